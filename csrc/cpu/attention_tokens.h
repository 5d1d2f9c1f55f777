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

// Asks for a token's memory while there is other work: a head's tokens lie so far apart that a CPU does not see them
// coming. Inlined, as the compiler takes a function that does only this for one without an effect.
template <class T, bool kToWrite = false>
[[gnu::always_inline]] inline void prefetch(const Heads& x, const Span& span, int64_t token, int head_dim) {
    if (token >= span.tokens) return;
    constexpr int kLine = 64;
    const char* row = reinterpret_cast<const char*>(token_of<const T>(x, span, token));
    const int bytes = head_dim * static_cast<int>(sizeof(T));
    for (int i = 0; i < bytes; i += kLine) __builtin_prefetch(row + i, kToWrite);
    __builtin_prefetch(row + bytes - 1, kToWrite);
}

// Numbers of a token with any stride, as fp32 with `count` a multiple of kLanes or the last.
template <class T>
inline F32 some_of(const T* token, ptrdiff_t channel, int first, int count) {
    if (channel == 1) return some_of(token, first, count);
    T some[kLanes] = {};
    for (int i = 0; i < count && i < kLanes; ++i) some[i] = token[(first + i) * channel];
    return load(some);
}

// Numbers times a factor, to a token with any stride.
template <class T>
inline void write_token(T* token, ptrdiff_t channel, const float* from, float factor, int numbers) {
    const F32 by = broadcast(factor);
    for (int d = 0; d < numbers; d += kLanes) {
        const int count = numbers - d;
        const F32 product = some_of(from, d, count) * by;
        if (channel == 1) {
            store_some(token + d, product, count);
        } else {
            T some[kLanes];
            store(some, product);
            for (int i = 0; i < count && i < kLanes; ++i) token[(d + i) * channel] = some[i];
        }
    }
}

// Whether all numbers that it has seen are finite.
class Finite {
public:
    [[gnu::always_inline]] void see(F32 x) { total_ = fma(x, zero(), total_); }
    explicit operator bool() const { return sum(total_) == 0.0f; }

private:
    F32 total_ = zero();
};

template <class T>
inline bool is_finite(const Rows<T>& rows, int numbers) {
    constexpr int kMany = 4;  // which do not wait for each other
    Finite all[kMany];
    for (int row = 0; row < rows.count; ++row)
        for (int d = 0; d < numbers; d += kMany * kLanes)
#pragma GCC unroll 4
            for (int i = 0; i < kMany; ++i) all[i].see(some_of(rows, row, d + i * kLanes, numbers));
    return all[0] && all[1] && all[2] && all[3];
}

// The other of each pair of neighbouring lanes; and every second lane with the other sign.
#if defined(__AVX512F__)
inline F32 swap_pairs(F32 v) { return _mm512_permute_ps(v, 0xb1); }
inline F32 alternate(F32 v) { return _mm512_xor_ps(v, _mm512_castsi512_ps(_mm512_set1_epi64(int64_t{1} << 63))); }
#elif defined(__AVX2__)
inline F32 swap_pairs(F32 v) { return _mm256_permute_ps(v, 0xb1); }
inline F32 alternate(F32 v) { return _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_set1_epi64x(int64_t{1} << 63))); }
#else
inline F32 swap_pairs(F32 v) { return F32{v[1], v[0], v[3], v[2]}; }
inline F32 alternate(F32 v) { return F32{v[0], -v[1], v[2], -v[3]}; }
#endif

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

    // A pair (a, b) to (a cos_a - b sin_a, b cos_b + a sin_b).
    void turn(float* x, int64_t token, int head_dim) const { apply<false>(x, token, head_dim); }

    // The transposed map, of gradients: to (a cos_a + b sin_b, b cos_b - a sin_a).
    void turn_back(float* x, int64_t token, int head_dim) const { apply<true>(x, token, head_dim); }

private:
    template <bool kBack>
    void apply(float* x, int64_t token, int head_dim) const {
        const float *c = cos + (token - first_patch) * stride, *s = sin + (token - first_patch) * stride;
        const int half = head_dim / 2, length = interleaved ? head_dim : half;
        for (int i = 0; i < length; i += kLanes) {
            const int count = length - i;
            if (interleaved) {
                const F32 own = some_of(x, i, count), sines = some_of(s, i, count);
                const F32 turned = alternate(swap_pairs(own) * (kBack ? swap_pairs(sines) : sines));
                const F32 both = own * some_of(c, i, count);
                store_some(x + i, kBack ? both + turned : both - turned, count);
            } else {
                const F32 a = some_of(x, i, count), b = some_of(x + half, i, count);
                const F32 sine_a = some_of(s, i, count), sine_b = some_of(s + half, i, count);
                const F32 turned_a = b * (kBack ? sine_b : sine_a), turned_b = a * (kBack ? sine_a : sine_b);
                const F32 own_a = a * some_of(c, i, count), own_b = b * some_of(c + half, i, count);
                store_some(x + i, kBack ? own_a + turned_a : own_a - turned_a, count);
                store_some(x + half + i, kBack ? own_b - turned_b : own_b + turned_b, count);
            }
        }
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
        for (int d = 0; d < head_dim; d += kLanes) store(row + d, some_of(from, x.channel, d, head_dim - d));
        if (turned && rotation->turns(token)) rotation->turn(row, token, head_dim);
        write_token(copy + i * head_dim, 1, row, 1.0f, head_dim);
    }
    return {copy, head_dim, count};
}

}  // namespace vitreg::VITREG_ISA
