// The residual, its norm and its statistics. A row is read once and written once; what is needed of it in between, to
// find its mean, its variance and the result, lies in the first-level cache.
#pragma once

#include "residual_norm_rows.h"

namespace vitreg::VITREG_ISA {

namespace residual_norm {

struct NoBranch {};

// X of x and the residual, B of the branch, Y of the normalized tokens.
template <class X, class B, class Y, bool kStreamed>
void forward_rows(const NormForward& call, size_t first, size_t last, float* scratch) {
    constexpr bool kBranch = sizeof(B) != sizeof(NoBranch);
    const size_t channels = call.channels;
    const float* weight = call.weight;
    const float* bias = call.bias;
    const float* layer_scale = call.layer_scale;

    for (size_t row = first; row < last; ++row) {
        const Place place(row, call.tokens), next(row + 1 < last ? row + 1 : row, call.tokens);
        const X *x = row_of<X>(call.x, place), *next_x = row_of<X>(call.x, next);
        const float* values = scratch;  // the residual as it is stored

        Total total, squares;
        const auto add = [&](auto value, int i) VITREG_INLINE {
            total.add(value, i);
            squares.add_product(value, value, i);
        };
        if constexpr (kBranch) {
            X* residual = row_of<X>(call.residual, row, channels);
            const B *branch = row_of<B>(call.branch, place), *next_branch = row_of<B>(call.branch, next);
            constexpr bool kKeptApart = sizeof(X) != sizeof(float) || kStreamed;
            const F32 kept = broadcast(call.drop_path == nullptr ? 1.0f : call.drop_path[place.image]);
            sweep(channels, [&](size_t c, int i, auto part) VITREG_INLINE {
                prefetch(next_x + c, part);
                prefetch(next_branch + c, part);
                const auto before = load(x + c, part);
                const decltype(before) factor = layer_scale == nullptr ? kept : kept * load(layer_scale + c, part);
                const auto value = fma(load(branch + c, part), factor, before);
                // What is normalized is what is stored: the backward has nothing else to start from.
                const auto stored = write<kStreamed>(residual + c, value, part);
                if constexpr (kKeptApart) write(scratch + c, stored, part);
                add(stored, i);
            });
            if constexpr (sizeof(X) == sizeof(float)) values = kKeptApart ? scratch : residual;
        } else {
            sweep(channels, [&](size_t c, int i, auto part) VITREG_INLINE {
                prefetch(next_x + c, part);
                const auto value = load(x + c, part);
                if constexpr (sizeof(X) != sizeof(float)) write(scratch + c, value, part);
                add(value, i);
            });
            if constexpr (sizeof(X) == sizeof(float)) values = x;
        }

        // By itself, though mean and variance would give it: they do not for an infinite token.
        float square = squares.value();
        call.token_norms[row] = __builtin_sqrtf(square);
        float mean = 0.0f;
        if (call.mean != nullptr) {
            mean = total.value() / channels;
            call.mean[row] = mean;
            // Centred before it is squared: E[x^2] - E[x]^2 has nothing left of the variance where the mean is large.
            const F32 centre = broadcast(mean);
            Total centred_squares;
            sweep(channels, [&](size_t c, int i, auto part) VITREG_INLINE {
                const auto centred = existing(load(values + c, part) - centre, part);
                centred_squares.add_product(centred, centred, i);
            });
            square = centred_squares.value();
        }
        const float rstd = 1.0f / __builtin_sqrtf(square / channels + call.eps);
        call.rstd[row] = rstd;

        Y* normalized = row_of<Y>(call.normalized, row, channels);
        const F32 centre = broadcast(mean), scale = broadcast(rstd);
        if (bias != nullptr) {
            sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
                const auto unit = (load(values + c, part) - centre) * scale;
                const auto result = fma(unit, load(weight + c, part), load(bias + c, part));
                write<kStreamed>(normalized + c, result, part);
            });
        } else {
            sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
                const auto unit = (load(values + c, part) - centre) * scale;
                write<kStreamed>(normalized + c, unit * load(weight + c, part), part);
            });
        }
    }
    if constexpr (kStreamed) stream_done();
}

inline void forward(const NormForward& call, size_t first, size_t last, float* scratch) {
    with_type(call.x.dtype, [&](auto x) {
        with_type(call.normalized.dtype, [&](auto y) {
            using X = decltype(x);
            using Y = decltype(y);
            with_flag(call.streamed, [&](auto streamed) {
                constexpr bool kStreamed = decltype(streamed)::value;
                if (call.branch.data == nullptr)
                    return forward_rows<X, NoBranch, Y, kStreamed>(call, first, last, scratch);
                with_type(call.branch.dtype, [&](auto b) {
                    forward_rows<X, decltype(b), Y, kStreamed>(call, first, last, scratch);
                });
            });
        });
    });
}

}  // namespace residual_norm

}  // namespace vitreg::VITREG_ISA
