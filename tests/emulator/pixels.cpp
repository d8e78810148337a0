// The CUDA order statistics and confident learning, emulated, against the CPU functions: the same bits.
#include "noisyseg/pixels.h"

#include "tensors.h"
#include "watched.h"

namespace {

Exec place(bool cuda) { return cuda ? device : host; }

#define CALL(name, ...) (cuda ? cuda::name(__VA_ARGS__) : cpu::name(__VA_ARGS__))

std::vector<char> bytes(size_t n) { return std::vector<char>(n + 8); }

// Equal, NaN included.
void same(const std::string& name, const char* what, Tensor& a, Tensor& b) {
  const std::vector<double> x = a.values(), y = b.values();
  for (size_t i = 0; i < x.size(); ++i)
    if (!(x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))))
      return fail(name, std::string(what) + " differs at " + std::to_string(i));
}

void order_statistics(const std::string& name, int64_t rows, const Shape& size, DType dtype, Order order,
                      bool masked, bool ties) {
  Shape shape = {rows, 1}, out_shape = {rows};
  for (int64_t n : size) shape.push_back(n), out_shape.push_back(n);
  Tensor values(shape, dtype, order), mask(shape, DType::u8);
  fill(values, -1, [&](int64_t, int64_t) {
    const double x = 4 * uniform() - 2, u = uniform();
    if (u < 0.02) return std::numeric_limits<double>::quiet_NaN();
    return u < 0.04 ? HUGE_VAL : ties ? std::round(x) * 0.5 : x;
  });
  fill(mask, -1, [&](int64_t, int64_t) { return uniform() < 0.7 ? 1.0 : 0.0; });
  const Array inside = masked ? mask.array() : Array{};

  for (const int count : {1, 2, 5}) {
    if (watched && count != 2) continue;
    Quantiles q;
    q.count = count;
    q.rule = static_cast<Interpolation>(pick(5));
    for (int i = 0; i < count; ++i) q.q[i] = uniform();
    Tensor out[2];
    for (int cuda = 0; cuda < 2; ++cuda) {
      out[cuda] = Tensor({count, rows}, dtype);
      auto work = bytes(CALL(selection_workspace, values.array(), 2 * count, place(cuda)));
      CALL(quantile, values.array(), inside, q, out[cuda].array(), work.data(), place(cuda));
    }
    same(name, "quantile", out[0], out[1]);
  }
  Tensor counts({rows}, DType::i64);
  fill(counts, -1,
       [&](int64_t, int64_t) { return static_cast<double>(pick(values.view.size() / rows + 2)); });
  for (const bool given : {false, true}) {
    TopK options;
    options.k = pick(values.view.size() + 2);
    options.largest = pick(2) == 1;
    Tensor threshold[2], chosen[2];
    for (int cuda = 0; cuda < 2; ++cuda) {
      threshold[cuda] = Tensor({rows}, dtype);
      chosen[cuda] = Tensor(out_shape, DType::b8);
      auto work = bytes(CALL(selection_workspace, values.array(), 1, place(cuda)));
      CALL(top_k, values.array(), inside, given ? counts.array() : Array{}, options, threshold[cuda].array(),
           chosen[cuda].array(), work.data(), place(cuda));
    }
    same(name, "threshold", threshold[0], threshold[1]);
    same(name, "chosen", chosen[0], chosen[1]);
  }
}

void confident(const std::string& name, int64_t batch, int64_t classes, const Shape& size, DType dtype,
               DType label_type, Order order, bool ties) {
  Shape shape = {batch, classes}, image = {batch};
  for (int64_t n : size) shape.push_back(n), image.push_back(n);
  Tensor p(shape, dtype, order), label(image, label_type);
  fill(p, -1, [&](int64_t, int64_t) {
    const double x = uniform();
    if (uniform() < 0.005) return std::numeric_limits<double>::quiet_NaN();
    return ties ? std::round(2 * x) / 2 : x;
  });
  fill(label, -1, [&](int64_t pixel, int64_t) {
    return uniform() < 0.1 ? 255.0 : static_cast<double>(pixel / 5 % classes);
  });
  Tensor counts[2];
  for (int cuda = 0; cuda < 2; ++cuda) {
    counts[cuda] = Tensor({classes, classes}, DType::i64);
    auto work = bytes(CALL(confident_workspace, p.array(), place(cuda)));
    CALL(confident_joint, p.array(), label.array(), counts[cuda].array(), work.data(), place(cuda));
  }
  same(name, "joint", counts[0], counts[1]);
  for (const Prune prune : {Prune::both, Prune::by_class, Prune::by_noise_rate}) {
    Tensor wrong[2];
    for (int cuda = 0; cuda < 2; ++cuda) {
      wrong[cuda] = Tensor(image, DType::b8);
      auto work = bytes(CALL(confident_workspace, p.array(), place(cuda)));
      CALL(label_errors, p.array(), label.array(), prune, wrong[cuda].array(), work.data(), place(cuda));
    }
    same(name, "errors", wrong[0], wrong[1]);
  }
}

}  // namespace

int main() {
  order_statistics("float", 2, {9, 37}, DType::f32, Order::contiguous, false, false);
  order_statistics("one long row", 1, {5000}, DType::f32, Order::contiguous, true, true);
  order_statistics("ties", 1, {70, 61}, DType::bf16, Order::contiguous, false, true);
  order_statistics("half", 3, {3, 5, 21}, DType::f16, Order::strided, true, false);
  order_statistics("double", 2, {21, 20}, DType::f64, Order::strided, false, true);
  order_statistics("one value", 3, {1}, DType::f32, Order::contiguous, false, false);

  confident("two classes", 2, 2, {11, 30}, DType::f32, DType::u8, Order::contiguous, false);
  confident("many pixels", 1, 2, {68, 64}, DType::f32, DType::u8, Order::contiguous, true);
  confident("ties", 2, 3, {10, 30}, DType::f64, DType::i64, Order::channels_last, true);
  confident("half", 1, 4, {5, 7, 9}, DType::f16, DType::i32, Order::strided, false);
  confident("more than fits shared memory", 1, 9, {300}, DType::bf16, DType::u8, Order::contiguous, true);
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}
