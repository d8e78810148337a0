// The CUDA surface and overlap kernels, emulated, against the CPU functions on the same masks.
#include "noisyseg/surface.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace noisyseg;

namespace {

int failures = 0;

template <class T>
Array view(std::vector<T>& data, DType dtype, const std::vector<int64_t>& shape, bool reversed_axes) {
  Array a;
  a.data = data.data();
  a.dtype = dtype;
  a.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int i = 0; i < a.rank; ++i) {
    const int axis = reversed_axes ? i : a.rank - 1 - i;
    a.shape[axis] = shape[axis];
    a.strides[axis] = stride;
    stride *= shape[axis];
  }
  return a;
}

std::vector<double> run(bool cuda, const Array& p, const Array& t, int dims, const SurfaceOptions& options) {
  Exec exec;
  exec.device = cuda ? 0 : -1;
  exec.threads = 1;
  int64_t items = 1;
  for (int i = 0; i < p.rank - dims; ++i) items *= p.shape[i];
  std::vector<double> result(11 * items, NAN);
  std::vector<int64_t> out_shape = {5, items};
  Array out;
  out.data = result.data();
  out.dtype = DType::f64;
#define CALL(name, ...) (cuda ? cuda::name(__VA_ARGS__) : cpu::name(__VA_ARGS__))
  std::vector<uint64_t> surfaces(CALL(surface_extract_workspace, p, dims, exec) / 8 + 1, ~0ull);
  std::vector<uint64_t> work(CALL(surface_extract, p, t, dims, options, surfaces.data(), exec) / 8 + 1,
                             ~0ull);
  CALL(surface_metrics, p, dims, options, surfaces.data(), work.data(), out, exec);
  std::vector<uint64_t> counts(CALL(overlap_metrics_workspace, p, dims, exec) / 8 + 1, ~0ull);
  out.data = result.data() + 5 * items;
  CALL(overlap_metrics, p, t, dims, counts.data(), out, exec);
#undef CALL
  return result;
}

void compare(const char* what, const Array& p, const Array& t, int dims, const SurfaceOptions& options) {
  const std::vector<double> a = run(false, p, t, dims, options), b = run(true, p, t, dims, options);
  const bool twice = dims == 1;
  const std::vector<double> again = twice ? run(true, p, t, dims, options) : b;
  for (size_t i = 0; i < a.size(); ++i) {
    if (again[i] == b[i] && (a[i] == b[i] || std::fabs(a[i] - b[i]) <= 3e-7 * std::fabs(a[i]))) continue;
    std::printf("%s: value %zu is %.9g on the CPU, %.9g and %.9g on CUDA\n", what, i, a[i], b[i], again[i]);
    ++failures;
  }
}

// Noise of the two densities in all but the last axis' middle: far apart where apart is set.
void pair(const char* what, const std::vector<int64_t>& shape, int dims, double density_p, double density_t,
          bool apart, const SurfaceOptions& options, bool reversed_axes = false) {
  std::mt19937 random(7);
  int64_t n = 1;
  for (int64_t s : shape) n *= s;
  std::vector<uint8_t> p(n);
  std::vector<int32_t> t(n);
  std::uniform_real_distribution<double> uniform(0, 1);
  const int64_t axis_length = shape[shape.size() - dims], below = n / axis_length;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i / (dims == static_cast<int>(shape.size()) ? below : 1) % axis_length;
    p[i] = uniform(random) < density_p && (!apart || at < 3) ? 255 : 0;
    t[i] = uniform(random) < density_t && (!apart || at >= axis_length - 2) ? -256 : 0;
  }
  compare(what, view(p, DType::u8, shape, false), view(t, DType::i32, shape, reversed_axes), dims, options);
}

}  // namespace

int main() {
  SurfaceOptions unit, wide, medpy;
  wide.spacing[0] = 2.5;
  wide.spacing[1] = 0.7;
  wide.percentile = 50;
  medpy.definition = SurfaceDefinition::medpy;
  medpy.tolerance = 0;
  medpy.spacing[0] = medpy.spacing[1] = medpy.spacing[2] = 0.7;
  pair("noise", {5, 9, 70}, 3, 0.3, 0.05, false, unit);
  pair("noise, anisotropic", {5, 9, 70}, 3, 0.02, 0.9, false, wide);
  pair("noise, medpy", {4, 6, 33}, 3, 0.5, 0.02, false, medpy);
  pair("axes reversed", {4, 6, 33}, 3, 0.5, 0.02, false, unit, true);
  pair("flat, batch", {2, 3, 21, 130}, 2, 0.05, 0.05, false, wide);
  pair("line", {150}, 1, 0.05, 0.03, false, unit);
  pair("one voxel wide", {1, 1, 140}, 3, 0.05, 0.03, false, unit);
  pair("sparse", {3, 5, 300}, 3, 0.002, 0.002, false, wide);
  pair("sparse, medpy", {36, 20, 8}, 3, 0.0003, 0.0002, false, medpy);
  pair("far apart", {24, 40, 8}, 3, 0.9, 0.9, true, unit);
  pair("far apart, anisotropic", {24, 40, 8}, 3, 0.9, 0.9, true, wide);
  pair("pred empty", {4, 5, 6}, 3, 0, 0.3, false, unit);
  pair("target empty", {2, 8, 6}, 2, 0.3, 0, false, medpy);
  pair("both empty", {8, 6}, 2, 0, 0, false, unit);
  pair("full", {2, 2, 66, 8}, 2, 1, 1, false, unit);
  if (failures == 0) std::printf("surface: CUDA equals CPU\n");
  return failures != 0;
}
