#include "scratch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitreg {

namespace {

constexpr size_t kPage = 4096;

}  // namespace

Scratch::~Scratch() { std::free(memory_); }

char* Scratch::bytes(size_t count) {
    if (count <= bytes_) return memory_;
    std::free(memory_);
    bytes_ = 0;
    const size_t pages = (count + kPage - 1) / kPage * kPage;
    memory_ = static_cast<char*>(std::aligned_alloc(kPage, pages));
    if (!memory_)
        throw std::runtime_error("can't allocate memory: each thread of this native kernel needs " +
                                 std::to_string(pages) + " bytes to work in");
    bytes_ = pages;
    return memory_;
}

Scratch& scratch_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
}

}  // namespace vitreg
