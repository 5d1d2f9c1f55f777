// The functions of attention for one way to multiply and one dtype.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace vitreg::VITREG_ISA {

template <class Op, class T>
struct Attend {
    static int64_t forward_items(const AttentionForward& call) {
        return count_items(call, [&](int64_t tokens) { return Forward<Op, T>::parts(call, tokens); });
    }
    static void forward(const AttentionForward& call, int64_t begin, int64_t end) {
        Scratch& scratch = scratch_of_thread();
        [[maybe_unused]] const typename Op::Session session;
        Forward<Op, T> kernel(call, scratch);
        for_items(
            call, [&](int64_t tokens) { return Forward<Op, T>::parts(call, tokens); }, begin, end,
            [&](const Span& span, int64_t part) { kernel.item(span, part); });
        scratch.end_call();
    }
    static int64_t backward_items(const AttentionBackward& call) {
        return count_items(call, [&](int64_t tokens) { return Backward<Op, T>::parts(call, tokens); });
    }
    static void backward(const AttentionBackward& call, int64_t begin, int64_t end) {
        Scratch& scratch = scratch_of_thread();
        [[maybe_unused]] const typename Op::Session session;
        Backward<Op, T> kernel(call, scratch);
        for_items(
            call, [&](int64_t tokens) { return Backward<Op, T>::parts(call, tokens); }, begin, end,
            [&](const Span& span, int64_t part) { kernel.item(span, part); });
        scratch.end_call();
    }
    static constexpr AttentionKernels kernels() { return {forward_items, forward, backward_items, backward}; }
};

inline AttentionKernels attention_kernels(Dtype dtype) {
#if defined(__AVX512BF16__)
    if (dtype == Dtype::bf16) return Attend<Dot, bf16>::kernels();
#else
    if (dtype == Dtype::bf16) return Attend<Fma, bf16>::kernels();
#endif
    if (dtype == Dtype::f16) return Attend<Fma, fp16>::kernels();
    return Attend<Fma, float>::kernels();
}

}  // namespace vitreg::VITREG_ISA
