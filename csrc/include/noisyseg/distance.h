// Exact Euclidean distance transforms and signed distance maps, on the CPU or a CUDA device.
//
// mask: (..., *S) u8, b8, i32 or i64 with any strides; not 0 means object; the last spatial_dims axes (1 to
// 3) are space, the others a batch. spacing: one value for each spatial axis, nullptr for 1. out: f32, the
// mask's shape, contiguous. workspace: distance_workspace(...) bytes on the same device, aligned to 16.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class SignedMap : int {
  boundary,   // distance to the object's inner contour, 0 on it
  two_sided,  // distance to the object outside, minus the distance to the background inside
  kervadec,   // +d outside, -(d - 1) inside
  dtc         // each side divided by its maximum, 0 on the inner contour
};

// indices: for distance_transform_edt with indices; contour: for signed_distance_map with
// SignedMap::boundary.
size_t distance_workspace(const Array& mask, int spatial_dims, bool indices, bool contour, const Exec& exec);

// Distance of every object voxel to the nearest background voxel; inf where the item has none. indices,
// optional: i32 (batch..., spatial_dims, *S), contiguous, the position of that voxel, -1 where there is none.
void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing, bool squared,
                            const Array& out, const Array& indices, void* workspace, const Exec& exec);

// Negative inside. Without a boundary in an item: +-inf, with normalize and for dtc +1 (empty) and -1 (full),
// for kervadec 0. normalize divides by the item's largest absolute value.
void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing, SignedMap convention,
                         bool normalize, const Array& out, void* workspace, const Exec& exec);

}  // namespace noisyseg
