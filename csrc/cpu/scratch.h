// Working memory of a thread. It is kept between calls: fresh pages would cost a short call more than its arithmetic.
#pragma once

#include <cstddef>
#include <cstdlib>

#include "vec.h"

namespace vitreg::VITREG_ISA {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    // `count` floats, at a cache line. What stood there is lost when it grows.
    float* floats(size_t count) {
        const size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
            bytes_ = memory_ ? bytes : 0;
            if (!memory_) std::abort();
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace vitreg::VITREG_ISA
