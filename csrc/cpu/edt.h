// Squared distance maps of dense volumes, for other CPU kernels.
#pragma once
#include "cpu/isa.h"

namespace noisyseg::NOISYSEG_ISA {

// Bytes of scratch memory, aligned to 16, for volumes of this shape (leading axes 1 if there are fewer than
// three).
size_t squared_distance_workspace(const int64_t shape[3], int threads, bool fp64);

// out[v] = squared distance from v to the nearest voxel with sites[v] != 0, inf if there is none. Both in C
// order.
void squared_distance(const uint8_t* sites, float* out, void* workspace, const int64_t shape[3],
                      const double spacing[3], int threads);
void squared_distance(const uint8_t* sites, double* out, void* workspace, const int64_t shape[3],
                      const double spacing[3], int threads);

}  // namespace noisyseg::NOISYSEG_ISA
