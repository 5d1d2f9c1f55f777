// Tokens put side by side, each number read once and written once, and their gradients summed over the batch.
#pragma once

#include "assemble.h"
#include "sweep.h"
#include "transpose.h"

namespace vitreg::VITREG_ISA {

namespace assemble {

// A token from what it is made of; `row` may be null. P is their dtype, T that of the result.
template <class T, class P>
inline void write_token(T* to, const P* from, const T* row, size_t channels) {
    if (row == nullptr) {
        sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
            write(to + c, load(from + c, part), part);
        });
    } else {
        sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
            write(to + c, load(from + c, part) + load(row + c, part), part);
        });
    }
}

template <class T>
void write_prefix(const AssembleForward& call, T* to, const T* rows) {
    const size_t channels = call.sizes.channels;
    for (size_t token = 0; token < call.sizes.prefix(); ++token) {
        const bool is_cls = token < call.sizes.cls_tokens;
        const void* parameter = is_cls ? call.cls_token : call.register_tokens;
        const size_t of_parameter = is_cls ? token : token - call.sizes.cls_tokens;
        const T* from = static_cast<const T*>(parameter) + of_parameter * channels;
        const bool has_row = rows != nullptr && token < call.sizes.prefix_rows;
        write_token(to + token * channels, from, has_row ? rows + token * channels : nullptr, channels);
    }
}

// Patches that are neighbours, turned square by square; `rows` may be null. All patches of some channels come before the
// next channels: what is read then lies as close together as it can.
template <class T, class P>
void write_turned(T* to, const P* from, int64_t stride_c, const T* rows, size_t patches, size_t channels) {
    alignas(64) float read[kLanes * kLanes] = {}, turned[kLanes * kLanes];
    for (size_t c = 0; c < channels; c += kLanes) {
        const int width = static_cast<int>(channels - c < kLanes ? channels - c : kLanes);
        for (size_t m = 0; m < patches; m += kLanes) {
            const int count = static_cast<int>(patches - m < kLanes ? patches - m : kLanes);
            for (int i = 0; i < width; ++i) {
                const P* some = from + (c + i) * stride_c + m;
                __builtin_prefetch(some + kLanes * stride_c);  // the CPU does not see such a stride coming
                store(read + i * kLanes, some_of(some, 0, count));
            }
            transpose(turned, kLanes, read, kLanes);
            for (int j = 0; j < count; ++j) {
                const size_t at = (m + j) * channels + c;
                const F32 value = load(turned + j * kLanes);
                store_some(to + at, rows == nullptr ? value : value + some_of(rows + at, 0, width), width);
            }
        }
    }
}

template <class T, class P>
void forward_items(const AssembleForward& call, size_t first, size_t last) {
    const TokenSizes& sizes = call.sizes;
    const size_t channels = sizes.channels;
    const T* rows = static_cast<const T*>(call.pos_embed);
    for (size_t item = first; item < last; ++item) {
        const size_t image = item / call.items_of_image(), block = item % call.items_of_image();
        T* tokens = static_cast<T*>(call.tokens) + image * sizes.tokens() * channels;
        if (block == 0) {
            write_prefix(call, tokens, rows);
            continue;
        }
        const size_t begin = (block - 1) * call.kPatches, most = begin + call.kPatches;
        const size_t end = most < sizes.patches ? most : sizes.patches;
        const P* patches = static_cast<const P*>(call.patches) + image * call.stride_b;
        T* to = tokens + sizes.prefix() * channels;
        const T* of_patches = rows == nullptr ? nullptr : rows + sizes.prefix_rows * channels;
        const auto row = [&](size_t m) { return rows == nullptr ? nullptr : of_patches + m * channels; };
        if (call.stride_c == 1 || channels == 1) {
            for (size_t m = begin; m < end; ++m) {
                write_token(to + m * channels, patches + m * call.stride_m, row(m), channels);
            }
        } else {
            write_turned(to + begin * channels, patches + begin, call.stride_c, row(begin), end - begin, channels);
        }
    }
}

inline void forward(const AssembleForward& call, size_t first, size_t last) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (sizeof(T) == sizeof(float)) {
            with_type(call.patches_dtype, [&](auto of_patches) {
                forward_items<T, decltype(of_patches)>(call, first, last);
            });
        } else {
            forward_items<T, T>(call, first, last);
        }
    });
}

inline void write_gradient(const ParameterGradient& gradient, size_t row, const float* sums, size_t channels) {
    with_type(gradient.dtype, [&](auto type) {
        auto* to = static_cast<decltype(type)*>(gradient.data) + row * channels;
        sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE { write(to + c, load(sums + c, part), part); });
    });
}

inline void backward(const AssembleBackward& call, size_t first, size_t last, float* sums) {
    const TokenSizes& sizes = call.sizes;
    const size_t channels = sizes.channels;
    for (size_t token = first; token < last; ++token) {
        const bool is_patch = token >= sizes.prefix(), is_cls = token < sizes.cls_tokens;
        const ParameterGradient own = is_patch ? ParameterGradient{} : is_cls ? call.cls_token : call.register_tokens;
        const bool has_row = is_patch || token < sizes.prefix_rows;
        const ParameterGradient of_row = has_row ? call.pos_embed : ParameterGradient{};
        if (own.data == nullptr && of_row.data == nullptr) continue;

        sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE { write(sums + c, zero(), part); });
        with_type(call.dtype, [&](auto type) {
            const auto* arrived = static_cast<const decltype(type)*>(call.grad_tokens) + token * call.stride_n;
            for (size_t image = 0; image < sizes.batch; ++image, arrived += call.stride_b) {
                sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
                    write(sums + c, load(sums + c, part) + load(arrived + c, part), part);
                });
            }
        });
        if (own.data != nullptr) write_gradient(own, is_cls ? token : token - sizes.cls_tokens, sums, channels);
        if (of_row.data != nullptr) {
            write_gradient(of_row, is_patch ? token - sizes.prefix() + sizes.prefix_rows : token, sums, channels);
        }
    }
}

}  // namespace assemble

}  // namespace vitreg::VITREG_ISA
