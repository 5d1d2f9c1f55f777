// The norms of tokens, each token read once, and counting them, each norm read once.
#pragma once

#include "sweep.h"
#include "token_norms.h"

namespace vitreg::VITREG_ISA {

namespace token_norms {

// In the order of residual_norm_forward.h, whose norms of the same tokens have the same bits.
inline void norms(const TokenNorms& call, size_t first, size_t last) {
    with_type(call.dtype, [&](auto type) {
        using T = decltype(type);
        for (size_t row = first; row < last; ++row) {
            const size_t image = row / call.tokens, token = row % call.tokens;
            const T* x = static_cast<const T*>(call.x) + image * call.stride_b + token * call.stride_n;
            Total squares;
            sweep(call.channels, [&](size_t c, int i, auto part) VITREG_INLINE {
                const auto value = load(x + c, part);
                squares.add_product(value, value, i);
            });
            call.norms[row] = __builtin_sqrtf(squares.value());
        }
    });
}

// Bins as ops/token_norms/bins.py has them: a norm's exponent and the first 6 bits of its mantissa, from 2^-12 on.
constexpr int kShift = 23 - 6, kFirstBin = (127 - 12) << 6, kBins = 2048;

inline int bin_of(int32_t bits) {
    const int bin = (bits >> kShift) - kFirstBin;
    return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// Group by group, image by image: one order for all sums.
inline void count(const NormCounts& call) {
    size_t begin = 0;
    for (size_t group = 0; group < 3; ++group) {
        double total = 0.0, squares = 0.0;
        float smallest = call.extremes.at(group, 0), largest = call.extremes.at(group, 1);
        for (size_t image = 0; image < call.batch; ++image) {
            const float* of_image = call.norms + image * call.stride_b;
            for (size_t token = begin; token < call.ends[group]; ++token) {
                const float norm = of_image[token * call.stride_n];
                int32_t bits;
                __builtin_memcpy(&bits, &norm, sizeof bits);
                const int32_t magnitude = bits & 0x7fffffff, infinite = 0x7f800000;
                if (magnitude >= infinite) {
                    ++call.nonfinite.at(group, magnitude > infinite ? 0 : 1);
                    continue;
                }
                ++call.histogram.at(group, bin_of(bits));
                const double wide = norm;
                total += wide;
                squares += wide * wide;
                smallest = norm < smallest ? norm : smallest;
                largest = norm > largest ? norm : largest;
            }
        }
        call.sums.at(group, 0) += total;
        call.sums.at(group, 1) += squares;
        call.extremes.at(group, 0) = smallest;
        call.extremes.at(group, 1) = largest;
        begin = call.ends[group];
    }
}

}  // namespace token_norms

}  // namespace vitreg::VITREG_ISA
