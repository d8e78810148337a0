// The CUDA distance transforms, emulated, against the CPU's.
#include "noisyseg/distance.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/edt.cuh"
#include "dense.h"
#include "watched.h"

#define DECLARE(space)                                                                                     \
  namespace noisyseg::space {                                                                              \
  size_t distance_workspace(const Array&, int, const DistanceOptions&, bool, bool, const Exec&);           \
  void distance_transform_edt(const Array&, int, const double*, const DistanceOptions&, const Array&,      \
                              const Array&, void*, const Exec&);                                           \
  void signed_distance_map(const Array&, int, const double*, const DistanceOptions&, const Array&, void*,  \
                           const Exec&);                                                                   \
  size_t sampled_distance_workspace(const Array&, int, const Exec&);                                       \
  void sampled_distance(const Array&, const Array&, int, const double*, const Array&, const Array&, void*, \
                        const Exec&);                                                                      \
  void sampled_distance_backward(const Array&, const Array&, int, const Array&, void*, const Exec&);       \
  }
DECLARE(cpu)
DECLARE(cuda)

using namespace noisyseg;

namespace {

const Exec host{-1, nullptr, 1}, device{0, nullptr, 0};
int failures = 0;

template <class T>
void compare(const std::vector<T>& cpu, const std::vector<T>& gpu, double tolerance, const char* what,
             const std::vector<int64_t>& shape, const char* mask) {
  for (size_t i = 0; i < cpu.size(); ++i) {
    const bool same = cpu[i] == gpu[i] ||
                      std::fabs(double(cpu[i]) - double(gpu[i])) <= tolerance * std::fabs(double(cpu[i]));
    if (same) continue;
    std::printf("%s, mask %s, shape", what, mask);
    for (int64_t n : shape) std::printf(" %ld", static_cast<long>(n));
    std::printf(": voxel %zu is %.9g, the CPU has %.9g\n", i, static_cast<double>(gpu[i]),
                static_cast<double>(cpu[i]));
    ++failures;
    return;
  }
}

// Whether an item's indices name voxels of another class (or label) at the squared distances found.
template <class T>
void check_indices(const std::vector<int64_t>& labels, const std::vector<T>& squared,
                   const std::vector<int32_t>& sites, const std::vector<int64_t>& shape, int dims,
                   const double* spacing, bool multi_label, const char* mask) {
  const size_t lead = shape.size() - static_cast<size_t>(dims);
  int64_t voxels = 1;
  for (size_t d = lead; d < shape.size(); ++d) voxels *= shape[d];
  for (int64_t at = 0; at < static_cast<int64_t>(squared.size()); ++at) {
    const int64_t item = at / voxels;
    int64_t rest = at % voxels, from = 0, step = 1;
    double reached = 0;
    bool none = false;
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t n = shape[lead + static_cast<size_t>(d)], i = rest % n;
      const int64_t j = sites[static_cast<size_t>((item * dims + d) * voxels + at % voxels)];
      none = none || j < 0;
      const double w = spacing ? spacing[d] : 1;
      reached += w * w * static_cast<double>((i - j) * (i - j));
      from += j * step;
      step *= n;
      rest /= n;
    }
    const int64_t own = labels[static_cast<size_t>(at)];
    const double found = static_cast<double>(squared[static_cast<size_t>(at)]);
    bool right = none ? std::isinf(found) : std::fabs(reached - found) <= 1e-6 * found;
    if (right && !none && own != 0) {
      const int64_t other = labels[static_cast<size_t>(item * voxels + from)];
      right = multi_label ? other != own : other == 0;
    }
    if (right) continue;
    std::printf("indices, mask %s: voxel %ld of %ld\n", mask, static_cast<long>(at),
                static_cast<long>(squared.size()));
    ++failures;
    return;
  }
}

template <class T>
void run_as(const std::vector<int64_t>& shape, int dims, const double* spacing, const char* kind,
            unsigned seed) {
  constexpr bool fp64 = sizeof(T) == 8;
  constexpr DType real = fp64 ? DType::f64 : DType::f32;
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
  const bool is_wide = seed % 2;
  const double tolerance = spacing ? 1e-6 : 0;
  const auto labels_of = [&](int many) {  // pieces of several labels, 0 where the mask is
    std::vector<int64_t> labels(n);
    for (size_t i = 0; i < n; ++i)
      labels[i] = bytes[i] * (1 + static_cast<int64_t>(i / 37 % static_cast<size_t>(many)));
    return labels;
  };
  const auto both = [&](const Array& mask, const DistanceOptions& options, bool is_signed, bool indices,
                        const char* what) {
    std::vector<int64_t> to(shape);
    size_t size = n;
    if (options.num_classes) {
      to.insert(to.end() - dims, options.num_classes);
      size *= static_cast<size_t>(options.num_classes);
    }
    std::vector<T> a(size, -7), b(size, -7);
    std::vector<int32_t> sites(n * static_cast<size_t>(dims));
    const auto memory = [&](const Exec& exec) {
      const size_t wanted = exec.device < 0
                                ? cpu::distance_workspace(mask, dims, options, false, fp64, exec)
                                : cuda::distance_workspace(mask, dims, options, indices, fp64, exec);
      return std::vector<uint64_t>(wanted / 8 + 1, ~uint64_t{0});
    };
    auto wa = memory(host), wb = memory(device);
    if (is_signed) {
      cpu::signed_distance_map(mask, dims, spacing, options, dense(a, real, to), wa.data(), host);
      cuda::signed_distance_map(mask, dims, spacing, options, dense(b, real, to), wb.data(), device);
    } else {
      cpu::distance_transform_edt(mask, dims, spacing, options, dense(a, real, to), {}, wa.data(), host);
      cuda::distance_transform_edt(
          mask, dims, spacing, options, dense(b, real, to),
          indices ? dense(sites, DType::i32, {static_cast<int64_t>(sites.size())}) : Array{}, wb.data(),
          device);
    }
    compare(a, b, tolerance, what, shape, kind);
    if (!indices) return;
    std::vector<int64_t> labels(n);
    for (size_t i = 0; i < n; ++i)
      labels[i] = mask.dtype == DType::i64 ? static_cast<int64_t*>(mask.data)[i]
                                           : static_cast<uint8_t*>(mask.data)[i];
    check_indices(labels, b, sites, shape, dims, spacing, options.multi_label, kind);
  };
  const Array mask = is_wide ? dense(wide, DType::i64, shape) : dense(bytes, DType::u8, shape);
  std::vector<int64_t> many = labels_of(3);
  const Array labels = dense(many, DType::i64, shape);
  DistanceOptions options;
  options.squared = true;
  both(mask, options, false, false, "squared edt");
  both(mask, options, false, true, "squared edt with indices");
  options.multi_label = true;
  both(labels, options, false, false, "labels");
  both(labels, options, false, true, "labels with indices");
  options.border = true;
  both(labels, options, false, false, "labels with border");
  options = {};
  options.no_site = 99;
  both(mask, options, false, false, "edt with no_site");
  options.border = true;
  both(mask, options, false, false, "edt with border");
  const char* const names[] = {"boundary", "two_sided", "kervadec", "dtc"};
  for (int convention = 0; convention < 4; ++convention)
    for (const bool normalize : {false, true}) {
      if ((watched || n > 1000) && normalize != (convention > 1)) continue;  // what takes its time
      options = {};
      options.convention = static_cast<SignedMap>(convention);
      options.normalize = normalize;
      both(mask, options, true, false, names[convention]);
      options.border = true;
      options.no_site = 50;
      options.num_classes = 3;
      both(labels, options, true, false, names[convention]);
    }

  std::vector<T> values(n), grad(n);
  for (auto& x : values) x = static_cast<T>(random() % 1000) / 16 - 20;
  for (auto& x : grad) x = static_cast<T>(random() % 1000) / 1000;
  std::vector<uint64_t> wa(cpu::sampled_distance_workspace(dense(values, real, shape), dims, host) / 8 + 1);
  std::vector<uint64_t> wb(cuda::sampled_distance_workspace(dense(values, real, shape), dims, device) / 8 +
                           1);
  for (const Array& sites : {Array{}, mask}) {
    std::vector<T> a(n), b(n), da(n), db(n);
    std::vector<int32_t> from_a(n * static_cast<size_t>(dims)), from_b(from_a);
    const Array ia = dense(from_a, DType::i32, {static_cast<int64_t>(from_a.size())}),
                ib = dense(from_b, DType::i32, {static_cast<int64_t>(from_b.size())});
    cpu::sampled_distance(dense(values, real, shape), sites, dims, spacing, dense(a, real, shape), ia,
                          wa.data(), host);
    cuda::sampled_distance(dense(values, real, shape), sites, dims, spacing, dense(b, real, shape), ib,
                           wb.data(), device);
    compare(a, b, 0, "sampled_distance", shape, kind);
    cpu::sampled_distance_backward(dense(grad, real, shape), ia, dims, dense(da, real, shape), wa.data(),
                                   host);
    cuda::sampled_distance_backward(dense(grad, real, shape), ib, dims, dense(db, real, shape), wb.data(),
                                    device);
    compare(da, db, 0, "sampled_distance_backward", shape, kind);
  }

  if constexpr (!fp64)
    if (dims == 3 && shape.size() == 4 && seed % 2 == 0) {
      std::vector<T> a(n, -7), b(n, -7);
      options = {};
      options.squared = true;
      std::vector<uint64_t> memory(cpu::distance_workspace(mask, dims, options, false, false, host) / 8 + 1);
      std::vector<uint8_t> sites(bytes);
      for (auto& x : sites) x = !x;
      std::vector<uint64_t> other(cuda::squared_distance_workspace(shape[0], &shape[1]) / 8 + 1);
      const double ones[3] = {1, 1, 1};
      cpu::distance_transform_edt(mask, dims, spacing, options, dense(a, DType::f32, shape), {},
                                  memory.data(), host);
      cuda::squared_distance(sites.data(), b.data(), other.data(), shape[0], &shape[1],
                             spacing ? spacing : ones, device);
      compare(a, b, tolerance, "squared_distance", shape, kind);
    }
}

void run(const std::vector<int64_t>& shape, int dims, const double* spacing, const char* kind,
         unsigned seed) {
  if (seed % 3)
    run_as<float>(shape, dims, spacing, kind, seed);
  else
    run_as<double>(shape, dims, spacing, kind, seed);
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
    // What takes its time: threads do much the same for each kind.
    if (std::strcmp(kind, "random") && (watched || std::strcmp(kind, "lone"))) continue;
    run({1, 80, 81}, 2, nullptr, kind, seed++);  // too large for one block: one kernel for each axis
    run({1, 6, 40, 33}, 3, spacing, kind, seed++);
  }
  // Lines so long that their searches give way to the envelope, along axis 2 and axis 0.
  for (const char* kind : {"sparse", "lone"}) {
    if (watched && !std::strcmp(kind, "sparse")) continue;
    run({3, 300}, 2, nullptr, kind, seed++);
    run({300, 2, 3}, 3, spacing, kind, seed++);
    run({1, 270, 1, 20}, 3, nullptr, kind, seed++);
  }
  run({1, 13000}, 1, nullptr, "random", 2);  // a row that does not fit shared memory
  std::printf(failures ? "%d differences\n" : "distance: CUDA and CPU agree\n", failures);
  return failures != 0;
}
