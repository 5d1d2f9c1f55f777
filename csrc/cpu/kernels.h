// What each instruction set offers. One file isa_<name>.cpp defines each table.
#pragma once

#include "residual_norm.h"

namespace vitreg {

struct Kernels {
    NormKernels residual_norm;
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

// Those that this process runs, see cpuid.h.
const Kernels& kernels();

}  // namespace vitreg
