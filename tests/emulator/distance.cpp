// The CUDA distance transforms, emulated, against the CPU's.
#include "noisyseg/distance.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/edt.cuh"

#define DECLARE(space)                                                                                   \
  namespace noisyseg::space {                                                                            \
  size_t distance_workspace(const Array&, int, bool, bool, const Exec&);                                 \
  void distance_transform_edt(const Array&, int, const double*, bool, const Array&, const Array&, void*, \
                              const Exec&);                                                              \
  void signed_distance_map(const Array&, int, const double*, SignedMap, bool, const Array&, void*,       \
                           const Exec&);                                                                 \
  }
DECLARE(cpu)
DECLARE(cuda)

using namespace noisyseg;

namespace {

const Exec host{-1, nullptr, 1}, device{0, nullptr, 0};
int failures = 0;

template <class T>
Array dense(std::vector<T>& values, DType dtype, const std::vector<int64_t>& shape) {
  Array a;
  a.data = values.data();
  a.dtype = dtype;
  a.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = a.rank - 1; d >= 0; --d) {
    a.shape[d] = shape[static_cast<size_t>(d)];
    a.strides[d] = stride;
    stride *= a.shape[d];
  }
  return a;
}

void compare(const std::vector<float>& cpu, const std::vector<float>& gpu, double tolerance, const char* what,
             const std::vector<int64_t>& shape, const char* mask) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    const bool same = cpu[i] == gpu[i] || std::fabs(cpu[i] - gpu[i]) <= tolerance * std::fabs(cpu[i]);
    if (same) continue;
    std::printf("%s, mask %s, shape", what, mask);
    for (int64_t n : shape) std::printf(" %ld", static_cast<long>(n));
    std::printf(": voxel %zu is %.9g, the CPU has %.9g\n", i, static_cast<double>(gpu[i]),
                static_cast<double>(cpu[i]));
    ++failures;
    return;
  }
}

void run(const std::vector<int64_t>& shape, int dims, const double* spacing, const char* kind,
         unsigned seed) {
  size_t n = 1;
  for (int64_t extent : shape) n *= static_cast<size_t>(extent);
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(n, 1);
  if (!std::strcmp(kind, "random"))
    for (auto& x : bytes) x = random() % 4 != 0;
  if (!std::strcmp(kind, "sparse"))
    for (auto& x : bytes) x = random() % 200 != 0;
  if (!std::strcmp(kind, "empty"))
    for (auto& x : bytes) x = 0;
  if (!std::strcmp(kind, "lone")) bytes[random() % n] = 0;
  std::vector<int64_t> wide(bytes.begin(), bytes.end());
  const Array mask = seed % 2 ? dense(wide, DType::i64, shape) : dense(bytes, DType::u8, shape);
  const double tolerance = spacing ? 1e-6 : 0;
  const auto work = [&](bool contour, const Exec& exec) {
    const size_t size = exec.device < 0 ? cpu::distance_workspace(mask, dims, false, contour, exec)
                                        : cuda::distance_workspace(mask, dims, false, contour, exec);
    return std::vector<uint64_t>(size / 8 + 1, ~uint64_t{0});
  };
  for (bool squared : {false, true}) {
    std::vector<float> a(n, -7), b(n, -7);
    auto wa = work(false, host), wb = work(false, device);
    cpu::distance_transform_edt(mask, dims, spacing, squared, dense(a, DType::f32, shape), {}, wa.data(),
                                host);
    cuda::distance_transform_edt(mask, dims, spacing, squared, dense(b, DType::f32, shape), {}, wb.data(),
                                 device);
    compare(a, b, tolerance, squared ? "squared edt" : "edt", shape, kind);
  }
  const char* const names[] = {"boundary", "two_sided", "kervadec", "dtc"};
  for (int convention = 0; convention < 4; ++convention)
    for (bool normalize : {false, true}) {
      std::vector<float> a(n, -7), b(n, -7);
      auto wa = work(convention == 0, host), wb = work(convention == 0, device);
      const auto c = static_cast<SignedMap>(convention);
      cpu::signed_distance_map(mask, dims, spacing, c, normalize, dense(a, DType::f32, shape), wa.data(),
                               host);
      cuda::signed_distance_map(mask, dims, spacing, c, normalize, dense(b, DType::f32, shape), wb.data(),
                                device);
      compare(a, b, tolerance, names[convention], shape, kind);
    }
  if (dims == 3 && shape.size() == 4 && seed % 2 == 0) {
    std::vector<float> a(n, -7), b(n, -7);
    auto wa = work(false, host);
    std::vector<uint8_t> sites(bytes);
    for (auto& x : sites) x = !x;
    std::vector<uint64_t> wb(cuda::squared_distance_workspace(shape[0], &shape[1]) / 8 + 1);
    const double ones[3] = {1, 1, 1};
    cpu::distance_transform_edt(mask, dims, spacing, true, dense(a, DType::f32, shape), {}, wa.data(), host);
    cuda::squared_distance(sites.data(), b.data(), wb.data(), shape[0], &shape[1], spacing ? spacing : ones,
                           device);
    compare(a, b, tolerance, "squared_distance", shape, kind);
  }
}

}  // namespace

int main() {
  const double spacing[3] = {2.5, 0.7, 1.3};
  unsigned seed = 0;
  for (const char* kind : {"random", "sparse", "full", "empty", "lone"}) {
    run({17}, 1, nullptr, kind, seed++);
    run({1}, 1, spacing, kind, seed++);
    run({2, 9, 5}, 2, spacing, kind, seed++);
    run({2, 8, 8}, 2, nullptr, kind, seed++);
    run({1, 3, 4, 5}, 3, spacing, kind, seed++);
    run({2, 5, 1, 7}, 3, nullptr, kind, seed++);
    run({1, 80, 81}, 2, nullptr, kind, seed++);  // too large for one block: one kernel for each axis
    run({1, 6, 40, 33}, 3, spacing, kind, seed++);
  }
  run({1, 13000}, 1, nullptr, "random", 2);  // a row that does not fit shared memory
  std::printf(failures ? "%d differences\n" : "distance: CUDA and CPU agree\n", failures);
  return failures != 0;
}
