// Exact Euclidean distance transforms on the CPU.
//
// A volume (n0, n1, n2), n2 contiguous, is worked on in place in the result:
//  1. along axis 1, run lengths to the nearest site by a sweep down and a sweep up, vectorised across axis 2;
//  2. along axis 2, the outward search of formulas/distance.h, vectorised along the line itself;
//  3. along axis 0, the same search, vectorised across axis 2, on tiles that fit the L1 or L2 cache.
// Steps 1 and 2 of a slice follow one another while it is in the cache. The search takes as many steps as the
// distance is long; a line or tile whose steps exceed a budget is finished by the lower envelope of parabolas
// (Felzenszwalb and Huttenlocher 2012, algorithm 1), linear in its length, so that a lone voxel in a large
// volume is not quadratic. Which way is taken depends on the data alone, never on the threads. Memory: mask
// read once, result written twice in 3D (9 bytes per voxel), once in 2D; scratch per thread only.
#include "noisyseg/distance.h"

#include "cpu/bits.h"
#include "cpu/edt.h"
#include "cpu/parallel.h"
#include "formulas/distance.h"
#include "formulas/math.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

using namespace formulas;

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(vector_bytes)));
  typedef int32_t I __attribute__((vector_size(vector_bytes)));
  static constexpr int32_t sign = INT32_MIN;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(vector_bytes)));
  typedef int64_t I __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t sign = INT64_MIN;
};
template <class T>
constexpr int width = vector_bytes / static_cast<int>(sizeof(T));
// Sites are the voxels of class 0, those of the other class, or those of any other label; what carries the
// class of f's voxel along: nothing, f's sign, or an array of labels beside it.
enum class Mode { sites, two_classes, labels };

constexpr int registers = 2;  // vectors side by side: hides the latency of one
template <class T>
constexpr int lanes = registers * width<T>;
constexpr int budget = 64;  // steps for each block of lanes from which the envelope is quicker

template <class T>
struct LabelOf {
  using type = int32_t;
};
template <>
struct LabelOf<double> {
  using type = int64_t;
};
template <class T>
using Label = typename LabelOf<T>::type;  // as wide as T: one mask for both

template <class T>
constexpr T infinity = static_cast<T>(__builtin_inf());

template <class V, class T>
inline __attribute__((always_inline)) V load_vector(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class I>
inline __attribute__((always_inline)) bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  uint64_t parts[sizeof(I) / 8], all = 0;
  __builtin_memcpy(parts, &mask, sizeof(I));
  for (uint64_t part : parts) all |= part;
  return all != 0;
#endif
}

// The outward search for `lanes` neighbouring outputs. centre: their own f; f_(i-k) and f_(i+k) lie k *
// stride away and exist for k <= left and k <= right. Writes the squared distances (>= 0) to best; returns
// the steps taken. labels: those of f, in Mode::labels.
template <class T, Mode mode>
inline __attribute__((always_inline)) int64_t search(const T* centre, const Label<T>* labels, int64_t stride,
                                                     int64_t left, int64_t right, const T* steps, T* result) {
  constexpr bool two_classes = mode == Mode::two_classes, of_labels = mode == Mode::labels;
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  constexpr int w = width<T>;
  const V zero = {};
  V best[registers];
  I sign[registers], own[registers];
  for (int r = 0; r < registers; ++r) {
    const V f = load_vector<V>(centre + r * w);
    sign[r] = two_classes ? (I)f & Simd<T>::sign : I{};
    const I magnitude = (I)f ^ sign[r];
    best[r] = (V)magnitude;
    own[r] = of_labels ? load_vector<I>(labels + r * w) : I{};
  }
  const auto seen = [&](int64_t offset, int r) {
    const V f = load_vector<V>(centre + offset + r * w);
    if (of_labels) {  // another label is a site
      const I same = load_vector<I>(labels + offset + r * w) == own[r];
      const I kept = (I)f & same;
      return (V)kept;
    }
    if (!two_classes) return f;
    const I turned = (I)f ^ sign[r];
    return (V)turned;
  };
  const auto better = [&](V candidate, V step, int r) {
    if (two_classes) candidate = candidate > zero ? candidate : zero;
    candidate += step;
    best[r] = candidate < best[r] ? candidate : best[r];
  };
  const int64_t both = left < right ? left : right, last = left < right ? right : left;
  const int64_t side = left < right ? stride : -stride;
  int64_t k = 1;
  while (k <= last) {
    const V bound = zero + steps[k];
    I open = best[0] > bound;
    for (int r = 1; r < registers; ++r) open |= best[r] > bound;
    if (!any(open)) break;
    const int64_t until = k + 4 < last + 1 ? k + 4 : last + 1;
    for (; k < until && k <= both; ++k) {
      const V step = zero + steps[k];
      for (int r = 0; r < registers; ++r) {
        const V a = seen(-k * stride, r), b = seen(k * stride, r);
        better(a < b ? a : b, step, r);
      }
    }
    for (; k < until; ++k) {
      const V step = zero + steps[k];
      for (int r = 0; r < registers; ++r) better(seen(k * side, r), step, r);
    }
  }
  for (int r = 0; r < registers; ++r) __builtin_memcpy(result + r * w, &best[r], sizeof(V));
  return k;
}

// The lower envelope over a line or a part of it: put(i, value, j of the nearest, -1 if there is none).
struct Envelope {
  int32_t *starts, *apexes;  // a line's length each
  void get(int64_t k, int64_t& apex, int64_t& start) const { apex = apexes[k], start = starts[k]; }
  void set(int64_t k, int64_t apex, int64_t start) const {
    apexes[k] = static_cast<int32_t>(apex), starts[k] = static_cast<int32_t>(start);
  }
  template <class T, class F, class Put>
  void line(int64_t from, int64_t to, const T* steps, T w2, const F& f, const Put& put) const {
    lower_envelope(from, to, w2, f, *this, [&](int64_t i, int64_t j) {
      put(i, j < 0 ? infinity<T> : f(j) + steps[i > j ? i - j : j - i], static_cast<int32_t>(j));
    });
  }
  // The same for each run of one label, label 0 left out, with the voxels next to the run as sites.
  template <class T, class L, class F, class Put>
  void runs(int64_t n, const T* steps, T w2, const L& label, const F& f, const Put& put) const {
    for (int64_t from = 0, to; from < n; from = to) {
      const auto own = label(from);
      for (to = from + 1; to < n && label(to) == own;) ++to;
      if (own == 0) continue;
      const auto inside = [&](int64_t j) { return j < from || j >= to ? T(0) : f(j); };
      line(from - (from > 0), to + (to < n), steps, w2, inside, [&](int64_t i, T value, int32_t j) {
        if (i >= from && i < to) put(i, value, j);
      });
    }
  }
};

// Where a volume's voxels come from.
struct Source {
  const char* data;
  DType dtype;
  int64_t strides[3];  // in elements
  bool site_is_nonzero = false;
  bool one_label = false;  // class 1 is this label, not everything but 0
  int64_t label = 0;
  int64_t first_bit = -1;  // from 0 on: sites are bits of 64-bit words, and strides[0] and [1] in words

  // The class of each voxel of a row of axis 2: 1, or 0 for a site.
  const uint8_t* row(int64_t i0, int64_t i1, int64_t from, int64_t n, uint8_t* buffer) const {
    if (first_bit >= 0) return expand(i0 * strides[0] + i1 * strides[1], first_bit + from, n, buffer);
    const int64_t offset = i0 * strides[0] + i1 * strides[1] + from * strides[2];
    switch (dtype) {
      case DType::i32: return convert<int32_t>(offset, n, buffer);
      case DType::i64: return convert<int64_t>(offset, n, buffer);
      default: return convert<uint8_t>(offset, n, buffer);
    }
  }

  int64_t value(int64_t i0, int64_t i1, int64_t i2) const {
    const int64_t offset = i0 * strides[0] + i1 * strides[1] + i2 * strides[2];
    switch (dtype) {
      case DType::i32: return reinterpret_cast<const int32_t*>(data)[offset];
      case DType::i64: return reinterpret_cast<const int64_t*>(data)[offset];
      default: return reinterpret_cast<const uint8_t*>(data)[offset];
    }
  }
  bool object(int64_t i0, int64_t i1, int64_t i2) const {
    return one_label ? value(i0, i1, i2) == label : value(i0, i1, i2) != 0;
  }
  // The labels of a row.
  template <class L>
  void labels(int64_t i0, int64_t i1, int64_t from, int64_t n, L* to) const {
    const int64_t offset = i0 * strides[0] + i1 * strides[1] + from * strides[2];
    switch (dtype) {
      case DType::i32: return copy<int32_t>(offset, n, to);
      case DType::i64: return copy<int64_t>(offset, n, to);
      default: return copy<uint8_t>(offset, n, to);
    }
  }

 private:
  const uint8_t* expand(int64_t word, int64_t bit, int64_t n, uint8_t* buffer) const {
    const uint64_t* words = reinterpret_cast<const uint64_t*>(data) + word;
    for (int64_t i = 0; i < n; i += 8, bit += 8) {
      const uint64_t* p = words + bit / 64;
      const uint64_t classes = spread8(~(*p >> bit % 64 | p[1] << 1 << (63 - bit % 64)));
      __builtin_memcpy(buffer + i, &classes, static_cast<size_t>(n - i < 8 ? n - i : 8));
    }
    return buffer;
  }
  template <class From>
  const uint8_t* convert(int64_t offset, int64_t n, uint8_t* buffer) const {
    const From* from = reinterpret_cast<const From*>(data) + offset;
    const uint8_t flip = site_is_nonzero;
    if (one_label) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = from[i * strides[2]] == label;
      return buffer;
    }
    if (strides[2] == 1)
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<uint8_t>(from[i] != 0) ^ flip;
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<uint8_t>(from[i * strides[2]] != 0) ^ flip;
    return buffer;
  }
  template <class From, class L>
  void copy(int64_t offset, int64_t n, L* to) const {
    const From* from = reinterpret_cast<const From*>(data) + offset;
    if (strides[2] == 1)
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<L>(from[i]);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<L>(from[i * strides[2]]);
  }
};

struct Volume {
  int64_t n[3];
  double w2[3];         // squared spacing
  bool border = false;  // voxels outside are sites of class 0
  int first_axis = 0;   // those before it are no axes of the image
  int64_t size() const { return n[0] * n[1] * n[2]; }
};

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A thread's scratch memory and the tables that all threads read.
template <class T>
struct Scratch {
  T *steps0, *steps2;  // squared_step of axes 0 and 2
  T* line;             // a row with `lanes` repeated values before and behind it, or a tile (n0, lanes)
  Label<T>* labels;    // the same of labels; in step 1 the labels of two rows
  Envelope envelope;
  T* run;  // a strip of run lengths
  uint8_t* classes;

  static size_t table_bytes(const Volume& v) {
    return static_cast<size_t>(round_up(v.n[0] + v.n[2] + 8, 16)) * sizeof(T);
  }
  static int64_t line_size(const Volume& v) {
    const int64_t row = v.n[2] + 3 * lanes<T>, tile = v.n[0] * lanes<T>;
    return row > tile ? row : tile;
  }
  static size_t thread_bytes(const Volume& v) {
    const int64_t longest = v.n[0] > v.n[2] ? v.n[0] : v.n[2];
    return static_cast<size_t>(round_up(line_size(v) * static_cast<int64_t>(sizeof(T)), 64) +
                               round_up((line_size(v) + v.n[2]) * static_cast<int64_t>(sizeof(T)), 64) +
                               2 * round_up(longest * 4, 64) +
                               round_up(v.n[2] * static_cast<int64_t>(sizeof(T)), 64) + round_up(v.n[2], 64));
  }
  Scratch(char* memory, const Volume& v, int thread) {
    steps0 = reinterpret_cast<T*>(memory);
    steps2 = steps0 + v.n[0] + 4;
    char* p = memory + table_bytes(v) + static_cast<size_t>(thread) * thread_bytes(v);
    const int64_t longest = v.n[0] > v.n[2] ? v.n[0] : v.n[2];
    const auto take = [&](int64_t bytes) {
      char* q = p;
      p += round_up(bytes, 64);
      return q;
    };
    line = reinterpret_cast<T*>(take(line_size(v) * static_cast<int64_t>(sizeof(T))));
    labels = reinterpret_cast<Label<T>*>(take((line_size(v) + v.n[2]) * static_cast<int64_t>(sizeof(T))));
    envelope.starts = reinterpret_cast<int32_t*>(take(longest * 4));
    envelope.apexes = reinterpret_cast<int32_t*>(take(longest * 4));
    run = reinterpret_cast<T*>(take(v.n[2] * static_cast<int64_t>(sizeof(T))));
    classes = reinterpret_cast<uint8_t*>(take(v.n[2]));
  }
  void fill_tables(const Volume& v) const {
    for (int64_t k = 0; k < v.n[0] + 4; ++k) steps0[k] = squared_step(k, static_cast<T>(v.w2[0]));
    for (int64_t k = 0; k < v.n[2] + 4; ++k) steps2[k] = squared_step(k, static_cast<T>(v.w2[2]));
  }
};

// How a squared distance becomes a result in the last step.
enum class Finish { squared, root, two_sided };

// The squared distance along an axis to the nearer voxel outside, inf if that is no site. It joins the result
// of the axis's own step, not f before that: the steps' displacements must be along different axes.
template <class T>
T to_outside(const Volume& v, int axis, int64_t i) {
  return v.border && axis >= v.first_axis ? squared_to_edge(i, v.n[axis], static_cast<T>(v.w2[axis]))
                                          : infinity<T>;
}

// squared: the results of positions [i, i + n) of axis 2, or of n columns at one position i of axis 0.
template <class T, Mode mode>
void limit_by_border(const Volume& v, int axis, int64_t i, T* squared, const T* f, int64_t n) {
  if (!v.border) return;
  for (int64_t j = 0; j < n; ++j) {
    const T outside = to_outside<T>(v, axis, axis == 2 ? i + j : i);
    if (outside < squared[j] && (mode != Mode::two_classes || f[j] > T(0))) squared[j] = outside;
  }
}

// Step 1 for columns [from, from + m) of slice i0: f (n1, n2) of that slice.
template <class T, Mode mode>
void sweep(const Source& source, const Volume& v, int64_t i0, int64_t from, int64_t m, T* f,
           const Scratch<T>& s) {
  constexpr bool two_classes = mode == Mode::two_classes;
  const int64_t n1 = v.n[1], n2 = v.n[2];
  T* run = s.run;
  Label<T>*labels = s.labels, *before = labels + m;
  for (int64_t x = 0; x < m; ++x) run[x] = infinity<T>;
  for (int64_t y = 0; y < n1; ++y) {
    T* row = f + y * n2 + from;
    if (mode == Mode::labels) {
      source.labels(i0, y, from, m, labels);
      for (int64_t x = 0; x < m; ++x) {
        run[x] = y && labels[x] != before[x] ? T(1) : run[x] + T(1);
        run[x] = labels[x] ? run[x] : T(0);
        row[x] = run[x];
        before[x] = labels[x];
      }
      continue;
    }
    const uint8_t* classes = source.row(i0, y, from, m, s.classes);
    if (two_classes) {  // the sign of `run` is the class above; a voxel of the other class is one step away
      const T* above = y ? row - n2 : nullptr;
      for (int64_t x = 0; x < m; ++x) {
        const T sign = classes[x] ? T(1) : T(-1);
        const T before = above ? above[x] : sign * infinity<T>;
        row[x] = sign * (before * sign > T(0) ? before * sign + T(1) : T(1));
      }
    } else {
      for (int64_t x = 0; x < m; ++x) {
        run[x] = classes[x] ? run[x] + T(1) : T(0);
        row[x] = run[x];
      }
    }
  }
  const T w2 = static_cast<T>(v.w2[1]);
  for (int64_t x = 0; x < m; ++x) run[x] = two_classes ? T(0) : infinity<T>;
  for (int64_t y = n1 - 1; y >= 0; --y) {
    T* row = f + y * n2 + from;
    if (mode == Mode::labels) {
      source.labels(i0, y, from, m, labels);
      for (int64_t x = 0; x < m; ++x) {
        run[x] = y + 1 < n1 && labels[x] != before[x] ? T(1) : run[x] + T(1);
        run[x] = labels[x] ? run[x] : T(0);
        const T d = row[x] < run[x] ? row[x] : run[x];
        row[x] = d * d * w2;
        before[x] = labels[x];
      }
    } else if (two_classes) {  // run: the signed run length below, 0 at the end
      for (int64_t x = 0; x < m; ++x) {
        const T sign = row[x] > T(0) ? T(1) : T(-1);
        const T below = run[x] * sign;
        const T up = row[x] * sign;
        const T down = below > T(0) ? below + T(1) : below < T(0) ? T(1) : infinity<T>;
        const T d = up < down ? up : down;
        run[x] = sign * down;
        row[x] = sign * (d * d * w2);
      }
    } else {
      for (int64_t x = 0; x < m; ++x) {
        run[x] = row[x] == T(0) ? T(0) : run[x] + T(1);
        const T d = row[x] < run[x] ? row[x] : run[x];
        row[x] = d * d * w2;
      }
    }
    const T outside = to_outside<T>(v, 1, y);
    if (v.border)
      for (int64_t x = 0; x < m; ++x) row[x] = row[x] > outside ? outside : row[x];
  }
}

template <class T, Mode mode>
inline __attribute__((always_inline)) void finish_values(T* to, const T* squared, const T* f, int64_t n,
                                                         Finish finish) {
  constexpr bool two_classes = mode == Mode::two_classes;
  if (finish == Finish::squared) {
    for (int64_t i = 0; i < n; ++i) to[i] = two_classes ? with_sign(squared[i], f[i]) : squared[i];
  } else if (finish == Finish::root) {
    for (int64_t i = 0; i < n; ++i) to[i] = sqrt_(squared[i]);
  } else {  // object: f > 0, the map is negative there
    for (int64_t i = 0; i < n; ++i) to[i] = with_sign(sqrt_(squared[i]), -f[i]);
  }
}

// Whether a line keeps its values: sites all along it, or none at all. With labels that differ it does not.
template <Mode mode>
bool nothing_to_find(bool finite, bool positive, bool negative) {
  return mode == Mode::sites ? !finite || !positive : !finite && !(positive && negative);
}

// Step 2 for one row, in place.
template <class T, Mode mode>
void search_row(const Volume& v, const Source& source, int64_t i0, int64_t y, T* row, const Scratch<T>& s,
                Finish finish) {
  constexpr bool two_classes = mode == Mode::two_classes, of_labels = mode == Mode::labels;
  const int64_t n = v.n[2];
  constexpr int l = lanes<T>;
  Label<T>* labels = s.labels + l;
  int finite = 0, positive = 0, negative = 0;
  for (int64_t i = 0; i < n; ++i) {
    finite |= abs_(row[i]) < infinity<T>;
    positive |= row[i] > T(0);
    negative |= row[i] < T(0);
  }
  if (of_labels) {
    source.labels(i0, y, 0, n, labels);
    for (int i = 1; i <= l; ++i) labels[-i] = labels[0];
    for (int i = 0; i < 2 * l; ++i) labels[n + i] = labels[n - 1];
    for (int64_t i = 0; i < n; ++i) negative |= labels[i] != labels[0];
  }
  if (nothing_to_find<mode>(finite, positive, negative)) {
    for (int64_t i = 0; i < n; ++i) s.line[i] = abs_(row[i]);
    limit_by_border<T, mode>(v, 2, 0, s.line, row, n);
    return finish_values<T, mode>(row, s.line, row, n, finish);
  }
  T* f = s.line + l;  // the values at the ends, repeated: never better than they are themselves
  for (int64_t i = 0; i < n; ++i) f[i] = row[i];
  for (int i = 1; i <= l; ++i) f[-i] = f[0];
  for (int i = 0; i < 2 * l; ++i) f[n + i] = f[n - 1];
  int64_t steps = 0;
  for (int64_t i = 0; i < n; i += l) {
    T best[l];
    // As far as the repeated values allow, and no further than any site can be.
    const int64_t left = i + l < n - 1 ? i + l : n - 1, right = n + l - 1 - i < n - 1 ? n + l - 1 - i : n - 1;
    steps += search<T, mode>(f + i, labels + i, 1, left, right, s.steps2, best);
    const int64_t m = n - i < l ? n - i : l;
    limit_by_border<T, mode>(v, 2, i, best, f + i, m);
    finish_values<T, mode>(row + i, best, f + i, m, finish);
    if (steps > budget * (i / l + 1) && i + l < n) {
      const T w2 = static_cast<T>(v.w2[2]);
      const int64_t after = i + l;
      const auto put = [&](T sign) {
        return [&, sign](int64_t x, T value, int32_t) {
          if (x < after || (two_classes && f[x] * sign < T(0))) return;
          limit_by_border<T, mode>(v, 2, x, &value, f + x, 1);
          finish_values<T, mode>(row + x, &value, f + x, 1, finish);
        };
      };
      const auto value = [&](int64_t j) { return f[j]; };
      if (of_labels)
        return s.envelope.runs(n, s.steps2, w2, [&](int64_t j) { return labels[j]; }, value, put(T(1)));
      if (!two_classes) return s.envelope.line(0, n, s.steps2, w2, value, put(T(1)));
      s.envelope.line(0, n, s.steps2, w2, [&](int64_t j) { return max_(f[j], T(0)); }, put(T(1)));
      s.envelope.line(0, n, s.steps2, w2, [&](int64_t j) { return max_(-f[j], T(0)); }, put(T(-1)));
      return;
    }
  }
}

// Step 3 for the columns [x, x + m), m <= lanes, of row y, in place.
template <class T, Mode mode>
void search_tile(const Volume& v, const Source& source, T* volume, int64_t y, int64_t x, int64_t m,
                 const Scratch<T>& s, Finish finish) {
  constexpr bool two_classes = mode == Mode::two_classes, of_labels = mode == Mode::labels;
  const int64_t n = v.n[0], slice = v.n[1] * v.n[2];
  constexpr int l = lanes<T>;
  T* base = volume + y * v.n[2] + x;
  T* f = s.line;
  int finite = 0, positive = 0, negative = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T* from = base + i * slice;
    T* to = f + i * l;
    if (m == l)
      for (int j = 0; j < l; ++j) to[j] = from[j];
    else
      for (int j = 0; j < l; ++j) to[j] = from[j < m ? j : m - 1];
    for (int j = 0; j < l; ++j) {
      finite |= abs_(to[j]) < infinity<T>;
      positive |= to[j] > T(0);
      negative |= to[j] < T(0);
    }
    if (of_labels) {
      Label<T>* labels = s.labels + i * l;
      source.labels(i, y, x, m, labels);
      for (int64_t j = m; j < l; ++j) labels[j] = labels[m - 1];
      for (int j = 0; j < l; ++j) negative |= labels[j] != s.labels[j];
    }
  }
  T best[l];
  if (nothing_to_find<mode>(finite, positive, negative)) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < l; ++j) best[j] = abs_(f[i * l + j]);
      limit_by_border<T, mode>(v, 0, i, best, f + i * l, m);
      finish_values<T, mode>(base + i * slice, best, f + i * l, m, finish);
    }
    return;
  }
  int64_t steps = 0;
  for (int64_t i = 0; i < n; ++i) {
    steps += search<T, mode>(f + i * l, s.labels + i * l, l, i, n - 1 - i, s.steps0, best);
    limit_by_border<T, mode>(v, 0, i, best, f + i * l, m);
    finish_values<T, mode>(base + i * slice, best, f + i * l, m, finish);
    if (steps > budget * (i + 4) && i + 1 < n) {
      const T w2 = static_cast<T>(v.w2[0]);
      for (int64_t j = 0; j < m; ++j) {
        const T* column = f + j;
        const auto put = [&](T sign) {
          return [&, sign](int64_t z, T value, int32_t) {
            if (z <= i || (two_classes && column[z * l] * sign < T(0))) return;
            limit_by_border<T, mode>(v, 0, z, &value, column + z * l, 1);
            finish_values<T, mode>(base + z * slice + j, &value, column + z * l, 1, finish);
          };
        };
        const auto value = [&](int64_t z) { return column[z * l]; };
        const auto label = [&](int64_t z) { return s.labels[z * l + j]; };
        if (of_labels) {
          s.envelope.runs(n, s.steps0, w2, label, value, put(T(1)));
        } else if (!two_classes) {
          s.envelope.line(0, n, s.steps0, w2, value, put(T(1)));
        } else {
          s.envelope.line(
              0, n, s.steps0, w2, [&](int64_t z) { return max_(column[z * l], T(0)); }, put(T(1)));
          s.envelope.line(
              0, n, s.steps0, w2, [&](int64_t z) { return max_(-column[z * l], T(0)); }, put(T(-1)));
        }
      }
      return;
    }
  }
}

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// All three steps for `count` volumes, one behind the other in `out`; after(offset) for each row that is
// finished, from the cache.
template <class T, Mode mode, class MakeSource, class After>
void transform(int64_t count, const Volume& v, const MakeSource& source_of, T* out, char* memory, int threads,
               Finish finish, const After& after) {
  const int64_t n0 = v.n[0], n1 = v.n[1], n2 = v.n[2], slices = count * n0;
  if (count * v.size() == 0) return;
  Scratch<T>(memory, v, 0).fill_tables(v);
  const bool planes = n0 > 1 || (v.border && v.first_axis == 0);
  const Finish after_rows = planes ? Finish::squared : finish;
  if (slices >= 2 * threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Scratch<T> s(memory, v, thread_number());
      T* f = out + slice * n1 * n2;
      const Source source = source_of(slice / n0);
      sweep<T, mode>(source, v, slice % n0, 0, n2, f, s);
      for (int64_t y = 0; y < n1; ++y) {
        search_row<T, mode>(v, source, slice % n0, y, f + y * n2, s, after_rows);
        if (!planes) after((slice * n1 + y) * n2);
      }
    }
  } else {
    const int64_t strip = round_up((n2 + threads - 1) / threads, 64), strips = (n2 + strip - 1) / strip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < slices * strips; ++item) {
      const Scratch<T> s(memory, v, thread_number());
      const int64_t slice = item / strips, from = item % strips * strip;
      const Source source = source_of(slice / n0);
      sweep<T, mode>(source, v, slice % n0, from, n2 - from < strip ? n2 - from : strip,
                     out + slice * n1 * n2, s);
    }
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < slices * n1; ++row) {
      search_row<T, mode>(v, source_of(row / n1 / n0), row / n1 % n0, row % n1, out + row * n2,
                          Scratch<T>(memory, v, thread_number()), after_rows);
      if (!planes) after(row * n2);
    }
  }
  if (!planes) return;
  const int64_t tiles = (n2 + lanes<T> - 1) / lanes<T>;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < count * n1; ++item) {
    const Scratch<T> s(memory, v, thread_number());
    const Source source = source_of(item / n1);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t x = tile * lanes<T>;
      search_tile<T, mode>(v, source, out + item / n1 * v.size(), item % n1, x,
                           n2 - x < lanes<T> ? n2 - x : lanes<T>, s, finish);
    }
    for (int64_t i0 = 0; i0 < n0; ++i0) after(((item / n1 * n0 + i0) * n1 + item % n1) * n2);
  }
}
template <class T, Mode mode, class MakeSource>
void transform(int64_t count, const Volume& v, const MakeSource& source_of, T* out, char* memory, int threads,
               Finish finish) {
  transform<T, mode>(count, v, source_of, out, memory, threads, finish, [](int64_t) {});
}

// The mask's batch axes, and its classes if each has a map of its own, and its spatial axes as a Volume.
struct Batch {
  int64_t count = 1, classes;
  int axes = 0;
  int64_t shape[Array::max_rank], strides[Array::max_rank];
  Volume volume{{1, 1, 1}, {1, 1, 1}};
  Source source;

  Batch(const Array& mask, int spatial_dims, const double* spacing, const DistanceOptions& options = {})
      : classes(options.num_classes) {
    axes = mask.rank - spatial_dims;
    for (int i = 0; i < axes; ++i) shape[i] = mask.shape[i], strides[i] = mask.strides[i], count *= shape[i];
    if (classes) count *= classes;
    source.data = static_cast<const char*>(mask.data);
    source.dtype = mask.dtype;
    source.one_label = classes > 0;
    volume.border = options.border;
    volume.first_axis = 3 - spatial_dims;
    for (int d = 0; d < 3; ++d) source.strides[d] = 0;
    for (int d = 0; d < spatial_dims; ++d) {
      const int to = 3 - spatial_dims + d;
      volume.n[to] = mask.shape[axes + d];
      volume.w2[to] = spacing ? spacing[d] * spacing[d] : 1.0;
      source.strides[to] = mask.strides[axes + d];
    }
  }
  Source item(int64_t i) const {
    Source s = source;
    if (classes) s.label = i % classes, i /= classes;
    int64_t offset = 0;
    for (int a = axes - 1; a >= 0; --a) offset += i % shape[a] * strides[a], i /= shape[a];
    s.data += offset * dtype_size(source.dtype);
    return s;
  }
};

// Codes of the boundary convention: 0 on the inner contour, 1 outside, 2 inside. rows: bytes for five rows.
// Reads each class three times, from the cache, and writes 1 B per voxel.
void contour_codes(const Source& source, const Volume& v, uint8_t* codes, int64_t i0, uint8_t* rows) {
  const int64_t n1 = v.n[1], n2 = v.n[2];
  uint8_t *above = rows, *own = rows + n2, *below = rows + 2 * n2, *before = rows + 3 * n2,
          *after = rows + 4 * n2;
  // The classes of row (i0 + dz, y); outside the image those of row (i0, y), which make no contour, or the
  // background's.
  const auto neighbour = [&](int axis, int64_t i, int64_t z, int64_t y, const uint8_t* same, uint8_t* to) {
    if (i >= 0 && i < v.n[axis]) {
      source.row(z, y, 0, n2, to);
    } else {
      const bool site = v.border && axis >= v.first_axis;
      for (int64_t x = 0; x < n2; ++x) to[x] = site ? 0 : same[x];
    }
  };
  source.row(i0, 0, 0, n2, own);
  neighbour(1, -1, i0, -1, own, above);
  for (int64_t y = 0; y < n1; ++y) {
    neighbour(1, y + 1, i0, y + 1, own, below);
    neighbour(0, i0 - 1, i0 - 1, y, own, before);
    neighbour(0, i0 + 1, i0 + 1, y, own, after);
    uint8_t* row = codes + (i0 * n1 + y) * n2;
    const bool edge = v.border && v.first_axis <= 2;
    const auto put = [&](int64_t x, uint8_t left, uint8_t right) {
      const uint8_t all = above[x] & below[x] & before[x] & after[x] & left & right;
      row[x] = static_cast<uint8_t>(own[x] ? 2 * all : 1);
    };
    put(0, !edge, n2 > 1 ? own[1] : !edge);
#pragma GCC ivdep
    for (int64_t x = 1; x < n2 - 1; ++x) put(x, own[x - 1], own[x + 1]);
    if (n2 > 1) put(n2 - 1, own[n2 - 2], !edge);
    uint8_t* next = above;
    above = own, own = below, below = next;
  }
}

// One line of a pass along any axis, for each thread, and what the threads share: parabolas of the whole
// axis.
template <class T>
struct LineScratch {
  int64_t *old, *labels;
  T *line, *steps;
  Envelope envelope;

  static int64_t longest(const Volume& v) {
    int64_t n = 8;
    for (int64_t extent : v.n) n = extent > n ? extent : n;
    return round_up(n, 8);
  }
  static size_t bytes(const Volume& v) { return static_cast<size_t>(longest(v)) * (16 + 2 * sizeof(T) + 8); }
  LineScratch(char* memory, const Volume& v, int thread) {
    const int64_t n = longest(v);
    old = reinterpret_cast<int64_t*>(memory + static_cast<size_t>(thread) * bytes(v));
    labels = old + n;
    line = reinterpret_cast<T*>(labels + n);
    steps = line + n;
    envelope.starts = reinterpret_cast<int32_t*>(steps + n);
    envelope.apexes = envelope.starts + n;
  }
};

// pass(scratch, offset of the line's first voxel, its coordinates, axis) for each line along each axis longer
// than 1, in the order 1, 2, 0 or the other way round.
template <class T, class Pass>
void for_lines(const Volume& v, bool backwards, char* memory, int threads, const Pass& pass) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1};
  for (int turn = 0; turn < 3; ++turn) {
    const int axis = (backwards ? 3 - turn : turn + 1) % 3;
    const int64_t n = v.n[axis];
    if (n == 1) continue;
    const int a = axis == 0 ? 1 : 0, b = axis == 2 ? 1 : 2;
    const T w2 = static_cast<T>(v.w2[axis]);
    for (int t = 0; t < threads; ++t) {
      const LineScratch<T> s(memory, v, t);
      for (int64_t k = 0; k < n; ++k) s.steps[k] = squared_step(k, w2);
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < v.n[a] * v.n[b]; ++item) {
      int64_t at[3] = {0, 0, 0};
      at[a] = item / v.n[b], at[b] = item % v.n[b];
      pass(LineScratch<T>(memory, v, thread_number()), at[a] * step[a] + at[b] * step[b], at, axis);
    }
  }
}

// Nearest sites: passes of the envelope that carry the site's index along.
template <class T>
void nearest_sites(const Source& source, const Volume& v, bool multi_label, T* f, int32_t* indices, int dims,
                   int64_t* nearest, char* memory, int threads) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1}, voxels = v.size();
  for (int64_t at = 0; at < voxels; ++at) {
    const bool site = !source.object(at / step[0], at / step[1] % v.n[1], at % v.n[2]);
    f[at] = site ? T(0) : infinity<T>;
    nearest[at] = site ? at : -1;
  }
  for_lines<T>(v, false, memory, threads,
               [&](const LineScratch<T>& s, int64_t base, const int64_t* first, int axis) {
                 const int64_t n = v.n[axis], along = step[axis];
                 for (int64_t k = 0; k < n; ++k) {
                   s.line[k] = f[base + k * along];
                   s.old[k] = nearest[base + k * along];
                 }
                 const T w2 = static_cast<T>(v.w2[axis]);
                 const auto value = [&](int64_t k) { return s.line[k]; };
                 if (!multi_label)
                   return s.envelope.line(0, n, s.steps, w2, value, [&](int64_t k, T squared, int32_t from) {
                     f[base + k * along] = squared;
                     nearest[base + k * along] = from < 0 ? -1 : s.old[from];
                   });
                 int64_t at[3] = {first[0], first[1], first[2]};
                 for (int64_t k = 0; k < n; ++k) {
                   at[axis] = k;
                   s.labels[k] = source.value(at[0], at[1], at[2]);
                 }
                 const auto label = [&](int64_t k) { return s.labels[k]; };
                 s.envelope.runs(n, s.steps, w2, label, value, [&](int64_t k, T squared, int32_t from) {
                   f[base + k * along] = squared;
                   nearest[base + k * along] = from < 0                        ? -1
                                               : s.labels[from] != s.labels[k] ? base + from * along
                                                                               : s.old[from];
                 });
               });
  for (int64_t at = 0; at < voxels; ++at)
    for (int d = 3 - dims; d < 3; ++d)
      indices[(d - 3 + dims) * voxels + at] =
          nearest[at] < 0 ? -1 : static_cast<int32_t>(nearest[at] / step[d] % v.n[d]);
}

// The signed map of one item from squared distances, or from distances with the sign already there.
template <class T>
void normalise(T* phi, int64_t n) {
  T top = 0;
  for (int64_t i = 0; i < n; ++i) top = max_(top, abs_(phi[i]));
  if (!(top > 0)) return;
  if (top == infinity<T>)
    for (int64_t i = 0; i < n; ++i) phi[i] = phi[i] > 0 ? T(1) : phi[i] < 0 ? T(-1) : T(0);
  else
    for (int64_t i = 0; i < n; ++i) phi[i] /= top;
}

template <class T>
void to_kervadec(T* phi, int64_t n) {
  if (n && abs_(phi[0]) == infinity<T>) {  // one class only
    for (int64_t i = 0; i < n; ++i) phi[i] = 0;
    return;
  }
  for (int64_t i = 0; i < n; ++i) phi[i] = kervadec_value(abs_(phi[i]), phi[i] < 0);
}

template <class T>
void to_dtc(T* phi, const Volume& v) {
  const int64_t n = v.size(), step[3] = {v.n[1] * v.n[2], v.n[2], 1};
  T outside = 0, inside = 0;
  for (int64_t i = 0; i < n; ++i) {
    outside = max_(outside, phi[i]);
    inside = max_(inside, -phi[i]);
  }
  if (max_(outside, inside) == infinity<T>) return normalise(phi, n);
  // In place: a contour voxel becomes 0, which its neighbours still see as "not outside".
  for (int64_t at = 0; at < n; ++at) {
    if (phi[at] > 0) continue;
    bool edge = false;
    for (int d = 0; d < 3; ++d) {
      const int64_t i = at / step[d] % v.n[d], last = v.n[d] - 1;
      edge |= v.border && d >= v.first_axis && (i == 0 || i == last);
      edge |= (i > 0 && phi[at - step[d]] > 0) || (i < last && phi[at + step[d]] > 0);
    }
    if (edge) phi[at] = 0;
  }
  for (int64_t i = 0; i < n; ++i)
    phi[i] = phi[i] > 0 ? phi[i] / outside : phi[i] < 0 ? phi[i] / inside : T(0);
}

// no_site where an item is inf: throughout or nowhere.
template <class T>
void fill_siteless(T* out, int64_t count, int64_t voxels, double no_site) {
  const T value = static_cast<T>(no_site);
  if (value == infinity<T> || voxels == 0) return;
  for (int64_t i = 0; i < count; ++i) {
    T* item = out + i * voxels;
    if (abs_(item[0]) != infinity<T>) continue;
    for (int64_t at = 0; at < voxels; ++at) item[at] = with_sign(value, item[at]);
  }
}

int available_threads(const Exec& exec) { return threads_for(exec, int64_t{1} << 40); }

size_t scratch_bytes(const Volume& v, int threads, bool fp64) {
  return fp64 ? Scratch<double>::table_bytes(v) +
                    static_cast<size_t>(threads) * Scratch<double>::thread_bytes(v)
              : Scratch<float>::table_bytes(v) +
                    static_cast<size_t>(threads) * Scratch<float>::thread_bytes(v);
}

Volume dense(const int64_t shape[3], const double spacing[3]) {
  Volume v;
  for (int d = 0; d < 3; ++d) v.n[d] = shape[d], v.w2[d] = spacing ? spacing[d] * spacing[d] : 1.0;
  return v;
}

template <class T>
void squared_distance_as(const uint8_t* sites, T* out, void* workspace, const int64_t shape[3],
                         const double spacing[3], int threads) {
  const Volume v = dense(shape, spacing);
  const Source source{reinterpret_cast<const char*>(sites), DType::u8, {v.n[1] * v.n[2], v.n[2], 1}, true};
  transform<T, Mode::sites>(
      1, v, [&](int64_t) { return source; }, out, static_cast<char*>(workspace), threads, Finish::squared);
}

template <class T>
void plane_distance_as(const BitPlanes& sites, const double squared_spacing[2], T* out, void* workspace,
                       int threads) {
  Volume v;
  for (int d = 1; d < 3; ++d) v.n[d] = sites.shape[d], v.w2[d] = squared_spacing[d - 1];
  v.n[0] = 1, v.w2[0] = 1;
  Source source{reinterpret_cast<const char*>(sites.bits), DType::u8, {sites.plane, sites.row, 0}};
  source.first_bit = sites.first;
  transform<T, Mode::sites>(
      sites.shape[0], v,
      [&](int64_t plane) {
        Source s = source;
        s.data += plane * sites.plane * 8;
        return s;
      },
      out, static_cast<char*>(workspace), threads, Finish::squared);
}

}  // namespace

size_t plane_distance_workspace(int64_t rows, int64_t columns, int threads, bool fp64) {
  const int64_t shape[3] = {1, rows, columns};
  return scratch_bytes(dense(shape, nullptr), threads, fp64);
}
void plane_distance(const BitPlanes& sites, const double squared_spacing[2], float* out, void* workspace,
                    int threads) {
  plane_distance_as(sites, squared_spacing, out, workspace, threads);
}
void plane_distance(const BitPlanes& sites, const double squared_spacing[2], double* out, void* workspace,
                    int threads) {
  plane_distance_as(sites, squared_spacing, out, workspace, threads);
}

size_t squared_distance_workspace(const int64_t shape[3], int threads, bool fp64) {
  return scratch_bytes(dense(shape, nullptr), threads, fp64);
}
void squared_distance(const uint8_t* sites, float* out, void* workspace, const int64_t shape[3],
                      const double spacing[3], int threads) {
  squared_distance_as(sites, out, workspace, shape, spacing, threads);
}
void squared_distance(const uint8_t* sites, double* out, void* workspace, const int64_t shape[3],
                      const double spacing[3], int threads) {
  squared_distance_as(sites, out, workspace, shape, spacing, threads);
}

namespace {

template <class T>
void edt(const Batch& batch, int spatial_dims, const DistanceOptions& options, T* to, int32_t* indices,
         char* memory, int threads) {
  const Volume& v = batch.volume;
  const int64_t voxels = v.size();
  const auto source_of = [&](int64_t i) { return batch.item(i); };
  const Finish finish = options.squared ? Finish::squared : Finish::root;
  if (!indices) {
    if (options.multi_label)
      transform<T, Mode::labels>(batch.count, v, source_of, to, memory, threads, finish);
    else
      transform<T, Mode::sites>(batch.count, v, source_of, to, memory, threads, finish);
  } else {
    int64_t* nearest = reinterpret_cast<int64_t*>(memory);
    for (int64_t i = 0; i < batch.count; ++i)
      nearest_sites(batch.item(i), v, options.multi_label, to + i * voxels,
                    indices + i * spatial_dims * voxels, spatial_dims, nearest, memory + voxels * 8,
                    voxels < 32768 ? 1 : threads);
    if (!options.squared)
      for (int64_t at = 0; at < batch.count * voxels; ++at) to[at] = sqrt_(to[at]);
  }
  fill_siteless(to, batch.count, voxels, options.no_site);
}

template <class T>
void signed_map(const Batch& batch, const DistanceOptions& options, T* phi, char* memory, uint8_t* codes,
                int threads) {
  const Volume& v = batch.volume;
  const int64_t voxels = v.size(), slices = voxels ? batch.count * v.n[0] : 0;
  const SignedMap convention = options.convention;
  if (convention == SignedMap::boundary) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t slice = 0; slice < slices; ++slice)
      contour_codes(batch.item(slice / v.n[0]), v, codes + slice / v.n[0] * voxels, slice % v.n[0],
                    reinterpret_cast<uint8_t*>(Scratch<T>(memory, v, thread_number()).labels));
    const auto coded = [&](int64_t i) {
      Source s;
      s.data = reinterpret_cast<const char*>(codes + i * voxels);
      s.dtype = DType::u8;
      s.strides[0] = v.n[1] * v.n[2], s.strides[1] = v.n[2], s.strides[2] = 1;
      return s;
    };
    Volume plain = v;  // the border is in the codes
    plain.border = false;
    transform<T, Mode::sites>(batch.count, plain, coded, phi, memory, threads, Finish::root, [&](int64_t at) {
      for (int64_t i = at; i < at + v.n[2]; ++i) phi[i] = codes[i] == 2 ? -phi[i] : phi[i];
    });
  } else {
    transform<T, Mode::two_classes>(
        batch.count, v, [&](int64_t i) { return batch.item(i); }, phi, memory, threads, Finish::two_sided);
  }
  const bool plain = convention == SignedMap::two_sided || convention == SignedMap::boundary;
  if (plain && !options.normalize) return fill_siteless(phi, batch.count, voxels, options.no_site);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < batch.count; ++i) {
    T* item = phi + i * voxels;
    if (convention == SignedMap::kervadec) to_kervadec(item, voxels);
    if (convention == SignedMap::dtc)
      to_dtc(item, v);
    else if (options.normalize)
      normalise(item, voxels);
  }
}

// ---- sampled functions ------------------------------------------------------------------------------------

// apexes: one plane for each of the volume's own axes, of `count` volumes, `plane` apart.
template <class T>
void sampled_forward(const Source& values, const Source* sites, const Volume& v, T* f, int32_t* apexes,
                     int64_t plane, char* memory, int threads) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1}, voxels = v.size();
  const T* from = reinterpret_cast<const T*>(values.data);
  for (int64_t at = 0; at < voxels; ++at) {
    const int64_t z = at / step[0], y = at / step[1] % v.n[1], x = at % v.n[2];
    const bool site = !sites || sites->object(z, y, x);
    f[at] = site ? from[z * values.strides[0] + y * values.strides[1] + x * values.strides[2]] : infinity<T>;
  }
  for_lines<T>(v, false, memory, threads,
               [&](const LineScratch<T>& s, int64_t base, const int64_t*, int axis) {
                 const int64_t n = v.n[axis], along = step[axis];
                 int32_t* apex = apexes + (axis - v.first_axis) * plane + base;
                 for (int64_t k = 0; k < n; ++k) s.line[k] = f[base + k * along];
                 s.envelope.line(
                     0, n, s.steps, static_cast<T>(v.w2[axis]), [&](int64_t k) { return s.line[k]; },
                     [&](int64_t k, T value, int32_t j) {
                       f[base + k * along] = value;
                       apex[k * along] = j;
                     });
               });
}

template <class T>
void sampled_backward(const T* grad, const int32_t* apexes, int64_t plane, const Volume& v, T* to,
                      char* memory, int threads) {
  const int64_t step[3] = {v.n[1] * v.n[2], v.n[2], 1}, voxels = v.size();
  for (int64_t at = 0; at < voxels; ++at) to[at] = grad[at];
  for_lines<T>(v, true, memory, threads,
               [&](const LineScratch<T>& s, int64_t base, const int64_t*, int axis) {
                 const int64_t n = v.n[axis], along = step[axis];
                 const int32_t* apex = apexes + (axis - v.first_axis) * plane + base;
                 for (int64_t k = 0; k < n; ++k) s.line[k] = 0;
                 for (int64_t k = 0; k < n; ++k)
                   if (apex[k * along] >= 0) s.line[apex[k * along]] += to[base + k * along];
                 for (int64_t k = 0; k < n; ++k) to[base + k * along] = s.line[k];
               });
}

}  // namespace

size_t distance_workspace(const Array& mask, int spatial_dims, const DistanceOptions& options, bool indices,
                          bool fp64, const Exec& exec) {
  const Batch batch(mask, spatial_dims, nullptr, options);
  const Volume& v = batch.volume;
  const int threads = available_threads(exec);
  if (indices)
    return static_cast<size_t>(v.size()) * 8 + LineScratch<double>::bytes(v) * static_cast<size_t>(threads);
  return scratch_bytes(v, threads, fp64) + 64 +
         (options.convention == SignedMap::boundary ? static_cast<size_t>(batch.count * v.size()) : 0);
}

void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing,
                            const DistanceOptions& options, const Array& out, const Array& indices,
                            void* workspace, const Exec& exec) {
  const Batch batch(mask, spatial_dims, spacing, options);
  const int threads = threads_for(exec, batch.count * batch.volume.size());
  int32_t* sites = static_cast<int32_t*>(indices.data);
  char* memory = static_cast<char*>(workspace);
  if (out.dtype == DType::f64)
    edt(batch, spatial_dims, options, static_cast<double*>(out.data), sites, memory, threads);
  else
    edt(batch, spatial_dims, options, static_cast<float*>(out.data), sites, memory, threads);
}

void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing,
                         const DistanceOptions& options, const Array& out, void* workspace,
                         const Exec& exec) {
  const Batch batch(mask, spatial_dims, spacing, options);
  const int threads = threads_for(exec, batch.count * batch.volume.size());
  const bool fp64 = out.dtype == DType::f64;
  char* memory = static_cast<char*>(workspace);
  uint8_t* codes =
      reinterpret_cast<uint8_t*>(memory) +
      round_up(static_cast<int64_t>(scratch_bytes(batch.volume, available_threads(exec), fp64)), 64);
  if (fp64)
    signed_map(batch, options, static_cast<double*>(out.data), memory, codes, threads);
  else
    signed_map(batch, options, static_cast<float*>(out.data), memory, codes, threads);
}

size_t sampled_distance_workspace(const Array& values, int spatial_dims, const Exec& exec) {
  const Batch batch(values, spatial_dims, nullptr);
  return LineScratch<double>::bytes(batch.volume) * static_cast<size_t>(available_threads(exec));
}

void sampled_distance(const Array& values, const Array& sites, int spatial_dims, const double* spacing,
                      const Array& out, const Array& apexes, void* workspace, const Exec& exec) {
  const Batch batch(values, spatial_dims, spacing), masks(sites ? sites : values, spatial_dims, nullptr);
  const int64_t voxels = batch.volume.size();
  const int threads = threads_for(exec, voxels);
  for (int64_t i = 0; i < batch.count; ++i) {
    const Source from = batch.item(i), mask = masks.item(i);
    int32_t* to = static_cast<int32_t*>(apexes.data) + i * voxels;
    char* memory = static_cast<char*>(workspace);
    if (values.dtype == DType::f64)
      sampled_forward(from, sites ? &mask : nullptr, batch.volume,
                      static_cast<double*>(out.data) + i * voxels, to, batch.count * voxels, memory, threads);
    else
      sampled_forward(from, sites ? &mask : nullptr, batch.volume, static_cast<float*>(out.data) + i * voxels,
                      to, batch.count * voxels, memory, threads);
  }
}

void sampled_distance_backward(const Array& grad, const Array& apexes, int spatial_dims,
                               const Array& grad_values, void* workspace, const Exec& exec) {
  const Batch batch(grad, spatial_dims, nullptr);
  const int64_t voxels = batch.volume.size();
  const int threads = threads_for(exec, voxels);
  for (int64_t i = 0; i < batch.count; ++i) {
    const int32_t* from = static_cast<const int32_t*>(apexes.data) + i * voxels;
    char* memory = static_cast<char*>(workspace);
    if (grad.dtype == DType::f64)
      sampled_backward(static_cast<const double*>(grad.data) + i * voxels, from, batch.count * voxels,
                       batch.volume, static_cast<double*>(grad_values.data) + i * voxels, memory, threads);
    else
      sampled_backward(static_cast<const float*>(grad.data) + i * voxels, from, batch.count * voxels,
                       batch.volume, static_cast<float*>(grad_values.data) + i * voxels, memory, threads);
  }
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, distance_workspace,
             (const Array& mask, int spatial_dims, const DistanceOptions& options, bool indices, bool fp64,
              const Exec& exec),
             (mask, spatial_dims, options, indices, fp64, exec))
NOISYSEG_API(void, distance_transform_edt,
             (const Array& mask, int spatial_dims, const double* spacing, const DistanceOptions& options,
              const Array& out, const Array& indices, void* workspace, const Exec& exec),
             (mask, spatial_dims, spacing, options, out, indices, workspace, exec))
NOISYSEG_API(void, signed_distance_map,
             (const Array& mask, int spatial_dims, const double* spacing, const DistanceOptions& options,
              const Array& out, void* workspace, const Exec& exec),
             (mask, spatial_dims, spacing, options, out, workspace, exec))
NOISYSEG_API(size_t, sampled_distance_workspace, (const Array& values, int spatial_dims, const Exec& exec),
             (values, spatial_dims, exec))
NOISYSEG_API(void, sampled_distance,
             (const Array& values, const Array& sites, int spatial_dims, const double* spacing,
              const Array& out, const Array& apexes, void* workspace, const Exec& exec),
             (values, sites, spatial_dims, spacing, out, apexes, workspace, exec))
NOISYSEG_API(void, sampled_distance_backward,
             (const Array& grad, const Array& apexes, int spatial_dims, const Array& grad_values,
              void* workspace, const Exec& exec),
             (grad, apexes, spatial_dims, grad_values, workspace, exec))
