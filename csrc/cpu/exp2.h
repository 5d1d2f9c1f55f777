// 2^x for x <= 0, as the softmax needs it.
//
// x = n + r with n whole and 0 <= r <= 1; 2^r by a polynomial of degree 5, 1 at 0 and otherwise of the least relative
// error (Remez). The relative error of the result is below 2^-22 from -100 to 0. Below -100, at -inf too, the result
// is at most 2^-100, which is nothing beside the 1 that every row of a softmax holds. NaN stays NaN. Where rounding has
// made x a little positive the same bound holds, to x = 100.
#pragma once

#include "vec.h"

namespace vitreg::VITREG_ISA {

constexpr float kLog2E = 1.44269504f;

// Several at once, step by step: one alone is a chain of operations that wait for each other.
template <int kCount>
[[gnu::always_inline]] inline void exp2_of_nonpositive(F32 (&x)[kCount]) {
    F32 r[kCount], p[kCount];
#if defined(__AVX512F__)
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) r[i] = _mm512_reduce_ps(x[i], _MM_FROUND_TO_NEG_INF);
#else
    // Adding `magic` rounds to a whole number, which then stands, with the bias of the exponent, in the lowest bits.
    const F32 magic = broadcast(0x1.8p23f + 127);
    F32 n[kCount];
    for (int i = 0; i < kCount; ++i) {
        x[i] = max(broadcast(-100.0f), x[i]);
        n[i] = (x[i] - broadcast(0.5f)) + magic;
        r[i] = x[i] - (n[i] - magic);
    }
#endif
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = fma(broadcast(0x1.e97506p-10f), r[i], broadcast(0x1.277852p-7f));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], broadcast(0x1.c91ce8p-5f));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], broadcast(0x1.ebdb56p-3f));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], broadcast(0x1.62e4bap-1f));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) p[i] = fma(p[i], r[i], broadcast(1.0f));
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
#if defined(__AVX512F__)
        x[i] = _mm512_scalef_ps(p[i], x[i]);
#elif defined(__AVX2__)
        x[i] = p[i] * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n[i]), 23));
#else
        x[i] = p[i] * (F32)((detail::U32)n[i] << 23);
#endif
    }
}

[[gnu::always_inline]] inline F32 exp2_of_nonpositive(F32 x) {
    F32 one[1] = {x};
    exp2_of_nonpositive(one);
    return one[0];
}

}  // namespace vitreg::VITREG_ISA
