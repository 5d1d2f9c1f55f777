#define VITREG_ISA avx512
#include "assemble_kernels.h"
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"
#include "token_norms_kernels.h"

namespace vitreg {

namespace avx512 {

constexpr NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};
extern const TokenNormKernels kTokenNorms{token_norms::norms, token_norms::count};
constexpr AssembleKernels kAssemble{assemble::forward, assemble::backward};

AttentionKernels attention(Dtype dtype) { return attention_kernels(dtype); }

}  // namespace avx512

const Kernels kAvx512{&avx512::kResidualNorm, &avx512::kTokenNorms, &avx512::kAssemble, avx512::attention};

}  // namespace vitreg
