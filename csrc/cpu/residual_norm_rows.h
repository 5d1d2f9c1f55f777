// Where the rows of a residual norm's tensors are.
#pragma once

#include "residual_norm.h"
#include "sweep.h"

namespace vitreg::VITREG_ISA {

namespace residual_norm {

struct Place {
    size_t image, token;

    Place(size_t row, size_t tokens) : image(row / tokens), token(row % tokens) {}
};

template <class T>
inline const T* row_of(const NormRows& rows, const Place& place) {
    if (rows.data == nullptr) return nullptr;
    return static_cast<const T*>(rows.data) + place.image * rows.stride_b + place.token * rows.stride_n;
}

template <class T>
inline T* row_of(const NormRowsOut& rows, size_t row, size_t channels) {
    return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * channels;
}

}  // namespace residual_norm

}  // namespace vitreg::VITREG_ISA
