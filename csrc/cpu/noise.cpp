// Label noise on the CPU. Compiled with -ffp-contract=off, so that every instruction set gives the same bits.
#include "formulas/noise.h"

#include <cstring>

#include "cpu/bits.h"
#include "cpu/parallel.h"
#include "formulas/distance.h"
#include "formulas/math.h"
#include "formulas/room.h"

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

// The first pixel from x on in the object (or, for run_end, in the background); n if there is none. Eight at
// a time.
int64_t next_object(const uint8_t* row, int64_t x, int64_t n) {
  for (uint64_t word; x + 8 <= n; x += 8) {
    memcpy(&word, row + x, 8);
    if (word) break;
  }
  while (x < n && !row[x]) ++x;
  return x;
}
int64_t run_end(const uint8_t* row, int64_t x, int64_t n) {
  for (uint64_t word; x + 8 <= n; x += 8) {
    memcpy(&word, row + x, 8);
    if ((word - 0x0101010101010101u) & ~word & 0x8080808080808080u) break;  // one of them is 0
  }
  while (x < n && row[x]) ++x;
  return x;
}

// Union-find over the runs along the last axis, known by their first voxel; each is joined with those that it
// touches in the rows before. Reads the mask (1 B per voxel) and its rows before (from the cache), writes 4 B
// per voxel.
void components(const uint8_t* mask, const int64_t n[3], bool full, int32_t* parent) {
  const int64_t before[4][2] = {{0, -1}, {-1, 0}, {-1, -1}, {-1, 1}};  // planes and rows
  const int64_t width = n[2];
  for (int64_t z = 0; z < n[0]; ++z)
    for (int64_t y = 0; y < n[1]; ++y) {
      const int64_t base = (z * n[1] + y) * width;
      const uint8_t* row = mask + base;
      const int64_t start = next_object(row, 0, width);
      for (int64_t x = start; x < width; x = next_object(row, run_end(row, x, width), width))
        parent[base + x] = static_cast<int32_t>(base + x);
      for (int k = 0; start < width && k < (full ? 4 : 2); ++k) {
        const int64_t v = z + before[k][0], u = y + before[k][1];
        if (v < 0 || u < 0 || u >= n[1]) continue;
        const int64_t other = (v * n[1] + u) * width;
        const uint8_t* above = mask + other;
        int64_t a = next_object(above, 0, width), a_end = run_end(above, a, width);
        for (int64_t x = start, end; x < width && a < width; x = next_object(row, end, width)) {
          end = run_end(row, x, width);
          const int64_t low = x - full, high = end + full;
          while (a < width && a_end <= low) {
            a = next_object(above, a_end, width);
            a_end = run_end(above, a, width);
          }
          while (a < width && a < high) {
            unite(parent, static_cast<int32_t>(base + x), static_cast<int32_t>(other + a));
            if (a_end >= high) break;  // it may touch the next run too
            a = next_object(above, a_end, width);
            a_end = run_end(above, a, width);
          }
        }
      }
    }
  // Parents come before their children, so the label of a run's parent is final: one more than the root.
  for (int64_t r = 0; r < n[0] * n[1]; ++r) {
    const uint8_t* row = mask + r * width;
    int32_t* out = parent + r * width;
    for (int64_t x = 0; x < width;) {
      const int64_t next = next_object(row, x, width);
      memset(out + x, 0, static_cast<size_t>(next - x) * sizeof(int32_t));
      if (next == width) break;
      const int64_t own = r * width + next;
      const int32_t label = parent[own] == own ? static_cast<int32_t>(own + 1) : parent[parent[own]];
      x = run_end(row, next, width);
      for (int64_t i = next; i < x; ++i) out[i] = label;
    }
  }
}

// ---- dilation --------------------------------------------------------------------------------------

// The voxels within a radius, row by row: z planes and y rows away, up to x steps along the row.
struct Reach {
  int32_t z, y, x;
};
constexpr int64_t most_rows = 1024;  // with more a distance transform is quicker

// The rows of a ball and their number, as far as that is at most most_rows; they are not written to a null.
// Distances are rounded as the distance transform rounds them.
int64_t ball_rows(const int64_t n[3], const double spacing[3], float radius, Reach* rows) {
  const auto squared = [&](int axis, int64_t k) {
    return formulas::squared_step(k, static_cast<float>(spacing[axis] * spacing[axis]));
  };
  const auto within = [&](int64_t z, int64_t y, int64_t x) {
    return formulas::sqrt_((squared(1, y) + squared(2, x)) + squared(0, z)) <= radius;
  };
  int64_t count = 0;
  for (int64_t z = 0; z < n[0] && within(z, 0, 0); ++z)
    for (int64_t y = 0, x = n[2] - 1; y < n[1] && within(z, y, 0); ++y) {
      while (!within(z, y, x)) --x;
      for (int64_t mirror = 0; mirror < 4; ++mirror) {
        if ((mirror & 1 && !y) || (mirror & 2 && !z)) continue;
        if (++count > most_rows) return count;
        if (rows)
          rows[count - 1] = {static_cast<int32_t>(mirror & 2 ? -z : z),
                             static_cast<int32_t>(mirror & 1 ? -y : y), static_cast<int32_t>(x)};
      }
    }
  for (int64_t gap = rows ? count / 2 : 0; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)  // Shell sort
    for (int64_t i = gap; i < count; ++i) {
      const Reach r = rows[i];
      int64_t j = i;
      for (; j >= gap && r.x > rows[j - gap].x; j -= gap) rows[j] = rows[j - gap];
      rows[j] = r;
    }
  return count;
}

struct Dilation {
  int64_t n[3], planes;      // of one item; of all
  int64_t words, row, part;  // words of a row's bits; and of zeros behind them; rows worked on at a time
  int64_t balls, threads;
  size_t bytes = 0;
  int64_t* counts;  // (balls): rows of each
  Reach* rows;      // (balls, most_rows at most)
  int64_t* span;    // (planes, 2): first row with an object and the one behind the last
  uint64_t *bits, *scratch;

  Dilation(const Array& mask, const Array& radii, const double* spacing, const Exec& exec, char* memory)
      : n{mask.shape[1], mask.shape[2], mask.shape[3]}, planes(mask.shape[0] * mask.shape[1]) {
    if (!mask.size()) return;
    const float* radius = static_cast<const float*>(radii.data);
    balls = radii.shape[0];
    threads = threads_for(exec, mask.size());
    int64_t all = 0, reach = 0;
    for (int64_t i = 0; i < balls; ++i) {
      Reach first[most_rows];
      const int64_t count = ball_rows(n, spacing, radius[i], first);
      if (count > most_rows || !count) return;  // none: lengths beyond single precision
      all += count;
      reach = larger(reach, first[0].x);
    }
    words = (n[2] + 63) / 64;
    row = words + (reach + 64) / 64;
    part = larger(1, smaller(n[1], 512 / row));
    formulas::Room room{memory};
    counts = room.take<int64_t>(balls);
    rows = room.take<Reach>(all);
    span = room.take<int64_t>(2 * planes);
    bits = room.take<uint64_t>(planes * n[1] * row);
    scratch = room.take<uint64_t>(threads * 2 * (part * row + 2));
    bytes = room.bytes;
    if (!memory) return;
    Reach* to = rows;
    for (int64_t i = 0; i < balls; ++i) to += counts[i] = ball_rows(n, spacing, radius[i], to);
  }
};

// Bits of a plane's voxels that are (not) 0.
void pack_plane(const Dilation& d, const uint8_t* mask, bool zeros, int64_t plane) {
  int64_t first = d.n[1], end = 0;
  for (int64_t y = 0; y < d.n[1]; ++y) {
    const uint8_t* p = mask + (plane * d.n[1] + y) * d.n[2];
    uint64_t *to = d.bits + (plane * d.n[1] + y) * d.row, any = 0;
    for (int64_t w = 0; w < d.row; ++w) {
      const int64_t left = d.n[2] - 64 * w;
      to[w] = 0;
      if (left >= 64)
        to[w] = zeros ? equal64(p + 64 * w, 0) : ~equal64(p + 64 * w, 0);
      else
        for (int64_t i = 0; i < left; ++i) to[w] |= static_cast<uint64_t>((p[64 * w + i] == 0) == zeros) << i;
      any |= to[w];
    }
    if (!any) continue;
    first = smaller(first, y);
    end = y + 1;
  }
  d.span[2 * plane] = first;
  d.span[2 * plane + 1] = end;
}

// Rows [y0, y1) of a plane: rows of the mask by falling reach are joined, and all that are there grow by one
// voxel along the row for each step from one reach to the next. What grows beyond a row's end lies in the
// zeros behind it.
void dilate_rows(const Dilation& d, const Reach* rows, int64_t count, int64_t plane, int64_t y0, int64_t y1,
                 uint64_t* scratch, uint64_t flip, uint8_t* out) {
  const int64_t z = plane % d.n[0], size = (y1 - y0) * d.row;
  uint64_t *grown = scratch + 1, *other = grown + size + 1;
  for (int64_t i = -1; i <= size; ++i) grown[i] = 0;
  other[size] = 0;
  bool any = false;
  int64_t reach = rows[0].x;
  const auto grow_to = [&](int64_t x) {
    for (; reach > x; --reach) {
      if (!any) continue;
      const uint64_t* const a = grown;
      uint64_t* const b = other;
#pragma GCC ivdep
      for (int64_t i = 0; i < size; ++i)
        b[i] = a[i] | a[i] << 1 | a[i] >> 1 | a[i - 1] >> 63 | a[i + 1] << 63;
      grown = b;
      other = const_cast<uint64_t*>(a);
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t v = z + rows[i].z, dy = rows[i].y;
    grow_to(rows[i].x);
    if (v < 0 || v >= d.n[0]) continue;
    const int64_t source = plane + rows[i].z;
    const int64_t from = larger(y0, d.span[2 * source] - dy), to = smaller(y1, d.span[2 * source + 1] - dy);
    if (from >= to) continue;
    any = true;
    const uint64_t* const a = d.bits + (source * d.n[1] + from + dy) * d.row;
    uint64_t* const b = grown + (from - y0) * d.row;
    const int64_t m = (to - from) * d.row;
#pragma GCC ivdep
    for (int64_t k = 0; k < m; ++k) b[k] |= a[k];
  }
  grow_to(0);
  for (int64_t y = y0; y < y1; ++y, grown += d.row) {
    uint8_t* const to = out + (plane * d.n[1] + y) * d.n[2];
    int64_t x = 0;
    for (; x + 8 <= d.n[2]; x += 8) {
      const uint64_t eight = spread8((grown[x / 64] ^ flip) >> x % 64);
      memcpy(to + x, &eight, 8);
    }
    for (; x < d.n[2]; ++x) to[x] = (grown[x / 64] ^ flip) >> x % 64 & 1;
  }
}

// ---- polygons --------------------------------------------------------------------------------------

// A row's windings as differences, then their sum: m edges and the polygon's width per row and polygon.
void fill_polygon(const int32_t* v, int64_t m, int64_t rows, int64_t columns, int32_t* turns, uint8_t* out) {
  int64_t low[2] = {INT64_MAX, INT64_MAX}, high[2] = {INT64_MIN, INT64_MIN};  // in pixels
  for (int64_t i = 0; i < m; ++i)
    for (int k = 0; k < 2; ++k) {
      low[k] = smaller(low[k], formulas::floor_div(v[2 * i + k], formulas::subpixels));
      high[k] = larger(high[k], formulas::floor_div(v[2 * i + k], formulas::subpixels) + 1);
    }
  const int64_t left = larger(low[1], 0), right = smaller(high[1] + 1, columns);
  if (left >= right) return;
  for (int64_t y = larger(low[0], 0); y <= smaller(high[0], rows - 1); ++y) {
    uint8_t* row = out + y * columns;
    memset(turns + left, 0, static_cast<size_t>(right - left) * sizeof(int32_t));
    for (int64_t i = 0; i < m; ++i) {
      const Crossing c = formulas::crossing(v + 2 * i, v + 2 * (i + 1 < m ? i + 1 : 0), y);
      for (int64_t x = larger(c.on, 0); x < smaller(c.on_end, columns); ++x) row[x] = 1;
      if (c.turns && c.first < right) turns[larger(c.first, left)] += c.turns;
    }
    int32_t sum = 0;
    for (int64_t x = left; x < right; ++x) {
      sum += turns[x];
      row[x] |= sum != 0;
    }
  }
}

// ---- deformation -----------------------------------------------------------------------------------

// Samples `count` places; fills what lies outside.
struct Nearest {
  template <class T, int block>
  static void put(const Deformation& d, const T* image, const double (&p)[3][block], int count, const T& fill,
                  double, T* out) {
    double at[block];  // formulas::nearest_voxel in doubles, which are vectorised
    const double n0 = static_cast<double>(d.n[0]), n1 = static_cast<double>(d.n[1]),
                 n2 = static_cast<double>(d.n[2]);
    for (int j = 0; j < count; ++j) {
      const double a = floor(p[0][j] + 0.5), b = floor(p[1][j] + 0.5), c = floor(p[2][j] + 0.5);
      const bool inside = (a >= 0) & (a < n0) & (b >= 0) & (b < n1) & (c >= 0) & (c < n2);
      at[j] = inside ? (a * n1 + b) * n2 + c : -1;
    }
    for (int j = 0; j < count; ++j) out[j] = at[j] < 0 ? fill : image[static_cast<int64_t>(at[j])];
  }
};
struct Linear {
  template <class T, int block>
  static void put(const Deformation& d, const T* image, const double (&at)[3][block], int count, const T&,
                  double fill, T* out) {
    for (int j = 0; j < count; ++j) {
      const double p[3] = {at[0][j], at[1][j], at[2][j]};
      out[j] = static_cast<T>(formulas::linear_value(d, image, p, fill));
    }
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
    constexpr int block = 128;
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
      // Counters of 32 bits: AVX2 converts no others to double.
      const int count = static_cast<int>(end - x);
      const double first = static_cast<double>(x);
      double w[4][block];
      for (int j = 0; j < count && points > 1; ++j) {
        double of_j[4];
        formulas::spline_weights((first + j) * d.scale[2] + -static_cast<double>(i), of_j);
        for (int t = 0; t < 4; ++t) w[t][j] = of_j[t];
      }
      for (int k = 0; k < 3; ++k) {
        if (points == 1) {
          for (int j = 0; j < count; ++j) at[k][j] = base[k] + slope[k] * (first + j) + columns[k][0];
          continue;
        }
        double c[4];
        for (int t = 0; t < 4; ++t) c[t] = columns[k][formulas::mirrored(i - 1 + t, points)];
        for (int j = 0; j < count; ++j) {
          const double u = ((w[0][j] * c[0] + w[1][j] * c[1]) + w[2][j] * c[2]) + w[3][j] * c[3];
          at[k][j] = base[k] + slope[k] * (first + j) + u;
        }
      }
      Sampling::template put<T, block>(d, image + item * size, at, count, fill, fill_value,
                                       out + item * size + r % rows * d.n[2] + x);
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
  constexpr int64_t part = 1024;
  const int64_t parts = (blocks + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < items * parts; ++i) {
    const int64_t item = i / parts, begin = i % parts * part, end = smaller(begin + part, blocks);
    float* row = to + item * n;
    for (int64_t block = begin; block < smaller(end, n / 4); ++block) {
      const formulas::Words words = formulas::random_words(key[item], stream, block);
      for (int k = 0; k < 4; ++k) row[4 * block + k] = formulas::uniform(words.x[k]);
    }
    if (end == blocks && n % 4) {
      const formulas::Words words = formulas::random_words(key[item], stream, blocks - 1);
      for (int64_t k = 0; k < n % 4; ++k) row[4 * (blocks - 1) + k] = formulas::uniform(words.x[k]);
    }
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

size_t dilate_workspace(const Array& mask, const Array& radii, const double* spacing, const Exec& exec) {
  return Dilation(mask, radii, spacing, exec, nullptr).bytes;
}

// As bits: reads the mask once and writes the result once (2 B per voxel), and in between takes an operation
// on a word of 64 voxels for each row of the ball and some for each step of the radius.
void dilate(const Array& mask, const Array& radii, const double* spacing, bool erode, const Array& out,
            void* workspace, const Exec& exec) {
  const Dilation d(mask, radii, spacing, exec, static_cast<char*>(workspace));
  const int threads = static_cast<int>(d.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t plane = 0; plane < d.planes; ++plane)
    pack_plane(d, static_cast<const uint8_t*>(mask.data), erode, plane);
  const int64_t parts = (d.n[1] + d.part - 1) / d.part;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < d.planes * parts; ++i) {
    const int64_t plane = i / parts, y = i % parts * d.part, ball = d.balls > 1 ? plane / d.n[0] : 0;
    const Reach* rows = d.rows;
    for (int64_t k = 0; k < ball; ++k) rows += d.counts[k];
    dilate_rows(d, rows, d.counts[ball], plane, y, smaller(y + d.part, d.n[1]),
                d.scratch + thread_number() * 2 * (d.part * d.row + 2), erode ? ~uint64_t{0} : 0,
                static_cast<uint8_t*>(out.data));
  }
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
NOISYSEG_DISPATCH(size_t, dilate_workspace,
                  (const Array& mask, const Array& radii, const double* spacing, const Exec& exec),
                  (mask, radii, spacing, exec))
NOISYSEG_DISPATCH(void, dilate,
                  (const Array& mask, const Array& radii, const double* spacing, bool erode, const Array& out,
                   void* workspace, const Exec& exec),
                  (mask, radii, spacing, erode, out, workspace, exec))
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
