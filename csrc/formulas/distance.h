// What the CPU and the CUDA distance transforms share.
//
// Both go axis by axis. Along a line, with f_j the squared distance found so far at j, the new one is
// min_j f_j + w^2 (i-j)^2 (Felzenszwalb and Huttenlocher 2012). It is found by looking outwards from i, k =
// 1, 2, ..., until w^2 k^2 alone is no better: exact, and as short as the distance itself.
//
// A signed map takes one such transform, not two: f carries its voxel's class as its sign (f > 0: object).
// Seen from a voxel of class s, a voxel j of the other class is a site itself, so the candidate is max(s f_j,
// 0) + w^2 k^2.
#pragma once
#include "formulas/host_device.h"

namespace noisyseg::formulas {

template <class T>
NOISYSEG_FORMULA T squared_step(int64_t k, T w2) {
  return static_cast<T>(k) * static_cast<T>(k) * w2;
}

// A signed map's value from the distance d >= 0 of a voxel that is inside the object or not.
NOISYSEG_FORMULA float kervadec_value(float d, bool inside) { return inside ? 1.f - d : d; }

}  // namespace noisyseg::formulas
