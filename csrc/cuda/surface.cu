// Surface and overlap metrics on CUDA: the same bit masks and the same search as csrc/cpu/surface.cpp,
// over the whole image, with all decisions taken on the device and no synchronisation.
// Bytes per voxel: 2 read, 0.5 of bits written and read; searches read bits that stay in L2. Only where
// many voxels find nothing nearby is a map of squared distances within planes made (4 B per voxel).
#include "cuda/launch.h"
#include "formulas/surface.h"

namespace noisyseg {
namespace {
using formulas::far;
using formulas::is_object;
using formulas::larger;
using formulas::lowest_bit;
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
  int64_t words, row, plane, volume, chunks, voxels;
};

__host__ __device__ inline uint64_t* bits_at(uint64_t* bits, const Layout& l, int64_t item, int which) {
  return bits + (item * 4 + which) * l.volume + 1;
}

Layout layout_of(const MaskPairs& m) {
  Layout l;
  l.words = (m.shape[2] + 63) / 64;
  l.row = l.words + 1;
  l.plane = m.shape[1] * l.row;
  l.volume = m.shape[0] * l.plane + 1;
  l.chunks = (l.volume + threads - 1) / threads;
  l.voxels = m.shape[0] * m.shape[1] * m.shape[2];
  return l;
}

double common_spacing(const MaskPairs& m) {
  double common = 0;
  for (int i = 0; i < 3; ++i) {
    if (m.shape[i] == 1) continue;
    if (common != 0 && m.spacing[i] != common) return 0;
    common = m.spacing[i];
  }
  return common == 0 ? 1 : common;
}

// What a chunk of `threads` words of a surface adds: [0] from the search, [1] from what it left open.
struct Chunk {
  double sum[2], maximum[2];
  int64_t within[2];
  int64_t count, base;  // surface voxels; the place of their distances in the side's list
  int64_t open;
};

struct Totals {
  u64 listed, open;
};

struct Work {
  void* offsets;
  int* offset_count;
  Chunk* chunks;   // (items, 2, chunks)
  Totals* totals;  // (items, 2)
  float* keys;     // (items, 2, voxels): squared distances, in any order
  float* map;      // (items, voxels): squared distance within the plane
};

Work work_at(void* base, const MaskPairs& m, const Layout& l, size_t* bytes) {
  char* p = static_cast<char*>(base);
  const auto take = [&](int64_t n) {
    char* here = p;
    p += align(n);
    return static_cast<void*>(here);
  };
  Work w;
  w.offsets = take(max_offsets * static_cast<int64_t>(sizeof(Offset<double>)));
  w.offset_count = static_cast<int*>(take(sizeof(int)));
  w.chunks = static_cast<Chunk*>(take(m.items * 2 * l.chunks * static_cast<int64_t>(sizeof(Chunk))));
  w.totals = static_cast<Totals*>(take(m.items * 2 * static_cast<int64_t>(sizeof(Totals))));
  w.keys = static_cast<float*>(take(m.items * 2 * l.voxels * 4));
  w.map = static_cast<float*>(take(m.items * l.voxels * 4));
  if (bytes) *bytes = static_cast<size_t>(p - static_cast<char*>(base));
  return w;
}

// ---- masks to bits, bits to surfaces ---------------------------------------------------------------

// A warp makes 32 bits: lane i reads voxel i. Reads both masks once, writes 1/8 B per voxel each.
__global__ void __launch_bounds__(threads) pack_masks(MaskPairs m, Layout l, uint64_t* bits) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (threads / 32);
  const int64_t rows = m.shape[0] * m.shape[1], total = m.items * 2 * rows * 2 * l.row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (threads / 32) + threadIdx.x / 32; i < total;
       i += warps) {
    const int64_t half = i % (2 * l.row), r = i / (2 * l.row) % rows, pair = i / (2 * l.row) / rows;
    const int side = static_cast<int>(pair & 1);
    const int64_t item = pair >> 1, x = 32 * half + lane;
    bool object = false;
    if (x < m.shape[2])
      object = is_object(m.data[side], m.bytes[side],
                         formulas::item_offset(m, side, item) + r / m.shape[1] * m.strides[side][0] +
                             r % m.shape[1] * m.strides[side][1] + x * m.strides[side][2]);
    const unsigned word = __ballot_sync(0xffffffffu, object);
    uint64_t* const to = bits_at(bits, l, item, side);
    if (lane == 0) {
      reinterpret_cast<unsigned*>(to + r * l.row)[half] = word;
      if (r == 0 && half == 0) to[-1] = 0;
    }
  }
}

// surface = mask and not all face neighbours, a thread per word. Reads 5 words around, writes one.
__global__ void __launch_bounds__(threads) extract_surfaces(MaskPairs m, Layout l, uint64_t* bits) {
  const int64_t rows = m.shape[0] * m.shape[1], each = rows * l.row, total = m.items * 2 * each;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step) {
    const int64_t pair = i / each, at = i % each, k = at % l.row, r = at / l.row;
    const int64_t z = r / m.shape[1], y = r % m.shape[1];
    const int side = static_cast<int>(pair & 1);
    const uint64_t* in = bits_at(bits, l, pair >> 1, side) + at;
    uint64_t* out = bits_at(bits, l, pair >> 1, 2 + side) + at;
    if (at == 0) out[-1] = 0;
    const uint64_t word = *in;
    uint64_t inner = 0;
    if (word != 0 && k < l.words) {
      inner = (word << 1 | in[-1] >> 63) & (word >> 1 | in[1] << 63);
      if (m.spatial[1]) inner &= (y > 0 ? in[-l.row] : 0) & (y + 1 < m.shape[1] ? in[l.row] : 0);
      if (m.spatial[0]) inner &= (z > 0 ? in[-l.plane] : 0) & (z + 1 < m.shape[0] ? in[l.plane] : 0);
    }
    *out = word & ~inner;
  }
}

// ---- distances -------------------------------------------------------------------------------------

// The offsets of the rings by bitonic sort, and zeroed totals. One block of max_offsets threads.
template <class T>
__global__ void __launch_bounds__(max_offsets)
    make_rings(Rings<T> r, int64_t to0, int64_t to1, int* count, Totals* totals, int64_t pairs) {
  __shared__ T key[max_offsets];
  __shared__ int id[max_offsets];
  __shared__ int kept;
  const int t = static_cast<int>(threadIdx.x), width = static_cast<int>(2 * to1 + 1);
  const int n = static_cast<int>(2 * to0 + 1) * width;
  for (int64_t i = t; i < pairs; i += max_offsets) totals[i] = Totals{0, 0};
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
  if (t == 0) *count = kept;
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
  int64_t shape[3];
  double scale, tolerance;
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
__device__ inline void write_partials(Chunk& c, int part, double sum, double most, int64_t within,
                                      double* reals, u64* counts) {
  sum = block_reduce(sum, reals, Sum());
  most = block_reduce(most, reals, Most());
  within = static_cast<int64_t>(block_reduce(static_cast<u64>(within), counts, Sum()));
  if (threadIdx.x == 0) {
    c.sum[part] = sum;
    c.maximum[part] = most;
    c.within[part] = within;
  }
}

// Searches the rings for each surface voxel; voxels that find nothing sure get key -1 and stay open.
// Block (chunk of words, side, item); its voxels are spread evenly over its threads.
template <class T>
__global__ void __launch_bounds__(threads) search_rings(Problem p, Rings<T> r) {
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
  float* keys = p.work.keys + pair * p.layout.voxels + base;
  double sum = 0, most = 0;
  int64_t within = 0, open = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) {
    const Voxel v = voxel_of(p, first, list[i]);
    int64_t seen;
    const T d = formulas::nearest(sites, r, v.z, v.y, v.x, seen);
    if (d > r.beyond || d >= far<T>()) {
      keys[i] = -1;
      ++open;
      continue;
    }
    const double squared = static_cast<double>(d) * p.scale;
    keys[i] = static_cast<float>(squared);
    sum += sqrt(squared);
    most = squared > most ? squared : most;
    within += formulas::within_tolerance(squared, p.tolerance);
  }
  write_partials(c, 0, sum, most, within, reals, counts);
  open = static_cast<int64_t>(block_reduce(static_cast<u64>(open), counts, Sum()));
  if (threadIdx.x == 0) {
    c.count = n;
    c.base = base;
    c.open = open;
    c.sum[1] = c.maximum[1] = 0;
    c.within[1] = 0;
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
  float* map = p.work.map + item * p.layout.voxels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < p.layout.voxels; i += step) {
    const int64_t row = i / p.shape[2];
    const T d = formulas::nearest_on_plane(sites, r.unit, row / p.shape[1], row % p.shape[1], i % p.shape[2],
                                           T(0), far<T>());
    map[i] = d < far<T>() ? static_cast<float>(d) : static_cast<float>(far<T>());
  }
}

// The distances that search_rings left open: along z over the map, or over all rows where there is none.
template <class T, bool from_map>
__global__ void __launch_bounds__(threads) close_open(Problem p, Rings<T> r, int side) {
  __shared__ uint16_t list[64 * threads];
  __shared__ double reals[threads];
  __shared__ u64 counts[threads];
  __shared__ int scan[threads];
  const int64_t item = blockIdx.y, pair = 2 * item + side;
  if (p.work.totals[2 * item + 1 - side].listed == 0 || map_is_cheaper(p, item, side) != from_map) return;
  const Sites sites = sites_of(p, item, 1 - side);
  const float* map = p.work.map + item * p.layout.voxels;
  for (int64_t chunk = blockIdx.x; chunk < p.layout.chunks; chunk += gridDim.x) {
    Chunk& c = p.work.chunks[pair * p.layout.chunks + chunk];
    if (c.open == 0) continue;
    const int n = list_bits(bits_at(p.bits, p.layout, item, 2 + side), chunk * threads, p.layout.volume - 1,
                            list, scan);
    float* keys = p.work.keys + pair * p.layout.voxels + c.base;
    double sum = 0, most = 0;
    int64_t within = 0;
    for (int i = static_cast<int>(threadIdx.x); i < n; i += threads) {
      if (keys[i] >= 0) continue;
      const Voxel v = voxel_of(p, chunk * threads, list[i]);
      T d = far<T>();
      if constexpr (from_map)
        for (int64_t j = 0; j <= 2 * p.shape[0]; ++j) {
          const int64_t z = formulas::outward(j, v.z);
          const T along = square_of<T>(z - v.z, r.unit[0]);
          if (along >= d) break;
          if (z < 0 || z >= p.shape[0]) continue;
          const T at = along + static_cast<T>(map[(z * p.shape[1] + v.y) * p.shape[2] + v.x]);
          d = at < d ? at : d;
        }
      else
        d = formulas::nearest_of_all(sites, r.unit, v.z, v.y, v.x, d);
      const double squared = static_cast<double>(d) * p.scale;
      keys[i] = static_cast<float>(squared);
      sum += sqrt(squared);
      most = squared > most ? squared : most;
      within += formulas::within_tolerance(squared, p.tolerance);
    }
    write_partials(c, 1, sum, most, within, reals, counts);
    __syncthreads();
  }
}

// ---- order statistics and results ------------------------------------------------------------------

// f(bits) for each key of two lists, shared out over the block.
template <class F>
__device__ inline void for_each_key(const float* a, int64_t na, const float* b, int64_t nb, const F& f) {
  for (int64_t i = threadIdx.x; i < na; i += blockDim.x) f(__float_as_uint(a[i]));
  for (int64_t i = threadIdx.x; i < nb; i += blockDim.x) f(__float_as_uint(b[i]));
}

// The percentile of sqrt(keys) over two lists, by radix selection on the bits of the keys, which sort as
// the numbers do. By a whole block; the result in every thread.
__device__ inline double select(const float* a, int64_t na, const float* b, int64_t nb, double percentile,
                                unsigned* histogram, unsigned* shared) {
  const formulas::Rank rank = formulas::percentile_rank(percentile, na + nb);
  int64_t k = rank.index;
  unsigned prefix = 0, left = 0;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 20 : level == 1 ? 9 : 0, width = level == 2 ? 9 : 11;
    for (unsigned i = threadIdx.x; i < 2048; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for_each_key(a, na, b, nb, [&](unsigned bits) {
      if (level == 0 || bits >> (shift + width) == prefix)
        atomicAdd(&histogram[bits >> shift & ((1u << width) - 1)], 1u);
    });
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned bin = 0;
      int64_t before = 0;
      for (; before + histogram[bin] <= k; ++bin) before += histogram[bin];
      shared[0] = bin;
      shared[1] = static_cast<unsigned>(before);
      shared[2] = histogram[bin];
      shared[3] = 0x7f800000u;
    }
    __syncthreads();
    prefix = prefix << width | shared[0];
    k -= shared[1];
    left = shared[2];
    __syncthreads();
  }
  unsigned high = prefix;  // the next value, if it is not the same again
  if (k + 1 >= static_cast<int64_t>(left) && rank.index + 1 < na + nb) {
    unsigned least = 0x7f800000u;
    for_each_key(a, na, b, nb, [&](unsigned bits) {
      if (bits > prefix && bits < least) least = bits;
    });
    atomicMin(&shared[3], least);
    __syncthreads();
    high = shared[3];
  }
  __syncthreads();
  return formulas::percentile_value(__uint_as_float(prefix), __uint_as_float(high), rank.weight);
}

// A block per item: sums the chunks in a fixed order, selects the percentiles, writes the five results.
__global__ void __launch_bounds__(select_threads)
    write_results(Problem p, SurfaceDefinition definition, double percentile, double* out, int64_t items) {
  __shared__ double reals[select_threads];
  __shared__ u64 counts[select_threads];
  __shared__ unsigned histogram[2048];
  __shared__ unsigned shared[4];
  const int64_t item = blockIdx.x;
  __shared__ formulas::Directed directed[2];
  for (int side = 0; side < 2; ++side) {
    const Chunk* chunks = p.work.chunks + (2 * item + side) * p.layout.chunks;
    double sum = 0, most = 0;
    u64 within = 0;
    for (int64_t i = threadIdx.x; i < p.layout.chunks; i += select_threads)
      for (int part = 0; part < 2; ++part) {
        sum += chunks[i].sum[part];
        most = chunks[i].maximum[part] > most ? chunks[i].maximum[part] : most;
        within += static_cast<u64>(chunks[i].within[part]);
      }
    sum = block_reduce(sum, reals, Sum());
    most = block_reduce(most, reals, Most());
    within = block_reduce(within, counts, Sum());
    if (threadIdx.x == 0)
      directed[side] = {static_cast<int64_t>(p.work.totals[2 * item + side].listed),
                        static_cast<int64_t>(within), sum, most, 0};
  }
  __syncthreads();
  if (directed[0].count != 0 && directed[1].count != 0) {
    const bool pooled = definition == SurfaceDefinition::medpy;
    for (int side = 0; side < 2; ++side) {
      const int64_t first = (2 * item + (pooled ? 0 : side)) * p.layout.voxels;
      const double quantile = select(p.work.keys + first, directed[pooled ? 0 : side].count,
                                     p.work.keys + first + p.layout.voxels, pooled ? directed[1].count : 0,
                                     percentile, histogram, shared);
      if (threadIdx.x == 0) directed[side].quantile = quantile;
    }
  }
  if (threadIdx.x == 0) formulas::surface_result(directed[0], directed[1], out + item, items);
}

// ---- overlap ---------------------------------------------------------------------------------------

__global__ void __launch_bounds__(threads) zero_counts(u64* counts, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i < n) counts[i] = 0;
}

// Counts |pred|, |target| and |pred and target|: grid (parts of an item, items). Reads both masks once.
__global__ void __launch_bounds__(threads) count_overlap(MaskPairs m, u64* counts) {
  __shared__ u64 shared[threads];
  const int64_t item = blockIdx.y, voxels = m.shape[0] * m.shape[1] * m.shape[2];
  const int64_t base[2] = {formulas::item_offset(m, 0, item), formulas::item_offset(m, 1, item)};
  u64 sum[3] = {0, 0, 0};
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < voxels; i += step) {
    const int64_t x = i % m.shape[2], y = i / m.shape[2] % m.shape[1], z = i / m.shape[2] / m.shape[1];
    bool object[2];
    for (int side = 0; side < 2; ++side)
      object[side] =
          is_object(m.data[side], m.bytes[side],
                    base[side] + z * m.strides[side][0] + y * m.strides[side][1] + x * m.strides[side][2]);
    sum[0] += object[0];
    sum[1] += object[1];
    sum[2] += object[0] && object[1];
  }
  for (int k = 0; k < 3; ++k) {
    const u64 all = block_reduce(sum[k], shared, Sum());
    if (threadIdx.x == 0 && all) atomicAdd(&counts[3 * item + k], all);
  }
}

__global__ void __launch_bounds__(threads)
    write_overlap(const u64* counts, int64_t voxels, double* out, int64_t items) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= items) return;
  const auto count = [&](int k) { return static_cast<int64_t>(counts[3 * i + k]); };
  formulas::overlap_result(count(0), count(1), count(2), voxels, out + i, items);
}

// ---- launches --------------------------------------------------------------------------------------

void check_items(const MaskPairs& m) {
  if (m.items > 65535) throw std::invalid_argument("at most 65535 pairs of masks in one call on CUDA");
}

template <class T>
void measure(const MaskPairs& m, const Problem& p, double common, const SurfaceOptions& options,
             const Array& out, const Exec& exec) {
  int64_t to[2];
  const Rings<T> r =
      formulas::empty_rings<T>(m.shape, m.spacing, common, static_cast<Offset<T>*>(p.work.offsets), to);
  const unsigned items = static_cast<unsigned>(m.items), chunks = static_cast<unsigned>(p.layout.chunks);
  NOISYSEG_LAUNCH((make_rings<T>), 1, max_offsets, 0, exec, r, to[0], to[1], p.work.offset_count,
                  p.work.totals, 2 * m.items);
  NOISYSEG_LAUNCH((search_rings<T>), dim3(chunks, 2, items), threads, 0, exec, p, r);
  for (int side = 0; side < 2; ++side) {
    NOISYSEG_LAUNCH((map_planes<T>), dim3(blocks_for(p.layout.voxels, threads, map_blocks), items), threads,
                    0, exec, p, r, side);
    const dim3 grid(blocks_for(p.layout.chunks, 1, map_blocks), items);
    NOISYSEG_LAUNCH((close_open<T, true>), grid, threads, 0, exec, p, r, side);
    NOISYSEG_LAUNCH((close_open<T, false>), grid, threads, 0, exec, p, r, side);
  }
  NOISYSEG_LAUNCH((write_results), items, select_threads, 0, exec, p, options.definition, options.percentile,
                  static_cast<double*>(out.data), m.items);
}

}  // namespace

namespace cuda {

size_t surface_extract_workspace(const Array& pred, int spatial_dims, const Exec&) {
  const MaskPairs m = formulas::mask_pairs(pred, pred, spatial_dims, nullptr);
  return static_cast<size_t>(m.items * 4 * layout_of(m).volume * 8);
}

size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,
                       const SurfaceOptions& options, void* surfaces, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const MaskPairs m = formulas::mask_pairs(pred, target, spatial_dims, options.spacing);
  check_items(m);
  const Layout l = layout_of(m);
  const int64_t words = m.items * 2 * m.shape[0] * m.shape[1] * l.row;
  uint64_t* bits = static_cast<uint64_t*>(surfaces);
  NOISYSEG_LAUNCH((pack_masks), blocks_for(2 * words, threads / 32, 1 << 20), threads, 0, exec, m, l, bits);
  NOISYSEG_LAUNCH((extract_surfaces), blocks_for(words, threads, 1 << 20), threads, 0, exec, m, l, bits);
  size_t bytes;
  work_at(nullptr, m, l, &bytes);
  return bytes;
}

void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces,
                     void* workspace, const Array& out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const MaskPairs m = formulas::mask_pairs(pred, pred, spatial_dims, options.spacing);
  const Layout l = layout_of(m);
  const double common = common_spacing(m);
  const Problem p = {l,
                     {m.shape[0], m.shape[1], m.shape[2]},
                     common > 0 ? common * common : 1,
                     options.tolerance,
                     static_cast<uint64_t*>(surfaces),
                     work_at(workspace, m, l, nullptr)};
  if (common > 0)
    measure<int64_t>(m, p, common, options, out, exec);
  else
    measure<double>(m, p, common, options, out, exec);
}

size_t overlap_metrics_workspace(const Array& pred, int spatial_dims, const Exec&) {
  return static_cast<size_t>(formulas::mask_pairs(pred, pred, spatial_dims, nullptr).items * 3 * 8);
}

void overlap_metrics(const Array& pred, const Array& target, int spatial_dims, void* workspace,
                     const Array& out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const MaskPairs m = formulas::mask_pairs(pred, target, spatial_dims, nullptr);
  check_items(m);
  const int64_t voxels = m.shape[0] * m.shape[1] * m.shape[2];
  u64* counts = static_cast<u64*>(workspace);
  NOISYSEG_LAUNCH((zero_counts), blocks_for(3 * m.items, threads, 1 << 20), threads, 0, exec, counts,
                  3 * m.items);
  NOISYSEG_LAUNCH((count_overlap),
                  dim3(blocks_for(voxels, 16 * threads, 4096), static_cast<unsigned>(m.items)), threads, 0,
                  exec, m, counts);
  NOISYSEG_LAUNCH((write_overlap), blocks_for(m.items, threads, 1 << 20), threads, 0, exec, counts, voxels,
                  static_cast<double*>(out.data), m.items);
}

}  // namespace cuda
}  // namespace noisyseg
