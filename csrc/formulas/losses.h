// The losses, one pixel at a time: the only place where their formulas stand in C++.
// Sources: NR-Dice and the Dice of eq. 1: Wang et al., TMI 2020 (COPLE-Net), eq. 1 and 3; see METHODS.md.
#pragma once
#include "formulas/math.h"

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

// ---- ratio losses: F(N, D) with N = sum w n(p, g) and D = sum w d(p, g) over an image or a batch ----

enum class Ratio : int {
  nr_dice,  // N = sum |p-g|^gamma, loss N / (D + eps)
  dice      // N = sum 2 p g,       loss 1 - (N + eps) / (D + eps)
};
enum class Power : int { one, three_halves, two, any };  // gamma of nr_dice

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

// The loss of one sum pair and its derivatives. 0 / 0 (eps = 0 and nothing there) counts as no loss.
struct RatioValue {
  double loss, by_numerator, by_denominator;
};
NOISYSEG_FORMULA RatioValue ratio_value(Ratio ratio, double numerator, double denominator, double eps) {
  const double d = denominator + eps;
  if (!(d != 0)) return d == 0 ? RatioValue{0, 0, 0} : RatioValue{d, d, d};  // NaN goes through
  const double n = ratio == Ratio::dice ? numerator + eps : numerator;
  const double sign = ratio == Ratio::dice ? -1.0 : 1.0;
  return {(ratio == Ratio::dice ? 1.0 : 0.0) + sign * n / d, sign / d, -sign * n / (d * d)};
}

// ---- cross-entropy --------------------------------------------------------------------------------

// -g ln sigmoid(z) - (1-g) ln(1 - sigmoid(z))
template <class T>
NOISYSEG_FORMULA T binary_cross_entropy(T z, T g, T e) {  // e = e^(-|z|)
  return max_(z, T(0)) - g * z + log1p_(e);
}
template <class T>
NOISYSEG_FORMULA T binary_cross_entropy(T z, T g) {
  return binary_cross_entropy(z, g, exp_(-abs_(z)));
}

}  // namespace noisyseg::formulas
