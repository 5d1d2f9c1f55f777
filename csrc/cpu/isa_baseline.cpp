#define VITREG_ISA baseline
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg {

namespace baseline {

extern const NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};

AttentionKernels attention(Dtype dtype) { return attention_kernels(dtype); }

}  // namespace baseline

const Kernels kBaseline{&baseline::kResidualNorm, baseline::attention};

}  // namespace vitreg
