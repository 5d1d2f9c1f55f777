// One vector of fp32 lanes, as wide as the instruction set that the including file is compiled for, and how the three
// dtypes are read into it and written from it. Every kernel is written with what stands here.
//
// A file of one instruction set defines VITREG_ISA, the namespace of all its code, so that no two of them share a
// symbol. For the same reason nothing here, and nothing that is compiled beside it, may use an inline function of the
// standard library: the linker would keep one copy of it, perhaps one that this CPU cannot run.
//
//   F32                       a vector of kLanes floats; + - * / and comparisons are the compiler's own
//   broadcast(x) zero()
//   load(p) store(p, v)       kLanes elements of float, bf16 or fp16; no alignment asked for
//   load_first(p, n)          n <= kLanes elements, zeros after them; touches no memory beyond
//   store_first(p, v, n)      likewise
//   some_of(row, first, n)   elements from the first-th, as many of n as there are lanes, zeros after them
//   store_some(p, v, n)       as many of n elements as there are lanes
//   first_lanes(v, n)         v in its first n <= kLanes lanes, zero in the others
//   rounded<T>(v)             v as store would round it to T, ties to even; NaN stays NaN if it is quiet, as all computed ones are
//   fma(a, b, c)              a * b + c, in one rounding where the CPU can
//   max(a, b) min(a, b)       of lanes, b where either is NaN
//   sum(v) max_of(v)          over the lanes
//   stream(p, v)              store past the caches; p is a multiple of what is written, sizeof(*p) * kLanes
//   stream_done()             what was streamed is visible to others afterwards
#pragma once

#ifndef VITREG_ISA
#error "define VITREG_ISA, the namespace of this instruction set, before including vec.h"
#endif

#include <cstddef>
#include <cstdint>

#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vitreg::VITREG_ISA {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using F32 = __m512;

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline float sum(F32 v) { return _mm512_reduce_add_ps(v); }
inline float max_of(F32 v) { return _mm512_reduce_max_ps(v); }

namespace detail {

inline __mmask16 first(size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F32 widen(const bf16*, __m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline F32 widen(const fp16*, __m256i v) { return _mm512_cvtph_ps(v); }

// The upper half of each lane is v in bf16.
inline __m512i rounded_bits(F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, half);
}
#if defined(__AVX512BF16__)
inline bool subnormal(F32 v) { return _mm512_fpclass_ps_mask(v, 0x20) != 0; }
#endif
inline __m256i narrow(const bf16*, F32 v) {
#if defined(__AVX512BF16__)
    // Which takes a subnormal number for zero.
    if (__builtin_expect(!subnormal(v), 1)) return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
    const __m512i upper = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                           0xb0009, 0x70005, 0x30001);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded_bits(v)));
}
inline __m256i narrow(const fp16*, F32 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace detail

inline F32 first_lanes(F32 v, size_t n) { return _mm512_maskz_mov_ps(detail::first(n), v); }

inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load_first(const float* p, size_t n) { return _mm512_maskz_loadu_ps(detail::first(n), p); }
inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, F32 v) { _mm512_stream_ps(p, v); }
inline void store_first(float* p, F32 v, size_t n) { _mm512_mask_storeu_ps(p, detail::first(n), v); }

template <class T>
inline F32 load(const T* p) {
    return detail::widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
inline F32 load_first(const T* p, size_t n) {
    return detail::widen(p, _mm256_maskz_loadu_epi16(detail::first(n), p));
}
template <class T>
inline void store(T* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), detail::narrow(p, v));
}
template <class T>
inline void stream(T* p, F32 v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), detail::narrow(p, v));
}
template <class T>
inline void store_first(T* p, F32 v, size_t n) {
    _mm256_mask_storeu_epi16(p, detail::first(n), detail::narrow(p, v));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using F32 = __m256;

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 broadcast(float x) { return _mm256_set1_ps(x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline float sum(F32 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float max_of(F32 v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

namespace detail {

inline __m256i first(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32 widen(const bf16*, __m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline F32 widen(const fp16*, __m128i v) { return _mm256_cvtph_ps(v); }

inline __m128i narrow(const bf16*, F32 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_and_si256(number, half)), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(const fp16*, F32 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace detail

inline F32 first_lanes(F32 v, size_t n) { return _mm256_and_ps(v, _mm256_castsi256_ps(detail::first(n))); }

inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 load_first(const float* p, size_t n) { return _mm256_maskload_ps(p, detail::first(n)); }
inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, F32 v) { _mm256_stream_ps(p, v); }
inline void store_first(float* p, F32 v, size_t n) { _mm256_maskstore_ps(p, detail::first(n), v); }

template <class T>
inline F32 load(const T* p) {
    return detail::widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
inline F32 load_first(const T* p, size_t n) {
    alignas(16) T some[kLanes] = {};
    for (size_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}
template <class T>
inline void store(T* p, F32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), detail::narrow(p, v));
}
template <class T>
inline void stream(T* p, F32 v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), detail::narrow(p, v));
}
template <class T>
inline void store_first(T* p, F32 v, size_t n) {
    alignas(16) T some[kLanes];
    store(some, v);
    for (size_t i = 0; i < n; ++i) p[i] = some[i];
}

#else  // any CPU: four lanes of the compiler's own vectors, which are SSE on x86-64 and NEON on AArch64

constexpr int kLanes = 4;
typedef float F32 __attribute__((vector_size(16)));

namespace detail {

typedef uint32_t U32 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));  // what a comparison gives: all bits or none

inline U32 chosen(I32 condition, U32 yes, U32 no) { return ((U32)condition & yes) | (~(U32)condition & no); }

inline F32 widen(const bf16*, U32 v) { return (F32)(v << 16); }
inline F32 widen(const fp16*, U32 v) {
    const U32 magnitude = v & 0x7fffu;
    // The exponent is 112 too small as it stands; multiplying puts subnormal numbers right as well.
    const F32 finite = (F32)(magnitude << 13) * 0x1p112f;
    const U32 bits = chosen(magnitude >= 0x7c00u, (magnitude << 13) | 0x7f800000u, (U32)finite);
    return (F32)(bits | ((v & 0x8000u) << 16));
}

inline U32 narrow(const bf16*, F32 v) {
    const U32 bits = (U32)v;
    return (bits + ((U32)(v == v) & (0x7fffu + ((bits >> 16) & 1u)))) >> 16;
}
inline U32 narrow(const fp16*, F32 v) {
    const U32 bits = (U32)v & 0x7fffffffu, sign = ((U32)v >> 16) & 0x8000u;
    // Below 2^-14 adding a half makes the last bit of the sum the last bit of the subnormal; the adder rounds.
    const U32 subnormal = (U32)((F32)bits + 0.5f) - 0x3f000000u;
    const U32 normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const U32 special = chosen(bits > 0x7f800000u, U32{} + 0x7e00u, U32{} + 0x7c00u);
    const U32 small = chosen(bits < 113u << 23, subnormal, normal);
    return chosen(bits >= 143u << 23, special, small) | sign;
}

}  // namespace detail

inline F32 zero() { return F32{}; }
inline F32 broadcast(float x) { return F32{x, x, x, x}; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 max(F32 a, F32 b) { return (F32)detail::chosen(a > b, (detail::U32)a, (detail::U32)b); }
inline F32 min(F32 a, F32 b) { return (F32)detail::chosen(a < b, (detail::U32)a, (detail::U32)b); }
inline float sum(F32 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float max_of(F32 v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}

inline F32 load(const float* p) {
    F32 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, F32 v) { __builtin_memcpy(p, &v, sizeof v); }
inline void stream(float* p, F32 v) {
#if defined(__x86_64__)
    _mm_stream_ps(p, v);
#else
    store(p, v);
#endif
}

template <class T>
inline F32 load(const T* p) {
    return detail::widen(p, detail::U32{p[0].bits, p[1].bits, p[2].bits, p[3].bits});
}
template <class T>
inline void store(T* p, F32 v) {
    const detail::U32 bits = detail::narrow(p, v);
    for (size_t i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(bits[i]);
}
template <class T>
inline void stream(T* p, F32 v) {
#if defined(__x86_64__)
    T some[kLanes];
    store(some, v);
    long long bits;
    __builtin_memcpy(&bits, some, sizeof bits);
    _mm_stream_si64(reinterpret_cast<long long*>(p), bits);
#else
    store(p, v);
#endif
}
template <class T>
inline F32 load_first(const T* p, size_t n) {
    T some[kLanes] = {};
    for (size_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
}
template <class T>
inline void store_first(T* p, F32 v, size_t n) {
    T some[kLanes];
    store(some, v);
    for (size_t i = 0; i < n; ++i) p[i] = some[i];
}

inline F32 first_lanes(F32 v, size_t n) {
    for (size_t i = n; i < kLanes; ++i) v[i] = 0.0f;
    return v;
}

#endif

template <class T>
inline F32 rounded(F32 v) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return v;
    } else {
        return detail::widen(static_cast<const T*>(nullptr), detail::narrow(static_cast<const T*>(nullptr), v));
    }
}

template <class T>
inline F32 some_of(const T* row, int first, int count) {
    if (count >= kLanes) return load(row + first);
    return count > 0 ? load_first(row + first, count) : zero();
}

template <class T>
inline void store_some(T* to, F32 v, int count) {
    if (count >= kLanes)
        store(to, v);
    else
        store_first(to, v, count);
}

inline void stream_done() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#if defined(__AVX512F__)
template <>
inline F32 rounded<bf16>(F32 v) {
    return _mm512_castsi512_ps(_mm512_and_si512(detail::rounded_bits(v), _mm512_set1_epi32(int(0xffff0000))));
}
#endif

}  // namespace vitreg::VITREG_ISA
