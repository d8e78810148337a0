// Blocks of pixels on the CPU: brought to float or double in the L1 cache from planes of any type and
// strides, and stored back. Sums of blocks in a fixed order.
#pragma once
#include "cpu/parallel.h"
#include "formulas/dtype.h"
#include "layout.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

using namespace formulas;

constexpr int lanes = 16;
constexpr int block_pixels = 512;
constexpr int64_t chunk_pixels = 4096;  // fixed: it decides the order of the sums

inline int64_t chunks_of(const Layout& layout) { return (layout.pixels() + chunk_pixels - 1) / chunk_pixels; }

inline int padded(int n) { return (n + lanes - 1) / lanes * lanes; }

template <class T, class From>
void load_row(const char* data, int64_t offset, int64_t step, int n, T* out) {
  const From* from = reinterpret_cast<const From*>(data) + offset;
  if (step == 1)
    for (int i = 0; i < n; ++i) out[i] = to_real<T>(from[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = to_real<T>(from[i * step]);
}

template <class T, class To>
void store_row(char* data, int64_t offset, int64_t step, int n, const T* in) {
  To* to = reinterpret_cast<To*>(data) + offset;
  if (step == 1)
    for (int i = 0; i < n; ++i) assign(to[i], in[i]);
  else
    for (int i = 0; i < n; ++i) assign(to[i * step], in[i]);
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

// Calls f(offset, done, m) for each run of m pixels that lie in one row, among pixels [q, q + n).
template <class F>
inline void for_rows(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, const F& f) {
  const int64_t width = layout.extent[2];
  if (layout.extent[0] * layout.extent[1] == 1) return f(base + q * plane.step[2], 0, n);  // no division
  int64_t row = q / width, column = q % width;
  for (int done = 0; done < n; ++row, column = 0) {
    const int64_t left = width - column;
    const int m = left < n - done ? static_cast<int>(left) : n - done;
    const int64_t offset = base + (row / layout.extent[1]) * plane.step[0] +
                           (row % layout.extent[1]) * plane.step[1] + column * plane.step[2];
    f(offset, done, m);
    done += m;
  }
}

// The address of pixels [q, q + n) if they are T, without gaps and a multiple of the lanes; else `buffer`.
template <class T>
const T* load_direct(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n,
                     const T* buffer) {
  if (plane.dtype != dtype_of<T>() || plane.step[2] != 1 || n % lanes != 0 ||
      (layout.extent[0] * layout.extent[1] > 1 && q % layout.extent[2] + n > layout.extent[2]))
    return buffer;
  const T* direct = nullptr;
  for_rows(plane, layout, base, q, n,
           [&](int64_t offset, int, int) { direct = reinterpret_cast<const T*>(plane.data) + offset; });
  return direct;
}

// Pixels [q, q + n) of one plane as T, zeros behind them up to a multiple of the lanes: where they lie, if
// they lie there as T already, otherwise in `buffer`.
template <class T>
const T* load(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, T* buffer) {
  const T* direct = load_direct<T>(plane, layout, base, q, n, buffer);
  if (direct != buffer) return direct;
  for_rows(plane, layout, base, q, n, [&](int64_t offset, int done, int m) {
#define CASE(From) load_row<T, From>(plane.data, offset, plane.step[2], m, buffer + done);
    NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
  });
  for (int i = n; i < padded(n); ++i) buffer[i] = T(0);
  return buffer;
}

template <class T>
void store(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, const T* values) {
  for_rows(plane, layout, base, q, n, [&](int64_t offset, int done, int m) {
#define CASE(To) store_row<T, To>(plane.data, offset, plane.step[2], m, values + done);
    NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
  });
}

// Asks for pixels [q, q + n), if there are so many, to be brought near: a processor's own prefetching does
// not see far into runs of a few kilobytes of each class.
template <bool writing>
inline void prefetch(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n) {
  if (plane.step[2] != 1 || q + n > layout.pixels()) return;
  for_rows(plane, layout, base, q, n, [&](int64_t offset, int, int m) {
    const char* from = plane.data + offset * dtype_size(plane.dtype);
    for (int64_t i = 0, bytes = m * static_cast<int64_t>(dtype_size(plane.dtype)); i < bytes; i += 64)
      __builtin_prefetch(from + i, writing, 3);
  });
}

// Where to compute a block's results: in place, if the plane holds T without gaps there, otherwise `buffer`,
// to be stored afterwards.
template <class T>
T* destination(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, T* buffer) {
  return const_cast<T*>(load_direct<T>(plane, layout, base, q, n, buffer));
}

// yes ? a : b without a branch: of a plain one g++ makes masked loads and stores, which are slow on some
// processors.
inline float choose(bool yes, float a, float b) {
  const int32_t mask = -static_cast<int32_t>(yes);
  return bits_to_float((float_to_bits(a) & mask) | (float_to_bits(b) & ~mask));
}

template <class T>
double sum_lanes(const T* x) {
  double half[lanes / 2];
  for (int l = 0; l < lanes / 2; ++l)
    half[l] = static_cast<double>(x[l]) + static_cast<double>(x[l + lanes / 2]);
  for (int width = lanes / 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) half[l] += half[l + width];
  return half[0];
}

// Of f32 or f64: the element `offset` elements on; element i of a row.
inline double value_at(const Array& a, int64_t offset) {
  return a.dtype == DType::f64 ? static_cast<const double*>(a.data)[offset]
                               : static_cast<const float*>(a.data)[offset];
}
inline double scalar(const Array& a, int64_t i = 0) {
  return value_at(a, i * (a.rank ? a.strides[a.rank - 1] : 0));
}
inline void set_scalar(const Array& a, int64_t i, double x) {
  if (a.dtype == DType::f64)
    static_cast<double*>(a.data)[i] = x;
  else
    static_cast<float*>(a.data)[i] = static_cast<float>(x);
}

// Adds the chunks' partial sums in their order: sums (items, values).
inline void add_chunks(const double* partial, int64_t items, int64_t chunks, int64_t values, double* sums) {
  for (int64_t b = 0; b < items; ++b)
    for (int64_t v = 0; v < values; ++v) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) total += partial[(b * chunks + k) * values + v];
      sums[b * values + v] = total;
    }
}

}  // namespace
}  // namespace noisyseg::NOISYSEG_ISA
