// Reading and writing any DType as float or double. Half precision by integer arithmetic, so that
// host, device and emulator agree to the bit without vendor headers.
#pragma once
#include "formulas/math.h"
#include "noisyseg/array.h"

namespace noisyseg::formulas {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

NOISYSEG_FORMULA float bfloat16_to_float(BFloat16 x) {
  return bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}
NOISYSEG_FORMULA BFloat16 float_to_bfloat16(float f) {  // to nearest even; NaN stays NaN
  const uint32_t u = static_cast<uint32_t>(float_to_bits(f));
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(f != f ? 0x7fc0u : rounded)};
}
NOISYSEG_FORMULA float half_to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  // 2^112 moves half's exponent range onto float's and makes its denormals normal numbers on the way.
  const float scaled = bits_to_float(static_cast<int32_t>(magnitude << 13)) * 5.192296858534828e33f;
  const uint32_t bits =
      magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : static_cast<uint32_t>(float_to_bits(scaled));
  return bits_to_float(static_cast<int32_t>(bits | sign));
}
NOISYSEG_FORMULA Half float_to_half(float f) {  // to nearest even, overflow to inf
  const uint32_t u = static_cast<uint32_t>(float_to_bits(f));
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 leaves the denormal's bits, rounded, at the low end of the mantissa.
  const uint32_t denormal =
      static_cast<uint32_t>(float_to_bits(bits_to_float(static_cast<int32_t>(a)) + 0.5f) - 0x3f000000);
  uint32_t bits = a < 0x38800000u ? denormal : normal;
  bits = a >= 0x477ff000u ? 0x7c00u : bits;
  bits = a > 0x7f800000u ? 0x7e00u : bits;
  return {static_cast<uint16_t>(sign | bits)};
}
// to_real<float>(x), to_real<double>(x): any stored type as a number to compute with.
template <class T, class From>
NOISYSEG_FORMULA T to_real(From x) {
  return static_cast<T>(x);
}
template <class T>
NOISYSEG_FORMULA T to_real(BFloat16 x) {
  return static_cast<T>(bfloat16_to_float(x));
}
template <class T>
NOISYSEG_FORMULA T to_real(Half x) {
  return static_cast<T>(half_to_float(x));
}

// assign(to, x): a computed number into any stored type.
template <class To, class T>
NOISYSEG_FORMULA void assign(To& to, T x) {
  to = static_cast<To>(x);
}
template <class T>
NOISYSEG_FORMULA void assign(BFloat16& to, T x) {
  to = float_to_bfloat16(static_cast<float>(x));
}
template <class T>
NOISYSEG_FORMULA void assign(Half& to, T x) {
  to = float_to_half(static_cast<float>(x));
}

// CASE(type) for the type that stands behind a DType.
#define NOISYSEG_DTYPE_CASES(dtype, CASE)                         \
  switch (dtype) {                                                \
    case DType::u8:                                               \
    case DType::b8: CASE(uint8_t) break;                          \
    case DType::i32: CASE(int32_t) break;                         \
    case DType::i64: CASE(int64_t) break;                         \
    case DType::f16: CASE(::noisyseg::formulas::Half) break;      \
    case DType::bf16: CASE(::noisyseg::formulas::BFloat16) break; \
    case DType::f32: CASE(float) break;                           \
    case DType::f64: CASE(double) break;                          \
  }
// The same for a floating-point type.
#define NOISYSEG_FLOAT_CASES(dtype, CASE)                         \
  switch (dtype) {                                                \
    case DType::f16: CASE(::noisyseg::formulas::Half) break;      \
    case DType::bf16: CASE(::noisyseg::formulas::BFloat16) break; \
    case DType::f64: CASE(double) break;                          \
    default: CASE(float) break;                                   \
  }

}  // namespace noisyseg::formulas
