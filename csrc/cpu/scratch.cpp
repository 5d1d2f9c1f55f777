#include "scratch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace vitreg {

namespace {

constexpr size_t kPage = 4096;
// Half as much again as the backward takes of 1374 tokens of 128 fp32 channels in parts, the largest call of a common ViT.
// Beyond it the pages cost little beside the arithmetic, which grows with the square of the tokens.
constexpr size_t kKept = 16 << 20;

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

void Scratch::end_call() {
    if (bytes_ <= kKept) return;
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
}

Scratch& scratch_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
}

}  // namespace vitreg
