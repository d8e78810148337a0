// The geometry of a batch of mask pairs, and the way from distances and counts to metrics: the
// definitions, shared by CPU and CUDA.
#pragma once
#include "formulas/host_device.h"
#include "noisyseg/surface.h"

namespace noisyseg::formulas {

// A batch of mask pairs as three spatial axes; those that a lower rank lacks have length 1 and stride 0.
struct MaskPairs {
  const void* data[2];  // pred, target
  int bytes[2];         // per element
  int64_t items;
  int batch_axes;
  int64_t batch_shape[Array::max_rank], batch_strides[2][Array::max_rank];
  int64_t shape[3], strides[2][3];
  bool spatial[3];
  double spacing[3];
};

static inline MaskPairs mask_pairs(const Array& pred, const Array& target, int spatial_dims,
                                   const double* spacing) {
  MaskPairs m = {};
  const Array* arrays[2] = {&pred, &target};
  if (spatial_dims < 1 || spatial_dims > 3 || spatial_dims > pred.rank)
    throw std::invalid_argument("spatial_dims must be 1, 2 or 3, and at most the masks' rank");
  if (pred.rank != target.rank) throw std::invalid_argument("pred and target must have the same shape");
  m.batch_axes = pred.rank - spatial_dims;
  m.items = 1;
  for (int side = 0; side < 2; ++side) {
    m.data[side] = arrays[side]->data;
    m.bytes[side] = dtype_size(arrays[side]->dtype);
  }
  for (int axis = 0; axis < pred.rank; ++axis) {
    if (pred.shape[axis] != target.shape[axis])
      throw std::invalid_argument("pred and target must have the same shape");
    if (pred.shape[axis] < 1) throw std::invalid_argument("pred and target must not be empty arrays");
    if (axis < m.batch_axes) {
      m.items *= m.batch_shape[axis] = pred.shape[axis];
      for (int side = 0; side < 2; ++side) m.batch_strides[side][axis] = arrays[side]->strides[axis];
    }
  }
  for (int i = 0; i < 3; ++i) {
    const int axis = pred.rank - 3 + i;
    m.spatial[i] = i >= 3 - spatial_dims;
    m.shape[i] = m.spatial[i] ? pred.shape[axis] : 1;
    m.spacing[i] = m.spatial[i] && spacing ? spacing[i - (3 - spatial_dims)] : 1.0;
    if (!(m.spacing[i] > 0)) throw std::invalid_argument("spacing must be positive");
    for (int side = 0; side < 2; ++side) m.strides[side][i] = m.spatial[i] ? arrays[side]->strides[axis] : 0;
  }
  return m;
}

// Where the mask of one item begins, in elements.
NOISYSEG_FORMULA int64_t item_offset(const MaskPairs& m, int side, int64_t item) {
  int64_t offset = 0;
  for (int axis = m.batch_axes - 1; axis >= 0; --axis) {
    offset += item % m.batch_shape[axis] * m.batch_strides[side][axis];
    item /= m.batch_shape[axis];
  }
  return offset;
}

NOISYSEG_FORMULA bool is_object(const void* data, int bytes, int64_t element) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(data)[element] != 0;
    case 4: return static_cast<const int32_t*>(data)[element] != 0;
    default: return static_cast<const int64_t*>(data)[element] != 0;
  }
}

// Linear interpolation between the order statistics `index` and `index + 1` of n sorted values, as
// numpy.percentile and torch.quantile do.
struct Rank {
  int64_t index;
  double weight;
};

NOISYSEG_FORMULA Rank percentile_rank(double percentile, int64_t n) {
  const double position = percentile / 100 * static_cast<double>(n - 1);
  int64_t index = static_cast<int64_t>(position);
  if (index > n - 1) index = n - 1;
  return {index, position - static_cast<double>(index)};
}

NOISYSEG_FORMULA double percentile_value(double low_squared, double high_squared, double weight) {
  const double low = sqrt(low_squared), high = sqrt(high_squared);
  return weight < 0.5 ? low + (high - low) * weight : high - (high - low) * (1 - weight);
}

// In single precision, as MONAI compares: the rounding of spacing times voxels then decides no tie.
NOISYSEG_FORMULA bool within_tolerance(double squared, double tolerance) {
  return static_cast<float>(sqrt(squared)) <= static_cast<float>(tolerance);
}

// Distances from each surface voxel of one mask to the other's surface.
struct Directed {
  int64_t count;    // surface voxels
  int64_t within;   // of them, those within the tolerance
  double sum;       // of distances
  double maximum;   // squared
  double quantile;  // distance; of the pooled distances in both directions for medpy
};

// out[0], out[stride], ...: hd, hd_percentile, asd, assd, nsd. pred: from pred's surface to target's.
//   monai (1.6.1): hd_percentile = the larger of the two directed percentiles;
//   medpy (0.5.2): hd_percentile = the percentile of the pooled distances.
// asd = mean over pred's surface; assd = mean over both; nsd = share of both within the tolerance.
// One surface empty: infinitely far, nsd 0. Both empty: in agreement, 0 and nsd 1.
NOISYSEG_FORMULA void surface_result(const Directed& pred, const Directed& target, double* out,
                                     int64_t stride) {
  const int64_t both = pred.count + target.count;
  if (pred.count == 0 || target.count == 0) {
    for (int i = 0; i < 4; ++i) out[i * stride] = both ? HUGE_VAL : 0.0;
    out[4 * stride] = both ? 0.0 : 1.0;
    return;
  }
  out[0] = sqrt(pred.maximum > target.maximum ? pred.maximum : target.maximum);
  out[stride] = pred.quantile > target.quantile ? pred.quantile : target.quantile;
  out[2 * stride] = pred.sum / static_cast<double>(pred.count);
  out[3 * stride] = (pred.sum + target.sum) / static_cast<double>(both);
  out[4 * stride] = static_cast<double>(pred.within + target.within) / static_cast<double>(both);
}

// out[0], out[stride], ...: dice, jaccard, sensitivity, specificity, precision, volume_error.
// 0/0 is 1 where the masks are equal and 0 where they differ; volume_error is inf for an empty target.
NOISYSEG_FORMULA void overlap_result(int64_t pred, int64_t target, int64_t both, int64_t size, double* out,
                                     int64_t stride) {
  const double tp = static_cast<double>(both), p = static_cast<double>(pred), t = static_cast<double>(target);
  const double negatives = static_cast<double>(size - target);
  const double tn = static_cast<double>(size - pred - target + both);
  const double none = pred == both && target == both ? 1.0 : 0.0;
  out[0] = p + t > 0 ? 2 * tp / (p + t) : none;
  out[stride] = p + t > 0 ? tp / (p + t - tp) : none;
  out[2 * stride] = t > 0 ? tp / t : none;
  out[3 * stride] = negatives > 0 ? tn / negatives : none;
  out[4 * stride] = p > 0 ? tp / p : none;
  out[5 * stride] = t > 0 ? (p - t) / t : (p > 0 ? HUGE_VAL : 0.0);
}

}  // namespace noisyseg::formulas
