#define VITREG_ISA avx512
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg {

namespace avx512 {

extern const NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};

AttentionKernels attention(Dtype dtype) { return attention_kernels(dtype); }

}  // namespace avx512

const Kernels kAvx512{&avx512::kResidualNorm, avx512::attention};

}  // namespace vitreg
