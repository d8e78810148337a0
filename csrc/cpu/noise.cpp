// Label noise on the CPU. Compiled with -ffp-contract=off, so that every instruction set gives the same bits.
#include "formulas/noise.h"

#include <cstring>

#include "cpu/parallel.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {
using formulas::Crossing;
using formulas::Deformation;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// ---- components ------------------------------------------------------------------------------------

int32_t root_of(int32_t* parent, int32_t i) {
  while (parent[i] != i) {
    parent[i] = parent[parent[i]];
    i = parent[i];
  }
  return i;
}

// The smaller root becomes the parent: a component's root is its first voxel.
void unite(int32_t* parent, int32_t a, int32_t b) {
  a = root_of(parent, a);
  b = root_of(parent, b);
  if (a < b)
    parent[b] = a;
  else
    parent[a] = b;
}

// Union-find over one item. Voxels of a run along the last axis point at its first; runs are joined with
// those of the rows before, once for each stretch of contact. Reads the mask (1 B) and its rows before (from
// the cache), writes and reads 4 B per voxel.
void components(const uint8_t* mask, const int64_t n[3], bool full, int32_t* parent) {
  const int64_t before[4][2] = {{0, -1}, {-1, 0}, {-1, -1}, {-1, 1}};  // planes and rows
  for (int64_t z = 0; z < n[0]; ++z)
    for (int64_t y = 0; y < n[1]; ++y) {
      const int64_t base = (z * n[1] + y) * n[2];
      const uint8_t* row = mask + base;
      for (int64_t x = 0; x < n[2]; ++x)
        if (row[x])
          parent[base + x] = static_cast<int32_t>(x > 0 && row[x - 1] ? parent[base + x - 1] : base + x);
      for (int k = 0; k < (full ? 4 : 2); ++k) {
        const int64_t v = z + before[k][0], u = y + before[k][1];
        if (v < 0 || u < 0 || u >= n[1]) continue;
        const int64_t other = (v * n[1] + u) * n[2];
        const uint8_t* above = mask + other;
        if (!full) {
          for (int64_t x = 0; x < n[2]; ++x)
            if (row[x] && above[x] && !(x > 0 && row[x - 1] && above[x - 1]))
              unite(parent, static_cast<int32_t>(base + x), static_cast<int32_t>(other + x));
          continue;
        }
        for (int64_t x = 0;
             x < n[2];) {  // a run of this row, and the runs above it, a voxel further each way
          if (!row[x]) {
            ++x;
            continue;
          }
          const int64_t start = x;
          while (x < n[2] && row[x]) ++x;
          const int64_t end = smaller(x + 1, n[2]);
          for (int64_t i = larger(start - 1, 0); i < end; ++i)
            if (above[i] && (i == larger(start - 1, 0) || !above[i - 1]))
              unite(parent, static_cast<int32_t>(base + start), static_cast<int32_t>(other + i));
        }
      }
    }
  const int64_t size = n[0] * n[1] * n[2];
  // Parents come before their children, and those before i are final labels already: one more than the root.
  for (int64_t i = 0; i < size; ++i)
    parent[i] = !mask[i] ? 0 : parent[i] == i ? static_cast<int32_t>(i + 1) : parent[parent[i]];
}

// ---- polygons --------------------------------------------------------------------------------------

// A row's windings as differences, then their sum: m edges and the row's pixels per row and polygon.
void fill_polygon(const int32_t* v, int64_t m, int64_t rows, int64_t columns, int32_t* turns, uint8_t* out) {
  int64_t low = rows * formulas::subpixels, high = -1;
  for (int64_t i = 0; i < m; ++i) {
    low = smaller(low, v[2 * i]);
    high = larger(high, v[2 * i]);
  }
  const int64_t last = smaller(formulas::floor_div(high, formulas::subpixels), rows - 1);
  for (int64_t y = larger(-formulas::floor_div(-low, formulas::subpixels), 0); y <= last; ++y) {
    uint8_t* row = out + y * columns;
    memset(turns, 0, static_cast<size_t>(columns) * sizeof(int32_t));
    for (int64_t i = 0; i < m; ++i) {
      const Crossing c = formulas::crossing(v + 2 * i, v + 2 * (i + 1 < m ? i + 1 : 0), y);
      for (int64_t x = larger(c.on, 0); x < smaller(c.on_end, columns); ++x) row[x] = 1;
      if (c.turns && c.first < columns) turns[larger(c.first, 0)] += c.turns;
    }
    int32_t sum = 0;
    for (int64_t x = 0; x < columns; ++x) {
      sum += turns[x];
      row[x] |= sum != 0;
    }
  }
}

// ---- deformation -----------------------------------------------------------------------------------

struct Nearest {
  template <class T>
  static void put(const Deformation& d, const T* image, const double p[3], const T& fill, double, T& out) {
    const int64_t at = formulas::nearest_voxel(d, p);
    out = at < 0 ? fill : image[at];
  }
};
struct Linear {
  template <class T>
  static void put(const Deformation& d, const T* image, const double p[3], const T&, double fill, T& out) {
    out = static_cast<T>(formulas::linear_value(d, image, p, fill));
  }
};

// Rows of voxels: the grid is summed up over the first two axes once for each row, then a row is walked
// interval by interval of the grid, where its four columns do not change. Per voxel one gathered read and one
// write.
template <class Sampling, class T>
void deform_rows(const Deformation& d, const T* image, T fill, double fill_value, T* out, int threads) {
  const int64_t rows = d.n[0] * d.n[1], size = rows * d.n[2];
  const int points = d.points[2];
  const int64_t cells = int64_t{d.points[0]} * d.points[1] * points;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < d.items * rows; ++r) {
    constexpr int64_t block = 128;
    const int64_t item = r / rows, z = r % rows / d.n[1], y = r % d.n[1];
    const double* grid = d.coefficients + item * 3 * cells;
    const double* affine = d.affine + item * 12;
    double columns[3][DeformOptions::max_points], base[3], slope[3], at[3][block];
    for (int k = 0; k < 3; ++k) {
      base[k] = formulas::row_base(affine + 4 * k, z, y);
      slope[k] = affine[4 * k + 2];
      for (int j = 0; j < points; ++j) columns[k][j] = formulas::column(d, grid + k * cells, z, y, j);
    }
    for (int64_t x = 0; x < d.n[2];) {
      double place;
      const int i = points > 1 ? formulas::interval(d, 2, x, &place) : 0;
      int64_t end = smaller(x + block, d.n[2]);
      if (points > 1)  // no further than this interval
        while (end - 1 > x && formulas::interval(d, 2, end - 1, &place) > i) --end;
      for (int k = 0; k < 3; ++k) {
        if (points == 1) {
          for (int64_t j = x; j < end; ++j)
            at[k][j - x] = base[k] + slope[k] * static_cast<double>(j) + columns[k][0];
          continue;
        }
        double c[4];
        for (int t = 0; t < 4; ++t) c[t] = columns[k][formulas::mirrored(i - 1 + t, points)];
        for (int64_t j = x; j < end; ++j) {
          double w[4];
          formulas::spline_weights(static_cast<double>(j) * d.scale[2] + -static_cast<double>(i), w);
          const double u = ((w[0] * c[0] + w[1] * c[1]) + w[2] * c[2]) + w[3] * c[3];
          at[k][j - x] = base[k] + slope[k] * static_cast<double>(j) + u;
        }
      }
      T* to = out + item * size + r % rows * d.n[2];
      for (int64_t j = x; j < end; ++j) {
        const double p[3] = {at[0][j - x], at[1][j - x], at[2][j - x]};
        Sampling::put(d, image + item * size, p, fill, fill_value, to[j]);
      }
      x = end;
    }
  }
}

template <class T>
void deform_nearest(const Deformation& d, const Array& image, const DeformOptions& o, const Array& out,
                    int threads) {  // any dtype by its bytes
  deform_rows<Nearest>(d, static_cast<const T*>(image.data),
                       static_cast<T>(formulas::fill_bits(image.dtype, o.fill)), 0, static_cast<T*>(out.data),
                       threads);
}

}  // namespace

void uniforms(const Array& keys, int stream, const Array& out, const Exec& exec) {
  formulas::check_uniforms(keys, out);
  const int64_t items = out.shape[0], n = out.shape[1], blocks = (n + 3) / 4;
  const int64_t* key = static_cast<const int64_t*>(keys.data);
  float* to = static_cast<float*>(out.data);
  const int threads = threads_for(exec, items * n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < items * blocks; ++i) {
    const formulas::Words words = formulas::random_words(key[i / blocks], stream, i % blocks);
    for (int64_t k = 0; k < 4 && i % blocks * 4 + k < n; ++k)
      to[i / blocks * n + i % blocks * 4 + k] = formulas::uniform(words.x[k]);
  }
}

void connected_components(const Array& mask, bool full, const Array& labels, const Exec& exec) {
  formulas::check_components(mask, labels);
  const int64_t* n = mask.shape + 1;
  const int64_t size = n[0] * n[1] * n[2];
  const int threads = threads_for(exec, mask.shape[0] * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && mask.shape[0] > 1)
  for (int64_t item = 0; item < mask.shape[0]; ++item)
    components(static_cast<const uint8_t*>(mask.data) + item * size, n, full,
               static_cast<int32_t*>(labels.data) + item * size);
}

void contour_vertices(const Array& labels, const Array& starts, const Array& phases, const Array& out,
                      const Exec& exec) {
  formulas::check_contours(labels, starts, phases, out);
  const int64_t rows = labels.shape[1], columns = labels.shape[2], n = out.shape[1];
  const int threads = threads_for(exec, starts.shape[0] * 1024);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < starts.shape[0]; ++i) {
    const int64_t start = static_cast<const int64_t*>(starts.data)[i], item = start / (rows * columns);
    const int64_t at = start % (rows * columns);
    const formulas::LabelImage image = {static_cast<const int32_t*>(labels.data) + item * rows * columns,
                                        rows, columns};
    formulas::contour_vertices(image, at / columns, at % columns, n,
                               static_cast<const double*>(phases.data)[i],
                               static_cast<int32_t*>(out.data) + i * n * 2);
  }
}

size_t fill_workspace(const Array& out, const Exec& exec) {
  const int threads = threads_for(exec, out.size());
  return static_cast<size_t>(threads) * static_cast<size_t>(out.shape[2]) * sizeof(int32_t);
}

void fill_polygons(const Array& vertices, const Array& first, const Array& out, void* workspace,
                   const Exec& exec) {
  formulas::check_polygons(vertices, first, out);
  const int64_t rows = out.shape[1], columns = out.shape[2], m = vertices.shape[1];
  const int64_t* polygon = static_cast<const int64_t*>(first.data);
  const int threads = threads_for(exec, out.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < out.shape[0]; ++item)
    for (int64_t p = polygon[item]; p < polygon[item + 1]; ++p)
      fill_polygon(static_cast<const int32_t*>(vertices.data) + p * m * 2, m, rows, columns,
                   static_cast<int32_t*>(workspace) + thread_number() * columns,
                   static_cast<uint8_t*>(out.data) + item * rows * columns);
}

void deform(const Array& image, const Array& coefficients, const Array& affine, const DeformOptions& options,
            const Array& out, const Exec& exec) {
  const Deformation d = formulas::deformation(image, coefficients, affine, options);
  const int threads = threads_for(exec, image.size());
  if (options.linear) {
    if (image.dtype == DType::f64)
      deform_rows<Linear>(d, static_cast<const double*>(image.data), 0.0, options.fill,
                          static_cast<double*>(out.data), threads);
    else
      deform_rows<Linear>(d, static_cast<const float*>(image.data), 0.f, options.fill,
                          static_cast<float*>(out.data), threads);
    return;
  }
  switch (dtype_size(image.dtype)) {
    case 1: deform_nearest<uint8_t>(d, image, options, out, threads); break;
    case 2: deform_nearest<uint16_t>(d, image, options, out, threads); break;
    case 4: deform_nearest<uint32_t>(d, image, options, out, threads); break;
    default: deform_nearest<uint64_t>(d, image, options, out, threads);
  }
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(void, uniforms, (const Array& keys, int stream, const Array& out, const Exec& exec),
             (keys, stream, out, exec))
NOISYSEG_API(void, connected_components,
             (const Array& mask, bool full, const Array& labels, const Exec& exec),
             (mask, full, labels, exec))
NOISYSEG_API(void, contour_vertices,
             (const Array& labels, const Array& starts, const Array& phases, const Array& out,
              const Exec& exec),
             (labels, starts, phases, out, exec))
NOISYSEG_API(size_t, fill_workspace, (const Array& out, const Exec& exec), (out, exec))
NOISYSEG_API(void, fill_polygons,
             (const Array& vertices, const Array& first, const Array& out, void* workspace, const Exec& exec),
             (vertices, first, out, workspace, exec))
NOISYSEG_API(void, deform,
             (const Array& image, const Array& coefficients, const Array& affine,
              const DeformOptions& options, const Array& out, const Exec& exec),
             (image, coefficients, affine, options, out, exec))
