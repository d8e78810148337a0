// Elementary functions that g++ vectorises in a plain loop (no libm call, no branch, no table) and
// that are the device's own instructions under nvcc.
//
// float: Cody-Waite reduction and minimax polynomials, for the logarithm that of the Cephes library (Moshier,
// 1992); error below 2 ulp over the whole range. double: libm.
#pragma once
#include <math.h>

#include <cstring>

#include "formulas/host_device.h"

namespace noisyseg::formulas {

NOISYSEG_FORMULA float bits_to_float(int32_t i) {
#ifdef __CUDA_ARCH__
  return __int_as_float(i);
#else
  float f;
  memcpy(&f, &i, 4);
  return f;
#endif
}
NOISYSEG_FORMULA int32_t float_to_bits(float f) {
#ifdef __CUDA_ARCH__
  return __float_as_int(f);
#else
  int32_t i;
  memcpy(&i, &f, 4);
  return i;
#endif
}

NOISYSEG_FORMULA float abs_(float x) { return fabsf(x); }
NOISYSEG_FORMULA double abs_(double x) { return fabs(x); }
NOISYSEG_FORMULA float sqrt_(float x) { return sqrtf(x); }
NOISYSEG_FORMULA double sqrt_(double x) { return sqrt(x); }
NOISYSEG_FORMULA float with_sign(float magnitude, float sign) { return copysignf(magnitude, sign); }
NOISYSEG_FORMULA double with_sign(double magnitude, double sign) { return copysign(magnitude, sign); }
template <class T>
NOISYSEG_FORMULA T max_(T a, T b) {
  return a > b ? a : b;
}

// e^x for x <= 88. Below -87 it stays at e^-87 = 1.6e-38, next to the smallest normal number: no loss sees
// the difference, and it saves a select for each pixel.
NOISYSEG_FORMULA float exp_(float x) {
#ifdef __CUDA_ARCH__
  const float t = x * 1.44269504f;
  const float rest =
      fmaf(x, 1.44269504f, -t) + x * 1.92596299e-8f;  // what t lost, so that 2 ulp hold for all x
  return exp2f(t) * fmaf(rest, 0.693147181f, 1.f);
#else
  const float clamped = x < -87.f ? -87.f : x;
  const float shifted = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.f;
#ifdef __FMA__
  const float r = clamped - n * 0.693147182f;  // fused: the product is exact
#else
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
#endif
  // Estrin's order: the chain of dependent operations, not their number, is what limits these loops.
  const float r2 = r * r;
  const float low = 1.666652113e-1f * r + 4.999999404e-1f;
  const float high = 8.368739858e-3f * r + 4.166839644e-2f;
  const float p = ((1.381405746e-3f * r2 + high) * r2 + low) * r2 + (r + 1.f);
  const float scale = bits_to_float(
      static_cast<int32_t>((static_cast<uint32_t>(float_to_bits(shifted)) << 23) + 0x3f800000u));
  return p * scale;
#endif
}
NOISYSEG_FORMULA double exp_(double x) { return exp(x); }

// 1 / sqrt(x) for x in [1, 2]: a cubic within 0.04 % and one step of Householder's third-order iteration,
// below 2e-7 in all; 8 multiply-adds where a division and a square root would hold up the divider for 15
// cycles.
NOISYSEG_FORMULA float rsqrt_1_to_2(float x) {
#ifdef __CUDA_ARCH__
  return rsqrtf(x);
#else
  const float y = (-0.0845587552f * x + 0.528656125f) * (x * x) + (-1.28681004f * x + 1.84223366f);
  const float w = 1.f - (x * y) * y;
  return y + (y * w) * (0.375f * w + 0.5f);
#endif
}
NOISYSEG_FORMULA double rsqrt_1_to_2(double x) { return 1.0 / sqrt(x); }

// ln x for positive normal x; NaN stays NaN.
NOISYSEG_FORMULA float log_(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  const int32_t bits = float_to_bits(x) - 0x3f3504f3;  // sqrt(1/2): the mantissa lies in [sqrt(1/2), sqrt 2)
  const float n = static_cast<float>(bits >> 23);
  const float r = bits_to_float((bits & 0x7fffff) + 0x3f3504f3) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float r2 = r * r;
  p = p * r * r2 + n * -2.12194440e-4f - 0.5f * r2;
  return x == x ? r + p + n * 0.693359375f : x;
#endif
}
NOISYSEG_FORMULA double log_(double x) { return log(x); }

// ln(1 + e) for e >= 0, accurate for small e too: the rounding of 1 + e is put right.
template <class T>
NOISYSEG_FORMULA T log1p_(T e, T inverse) {  // inverse = 1 / (1 + e), where the caller has it already
  const T u = T(1) + e;
  return log_(u) - ((u - T(1)) - e) * inverse;
}
NOISYSEG_FORMULA float log1p_(float e) { return log1p_(e, 1.f / (1.f + e)); }
NOISYSEG_FORMULA double log1p_(double e) { return log1p(e); }

// e^x - 1 for x <= 0, accurate for small x too.
NOISYSEG_FORMULA float expm1_(float x) {
  const float low = 0.166666667f * x + 0.5f, high = 8.33333377e-3f * x + 4.16666679e-2f;
  const float x2 = x * x;
  const float near = x + x2 * (low + x2 * (high + x2 * 1.38888892e-3f));  // below 1e-7 for |x| < 0.25
  return x > -0.25f ? near : exp_(x) - 1.f;
}
NOISYSEG_FORMULA double expm1_(double x) { return expm1(x); }

}  // namespace noisyseg::formulas
