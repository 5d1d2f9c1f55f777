// Rows of numbers (tokens) packed as operands of the products in products.h.
//
// Symbols: n rows of D numbers. A row's words are its numbers, or pairs of them; a column's likewise.
#pragma once

#include "products.h"
#if defined(VITREG_AMX)
#include "amx.h"
#endif
#include "transpose.h"

namespace vitreg::VITREG_ISA {

constexpr int up_to(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class Op>
constexpr int words(int numbers) {
    return up_to(numbers, Op::kPerWord * Op::kStep) / Op::kPerWord;
}

template <class T>
struct Rows {
    const T* data = nullptr;
    ptrdiff_t stride = 0;  // from row to row; numbers of a row are neighbours
    int count = 0;

    const T* operator[](int i) const { return data + i * stride; }
};

// Whether rows of so many numbers, as they lie, are rows of whole words.
template <class Op, class T>
inline bool are_words(const Rows<T>& rows, int numbers) {
    return sizeof(T) * Op::kPerWord == sizeof(float) && numbers % Op::kPerWord == 0 && rows.stride % Op::kPerWord == 0;
}

// One row as words, zeros in what is left of them.
template <class Op, class T>
inline void pack_words(float* to, const T* row, int numbers) {
    if constexpr (Op::kPerWord == 1) {
        for (int d = 0; d < numbers; d += kLanes) store_some(to + d, some_of(row, d, numbers - d), numbers - d);
    } else {
        for (int i = numbers / 2; i < words<Op>(numbers); ++i) to[i] = 0.0f;
        __builtin_memcpy(to, row, numbers * sizeof(T));
    }
}

// The left operand: [n][words of D].
template <class Op, class T>
inline void pack_left(float* to, const Rows<T>& rows, int numbers) {
    for (int i = 0; i < rows.count; ++i) pack_words<Op>(to + i * words<Op>(numbers), rows[i], numbers);
}

// The right operand whose columns are the rows' numbers: panels of [words of n][width vectors].
template <class Op, class T>
inline void pack_right(float* to, const Rows<T>& rows, int numbers) {
    const int vectors = up_to(numbers, kLanes) / kLanes;
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v);
        for (int i = 0; i < rows.count; i += Op::kPerWord) {
            for (int w = 0; w < width; ++w, to += kLanes) {
                const int first = (v + w) * kLanes;
                const F32 a = some_of(rows[i], first, numbers - first);
                if constexpr (Op::kPerWord == 1)
                    store(to, a);
                else
                    Op::store_words(to, a, i + 1 < rows.count ? some_of(rows[i + 1], first, numbers - first) : zero());
            }
        }
        const int beyond = words<Op>(rows.count) - (rows.count + Op::kPerWord - 1) / Op::kPerWord;
        __builtin_memset(to, 0, beyond * width * kLanes * sizeof(float));
        to += beyond * width * kLanes;
        v += width;
    }
}

// The right operand whose columns are the rows themselves: panels of [words of D][width vectors], zeros beyond the
// n-th. `stage` holds kLanes rows of words.
template <class Op, class T>
inline void pack_right_transposed(float* to, const Rows<T>& rows, int numbers, float* stage) {
    const int vectors = up_to(rows.count, kLanes) / kLanes, length = words<Op>(numbers);
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v);
        for (int w = 0; w < width; ++w) {
            const int begin = (v + w) * kLanes, count = rows.count - begin < kLanes ? rows.count - begin : kLanes;
            float* panel = to + w * kLanes;
            if (count == kLanes && are_words<Op>(rows, numbers) && numbers % (kLanes * Op::kPerWord) == 0) {
                const float* from = reinterpret_cast<const float*>(rows[begin]);
                for (int k = 0; k < length; k += kLanes)
                    transpose(panel + k * width * kLanes, width * kLanes, from + k, rows.stride / Op::kPerWord);
                continue;
            }
            pack_left<Op>(stage, Rows<T>{rows[begin], rows.stride, count}, numbers);
            __builtin_memset(stage + count * length, 0, (kLanes - count) * length * sizeof(float));
            int k = 0;
            for (; k + kLanes <= length; k += kLanes)
                transpose(panel + k * width * kLanes, width * kLanes, stage + k, length);
            for (; k < length; ++k)
                for (int i = 0; i < kLanes; ++i) panel[k * width * kLanes + i] = stage[i * length + k];
        }
        to += width * kLanes * length;
        v += width;
    }
}

// The left operand whose rows are the rows' numbers, of pairs: [D, to whole vectors][words of n]. `stage` holds kLanes
// times as many words.
template <class Op, class T>
inline void pack_left_transposed(float* to, const Rows<T>& rows, int numbers, float* stage) {
    const int length = words<Op>(rows.count);
    for (int d = 0; d < numbers; d += kLanes) {
        for (int k = 0; k < length; k += kLanes) {
            for (int i = 0; i < kLanes; ++i) {
                const int row = (k + i) * Op::kPerWord;
                const F32 a = row < rows.count ? some_of(rows[row], d, numbers - d) : zero();
                const F32 b = row + 1 < rows.count ? some_of(rows[row + 1], d, numbers - d) : zero();
                Op::store_words(stage + i * kLanes, a, b);
            }
            transpose(to + d * length + k, length, stage, kLanes);
        }
    }
}

// The other sign of all words.
template <class Op>
inline void negate(float* x, int count) {
    for (int i = 0; i < count; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, x + i, sizeof word);
        word ^= Op::kPerWord == 1 ? 0x80000000u : 0x80008000u;
        __builtin_memcpy(x + i, &word, sizeof word);
    }
}

}  // namespace vitreg::VITREG_ISA
