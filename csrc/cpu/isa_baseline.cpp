#define VITREG_ISA baseline
#include "assemble_kernels.h"
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"
#include "token_norms_kernels.h"

namespace vitreg {

namespace baseline {

constexpr NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};
constexpr TokenNormKernels kTokenNorms{token_norms::norms, token_norms::count};
constexpr AssembleKernels kAssemble{assemble::forward, assemble::backward};

AttentionKernels attention(Dtype dtype) { return attention_kernels(dtype); }

}  // namespace baseline

const Kernels kBaseline{&baseline::kResidualNorm, &baseline::kTokenNorms, &baseline::kAssemble, baseline::attention};

}  // namespace vitreg
