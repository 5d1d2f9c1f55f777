// Working memory of a thread. It is kept between calls: fresh pages would cost a short call more than its arithmetic.
#pragma once

#include <stddef.h>
#include <stdlib.h>

#include "vec.h"

namespace vitreg::VITREG_ISA {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { free(memory_); }

    // At least as many bytes, at a cache line; what stood there before is lost.
    char* bytes(size_t count) {
        if (count > bytes_) {
            free(memory_);
            bytes_ = (count + 4095) / 4096 * 4096;
            memory_ = static_cast<char*>(aligned_alloc(4096, bytes_));
            if (!memory_) abort();
        }
        return memory_;
    }

private:
    char* memory_ = nullptr;
    size_t bytes_ = 0;
};

// Arrays side by side: named once, they are gone through twice, to add up their sizes and to place them.
//
//   Places places(scratch);
//   do { places.put(pointer, elements); } while (places.again());
class Places {
public:
    explicit Places(Scratch& scratch) : scratch_(scratch) {}

    template <class T>
    void put(T*& pointer, size_t elements) {
        pointer = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += (elements * sizeof(T) + 63) / 64 * 64;
    }

    bool again() {
        if (memory_) return false;
        memory_ = scratch_.bytes(used_);
        used_ = 0;
        return true;
    }

private:
    Scratch& scratch_;
    char* memory_ = nullptr;
    size_t used_ = 0;
};

}  // namespace vitreg::VITREG_ISA
