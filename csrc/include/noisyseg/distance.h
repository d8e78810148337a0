// Exact Euclidean distance transforms and signed distance maps, on the CPU or a CUDA device.
//
// mask: (..., *S) u8, b8, i32 or i64 with any strides; not 0 means object; the last spatial_dims axes (1 to
// 3) are space, the others a batch. spacing: one value for each spatial axis, nullptr for 1. out: f32 or f64,
// the mask's shape, contiguous; computed in its own precision. workspace: as many bytes as the query says, on
// the same device, aligned to 16.
#pragma once
#include <cmath>

#include "noisyseg/array.h"

namespace noisyseg {

enum class SignedMap : int {
  boundary,   // distance to the object's inner contour, 0 on it
  two_sided,  // distance to the object outside, minus the distance to the background inside
  kervadec,   // +d outside, -(d - 1) inside
  dtc         // each side divided by its maximum, 0 on the inner contour
};

struct DistanceOptions {
  bool border = false;        // voxels outside the image are background
  double no_site = INFINITY;  // the value where an item has no site
  // distance_transform_edt
  bool squared = false;
  bool multi_label = false;  // sites of a voxel: all voxels of another value; 0 where the mask is 0
  // signed_distance_map
  SignedMap convention = SignedMap::two_sided;
  bool normalize = false;   // divides by the item's largest absolute value
  int64_t num_classes = 0;  // c > 0: out is (batch..., c, *S), one map for each value 0 to c-1 of the mask
};

// For the two functions below; indices: whether distance_transform_edt is asked for them.
size_t distance_workspace(const Array& mask, int spatial_dims, const DistanceOptions& options, bool indices,
                          bool fp64, const Exec& exec);

// Distance of every object voxel to the nearest background voxel; no_site where the item has none. indices,
// optional, not with border: i32 (batch..., spatial_dims, *S), contiguous, the position of that voxel, -1
// where there is none. multi_label on the CPU: i64 values within the range of i32.
void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing,
                            const DistanceOptions& options, const Array& out, const Array& indices,
                            void* workspace, const Exec& exec);

// Negative inside. Without a boundary in an item: +-no_site, with normalize and for dtc +1 (empty) and -1
// (full), for kervadec 0.
void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing,
                         const DistanceOptions& options, const Array& out, void* workspace, const Exec& exec);

// out(p) = min_q values(q) + |p - q|^2 over the q with sites(q) != 0 (all without sites) and values(q) < inf;
// inf if there is none. values: f32 or f64, sites: as mask, both any strides; out: of the values' dtype,
// contiguous. apexes: i32 (spatial_dims, batch..., *S), contiguous, for the backward: per axis, where each
// voxel's minimum comes from.
size_t sampled_distance_workspace(const Array& values, int spatial_dims, const Exec& exec);
void sampled_distance(const Array& values, const Array& sites, int spatial_dims, const double* spacing,
                      const Array& out, const Array& apexes, void* workspace, const Exec& exec);

// grad_values(q) = sum of grad(p) over the p whose minimum is at q: line by line along each axis, in order.
// grad: contiguous, of out's dtype and shape, as is grad_values.
void sampled_distance_backward(const Array& grad, const Array& apexes, int spatial_dims,
                               const Array& grad_values, void* workspace, const Exec& exec);

}  // namespace noisyseg
