#include "kernels.h"

#include "cpuid.h"

namespace vitreg {

const Kernels& kernels() {
#if defined(__x86_64__)
    static const Kernels* const tables[kIsas] = {&kBaseline, &kAvx2, &kAvx512, &kAvx512Bf16, &kAmx};
    return *tables[int(chosen())];
#else
    return kBaseline;
#endif
}

}  // namespace vitreg
