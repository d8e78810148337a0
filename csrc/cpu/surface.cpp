// Surface and overlap metrics on the CPU.
//
// A mask is kept as one bit per voxel, rows of 64-bit words along the axis with the smallest stride: a
// surface is then a few word operations, and the nearest surface voxel on a row one count of zeros.
// Each surface voxel looks for the other surface on the rows around it, nearest rows first, until no
// row can be nearer than what it has found: work follows the distances, and no distance map is made.
// Where a sample of the voxels says that this would take longer than an exact distance map of the box
// around both masks (surfaces far apart), the map is made instead.
#include "formulas/surface.h"

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "noisyseg/surface.h"
#ifdef _OPENMP
#include <omp.h>
#else  // the emulator's build
#define omp_get_max_threads() 1
#define omp_get_thread_num() 0
#endif
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace noisyseg {
namespace {
using formulas::highest_bit;
using formulas::larger;
using formulas::lowest_bit;
using formulas::MaskPairs;
using formulas::max_offsets;
using formulas::nearest;
using formulas::nearest_of_all;
using formulas::Offset;
using formulas::Rings;
using formulas::Sites;
using formulas::smaller;

int64_t align(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

int thread_count(const Exec& exec) { return exec.threads > 0 ? exec.threads : omp_get_max_threads(); }

int workers_of(int64_t items, int threads) { return items < 2 * threads ? 1 : threads; }

// f(item, threads for its own use): items in parallel when there are enough of them, else one by one.
template <class F>
void for_each_item(int64_t items, int threads, const F& f) {
  if (workers_of(items, threads) == 1) {
    for (int64_t item = 0; item < items; ++item) f(item, threads, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t item = 0; item < items; ++item) f(item, 1, omp_get_thread_num());
}

template <class T>
void swap(T& a, T& b) {
  const T t = a;
  a = b;
  b = t;
}

void swap_axes(MaskPairs& m, int a, int b) {
  swap(m.shape[a], m.shape[b]);
  swap(m.spatial[a], m.spatial[b]);
  swap(m.spacing[a], m.spacing[b]);
  for (int side = 0; side < 2; ++side) swap(m.strides[side][a], m.strides[side][b]);
}

// The spatial axes by falling stride of pred, so that rows lie along memory whatever the layout; a flat
// image as planes of one row each, since work is shared out by planes.
MaskPairs in_memory_order(MaskPairs m) {
  for (int a : {0, 1, 0})
    if (m.spatial[a] && llabs(m.strides[0][a]) < llabs(m.strides[0][a + 1])) swap_axes(m, a, a + 1);
  if (!m.spatial[0] && m.spatial[1]) swap_axes(m, 0, 1);
  return m;
}

// ---- masks to bits ---------------------------------------------------------------------------------

uint64_t pack64(const uint8_t* p) {
#if defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto part = [&](const uint8_t* q) -> uint32_t {
    return static_cast<uint32_t>(_mm256_movemask_epi8(
        _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), zero)));
  };
  return ~(part(p) | static_cast<uint64_t>(part(p + 32)) << 32);
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  uint64_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(
                _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)), zero))))
            << 16 * i;
  return ~word;
#else
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(p[i] != 0) << i;
  return word;
#endif
}

template <class T>
uint64_t pack_some(const T* p, int64_t stride, int64_t n) {
  uint64_t word = 0;
  for (int64_t i = 0; i < n; ++i) word |= static_cast<uint64_t>(p[i * stride] != 0) << i;
  return word;
}

// Bits 64 w to 64 w + 63 of a row of n voxels.
uint64_t pack_word(const void* data, int bytes, int64_t first, int64_t stride, int64_t w, int64_t n) {
  const int64_t count = smaller(64, n - 64 * w), element = first + 64 * w * stride;
  if (bytes == 1) {
    const uint8_t* p = static_cast<const uint8_t*>(data) + element;
    return stride == 1 && count == 64 ? pack64(p) : pack_some(p, stride, count);
  }
  if (bytes == 4) return pack_some(static_cast<const int32_t*>(data) + element, stride, count);
  return pack_some(static_cast<const int64_t*>(data) + element, stride, count);
}

// ---- surfaces --------------------------------------------------------------------------------------

// The smallest box around both masks, and what is known of each surface.
struct Box {
  int64_t low[3], shape[3];
  int64_t count[2];  // surface voxels
  bool map[2];       // whether their distances are to come from a map
};

// What one item occupies in the first buffer. A row is `words` words of bits and one of zeros, which
// also stands before the first row: word -1 and word `words` of a row are always there and zero.
struct Layout {
  int64_t words, row, plane, volume;                               // in words; row = words + 1
  int64_t rings, offsets, columns, rows, count, bits, item_bytes;  // offsets in bytes
};

Layout layout_of(const int64_t shape[3]) {
  Layout l;
  l.words = (shape[2] + 63) / 64;
  l.row = l.words + 1;
  l.plane = shape[1] * l.row;
  l.volume = shape[0] * l.plane + 1;
  l.rings = align(sizeof(Box));
  l.offsets = l.rings + align(sizeof(Rings<double>));
  l.columns = l.offsets +
              align(smaller(max_offsets, (2 * shape[0] - 1) * (2 * shape[1] - 1)) * sizeof(Offset<double>));
  l.rows = l.columns + align(shape[0] * l.words * 8);  // per plane: OR of all its rows
  l.count = l.rows + align(shape[0] * 2 * 8);          // per plane: first and last row with an object
  l.bits = l.count + align(2 * (shape[0] + 1) * 8);    // per side and plane: surface voxels before it
  l.item_bytes = l.bits + align(4 * l.volume * 8);
  return l;
}

struct Item {
  Box* box;
  void* rings;    // Rings<T>
  void* offsets;  // Offset<T>
  uint64_t* columns;
  int64_t* rows;
  int64_t* count[2];
  uint64_t* mask[2];     // word 0 of the first row
  uint64_t* surface[2];  // the same places
};

Item item_at(void* buffer, const Layout& l, const int64_t shape[3], int64_t item) {
  char* base = static_cast<char*>(buffer) + item * l.item_bytes;
  Item r;
  r.box = reinterpret_cast<Box*>(base);
  r.rings = base + l.rings;
  r.offsets = base + l.offsets;
  r.columns = reinterpret_cast<uint64_t*>(base + l.columns);
  r.rows = reinterpret_cast<int64_t*>(base + l.rows);
  uint64_t* bits = reinterpret_cast<uint64_t*>(base + l.bits);
  for (int side = 0; side < 2; ++side) {
    r.count[side] = reinterpret_cast<int64_t*>(base + l.count) + side * (shape[0] + 1);
    r.mask[side] = bits + side * l.volume + 1;
    r.surface[side] = bits + (2 + side) * l.volume + 1;
  }
  return r;
}

// Bits of both masks; per plane the rows and columns in use. Reads each mask once.
void pack(const MaskPairs& m, const Layout& l, int64_t index, const Item& item, int threads) {
  const int64_t *n = m.shape, base[2] = {item_offset(m, 0, index), item_offset(m, 1, index)};
  for (int side = 0; side < 2; ++side) item.mask[side][-1] = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t z = 0; z < n[0]; ++z) {
    uint64_t* columns = item.columns + z * l.words;
    int64_t first = n[1], last = -1;
    for (int64_t w = 0; w < l.words; ++w) columns[w] = 0;
    for (int64_t y = 0; y < n[1]; ++y) {
      uint64_t any = 0, *to[2];
      for (int side = 0; side < 2; ++side) {
        to[side] = item.mask[side] + z * l.plane + y * l.row;
        const int64_t row = base[side] + z * m.strides[side][0] + y * m.strides[side][1];
        for (int64_t w = 0; w < l.words; ++w) {
          to[side][w] = pack_word(m.data[side], m.bytes[side], row, m.strides[side][2], w, n[2]);
          any |= to[side][w];
        }
        to[side][l.words] = 0;
      }
      if (!any) continue;
      for (int64_t w = 0; w < l.words; ++w) columns[w] |= to[0][w] | to[1][w];
      first = smaller(first, y);
      last = y;
    }
    item.rows[2 * z] = first;
    item.rows[2 * z + 1] = last;
  }
}

Box find_box(const int64_t n[3], const Layout& l, const Item& item) {
  int64_t low[3] = {n[0], n[1], n[2]}, high[3] = {-1, -1, -1};
  for (int64_t z = 0; z < n[0]; ++z) {
    if (item.rows[2 * z + 1] < 0) continue;
    low[0] = smaller(low[0], z);
    high[0] = z;
    low[1] = smaller(low[1], item.rows[2 * z]);
    high[1] = larger(high[1], item.rows[2 * z + 1]);
    for (int64_t w = 0; w < l.words; ++w) {
      const uint64_t word = item.columns[z * l.words + w];
      if (!word) continue;
      low[2] = smaller(low[2], 64 * w + lowest_bit(word));
      high[2] = larger(high[2], 64 * w + highest_bit(word));
    }
  }
  Box box = {};
  for (int i = 0; i < 3; ++i) {
    box.low[i] = high[i] < 0 ? 0 : low[i];
    box.shape[i] = high[i] < 0 ? 0 : high[i] - low[i] + 1;
  }
  return box;
}

// surface = mask and not all face neighbours, inside the box; counts per plane, summed up.
void extract(const MaskPairs& m, const Layout& l, const Item& item, int threads) {
  Box& box = *item.box;
  const int64_t z0 = box.low[0], z1 = z0 + box.shape[0], y0 = box.low[1], y1 = y0 + box.shape[1];
  const int64_t w0 = box.low[2] / 64, w1 = (box.low[2] + box.shape[2] + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t z = z0; z < z1; ++z)
    for (int side = 0; side < 2; ++side) {
      int64_t count = 0;
      for (int64_t y = y0; y < y1; ++y) {
        const uint64_t* in = item.mask[side] + z * l.plane + y * l.row;
        uint64_t* out = item.surface[side] + z * l.plane + y * l.row;
        out[w0 - 1] = out[w1] = 0;
        for (int64_t w = w0; w < w1; ++w) {
          const uint64_t word = in[w];
          out[w] = 0;
          if (!word) continue;
          uint64_t inner = (word << 1 | in[w - 1] >> 63) & (word >> 1 | in[w + 1] << 63);
          if (m.spatial[1]) inner &= (y > 0 ? in[w - l.row] : 0) & (y + 1 < m.shape[1] ? in[w + l.row] : 0);
          if (m.spatial[0])
            inner &= (z > 0 ? in[w - l.plane] : 0) & (z + 1 < m.shape[0] ? in[w + l.plane] : 0);
          out[w] = word & ~inner;
          count += __builtin_popcountll(out[w]);
        }
      }
      item.count[side][z + 1 - z0] = count;
    }
  for (int side = 0; side < 2; ++side) {
    item.count[side][0] = 0;
    for (int64_t z = 0; z < box.shape[0]; ++z) item.count[side][z + 1] += item.count[side][z];
    box.count[side] = item.count[side][box.shape[0]];
  }
}

// ---- nearest surface voxel -------------------------------------------------------------------------

// The rows that searches of this item visit.
template <class T>
void make_rings(const Item& item, const double spacing[3], double common) {
  Rings<T>& r = *static_cast<Rings<T>*>(item.rings);
  int64_t to[2];
  r = formulas::empty_rings<T>(item.box->shape, spacing, common, static_cast<Offset<T>*>(item.offsets), to);
  for (int64_t dz = -to[0]; dz <= to[0]; ++dz)
    for (int64_t dy = -to[1]; dy <= to[1]; ++dy) {
      const T squared = formulas::square_of<T>(dz, r.unit[0]) + formulas::square_of<T>(dy, r.unit[1]);
      if (squared < r.beyond)
        r.offsets[r.count++] = {squared, static_cast<int32_t>(dz), static_cast<int32_t>(dy)};
    }
  for (int64_t gap = r.count / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)  // Shell sort
    for (int64_t i = gap; i < r.count; ++i) {
      const Offset<T> x = r.offsets[i];
      int64_t j = i;
      for (; j >= gap && x.squared < r.offsets[j - gap].squared; j -= gap) r.offsets[j] = r.offsets[j - gap];
      r.offsets[j] = x;
    }
}

// f(position in the list, z, y, x) for each surface voxel of a side; z, y count from the box's corner,
// x from the row's first bit. Planes in parallel. Returns the sum of what f returns.
template <class F>
int64_t for_each_voxel(const Item& item, const Layout& l, int side, int threads, const F& f) {
  const Box& box = *item.box;
  const int64_t w0 = box.low[2] / 64, w1 = (box.low[2] + box.shape[2] + 63) / 64;
  int64_t total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1) reduction(+ : total)
  for (int64_t z = 0; z < box.shape[0]; ++z) {
    int64_t position = item.count[side][z];
    if (position == item.count[side][z + 1]) continue;
    for (int64_t y = 0; y < box.shape[1]; ++y) {
      const uint64_t* row = item.surface[side] + (z + box.low[0]) * l.plane + (y + box.low[1]) * l.row;
      for (int64_t w = w0; w < w1; ++w)
        for (uint64_t word = row[w]; word; word &= word - 1)
          total += f(position++, z, y, 64 * w + lowest_bit(word));
    }
  }
  return total;
}

Sites sites_of(const Item& item, const Layout& l, int side) {
  const Box& box = *item.box;
  return {item.surface[side] + box.low[0] * l.plane + box.low[1] * l.row,
          l.plane,
          l.row,
          box.low[2] / 64,
          (box.low[2] + box.shape[2] + 63) / 64,
          {box.shape[0], box.shape[1]}};
}

// ---- map of the box, for surfaces far apart --------------------------------------------------------

// A map in single precision is exact for steps of 1 while squared lengths stay below 2^24.
bool exact_in_float(const Box& box, bool equal) {
  const int64_t* n = box.shape;
  return equal && n[0] * n[0] + n[1] * n[1] + n[2] * n[2] < int64_t{1} << 24;
}

// A flat image is planes of one row for the search, but one plane of rows for the map.
struct MapShape {
  int64_t planes, rows, columns;
  explicit MapShape(const Box& box)
      : planes(box.shape[1] == 1 ? 1 : box.shape[0]),
        rows(box.shape[1] == 1 ? box.shape[0] : box.shape[1]),
        columns(box.shape[2]) {}
  int64_t voxels() const { return planes * rows * columns; }
};

int64_t map_bytes(const Box& box, bool equal, int threads) {
  const MapShape n(box);
  return align(n.voxels() * (exact_in_float(box, equal) ? 4 : 8)) + threads * align(n.rows * 32);
}

// One column of a plane's map: f(y) <- min over u of f(u) + unit (y - u)^2, by the lower envelope of
// parabolas (Felzenszwalb and Huttenlocher, 2012). room: 4 rows doubles.
template <class Real>
void envelope(Real* column, int64_t stride, int64_t rows, double unit, double* room) {
  double *from = room, *at = room + rows, *height = room + 2 * rows, *result = room + 3 * rows;
  int64_t top = -1;
  for (int64_t y = 0; y < rows; ++y) {
    const double f = static_cast<double>(column[y * stride]), q = static_cast<double>(y);
    if (f == HUGE_VAL) continue;
    double begin = -HUGE_VAL;
    for (; top >= 0; --top) {
      begin = ((f - height[top]) / unit + q * q - at[top] * at[top]) / (2 * (q - at[top]));
      if (begin > from[top]) break;
    }
    ++top;
    from[top] = top == 0 ? -HUGE_VAL : begin;
    at[top] = q;
    height[top] = f;
  }
  if (top < 0) return;
  for (int64_t y = 0, k = 0; y < rows; ++y) {
    const double q = static_cast<double>(y);
    while (k < top && from[k + 1] <= q) ++k;
    result[y] = height[k] + unit * (q - at[k]) * (q - at[k]);
  }
  for (int64_t y = 0; y < rows; ++y) column[y * stride] = static_cast<Real>(result[y]);
}

// A map of squared distances within each plane to the other surface (4 or 8 B written, then read and
// written once per voxel), then the last axis where a distance is asked for.
template <class T, class Real>
void distances_from_map(const Item& item, const Layout& l, int side, const T unit[3], double scale,
                        double* squared, void* scratch, int threads) {
  const Box& box = *item.box;
  const MapShape n(box);
  const bool flat = box.shape[1] == 1;
  Real* const map = static_cast<Real*>(scratch);
  double* const room =
      reinterpret_cast<double*>(static_cast<char*>(scratch) + align(n.voxels() * sizeof(Real)));
  const Sites sites = sites_of(item, l, 1 - side);
  const auto number = [](T value) { return static_cast<double>(value); };
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t z = 0; z < n.planes; ++z) {
    for (int64_t y = 0; y < n.rows; ++y) {
      Real* const row = map + (z * n.rows + y) * n.columns;
      const uint64_t* bits = sites.bits + (flat ? y * sites.plane : z * sites.plane + y * sites.row);
      int64_t last = -1;  // the nearest set bit so far
      const auto bit = [&](int64_t x) { return bits[(x + box.low[2]) >> 6] >> ((x + box.low[2]) & 63) & 1; };
      for (int64_t x = 0; x < n.columns; ++x) {
        if (bit(x)) last = x;
        row[x] = last < 0 ? static_cast<Real>(HUGE_VAL)
                          : static_cast<Real>(number((x - last) * (x - last) * unit[2]));
      }
      if (last < 0) continue;
      for (int64_t x = n.columns - 1; x >= 0; --x) {
        if (row[x] == 0) last = x;
        const Real d = static_cast<Real>(number((last - x) * (last - x) * unit[2]));
        if (x <= last && d < row[x]) row[x] = d;
      }
    }
    double* const own = room + (threads > 1 ? omp_get_thread_num() : 0) * (align(n.rows * 32) / 8);
    for (int64_t x = 0; x < n.columns; ++x)
      envelope(map + z * n.rows * n.columns + x, n.columns, n.rows, number(unit[flat ? 0 : 1]), own);
  }
  for_each_voxel(item, l, side, threads, [&](int64_t i, int64_t z, int64_t y, int64_t x) {
    if (flat) {
      y = z;
      z = 0;
    }
    double best = HUGE_VAL;
    for (int64_t j = 0; j <= 2 * n.planes; ++j) {
      const int64_t v = formulas::outward(j, z);
      const double along = number(formulas::square_of<T>(v - z, unit[0]));
      if (along >= best) break;
      if (v < 0 || v >= n.planes) continue;
      const double d = along + static_cast<double>(map[(v * n.rows + y) * n.columns + x - box.low[2]]);
      best = d < best ? d : best;
    }
    squared[i] = best * scale;
    return 0;
  });
}

// Whether a map of the box is cheaper than searches, from every 64th voxel: a map costs about as much
// as seeing two rows per voxel of the box, and nearest_of_all sees all rows.
template <class T>
bool map_is_cheaper(const Item& item, const Layout& l, int side, int threads) {
  const Box& box = *item.box;
  const Rings<T>& rings = *static_cast<const Rings<T>*>(item.rings);
  const int64_t rows = box.shape[0] * box.shape[1];
  if (box.count[side] * rings.count <= 2 * rows * box.shape[2] && rings.beyond == formulas::far<T>())
    return false;
  const Sites sites = sites_of(item, l, 1 - side);
  const int64_t seen =
      for_each_voxel(item, l, side, threads, [&](int64_t i, int64_t z, int64_t y, int64_t x) {
        if (i % 64) return int64_t{0};
        int64_t n;
        return nearest(sites, rings, z, y, x, n) <= rings.beyond ? n : n + rows;
      });
  return 64 * seen > 2 * rows * box.shape[2];
}

// squared[i] = squared distance of the i-th surface voxel of `side` to the other surface.
template <class T>
void directed_distances(const Item& item, const Layout& l, int side, double common, double* squared,
                        void* scratch, int threads) {
  const Box& box = *item.box;
  const double scale = common > 0 ? common * common : 1;
  if (!box.map[side]) {
    const Rings<T>& rings = *static_cast<const Rings<T>*>(item.rings);
    const Sites sites = sites_of(item, l, 1 - side);
    for_each_voxel(item, l, side, threads, [&](int64_t i, int64_t z, int64_t y, int64_t x) {
      int64_t seen;
      T d = nearest(sites, rings, z, y, x, seen);
      if (d > rings.beyond) d = nearest_of_all(sites, rings.unit, z, y, x, d);
      squared[i] = static_cast<double>(d) * scale;
      return 0;
    });
    return;
  }
  const T* unit = static_cast<const Rings<T>*>(item.rings)->unit;
  if (exact_in_float(box, common > 0))
    distances_from_map<T, float>(item, l, side, unit, scale, squared, scratch, threads);
  else
    distances_from_map<T, double>(item, l, side, unit, scale, squared, scratch, threads);
}

// ---- sums and order statistics ---------------------------------------------------------------------

// Eight running sums, so that the order is fixed and the loop runs in vectors.
void summarize(const double* squared, int64_t n, double tolerance, formulas::Directed& out) {
  double sum[8] = {}, most[8] = {};
  int64_t within[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) {
      const double d = squared[i + j];
      sum[j] += std::sqrt(d);
      most[j] = d > most[j] ? d : most[j];
      within[j] += formulas::within_tolerance(d, tolerance);
    }
  for (int j = 0; i < n; ++i, ++j) {
    sum[j] += std::sqrt(squared[i]);
    most[j] = squared[i] > most[j] ? squared[i] : most[j];
    within[j] += formulas::within_tolerance(squared[i], tolerance);
  }
  out.count = n;
  out.sum = out.maximum = 0;
  out.within = 0;
  for (int j = 0; j < 8; ++j) {
    out.sum += sum[j];
    out.maximum = most[j] > out.maximum ? most[j] : out.maximum;
    out.within += within[j];
  }
}

// The percentile of sqrt(values) by radix selection: 11 bits at a time, the candidates moved to the
// front. Destroys the order of values. No value is negative, so bit patterns sort as the numbers do.
double select(double* values, int64_t n, double percentile) {
  const formulas::Rank rank = formulas::percentile_rank(percentile, n);
  int64_t k = rank.index, left = n;
  double next = HUGE_VAL;  // smallest value above the candidates
  for (int shift = 53; left > 1; shift = shift > 11 ? shift - 11 : 0) {
    const auto key = [&](double v) {
      uint64_t bits;
      std::memcpy(&bits, &v, 8);
      return static_cast<int>(bits >> shift & 2047);
    };
    int64_t histogram[2048] = {};
    for (int64_t i = 0; i < left; ++i) ++histogram[key(values[i])];
    int bin = 0;
    for (; k >= histogram[bin]; ++bin) k -= histogram[bin];
    if (histogram[bin] < left) {
      const bool last = k + 1 == histogram[bin];
      int64_t kept = 0;
      for (int64_t i = 0; i < left; ++i) {
        const double v = values[i];
        const int at = key(v);
        if (last && at > bin && v < next) next = v;
        if (at == bin) values[kept++] = v;
      }
      left = kept;
    }
    if (shift == 0) break;
  }
  const double low = values[0];
  const double high = k + 1 < left ? low : (rank.index + 1 < n ? next : low);
  return formulas::percentile_value(low, high, rank.weight);
}

// ---- one item, and the batch -------------------------------------------------------------------------

// The spacing of all axes along which distances arise, or 0 where they differ.
double common_spacing(const MaskPairs& m) {
  double common = 0;
  for (int i = 0; i < 3; ++i) {
    if (m.shape[i] == 1) continue;
    if (common != 0 && m.spacing[i] != common) return 0;
    common = m.spacing[i];
  }
  return common == 0 ? 1 : common;
}

// Bytes of a worker's share of the second buffer: squared distances of both surfaces, then a map.
struct Scratch {
  int64_t distances, map;
};

Scratch scratch_of(const MaskPairs& m, const Layout& l, void* surfaces, int threads) {
  Scratch most = {};
  const int inner = workers_of(m.items, threads) == 1 ? threads : 1;
  for (int64_t i = 0; i < m.items; ++i) {
    const Box& box = *item_at(surfaces, l, m.shape, i).box;
    if (!box.count[0] || !box.count[1]) continue;
    most.distances = larger(most.distances, align((box.count[0] + box.count[1]) * 8));
    if (box.map[0] || box.map[1]) most.map = larger(most.map, map_bytes(box, common_spacing(m) > 0, inner));
  }
  return most;
}

// First step of an item: everything that the size of the second buffer depends on.
template <class T>
void prepare(const MaskPairs& m, const Layout& l, int64_t index, void* surfaces, int threads) {
  const Item item = item_at(surfaces, l, m.shape, index);
  Box& box = *item.box;
  pack(m, l, index, item, threads);
  box = find_box(m.shape, l, item);
  extract(m, l, item, threads);
  if (!box.count[0] || !box.count[1]) return;
  make_rings<T>(item, m.spacing, common_spacing(m));
  for (int side = 0; side < 2; ++side) box.map[side] = map_is_cheaper<T>(item, l, side, threads);
}

// Second step.
template <class T>
void measure(const MaskPairs& m, const Layout& l, const SurfaceOptions& options, const Item& item,
             char* scratch, const Scratch& parts, double* out, int threads) {
  const Box& box = *item.box;
  formulas::Directed directed[2] = {};
  for (int side = 0; side < 2; ++side) directed[side].count = box.count[side];
  if (box.count[0] && box.count[1]) {
    double* const all = reinterpret_cast<double*>(scratch);
    double* const list[2] = {all, all + box.count[0]};
    for (int side = 0; side < 2; ++side) {
      directed_distances<T>(item, l, side, common_spacing(m), list[side], scratch + parts.distances, threads);
      summarize(list[side], box.count[side], options.tolerance, directed[side]);
    }
    if (options.definition == SurfaceDefinition::monai)
      for (int side = 0; side < 2; ++side)
        directed[side].quantile = select(list[side], box.count[side], options.percentile);
    else
      directed[0].quantile = directed[1].quantile =
          select(all, box.count[0] + box.count[1], options.percentile);
  }
  formulas::surface_result(directed[0], directed[1], out, m.items);
}

}  // namespace

namespace NOISYSEG_ISA {

size_t surface_extract_workspace(const Array& pred, int spatial_dims, const Exec&) {
  const MaskPairs m = in_memory_order(formulas::mask_pairs(pred, pred, spatial_dims, nullptr));
  return static_cast<size_t>(m.items * layout_of(m.shape).item_bytes);
}

size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,
                       const SurfaceOptions& options, void* surfaces, const Exec& exec) {
  const MaskPairs m = in_memory_order(formulas::mask_pairs(pred, target, spatial_dims, options.spacing));
  const Layout l = layout_of(m.shape);
  const int threads = thread_count(exec);
  const bool equal = common_spacing(m) > 0;
  for_each_item(m.items, threads, [&](int64_t i, int inner, int) {
    (equal ? prepare<int64_t> : prepare<double>)(m, l, i, surfaces, inner);
  });
  const Scratch share = scratch_of(m, l, surfaces, threads);
  return static_cast<size_t>(workers_of(m.items, threads) * (share.distances + share.map));
}

void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                     void* workspace, const Array& out, const Exec& exec) {
  const MaskPairs m = in_memory_order(formulas::mask_pairs(pred, pred, spatial_dims, options.spacing));
  const Layout l = layout_of(m.shape);
  const int threads = thread_count(exec);
  const Scratch parts = scratch_of(m, l, surfaces, threads);
  const bool equal = common_spacing(m) > 0;
  for_each_item(m.items, threads, [&](int64_t i, int inner, int worker) {
    const Item item = item_at(surfaces, l, m.shape, i);
    char* scratch = static_cast<char*>(workspace) + worker * (parts.distances + parts.map);
    double* result = static_cast<double*>(out.data) + i;
    (equal ? measure<int64_t> : measure<double>)(m, l, options, item, scratch, parts, result, inner);
  });
}

size_t overlap_metrics_workspace(const Array& pred, int spatial_dims, const Exec&) {
  return static_cast<size_t>(formulas::mask_pairs(pred, pred, spatial_dims, nullptr).items * 3 * 8);
}

// Counts |pred|, |target| and |pred and target| from 64-bit words of both masks, each read once.
void overlap_metrics(const Array& pred, const Array& target, int spatial_dims, void* workspace,
                     const Array& out, const Exec& exec) {
  const MaskPairs m = in_memory_order(formulas::mask_pairs(pred, target, spatial_dims, nullptr));
  int64_t* counts = static_cast<int64_t*>(workspace);
  for (int64_t i = 0; i < 3 * m.items; ++i) counts[i] = 0;
  const int64_t* n = m.shape;
#pragma omp parallel for schedule(static) num_threads(thread_count(exec))
  for (int64_t plane = 0; plane < m.items * n[0]; ++plane) {
    const int64_t item = plane / n[0], z = plane % n[0];
    int64_t sum[3] = {};
    for (int64_t y = 0; y < n[1]; ++y)
      for (int64_t w = 0; w < (n[2] + 63) / 64; ++w) {
        uint64_t word[2];
        for (int side = 0; side < 2; ++side)
          word[side] = pack_word(m.data[side], m.bytes[side],
                                 item_offset(m, side, item) + z * m.strides[side][0] + y * m.strides[side][1],
                                 m.strides[side][2], w, n[2]);
        sum[0] += __builtin_popcountll(word[0]);
        sum[1] += __builtin_popcountll(word[1]);
        sum[2] += __builtin_popcountll(word[0] & word[1]);
      }
    for (int k = 0; k < 3; ++k) {
#pragma omp atomic
      counts[3 * item + k] += sum[k];
    }
  }
  for (int64_t i = 0; i < m.items; ++i)
    formulas::overlap_result(counts[3 * i], counts[3 * i + 1], counts[3 * i + 2], n[0] * n[1] * n[2],
                             static_cast<double*>(out.data) + i, m.items);
}

}  // namespace NOISYSEG_ISA
}  // namespace noisyseg

NOISYSEG_DISPATCH(size_t, surface_extract_workspace, (const Array& pred, int spatial_dims, const Exec& exec),
                  (pred, spatial_dims, exec))
NOISYSEG_DISPATCH(size_t, surface_extract,
                  (const Array& pred, const Array& target, int spatial_dims, const SurfaceOptions& options,
                   void* surfaces, const Exec& exec),
                  (pred, target, spatial_dims, options, surfaces, exec))
NOISYSEG_DISPATCH(void, surface_metrics,
                  (const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                   void* workspace, const Array& out, const Exec& exec),
                  (pred, spatial_dims, options, surfaces, workspace, out, exec))
NOISYSEG_DISPATCH(size_t, overlap_metrics_workspace, (const Array& pred, int spatial_dims, const Exec& exec),
                  (pred, spatial_dims, exec))
NOISYSEG_DISPATCH(void, overlap_metrics,
                  (const Array& pred, const Array& target, int spatial_dims, void* workspace,
                   const Array& out, const Exec& exec),
                  (pred, target, spatial_dims, workspace, out, exec))
