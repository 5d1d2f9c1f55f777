#define VITREG_ISA avx512
#include "isa.h"

const vitreg::Kernels vitreg::kAvx512 = vitreg::avx512::kTable;
