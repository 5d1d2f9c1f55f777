#include "cpuid.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitreg {

namespace {

constexpr const char* kNames[kIsas] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)

constexpr bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

// Tiles are eight kilobytes that the system must keep for every thread: it wants to be asked first, once for them all.
bool tiles_are_granted() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Isa ask() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::baseline;
    const bool fma_f16c = has(ecx, bit_FMA | bit_F16C);
    if (!has(ecx, bit_OSXSAVE)) return Isa::baseline;
    uint32_t saved, high;  // the registers that the operating system keeps for each thread
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::baseline;
    constexpr uint32_t kYmm = 0x06, kZmm = 0xe6, kTiles = 0x60000, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    const bool amx = has(edx, kAmxBf16 | kAmxTile) && has(saved, kTiles);
    if (!fma_f16c || !has(ebx, bit_AVX2) || !has(saved, kYmm)) return Isa::baseline;
    if (!has(ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) || !has(saved, kZmm)) return Isa::avx2;
    constexpr uint32_t kAvx512Bf16 = 1u << 5;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !has(eax, kAvx512Bf16)) return Isa::avx512;
    if (amx && tiles_are_granted()) return Isa::amx;
    // Measured on an Intel CPU: half as many products of bf16 as of fp32 in a cycle, twice as many on one of AMD.
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx ? Isa::avx512 : Isa::avx512bf16;
}

#else

Isa ask() { return Isa::baseline; }

#endif

Isa choose() {
    const char* wanted = std::getenv("VITREG_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return detected();
    for (int isa = 0; isa < kIsas; ++isa) {
        if (std::strcmp(wanted, kNames[isa]) != 0) continue;
        if (Isa(isa) <= detected()) return Isa(isa);
        throw std::runtime_error(std::string("VITREG_CPU_ISA=") + wanted + ", but this CPU goes no further than " +
                                 name(detected()));
    }
    throw std::runtime_error(std::string("VITREG_CPU_ISA must be baseline, avx2, avx512, avx512bf16 or amx, got ") + wanted);
}

}  // namespace

const char* name(Isa isa) { return kNames[int(isa)]; }

Isa detected() {
    static const Isa isa = ask();
    return isa;
}

Isa chosen() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace vitreg
