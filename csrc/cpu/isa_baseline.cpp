#define VITREG_ISA baseline
#include "isa.h"

const vitreg::Kernels vitreg::kBaseline = vitreg::baseline::kTable;
