// For the drivers: random numbers, arrays of any type and strides with memory of exactly their size,
// comparison.
#pragma once
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formulas/dtype.h"

namespace {

using namespace noisyseg;

using Shape = std::vector<int64_t>;
enum class Order { contiguous, channels_last, strided, expanded };

#ifdef NOISYSEG_RANDOMNESS  // of another driver
NOISYSEG_RANDOMNESS randomness;
#else
std::mt19937 randomness(1);
#endif
int64_t pick(int64_t n) { return static_cast<int64_t>(randomness() % static_cast<unsigned>(n)); }
template <class T>
T pick(std::initializer_list<T> from) {
  return from.begin()[pick(static_cast<int64_t>(from.size()))];
}
[[maybe_unused]] double uniform() { return (randomness() >> 8) / 16777216.0; }

int failures = 0;
void fail(const std::string& name, const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "%s: %s\n", name.c_str(), what.c_str());
}

// An array with memory of exactly its own size, so that AddressSanitizer sees the first byte too far.
struct Tensor {
  std::vector<unsigned char> bytes;
  int64_t first = 0;  // element where the view starts
  Array view;

  Tensor() = default;
  Tensor(const Shape& shape, DType dtype, Order order = Order::contiguous) {
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::vector<int> axes;  // from the fastest
    for (int i = view.rank - 1; i >= 0; --i) axes.push_back(i);
    if (order == Order::channels_last && view.rank > 2) {
      axes.insert(axes.begin(), 1);
      axes.erase(axes.end() - 2);
    }
    int64_t size = 1;
    for (int axis : axes) {
      view.shape[axis] = shape[static_cast<size_t>(axis)];
      view.strides[axis] = size;
      const bool apart = order == Order::strided && axis != 0;  // every second, and backwards
      if (order == Order::expanded && axis == 0)
        view.strides[axis] = 0;
      else
        size *= apart ? 2 * view.shape[axis] : view.shape[axis];
      if (apart) {
        first += (2 * view.shape[axis] - 1) * view.strides[axis];
        view.strides[axis] *= -2;
      }
    }
    if (view.size() == 0) first = size = 0;
    bytes.assign(static_cast<size_t>(size * dtype_size(dtype)), 0x55);
  }
  Array array() {
    Array a = view;
    a.data = bytes.empty() ? nullptr : bytes.data() + first * dtype_size(view.dtype);
    return a;
  }
  // f(element, pixel's number, class) for every element; the class is 0 without a channel axis.
  template <class F>
  void each(int rank, const F& f) {
    const Array a = array();
    if (!a.data) return;
    for (int64_t i = 0; i < a.size(); ++i) {
      int64_t rest = i, at = 0, pixel = 0, c = 0, step = 1;
      for (int axis = a.rank - 1; axis >= 0; --axis) {
        const int64_t k = rest % a.shape[axis];
        rest /= a.shape[axis];
        at += k * a.strides[axis];
        if (axis == 1 && a.rank == rank)
          c = k;
        else
          pixel += k * step, step *= a.shape[axis];
      }
#define CASE(T) f(static_cast<T*>(a.data)[at], pixel, c);
      NOISYSEG_DTYPE_CASES(a.dtype, CASE)
#undef CASE
    }
  }
  std::vector<double> values() {
    std::vector<double> out;
    each(-1, [&](auto& x, int64_t, int64_t) { out.push_back(formulas::to_real<double>(x)); });
    return out;
  }
};

template <class F>
void fill(Tensor& t, int rank, const F& f) {
  t.each(rank, [&](auto& x, int64_t pixel, int64_t c) { formulas::assign(x, f(pixel, c)); });
}

const Exec host{-1, nullptr, 1}, device{0, nullptr, 0};

// Largest difference over largest value; the sums' order differs, and half precision rounds once more.
[[maybe_unused]] void compare(const std::string& name, const char* what, Tensor& cpu, Tensor& cuda,
                              double tolerance) {
  const std::vector<double> a = cpu.values(), b = cuda.values();
  double largest = 0, apart = 0;
  bool same_nan = true;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) {
      same_nan &= std::isnan(a[i]) && std::isnan(b[i]);
      continue;
    }
    largest = std::fmax(largest, std::fabs(a[i]));
    apart = std::fmax(apart, std::fabs(a[i] - b[i]));
  }
  if (cpu.view.dtype == DType::bf16) tolerance += 1.0 / 128;
  if (cpu.view.dtype == DType::f16) tolerance += 1.0 / 1024, largest = std::fmax(largest, 1e-4);
  if (!same_nan) fail(name, std::string(what) + " is NaN at different places");
  if (!(apart <= tolerance * largest))
    fail(name,
         std::string(what) + " differs by " + std::to_string(apart / largest) + " of the largest value");
}

}  // namespace
