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

// ---- nearest surface voxel -------------------------------------------------------------------------
// A surface is one bit per voxel, rows of 64-bit words; words before and after a row are zero. A search
// goes over the rows around a voxel, nearest first; T is the type of squared lengths: integers for equal
// spacings (times the squared spacing in the end), doubles for others.

NOISYSEG_FORMULA int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NOISYSEG_FORMULA int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

#if defined(__CUDA_ARCH__)
NOISYSEG_FORMULA int lowest_bit(uint64_t word) { return __ffsll(static_cast<long long>(word)) - 1; }
NOISYSEG_FORMULA int highest_bit(uint64_t word) { return 63 - __clzll(static_cast<long long>(word)); }
#else
NOISYSEG_FORMULA int lowest_bit(uint64_t word) { return __builtin_ctzll(word); }
NOISYSEG_FORMULA int highest_bit(uint64_t word) { return 63 - __builtin_clzll(word); }
#endif

template <class T>
NOISYSEG_FORMULA T far() {
  return static_cast<T>(int64_t{1} << 62);
}

template <class T>
NOISYSEG_FORMULA T square_of(int64_t steps, T unit) {
  return static_cast<T>(steps * steps) * unit;
}

template <class T>
struct Offset {
  T squared;
  int32_t dz, dy;
};

constexpr int64_t max_offsets = 1024;

template <class T>
struct Rings {
  Offset<T>* offsets;  // sorted
  int64_t count;
  T beyond;   // no row outside the list is nearer; far when the list holds every row
  T unit[3];  // squared spacing
};

// Rings without their offsets: the rows up to to[0] along z and to[1] along y that are nearer than
// `beyond`, for the largest radius that gives at most max_offsets. common: the spacing of all axes or 0.
template <class T>
static inline Rings<T> empty_rings(const int64_t shape[3], const double spacing[3], double common,
                                   Offset<T>* offsets, int64_t to[2]) {
  Rings<T> r = {offsets, 0, far<T>(), {}};
  for (int i = 0; i < 3; ++i) r.unit[i] = common > 0 ? T(1) : T(spacing[i] * spacing[i]);
  double radius =
      fmax(spacing[0] * static_cast<double>(shape[0]), spacing[1] * static_cast<double>(shape[1]));
  do {
    for (int i = 0; i < 2; ++i) to[i] = smaller(shape[i] - 1, static_cast<int64_t>(radius / spacing[i]));
    radius *= 0.95;
  } while ((2 * to[0] + 1) * (2 * to[1] + 1) > max_offsets);
  for (int i = 0; i < 2; ++i) {
    const T outside = square_of<T>(to[i] + 1, r.unit[i]);
    if (to[i] + 1 < shape[i] && outside < r.beyond) r.beyond = outside;
  }
  return r;
}

struct Sites {
  const uint64_t* bits;  // word 0 of the first row
  int64_t plane, row;    // words from one plane or row to the next
  int64_t first, end;    // words of a row that may hold bits
  int64_t shape[2];      // planes, rows
};

// Steps from voxel x of a row to the nearest set bit outside x's word, if fewer than `limit`.
NOISYSEG_FORMULA int64_t steps_along(const uint64_t* row, int64_t x, int64_t first, int64_t end,
                                     int64_t limit) {
  for (int64_t k = x / 64 + 1; k < end && 64 * k - x < limit; ++k)
    if (row[k]) limit = smaller(limit, 64 * k + lowest_bit(row[k]) - x);
  for (int64_t k = x / 64 - 1; k >= first && x - 64 * k - 63 < limit; --k)
    if (row[k]) limit = smaller(limit, x - 64 * k - highest_bit(row[k]));
  return limit;
}

// `best`, or the squared distance from position x to the nearest set bit on row (z, y), which is
// `squared` away, if that is less.
template <class T>
NOISYSEG_FORMULA T on_row(const Sites& s, T unit, int64_t z, int64_t y, int64_t x, T squared, T best) {
  const uint64_t* row = s.bits + z * s.plane + y * s.row;
  const int64_t k = x >> 6;
  const int shift = static_cast<int>(x & 63);
  const uint64_t right = row[k] >> shift | row[k + 1] << 1 << (63 - shift);  // bits x to x + 63
  const uint64_t left = row[k] << (63 - shift) | row[k - 1] >> 1 >> shift;   // bits x - 63 to x
  int64_t steps = 64;
  if (right | left) {
    const int a = right ? lowest_bit(right) : 64, b = left ? 63 - highest_bit(left) : 64;
    steps = a < b ? a : b;
  } else {
    if (squared + square_of<T>(64, unit) >= best) return best;
    const int64_t none = int64_t{1} << 30;
    steps = steps_along(row, x, s.first, s.end, none);
    if (steps == none) return best;
  }
  const T d = squared + square_of<T>(steps, unit);
  return d < best ? d : best;
}

// Squared distance from voxel (z, y, x) to the nearest set bit on the rows of the list, and the number of
// rows seen. Right if it is at most r.beyond.
template <class T>
NOISYSEG_FORMULA T nearest(const Sites& s, const Rings<T>& r, int64_t z, int64_t y, int64_t x, int64_t& i) {
  T best = far<T>();
  for (i = 0; i < r.count; ++i) {
    const Offset<T> o = r.offsets[i];
    if (o.squared >= best) break;
    const int64_t v = z + o.dz, u = y + o.dy;
    if (static_cast<uint64_t>(v) < static_cast<uint64_t>(s.shape[0]) &&
        static_cast<uint64_t>(u) < static_cast<uint64_t>(s.shape[1]))
      best = on_row(s, r.unit[2], v, u, x, o.squared, best);
  }
  return best;
}

// at, at + 1, at - 1, at + 2, ...
NOISYSEG_FORMULA int64_t outward(int64_t i, int64_t at) { return at + (i & 1 ? i / 2 + 1 : -(i / 2)); }

// The same over every row of plane z + dz at squared distance `squared`.
template <class T>
NOISYSEG_FORMULA T nearest_on_plane(const Sites& s, const T unit[3], int64_t z, int64_t y, int64_t x,
                                    T squared, T best) {
  for (int64_t j = 0; j <= 2 * s.shape[1]; ++j) {
    const int64_t u = outward(j, y);
    const T d = squared + square_of<T>(u - y, unit[1]);
    if (d >= best) break;
    if (u >= 0 && u < s.shape[1]) best = on_row(s, unit[2], z, u, x, d, best);
  }
  return best;
}

// The same over every row, for the few voxels that the list leaves open.
template <class T>
NOISYSEG_FORMULA T nearest_of_all(const Sites& s, const T unit[3], int64_t z, int64_t y, int64_t x, T best) {
  for (int64_t i = 0; i <= 2 * s.shape[0]; ++i) {
    const int64_t v = outward(i, z);
    const T squared = square_of<T>(v - z, unit[0]);
    if (squared >= best) break;
    if (v >= 0 && v < s.shape[0]) best = nearest_on_plane(s, unit, v, y, x, squared, best);
  }
  return best;
}

// ---- from distances to metrics ---------------------------------------------------------------------

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
