// 2^x for x <= 0, as the softmax needs it.
//
// x = n + r with n whole and |r| <= 1/2; 2^r by a polynomial of degree 5 (Remez, in relative error). The relative error
// is below 2^-22 from -100 to 0; what lies below -100, -inf among it, gives 2^-100, which is nothing beside the 1 that
// every row of a softmax holds. NaN stays NaN.
#pragma once

#include "vec.h"

namespace vitreg::VITREG_ISA {

constexpr float kLog2E = 1.44269504f;

namespace detail {

#if defined(__AVX512F__)
inline F32 shifted_to_exponent(F32 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }
#elif defined(__AVX2__)
inline F32 shifted_to_exponent(F32 v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }
#else
inline F32 shifted_to_exponent(F32 v) { return (F32)((U32)v << 23); }
#endif

}  // namespace detail

[[gnu::always_inline]] inline F32 exp2_of_nonpositive(F32 x) {
    // Adding it rounds to a whole number, which then stands, with the bias of the exponent, in the lowest bits.
    const F32 magic = broadcast(0x1.8p23f + 127);
    x = max(broadcast(-100.0f), x);
    const F32 n = x + magic;
    const F32 r = x - (n - magic);
    F32 p = broadcast(0x1.5c08dep-10f);
    p = fma(p, r, broadcast(0x1.3d0c52p-7f));
    p = fma(p, r, broadcast(0x1.c6b6e6p-5f));
    p = fma(p, r, broadcast(0x1.ebf918p-3f));
    p = fma(p, r, broadcast(0x1.62e428p-1f));
    p = fma(p, r, broadcast(1.0f));
    return p * detail::shifted_to_exponent(n);
}

}  // namespace vitreg::VITREG_ISA
