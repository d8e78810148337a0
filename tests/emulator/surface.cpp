// The CUDA surface and overlap kernels, emulated, against the CPU functions on the same masks.
#include "noisyseg/surface.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "watched.h"

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

Exec place(bool cuda) {
  Exec exec;
  exec.device = cuda ? 0 : -1;
  exec.threads = 1;
  return exec;
}

#define CALL(name, ...) (cuda ? cuda::name(__VA_ARGS__) : cpu::name(__VA_ARGS__))

Array results(std::vector<double>& data) {
  Array out;
  out.data = data.data();
  out.dtype = DType::f64;
  return out;
}

// The items of label images in two calls.
std::vector<double> surfaces_of(bool cuda, const Array& p, const Array& t, int dims, SurfaceOptions options) {
  const Exec exec = place(cuda);
  int64_t items = options.classes ? options.classes : 1;
  for (int i = 0; i < p.rank - dims; ++i) items *= p.shape[i];
  std::vector<double> result((5 + options.tolerances) * items, NAN);
  for (int part = 0; part < (options.classes ? 2 : 1); ++part) {
    options.first = part;
    options.count = !options.classes ? 0 : part == 0 ? 1 : items - 1;
    std::vector<uint64_t> surfaces(CALL(surface_extract_workspace, p, dims, options, exec) / 8 + 1, ~0ull);
    std::vector<uint64_t> work(CALL(surface_extract, p, t, dims, options, surfaces.data(), exec) / 8 + 1,
                               ~0ull);
    CALL(surface_metrics, p, dims, options, surfaces.data(), work.data(), results(result), exec);
  }
  return result;
}

std::vector<double> overlap_of(bool cuda, const Array& p, const Array& t, int dims, int64_t items,
                               const OverlapOptions& options) {
  const Exec exec = place(cuda);
  std::vector<double> result(6 * items, NAN);
  std::vector<int64_t> counts(3 * items, -1);
  Array c;
  c.data = counts.data();
  CALL(overlap_metrics, p, t, dims, options, c, results(result), exec);
  result.insert(result.end(), counts.begin(), counts.end());
  return result;
}

void same(const char* what, const std::vector<double>& a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i] || std::fabs(a[i] - b[i]) <= 1e-13 * std::fabs(a[i])) continue;
    std::printf("%s: value %zu is %.17g on the CPU, %.17g on CUDA\n", what, i, a[i], b[i]);
    ++failures;
  }
}

void compare(const char* what, const Array& p, const Array& t, int dims, const SurfaceOptions& options) {
  const std::vector<double> cuda = surfaces_of(true, p, t, dims, options);
  same(what, surfaces_of(false, p, t, dims, options), cuda);
  if (dims == 1) same("again", cuda, surfaces_of(true, p, t, dims, options));
  OverlapOptions overlap;
  overlap.classes = options.classes;
  overlap.first_label = options.first_label;
  overlap.target_labels = options.classes > 0;
  int64_t items = options.classes ? options.classes : 1;
  for (int i = 0; i < p.rank - dims; ++i) items *= p.shape[i];
  same(what, overlap_of(false, p, t, dims, items, overlap), overlap_of(true, p, t, dims, items, overlap));
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

// Label images of 3 classes and one other label.
void labels(const char* what, SurfaceOptions options) {
  std::mt19937 random(11);
  const std::vector<int64_t> shape = {2, 3, 7, 70};
  std::vector<uint8_t> p(2 * 3 * 7 * 70);
  std::vector<int64_t> t(p.size());
  for (size_t i = 0; i < p.size(); ++i) {
    p[i] = random() % 8 < 5 ? 0 : random() % 4;
    t[i] = random() % 8 < 5 ? p[i] : random() % 3 == 0 ? -1 : 2;
  }
  compare(what, view(p, DType::u8, shape, false), view(t, DType::i64, shape, true), 3, options);
}

// Logits of some classes against labels and against masks of each class.
template <class T>
void logits(const char* what, DType dtype, int64_t classes, OverlapOptions options, bool masks) {
  std::mt19937 random(5);
  const std::vector<int64_t> shape = {2, classes, 9, 75}, image = {2, 9, 75};
  std::vector<T> p(2 * classes * 9 * 75);
  std::vector<uint8_t> t(masks ? p.size() : p.size() / classes);
  // Halves: numbers of few bits, so that some are equal.
  for (T& x : p)
    x = static_cast<T>(sizeof(T) == 2 ? 0x3c00 + 64 * (random() % 8) + 0x8000 * (random() % 2)
                                      : static_cast<int>(random() % 9) - 4);
  for (uint8_t& x : t) x = static_cast<uint8_t>(random() % (masks ? 2 : classes + 1));
  options.target_labels = !masks;
  const Array logit = view(p, dtype, shape, masks);
  const Array target = view(t, DType::u8, masks ? shape : image, false);
  const int64_t items = 2 * options.classes;
  same(what, overlap_of(false, logit, target, 2, items, options),
       overlap_of(true, logit, target, 2, items, options));
}

}  // namespace

int main() {
  SurfaceOptions unit, wide, medpy;
  wide.spacing[0] = 2.5;
  wide.spacing[1] = 0.7;
  wide.percentile = 50;
  medpy.pooled = true;
  medpy.tolerance[0] = 0;
  medpy.spacing[0] = medpy.spacing[1] = medpy.spacing[2] = 0.7;
  pair("noise, anisotropic", {4, 7, 70}, 3, 0.02, 0.9, false, wide);
  if (!watched) pair("noise, medpy", {4, 6, 33}, 3, 0.5, 0.02, false, medpy);
  pair("flat, batch", {2, 2, 11, 130}, 2, 0.05, 0.05, false, wide);
  pair("line", {150}, 1, 0.05, 0.03, false, unit);
  pair("sparse", {3, 5, 300}, 3, 0.002, 0.002, false, wide);
  pair("sparse, medpy", {36, 20, 8}, 3, 0.0003, 0.0002, false, medpy);
  if (!watched) pair("far apart", {24, 40, 8}, 3, 0.9, 0.9, true, unit);
  if (!watched) pair("pred empty", {4, 5, 6}, 3, 0, 0.3, false, unit);
  pair("both empty", {8, 6}, 2, 0, 0, false, unit);
  pair("full", {2, 2, 66, 8}, 2, 1, 1, false, unit);
  SurfaceOptions cells, full, classes;
  cells.surface = SurfaceKind::cells;
  cells.interpolate = false;
  cells.tolerances = 3;
  cells.tolerance[1] = 0;
  cells.tolerance[2] = 2.5;
  full.surface = SurfaceKind::full;
  full.border = false;
  full.mean_of_two = true;
  full.missing = 1000;
  pair("cells, axes reversed", {5, 9, 63}, 3, 0.3, 0.05, false, cells, true);
  if (!watched) pair("cells, two flat images", {2, 9, 64}, 2, 0.3, 0.6, false, cells);
  pair("full", {4, 6, 64}, 3, 0.97, 0.9, false, full);
  if (!watched) pair("full, no surface and none", {4, 6}, 2, 1, 0, false, full);
  cells.border = false;
  cells.pooled = true;
  cells.spacing[0] = 2.5;
  cells.percentile = 50;
  pair("cells, pooled, edge repeated", {5, 9, 70}, 3, 0.6, 0.9, false, cells);
  if (!watched) pair("cells, far apart", {24, 40, 8}, 3, 0.9, 0.9, true, cells);
  classes.classes = 2;
  classes.first_label = 1;
  classes.tolerance_classes = classes.tolerances = 2;
  classes.tolerance[1] = 2;
  classes.tolerance[2] = 0;
  classes.tolerance[3] = 1.5;
  labels("labels", classes);
  OverlapOptions largest, above;
  largest.pred = OverlapOptions::argmax;
  above.pred = OverlapOptions::above;
  largest.classes = above.classes = 3;
  logits<float>("argmax", DType::f32, 3, largest, false);
  logits<double>("argmax, masks", DType::f64, 3, largest, true);
  logits<uint16_t>("above, half", DType::f16, 3, above, true);
  largest.classes = 2;
  largest.first_label = 1;
  logits<uint16_t>("argmax, bfloat16, no background", DType::bf16, 3, largest, false);
  above.classes = 1;
  above.threshold = 0.5;
  logits<float>("one channel", DType::f32, 1, above, false);
  if (failures == 0) std::printf("surface: CUDA equals CPU\n");
  return failures != 0;
}
