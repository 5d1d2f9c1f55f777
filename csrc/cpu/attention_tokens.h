// Tokens of one head of one image: read as rows that lie as the packing wants them, and written back.
#pragma once

#include "attention.h"
#include "attention_items.h"
#include "packing.h"

namespace vitreg::VITREG_ISA {

constexpr int kMaxHeadDim = 256;

template <class T>
inline T* token_of(const Heads& x, const Span& span, int64_t token) {
    return static_cast<T*>(x.data) + span.batch * x.batch + span.head * x.head + (span.first + token) * x.token;
}

// Numbers of a token with any stride, as fp32 with `count` a multiple of kLanes or the last.
template <class T>
inline F32 some_of(const T* token, ptrdiff_t channel, int first, int count) {
    if (channel == 1) return some_of(token, first, count);
    T some[kLanes] = {};
    for (int i = 0; i < count && i < kLane; ++i) some[i] = token[(first + i) * channel];
    return load(some);
}

// Numbers times a factor, to a token with any stride.
template <class T>
inline void write_token(T* token, ptrdiff_t channel, const float* from, float factor, int numbers) {
    const F32 by = broadcast(factor);
    for (int d = 0; d < numbers; d += kLane) {
        const int count = numbers - d < kLane ? numbers - d : kLane;
        if (channel != 1) {
            T some[kLanes];
            store(some, load_first(from + d, count) * by);
            for (int i = 0; i < count; ++i) token[(d + i) * channel] = some[i];
        } else if (count == kLane) {
            store(token + d, load(from + d) * by);
        } else {
            store_first(token + d, load_first(from + d, count) * by, count);
        }
    }
}

// Rotation of the patches of a span.
struct Rotation {
    const float *cos = nullptr, *sin = nullptr;  // rows of the first patch
    int64_t stride = 0, first_patch = 0;
    bool interleaved = false;

    Rotation() = default;
    Rotation(const Attention& call, const Span& span) {
        if (!call.cos) return;
        const int64_t at = span.batch * call.rope_batch + span.first_patch * call.rope_token;
        cos = call.cos + at;
        sin = call.sin + at;
        stride = call.rope_token;
        first_patch = call.num_prefix_tokens;
        interleaved = call.rope_interleaved;
    }

    bool turns(int64_t token) const { return cos && token >= first_patch; }

    void turn(float* x, int64_t token, int head_dim) const {
        each_pair(token, head_dim, [x](int i, int j, const float* c, const float* s) {
            const float a = x[i], b = x[j];
            x[i] = a * c[i] - b * s[i];
            x[j] = b * c[j] + a * s[j];
        });
    }

    // The transposed map, of gradients.
    void turn_back(float* x, int64_t token, int head_dim) const {
        each_pair(token, head_dim, [x](int i, int j, const float* c, const float* s) {
            const float a = x[i], b = x[j];
            x[i] = a * c[i] + b * s[j];
            x[j] = b * c[j] - a * s[i];
        });
    }

private:
    template <class F>
    [[gnu::always_inline]] void each_pair(int64_t token, int head_dim, F f) const {
        const float *c = cos + (token - first_patch) * stride, *s = sin + (token - first_patch) * stride;
        const int half = head_dim / 2;
        if (interleaved)
            for (int i = 0; i < half; ++i) f(2 * i, 2 * i + 1, c, s);
        else
            for (int i = 0; i < half; ++i) f(i, i + half, c, s);
    }
};

// The tokens that take part, in order; all of them where nothing is masked.
struct Kept {
    const int32_t* index = nullptr;
    int count = 0;

    int64_t operator[](int i) const { return index ? index[i] : i; }
};

inline Kept kept_keys(const Attention& call, const Span& span, int32_t* index) {
    if (!call.key_mask) return {nullptr, static_cast<int>(span.tokens)};
    const bool* mask = call.key_mask + span.batch * call.key_mask_batch + span.first * call.key_mask_token;
    int count = 0;
    for (int64_t token = 0; token < span.tokens; ++token)
        if (mask[token * call.key_mask_token]) index[count++] = static_cast<int32_t>(token);
    return {count < span.tokens ? index : nullptr, count};
}

// Tokens [first, first + count) of what is kept, rotated, as rows: in place where they lie so, copied if they do not.
template <class T>
inline Rows<T> rows_of(const Heads& x, const Span& span, const Kept& kept, int first, int count, int head_dim,
                       const Rotation* rotation, T* copy) {
    const bool turned = rotation && rotation->cos;
    if (x.channel == 1 && !kept.index && !turned) return {token_of<const T>(x, span, first), x.token, count};
    float row[kMaxHeadDim];
    for (int i = 0; i < count; ++i) {
        const int64_t token = kept[first + i];
        const T* from = token_of<const T>(x, span, token);
        for (int d = 0; d < head_dim; d += kLane) store(row + d, some_of(from, x.channel, d, head_dim - d));
        if (turned && rotation->turns(token)) rotation->turn(row, token, head_dim);
        write_token(copy + i * head_dim, 1, row, 1.0f, head_dim);
    }
    return {copy, head_dim, count};
}

}  // namespace vitreg::VITREG_ISA
