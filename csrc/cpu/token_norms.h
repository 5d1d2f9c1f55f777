// token_norms and accumulate_token_norms: what a call asks of a kernel, in plain pointers. The source of these
// functions is token_norms_kernels.h.
//
// Symbols: B batch, N tokens, C channels; a row is a token.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace vitreg {

// [B, N, C] with rows of C numbers side by side.
struct TokenNorms {
    size_t batch, tokens, channels;
    const void* x;
    Dtype dtype;
    int64_t stride_b, stride_n;
    float* norms;  // [B, N], contiguous
};

// [3, n] numbers in any strides: some of each group of tokens.
template <class T>
struct OfGroups {
    T* data;
    int64_t stride_group, stride;

    T& at(size_t group, int64_t i) const { return data[group * stride_group + i * stride]; }
};

struct NormCounts {
    size_t batch, tokens;
    const float* norms;  // [B, N]
    int64_t stride_b, stride_n;
    size_t ends[3];  // of CLS tokens, registers and patches, which stand in this order
    // What is counted into.
    OfGroups<int64_t> histogram;  // by bin
    OfGroups<double> sums;        // of the norms, of their squares
    OfGroups<float> extremes;     // smallest, largest
    OfGroups<int64_t> nonfinite;  // NaN, infinite
};

// The functions of one instruction set.
struct TokenNormKernels {
    // Rows [first, last).
    void (*norms)(const TokenNorms&, size_t first, size_t last);
    void (*count)(const NormCounts&);
};

}  // namespace vitreg
