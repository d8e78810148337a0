// Exact Euclidean distance transforms on CUDA: no padding, no synchronisation, the caller's memory and stream.
//
// Volumes (n0, n1, n2) of up to 6,144 voxels: one block each, both buffers in shared memory, one launch; the mask is
// read once and the result written once (5 bytes per voxel for uint8).
// Larger ones, one kernel for each axis, threads along the contiguous one: run lengths along axis 1 (mask -> result),
// outward search along axis 2 from rows in shared memory (result -> workspace), along axis 0 (workspace -> result):
// 21 bytes per voxel in 3D, 13 in 2D, plus what the search along axis 0 misses in the caches. The search takes as
// many steps as the distance is long (formulas/distance.h).
#include "noisyseg/distance.h"

#include "cuda/edt.cuh"
#include "cuda/launch.h"
#include "formulas/distance.h"
#include "formulas/math.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int threads = 256;
constexpr int64_t small_voxels = 6144;  // two float buffers in 48 KB
constexpr int64_t row_limit = 12288;    // floats of a row in shared memory

enum class Finish : int { squared, root, two_sided };

struct Volume {
  int64_t n[3];
  float w2[3];  // squared spacing
  NOISYSEG_HOST_DEVICE int64_t size() const { return n[0] * n[1] * n[2]; }
};

// Where the voxels come from: items of a batch with any strides.
struct Source {
  const char* data = nullptr;
  DType dtype = DType::u8;
  int64_t strides[3] = {};
  int axes = 0;  // of the batch
  int64_t shape[Array::max_rank] = {}, batch_strides[Array::max_rank] = {};
  bool site_is_nonzero = false;
};

__device__ inline int64_t item_offset(const Source& s, int64_t item) {
  int64_t offset = 0;
#pragma unroll
  for (int a = Array::max_rank - 1; a >= 0; --a)
    if (a < s.axes) {
      offset += item % s.shape[a] * s.batch_strides[a];
      item /= s.shape[a];
    }
  return offset;
}

// 1, or 0 for a site.
__device__ inline bool class_at(const Source& s, int64_t offset) {
  bool nonzero;
  if (s.dtype == DType::i32)
    nonzero = reinterpret_cast<const int32_t*>(s.data)[offset] != 0;
  else if (s.dtype == DType::i64)
    nonzero = reinterpret_cast<const int64_t*>(s.data)[offset] != 0;
  else
    nonzero = reinterpret_cast<const uint8_t*>(s.data)[offset] != 0;
  return nonzero != s.site_is_nonzero;
}

// Run lengths along axis 1 for the column at `offset` of the source; f has row stride n2.
template <bool two_classes>
__device__ inline void sweep_column(const Source& s, int64_t offset, const Volume& v, float* f) {
  const int64_t n1 = v.n[1], n2 = v.n[2];
  float run = two_classes ? 0.f : INFINITY;  // two classes: signed run length, 0 before the first voxel
  for (int64_t y = 0; y < n1; ++y) {
    const bool object = class_at(s, offset + y * s.strides[1]);
    if (two_classes) {
      const float sign = object ? 1.f : -1.f;
      const float before = run * sign;
      run = sign * (before > 0.f ? before + 1.f : before < 0.f ? 1.f : INFINITY);
    } else {
      run = object ? run + 1.f : 0.f;
    }
    f[y * n2] = run;
  }
  run = two_classes ? 0.f : INFINITY;
  for (int64_t y = n1 - 1; y >= 0; --y) {
    const float up = f[y * n2];
    if (two_classes) {
      const float sign = up > 0.f ? 1.f : -1.f;
      const float below = run * sign;
      run = sign * (below > 0.f ? below + 1.f : below < 0.f ? 1.f : INFINITY);
      const float d = up * sign < run * sign ? up * sign : run * sign;
      f[y * n2] = sign * (d * d * v.w2[1]);
    } else {
      run = up == 0.f ? 0.f : run + 1.f;
      const float d = up < run ? up : run;
      f[y * n2] = d * d * v.w2[1];
    }
  }
}

// The new squared distance (>= 0) of position i of a line.
template <bool two_classes>
__device__ inline float outward(const float* line, int64_t stride, int64_t i, int64_t n, float w2) {
  const float own = line[i * stride];
  const float sign = two_classes && own < 0.f ? -1.f : 1.f;
  float best = abs_(own);
  const int64_t last = i > n - 1 - i ? i : n - 1 - i;
  for (int64_t k = 1; k <= last; ++k) {
    const float step = squared_step(k, w2);
    if (!(step < best)) break;
    if (k <= i) {
      float f = line[(i - k) * stride] * sign;
      if (two_classes) f = max_(f, 0.f);
      if (f + step < best) best = f + step;
    }
    if (k < n - i) {
      float f = line[(i + k) * stride] * sign;
      if (two_classes) f = max_(f, 0.f);
      if (f + step < best) best = f + step;
    }
  }
  return best;
}

template <bool two_classes>
__device__ inline float finished(float squared, float f, Finish finish) {
  if (finish == Finish::squared) return two_classes ? with_sign(squared, f) : squared;
  if (finish == Finish::root) return sqrt_(squared);
  return with_sign(sqrt_(squared), -f);  // object: f > 0, the map is negative there
}

// One block for each volume; dynamic shared memory: two buffers of the volume's size.
template <bool two_classes>
__global__ void __launch_bounds__(threads) small_volume(Source source, Volume v, Finish finish, float* out) {
  NOISYSEG_SHARED(float, a);
  // Small enough for 32 bits, whose divisions need no subroutine.
  const int n0 = static_cast<int>(v.n[0]), n2 = static_cast<int>(v.n[2]), slice = static_cast<int>(v.n[1]) * n2;
  const int voxels = n0 * slice;
  float* b = a + voxels;
  const int64_t offset = item_offset(source, blockIdx.x);
  for (int c = static_cast<int>(threadIdx.x); c < n0 * n2; c += threads) {
    const int z = c / n2, x = c % n2;
    sweep_column<two_classes>(source, offset + z * source.strides[0] + x * source.strides[2], v, a + z * slice + x);
  }
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < voxels; at += threads) {
    const int x = at % n2;
    const float squared = outward<two_classes>(a + (at - x), 1, x, n2, v.w2[2]);
    b[at] = two_classes ? with_sign(squared, a[at]) : squared;
  }
  __syncthreads();
  out += static_cast<int64_t>(blockIdx.x) * voxels;
  for (int at = static_cast<int>(threadIdx.x); at < voxels; at += threads) {
    const int z = at / slice;
    const float squared = outward<two_classes>(b + (at - z * slice), slice, z, n0, v.w2[0]);
    out[at] = finished<two_classes>(squared, b[at], finish);
  }
}

// A thread for each column of axis 1.
template <bool two_classes>
__global__ void __launch_bounds__(threads) sweep_columns(Source source, Volume v, int64_t columns, float* f) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (c >= columns) return;
  const int64_t x = c % v.n[2], slice = c / v.n[2], z = slice % v.n[0], item = slice / v.n[0];
  sweep_column<two_classes>(source, item_offset(source, item) + z * source.strides[0] + x * source.strides[2], v,
                            f + slice * v.n[1] * v.n[2] + x);
}

// A block for `rows` neighbouring rows of axis 2, in dynamic shared memory if they fit.
template <bool two_classes>
__global__ void __launch_bounds__(threads)
    search_rows(const float* from, float* to, Volume v, int64_t all_rows, int rows, bool staged, Finish finish) {
  NOISYSEG_SHARED(float, shared);
  const int64_t n = v.n[2], first = static_cast<int64_t>(blockIdx.x) * rows;
  const int64_t count = (all_rows - first < rows ? all_rows - first : rows) * n;
  const float* line = from + first * n;
  if (staged) {
    for (int64_t at = threadIdx.x; at < count; at += threads) shared[at] = line[at];
    __syncthreads();
    line = shared;
  }
  for (int64_t at = threadIdx.x; at < count; at += threads) {
    const int64_t x = at % n;
    const float squared = outward<two_classes>(line + (at - x), 1, x, n, v.w2[2]);
    to[first * n + at] = finished<two_classes>(squared, line[at], finish);
  }
}

// A thread for each voxel, looking along axis 0.
template <bool two_classes>
__global__ void __launch_bounds__(threads)
    search_planes(const float* from, float* to, Volume v, int64_t voxels, Finish finish) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= voxels) return;
  const int64_t slice = v.n[1] * v.n[2], z = at / slice % v.n[0];
  const float squared = outward<two_classes>(from + (at - z * slice), slice, z, v.n[0], v.w2[0]);
  to[at] = finished<two_classes>(squared, from[at], finish);
}

unsigned blocks_for(int64_t n) { return static_cast<unsigned>((n + threads - 1) / threads); }

template <bool two_classes>
void transform(const Source& source, int64_t count, const Volume& v, float* out, float* work, Finish finish,
               const Exec& exec) {
  const int64_t voxels = v.size(), all = count * voxels;
  if (all == 0) return;
  if (voxels <= small_voxels && count < (int64_t{1} << 31)) {
    const size_t shared = static_cast<size_t>(2 * voxels) * sizeof(float);
    NOISYSEG_LAUNCH((small_volume<two_classes>), static_cast<unsigned>(count), threads, shared, exec, source, v, finish,
                    out);
    return;
  }
  const bool planes = v.n[0] > 1;
  float* swept = planes ? out : work;
  float* searched = planes ? work : out;
  const int64_t rows = all / v.n[2], columns = all / v.n[1];
  NOISYSEG_LAUNCH((sweep_columns<two_classes>), blocks_for(columns), threads, 0, exec, source, v, columns, swept);
  const bool staged = v.n[2] <= row_limit;
  const int64_t fit = v.n[2] < 1024 ? 1024 / v.n[2] : 1;
  const int together = static_cast<int>(fit < 8 ? fit : 8);
  const size_t shared = staged ? static_cast<size_t>(together * v.n[2]) * sizeof(float) : 0;
  NOISYSEG_LAUNCH((search_rows<two_classes>), static_cast<unsigned>((rows + together - 1) / together), threads, shared,
                  exec, swept, searched, v, rows, together, staged, planes ? Finish::squared : finish);
  if (planes)
    NOISYSEG_LAUNCH((search_planes<two_classes>), blocks_for(all), threads, 0, exec, searched, out, v, all, finish);
}

// ---- conventions ----------------------------------------------------------------------------------

__device__ inline bool on_inner_contour(const Source& s, const Volume& v, int64_t item, int64_t at) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1};
  int64_t offset = item_offset(s, item);
  int64_t i[3];
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    i[d] = at / step[d] % v.n[d];
    offset += i[d] * s.strides[d];
  }
  if (!class_at(s, offset)) return false;
  bool edge = false;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    if (i[d] > 0 && !class_at(s, offset - s.strides[d])) edge = true;
    if (i[d] + 1 < v.n[d] && !class_at(s, offset + s.strides[d])) edge = true;
  }
  return edge;
}

// Codes of the boundary convention: 0 on the inner contour, 1 outside, 2 inside.
__global__ void __launch_bounds__(threads) contour_codes(Source source, Volume v, int64_t all, uint8_t* codes) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t voxels = v.size(), item = at / voxels, in_item = at % voxels;
  const int64_t z = in_item / (v.n[1] * v.n[2]), y = in_item / v.n[2] % v.n[1], x = in_item % v.n[2];
  const bool object = class_at(source, item_offset(source, item) + z * source.strides[0] + y * source.strides[1] +
                                           x * source.strides[2]);
  codes[at] = static_cast<uint8_t>(!object ? 1 : on_inner_contour(source, v, item, in_item) ? 0 : 2);
}

__global__ void __launch_bounds__(threads) set_inside(const uint8_t* codes, int64_t all, float* phi) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at < all && codes[at] == 2) phi[at] = -phi[at];
}

// The largest value outside and inside of each item, as the bits of non-negative floats: their order is the
// integers' order, so that integer atomics give the exact maximum. Grid (chunks, items).
__global__ void __launch_bounds__(threads) item_maxima(const float* phi, int64_t voxels, unsigned* maxima) {
  float outside = 0.f, inside = 0.f;
  const float* item = phi + blockIdx.y * voxels;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; at < voxels;
       at += static_cast<int64_t>(gridDim.x) * threads) {
    outside = max_(outside, item[at]);
    inside = max_(inside, -item[at]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    outside = max_(outside, __shfl_xor_sync(0xffffffffu, outside, step));
    inside = max_(inside, __shfl_xor_sync(0xffffffffu, inside, step));
  }
  if (threadIdx.x % 32 == 0) {
    atomicMax(maxima + 2 * blockIdx.y, static_cast<unsigned>(float_to_bits(outside)));
    atomicMax(maxima + 2 * blockIdx.y + 1, static_cast<unsigned>(float_to_bits(inside)));
  }
}

__device__ inline float sign_of(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f; }

__global__ void __launch_bounds__(threads)
    apply_convention(Source source, Volume v, int64_t all, const unsigned* maxima, SignedMap convention, bool normalize,
                     float* phi) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= all) return;
  const int64_t voxels = v.size(), item = at / voxels;
  const float outside = bits_to_float(static_cast<int32_t>(maxima[2 * item]));
  const float inside = bits_to_float(static_cast<int32_t>(maxima[2 * item + 1]));
  const bool one_class = max_(outside, inside) == INFINITY;
  float value = phi[at];
  if (convention == SignedMap::dtc) {
    if (one_class)
      value = sign_of(value);
    else if (on_inner_contour(source, v, item, at % voxels))
      value = 0.f;
    else
      value = value > 0.f ? value / outside : value / inside;
  } else {
    float top = max_(outside, inside);
    if (convention == SignedMap::kervadec) {
      value = one_class ? 0.f : kervadec_value(abs_(value), value < 0.f);
      top = max_(outside, inside - 1.f);  // of the shifted values
    }
    if (normalize) value = one_class ? sign_of(value) : top > 0.f ? value / top : value;
  }
  phi[at] = value;
}

Source make_source(const Array& mask, int spatial_dims) {
  Source s;
  s.data = static_cast<const char*>(mask.data);
  s.dtype = mask.dtype;
  s.axes = mask.rank - spatial_dims;
  for (int a = 0; a < s.axes; ++a) s.shape[a] = mask.shape[a], s.batch_strides[a] = mask.strides[a];
  for (int d = 0; d < spatial_dims; ++d) s.strides[3 - spatial_dims + d] = mask.strides[s.axes + d];
  return s;
}

Volume make_volume(const Array& mask, int spatial_dims, const double* spacing) {
  Volume v{{1, 1, 1}, {1.f, 1.f, 1.f}};
  for (int d = 0; d < spatial_dims; ++d) {
    v.n[3 - spatial_dims + d] = mask.shape[mask.rank - spatial_dims + d];
    if (spacing) v.w2[3 - spatial_dims + d] = static_cast<float>(spacing[d] * spacing[d]);
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

int64_t count_of(const Array& mask, int spatial_dims) {
  int64_t count = 1;
  for (int a = 0; a < mask.rank - spatial_dims; ++a) count *= mask.shape[a];
  return count;
}

size_t round_up(size_t n) { return (n + 255) / 256 * 256; }
size_t work_bytes(int64_t count, const Volume& v) {
  return v.size() <= small_voxels ? 0 : round_up(static_cast<size_t>(count * v.size()) * sizeof(float));
}

}  // namespace

size_t squared_distance_workspace(int64_t batch, const int64_t shape[3]) {
  return work_bytes(batch, Volume{{shape[0], shape[1], shape[2]}, {1.f, 1.f, 1.f}});
}

void squared_distance(const uint8_t* sites, float* out, void* workspace, int64_t batch, const int64_t shape[3],
                      const double spacing[3], const Exec& exec) {
  const DeviceGuard guard(exec.device);
  Volume v{{shape[0], shape[1], shape[2]}, {1.f, 1.f, 1.f}};
  for (int d = 0; d < 3; ++d) v.w2[d] = static_cast<float>(spacing[d] * spacing[d]);
  transform<false>(dense_source(sites, batch, v, true), batch, v, out, static_cast<float*>(workspace), Finish::squared,
                   exec);
}

size_t distance_workspace(const Array& mask, int spatial_dims, bool, bool contour, const Exec&) {
  const Volume v = make_volume(mask, spatial_dims, nullptr);
  const int64_t count = count_of(mask, spatial_dims);
  return work_bytes(count, v) + round_up(static_cast<size_t>(2 * count) * sizeof(unsigned)) +
         (contour ? static_cast<size_t>(count * v.size()) : 0);
}

void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing, bool squared, const Array& out,
                            const Array& indices, void* workspace, const Exec& exec) {
  if (indices) throw std::invalid_argument("indices are not available on a CUDA device");
  const DeviceGuard guard(exec.device);
  transform<false>(make_source(mask, spatial_dims), count_of(mask, spatial_dims),
                   make_volume(mask, spatial_dims, spacing), static_cast<float*>(out.data),
                   static_cast<float*>(workspace), squared ? Finish::squared : Finish::root, exec);
}

void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing, SignedMap convention,
                         bool normalize, const Array& out, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Volume v = make_volume(mask, spatial_dims, spacing);
  const Source source = make_source(mask, spatial_dims);
  const int64_t count = count_of(mask, spatial_dims), all = count * v.size();
  if (all == 0) return;
  if (count > 65535) throw std::invalid_argument("mask has a batch of more than 65,535 on a CUDA device");
  float* phi = static_cast<float*>(out.data);
  char* memory = static_cast<char*>(workspace);
  float* work = static_cast<float*>(workspace);
  unsigned* maxima = reinterpret_cast<unsigned*>(memory + work_bytes(count, v));
  if (convention == SignedMap::boundary) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(maxima) + round_up(static_cast<size_t>(2 * count) * sizeof(unsigned));
    NOISYSEG_LAUNCH((contour_codes), blocks_for(all), threads, 0, exec, source, v, all, codes);
    transform<false>(dense_source(codes, count, v, false), count, v, phi, work, Finish::root, exec);
    NOISYSEG_LAUNCH((set_inside), blocks_for(all), threads, 0, exec, codes, all, phi);
  } else {
    transform<true>(source, count, v, phi, work, Finish::two_sided, exec);
  }
  const bool two_sided = convention == SignedMap::two_sided || convention == SignedMap::boundary;
  if (two_sided && !normalize) return;
  const size_t bytes = static_cast<size_t>(2 * count) * sizeof(unsigned);
  check(cudaMemsetAsync(maxima, 0, bytes, static_cast<cudaStream_t>(exec.stream)), "cudaMemsetAsync");
  const int64_t wanted = (v.size() + 8 * threads - 1) / (8 * threads), most = 1024;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most), static_cast<unsigned>(count));
  NOISYSEG_LAUNCH((item_maxima), grid, threads, 0, exec, phi, v.size(), maxima);
  NOISYSEG_LAUNCH((apply_convention), blocks_for(all), threads, 0, exec, source, v, all, maxima, convention, normalize,
                  phi);
}

}  // namespace noisyseg::cuda
