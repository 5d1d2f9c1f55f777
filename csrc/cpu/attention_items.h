// The heads of a call's images, and how they are cut into items.
#pragma once

#include "attention.h"

namespace vitreg::VITREG_ISA {

// One head of one image.
struct Span {
    int64_t batch = 0, image = 0, head = 0;
    int64_t first = 0, tokens = 0;  // of all tokens of its batch entry
    int64_t first_patch = 0;        // row of cos and sin where its patches begin
};

inline int64_t images_of(const Attention& call) { return call.cu_seqlens ? call.images : call.batch; }

inline Span span_of(const Attention& call, int64_t image, int64_t head) {
    if (!call.cu_seqlens) return {image, image, head, 0, call.tokens, 0};
    const int64_t first = call.cu_seqlens[image];
    return {0, image, head, first, call.cu_seqlens[image + 1] - first, first - image * call.num_prefix_tokens};
}

// The head after this one; itself if it is the last.
inline Span next_of(const Attention& call, const Span& span) {
    if (span.head + 1 < call.heads) return span_of(call, span.image, span.head + 1);
    return span.image + 1 < images_of(call) ? span_of(call, span.image + 1, 0) : span;
}

inline int64_t longest_of(const Attention& call) {
    int64_t longest = 0;
    for (int64_t image = 0; image < images_of(call); ++image) {
        const int64_t tokens = span_of(call, image, 0).tokens;
        longest = tokens > longest ? tokens : longest;
    }
    return longest;
}

// How many items there are when a span of some length has parts(length) of them.
template <class Parts>
inline int64_t count_items(const Attention& call, Parts parts) {
    int64_t items = 0;
    for (int64_t image = 0; image < images_of(call); ++image)
        items += parts(span_of(call, image, 0).tokens) * call.heads;
    return items;
}

// Calls f(span, part) for the items from `begin` to `end`.
template <class Parts, class F>
inline void for_items(const Attention& call, Parts parts, int64_t begin, int64_t end, F f) {
    int64_t first = 0;  // item of the image
    for (int64_t image = 0; image < images_of(call) && first < end; ++image) {
        const int64_t each = parts(span_of(call, image, 0).tokens), next = first + each * call.heads;
        for (int64_t item = begin > first ? begin : first; item < end && item < next; ++item)
            f(span_of(call, image, (item - first) / each), (item - first) % each);
        first = next;
    }
}

// Keys whose scores are looked at together.
constexpr int kChunk = 256;

// A chunk of `each` keys may have half as many again: the last of a head has from half as many to that.
constexpr int longest_chunk(int each) { return each * 3 / 2; }
constexpr int count_chunks(int keys, int each) {
    return keys < longest_chunk(each) ? keys > 0 : (keys + each / 2) / each;
}

// Calls f(first key, keys) for each chunk. They begin where panels of keys do.
template <class F>
inline void for_chunks(int keys, int each, F f) {
    const int chunks = count_chunks(keys, each);
    for (int i = 0; i < chunks; ++i) f(i * each, i + 1 < chunks ? each : keys - i * each);
}

}  // namespace vitreg::VITREG_ISA
