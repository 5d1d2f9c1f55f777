// Gradients of the tokens, row by row, with those of the parameters as one sum a block of rows, and the sum of these.
//
// With x_hat = (residual - mean) * rstd and g = weight * grad_normalized, a token's gradient through the norm is
// rstd * (g - mean(g) - x_hat * mean(g * x_hat)); for RMSNorm there is no mean of g. (Ba et al., arXiv 1607.06450.)
#pragma once

#include "residual_norm_rows.h"

namespace vitreg::VITREG_ISA {

namespace residual_norm {

// This block's row of the sums, of zeros; null where nobody wants it.
inline float* begin_sums(float* sums, size_t block, size_t channels) {
    if (sums == nullptr) return nullptr;
    float* own = sums + block * channels;
    sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE { write(own + c, zero(), part); });
    return own;
}

template <class V, class Part>
inline VITREG_INLINE void accumulate(float* sums, V a, V b, Part part) {
    write(sums, fma(a, b, load(sums, part)), part);
}

// X of the residual, B of the branch, Y of the normalized tokens.
template <class X, class B, class Y, bool kStreamed>
void backward_rows(const NormBackward& call, size_t block) {
    const size_t channels = call.channels;
    const float* weight = call.weight;
    const float* layer_scale = call.layer_scale;
    float* of_layer_scale = begin_sums(call.layer_scale_sums, block, channels);
    float* of_weight = begin_sums(call.weight_sums, block, channels);
    float* of_bias = begin_sums(call.bias_sums, block, channels);

    const size_t first = block * call.rows_of_block(), end = first + call.rows_of_block();
    const size_t last = end < call.rows() ? end : call.rows();
    for (size_t row = first; row < last; ++row) {
        const Place place(row, call.tokens), next(row + 1 < last ? row + 1 : row, call.tokens);
        const X *residual = row_of<X>(call.residual, place), *next_residual = row_of<X>(call.residual, next);
        const Y *upstream = row_of<Y>(call.grad_normalized, place), *next_upstream = row_of<Y>(call.grad_normalized, next);
        const F32 centre = broadcast(call.mean == nullptr ? 0.0f : call.mean[row]), scale = broadcast(call.rstd[row]);
        F32 along = zero(), average = zero();  // mean(g * x_hat), mean(g)
        if (upstream != nullptr) {
            Total of_products, total;
            sweep(channels, [&](size_t c, int i, auto part) VITREG_INLINE {
                prefetch(next_residual + c, part);
                prefetch(next_upstream + c, part);
                const auto arrived = load(upstream + c, part);
                const auto unit = (load(residual + c, part) - centre) * scale;
                const auto g = arrived * load(weight + c, part);  // zero in lanes that do not exist
                of_products.add_product(g, unit, i);
                total.add(g, i);
                if (of_weight != nullptr) accumulate(of_weight + c, arrived, unit, part);
                if (of_bias != nullptr) write(of_bias + c, arrived + load(of_bias + c, part), part);
            });
            along = broadcast(of_products.value() / channels);
            if (call.mean != nullptr) average = broadcast(total.value() / channels);
        }

        const X *passing = row_of<X>(call.grad_residual, place), *next_passing = row_of<X>(call.grad_residual, next);
        const B *branch = row_of<B>(call.branch, place), *next_branch = row_of<B>(call.branch, next);
        X* grad_x = row_of<X>(call.grad_x, row, channels);
        B* grad_branch = row_of<B>(call.grad_branch, row, channels);
        const F32 kept = broadcast(call.drop_path == nullptr ? 1.0f : call.drop_path[place.image]);
        sweep(channels, [&](size_t c, int, auto part) VITREG_INLINE {
            decltype(load(weight, part)) gradient = zero();
            if (upstream != nullptr) {
                const auto g = load(upstream + c, part) * load(weight + c, part);
                const auto unit = (load(residual + c, part) - centre) * scale;
                gradient = scale * (g - average - unit * along);
            }
            if (passing != nullptr) {
                prefetch(next_passing + c, part);
                gradient = gradient + load(passing + c, part);
            }
            if (grad_x != nullptr) write<kStreamed>(grad_x + c, gradient, part);
            if (grad_branch != nullptr) {
                const decltype(gradient) factor = layer_scale == nullptr ? kept : kept * load(layer_scale + c, part);
                write<kStreamed>(grad_branch + c, gradient * factor, part);
            }
            if (of_layer_scale != nullptr) {
                prefetch(next_branch + c, part);
                accumulate(of_layer_scale + c, gradient, kept * load(branch + c, part), part);
            }
        });
    }
    if constexpr (kStreamed) stream_done();
}

inline void backward(const NormBackward& call, size_t block) {
    with_type(call.residual.dtype, [&](auto x) {
        with_type(call.grad_branch.data == nullptr ? call.branch.dtype : call.grad_branch.dtype, [&](auto b) {
            with_type(call.grad_normalized.dtype, [&](auto y) {
                with_flag(call.streamed, [&](auto streamed) {
                    backward_rows<decltype(x), decltype(b), decltype(y), decltype(streamed)::value>(call, block);
                });
            });
        });
    });
}

inline void sum_blocks(const NormSums& call, size_t first, size_t last) {
    with_type(call.dtype, [&](auto type) {
        auto* gradient = static_cast<decltype(type)*>(call.gradient) + first;
        sweep(last - first, [&](size_t c, int, auto part) VITREG_INLINE {
            decltype(load(call.sums, part)) total = zero();
            for (size_t block = 0; block < call.blocks; ++block) {
                total = total + load(call.sums + block * call.channels + first + c, part);
            }
            write(gradient + c, total, part);
        });
    });
}

}  // namespace residual_norm

}  // namespace vitreg::VITREG_ISA
