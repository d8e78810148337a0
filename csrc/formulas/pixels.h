// Keys in the order of values, their digits, and where a search for an order statistic stands; confident
// learning's counts.
#pragma once
#include "formulas/dtype.h"
#include "formulas/room.h"
#include "formulas/unfused.h"
#include "layout.h"
#include "noisyseg/pixels.h"

namespace noisyseg::formulas {

// ---- keys ------------------------------------------------------------------------------------------

template <class T>
struct KeyOf {
  using Key = uint32_t;
  static constexpr int bits = 16;
};
template <>
struct KeyOf<float> {
  using Key = uint32_t;
  static constexpr int bits = 32;
};
template <>
struct KeyOf<double> {
  using Key = uint64_t;
  static constexpr int bits = 64;
};

// The key of NaN and of what is masked out: no other value has it, in either order.
template <class Key>
NOISYSEG_FORMULA Key no_key(int bits) {
  return static_cast<Key>(~Key{0}) >> (8 * static_cast<int>(sizeof(Key)) - bits);
}

// flip: 0, or no_key for the opposite order.
NOISYSEG_FORMULA uint32_t key_of(float x, uint32_t flip) {
  const uint32_t u = static_cast<uint32_t>(float_to_bits(x + 0.f));  // -0 + 0 is +0
  const uint32_t key = u ^ (static_cast<uint32_t>(static_cast<int32_t>(u) >> 31) | 0x80000000u);
  return x == x ? key ^ flip : 0xffffffffu;
}
NOISYSEG_FORMULA uint64_t key_of(double x, uint64_t flip) {
  const double zeroed = x + 0.0;
#ifdef __CUDA_ARCH__
  const uint64_t u = static_cast<uint64_t>(__double_as_longlong(zeroed));
#else
  uint64_t u;
  memcpy(&u, &zeroed, 8);
#endif
  const uint64_t key = u ^ (static_cast<uint64_t>(static_cast<int64_t>(u) >> 63) | (uint64_t{1} << 63));
  return x == x ? key ^ flip : ~uint64_t{0};
}
NOISYSEG_FORMULA uint32_t key_of_half(uint32_t bits, uint32_t infinity, uint32_t flip) {
  const uint32_t u = bits == 0x8000u ? 0u : bits;
  const uint32_t key = u & 0x8000u ? u ^ 0xffffu : u | 0x8000u;
  return (bits & 0x7fffu) > infinity ? 0xffffu : key ^ flip;
}
NOISYSEG_FORMULA uint32_t key_of(Half x, uint32_t flip) { return key_of_half(x.bits, 0x7c00u, flip); }
NOISYSEG_FORMULA uint32_t key_of(BFloat16 x, uint32_t flip) { return key_of_half(x.bits, 0x7f80u, flip); }

// The value of a key that was not flipped.
NOISYSEG_FORMULA void value_of(uint64_t key, float& x) {
  const uint32_t k = static_cast<uint32_t>(key);
  x = bits_to_float(static_cast<int32_t>(k & 0x80000000u ? k ^ 0x80000000u : ~k));
}
NOISYSEG_FORMULA void value_of(uint64_t key, double& x) {
  const uint64_t u = key >> 63 ? key ^ (uint64_t{1} << 63) : ~key;
#ifdef __CUDA_ARCH__
  x = __longlong_as_double(static_cast<long long>(u));
#else
  memcpy(&x, &u, 8);
#endif
}
NOISYSEG_FORMULA uint16_t half_of(uint64_t key) {
  return static_cast<uint16_t>(key & 0x8000u ? key ^ 0x8000u : key ^ 0xffffu);
}
NOISYSEG_FORMULA void value_of(uint64_t key, Half& x) { x.bits = half_of(key); }
NOISYSEG_FORMULA void value_of(uint64_t key, BFloat16& x) { x.bits = half_of(key); }

// ---- the search ------------------------------------------------------------------------------------

namespace {  // types with functions of their own: no weak symbols

// One digit: of the key, or, behind all of the key, of the pixel's place in its row.
struct Step {
  int shift, width;
  bool place, first;
};

struct Digits {
  int key_bits, place_bits, width;
  NOISYSEG_HOST_DEVICE int key_steps() const { return (key_bits + width - 1) / width; }
  NOISYSEG_HOST_DEVICE int steps() const { return key_steps() + (place_bits + width - 1) / width; }
  NOISYSEG_HOST_DEVICE Step step(int i) const {
    const bool place = i >= key_steps();
    const int left = place ? place_bits - (i - key_steps()) * width : key_bits - i * width;
    const int digits = left < width ? left : width;
    return {left - digits, digits, place, i == 0};
  }
};

}  // namespace

// One order statistic: the digits found so far, and its rank (from 0) among what begins with them. When all
// is found, or what begins so is wanted whole (open = 0), key and place are the last ones that are in.
struct Target {
  uint64_t key;
  int64_t place;
  int64_t rank;  // negative: there is none
  int32_t slot;  // whose counts: targets of a row with the same digits share them
  int32_t open;
};

NOISYSEG_FORMULA int64_t last_with(int shift) { return (int64_t{1} << shift) - 1; }

// The key's (or place's) digit, -1 where the digits before are not the target's.
template <class Key>
NOISYSEG_FORMULA int digit_of(const Step& step, const Target& t, Key key, int64_t place, Key none) {
  const Key digit =
      (step.place ? static_cast<Key>(0) : key >> step.shift) & static_cast<Key>(last_with(step.width));
  const bool begins = step.place
                          ? key == static_cast<Key>(t.key) && place >> step.shift >> step.width == t.place
                          : key >> step.shift >> step.width == static_cast<Key>(t.key);
  if (!begins | (key == none)) return -1;
  return step.place ? static_cast<int>((place >> step.shift) & last_with(step.width))
                    : static_cast<int>(digit);
}

// Whether places [first, first + n) can hold what the target still looks for.
NOISYSEG_FORMULA bool may_hold(const Step& step, const Target& t, int64_t first, int64_t n) {
  if (!step.place) return true;
  const int bits = step.shift + step.width;
  return (first >> bits) <= t.place && ((first + n - 1) >> bits) >= t.place;
}

NOISYSEG_FORMULA void find_none(Target& t) {
  t.key = 0;
  t.place = -1;
  t.rank = -1;
  t.open = 0;
}

// The next digit is found: `before` matches come before it, `here` have it. to_choose: the places are wanted.
NOISYSEG_FORMULA void advance(Target& t, const Step& step, int digit, int64_t before, int64_t here,
                              bool to_choose) {
  t.rank -= before;
  if (step.place)
    t.place = (t.place << step.width) | digit;
  else
    t.key = (t.key << step.width) | static_cast<uint64_t>(digit);
  if (!to_choose || t.rank + 1 != here) return;
  t.open = 0;  // all of them are in
  if (step.place) {
    t.place = (t.place << step.shift) | last_with(step.shift);
  } else {
    t.key = (t.key << step.shift) | static_cast<uint64_t>(last_with(step.shift));
    t.place = INT64_MAX;
  }
}

// first: whether the pixel is among the first of those whose key is the last one that is in.
template <class Key>
NOISYSEG_FORMULA bool is_in(Key last, Key key, bool first, Key none) {
  return (key != none) & ((key < last) | (first & (key == last)));
}
template <class Key>
NOISYSEG_FORMULA bool is_in(const Target& t, Key key, int64_t place, Key none) {
  return is_in(static_cast<Key>(t.key), key, place <= t.place, none);
}

// What is looked for in each row: the two neighbours of each quantile, or the k first values.
struct Wanted {
  const double* q;        // or null: then the k first values
  const int64_t* counts;  // (rows), or null: then k
  int64_t k;
};
NOISYSEG_FORMULA int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NOISYSEG_FORMULA int64_t first_rank(const Wanted& w, int64_t row, int target, int64_t valid) {
  if (valid < 1) return -1;
  if (!w.q) return smaller(w.counts ? w.counts[row] : w.k, valid) - 1;
  const double position = times(w.q[target / 2], static_cast<double>(valid - 1)), low = floor(position);
  return static_cast<int64_t>(low) + (target % 2 && low < position);
}

// Between the neighbours low and high of the q-quantile.
NOISYSEG_FORMULA double interpolate(Interpolation rule, double q, int64_t valid, double low, double high) {
  const double position = times(q, static_cast<double>(valid - 1)), share = position - floor(position);
  if (share == 0 || low == high || rule == Interpolation::lower) return low;
  if (rule == Interpolation::higher) return high;
  if (rule == Interpolation::nearest) return rint(position) == floor(position) ? low : high;
  const double f = rule == Interpolation::midpoint ? 0.5 : share, gap = high - low;
  if (!(gap - gap == 0)) return plus(times(low, 1 - f), times(high, f));  // infinite
  return f < 0.5 ? plus(low, times(gap, f)) : plus(high, -times(gap, 1 - f));
}

// ---- confident learning ----------------------------------------------------------------------------

constexpr double tolerance = 1e-6;  // of probabilities, cleanlab's

// A probability as high 2^-26 + low 2^-52: sums of these are exact in any order.
struct Fixed {
  int32_t high, low;
};
template <class T>
NOISYSEG_FORMULA Fixed fixed_of(T p) {
  const T inside = p > T(0) ? (p < T(1) ? p : T(1)) : T(0), scaled = inside * T(67108864);
  const int32_t high = static_cast<int32_t>(scaled);
  return {high, static_cast<int32_t>((scaled - static_cast<T>(high)) * T(67108864))};
}

// What a class's probability must reach: its mean over the pixels with that label, sums (high, low, pixels);
// NaN, which nothing reaches, without any.
NOISYSEG_FORMULA double threshold_of(const int64_t* sums) {
  if (sums[2] == 0) return NAN;
  const double sum =
      plus(times(static_cast<double>(sums[0]), 0x1p-26), times(static_cast<double>(sums[1]), 0x1p-52));
  const double mean = sum / static_cast<double>(sums[2]);
  return (mean > 2 * tolerance ? mean : 2 * tolerance) - tolerance;
}

// Row i of the confident joint, scaled so that it sums to the `size` pixels labelled i and rounded to whole
// numbers with that sum: the largest remainders go the other way. Then the diagonal is raised to 1 at least,
// at the cost of the others, and the entries become how many pixels each search is to choose: at [i, j] those
// labelled i that are of class j, at [i, i] all that are of another class.
NOISYSEG_FORMULA void numbers_of_row(const int64_t* counts, int64_t size, int i, int classes, Prune prune,
                                     int64_t* numbers) {
  int64_t total = 0;
  for (int j = 0; j < classes; ++j) total += counts[j];
  const double scale = static_cast<double>(size) / static_cast<double>(total);
  double sum = 0, whole = 0;
  for (int j = 0; j < classes; ++j) {
    const double value = times(static_cast<double>(counts[j]), scale);
    sum = plus(sum, value);
    whole = plus(whole, rint(value));
  }
  const double lacking = rint(sum) - whole;
  int64_t others = -1;  // entries that are not 0, less one
  for (int j = 0; j < classes; ++j) {
    const double value = times(static_cast<double>(counts[j]), scale), over = rint(value) - value;
    int less = 0, more = 0, equal = 0;
    for (int k = 0; k < classes; ++k) {
      const double v = times(static_cast<double>(counts[k]), scale), o = rint(v) - v;
      less += o < over;
      more += o > over;
      equal += o == over && k < j;
    }
    const double up = less + equal < lacking, down = more + equal < -lacking;
    numbers[j] = static_cast<int64_t>(rint(value) + up - down);
    others += numbers[j] != 0;
  }
  const int64_t kept = numbers[i] > 1 ? numbers[i] : 1;
  const double cost = static_cast<double>(kept - numbers[i]) / static_cast<double>(others > 1 ? others : 1);
  for (int j = 0; j < classes; ++j) {
    const double left = static_cast<double>(numbers[j]) - cost;
    numbers[j] = prune == Prune::by_class || left < 0 ? 0 : static_cast<int64_t>(floor(left));
  }
  numbers[i] = prune == Prune::by_noise_rate ? 0 : size - kept;
}

// ---- sizes -----------------------------------------------------------------------------------------

static inline int bits_for(int64_t n) {  // of the numbers below n
  int bits = 1;
  while (bits < 62 && (int64_t{1} << bits) < n) ++bits;
  return bits;
}
static inline int key_bits_of(DType dtype) { return 8 * dtype_size(dtype); }

// The wider a digit, the fewer passes; but the tables should fit shared memory and caches: up to 1024 of them
// take 1 MB at most, 65025 of them 4 MB.
static inline Digits digits_of(DType dtype, int64_t pixels, int64_t tables) {
  return {key_bits_of(dtype), bits_for(pixels), tables > 1024 ? 4 : tables > 4 || pixels < 4096 ? 8 : 11};
}

static inline void check_probabilities(const Array& p) {
  if (p.dtype < DType::f16) throw std::invalid_argument("probabilities must have a floating-point dtype");
  if (p.shape[1] < 2 || p.shape[1] > 255) throw std::invalid_argument("there must be 2 to 255 classes");
}

}  // namespace noisyseg::formulas
