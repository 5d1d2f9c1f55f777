#define VITREG_ISA amx
#define VITREG_AMX
#include "attention_parts.h"
#include "kernels.h"

namespace vitreg {

// What does not multiply bf16.
namespace avx512 {
extern const TokenNormKernels kTokenNorms;
AttentionKernels attention(Dtype dtype);
}  // namespace avx512

namespace avx512bf16 {
extern const NormKernels kResidualNorm;
extern const AssembleKernels kAssemble;
}  // namespace avx512bf16

namespace amx {

AttentionKernels attention(Dtype dtype) {
    if (dtype == Dtype::bf16) return Attend<Amx, bf16>::kernels();
    if (dtype == Dtype::f16) return AttendInParts<AmxInParts, fp16, avx512::attention>::kernels();
    return AttendInParts<AmxInParts, float, avx512::attention>::kernels();
}

}  // namespace amx

const Kernels kAmx{&avx512bf16::kResidualNorm, &avx512::kTokenNorms, &avx512bf16::kAssemble, amx::attention};

}  // namespace vitreg
