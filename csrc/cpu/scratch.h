// Working memory of a thread.
#pragma once

#include <stddef.h>

namespace vitreg {

// It is kept between calls: fresh pages would cost a short call more than its arithmetic. Nothing here is inline, as one
// copy would serve all instruction sets.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch();

    // At least as many bytes, at a page; what stood there before is lost. Throws std::runtime_error, one sentence, where
    // there is no such memory.
    char* bytes(size_t count);

    // At the end of a call: back to the system with what is more than short calls need.
    void end_call();

private:
    char* memory_ = nullptr;
    size_t bytes_ = 0;
};

// That of the calling thread: one for all ops and dtypes, which take turns.
Scratch& scratch_of_thread();

}  // namespace vitreg
