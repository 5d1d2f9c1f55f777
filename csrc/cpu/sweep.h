// Walking a row of channels in vectors, and dtypes known at run time made types.
#pragma once

#include "vec.h"

namespace vitreg::VITREG_ISA {

// Which lanes of a vector exist: all, or the first n.
struct Whole {};
struct First {
    size_t n;
};

// For the bodies of loops, which the compiler would call otherwise, with all that they capture in memory.
#define VITREG_INLINE __attribute__((always_inline))

template <class T>
inline F32 load(const T* p, Whole) { return load(p); }
template <class T>
inline F32 load(const T* p, First part) { return load_first(p, part.n); }
template <class T>
inline void store(T* p, F32 v, Whole) { store(p, v); }
template <class T>
inline void store(T* p, F32 v, First part) { store_first(p, v, part.n); }

// store, or stream where that is asked for and there is a whole vector to write.
template <class T, class Part>
inline void write(T* p, F32 v, Part part, bool streamed) {
    if constexpr (sizeof(Part) == sizeof(Whole)) {
        if (streamed) return stream(p, v);
    }
    store(p, v, part);
}

inline F32 existing(F32 v, Whole) { return v; }
inline F32 existing(F32 v, First part) { return first_lanes(v, part.n); }

// body(c, i, part) for the vectors of `channels` numbers: c is the first channel, part says which lanes exist, and i
// goes round 0 to 3, for sums that need not wait for each other.
template <class Body>
inline VITREG_INLINE void sweep(size_t channels, const Body& body) {
    size_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) body(c + i * kLanes, i, Whole{});
    }
    for (; c < channels; c += kLanes) body(c, 0, First{channels - c < kLanes ? channels - c : kLanes});
}

inline float sum(const F32 (&parts)[4]) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// function(T{}) with the type that a dtype stands for.
template <class Function>
inline void with_type(Dtype dtype, const Function& function) {
    switch (dtype) {
        case Dtype::f32: return function(float{});
        case Dtype::bf16: return function(bf16{});
        case Dtype::f16: return function(fp16{});
    }
}

}  // namespace vitreg::VITREG_ISA
