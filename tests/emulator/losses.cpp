// The CUDA losses, emulated, against the CPU's in double: random draws from all shapes, layouts, types and
// options.
#include "noisyseg/losses.h"

#include <cstring>

#include "tensors.h"
#include "watched.h"

#define DECLARE(space)                                                                                    \
  namespace noisyseg::space {                                                                             \
  size_t loss_workspace(const Array&, const Exec&);                                                       \
  LossReport loss_forward(const Array&, const Array&, const Array&, const Array&, const Array&,           \
                          const LossOptions&, Reduction, const Array&, const Array&, const Array&, void*, \
                          const Exec&);                                                                   \
  void loss_backward(const Array&, const Array&, const Array&, const Array&, const Array&,                \
                     const LossOptions&, Reduction, const Array&, const Array&, const Array&, bool,       \
                     const Exec&);                                                                        \
  void loss_tangent(const Array&, const Array&, const Array&, const Array&, const Array&, const Array&,   \
                    const LossOptions&, Reduction, const Array&, const Array&, void*, const Exec&);       \
  void loss_backward_tangent(const Array&, const Array&, const Array&, const Array&, const Array&,        \
                             const Array&, const LossOptions&, Reduction, const Array&, const Array&,     \
                             const Array&, const Array&, const Exec&);                                    \
  }
DECLARE(cpu)
DECLARE(cuda)

using namespace noisyseg;

namespace {

// Largest difference over largest value; the sums' order differs, and half precision rounds once more.
void compare(const std::string& name, const char* what, const std::vector<double>& a,
             const std::vector<double>& b, double tolerance, double floor = 0) {
  double largest = a.size() < 16 ? 1e-2 : floor, apart = 0;  // one pixel may be all but certain
  bool same_nan = true;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) || std::isnan(b[i])) {
      same_nan &= std::isnan(a[i]) && std::isnan(b[i]);
      continue;
    }
    largest = std::fmax(largest, std::fabs(a[i]));
    apart = std::fmax(apart, std::fabs(a[i] - b[i]));
  }
  if (!same_nan) fail(name, std::string(what) + " is NaN at different places");
  if (!(apart <= tolerance * largest))
    fail(name, std::string(what) + " differs by " + std::to_string(apart / largest * 1e6) +
                   " millionths of the largest value");
}
// Of stored gradients: relative, and where f16's smallest numbers are coarser.
double rounding_of(DType dtype) {
  return dtype == DType::bf16 ? 1.0 / 128 : dtype == DType::f16 ? 1.0 / 512 : 0;
}

struct Inputs {
  Shape shape;                                               // (B, C, *S)
  Tensor logits, exact, target, weight, mask, class_weight;  // exact: the logits in f64
};

// Masked pixels hold NaN and, like those of weight 0, the label 255. spoil: one pixel that counts holds a
// label out of range.
Inputs draw(const Shape& shape, DType dtype, Order order, DType target_dtype, bool labels, int weight,
            int mask, bool spoil, int64_t ignore) {
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
  in.exact = Tensor(shape, DType::f64);
  const std::vector<double> values = in.logits.values();
  for (size_t i = 0; i < values.size(); ++i) static_cast<double*>(in.exact.array().data)[i] = values[i];
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
    if (ignore && pick(6) == 0) return static_cast<double>(ignore);
    return to_spoil > 0 && to_spoil-- == 1 ? static_cast<double>(top) : static_cast<double>(pick(top));
  });
  if (mask) {
    in.mask = Tensor(pixels, mask == 1 ? DType::b8 : DType::f32,
                     order == Order::strided ? order : Order::contiguous);
    fill(in.mask, rank, [&](int64_t pixel, int64_t) { return keep[static_cast<size_t>(pixel)] ? 1.0 : 0.0; });
  }
  return in;
}

// The sums that mean something: N and D, or their derivatives, of the classes in the loss, G where it is
// needed.
std::vector<double> needed(const LossOptions& o, int64_t channels, const std::vector<double>& sums,
                           int parts) {
  std::vector<double> out;
  const int64_t entries = sums_per_class * parts, first = channels > 1 && !o.include_background;
  for (size_t i = 0; i < sums.size(); ++i) {
    const int64_t c = static_cast<int64_t>(i) / entries % (channels + 1),
                  v = static_cast<int64_t>(i) % entries / parts;
    const bool region = o.region != RegionLoss::none && c >= first && c < channels &&
                        (v != 2 || o.region == RegionLoss::generalized_dice);
    const bool pixel = o.pixel != PixelLoss::none && c == channels && v < 3;
    if (region || pixel) out.push_back(sums[i]);
  }
  return out;
}

// One draw of options for one draw of inputs: value and gradient, the CPU in double once and CUDA twice, and
// both along a direction.
void check(const std::string& name, Inputs& in, const LossOptions& o, Reduction reduction, Order order,
           bool spoil) {
  const Shape& shape = in.shape;
  const int64_t channels = shape[1];
  const DType dtype = in.logits.view.dtype, loss_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
  const double tolerance = dtype == DType::f64 ? 1e-11 : 2e-5, floor = dtype == DType::f16 ? 1e-4 : 0;
  const bool joint = o.region == RegionLoss::generalized_dice;
  Shape loss_shape;
  if (reduction == Reduction::image) loss_shape = {shape[0]};
  if (reduction == Reduction::none && o.pixel != PixelLoss::none) {
    loss_shape = shape;
    loss_shape.erase(loss_shape.begin() + 1);
  } else if (reduction == Reduction::none) {
    if (o.per_image) loss_shape.push_back(shape[0]);
    if (!joint) loss_shape.push_back(channels - (channels > 1 && !o.include_background));
  }
  const Shape sums_shape{shape[0], channels + 1, sums_per_class};
  const auto some = [&](const Shape& of, DType type, Order at, double least, double most) {
    Tensor t(of, type, at);
    fill(t, -1, [&](int64_t, int64_t) { return least + (most - least) * uniform(); });
    return t;
  };
  const Order loss_order =
      loss_shape.size() > 1 ? pick({Order::contiguous, Order::expanded, Order::strided}) : Order::contiguous;
  Tensor grad_loss = some(loss_shape, loss_dtype, loss_order, 0.5, 1.5);
  const Order grad_order = order == Order::expanded ? Order::contiguous : order;
  const std::vector<unsigned char> before = in.logits.bytes;
  Tensor loss[3], sums[3], grad[3];
  for (int run = 0; run < 3; ++run) {
    const bool gpu = run > 0;
    const Exec& exec = gpu ? device : host;
    const Array logits = gpu ? in.logits.array() : in.exact.array(), target = in.target.array(),
                weight = in.weight.array(), mask = in.mask.array(), class_weight = in.class_weight.array();
    loss[run] = Tensor(loss_shape, gpu ? loss_dtype : DType::f64), sums[run] = Tensor(sums_shape, DType::f64);
    grad[run] = Tensor(shape, gpu ? dtype : DType::f64, gpu ? grad_order : Order::contiguous);
    const size_t size = gpu ? cuda::loss_workspace(logits, exec) : cpu::loss_workspace(logits, exec);
    std::vector<double> workspace(size / sizeof(double), -7);
    const bool keep = gpu && o.region == RegionLoss::none && channels != 7;
    const LossReport report = (gpu ? cuda::loss_forward : cpu::loss_forward)(
        logits, target, weight, mask, class_weight, o, reduction, loss[run].array(), sums[run].array(),
        keep ? grad[run].array() : Array{}, workspace.data(), exec);
    if (report.labels_in_range != (gpu || !spoil))
      return fail(name, spoil ? "a label out of range passes" : "good labels are refused");
    if (spoil) {
      bool nan = false;
      for (double x : loss[run].values()) nan |= std::isnan(x);
      if (gpu && !nan) fail(name, "a label out of range does not give NaN");
      continue;
    }
    const bool scalar = reduction == Reduction::mean || reduction == Reduction::sum;
    if (report.kept != (keep && scalar && dtype == DType::f32 && grad[run].view.size() > 0))
      return fail(name, "kept is not what it should be");
    if (report.kept) {  // as it is, the gradient for grad_loss = 1
      Tensor one({}, DType::f32), want(shape, DType::f64);
      fill(one, -1, [](int64_t, int64_t) { return 1.0; });
      cuda::loss_backward(logits, target, weight, mask, class_weight, o, reduction, one.array(),
                          sums[run].array(), grad[run].array(), true, exec);
      cpu::loss_backward(in.exact.array(), target, weight, mask, class_weight, o, reduction, one.array(),
                         sums[0].array(), want.array(), false, host);
      compare(name, "the gradient that was kept", want.values(), grad[run].values(), tolerance);
    }
    (gpu ? cuda::loss_backward : cpu::loss_backward)(logits, target, weight, mask, class_weight, o, reduction,
                                                     grad_loss.array(), sums[run].array(), grad[run].array(),
                                                     report.kept, exec);
  }
  if (in.logits.bytes != before) fail(name, "the logits were written to");
  if (spoil) return;
  compare(name, "the loss", loss[0].values(), loss[1].values(), tolerance);
  compare(name, "the sums", needed(o, channels, sums[0].values(), 1),
          needed(o, channels, sums[1].values(), 1), tolerance);
  compare(name, "the gradient", grad[0].values(), grad[1].values(), tolerance + rounding_of(dtype), floor);
  if (loss[1].bytes != loss[2].bytes || grad[1].bytes != grad[2].bytes) fail(name, "two runs differ");

  Tensor direction = some(shape, dtype, order, -1, 1), direction64(shape, DType::f64);
  const std::vector<double> values = direction.values();
  for (size_t i = 0; i < values.size(); ++i) static_cast<double*>(direction64.array().data)[i] = values[i];
  Tensor grad_loss_dot;
  if (pick(2)) grad_loss_dot = some(loss_shape, loss_dtype, loss_order, -1, 1);
  Tensor loss_dot[2], sums_dot[2], grad_dot[2];
  for (int run = 0; run < 2; ++run) {
    const bool gpu = run > 0;
    const Exec& exec = gpu ? device : host;
    const Array logits = gpu ? in.logits.array() : in.exact.array(),
                logits_dot = gpu ? direction.array() : direction64.array(), target = in.target.array(),
                weight = in.weight.array(), mask = in.mask.array(), class_weight = in.class_weight.array();
    loss_dot[run] = Tensor(loss_shape, gpu ? loss_dtype : DType::f64);
    sums_dot[run] = Tensor({shape[0], channels + 1, sums_per_class, 2}, DType::f64);
    grad_dot[run] = Tensor(shape, gpu ? dtype : DType::f64, gpu ? grad_order : Order::contiguous);
    const size_t size = gpu ? cuda::loss_workspace(logits, exec) : cpu::loss_workspace(logits, exec);
    std::vector<double> workspace(size / sizeof(double), -7);
    (gpu ? cuda::loss_tangent : cpu::loss_tangent)(logits, logits_dot, target, weight, mask, class_weight, o,
                                                   reduction, loss_dot[run].array(), sums_dot[run].array(),
                                                   workspace.data(), exec);
    (gpu ? cuda::loss_backward_tangent : cpu::loss_backward_tangent)(
        logits, logits_dot, target, weight, mask, class_weight, o, reduction, grad_loss.array(),
        grad_loss_dot.array(), sums_dot[run].array(), grad_dot[run].array(), exec);
  }
  const double stored = dtype == DType::f64 ? 1e-9 : 1e-6;  // an f32 loss is rounded
  compare(name, "the loss's tangent", loss_dot[0].values(), loss_dot[1].values(), stored);
  compare(name, "the tangent's sums", needed(o, channels, sums_dot[0].values(), 2),
          needed(o, channels, sums_dot[1].values(), 2), 1e-9);
  compare(name, "the gradient's tangent", grad_dot[0].values(), grad_dot[1].values(),
          stored + rounding_of(dtype), floor);
}

// kept: a draw whose forward call leaves the gradient.
void run(const Shape& shape, bool spoil, bool kept = false) {
  static int turn = 0;  // all losses in turn
  const int64_t classes = shape[1];
  LossOptions o;
  const int region = kept ? 0 : turn % 5, pixel = kept ? 1 + turn % 6 : turn / 5 % 8;
  ++turn;
  o.region = static_cast<RegionLoss>(region || pixel ? region : 1);
  o.pixel = static_cast<PixelLoss>(pick(3) && region ? 0 : pixel);
  const bool both = o.region != RegionLoss::none && o.pixel != PixelLoss::none;
  const bool softmax = classes > 1 && pick(3) > 0;
  const bool labels = spoil || (pick(3) > 0 && (o.pixel != PixelLoss::boundary || pick(3) == 0));
  const auto dtype = kept ? DType::f32 : pick({DType::f32, DType::f32, DType::f64, DType::bf16, DType::f16});
  const auto order = pick({Order::contiguous, Order::channels_last, Order::strided, Order::expanded});
  DType target_dtype = labels ? pick({DType::u8, DType::u8, DType::i32, DType::i64})
                              : pick({DType::u8, DType::f32, DType::f64, DType::bf16, DType::f16});
  if (labels && !spoil && classes < 3 && pick(4) == 0) target_dtype = DType::b8;
  const int weight = static_cast<int>(pick(3)), mask = spoil ? 0 : static_cast<int>(pick(3));
  auto reduction = kept ? pick({Reduction::mean, Reduction::mean, Reduction::sum})
                        : pick({Reduction::mean, Reduction::sum, Reduction::none, Reduction::image});
  if (both && reduction == Reduction::none) reduction = Reduction::mean;
  o.has_ignore = labels && target_dtype != DType::b8 && pick(3) == 0;
  o.ignore = o.has_ignore ? pick({int64_t{254}, int64_t{1}}) : 0;
  Inputs in = draw(shape, dtype, order, target_dtype, labels, weight, mask, spoil, o.ignore);
  o.activation = softmax ? Activation::softmax : Activation::sigmoid;
  o.gamma = pick({1.0, 1.3, 1.5, 1.5, 2.0});
  o.dice_power = o.region == RegionLoss::focal_dice ? pick({0.5, 2.0}) : 1;
  o.volume_power = static_cast<int>(pick(3));
  o.squared = pick(2), o.per_image = reduction == Reduction::image || pick(2);
  o.include_background = spoil || pick(2);
  o.parameter = o.pixel == PixelLoss::focal ? pick({1.0, 2.0, 2.0, 0.5}) : 0.7;
  o.region_scale = pick({1.0, 0.5}), o.pixel_scale = pick({1.0, 2.0});
  o.target_is_logits = !labels && pick(3) == 0;
  o.label_smoothing = !o.target_is_logits && o.pixel != PixelLoss::boundary && pick(4) == 0 ? 0.1 : 0;
  const int64_t weighted = pick(3);
  if (weighted && o.pixel != PixelLoss::none) {
    in.class_weight = Tensor({classes}, weighted == 1 ? DType::f32 : DType::f64);
    fill(in.class_weight, -1, [](int64_t, int64_t) { return 0.5 + uniform(); });
    if (pick(2)) in.class_weight.view.strides[0] = 0;  // one weight for all
  }
  std::string name = "shape";
  for (int64_t n : shape) name += " " + std::to_string(n);
  const auto say = [&](const char* what, double x) {
    char text[64];
    std::snprintf(text, sizeof text, ", %s %g", what, x);
    name += text;
  };
  say("region", static_cast<int>(o.region)), say("pixel", static_cast<int>(o.pixel));
  say("reduction", static_cast<int>(reduction)), say("softmax", softmax), say("labels", labels);
  say("dtype", static_cast<int>(dtype)), say("order", static_cast<int>(order));
  say("target", static_cast<int>(target_dtype)), say("weight", weight), say("mask", mask);
  say("gamma", o.gamma), say("squared", o.squared), say("per image", o.per_image);
  say("background", o.include_background), say("parameter", o.parameter);
  say("smoothing", o.label_smoothing), say("ignore", o.has_ignore ? static_cast<double>(o.ignore) : -1);
  say("target logits", o.target_is_logits), say("class weight", in.class_weight.view.rank);
  check(name, in, o, reduction, order, spoil);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : watched ? 3 : 4;
  for (int round = 0; round < rounds; ++round)
    for (int64_t classes : {1, 2, 3, 5}) {
      run({1, classes, 1, 1}, false);
      run({2, classes, 3, 5}, false);
      run({3, classes, 3, 1, 5}, round == 0);
      run({2, classes, 257}, false);
    }
  for (int64_t classes : {1, 2, 3, 5, 1, 2, 3, 5})
    run({2, classes, 9, 31}, false, true), run({1, classes, 700}, false, true);
  for (int64_t classes : {1, 3}) run({1, classes, 64, 64}, false);  // eight tiles
  for (int64_t classes : {2, 7}) run({2, classes, 7, 11, 17}, false);
  run({1, 257, 2}, false);  // more classes than a block keeps on chip
  run({1, 70, 300}, false);
  run({12, 69, 4}, false);                // too many sums for one block
  if (!watched) run({300, 1, 4}, false);  // more images than a block has threads
  run({0, 2, 4, 4}, false);
  run({2, 2, 0, 4}, false);
  std::fprintf(stderr, failures ? "losses: %d differences\n" : "losses: CUDA and CPU agree\n", failures);
  return failures != 0;
}
