#define VITREG_ISA avx512bf16
#include "attention_kernels.h"
#include "kernels.h"

namespace vitreg {

namespace avx512 {

// What makes no use of products of bf16.
extern const NormKernels kResidualNorm;
extern const TokenNormKernels kTokenNorms;
extern const AssembleKernels kAssemble;
AttentionKernels attention(Dtype dtype);

}  // namespace avx512

namespace avx512bf16 {

AttentionKernels attention(Dtype dtype) {
    return dtype == Dtype::bf16 ? Attend<Dot, bf16>::kernels() : avx512::attention(dtype);
}

}  // namespace avx512bf16

const Kernels kAvx512Bf16{&avx512::kResidualNorm, &avx512::kTokenNorms, &avx512::kAssemble, avx512bf16::attention};

}  // namespace vitreg
