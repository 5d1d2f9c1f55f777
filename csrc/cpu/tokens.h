// Tokens on their way from strided tensors into packed words, and back.
#pragma once

#include "attention.h"
#include "products.h"

namespace vitreg::VITREG_ISA {

// Longest token in a temporary row.
constexpr int kMaxHeadDim = 256;

struct Rotation {
    const float *cos = nullptr, *sin = nullptr;  // rows of the token, or null where it is not rotated
    bool interleaved = false;
};

template <class T>
inline float to_float(T x) {
    if constexpr (sizeof(T) == 4) {
        return x;
    } else {
        const T one[kLanes] = {x};
        return load(one)[0];
    }
}

// Channels [first, first + count) of a token, count <= kLanes; zeros after them and for no token.
template <class T>
inline F32 read_vector(const T* from, int first, int count, ptrdiff_t channel) {
    if (!from || count <= 0) return zero();
    if (channel == 1) return count == static_cast<int>(kLanes) ? load(from + first) : load_first(from + first, count);
    T some[kLanes] = {};
    for (int i = 0; i < count; ++i) some[i] = from[(first + i) * channel];
    return load(some);
}

// Channels of one token as fp32.
template <class T>
inline void read_token(float* to, const T* from, ptrdiff_t channel, int head_dim) {
    const int lanes = static_cast<int>(kLanes);
    if (channel == 1) {
        int d = 0;
        for (; d + lanes <= head_dim; d += lanes) store(to + d, load(from + d));
        if (d < head_dim) store_first(to + d, load_first(from + d, head_dim - d), head_dim - d);
    } else {
        for (int d = 0; d < head_dim; d += lanes) {
            const int count = head_dim - d < lanes ? head_dim - d : lanes;
            T some[kLanes] = {};
            for (int i = 0; i < count; ++i) some[i] = from[(d + i) * channel];
            store_first(to + d, load(some), count);
        }
    }
}

template <class T>
inline void write_token(T* to, const float* from, ptrdiff_t channel, int head_dim) {
    const int lanes = static_cast<int>(kLanes);
    if (channel == 1) {
        int d = 0;
        for (; d + lanes <= head_dim; d += lanes) store(to + d, load(from + d));
        if (d < head_dim) store_first(to + d, load_first(from + d, head_dim - d), head_dim - d);
    } else {
        for (int d = 0; d < head_dim; d += lanes) {
            const int count = head_dim - d < lanes ? head_dim - d : lanes;
            T some[kLanes];
            store(some, load_first(from + d, count));
            for (int i = 0; i < count; ++i) to[(d + i) * channel] = some[i];
        }
    }
}

// Rotates by the angles whose cosines and sines are given (backwards with sign -1: the transposed rotation).
inline void rotate(float* x, const Rotation& by, int head_dim) {
    const int half = head_dim / 2;
    if (by.interleaved) {
        for (int i = 0; i < half; ++i) {
            const float a = x[2 * i], b = x[2 * i + 1];
            x[2 * i] = a * by.cos[2 * i] - b * by.sin[2 * i];
            x[2 * i + 1] = b * by.cos[2 * i + 1] + a * by.sin[2 * i + 1];
        }
    } else {
        for (int i = 0; i < half; ++i) {
            const float a = x[i], b = x[i + half];
            x[i] = a * by.cos[i] - b * by.sin[i];
            x[i + half] = b * by.cos[i + half] + a * by.sin[i + half];
        }
    }
}

// The gradient of the above.
inline void rotate_back(float* x, const Rotation& by, int head_dim) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        const int one = by.interleaved ? 2 * i : i, other = by.interleaved ? 2 * i + 1 : i + half;
        const float a = x[one], b = x[other];
        x[one] = a * by.cos[one] + b * by.sin[other];
        x[other] = b * by.cos[other] - a * by.sin[one];
    }
}

// Words of a token: channels in pairs of bf16, or single floats; zeros fill the last pair.
template <class Op>
constexpr int words(int elements) {
    return static_cast<int>((elements + Op::kPerWord - 1) / Op::kPerWord);
}

// One token as packed words, rotated and rounded to its dtype as the op says.
template <class Op, class T>
inline void pack_token(float* to, const T* from, ptrdiff_t channel, int head_dim, const Rotation& rotation) {
    if constexpr (Op::kPerWord == 1) {
        read_token(to, from, channel, head_dim);
        if (rotation.cos) {
            rotate(to, rotation, head_dim);
            if constexpr (sizeof(T) == 2) {
                for (int d = 0; d < head_dim; d += static_cast<int>(kLanes)) {
                    const int count = head_dim - d < static_cast<int>(kLanes) ? head_dim - d : static_cast<int>(kLanes);
                    store_first(to + d, rounded<T>(load_first(to + d, count)), count);
                }
            }
        }
    } else {
        T* element = reinterpret_cast<T*>(to);
        if (head_dim % 2) to[head_dim / 2] = 0.0f;
        if (rotation.cos) {
            float row[kMaxHeadDim];
            read_token(row, from, channel, head_dim);
            rotate(row, rotation, head_dim);
            write_token(element, row, 1, head_dim);
        } else if (channel == 1) {
            __builtin_memcpy(element, from, head_dim * sizeof(T));
        } else {
            for (int d = 0; d < head_dim; ++d) __builtin_memcpy(element + d, from + d * channel, sizeof(T));
        }
    }
}

// A row of a panel of values: `channels` of one token, or of a pair of them word by word; zeros up to `width` vectors and
// for a token that is not there.
template <class Op, class T>
inline void pack_row(float* to, const T* token, const T* partner, ptrdiff_t channel, int channels, int width) {
    for (int w = 0; w < width; ++w, to += kLanes) {
        const int first = w * static_cast<int>(kLanes);
        const int count = channels - first < static_cast<int>(kLanes) ? channels - first : static_cast<int>(kLanes);
        const F32 a = read_vector(token, first, count, channel);
        if constexpr (Op::kPerWord == 1) {
            store(to, a);
        } else {
            Op::store_words(to, a, read_vector(partner, first, count, channel));
        }
    }
}

// The other sign of all.
template <class Op>
inline void negate(float* x, int words) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(x);
    for (int i = 0; i < words; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, bits + i, 4);
        word ^= Op::kPerWord == 1 ? 0x80000000u : 0x80008000u;
        __builtin_memcpy(bits + i, &word, 4);
    }
}

#if defined(__AVX512F__)

// 16 rows of 16 words, turned about.
[[gnu::always_inline]] inline void transpose(float* to, ptrdiff_t to_row, const float* from, ptrdiff_t from_row) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_row);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

#else

inline void transpose(float* to, ptrdiff_t to_row, const float* from, ptrdiff_t from_row) {
    const int lanes = static_cast<int>(kLanes);
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < lanes; ++j) to[i * to_row + j] = from[j * from_row + i];
}

#endif

// Rows of words, `kLanes` of them, as vectors of columns of a panel: to[k * to_row + i] = from[i * from_row + k].
inline void transpose_rows(float* to, ptrdiff_t to_row, const float* from, ptrdiff_t from_row, int count) {
    const int lanes = static_cast<int>(kLanes);
    int k = 0;
    for (; k + lanes <= count; k += lanes) transpose(to + k * to_row, to_row, from + k, from_row);
    for (; k < count; ++k)
        for (int i = 0; i < lanes; ++i) to[k * to_row + i] = from[i * from_row + k];
}

}  // namespace vitreg::VITREG_ISA
