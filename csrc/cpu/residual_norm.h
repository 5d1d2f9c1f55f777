// residual_layer_norm: what a call asks of a kernel, in plain pointers. Each instruction set has these three functions;
// their source is residual_norm_forward.h and residual_norm_backward.h.
//
// Symbols: B batch, N tokens, C channels; a row is a token. Parameters are fp32 whatever their dtype in the call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace vitreg {

// [B, N, C] with rows of C numbers side by side; `data` is null where there is none.
struct NormRows {
    const void* data = nullptr;
    Dtype dtype = Dtype::f32;
    int64_t stride_b = 0, stride_n = 0;
};

// Contiguous [B, N, C]; `data` is null where nobody wants it.
struct NormRowsOut {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
};

struct NormForward {
    size_t batch, tokens, channels;
    NormRows x, branch;
    const float* layer_scale;  // [C] or null
    const float* drop_path;    // [B] or null
    const float* weight;       // [C]
    const float* bias;         // [C] or null
    float eps;
    NormRowsOut residual;  // in x's dtype; null without a branch
    NormRowsOut normalized;
    float* token_norms;  // [B, N]
    float* mean;         // [B, N]; null for RMSNorm
    float* rstd;         // [B, N]
    // Residual and normalized tokens go past the caches, which have no room for them and so need not fetch what is
    // overwritten. Their rows begin at multiples of 64 bytes then.
    bool streamed;
};

struct NormBackward {
    size_t batch, tokens, channels;
    NormRows grad_residual, grad_normalized;  // the first in the residual's dtype; one of them may be null
    NormRows residual;
    const float* mean;  // [B, N]; null for RMSNorm
    const float* rstd;  // [B, N]
    NormRows branch;        // null where layer_scale wants no gradient
    const float* layer_scale;  // as in the forward
    const float* drop_path;
    const float* weight;
    NormRowsOut grad_x, grad_branch;  // the first in the residual's dtype
    bool streamed;  // both, as in the forward
    float* layer_scale_sums;      // [blocks, C] or null, each block's part of the gradient
    float* weight_sums;
    float* bias_sums;

    // Always inlined, as one copy would serve all instruction sets.
    [[gnu::always_inline]] size_t rows() const { return batch * tokens; }

    // Rows whose parts of the parameters' gradients are added up one after another. The cut depends on the sizes alone,
    // and so do the sums: not on the threads. At most 256 blocks, each of at least 64 rows, which makes the sums a small
    // part of what is written.
    [[gnu::always_inline]] size_t rows_of_block() const {
        const size_t rows_of_256th = (rows() + 255) / 256;
        return rows_of_256th < 64 ? 64 : rows_of_256th;
    }
    [[gnu::always_inline]] size_t blocks() const { return (rows() + rows_of_block() - 1) / rows_of_block(); }
};

// A parameter's gradient from its parts.
struct NormSums {
    const float* sums;  // [blocks, C]
    size_t blocks, channels;
    void* gradient;  // [C]
    Dtype dtype;
};

// The functions of one instruction set.
struct NormKernels {
    // Rows [first, last); `scratch` has room for C floats.
    void (*forward)(const NormForward&, size_t first, size_t last, float* scratch);
    void (*backward)(const NormBackward&, size_t block);
    // Channels [first, last).
    void (*sum)(const NormSums&, size_t first, size_t last);
};

}  // namespace vitreg
