// Random words, contours, polygon crossings and B-splines: the definitions, shared by CPU and CUDA.
#pragma once
#include "formulas/dtype.h"
#include "formulas/host_device.h"
#include "formulas/unfused.h"
#include "noisyseg/noise.h"

namespace noisyseg::formulas {

// ---- random numbers --------------------------------------------------------------------------------

struct Words {
  uint32_t x[4];
};

// Philox4x32-10 (Salmon et al., 2011): four random words for each counter and key.
NOISYSEG_FORMULA Words philox(Words c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.x[0], b = uint64_t{0xCD9E8D57u} * c.x[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.x[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.x[3] ^ k1, static_cast<uint32_t>(a)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

NOISYSEG_FORMULA Words random_words(int64_t key, int stream, int64_t block) {
  return philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32),
                  static_cast<uint32_t>(stream), 0}},
                static_cast<uint64_t>(key));
}

NOISYSEG_FORMULA float uniform(uint32_t word) {
  return static_cast<float>(word >> 8) * 5.9604644775390625e-8f;
}

// ---- contours --------------------------------------------------------------------------------------

// Steps clockwise (rows go down): E, SE, S, SW, W, NW, N, NE. Their lengths are 1 and sqrt(2) as 5741 and
// 8119 (off by 1e-8), so that arc lengths are integers.
NOISYSEG_FORMULA int step_row(int d) { return d == 0 || d == 4 ? 0 : d < 4 ? 1 : -1; }
NOISYSEG_FORMULA int step_column(int d) { return d == 2 || d == 6 ? 0 : d < 2 || d == 7 ? 1 : -1; }
NOISYSEG_FORMULA int64_t step_length(int d) { return d & 1 ? 8119 : 5741; }

struct LabelImage {
  const int32_t* data;
  int64_t rows, columns;
};

// The direction of the next contour pixel when (row, column) was reached by step `last`, -1 for a lone pixel.
// Moore's neighbour tracing: clockwise from the background pixel that was seen last.
NOISYSEG_FORMULA int next_step(const LabelImage& l, int32_t label, int64_t row, int64_t column, int last) {
  for (int i = 0; i < 8; ++i) {
    const int d = (last + 6 - (last & 1) + i) & 7;
    const int64_t r = row + step_row(d), c = column + step_column(d);
    if (static_cast<uint64_t>(r) < static_cast<uint64_t>(l.rows) &&
        static_cast<uint64_t>(c) < static_cast<uint64_t>(l.columns) && l.data[r * l.columns + c] == label)
      return d;
  }
  return -1;
}

// Two rounds of the contour that starts at (row, column), its first pixel in reading order: one for its
// length, one for the vertices, each the first pixel at or after its place. out: (n, 2).
NOISYSEG_FORMULA void contour_vertices(const LabelImage& l, int64_t row, int64_t column, int64_t n,
                                       double phase, int32_t* out) {
  const int32_t label = l.data[row * l.columns + column];
  const int first = next_step(l, label, row, column, 0);
  int64_t length = 0, r = row, c = column, k = 0;
  int d = first;
  if (first >= 0) do {
      length += step_length(d);
      r += step_row(d);
      c += step_column(d);
      d = next_step(l, label, r, c, d);
    } while (r != row || c != column || d != first);
  const int64_t part = static_cast<int64_t>(phase * 1024);
  int64_t at = 0;
  for (;;) {
    for (; k < n && (1024 * k + part) * length <= at * 1024 * n; ++k) {
      out[2 * k] = static_cast<int32_t>(r);
      out[2 * k + 1] = static_cast<int32_t>(c);
    }
    if (k == n) return;
    at += step_length(d);
    r += step_row(d);
    c += step_column(d);
    d = next_step(l, label, r, c, d);
  }
}

// ---- polygons --------------------------------------------------------------------------------------

constexpr int64_t subpixels = 256;

// What an edge does to a row of pixel centres: pixels from `first` on have `turns` more windings; pixels `on`
// to `on_end` - 1 lie on it.
struct Crossing {
  int64_t first, on, on_end;
  int turns;
};

NOISYSEG_FORMULA int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}

// Edge from a to b (row, column, in subpixels) and row y of pixels, in exact arithmetic.
NOISYSEG_FORMULA Crossing crossing(const int32_t* a, const int32_t* b, int64_t y) {
  const int64_t level = y * subpixels;
  int64_t y0 = a[0], x0 = a[1], y1 = b[0], x1 = b[1];
  Crossing c = {0, 0, 0, 0};
  if ((y0 < level && y1 < level) || (y0 > level && y1 > level)) return c;
  if (y0 == y1) {  // along the row
    c.on = -floor_div(-(x0 < x1 ? x0 : x1), subpixels);
    c.on_end = floor_div(x0 < x1 ? x1 : x0, subpixels) + 1;
    return c;
  }
  const int sign = y0 < y1 ? 1 : -1;
  if (sign < 0) {
    int64_t t = y0;
    y0 = y1;
    y1 = t;
    t = x0;
    x0 = x1;
    x1 = t;
  }
  const int64_t over = subpixels * (y1 - y0), place = x0 * (y1 - y0) + (x1 - x0) * (level - y0);
  c.first = -floor_div(-place, over);
  c.turns = level < y1 ? sign : 0;  // of two edges that meet on the row one counts
  c.on = c.first;
  c.on_end = place % over == 0 ? c.first + 1 : c.first;
  return c;
}

// ---- deformation -----------------------------------------------------------------------------------

struct Deformation {
  int64_t items, n[3];
  int points[3];
  double scale[3];  // grid steps per voxel
  const double *coefficients, *affine;
};

// The cubic B-spline's weights at t in [0, 1] between the second and third of four points.
NOISYSEG_FORMULA void spline_weights(double t, double w[4]) {
  const double s = plus(1, -t), sixth = 1.0 / 6, t2 = times(t, t), s2 = times(s, s);
  const double t3 = times(t2, t), s3 = times(s2, s);
  w[0] = times(s3, sixth);
  w[1] = plus(plus(times(t3, 0.5), -t2), 4 * sixth);
  w[2] = plus(plus(times(s3, 0.5), -s2), 4 * sixth);
  w[3] = times(t3, sixth);
}

NOISYSEG_FORMULA int mirrored(int i, int points) { return i < 0 ? -i : i >= points ? 2 * points - 2 - i : i; }

// The grid interval of voxel x of an axis with two points or more, and its place in grid steps.
NOISYSEG_FORMULA int interval(const Deformation& d, int axis, int64_t x, double* place) {
  *place = times(static_cast<double>(x), d.scale[axis]);
  const int last = d.points[axis] - 2, i = static_cast<int>(*place);
  return i < last ? i : last;
}

// The grid of one component summed up over the first two axes, at row (z, y) of voxels and point j of the
// third.
NOISYSEG_FORMULA double column(const Deformation& d, const double* grid, int64_t z, int64_t y, int j) {
  double place_z = 0, place_y = 0, of_z[4] = {0, 1, 0, 0}, of_y[4] = {0, 1, 0, 0}, sum = 0;
  const bool deep = d.points[0] > 1, high = d.points[1] > 1;
  const int at_z = deep ? interval(d, 0, z, &place_z) : 0, at_y = high ? interval(d, 1, y, &place_y) : 0;
  if (deep) spline_weights(plus(place_z, -static_cast<double>(at_z)), of_z);
  if (high) spline_weights(plus(place_y, -static_cast<double>(at_y)), of_y);
  // Counts that the compiler knows, so that on CUDA the weights stay in registers.
  for (int a = 0; a < 4; ++a) {
    if (!deep && a != 1) continue;
    const int64_t plane = deep ? mirrored(at_z - 1 + a, d.points[0]) : 0;
    double inner = 0;
    for (int b = 0; b < 4; ++b) {
      if (!high && b != 1) continue;
      const int64_t row = high ? mirrored(at_y - 1 + b, d.points[1]) : 0;
      inner = plus(inner, times(of_y[b], grid[(plane * d.points[1] + row) * d.points[2] + j]));
    }
    sum = plus(sum, times(of_z[a], inner));
  }
  return sum;
}

// affine (z, y, x, 1) without the part of x.
NOISYSEG_FORMULA double row_base(const double* affine, int64_t z, int64_t y) {
  return plus(plus(affine[3], times(affine[0], static_cast<double>(z))),
              times(affine[1], static_cast<double>(y)));
}

// The nearest voxel's index, -1 outside; a half rounds up.
NOISYSEG_FORMULA int64_t nearest_voxel(const Deformation& d, const double p[3]) {
  int64_t at = 0;
  for (int i = 0; i < 3; ++i) {
    const double r = floor(plus(p[i], 0.5));
    if (!(r >= 0 && r < static_cast<double>(d.n[i]))) return -1;
    at = at * d.n[i] + static_cast<int64_t>(r);
  }
  return at;
}

template <class T>
NOISYSEG_FORMULA double linear_value(const Deformation& d, const T* image, const double p[3], double fill) {
  int64_t low[3];
  double high_share[3];
  for (int i = 0; i < 3; ++i) {
    const double f = floor(p[i]);
    if (!(f >= -1 && f < static_cast<double>(d.n[i]))) return fill;
    low[i] = static_cast<int64_t>(f);
    high_share[i] = plus(p[i], -f);
  }
  double sum = 0;
  for (int corner = 0; corner < 8; ++corner) {
    double weight = 1;
    int64_t at = 0;
    bool inside = true;
    for (int i = 0; i < 3; ++i) {
      const int up = corner >> (2 - i) & 1;
      const int64_t v = low[i] + up;
      weight = times(weight, up ? high_share[i] : plus(1, -high_share[i]));
      inside = inside && v >= 0 && v < d.n[i];
      at = at * d.n[i] + v;
    }
    if (weight != 0) sum = plus(sum, times(weight, inside ? static_cast<double>(image[at]) : fill));
  }
  return sum;
}

// A value of any dtype as the low bytes of a word.
static inline uint64_t fill_bits(DType dtype, double value) {
  uint64_t bits = 0;
#define NOISYSEG_FILL(type)                  \
  {                                          \
    type element;                            \
    assign(element, value);                  \
    memcpy(&bits, &element, sizeof element); \
  }
  NOISYSEG_DTYPE_CASES(dtype, NOISYSEG_FILL)
#undef NOISYSEG_FILL
  return bits;
}

// ---- arguments -------------------------------------------------------------------------------------

static inline void need(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

static inline void check_uniforms(const Array& keys, const Array& out) {
  need(keys.dtype == DType::i64 && keys.rank == 1, "keys must be int64 (B)");
  need(out.dtype == DType::f32 && out.rank == 2 && out.shape[0] == keys.shape[0],
       "out must be float32 (B, n)");
}

static inline void check_components(const Array& mask, const Array& labels) {
  need((mask.dtype == DType::u8 || mask.dtype == DType::b8) && mask.rank == 4, "mask must be uint8 (B, *S)");
  need(labels.dtype == DType::i32 && labels.rank == 4, "labels must be int32 (B, *S)");
  need(mask.shape[1] * mask.shape[2] * mask.shape[3] < 2147483647, "an item has 2^31 voxels or more");
}

static inline void check_contours(const Array& labels, const Array& starts, const Array& phases,
                                  const Array& out) {
  need(labels.dtype == DType::i32 && labels.rank == 3, "labels must be int32 (B, H, W)");
  need(starts.dtype == DType::i64 && phases.dtype == DType::f64 && out.dtype == DType::i32 && out.rank == 3 &&
           out.shape[0] == starts.shape[0] && phases.shape[0] == starts.shape[0] && out.shape[2] == 2,
       "starts, phases and out must be int64 (P), float64 (P) and int32 (P, n, 2)");
}

static inline void check_polygons(const Array& vertices, const Array& first, const Array& out) {
  need(vertices.dtype == DType::i32 && vertices.rank == 3 && vertices.shape[2] == 2,
       "vertices must be int32 (P, m, 2)");
  need(out.dtype == DType::u8 && out.rank == 3, "out must be uint8 (B, H, W)");
  need(out.shape[1] <= 1 << 20 && out.shape[2] <= 1 << 20,
       "polygons are filled in images of up to 2^20 rows and columns");
  need(first.dtype == DType::i64 && first.shape[0] == out.shape[0] + 1, "first must be int64 (B + 1)");
}

static inline Deformation deformation(const Array& image, const Array& coefficients, const Array& affine,
                                      const DeformOptions& o) {
  need(image.rank == 4 && coefficients.rank == 5 && affine.rank == 3, "deform takes (B, n0, n1, n2)");
  need(coefficients.dtype == DType::f64 && affine.dtype == DType::f64,
       "coefficients and affine must be float64");
  need(!o.linear || image.dtype == DType::f32 || image.dtype == DType::f64,
       "linear needs float32 or float64");
  const double top = image.dtype == DType::i64 ? 9e18 : image.dtype == DType::i32 ? 2147483647.0 : 255.0;
  need(image.dtype >= DType::f16 || (o.fill <= top && o.fill >= (top > 255 ? -top : 0)),
       "fill must be a value of the image's dtype");
  Deformation d = {};
  d.items = image.shape[0];
  need(coefficients.shape[0] == d.items && coefficients.shape[1] == 3 && affine.shape[0] == d.items &&
           affine.shape[1] == 3 && affine.shape[2] == 4,
       "coefficients must be (B, 3, p0, p1, p2) and affine (B, 3, 4)");
  for (int i = 0; i < 3; ++i) {
    d.n[i] = image.shape[1 + i];
    need(coefficients.shape[2 + i] >= 1 && coefficients.shape[2 + i] <= DeformOptions::max_points,
         "1 to 64 grid points are supported along each axis");
    d.points[i] = static_cast<int>(coefficients.shape[2 + i]);
    d.scale[i] = d.n[i] > 1 ? static_cast<double>(d.points[i] - 1) / static_cast<double>(d.n[i] - 1) : 0;
  }
  d.coefficients = static_cast<const double*>(coefficients.data);
  d.affine = static_cast<const double*>(affine.data);
  return d;
}

}  // namespace noisyseg::formulas
