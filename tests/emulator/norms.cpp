// The CUDA norms, emulated, against the CPU's: random draws of shapes, layouts, types, statistics and
// parameters; values, tangents, statistics and gradients.
#include "noisyseg/norms.h"

#include "tensors.h"
#include "watched.h"

#define DECLARE(space)                                                                                      \
  namespace noisyseg::space {                                                                               \
  size_t norm_workspace(const NormInputs&, const NormOptions&, const Exec&);                                \
  void norm_forward(const NormInputs&, const NormOptions&, const Array&, const Array&, const Array&, void*, \
                    const Exec&);                                                                           \
  void norm_backward(const NormInputs&, const NormOptions&, const Array&, const Array&, const Array&,       \
                     const Array&, const Array&, const Array&, void*, const Exec&);                         \
  }
DECLARE(cpu)
DECLARE(cuda)

namespace {

enum class Kind { batch, given, instance, group };

Tensor drawn(const Shape& shape, DType dtype, Order order, double middle) {
  Tensor t(shape, dtype, order);
  fill(t, static_cast<int>(shape.size()), [&](int64_t, int64_t) { return 2 * uniform() - 1 + middle; });
  return t;
}

// huge: a value whose square no float holds.
void check(const Shape& shape, Kind kind, bool dual, bool huge = false) {
  const DType dtype = huge ? DType::f32 : pick({DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16});
  const Order order = pick({Order::contiguous, Order::channels_last});
  const bool half = dtype == DType::f16 || dtype == DType::bf16;
  const DType wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const int64_t batch = shape[0], channels = shape[1];
  const auto vector = [&](int64_t n, double middle, bool wanted = true) {
    return wanted ? drawn({n}, pick({wide, wide, half ? dtype : wide}), Order::contiguous, middle) : Tensor();
  };
  NormOptions o;
  o.over_batch = kind == Kind::batch || kind == Kind::given, o.given = kind == Kind::given;
  o.groups = kind == Kind::group ? (channels % 2 ? 1 : 2) : channels;
  o.slope = pick({0.0, 0.2, 1.0}), o.momentum = 0.3;
  Tensor x = drawn(shape, dtype, order, 3), x_dot, grad_y = drawn(shape, dtype, order, 0.2);
  if (huge) reinterpret_cast<float*>(x.bytes.data())[1] = 1e30f;
  if (dual && pick(4)) x_dot = drawn(shape, dtype, order, 0.5);
  const bool affine = pick(3);
  const int64_t slopes = pick({int64_t{0}, int64_t{1}, channels});
  Tensor weight = vector(channels, 1, affine), bias = vector(channels, 0, affine);
  Tensor weight_dot = vector(channels, 0, affine && dual), bias_dot = vector(channels, 0, affine && dual);
  Tensor slope = vector(slopes, 0, slopes > 0), slope_dot = vector(slopes, 0, slopes > 0 && dual);
  const bool running = kind == Kind::given || (kind == Kind::batch && pick(2));
  std::string name = "norm of kind " + std::to_string(static_cast<int>(kind)) + ", dtype " +
                     std::to_string(static_cast<int>(dtype)) + (dual ? ", dual," : ",");
  for (int64_t n : shape) name += " " + std::to_string(n);
  if (order == Order::channels_last) name += ", channels last";

  const Shape stats_shape{o.over_batch ? channels : batch * o.groups, norm_stats};
  Tensor y[3], y_dot[3], stats[3], mean[3], var[3], grad_x[3], grad_weight[3], grad_bias[3], grad_slope[3];
  if (running)
    mean[0] = drawn({channels}, wide, Order::contiguous, 3),
    var[0] = drawn({channels}, wide, Order::contiguous, 2);
  for (int run = 1; run < 3; ++run) mean[run] = mean[0], var[run] = var[0];
  const std::vector<unsigned char> before = x.bytes;
  const bool no_value = dual && pick(4) == 0, no_grad_x = pick(5) == 0;
  for (int run = 0; run < 3; ++run) {
    const bool gpu = run > 0;
    const Exec& exec = gpu ? device : host;
    const NormInputs in{x.array(),         x_dot.array(),    weight.array(), weight_dot.array(),
                        bias.array(),      bias_dot.array(), slope.array(),  slope_dot.array(),
                        mean[run].array(), var[run].array()};
    if (!no_value) y[run] = Tensor(shape, dtype, order);
    if (dual) y_dot[run] = Tensor(shape, dtype, order);
    stats[run] = Tensor(stats_shape, DType::f64);
    if (!no_grad_x) grad_x[run] = Tensor(shape, dtype, order);
    if (affine) grad_weight[run] = Tensor({channels}, wide), grad_bias[run] = Tensor({channels}, wide);
    if (slopes) grad_slope[run] = Tensor({slopes}, wide);
    const size_t size = (gpu ? cuda::norm_workspace : cpu::norm_workspace)(in, o, exec);
    std::vector<double> workspace(size / sizeof(double), -7);
    (gpu ? cuda::norm_forward : cpu::norm_forward)(in, o, y[run].array(), y_dot[run].array(),
                                                   stats[run].array(), workspace.data(), exec);
    (gpu ? cuda::norm_backward : cpu::norm_backward)(
        in, o, grad_y.array(), stats[run].array(), grad_x[run].array(), grad_weight[run].array(),
        grad_bias[run].array(), grad_slope[run].array(), workspace.data(), exec);
  }
  if (x.bytes != before) fail(name, "an input was written to");
  const double tolerance = dtype == DType::f64 ? 1e-11 : 2e-5;
  const struct {
    const char* what;
    Tensor* of;
  } results[] = {{"y", y},
                 {"y_dot", y_dot},
                 {"the statistics", stats},
                 {"mean", mean},
                 {"var", var},
                 {"grad_x", grad_x},
                 {"grad_weight", grad_weight},
                 {"grad_bias", grad_bias},
                 {"grad_slope", grad_slope}};
  for (const auto& r : results) {
    compare(name, r.what, r.of[0], r.of[1], tolerance);
    if (r.of[1].bytes != r.of[2].bytes) fail(name, std::string("two runs differ in ") + r.what);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 1;
  for (int round = 0; round < rounds; ++round)
    for (const Kind kind : {Kind::batch, Kind::given, Kind::instance, Kind::group})
      for (const bool dual : {false, true}) {
        check({2, 3, 3, 5}, kind, dual);
        if (!watched || dual) check({3, 10, 2}, kind, dual);
        if (!watched || !dual) check({1, 4, 5, 1, 7}, kind, dual);
        check({2, 2, 19, 17}, kind, dual);
        check({2, 34, 9, 9}, kind, dual);
      }
  for (const bool dual : {false, true}) {
    check({1, 2, 50, 64}, Kind::batch, dual);  // several tiles
    check({1, 2, 50, 64}, Kind::group, dual);
    check({70, 3}, Kind::batch, dual);
    check({2, 3, 9, 8}, Kind::batch, dual, true);
  }
  std::fprintf(stderr, failures ? "norms: %d differences\n" : "norms: CUDA and CPU agree\n", failures);
  return failures != 0;
}
