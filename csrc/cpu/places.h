// Arrays side by side in the working memory of a thread.
#pragma once

#include "scratch.h"
#include "vec.h"

namespace vitreg::VITREG_ISA {

// Named once, the arrays are gone through twice, to add up their sizes and to place them.
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
