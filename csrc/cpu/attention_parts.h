// The functions of attention for products of numbers in parts. Parts of an infinity are NaN, and so is what they are
// multiplied with: what holds one is left to kernels that multiply numbers as they are. The forward finds it in its
// results, item by item; the backward in what it packs of a head, as all items of that must be of one kind. What overflows
// on the way there is NaN where it might have been an infinity.
#pragma once

#include "attention_kernels.h"

namespace vitreg::VITREG_ISA {

// `kPlain` gives those kernels, whose items are the same.
template <class Op, class T, AttentionKernels (*kPlain)(Dtype)>
struct AttendInParts : Attend<Op, T> {
    static void forward(const AttentionForward& call, int64_t begin, int64_t end) {
        run<Forward<Op, T>>(call, begin, end, kPlain(kDtypeOf<T>).forward);
    }
    static void backward(const AttentionBackward& call, int64_t begin, int64_t end) {
        run<Backward<Op, T>>(call, begin, end, kPlain(kDtypeOf<T>).backward);
    }
    static constexpr AttentionKernels kernels() {
        return {Attend<Op, T>::forward_items, forward, Attend<Op, T>::backward_items, backward};
    }

private:
    // From so many on parts are faster, forward and backward, as measured on an Intel Xeon at head dims of 8 to 128 and 2
    // to 1374 tokens: fewer are packed for longer than they are multiplied.
    static constexpr int64_t kTokens = 192, kHeadDim = 32;

    template <class Kernel, class Call>
    static void run(const Call& call, int64_t begin, int64_t end, void (*plain)(const Call&, int64_t, int64_t)) {
        if (call.head_dim < kHeadDim || longest_of(call) < kTokens) return plain(call, begin, end);
        Scratch& scratch = scratch_of_thread();
        const typename Op::Session session;
        Kernel kernel(call, scratch);
        int64_t item = begin;
        const auto parts = [&](int64_t tokens) { return Kernel::parts(call, tokens); };
        for_items(call, parts, begin, end, [&](const Span& span, int64_t part) {
            if (!kernel.item(span, part)) {
                plain(call, item, item + 1);
                kernel.place(scratch);
            }
            ++item;
        });
        scratch.end_call();
    }
};

}  // namespace vitreg::VITREG_ISA
