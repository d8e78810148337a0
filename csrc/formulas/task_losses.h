// The losses of several maps, one pixel and one image at a time: the only place where their formulas stand in
// C++. Every formula also runs on dual numbers. UMA-Net: Wang et al. 2023, eq. 1-8; DTML: Zhang and Zhang
// 2021.
#pragma once
#include "formulas/dtype.h"
#include "formulas/dual.h"
#include "formulas/losses.h"
#include "noisyseg/task_losses.h"

namespace noisyseg::formulas {

// The number that sums of T are taken in, and T without its derivative.
template <class T>
struct NumberTraits {
  using Sum = double;
  using Real = T;
};
template <class T>
struct NumberTraits<Dual<T>> {
  using Sum = Dual<double>;
  using Real = T;
};
template <class T>
using SumOf = typename NumberTraits<T>::Sum;
template <class T>
using RealOf = typename NumberTraits<T>::Real;

// A number as another kind of number; `frozen` as a constant.
template <class T>
NOISYSEG_FORMULA T number(double x) {
  return static_cast<T>(x);
}
template <class T>
NOISYSEG_FORMULA T number(Dual<double> x) {
  return x;
}
template <class T>
NOISYSEG_FORMULA T frozen(T x) {
  return x;
}
template <class T>
NOISYSEG_FORMULA Dual<T> frozen(Dual<T> x) {
  return {x.value, T(0)};
}
NOISYSEG_FORMULA double value_of(double x) { return x; }
NOISYSEG_FORMULA double value_of(Dual<double> x) { return x.value; }

// One number for each image, or each image and map, of any type.
struct ImageWeights {
  const char* data;
  DType dtype;
  int64_t image, map;  // strides
};
NOISYSEG_FORMULA ImageWeights image_weights(const Array& a) {
  return {static_cast<const char*>(a.data), a.dtype, a.data ? a.strides[0] : 0,
          a.rank > 1 ? a.strides[1] : 0};
}
NOISYSEG_FORMULA double image_weight(const ImageWeights& w, int64_t b, int64_t m) {
  double x = 1;
  if (!w.data) return x;
  const int64_t at = b * w.image + m * w.map;
#define CASE(From) x = to_real<double>(reinterpret_cast<const From*>(w.data)[at]);
  NOISYSEG_DTYPE_CASES(w.dtype, CASE)
#undef CASE
  return x;
}

// The gradient with respect to the terms, and its derivative.
struct GradTerms {
  const void *value, *slope;
  bool value_fp64, slope_fp64;
  int64_t value_step[2], slope_step[2];  // by term, by image
};
NOISYSEG_FORMULA GradTerms grad_terms_of(const Array& a, const Array& dot) {
  return {a.data,
          dot.data,
          a.dtype == DType::f64,
          dot.dtype == DType::f64,
          {a.strides[0], a.rank > 1 ? a.strides[1] : 0},
          {dot.strides[0], dot.rank > 1 ? dot.strides[1] : 0}};
}
NOISYSEG_FORMULA double float_at(const void* data, bool fp64, int64_t at) {
  return fp64 ? static_cast<const double*>(data)[at]
              : static_cast<double>(static_cast<const float*>(data)[at]);
}
NOISYSEG_FORMULA void grad_term(const GradTerms& g, int term, int64_t b, double& out) {
  out = float_at(g.value, g.value_fp64, term * g.value_step[0] + b * g.value_step[1]);
}
NOISYSEG_FORMULA void grad_term(const GradTerms& g, int term, int64_t b, Dual<double>& out) {
  out.value = float_at(g.value, g.value_fp64, term * g.value_step[0] + b * g.value_step[1]);
  out.slope = g.slope ? float_at(g.slope, g.slope_fp64, term * g.slope_step[0] + b * g.slope_step[1]) : 0.0;
}

// ---- a pixel's prediction -------------------------------------------------------------------------

// p = sigmoid(z) and q = 1 - p to full relative accuracy, from e = e^-|z|.
template <class T>
struct Prediction {
  T p, q;
};
template <class T>
NOISYSEG_FORMULA Prediction<T> prediction(T z, T e) {
  const T larger = T(1) / (T(1) + e), smaller = e * larger;
  return {z >= T(0) ? larger : smaller, z >= T(0) ? smaller : larger};
}
// ln(1 + e) as log1p_ has it, sharing the division: larger = 1 / (1 + e) is the larger one of p and q.
template <class T>
NOISYSEG_FORMULA T log_sum_of(T e, T larger) {
  const T u = T(1) + e;
  return log_(u) - ((u - T(1)) - e) * larger;
}
// -ln p and -ln q, from log_sum = ln(1 + e)
template <class T>
NOISYSEG_FORMULA T minus_log_p(T z, T log_sum) {
  return (z >= T(0) ? T(0) : -z) + log_sum;
}
template <class T>
NOISYSEG_FORMULA T minus_log_q(T z, T log_sum) {
  return (z >= T(0) ? z : T(0)) + log_sum;
}
template <class T>
NOISYSEG_FORMULA T soft_cross_entropy(T minus_log_p, T minus_log_q, T y) {
  return y * minus_log_p + (T(1) - y) * minus_log_q;
}
// p - y without cancellation where p is close to 1; likewise p - p2, with y = p2 and 1 - y = q2
template <class T>
NOISYSEG_FORMULA T apart(T p, T q, T y, T one_minus_y) {
  return q < p ? one_minus_y - q : p - y;
}

// ---- uncertainty-weighted loss --------------------------------------------------------------------

// The sums of an image: pixels in the mask; over raters, weighted by them, the cross-entropies times
// e^-sigma, and the sigmas; p^2; variance and mean of the calibration maps, and the entropy of that mean;
// then for each rater (p - y)^2 e^-sigma and y^2.
enum UncertaintySum { in_mask, weighted_ce, sigmas, squares, variance, calibration, entropy, by_rater };

// s = |y - sigma|, eq. 4, with derivative 0 at the kink, and its slope by sigma
template <class T>
NOISYSEG_FORMULA T calibration_of(T y, T sigma) {
  return abs_(y - sigma);
}
template <class T>
NOISYSEG_FORMULA Dual<T> calibration_of(Dual<T> y, Dual<T> sigma) {
  const Dual<T> d = y - sigma;
  return {abs_(d.value), d.value > T(0) ? d.slope : d.value < T(0) ? -d.slope : T(0)};
}
template <class T>
NOISYSEG_FORMULA T calibration_slope(T y, T sigma) {
  return sigma > y ? T(1) : sigma < y ? T(-1) : T(0);
}

// -s ln s, or -s ln s - (1-s) ln(1-s); 0 ln 0 = 0
template <class T>
NOISYSEG_FORMULA T entropy_part(T s) {
  return -s * log_(max_(s, T(1e-30)));
}
template <class T>
NOISYSEG_FORMULA T entropy_of(T s, bool binary) {
  return entropy_part(s) + (binary ? entropy_part(max_(T(1) - s, T(0))) : T(0));
}

NOISYSEG_FORMULA double raters_mass(const ImageWeights& raters, int64_t b, int64_t maps) {
  double mass = 0;
  for (int64_t m = 0; m < maps; ++m) mass += image_weight(raters, b, m);
  return mass;
}

template <class S>
NOISYSEG_FORMULA S uncertainty_denominator(const S* sums, int64_t m, double eps) {
  return sums[squares] + sums[by_rater + 2 * m + 1] + S(eps);
}

// terms: total, ce (eq. 1), dice (eq. 3), consistency (eq. 5). An image without pixels or raters has none.
template <class S>
NOISYSEG_FORMULA void uncertainty_terms(const S* sums, const ImageWeights& raters, int64_t b, int64_t maps,
                                        const UncertaintyOptions& o, S* terms) {
  const double mass = raters_mass(raters, b, maps), n = value_of(sums[in_mask]);
  terms[0] = terms[1] = terms[2] = terms[3] = S(0);
  if (n == 0 || mass == 0) return;
  const S regular = sums[sigmas] * S(0.5 / (n * mass));
  S dice = S(0);
  for (int64_t m = 0; m < maps; ++m) {
    const S d = uncertainty_denominator(sums, m, o.eps);
    const double r = image_weight(raters, b, m);
    if (r != 0 && d != S(0)) dice += S(r) * sums[by_rater + 2 * m] / d;
  }
  terms[1] = sums[weighted_ce] * S(1 / (n * mass)) + regular;
  terms[2] = dice * S(1 / mass) + regular;
  terms[3] = sums[variance] * S(1 / n);
  terms[0] = terms[1] + S(o.dice_weight) * terms[2] + S(o.consistency_weight) * terms[3];
}

// eq. 6 (or the mean binary entropy) and eq. 7: 4 M sum Var / sum_m sum s^m = 4 sum Var / sum s*
NOISYSEG_FORMULA double confidence_of(const double* sums, bool binary) {
  const double by = binary ? sums[in_mask] : sums[calibration];
  return by == 0 ? 0.0 : sums[entropy] / by;
}
NOISYSEG_FORMULA double agreement_of(const double* sums) {
  return sums[calibration] == 0 ? 0.0 : 4 * sums[variance] / sums[calibration];
}

// What the gradient of an image's pixels needs, and for each rater its weight and `dice`.
template <class S>
struct UncertaintySlopes {
  S ce, constant, consistency, shrink;
};
template <class S>
NOISYSEG_FORMULA UncertaintySlopes<S> uncertainty_slopes(const S* sums, const ImageWeights& raters, int64_t b,
                                                         int64_t maps, const UncertaintyOptions& o,
                                                         const GradTerms& grad_terms, double batch, S* dice) {
  const double mass = raters_mass(raters, b, maps), n = value_of(sums[in_mask]);
  UncertaintySlopes<S> slopes{S(0), S(0), S(0), S(0)};
  for (int64_t m = 0; m < maps; ++m) dice[m] = S(0);
  if (n == 0 || mass == 0) return slopes;
  S g[4];
  for (int t = 0; t < 4; ++t) {
    grad_term(grad_terms, t, b, g[t]);
    if (o.reduction == TaskReduction::mean) g[t] = g[t] * S(1 / batch);
  }
  const S by_dice = g[2] + S(o.dice_weight) * g[0];
  slopes.ce = (g[1] + g[0]) * S(1 / (n * mass));
  slopes.constant = (g[1] + g[0] + by_dice) * S(0.5 / (n * mass));
  slopes.consistency = (g[3] + S(o.consistency_weight) * g[0]) * S(2 / (n * mass));
  for (int64_t m = 0; m < maps; ++m) {
    const S d = uncertainty_denominator(sums, m, o.eps);
    const double r = image_weight(raters, b, m);
    if (r == 0 || d == S(0)) continue;
    dice[m] = by_dice * S(r / mass) / d;
    slopes.shrink += dice[m] * sums[by_rater + 2 * m] / d;
  }
  return slopes;
}

// d/dsigma of one rater at one pixel; weight = e^-sigma, off = p - y, deviation = s - s*
template <class T>
NOISYSEG_FORMULA T uncertainty_slope(T rater, T ce_slope, T constant, T consistency, T dice, T weight, T off,
                                     T ce, T deviation, T side) {
  return rater * (constant + consistency * deviation * side) -
         weight * (rater * ce_slope * ce + dice * off * off);
}
// d/dz at one pixel; pull and lean: the sums over raters of weight * off times the rater's weight, and `dice`
template <class T>
NOISYSEG_FORMULA T uncertainty_logit_slope(T p, T q, T pull, T lean, T ce_slope, T shrink) {
  return ce_slope * pull + T(2) * p * q * (lean - shrink * p);
}

// ---- dual-task loss -------------------------------------------------------------------------------

// The sums of an image (or of the batch, for each image): pixels in the mask, (p - t)^2; of labelled images
// pixels, cross-entropy, p y, p^2, t y, t^2, y^2; and how many images are labelled. p = sigmoid(z), t =
// sigmoid(-k d).
enum DualTaskSum { all_pixels, mismatch, pixels, ce, py, pp, ty, tt, yy, labelled_images };

// The consistency term's factor for each input's gradient. DTML's code back-propagates both losses through
// one undetached term, so that each network gets it twice (train_la_dtml.py:188); the paper means it once.
NOISYSEG_FORMULA double routing_to_logits(Routing r) {
  return r == Routing::shared ? 2 : r == Routing::sdf ? 0 : 1;
}
NOISYSEG_FORMULA double routing_to_sdf(Routing r) {
  return r == Routing::shared ? 2 : r == Routing::logits ? 0 : 1;
}
NOISYSEG_FORMULA double routed(double x, Routing) { return x; }
NOISYSEG_FORMULA Dual<double> routed(Dual<double> x, Routing r) {
  return {x.value, r == Routing::shared ? 2 * x.slope : x.slope};
}

NOISYSEG_FORMULA bool is_labelled(const ImageWeights& labelled, int64_t count, int64_t b) {
  return labelled.data ? image_weight(labelled, b, 0) != 0 : b < count;
}

// terms: seg, mask, consistency
template <class S>
NOISYSEG_FORMULA void dual_task_terms(const S* s, const DualTaskOptions& o, S* terms) {
  const double all = value_of(s[all_pixels]), n = value_of(s[pixels]);
  terms[0] = terms[1] = terms[2] = S(0);
  if (n != 0) {
    const RatioValue<S> seg = dice_value(S(2) * s[py], s[pp] + s[yy], o.eps, 1);
    terms[0] = S(0.5) * (s[ce] * S(1 / n) + seg.loss);
    terms[1] = dice_value(S(2) * s[ty], s[tt] + s[yy], o.eps, 1).loss;
  }
  if (all != 0) terms[2] = routed(s[mismatch] * S(1 / all), o.routing);
}

template <class S>
struct DualTaskSlopes {
  S ce, seg_y, seg_p, mask_y, mask_t, consistency;
};
template <class S>
NOISYSEG_FORMULA DualTaskSlopes<S> dual_task_slopes(const S* s, const DualTaskOptions& o,
                                                    const GradTerms& grad_terms, int64_t b, double batch) {
  const double all = value_of(s[all_pixels]), n = value_of(s[pixels]);
  const double labelled = value_of(s[labelled_images]);
  DualTaskSlopes<S> slopes{S(0), S(0), S(0), S(0), S(0), S(0)};
  S g[3];
  for (int t = 0; t < 3; ++t) grad_term(grad_terms, t, b, g[t]);
  if (o.per_image && o.reduction == TaskReduction::mean) {
    const S share = S(labelled != 0 ? 1 / labelled : 0);
    g[0] = g[0] * share, g[1] = g[1] * share, g[2] = g[2] * S(1 / batch);
  }
  if (n != 0) {
    const RatioValue<S> seg = dice_value(S(2) * s[py], s[pp] + s[yy], o.eps, 1);
    const RatioValue<S> mask = dice_value(S(2) * s[ty], s[tt] + s[yy], o.eps, 1);
    slopes.ce = g[0] * S(0.5 / n);
    slopes.seg_y = g[0] * seg.by_numerator, slopes.seg_p = g[0] * seg.by_denominator;
    slopes.mask_y = S(2) * g[1] * mask.by_numerator, slopes.mask_t = S(2) * g[1] * mask.by_denominator;
  }
  if (all != 0) slopes.consistency = g[2] * S(2 / all);
  return slopes;
}

// d/dz and d/dd at one pixel. toward: the consistency slope times the factor of the routing, off: p - t.
template <class T>
NOISYSEG_FORMULA T dual_task_logit_slope(T p, T q, T y, T off_label, T off, T ce, T seg_y, T seg_p,
                                         T toward) {
  return ce * off_label + p * q * (seg_y * y + seg_p * p + toward * off);
}
template <class T>
NOISYSEG_FORMULA T dual_task_sdf_slope(T t, T u, T y, T off, T mask_y, T mask_t, T toward, T k) {
  return -k * (t * u) * (mask_y * y + mask_t * t - toward * off);
}

}  // namespace noisyseg::formulas
