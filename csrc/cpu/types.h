// The dtypes that kernels read and write, as plain bits: what the template sources and the bindings have in common.
#pragma once

#include <cstdint>

namespace vitreg {

enum class Dtype : uint8_t { f32, bf16, f16 };

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

template <class T>
constexpr Dtype kDtypeOf = Dtype::f32;
template <>
constexpr Dtype kDtypeOf<bf16> = Dtype::bf16;
template <>
constexpr Dtype kDtypeOf<fp16> = Dtype::f16;

}  // namespace vitreg
