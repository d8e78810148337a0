// A block's pixels of one loss call: where they lie, their weights, labels, logits and targets; and sums over
// threads.
//
// A block of 256 threads walks over tiles of one image, two pixels a thread (one in double and in dual
// numbers), 256 apart, so that loads are coalesced and two are in flight.
#pragma once
#include "cuda/launch.h"
#include "formulas/dtype.h"
#include "formulas/dual.h"
#include "formulas/losses.h"
#include "layout.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int threads = 256;
constexpr int warps = threads / 32;

// T computes: float, double or Dual<double>. Real<T> is what arrays are read as, Sum<T> what sums are.
template <class T>
struct NumberTypes {
  using Real = double;
  using Sum = T;
};
template <>
struct NumberTypes<float> {
  using Real = float;
  using Sum = double;
};
template <class T>
using Real = typename NumberTypes<T>::Real;
template <class T>
using Sum = typename NumberTypes<T>::Sum;

template <class T>
constexpr int per_thread = sizeof(T) == 4 ? 2 : 1;
template <class T>
constexpr int64_t tile_pixels = threads * per_thread<T>;

// Everything of a call that is the same for the whole grid.
struct Call {
  Plane logits, target, weight, mask, grad, map;  // map: the loss map or the gradient with respect to it
  Plane direction, map_direction;                 // of the logits and of that gradient, for tangents
  Layout layout;
  LossOptions options;
  RegionFormula formula;
  Power power;               // of the pixel loss
  const void* class_weight;  // (C,) or nullptr
  bool class_weight_f64;
  int64_t class_weight_step;
  double inverse_channels, smoothed;  // 1 / C; what label smoothing gives to every class
  int64_t first, chunks;              // the first class of the region loss; blocks for each image
  bool flat;                          // an image's pixels are one row
  bool softmax, labels;
  bool hard;                       // targets are 0 or 1, and the pixel loss's short formulas hold
  bool labels_only;                // hard, and of a softmax the label's own probability is enough
  bool two;                        // softmax over two classes: one sigmoid of the logits' difference
  bool count_by_class, count_all;  // what "mean" divides by: class weights; or simply all pixels
};

__device__ inline double scalar_at(const void* from, bool f64, int64_t i) {
  return f64 ? static_cast<const double*>(from)[i] : static_cast<double>(static_cast<const float*>(from)[i]);
}
__device__ inline double class_weight(const Call& call, int64_t c) {
  return call.class_weight ? scalar_at(call.class_weight, call.class_weight_f64, c * call.class_weight_step)
                           : 1.0;
}

template <class T>
struct Pixels {
  static constexpr int n = per_thread<T>;
  int64_t batch, start;  // the image, and the tile's first pixel
  int left;              // pixels of the tile
  int row0[n], row1[n];  // where a pixel lies, unless all are in one row
  Real<T> weight[n];  // 0 where left out and beyond the image; NaN where a label that counts is out of range
  int label[n];       // -1: none of the classes
  Real<T> count;      // what these pixels add to the divisor of "mean"
};

__device__ inline int place(int k) { return k * threads + static_cast<int>(threadIdx.x); }

template <class T>
__device__ inline void offsets(const Call& call, const Pixels<T>& px, const Plane& plane, int64_t base,
                               int64_t* out) {
  if (call.flat) {
    base += px.start * plane.step[2];
#pragma unroll
    for (int k = 0; k < px.n; ++k) out[k] = base + place(k) * plane.step[2];
    return;
  }
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    const int64_t row = px.row0[k] * call.layout.extent[1] + px.row1[k];
    const int64_t column = px.start + place(k) - row * call.layout.extent[2];
    out[k] = base + px.row0[k] * plane.step[0] + px.row1[k] * plane.step[1] + column * plane.step[2];
  }
}

// Types that an array may have: no code for the others.
enum : int { f16_bf16 = 1, f32 = 2, f64 = 4, whole = 8 };

template <class From, class T, class R>
__device__ inline void load_as(const Pixels<T>& px, const Plane& plane, const int64_t* at, R* out) {
  const From* from = reinterpret_cast<const From*>(plane.data);
#pragma unroll
  for (int k = 0; k < px.n; ++k) out[k] = place(k) < px.left ? to_real<R>(from[at[k]]) : R(0);
}

// This thread's pixels of one plane; 0 beyond the image.
template <int types, class T, class R>
__device__ inline void load(const Call& call, const Pixels<T>& px, const Plane& plane, int64_t c, R* out) {
  int64_t at[px.n];
  offsets(call, px, plane, px.batch * plane.batch + c * plane.channel, at);
  if ((types & f32) && plane.dtype == DType::f32) return load_as<float>(px, plane, at, out);
  if ((types & f64) && plane.dtype == DType::f64) return load_as<double>(px, plane, at, out);
  if ((types & f16_bf16) && plane.dtype == DType::bf16) return load_as<BFloat16>(px, plane, at, out);
  if ((types & f16_bf16) && plane.dtype == DType::f16) return load_as<Half>(px, plane, at, out);
  if ((types & whole) && plane.dtype == DType::i32) return load_as<int32_t>(px, plane, at, out);
  if ((types & whole) && plane.dtype == DType::i64) return load_as<int64_t>(px, plane, at, out);
  if (types & whole) load_as<uint8_t>(px, plane, at, out);
}

__device__ inline void load_logits(const Call& call, const Pixels<float>& px, int64_t c, float* z) {
  load<f32 | f16_bf16>(call, px, call.logits, c, z);
}
// In double only f64 logits, in dual numbers any.
__device__ inline void load_logits(const Call& call, const Pixels<double>& px, int64_t c, double* z) {
  load<f64>(call, px, call.logits, c, z);
}
__device__ inline void load_logits(const Call& call, const Pixels<Dual<double>>& px, int64_t c,
                                   Dual<double>* z) {
  double value[1], slope[1];
  load<f32 | f64 | f16_bf16>(call, px, call.logits, c, value);
  load<f32 | f64 | f16_bf16>(call, px, call.direction, c, slope);
  z[0] = Dual<double>(value[0], slope[0]);
}

// The gradient of the loss map.
template <class T>
__device__ inline void load_map(const Call& call, const Pixels<T>& px, T* out) {
  Real<T> value[px.n];
  load<f32 | f64>(call, px, call.map, 0, value);
#pragma unroll
  for (int k = 0; k < px.n; ++k) out[k] = T(value[k]);
}
__device__ inline void load_map(const Call& call, const Pixels<Dual<double>>& px, Dual<double>* out) {
  double value[1], slope[1] = {0};
  load<f32 | f64>(call, px, call.map, 0, value);
  if (call.map_direction) load<f32 | f64>(call, px, call.map_direction, 0, slope);
  out[0] = Dual<double>(value[0], slope[0]);
}

__device__ inline float result(float x) { return x; }
__device__ inline double result(double x) { return x; }
__device__ inline double result(Dual<double> x) { return x.slope; }  // what a tangent call is to give

template <class To, class T>
__device__ inline void store_as(const Pixels<T>& px, const Plane& plane, const int64_t* at, const T* values) {
  To* to = reinterpret_cast<To*>(plane.data);
#pragma unroll
  for (int k = 0; k < px.n; ++k)
    if (place(k) < px.left) assign(to[at[k]], result(values[k]));
}
template <int types, class T>
__device__ inline void store(const Call& call, const Pixels<T>& px, const Plane& plane, int64_t c,
                             const T* values) {
  int64_t at[px.n];
  offsets(call, px, plane, px.batch * plane.batch + c * plane.channel, at);
  if ((types & f32) && plane.dtype == DType::f32) return store_as<float>(px, plane, at, values);
  if ((types & f64) && plane.dtype == DType::f64) return store_as<double>(px, plane, at, values);
  if ((types & f16_bf16) && plane.dtype == DType::bf16) return store_as<BFloat16>(px, plane, at, values);
  if (types & f16_bf16) store_as<Half>(px, plane, at, values);
}
// The gradient has the logits' type.
__device__ inline void store_grad(const Call& call, const Pixels<float>& px, int64_t c, const float* d) {
  store<f32 | f16_bf16>(call, px, call.grad, c, d);
}
__device__ inline void store_grad(const Call& call, const Pixels<double>& px, int64_t c, const double* d) {
  store<f64>(call, px, call.grad, c, d);
}
__device__ inline void store_grad(const Call& call, const Pixels<Dual<double>>& px, int64_t c,
                                  const Dual<double>* d) {
  store<f32 | f64 | f16_bf16>(call, px, call.grad, c, d);
}

template <class From, class T>
__device__ inline void load_labels_as(const Call& call, Pixels<T>& px, const int64_t* at) {
  const From* from = reinterpret_cast<const From*>(call.target.data);
  const int classes = call.layout.channels == 1 ? 2 : static_cast<int>(call.layout.channels);
  From x[px.n];
#pragma unroll
  for (int k = 0; k < px.n; ++k) x[k] = place(k) < px.left ? from[at[k]] : From(0);
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    const int64_t label = static_cast<int64_t>(x[k]);
    px.label[k] =
        static_cast<uint64_t>(label) < static_cast<uint64_t>(classes) ? static_cast<int>(label) : -1;
    if (call.options.has_ignore && label == call.options.ignore) px.weight[k] = Real<T>(0);
  }
}

// `count`: whether px.count is wanted.
template <class T>
__device__ inline Pixels<T> load_pixels(const Call& call, int64_t b, int64_t tile, bool count) {
  Pixels<T> px;
  px.batch = b;
  px.start = tile * tile_pixels<T>;
  const int64_t left = call.layout.pixels() - px.start;
  px.left = static_cast<int>(left < tile_pixels<T> ? left : tile_pixels<T>);
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    px.row0[k] = px.row1[k] = 0;
    px.weight[k] = place(k) < px.left ? Real<T>(1) : Real<T>(0);
    px.label[k] = 0;
    if (!call.flat) {
      const int64_t row = (px.start + place(k)) / call.layout.extent[2];
      px.row0[k] = static_cast<int>(row / call.layout.extent[1]);
      px.row1[k] = static_cast<int>(row % call.layout.extent[1]);
    }
  }
  if (call.mask) {
    Real<T> keep[px.n];
    load<f32 | f64 | f16_bf16 | whole>(call, px, call.mask, 0, keep);
#pragma unroll
    for (int k = 0; k < px.n; ++k)
      if (!(keep[k] != Real<T>(0))) px.weight[k] = Real<T>(0);
  }
  if (call.labels) {
    int64_t at[px.n];
    offsets(call, px, call.target, b * call.target.batch, at);
    if (call.target.dtype == DType::i64)
      load_labels_as<int64_t>(call, px, at);
    else if (call.target.dtype == DType::i32)
      load_labels_as<int32_t>(call, px, at);
    else
      load_labels_as<uint8_t>(call, px, at);
  }
  px.count = Real<T>(0);
  if (count) {
#pragma unroll
    for (int k = 0; k < px.n; ++k)
      if (!call.count_by_class)
        px.count += px.weight[k];
      else if (px.weight[k] != Real<T>(0) && px.label[k] >= 0)
        px.count += static_cast<Real<T>>(class_weight(call, px.label[k]));
  }
  if (call.weight) {
    Real<T> weight[px.n];
    load<f32 | f64 | f16_bf16>(call, px, call.weight, 0, weight);
#pragma unroll
    for (int k = 0; k < px.n; ++k) px.weight[k] = px.weight[k] != Real<T>(0) ? weight[k] : Real<T>(0);
  }
#pragma unroll
  for (int k = 0; k < px.n; ++k)
    if (px.label[k] < 0 && px.weight[k] != Real<T>(0)) px.weight[k] = static_cast<Real<T>>(NAN);
  return px;
}

// Maximum, and one over the sum of exponentials, in one reading; over channels of the logits or the target.
template <class T>
struct Softmax {
  T top[per_thread<T>], inverse[per_thread<T>];
};
// One class more: sum is that of e^(z - top). One exponential, whichever is larger.
template <class T>
__device__ inline void add_class(T z, T& top, T& sum) {
  const bool larger = z > top;
  const T e = exp_(larger ? top - z : z - top);
  sum = larger ? sum * e + T(1) : sum + e;
  top = larger ? z : top;
}
template <class T>
__device__ inline Softmax<Real<T>> target_softmax(const Call& call, const Pixels<T>& px) {
  Softmax<Real<T>> s{};
  Real<T> z[px.n];
  for (int64_t c = 0; c < call.layout.channels; ++c) {
    load<f32 | f64 | f16_bf16 | whole>(call, px, call.target, c, z);
#pragma unroll
    for (int k = 0; k < px.n; ++k) {
      if (c == 0) s.top[k] = z[k];
      add_class(z[k], s.top[k], s.inverse[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < px.n; ++k) s.inverse[k] = Real<T>(1) / s.inverse[k];
  return s;
}

// The target of class c.
template <class T>
__device__ inline void load_target(const Call& call, const Pixels<T>& px, const Softmax<Real<T>>& softmax,
                                   int64_t c, T* out) {
  using R = Real<T>;
  const R s = static_cast<R>(call.options.label_smoothing);
  const R share = static_cast<R>(call.smoothed);
  if (call.labels) {
    const int wanted = call.layout.channels == 1 ? 1 : static_cast<int>(c);
#pragma unroll
    for (int k = 0; k < px.n; ++k) out[k] = T((px.label[k] == wanted ? R(1) - s : R(0)) + share);
    return;
  }
  R g[px.n];
  load<f32 | f64 | f16_bf16 | whole>(call, px, call.target, c, g);
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    if (call.options.target_is_logits)
      g[k] = call.softmax ? exp_(g[k] - softmax.top[k]) * softmax.inverse[k] : sigmoid(g[k]).p;
    else if (s != R(0))
      g[k] = (R(1) - s) * g[k] + share;
    out[k] = T(g[k]);
  }
}

// ---- sums over threads ----------------------------------------------------------------------------

template <class T>
__device__ inline T shuffle_xor(T x, int step) {
  return __shfl_xor_sync(0xffffffffu, x, step);
}
__device__ inline Dual<double> shuffle_xor(Dual<double> x, int step) {
  const double value = __shfl_xor_sync(0xffffffffu, x.value, step);
  return {value, __shfl_xor_sync(0xffffffffu, x.slope, step)};
}
// Of neighbouring lanes; width: a power of two, at most 32.
template <class T>
__device__ inline T group_sum(T x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x = x + shuffle_xor(x, step);
  return x;
}
template <class T>
__device__ inline T warp_sum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = x + shuffle_xor(x, step);
  return x;
}

// The sum of all threads' x, in every thread.
template <int block, class S>
__device__ inline S block_sum(S x) {
  __shared__ S parts[block / 32];
  x = warp_sum(x);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  S total = S(0);
  for (int w = 0; w < block / 32; ++w) total += parts[w];
  return total;
}

}  // namespace
}  // namespace noisyseg::cuda
