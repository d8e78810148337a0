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

// Planes whose sites are bits: bit first + x of row (z, y), whose word 0 is bits[z * plane + y * row]; the
// word after a row's last is readable.
struct BitPlanes {
  const uint64_t* bits;
  int64_t plane, row, first;
  int64_t shape[3];  // planes, rows, columns
};

// Bytes of scratch memory, aligned to 16, for planes of that shape.
size_t plane_distance_workspace(int64_t rows, int64_t columns, int threads, bool fp64);

// out (planes, rows, columns): the squared distance to the nearest site of the same plane, inf if it has
// none.
void plane_distance(const BitPlanes& sites, const double squared_spacing[2], float* out, void* workspace,
                    int threads);
void plane_distance(const BitPlanes& sites, const double squared_spacing[2], double* out, void* workspace,
                    int threads);

}  // namespace noisyseg::NOISYSEG_ISA
