// The whole of an isa_<name>.cpp but for its name: every kernel, compiled for one instruction set.
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg::VITREG_ISA {

constexpr Kernels kTable{{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks}};

}  // namespace vitreg::VITREG_ISA
