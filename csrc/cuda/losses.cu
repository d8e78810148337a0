// Fused losses on CUDA. No kernel synchronises with the host; every sum has a fixed order.
//
// A block of 256 threads walks over tiles of one image, four pixels a thread (one in double), 256 apart, so
// that loads are coalesced and four are in flight. How many blocks share an image depends on the shapes
// alone. Bytes per pixel and channel, fp32 logits and uint8 labels: forward 5 read; backward 5 read, 4
// written. Further reads of the same tile by softmax (maximum, sum, classes) come from the caches.
#include "cuda/launch.h"
#include "formulas/dtype.h"
#include "formulas/losses.h"
#include "layout.h"
#include "noisyseg/losses.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int threads = 256;
constexpr int warps = threads / 32;
template <class T>
constexpr int per_thread = sizeof(T) == 4 ? 4 : 1;
template <class T>
constexpr int64_t tile_pixels = threads * per_thread<T>;
constexpr int64_t wanted_blocks = 2048;  // enough to fill a large GPU twice

struct Inputs {
  Plane logits, target, weight, mask, other;  // other: the gradient or the loss map
  Plane map;                                  // the gradient with respect to the loss map
  Layout layout;
  bool labels;
  bool softmax;
};

Inputs make_inputs(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                   const Array& other, const Array& map, Activation activation) {
  Inputs in;
  const Array arrays[6] = {logits, target, weight, mask, other, map};
  Plane planes[6];
  in.layout = make_layout(arrays, planes, 6);
  in.logits = planes[0], in.target = planes[1], in.weight = planes[2], in.mask = planes[3],
  in.other = planes[4], in.map = planes[5];
  in.labels = target.rank == logits.rank - 1;
  in.softmax = activation == Activation::softmax;
  return in;
}

int64_t tiles_of(int64_t pixels) { return (pixels + tile_pixels<float> - 1) / tile_pixels<float>; }
// Blocks for each image.
int64_t chunks_of(int64_t batch, int64_t pixels) {
  const int64_t share = (wanted_blocks + batch - 1) / (batch > 0 ? batch : 1);
  const int64_t tiles = tiles_of(pixels);
  return tiles < share ? tiles : share;
}

// Everything about a thread's pixels that does not depend on the class.
template <class T>
struct Pixels {
  static constexpr int n = per_thread<T>;
  int64_t batch;
  int64_t column[n];  // where each pixel lies: rows and column of the layout
  int row0[n], row1[n];
  bool inside[n];        // false beyond the image's end
  T weight[n];           // 0 where masked and beyond the image
  T kept[n];             // 1, or 0 where masked and beyond the image
  T label[n];            // with labels; out of range NaN, or -1 (no class) where the weight is 0
  T top[n], inverse[n];  // softmax over three classes or more: maximum and 1 / sum of exponentials
};

template <class T>
__device__ inline int64_t offset_of(const Pixels<T>& px, const Plane& plane, int k) {
  return px.row0[k] * plane.step[0] + px.row1[k] * plane.step[1] + px.column[k] * plane.step[2];
}

template <class From, class T>
__device__ inline void load_as(const Pixels<T>& px, const Plane& plane, int64_t base, T* out) {
  const From* from = reinterpret_cast<const From*>(plane.data) + base;
#pragma unroll
  for (int k = 0; k < px.n; ++k) out[k] = px.inside[k] ? to_real<T>(from[offset_of(px, plane, k)]) : T(0);
}

// This thread's pixels of one plane; 0 beyond the image.
template <class T>
__device__ inline void load(const Pixels<T>& px, const Plane& plane, int64_t base, T* out) {
#define CASE(From) load_as<From>(px, plane, base, out);
  NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
}
__device__ inline void load_float(const Pixels<float>& px, const Plane& plane, int64_t base, float* out) {
  if (plane.dtype == DType::f32)
    load_as<float>(px, plane, base, out);
  else if (plane.dtype == DType::bf16)
    load_as<BFloat16>(px, plane, base, out);
  else
    load_as<Half>(px, plane, base, out);
}
// Only f64 logits are computed in double.
__device__ inline void load_float(const Pixels<double>& px, const Plane& plane, int64_t base, double* out) {
  load_as<double>(px, plane, base, out);
}

template <class To, class T>
__device__ inline void store_as(const Pixels<T>& px, const Plane& plane, int64_t base, const T* values) {
  To* to = reinterpret_cast<To*>(plane.data) + base;
#pragma unroll
  for (int k = 0; k < px.n; ++k)
    if (px.inside[k]) assign(to[offset_of(px, plane, k)], values[k]);
}
// Into a gradient, which has the logits' dtype, or a loss map.
__device__ inline void store(const Pixels<float>& px, const Plane& plane, int64_t base, const float* values) {
  if (plane.dtype == DType::f32)
    store_as<float>(px, plane, base, values);
  else if (plane.dtype == DType::bf16)
    store_as<BFloat16>(px, plane, base, values);
  else
    store_as<Half>(px, plane, base, values);
}
__device__ inline void store(const Pixels<double>& px, const Plane& plane, int64_t base,
                             const double* values) {
  store_as<double>(px, plane, base, values);
}

template <class T>
__device__ inline void load_logits(const Inputs& in, const Pixels<T>& px, int64_t c, T* out) {
  load_float(px, in.logits, px.batch * in.logits.batch + c * in.logits.channel, out);
}

template <class T>
__device__ inline Pixels<T> load_pixels(const Inputs& in, int64_t b, int64_t tile) {
  Pixels<T> px;
  px.batch = b;
  const int64_t pixels = in.layout.pixels();
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    const int64_t q = tile * tile_pixels<T> + k * threads + threadIdx.x;
    px.inside[k] = q < pixels;
    px.row0[k] = px.row1[k] = 0;
    px.column[k] = q;
    if (in.layout.extent[2] != pixels) {
      const int64_t row = q / in.layout.extent[2];
      px.row0[k] = static_cast<int>(row / in.layout.extent[1]);
      px.row1[k] = static_cast<int>(row % in.layout.extent[1]);
      px.column[k] = q - row * in.layout.extent[2];
    }
    px.weight[k] = px.kept[k] = px.inside[k] ? T(1) : T(0);
  }
  if (in.weight) load(px, in.weight, b * in.weight.batch, px.weight);
  if (in.mask) {
    T keep[px.n];
    load(px, in.mask, b * in.mask.batch, keep);
#pragma unroll
    for (int k = 0; k < px.n; ++k)
      if (!(keep[k] != T(0))) px.weight[k] = px.kept[k] = T(0);
  }
  if (in.labels) {
    const T classes = static_cast<T>(in.layout.channels == 1 ? 2 : in.layout.channels);
    load(px, in.target, b * in.target.batch, px.label);
#pragma unroll
    for (int k = 0; k < px.n; ++k)
      if (px.label[k] < T(0) || px.label[k] >= classes)
        px.label[k] = px.weight[k] == T(0) ? T(-1) : static_cast<T>(NAN);
  }
  return px;
}

template <class T>
__device__ inline void prepare_softmax(const Inputs& in, Pixels<T>& px) {
  T z[px.n];
  load_logits(in, px, 0, px.top);
  for (int64_t c = 1; c < in.layout.channels; ++c) {
    load_logits(in, px, c, z);
#pragma unroll
    for (int k = 0; k < px.n; ++k) px.top[k] = max_(px.top[k], z[k]);
  }
#pragma unroll
  for (int k = 0; k < px.n; ++k) px.inverse[k] = T(0);
  for (int64_t c = 0; c < in.layout.channels; ++c) {
    load_logits(in, px, c, z);
#pragma unroll
    for (int k = 0; k < px.n; ++k) px.inverse[k] += exp_(z[k] - px.top[k]);
  }
#pragma unroll
  for (int k = 0; k < px.n; ++k) px.inverse[k] = T(1) / px.inverse[k];
}

// The target of class c; NaN where the label is out of range.
template <class T>
__device__ inline void load_class(const Inputs& in, const Pixels<T>& px, int64_t c, T* out) {
  if (!in.labels) {
    load(px, in.target, px.batch * in.target.batch + c * in.target.channel, out);
    return;
  }
  const T wanted = in.layout.channels == 1 ? T(1) : static_cast<T>(c);
#pragma unroll
  for (int k = 0; k < px.n; ++k)
    out[k] = px.label[k] != px.label[k] ? px.label[k] : px.label[k] == wanted ? T(1) : T(0);
}

template <class T>
__device__ inline void load_probability(const Inputs& in, const Pixels<T>& px, int64_t c,
                                        Probability<T>* out) {
  T z[px.n];
  load_logits(in, px, c, z);
  if (!in.softmax || in.layout.channels == 2) {
    T other[px.n] = {};
    if (in.softmax) load_logits(in, px, 1 - c, other);
#pragma unroll
    for (int k = 0; k < px.n; ++k) out[k] = sigmoid(in.softmax ? z[k] - other[k] : z[k]);
  } else {
#pragma unroll
    for (int k = 0; k < px.n; ++k) out[k] = given_probability(exp_(z[k] - px.top[k]) * px.inverse[k]);
  }
}

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sum of all threads' x, in thread 0.
__device__ inline double block_sum(double x) {
  __shared__ double parts[warps];
  x = warp_sum(x);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < warps; ++w) total += parts[w];
  return total;
}

// ---- ratio losses ---------------------------------------------------------------------------------

struct Formula {
  Ratio ratio;
  Power power;
  bool squared;
};

Formula formula_of(const RegionOptions& o) {
  const Power power = o.gamma == 1.5 ? Power::three_halves
                      : o.gamma == 1 ? Power::one
                      : o.gamma == 2 ? Power::two
                                     : Power::any;
  return {o.kind == RegionLoss::dice ? Ratio::dice : Ratio::nr_dice, power, o.squared};
}

// The formula is the same for the whole grid, so these branches never diverge.
template <class T>
__device__ inline T numerator(Formula f, const Probability<T>& a, T g, T gamma) {
  const Difference<T> d = difference<false>(a, g);
  if (f.ratio == Ratio::dice) return ratio_numerator<Ratio::dice, Power::one>(d, a.p, g, gamma);
  if (f.power == Power::three_halves) return abs_power<Power::three_halves>(d, gamma);
  if (f.power == Power::one) return abs_power<Power::one>(d, gamma);
  if (f.power == Power::two) return abs_power<Power::two>(d, gamma);
  return abs_power<Power::any>(d, gamma);
}
template <class T>
__device__ inline T numerator_slope(Formula f, const Probability<T>& a, T g, T gamma) {
  const Difference<T> d = difference<false>(a, g);
  if (f.ratio == Ratio::dice) return ratio_numerator_slope<Ratio::dice, Power::one>(d, g, gamma);
  if (f.power == Power::three_halves) return abs_power_slope<Power::three_halves>(d, gamma);
  if (f.power == Power::one) return abs_power_slope<Power::one>(d, gamma);
  if (f.power == Power::two) return abs_power_slope<Power::two>(d, gamma);
  return abs_power_slope<Power::any>(d, gamma);
}

// Partial sums of each warp: partial (B, chunks, warps, C, 2). Grid (chunks, B). No barrier: a warp's partial
// sums are its own, kept in memory between tiles when there are several classes.
template <class T>
__global__ void __launch_bounds__(threads)
    region_sums(Inputs in, Formula formula, T gamma, int64_t first, double* partial) {
  const int64_t channels = in.layout.channels, b = blockIdx.y;
  const int lane = threadIdx.x % 32;
  double* mine = partial + ((b * gridDim.x + blockIdx.x) * warps + threadIdx.x / 32) * channels * 2;
  if (lane == 0)
    for (int64_t v = 0; v < 2 * channels; ++v) mine[v] = 0;
  double n_one = 0, d_one = 0;
  const int64_t tiles = (in.layout.pixels() + tile_pixels<T> - 1) / tile_pixels<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Pixels<T> px = load_pixels<T>(in, b, tile);
    if (in.softmax && channels > 2) prepare_softmax(in, px);
    for (int64_t c = first; c < channels; ++c) {
      Probability<T> a[px.n];
      T g[px.n];
      load_probability(in, px, c, a);
      load_class(in, px, c, g);
      T n = T(0), d = T(0);
#pragma unroll
      for (int k = 0; k < px.n; ++k) {
        if (px.weight[k] == T(0)) continue;
        // NaN marks a label out of range and goes through the denominator.
        n += px.weight[k] * numerator(formula, a[k], g[k], gamma);
        d += px.weight[k] * (formula.squared ? ratio_denominator<true>(a[k].p, g[k])
                                             : ratio_denominator<false>(a[k].p, g[k]));
      }
      if (channels == 1) {
        n_one += static_cast<double>(n), d_one += static_cast<double>(d);
      } else {
        const double nw = warp_sum(static_cast<double>(n)), dw = warp_sum(static_cast<double>(d));
        if (lane == 0) mine[2 * c] += nw, mine[2 * c + 1] += dw;
      }
    }
  }
  if (channels == 1) {
    n_one = warp_sum(n_one), d_one = warp_sum(d_one);
    if (lane == 0) mine[0] = n_one, mine[1] = d_one;
  }
}

// sums (B, C, 2) from the partial sums. Grid (C, B).
__global__ void __launch_bounds__(threads) region_add(const double* partial, int64_t parts, double* sums) {
  const int64_t c = blockIdx.x, channels = gridDim.x, b = blockIdx.y;
  double n = 0, d = 0;
  for (int64_t i = threadIdx.x; i < parts; i += threads) {
    const double* part = partial + ((b * parts + i) * channels + c) * 2;
    n += part[0], d += part[1];
  }
  n = block_sum(n);
  d = block_sum(d);
  if (threadIdx.x == 0) {
    sums[(b * channels + c) * 2] = n;
    sums[(b * channels + c) * 2 + 1] = d;
  }
}

__device__ inline void set_scalar(void* to, bool fp64, int64_t i, double x) {
  if (fp64)
    static_cast<double*>(to)[i] = x;
  else
    static_cast<float*>(to)[i] = static_cast<float>(x);
}
__device__ inline double get_scalar(const void* from, bool fp64, int64_t i) {
  return fp64 ? static_cast<const double*>(from)[i] : static_cast<double>(static_cast<const float*>(from)[i]);
}

// The loss from the sums. One block.
__global__ void __launch_bounds__(threads)
    region_value(double* sums, int64_t batch, int64_t channels, int64_t first, bool per_image, Ratio ratio,
                 double eps, Reduction reduction, void* loss, bool fp64) {
  if (!per_image) {  // every image's sums become the batch's
    for (int64_t v = threadIdx.x; v < 2 * channels; v += threads) {
      double total = 0;
      for (int64_t b = 0; b < batch; ++b) total += sums[b * 2 * channels + v];
      for (int64_t b = 0; b < batch; ++b) sums[b * 2 * channels + v] = total;
    }
    __syncthreads();
  }
  const int64_t classes = channels - first, items = (per_image ? batch : 1) * classes;
  double total = 0;
  for (int64_t i = threadIdx.x; i < items; i += threads) {
    const int64_t at = (i / classes) * channels + first + i % classes;
    const double value = batch ? ratio_value(ratio, sums[at * 2], sums[at * 2 + 1], eps).loss : 0.0;
    if (reduction == Reduction::none) set_scalar(loss, fp64, i, value);
    total += value;
  }
  total = block_sum(total);
  if (threadIdx.x == 0 && reduction != Reduction::none)
    set_scalar(loss, fp64, 0,
               reduction == Reduction::sum ? total
               : batch                     ? total / static_cast<double>(items)
                                           : 0.0);
}

// Where the gradient with respect to the loss lies: one value, or one for each (image and) class.
struct GradLoss {
  const void* data;
  bool fp64;
  int64_t by_image, by_class;
};

// Grid (chunks, B); dynamic shared memory: the loss's derivatives with respect to the two sums of each class.
// At least one block: left alone, ptxas 13.0 aims at 64 registers for sm_120 and spills the double version.
template <class T>
__global__ void __launch_bounds__(threads, 1)
    region_grad(Inputs in, Formula formula, T gamma, int64_t first, const double* sums, double eps,
                double scale, GradLoss grad_loss) {
  NOISYSEG_SHARED(double, by_sum);
  const int64_t channels = in.layout.channels, b = blockIdx.y;
  for (int64_t c = threadIdx.x; c < channels; c += threads) {
    const double* s = sums + (b * channels + c) * 2;
    const RatioValue value = ratio_value(formula.ratio, s[0], s[1], eps);
    const double g = c < first
                         ? 0.0
                         : scale * get_scalar(grad_loss.data, grad_loss.fp64,
                                              b * grad_loss.by_image + (c - first) * grad_loss.by_class);
    by_sum[2 * c] = c < first ? 0.0 : g * value.by_numerator;
    by_sum[2 * c + 1] = c < first ? 0.0 : g * value.by_denominator;
  }
  __syncthreads();
  const int64_t tiles = (in.layout.pixels() + tile_pixels<T> - 1) / tile_pixels<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Pixels<T> px = load_pixels<T>(in, b, tile);
    const bool many = in.softmax && channels > 2;
    if (many) prepare_softmax(in, px);
    T mean[px.n] = {};
    // Softmax over many classes goes twice over them: first sum_c p_c dL/dp_c, then the gradient.
    for (int pass = many ? 0 : 1; pass < 2; ++pass)
      for (int64_t c = 0; c < channels; ++c) {
        Probability<T> a[px.n];
        T g[px.n], d[px.n];
        const T bn = static_cast<T>(by_sum[2 * c]), bd = static_cast<T>(by_sum[2 * c + 1]);
        load_probability(in, px, c, a);
        load_class(in, px, c, g);
#pragma unroll
        for (int k = 0; k < px.n; ++k) {
          d[k] = T(0);
          if (px.weight[k] == T(0)) continue;
          const T slope = formula.squared ? ratio_denominator_slope<true>(a[k].p)
                                          : ratio_denominator_slope<false>(a[k].p);
          d[k] = px.weight[k] * (bn * numerator_slope(formula, a[k], g[k], gamma) + bd * slope);
        }
        if (in.softmax && channels == 2) {  // the other class's slope counts too
          const T bn2 = static_cast<T>(by_sum[2 * (1 - c)]), bd2 = static_cast<T>(by_sum[2 * (1 - c) + 1]);
          T g2[px.n];
          load_class(in, px, 1 - c, g2);
#pragma unroll
          for (int k = 0; k < px.n; ++k) {
            if (px.weight[k] == T(0)) continue;
            const Probability<T> o{a[k].q, a[k].p, a[k].root_q, a[k].root_p};
            const T slope =
                formula.squared ? ratio_denominator_slope<true>(o.p) : ratio_denominator_slope<false>(o.p);
            d[k] -= px.weight[k] * (bn2 * numerator_slope(formula, o, g2[k], gamma) + bd2 * slope);
          }
        }
#pragma unroll
        for (int k = 0; k < px.n; ++k) {
          if (!many)
            d[k] = px.weight[k] == T(0) ? T(0) : d[k] * a[k].p * a[k].q;
          else if (pass == 0)
            mean[k] += a[k].p * d[k];
          else
            d[k] = px.weight[k] == T(0) ? T(0) : a[k].p * (d[k] - mean[k]);
        }
        if (pass == 1) store(px, in.other, b * in.other.batch + c * in.other.channel, d);
      }
  }
}

// ---- cross-entropy --------------------------------------------------------------------------------

struct ClassWeight {
  const void* data;
  bool fp64;
  int64_t step;
  explicit ClassWeight(const Array& a)
      : data(a.data), fp64(a.dtype == DType::f64), step(a ? a.strides[0] : 0) {}
  template <class T>
  __device__ T of(int64_t c) const {
    return data ? static_cast<T>(get_scalar(data, fp64, c * step)) : T(1);
  }
};

// partial (B, chunks, 2): the weighted sum and what "mean" divides by. Grid (chunks, B).
template <class T>
__global__ void __launch_bounds__(threads)
    pixel_sums(Inputs in, ClassWeight class_weight, bool map, double* partial) {
  const int64_t channels = in.layout.channels, b = blockIdx.y;
  double total = 0, counted = 0;
  const int64_t tiles = (in.layout.pixels() + tile_pixels<T> - 1) / tile_pixels<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Pixels<T> px = load_pixels<T>(in, b, tile);
    T loss[px.n] = {}, mass[px.n] = {};
    const bool many = in.softmax && channels > 2;
    if (many) prepare_softmax(in, px);
    for (int64_t c = 0; c < channels; ++c) {
      T z[px.n], g[px.n], other[px.n] = {};
      load_logits(in, px, c, z);
      load_class(in, px, c, g);
      if (in.softmax && channels == 2) load_logits(in, px, 1 - c, other);
      const T k_class = class_weight.of<T>(c);
#pragma unroll
      for (int k = 0; k < px.n; ++k) {
        const T share = k_class * g[k];
        mass[k] += share;
        if (!in.softmax)
          loss[k] += k_class / static_cast<T>(channels) * binary_cross_entropy(z[k], g[k]);
        else if (!many)
          loss[k] += share != T(0) ? share * binary_cross_entropy(z[k] - other[k], T(1)) : T(0);
        else
          loss[k] += share != T(0) ? share * (px.top[k] - z[k] - log_(px.inverse[k])) : T(0);
      }
    }
#pragma unroll
    for (int k = 0; k < px.n; ++k) {
      loss[k] = px.weight[k] == T(0) ? T(0) : px.weight[k] * loss[k];
      total += static_cast<double>(loss[k]);
      const T count = in.softmax && in.labels ? mass[k] : T(1);
      counted += px.kept[k] == T(0) ? 0.0 : static_cast<double>(count);
    }
    if (map) store(px, in.other, b * in.other.batch, loss);
  }
  total = block_sum(total);
  counted = block_sum(counted);
  if (threadIdx.x == 0) {
    partial[(b * gridDim.x + blockIdx.x) * 2] = total;
    partial[(b * gridDim.x + blockIdx.x) * 2 + 1] = counted;
  }
}

// One block.
__global__ void __launch_bounds__(threads)
    pixel_value(const double* partial, int64_t parts, Reduction reduction, double* sums, void* loss,
                bool fp64) {
  double total = 0, counted = 0;
  for (int64_t i = threadIdx.x; i < parts; i += threads)
    total += partial[2 * i], counted += partial[2 * i + 1];
  total = block_sum(total);
  counted = block_sum(counted);
  if (threadIdx.x == 0) {
    sums[0] = total;
    sums[1] = counted;
    if (reduction == Reduction::mean) set_scalar(loss, fp64, 0, counted == 0 ? 0.0 : total / counted);
    if (reduction == Reduction::sum) set_scalar(loss, fp64, 0, total);
  }
}

template <class T>
__global__ void __launch_bounds__(threads)
    pixel_grad(Inputs in, ClassWeight class_weight, const double* sums, Reduction reduction,
               const void* grad_loss, bool grad_loss_fp64, Plane grad_map) {
  const int64_t channels = in.layout.channels, b = blockIdx.y;
  T scale = T(0);
  if (reduction != Reduction::none) {
    const double g = get_scalar(grad_loss, grad_loss_fp64, 0);
    scale = static_cast<T>(reduction == Reduction::sum ? g : sums[1] == 0 ? 0.0 : g / sums[1]);
  }
  const int64_t tiles = (in.layout.pixels() + tile_pixels<T> - 1) / tile_pixels<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Pixels<T> px = load_pixels<T>(in, b, tile);
    T k_pixel[px.n], mass[px.n] = {};
#pragma unroll
    for (int k = 0; k < px.n; ++k) k_pixel[k] = scale;
    if (reduction == Reduction::none) load_float(px, grad_map, b * grad_map.batch, k_pixel);
#pragma unroll
    for (int k = 0; k < px.n; ++k) k_pixel[k] = px.weight[k] == T(0) ? T(0) : k_pixel[k] * px.weight[k];
    if (in.softmax && channels > 2) prepare_softmax(in, px);
    if (in.softmax)
      for (int64_t c = 0; c < channels; ++c) {
        T g[px.n];
        load_class(in, px, c, g);
        const T k_class = class_weight.of<T>(c);
#pragma unroll
        for (int k = 0; k < px.n; ++k) mass[k] += k_class * g[k];
      }
    for (int64_t c = 0; c < channels; ++c) {
      Probability<T> a[px.n];
      T g[px.n], d[px.n];
      load_probability(in, px, c, a);
      load_class(in, px, c, g);
      const T k_class = class_weight.of<T>(c);
#pragma unroll
      for (int k = 0; k < px.n; ++k) {
        if (!in.softmax)
          d[k] = k_class / static_cast<T>(channels) * difference<false>(a[k], g[k]).value;
        else if (in.labels && channels == 2)
          d[k] = mass[k] * difference<true>(a[k], g[k]).value;
        else
          d[k] = a[k].p * mass[k] - k_class * g[k];
        d[k] = k_pixel[k] == T(0) ? T(0) : k_pixel[k] * d[k];
      }
      store(px, in.other, b * in.other.batch + c * in.other.channel, d);
    }
  }
}

dim3 grid_of(const Layout& layout) {
  return dim3(static_cast<unsigned>(chunks_of(layout.batch, layout.pixels())),
              static_cast<unsigned>(layout.batch));
}
bool empty(const Layout& layout) { return layout.batch == 0 || layout.pixels() == 0; }
constexpr int64_t max_batch = 65535;  // gridDim.y

void check_batch(const Layout& layout) {
  if (layout.batch > max_batch)
    throw std::invalid_argument("logits has a batch of more than 65,535 on a CUDA device");
}

}  // namespace

size_t loss_workspace(const Array& logits, const Exec&) {
  int64_t pixels = 1;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  return static_cast<size_t>(logits.shape[0] * chunks_of(logits.shape[0], pixels) * warps * logits.shape[1] *
                             2) *
         sizeof(double);
}

bool region_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const RegionOptions& o, Reduction reduction, const Array& loss, const Array& sums,
                         void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Inputs in = make_inputs(logits, target, weight, mask, Array{}, Array{}, o.activation);
  check_batch(in.layout);
  const int64_t channels = in.layout.channels, first = channels > 1 && !o.include_background;
  const Formula formula = formula_of(o);
  double* partial = static_cast<double*>(workspace);
  double* sum = static_cast<double*>(sums.data);
  const dim3 grid = grid_of(in.layout);
  if (!empty(in.layout)) {
    if (logits.dtype == DType::f64)
      NOISYSEG_LAUNCH((region_sums<double>), grid, threads, 0, exec, in, formula, o.gamma, first, partial);
    else
      NOISYSEG_LAUNCH((region_sums<float>), grid, threads, 0, exec, in, formula, static_cast<float>(o.gamma),
                      first, partial);
  }
  if (in.layout.batch > 0)
    NOISYSEG_LAUNCH((region_add), dim3(static_cast<unsigned>(channels), grid.y), threads, 0, exec, partial,
                    empty(in.layout) ? int64_t{0} : static_cast<int64_t>(grid.x) * warps, sum);
  NOISYSEG_LAUNCH((region_value), 1, threads, 0, exec, sum, in.layout.batch, channels, first, o.per_image,
                  formula.ratio, o.eps, reduction, loss.data, loss.dtype == DType::f64);
  return true;
}

void region_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                          const RegionOptions& o, Reduction reduction, const Array& grad_loss,
                          const Array& sums, const Array& grad, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Inputs in = make_inputs(logits, target, weight, mask, grad, Array{}, o.activation);
  check_batch(in.layout);
  if (empty(in.layout)) return;
  const int64_t channels = in.layout.channels, first = channels > 1 && !o.include_background;
  const double count = static_cast<double>((o.per_image ? in.layout.batch : 1) * (channels - first));
  const double scale = reduction == Reduction::mean ? 1.0 / count : 1.0;
  GradLoss from{grad_loss.data, grad_loss.dtype == DType::f64, 0, 0};
  if (reduction == Reduction::none) {
    from.by_class = grad_loss.strides[grad_loss.rank - 1];
    if (o.per_image) from.by_image = grad_loss.strides[0];
  }
  const Formula formula = formula_of(o);
  const double* sum = static_cast<const double*>(sums.data);
  const size_t shared = static_cast<size_t>(2 * channels) * sizeof(double);
  if (logits.dtype == DType::f64)
    NOISYSEG_LAUNCH((region_grad<double>), grid_of(in.layout), threads, shared, exec, in, formula, o.gamma,
                    first, sum, o.eps, scale, from);
  else
    NOISYSEG_LAUNCH((region_grad<float>), grid_of(in.layout), threads, shared, exec, in, formula,
                    static_cast<float>(o.gamma), first, sum, o.eps, scale, from);
}

bool pixel_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const PixelOptions& o, Reduction reduction,
                        const Array& loss, const Array& sums, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const bool map = reduction == Reduction::none;
  const Inputs in = make_inputs(logits, target, weight, mask, map ? loss : Array{}, Array{}, o.activation);
  check_batch(in.layout);
  double* partial = static_cast<double*>(workspace);
  const dim3 grid = grid_of(in.layout);
  if (!empty(in.layout)) {
    if (logits.dtype == DType::f64)
      NOISYSEG_LAUNCH((pixel_sums<double>), grid, threads, 0, exec, in, ClassWeight(class_weight), map,
                      partial);
    else
      NOISYSEG_LAUNCH((pixel_sums<float>), grid, threads, 0, exec, in, ClassWeight(class_weight), map,
                      partial);
  }
  NOISYSEG_LAUNCH((pixel_value), 1, threads, 0, exec, partial,
                  empty(in.layout) ? int64_t{0} : static_cast<int64_t>(grid.x) * grid.y, reduction,
                  static_cast<double*>(sums.data), loss.data, loss.dtype == DType::f64);
  return true;
}

void pixel_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const Array& class_weight, const PixelOptions& o, Reduction reduction,
                         const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Inputs in = make_inputs(logits, target, weight, mask, grad,
                                reduction == Reduction::none ? grad_loss : Array{}, o.activation);
  check_batch(in.layout);
  if (empty(in.layout)) return;
  const double* sum = static_cast<const double*>(sums.data);
  if (logits.dtype == DType::f64)
    NOISYSEG_LAUNCH((pixel_grad<double>), grid_of(in.layout), threads, 0, exec, in, ClassWeight(class_weight),
                    sum, reduction, grad_loss.data, grad_loss.dtype == DType::f64, in.map);
  else
    NOISYSEG_LAUNCH((pixel_grad<float>), grid_of(in.layout), threads, 0, exec, in, ClassWeight(class_weight),
                    sum, reduction, grad_loss.data, grad_loss.dtype == DType::f64, in.map);
}

}  // namespace noisyseg::cuda
