// Exact Euclidean distance transforms on CUDA: no padding, no synchronisation, the caller's memory and
// stream.
//
// Volumes (n0, n1, n2) of up to 6,144 voxels, in float: one block each, both buffers in shared
// memory, one launch. Larger ones, one kernel for each axis, threads along the contiguous one: run lengths
// along axis 1 (mask -> result), outward search along axis 2 from rows in shared memory (result ->
// workspace), along axis 0 (workspace -> result). The search takes as many steps as the distance is long
// (formulas/distance.h); on axes of more than `budget_from` voxels a line in which some search exceeds
// `budget` steps is flagged and done again by the lower envelope, linear in its length: a lone voxel in a
// large volume is not quadratic. (Not float lines of more than 65,535 voxels: the envelope's stack lies in
// the line's own results, two 16-bit numbers in 32 bits.)
//
// Bytes per voxel, uint8 to float, caches aside; PEERS.md's floors: 5 in one pass, 9 in 2D and 17 in 3D one
// kernel per axis with a 16-bit first intermediate:
//   small_volume                            1 + 4 =  5
//   sweep_columns + search_rows (2D)        (1 + 4 + 4 + 4) + 8 = 21: the sweep reads its own runs back, from
//   L2 if the
//                                           columns in flight fit (then 13)
//   + search_planes (3D)                    + 8 = 29 (21), plus what the search misses in the caches
//   envelope_lines, flagged lines only      f twice, the stack once each way, the result: 20
//   two classes                             the same;  labels: + the labels' bytes for each candidate
//   (cached) with indices                            + 4 for each axis, + 8 to 12 in write_indices signed map
//   with normalisation           + 4 in item_maxima, + 8 in apply_convention; boundary: + 3 for the codes
//   sampled_distance                        8 to 12 in sample_values, 24 for each axis; backward 16 for each
//   axis
#include "cuda/edt.cuh"
#include "cuda/launch.h"
#include "formulas/distance.h"
#include "formulas/math.h"
#include "noisyseg/distance.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int threads = 256;
constexpr size_t small_bytes = 49152;   // two buffers of a small volume
constexpr int64_t small_line = 512;     // its longest line: the search has no budget there
constexpr size_t row_bytes = 49152;     // a row in shared memory
constexpr int64_t budget_from = 256;    // below that a search is never long
constexpr int64_t budget = 64;          // steps from which the envelope is quicker
constexpr int64_t float_stack = 65535;  // longest line whose stack fits float results

enum class Mode { sites, two_classes, labels };  // as in csrc/cpu/distance.cpp
enum class Finish : int { squared, root, two_sided };

template <class T>
struct Ending {
  Finish finish;
  T no_site;  // in place of inf
};

struct Volume {
  int64_t n[3];
  double w2[3];         // squared spacing
  bool border = false;  // voxels outside are sites of class 0
  int first_axis = 0;   // those before it are no axes of the image
  NOISYSEG_HOST_DEVICE int64_t size() const { return n[0] * n[1] * n[2]; }
};

// Where the voxels come from: items of a batch with any strides.
struct Source {
  const char* data = nullptr;
  DType dtype = DType::u8;
  int64_t strides[3] = {};
  int axes = 0;  // of the batch
  int64_t shape[Array::max_rank] = {}, batch_strides[Array::max_rank] = {};
  int64_t classes = 0;  // > 0: item i is class i % classes of item i / classes
  bool site_is_nonzero = false;
  bool binary = false;  // the label is whether the value is 0
};

struct Item {
  int64_t offset;
  int64_t label;
};

__device__ inline Item item_of(const Source& s, int64_t item) {
  Item found{0, 0};
  if (s.classes) {
    found.label = item % s.classes;
    item /= s.classes;
  }
#pragma unroll
  for (int a = Array::max_rank - 1; a >= 0; --a)
    if (a < s.axes) {
      found.offset += item % s.shape[a] * s.batch_strides[a];
      item /= s.shape[a];
    }
  return found;
}

__device__ inline int64_t value_at(const Source& s, int64_t offset) {
  if (s.dtype == DType::i32) return reinterpret_cast<const int32_t*>(s.data)[offset];
  if (s.dtype == DType::i64) return reinterpret_cast<const int64_t*>(s.data)[offset];
  return reinterpret_cast<const uint8_t*>(s.data)[offset];
}

// 1, or 0 for a site.
__device__ inline bool class_at(const Source& s, int64_t offset, int64_t label) {
  const int64_t value = value_at(s, offset);
  return (s.classes ? value == label : value != 0) != s.site_is_nonzero;
}

__device__ inline int64_t label_at(const Source& s, int64_t offset) {
  const int64_t value = value_at(s, offset);
  return s.binary ? value != 0 : value;
}

// By selects: a parameter indexed at run time would be copied to local memory.
__device__ inline int64_t extent(const Volume& v, int axis) {
  return axis == 0 ? v.n[0] : axis == 1 ? v.n[1] : v.n[2];
}
template <class T>
__device__ inline T squared_spacing(const Volume& v, int axis) {
  return static_cast<T>(axis == 0 ? v.w2[0] : axis == 1 ? v.w2[1] : v.w2[2]);
}

template <class T>
__device__ inline T to_outside(const Volume& v, int axis, int64_t i) {
  return v.border && axis >= v.first_axis ? squared_to_edge(i, extent(v, axis), squared_spacing<T>(v, axis))
                                          : static_cast<T>(INFINITY);
}

// An axis's result, limited by the voxels outside the image; f: the voxel's value before.
template <class T, Mode mode>
__device__ inline T limited(T squared, T f, const Volume& v, int axis, int64_t i) {
  if (mode == Mode::two_classes && f < T(0)) return squared;
  const T outside = to_outside<T>(v, axis, i);
  return outside < squared ? outside : squared;
}

// Run lengths along axis 1 for the column at `offset` of the source; f and apex (optional, Mode::labels: the
// nearest site's position) have row stride n2.
template <class T, Mode mode>
__device__ inline void sweep_column(const Source& s, int64_t offset, int64_t label, const Volume& v, T* f,
                                    int32_t* apex) {
  constexpr bool two_classes = mode == Mode::two_classes;
  constexpr T inf = static_cast<T>(INFINITY);
  const int64_t n1 = v.n[1], n2 = v.n[2];
  const T w2 = static_cast<T>(v.w2[1]);
  T run = two_classes ? T(0) : inf;  // two classes: signed run length, 0 before the first voxel
  int64_t before = 0;                // labels: that of the voxel before
#pragma unroll 1                     // more spilled registers on sm_100
  for (int64_t y = 0; y < n1; ++y) {
    if (mode == Mode::labels) {
      const int64_t own = label_at(s, offset + y * s.strides[1]);
      run = own == 0 ? T(0) : y && own != before ? T(1) : run + T(1);
      before = own;
    } else if (two_classes) {
      const T sign = class_at(s, offset + y * s.strides[1], label) ? T(1) : T(-1);
      const T last = run * sign;
      run = sign * (last > T(0) ? last + T(1) : last < T(0) ? T(1) : inf);
    } else {
      run = class_at(s, offset + y * s.strides[1], label) ? run + T(1) : T(0);
    }
    f[y * n2] = run;
  }
  run = two_classes ? T(0) : inf;
#pragma unroll 1  // more spilled registers on sm_100
  for (int64_t y = n1 - 1; y >= 0; --y) {
    const T up = f[y * n2];
    T sign = T(1), d;
    if (two_classes) {
      sign = up > T(0) ? T(1) : T(-1);
      const T below = run * sign;
      run = sign * (below > T(0) ? below + T(1) : below < T(0) ? T(1) : inf);
      d = up * sign < run * sign ? up * sign : run * sign;
    } else {
      if (mode == Mode::labels) {
        const int64_t own = label_at(s, offset + y * s.strides[1]);
        run = own == 0 ? T(0) : y + 1 < n1 && own != before ? T(1) : run + T(1);
        before = own;
      } else {
        run = up == T(0) ? T(0) : run + T(1);
      }
      d = up < run ? up : run;
      if (mode == Mode::labels && apex)
        apex[y * n2] = d == inf ? -1
                                : static_cast<int32_t>(up <= run ? y - static_cast<int64_t>(d)
                                                                 : y + static_cast<int64_t>(d));
    }
    f[y * n2] = sign * limited<T, mode>(d * d * w2, sign, v, 1, y);
  }
}

// The new squared distance (>= 0) of position i of a line, and where it comes from; false if that takes more
// than `most` steps. other(j): whether j has another label.
template <class T, Mode mode, class Other>
__device__ inline bool outward(const T* line, int64_t stride, int64_t i, int64_t n, T w2, int64_t most,
                               const Other& other, T& best, int64_t& from) {
  const T own = line[i * stride];
  const T sign = mode == Mode::two_classes && own < T(0) ? T(-1) : T(1);
  best = abs_(own);
  from = i;
  const auto look = [&](int64_t j, T step) {
    T f = line[j * stride] * sign;
    if (mode == Mode::two_classes) f = max_(f, T(0));
    if (mode == Mode::labels && other(j)) f = T(0);
    if (f + step < best) {
      best = f + step;
      from = j;
    }
  };
  const int64_t last = i > n - 1 - i ? i : n - 1 - i;
  for (int64_t k = 1; k <= last; ++k) {
    const T step = squared_step(k, w2);
    if (!(step < best)) break;
    if (k > most) return false;
    if (k <= i) look(i - k, step);
    if (k < n - i) look(i + k, step);
  }
  return true;
}

template <class T, Mode mode>
__device__ inline T finished(T squared, T f, const Ending<T>& ending) {
  T value = ending.finish == Finish::squared ? squared : sqrt_(squared);
  if (value == static_cast<T>(INFINITY)) value = ending.no_site;
  if (mode != Mode::two_classes) return value;
  return with_sign(value,
                   ending.finish == Finish::squared ? f : -f);  // object: f > 0, the map is negative there
}

struct NoOther {
  __device__ bool operator()(int64_t) const { return false; }
};

// One block for each volume; dynamic shared memory: two buffers of the volume's size. 5 bytes per voxel.
template <Mode mode>
__global__ void __launch_bounds__(threads)
    small_volume(Source source, Volume v, Ending<float> ending, float* out) {
  NOISYSEG_SHARED(float, a);
  // Small enough for 32 bits, whose divisions need no subroutine.
  const int n0 = static_cast<int>(v.n[0]), n2 = static_cast<int>(v.n[2]),
            slice = static_cast<int>(v.n[1]) * n2;
  const int voxels = n0 * slice;
  float* b = a + voxels;
  const Item item = item_of(source, blockIdx.x);
  for (int c = static_cast<int>(threadIdx.x); c < n0 * n2; c += threads) {
    const int z = c / n2, x = c % n2;
    sweep_column<float, mode>(source, item.offset + z * source.strides[0] + x * source.strides[2], item.label,
                              v, a + z * slice + x, nullptr);
  }
  __syncthreads();
  float squared;
  int64_t from;
  for (int at = static_cast<int>(threadIdx.x); at < voxels; at += threads) {
    const int x = at % n2;
    outward<float, mode>(a + (at - x), 1, x, n2, static_cast<float>(v.w2[2]), n2, NoOther(), squared, from);
    b[at] = finished<float, mode>(limited<float, mode>(squared, a[at], v, 2, x), a[at],
                                  {Finish::squared, static_cast<float>(INFINITY)});
  }
  __syncthreads();
  out += static_cast<int64_t>(blockIdx.x) * voxels;
  for (int at = static_cast<int>(threadIdx.x); at < voxels; at += threads) {
    const int z = at / slice;
    outward<float, mode>(b + (at - z * slice), slice, z, n0, static_cast<float>(v.w2[0]), n0, NoOther(),
                         squared, from);
    out[at] = finished<float, mode>(limited<float, mode>(squared, b[at], v, 0, z), b[at], ending);
  }
}

// A thread for each column of axis 1, neighbours on neighbouring columns. Reads the mask, writes f, reads and
// writes it again: 13 bytes per voxel.
template <class T, Mode mode>
__global__ void __launch_bounds__(threads)
    sweep_columns(Source source, Volume v, int64_t columns, T* f, int32_t* apex) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (c >= columns) return;
  const int64_t x = c % v.n[2], slice = c / v.n[2], z = slice % v.n[0];
  const Item item = item_of(source, slice / v.n[0]);
  const int64_t first = slice * v.n[1] * v.n[2] + x;
  sweep_column<T, mode>(source, item.offset + z * source.strides[0] + x * source.strides[2], item.label, v,
                        f + first, apex ? apex + first : nullptr);
}

// Whether voxel j of a line has another label than voxel i.
struct OtherLabel {
  const Source* source;
  int64_t offset, stride, own;
  __device__ bool operator()(int64_t j) const { return label_at(*source, offset + j * stride) != own; }
};

// A block for `rows` neighbouring rows of axis 2, in dynamic shared memory if they fit. 8 bytes per voxel, 12
// with apexes.
template <class T, Mode mode>
__global__ void __launch_bounds__(threads)
    search_rows(const T* from, T* to, Source source, Volume v, int64_t all_rows, int rows, bool staged,
                int64_t most, unsigned* flags, int32_t* apex, Ending<T> ending) {
  NOISYSEG_SHARED(T, shared);
  const int64_t n = v.n[2], first = static_cast<int64_t>(blockIdx.x) * rows;
  const int64_t count = (all_rows - first < rows ? all_rows - first : rows) * n;
  const T* line = from + first * n;
  if (staged) {
    for (int64_t at = threadIdx.x; at < count; at += threads) shared[at] = line[at];
    __syncthreads();
    line = shared;
  }
  for (int64_t at = threadIdx.x; at < count; at += threads) {
    const int64_t in_block = at / n, x = at - in_block * n, row = first + in_block;
    T squared;
    int64_t site;
    bool done;
    if (mode == Mode::labels) {
      const int64_t slice = row / v.n[1], item = slice / v.n[0];
      int64_t offset =
          (row - slice * v.n[1]) * source.strides[1] + (slice - item * v.n[0]) * source.strides[0];
      offset += item_of(source, item).offset;
      const OtherLabel other{&source, offset, source.strides[2],
                             label_at(source, offset + x * source.strides[2])};
      done = outward<T, mode>(line + (at - x), 1, x, n, static_cast<T>(v.w2[2]), most, other, squared, site);
    } else {
      done =
          outward<T, mode>(line + (at - x), 1, x, n, static_cast<T>(v.w2[2]), most, NoOther(), squared, site);
    }
    if (!done) atomicOr(flags + row, 1u);
    if (mode == Mode::labels && apex)
      apex[first * n + at] = squared == static_cast<T>(INFINITY) ? -1 : static_cast<int32_t>(site);
    to[first * n + at] = finished<T, mode>(limited<T, mode>(squared, line[at], v, 2, x), line[at], ending);
  }
}

// A thread for each voxel, looking along axis 0; neighbours look at neighbouring columns. 8 bytes per voxel,
// 12 with apexes, and what the search misses in the caches.
template <class T, Mode mode>
__global__ void __launch_bounds__(threads)
    search_planes(const T* from, T* to, Source source, Volume v, int64_t voxels, int64_t most,
                  unsigned* flags, int32_t* apex, Ending<T> ending) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= voxels) return;
  const int64_t slice = v.n[1] * v.n[2], z = at / slice % v.n[0], column = at % slice,
                item = at / slice / v.n[0];
  T squared;
  int64_t site;
  bool done;
  if (mode == Mode::labels) {
    const int64_t offset = item_of(source, item).offset + column / v.n[2] * source.strides[1] +
                           column % v.n[2] * source.strides[2];
    const OtherLabel other{&source, offset, source.strides[0],
                           label_at(source, offset + z * source.strides[0])};
    done = outward<T, mode>(from + (at - z * slice), slice, z, v.n[0], static_cast<T>(v.w2[0]), most, other,
                            squared, site);
  } else {
    done = outward<T, mode>(from + (at - z * slice), slice, z, v.n[0], static_cast<T>(v.w2[0]), most,
                            NoOther(), squared, site);
  }
  if (!done) atomicOr(flags + item * slice + column, 1u);
  if (mode == Mode::labels && apex)
    apex[at] = squared == static_cast<T>(INFINITY) ? -1 : static_cast<int32_t>(site);
  to[at] = finished<T, mode>(limited<T, mode>(squared, from[at], v, 0, z), from[at], ending);
}

// Two numbers in the bits of a result that is not yet written.
template <class T>
struct Stack;
template <>
struct Stack<float> {
  float* to;
  int64_t stride;
  __device__ void get(int64_t k, int64_t& apex, int64_t& start) const {
    const uint32_t bits = static_cast<uint32_t>(float_to_bits(to[k * stride]));
    apex = bits >> 16;
    start = bits & 0xffffu;
  }
  __device__ void set(int64_t k, int64_t apex, int64_t start) const {
    to[k * stride] =
        bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(apex) << 16 | static_cast<uint32_t>(start)));
  }
};
template <>
struct Stack<double> {
  double* to;
  int64_t stride;
  __device__ void get(int64_t k, int64_t& apex, int64_t& start) const {
    uint64_t bits;
    memcpy(&bits, to + k * stride, 8);
    apex = static_cast<int64_t>(bits >> 32);
    start = static_cast<int64_t>(bits & 0xffffffffu);
  }
  __device__ void set(int64_t k, int64_t apex, int64_t start) const {
    const uint64_t bits = static_cast<uint64_t>(apex) << 32 | static_cast<uint64_t>(start);
    memcpy(to + k * stride, &bits, 8);
  }
};

// A thread for each line along `axis`, those with a flag only (flags == nullptr: all): the lower envelope of
// each run of one class, with the voxels next to the run as sites, and its stack in the results. 20 bytes per
// voxel and about 2 divisions in double; lines along axis 2 are read with stride n2 between threads, their
// cache lines used up one after the other.
template <class T, Mode mode>
__global__ void __launch_bounds__(threads)
    envelope_lines(const T* from, T* to, Source source, Volume v, int axis, int64_t lines,
                   const unsigned* flags, int32_t* apex, Ending<T> ending) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (line >= lines || (flags && !flags[line])) return;
  const int64_t n = extent(v, axis), stride = axis == 2 ? 1 : axis == 1 ? v.n[2] : v.n[1] * v.n[2];
  const int64_t first = line / stride * stride * n + line % stride;
  const T w2 = squared_spacing<T>(v, axis);
  int64_t offset = 0, along = 0;
  if (mode == Mode::labels) {
    const int64_t slice = v.n[1] * v.n[2], z = first / slice % v.n[0];
    offset = item_of(source, first / slice / v.n[0]).offset + z * source.strides[0] +
             first / v.n[2] % v.n[1] * source.strides[1] + first % v.n[2] * source.strides[2];
    along = axis == 0 ? source.strides[0] : axis == 1 ? source.strides[1] : source.strides[2];
  }
  from += first;
  to += first;
  if (apex) apex += first;
  for (int64_t a = 0, b; a < n; a = b) {
    const T sign = mode == Mode::two_classes && from[a * stride] < T(0) ? T(-1) : T(1);
    b = n;
    if (mode == Mode::two_classes) {
      for (b = a + 1; b < n && from[b * stride] * sign > T(0);) ++b;
    } else if (mode == Mode::labels) {
      const int64_t own = label_at(source, offset + a * along);
      for (b = a + 1; b < n && label_at(source, offset + b * along) == own;) ++b;
    }
    const auto value_of = [&](int64_t j) { return from[j * stride] * sign; };
    const auto put = [&](int64_t i, int64_t j) {
      T squared = static_cast<T>(INFINITY);
      int64_t site = j;
      if (j >= 0) squared = value_of(j) + squared_step(i - j, w2);
      if (mode != Mode::sites && a > 0 && squared_step(i - a + 1, w2) < squared) {
        squared = squared_step(i - a + 1, w2);
        site = a - 1;
      }
      if (mode != Mode::sites && b < n && squared_step(b - i, w2) < squared) {
        squared = squared_step(b - i, w2);
        site = b;
      }
      if (apex) apex[i * stride] = static_cast<int32_t>(site);
      const T f = from[i * stride];
      to[i * stride] = finished<T, mode>(limited<T, mode>(squared, f, v, axis, i), f, ending);
    };
    lower_envelope(a, b, w2, value_of, Stack<T>{to + a * stride, stride}, put);
  }
}

// Nearest sites from each axis's apexes, followed back through the axes: 1 + 4 bytes per voxel and axis each
// way. A thread for each voxel. planes: those of axes 0, 1, 2; indices: (items, dims, *S).
__global__ void __launch_bounds__(threads)
    write_indices(Source source, Volume v, int64_t all, const int32_t* planes, int32_t* indices) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t voxels = v.size(), item = at / voxels, slice = v.n[1] * v.n[2];
  const int64_t start = item_of(source, item).offset;
  int64_t z = at % voxels / slice, y = at / v.n[2] % v.n[1], x = at % v.n[2];
  const auto label = [&] {
    return label_at(source, start + z * source.strides[0] + y * source.strides[1] + x * source.strides[2]);
  };
  const int64_t own = label();
  bool found = own == 0, none = false;
  const auto follow = [&](int axis, int64_t& i) {
    if (found || none || extent(v, axis) == 1) return;
    const int32_t next = planes[axis * all + item * voxels + z * slice + y * v.n[2] + x];
    none = next < 0;
    if (none || next == i) return;
    i = next;
    found = label() != own;
  };
  follow(0, z);
  follow(2, x);
  follow(1, y);
  int32_t* to = indices + item * voxels * (3 - v.first_axis) + at % voxels;
  if (v.first_axis < 1) to[0] = found ? static_cast<int32_t>(z) : -1;
  if (v.first_axis < 2) to[(1 - v.first_axis) * voxels] = found ? static_cast<int32_t>(y) : -1;
  to[(2 - v.first_axis) * voxels] = found ? static_cast<int32_t>(x) : -1;
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + threads - 1) / threads); }
size_t round_up(size_t n) { return (n + 255) / 256 * 256; }

// Float results only: double's would spill registers.
template <class T, Mode mode>
bool is_small(const Volume& v, int64_t count) {
  return sizeof(T) == 4 && mode != Mode::labels &&
         static_cast<size_t>(2 * v.size()) * sizeof(T) <= small_bytes && v.n[0] <= small_line &&
         v.n[2] <= small_line && count < (int64_t{1} << 31);
}

// Whether searches along a line of n voxels are bounded, and how.
template <class T>
int64_t most_steps(int64_t n) {
  return n <= budget_from || (sizeof(T) == 4 && n > float_stack) ? n : budget;
}

// What a call needs of the caller's memory, in bytes from its start.
struct Workspace {
  size_t work = 0, flags = 0, apexes = 0, maxima = 0, codes = 0, end = 0;
};

template <class T>
Workspace workspace_of(int64_t count, const Volume& v, bool labels, bool indices, bool contour) {
  Workspace w;
  const size_t all = static_cast<size_t>(count * v.size());
  const bool small = is_small<T, Mode::sites>(v, count) && !labels;
  const int64_t shorter = v.n[0] > 1 && v.n[0] < v.n[2] ? v.n[0] : v.n[2];
  w.flags = small ? 0 : round_up(all * sizeof(T));
  w.apexes =
      w.flags + (small ? 0 : round_up(all / static_cast<size_t>(shorter ? shorter : 1) * sizeof(unsigned)));
  w.maxima = w.apexes + (indices ? round_up(3 * all * sizeof(int32_t)) : 0);
  w.codes = w.maxima + round_up(static_cast<size_t>(2 * count) * sizeof(unsigned long long));
  w.end = w.codes + (contour ? all : 0);
  return w;
}

template <class T, Mode mode>
void transform(const Source& source, int64_t count, const Volume& v, T* out, char* memory, const Workspace& w,
               int32_t* apexes, const Ending<T>& ending, const Exec& exec) {
  const int64_t voxels = v.size(), all = count * voxels;
  if (all == 0) return;
  if constexpr (sizeof(T) == 4 && mode != Mode::labels)
    if (is_small<T, mode>(v, count)) {
      NOISYSEG_LAUNCH((small_volume<mode>), static_cast<unsigned>(count), threads,
                      static_cast<size_t>(2 * voxels) * sizeof(T), exec, source, v, ending, out);
      return;
    }
  T* work = reinterpret_cast<T*>(memory + w.work);
  unsigned* flags = reinterpret_cast<unsigned*>(memory + w.flags);
  const auto plane = [&](int axis) { return apexes ? apexes + axis * all : nullptr; };
  const auto clear = [&](int64_t lines) {
    check(cudaMemsetAsync(flags, 0, static_cast<size_t>(lines) * sizeof(unsigned),
                          static_cast<cudaStream_t>(exec.stream)),
          "cudaMemsetAsync");
  };
  const Ending<T> between{Finish::squared, static_cast<T>(INFINITY)};
  const bool planes = v.n[0] > 1 || (v.border && v.first_axis == 0);
  T* swept = planes ? out : work;
  T* searched = planes ? work : out;
  const int64_t rows = all / v.n[2], columns = all / v.n[1], lines = all / v.n[0];
  NOISYSEG_LAUNCH((sweep_columns<T, mode>), blocks_for(columns), threads, 0, exec, source, v, columns, swept,
                  plane(1));
  const bool staged = static_cast<size_t>(v.n[2]) * sizeof(T) <= row_bytes;
  const int64_t fit = v.n[2] < 1024 ? 1024 / v.n[2] : 1;
  const int together = static_cast<int>(fit < 8 ? fit : 8);
  const size_t shared = staged ? static_cast<size_t>(together * v.n[2]) * sizeof(T) : 0;
  const int64_t most_rows = most_steps<T>(v.n[2]), most_planes = most_steps<T>(v.n[0]);
  const Ending<T>& after_rows = planes ? between : ending;
  if (most_rows < v.n[2]) clear(rows);
  NOISYSEG_LAUNCH((search_rows<T, mode>), static_cast<unsigned>((rows + together - 1) / together), threads,
                  shared, exec, swept, searched, source, v, rows, together, staged, most_rows, flags,
                  plane(2), after_rows);
  if (most_rows < v.n[2])
    NOISYSEG_LAUNCH((envelope_lines<T, mode>), blocks_for(rows), threads, 0, exec, swept, searched, source, v,
                    2, rows, flags, plane(2), after_rows);
  if (!planes) return;
  if (most_planes < v.n[0]) clear(lines);
  NOISYSEG_LAUNCH((search_planes<T, mode>), blocks_for(all), threads, 0, exec, searched, out, source, v, all,
                  most_planes, flags, plane(0), ending);
  if (most_planes < v.n[0])
    NOISYSEG_LAUNCH((envelope_lines<T, mode>), blocks_for(lines), threads, 0, exec, searched, out, source, v,
                    0, lines, flags, plane(0), ending);
}

// ---- conventions ----------------------------------------------------------------------------------

__device__ inline bool on_inner_contour(const Source& s, const Volume& v, int64_t item, int64_t at) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1};
  const Item place = item_of(s, item);
  int64_t offset = place.offset;
  int64_t i[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    i[d] = at / step[d] % v.n[d];
    offset += i[d] * s.strides[d];
  }
  if (!class_at(s, offset, place.label)) return false;
  bool edge = false;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (v.border && d >= v.first_axis && (i[d] == 0 || i[d] + 1 == v.n[d])) edge = true;
    if (i[d] > 0 && !class_at(s, offset - s.strides[d], place.label)) edge = true;
    if (i[d] + 1 < v.n[d] && !class_at(s, offset + s.strides[d], place.label)) edge = true;
  }
  return edge;
}

// Codes of the boundary convention: 0 on the inner contour, 1 outside, 2 inside. 2 bytes per voxel (uint8).
__global__ void __launch_bounds__(threads)
    contour_codes(Source source, Volume v, int64_t all, uint8_t* codes) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t voxels = v.size(), item = at / voxels, in_item = at % voxels;
  const int64_t z = in_item / (v.n[1] * v.n[2]), y = in_item / v.n[2] % v.n[1], x = in_item % v.n[2];
  const Item place = item_of(source, item);
  const bool object =
      class_at(source, place.offset + z * source.strides[0] + y * source.strides[1] + x * source.strides[2],
               place.label);
  codes[at] = static_cast<uint8_t>(!object ? 1 : on_inner_contour(source, v, item, in_item) ? 0 : 2);
}

// 1 byte per voxel, 8 more inside.
template <class T>
__global__ void __launch_bounds__(threads) set_inside(const uint8_t* codes, int64_t all, T* phi) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at < all && codes[at] == 2) phi[at] = -phi[at];
}

// The bits of non-negative numbers: their order is the integers' order, so that integer atomics give the
// exact maximum.
__device__ inline unsigned long long ordered_bits(float x) { return static_cast<uint32_t>(float_to_bits(x)); }
__device__ inline unsigned long long ordered_bits(double x) {
  unsigned long long bits;
  memcpy(&bits, &x, 8);
  return bits;
}
template <class T>
__device__ inline T from_bits(unsigned long long bits) {
  T x;
  if (sizeof(T) == 4) {
    const uint32_t low = static_cast<uint32_t>(bits);
    memcpy(&x, &low, 4);
  } else {
    memcpy(&x, &bits, sizeof(T));
  }
  return x;
}

// The largest value outside and inside of each item, of kervadec's as its map has them; `chunks` blocks for
// each. 4 bytes per voxel.
template <class T>
__global__ void __launch_bounds__(threads)
    item_maxima(const T* phi, int64_t voxels, int64_t chunks, bool kervadec, unsigned long long* maxima) {
  T outside = 0, inside = 0;
  const int64_t number = blockIdx.x / chunks;
  const T* item = phi + number * voxels;
  for (int64_t at = blockIdx.x % chunks * threads + threadIdx.x; at < voxels; at += chunks * threads) {
    outside = max_(outside, item[at]);
    if (item[at] < T(0)) inside = max_(inside, kervadec ? abs_(kervadec_value(-item[at], true)) : -item[at]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    outside = max_(outside, __shfl_xor_sync(0xffffffffu, outside, step));
    inside = max_(inside, __shfl_xor_sync(0xffffffffu, inside, step));
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(maxima + 2 * number, ordered_bits(outside));
    atomicMax(maxima + 2 * number + 1, ordered_bits(inside));
  }
}

template <class T>
__device__ inline T sign_of(T x) {
  return x > T(0) ? T(1) : x < T(0) ? T(-1) : T(0);
}

// 8 bytes per voxel; for dtc the mask too.
template <class T>
__global__ void __launch_bounds__(threads)
    apply_convention(Source source, Volume v, int64_t all, const unsigned long long* maxima,
                     SignedMap convention, bool normalize, T* phi) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t voxels = v.size(), item = at / voxels;
  const T outside = from_bits<T>(maxima[2 * item]), inside = from_bits<T>(maxima[2 * item + 1]);
  const bool one_class = max_(outside, inside) == static_cast<T>(INFINITY);
  T value = phi[at];
  if (convention == SignedMap::dtc) {
    if (one_class)
      value = sign_of(value);
    else if (on_inner_contour(source, v, item, at % voxels))
      value = 0;
    else
      value = value > T(0) ? value / outside : value / inside;
  } else {
    const T top = max_(outside, inside);
    if (convention == SignedMap::kervadec)
      value = one_class ? T(0) : kervadec_value(abs_(value), value < T(0));
    if (normalize) value = one_class ? sign_of(value) : top > T(0) ? value / top : value;
  }
  phi[at] = value;
}

// ---- sampled functions ----------------------------------------------------------------------------

// values where sites are, else inf. 4 bytes read, 4 written, and the sites' 1.
template <class T>
__global__ void __launch_bounds__(threads)
    sample_values(Source values, Source sites, bool everywhere, Volume v, int64_t all, T* f) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t z = at / (v.n[1] * v.n[2]) % v.n[0], y = at / v.n[2] % v.n[1], x = at % v.n[2],
                item = at / v.size();
  bool site = everywhere;
  if (!everywhere)
    site = value_at(sites, item_of(sites, item).offset + z * sites.strides[0] + y * sites.strides[1] +
                               x * sites.strides[2]) != 0;
  const int64_t offset =
      item_of(values, item).offset + z * values.strides[0] + y * values.strides[1] + x * values.strides[2];
  f[at] = site ? reinterpret_cast<const T*>(values.data)[offset] : static_cast<T>(INFINITY);
}

// The adjoint of one axis: to(j) = sum of from(i) over the i with apex j, in order. A thread for each line;
// the i of one j are neighbours. 16 bytes per voxel.
template <class T>
__global__ void __launch_bounds__(threads)
    adjoint_lines(const T* from, const int32_t* apex, T* to, Volume v, int axis, int64_t lines) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (line >= lines) return;
  const int64_t n = extent(v, axis), stride = axis == 2 ? 1 : axis == 1 ? v.n[2] : v.n[1] * v.n[2];
  const int64_t first = line / stride * stride * n + line % stride;
  for (int64_t i = 0; i < n; ++i) to[first + i * stride] = 0;
  int32_t current = -1;
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t j = apex[first + i * stride];
    if (j != current) {
      if (current >= 0) to[first + current * stride] = sum;
      current = j;
      sum = 0;
    }
    sum += from[first + i * stride];
  }
  if (current >= 0) to[first + current * stride] = sum;
}

// ---- host -----------------------------------------------------------------------------------------

Source make_source(const Array& mask, int spatial_dims, int64_t classes = 0) {
  Source s;
  s.data = static_cast<const char*>(mask.data);
  s.dtype = mask.dtype;
  s.axes = mask.rank - spatial_dims;
  s.classes = classes;
  for (int a = 0; a < s.axes; ++a) s.shape[a] = mask.shape[a], s.batch_strides[a] = mask.strides[a];
  for (int d = 0; d < spatial_dims; ++d) s.strides[3 - spatial_dims + d] = mask.strides[s.axes + d];
  return s;
}

Volume make_volume(const Array& mask, int spatial_dims, const double* spacing, bool border = false) {
  Volume v{{1, 1, 1}, {1, 1, 1}};
  v.border = border;
  v.first_axis = 3 - spatial_dims;
  for (int d = 0; d < spatial_dims; ++d) {
    v.n[3 - spatial_dims + d] = mask.shape[mask.rank - spatial_dims + d];
    if (spacing) v.w2[3 - spatial_dims + d] = spacing[d] * spacing[d];
  }
  return v;
}

Source dense_source(const uint8_t* data, int64_t count, const Volume& v, bool site_is_nonzero) {
  Source s;
  s.data = reinterpret_cast<const char*>(data);
  s.strides[0] = v.n[1] * v.n[2], s.strides[1] = v.n[2], s.strides[2] = 1;
  s.axes = 1;
  s.shape[0] = count;
  s.batch_strides[0] = v.size();
  s.site_is_nonzero = site_is_nonzero;
  return s;
}

int64_t count_of(const Array& mask, int spatial_dims, int64_t classes = 0) {
  int64_t count = classes > 0 ? classes : 1;
  for (int a = 0; a < mask.rank - spatial_dims; ++a) count *= mask.shape[a];
  return count;
}

template <class T>
void edt(const Array& mask, int spatial_dims, const double* spacing, const DistanceOptions& options,
         const Array& out, const Array& indices, char* memory, const Exec& exec) {
  const Volume v = make_volume(mask, spatial_dims, spacing, options.border);
  const int64_t count = count_of(mask, spatial_dims), all = count * v.size();
  Source source = make_source(mask, spatial_dims);
  source.binary = !options.multi_label;
  const Ending<T> ending{options.squared ? Finish::squared : Finish::root, static_cast<T>(options.no_site)};
  const bool labels = options.multi_label || indices;
  const Workspace w = workspace_of<T>(count, v, labels, static_cast<bool>(indices), false);
  T* to = static_cast<T*>(out.data);
  int32_t* apexes = indices ? reinterpret_cast<int32_t*>(memory + w.apexes) : nullptr;
  if (labels)
    transform<T, Mode::labels>(source, count, v, to, memory, w, apexes, ending, exec);
  else
    transform<T, Mode::sites>(source, count, v, to, memory, w, nullptr, ending, exec);
  if (indices && all)
    NOISYSEG_LAUNCH((write_indices), blocks_for(all), threads, 0, exec, source, v, all, apexes,
                    static_cast<int32_t*>(indices.data));
}

template <class T>
void signed_map(const Array& mask, int spatial_dims, const double* spacing, const DistanceOptions& options,
                T* phi, char* memory, const Exec& exec) {
  const Volume v = make_volume(mask, spatial_dims, spacing, options.border);
  const Source source = make_source(mask, spatial_dims, options.num_classes);
  const int64_t count = count_of(mask, spatial_dims, options.num_classes), all = count * v.size();
  if (all == 0) return;
  const SignedMap convention = options.convention;
  const bool contour = convention == SignedMap::boundary;
  const bool plain = (contour || convention == SignedMap::two_sided) && !options.normalize;
  const T no_site = plain ? static_cast<T>(options.no_site) : static_cast<T>(INFINITY);
  const Workspace w = workspace_of<T>(count, v, false, false, contour);
  if (contour) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(memory + w.codes);
    NOISYSEG_LAUNCH((contour_codes), blocks_for(all), threads, 0, exec, source, v, all, codes);
    Volume inner = v;  // the border is in the codes
    inner.border = false;
    transform<T, Mode::sites>(dense_source(codes, count, v, false), count, inner, phi, memory, w, nullptr,
                              {Finish::root, no_site}, exec);
    NOISYSEG_LAUNCH((set_inside<T>), blocks_for(all), threads, 0, exec, codes, all, phi);
  } else {
    transform<T, Mode::two_classes>(source, count, v, phi, memory, w, nullptr, {Finish::two_sided, no_site},
                                    exec);
  }
  if (plain) return;
  unsigned long long* maxima = reinterpret_cast<unsigned long long*>(memory + w.maxima);
  check(cudaMemsetAsync(maxima, 0, static_cast<size_t>(2 * count) * sizeof(unsigned long long),
                        static_cast<cudaStream_t>(exec.stream)),
        "cudaMemsetAsync");
  const int64_t wanted = (v.size() + 8 * threads - 1) / (8 * threads), chunks = wanted < 1024 ? wanted : 1024;
  NOISYSEG_LAUNCH((item_maxima<T>), static_cast<unsigned>(count * chunks), threads, 0, exec, phi, v.size(),
                  chunks, convention == SignedMap::kervadec, maxima);
  NOISYSEG_LAUNCH((apply_convention<T>), blocks_for(all), threads, 0, exec, source, v, all, maxima,
                  convention, options.normalize, phi);
}

template <class T>
void sampled_forward(const Array& values, const Array& sites, int spatial_dims, const double* spacing, T* out,
                     int32_t* apexes, T* work, const Exec& exec) {
  const Volume v = make_volume(values, spatial_dims, spacing);
  const int64_t all = count_of(values, spatial_dims) * v.size();
  if (all == 0) return;
  int passes = 0;
  for (int64_t n : v.n) {
    passes += n > 1;
    if (sizeof(T) == 4 && n > float_stack)
      throw std::invalid_argument(
          "values has an axis longer than 65,535, too long for float32 on a CUDA device; pass "
          "values.double()");
  }
  T* from = passes % 2 ? work : out;
  T* to = passes % 2 ? out : work;
  const Source source = make_source(values, spatial_dims);
  NOISYSEG_LAUNCH((sample_values<T>), blocks_for(all), threads, 0, exec, source,
                  sites ? make_source(sites, spatial_dims) : source, !sites, v, all, from);
  for (int axis : {1, 2, 0}) {
    if (v.n[axis] == 1) continue;
    const int64_t lines = all / v.n[axis];
    const Ending<T> ending{Finish::squared, static_cast<T>(INFINITY)};
    const unsigned* every = nullptr;
    NOISYSEG_LAUNCH((envelope_lines<T, Mode::sites>), blocks_for(lines), threads, 0, exec, from, to, source,
                    v, axis, lines, every, apexes + (axis - v.first_axis) * all, ending);
    T* next = from;
    from = to;
    to = next;
  }
}

template <class T>
void sampled_backward(const Array& grad, const int32_t* apexes, int spatial_dims, T* out, T* work,
                      const Exec& exec) {
  const Volume v = make_volume(grad, spatial_dims, nullptr);
  const int64_t all = count_of(grad, spatial_dims) * v.size();
  if (all == 0) return;
  int left = 0;
  for (int64_t n : v.n) left += n > 1;
  const T* from = static_cast<const T*>(grad.data);
  if (left == 0)
    check(cudaMemcpyAsync(out, from, static_cast<size_t>(all) * sizeof(T), cudaMemcpyDeviceToDevice,
                          static_cast<cudaStream_t>(exec.stream)),
          "cudaMemcpyAsync");
  for (int axis : {0, 2, 1}) {
    if (v.n[axis] == 1) continue;
    T* to = left-- % 2 ? out : work;
    const int64_t lines = all / v.n[axis];
    NOISYSEG_LAUNCH((adjoint_lines<T>), blocks_for(lines), threads, 0, exec, from,
                    apexes + (axis - v.first_axis) * all, to, v, axis, lines);
    from = to;
  }
}

}  // namespace

size_t squared_distance_workspace(int64_t batch, const int64_t shape[3]) {
  return workspace_of<float>(batch, Volume{{shape[0], shape[1], shape[2]}, {1, 1, 1}}, false, false, false)
      .end;
}

void squared_distance(const uint8_t* sites, float* out, void* workspace, int64_t batch,
                      const int64_t shape[3], const double spacing[3], const Exec& exec) {
  const DeviceGuard guard(exec.device);
  Volume v{{shape[0], shape[1], shape[2]}, {1, 1, 1}};
  for (int d = 0; d < 3; ++d) v.w2[d] = spacing[d] * spacing[d];
  transform<float, Mode::sites>(
      dense_source(sites, batch, v, true), batch, v, out, static_cast<char*>(workspace),
      workspace_of<float>(batch, v, false, false, false), nullptr, {Finish::squared, INFINITY}, exec);
}

size_t distance_workspace(const Array& mask, int spatial_dims, const DistanceOptions& options, bool indices,
                          bool fp64, const Exec&) {
  const Volume v = make_volume(mask, spatial_dims, nullptr);
  const int64_t count = count_of(mask, spatial_dims, options.num_classes);
  const bool contour = options.convention == SignedMap::boundary, labels = options.multi_label || indices;
  return fp64 ? workspace_of<double>(count, v, labels, indices, contour).end
              : workspace_of<float>(count, v, labels, indices, contour).end;
}

void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing,
                            const DistanceOptions& options, const Array& out, const Array& indices,
                            void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  char* memory = static_cast<char*>(workspace);
  if (out.dtype == DType::f64)
    edt<double>(mask, spatial_dims, spacing, options, out, indices, memory, exec);
  else
    edt<float>(mask, spatial_dims, spacing, options, out, indices, memory, exec);
}

void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing,
                         const DistanceOptions& options, const Array& out, void* workspace,
                         const Exec& exec) {
  const DeviceGuard guard(exec.device);
  char* memory = static_cast<char*>(workspace);
  if (out.dtype == DType::f64)
    signed_map(mask, spatial_dims, spacing, options, static_cast<double*>(out.data), memory, exec);
  else
    signed_map(mask, spatial_dims, spacing, options, static_cast<float*>(out.data), memory, exec);
}

size_t sampled_distance_workspace(const Array& values, int, const Exec&) {
  return static_cast<size_t>(values.size()) * static_cast<size_t>(dtype_size(values.dtype));
}

void sampled_distance(const Array& values, const Array& sites, int spatial_dims, const double* spacing,
                      const Array& out, const Array& apexes, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  int32_t* at = static_cast<int32_t*>(apexes.data);
  if (values.dtype == DType::f64)
    sampled_forward(values, sites, spatial_dims, spacing, static_cast<double*>(out.data), at,
                    static_cast<double*>(workspace), exec);
  else
    sampled_forward(values, sites, spatial_dims, spacing, static_cast<float*>(out.data), at,
                    static_cast<float*>(workspace), exec);
}

void sampled_distance_backward(const Array& grad, const Array& apexes, int spatial_dims,
                               const Array& grad_values, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const int32_t* at = static_cast<const int32_t*>(apexes.data);
  if (grad.dtype == DType::f64)
    sampled_backward(grad, at, spatial_dims, static_cast<double*>(grad_values.data),
                     static_cast<double*>(workspace), exec);
  else
    sampled_backward(grad, at, spatial_dims, static_cast<float*>(grad_values.data),
                     static_cast<float*>(workspace), exec);
}

}  // namespace noisyseg::cuda
