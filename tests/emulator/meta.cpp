// The CUDA kernels of the meta-gradient, emulated, against the CPU's: random draws of shapes, layouts and
// types.
#include "noisyseg/meta.h"

#include "tensors.h"
#include "watched.h"

#define DECLARE(space)                                                                                       \
  namespace noisyseg::space {                                                                                \
  bool ce_dual(const Array&, const Array&, const Array&, bool, const Array&, const Array&, const Exec&);     \
  void mask_net(const Array&, const MaskNet&, const Array&, const Exec&);                                    \
  size_t mask_net_workspace(const Array&, const MaskNet&, bool, const Exec&);                                \
  void mask_net_vjp(const Array&, const Array&, const Array&, const MaskNet&, const Array&, const Array&,    \
                    void*, const Exec&);                                                                     \
  size_t mw_net_workspace(const Array&, const MwNet&, const Exec&);                                          \
  void mw_net(const Array&, const MwNet&, const Array&, void*, const Exec&);                                 \
  void mw_net_vjp(const Array&, const Array&, const Array&, const MwNet&, const Array&, const Array&, void*, \
                  const Exec&);                                                                              \
  }
DECLARE(cpu)
DECLARE(cuda)

namespace {

std::string text(const Shape& shape) {
  std::string s;
  for (int64_t n : shape) s += " " + std::to_string(n);
  return s;
}
Tensor random_tensor(const Shape& shape, DType dtype, Order order, double low, double high) {
  Tensor t(shape, dtype, order);
  fill(t, -1, [&](int64_t, int64_t) { return low + (high - low) * uniform(); });
  return t;
}
double tolerance_of(DType dtype) { return dtype == DType::f64 ? 1e-12 : 1e-5; }

// labels: 0: hard, 1: hard, some of them no class, 2: soft
void cross_entropy(const Shape& shape, int labels) {
  const auto floats = {DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16};
  const DType dtype = pick(floats), dot_dtype = pick(2) ? dtype : pick(floats);
  const DType wide = dtype == DType::f64 || dot_dtype == DType::f64 ? DType::f64 : DType::f32;
  const Order order = pick({Order::contiguous, Order::channels_last, Order::strided});
  const int rank = static_cast<int>(shape.size());
  Shape pixels = shape;
  pixels.erase(pixels.begin() + 1);
  const int64_t classes = shape[1] == 1 ? 2 : shape[1];
  const bool softmax = shape[1] > 1 && pick(4);
  Tensor z = random_tensor(shape, dtype, order, -6, 6), dot = random_tensor(shape, dot_dtype, order, -1, 1);
  Tensor y(labels == 2 ? shape : pixels,
           labels == 2 ? pick(floats) : pick({DType::u8, DType::i32, DType::i64}),
           labels == 2 ? order : Order::contiguous);
  fill(y, rank, [&](int64_t pixel, int64_t) {
    return labels == 2 ? uniform()
                       : static_cast<double>(labels == 1 && pixel % 5 == 0 ? classes : pick(classes));
  });
  const std::string name = "cross-entropy" + text(shape) + ", labels " + std::to_string(labels);
  Tensor loss[3], loss_dot[3];
  for (int run = 0; run < 3; ++run) {
    loss[run] = Tensor(pixels, wide), loss_dot[run] = Tensor(pixels, wide);
    const bool good =
        (run ? cuda::ce_dual : cpu::ce_dual)(z.array(), dot.array(), y.array(), softmax, loss[run].array(),
                                             loss_dot[run].array(), run ? device : host);
    if (!run && good == (labels == 1 && loss[run].view.size() > 0))
      fail(name, "the CPU misjudges the labels");
  }
  if (labels == 1) {
    const std::vector<double> a = loss[1].values();
    for (size_t i = 0; i < a.size(); ++i)
      if (std::isnan(a[i]) != (i % 5 == 0)) return fail(name, "a label that is no class does not give NaN");
    return;
  }
  compare(name, "the loss", loss[0], loss[1], tolerance_of(wide));
  compare(name, "its tangent", loss_dot[0], loss_dot[1], tolerance_of(wide));
  if (loss[1].bytes != loss[2].bytes || loss_dot[1].bytes != loss_dot[2].bytes) fail(name, "two runs differ");
}

// forward(gpu, L, R, exec) and reverse(gpu, dR, R, L, by the parameters, by L, exec): CPU once, CUDA twice
template <class Forward, class Reverse>
void check(const std::string& name, const Shape& shape, DType dtype, int64_t parameters,
           const Forward& forward, const Reverse& reverse) {
  const Order order = pick({Order::contiguous, Order::strided});
  Tensor loss = random_tensor(shape, dtype, order, -1, 4), grad = random_tensor(shape, dtype, order, -1, 1);
  const std::vector<unsigned char> before = loss.bytes;
  Tensor weight[3], by_net[3], by_loss[3];
  const bool attached = pick(3);
  for (int run = 0; run < 3; ++run) {
    const Exec& exec = run ? device : host;
    weight[run] = Tensor(shape, dtype, pick({Order::contiguous, Order::strided}));
    by_net[run] = Tensor({parameters}, dtype);
    if (attached) by_loss[run] = Tensor(shape, dtype, Order::strided);
    forward(run > 0, loss.array(), weight[run].array(), exec);
    reverse(run > 0, grad.array(), weight[run].array(), loss.array(), by_net[run].array(),
            by_loss[run].array(), exec);
  }
  if (loss.bytes != before) fail(name, "an input was written to");
  compare(name, "the weight", weight[0], weight[1], tolerance_of(dtype));
  compare(name, "the parameters' gradient", by_net[0], by_net[1], 4 * tolerance_of(dtype));
  compare(name, "the gradient by the loss", by_loss[0], by_loss[1], tolerance_of(dtype));
  if (by_net[1].bytes != by_net[2].bytes || by_loss[1].bytes != by_loss[2].bytes)
    fail(name, "two runs differ");
}

void mask(const Shape& shape, int64_t k3, int64_t k5) {
  const DType dtype = pick({DType::f32, DType::f64});
  const bool deep = shape.size() == 4;
  const auto make = [&](const Shape& s) { return random_tensor(s, dtype, Order::contiguous, -0.5, 0.5); };
  Tensor w3 = make(deep ? Shape{k3, 3, 3, 3} : Shape{k3, 3, 3}), b3 = make({k3});
  Tensor w5 = make(deep ? Shape{k5, 5, 5, 5} : Shape{k5, 5, 5}), b5 = make({k5});
  Tensor w1 = make({k3 + k5 + 1}), b1 = make({1});
  const MaskNet net{w3.array(), b3.array(), w5.array(), b5.array(), w1.array(), b1.array()};
  const int64_t parameters = w3.view.size() + w5.view.size() + 2 * (k3 + k5) + 2;
  check(
      "mask net" + text(shape) + ", widths " + std::to_string(k3) + " " + std::to_string(k5), shape, dtype,
      parameters,
      [&](bool gpu, const Array& loss, const Array& weight, const Exec& exec) {
        (gpu ? cuda::mask_net : cpu::mask_net)(loss, net, weight, exec);
      },
      [&](bool gpu, const Array& grad, const Array& weight, const Array& loss, const Array& by_net,
          const Array& by_loss, const Exec& exec) {
        const size_t size =
            (gpu ? cuda::mask_net_workspace : cpu::mask_net_workspace)(loss, net, by_loss.rank > 0, exec);
        std::vector<double> workspace(size / sizeof(double), -7);
        (gpu ? cuda::mask_net_vjp : cpu::mask_net_vjp)(grad, weight, loss, net, by_net, by_loss,
                                                       workspace.data(), exec);
      });
}

void mw(const Shape& shape, int64_t hidden) {
  const DType dtype = pick({DType::f32, DType::f64});
  const auto make = [&](const Shape& s) { return random_tensor(s, dtype, Order::contiguous, -1, 1); };
  Tensor w1 = make({hidden}), b1 = make({hidden}), w2 = make({hidden}), b2 = make({1});
  const MwNet net{w1.array(), b1.array(), w2.array(), b2.array()};
  check(
      "MWNet" + text(shape) + ", H " + std::to_string(hidden), shape, dtype, 3 * hidden + 1,
      [&](bool gpu, const Array& loss, const Array& weight, const Exec& exec) {
        const size_t size = (gpu ? cuda::mw_net_workspace : cpu::mw_net_workspace)(loss, net, exec);
        std::vector<double> workspace(size / sizeof(double), -7);
        (gpu ? cuda::mw_net : cpu::mw_net)(loss, net, weight, workspace.data(), exec);
      },
      [&](bool gpu, const Array& grad, const Array& weight, const Array& loss, const Array& by_net,
          const Array& by_loss, const Exec& exec) {
        const size_t size = (gpu ? cuda::mw_net_workspace : cpu::mw_net_workspace)(loss, net, exec);
        std::vector<double> workspace(size / sizeof(double), -7);
        (gpu ? cuda::mw_net_vjp : cpu::mw_net_vjp)(grad, weight, loss, net, by_net, by_loss, workspace.data(),
                                                   exec);
      });
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 1;
  for (int round = 0; round < rounds; ++round) {
    for (int64_t channels : {1, 2, 4})
      for (int labels : {0, 1, 2})
        for (const Shape& shape : {Shape{2, channels, 5, 7}, Shape{1, channels, 1100}, Shape{3, channels}})
          cross_entropy(shape, labels);
    mask({2, 1, 1}, 1, 1);
    mask({1, 13, 40}, 5, 3);
    mask({1, 2, 3, 5}, 2, 5);
    mw({2, 1, 5, 7}, 1);
    mw({1, 1, 700}, 100);
  }
  mask({2, 9, 33}, 4, 4);
  if (!watched) mask({1, 5, 6, 19}, 3, 2);
  mw({2, 1, 3, 5, 6}, 300);
  cross_entropy({0, 2, 4}, 0);
  mask({0, 4, 4}, 2, 2);
  mw({0, 1, 4}, 5);
  std::fprintf(stderr, failures ? "meta: %d differences\n" : "meta: CUDA and CPU agree\n", failures);
  return failures != 0;
}
