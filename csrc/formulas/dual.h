// Numbers with a derivative: a formula run on Dual<T> gives its value and its directional derivative. This is
// how the losses get forward-mode tangents and second derivatives without a second copy of any formula.
#pragma once
#include "formulas/math.h"

namespace noisyseg::formulas {

template <class T>
struct Dual {
  T value, slope;
  Dual() = default;
  template <class Number>
  NOISYSEG_HOST_DEVICE Dual(Number x) : value(static_cast<T>(x)), slope(T(0)) {}
  NOISYSEG_HOST_DEVICE Dual(T x, T dx) : value(x), slope(dx) {}
};

template <class T>
NOISYSEG_FORMULA Dual<T> operator-(Dual<T> a) {
  return {-a.value, -a.slope};
}
// Mixed operands convert: friends of a class template would do it alone, but nvcc inlines these better.
#define NOISYSEG_DUAL_OPERATOR(op, slope_of)                   \
  template <class T>                                           \
  NOISYSEG_FORMULA Dual<T> operator op(Dual<T> a, Dual<T> b) { \
    return {a.value op b.value, slope_of};                     \
  }
NOISYSEG_DUAL_OPERATOR(+, a.slope + b.slope)
NOISYSEG_DUAL_OPERATOR(-, a.slope - b.slope)
NOISYSEG_DUAL_OPERATOR(*, a.slope* b.value + a.value * b.slope)
NOISYSEG_DUAL_OPERATOR(/, (a.slope - a.value / b.value * b.slope) / b.value)
#undef NOISYSEG_DUAL_OPERATOR
template <class T>
NOISYSEG_FORMULA Dual<T>& operator+=(Dual<T>& a, Dual<T> b) {
  return a = a + b;
}
template <class T>
NOISYSEG_FORMULA Dual<T>& operator-=(Dual<T>& a, Dual<T> b) {
  return a = a - b;
}
template <class T>
NOISYSEG_FORMULA Dual<T>& operator*=(Dual<T>& a, Dual<T> b) {
  return a = a * b;
}
#define NOISYSEG_DUAL_COMPARISON(op)                        \
  template <class T>                                        \
  NOISYSEG_FORMULA bool operator op(Dual<T> a, Dual<T> b) { \
    return a.value op b.value;                              \
  }
NOISYSEG_DUAL_COMPARISON(<)
NOISYSEG_DUAL_COMPARISON(>)
NOISYSEG_DUAL_COMPARISON(<=)
NOISYSEG_DUAL_COMPARISON(>=)
NOISYSEG_DUAL_COMPARISON(==)
NOISYSEG_DUAL_COMPARISON(!=)
#undef NOISYSEG_DUAL_COMPARISON

// The kink of |x| counts as its right side, so that formulas that choose by x >= 0 stay smooth there.
template <class T>
NOISYSEG_FORMULA Dual<T> abs_(Dual<T> x) {
  return x.value >= T(0) ? x : -x;
}
// Infinite slopes at 0 (sqrt) count as 0.
template <class T>
NOISYSEG_FORMULA Dual<T> sqrt_(Dual<T> x) {
  const T root = sqrt_(x.value);
  return {root, root > T(0) ? x.slope / (root + root) : T(0)};
}
template <class T>
NOISYSEG_FORMULA Dual<T> rsqrt_1_to_2(Dual<T> x) {
  const T y = rsqrt_1_to_2(x.value);
  return {y, T(-0.5) * y * y * y * x.slope};
}
template <class T>
NOISYSEG_FORMULA Dual<T> exp_(Dual<T> x) {
  const T y = exp_(x.value);
  return {y, y * x.slope};
}
template <class T>
NOISYSEG_FORMULA Dual<T> expm1_(Dual<T> x) {
  return {expm1_(x.value), exp_(x.value) * x.slope};
}
template <class T>
NOISYSEG_FORMULA Dual<T> log_(Dual<T> x) {
  return {log_(x.value), x.slope / x.value};
}
template <class T>
NOISYSEG_FORMULA Dual<T> log1p_(Dual<T> x) {
  return {log1p_(x.value), x.slope / (T(1) + x.value)};
}
template <class T>
NOISYSEG_FORMULA Dual<T> with_sign(Dual<T> magnitude, Dual<T> sign) {
  const T value = with_sign(magnitude.value, sign.value);
  return {value, value == magnitude.value ? magnitude.slope : -magnitude.slope};
}

}  // namespace noisyseg::formulas
