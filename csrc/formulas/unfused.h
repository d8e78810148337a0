// Products and sums that no compiler fuses: the CPU's files that use them are compiled with
// -ffp-contract=off.
#pragma once
#include "formulas/host_device.h"

namespace noisyseg::formulas {

#ifdef __CUDA_ARCH__
NOISYSEG_FORMULA double times(double a, double b) { return __dmul_rn(a, b); }
NOISYSEG_FORMULA double plus(double a, double b) { return __dadd_rn(a, b); }
#else
NOISYSEG_FORMULA double times(double a, double b) { return a * b; }
NOISYSEG_FORMULA double plus(double a, double b) { return a + b; }
#endif

}  // namespace noisyseg::formulas
