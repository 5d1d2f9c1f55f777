#define VITREG_ISA avx512bf16
#include "assemble_kernels.h"
#include "attention_kernels.h"
#include "kernels.h"
#include "residual_norm_backward.h"
#include "residual_norm_forward.h"

namespace vitreg {

namespace avx512 {

// What neither multiplies bf16 nor rounds to it.
extern const TokenNormKernels kTokenNorms;
AttentionKernels attention(Dtype dtype);

}  // namespace avx512

namespace avx512bf16 {

extern const NormKernels kResidualNorm{residual_norm::forward, residual_norm::backward, residual_norm::sum_blocks};
extern const AssembleKernels kAssemble{assemble::forward, assemble::backward};

AttentionKernels attention(Dtype dtype) {
    return dtype == Dtype::bf16 ? Attend<Dot, bf16>::kernels() : avx512::attention(dtype);
}

}  // namespace avx512bf16

const Kernels kAvx512Bf16{&avx512bf16::kResidualNorm, &avx512::kTokenNorms, &avx512bf16::kAssemble,
                          avx512bf16::attention};

}  // namespace vitreg
