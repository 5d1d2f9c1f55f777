// Where the images and heads of a call lie, and how they are cut into items.
#pragma once

#include "attention.h"

namespace vitreg::VITREG_ISA {

// One head of one image.
struct Span {
    int64_t batch = 0, image = 0, head = 0;
    int64_t first = 0, tokens = 0;  // of all tokens of its batch entry
    int64_t first_patch = 0;        // row of cos and sin where its patches begin
};

// All spans in order, each with a number of parts that its length decides.
template <class Parts>
class Walk {
public:
    Walk(const Attention& call, Parts parts) : call_(call), parts_(parts) {}

    int64_t items() const {
        int64_t count = 0;
        for (int64_t image = 0; image < images(); ++image) count += parts_(span(image, 0).tokens) * call_.heads;
        return count;
    }

    // Calls f(span, part, whether the span is another than that of the last call).
    template <class F>
    void run(int64_t begin, int64_t end, F f) const {
        int64_t item = 0;
        bool fresh = true;
        for (int64_t image = 0; image < images() && item < end; ++image) {
            const int64_t parts = parts_(span(image, 0).tokens);
            if (item + parts * call_.heads <= begin) {
                item += parts * call_.heads;
                continue;
            }
            for (int64_t head = 0; head < call_.heads; ++head) {
                fresh = true;
                for (int64_t part = 0; part < parts; ++part, ++item) {
                    if (item < begin || item >= end) continue;
                    f(span(image, head), part, fresh);
                    fresh = false;
                }
            }
        }
    }

private:
    int64_t images() const { return call_.cu_seqlens ? call_.images : call_.batch; }

    Span span(int64_t image, int64_t head) const {
        if (!call_.cu_seqlens) return {image, image, head, 0, call_.tokens, 0};
        const int64_t first = call_.cu_seqlens[image];
        return {0, image, head, first, call_.cu_seqlens[image + 1] - first, first - image * call_.num_prefix_tokens};
    }

    const Attention& call_;
    Parts parts_;
};

template <class T>
inline T* token_of(const Heads& x, const Span& span, int64_t token) {
    return static_cast<T*>(x.data) + span.batch * x.batch + span.head * x.head + (span.first + token) * x.token;
}

}  // namespace vitreg::VITREG_ISA
