// The losses, one pixel at a time: the only place where their formulas stand in C++.
// Sources stand with the public functions in noisyseg_fast/losses.py; definitions in
// noisyseg_fast/reference.py.
#pragma once
#include "formulas/math.h"
#include "noisyseg/losses.h"

namespace noisyseg::formulas {

// sigmoid(z) = p and 1 - p = q, and their square roots, all to full relative accuracy: no cancellation at
// either end. With h = e^(-|z|/2) and r = 1 / sqrt(1 + h^2) the larger one is r^2 and the smaller (h r)^2.
template <class T>
struct Probability {
  T p, q, root_p, root_q;
};
template <class T>
NOISYSEG_FORMULA T half_exponential(T z) {  // h
  return exp_(T(-0.5) * abs_(z));
}
template <class T>
NOISYSEG_FORMULA T larger_root(T h) {  // r
  return rsqrt_1_to_2(T(1) + h * h);
}
template <class T>
NOISYSEG_FORMULA Probability<T> sigmoid(T z, T h, T large) {
  const T small = h * large;
  const T root_p = z >= T(0) ? large : small, root_q = z >= T(0) ? small : large;
  return {root_p * root_p, root_q * root_q, root_p, root_q};
}
template <class T>
NOISYSEG_FORMULA Probability<T> sigmoid(T z) {
  const T h = half_exponential(z);
  return sigmoid(z, h, larger_root(h));
}
template <class T>
NOISYSEG_FORMULA Probability<T> given_probability(T p) {
  const T q = T(1) - p;
  return {p, q, sqrt_(p), sqrt_(max_(T(0), q))};
}

// |p - g|, its square root and the sign of p - g, without cancellation where p is close to 1. `hard`: g is 0
// or 1.
template <class T>
struct Difference {
  T value, size, root;
};
template <bool hard, class T>
NOISYSEG_FORMULA Difference<T> difference(Probability<T> a, T g) {
  if (hard) {
    const T root = g != T(0) ? a.root_q : a.root_p;
    const T size = root * root;
    return {g != T(0) ? -size : size, size, root};
  }
  const T value = a.q < a.p ? (T(1) - g) - a.q : a.p - g;
  return {value, abs_(value), sqrt_(abs_(value))};
}

// A pixel with a hard label, side = 1 for g = 0 and -1 for g = 1: then |p - g| = sigmoid(side * z), and one
// select is enough for everything.
template <class T>
struct HardPixel {
  T p, g, edge;  // edge^2 = p (1 - p)
  Difference<T> difference;
};
template <class T>
NOISYSEG_FORMULA HardPixel<T> hard_pixel(T z, T side, T h, T large) {
  const T small = h * large;
  const T root = z * side >= T(0) ? large : small;
  const T size = root * root;
  const T g = T(0.5) - T(0.5) * side;
  return {abs_(g - size), g, large * small, {side * size, size, root}};
}

// ---- region losses: functions of sums over an image or a batch -------------------------------------
//
// For each class N = sum w n(p, g), D = sum w d(p, g) and, for generalized Dice, G = sum w g.

enum class Ratio : int {
  nr_dice,  // n = |p-g|^gamma
  dice      // n = 2 p g
};
enum class Power : int { one, three_halves, two, any };  // gamma of nr_dice

NOISYSEG_FORMULA Ratio ratio_of(RegionLoss loss) {
  return loss == RegionLoss::nr_dice ? Ratio::nr_dice : Ratio::dice;
}
NOISYSEG_FORMULA Power power_of(double gamma) {
  return gamma == 1.5 ? Power::three_halves : gamma == 1 ? Power::one : gamma == 2 ? Power::two : Power::any;
}

template <Power power, class T>
NOISYSEG_FORMULA T abs_power(Difference<T> d, T gamma) {
  if (power == Power::one) return d.size;
  if (power == Power::three_halves) return d.size * d.root;
  if (power == Power::two) return d.size * d.size;
  return d.size < T(1e-30) ? T(0) : exp_(gamma * log_(d.size));
}

// d/dd |d|^gamma. Convention: 0 at d = 0 for every gamma, gamma = 1 included.
template <Power power, class T>
NOISYSEG_FORMULA T abs_power_slope(Difference<T> d, T gamma) {
  if (power == Power::one) return d.value != T(0) ? with_sign(T(1), d.value) : d.value;
  if (power == Power::three_halves) return with_sign(T(1.5) * d.root, d.value);
  if (power == Power::two) return T(2) * d.value;
  return d.size < T(1e-30) ? T(0) : with_sign(gamma * exp_((gamma - T(1)) * log_(d.size)), d.value);
}

template <Ratio ratio, Power power, class T>
NOISYSEG_FORMULA T ratio_numerator(Difference<T> d, T p, T g, T gamma) {
  return ratio == Ratio::dice ? T(2) * p * g : abs_power<power>(d, gamma);
}
template <Ratio ratio, Power power, class T>
NOISYSEG_FORMULA T ratio_numerator_slope(Difference<T> d, T g, T gamma) {
  return ratio == Ratio::dice ? T(2) * g : abs_power_slope<power>(d, gamma);
}
template <bool squared, class T>
NOISYSEG_FORMULA T ratio_denominator(T p, T g) {
  return squared ? p * p + g * g : p + g;
}
template <bool squared, class T>
NOISYSEG_FORMULA T ratio_denominator_slope(T p) {
  return squared ? T(2) * p : T(1);
}

// The same where the formula is chosen at run time; branches that a whole grid or chunk takes alike.
struct RegionFormula {
  Ratio ratio;
  Power power;
  bool squared;
};
NOISYSEG_FORMULA RegionFormula region_formula(const LossOptions& o) {
  return {ratio_of(o.region), power_of(o.gamma), o.squared};
}
template <class T>
NOISYSEG_FORMULA T numerator(RegionFormula f, Difference<T> d, T p, T g, T gamma) {
  if (f.ratio == Ratio::dice) return T(2) * p * g;
  if (f.power == Power::three_halves) return abs_power<Power::three_halves>(d, gamma);
  if (f.power == Power::one) return abs_power<Power::one>(d, gamma);
  if (f.power == Power::two) return abs_power<Power::two>(d, gamma);
  return abs_power<Power::any>(d, gamma);
}
template <class T>
NOISYSEG_FORMULA T numerator_slope(RegionFormula f, Difference<T> d, T g, T gamma) {
  if (f.ratio == Ratio::dice) return T(2) * g;
  if (f.power == Power::three_halves) return abs_power_slope<Power::three_halves>(d, gamma);
  if (f.power == Power::one) return abs_power_slope<Power::one>(d, gamma);
  if (f.power == Power::two) return abs_power_slope<Power::two>(d, gamma);
  return abs_power_slope<Power::any>(d, gamma);
}
template <class T>
NOISYSEG_FORMULA T denominator(RegionFormula f, T p, T g) {
  return f.squared ? ratio_denominator<true>(p, g) : ratio_denominator<false>(p, g);
}
template <class T>
NOISYSEG_FORMULA T denominator_slope(RegionFormula f, T p) {
  return f.squared ? ratio_denominator_slope<true>(p) : ratio_denominator_slope<false>(p);
}

// The loss of one pair of sums and its derivatives. 0 / 0 (eps = 0 and nothing there) counts as no loss.
template <class T>
struct RatioValue {
  T loss, by_numerator, by_denominator;
};
template <class T>
NOISYSEG_FORMULA RatioValue<T> nr_dice_value(T n, T denominator, double eps) {
  const T d = denominator + T(eps);
  if (d == T(0)) return {T(0), T(0), T(0)};
  return {n / d, T(1) / d, -n / (d * d)};
}
// 1 - ((N + eps) / (D + eps))^power; power 1 is Dice, 1 / beta focal Dice.
template <class T>
NOISYSEG_FORMULA RatioValue<T> dice_value(T n, T denominator, double eps, double power) {
  const T d = denominator + T(eps), m = n + T(eps);
  if (d == T(0)) return {T(0), T(0), T(0)};
  const T dice = m / d;
  if (power == 1) return {T(1) - dice, T(-1) / d, dice / d};
  if (!(dice > T(0))) return {dice != dice ? dice : T(1), T(0) * dice, T(0) * dice};
  const T raised = exp_(T(power) * log_(dice)), slope = T(power) * raised / dice;
  return {T(1) - raised, -slope / d, slope * dice / d};
}

// Generalized Dice (Sudre et al. 2017): one loss from all classes' sums, each class weighted by G^-power. A
// class that is absent gets the largest weight of the others, as in MONAI. sums: N, D, G of class c at
// sums[c * stride]; by: receives dL/dN and dL/dD of each class.
template <class T>
NOISYSEG_FORMULA T generalized_dice_weight(T volume, int power) {
  return power == 0 ? T(1) : power == 1 ? T(1) / volume : T(1) / (volume * volume);
}
template <class T>
NOISYSEG_FORMULA T generalized_dice_value(T* sums, int64_t first, int64_t classes, int64_t stride, int power,
                                          double eps) {
  T top = T(0);
  for (int64_t c = first; c < classes; ++c) {
    const T volume = sums[c * stride + 2];
    if (volume != T(0)) top = max_(top, generalized_dice_weight(volume, power));
  }
  // Nothing anywhere: MONAI's weights are then all 0; ours are 1, so that false positives still cost.
  if (top == T(0)) top = T(1);
  T n = T(eps), d = T(eps);
  for (int64_t c = first; c < classes; ++c) {
    const T volume = sums[c * stride + 2];
    const T w = volume == T(0) ? top : generalized_dice_weight(volume, power);
    n += w * sums[c * stride], d += w * sums[c * stride + 1];
  }
  const bool nothing = d == T(0);
  for (int64_t c = first; c < classes; ++c) {
    const T volume = sums[c * stride + 2];
    const T w = volume == T(0) ? top : generalized_dice_weight(volume, power);
    sums[c * stride + 3] = nothing ? T(0) : -w / d;
    sums[c * stride + 4] = nothing ? T(0) : w * n / (d * d);
  }
  return nothing ? T(0) : T(1) - n / d;
}

// ---- pixel losses ---------------------------------------------------------------------------------

// Of a pixel with a hard label, g = 0 or 1, from z = logit of class 1 (sigmoid, or the difference of two
// softmax logits): s = |p - g|, t = 1 - s, both to full accuracy, -ln t and -ln s. `side` as in hard_pixel.
template <class T>
struct BinaryPixel {
  T s, t, nll_t, nll_s;
};
template <class T>
NOISYSEG_FORMULA BinaryPixel<T> binary_pixel(T z, T side, T e, T inverse, T log_sum) {
  // e = e^-|z|, inverse = 1 / (1 + e), log_sum = ln(1 + e). Which of the two is the larger goes by z >= 0, as
  // in |z|, so that dual numbers have the right slope at z = 0.
  const bool wrong = (z >= T(0)) == (side > T(0));
  const T size = abs_(z), small = e * inverse;
  return {wrong ? inverse : small, wrong ? small : inverse, (wrong ? size : T(0)) + log_sum,
          (wrong ? T(0) : size) + log_sum};
}
template <class T>
NOISYSEG_FORMULA BinaryPixel<T> binary_pixel(T z, T side) {
  const T e = exp_(-abs_(z)), inverse = T(1) / (T(1) + e);
  return binary_pixel(z, side, e, inverse, log1p_(e));
}

// size^gamma, given -ln size
template <class T>
NOISYSEG_FORMULA T power_by_log(T size, T nll, T gamma, Power power) {
  if (power == Power::one) return size;
  if (power == Power::two) return size * size;
  return exp_(-gamma * nll);
}
// The exponents of the pixel losses: only focal's gamma = 1 and 2 have a short way.
NOISYSEG_FORMULA Power pixel_power(PixelLoss kind, double parameter) {
  return kind != PixelLoss::focal ? Power::any
         : parameter == 1         ? Power::one
         : parameter == 2         ? Power::two
                                  : Power::any;
}

// A loss and its slope. binary_hard: slope by a = side * z. one_of: by the pixel's own class of a softmax,
// dL/dz_c = slope (p_c - [c is the label]). term: of one class of a softmax, slope u = -p dh/dp, so that
// dL/dz_c = p_c sum_k u_k - u_c.
template <class T>
struct LossSlope {
  T loss, slope;
};
template <PixelLoss kind, class T>
NOISYSEG_FORMULA LossSlope<T> binary_hard(BinaryPixel<T> a, T parameter, Power power) {
  if (kind == PixelLoss::focal) {
    const T modulator = power_by_log(a.s, a.nll_s, parameter, power);
    return {modulator * a.nll_t, modulator * (parameter * a.t * a.nll_t + a.s)};
  }
  if (kind == PixelLoss::gce) {
    const T scaled = parameter * a.nll_t;
    return {-expm1_(-scaled) / parameter, exp_(-scaled) * a.s};
  }
  if (kind == PixelLoss::mae) return {a.s, a.s * a.t};
  if (kind == PixelLoss::mse) return {a.s * a.s, T(2) * a.s * a.s * a.t};
  return {a.nll_t, a.s};  // ce, kl
}

// Soft label g; p, q = 1 - p, -ln p, -ln q. slope: by z.
template <PixelLoss kind, class T>
NOISYSEG_FORMULA LossSlope<T> binary_soft(T p, T q, T nll_p, T nll_q, T g, T parameter, Power power) {
  const T f = T(1) - g;
  if (kind == PixelLoss::focal || kind == PixelLoss::gce) {
    const LossSlope<T> one = binary_hard<kind>(BinaryPixel<T>{q, p, nll_p, nll_q}, parameter, power);
    const LossSlope<T> zero = binary_hard<kind>(BinaryPixel<T>{p, q, nll_q, nll_p}, parameter, power);
    return {g * one.loss + f * zero.loss, f * zero.slope - g * one.slope};
  }
  const T d = q < p ? f - q : p - g;
  if (kind == PixelLoss::mae) return {abs_(d), d != T(0) ? with_sign(p * q, d) : T(0) * d};
  if (kind == PixelLoss::mse) return {d * d, T(2) * d * p * q};
  if (kind == PixelLoss::boundary) return {p * g, g * p * q};
  const T ce = g * nll_p + f * nll_q;
  if (kind == PixelLoss::kl) {
    const T h = (g > T(0) ? g * log_(g) : T(0)) + (f > T(0) ? f * log_(f) : T(0));
    return {ce + h, d};
  }
  return {ce, d};
}

// Softmax over C classes with a hard label: t = p_label, s = 1 - t, nll = -ln t. Not for mse.
template <PixelLoss kind, class T>
NOISYSEG_FORMULA LossSlope<T> one_of(T s, T t, T nll, T parameter, Power power, T inverse_classes) {
  if (kind == PixelLoss::focal) {
    // -ln s: not at hand; s = 0 only where nll is 0 too, and there nll / s = 1.
    const bool tiny = s < T(1e-30);
    const T size = tiny ? T(1e-30) : s;
    const T modulator = power == Power::one || power == Power::two ? power_by_log(s, T(0), parameter, power)
                                                                   : exp_(parameter * log_(size));
    const T ratio = tiny ? T(1) : nll / size;
    return {modulator * nll, modulator * (T(1) + parameter * t * ratio)};
  }
  if (kind == PixelLoss::gce) {
    const T scaled = parameter * nll;
    return {-expm1_(-scaled) / parameter, exp_(-scaled)};
  }
  if (kind == PixelLoss::mae) return {T(2) * s * inverse_classes, T(2) * t * inverse_classes};
  return {nll, T(1)};  // ce, kl
}

template <PixelLoss kind, class T>
NOISYSEG_FORMULA LossSlope<T> term(T p, T nll, T g, T parameter, Power power, T inverse_classes) {
  if (kind == PixelLoss::mae) {
    const T d = p - g;
    return {abs_(d) * inverse_classes, d != T(0) ? -with_sign(p, d) * inverse_classes : T(0) * d};
  }
  if (kind == PixelLoss::mse) {
    const T d = p - g;
    return {d * d * inverse_classes, T(-2) * p * d * inverse_classes};
  }
  if (kind == PixelLoss::boundary) return {p * g * inverse_classes, -p * g * inverse_classes};
  if (kind == PixelLoss::focal || kind == PixelLoss::gce) {
    const LossSlope<T> own = one_of<kind>(T(1) - p, p, nll, parameter, power, inverse_classes);
    return {g != T(0) ? g * own.loss : T(0), g * own.slope};
  }
  const T h = kind == PixelLoss::kl && g > T(0) ? g * log_(g) : T(0);
  return {(g != T(0) ? g * nll : T(0)) + h, g};
}

// CASE(kind) with the kind as a constant
#define NOISYSEG_PIXEL_KINDS(kind, CASE)                       \
  switch (kind) {                                              \
    case PixelLoss::none: break;                               \
    case PixelLoss::ce: CASE(PixelLoss::ce) break;             \
    case PixelLoss::focal: CASE(PixelLoss::focal) break;       \
    case PixelLoss::mae: CASE(PixelLoss::mae) break;           \
    case PixelLoss::gce: CASE(PixelLoss::gce) break;           \
    case PixelLoss::mse: CASE(PixelLoss::mse) break;           \
    case PixelLoss::kl: CASE(PixelLoss::kl) break;             \
    case PixelLoss::boundary: CASE(PixelLoss::boundary) break; \
  }

}  // namespace noisyseg::formulas
