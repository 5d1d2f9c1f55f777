// Two vectors of neighbouring numbers. What walks along rows goes by pairs: 2 * kLanes numbers of 16 bits fill the
// widest register, in which they are read, rounded and written all at once.
//
//   Pair                  used like F32, which stands for a pair of the same
//   load_pair(p)          2 * kLanes elements of float, bf16 or fp16
//   put<streamed>(p, v)   writes them, past the caches if so, and gives what is then read there
#pragma once

#include "vec.h"

namespace vitreg::VITREG_ISA {

struct Pair {
    F32 low, high;

    Pair(F32 both) : low(both), high(both) {}
    Pair(F32 low, F32 high) : low(low), high(high) {}

    [[gnu::always_inline]] friend Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
    [[gnu::always_inline]] friend Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
    [[gnu::always_inline]] friend Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
};

[[gnu::always_inline]] inline Pair fma(Pair a, Pair b, Pair c) {
    return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

#if defined(__AVX512F__)

namespace detail {

template <class T>
[[gnu::always_inline]] inline Pair widen(const T* type, __m512i v) {
    return {widen(type, _mm512_castsi512_si256(v)), widen(type, _mm512_extracti64x4_epi64(v, 1))};
}
[[gnu::always_inline]] inline Pair widen(const bf16*, __m512i v) {
    // Each number above 16 bits of zeros.
    const __m512i low = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, low, v)),
            _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, high, v))};
}

template <class T>
[[gnu::always_inline]] inline __m512i halves(const T* type, Pair v) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(type, v.low)), narrow(type, v.high), 1);
}
[[gnu::always_inline]] inline __m512i narrow(const fp16* type, Pair v) { return halves(type, v); }
[[gnu::always_inline]] inline __m512i narrow(const bf16* type, Pair v) {
#if defined(__AVX512BF16__)
    if (__builtin_expect(!subnormal(v.low) && !subnormal(v.high), 1))
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.high, v.low));
#endif
    return halves(type, v);
}

}  // namespace detail

#endif

template <class T>
[[gnu::always_inline]] inline Pair load_pair(const T* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(bf16)) return detail::widen(p, _mm512_loadu_si512(p));
#endif
    return {load(p), load(p + kLanes)};
}

template <bool kStreamed, class T>
[[gnu::always_inline]] inline Pair put(T* p, Pair v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == sizeof(bf16)) {
        const __m512i bits = detail::narrow(p, v);
        if constexpr (kStreamed)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
        else
            _mm512_storeu_si512(p, bits);
        return detail::widen(p, bits);
    }
#endif
    if constexpr (kStreamed) {
        stream(p, v.low);
        stream(p + kLanes, v.high);
    } else {
        store(p, v.low);
        store(p + kLanes, v.high);
    }
    return {rounded<T>(v.low), rounded<T>(v.high)};
}

}  // namespace vitreg::VITREG_ISA
