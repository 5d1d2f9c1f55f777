#define VITREG_ISA baseline
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg {

namespace baseline {

extern const NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};

}  // namespace baseline

const Kernels kBaseline{&baseline::kResidualNorm};

}  // namespace vitreg
