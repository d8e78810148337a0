// Surface and overlap metrics on CUDA: the same bit masks and the same search as csrc/cpu/surface.cpp,
// over the whole image, with all decisions taken on the device and no synchronisation.
// Bytes per voxel: both masks read (2 for u8), 0.5 of bits written and read; searches read bits that stay in
// L2. Only where many voxels find nothing nearby is a map of squared distances within planes made (4 B per
// voxel written and read, 8 where the spacings differ). Per surface element: its key (4 or 8 B) written, then
// read 3 or 6 times for the percentile and once for each tolerance; its code (1 B), for cells, the same.
#include "cuda/launch.h"
#include "formulas/surface.h"

namespace noisyseg {
namespace {
using formulas::CellWeights;
using formulas::common_spacing;
using formulas::far;
using formulas::is_object;
using formulas::items_of;
using formulas::Limits;
using formulas::lowest_bit;
using formulas::MaskBits;
using formulas::MaskPairs;
using formulas::max_offsets;
using formulas::Offset;
using formulas::Rings;
using formulas::Sites;
using formulas::smaller;
using formulas::square_of;
using u64 = unsigned long long;

constexpr int threads = 256;
constexpr int select_threads = 512;
constexpr int map_blocks = 2048;

int64_t align(int64_t bytes) { return (bytes + 63) & ~int64_t{63}; }
unsigned blocks_for(int64_t n, int64_t each, int64_t most) {
  return static_cast<unsigned>(smaller((n + each - 1) / each, most));
}

// Bits: per item mask of pred, of target, surface of pred, of target; a zero word, then rows of `words`
// words and one of zeros.
struct Layout {
  int64_t words, row, plane, volume, chunks, voxels;  // voxels: places of surface elements
};

__host__ __device__ inline uint64_t* bits_at(uint64_t* bits, const Layout& l, int64_t item, int which) {
  return bits + (item * 4 + which) * l.volume + 1;
}

Layout layout_of(const MaskPairs& m) {
  Layout l;
  l.words = (m.grid[2] + 63) / 64;
  l.row = l.words + 1;
  l.plane = m.grid[1] * l.row;
  l.volume = m.grid[0] * l.plane + 1;
  l.chunks = (l.volume + threads - 1) / threads;
  l.voxels = m.grid[0] * m.grid[1] * m.grid[2];
  return l;
}

// A squared distance as a sortable key: whole steps where all spacings are equal, else the bits of a double.
template <class T>
struct Key {
  using Bits = uint32_t;
  __device__ static Bits of(int64_t squared) { return static_cast<Bits>(squared); }
  __device__ static double value(Bits key, double scale) { return static_cast<double>(key) * scale; }
  __device__ static int64_t steps(Bits key) { return static_cast<int64_t>(key); }
};

template <>
struct Key<double> {
  using Bits = u64;
  __device__ static Bits of(double squared) { return static_cast<Bits>(__double_as_longlong(squared)); }
  __device__ static double value(Bits key, double) {
    return __longlong_as_double(static_cast<long long>(key));
  }
  __device__ static double steps(Bits key) { return __longlong_as_double(static_cast<long long>(key)); }
};

// Whether whole steps fit the 32 bits of a key (all but the two largest numbers).
bool whole_steps(const MaskPairs& m) {
  const int64_t* n = m.grid;
  return common_spacing(m) > 0 && n[0] < 46340 && n[1] < 46340 && n[2] < 46340 &&
         n[0] * n[0] + n[1] * n[1] + n[2] * n[2] < (int64_t{1} << 32) - 2;
}

// What a chunk of `threads` words of a surface adds: [0] from the search, [1] from what it left open.
struct Chunk {
  double sum[2], maximum[2];
  int64_t count, base;  // surface elements; the place of their distances in the side's list
  int64_t open;
};

struct Totals {
  u64 listed, open, weight;
};

struct Work {
  void* offsets;
  int* offset_count;
  Chunk* chunks;   // (items, 2, chunks)
  Totals* totals;  // (items, 2)
  u64* within;     // (items, 2, tolerances)
  void* keys;      // (items, 2, voxels): squared distances, in any order
  void* map;       // (items, voxels): keys of squared distances within the plane
  uint8_t* codes;  // (items, 2, voxels) in the order of the keys, for cells
};

Work work_at(void* base, const MaskPairs& m, const Layout& l, const SurfaceOptions& o, size_t* bytes) {
  char* p = static_cast<char*>(base);
  const auto take = [&](int64_t n) {
    char* here = p;
    p += align(n);
    return static_cast<void*>(here);
  };
  const int64_t items = items_of(m, o), key = whole_steps(m) ? 4 : 8;
  Work w;
  w.offsets = take(max_offsets * static_cast<int64_t>(sizeof(Offset<double>)));
  w.offset_count = static_cast<int*>(take(sizeof(int)));
  w.chunks = static_cast<Chunk*>(take(items * 2 * l.chunks * static_cast<int64_t>(sizeof(Chunk))));
  w.totals = static_cast<Totals*>(take(items * 2 * static_cast<int64_t>(sizeof(Totals))));
  w.within = static_cast<u64*>(take(items * 2 * o.tolerances * 8));
  w.keys = take(items * 2 * l.voxels * key);
  w.map = take(items * l.voxels * key);
  w.codes = static_cast<uint8_t*>(take(o.surface == SurfaceKind::cells ? items * 2 * l.voxels : 0));
  if (bytes) *bytes = static_cast<size_t>(p - static_cast<char*>(base));
  return w;
}

// ---- masks to bits, bits to surfaces ---------------------------------------------------------------

// A warp makes 32 bits: lane i reads voxel i. Reads both masks once, writes 1/8 B per voxel each. first: the
// item that the buffer begins with. Where the image's edge is repeated, so is a row's last bit
// (formulas::MaskBits).
__global__ void __launch_bounds__(threads)
    pack_masks(MaskPairs m, Layout l, int64_t first, int64_t items, bool border, uint64_t* bits) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (threads / 32);
  const int64_t rows = m.shape[0] * m.shape[1], total = items * 2 * rows * 2 * l.row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32; i < total;
       i += warps) {
    const int64_t half = i % (2 * l.row), r = i / (2 * l.row) % rows, pair = i / (2 * l.row) / rows;
    const int side = static_cast<int>(pair & 1);
    const int64_t item = pair >> 1, z = r / m.shape[1], y = r % m.shape[1];
    int64_t x = 32 * half + lane;
    if (!border && x == m.shape[2]) --x;
    bool object = false;
    if (x < m.shape[2])
      object = is_object(m.data[side], m.bytes[side],
                         formulas::item_offset(m, side, (first + item) / m.classes) + z * m.strides[side][0] +
                             y * m.strides[side][1] + x * m.strides[side][2],
                         formulas::label_of(m, first + item));
    const unsigned word = __ballot_sync(0xffffffffu, object);
    uint64_t* const to = bits_at(bits, l, item, side);
    if (lane == 0) {
      reinterpret_cast<unsigned*>(to + z * l.plane + y * l.row)[half] = word;
      if (r == 0 && half == 0) to[-1] = 0;
    }
  }
}

__device__ inline MaskBits mask_bits(const int64_t shape[3], const int64_t grid[3], const bool spatial[3],
                                     const Layout& l, const uint64_t* bits, bool border) {
  return {
      bits,  l.plane, l.row, {shape[0], shape[1], shape[2]}, grid[2], {spatial[0], spatial[1], spatial[2]},
      border};
}

// A thread per word of the surfaces. Reads up to 27 words around (1/8 B per voxel and side from memory, the
// rest from L1 and L2), writes one.
__global__ void __launch_bounds__(threads)
    extract_surfaces(MaskPairs m, Layout l, SurfaceKind kind, int64_t items, bool border, uint64_t* bits) {
  const int64_t rows = m.grid[0] * m.grid[1], each = rows * l.row, total = items * 2 * each;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step) {
    const int64_t pair = i / each, at = i % each, k = at % l.row, r = at / l.row;
    const int side = static_cast<int>(pair & 1);
    const MaskBits in = mask_bits(m.shape, m.grid, m.spatial, l, bits_at(bits, l, pair >> 1, side), border);
    uint64_t* out = bits_at(bits, l, pair >> 1, 2 + side) + at;
    if (at == 0) out[-1] = 0;
    *out = k < l.words ? formulas::surface_word(in, kind, r / m.grid[1], r % m.grid[1], k) : 0;
  }
}

// ---- distances -------------------------------------------------------------------------------------

// The offsets of the rings by bitonic sort, and zeroed totals. One block of max_offsets threads.
template <class T>
__global__ void __launch_bounds__(max_offsets)
    make_rings(Rings<T> r, int64_t to0, int64_t to1, Work work, int64_t pairs, int tolerances) {
  __shared__ T key[max_offsets];
  __shared__ int id[max_offsets];
  __shared__ int kept;
  const int t = static_cast<int>(threadIdx.x), width = static_cast<int>(2 * to1 + 1);
  const int n = static_cast<int>(2 * to0 + 1) * width;
  for (int64_t i = t; i < pairs; i += max_offsets) work.totals[i] = Totals{0, 0, 0};
  for (int64_t i = t; i < pairs * tolerances; i += max_offsets) work.within[i] = 0;
  key[t] = far<T>();
  id[t] = t;
  if (t == 0) kept = 0;
  __syncthreads();
  if (t < n) {
    const T squared = square_of<T>(t / width - to0, r.unit[0]) + square_of<T>(t % width - to1, r.unit[1]);
    if (squared < r.beyond) {
      key[t] = squared;
      atomicAdd(&kept, 1);
    }
  }
  __syncthreads();
  for (int size = 2; size <= max_offsets; size *= 2)
    for (int gap = size / 2; gap > 0; gap /= 2) {
      const int other = t ^ gap;
      if (other > t) {
        const bool falling = (t & size) != 0;
        if (falling ? key[t] < key[other] : key[other] < key[t]) {
          const T k = key[t];
          const int i = id[t];
          key[t] = key[other];
          id[t] = id[other];
          key[other] = k;
          id[other] = i;
        }
      }
      __syncthreads();
    }
  r.offsets[t] = {key[t], static_cast<int32_t>(id[t] / width - to0),
                  static_cast<int32_t>(id[t] % width - to1)};
  if (t == 0) *work.offset_count = kept;
}

// The sum of one value per thread, the same in every thread; pairs are added in a fixed order.
template <class V, class Add>
__device__ inline V block_reduce(V value, V* shared, const Add& add) {
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = add(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  return shared[0];
}

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Most {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// The set bits of the block's chunk of words, in order, into list; returns how many.
__device__ inline int list_bits(const uint64_t* words, int64_t first, int64_t end, uint16_t* list,
                                int* shared) {
  const int t = static_cast<int>(threadIdx.x);
  uint64_t word = first + t < end ? words[first + t] : 0;
  const int own = __popcll(word);
  shared[t] = own;
  __syncthreads();
  for (int gap = 1; gap < threads; gap *= 2) {
    const int before = t >= gap ? shared[t - gap] : 0;
    __syncthreads();
    shared[t] += before;
    __syncthreads();
  }
  int at = shared[t] - own;
  const int total = shared[threads - 1];
  for (; word; word &= word - 1) list[at++] = static_cast<uint16_t>(64 * t + lowest_bit(word));
  __syncthreads();
  return total;
}

struct Problem {
  Layout layout;
  int64_t shape[3];  // of the surfaces' grid
  int64_t voxels[3];
  bool spatial[3], border, cells;
  double scale;
  uint64_t* bits;
  Work work;
};

__device__ inline Sites sites_of(const Problem& p, int64_t item, int side) {
  return {bits_at(p.bits, p.layout, item, 2 + side),
          p.layout.plane,
          p.layout.row,
          0,
          p.layout.words,
          {p.shape[0], p.shape[1]}};
}

struct Voxel {
  int64_t z, y, x;
};

__device__ inline Voxel voxel_of(const Problem& p, int64_t first, int bit) {
  const int64_t word = first + bit / 64, r = word / p.layout.row;
  return {r / p.shape[1], r % p.shape[1], 64 * (word % p.layout.row) + bit % 64};
}

// What a block gathers over its share of a list; part 0 or 1 of the chunk.
__device__ inline void write_partials(Chunk& c, int part, double sum, double most, double* reals) {
  sum = block_reduce(sum, reals, Sum());
  most = block_reduce(most, reals, Most());
  if (threadIdx.x == 0) {
    c.sum[part] = sum;
    c.maximum[part] = most;
  }
}

// The code of a surface element: 0 but for cells.
__device__ inline int code_at(const Problem& p, int64_t item, int side, const Voxel& v) {
  if (!p.cells) return 0;
  const MaskBits bits =
      mask_bits(p.voxels, p.shape, p.spatial, p.layout, bits_at(p.bits, p.layout, item, side), p.border);
  return formulas::cell_code(bits, v.z, v.y, v.x);
}

__device__ inline double weight_of(const Problem& p, const CellWeights& weights, int code) {
  return p.cells ? static_cast<double>(weights.of[code]) : 1.0;
}

// Searches the rings for each surface element; those that find nothing sure get a key of all ones and stay
// open. Block (chunk of words, side, item); its elements are spread evenly over its threads.
template <class T>
__global__ void __launch_bounds__(threads) search_rings(Problem p, Rings<T> r, CellWeights weights) {
  using Bits = typename Key<T>::Bits;
  __shared__ uint16_t list[64 * threads];
  __shared__ double reals[threads];
  __shared__ u64 counts[threads];
  __shared__ int scan[threads];
  __shared__ int64_t base;
  const int64_t item = blockIdx.z, pair = 2 * item + blockIdx.y;
  const int side = static_cast<int>(blockIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * threads;
  Chunk& c = p.work.chunks[pair * p.layout.chunks + blockIdx.x];
  const int n = list_bits(bits_at(p.bits, p.layout, item, 2 + side), first, p.layout.volume - 1, list, scan);
  if (threadIdx.x == 0)
    base = n ? static_cast<int64_t>(atomicAdd(&p.work.totals[pair].listed, static_cast<u64>(n))) : 0;
  __syncthreads();
  r.count = *p.work.offset_count;
  const Sites sites = sites_of(p, item, 1 - side);
  Bits* keys = static_cast<Bits*>(p.work.keys) + pair * p.layout.voxels + base;
  double sum = 0, most = 0;
  int64_t open = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) {
    const Voxel v = voxel_of(p, first, list[i]);
    const int code = code_at(p, item, side, v);
    if (p.cells) p.work.codes[pair * p.layout.voxels + base + i] = static_cast<uint8_t>(code);
    int64_t seen;
    const T d = formulas::nearest(sites, r, v.z, v.y, v.x, seen);
    if (d > r.beyond || d >= far<T>()) {
      keys[i] = ~Bits{0};
      ++open;
      continue;
    }
    keys[i] = Key<T>::of(d);
    const double squared = static_cast<double>(d) * p.scale;
    sum += weight_of(p, weights, code) * sqrt(squared);
    most = squared > most ? squared : most;
  }
  write_partials(c, 0, sum, most, reals);
  open = static_cast<int64_t>(block_reduce(static_cast<u64>(open), counts, Sum()));
  if (threadIdx.x == 0) {
    c.count = n;
    c.base = base;
    c.open = open;
    c.sum[1] = c.maximum[1] = 0;
    if (open) atomicAdd(&p.work.totals[pair].open, static_cast<u64>(open));
  }
}

// Few open voxels see all rows themselves; for more than this, a map is made. No voxel stays open where
// the other surface is empty: then there is nothing to find.
__device__ inline bool map_is_cheaper(const Problem& p, int64_t item, int side) {
  const Totals own = p.work.totals[2 * item + side], other = p.work.totals[2 * item + 1 - side];
  return other.listed != 0 && own.open * static_cast<u64>(p.shape[0]) > 4096;
}

// map[v] = squared distance within v's plane to the other surface; all voxels, only if needed.
template <class T>
__global__ void __launch_bounds__(threads) map_planes(Problem p, Rings<T> r, int side) {
  const int64_t item = blockIdx.y;
  if (!map_is_cheaper(p, item, side)) return;
  const Sites sites = sites_of(p, item, 1 - side);
  typename Key<T>::Bits* map = static_cast<typename Key<T>::Bits*>(p.work.map) + item * p.layout.voxels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < p.layout.voxels; i += step) {
    const int64_t row = i / p.shape[2];
    const T d = formulas::nearest_on_plane(sites, r.unit, row / p.shape[1], row % p.shape[1], i % p.shape[2],
                                           T(0), far<T>());
    map[i] = d < far<T>() ? Key<T>::of(d) : ~typename Key<T>::Bits{0};
  }
}

// The distances that search_rings left open: along z over the map, or over all rows where there is none.
template <class T, bool from_map>
__global__ void __launch_bounds__(threads) close_open(Problem p, Rings<T> r, CellWeights weights, int side) {
  using Bits = typename Key<T>::Bits;
  __shared__ uint16_t list[64 * threads];
  __shared__ double reals[threads];
  __shared__ int scan[threads];
  const int64_t item = blockIdx.y, pair = 2 * item + side;
  if (p.work.totals[2 * item + 1 - side].listed == 0 || map_is_cheaper(p, item, side) != from_map) return;
  const Sites sites = sites_of(p, item, 1 - side);
  const Bits* map = static_cast<const Bits*>(p.work.map) + item * p.layout.voxels;
  for (int64_t chunk = blockIdx.x; chunk < p.layout.chunks; chunk += gridDim.x) {
    Chunk& c = p.work.chunks[pair * p.layout.chunks + chunk];
    if (c.open == 0) continue;
    const int n = list_bits(bits_at(p.bits, p.layout, item, 2 + side), chunk * threads, p.layout.volume - 1,
                            list, scan);
    Bits* keys = static_cast<Bits*>(p.work.keys) + pair * p.layout.voxels + c.base;
    double sum = 0, most = 0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) {
      if (keys[i] != ~Bits{0}) continue;
      const Voxel v = voxel_of(p, chunk * threads, list[i]);
      T d = far<T>();
      if constexpr (from_map)
        for (int64_t j = 0; j <= 2 * p.shape[0]; ++j) {
          const int64_t z = formulas::outward(j, v.z);
          const T along = square_of<T>(z - v.z, r.unit[0]);
          if (along >= d) break;
          if (z < 0 || z >= p.shape[0]) continue;
          const Bits within = map[(z * p.shape[1] + v.y) * p.shape[2] + v.x];
          if (within == ~Bits{0}) continue;
          const T at = along + static_cast<T>(Key<T>::steps(within));
          d = at < d ? at : d;
        }
      else
        d = formulas::nearest_of_all(sites, r.unit, v.z, v.y, v.x, d);
      keys[i] = Key<T>::of(d);
      const double squared = static_cast<double>(d) * p.scale;
      const int code = p.cells ? p.work.codes[pair * p.layout.voxels + c.base + i] : 0;
      sum += weight_of(p, weights, code) * sqrt(squared);
      most = squared > most ? squared : most;
    }
    write_partials(c, 1, sum, most, reals);
    __syncthreads();
  }
}

// ---- order statistics and results ------------------------------------------------------------------

// The weight of each surface, and of its elements within each tolerance: grid (parts of a list, sides,
// items). Reads the keys and codes once for each tolerance, after the first from L2. Integers, so the order
// of additions is free.
template <class T>
__global__ void __launch_bounds__(threads)
    count_within(Problem p, Limits limits, CellWeights weights, int64_t first) {
  __shared__ u64 shared[threads];
  const int64_t pair = 2 * static_cast<int64_t>(blockIdx.z) + blockIdx.y;
  const int64_t n = static_cast<int64_t>(p.work.totals[pair].listed);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * threads,
                step = static_cast<int64_t>(gridDim.x) * threads;
  if (begin >= n || p.work.totals[pair ^ 1].listed == 0) return;
  const typename Key<T>::Bits* keys =
      static_cast<const typename Key<T>::Bits*>(p.work.keys) + pair * p.layout.voxels;
  const uint8_t* codes = p.work.codes + (p.cells ? pair * p.layout.voxels : 0);
  const int64_t row = (first + pair / 2) % limits.classes * limits.count;
  for (int t = 0; t <= limits.count; ++t) {
    const double limit = t < limits.count ? limits.squared[row + t] : HUGE_VAL;
    u64 own = 0;
    for (int64_t i = begin + threadIdx.x; i < n; i += step)
      if (Key<T>::value(keys[i], p.scale) <= limit) own += p.cells ? weights.of[codes[i]] : 1;
    own = block_reduce(own, shared, Sum());
    if (threadIdx.x == 0 && own)
      atomicAdd(t < limits.count ? &p.work.within[pair * limits.count + t] : &p.work.totals[pair].weight,
                own);
  }
}

// The elements of one or two lists.
template <class Bits>
struct Lists {
  const Bits* keys[2];
  const uint8_t* codes[2];
  int64_t count[2];
};

// f(key, weight) for each element, shared out over the block.
template <class Bits, class F>
__device__ inline void for_each_key(const Lists<Bits>& l, bool cells, const CellWeights& weights,
                                    const F& f) {
  for (int k = 0; k < 2; ++k)
    for (int64_t i = threadIdx.x; i < l.count[k]; i += blockDim.x)
      f(l.keys[k][i], cells ? static_cast<u64>(weights.of[l.codes[k][i]]) : u64{1});
}

// The percentile over lists of this total weight, by radix selection on the bits of the keys, which sort as
// the numbers do. By a whole block; the result in every thread.
template <class T>
__device__ inline double select(const Lists<typename Key<T>::Bits>& lists, const Problem& p,
                                const CellWeights& weights, u64 total, double percentile, bool interpolate,
                                u64* histogram, u64* shared) {
  using Bits = typename Key<T>::Bits;
  const formulas::Rank rank = formulas::percentile_rank(percentile, total, interpolate);
  u64 reach = rank.reach, in_bin = 0;
  Bits prefix = 0;
  const int bits = 8 * static_cast<int>(sizeof(Bits));
  for (int shift = bits; shift > 0;) {
    const int above = shift, width = shift < 11 ? shift : 11;
    shift -= width;
    for (unsigned i = threadIdx.x; i < 2048; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for_each_key(lists, p.cells, weights, [&](Bits key, u64 weight) {
      if (above == bits || key >> above == prefix)
        atomicAdd(&histogram[static_cast<unsigned>(key >> shift) & ((1u << width) - 1)], weight);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned bin = 0;
      u64 before = 0;
      for (; before + histogram[bin] < reach; ++bin) before += histogram[bin];
      shared[0] = bin;
      shared[1] = before;
      shared[2] = histogram[bin];
      shared[3] = ~u64{0};
    }
    __syncthreads();
    prefix = static_cast<Bits>(prefix << width | static_cast<Bits>(shared[0]));
    reach -= shared[1];
    in_bin = shared[2];
    __syncthreads();
  }
  Bits high = prefix;  // the next value, if it is not the same again
  if (interpolate && reach == in_bin && rank.reach < total) {
    u64 least = ~u64{0};
    for_each_key(lists, p.cells, weights, [&](Bits key, u64) {
      if (key > prefix && key < least) least = key;
    });
    atomicMin(reinterpret_cast<unsigned long long*>(&shared[3]), least);
    __syncthreads();
    high = static_cast<Bits>(shared[3]);
  }
  __syncthreads();
  return formulas::percentile_value(Key<T>::value(prefix, p.scale), Key<T>::value(high, p.scale),
                                    rank.fraction);
}

struct Rules {
  double percentile, missing;
  bool pooled, interpolate, mean_of_two;
  int tolerances;
};

// A block per item: sums the chunks in a fixed order, selects the percentiles, writes the results. stride:
// from one result of an item to the next.
template <class T>
__global__ void __launch_bounds__(select_threads)
    write_results(Problem p, Rules rules, CellWeights weights, double* out, int64_t stride) {
  using Bits = typename Key<T>::Bits;
  __shared__ double reals[select_threads];
  __shared__ u64 histogram[2048];
  __shared__ u64 shared[4];
  const int64_t item = blockIdx.x;
  __shared__ formulas::Directed directed[2];
  for (int side = 0; side < 2; ++side) {
    const Chunk* chunks = p.work.chunks + (2 * item + side) * p.layout.chunks;
    double sum = 0, most = 0;
    for (int64_t i = threadIdx.x; i < p.layout.chunks; i += select_threads)
      for (int part = 0; part < 2; ++part) {
        sum += chunks[i].sum[part];
        most = chunks[i].maximum[part] > most ? chunks[i].maximum[part] : most;
      }
    sum = block_reduce(sum, reals, Sum());
    most = block_reduce(most, reals, Most());
    if (threadIdx.x == 0) {
      const Totals totals = p.work.totals[2 * item + side];
      directed[side] = {totals.listed,
                        totals.weight,
                        sum,
                        most,
                        0,
                        totals.listed != 0 || (*bits_at(p.bits, p.layout, item, side) & 1) != 0};
    }
  }
  __syncthreads();
  if (directed[0].count != 0 && directed[1].count != 0) {
    const int64_t voxels = p.layout.voxels;
    for (int side = 0; side < 2; ++side) {
      Lists<Bits> lists = {};
      u64 total = 0;
      for (int k = 0; k < 2; ++k) {
        if (!rules.pooled && k != side) continue;
        lists.keys[k] = static_cast<const Bits*>(p.work.keys) + (2 * item + k) * voxels;
        lists.codes[k] = p.work.codes + (p.cells ? (2 * item + k) * voxels : 0);
        lists.count[k] = static_cast<int64_t>(directed[k].count);
        total += directed[k].weight;
      }
      const double quantile =
          select<T>(lists, p, weights, total, rules.percentile, rules.interpolate, histogram, shared);
      if (threadIdx.x == 0) directed[side].quantile = quantile;
      if (rules.pooled) {
        if (threadIdx.x == 0) directed[1].quantile = quantile;
        break;
      }
    }
  }
  if (threadIdx.x == 0) {
    const u64* within = p.work.within + 2 * item * rules.tolerances;
    formulas::surface_result(directed[0], directed[1], reinterpret_cast<const uint64_t*>(within),
                             reinterpret_cast<const uint64_t*>(within + rules.tolerances), rules.tolerances,
                             rules.mean_of_two, rules.missing, out + item, stride);
  }
}

// ---- overlap ---------------------------------------------------------------------------------------

// 8 B written per count.
__global__ void __launch_bounds__(threads) zero_counts(u64* counts, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i < n) counts[i] = 0;
}

// Counts |pred|, |target| and |pred and target| of each class: grid (parts of an image, images). Reads each
// logit and each mask and label once.
template <OverlapOptions::Pred kind>
__global__ void __launch_bounds__(threads)
    count_overlap(formulas::OverlapPairs m, double threshold, u64* counts) {
  __shared__ unsigned tally[3 * OverlapOptions::max_classes];
  const int classes = static_cast<int>(m.classes), lane = static_cast<int>(threadIdx.x & 31);
  const int64_t voxels = m.shape[0] * m.shape[1] * m.shape[2], first = m.first_label < 0 ? 0 : m.first_label;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t image = blockIdx.y; image < m.images; image += gridDim.y) {
    for (int k = static_cast<int>(threadIdx.x); k < 3 * classes; k += threads) tally[k] = 0;
    __syncthreads();
    const int64_t base[2] = {formulas::item_offset(m, 0, image), formulas::item_offset(m, 1, image)};
    for (int64_t begin = static_cast<int64_t>(blockIdx.x) * threads; begin < voxels; begin += step) {
      const int64_t i = begin + threadIdx.x;
      const bool here = i < voxels;
      const int64_t x = i % m.shape[2], y = i / m.shape[2] % m.shape[1], z = i / m.shape[2] / m.shape[1];
      int64_t at[2], label[2] = {-1, -1};
      for (int side = 0; side < 2; ++side)
        at[side] = base[side] + z * m.strides[side][0] + y * m.strides[side][1] + x * m.strides[side][2];
      if (here && kind == OverlapOptions::masks)
        label[0] = formulas::integer_at(m.data[0], m.bytes[0], at[0]);
      if (here && !m.class_axis[1]) label[1] = formulas::integer_at(m.data[1], m.bytes[1], at[1]);
      if (here && kind == OverlapOptions::argmax) {
        double best = formulas::real_at(m.data[0], m.dtype[0], at[0]);
        label[0] = 0;
#pragma unroll 1
        for (int64_t c = 1; c < m.logits; ++c) {
          const double v = formulas::real_at(m.data[0], m.dtype[0], at[0] + c * m.class_stride[0]);
          if (v > best) {
            best = v;
            label[0] = c;
          }
        }
      }
#pragma unroll 1
      for (int k = 0; k < classes; ++k) {
        bool object[2];
        for (int side = 0; side < 2; ++side)
          object[side] = here && (m.first_label < 0 ? label[side] != 0 : label[side] == first + k);
        if (here && kind == OverlapOptions::above)
          object[0] =
              formulas::real_at(m.data[0], m.dtype[0], at[0] + (first + k) * m.class_stride[0]) > threshold;
        if (here && m.class_axis[1])
          object[1] =
              formulas::integer_at(m.data[1], m.bytes[1], at[1] + (first + k) * m.class_stride[1]) != 0;
        const unsigned p = __ballot_sync(0xffffffffu, object[0]), t = __ballot_sync(0xffffffffu, object[1]);
        if (lane == 0 && p) atomicAdd(&tally[3 * k], static_cast<unsigned>(__popc(p)));
        if (lane == 0 && t) atomicAdd(&tally[3 * k + 1], static_cast<unsigned>(__popc(t)));
        if (lane == 0 && (p & t)) atomicAdd(&tally[3 * k + 2], static_cast<unsigned>(__popc(p & t)));
      }
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < 3 * classes; k += threads)
      if (tally[k]) atomicAdd(&counts[3 * image * classes + k], static_cast<u64>(tally[k]));
    __syncthreads();
  }
}

// A thread per mask: 24 B read, 48 written.
__global__ void __launch_bounds__(threads)
    write_overlap(const u64* counts, int64_t voxels, double* out, int64_t items) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= items) return;
  const auto count = [&](int k) { return static_cast<int64_t>(counts[3 * i + k]); };
  formulas::overlap_result(count(0), count(1), count(2), voxels, out + i, items);
}

// ---- launches --------------------------------------------------------------------------------------

template <class T>
void measure(const MaskPairs& m, const Problem& p, double common, const SurfaceOptions& o, const Array& out,
             const Exec& exec) {
  int64_t to[2];
  const Rings<T> r =
      formulas::empty_rings<T>(m.grid, m.spacing, common, static_cast<Offset<T>*>(p.work.offsets), to);
  const CellWeights weights = formulas::cell_weights(m.spacing);
  const Limits limits = formulas::limits_of(o);
  const unsigned items = static_cast<unsigned>(items_of(m, o)),
                 chunks = static_cast<unsigned>(p.layout.chunks);
  NOISYSEG_LAUNCH((make_rings<T>), 1, max_offsets, 0, exec, r, to[0], to[1], p.work, int64_t{2} * items,
                  o.tolerances);
  NOISYSEG_LAUNCH((search_rings<T>), dim3(chunks, 2, items), threads, 0, exec, p, r, weights);
  for (int side = 0; side < 2; ++side) {
    NOISYSEG_LAUNCH((map_planes<T>), dim3(blocks_for(p.layout.voxels, threads, map_blocks), items), threads,
                    0, exec, p, r, side);
    const dim3 grid(blocks_for(p.layout.chunks, 1, map_blocks), items);
    NOISYSEG_LAUNCH((close_open<T, true>), grid, threads, 0, exec, p, r, weights, side);
    NOISYSEG_LAUNCH((close_open<T, false>), grid, threads, 0, exec, p, r, weights, side);
  }
  NOISYSEG_LAUNCH((count_within<T>), dim3(blocks_for(p.layout.voxels, 64 * threads, 256), 2, items), threads,
                  0, exec, p, limits, weights, o.first);
  const Rules rules = {o.percentile, o.missing, o.pooled, o.interpolate, o.mean_of_two, o.tolerances};
  NOISYSEG_LAUNCH((write_results<T>), items, select_threads, 0, exec, p, rules, weights,
                  static_cast<double*>(out.data) + o.first, m.items);
}

}  // namespace

namespace cuda {

size_t surface_extract_workspace(const Array& pred, int spatial_dims, const SurfaceOptions& options,
                                 const Exec&) {
  const MaskPairs m = formulas::surface_pairs(pred, pred, spatial_dims, options);
  return static_cast<size_t>(items_of(m, options) * 4 * layout_of(m).volume * 8);
}

size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,
                       const SurfaceOptions& options, void* surfaces, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const MaskPairs m = formulas::surface_pairs(pred, target, spatial_dims, options);
  const int64_t items = items_of(m, options);
  if (items > 65535)
    throw std::invalid_argument("at most 65535 pairs of masks in one call on CUDA: pass first and count");
  const Layout l = layout_of(m);
  const int64_t rows = items * 2 * l.row;
  uint64_t* bits = static_cast<uint64_t*>(surfaces);
  NOISYSEG_LAUNCH((pack_masks), blocks_for(2 * rows * m.shape[0] * m.shape[1], threads / 32, 1 << 20),
                  threads, 0, exec, m, l, options.first, items, options.border, bits);
  NOISYSEG_LAUNCH((extract_surfaces), blocks_for(rows * m.grid[0] * m.grid[1], threads, 1 << 20), threads, 0,
                  exec, m, l, options.surface, items, options.border, bits);
  size_t bytes;
  work_at(nullptr, m, l, options, &bytes);
  return bytes;
}

void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                     void* workspace, const Array& out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const MaskPairs m = formulas::surface_pairs(pred, pred, spatial_dims, options);
  const Layout l = layout_of(m);
  const double common = whole_steps(m) ? common_spacing(m) : 0;
  const Problem p = {l,
                     {m.grid[0], m.grid[1], m.grid[2]},
                     {m.shape[0], m.shape[1], m.shape[2]},
                     {m.spatial[0], m.spatial[1], m.spatial[2]},
                     options.border,
                     options.surface == SurfaceKind::cells,
                     common > 0 ? common * common : 1,
                     static_cast<uint64_t*>(surfaces),
                     work_at(workspace, m, l, options, nullptr)};
  if (common > 0)
    measure<int64_t>(m, p, common, options, out, exec);
  else
    measure<double>(m, p, common, options, out, exec);
}

void overlap_metrics(const Array& pred, const Array& target, int spatial_dims, const OverlapOptions& options,
                     const Array& counts_out, const Array& out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const formulas::OverlapPairs m = formulas::overlap_pairs(pred, target, spatial_dims, options);
  const int64_t voxels = m.shape[0] * m.shape[1] * m.shape[2];
  u64* counts = static_cast<u64*>(counts_out.data);
  NOISYSEG_LAUNCH((zero_counts), blocks_for(3 * m.items, threads, int64_t{1} << 30), threads, 0, exec, counts,
                  3 * m.items);
  const dim3 grid(blocks_for(voxels, 16 * threads, 4096), blocks_for(m.images, 1, 65535));
  if (options.pred == OverlapOptions::masks)
    NOISYSEG_LAUNCH((count_overlap<OverlapOptions::masks>), grid, threads, 0, exec, m, options.threshold,
                    counts);
  else if (options.pred == OverlapOptions::argmax)
    NOISYSEG_LAUNCH((count_overlap<OverlapOptions::argmax>), grid, threads, 0, exec, m, options.threshold,
                    counts);
  else
    NOISYSEG_LAUNCH((count_overlap<OverlapOptions::above>), grid, threads, 0, exec, m, options.threshold,
                    counts);
  NOISYSEG_LAUNCH((write_overlap), blocks_for(m.items, threads, int64_t{1} << 30), threads, 0, exec, counts,
                  voxels, static_cast<double*>(out.data), m.items);
}

}  // namespace cuda
}  // namespace noisyseg
