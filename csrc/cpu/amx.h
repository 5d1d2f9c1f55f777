// Matrix products by AMX, where a CPU has it: tiles of 16 rows of 16 words, and one instruction for a product of two.
//
// Of the left operand a tile holds 16 rows of 16 words (32 bf16), of the right one 16 words of 16 columns: just as
// products.h lays both out, as long as there are words by the 16. So rows of words are padded with zeros to that.
//
// In assembly: compilers name tiles by literals only, some let a tile be loaded before what it loads is stored, and older
// ones know neither the instructions nor one macro for them. So isa_amx.cpp defines VITREG_AMX.
#pragma once

#include "products.h"

namespace vitreg::VITREG_ISA {

namespace tile {

constexpr int kSide = 16;  // rows, and words in each
alignas(64) constexpr float kZeros[kSide] = {};

// A row every `stride` words.
template <int kTile>
[[gnu::always_inline]] inline void load(const float* from, ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(stride * sizeof(float)), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void store(float* to, ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(stride * sizeof(float)), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
[[gnu::always_inline]] inline void add_product() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

// kRows by kColumns tiles of C, in tiles 0 to 3, and what A, in 4 and 5, and B, in 6 and 7, add to them. Either may be
// there from the product before.
template <int kRows, int kColumns, bool kLoadA = true, bool kLoadB = true>
[[gnu::always_inline]] inline void add_products(const float* a, ptrdiff_t a_row, const float* b, ptrdiff_t b_row) {
    if (kLoadA) load<4>(a, a_row);
    if (kLoadB) load<6>(b, b_row);
    add_product<0, 4, 6>();
    if (kColumns == 2 && kLoadB) load<7>(b + kSide, b_row);
    if (kColumns == 2) add_product<1, 4, 7>();
    if (kRows == 2 && kLoadA) load<5>(a + kSide * a_row, a_row);
    if (kRows == 2) add_product<2, 5, 6>();
    if (kRows == 2 && kColumns == 2) add_product<3, 5, 7>();
}

// All words of a step: of one part, or of three, high, middle and low. Of the nine products of those the three least are
// left out, which are at most 2^-21 of the whole and 2^-24 on average.
template <int kParts, int kRows, int kColumns>
[[gnu::always_inline]] inline void add_step(const float* a, ptrdiff_t a_row, const float* b, ptrdiff_t b_row) {
    if constexpr (kParts == 1) {
        add_products<kRows, kColumns>(a, a_row, b, b_row);
    } else {
        const float *a_middle = a + kSide, *a_low = a_middle + kSide;
        const float *b_middle = b + kSide * b_row, *b_low = b_middle + kSide * b_row;
        add_products<kRows, kColumns>(a_low, a_row, b, b_row);
        add_products<kRows, kColumns, true, false>(a, a_row, b, b_row);
        add_products<kRows, kColumns, false>(a, a_row, b_low, b_row);
        add_products<kRows, kColumns, false>(a, a_row, b_middle, b_row);
        add_products<kRows, kColumns, true, false>(a_middle, a_row, b_middle, b_row);
        add_products<kRows, kColumns, false>(a_middle, a_row, b, b_row);
    }
}

// kRows by kColumns tiles of C, two by two at most.
template <int kParts, int kRows, int kColumns>
inline void multiply(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* b,
                     ptrdiff_t b_row, int steps, bool add) {
    float *right = c + kSide, *below = c + kSide * c_row, *across = below + kSide;
    // A tile cleared by tilezero makes the next product wait for all before it; one that is loaded does not.
    const ptrdiff_t from_row = add ? c_row : 0;
    load<0>(add ? c : kZeros, from_row);
    if (kColumns == 2) load<1>(add ? right : kZeros, from_row);
    if (kRows == 2) load<2>(add ? below : kZeros, from_row);
    if (kRows == 2 && kColumns == 2) load<3>(add ? across : kZeros, from_row);
    for (int k = 0; k < steps; k += kParts * kSide, a += a_step, b += kParts * kSide * b_row)
        add_step<kParts, kRows, kColumns>(a, a_row, b, b_row);
    store<0>(c, c_row);
    if (kColumns == 2) store<1>(right, c_row);
    if (kRows == 2) store<2>(below, c_row);
    if (kRows == 2 && kColumns == 2) store<3>(across, c_row);
}

}  // namespace tile

struct Amx : Dot {
    static constexpr int kBlock = 32, kItem = 4 * kBlock, kStep = 16;
    static constexpr bool kTiles = true;

    // While it lives, its thread has the tiles: eight, of the full size.
    class Session {
    public:
        Session() {
            struct alignas(64) {
                uint8_t palette = 1, start_row = 0, reserved[14] = {};
                uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
                uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
            } config;
            __asm__ volatile("ldtilecfg %0" ::"m"(config));
        }
        Session(const Session&) = delete;
        Session& operator=(const Session&) = delete;
        ~Session() { __asm__ volatile("tilerelease"); }
    };
};

// fp32 in three bf16: the 24 bits of a number are cut into 8, 8 and 8, which is exact, and six of the nine products of
// such parts are what fp32 holds of a product. By the peaks of both that is 2.6 times as fast as vectors multiply fp32.
// A step of 32 numbers is 16 words of high parts, 16 of middle and 16 of low ones; the i-th of each holds those of numbers
// i and i + 16. Parts of an infinity are not numbers, see attention_parts.h. What is below 2^-126, a part, a product or a
// sum, counts as 0: a number below 2^-103 has fewer bits.
//
// Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations" (arXiv 1904.06376).
struct AmxInParts : Amx {
    static constexpr int kItem = Fma::kItem, kParts = 3, kApart = kLanes;
    static constexpr int first_number(int word) { return word; }

    // Words of which a gives the first numbers and b the second: of each part, `part` words after those of the part before.
    [[gnu::always_inline]] static void store_words(float* p, ptrdiff_t part, F32 a, F32 b) {
#pragma GCC unroll 3
        for (int i = 0; i < kParts; ++i, p += part) {
            const F32 a_high = high(a), b_high = high(b);
            Dot::store_words(p, part, a_high, b_high);
            a = a - a_high;
            b = b - b_high;
        }
    }
    [[gnu::always_inline]] static void store_pair(float* p, F32 a, F32 b) { store_words(p, kStep, a, b); }
    [[gnu::always_inline]] static void store_one(float* p, F32 a) { store_pair(p, a, zero()); }
    [[gnu::always_inline]] static void store_rows(float* x_row, float* y_row, float* pairs, ptrdiff_t part,
                                                  const F32 (&x)[2], const F32 (&y)[2]) {
        if (x_row) store_pair(x_row, x[0], x[1]);
        if (y_row) store_pair(y_row, y[0], y[1]);
        store_words(pairs, part, x[0], y[0]);
        store_words(pairs + kLanes, part, x[1], y[1]);
    }

private:
    // Its sign, its exponent and the first 8 bits.
    [[gnu::always_inline]] static F32 high(F32 x) {
        return _mm512_castsi512_ps(
            _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
};

template <class Op>
inline void multiply_tiles(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, int rows,
                           const float* b, ptrdiff_t b_row, int vectors, int steps, bool add) {
    constexpr int kSide = tile::kSide, kParts = Op::kParts;
    for (int v = 0; v < vectors; v += 2) {
        for (int r = 0; r < rows; r += 2 * kSide) {
            const bool right = v + 1 < vectors, below = r + kSide < rows;
            const auto run = right && below ? tile::multiply<kParts, 2, 2>
                             : right        ? tile::multiply<kParts, 1, 2>
                             : below        ? tile::multiply<kParts, 2, 1>
                                            : tile::multiply<kParts, 1, 1>;
            run(c + r * c_row + v * kSide, c_row, a + r * a_row, a_row, a_step, b + v * kSide, b_row, steps, add);
        }
    }
}

}  // namespace vitreg::VITREG_ISA
