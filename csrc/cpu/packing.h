// Rows of numbers (tokens) packed as operands of the products in products.h.
//
// Symbols: n rows of D numbers. A row's words are its numbers, or pairs of them, or those of their parts; a column's
// likewise.
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
    return up_to(numbers, kNumbersOfStep<Op>) / Op::kPerWord * Op::kParts;
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
    return sizeof(T) * Op::kPerWord == sizeof(float) && Op::kParts == 1 && numbers % Op::kPerWord == 0 &&
           rows.stride % Op::kPerWord == 0;
}

// One row as words, zeros in what is left of them.
template <class Op, class T>
inline void pack_words(float* to, const T* row, int numbers) {
    if constexpr (Op::kParts > 1) {
        for (int d = 0; d < numbers; d += kNumbersOfStep<Op>)
            Op::store_pair(to + words<Op>(d), some_of(row, d, numbers - d), some_of(row, d + kLanes, numbers - d - kLanes));
    } else if constexpr (Op::kPerWord == 1) {
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

// Numbers of a row from the `first`; zeros beyond the last row.
template <class T>
inline F32 some_of(const Rows<T>& rows, int row, int first, int numbers) {
    return row < rows.count ? some_of(rows[row], first, numbers - first) : zero();
}

// The right operand whose columns are the rows' numbers: panels of [words of n][width vectors].
template <class Op, class T>
inline void pack_right(float* to, const Rows<T>& rows, int numbers) {
    const int vectors = up_to(numbers, kLanes) / kLanes;
    for (int v = 0; v < vectors;) {
        const int width = panel_width(vectors - v), part = Op::kStep * width * kLanes;
        for (int step = 0; step < rows.count; step += kNumbersOfStep<Op>) {
            for (int word = 0; word < Op::kStep; ++word) {
                for (int w = 0; w < width; ++w, to += kLanes) {
                    const int d = (v + w) * kLanes;
                    if constexpr (Op::kPerWord == 1) {
                        store(to, some_of(rows[step], d, numbers - d));
                    } else {
                        const int row = step + Op::first_number(word);
                        const F32 a = some_of(rows, row, d, numbers), b = some_of(rows, row + Op::kApart, d, numbers);
                        Op::store_words(to, part, a, b);
                    }
                }
            }
            to += (Op::kParts - 1) * part;
        }
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

// The left operand whose rows are the rows' numbers, for tiles: [steps of n][D, to whole vectors][words of a step].
// `stage` holds a step of kLanes columns.
template <class Op, class T>
inline void pack_left_transposed(float* to, const Rows<T>& rows, int numbers, float* stage) {
    constexpr int kSquare = kLanes * kLanes;
    for (int step = 0; step < rows.count; step += kNumbersOfStep<Op>) {
        for (int d = 0; d < numbers; d += kLanes, to += kLanes * kWordsOfStep<Op>) {
            for (int word = 0; word < kLanes; ++word) {
                const int row = step + Op::first_number(word);
                const F32 a = some_of(rows, row, d, numbers), b = some_of(rows, row + Op::kApart, d, numbers);
                Op::store_words(stage + word * kLanes, kSquare, a, b);
            }
            for (int part = 0; part < Op::kParts; ++part)
                transpose(to + part * kLanes, kWordsOfStep<Op>, stage + part * kSquare, kLanes);
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
