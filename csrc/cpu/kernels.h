// What each instruction set offers: the tables that the files isa_<name>.cpp define.
#pragma once

#include "assemble.h"
#include "attention.h"
#include "residual_norm.h"
#include "token_norms.h"

namespace vitreg {

struct Kernels {
    const NormKernels* residual_norm;
    const TokenNormKernels* token_norms;
    const AssembleKernels* assemble;
    AttentionKernels (*attention)(Dtype);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmx;
#endif

// Those that this process runs, see cpuid.h.
const Kernels& kernels();

}  // namespace vitreg
