// A block's pixels: 256 threads walk over tiles of one image, four pixels a thread (one in double), 256
// apart, so that loads are coalesced and four are in flight. Sums over warps and blocks in a fixed order.
#pragma once
#include "cuda/launch.h"
#include "formulas/dtype.h"
#include "formulas/dual.h"
#include "layout.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int block_threads = 256;
constexpr int block_warps = block_threads / 32;
template <class T>
constexpr int pixels_per_thread = sizeof(T) == 4 ? 4 : 1;
template <class T>
constexpr int64_t pixels_per_tile = block_threads * pixels_per_thread<T>;
constexpr int64_t blocks_wanted = 2048;  // enough to fill a large GPU twice
constexpr int64_t most_images = 65535;   // gridDim.y

template <class T>
inline int64_t tiles_of_image(int64_t pixels) {
  return (pixels + pixels_per_tile<T> - 1) / pixels_per_tile<T>;
}
// Blocks for each image, by the shapes alone.
template <class T>
inline int64_t blocks_of_image(int64_t batch, int64_t pixels) {
  const int64_t share = (blocks_wanted + batch - 1) / (batch > 0 ? batch : 1);
  const int64_t tiles = tiles_of_image<T>(pixels);
  return tiles < share ? tiles : share;
}

// Where this thread's n pixels of a tile lie.
template <int n>
struct Spots {
  int64_t column[n];
  int row0[n], row1[n];
  bool inside[n];  // false beyond the image's end
};
template <int n>
__device__ inline Spots<n> spots_of(const Layout& layout, int64_t tile) {
  Spots<n> at;
  const int64_t pixels = layout.pixels();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int64_t q = (tile * n + k) * block_threads + threadIdx.x;
    at.inside[k] = q < pixels;
    at.row0[k] = at.row1[k] = 0;
    at.column[k] = q;
    if (layout.extent[2] != pixels) {
      const int64_t row = q / layout.extent[2];
      at.row0[k] = static_cast<int>(row / layout.extent[1]);
      at.row1[k] = static_cast<int>(row % layout.extent[1]);
      at.column[k] = q - row * layout.extent[2];
    }
  }
  return at;
}
template <int n>
__device__ inline int64_t offset_at(const Spots<n>& at, const Plane& plane, int k) {
  return at.row0[k] * plane.step[0] + at.row1[k] * plane.step[1] + at.column[k] * plane.step[2];
}

template <class From, int n, class T>
__device__ inline void read_as(const Spots<n>& at, const bool* wanted, const Plane& plane, int64_t base,
                               T* out) {
  const From* from = reinterpret_cast<const From*>(plane.data) + base;
#pragma unroll
  for (int k = 0; k < n; ++k) out[k] = wanted[k] ? to_real<T>(from[offset_at(at, plane, k)]) : T(0);
}
// This thread's wanted pixels of one plane, 0 for the others.
template <int n, class T>
__device__ inline void read(const Spots<n>& at, const bool* wanted, const Plane& plane, int64_t base,
                            T* out) {
#define CASE(From) read_as<From>(at, wanted, plane, base, out);
  NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
}
template <int n, class T>
__device__ inline void read_float(const Spots<n>& at, const bool* wanted, const Plane& plane, int64_t base,
                                  T* out) {
#define CASE(From) read_as<From>(at, wanted, plane, base, out);
  NOISYSEG_FLOAT_CASES(plane.dtype, CASE)
#undef CASE
}

template <class To, int n, class T>
__device__ inline void write_as(const Spots<n>& at, const Plane& plane, int64_t base, const T* values) {
  To* to = reinterpret_cast<To*>(plane.data) + base;
#pragma unroll
  for (int k = 0; k < n; ++k)
    if (at.inside[k]) assign(to[offset_at(at, plane, k)], values[k]);
}
template <int n, class T>
__device__ inline void write_float(const Spots<n>& at, const Plane& plane, int64_t base, const T* values) {
#define CASE(To) write_as<To>(at, plane, base, values);
  NOISYSEG_FLOAT_CASES(plane.dtype, CASE)
#undef CASE
}

template <class T>
__device__ inline T sum_of_warp(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ inline Dual<double> sum_of_warp(Dual<double> x) {
  return {sum_of_warp(x.value), sum_of_warp(x.slope)};
}

// The sum of all threads' x, in thread 0.
__device__ inline double sum_of_block(double x) {
  __shared__ double parts[block_warps];
  x = sum_of_warp(x);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < block_warps; ++w) total += parts[w];
  return total;
}
__device__ inline Dual<double> sum_of_block(Dual<double> x) {
  const double value = sum_of_block(x.value);
  return {value, sum_of_block(x.slope)};
}

}  // namespace
}  // namespace noisyseg::cuda
