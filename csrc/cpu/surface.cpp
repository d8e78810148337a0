// Surface and overlap metrics on the CPU.
//
// A mask is kept as one bit per voxel, rows of 64-bit words along the axis with the smallest stride: a
// surface is then a few word operations, and the nearest surface voxel on a row one count of zeros.
// Each surface voxel looks for the other surface on the rows around it, nearest rows first, until no
// row can be nearer than what it has found: work follows the distances, and no distance map is made.
// Farther away it looks at blocks of rows first, joined to one. Where a sample of the voxels says that this
// would take longer than an exact distance map of the box around both masks (surfaces far apart), the map is
// made instead.
#include "formulas/surface.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/bits.h"
#include "cpu/edt.h"
#include "cpu/isa.h"
#include "noisyseg/surface.h"
#ifdef _OPENMP
#include <omp.h>
#else  // the emulator's build
#define omp_get_max_threads() 1
#define omp_get_thread_num() 0
#endif

namespace noisyseg {
namespace {
using formulas::CellWeights;
using formulas::common_spacing;
using formulas::highest_bit;
using formulas::items_of;
using formulas::larger;
using formulas::Limits;
using formulas::lowest_bit;
using formulas::MaskBits;
using formulas::MaskPairs;
using formulas::max_offsets;
using formulas::Offset;
using formulas::Rings;
using formulas::Sites;
using formulas::smaller;

int64_t align(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }

// One thread for few voxels: waking others, a few times in a call, would take longer.
int thread_count(const Exec& exec, int64_t voxels) {
  return voxels < 65536 ? 1 : exec.threads > 0 ? exec.threads : omp_get_max_threads();
}

int thread_count(const Exec& exec, const MaskPairs& m, int64_t items) {
  return thread_count(exec, items * m.grid[0] * m.grid[1] * m.grid[2]);
}

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
  swap(m.grid[a], m.grid[b]);
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

template <class T>
uint64_t pack_some(const T* p, int64_t stride, int64_t n, int64_t label) {
  uint64_t word = 0;
  if (label < 0)
    for (int64_t i = 0; i < n; ++i) word |= static_cast<uint64_t>(p[i * stride] != 0) << i;
  else
    for (int64_t i = 0; i < n; ++i) word |= static_cast<uint64_t>(p[i * stride] == label) << i;
  return word;
}

// Bits 64 w to 64 w + 63 of a row of n voxels: of label, or of all that is not 0.
uint64_t pack_word(const void* data, int bytes, int64_t first, int64_t stride, int64_t w, int64_t n,
                   int64_t label) {
  const int64_t count = smaller(64, n - 64 * w), element = first + 64 * w * stride;
  if (bytes == 1) {
    const uint8_t* p = static_cast<const uint8_t*>(data) + element;
    if (label > 255) return 0;
    if (stride != 1 || count < 64) return pack_some(p, stride, count, label);
    return label < 0 ? ~equal64(p, 0) : equal64(p, static_cast<uint8_t>(label));
  }
  if (bytes == 4) return pack_some(static_cast<const int32_t*>(data) + element, stride, count, label);
  return pack_some(static_cast<const int64_t*>(data) + element, stride, count, label);
}

// ---- surfaces --------------------------------------------------------------------------------------

// The smallest box around both surfaces, and what is known of each.
struct Box {
  int64_t low[3], shape[3];
  int64_t count[2];  // surface elements
  bool object[2];    // whether there are any, or there is no background at all
  bool map[2];       // whether their distances are to come from a map
};

// Rows are joined in blocks of block_rows planes by as many rows, for searches far away.
constexpr int64_t block_rows = 4;
constexpr int64_t near_rows = 256;  // that a search sees one by one before it goes by blocks
int64_t blocks_of(int64_t n) { return (n + block_rows - 1) / block_rows; }

// What one item occupies in the first buffer. A row is `words` words of bits and one of zeros, which
// also stands before the first row: word -1 and word `words` of a row are always there and zero.
struct Layout {
  int64_t words, row, plane, volume, blocks;                               // in words; row = words + 1
  int64_t rings, offsets, columns, rows, count, bits, joined, item_bytes;  // offsets in bytes
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
  l.blocks = blocks_of(shape[0]) * blocks_of(shape[1]) * l.row + 1;
  l.joined = l.bits + align(4 * l.volume * 8);
  l.item_bytes = l.joined + align(2 * l.blocks * 8);
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
  uint64_t* joined[2];   // word 0 of the first block
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
    r.joined[side] = reinterpret_cast<uint64_t*>(base + l.joined) + side * l.blocks + 1;
  }
  return r;
}

// Bits of both masks; per plane the rows and columns in use. Reads each mask once (B per voxel: both
// dtypes'), writes 1/4 B per voxel. Where the image's edge is repeated, so is a row's last bit
// (formulas::MaskBits).
void pack(const MaskPairs& m, const Layout& l, int64_t index, bool border, const Item& item, int threads) {
  const int64_t *n = m.shape, image = index / m.classes, label = label_of(m, index);
  const int64_t base[2] = {item_offset(m, 0, image), item_offset(m, 1, image)};
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
          to[side][w] = 64 * w >= n[2]
                            ? 0
                            : pack_word(m.data[side], m.bytes[side], row, m.strides[side][2], w, n[2], label);
          any |= to[side][w];
        }
        to[side][l.words] = 0;
      }
      if (!any) continue;
      for (int64_t w = 0; w < l.words; ++w) columns[w] |= to[0][w] | to[1][w];
      for (int side = 0; side < 2 && !border; ++side)
        to[side][n[2] / 64] |= (to[side][(n[2] - 1) / 64] >> (n[2] - 1) % 64 & 1) << n[2] % 64;
      first = smaller(first, y);
      last = y;
    }
    item.rows[2 * z] = first;
    item.rows[2 * z + 1] = last;
  }
}

Box find_box(const MaskPairs& m, const Layout& l, const Item& item) {
  const int64_t* n = m.shape;
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
    box.shape[i] = high[i] < 0 ? 0 : high[i] - low[i] + 1 + (m.grid[i] - n[i]);  // cells end one place later
  }
  return box;
}

MaskBits bits_of(const MaskPairs& m, const Layout& l, const uint64_t* mask, bool border) {
  return {mask,      l.plane,
          l.row,     {m.shape[0], m.shape[1], m.shape[2]},
          m.grid[2], {m.spatial[0], m.spatial[1], m.spatial[2]},
          border};
}

// The surfaces inside the box; counts per plane, summed up. Reads the bits of the rows around each row (1/8 B
// per voxel, the rest from the cache), writes 1/8 B per voxel and side.
void extract(const MaskPairs& m, const Layout& l, const SurfaceOptions& o, const Item& item, int threads) {
  Box& box = *item.box;
  const int64_t z0 = box.low[0], z1 = z0 + box.shape[0], y0 = box.low[1], y1 = y0 + box.shape[1];
  const int64_t w0 = box.low[2] / 64, w1 = (box.low[2] + box.shape[2] + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t z = z0; z < z1; ++z)
    for (int side = 0; side < 2; ++side) {
      const MaskBits bits = bits_of(m, l, item.mask[side], o.border);
      int64_t count = 0;
      for (int64_t y = y0; y < y1; ++y) {
        uint64_t* out = item.surface[side] + z * l.plane + y * l.row;
        out[w0 - 1] = out[w1] = 0;
        for (int64_t w = w0; w < w1; ++w) {
          switch (o.surface) {  // so that each is compiled for its kind
            case SurfaceKind::faces: out[w] = surface_word(bits, SurfaceKind::faces, z, y, w); break;
            case SurfaceKind::full: out[w] = surface_word(bits, SurfaceKind::full, z, y, w); break;
            default: out[w] = surface_word(bits, SurfaceKind::cells, z, y, w);
          }
          count += __builtin_popcountll(out[w]);
        }
      }
      item.count[side][z + 1 - z0] = count;
    }
  for (int side = 0; side < 2; ++side) {
    item.count[side][0] = 0;
    for (int64_t z = 0; z < box.shape[0]; ++z) item.count[side][z + 1] += item.count[side][z];
    box.count[side] = item.count[side][box.shape[0]];
    box.object[side] = box.count[side] > 0 || *item.mask[side] & 1;
  }
}

// Blocks of the surfaces' rows inside the box: reads 1/8 B per voxel and side.
void join_rows(const Layout& l, const Item& item, int threads) {
  const Box& box = *item.box;
  const int64_t w0 = box.low[2] / 64, w1 = (box.low[2] + box.shape[2] + 63) / 64;
  const int64_t planes = blocks_of(box.shape[0]), rows = blocks_of(box.shape[1]);
  (void)threads;  // without OpenMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t bz = 0; bz < planes; ++bz)
    for (int side = 0; side < 2; ++side)
      for (int64_t by = 0; by < rows; ++by) {
        uint64_t* const to = item.joined[side] + (bz * rows + by) * l.row;
        for (int64_t w = w0 - 1; w <= w1; ++w) to[w] = 0;
        for (int64_t z = bz * block_rows; z < smaller((bz + 1) * block_rows, box.shape[0]); ++z)
          for (int64_t y = by * block_rows; y < smaller((by + 1) * block_rows, box.shape[1]); ++y) {
            const uint64_t* const from =
                item.surface[side] + (z + box.low[0]) * l.plane + (y + box.low[1]) * l.row;
            for (int64_t w = w0; w < w1; ++w) to[w] |= from[w];
          }
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
  if (r.count > near_rows) {
    r.count = near_rows;
    r.beyond = r.offsets[near_rows].squared;
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

Sites blocks_at(const Item& item, const Layout& l, int side) {
  const Box& box = *item.box;
  const int64_t rows = blocks_of(box.shape[1]);
  return {item.joined[side],
          rows * l.row,
          l.row,
          box.low[2] / 64,
          (box.low[2] + box.shape[2] + 63) / 64,
          {blocks_of(box.shape[0]), rows}};
}

// From position i to block b, along an axis: 0 inside.
int64_t steps_to_block(int64_t i, int64_t b) {
  const int64_t first = b * block_rows;
  return i < first ? first - i : i >= first + block_rows ? i - first - block_rows + 1 : 0;
}

// `best`, or the squared distance from voxel (z, y, x) to the nearest set bit of all rows if that is less.
// Blocks outwards, and of those that may hold a nearer one the rows. seen: grows by the rows and blocks seen.
template <class T>
T nearest_by_blocks(const Sites& s, const Sites& blocks, const T unit[3], int64_t z, int64_t y, int64_t x,
                    T best, int64_t& seen) {
  const auto least = [](int64_t k) {
    return k > 1 ? (k - 1) * block_rows + 1 : k;
  };  // steps to the k-th away
  for (int64_t i = 0; i <= 2 * blocks.shape[0]; ++i) {
    if (formulas::square_of<T>(least((i + 1) / 2), unit[0]) >= best) break;
    const int64_t bz = formulas::outward(i, z / block_rows);
    if (bz < 0 || bz >= blocks.shape[0]) continue;
    const T along_z = formulas::square_of<T>(steps_to_block(z, bz), unit[0]);
    for (int64_t j = 0; j <= 2 * blocks.shape[1]; ++j) {
      if (along_z + formulas::square_of<T>(least((j + 1) / 2), unit[1]) >= best) break;
      const int64_t by = formulas::outward(j, y / block_rows);
      if (by < 0 || by >= blocks.shape[1]) continue;
      const T away = along_z + formulas::square_of<T>(steps_to_block(y, by), unit[1]);
      ++seen;
      if (away >= best || formulas::on_row(blocks, unit[2], bz, by, x, away, best) >= best) continue;
      const int64_t z1 = smaller((bz + 1) * block_rows, s.shape[0]);
      const int64_t y1 = smaller((by + 1) * block_rows, s.shape[1]);
      for (int64_t v = bz * block_rows; v < z1; ++v)
        for (int64_t u = by * block_rows; u < y1; ++u) {
          const T d = formulas::square_of<T>(v - z, unit[0]) + formulas::square_of<T>(u - y, unit[1]);
          ++seen;
          if (d < best) best = formulas::on_row(s, unit[2], v, u, x, d, best);
        }
    }
  }
  return best;
}

// formulas::nearest, from one window of 64 bits around x on each row where that is enough.
template <class T>
T nearest_on_list(const Sites& s, const Rings<T>& r, int64_t z, int64_t y, int64_t x, int64_t& seen) {
  const uint64_t planes = static_cast<uint64_t>(s.shape[0]), rows = static_cast<uint64_t>(s.shape[1]);
  const uint64_t* const own = s.bits + z * s.plane + y * s.row + ((x - 32) >> 6);
  const int64_t plane = s.plane, row = s.row, count = r.count;
  const int shift = static_cast<int>((x - 32) & 63);
  const T unit = r.unit[2];
  T best = formulas::far<T>();
  int64_t i = 0;
  for (; i < count; ++i) {
    const Offset<T> o = r.offsets[i];
    if (o.squared >= best) break;
    if (static_cast<uint64_t>(z + o.dz) >= planes || static_cast<uint64_t>(y + o.dy) >= rows) continue;
    const uint64_t* const p = own + o.dz * plane + o.dy * row;
    const uint64_t window = p[0] >> shift | p[1] << 1 << (63 - shift);  // bits x - 32 to x + 31
    if (!window) {
      if (o.squared + formulas::square_of<T>(32, unit) < best)
        best = formulas::on_row(s, unit, z + o.dz, y + o.dy, x, o.squared, best);
      continue;
    }
    const int after = lowest_bit(window >> 32 | uint64_t{1} << 40);
    const int before = 64 - highest_bit((window << 32) | uint64_t{1} << 24);
    const T d = o.squared + formulas::square_of<T>(after < before ? after : before, unit);
    best = d < best ? d : best;
  }
  seen = i;
  return best;
}

// Squared distance from a voxel to the other surface; seen: the rows and blocks looked at.
template <class T>
T nearest_site(const Sites& sites, const Sites& blocks, const Rings<T>& rings, int64_t z, int64_t y,
               int64_t x, int64_t& seen) {
  const T d = nearest_on_list(sites, rings, z, y, x, seen);
  return d > rings.beyond ? nearest_by_blocks(sites, blocks, rings.unit, z, y, x, d, seen) : d;
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
  const bool fp64 = !exact_in_float(box, equal);
  return align(n.voxels() * (fp64 ? 8 : 4)) +
         align(
             static_cast<int64_t>(NOISYSEG_ISA::plane_distance_workspace(n.rows, n.columns, threads, fp64)));
}

// A map of squared distances within each plane to the other surface (4 or 8 B written and read per voxel),
// then the last axis where a distance is asked for.
template <class T, class Real>
void distances_from_map(const Item& item, const Layout& l, int side, const T unit[3], double scale,
                        double* squared, void* scratch, int threads) {
  const Box& box = *item.box;
  const MapShape n(box);
  const bool flat = box.shape[1] == 1;
  Real* const map = static_cast<Real*>(scratch);
  const Sites sites = sites_of(item, l, 1 - side);
  const double units[2] = {static_cast<double>(unit[flat ? 0 : 1]), static_cast<double>(unit[2])};
  NOISYSEG_ISA::plane_distance(
      {sites.bits, sites.plane, flat ? sites.plane : sites.row, box.low[2], {n.planes, n.rows, n.columns}},
      units, map, static_cast<char*>(scratch) + align(n.voxels() * sizeof(Real)), threads);
  for_each_voxel(item, l, side, threads, [&](int64_t i, int64_t z, int64_t y, int64_t x) {
    if (flat) {
      y = z;
      z = 0;
    }
    const Real* const column = map + y * n.columns + x - box.low[2];
    double best = HUGE_VAL;
    for (int64_t j = 0; j <= 2 * n.planes; ++j) {
      const int64_t v = formulas::outward(j, z);
      const double along = static_cast<double>(formulas::square_of<T>(v - z, unit[0]));
      if (along >= best) break;
      if (v < 0 || v >= n.planes) continue;
      const double d = along + static_cast<double>(column[v * n.rows * n.columns]);
      best = d < best ? d : best;
    }
    squared[i] = best * scale;
    return 0;
  });
}

// Whether a map of the box is cheaper than searches, from every 64th voxel: a map costs about as much
// as seeing one row per voxel of the box, or four of a flat image, whose searches see rows in turn.

template <class T>
bool map_is_cheaper(const Item& item, const Layout& l, int side, int threads) {
  const Box& box = *item.box;
  const Rings<T>& rings = *static_cast<const Rings<T>*>(item.rings);
  const int64_t cost = (box.shape[1] == 1 ? 4 : 1) * box.shape[0] * box.shape[1] * box.shape[2];
  if (box.count[side] * rings.count <= cost && rings.beyond == formulas::far<T>()) return false;
  const Sites sites = sites_of(item, l, 1 - side), blocks = blocks_at(item, l, 1 - side);
  return 64 * for_each_voxel(item, l, side, threads,
                             [&](int64_t i, int64_t z, int64_t y, int64_t x) {
                               int64_t seen = 0;
                               if (i % 64 == 0) nearest_site(sites, blocks, rings, z, y, x, seen);
                               return seen;
                             }) >
         cost;
}

// squared[i] = squared distance of the i-th surface voxel of `side` to the other surface.
template <class T>
void directed_distances(const Item& item, const Layout& l, int side, double common, double* squared,
                        void* scratch, int threads) {
  const Box& box = *item.box;
  const double scale = common > 0 ? common * common : 1;
  if (!box.map[side]) {
    const Rings<T>& rings = *static_cast<const Rings<T>*>(item.rings);
    const Sites sites = sites_of(item, l, 1 - side), blocks = blocks_at(item, l, 1 - side);
    for_each_voxel(item, l, side, threads, [&](int64_t i, int64_t z, int64_t y, int64_t x) {
      int64_t seen;
      squared[i] = static_cast<double>(nearest_site(sites, blocks, rings, z, y, x, seen)) * scale;
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

// Eight running sums, so that the order is fixed and the loop runs in vectors. Reads 8 B per element (and 1 B
// of its code), then 8 (9) B again for each tolerance.
template <bool weighted>
void summarize(const double* squared, const uint8_t* codes, const CellWeights& weights, int64_t n,
               const double* limits, int tolerances, formulas::Directed& out, uint64_t* within) {
  double sum[8] = {}, most[8] = {};
  const auto add = [&](int64_t i, int j) {
    const double d = squared[i];
    sum[j] += weighted ? static_cast<double>(weights.of[codes[i]]) * std::sqrt(d) : std::sqrt(d);
    most[j] = d > most[j] ? d : most[j];
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) add(i + j, j);
  for (int j = 0; i < n; ++i, ++j) add(i, j);
  out.count = out.weight = static_cast<uint64_t>(n);
  out.sum = out.maximum = 0;
  for (int j = 0; j < 8; ++j) {
    out.sum += sum[j];
    out.maximum = most[j] > out.maximum ? most[j] : out.maximum;
  }
  if (weighted) {
    out.weight = 0;
    for (i = 0; i < n; ++i) out.weight += weights.of[codes[i]];
  }
  for (int t = 0; t < tolerances; ++t) {
    const double limit = limits[t];
    uint64_t total = 0;
    for (i = 0; i < n; ++i)
      if (weighted)
        total += squared[i] <= limit ? weights.of[codes[i]] : 0;
      else
        total += squared[i] <= limit;
    within[t] = total;
  }
}

// The percentile of sqrt(values) by radix selection: 11 bits at a time, the candidates moved to the
// front. Destroys the order of values and codes. No value is negative, so bit patterns sort as the numbers
// do.
template <bool weighted>
double select(double* values, uint8_t* codes, const CellWeights& weights, int64_t n, uint64_t total,
              double percentile, bool interpolate) {
  const formulas::Rank rank = formulas::percentile_rank(percentile, total, interpolate);
  uint64_t reach = rank.reach, in_bin = total;
  int64_t left = n;
  double next = HUGE_VAL;  // smallest value above the candidates
  for (int shift = 53; left > 1; shift = shift > 11 ? shift - 11 : 0) {
    const auto key = [&](double v) {
      uint64_t bits;
      std::memcpy(&bits, &v, 8);
      return static_cast<int>(bits >> shift & 2047);
    };
    uint64_t histogram[2048] = {};
    for (int64_t i = 0; i < left; ++i) histogram[key(values[i])] += weighted ? weights.of[codes[i]] : 1;
    int bin = 0;
    for (; reach > histogram[bin]; ++bin) reach -= histogram[bin];
    if (histogram[bin] < in_bin) {
      const bool last = reach == histogram[bin];
      int64_t kept = 0;
      for (int64_t i = 0; i < left; ++i) {
        const double v = values[i];
        const int at = key(v);
        if (last && at > bin && v < next) next = v;
        if (at != bin) continue;
        if (weighted) codes[kept] = codes[i];
        values[kept++] = v;
      }
      left = kept;
      in_bin = histogram[bin];
    }
    if (shift == 0) break;
  }
  const double low = values[0];
  const double high = reach < in_bin || rank.reach == total ? low : next;
  return formulas::percentile_value(low, high, rank.fraction);
}

// ---- one item, and the batch -------------------------------------------------------------------------

// Bytes of a worker's share of the second buffer: squared distances of both surfaces, their codes, then a
// map.
struct Scratch {
  int64_t distances, codes, map;
  int64_t all() const { return distances + codes + map; }
};

Scratch scratch_of(const MaskPairs& m, const Layout& l, const SurfaceOptions& o, void* surfaces,
                   int threads) {
  Scratch most = {};
  const int64_t items = items_of(m, o);
  const int inner = workers_of(items, threads) == 1 ? threads : 1;
  for (int64_t i = 0; i < items; ++i) {
    const Box& box = *item_at(surfaces, l, m.grid, i).box;
    if (!box.count[0] || !box.count[1]) continue;
    most.distances = larger(most.distances, align((box.count[0] + box.count[1]) * 8));
    if (o.surface == SurfaceKind::cells) most.codes = larger(most.codes, align(box.count[0] + box.count[1]));
    if (box.map[0] || box.map[1]) most.map = larger(most.map, map_bytes(box, common_spacing(m) > 0, inner));
  }
  return most;
}

// First step of an item: everything that the size of the second buffer depends on.
template <class T>
void prepare(const MaskPairs& m, const Layout& l, const SurfaceOptions& o, int64_t index, void* surfaces,
             int threads) {
  const Item item = item_at(surfaces, l, m.grid, index);
  Box& box = *item.box;
  pack(m, l, o.first + index, o.border, item, threads);
  box = find_box(m, l, item);
  extract(m, l, o, item, threads);
  if (!box.count[0] || !box.count[1]) return;
  join_rows(l, item, threads);
  make_rings<T>(item, m.spacing, common_spacing(m));
  for (int side = 0; side < 2; ++side) box.map[side] = map_is_cheaper<T>(item, l, side, threads);
}

// What the second step's items share.
struct Rules {
  const SurfaceOptions& options;
  Limits limits;
  CellWeights weights;
};

// The codes of a surface's cells, in the order of for_each_voxel: formulas::cell_code, a word of cells at a
// time.
void list_codes(const MaskPairs& m, const Layout& l, bool border, const Item& item, int side, int threads,
                uint8_t* codes) {
  const Box& box = *item.box;
  const MaskBits bits = bits_of(m, l, item.mask[side], border);
  const int64_t w0 = box.low[2] / 64, w1 = (box.low[2] + box.shape[2] + 63) / 64;
  (void)threads;  // without OpenMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t z = 0; z < box.shape[0]; ++z) {
    int64_t position = item.count[side][z];
    if (position == item.count[side][z + 1]) continue;
    for (int64_t y = 0; y < box.shape[1]; ++y) {
      const int64_t v = z + box.low[0], u = y + box.low[1];
      const uint64_t* row = item.surface[side] + v * l.plane + u * l.row;
      for (int64_t w = w0; w < w1; ++w) {
        if (!row[w]) continue;
        uint64_t corners[8];
        for (int corner = 0; corner < 8; ++corner)
          corners[corner] = mask_word(bits, v - (corner >> 2), u - (corner >> 1 & 1), w, -(corner & 1));
        for (uint64_t word = row[w]; word; word &= word - 1) {
          const int bit = lowest_bit(word);
          int code = 0;
          for (int corner = 0; corner < 8; ++corner)
            code |= static_cast<int>(corners[corner] >> bit & 1) << corner;
          codes[position++] = static_cast<uint8_t>(code);
        }
      }
    }
  }
}

// Second step.
template <class T, bool weighted>
void measure(const MaskPairs& m, const Layout& l, const Rules& rules, const Item& item, int64_t index,
             char* scratch, const Scratch& parts, double* out, int threads) {
  const Box& box = *item.box;
  const SurfaceOptions& o = rules.options;
  formulas::Directed directed[2] = {};
  uint64_t within[2][SurfaceOptions::max_tolerances];
  for (int side = 0; side < 2; ++side) {
    directed[side].count = static_cast<uint64_t>(box.count[side]);
    directed[side].object = box.object[side];
  }
  if (box.count[0] && box.count[1]) {
    double* const all = reinterpret_cast<double*>(scratch);
    uint8_t* const all_codes = reinterpret_cast<uint8_t*>(scratch) + parts.distances;
    double* const list[2] = {all, all + box.count[0]};
    uint8_t* const codes[2] = {all_codes, all_codes + box.count[0]};
    const double* limits = rules.limits.squared + index % rules.limits.classes * rules.limits.count;
    for (int side = 0; side < 2; ++side) {
      directed_distances<T>(item, l, side, common_spacing(m), list[side],
                            scratch + parts.distances + parts.codes, threads);
      if (weighted) list_codes(m, l, o.border, item, side, threads, codes[side]);
      summarize<weighted>(list[side], codes[side], rules.weights, box.count[side], limits, rules.limits.count,
                          directed[side], within[side]);
    }
    const auto quantile = [&](int side, int64_t n, uint64_t total) {
      return select<weighted>(list[side], codes[side], rules.weights, n, total, o.percentile, o.interpolate);
    };
    if (o.pooled)
      directed[0].quantile = directed[1].quantile =
          quantile(0, box.count[0] + box.count[1], directed[0].weight + directed[1].weight);
    else
      for (int side = 0; side < 2; ++side)
        directed[side].quantile = quantile(side, box.count[side], directed[side].weight);
  }
  formulas::surface_result(directed[0], directed[1], within[0], within[1], rules.limits.count, o.mean_of_two,
                           o.missing, out, m.items);
}

// ---- logits ----------------------------------------------------------------------------------------

// The class with the largest logit for voxels 64 w to 64 w + 63 of a row: the first of equals.
template <class T>
void argmax_of(const T* p, int64_t class_stride, int64_t stride, int64_t n, int64_t classes,
               uint8_t* winner) {
  decltype(formulas::to_real<float>(*p) + (sizeof(T) == 8 ? 0.0 : 0.0f)) best[64];
  int32_t which[64];
  using Real = typename std::remove_reference<decltype(best[0])>::type;
  for (int64_t i = 0; i < n; ++i) {
    best[i] = formulas::to_real<Real>(p[i * stride]);
    which[i] = 0;
  }
  const auto class_ = [&](int32_t c, int64_t s) {
    const T* q = p + c * class_stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const Real v = formulas::to_real<Real>(q[i * s]);
      const bool more = v > best[i];
      best[i] = more ? v : best[i];
      which[i] = more ? c : which[i];
    }
  };
  for (int32_t c = 1; c < classes; ++c) stride == 1 ? class_(c, 1) : class_(c, stride);
  for (int64_t i = 0; i < n; ++i) winner[i] = static_cast<uint8_t>(which[i]);
}

void argmax_word(const formulas::OverlapPairs& m, int64_t row, int64_t w, uint8_t* winner) {
  const int64_t stride = m.strides[0][2], n = smaller(64, m.shape[2] - 64 * w), at = row + 64 * w * stride;
  for (int64_t i = n; i < 64; ++i) winner[i] = 0;
#define NOISYSEG_ARGMAX(T) \
  argmax_of(static_cast<const T*>(m.data[0]) + at, m.class_stride[0], stride, n, m.logits, winner);
  switch (m.dtype[0]) {
    case DType::f16: NOISYSEG_ARGMAX(formulas::Half) break;
    case DType::bf16: NOISYSEG_ARGMAX(formulas::BFloat16) break;
    case DType::f32: NOISYSEG_ARGMAX(float) break;
    default: NOISYSEG_ARGMAX(double)
  }
#undef NOISYSEG_ARGMAX
}

// Adds |pred|, |target| and |pred and target| of a row of masks or of a label.
void count_row(const MaskPairs& m, const int64_t row[2], int64_t label, int64_t* sum) {
  int64_t p = 0, t = 0, both = 0, w = 0;
  const auto add = [&](uint64_t a, uint64_t b) {
    p += __builtin_popcountll(a);
    t += __builtin_popcountll(b);
    both += __builtin_popcountll(a & b);
  };
  const int64_t n = m.shape[2];
  if (m.bytes[0] == 1 && m.bytes[1] == 1 && m.strides[0][2] == 1 && m.strides[1][2] == 1 && label < 256) {
    const uint8_t *a = static_cast<const uint8_t*>(m.data[0]) + row[0],
                  *b = static_cast<const uint8_t*>(m.data[1]) + row[1];
    const uint8_t value = label < 0 ? 0 : static_cast<uint8_t>(label);
    const uint64_t flip = label < 0 ? ~uint64_t{0} : 0;
    for (; w < n / 64; ++w) add(equal64(a + 64 * w, value) ^ flip, equal64(b + 64 * w, value) ^ flip);
  }
  for (; w < (n + 63) / 64; ++w)
    add(pack_word(m.data[0], m.bytes[0], row[0], m.strides[0][2], w, n, label),
        pack_word(m.data[1], m.bytes[1], row[1], m.strides[1][2], w, n, label));
  sum[0] += p;
  sum[1] += t;
  sum[2] += both;
}

template <class T>
uint64_t above_of(const T* p, int64_t stride, int64_t n, double threshold) {
  uint64_t word = 0;
  for (int64_t i = 0; i < n; ++i)
    word |= static_cast<uint64_t>(formulas::to_real<double>(p[i * stride]) > threshold) << i;
  return word;
}

uint64_t above_word(const formulas::OverlapPairs& m, int64_t row, int64_t w, double threshold) {
  const int64_t stride = m.strides[0][2], n = smaller(64, m.shape[2] - 64 * w), at = row + 64 * w * stride;
  switch (m.dtype[0]) {
    case DType::f16:
      return above_of(static_cast<const formulas::Half*>(m.data[0]) + at, stride, n, threshold);
    case DType::bf16:
      return above_of(static_cast<const formulas::BFloat16*>(m.data[0]) + at, stride, n, threshold);
    case DType::f32: return above_of(static_cast<const float*>(m.data[0]) + at, stride, n, threshold);
    default: return above_of(static_cast<const double*>(m.data[0]) + at, stride, n, threshold);
  }
}

}  // namespace

namespace NOISYSEG_ISA {

size_t surface_extract_workspace(const Array& pred, int spatial_dims, const SurfaceOptions& options,
                                 const Exec&) {
  const MaskPairs m = in_memory_order(formulas::surface_pairs(pred, pred, spatial_dims, options));
  return static_cast<size_t>(items_of(m, options) * layout_of(m.grid).item_bytes);
}

size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,
                       const SurfaceOptions& options, void* surfaces, const Exec& exec) {
  const MaskPairs m = in_memory_order(formulas::surface_pairs(pred, target, spatial_dims, options));
  const Layout l = layout_of(m.grid);
  const int64_t items = items_of(m, options);
  const int threads = thread_count(exec, m, items);
  const bool equal = common_spacing(m) > 0;
  for_each_item(items, threads, [&](int64_t i, int inner, int) {
    (equal ? prepare<int64_t> : prepare<double>)(m, l, options, i, surfaces, inner);
  });
  return static_cast<size_t>(workers_of(items, threads) * scratch_of(m, l, options, surfaces, threads).all());
}

void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                     void* workspace, const Array& out, const Exec& exec) {
  const MaskPairs m = in_memory_order(formulas::surface_pairs(pred, pred, spatial_dims, options));
  const Layout l = layout_of(m.grid);
  const int threads = thread_count(exec, m, items_of(m, options));
  const Scratch parts = scratch_of(m, l, options, surfaces, threads);
  const bool equal = common_spacing(m) > 0, cells = options.surface == SurfaceKind::cells;
  const Rules rules = {options, formulas::limits_of(options), formulas::cell_weights(m.spacing)};
  const auto step = cells ? (equal ? measure<int64_t, true> : measure<double, true>)
                          : (equal ? measure<int64_t, false> : measure<double, false>);
  for_each_item(items_of(m, options), threads, [&](int64_t i, int inner, int worker) {
    const Item item = item_at(surfaces, l, m.grid, i);
    char* scratch = static_cast<char*>(workspace) + worker * parts.all();
    double* result = static_cast<double*>(out.data) + options.first + i;
    step(m, l, rules, item, options.first + i, scratch, parts, result, inner);
  });
}

// Counts |pred|, |target| and |pred and target| of each class from 64-bit words of both sides. Reads each
// logit and each mask once; a label image once for each class, the words after the first time from the cache.
void overlap_metrics(const Array& pred, const Array& target, int spatial_dims, const OverlapOptions& options,
                     const Array& counts_out, const Array& out, const Exec& exec) {
  formulas::OverlapPairs m = formulas::overlap_pairs(pred, target, spatial_dims, options);
  static_cast<MaskPairs&>(m) = in_memory_order(m);
  int64_t* counts = static_cast<int64_t*>(counts_out.data);
  for (int64_t i = 0; i < 3 * m.items; ++i) counts[i] = 0;
  const int64_t *n = m.shape, classes = m.classes, first = larger(m.first_label, 0);
  const int threads = thread_count(exec, m, m.items);
  (void)threads;  // without OpenMP
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t plane = 0; plane < m.images * n[0]; ++plane) {
    const int64_t image = plane / n[0], z = plane % n[0];
    int64_t sum[3 * OverlapOptions::max_classes];
    for (int64_t k = 0; k < 3 * classes; ++k) sum[k] = 0;
    for (int64_t y = 0; y < n[1]; ++y) {
      int64_t row[2];
      for (int side = 0; side < 2; ++side)
        row[side] = item_offset(m, side, image) + z * m.strides[side][0] + y * m.strides[side][1];
      if (options.pred == OverlapOptions::masks) {
        for (int64_t k = 0; k < classes; ++k)
          count_row(m, row, m.first_label < 0 ? -1 : m.first_label + k, sum + 3 * k);
        continue;
      }
      for (int64_t w = 0; w < (n[2] + 63) / 64; ++w) {
        uint8_t winner[64];
        if (options.pred == OverlapOptions::argmax) argmax_word(m, row[0], w, winner);
        const uint64_t inside = n[2] - 64 * w < 64 ? (uint64_t{1} << (n[2] - 64 * w)) - 1 : ~uint64_t{0};
        for (int64_t k = 0; k < classes; ++k) {
          const int64_t label = m.first_label < 0 || m.class_axis[1] ? -1 : m.first_label + k;
          const int64_t target_row = row[1] + (m.class_axis[1] ? (first + k) * m.class_stride[1] : 0);
          const uint64_t p =
              inside & (options.pred == OverlapOptions::argmax
                            ? equal64(winner, static_cast<uint8_t>(first + k))
                            : above_word(m, row[0] + (first + k) * m.class_stride[0], w, options.threshold));
          const uint64_t t = pack_word(m.data[1], m.bytes[1], target_row, m.strides[1][2], w, n[2], label);
          sum[3 * k] += __builtin_popcountll(p);
          sum[3 * k + 1] += __builtin_popcountll(t);
          sum[3 * k + 2] += __builtin_popcountll(p & t);
        }
      }
    }
    for (int64_t k = 0; k < 3 * classes; ++k) {
#pragma omp atomic
      counts[3 * image * classes + k] += sum[k];
    }
  }
  for (int64_t i = 0; i < m.items; ++i)
    formulas::overlap_result(counts[3 * i], counts[3 * i + 1], counts[3 * i + 2], n[0] * n[1] * n[2],
                             static_cast<double*>(out.data) + i, m.items);
}

}  // namespace NOISYSEG_ISA
}  // namespace noisyseg

NOISYSEG_DISPATCH(size_t, surface_extract_workspace,
                  (const Array& pred, int spatial_dims, const SurfaceOptions& options, const Exec& exec),
                  (pred, spatial_dims, options, exec))
NOISYSEG_DISPATCH(size_t, surface_extract,
                  (const Array& pred, const Array& target, int spatial_dims, const SurfaceOptions& options,
                   void* surfaces, const Exec& exec),
                  (pred, target, spatial_dims, options, surfaces, exec))
NOISYSEG_DISPATCH(void, surface_metrics,
                  (const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                   void* workspace, const Array& out, const Exec& exec),
                  (pred, spatial_dims, options, surfaces, workspace, out, exec))
NOISYSEG_DISPATCH(void, overlap_metrics,
                  (const Array& pred, const Array& target, int spatial_dims, const OverlapOptions& options,
                   const Array& counts, const Array& out, const Exec& exec),
                  (pred, target, spatial_dims, options, counts, out, exec))
