// The CUDA losses of several maps, emulated, against the CPU's: random draws of shapes, layouts, types and
// options, values, gradients and their derivatives along a direction.
#include "noisyseg/task_losses.h"

#include "tensors.h"
#include "watched.h"

#define DECLARE(space)                                                                                       \
  namespace noisyseg::space {                                                                                \
  size_t uncertainty_workspace(const UncertaintyInputs&, const Exec&);                                       \
  TaskFault uncertainty_forward(const UncertaintyInputs&, const UncertaintyOptions&, const Array&,           \
                                const Array&, const Array&, void*, const Exec&);                             \
  void uncertainty_backward(const UncertaintyInputs&, const UncertaintyOptions&, const Array&, const Array&, \
                            const Array&, const Array&, const Array&, const Exec&);                          \
  size_t dual_task_workspace(const DualTaskInputs&, const Exec&);                                            \
  TaskFault dual_task_forward(const DualTaskInputs&, const DualTaskOptions&, const Array&, const Array&,     \
                              void*, const Exec&);                                                           \
  void dual_task_backward(const DualTaskInputs&, const DualTaskOptions&, const Array&, const Array&,         \
                          const Array&, const Array&, const Array&, const Exec&);                            \
  }
DECLARE(cpu)
DECLARE(cuda)

namespace {

enum class Spoil { none, labels, raters };

struct Drawn {
  Tensor logits, other, labels, weights, mask, logits_dot, other_dot;
  std::string name;
};

// logits (B, 1, *S); the other input and the labels (B, M, *S); weights of the given shape, some of them 0.
// Masked pixels and the labels of images or maps of weight 0 hold nonsense.
Drawn draw(const Shape& shape, int64_t maps, const Shape& weights, double scale, bool direction,
           Spoil spoil) {
  Drawn in;
  const int rank = static_cast<int>(shape.size());
  Shape pixels = shape, several = shape;
  pixels.erase(pixels.begin() + 1);
  several[1] = maps;
  const auto floats = {DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16};
  const DType dtype = pick(floats), other_dtype = pick(3) ? dtype : pick(floats);
  const auto order = pick({Order::contiguous, Order::contiguous, Order::channels_last, Order::strided});
  const auto label_dtype =
      pick({DType::u8, DType::b8, DType::i32, DType::i64, DType::f32, DType::bf16, DType::f64});
  const DType labels = spoil == Spoil::labels ? pick({DType::u8, DType::i32, DType::i64}) : label_dtype;
  const bool soft = static_cast<int>(labels) >= static_cast<int>(DType::f16);
  const bool mask = spoil == Spoil::none && pick(2);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  int64_t count = 1;
  for (int64_t n : pixels) count *= n;
  std::vector<bool> keep;
  for (int64_t i = 0; i < count; ++i) keep.push_back(!mask || pick(4) != 0);
  const auto kept = [&](int64_t pixel) { return keep[static_cast<size_t>(pixel)]; };
  in.logits = Tensor(shape, dtype, order);
  fill(in.logits, rank,
       [&](int64_t p, int64_t) { return kept(p) ? 6 * (uniform() - 0.5) * (pick(8) ? 1 : 10) : nan; });
  in.other = Tensor(several, other_dtype, order);
  fill(in.other, rank,
       [&](int64_t p, int64_t) { return kept(p) ? scale * (uniform() - (scale < 1 ? 0.5 : 0.0)) : nan; });
  in.labels = Tensor(several, labels, pick({Order::contiguous, order}));
  fill(in.labels, rank, [&](int64_t p, int64_t) {
    return !kept(p) ? (labels == DType::b8 ? 1.0 : 7.0) : soft ? uniform() : static_cast<double>(pick(2));
  });
  if (spoil == Spoil::labels && count) {
    int64_t left = 1;
    fill(in.labels, rank, [&](int64_t, int64_t) { return left-- > 0 ? 2.0 : 1.0; });
  }
  if (spoil == Spoil::raters || pick(2)) {
    in.weights = Tensor(weights, pick({DType::f32, DType::f64, DType::bf16, DType::i64}));
    fill(in.weights, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(3)); });
    if (spoil == Spoil::raters) fill(in.weights, -1, [&](int64_t, int64_t) { return -1.0; });
    if (spoil == Spoil::labels) fill(in.weights, -1, [&](int64_t, int64_t) { return 1.0; });
  }
  if (mask) {
    in.mask = Tensor(pixels, pick({DType::b8, DType::f32, DType::i64}));
    fill(in.mask, rank, [&](int64_t p, int64_t) { return kept(p) ? 1.0 : 0.0; });
  }
  if (direction) {
    const int64_t which = pick(3);
    if (which != 1) in.logits_dot = Tensor(shape, dtype, pick({Order::contiguous, order}));
    if (which != 0) in.other_dot = Tensor(several, other_dtype, order);
    for (Tensor* dot : {&in.logits_dot, &in.other_dot})
      fill(*dot, rank, [&](int64_t, int64_t) { return 2 * uniform() - 1; });
  }
  in.name = "shape";
  for (int64_t n : shape) in.name += " " + std::to_string(n);
  in.name += ", maps " + std::to_string(maps) + ", dtypes " + std::to_string(static_cast<int>(dtype)) + " " +
             std::to_string(static_cast<int>(other_dtype)) + " " + std::to_string(static_cast<int>(labels)) +
             ", order " + std::to_string(static_cast<int>(order)) + (mask ? ", mask" : "") +
             (in.weights.view.rank ? ", weights" : "") + (in.logits_dot.view.rank ? ", along logits" : "") +
             (in.other_dot.view.rank ? ", along the other" : "");
  return in;
}

// forward(gpu, terms, scores, sums, exec) and backward(gpu, grad_terms, its direction, sums, gradients,
// exec): CPU once, CUDA twice.
template <class Forward, class Backward>
void check(const std::string& name, Drawn& in, const Shape& terms_shape, const Shape& scores_shape,
           int64_t sums, Spoil spoil, const Forward& forward, const Backward& backward) {
  const bool direction = in.logits_dot.view.rank || in.other_dot.view.rank;
  const bool fp64 = in.logits.view.dtype == DType::f64 || in.other.view.dtype == DType::f64;
  const DType dtype = fp64 ? DType::f64 : DType::f32;
  const double tolerance = fp64 || direction ? 1e-11 : 1e-5;
  const int64_t batch = in.logits.view.shape[0];
  Tensor terms[3], scores[3], kept[3], by_logits[3], by_other[3];
  const Shape input(in.logits.view.shape, in.logits.view.shape + in.logits.view.rank);
  const Shape other(in.other.view.shape, in.other.view.shape + in.other.view.rank);
  Tensor grad_terms(terms_shape, dtype,
                    terms_shape.size() > 1 ? pick({Order::contiguous, Order::expanded}) : Order::contiguous);
  Tensor grad_terms_dot;
  fill(grad_terms, -1, [](int64_t, int64_t) { return uniform() - 0.2; });
  if (direction && pick(2)) {
    grad_terms_dot = Tensor(terms_shape, dtype);
    fill(grad_terms_dot, -1, [](int64_t, int64_t) { return uniform() - 0.5; });
  }
  const int64_t without = spoil == Spoil::none ? pick(6) : 2;  // 0, 1: one gradient is not wanted
  const std::vector<unsigned char> before = in.logits.bytes, other_before = in.other.bytes;
  for (int run = 0; run < 3; ++run) {
    const bool gpu = run > 0;
    const Exec& exec = gpu ? device : host;
    terms[run] = Tensor(terms_shape, dtype);
    if (!direction && !scores_shape.empty()) scores[run] = Tensor(scores_shape, dtype);
    kept[run] = Tensor(direction ? Shape{batch, sums, 2} : Shape{batch, sums}, DType::f64);
    if (without != 0) by_logits[run] = Tensor(input, in.logits.view.dtype, Order::strided);
    if (without != 1) by_other[run] = Tensor(other, in.other.view.dtype, Order::channels_last);
    const TaskFault fault = forward(gpu, terms[run].array(), scores[run].array(), kept[run].array(), exec);
    if (spoil != Spoil::none) {
      if (!gpu && fault != (spoil == Spoil::labels ? TaskFault::labels : TaskFault::raters))
        fail(name, "the CPU does not report the fault");
      bool nan = false;
      for (double x : terms[run].values()) nan |= std::isnan(x);
      if (gpu && !nan) fail(name, "a fault does not give NaN");
      continue;
    }
    if (fault != TaskFault::none) fail(name, "a fault is reported where none is");
    backward(gpu, grad_terms.array(), grad_terms_dot.array(), kept[run].array(), by_logits[run].array(),
             by_other[run].array(), exec);
  }
  if (in.logits.bytes != before || in.other.bytes != other_before) fail(name, "an input was written to");
  if (spoil != Spoil::none) return;
  compare(name, "a term", terms[0], terms[1], tolerance);
  compare(name, "a score", scores[0], scores[1], tolerance);
  compare(name, "the sums", kept[0], kept[1], tolerance);
  compare(name, "the gradient of logits", by_logits[0], by_logits[1], tolerance);
  compare(name, "the other gradient", by_other[0], by_other[1], tolerance);
  if (terms[1].bytes != terms[2].bytes || by_logits[1].bytes != by_logits[2].bytes ||
      by_other[1].bytes != by_other[2].bytes)
    fail(name, "two runs differ");
}

void uncertainty(const Shape& shape, int64_t maps, bool direction, Spoil spoil = Spoil::none) {
  Drawn in = draw(shape, maps, {shape[0], maps}, 1, direction, spoil);
  const UncertaintyInputs inputs{in.logits.array(),   in.other.array(), in.labels.array(),
                                 in.weights.array(),  in.mask.array(),  in.logits_dot.array(),
                                 in.other_dot.array()};
  UncertaintyOptions o;
  o.dice_weight = uniform() + 0.5, o.consistency_weight = uniform() + 0.5, o.binary_entropy = pick(2);
  o.eps = pick({1e-5, 0.0}),
  o.reduction = pick({TaskReduction::mean, TaskReduction::sum, TaskReduction::image});
  const bool image = o.reduction == TaskReduction::image;
  check(
      "uncertainty-weighted loss, " + in.name, in, image ? Shape{4, shape[0]} : Shape{4}, {2, shape[0]},
      uncertainty_sums(maps), spoil,
      [&](bool gpu, const Array& terms, const Array& scores, const Array& sums, const Exec& exec) {
        const size_t size = (gpu ? cuda::uncertainty_workspace : cpu::uncertainty_workspace)(inputs, exec);
        std::vector<double> workspace(size / sizeof(double), -7);
        return (gpu ? cuda::uncertainty_forward : cpu::uncertainty_forward)(inputs, o, terms, scores, sums,
                                                                            workspace.data(), exec);
      },
      [&](bool gpu, const Array& grad, const Array& grad_dot, const Array& sums, const Array& a,
          const Array& b, const Exec& exec) {
        (gpu ? cuda::uncertainty_backward : cpu::uncertainty_backward)(inputs, o, grad, grad_dot, sums, a, b,
                                                                       exec);
      });
}

void dual_task(const Shape& shape, bool direction, Spoil spoil = Spoil::none) {
  Drawn in = draw(shape, 1, {shape[0]}, 0.01, direction, spoil);
  const DualTaskInputs inputs{in.logits.array(),   in.other.array(), in.labels.array(),
                              in.weights.array(),  in.mask.array(),  in.logits_dot.array(),
                              in.other_dot.array()};
  DualTaskOptions o;
  o.k = pick({1500.0, 300.0}), o.eps = pick({1e-5, 0.0}), o.per_image = pick(2);
  o.routing = pick({Routing::own, Routing::shared, Routing::logits, Routing::sdf});
  o.labelled_count = spoil == Spoil::none ? pick(shape[0] + 1) : shape[0];
  const bool image = o.per_image && pick(2);
  if (image) o.reduction = TaskReduction::image;
  check(
      "dual-task loss, " + in.name + (o.per_image ? ", per image" : ""), in,
      image ? Shape{3, shape[0]} : Shape{3}, {}, dual_task_sums, spoil,
      [&](bool gpu, const Array& terms, const Array&, const Array& sums, const Exec& exec) {
        const size_t size = (gpu ? cuda::dual_task_workspace : cpu::dual_task_workspace)(inputs, exec);
        std::vector<double> workspace(size / sizeof(double), -7);
        return (gpu ? cuda::dual_task_forward : cpu::dual_task_forward)(inputs, o, terms, sums,
                                                                        workspace.data(), exec);
      },
      [&](bool gpu, const Array& grad, const Array& grad_dot, const Array& sums, const Array& a,
          const Array& b, const Exec& exec) {
        (gpu ? cuda::dual_task_backward : cpu::dual_task_backward)(inputs, o, grad, grad_dot, sums, a, b,
                                                                   exec);
      });
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : watched ? 1 : 2;
  for (int round = 0; round < rounds; ++round)
    for (bool direction : {false, true}) {
      for (int64_t maps : {1, 2, 5}) {
        uncertainty({1, 1, 1, 1}, maps, direction);
        uncertainty({3, 1, 3, 5}, maps, direction);
        uncertainty({2, 1, 257}, maps, direction);
      }
      dual_task({1, 1, 1, 1}, direction);
      dual_task({4, 1, 3, 5}, direction);
      dual_task({2, 1, 257}, direction);
      dual_task({3, 1, 3, 1, 5}, direction);
    }
  for (bool direction : {false, true}) {
    if (!watched || direction) uncertainty({1, 1, 40, 64}, 3, direction);  // several tiles
    uncertainty({2, 1, 7, 11, 17}, 2, direction);
    uncertainty({2, 1, 5}, 40, direction);
    if (!watched || !direction) dual_task({2, 1, 40, 64}, direction);
    dual_task({2, 1, 7, 11, 17}, direction);
    for (const Shape& nothing : {Shape{0, 1, 4, 4}, Shape{2, 1, 0, 4}}) {
      uncertainty(nothing, 2, direction);
      dual_task(nothing, direction);
    }
  }
  for (int i = 0; i < 3; ++i) {
    uncertainty({2, 1, 9}, 3, false, Spoil::labels);
    uncertainty({2, 1, 9}, 3, false, Spoil::raters);
    dual_task({2, 1, 9}, false, Spoil::labels);
  }
  std::fprintf(stderr, failures ? "task_losses: %d differences\n" : "task_losses: CUDA and CPU agree\n",
               failures);
  return failures != 0;
}
