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

// kRows by kColumns tiles, two by two at most: C in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
template <int kRows, int kColumns>
inline void multiply(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, const float* b, ptrdiff_t b_row,
                     int steps, bool add) {
    float *right = c + kSide, *below = c + kSide * c_row, *across = below + kSide;
    // A tile cleared by tilezero makes the next product wait for all before it; one that is loaded does not.
    const ptrdiff_t from_row = add ? c_row : 0;
    load<0>(add ? c : kZeros, from_row);
    if (kColumns == 2) load<1>(add ? right : kZeros, from_row);
    if (kRows == 2) load<2>(add ? below : kZeros, from_row);
    if (kRows == 2 && kColumns == 2) load<3>(add ? across : kZeros, from_row);
    for (int k = 0; k < steps; k += kSide, a += kSide, b += kSide * b_row) {
        load<4>(a, a_row);
        load<6>(b, b_row);
        add_product<0, 4, 6>();
        if (kColumns == 2) load<7>(b + kSide, b_row);
        if (kColumns == 2) add_product<1, 4, 7>();
        if (kRows == 2) load<5>(a + kSide * a_row, a_row);
        if (kRows == 2) add_product<2, 5, 6>();
        if (kRows == 2 && kColumns == 2) add_product<3, 5, 7>();
    }
    store<0>(c, c_row);
    if (kColumns == 2) store<1>(right, c_row);
    if (kRows == 2) store<2>(below, c_row);
    if (kRows == 2 && kColumns == 2) store<3>(across, c_row);
}

}  // namespace tile

struct Amx : Dot {
    static constexpr int kBlock = 32, kStep = 16;
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

    // C[rows, columns] = A B, or C += A B. Rows and columns are whole tiles to it.
    static void multiply(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, int rows, const float* b,
                         ptrdiff_t b_row, int vectors, int steps, bool add) {
        constexpr int kSide = tile::kSide;
        for (int v = 0; v < vectors; v += 2) {
            for (int r = 0; r < rows; r += 2 * kSide) {
                const bool right = v + 1 < vectors, below = r + kSide < rows;
                const auto run = right && below ? tile::multiply<2, 2>
                                 : right        ? tile::multiply<1, 2>
                                 : below        ? tile::multiply<2, 1>
                                                : tile::multiply<1, 1>;
                run(c + r * c_row + v * kSide, c_row, a + r * a_row, a_row, b + v * kSide, b_row, steps, add);
            }
        }
    }
};

// The words of a row of A are neighbours: `a_k` is 1.
template <>
inline void multiply<Amx>(float* c, ptrdiff_t c_row, const float* a, ptrdiff_t a_row, ptrdiff_t, int rows,
                          const float* b, int vectors, ptrdiff_t panel, int first, int steps, bool add) {
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v), b_row = width * kLanes;
        Amx::multiply(c + v * kLanes, c_row, a, a_row, rows, b + first * b_row, b_row, width, steps, add);
        b += b_row * panel;
        v += width;
    }
}

}  // namespace vitreg::VITREG_ISA
