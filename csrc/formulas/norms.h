// Normalisation and activation: what happens to one pixel, and to the sums of a channel.
#pragma once
#include "formulas/dtype.h"
#include "noisyseg/norms.h"

namespace noisyseg::formulas {

// x as (B, C, P), channels first or last.
struct NormShape {
  int64_t batch = 0, channels = 0, pixels = 0, groups = 0;
  bool last = false, over_batch = false;
  NOISYSEG_HOST_DEVICE int64_t statistics() const { return over_batch ? channels : batch * groups; }
  NOISYSEG_HOST_DEVICE int64_t per_group() const { return over_batch ? 1 : channels / groups; }
  NOISYSEG_HOST_DEVICE int64_t images() const { return over_batch ? batch : 1; }  // that share statistics
  NOISYSEG_HOST_DEVICE double count() const {
    return static_cast<double>(images()) * static_cast<double>(per_group()) * static_cast<double>(pixels);
  }
  NOISYSEG_HOST_DEVICE int64_t statistic_of(int64_t b, int64_t c) const {
    return over_batch ? c : b * groups + c / per_group();
  }
  NOISYSEG_HOST_DEVICE int64_t offset(int64_t b, int64_t c, int64_t q) const {
    return b * channels * pixels + (last ? q * channels + c : c * pixels + q);
  }
};

static inline NormShape norm_shape(const Array& x, const NormOptions& o) {
  NormShape s;
  s.batch = x.shape[0], s.channels = x.shape[1], s.pixels = 1;
  for (int axis = 2; axis < x.rank; ++axis) s.pixels *= x.shape[axis];
  s.over_batch = o.over_batch, s.groups = o.over_batch ? s.channels : o.groups;
  if (s.groups < 1 || s.channels % s.groups != 0)
    throw std::invalid_argument("the number of channels must be a multiple of the groups");
  bool first = true, last = true;
  int64_t step = 1;
  for (int axis = x.rank - 1; axis >= 1; --axis) {
    first = first && (x.shape[axis] == 1 || x.strides[axis] == step);
    step *= x.shape[axis];
  }
  int64_t outer = s.channels;
  for (int axis = x.rank - 1; axis >= 2; --axis) {
    last = last && (x.shape[axis] == 1 || x.strides[axis] == outer);
    outer *= x.shape[axis];
  }
  last = last && (s.channels == 1 || x.strides[1] == 1);
  if ((!first && !last) || (s.batch > 1 && x.strides[0] != step))
    throw std::invalid_argument("x must be contiguous or channels_last");
  s.last = !first;
  return s;
}

// A vector over the channels, one value for all, or nothing.
struct NormVector {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t step = 0;
};
static inline NormVector norm_vector(const Array& a) {
  return {a.data, a.dtype, a.rank > 0 && a.shape[0] > 1 ? a.strides[0] : 0};
}
NOISYSEG_FORMULA double value_at(const NormVector& v, int64_t c, double otherwise) {
  if (!v.data) return otherwise;
  const int64_t i = c * v.step;
  switch (v.dtype) {
    case DType::f64: return static_cast<const double*>(v.data)[i];
    case DType::f16: return half_to_float(static_cast<const Half*>(v.data)[i]);
    case DType::bf16: return bfloat16_to_float(static_cast<const BFloat16*>(v.data)[i]);
    default: return static_cast<const float*>(v.data)[i];
  }
}
NOISYSEG_FORMULA void set_value(const NormVector& v, int64_t c, double x) {
  if (v.dtype == DType::f64)
    static_cast<double*>(const_cast<void*>(v.data))[c * v.step] = x;
  else
    static_cast<float*>(const_cast<void*>(v.data))[c * v.step] = static_cast<float>(x);
}

struct NormParameters {
  NormVector weight, weight_dot, bias, bias_dot, slope, slope_dot;
  double constant_slope = 1;
};
static inline NormParameters norm_parameters(const NormInputs& in, const NormOptions& o) {
  return {norm_vector(in.weight),
          norm_vector(in.weight_dot),
          norm_vector(in.bias),
          norm_vector(in.bias_dot),
          norm_vector(in.slope),
          norm_vector(in.slope_dot),
          o.slope};
}

// The moments of n pixels: mean, sum of squared deviations, and with a direction t its sum and the sum of
// deviation times t.
struct NormMoments {
  double mean, squares, sum_dot, product;
};
// From sums over d = x - shift.
NOISYSEG_FORMULA NormMoments moments_from(double n, double shift, double d, double dd, double t, double dt) {
  const double off = d / n;
  return {shift + off, dd - d * off, t, dt - off * t};
}

// The statistics from the group's sums; biased variance as everywhere.
NOISYSEG_FORMULA void statistics_from(double n, const NormMoments& whole, double eps, double* stats) {
  stats[0] = whole.mean;
  stats[1] = 1 / sqrt(whole.squares / n + eps);
  stats[2] = whole.sum_dot / n;
  stats[3] = whole.product / n;
}
// torch's update: the unbiased variance goes into the running one.
NOISYSEG_FORMULA void update_running(const NormVector& mean, const NormVector& var, int64_t c, double n,
                                     const NormMoments& whole, double momentum) {
  if (mean.data) set_value(mean, c, (1 - momentum) * value_at(mean, c, 0) + momentum * whole.mean);
  if (var.data)
    set_value(var, c, (1 - momentum) * value_at(var, c, 0) + momentum * (whole.squares / (n - 1)));
}

// y = act(scale (x - mean) + shift), and along x_dot
// scale (x_dot - mean_dot) + bend (x - mean) + shift_dot before the activation. The mean in T is off by its
// rounding, which the shifts take back; under an infinite weight they do not, or all would be NaN.
template <class T>
struct NormCoefficients {
  T mean, mean_dot, scale, bend, shift, shift_dot, slope, slope_dot;
};
constexpr int norm_coefficients = 8;

template <class T>
NOISYSEG_FORMULA NormCoefficients<T> coefficients_of(const double* stats, const NormParameters& p,
                                                     int64_t c) {
  const double weight = value_at(p.weight, c, 1), r = stats[1], scale = weight * r;
  const double bend = value_at(p.weight_dot, c, 0) * r - scale * r * r * stats[3];
  const T mean = static_cast<T>(stats[0]), mean_dot = static_cast<T>(stats[2]);
  const double off = static_cast<double>(mean) - stats[0], off_dot = static_cast<double>(mean_dot) - stats[2];
  const bool finite = scale - scale == 0;
  return {mean,
          mean_dot,
          static_cast<T>(scale),
          static_cast<T>(bend),
          static_cast<T>(value_at(p.bias, c, 0) + (finite ? scale * off : 0)),
          static_cast<T>(value_at(p.bias_dot, c, 0) + (finite ? bend * off + scale * off_dot : 0)),
          static_cast<T>(value_at(p.slope, c, p.constant_slope)),
          static_cast<T>(value_at(p.slope_dot, c, 0))};
}

// The derivative at 0 is the negative side's, as torch has it. A slope of 0 is ReLU: -inf gives 0, NaN stays.
template <class T>
NOISYSEG_FORMULA T activate(T v, T slope) {
  return v > T(0) ? v : slope * v;
}
template <class T>
NOISYSEG_FORMULA T relu(T v) {
  return v < T(0) ? T(0) : v;
}

// Gradient with respect to x: scale g - constant - linear (x - mean), g the one before the activation; from
// the sums over the group of weight g and of weight g (x - mean), with the mean as T has it.
template <class T>
struct NormGradient {
  T mean, scale, shift, slope, constant, linear;
};
constexpr int norm_grad_sums = 3;  // g, g (x - mean), and grad_y times the activation's negative input

template <class T>
NOISYSEG_FORMULA NormGradient<T> gradient_of(const double* stats, const NormParameters& p, int64_t c,
                                             const double* projections) {
  const NormCoefficients<T> k = coefficients_of<T>(stats, p, c);
  const double linear = projections[1], off = static_cast<double>(k.mean) - stats[0];
  return {k.mean,
          k.scale,
          k.shift,
          k.slope,
          static_cast<T>(projections[0] + linear * off),
          static_cast<T>(linear)};
}

}  // namespace noisyseg::formulas
