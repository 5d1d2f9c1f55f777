#define VITREG_ISA avx512bf16
#include "isa.h"

const vitreg::Kernels vitreg::kAvx512Bf16 = vitreg::avx512bf16::kTable;
