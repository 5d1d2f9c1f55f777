#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "cpuid.h"

namespace vitreg {

namespace {

#if defined(__x86_64__)

// In assembly, because a compiler may put sums of intrinsics into memory, and then finds half the speed. There are 15
// sums, so that none is waited for: a product takes 4 to 6 cycles, and a core begins two in each.
#define VITREG_BURST(op, width)                                                                                   \
    const uint32_t half = 0x3f003f00;  /* about 0.5 as fp32, 0.5 twice as bf16 */                                 \
    const int64_t products = 4 * 15 * rounds;                                                                     \
    __asm__ volatile(                                                                                             \
        "vbroadcastss %[half], %%" width "15\n"                                                                   \
        ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14\n"                                              \
        "vxorps %%xmm\\i, %%xmm\\i, %%xmm\\i\n"                                                                   \
        ".endr\n"                                                                                                 \
        "1:\n"                                                                                                    \
        ".rept 4\n"                                                                                               \
        ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14\n" op " %%" width "15, %%" width "15, %%" width \
        "\\i\n"                                                                                                   \
        ".endr\n"                                                                                                 \
        ".endr\n"                                                                                                 \
        "dec %[rounds]\n"                                                                                         \
        "jnz 1b\n"                                                                                                \
        "vzeroupper\n"                                                                                            \
        : [rounds] "+r"(rounds)                                                                                   \
        : [half] "m"(half)                                                                                        \
        : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
          "xmm12", "xmm13", "xmm14", "xmm15")

__attribute__((target("avx2,fma"))) int64_t fma_256(int64_t rounds) {
    VITREG_BURST("vfmadd231ps", "ymm");
    return products * 8 * 2;
}

__attribute__((target("avx512f"))) int64_t fma_512(int64_t rounds) {
    VITREG_BURST("vfmadd231ps", "zmm");
    return products * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t dot_512(int64_t rounds) {
    VITREG_BURST("vdpbf16ps", "zmm");
    return products * 32 * 2;
}

#undef VITREG_BURST

// By the assembler's own words for it, which no target attribute is asked for. Tiles are loaded by nothing: they are 0.
int64_t tiles(int64_t rounds) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
    } config;
    const int64_t products = 16 * rounds;
    __asm__ volatile(
        "ldtilecfg %[config]\n"
        "1:\n"
        ".rept 4\n"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm0\n"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm1\n"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm2\n"
        "tdpbf16ps %%tmm5, %%tmm4, %%tmm3\n"
        ".endr\n"
        "dec %[rounds]\n"
        "jnz 1b\n"
        "tilerelease\n"
        : [rounds] "+r"(rounds)
        : [config] "m"(config)
        : "cc");
    return products * 16 * 16 * 32 * 2;
}

#endif

// What kernels do without such instructions: a product, then a sum. Twelve variables, not an array, stay in registers.
int64_t plain(int64_t rounds) {
    typedef float Vector __attribute__((vector_size(16)));
    const Vector half = {0.5f, 0.5f, 0.5f, 0.5f};
    Vector a = half * 0, b = a + 1, c = a + 2, d = a + 3, e = a + 4, f = a + 5;
    Vector g = a + 6, h = a + 7, i = a + 8, j = a + 9, k = a + 10, l = a + 11;
    for (int64_t round = 0; round < rounds; ++round) {
        a = a * half + half, b = b * half + half, c = c * half + half, d = d * half + half;
        e = e * half + half, f = f * half + half, g = g * half + half, h = h * half + half;
        i = i * half + half, j = j * half + half, k = k * half + half, l = l * half + half;
    }
    const Vector sum = ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + l));
    volatile float used = sum[0] + sum[1] + sum[2] + sum[3];
    (void)used;
    return 12 * 4 * 2 * rounds;
}

// Of bf16, for one of fp32 in parts: see cpu/amx.h.
constexpr int kProductsOfParts = 6;

// The fastest products that kernels can make of a dtype with the instruction set of this process.
int64_t burst(Dtype dtype, int64_t rounds) {
#if defined(__x86_64__)
    const Isa isa = chosen();
    if (isa >= Isa::amx) return tiles(rounds / 4) / (dtype == Dtype::bf16 ? 1 : kProductsOfParts);
    if (isa >= Isa::avx512bf16 && dtype == Dtype::bf16) return dot_512(rounds);
    if (isa >= Isa::avx512) return fma_512(rounds);
    if (isa >= Isa::avx2) return fma_256(rounds);
#endif
    return plain(rounds);
}

}  // namespace

double peak_gflops(Dtype dtype, double seconds) {
    using Clock = std::chrono::steady_clock;
    constexpr int64_t kRounds = 1 << 13;  // about 50 microseconds, within which a thread is seldom taken off its core
    std::vector<double> speeds;
    const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                     std::chrono::duration<double>(seconds));
    Clock::time_point start = Clock::now();
    do {
        const int64_t operations = burst(dtype, kRounds);
        const Clock::time_point now = Clock::now();
        speeds.push_back(operations / std::chrono::duration<double, std::nano>(now - start).count());
        start = now;
    } while (start < end);
    const auto middle = speeds.begin() + speeds.size() / 2;
    std::nth_element(speeds.begin(), middle, speeds.end());
    return *middle;
}

}  // namespace vitreg
