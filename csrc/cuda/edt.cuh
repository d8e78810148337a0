// Squared distance maps of dense volumes on the device, for other CUDA families.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg::cuda {

size_t squared_distance_workspace(int64_t batch, const int64_t shape[3]);

// out[v] = squared distance from v to the nearest voxel of its volume with sites[v] != 0, inf if there is
// none. sites and out: (batch, shape), C order; leading axes are 1 if there are fewer than three.
void squared_distance(const uint8_t* sites, float* out, void* workspace, int64_t batch,
                      const int64_t shape[3], const double spacing[3], const Exec& exec);

}  // namespace noisyseg::cuda
