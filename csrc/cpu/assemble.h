// assemble_tokens: what a call asks of a kernel, in plain pointers. The source of these functions is
// assemble_kernels.h.
//
// Symbols: B batch, K CLS tokens, R registers, M patches, N = K + R + M tokens, C channels of a token. A row is that of
// the position embedding: the first prefix_rows tokens have one, and all patches have.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace vitreg {

struct TokenSizes {
    size_t batch, cls_tokens, registers, patches, channels;
    size_t prefix_rows;

    size_t prefix() const { return cls_tokens + registers; }
    size_t tokens() const { return prefix() + patches; }
};

struct AssembleForward {
    TokenSizes sizes;
    const void* patches;  // [B, M, C]; channels are neighbours, or else patches are
    Dtype patches_dtype;  // that of the tokens where these are not fp32
    int64_t stride_b, stride_m, stride_c;
    // Contiguous, in the tokens' dtype, null where there is none.
    const void* cls_token;
    const void* register_tokens;
    const void* pos_embed;
    void* tokens;  // [B, N, C], contiguous
    Dtype dtype;

    // The work: of each image the prefix, and so many patches at a time.
    static constexpr size_t kPatches = 128;
    size_t items_of_image() const { return 1 + (sizes.patches + kPatches - 1) / kPatches; }
    size_t items() const { return sizes.batch * items_of_image(); }
};

// A parameter's gradient, contiguous; null where nobody wants it.
struct ParameterGradient {
    void* data = nullptr;
    Dtype dtype = Dtype::f32;
};

struct AssembleBackward {
    TokenSizes sizes;
    const void* grad_tokens;  // [B, N, C], channels are neighbours
    Dtype dtype;
    int64_t stride_b, stride_n;
    ParameterGradient cls_token, register_tokens, pos_embed;
};

// The functions of one instruction set.
struct AssembleKernels {
    // Items [first, last).
    void (*forward)(const AssembleForward&, size_t first, size_t last);
    // Tokens [first, last), each over all images; `sums` has room for C floats.
    void (*backward)(const AssembleBackward&, size_t first, size_t last, float* sums);
};

}  // namespace vitreg
