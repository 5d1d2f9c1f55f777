#define VITREG_ISA avx2
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg {

namespace avx2 {

extern const NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};

AttentionKernels attention(Dtype dtype) { return attention_kernels(dtype); }

}  // namespace avx2

const Kernels kAvx2{&avx2::kResidualNorm, avx2::attention};

}  // namespace vitreg
