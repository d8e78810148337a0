// The CUDA losses, emulated, against the CPU's: random draws from all shapes, layouts, types and options.
#include "noisyseg/losses.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "formulas/dtype.h"

#define DECLARE(space)                                                                                     \
  namespace noisyseg::space {                                                                              \
  size_t loss_workspace(const Array&, const Exec&);                                                        \
  bool region_loss_forward(const Array&, const Array&, const Array&, const Array&, const RegionOptions&,   \
                           Reduction, const Array&, const Array&, void*, const Exec&);                     \
  void region_loss_backward(const Array&, const Array&, const Array&, const Array&, const RegionOptions&,  \
                            Reduction, const Array&, const Array&, const Array&, const Exec&);             \
  bool pixel_loss_forward(const Array&, const Array&, const Array&, const Array&, const Array&,            \
                          const PixelOptions&, Reduction, const Array&, const Array&, void*, const Exec&); \
  void pixel_loss_backward(const Array&, const Array&, const Array&, const Array&, const Array&,           \
                           const PixelOptions&, Reduction, const Array&, const Array&, const Array&,       \
                           const Exec&);                                                                   \
  }
DECLARE(cpu)
DECLARE(cuda)

using namespace noisyseg;

namespace {

using Shape = std::vector<int64_t>;
enum class Order { contiguous, channels_last, strided, expanded };

std::mt19937 randomness(1);
int64_t pick(int64_t n) { return static_cast<int64_t>(randomness() % static_cast<unsigned>(n)); }
template <class T>
T pick(std::initializer_list<T> from) {
  return from.begin()[pick(static_cast<int64_t>(from.size()))];
}
double uniform() { return (randomness() >> 8) / 16777216.0; }

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
void compare(const std::string& name, const char* what, Tensor& cpu, Tensor& cuda, double tolerance) {
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

struct Inputs {
  Shape shape;  // (B, C, *S)
  Tensor logits, target, weight, mask, class_weight;
};

// Masked pixels hold NaN and, like those of weight 0, the label 255. spoil: one pixel that counts holds a
// label out of range.
Inputs draw(const Shape& shape, DType dtype, Order order, DType target_dtype, bool labels, int weight,
            int mask, bool spoil) {
  Inputs in;
  in.shape = shape;
  const int rank = static_cast<int>(shape.size());
  const int64_t classes = shape[1];
  Shape pixels = shape;
  pixels.erase(pixels.begin() + 1);
  in.logits = Tensor(shape, dtype, order);
  std::vector<bool> keep;
  int64_t count = 1;
  for (int64_t n : pixels) count *= n;
  for (int64_t i = 0; i < count; ++i) keep.push_back(!mask || pick(4) != 0);
  fill(in.logits, rank, [&](int64_t pixel, int64_t) {
    const double z = 6 * (uniform() - 0.5) * (pick(8) == 0 ? 10 : 1);
    return keep[static_cast<size_t>(pixel)] || order == Order::expanded
               ? z
               : std::numeric_limits<double>::quiet_NaN();
  });
  std::vector<bool> labelled = keep;
  if (weight) {
    in.weight = Tensor(pixels, weight == 1 ? DType::f32 : DType::bf16);
    fill(in.weight, rank, [&](int64_t pixel, int64_t) {
      const bool zero = !spoil && pick(10) == 0;
      if (zero) labelled[static_cast<size_t>(pixel)] = false;
      return zero ? 0.0 : 0.1 + uniform();
    });
  }
  in.target = labels ? Tensor(pixels, target_dtype, order == Order::strided ? order : Order::contiguous)
                     : Tensor(shape, target_dtype, order);
  const int64_t top = classes == 1 ? 2 : classes;
  int64_t to_spoil = spoil ? 3 : 0;
  fill(in.target, rank, [&](int64_t pixel, int64_t) -> double {
    if (!labels) return target_dtype == DType::u8 ? static_cast<double>(pick(2)) : uniform();
    if (!labelled[static_cast<size_t>(pixel)]) return target_dtype == DType::b8 ? 1 : 255;
    return to_spoil > 0 && to_spoil-- == 1 ? static_cast<double>(top) : static_cast<double>(pick(top));
  });
  if (mask) {
    in.mask = Tensor(pixels, mask == 1 ? DType::b8 : DType::f32,
                     order == Order::strided ? order : Order::contiguous);
    fill(in.mask, rank, [&](int64_t pixel, int64_t) { return keep[static_cast<size_t>(pixel)] ? 1.0 : 0.0; });
  }
  return in;
}

// forward(gpu, loss, sums, workspace) and backward(gpu, grad_loss, sums, grad): CPU once, CUDA twice.
template <class Forward, class Backward>
void check(const std::string& name, Inputs& in, const Shape& loss_shape, const Shape& sums_shape, Order order,
           bool spoil, const Forward& forward, const Backward& backward) {
  const DType dtype = in.logits.view.dtype, loss_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-5;
  Tensor loss[3], sums[3], grad[3];
  Tensor grad_loss(
      loss_shape, loss_dtype,
      loss_shape.size() > 1 ? pick({Order::contiguous, Order::expanded, Order::strided}) : Order::contiguous);
  fill(grad_loss, -1, [](int64_t, int64_t) { return uniform() + 0.5; });
  const std::vector<unsigned char> before = in.logits.bytes;
  for (int run = 0; run < 3; ++run) {
    const bool gpu = run > 0;
    const Exec& exec = gpu ? device : host;
    loss[run] = Tensor(loss_shape, loss_dtype), sums[run] = Tensor(sums_shape, DType::f64);
    grad[run] = Tensor(in.shape, dtype, order == Order::expanded ? Order::contiguous : order);
    const size_t size =
        gpu ? cuda::loss_workspace(in.logits.array(), exec) : cpu::loss_workspace(in.logits.array(), exec);
    std::vector<double> workspace(size / sizeof(double), -7);
    const bool good = forward(gpu, loss[run].array(), sums[run].array(), workspace.data(), exec);
    if (good != (gpu || !spoil))
      return fail(name, good ? "a label out of range passes" : "good labels are refused");
    if (!gpu && spoil) {  // CUDA says it with NaN
      continue;
    }
    if (spoil) {
      bool nan = false;
      for (double x : loss[run].values()) nan |= std::isnan(x);
      if (!nan) fail(name, "a label out of range does not give NaN");
      continue;
    }
    backward(gpu, grad_loss.array(), sums[run].array(), grad[run].array(), exec);
  }
  if (in.logits.bytes != before) fail(name, "the logits were written to");
  if (spoil) return;
  compare(name, "the loss", loss[0], loss[1], tolerance);
  compare(name, "the sums", sums[0], sums[1], tolerance);
  compare(name, "the gradient", grad[0], grad[1], tolerance);
  if (loss[1].bytes != loss[2].bytes || grad[1].bytes != grad[2].bytes) fail(name, "two runs differ");
}

void run(const Shape& shape, bool spoil) {
  const int64_t classes = shape[1];
  const bool softmax = classes > 1 && pick(3) > 0, labels = spoil || pick(3) > 0;
  const auto dtype = pick({DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16});
  const auto order = pick({Order::contiguous, Order::channels_last, Order::strided, Order::expanded});
  DType target_dtype = labels ? pick({DType::u8, DType::u8, DType::i32, DType::i64})
                              : pick({DType::u8, DType::f32, DType::f64, DType::bf16, DType::f16});
  if (labels && !spoil && classes < 3 && pick(4) == 0) target_dtype = DType::b8;
  const int weight = static_cast<int>(pick(3)), mask = spoil ? 0 : static_cast<int>(pick(3));
  const auto reduction = pick({Reduction::mean, Reduction::sum, Reduction::none});
  Inputs in = draw(shape, dtype, order, target_dtype, labels, weight, mask, spoil);
  std::string name = "shape";
  for (int64_t n : shape) name += " " + std::to_string(n);
  name += ", dtype " + std::to_string(static_cast<int>(dtype)) + ", order " +
          std::to_string(static_cast<int>(order)) + ", target " +
          std::to_string(static_cast<int>(target_dtype)) + (labels ? " labels" : " maps") +
          (softmax ? ", softmax" : ", sigmoid") + ", weight " + std::to_string(weight) + ", mask " +
          std::to_string(mask) + ", reduction " + std::to_string(static_cast<int>(reduction));

  RegionOptions o;
  o.kind = pick(4) ? RegionLoss::nr_dice : RegionLoss::dice;
  o.activation = softmax ? Activation::softmax : Activation::sigmoid;
  o.gamma = pick({1.0, 1.3, 1.5, 1.5, 2.0});
  o.squared = pick(2), o.per_image = pick(2), o.include_background = spoil || pick(2);
  const int64_t in_loss = classes - (classes > 1 && !o.include_background);
  const Shape region_loss = reduction != Reduction::none ? Shape{}
                            : o.per_image                ? Shape{shape[0], in_loss}
                                                         : Shape{in_loss};
  check(
      "region loss, " + name + ", gamma " + std::to_string(o.kind == RegionLoss::dice ? 0.0 : o.gamma) +
          (o.squared ? ", squared" : ", linear") + (o.per_image ? ", per image" : "") +
          (o.include_background ? "" : ", no background"),
      in, region_loss, {shape[0], classes, 2}, order, spoil,
      [&](bool gpu, const Array& loss, const Array& sums, void* workspace, const Exec& exec) {
        return (gpu ? cuda::region_loss_forward : cpu::region_loss_forward)(
            in.logits.array(), in.target.array(), in.weight.array(), in.mask.array(), o, reduction, loss,
            sums, workspace, exec);
      },
      [&](bool gpu, const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec) {
        (gpu ? cuda::region_loss_backward : cpu::region_loss_backward)(
            in.logits.array(), in.target.array(), in.weight.array(), in.mask.array(), o, reduction, grad_loss,
            sums, grad, exec);
      });

  const int64_t weighted = pick(3);
  if (weighted) {
    in.class_weight = Tensor({classes}, weighted == 1 ? DType::f32 : DType::f64);
    fill(in.class_weight, -1, [](int64_t, int64_t) { return 0.5 + uniform(); });
    if (pick(2)) in.class_weight.view.strides[0] = 0;  // one weight for all
  }
  Shape map = shape;
  map.erase(map.begin() + 1);
  const PixelOptions p{o.activation};
  check(
      "pixel loss, " + name + ", class weight " + std::to_string(weighted), in,
      reduction == Reduction::none ? map : Shape{}, {2}, order, spoil,
      [&](bool gpu, const Array& loss, const Array& sums, void* workspace, const Exec& exec) {
        return (gpu ? cuda::pixel_loss_forward : cpu::pixel_loss_forward)(
            in.logits.array(), in.target.array(), in.weight.array(), in.mask.array(), in.class_weight.array(),
            p, reduction, loss, sums, workspace, exec);
      },
      [&](bool gpu, const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec) {
        (gpu ? cuda::pixel_loss_backward : cpu::pixel_loss_backward)(
            in.logits.array(), in.target.array(), in.weight.array(), in.mask.array(), in.class_weight.array(),
            p, reduction, grad_loss, sums, grad, exec);
      });
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 2;
  for (int round = 0; round < rounds; ++round)
    for (int64_t classes : {1, 2, 3, 7}) {
      run({1, classes, 1, 1}, false);
      run({2, classes, 3, 5}, false);
      run({3, classes, 3, 1, 5}, round == 0);
      run({2, classes, 257}, false);
    }
  for (int64_t classes : {1, 3}) run({1, classes, 64, 64}, false);  // four tiles
  for (int64_t classes : {2, 7}) run({2, classes, 7, 11, 17}, false);
  run({1, 257, 2}, false);  // more classes than threads
  run({0, 2, 4, 4}, false);
  run({2, 2, 0, 4}, false);
  std::fprintf(stderr, failures ? "losses: %d differences\n" : "losses: CUDA and CPU agree\n", failures);
  return failures != 0;
}
