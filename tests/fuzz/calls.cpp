// One call of the C++ API with arguments drawn from the fuzzer's bytes: every family's shapes, strides,
// dtypes and parameters within what its header allows, and some that it says it refuses. All memory has
// exactly the size that the call is entitled to, so that AddressSanitizer sees the first byte too far; inputs
// must come back unchanged. NOISYSEG_FUZZ_FAMILY in the environment keeps to one family.
#include <cstdint>
#include <cstdlib>
#include <cstring>

// The fuzzer's bytes one by one, then numbers that follow from them.
struct Source {
  const uint8_t *at = nullptr, *end = nullptr;
  uint64_t state = 1;
  void set(const uint8_t* data, size_t size) {
    at = data, end = data + size, state = 0x9e3779b97f4a7c15;
    for (size_t i = 0; i < size; ++i) state = (state ^ data[i]) * 0x100000001b3;
    state |= 1;
  }
  uint32_t operator()() {
    if (at < end) return *at++ * 0x9e3779b1u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
  }
};
#define NOISYSEG_RANDOMNESS Source
#include "../emulator/tensors.h"
#include "noisyseg/distance.h"
#include "noisyseg/labels.h"
#include "noisyseg/losses.h"
#include "noisyseg/meta.h"
#include "noisyseg/noise.h"
#include "noisyseg/norms.h"
#include "noisyseg/pixels.h"
#include "noisyseg/surface.h"
#include "noisyseg/task_losses.h"

namespace {

bool chance(int64_t of) { return pick(of) == 0; }
const std::initializer_list<DType> floats = {DType::f32, DType::f16, DType::bf16, DType::f64},
                                   wides = {DType::f32, DType::f64},
                                   label_types = {DType::u8, DType::b8, DType::i32, DType::i64};
DType any_type() { return static_cast<DType>(pick(8)); }

// Axes in any order, gaps, either direction; repeat: stride 0 too, for what is only read.
Tensor array(const Shape& shape, DType dtype, bool repeat = true) {
  const int64_t kind = pick(4);
  if (kind == 0) return Tensor(shape, dtype);
  if (kind == 1) return Tensor(shape, dtype, Order::channels_last);
  Tensor t(shape, dtype);
  std::vector<int> axes(shape.size());
  for (size_t i = 0; i < axes.size(); ++i) axes[i] = static_cast<int>(i);
  if (kind == 2)
    for (size_t i = axes.size(); i > 1; --i)
      std::swap(axes[i - 1], axes[static_cast<size_t>(pick(static_cast<int64_t>(i)))]);
  int64_t size = 1, first = 0;
  for (size_t i = axes.size(); i-- > 0;) {
    const int axis = axes[i];
    const int64_t n = t.view.shape[axis];
    const int64_t gap = chance(3) ? 2 : 1;
    if (repeat && chance(8)) {
      t.view.strides[axis] = 0;
      continue;
    }
    t.view.strides[axis] = size * gap;
    if (chance(4)) {
      first += (n - 1) * size * gap;
      t.view.strides[axis] *= -1;
    }
    size += (n - 1) * size * gap;  // to the last element, not beyond
  }
  if (t.view.size() == 0) size = first = 0;
  t.first = first;
  t.bytes.assign(static_cast<size_t>(size * dtype_size(dtype)), 0x55);
  return t;
}

double value(double low, double high) {
  if (chance(200)) return pick({HUGE_VAL, -HUGE_VAL, std::nan(""), 1e30, -1e-30});
  return low + (high - low) * uniform();
}
Tensor reals(const Shape& shape, DType dtype, double low, double high) {
  Tensor t = array(shape, dtype);
  fill(t, -1, [&](int64_t, int64_t) {
    const double x = value(low, high);
    return dtype >= DType::f16 ? x : std::isfinite(x) && std::fabs(x) < 99 ? std::fabs(std::round(x)) : 1.0;
  });
  return t;
}
// Whole numbers below `count`, a few of them none of those.
Tensor labels(const Shape& shape, DType dtype, int64_t count, bool strange = true) {
  Tensor t = array(shape, dtype);
  fill(t, -1, [&](int64_t, int64_t) {
    if (dtype == DType::b8) return static_cast<double>(pick(2));
    if (strange && chance(40) && dtype != DType::f16) return pick({255.0, 254.0, 3.0});
    return static_cast<double>(pick(dtype == DType::u8 ? std::min<int64_t>(count, 256) : count));
  });
  return t;
}
Tensor maybe(Tensor t, int64_t of = 2) { return chance(of) ? std::move(t) : Tensor(); }

int64_t extent(int64_t usual) { return chance(30) ? 0 : 1 + pick(chance(8) ? 4 * usual : usual); }
Shape space(int64_t most, int64_t usual) {
  Shape s;
  for (int64_t i = pick(most + 1), n = usual; i > 0; --i, n = n / 2 + 1) s.push_back(extent(n));
  return s;
}
Shape with(Shape lead, const Shape& rest) {
  lead.insert(lead.end(), rest.begin(), rest.end());
  return lead;
}
int64_t count_of(const Shape& s) {
  int64_t n = 1;
  for (int64_t x : s) n *= x;
  return n;
}
Shape shape_of(const Tensor& t) { return Shape(t.view.shape, t.view.shape + t.view.rank); }

// As many bytes as asked for, aligned to 16, and not one more.
struct Memory {
  std::vector<unsigned char> bytes;
  explicit Memory(size_t size) : bytes(size, 0xAA) {}
  void* get() { return bytes.data(); }
};

Exec place() { return {-1, nullptr, chance(50) ? 2 : 1}; }

struct Unchanged {
  std::vector<std::pair<Tensor*, std::vector<unsigned char>>> kept;
  explicit Unchanged(std::initializer_list<Tensor*> inputs) {
    for (Tensor* t : inputs) kept.emplace_back(t, t->bytes);
  }
  ~Unchanged() {
    for (const auto& [t, before] : kept)
      if (t->bytes != before) std::fprintf(stderr, "an input was written to\n"), std::abort();
  }
};

void losses_family() {
  const int64_t batch = extent(3), channels = chance(40) ? 1 + pick(1030) : 1 + pick(5);
  const Shape s = channels > 64 ? Shape{extent(3)} : space(4, 5), logit = with({batch, channels}, s),
              image = with({batch}, s);
  LossOptions o;
  o.activation = channels > 1 && pick(2) ? Activation::softmax : Activation::sigmoid;
  o.region = static_cast<RegionLoss>(pick(5)), o.pixel = static_cast<PixelLoss>(pick(8));
  if (o.region == RegionLoss::none && o.pixel == PixelLoss::none) o.pixel = PixelLoss::ce;
  o.gamma = pick({1.0, 1.5, 2.0, 1.2}), o.dice_power = pick({1.0, 2.0, 0.5}),
  o.volume_power = static_cast<int>(pick(3));
  o.squared = pick(2), o.per_image = pick(2), o.include_background = pick(2), o.eps = pick({1e-5, 0.0, 1.0});
  o.parameter = o.pixel == PixelLoss::focal ? pick({2.0, 0.5, 1.0}) : pick({0.7, 1.0, 0.1});
  o.label_smoothing = chance(4) ? 0.1 : 0;
  const bool both = o.region != RegionLoss::none && o.pixel != PixelLoss::none,
             hard = pick(2) && o.pixel != PixelLoss::boundary;
  auto reduction = static_cast<Reduction>(pick(both ? 2 : 4));
  if (reduction == Reduction::image) o.per_image = true;
  o.has_ignore = hard && chance(3), o.ignore = pick({int64_t{255}, int64_t{1}, int64_t{-7}});
  o.target_is_logits = !hard && chance(3);
  const DType dtype = pick(floats), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  Tensor logits = reals(logit, dtype, -8, 8);
  Tensor target = hard ? labels(image, pick(label_types), std::max<int64_t>(channels, 2), chance(3))
                       : reals(logit, any_type(), 0, 1);
  Tensor weight = maybe(reals(image, pick(floats), 0, 2), 3), mask = maybe(labels(image, any_type(), 2), 3);
  Tensor class_weight = maybe(reals({channels}, pick(wides), 0, 2), 3);
  const int64_t classes = channels - (channels > 1 && !o.include_background);
  Shape out;
  if (reduction == Reduction::image) out = {batch};
  if (reduction == Reduction::none) {
    if (o.pixel != PixelLoss::none) {
      out = image;
    } else {
      if (o.per_image) out.push_back(batch);
      if (o.region != RegionLoss::generalized_dice) out.push_back(classes);
    }
  }
  Tensor loss(out, wide), sums({batch, channels + 1, sums_per_class}, DType::f64),
      keep = maybe(Tensor(logit, dtype, Order::contiguous));
  const Unchanged same{&logits, &target, &weight, &mask, &class_weight};
  const Exec exec = place();
  Memory memory(loss_workspace(logits.array(), exec));
  const LossReport report =
      loss_forward(logits.array(), target.array(), weight.array(), mask.array(), class_weight.array(), o,
                   reduction, loss.array(), sums.array(), keep.array(), memory.get(), exec);
  Tensor grad_loss = reals(out, wide, -1, 1), grad = array(logit, dtype, false);
  loss_backward(logits.array(), target.array(), weight.array(), mask.array(), class_weight.array(), o,
                reduction, grad_loss.array(), sums.array(), report.kept ? keep.array() : grad.array(),
                report.kept, exec);
  if (!chance(3)) return;
  Tensor dot = reals(logit, dtype, -1, 1), loss_dot(out, wide),
         dots({batch, channels + 1, sums_per_class, 2}, DType::f64);
  Tensor grad_loss_dot = maybe(reals(out, wide, -1, 1)), grad_dot = array(logit, dtype, false);
  loss_tangent(logits.array(), dot.array(), target.array(), weight.array(), mask.array(),
               class_weight.array(), o, reduction, loss_dot.array(), dots.array(), memory.get(), exec);
  loss_backward_tangent(logits.array(), dot.array(), target.array(), weight.array(), mask.array(),
                        class_weight.array(), o, reduction, grad_loss.array(), grad_loss_dot.array(),
                        dots.array(), grad_dot.array(), exec);
}

template <class Inputs, class Options, class Forward, class Backward, class Query>
void terms_of(Inputs& in, const Options& o, int terms, bool per_image, bool scores, int64_t sums,
              const Shape& a_shape, const Shape& b_shape, const Query& query, const Forward& forward,
              const Backward& backward) {
  const Exec exec = place();
  const int64_t batch = a_shape[0];
  const DType a = in[0].view.dtype, b = in[1].view.dtype,
              wide = a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
  const bool direction = in[5].view.rank || in[6].view.rank;
  const Shape shape = per_image ? Shape{terms, batch} : Shape{terms};
  Tensor out(shape, wide), score = scores && !direction ? Tensor({2, batch}, wide) : Tensor();
  Tensor kept(direction ? Shape{batch, sums, 2} : Shape{batch, sums}, DType::f64);
  Memory memory(query(exec));
  forward(o, out.array(), score.array(), kept.array(), memory.get(), exec);
  Tensor grad = reals(shape, wide, -1, 1), grad_dot = direction ? maybe(reals(shape, wide, -1, 1)) : Tensor();
  Tensor by_a = maybe(array(a_shape, a, false)), by_b = maybe(array(b_shape, b, false));
  backward(o, grad.array(), grad_dot.array(), kept.array(), by_a.array(), by_b.array(), exec);
}

void task_losses_family() {
  const bool uncertainty = pick(2);
  const int64_t batch = extent(3), maps = uncertainty ? 1 + pick(chance(20) ? 520 : 4) : 1;
  const Shape s = maps > 16 ? Shape{extent(3)} : space(4, 5), one = with({batch, 1}, s),
              several = with({batch, maps}, s), image = with({batch}, s);
  const DType a = pick(floats), b = pick(floats);
  Tensor in[7] = {reals(one, a, -8, 8),
                  uncertainty ? reals(several, b, 0, 1) : reals(one, b, -0.01, 0.01),
                  labels(several, any_type(), 2, chance(4)),
                  maybe(labels(uncertainty ? Shape{batch, maps} : Shape{batch}, any_type(), 3, chance(4))),
                  maybe(labels(image, any_type(), 2)),
                  Tensor(),
                  Tensor()};
  if (chance(3)) in[5] = maybe(reals(one, a, -1, 1)), in[6] = maybe(reals(several, b, -1, 1));
  const Unchanged same{&in[0], &in[1], &in[2], &in[3], &in[4], &in[5], &in[6]};
  const auto reduction = static_cast<TaskReduction>(pick(uncertainty ? 3 : 1));
  if (uncertainty) {
    const UncertaintyInputs u{in[0].array(), in[1].array(), in[2].array(), in[3].array(),
                              in[4].array(), in[5].array(), in[6].array()};
    UncertaintyOptions o;
    o.binary_entropy = pick(2), o.reduction = reduction, o.eps = pick({1e-5, 0.0});
    terms_of(
        in, o, 4, reduction == TaskReduction::image, true, uncertainty_sums(maps), one, several,
        [&](const Exec& e) { return uncertainty_workspace(u, e); },
        [&](const auto&... x) { uncertainty_forward(u, x...); },
        [&](const auto&... x) { uncertainty_backward(u, x...); });
  } else {
    const DualTaskInputs d{in[0].array(), in[1].array(), in[2].array(), in[3].array(),
                           in[4].array(), in[5].array(), in[6].array()};
    DualTaskOptions o;
    o.routing = static_cast<Routing>(pick(4)), o.per_image = pick(2), o.labelled_count = pick(batch + 1),
    o.k = pick({1500.0, 10.0});
    const bool image_terms = o.per_image && pick(2);
    if (image_terms) o.reduction = TaskReduction::image;
    terms_of(
        in, o, 3, image_terms, false, dual_task_sums, one, one,
        [&](const Exec& e) { return dual_task_workspace(d, e); },
        [&](const auto& opts, const Array& terms, const Array&, const auto&... x) {
          dual_task_forward(d, opts, terms, x...);
        },
        [&](const auto&... x) { dual_task_backward(d, x...); });
  }
}

void distance_family() {
  const int dims = 1 + static_cast<int>(pick(3));
  Shape lead = space(3, 2), s;
  for (int i = 0; i < dims; ++i)
    s.push_back(1 + pick(chance(60) ? (dims == 1 ? 600 : 30) : dims == 3 ? 4 : 7));
  const Shape shape = with(lead, s);
  const double spacing[3] = {0.5 + uniform(), pick({1.0, 0.3}), pick({1.0, 1e-3, 7.0})};
  const double* const steps = pick(2) ? spacing : nullptr;
  const Exec exec = place();
  const bool fp64 = pick(2);
  const DType real = fp64 ? DType::f64 : DType::f32;
  if (pick(3)) {
    Tensor mask = labels(shape, pick(label_types), 1 + pick(4), false);
    const Unchanged same{&mask};
    DistanceOptions o;
    o.border = pick(2), o.squared = pick(2), o.no_site = pick({HUGE_VAL, 0.0, 99.0});
    if (pick(2)) {
      o.multi_label = pick(2);
      const bool want = !o.border && pick(2);
      Tensor out(shape, real), indices = want ? Tensor(with(with(lead, {dims}), s), DType::i32) : Tensor();
      Memory memory(distance_workspace(mask.array(), dims, o, want, fp64, exec));
      distance_transform_edt(mask.array(), dims, steps, o, out.array(), indices.array(), memory.get(), exec);
    } else {
      o.convention = static_cast<SignedMap>(pick(4)), o.normalize = pick(2),
      o.num_classes = chance(3) ? 1 + pick(4) : 0;
      Tensor out(o.num_classes ? with(with(lead, {o.num_classes}), s) : shape, real);
      Memory memory(distance_workspace(mask.array(), dims, o, false, fp64, exec));
      signed_distance_map(mask.array(), dims, steps, o, out.array(), memory.get(), exec);
    }
    return;
  }
  Tensor values = array(shape, real), sites = maybe(labels(shape, pick(label_types), 2)), out(shape, real),
         grad(shape, real), by_values(shape, real), apexes(with({dims}, shape), DType::i32);
  fill(values, -1, [&](int64_t, int64_t) { return chance(6) ? HUGE_VAL : 10 * uniform(); });
  fill(grad, -1, [&](int64_t, int64_t) { return value(-1, 1); });
  const Unchanged same{&values, &sites, &grad};
  Memory memory(sampled_distance_workspace(values.array(), dims, exec));
  sampled_distance(values.array(), sites.array(), dims, steps, out.array(), apexes.array(), memory.get(),
                   exec);
  sampled_distance_backward(grad.array(), apexes.array(), dims, by_values.array(), memory.get(), exec);
}

void surface_family() {
  const int dims = 1 + static_cast<int>(pick(3));
  Shape lead = space(2, 3), s;
  for (int i = 0; i < dims; ++i) s.push_back(1 + pick(chance(60) ? 140 / (dims * dims) : dims == 3 ? 5 : 8));
  const Shape shape = with(lead, s);
  const Exec exec = place();
  const int64_t classes = chance(2) ? 1 + pick(chance(10) ? 260 : 4) : 0;
  if (pick(2)) {
    const int64_t many = classes ? classes + 1 : 2;
    Tensor pred = labels(shape, pick(label_types), many), target = labels(shape, pick(label_types), many);
    const Unchanged same{&pred, &target};
    SurfaceOptions o;
    o.surface = static_cast<SurfaceKind>(pick(3)), o.border = pick(2), o.pooled = pick(2),
    o.mean_of_two = pick(2);
    o.interpolate = chance(30) || (o.surface != SurfaceKind::cells && pick(2));
    o.missing = pick({HUGE_VAL, 0.0, 12.0}), o.percentile = pick({95.0, 0.0, 100.0, 50.0, 99.9});
    for (double& x : o.spacing) x = pick({1.0, 0.5, 2.5, 1e-3});
    o.classes = classes, o.first_label = pick(2);
    const int64_t items = count_of(lead) * std::max<int64_t>(classes, 1);
    o.tolerances = 1 + static_cast<int>(pick(3)),
    o.tolerance_classes = chance(3) ? 1 + static_cast<int>(pick(chance(9) ? 50 : 3)) : 1;
    for (double& t : o.tolerance) t = pick({0.0, 1.0, 2.5});
    if (chance(3) && items) o.first = pick(items), o.count = pick(items - o.first + (chance(20) ? 3 : 1));
    Memory surfaces(cpu::surface_extract_workspace(pred.array(), dims, o, exec));
    Memory memory(cpu::surface_extract(pred.array(), target.array(), dims, o, surfaces.get(), exec));
    Tensor out({5 + o.tolerances, items}, DType::f64);
    cpu::surface_metrics(pred.array(), dims, o, surfaces.get(), memory.get(), out.array(), exec);
    return;
  }
  OverlapOptions o;
  o.pred = static_cast<OverlapOptions::Pred>(pick(3)), o.threshold = pick({0.0, 0.5}),
  o.first_label = pick(2);
  o.classes = o.pred == OverlapOptions::masks ? classes : 1 + pick(4), o.target_labels = pick(2);
  const int64_t channels = o.first_label + o.classes + (chance(40) ? 1 : 0);
  const Shape logit = with(with(lead, {channels}), s);
  const bool masks = o.pred == OverlapOptions::masks;
  Tensor pred = masks ? labels(shape, pick(label_types), classes + 1) : reals(logit, pick(floats), -1, 1);
  Tensor target = masks || o.target_labels ? labels(shape, pick(label_types), std::max<int64_t>(o.classes, 2))
                                           : labels(logit, pick(label_types), 2);
  const Unchanged same{&pred, &target};
  const int64_t items = count_of(lead) * std::max<int64_t>(o.classes, 1);
  Tensor counts({items, 3}, DType::i64), out({6, items}, DType::f64);
  cpu::overlap_metrics(pred.array(), target.array(), dims, o, counts.array(), out.array(), exec);
}

void labels_family() {
  const int64_t batch = 1 + pick(3), raters = 1 + pick(chance(30) ? 64 : 4);
  Shape s;
  for (int64_t i = pick(5); i > 0; --i) s.push_back(1 + pick(6));
  VoteOptions o;
  o.binary = pick(2), o.classes = o.binary ? 2 : 2 + static_cast<int>(pick(chance(20) ? 256 : 3));
  o.has_missing = chance(3), o.missing = pick({int64_t{255}, int64_t{0}, int64_t{1}, int64_t{-1}});
  const bool absent = chance(3), extra = chance(3);
  o.can_miss = absent || o.has_missing || !o.binary;
  const Shape image = with({batch}, s);
  const int64_t pixels = count_of(s), voters = raters + extra, channels = o.binary ? 1 : o.classes;
  const DType dtype = pick(label_types);
  Tensor votes = labels(with({batch, raters}, s), dtype, o.classes),
         fusion = extra ? labels(image, pick(label_types), o.classes) : Tensor();
  Tensor present = absent ? Tensor({batch, raters}, DType::u8) : Tensor(),
         weights = maybe(Tensor({batch, raters}, DType::f64));
  fill(present, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(2)); });
  fill(weights, -1, [&](int64_t, int64_t) { return uniform(); });
  const Unchanged same{&votes, &fusion, &present, &weights};
  const Exec exec = place();
  const int64_t base = o.classes + o.can_miss;
  int64_t slots = 1;
  for (int64_t m = 0; m < voters && slots <= 65536; ++m) slots *= base;
  const bool few = slots <= (chance(30) ? 65536 : 1024);
  switch (pick(4)) {
    case 0: {
      int64_t patterns = 1;  // without the extra rater
      for (int64_t m = 0; m < raters && patterns <= 65536; ++m) patterns *= base;
      if (patterns > 1024) patterns = 0;
      Tensor out(image, dtype);
      Memory memory(cpu::majority_vote_workspace(patterns));
      cpu::majority_vote(votes.array(), present.array(), o, static_cast<Tie>(pick(3)), 1, patterns,
                         out.array(), memory.get(), exec);
      return;
    }
    case 1: {
      Tensor soft = chance(2) ? reals(with({batch, raters}, s), pick(floats), 0, 1) : Tensor();
      Tensor out(with({batch, channels}, s), pick(wides));
      cpu::soft_average((soft.view.rank ? soft : votes).array(), present.array(), weights.array(), o,
                        out.array(), exec);
      return;
    }
    case 2: {
      double log = 0;
      for (int64_t m = 0; m < voters; ++m) log += std::log2(static_cast<double>(base));
      if (log >= 62) return;  // the caller's to see
      Tensor codes({batch, pixels}, DType::i64);
      cpu::vote_codes(votes.array(), fusion.array(), present.array(), o, codes.array(), exec);
      return;
    }
    default: break;
  }
  const bool hashed = !few || chance(4);
  double log = 0;
  for (int64_t m = 0; m < voters; ++m) log += std::log2(static_cast<double>(base));
  if (log >= 62) return;
  if (hashed) slots = int64_t{1} << pick(10);
  Tensor index({batch, pixels}, slots <= 256 && !hashed ? DType::u8 : DType::i32),
      keys = hashed ? Tensor({batch, slots}, DType::i64) : Tensor();
  Tensor counts({batch, slots}, DType::i64);
  Memory first(cpu::vote_patterns_workspace(slots, exec));
  if (!cpu::vote_patterns(votes.array(), fusion.array(), present.array(), o, index.array(), keys.array(),
                          counts.array(), first.get(), exec))
    return;
  const int c = o.classes;
  if (batch * slots * c > 20000 || voters * c * c > 20000) return;
  Tensor prior = maybe(Tensor({c}, DType::f64));
  fill(prior, -1, [&](int64_t, int64_t) { return 1.0 / c; });
  Tensor values({batch, slots, channels}, DType::f64), names({batch, slots}, DType::i64),
      performance({batch, voters, c, c}, DType::f64);
  Tensor sensitivity({batch, voters, c}, DType::f64), specificity({batch, voters, c}, DType::f64),
      status({batch, 2}, DType::i32);
  Memory memory(cpu::staple_workspace(batch, slots, voters, c, exec));
  cpu::staple(keys.array(), counts.array(), voters, o, StapleOptions{1 + pick(5), 1e-5}, prior.array(),
              values.array(), names.array(), performance.array(), sensitivity.array(), specificity.array(),
              status.array(), memory.get(), exec);
  Tensor out = maybe(Tensor({batch, channels, pixels}, pick(wides))),
         masks({batch, pixels}, pick(label_types));
  cpu::spread(index.array(), out.view.rank ? values.array() : Array{}, out.array(), names.array(),
              masks.array(), exec);
}

void norms_family() {
  const int64_t batch = extent(3), channels = 1 + pick(6);
  const Shape shape = with({batch, channels}, space(3, 6));
  const DType dtype = pick(floats), wide = dtype == DType::f64 ? DType::f64 : DType::f32;
  const Order order =
      pick({Order::contiguous, Order::channels_last, chance(9) ? Order::strided : Order::contiguous});
  NormOptions o;
  const int64_t kind = pick(4);
  o.over_batch = kind < 2, o.given = kind == 1, o.groups = kind == 2 ? channels : chance(9) ? 2 : 1;
  o.slope = pick({0.0, 1.0, 0.1}), o.eps = pick({1e-5, 0.0});
  const auto image = [&](bool wanted) {
    if (!wanted) return Tensor();
    Tensor t(shape, dtype, order);
    fill(t, -1, [&](int64_t, int64_t) { return value(-2, 2); });
    return t;
  };
  const auto vector = [&](int64_t n, bool wanted) {
    return wanted ? reals({n}, pick(floats), 0, 1) : Tensor();
  };
  const bool dual = pick(2), affine = pick(2);
  const int64_t slopes = pick({int64_t{0}, int64_t{1}, channels});
  Tensor x = image(true), x_dot = image(dual && pick(3)), grad_y = image(true);
  Tensor weight = vector(channels, affine), bias = vector(channels, affine && pick(3)),
         slope = vector(slopes, slopes);
  Tensor weight_dot = vector(channels, weight.view.rank && dual),
         bias_dot = vector(channels, bias.view.rank && dual), slope_dot = vector(slopes, slopes && dual);
  const bool running = o.given || (kind == 0 && pick(2));
  Tensor mean = running ? Tensor({channels}, wide) : Tensor(), var = mean;
  fill(mean, -1, [&](int64_t, int64_t) { return uniform(); }),
      fill(var, -1, [&](int64_t, int64_t) { return uniform() + 0.1; });
  const Unchanged same{&x, &x_dot, &grad_y, &weight, &bias, &slope, &weight_dot, &bias_dot, &slope_dot};
  const Exec exec = place();
  const NormInputs in{x.array(),        x_dot.array(), weight.array(),    weight_dot.array(), bias.array(),
                      bias_dot.array(), slope.array(), slope_dot.array(), mean.array(),       var.array()};
  Memory memory(norm_workspace(in, o, exec));
  Tensor y = image(pick(4)), y_dot = image(dual),
         stats({o.over_batch ? channels : batch * o.groups, norm_stats}, DType::f64);
  norm_forward(in, o, y.array(), y_dot.array(), stats.array(), memory.get(), exec);
  Tensor grad_x = image(pick(3)), grad_weight = affine ? Tensor({channels}, wide) : Tensor(),
         grad_bias = bias.view.rank ? Tensor({channels}, wide) : Tensor(),
         grad_slope = slopes ? Tensor({slopes}, wide) : Tensor();
  norm_backward(in, o, grad_y.array(), stats.array(), grad_x.array(), grad_weight.array(), grad_bias.array(),
                grad_slope.array(), memory.get(), exec);
}

void meta_family() {
  const int64_t batch = extent(3);
  const Exec exec = place();
  if (chance(3)) {
    const int64_t channels = 1 + pick(5);
    const Shape s = space(4, 5), shape = with({batch, channels}, s), image = with({batch}, s);
    const DType a = pick(floats), b = pick(floats),
                wide = a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
    Tensor z = reals(shape, a, -8, 8), dot = reals(shape, b, -1, 1);
    Tensor y = pick(2) ? labels(image, pick(label_types), std::max<int64_t>(2, channels), chance(3))
                       : reals(shape, any_type(), 0, 1);
    const Unchanged same{&z, &dot, &y};
    Tensor loss = array(image, wide, false), loss_dot = array(image, wide, false);
    ce_dual(z.array(), dot.array(), y.array(), channels > 1 && pick(2), loss.array(), loss_dot.array(), exec);
    return;
  }
  const DType dtype = pick(wides);
  const auto dense = [&](const Shape& shape) {
    Tensor t(shape, dtype);
    fill(t, -1, [&](int64_t, int64_t) { return value(-0.5, 0.5); });
    return t;
  };
  const bool mask = pick(2), deep = chance(4), attached = pick(2);
  const Shape shape = mask ? (deep ? Shape{batch, extent(3), extent(4), extent(5)}
                                   : Shape{batch, extent(6), extent(chance(9) ? 30 : 7)})
                           : with({batch, 1}, space(4, 5));
  Tensor loss = reals(shape, dtype, -1, 4), grad = reals(shape, dtype, -1, 1),
         weight = array(shape, dtype, false), by_loss = attached ? array(shape, dtype, false) : Tensor();
  const Unchanged same{&loss, &grad};
  if (mask) {
    const int64_t k3 = 1 + pick(5), k5 = 1 + pick(5);
    Tensor w3 = dense(deep ? Shape{k3, 3, 3, 3} : Shape{k3, 3, 3}), b3 = dense({k3}),
           w5 = dense(deep ? Shape{k5, 5, 5, 5} : Shape{k5, 5, 5}), b5 = dense({k5}),
           w1 = dense({k3 + k5 + 1}), b1 = dense({1});
    const MaskNet net{w3.array(), b3.array(), w5.array(), b5.array(), w1.array(), b1.array()};
    Tensor by_net({w3.view.size() + w5.view.size() + 2 * (k3 + k5) + 2}, dtype);
    mask_net(loss.array(), net, weight.array(), exec);
    Memory memory(mask_net_workspace(loss.array(), net, attached, exec));
    mask_net_vjp(grad.array(), weight.array(), loss.array(), net, by_net.array(), by_loss.array(),
                 memory.get(), exec);
  } else {
    const int64_t hidden = 1 + pick(chance(20) ? 1024 : 20);
    Tensor w1 = dense({hidden}), b1 = dense({hidden}), w2 = dense({hidden}), b2 = dense({1}),
           by_net({3 * hidden + 1}, dtype);
    const MwNet net{w1.array(), b1.array(), w2.array(), b2.array()};
    Memory memory(mw_net_workspace(loss.array(), net, exec));
    mw_net(loss.array(), net, weight.array(), memory.get(), exec);
    mw_net_vjp(grad.array(), weight.array(), loss.array(), net, by_net.array(), by_loss.array(), memory.get(),
               exec);
  }
}

void noise_family() {
  const Exec exec = place();
  const int64_t batch = extent(3), kind = pick(4);
  if (kind == 3) {
    const Shape shape = {batch, extent(5), extent(9), extent(chance(9) ? 200 : 20)};
    Tensor mask(shape, pick({DType::u8, DType::b8})), radii({pick(2) ? batch : 1}, DType::f32),
        out(shape, DType::b8);
    fill(mask, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(2)); });
    fill(radii, -1, [&](int64_t, int64_t) { return value(0, 12); });
    const double spacing[3] = {value(0.1, 3), value(0.1, 3), value(0.1, 3)};
    const Unchanged same{&mask, &radii};
    const size_t size = cpu::dilate_workspace(mask.array(), radii.array(), spacing, exec);
    Memory memory(size);
    if (size) cpu::dilate(mask.array(), radii.array(), spacing, pick(2), out.array(), memory.get(), exec);
    return;
  }
  if (kind == 0) {
    Tensor keys({batch}, DType::i64), out({batch, extent(40)}, DType::f32);
    uniforms(keys.array(), static_cast<int>(pick(5)), out.array(), exec);
    return;
  }
  if (kind == 1) {
    const bool flat = pick(2);
    const int64_t h = 1 + pick(9), w = 1 + pick(chance(20) ? 90 : 9);
    Tensor mask({batch, flat ? 1 : 1 + pick(5), h, w}, pick({DType::u8, DType::b8})),
        found(shape_of(mask), DType::i32);
    fill(mask, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(2)); });
    const bool full = flat || pick(2);
    connected_components(mask.array(), full, found.array(), exec);
    if (!flat || !batch) return;
    std::vector<int64_t> roots, polygons = {0};
    const std::vector<double> marks = found.values();
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < h * w; ++i)
        if (marks[static_cast<size_t>(b * h * w + i)] == static_cast<double>(i + 1))
          roots.push_back(b * h * w + i);
      polygons.push_back(static_cast<int64_t>(roots.size()));
    }
    const int64_t count = static_cast<int64_t>(roots.size()), n = 1 + pick(8);
    Tensor starts({count}, DType::i64), phases({count}, DType::f64), vertices({count, n, 2}, DType::i32),
        first({batch + 1}, DType::i64);
    Tensor image({batch, h, w}, DType::u8);
    if (count) std::memcpy(starts.bytes.data(), roots.data(), starts.bytes.size());
    std::memcpy(first.bytes.data(), polygons.data(), first.bytes.size());
    fill(phases, -1, [&](int64_t, int64_t) { return uniform(); });
    Array components = found.array();
    components.rank = 3, components.shape[1] = h, components.shape[2] = w, components.strides[1] = w,
    components.strides[2] = 1;
    contour_vertices(components, starts.array(), phases.array(), vertices.array(), exec);
    const bool wild = chance(3);
    fill(vertices, -1, [&](int64_t, int64_t) {
      return wild && chance(9) ? pick({536870912.0, -536870912.0})
                               : 256.0 * static_cast<double>(pick(30) - 9);
    });
    fill(image, -1, [&](int64_t, int64_t) { return 0.0; });
    Memory memory(fill_workspace(image.array(), exec));
    fill_polygons(vertices.array(), first.array(), image.array(), memory.get(), exec);
    return;
  }
  DeformOptions o;
  o.linear = pick(2), o.fill = pick({0.0, 255.0, -3.0, 1e30});
  const DType dtype = o.linear ? pick(wides) : any_type();
  const Shape shape = {batch, 1 + pick(4), 1 + pick(6), extent(9)};
  Tensor image(shape, dtype), out(shape, dtype),
      grid({batch, 3, 1 + pick(4), 1 + pick(4), 1 + pick(chance(9) ? 64 : 4)}, DType::f64),
      affine({batch, 3, 4}, DType::f64);
  fill(image, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(200)); });
  fill(grid, -1, [&](int64_t, int64_t) { return value(-9, 9); });
  fill(affine, -1, [&](int64_t, int64_t) { return value(-2, 2); });
  const Unchanged same{&image, &grid, &affine};
  deform(image.array(), grid.array(), affine.array(), o, out.array(), exec);
}

void pixels_family() {
  const Exec exec = place();
  const int64_t kind = pick(4);
  const Shape s = space(4, 7);
  if (kind < 2) {
    const int64_t rows = 1 + pick(3);
    const Shape shape = with({rows, 1}, s);
    const DType dtype = pick(floats);
    Tensor values = reals(shape, dtype, -3, 3), mask = maybe(labels(shape, any_type(), 2));
    if (pick(2)) fill(values, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(3) - 1); });
    if (!values.view.size()) return;  // the caller's to see
    const Unchanged same{&values, &mask};
    if (kind == 0) {
      Quantiles q;
      q.count = chance(40) ? static_cast<int>(pick(12)) : 1 + static_cast<int>(pick(8)),
      q.rule = static_cast<Interpolation>(pick(5));
      for (double& x : q.q) x = pick({0.0, 1.0, 0.5, uniform()});
      Tensor out({q.count, rows}, dtype);
      Memory memory(selection_workspace(values.array(), 2 * q.count, exec));
      quantile(values.array(), mask.array(), q, out.array(), memory.get(), exec);
    } else {
      TopK o;
      o.k = pick({int64_t{0}, int64_t{1}, pick(50), int64_t{1} << 62, int64_t{-3}}), o.largest = pick(2);
      Tensor counts = maybe(Tensor({rows}, DType::i64)), threshold = maybe(Tensor({rows}, dtype));
      Tensor chosen = maybe(Tensor(with({rows}, s), pick({DType::u8, DType::b8})));
      fill(counts, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(60) - 3); });
      Memory memory(selection_workspace(values.array(), 1, exec));
      top_k(values.array(), mask.array(), counts.array(), o, threshold.array(), chosen.array(), memory.get(),
            exec);
    }
    return;
  }
  const int64_t batch = 1 + pick(3), classes = 2 + pick(chance(20) ? 254 : 4);
  Tensor p = reals(with({batch, classes}, s), pick(floats), 0, 1),
         given = labels(with({batch}, s), pick(label_types), classes);
  if (!p.view.size()) return;
  const Unchanged same{&p, &given};
  Memory memory(confident_workspace(p.array(), exec));
  if (kind == 2) {
    Tensor counts({classes, classes}, DType::i64);
    confident_joint(p.array(), given.array(), counts.array(), memory.get(), exec);
  } else {
    Tensor wrong(with({batch}, s), pick({DType::u8, DType::b8}));
    label_errors(p.array(), given.array(), static_cast<Prune>(pick(3)), wrong.array(), memory.get(), exec);
  }
}

const struct {
  const char* name;
  void (*call)();
} families[] = {{"losses", losses_family},     {"task_losses", task_losses_family},
                {"distance", distance_family}, {"surface", surface_family},
                {"labels", labels_family},     {"norms", norms_family},
                {"meta", meta_family},         {"noise", noise_family},
                {"pixels", pixels_family}};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int64_t chosen = [] {
    const char* wish = std::getenv("NOISYSEG_FUZZ_FAMILY");
    for (int64_t i = 0; wish && *wish && i < 9; ++i)
      if (!std::strcmp(wish, families[i].name)) return i;
    if (wish && *wish) std::fprintf(stderr, "no family %s\n", wish), std::exit(2);
    return int64_t{-1};
  }();
  randomness.set(data, size);
  try {
    families[chosen < 0 ? pick(9) : chosen].call();
  } catch (const std::invalid_argument&) {  // what the headers say of bad arguments
  }
  return 0;
}
