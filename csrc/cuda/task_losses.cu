// Losses of several maps on CUDA: blocks and tiles as in planes.cuh. No kernel synchronises with the host.
//
// Bytes per pixel, fp32 logits and uncertainties, uint8 annotations of M raters: uncertainty-weighted loss
// forward 4 + 5 M read, backward as many read and 4 + 4 M written; the second reading of a tile's maps, once
// their mean is known, comes from the caches. Dual-task loss forward 9 read, backward 9 read, 8 written.
#include "cuda/planes.cuh"
#include "formulas/task_losses.h"
#include "noisyseg/task_losses.h"

namespace noisyseg::cuda {
namespace {

// sums (B, values) from partial sums (B, parts, values). Grid (values, B).
__global__ void __launch_bounds__(block_threads)
    add_parts(const double* partial, int64_t parts, double* sums) {
  const int64_t v = blockIdx.x, values = gridDim.x, b = blockIdx.y;
  double total = 0;
  for (int64_t i = threadIdx.x; i < parts; i += block_threads) total += partial[(b * parts + i) * values + v];
  total = sum_of_block(total);
  if (threadIdx.x == 0) sums[b * values + v] = total;
}

// An input and its direction, if there is one.
struct Source {
  Plane value, slope;
};

// This thread's wanted pixels of channel c, 0 for the others.
template <int n, class T>
__device__ inline void fetch(const Spots<n>& at, const bool* wanted, const Source& from, int64_t b, int64_t c,
                             T* out) {
  read_float(at, wanted, from.value, b * from.value.batch + c * from.value.channel, out);
}
template <int n>
__device__ inline void fetch(const Spots<n>& at, const bool* wanted, const Source& from, int64_t b, int64_t c,
                             Dual<double>* out) {
  double x[n], dx[n] = {};
  fetch(at, wanted, {from.value, {}}, b, c, x);
  if (from.slope) fetch(at, wanted, {from.slope, {}}, b, c, dx);
#pragma unroll
  for (int k = 0; k < n; ++k) out[k] = {x[k], dx[k]};
}

// Labels, integers other than 0 and 1 as NaN.
template <int n, class T>
__device__ inline void fetch_labels(const Spots<n>& at, const bool* wanted, const Plane& plane, int64_t b,
                                    int64_t c, T* out) {
  RealOf<T> y[n];
  read(at, wanted, plane, b * plane.batch + c * plane.channel, y);
  const bool integer = static_cast<int>(plane.dtype) < static_cast<int>(DType::f16);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const bool good = !integer || y[k] == RealOf<T>(0) || y[k] == RealOf<T>(1);
    out[k] = good ? T(y[k]) : T(static_cast<RealOf<T>>(NAN));
  }
}

// Which of the thread's pixels are in the mask.
template <class T, int n>
__device__ inline void read_mask(const Spots<n>& at, const Plane& mask, int64_t b, bool* keep) {
#pragma unroll
  for (int k = 0; k < n; ++k) keep[k] = at.inside[k];
  if (!mask) return;
  T x[n];
  read(at, at.inside, mask, b * mask.batch, x);
#pragma unroll
  for (int k = 0; k < n; ++k) keep[k] = keep[k] && x[k] != T(0);
}

template <int n>
__device__ inline void write_result(const Spots<n>& at, const Plane& plane, int64_t b, int64_t c,
                                    const Dual<double>* values) {
  double slopes[n];
#pragma unroll
  for (int k = 0; k < n; ++k) slopes[k] = values[k].slope;
  write_float(at, plane, b * plane.batch + c * plane.channel, slopes);
}
template <int n, class T>
__device__ inline void write_result(const Spots<n>& at, const Plane& plane, int64_t b, int64_t c,
                                    const T* values) {
  write_float(at, plane, b * plane.batch + c * plane.channel, values);
}

__device__ inline void set_float(void* data, bool fp64, int64_t i, double x) {
  if (fp64)
    static_cast<double*>(data)[i] = x;
  else
    static_cast<float*>(data)[i] = static_cast<float>(x);
}
__device__ inline void set_float(void* data, bool fp64, int64_t i, Dual<double> x) {
  set_float(data, fp64, i, x.slope);
}

template <class T>
__device__ inline Prediction<T> predict(T z) {
  return prediction(z, exp_(-abs_(z)));
}

// A weight that is no weight makes everything NaN.
NOISYSEG_FORMULA double weight_or_nan(const ImageWeights& raters, int64_t b, int64_t m) {
  const double r = image_weight(raters, b, m);
  return r >= 0 ? r : static_cast<double>(NAN);
}

// ---- uncertainty-weighted loss --------------------------------------------------------------------

struct UncertaintyPlanes {
  Source logits, uncertainty;
  Plane annotations, mask, grad_logits, grad_uncertainty;
  ImageWeights raters;
  Layout layout;
  int64_t maps;
  bool direction, fp64;
};

UncertaintyPlanes make_planes(const UncertaintyInputs& in, const Array& grad_logits,
                              const Array& grad_uncertainty) {
  const Array arrays[8] = {in.logits,     in.annotations,     in.uncertainty, in.mask,
                           in.logits_dot, in.uncertainty_dot, grad_logits,    grad_uncertainty};
  Plane planes[8];
  UncertaintyPlanes p;
  p.layout = make_layout(arrays, planes, 8);
  p.logits = {planes[0], planes[4]}, p.uncertainty = {planes[2], planes[5]};
  p.annotations = planes[1], p.mask = planes[3], p.grad_logits = planes[6], p.grad_uncertainty = planes[7];
  p.raters = image_weights(in.raters);
  p.maps = in.annotations.shape[1];
  p.direction = in.direction();
  p.fp64 = in.logits.dtype == DType::f64 || in.uncertainty.dtype == DType::f64;
  if (p.maps > max_raters) throw std::invalid_argument("annotations has more than 512 maps");
  return p;
}

// At least one block: left alone, ptxas 13.0 aims at 64 registers for some architectures and spills.

// Partial sums of each warp, which keeps its own in memory: partial (B, blocks, warps, sums). Grid (blocks,
// B).
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    uncertainty_parts(UncertaintyPlanes in, bool binary, double* partial) {
  using Sum = SumOf<T>;
  constexpr int n = pixels_per_thread<T>;
  const int64_t b = blockIdx.y, values = by_rater + 2 * in.maps;
  const bool first = threadIdx.x % 32 == 0;
  Sum* mine = reinterpret_cast<Sum*>(partial) +
              ((b * gridDim.x + blockIdx.x) * block_warps + threadIdx.x / 32) * values;
  if (first)
    for (int64_t v = 0; v < values; ++v) mine[v] = Sum(0);
  double mass = 0;
  for (int64_t m = 0; m < in.maps; ++m) mass += weight_or_nan(in.raters, b, m);
  const double share = mass == 0 ? 0.0 : 1 / mass;
  Sum total[by_rater];
  for (int v = 0; v < by_rater; ++v) total[v] = Sum(0);
  const int64_t tiles = (in.layout.pixels() + pixels_per_tile<T> - 1) / pixels_per_tile<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Spots<n> at = spots_of<n>(in.layout, tile);
    bool keep[n];
    read_mask<RealOf<T>>(at, in.mask, b, keep);
    T z[n], p[n], q[n], nll_p[n], nll_q[n], mean[n];
    fetch(at, keep, in.logits, b, 0, z);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T e = exp_(-abs_(z[k]));
      const Prediction<T> a = prediction(z[k], e);
      const T log_sum = log_sum_of(e, max_(a.p, a.q));
      p[k] = a.p, q[k] = a.q, mean[k] = T(0);
      nll_p[k] = minus_log_p(z[k], log_sum), nll_q[k] = minus_log_q(z[k], log_sum);
      if (keep[k]) total[in_mask] += Sum(1), total[squares] += Sum(a.p * a.p);
    }
    for (int64_t m = 0; m < in.maps; ++m) {
      const double weight = image_weight(in.raters, b, m);
      if (weight == 0) continue;
      T y[n], s[n];
      fetch_labels(at, keep, in.annotations, b, m, y);
      fetch(at, keep, in.uncertainty, b, m, s);
      T ce = T(0), sigma = T(0), off = T(0), square = T(0);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (!keep[k]) continue;
        const T w = exp_(-s[k]), d = apart(p[k], q[k], y[k], T(1) - y[k]);
        ce += w * soft_cross_entropy(nll_p[k], nll_q[k], y[k]);
        sigma += s[k];
        off += w * d * d;
        square += y[k] * y[k];
        mean[k] += number<T>(weight) * calibration_of(y[k], s[k]);
      }
      total[weighted_ce] += Sum(weight) * Sum(ce);
      total[sigmas] += Sum(weight) * Sum(sigma);
      off = sum_of_warp(off), square = sum_of_warp(square);
      if (first) mine[by_rater + 2 * m] += Sum(off), mine[by_rater + 2 * m + 1] += Sum(square);
    }
#pragma unroll
    for (int k = 0; k < n; ++k) mean[k] = number<T>(share) * mean[k];
    for (int64_t m = 0; m < in.maps; ++m) {
      const double weight = image_weight(in.raters, b, m);
      if (weight == 0) continue;
      T y[n], s[n], spread = T(0);
      fetch_labels(at, keep, in.annotations, b, m, y);
      fetch(at, keep, in.uncertainty, b, m, s);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T d = calibration_of(y[k], s[k]) - mean[k];
        spread += keep[k] ? d * d : T(0);
      }
      total[variance] += Sum(weight * share) * Sum(spread);
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (!keep[k]) continue;
      total[calibration] += Sum(mean[k]);
      if (!in.direction) total[entropy] += Sum(entropy_of(mean[k], binary));
    }
  }
  for (int v = 0; v < by_rater; ++v) {
    const Sum whole = sum_of_warp(total[v]);
    if (first) mine[v] = whole;
  }
}

// Terms and scores from the sums. One block.
template <class S>
__global__ void __launch_bounds__(block_threads, 1)
    uncertainty_value(const S* sums, ImageWeights raters, UncertaintyOptions o, int64_t batch, int64_t maps,
                      void* terms, void* scores, bool fp64) {
  const int64_t values = by_rater + 2 * maps;
  S total[4] = {S(0), S(0), S(0), S(0)};
  for (int64_t b = threadIdx.x; b < batch; b += block_threads) {
    S of_image[4];
    uncertainty_terms(sums + b * values, raters, b, maps, o, of_image);
    double spoilt = 0;  // NaN if a rater's weight is no weight
    for (int64_t m = 0; m < maps; ++m) spoilt += 0 * weight_or_nan(raters, b, m);
    for (int t = 0; t < 4; ++t) {
      of_image[t] += S(spoilt);
      total[t] += of_image[t];
      if (o.reduction == TaskReduction::image) set_float(terms, fp64, t * batch + b, of_image[t]);
    }
    if (scores) {
      double plain[by_rater];
      for (int v = 0; v < by_rater; ++v) plain[v] = value_of(sums[b * values + v]);
      set_float(scores, fp64, b, confidence_of(plain, o.binary_entropy));
      set_float(scores, fp64, batch + b, agreement_of(plain));
    }
  }
  if (o.reduction == TaskReduction::image) return;
  const double count = o.reduction == TaskReduction::mean && batch > 0 ? static_cast<double>(batch) : 1.0;
  for (int t = 0; t < 4; ++t) {
    const S whole = sum_of_block(total[t]);
    if (threadIdx.x == 0) set_float(terms, fp64, t, whole * S(1 / count));
  }
}

// Grid (blocks, B); dynamic shared memory: what uncertainty_slopes gives.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    uncertainty_grad(UncertaintyPlanes in, UncertaintyOptions o, GradTerms grad_terms, const SumOf<T>* sums) {
  using Sum = SumOf<T>;
  constexpr int n = pixels_per_thread<T>;
  NOISYSEG_SHARED(Sum, shared);  // four slopes, then `dice` of each rater
  const int64_t b = blockIdx.y;
  if (threadIdx.x == 0) {
    const UncertaintySlopes<Sum> slopes =
        uncertainty_slopes(sums + b * (by_rater + 2 * in.maps), in.raters, b, in.maps, o, grad_terms,
                           static_cast<double>(in.layout.batch), shared + 4);
    shared[0] = slopes.ce, shared[1] = slopes.constant, shared[2] = slopes.consistency,
    shared[3] = slopes.shrink;
  }
  __syncthreads();
  const T by_ce = number<T>(shared[0]), constant = number<T>(shared[1]);
  const T consistency = number<T>(shared[2]), shrink = number<T>(shared[3]);
  const double mass = raters_mass(in.raters, b, in.maps);
  const T share = number<T>(mass == 0 ? 0.0 : 1 / mass);
  const int64_t tiles = (in.layout.pixels() + pixels_per_tile<T> - 1) / pixels_per_tile<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Spots<n> at = spots_of<n>(in.layout, tile);
    bool keep[n];
    read_mask<RealOf<T>>(at, in.mask, b, keep);
    T p[n], q[n], nll_p[n], nll_q[n], mean[n], pull[n], lean[n], out[n];
    fetch(at, keep, in.logits, b, 0, out);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T e = exp_(-abs_(out[k]));
      const Prediction<T> a = prediction(out[k], e);
      const T log_sum = log_sum_of(e, max_(a.p, a.q));
      p[k] = a.p, q[k] = a.q, mean[k] = pull[k] = lean[k] = T(0);
      nll_p[k] = minus_log_p(out[k], log_sum), nll_q[k] = minus_log_q(out[k], log_sum);
    }
    if (in.grad_uncertainty)
      for (int64_t m = 0; m < in.maps; ++m) {
        const double weight = image_weight(in.raters, b, m);
        if (weight == 0) continue;
        T y[n], s[n];
        fetch_labels(at, keep, in.annotations, b, m, y);
        fetch(at, keep, in.uncertainty, b, m, s);
#pragma unroll
        for (int k = 0; k < n; ++k) mean[k] += number<T>(weight) * share * calibration_of(y[k], s[k]);
      }
    for (int64_t m = 0; m < in.maps; ++m) {
      const double weight = image_weight(in.raters, b, m);
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = T(0);
      if (weight != 0) {
        const T r = number<T>(weight), by_dice = number<T>(shared[4 + m]);
        T y[n], s[n];
        fetch_labels(at, keep, in.annotations, b, m, y);
        fetch(at, keep, in.uncertainty, b, m, s);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const T w = exp_(-s[k]), d = apart(p[k], q[k], y[k], T(1) - y[k]);
          pull[k] += r * (w * d);
          lean[k] += by_dice * (w * d);
          if (keep[k])
            out[k] = uncertainty_slope(r, by_ce, constant, consistency, by_dice, w, d,
                                       soft_cross_entropy(nll_p[k], nll_q[k], y[k]),
                                       calibration_of(y[k], s[k]) - mean[k], calibration_slope(y[k], s[k]));
        }
      }
      if (in.grad_uncertainty) write_result(at, in.grad_uncertainty, b, m, out);
    }
    if (!in.grad_logits) continue;
#pragma unroll
    for (int k = 0; k < n; ++k)
      out[k] = keep[k] ? uncertainty_logit_slope(p[k], q[k], pull[k], lean[k], by_ce, shrink) : T(0);
    write_result(at, in.grad_logits, b, 0, out);
  }
}

// ---- dual-task loss -------------------------------------------------------------------------------

struct DualTaskPlanes {
  Source logits, sdf;
  Plane target, mask, grad_logits, grad_sdf;
  ImageWeights labelled;
  Layout layout;
  bool direction, fp64;
};

DualTaskPlanes make_planes(const DualTaskInputs& in, const Array& grad_logits, const Array& grad_sdf) {
  const Array arrays[8] = {in.logits,     in.target,  in.sdf,      in.mask,
                           in.logits_dot, in.sdf_dot, grad_logits, grad_sdf};
  Plane planes[8];
  DualTaskPlanes p;
  p.layout = make_layout(arrays, planes, 8);
  p.logits = {planes[0], planes[4]}, p.sdf = {planes[2], planes[5]};
  p.target = planes[1], p.mask = planes[3], p.grad_logits = planes[6], p.grad_sdf = planes[7];
  p.labelled = image_weights(in.labelled);
  p.direction = in.direction();
  p.fp64 = in.logits.dtype == DType::f64 || in.sdf.dtype == DType::f64;
  return p;
}

// p - t of the consistency term: the side that learns nothing from it has no derivative
template <class T>
__device__ inline T off_transform(Routing routing, Prediction<T> a, Prediction<T> t) {
  if (routing == Routing::logits) t.p = frozen(t.p), t.q = frozen(t.q);
  if (routing == Routing::sdf) a.p = frozen(a.p), a.q = frozen(a.q);
  return apart(a.p, a.q, t.p, t.q);
}

// Partial sums of each warp: partial (B, blocks, warps, sums). Grid (blocks, B).
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    dual_task_parts(DualTaskPlanes in, DualTaskOptions o, double* partial) {
  using Sum = SumOf<T>;
  constexpr int n = pixels_per_thread<T>;
  const int64_t b = blockIdx.y;
  const bool known = is_labelled(in.labelled, o.labelled_count, b);
  const T k_minus = number<T>(-o.k);
  Sum total[dual_task_sums];
  for (int v = 0; v < dual_task_sums; ++v) total[v] = Sum(0);
  const int64_t tiles = (in.layout.pixels() + pixels_per_tile<T> - 1) / pixels_per_tile<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Spots<n> at = spots_of<n>(in.layout, tile);
    bool keep[n];
    read_mask<RealOf<T>>(at, in.mask, b, keep);
    T z[n], d[n], y[n] = {};
    fetch(at, keep, in.logits, b, 0, z);
    fetch(at, keep, in.sdf, b, 0, d);
    if (known) fetch_labels(at, keep, in.target, b, 0, y);
    T part[dual_task_sums];
    for (int v = 0; v < dual_task_sums; ++v) part[v] = T(0);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (!keep[k]) continue;
      const T e = exp_(-abs_(z[k]));
      const Prediction<T> a = prediction(z[k], e), t = predict(k_minus * d[k]);
      const T off = off_transform(o.routing, a, t);
      part[all_pixels] += T(1);
      part[mismatch] += off * off;
      if (!known) continue;
      const T log_sum = log_sum_of(e, max_(a.p, a.q));
      part[pixels] += T(1);
      part[ce] += soft_cross_entropy(minus_log_p(z[k], log_sum), minus_log_q(z[k], log_sum), y[k]);
      part[py] += a.p * y[k], part[pp] += a.p * a.p;
      part[ty] += t.p * y[k], part[tt] += t.p * t.p;
      part[yy] += y[k] * y[k];
    }
#pragma unroll
    for (int v = 0; v < dual_task_sums; ++v) total[v] += Sum(part[v]);
  }
  Sum* mine = reinterpret_cast<Sum*>(partial) +
              ((b * gridDim.x + blockIdx.x) * block_warps + threadIdx.x / 32) * dual_task_sums;
#pragma unroll
  for (int v = 0; v < dual_task_sums; ++v) {
    const Sum whole = sum_of_warp(total[v]);
    if (threadIdx.x % 32 == 0) mine[v] = whole;
  }
}

// Terms from the sums, which become the batch's if they run over it. One block.
template <class S>
__global__ void __launch_bounds__(block_threads, 1)
    dual_task_value(S* sums, ImageWeights labelled, DualTaskOptions o, int64_t batch, void* terms,
                    bool fp64) {
  __shared__ double whole_batch[2 * dual_task_sums];
  S* whole = reinterpret_cast<S*>(whole_batch);
  double known = 0;
  for (int64_t b = threadIdx.x; b < batch; b += block_threads)
    known += is_labelled(labelled, o.labelled_count, b);
  known = sum_of_block(known);
  if (threadIdx.x == 0) whole[labelled_images] = S(known);
  if (!o.per_image)
    for (int v = 0; v < labelled_images; ++v) {
      S x = S(0);
      for (int64_t b = threadIdx.x; b < batch; b += block_threads) x += sums[b * dual_task_sums + v];
      x = sum_of_block(x);
      if (threadIdx.x == 0) whole[v] = x;
    }
  __syncthreads();
  S total[3] = {S(0), S(0), S(0)};
  for (int64_t b = threadIdx.x; b < batch; b += block_threads) {
    S* mine = sums + b * dual_task_sums;
    for (int v = o.per_image ? labelled_images : 0; v < dual_task_sums; ++v) mine[v] = whole[v];
    S of_image[3];
    dual_task_terms(mine, o, of_image);
    for (int t = 0; t < 3; ++t) {
      if (o.per_image || b == 0) total[t] += of_image[t];
      if (o.reduction == TaskReduction::image) set_float(terms, fp64, t * batch + b, of_image[t]);
    }
  }
  if (o.reduction == TaskReduction::image) return;
  for (int t = 0; t < 3; ++t) {
    const S sum = sum_of_block(total[t]);
    const double items = !o.per_image ? 1.0
                         : t < 2      ? value_of(whole[labelled_images])
                                      : static_cast<double>(batch);
    if (threadIdx.x == 0) set_float(terms, fp64, t, sum * S(items == 0 ? 0.0 : 1 / items));
  }
}

// Grid (blocks, B).
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    dual_task_grad(DualTaskPlanes in, DualTaskOptions o, GradTerms grad_terms, const SumOf<T>* sums) {
  using Sum = SumOf<T>;
  constexpr int n = pixels_per_thread<T>;
  const int64_t b = blockIdx.y;
  const bool known = is_labelled(in.labelled, o.labelled_count, b);
  const DualTaskSlopes<Sum> slopes =
      dual_task_slopes(sums + b * dual_task_sums, o, grad_terms, b, static_cast<double>(in.layout.batch));
  const T none = T(0), toward = number<T>(slopes.consistency);
  const T by_ce = known ? number<T>(slopes.ce) : none;
  const T seg_y = known ? number<T>(slopes.seg_y) : none, seg_p = known ? number<T>(slopes.seg_p) : none;
  const T mask_y = known ? number<T>(slopes.mask_y) : none, mask_t = known ? number<T>(slopes.mask_t) : none;
  const T to_logits = number<T>(routing_to_logits(o.routing)) * toward;
  const T to_sdf = number<T>(routing_to_sdf(o.routing)) * toward;
  const T k_plus = number<T>(o.k);
  const int64_t tiles = (in.layout.pixels() + pixels_per_tile<T> - 1) / pixels_per_tile<T>;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Spots<n> at = spots_of<n>(in.layout, tile);
    bool keep[n];
    read_mask<RealOf<T>>(at, in.mask, b, keep);
    T z[n], d[n], y[n] = {};
    fetch(at, keep, in.logits, b, 0, z);
    fetch(at, keep, in.sdf, b, 0, d);
    if (known) fetch_labels(at, keep, in.target, b, 0, y);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const Prediction<T> a = predict(z[k]), t = predict(-k_plus * d[k]);
      const T off = off_transform(o.routing, a, t);
      z[k] = keep[k] ? dual_task_logit_slope(a.p, a.q, y[k], apart(a.p, a.q, y[k], T(1) - y[k]), off, by_ce,
                                             seg_y, seg_p, to_logits)
                     : none;
      d[k] = keep[k] ? dual_task_sdf_slope(t.p, t.q, y[k], off, mask_y, mask_t, to_sdf, k_plus) : none;
    }
    if (in.grad_logits) write_result(at, in.grad_logits, b, 0, z);
    if (in.grad_sdf) write_result(at, in.grad_sdf, b, 0, d);
  }
}

// ---- launches -------------------------------------------------------------------------------------

template <class T>
dim3 grid_of(const Layout& layout) {
  if (layout.batch > most_images)
    throw std::invalid_argument("logits has a batch of more than 65,535 on a CUDA device");
  return dim3(static_cast<unsigned>(blocks_of_image<T>(layout.batch, layout.pixels())),
              static_cast<unsigned>(layout.batch));
}
bool empty(const Layout& layout) { return layout.batch == 0 || layout.pixels() == 0; }

// Runs f(T) with the number type to compute with.
template <class F>
void with_number(bool direction, bool fp64, const F& f) {
  if (direction)
    f(Dual<double>{});
  else if (fp64)
    f(double{});
  else
    f(float{});
}

// Bytes for `values` partial sums of each warp.
size_t parts_bytes(const Array& logits, bool direction, bool fp64, int64_t values) {
  int64_t pixels = 1, blocks = 0;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  with_number(direction, fp64,
              [&](auto x) { blocks = blocks_of_image<decltype(x)>(logits.shape[0], pixels); });
  return static_cast<size_t>(logits.shape[0] * blocks * block_warps * values * (direction ? 2 : 1)) *
         sizeof(double);
}

void add_all(const Layout& layout, int64_t doubles, unsigned blocks, const void* partial, const Array& sums,
             const Exec& exec) {
  if (layout.batch == 0) return;
  NOISYSEG_LAUNCH((add_parts), dim3(static_cast<unsigned>(doubles), static_cast<unsigned>(layout.batch)),
                  block_threads, 0, exec, static_cast<const double*>(partial),
                  empty(layout) ? int64_t{0} : static_cast<int64_t>(blocks) * block_warps,
                  static_cast<double*>(sums.data));
}

}  // namespace

size_t uncertainty_workspace(const UncertaintyInputs& in, const Exec&) {
  return parts_bytes(in.logits, in.direction(),
                     in.logits.dtype == DType::f64 || in.uncertainty.dtype == DType::f64,
                     uncertainty_sums(in.annotations.shape[1]));
}

TaskFault uncertainty_forward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                              const Array& terms, const Array& scores, const Array& sums, void* workspace,
                              const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const UncertaintyPlanes p = make_planes(in, Array{}, Array{});
  with_number(p.direction, p.fp64, [&](auto number) {
    using T = decltype(number);
    using Sum = SumOf<T>;
    const dim3 grid = grid_of<T>(p.layout);
    if (!empty(p.layout))
      NOISYSEG_LAUNCH((uncertainty_parts<T>), grid, block_threads, 0, exec, p, options.binary_entropy,
                      static_cast<double*>(workspace));
    add_all(p.layout, uncertainty_sums(p.maps) * (p.direction ? 2 : 1), grid.x, workspace, sums, exec);
    NOISYSEG_LAUNCH((uncertainty_value<Sum>), 1, block_threads, 0, exec, static_cast<const Sum*>(sums.data),
                    p.raters, options, p.layout.batch, p.maps, terms.data, scores.data,
                    terms.dtype == DType::f64);
  });
  return TaskFault::none;
}

void uncertainty_backward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                          const Array& grad_terms, const Array& grad_terms_dot, const Array& sums,
                          const Array& grad_logits, const Array& grad_uncertainty, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const UncertaintyPlanes p = make_planes(in, grad_logits, grad_uncertainty);
  if (empty(p.layout)) return;
  with_number(p.direction, p.fp64, [&](auto number) {
    using T = decltype(number);
    using Sum = SumOf<T>;
    NOISYSEG_LAUNCH((uncertainty_grad<T>), grid_of<T>(p.layout), block_threads,
                    static_cast<size_t>(4 + p.maps) * sizeof(Sum), exec, p, options,
                    grad_terms_of(grad_terms, grad_terms_dot), static_cast<const Sum*>(sums.data));
  });
}

size_t dual_task_workspace(const DualTaskInputs& in, const Exec&) {
  return parts_bytes(in.logits, in.direction(), in.logits.dtype == DType::f64 || in.sdf.dtype == DType::f64,
                     dual_task_sums);
}

TaskFault dual_task_forward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& terms,
                            const Array& sums, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const DualTaskPlanes p = make_planes(in, Array{}, Array{});
  with_number(p.direction, p.fp64, [&](auto number) {
    using T = decltype(number);
    using Sum = SumOf<T>;
    const dim3 grid = grid_of<T>(p.layout);
    if (!empty(p.layout))
      NOISYSEG_LAUNCH((dual_task_parts<T>), grid, block_threads, 0, exec, p, options,
                      static_cast<double*>(workspace));
    add_all(p.layout, dual_task_sums * (p.direction ? 2 : 1), grid.x, workspace, sums, exec);
    NOISYSEG_LAUNCH((dual_task_value<Sum>), 1, block_threads, 0, exec, static_cast<Sum*>(sums.data),
                    p.labelled, options, p.layout.batch, terms.data, terms.dtype == DType::f64);
  });
  return TaskFault::none;
}

void dual_task_backward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& grad_terms,
                        const Array& grad_terms_dot, const Array& sums, const Array& grad_logits,
                        const Array& grad_sdf, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const DualTaskPlanes p = make_planes(in, grad_logits, grad_sdf);
  if (empty(p.layout)) return;
  with_number(p.direction, p.fp64, [&](auto number) {
    using T = decltype(number);
    using Sum = SumOf<T>;
    NOISYSEG_LAUNCH((dual_task_grad<T>), grid_of<T>(p.layout), block_threads, 0, exec, p, options,
                    grad_terms_of(grad_terms, grad_terms_dot), static_cast<const Sum*>(sums.data));
  });
}

}  // namespace noisyseg::cuda
