// The CUDA label fusion, emulated, against the CPU functions on the same annotations.
#include "noisyseg/labels.h"

#include "tensors.h"

namespace {

Exec place(bool cuda) { return cuda ? device : host; }

#define CALL(name, ...) (cuda ? cuda::name(__VA_ARGS__) : cpu::name(__VA_ARGS__))

struct Problem {
  std::string name;
  Shape size;
  int64_t batch = 2, raters = 3;
  DType dtype = DType::u8;
  Order order = Order::contiguous;
  VoteOptions options;
  bool absent = false, extra = false;

  Tensor annotations, fusion, present, weights;

  void make() {
    Shape shape = {batch, raters}, image = {batch};
    for (int64_t n : size) shape.push_back(n), image.push_back(n);
    annotations = Tensor(shape, dtype, order);
    fill(annotations, static_cast<int>(shape.size()), [&](int64_t pixel, int64_t) {
      const int64_t truth = pixel / 7 % options.classes;
      return static_cast<double>(uniform() < 0.8 ? truth : pick(options.classes + 2));
    });
    fusion = Tensor(image, pick({DType::u8, DType::i32, DType::i64}));
    fill(fusion, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(options.classes)); });
    present = Tensor({batch, raters}, DType::u8);
    fill(present, -1, [&](int64_t, int64_t) { return uniform() < 0.7 ? 1.0 : 0.0; });
    weights = Tensor({batch, raters}, DType::f64);
    fill(weights, -1, [&](int64_t, int64_t) { return uniform() + 0.1; });
    options.can_miss = absent || options.has_missing || !options.binary;
  }
  int64_t pixels() const {
    int64_t n = 1;
    for (int64_t s : size) n *= s;
    return n;
  }
  int64_t slots() const {
    int64_t n = 1;
    for (int64_t m = 0; m < raters + extra; ++m) n *= options.classes + options.can_miss;
    return n;
  }
  Array here() { return absent ? present.array() : Array{}; }
};

std::vector<char> bytes(size_t n) { return std::vector<char>(n + 8); }

void patterns(Problem& p, bool cuda, Tensor& index, Tensor& counts) {
  auto work = bytes(CALL(vote_patterns_workspace, p.slots(), place(cuda)));
  CALL(vote_patterns, p.annotations.array(), p.extra ? p.fusion.array() : Array{}, p.here(), p.options,
       index.array(), Array{}, counts.array(), work.data(), place(cuda));
}

struct Fit {
  Tensor values, labels, performance, sensitivity, specificity, status, out, masks;
};
Fit fit(Problem& p, bool cuda, Tensor& index, const Array& keys, Tensor& counts, const Array& prior,
        DType dtype, DType label) {
  const int64_t voters = p.raters + p.extra, slots = counts.view.shape[1], c = p.options.classes;
  const int64_t channels = p.options.binary ? 1 : c;
  Fit f{Tensor({p.batch, slots, channels}, DType::f64), Tensor({p.batch, slots}, DType::i64),
        Tensor({p.batch, voters, c, c}, DType::f64),    Tensor({p.batch, voters, c}, DType::f64),
        Tensor({p.batch, voters, c}, DType::f64),       Tensor({p.batch, 2}, DType::i32),
        Tensor({p.batch, channels, p.pixels()}, dtype), Tensor({p.batch, p.pixels()}, label)};
  auto work = bytes(CALL(staple_workspace, p.batch, slots, voters, p.options.classes, place(cuda)));
  CALL(staple, keys, counts.array(), voters, p.options, StapleOptions{40, 1e-6}, prior, f.values.array(),
       f.labels.array(), f.performance.array(), f.sensitivity.array(), f.specificity.array(),
       f.status.array(), work.data(), place(cuda));
  CALL(spread, index.array(), f.values.array(), f.out.array(), f.labels.array(), f.masks.array(),
       place(cuda));
  return f;
}

void compare(const Problem& p, Fit& a, Fit& b) {
  compare(p.name, "posterior", a.out, b.out, 1e-6);
  compare(p.name, "labels", a.masks, b.masks, 0);
  compare(p.name, "performance", a.performance, b.performance, 1e-6);
  compare(p.name, "sensitivity", a.sensitivity, b.sensitivity, 1e-6);
  compare(p.name, "specificity", a.specificity, b.specificity, 1e-6);
}

void run(Problem p) {
  p.make();
  const DType index_type = p.slots() <= 256 ? DType::u8 : DType::i32;
  Tensor index[2], counts[2];
  Fit f[2];
  const DType dtype = pick({DType::f32, DType::f64}), label = pick({DType::u8, DType::i32, DType::i64});
  Tensor prior({p.options.classes}, DType::f64);
  fill(prior, -1, [&](int64_t, int64_t) { return 1.0 / p.options.classes; });
  const bool given = pick(2) == 1;
  for (int cuda = 0; cuda < 2; ++cuda) {
    index[cuda] = Tensor({p.batch, p.pixels()}, index_type);
    counts[cuda] = Tensor({p.batch, p.slots()}, DType::i64);
    patterns(p, cuda, index[cuda], counts[cuda]);
    f[cuda] = fit(p, cuda, index[cuda], {}, counts[cuda], given ? prior.array() : Array{}, dtype, label);
  }
  compare(p.name, "index", index[0], index[1], 0);
  compare(p.name, "counts", counts[0], counts[1], 0);
  compare(p, f[0], f[1]);
  Fit again = fit(p, true, index[1], {}, counts[1], given ? prior.array() : Array{}, dtype, label);
  compare(p.name, "the second time", again.out, f[1].out, 0);

  Shape image = {p.batch};
  for (int64_t n : p.size) image.push_back(n);
  for (int tie = 0; tie < 3; ++tie)
    for (const int64_t slots : {p.extra ? int64_t{0} : p.slots(), int64_t{0}}) {
      Tensor voted[2];
      for (int cuda = 0; cuda < 2; ++cuda) {
        voted[cuda] = Tensor(image, p.dtype);
        auto work = bytes(CALL(majority_vote_workspace, slots));
        CALL(majority_vote, p.annotations.array(), p.here(), p.options, static_cast<Tie>(tie), 1, slots,
             voted[cuda].array(), work.data(), place(cuda));
      }
      compare(p.name, "majority", voted[0], voted[1], 0);
    }
  Tensor codes[2];
  for (int cuda = 0; cuda < 2; ++cuda) {
    codes[cuda] = Tensor({p.batch, p.pixels()}, DType::i64);
    CALL(vote_codes, p.annotations.array(), p.extra ? p.fusion.array() : Array{}, p.here(), p.options,
         codes[cuda].array(), place(cuda));
  }
  compare(p.name, "codes", codes[0], codes[1], 0);
}

void average(const std::string& name, DType dtype, bool binary, bool weighted, bool absent) {
  Problem p;
  p.name = name;
  p.size = {5, 61};
  p.dtype = dtype;
  p.absent = absent;
  p.order = Order::strided;
  if (!binary) p.options.binary = false, p.options.classes = 3;
  p.make();
  const int64_t channels = binary ? 1 : 3;
  Tensor out[2];
  for (int cuda = 0; cuda < 2; ++cuda) {
    out[cuda] = Tensor({p.batch, channels, 5, 61}, weighted ? DType::f32 : DType::f64);
    CALL(soft_average, p.annotations.array(), p.here(), weighted ? p.weights.array() : Array{}, p.options,
         out[cuda].array(), place(cuda));
  }
  ::compare(name, "average", out[0], out[1], 1e-12);
}

Problem masks(const char* name, Shape size, int64_t raters) {
  Problem p;
  p.name = name;
  p.size = size;
  p.raters = raters;
  return p;
}

}  // namespace

int main() {
  run(masks("two masks", {9, 37}, 2));
  Problem p = masks("strided, absent", {3, 5, 41}, 4);
  p.order = Order::strided, p.absent = true, p.dtype = DType::i32;
  run(p);
  p = masks("expanded, extra", {300}, 3);
  p.order = Order::expanded, p.extra = true, p.dtype = DType::i64;
  run(p);
  p = masks("missing pixels", {20, 20},
            6);  // more slots than shared memory would take: 3^6 fits, 3^8 does not
  p.options.has_missing = true, p.options.missing = 3;
  run(p);
  p.name = "many slots", p.raters = 8;
  run(p);
  p = masks("labels", {11, 30}, 3);
  p.options.binary = false, p.options.classes = 4, p.dtype = DType::i64;
  run(p);
  p.name = "one image of labels", p.batch = 1, p.raters = 1, p.dtype = DType::u8;
  run(p);

  // Patterns by keys, as from a sort.
  p = masks("keys", {13, 13}, 3);
  p.make();
  Tensor keys({p.batch, 8}, DType::i64), counts({p.batch, 8}, DType::i64), index({p.batch, 169}, DType::i32);
  int64_t k = 0;
  fill(keys, -1, [&](int64_t, int64_t) { return static_cast<double>(7 - k++ % 8); });
  fill(counts, -1, [&](int64_t, int64_t) { return static_cast<double>(pick(50)); });
  fill(index, -1, [&](int64_t, int64_t) { return 0.0; });
  Fit f[2];
  for (int cuda = 0; cuda < 2; ++cuda)
    f[cuda] = fit(p, cuda, index, keys.array(), counts, {}, DType::f64, DType::u8);
  compare(p.name, "performance", f[0].performance, f[1].performance, 1e-9);
  compare(p.name, "sensitivity", f[0].sensitivity, f[1].sensitivity, 1e-9);

  average("average u8", DType::u8, true, false, false);
  average("average i32", DType::i32, true, true, true);
  average("average i64 labels", DType::i64, false, true, true);
  average("average f16", DType::f16, true, false, true);
  average("average bf16", DType::bf16, true, true, false);
  average("average f32", DType::f32, true, false, false);
  average("average f64", DType::f64, true, true, true);
  if (failures) std::fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}
