// Which instruction sets this machine can run, and which of them the process runs.
#pragma once

namespace vitreg {

// In order: each contains the ones before it.
enum class Isa { baseline, avx2, avx512, avx512bf16, amx };

constexpr int kIsas = 5;

const char* name(Isa isa);

// The best one that the CPU and the operating system offer.
Isa detected();

// The one that kernels run: `detected()`, or what the environment variable VITREG_CPU_ISA names, which is read once.
// Throws std::runtime_error, one sentence, where it names what is not there.
Isa chosen();

}  // namespace vitreg
