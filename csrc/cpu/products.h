// Matrix products of small panels: the inner loops of attention.
//
// Everything is counted in words of 32 bits: a float, or a pair of bf16 that is multiplied and added in one step. A
// product C[rows, columns] = sum over k of A[row, k] B[k, columns] takes A by single words, which are broadcast, and B
// by packed panels: `width` vectors of columns, row after row. A tile of C of as many rows as fill the registers stays
// in them for the whole sum.
//
//   Fma, Dot        how words are multiplied
//   panel_width(n)  width of the next panel when n vectors of columns are left
//   Tile<Op, R, W>  R rows by W vectors
//   with_width      calls a function template with a width known to the compiler
#pragma once

#include "vec.h"

namespace vitreg::VITREG_ISA {

// Lanes of `a` before the n-th, of `b` from there on.
#if defined(__AVX512F__)
inline F32 first_of(F32 a, F32 b, int n) { return _mm512_mask_mov_ps(b, detail::first(n), a); }
#elif defined(__AVX2__)
inline F32 first_of(F32 a, F32 b, int n) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(detail::first(n))); }
#else
inline F32 first_of(F32 a, F32 b, int n) {
    for (int i = n; i < kLanes; ++i) a[i] = b[i];
    return a;
}
#endif

// Rows that are worked on together, a multiple of every tile's rows; those of an item of a call; and words that a sum
// advances by, its step. A number may be cut into parts, each of which has words of its own: a step is kStep words of
// the first part, then those of the next. `kTiles`: by AMX, see amx.h. A session lives as long as a thread multiplies.
struct OnVectors {
    static constexpr int kBlock = 24, kItem = 4 * kBlock, kStep = 1, kParts = 1;
    static constexpr bool kTiles = false;
    struct Session {};
};

struct Fma : OnVectors {
    static constexpr int kPerWord = 1;
    [[gnu::always_inline]] static F32 step(F32 a, F32 b, F32 c) { return fma(a, b, c); }
    [[gnu::always_inline]] static void store_pair(float* p, F32 a, F32 b) {
        store(p, a);
        store(p + kLanes, b);
    }
    [[gnu::always_inline]] static void store_one(float* p, F32 a) { store(p, a); }
};

#if defined(__AVX512BF16__)
struct Dot : OnVectors {
    // (i, i) in the i-th word.
    [[gnu::always_inline]] static __m512i lane_pairs() {
        return _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                  _mm512_set1_epi32(0x00010001));
    }
    // Which two numbers of a step a word holds: the first, and the one so far behind it.
    static constexpr int kPerWord = 2, kApart = 1;
    static constexpr int first_number(int word) { return 2 * word; }
    [[gnu::always_inline]] static F32 step(F32 a, F32 b, F32 c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    [[gnu::always_inline]] static void store_pair(float* p, F32 a, F32 b) {
        _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    }
    // Two rows of numbers as words of each row, if they are wanted, and as words of which x gives the first number and y the
    // second; these of each part `part` words after those of the part before.
    [[gnu::always_inline]] static void store_rows(float* x_row, float* y_row, float* pairs, ptrdiff_t /*part*/,
                                                  const F32 (&x)[2], const F32 (&y)[2]) {
        const __m512i a = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0]));
        const __m512i b = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y[1], y[0]));
        if (x_row) _mm512_storeu_si512(x_row, a);
        if (y_row) _mm512_storeu_si512(y_row, b);
        // Numbers 0 to 15 of both rows by turns, then 16 to 31.
        const __m512i step = _mm512_set1_epi32(0x00200000), first = _mm512_add_epi32(lane_pairs(), step);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x00100010));
        _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(pairs + kLanes, _mm512_permutex2var_epi16(a, second, b));
    }
    // Words of which a gives the first numbers and b the second, both of them bf16.
    [[gnu::always_inline]] static void store_words(float* p, ptrdiff_t /*part*/, F32 a, F32 b) {
        const __m512i first = _mm512_srli_epi32(_mm512_castps_si512(a), 16);
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        const __m512i second = _mm512_and_si512(_mm512_castps_si512(b), high);
        _mm512_storeu_si512(p, _mm512_or_si512(first, second));
    }
    // Its last word may have a partner beyond the row: a zero.
    [[gnu::always_inline]] static void store_one(float* p, F32 a) { store_pair(p, a, zero()); }
};
#endif

template <class Op>
constexpr int kNumbersOfStep = Op::kPerWord * Op::kStep;
template <class Op>
constexpr int kWordsOfStep = Op::kParts * Op::kStep;

// Accumulators of a tile: three quarters of the registers; the others hold a row of B and a word of A.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24, kWidest = 4;
#else
constexpr int kAccumulators = 12, kWidest = 2;
#endif

constexpr int rows_of_tile(int width) { return kAccumulators / width; }

// Never a panel of one vector after one of four: its tile would load a word of A for every product.
constexpr int panel_width(int vectors) {
    if (vectors == kWidest + 1 && kWidest > 2) return kWidest - 1;
    return vectors < kWidest ? vectors : kWidest;
}

template <int kWidth>
struct Width {
    static constexpr int value = kWidth;
};

template <class F>
[[gnu::always_inline]] inline void with_width(int width, F f) {
    if constexpr (kWidest > 2) {
        if (width == 4) return f(Width<4>{});
        if (width == 3) return f(Width<3>{});
    }
    if (width == 2) return f(Width<2>{});
    f(Width<1>{});
}

template <class Op, int kRows, int kWidth>
struct Tile {
    F32 c[kRows][kWidth];

    [[gnu::always_inline]] void clear() {
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < kWidth; ++w) c[r][w] = zero();
    }

    [[gnu::always_inline]] void read(const float* from, ptrdiff_t stride) {
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < kWidth; ++w) c[r][w] = load(from + r * stride + w * kLanes);
    }

    [[gnu::always_inline]] void write(float* to, ptrdiff_t stride) const {
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < kWidth; ++w) store(to + r * stride + w * kLanes, c[r][w]);
    }

    [[gnu::always_inline]] void add_product(const float* a, ptrdiff_t a_row, ptrdiff_t a_k, const float* b,
                                            ptrdiff_t steps) {
        for (; steps > 0; --steps, a += a_k, b += kWidth * kLanes) {
            F32 columns[kWidth];
#pragma GCC unroll 4
            for (int w = 0; w < kWidth; ++w) columns[w] = load(b + w * kLanes);
#pragma GCC unroll 24
            for (int r = 0; r < kRows; ++r) {
                const F32 word = broadcast(a[r * a_row]);
#pragma GCC unroll 4
                for (int w = 0; w < kWidth; ++w) c[r][w] = Op::step(word, columns[w], c[r][w]);
            }
        }
    }
};

// One panel of B, or of anything with a row every `b_row` words, by tiles; rows and columns are whole ones to it. The words
// of a row of A are neighbours in each step, and steps `a_step` words apart. In amx.h.
template <class Op>
inline void multiply_tiles(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, int rows,
                           const float* b, ptrdiff_t b_row, int vectors, int steps, bool add);

// C[rows, vectors] = A B, or C += A B: A[row, k] = a[row * a_row + k * a_k]; the panels of B are `panel` words long, of
// which `steps` from the `first` are used. C has room for rows up to the next multiple of Op::kBlock. For tiles, `a_k` is 1.
template <class Op>
inline void multiply(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, ptrdiff_t a_k, int rows,
                     const float* b, int vectors, ptrdiff_t panel, int first, int steps, bool add) {
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v), b_row = width * kLanes;
        if constexpr (Op::kTiles) {
            multiply_tiles<Op>(c + v * kLanes, c_row, a, a_row, kWordsOfStep<Op>, rows, b + first * b_row, b_row, width,
                               steps, add);
        } else {
            with_width(width, [&](auto w) {
                constexpr int kWidth = decltype(w)::value, kRows = rows_of_tile(kWidth);
                for (int r = 0; r < rows; r += kRows) {
                    float* to = c + r * c_row + v * kLanes;
                    Tile<Op, kRows, kWidth> tile;
                    if (add)
                        tile.read(to, c_row);
                    else
                        tile.clear();
                    tile.add_product(a + r * a_row, a_row, a_k, b + first * b_row, steps);
                    tile.write(to, c_row);
                }
            });
        }
        b += b_row * panel;
        v += width;
    }
}

}  // namespace vitreg::VITREG_ISA
