// The geometry of a batch of mask pairs, and the way from distances and counts to metrics: the
// definitions, shared by CPU and CUDA.
#pragma once
#include "formulas/dtype.h"
#include "formulas/host_device.h"
#include "noisyseg/surface.h"

namespace noisyseg::formulas {

// A batch of mask pairs as three spatial axes; those that a lower rank lacks have length 1 and stride 0.
struct MaskPairs {
  const void* data[2];  // pred, target
  DType dtype[2];
  int bytes[2];                  // per element
  int64_t items, images;         // items = images * classes
  int64_t classes, first_label;  // items of an image; the label of the first, -1 where nonzero is object
  int batch_axes[2];
  int64_t batch_shape[2][Array::max_rank], batch_strides[2][Array::max_rank];
  int64_t shape[3], strides[2][3];
  bool spatial[3];
  double spacing[3];
  int64_t grid[3];  // places of surface elements: voxels, or cells before, between and after them
};

// A pred and target whose leading shapes may differ: see one_batch.
static inline MaskPairs mask_pairs(const Array& pred, const Array& target, int spatial_dims,
                                   const double* spacing) {
  MaskPairs m = {};
  const Array* arrays[2] = {&pred, &target};
  m.images = m.classes = 1;
  m.first_label = -1;
  for (int side = 0; side < 2; ++side) {
    const Array& x = *arrays[side];
    if (spatial_dims < 1 || spatial_dims > 3 || spatial_dims > x.rank)
      throw std::invalid_argument("spatial_dims must be 1, 2 or 3, and at most the masks' rank");
    m.batch_axes[side] = x.rank - spatial_dims;
    m.data[side] = x.data;
    m.dtype[side] = x.dtype;
    m.bytes[side] = dtype_size(x.dtype);
    for (int axis = 0; axis < x.rank; ++axis) {
      if (x.shape[axis] < 1) throw std::invalid_argument("pred and target must not be empty arrays");
      if (axis >= m.batch_axes[side]) continue;
      if (side == 0) m.images *= x.shape[axis];
      m.batch_shape[side][axis] = x.shape[axis];
      m.batch_strides[side][axis] = x.strides[axis];
    }
  }
  m.items = m.images;
  for (int i = 0; i < 3; ++i) {
    m.spatial[i] = i >= 3 - spatial_dims;
    m.shape[i] = m.spatial[i] ? pred.shape[pred.rank - 3 + i] : 1;
    m.grid[i] = m.shape[i];
    m.spacing[i] = m.spatial[i] && spacing ? spacing[i - (3 - spatial_dims)] : 1.0;
    if (!(m.spacing[i] > 0)) throw std::invalid_argument("spacing must be positive");
    for (int side = 0; side < 2; ++side) {
      const int axis = arrays[side]->rank - 3 + i;
      m.strides[side][i] = m.spatial[i] ? arrays[side]->strides[axis] : 0;
      if (m.spatial[i] && arrays[side]->shape[axis] != m.shape[i])
        throw std::invalid_argument("pred and target must have the same spatial shape");
    }
  }
  return m;
}

// The masks of a call of surface_metrics.
static inline MaskPairs surface_pairs(const Array& pred, const Array& target, int spatial_dims,
                                      const SurfaceOptions& o) {
  MaskPairs m = mask_pairs(pred, target, spatial_dims, o.spacing);
  if (pred.rank != target.rank) throw std::invalid_argument("pred and target must have the same shape");
  for (int axis = 0; axis < m.batch_axes[0]; ++axis)
    if (pred.shape[axis] != target.shape[axis])
      throw std::invalid_argument("pred and target must have the same shape");
  if (o.classes > 0) {
    m.classes = o.classes;
    m.first_label = o.first_label;
    m.items = m.images * m.classes;
  }
  if (o.surface == SurfaceKind::cells)
    for (int i = 0; i < 3; ++i) m.grid[i] += m.spatial[i];
  const int64_t table = static_cast<int64_t>(o.tolerances) * o.tolerance_classes;
  if (o.tolerances < 1 || o.tolerance_classes < 1 || table > SurfaceOptions::max_tolerances)
    throw std::invalid_argument("1 to 128 tolerances are supported, classes times tolerances");
  if (o.surface == SurfaceKind::cells && o.interpolate)
    throw std::invalid_argument("weighted percentiles are not interpolated");
  if (o.first < 0 || o.count < 0 || o.first + o.count > m.items)
    throw std::invalid_argument("first and count must be a range of items");
  return m;
}

static inline int64_t items_of(const MaskPairs& m, const SurfaceOptions& o) {
  return o.count ? o.count : m.items - o.first;
}

// The two sides of a call of overlap_metrics. An axis of classes is taken out of the batch.
struct OverlapPairs : MaskPairs {
  bool class_axis[2];
  int64_t class_stride[2], logits;  // logits: channels of pred
};

static inline OverlapPairs overlap_pairs(const Array& pred, const Array& target, int spatial_dims,
                                         const OverlapOptions& o) {
  OverlapPairs m = {};
  static_cast<MaskPairs&>(m) = mask_pairs(pred, target, spatial_dims, nullptr);
  const bool logits = o.pred != OverlapOptions::masks;
  if (o.classes < 0 || o.first_label < 0 || o.first_label + o.classes > OverlapOptions::max_classes)
    throw std::invalid_argument("at most 256 classes are supported");
  if (logits && o.classes == 0) throw std::invalid_argument("logits need the number of classes");
  if (o.classes > 0) {
    m.classes = o.classes;
    m.first_label = o.first_label;
    m.logits = o.first_label + o.classes;
  }
  const Array* arrays[2] = {&pred, &target};
  int64_t images[2] = {1, 1};
  for (int side = 0; side < 2; ++side) {
    m.class_axis[side] = logits && (side == 0 || !o.target_labels);
    if (m.class_axis[side]) {
      const int axis = --m.batch_axes[side];
      if (axis < 0 || arrays[side]->shape[axis] != m.logits)
        throw std::invalid_argument("logits and masks of classes must be (..., classes, *S)");
      m.class_stride[side] = arrays[side]->strides[axis];
    }
    for (int axis = 0; axis < m.batch_axes[side]; ++axis) images[side] *= m.batch_shape[side][axis];
  }
  if (images[0] != images[1]) throw std::invalid_argument("pred and target must have as many images");
  m.images = images[0];
  m.items = m.images * m.classes;
  if (m.logits == 1 && logits) m.first_label = -1;  // a label image of one class: nonzero is object
  return m;
}

// A float as a number; more exact than any threshold or comparison needs.
NOISYSEG_FORMULA double real_at(const void* data, DType dtype, int64_t element) {
  switch (dtype) {
    case DType::f16: return half_to_float(static_cast<const Half*>(data)[element]);
    case DType::bf16: return bfloat16_to_float(static_cast<const BFloat16*>(data)[element]);
    case DType::f32: return static_cast<const float*>(data)[element];
    default: return static_cast<const double*>(data)[element];
  }
}

// Where an image's mask of one side begins, in elements; image counts over that side's own leading axes.
NOISYSEG_FORMULA int64_t item_offset(const MaskPairs& m, int side, int64_t image) {
  int64_t offset = 0;
  for (int axis = m.batch_axes[side] - 1; axis >= 0; --axis) {
    offset += image % m.batch_shape[side][axis] * m.batch_strides[side][axis];
    image /= m.batch_shape[side][axis];
  }
  return offset;
}

NOISYSEG_FORMULA int64_t integer_at(const void* data, int bytes, int64_t element) {
  switch (bytes) {
    case 1: return static_cast<const uint8_t*>(data)[element];
    case 4: return static_cast<const int32_t*>(data)[element];
    default: return static_cast<const int64_t*>(data)[element];
  }
}

// label -1: nonzero is object.
NOISYSEG_FORMULA bool is_object(const void* data, int bytes, int64_t element, int64_t label) {
  const int64_t value = integer_at(data, bytes, element);
  return label < 0 ? value != 0 : value == label;
}

// The label of an item's mask.
NOISYSEG_FORMULA int64_t label_of(const MaskPairs& m, int64_t item) {
  return m.first_label < 0 ? -1 : m.first_label + item % m.classes;
}

// The spacing of all axes along which distances arise, or 0 where they differ.
static inline double common_spacing(const MaskPairs& m) {
  double common = 0;
  for (int i = 0; i < 3; ++i) {
    if (m.grid[i] == 1) continue;
    if (common != 0 && m.spacing[i] != common) return 0;
    common = m.spacing[i];
  }
  return common == 0 ? 1 : common;
}

// ---- surfaces ----------------------------------------------------------------------------------------

// One mask's bits: rows of `row` words, the last of them zero, as the word before the first row. Where the
// image's edge is repeated (border false), the bit after a row's last voxel repeats that voxel.
struct MaskBits {
  const uint64_t* bits;
  int64_t plane, row;
  int64_t shape[3], columns;  // voxels; places along a row
  bool spatial[3], border;
};

// Bits of word w of row (z, y): of the voxel at each place, or (step -1, 1) of the one before or after it.
NOISYSEG_FORMULA uint64_t mask_word(const MaskBits& m, int64_t z, int64_t y, int64_t w, int step) {
  const bool repeat_z = !m.border || !m.spatial[0], repeat_y = !m.border || !m.spatial[1];
  if (z < 0 || z >= m.shape[0]) {
    if (!repeat_z) return 0;
    z = z < 0 ? 0 : m.shape[0] - 1;
  }
  if (y < 0 || y >= m.shape[1]) {
    if (!repeat_y) return 0;
    y = y < 0 ? 0 : m.shape[1] - 1;
  }
  const uint64_t* p = m.bits + z * m.plane + y * m.row + w;
  if (step > 0) return *p >> 1 | p[1] << 63;
  if (step == 0) return *p;
  const uint64_t before = w > 0 ? p[-1] >> 63 : m.border ? 0 : *p & 1;
  return *p << 1 | before;
}

// Word w of row (z, y) of the surface.
NOISYSEG_FORMULA uint64_t surface_word(const MaskBits& m, SurfaceKind kind, int64_t z, int64_t y, int64_t w) {
  uint64_t any, all;
  if (kind == SurfaceKind::faces) {
    any = mask_word(m, z, y, w, 0);
    if (!any) return 0;
    all = mask_word(m, z, y, w, -1) & mask_word(m, z, y, w, 1);
    if (m.spatial[1]) all &= mask_word(m, z, y - 1, w, 0) & mask_word(m, z, y + 1, w, 0);
    if (m.spatial[0]) all &= mask_word(m, z - 1, y, w, 0) & mask_word(m, z + 1, y, w, 0);
  } else {
    const bool cells = kind == SurfaceKind::cells;
    any = cells ? 0 : mask_word(m, z, y, w, 0);
    if (!cells && !any) return 0;
    all = ~uint64_t{0};
    const int to = cells ? 0 : 1, z0 = m.spatial[0] ? 1 : 0, y0 = m.spatial[1] ? 1 : 0;
    for (int dz = -z0; dz <= z0 * to; ++dz)
      for (int dy = -y0; dy <= y0 * to; ++dy) {
        const uint64_t at = mask_word(m, z + dz, y + dy, w, 0), before = mask_word(m, z + dz, y + dy, w, -1);
        if (cells)
          any |= at | before;
        else
          all &= mask_word(m, z + dz, y + dy, w, 1);
        all &= at & before;
      }
  }
  const int64_t left = m.columns - 64 * w;  // places, of which the bit that repeats a voxel may be none
  return any & ~all & (left >= 64 ? ~uint64_t{0} : left <= 0 ? 0 : (uint64_t{1} << left) - 1);
}

// Which of its 8 corners a cell's object voxels are: bit 4 dz + 2 dy + dx for the voxel before (1) or at (0)
// the cell's place along each axis.
NOISYSEG_FORMULA int cell_code(const MaskBits& m, int64_t z, int64_t y, int64_t x) {
  int code = 0;
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t v = z - (corner >> 1), u = y - (corner & 1);
    for (int dx = 0; dx < 2; ++dx)
      code |= static_cast<int>(mask_word(m, v, u, x / 64, -dx) >> (x & 63) & 1) << (2 * corner + dx);
  }
  return code;
}

// Elements' weights, as integers so that sums are exact in any order: 2^32 for the largest area.
struct CellWeights {
  uint64_t of[256];
};

// Area of the marching-cubes surface in a cell, which separates the fewer corners (object or background; the
// table of Lorensen and Cline, 1987, with its complementary cases) from the others: a sum over their
// components along the cube's edges. With S = |(f0, f1, f2)| for the areas f of the cell's faces, r_i the
// same without f_i:
//   one corner: S/8. Two along axis i: r_i/2. Three, in a face normal to k: f_k/2 + 3 S/8. Four: a face f_k;
//   one corner and its three neighbours 6 S/8; a path with ends along i and j: S/2 + (r_i + r_j)/4.
// Lower dimensions are prisms of length 1: a length in 2D, 1 in 1D.
static inline double cell_area(int code, const double spacing[3]) {
  const double f[3] = {spacing[1] * spacing[2], spacing[0] * spacing[2], spacing[0] * spacing[1]};
  const double s = sqrt(f[0] * f[0] + f[1] * f[1] + f[2] * f[2]);
  double r[3];
  for (int i = 0; i < 3; ++i) r[i] = sqrt(f[(i + 1) % 3] * f[(i + 1) % 3] + f[(i + 2) % 3] * f[(i + 2) % 3]);
  int corners = 0;
  for (int c = 0; c < 8; ++c) corners += code >> c & 1;
  int left = corners > 4 ? 255 - code : code;
  double area = 0;
  while (left) {
    int part = left & -left, size = 0, edges[3] = {},
        most = 0;  // edges of the component by axis; highest degree
    for (int grown = 0; grown != part;) {
      grown = part;
      for (int c = 0; c < 8; ++c)
        if (part >> c & 1)
          for (int axis = 0; axis < 3; ++axis) part |= left & 1 << (c ^ 4 >> axis);
    }
    left &= ~part;
    int end_axis[3] = {};  // edges at corners of degree 1, by axis
    for (int c = 0; c < 8; ++c) {
      if (!(part >> c & 1)) continue;
      ++size;
      int degree = 0, last = 0;
      for (int axis = 0; axis < 3; ++axis)
        if (part >> (c ^ 4 >> axis) & 1) {
          ++degree;
          ++edges[last = axis];
        }
      if (degree > most) most = degree;
      if (degree == 1) ++end_axis[last];
    }
    int unused = 0;  // an axis without edges
    while (unused < 2 && edges[unused]) ++unused;
    if (size == 1) area += s / 8;
    if (size == 2) area += 0.5 * r[edges[0] ? 0 : edges[1] ? 1 : 2];
    if (size == 3) area += 0.5 * f[unused] + 3 * s / 8;
    if (size == 4 && most == 3) area += 6 * s / 8;
    if (size == 4 && most == 2) {
      const int ends = end_axis[0] + end_axis[1] + end_axis[2];
      area += ends == 0 ? f[unused] : s / 2;
      for (int i = 0; i < 3; ++i) area += 0.25 * r[i] * end_axis[i];
    }
  }
  return area;
}

static inline CellWeights cell_weights(const double spacing[3]) {
  double area[256], most = 0;
  for (int code = 0; code < 256; ++code) {
    area[code] = cell_area(code, spacing);
    most = area[code] > most ? area[code] : most;
  }
  CellWeights w;
  for (int code = 0; code < 256; ++code)
    w.of[code] = static_cast<uint64_t>(area[code] / most * 4294967296.0 + 0.5);
  return w;
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

// Where a percentile lies among sorted elements: at the first whose weight and that of all before it reach
// `reach`. interpolated (weights 1): linearly between that and the next, as numpy.percentile and
// torch.quantile do. Not interpolated: numpy's "inverted_cdf"; a share reached but for rounding counts as
// reached.
struct Rank {
  uint64_t reach;
  double fraction;
};

NOISYSEG_FORMULA Rank percentile_rank(double percentile, uint64_t total, bool interpolate) {
  if (interpolate) {
    const double position = percentile / 100 * static_cast<double>(total - 1);
    uint64_t index = static_cast<uint64_t>(position);
    if (index > total - 1) index = total - 1;
    return {index + 1, position - static_cast<double>(index)};
  }
  const double share = ceil(percentile / 100 * static_cast<double>(total) * (1 - 1e-12));
  uint64_t reach = static_cast<uint64_t>(share);
  if (reach < 1) reach = 1;
  return {reach > total ? total : reach, 0};
}

NOISYSEG_FORMULA double percentile_value(double low_squared, double high_squared, double fraction) {
  const double low = sqrt(low_squared), high = sqrt(high_squared);
  return fraction < 0.5 ? low + (high - low) * fraction : high - (high - low) * (1 - fraction);
}

// In single precision, as MONAI compares: the rounding of spacing times voxels then decides no tie.
NOISYSEG_FORMULA bool within_tolerance(double squared, double tolerance) {
  return static_cast<float>(sqrt(squared)) <= static_cast<float>(tolerance);
}

// The largest squared distance within each tolerance, so that counting needs no root.
struct Limits {
  double squared[SurfaceOptions::max_tolerances];
  int count, classes;
};

static inline Limits limits_of(const SurfaceOptions& o) {
  Limits l = {};
  l.count = o.tolerances;
  l.classes = o.tolerance_classes;
  for (int i = 0; i < l.count * l.classes; ++i) {
    if (!(o.tolerance[i] >= 0)) throw std::invalid_argument("tolerances must not be negative");
    double low = 0, high = o.tolerance[i] * o.tolerance[i] * 1.001 + 1e-30;  // within; not within
    for (int step = 0; step < 200; ++step) {
      const double middle = low + (high - low) / 2;
      if (middle <= low || middle >= high) break;
      (within_tolerance(middle, o.tolerance[i]) ? low : high) = middle;
    }
    l.squared[i] = low;
  }
  return l;
}

// Distances from the surface elements of one mask to the other's surface.
struct Directed {
  uint64_t count, weight;  // elements; their weight
  double sum;              // of weight times distance
  double maximum;          // squared
  double quantile;         // distance; where pooled, of the distances in both directions
  bool object;             // a surface, or no background at all
};

// out[0], out[stride], ...: hd, hd_percentile, asd (pred's surface to target's), assd, asd (target's to
// pred's), nsd at each tolerance; within: weight within each tolerance. The larger of the two quantiles is
// hd_percentile: where the percentile is pooled, both are the same. One surface missing: `missing` and nsd 0.
// Both: in agreement, 0 and nsd 1, if the masks are equal.
NOISYSEG_FORMULA void surface_result(const Directed& pred, const Directed& target,
                                     const uint64_t* within_pred, const uint64_t* within_target,
                                     int tolerances, bool mean_of_two, double missing, double* out,
                                     int64_t stride) {
  if (pred.count == 0 || target.count == 0) {
    const bool agree = pred.count == target.count && pred.object == target.object;
    for (int i = 0; i < 5; ++i) out[i * stride] = agree ? 0.0 : missing;
    for (int i = 0; i < tolerances; ++i) out[(5 + i) * stride] = agree ? 1.0 : 0.0;
    return;
  }
  const double p = static_cast<double>(pred.weight), t = static_cast<double>(target.weight);
  const double asd = pred.sum / p, back = target.sum / t;
  out[0] = sqrt(pred.maximum > target.maximum ? pred.maximum : target.maximum);
  out[stride] = pred.quantile > target.quantile ? pred.quantile : target.quantile;
  out[2 * stride] = asd;
  out[3 * stride] = mean_of_two ? (asd + back) / 2 : (pred.sum + target.sum) / (p + t);
  out[4 * stride] = back;
  for (int i = 0; i < tolerances; ++i) {
    const double a = static_cast<double>(within_pred[i]), b = static_cast<double>(within_target[i]);
    out[(5 + i) * stride] = mean_of_two ? (a / p + b / t) / 2 : (a + b) / (p + t);
  }
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
