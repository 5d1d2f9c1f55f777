// Walking along a row of channels, and dtypes known at run time made types.
#pragma once

#include "pair.h"

namespace vitreg::VITREG_ISA {

// Which lanes exist: all of a pair of vectors, or the first n of one.
struct Whole {};
struct First {
    size_t n;
};

// For the bodies of loops, which the compiler would call otherwise, with all that they capture in memory.
#define VITREG_INLINE __attribute__((always_inline))

template <class T>
inline VITREG_INLINE Pair load(const T* p, Whole) { return load_pair(p); }
template <class T>
inline VITREG_INLINE F32 load(const T* p, First part) { return load_first(p, part.n); }

// Gives what is read there afterwards. Past the caches where kStreamed, but for single vectors.
template <bool kStreamed = false, class T>
inline VITREG_INLINE Pair write(T* p, Pair v, Whole) { return put<kStreamed>(p, v); }
template <bool kStreamed = false, class T>
inline VITREG_INLINE F32 write(T* p, F32 v, First part) {
    store_first(p, v, part.n);
    return rounded<T>(v);
}

// Asks for what a load of the next row will read. Measured on an Intel Xeon: up to a sixth of the time saved where rows
// come from beyond the second-level cache, none lost where they are in it.
template <class T>
inline VITREG_INLINE void prefetch(const T* p, Whole) {
    constexpr int kLine = 64 / sizeof(T);
    for (int i = 0; i < 2 * kLanes; i += kLine) __builtin_prefetch(p + i);
}
template <class T>
inline VITREG_INLINE void prefetch(const T* p, First) { __builtin_prefetch(p); }

inline VITREG_INLINE Pair existing(Pair v, Whole) { return v; }
inline VITREG_INLINE F32 existing(F32 v, First part) { return first_lanes(v, part.n); }

// A sum along a row: of four vectors, which need not wait for each other. Those of a pair are the i-th and the next.
class Total {
public:
    Total() : parts_{zero(), zero(), zero(), zero()} {}

    VITREG_INLINE void add(F32 v, int i) { parts_[i] = parts_[i] + v; }
    VITREG_INLINE void add(Pair v, int i) {
        add(v.low, i);
        add(v.high, i + 1);
    }

    VITREG_INLINE void add_product(F32 a, F32 b, int i) { parts_[i] = fma(a, b, parts_[i]); }
    VITREG_INLINE void add_product(Pair a, Pair b, int i) {
        add_product(a.low, b.low, i);
        add_product(a.high, b.high, i + 1);
    }

    VITREG_INLINE float value() const { return sum((parts_[0] + parts_[1]) + (parts_[2] + parts_[3])); }

private:
    F32 parts_[4];
};

// body(c, i, part) along `channels` numbers: c is the first of them, part says which lanes exist, and i is where a Total
// takes them.
template <class Body>
inline VITREG_INLINE void sweep(size_t channels, const Body& body) {
    size_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) {
        body(c, 0, Whole{});
        body(c + 2 * kLanes, 2, Whole{});
    }
    for (; c < channels; c += kLanes) body(c, 0, First{channels - c < kLanes ? channels - c : kLanes});
}

template <bool kValue>
struct Flag {
    static constexpr bool value = kValue;
};

// function(Flag<...>{}) with what is known at run time only.
template <class Function>
inline void with_flag(bool value, const Function& function) {
    if (value)
        function(Flag<true>{});
    else
        function(Flag<false>{});
}

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
