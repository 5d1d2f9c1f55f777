#define VITREG_ISA avx512bf16
#include "kernels.h"

namespace vitreg {

namespace avx512 {

extern const NormKernels kResidualNorm;  // has no use for products of bf16

}  // namespace avx512

const Kernels kAvx512Bf16{&avx512::kResidualNorm};

}  // namespace vitreg
