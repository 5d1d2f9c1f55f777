// How fast a core multiplies and adds with everything in registers: the ceiling that kernels are held against.
#pragma once

#include "types.h"

namespace vitreg {

// GFLOP/s of the calling thread, in the fastest products that kernels can make of `dtype` with the instruction set of
// this process, each added to a sum: the median of short bursts during `seconds`, as other programs take a thread off
// its core within some of them, and other threads slow it down within most.
double peak_gflops(Dtype dtype, double seconds);

}  // namespace vitreg
