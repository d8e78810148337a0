// The CUDA kernels of label noise, emulated, against the CPU's: the same bits.
#include "noisyseg/noise.h"

#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dense.h"

using namespace noisyseg;

namespace {

const Exec host{-1, nullptr, 1}, device{0, nullptr, 0};
std::mt19937 source(3);
int failures = 0;

template <class T>
void same(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))) return;
  std::printf("%s: CUDA and CPU differ\n", what);
  ++failures;
}

int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint32_t>(n)); }
double real() { return static_cast<double>(source()) / 4294967296.0; }

void uniform_numbers(int64_t items, int64_t n) {
  const size_t size = static_cast<size_t>(items * n);
  std::vector<int64_t> keys(static_cast<size_t>(items));
  for (auto& key : keys) key = static_cast<int64_t>(uint64_t{source()} << 32 | source());
  std::vector<float> a(size + 1, -1), b(a);
  cpu::uniforms(dense(keys, DType::i64, {items}), 2, dense(a, DType::f32, {items, n}), host);
  cuda::uniforms(dense(keys, DType::i64, {items}), 2, dense(b, DType::f32, {items, n}), device);
  same("uniforms", a, b);
}

// Components, then contours and polygons of those of flat images.
void objects(const std::vector<int64_t>& shape, double share, bool full) {
  size_t size = 1;
  for (int64_t n : shape) size *= static_cast<size_t>(n);
  std::vector<uint8_t> mask(size);
  for (auto& m : mask) m = real() < share ? 255 : 0;
  std::vector<int32_t> a(size, -7), b(size, -8);
  cpu::connected_components(dense(mask, DType::u8, shape), full, dense(a, DType::i32, shape), host);
  cuda::connected_components(dense(mask, DType::u8, shape), full, dense(b, DType::i32, shape), device);
  same("connected_components", a, b);
  if (shape[1] != 1 || !full) return;
  const int64_t pixels = shape[2] * shape[3];
  std::vector<int64_t> starts, first = {0};
  for (int64_t item = 0; item < shape[0]; ++item) {
    for (int64_t i = 0; i < pixels; ++i)
      if (a[static_cast<size_t>(item * pixels + i)] == i + 1) starts.push_back(item * pixels + i);
    first.push_back(static_cast<int64_t>(starts.size()));
  }
  const int64_t count = static_cast<int64_t>(starts.size()), n = 3 + below(9);
  std::vector<double> phases(starts.size());
  for (auto& p : phases) p = real();
  const std::vector<int64_t> flat = {shape[0], shape[2], shape[3]};
  std::vector<int32_t> va(static_cast<size_t>(count * n * 2), -1), vb(va);
  for (auto* v : {&va, &vb})
    (v == &va ? cpu::contour_vertices : cuda::contour_vertices)(
        dense(a, DType::i32, flat), dense(starts, DType::i64, {count}), dense(phases, DType::f64, {count}),
        dense(*v, DType::i32, {count, n, 2}), v == &va ? host : device);
  same("contour_vertices", va, vb);
  for (int round = 0; round < 2; ++round) {
    for (auto& v : va) v = round ? static_cast<int32_t>(below(600 * shape[3]) - 40 * shape[3]) : 256 * v;
    std::vector<uint8_t> fa(size, 0), fb(size, 0);
    const Array to = dense(fa, DType::u8, flat);
    std::vector<int32_t> memory(cpu::fill_workspace(to, host) / 4 + 1, -1);
    cpu::fill_polygons(dense(va, DType::i32, {count, n, 2}), dense(first, DType::i64, {shape[0] + 1}), to,
                       memory.data(), host);
    cuda::fill_polygons(dense(va, DType::i32, {count, n, 2}), dense(first, DType::i64, {shape[0] + 1}),
                        dense(fb, DType::u8, flat), nullptr, device);
    same("fill_polygons", fa, fb);
  }
}

template <class T>
void deformed(DType dtype, bool linear, const std::vector<int64_t>& shape,
              const std::vector<int64_t>& points) {
  size_t size = 1, cells = 3;
  for (int64_t n : shape) size *= static_cast<size_t>(n);
  for (int64_t n : points) cells *= static_cast<size_t>(n);
  std::vector<T> image(size), a(size), b(size);
  for (auto& x : image) x = static_cast<T>(below(200));
  std::vector<double> grid(cells * static_cast<size_t>(shape[0])), affine;
  for (auto& c : grid) c = 6 * (real() - 0.5);
  for (int64_t item = 0; item < shape[0]; ++item)
    for (int k = 0; k < 12; ++k) affine.push_back((k % 5 == 0) + 0.1 * (real() - 0.5));
  const Array c = dense(grid, DType::f64, {shape[0], 3, points[0], points[1], points[2]});
  const Array m = dense(affine, DType::f64, {shape[0], 3, 4});
  DeformOptions options;
  options.linear = linear;
  options.fill = 3;
  cpu::deform(dense(image, dtype, shape), c, m, options, dense(a, dtype, shape), host);
  cuda::deform(dense(image, dtype, shape), c, m, options, dense(b, dtype, shape), device);
  same(linear ? "deform, linear" : "deform", a, b);
}

}  // namespace

int main() {
  for (int64_t n : {1, 4, 7, 1030}) uniform_numbers(3, n);
  uniform_numbers(1, 0);
  for (bool full : {false, true}) {
    for (double share : {0.0, 0.3, 0.5, 0.8, 1.0}) {
      objects({2, 1, 13, 14}, share, full);
      objects({1, 1, 1, 9}, share, full);
      objects({2, 5, 6, 7}, share, full);
    }
    objects({1, 1, 6, 200}, 0.95, full);
  }
  objects({1, 1, 3, 1200}, 0.97, true);  // rows of several pieces
  const std::vector<int64_t> flat = {2, 1, 9, 150}, deep = {1, 4, 6, 11};
  deformed<uint8_t>(DType::u8, false, flat, {1, 3, 4});
  deformed<uint16_t>(DType::f16, false, deep, {2, 3, 5});
  deformed<int32_t>(DType::i32, false, deep, {3, 2, 64});
  deformed<int64_t>(DType::i64, false, {1, 1, 1, 40}, {1, 1, 3});
  deformed<float>(DType::f32, true, flat, {1, 2, 9});
  deformed<double>(DType::f64, true, deep, {2, 2, 2});
  std::printf(failures ? "%d differences\n" : "noise: CUDA and CPU agree\n", failures);
  return failures != 0;
}
