// Attention on a CPU: what the op's bindings fill in and call. Plain data; no torch and no instruction set here.
//
// A call is cut into `items`, which write to places of their own and may run in any order on any threads: results are
// the same to the last bit however they are dealt out. Neighbouring items share work (a head's keys and values are
// packed once for a run of them), so give each thread a range that is as long as can be. A thread works in memory of its
// own, see scratch.h; where there is none for it, it throws.
//
// Symbols: B batch, H heads, N tokens, D head dim, P prefix tokens, M = N - P patches, S packed images.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace vitreg {

// A [B, H, N, D] tensor by its strides in elements. What is only read may have any; what is written, any that do not
// overlap.
struct Heads {
    void* data = nullptr;
    int64_t batch = 0, head = 0, token = 0, channel = 0;
};

struct Attention {
    int64_t batch = 0, heads = 0, tokens = 0, head_dim = 0;
    int64_t num_prefix_tokens = 0;
    float scale = 1;
    Heads query, key, value;

    // True for the keys that take part; [B, N] by its strides (0 where it is broadcast), or null.
    const bool* key_mask = nullptr;
    int64_t key_mask_batch = 0, key_mask_token = 0;

    // Rotation of the patches, fp32 [B, M, D] with D contiguous, or null; batch stride 0 where it is shared. Packed:
    // the patches of all images one after another.
    const float *cos = nullptr, *sin = nullptr;
    int64_t rope_batch = 0, rope_token = 0;
    bool rope_interleaved = false;

    // [S + 1], rising from 0 to N, or null; B is then 1. The caller has looked at the values.
    const int32_t* cu_seqlens = nullptr;
    int64_t images = 0;
};

struct AttentionForward : Attention {
    Heads output;
    // fp32 and contiguous, or null where not asked for.
    float* lse = nullptr;                 // [B, H, N]
    float* prefix_attention = nullptr;    // [B, H, P, N]
    float* received_attention = nullptr;  // [B, H, N]
    float* max_logit = nullptr;           // [B, H] or [S, H]
};

struct AttentionBackward : Attention {
    Heads output, grad_output;
    const float* lse = nullptr;  // [B, H, N], contiguous
    Heads grad_query, grad_key, grad_value;
    int64_t threads = 1;  // that the items are dealt out to: it decides how many there are, and not a bit of the result
};

// The functions of one instruction set for one dtype of the tensors.
struct AttentionKernels {
    int64_t (*forward_items)(const AttentionForward&);
    void (*forward)(const AttentionForward&, int64_t begin, int64_t end);
    int64_t (*backward_items)(const AttentionBackward&);
    void (*backward)(const AttentionBackward&, int64_t begin, int64_t end);
};

}  // namespace vitreg
