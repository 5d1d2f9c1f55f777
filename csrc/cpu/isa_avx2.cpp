#define VITREG_ISA avx2
#include "isa.h"

const vitreg::Kernels vitreg::kAvx2 = vitreg::avx2::kTable;
