#include "huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vitreg {

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kPage = 2 << 20;  // on x86-64, and on AArch64 with pages of 4 KiB
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    // As NumPy asks from 4 MiB on, of which half is in whole pages at least: less is not worth a call of the system's.
    if (bytes >= 2 * kPage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace vitreg
