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

#include "cpu/edt.h"
#include "cpu/parallel.h"
#include "formulas/distance.h"
#include "formulas/math.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

using namespace formulas;

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

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
constexpr int registers = 2;  // vectors side by side: hides the latency of one
template <class T>
constexpr int lanes = registers * width<T>;
constexpr int budget = 64;  // steps for each block of lanes from which the envelope is quicker

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
  uint64_t parts[sizeof(I) / 8], all = 0;
  __builtin_memcpy(parts, &mask, sizeof(I));
  for (uint64_t part : parts) all |= part;
  return all != 0;
}

// The outward search for `lanes` neighbouring outputs. centre: their own f; f_(i-k) and f_(i+k) lie k *
// stride away and exist for k <= left and k <= right. Writes the squared distances (>= 0) to best; returns
// the steps taken.
template <class T, bool two_classes>
inline __attribute__((always_inline)) int64_t search(const T* centre, int64_t stride, int64_t left,
                                                     int64_t right, const T* steps, T* result) {
  using V = typename Simd<T>::V;
  using I = typename Simd<T>::I;
  constexpr int w = width<T>;
  const V zero = {};
  V best[registers];
  I sign[registers];
  for (int r = 0; r < registers; ++r) {
    const V f = load_vector<V>(centre + r * w);
    sign[r] = two_classes ? (I)f & Simd<T>::sign : I{};
    const I magnitude = (I)f ^ sign[r];
    best[r] = (V)magnitude;
  }
  const auto seen = [&](const T* at, int r) {
    const V f = load_vector<V>(at + r * w);
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
        const V a = seen(centre - k * stride, r), b = seen(centre + k * stride, r);
        better(a < b ? a : b, step, r);
      }
    }
    for (; k < until; ++k) {
      const V step = zero + steps[k];
      for (int r = 0; r < registers; ++r) better(seen(centre + k * side, r), step, r);
    }
  }
  for (int r = 0; r < registers; ++r) __builtin_memcpy(result + r * w, &best[r], sizeof(V));
  return k;
}

// The lower envelope of the parabolas over one line: f(j) -> put(i, value, j of the nearest, -1 if none).
struct Envelope {
  double* starts;   // n + 1: where each parabola begins to be the lowest
  int32_t* apexes;  // n

  template <class T, class F, class Put>
  void line(int64_t n, const T* steps, T w2, const F& f, const Put& put) const {
    int64_t top = -1;
    for (int64_t j = 0; j < n; ++j) {
      const T fj = f(j);
      if (!(fj < infinity<T>)) continue;
      double start = -__builtin_inf();
      while (top >= 0) {
        const int64_t v = apexes[top];
        // where parabola j gets below parabola v
        start = (static_cast<double>(fj) - static_cast<double>(f(v))) /
                    (2.0 * static_cast<double>(w2) * static_cast<double>(j - v)) +
                0.5 * static_cast<double>(j + v);
        if (start > starts[top]) break;
        --top;
        start = -__builtin_inf();
      }
      ++top;
      apexes[top] = static_cast<int32_t>(j);
      starts[top] = start;
    }
    if (top < 0) {
      for (int64_t i = 0; i < n; ++i) put(i, infinity<T>, -1);
      return;
    }
    starts[top + 1] = __builtin_inf();
    int64_t at = 0;
    for (int64_t i = 0; i < n; ++i) {
      while (starts[at + 1] < static_cast<double>(i)) ++at;
      const int64_t j = apexes[at];
      put(i, f(j) + steps[i > j ? i - j : j - i], static_cast<int32_t>(j));
    }
  }
};

// Where a volume's voxels come from.
struct Source {
  const char* data;
  DType dtype;
  int64_t strides[3];  // in elements
  bool site_is_nonzero;

  // The class of each voxel of a row of axis 2: 1, or 0 for a site.
  const uint8_t* row(int64_t i0, int64_t i1, int64_t from, int64_t n, uint8_t* buffer) const {
    const int64_t offset = i0 * strides[0] + i1 * strides[1] + from * strides[2];
    switch (dtype) {
      case DType::i32: return convert<int32_t>(offset, n, buffer);
      case DType::i64: return convert<int64_t>(offset, n, buffer);
      default: return convert<uint8_t>(offset, n, buffer);
    }
  }

 private:
  template <class From>
  const uint8_t* convert(int64_t offset, int64_t n, uint8_t* buffer) const {
    const From* from = reinterpret_cast<const From*>(data) + offset;
    const uint8_t flip = site_is_nonzero;
    if (strides[2] == 1)
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<uint8_t>(from[i] != 0) ^ flip;
    else
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<uint8_t>(from[i * strides[2]] != 0) ^ flip;
    return buffer;
  }
};

struct Volume {
  int64_t n[3];
  double w2[3];  // squared spacing
  int64_t size() const { return n[0] * n[1] * n[2]; }
};

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A thread's scratch memory and the tables that all threads read.
template <class T>
struct Scratch {
  T *steps0, *steps2;  // squared_step of axes 0 and 2
  T* line;             // a row with `lanes` repeated values before and behind it, or a tile (n0, lanes)
  Envelope envelope;
  T* run;  // a strip of run lengths
  uint8_t* classes;

  static size_t table_bytes(const Volume& v) {
    return static_cast<size_t>(round_up(v.n[0] + v.n[2] + 8, 16)) * sizeof(T);
  }
  static size_t thread_bytes(const Volume& v) {
    const int64_t longest = v.n[0] > v.n[2] ? v.n[0] : v.n[2];
    const int64_t row = v.n[2] + 3 * lanes<T>, tile = v.n[0] * lanes<T>;
    return static_cast<size_t>(round_up((row > tile ? row : tile) * static_cast<int64_t>(sizeof(T)), 64) +
                               round_up((longest + 1) * 8, 64) + round_up(longest * 4, 64) +
                               round_up(v.n[2] * static_cast<int64_t>(sizeof(T)), 64) + round_up(v.n[2], 64));
  }
  Scratch(char* memory, const Volume& v, int thread) {
    steps0 = reinterpret_cast<T*>(memory);
    steps2 = steps0 + v.n[0] + 4;
    char* p = memory + table_bytes(v) + static_cast<size_t>(thread) * thread_bytes(v);
    const int64_t longest = v.n[0] > v.n[2] ? v.n[0] : v.n[2];
    const int64_t row = v.n[2] + 3 * lanes<T>, tile = v.n[0] * lanes<T>;
    const auto take = [&](int64_t bytes) {
      char* q = p;
      p += round_up(bytes, 64);
      return q;
    };
    line = reinterpret_cast<T*>(take((row > tile ? row : tile) * static_cast<int64_t>(sizeof(T))));
    envelope.starts = reinterpret_cast<double*>(take((longest + 1) * 8));
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

// Step 1 for columns [from, from + m) of slice i0: f (n1, n2) of that slice.
template <class T, bool two_classes>
void sweep(const Source& source, const Volume& v, int64_t i0, int64_t from, int64_t m, T* f,
           const Scratch<T>& s) {
  const int64_t n1 = v.n[1], n2 = v.n[2];
  T* run = s.run;
  for (int64_t x = 0; x < m; ++x) run[x] = infinity<T>;
  for (int64_t y = 0; y < n1; ++y) {
    T* row = f + y * n2 + from;
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
    if (two_classes) {  // run: the signed run length below, 0 at the end
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
  }
}

template <class T, bool two_classes>
inline __attribute__((always_inline)) void finish_values(T* to, const T* squared, const T* f, int64_t n,
                                                         Finish finish) {
  if (finish == Finish::squared) {
    for (int64_t i = 0; i < n; ++i) to[i] = two_classes ? with_sign(squared[i], f[i]) : squared[i];
  } else if (finish == Finish::root) {
    for (int64_t i = 0; i < n; ++i) to[i] = sqrt_(squared[i]);
  } else {  // object: f > 0, the map is negative there
    for (int64_t i = 0; i < n; ++i) to[i] = with_sign(sqrt_(squared[i]), -f[i]);
  }
}

// Whether a line keeps its values: sites all along it, or none at all.
template <bool two_classes>
bool nothing_to_find(bool finite, bool positive, bool negative) {
  return two_classes ? !finite && !(positive && negative) : !finite || !positive;
}

// Step 2 for one row, in place.
template <class T, bool two_classes>
void search_row(const Volume& v, T* row, const Scratch<T>& s, Finish finish) {
  const int64_t n = v.n[2];
  constexpr int l = lanes<T>;
  int finite = 0, positive = 0, negative = 0;
  for (int64_t i = 0; i < n; ++i) {
    finite |= abs_(row[i]) < infinity<T>;
    positive |= row[i] > T(0);
    negative |= row[i] < T(0);
  }
  if (nothing_to_find<two_classes>(finite, positive, negative)) {
    for (int64_t i = 0; i < n; ++i) s.line[i] = abs_(row[i]);
    return finish_values<T, two_classes>(row, s.line, row, n, finish);
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
    steps += search<T, two_classes>(f + i, 1, left, right, s.steps2, best);
    const int64_t m = n - i < l ? n - i : l;
    finish_values<T, two_classes>(row + i, best, f + i, m, finish);
    if (steps > budget * (i / l + 1) && i + l < n) {
      const T w2 = static_cast<T>(v.w2[2]);
      const int64_t after = i + l;
      const auto put = [&](T sign) {
        return [&, sign](int64_t x, T value, int32_t) {
          if (x < after || (two_classes && f[x] * sign < T(0))) return;
          finish_values<T, two_classes>(row + x, &value, f + x, 1, finish);
        };
      };
      if (!two_classes) return s.envelope.line(n, s.steps2, w2, [&](int64_t j) { return f[j]; }, put(T(1)));
      s.envelope.line(n, s.steps2, w2, [&](int64_t j) { return max_(f[j], T(0)); }, put(T(1)));
      s.envelope.line(n, s.steps2, w2, [&](int64_t j) { return max_(-f[j], T(0)); }, put(T(-1)));
      return;
    }
  }
}

// Step 3 for the columns [x, x + m), m <= lanes, of row y, in place.
template <class T, bool two_classes>
void search_tile(const Volume& v, T* volume, int64_t y, int64_t x, int64_t m, const Scratch<T>& s,
                 Finish finish) {
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
  }
  T best[l];
  if (nothing_to_find<two_classes>(finite, positive, negative)) {
    for (int64_t i = 0; i < n; ++i) {
      for (int j = 0; j < l; ++j) best[j] = abs_(f[i * l + j]);
      finish_values<T, two_classes>(base + i * slice, best, f + i * l, m, finish);
    }
    return;
  }
  int64_t steps = 0;
  for (int64_t i = 0; i < n; ++i) {
    steps += search<T, two_classes>(f + i * l, l, i, n - 1 - i, s.steps0, best);
    finish_values<T, two_classes>(base + i * slice, best, f + i * l, m, finish);
    if (steps > budget * (i + 4) && i + 1 < n) {
      const T w2 = static_cast<T>(v.w2[0]);
      for (int64_t j = 0; j < m; ++j) {
        const T* column = f + j;
        const auto put = [&](T sign) {
          return [&, sign](int64_t z, T value, int32_t) {
            if (z <= i || (two_classes && column[z * l] * sign < T(0))) return;
            finish_values<T, two_classes>(base + z * slice + j, &value, column + z * l, 1, finish);
          };
        };
        if (!two_classes) {
          s.envelope.line(n, s.steps0, w2, [&](int64_t z) { return column[z * l]; }, put(T(1)));
          continue;
        }
        s.envelope.line(n, s.steps0, w2, [&](int64_t z) { return max_(column[z * l], T(0)); }, put(T(1)));
        s.envelope.line(n, s.steps0, w2, [&](int64_t z) { return max_(-column[z * l], T(0)); }, put(T(-1)));
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

// All three steps for `count` volumes, one behind the other in `out`.
template <class T, bool two_classes, class MakeSource>
void transform(int64_t count, const Volume& v, const MakeSource& source_of, T* out, char* memory, int threads,
               Finish finish) {
  const int64_t n0 = v.n[0], n1 = v.n[1], n2 = v.n[2], slices = count * n0;
  if (count * v.size() == 0) return;
  Scratch<T>(memory, v, 0).fill_tables(v);
  const Finish after_rows = n0 > 1 ? Finish::squared : finish;
  if (slices >= 2 * threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Scratch<T> s(memory, v, thread_number());
      T* f = out + slice * n1 * n2;
      const Source source = source_of(slice / n0);
      sweep<T, two_classes>(source, v, slice % n0, 0, n2, f, s);
      for (int64_t y = 0; y < n1; ++y) search_row<T, two_classes>(v, f + y * n2, s, after_rows);
    }
  } else {
    const int64_t strip = round_up((n2 + threads - 1) / threads, 64), strips = (n2 + strip - 1) / strip;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < slices * strips; ++item) {
      const Scratch<T> s(memory, v, thread_number());
      const int64_t slice = item / strips, from = item % strips * strip;
      const Source source = source_of(slice / n0);
      sweep<T, two_classes>(source, v, slice % n0, from, n2 - from < strip ? n2 - from : strip,
                            out + slice * n1 * n2, s);
    }
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < slices * n1; ++row)
      search_row<T, two_classes>(v, out + row * n2, Scratch<T>(memory, v, thread_number()), after_rows);
  }
  if (n0 == 1) return;
  const int64_t tiles = (n2 + lanes<T> - 1) / lanes<T>;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < count * n1; ++item) {
    const Scratch<T> s(memory, v, thread_number());
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t x = tile * lanes<T>;
      search_tile<T, two_classes>(v, out + item / n1 * v.size(), item % n1, x,
                                  n2 - x < lanes<T> ? n2 - x : lanes<T>, s, finish);
    }
  }
}

// The mask's batch axes and its spatial axes as a Volume.
struct Batch {
  int64_t count = 1;
  int axes = 0;
  int64_t shape[Array::max_rank], strides[Array::max_rank];
  Volume volume{{1, 1, 1}, {1, 1, 1}};
  Source source;

  Batch(const Array& mask, int spatial_dims, const double* spacing) {
    axes = mask.rank - spatial_dims;
    for (int i = 0; i < axes; ++i) shape[i] = mask.shape[i], strides[i] = mask.strides[i], count *= shape[i];
    source.data = static_cast<const char*>(mask.data);
    source.dtype = mask.dtype;
    source.site_is_nonzero = false;
    for (int d = 0; d < 3; ++d) source.strides[d] = 0;
    for (int d = 0; d < spatial_dims; ++d) {
      const int to = 3 - spatial_dims + d;
      volume.n[to] = mask.shape[axes + d];
      volume.w2[to] = spacing ? spacing[d] * spacing[d] : 1.0;
      source.strides[to] = mask.strides[axes + d];
    }
  }
  Source item(int64_t i) const {
    int64_t offset = 0;
    for (int a = axes - 1; a >= 0; --a) offset += i % shape[a] * strides[a], i /= shape[a];
    Source s = source;
    s.data += offset * dtype_size(source.dtype);
    return s;
  }
};

// Codes of the boundary convention: 0 on the inner contour, 1 outside, 2 inside.
void contour_codes(const Source& source, const Volume& v, uint8_t* codes, int64_t i0) {
  const int64_t n1 = v.n[1], n2 = v.n[2];
  const auto object = [&](int64_t z, int64_t y, int64_t x) {
    const int64_t offset = z * source.strides[0] + y * source.strides[1] + x * source.strides[2];
    switch (source.dtype) {
      case DType::i32: return reinterpret_cast<const int32_t*>(source.data)[offset] != 0;
      case DType::i64: return reinterpret_cast<const int64_t*>(source.data)[offset] != 0;
      default: return reinterpret_cast<const uint8_t*>(source.data)[offset] != 0;
    }
  };
  for (int64_t y = 0; y < n1; ++y) {
    uint8_t* row = codes + (i0 * n1 + y) * n2;
    source.row(i0, y, 0, n2, row);
    for (int64_t x = 0; x < n2; ++x) {
      if (!row[x]) {
        row[x] = 1;
        continue;
      }
      const bool edge = (x > 0 && !object(i0, y, x - 1)) || (x + 1 < n2 && !object(i0, y, x + 1)) ||
                        (y > 0 && !object(i0, y - 1, x)) || (y + 1 < n1 && !object(i0, y + 1, x)) ||
                        (i0 > 0 && !object(i0 - 1, y, x)) || (i0 + 1 < v.n[0] && !object(i0 + 1, y, x));
      row[x] = edge ? 0 : 2;
    }
  }
}

// Scratch memory of nearest_sites, all of it in 8-byte units.
struct NearestScratch {
  int64_t *nearest, *old;  // a volume and a line of linear indices
  double* starts;
  float *line, *steps;
  int32_t* apexes;
  uint8_t* classes;

  static int64_t longest(const Volume& v) {
    int64_t n = 8;
    for (int64_t extent : v.n) n = extent > n ? extent : n;
    return n + 1;
  }
  static size_t bytes(const Volume& v) { return static_cast<size_t>(v.size() + 6 * longest(v)) * 8; }
  NearestScratch(char* memory, const Volume& v) {
    const int64_t n = longest(v);
    nearest = reinterpret_cast<int64_t*>(memory);
    old = nearest + v.size();
    starts = reinterpret_cast<double*>(old + n);
    line = reinterpret_cast<float*>(starts + n);
    steps = line + 2 * n;
    apexes = reinterpret_cast<int32_t*>(steps + 2 * n);
    classes = reinterpret_cast<uint8_t*>(apexes + 2 * n);
  }
};

// Nearest sites: three passes of the envelope that carry the site's index along.
void nearest_sites(const Source& source, const Volume& v, float* f, int32_t* indices, int dims,
                   const NearestScratch& s) {
  const int64_t n[3] = {v.n[0], v.n[1], v.n[2]}, step[3] = {n[1] * n[2], n[2], 1}, voxels = v.size();
  for (int64_t z = 0; z < n[0]; ++z)
    for (int64_t y = 0; y < n[1]; ++y) {
      const uint8_t* row = source.row(z, y, 0, n[2], s.classes);
      for (int64_t x = 0; x < n[2]; ++x) {
        const int64_t at = z * step[0] + y * step[1] + x;
        f[at] = row[x] ? infinity<float> : 0.f;
        s.nearest[at] = row[x] ? -1 : at;
      }
    }
  const Envelope envelope{s.starts, s.apexes};
  for (int axis = 2; axis >= 0; --axis) {
    if (n[axis] == 1) continue;
    const int a = axis == 0 ? 1 : 0, b = axis == 2 ? 1 : 2;
    const float w2 = static_cast<float>(v.w2[axis]);
    for (int64_t k = 0; k < n[axis]; ++k) s.steps[k] = squared_step(k, w2);
    for (int64_t i = 0; i < n[a]; ++i)
      for (int64_t j = 0; j < n[b]; ++j) {
        const int64_t base = i * step[a] + j * step[b];
        for (int64_t k = 0; k < n[axis]; ++k) {
          s.line[k] = f[base + k * step[axis]];
          s.old[k] = s.nearest[base + k * step[axis]];
        }
        envelope.line(
            n[axis], s.steps, w2, [&](int64_t k) { return s.line[k]; },
            [&](int64_t k, float value, int32_t from) {
              f[base + k * step[axis]] = value;
              s.nearest[base + k * step[axis]] = from < 0 ? -1 : s.old[from];
            });
      }
  }
  for (int64_t at = 0; at < voxels; ++at)
    for (int d = 3 - dims; d < 3; ++d)
      indices[(d - 3 + dims) * voxels + at] =
          s.nearest[at] < 0 ? -1 : static_cast<int32_t>(s.nearest[at] / step[d] % n[d]);
}

// The signed map of one item from squared distances, or from distances with the sign already there.
void normalise(float* phi, int64_t n) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i) top = max_(top, abs_(phi[i]));
  if (!(top > 0)) return;
  if (top == infinity<float>)
    for (int64_t i = 0; i < n; ++i) phi[i] = phi[i] > 0 ? 1.f : phi[i] < 0 ? -1.f : 0.f;
  else
    for (int64_t i = 0; i < n; ++i) phi[i] /= top;
}

void to_kervadec(float* phi, int64_t n) {
  if (n && abs_(phi[0]) == infinity<float>) {  // one class only
    for (int64_t i = 0; i < n; ++i) phi[i] = 0.f;
    return;
  }
  for (int64_t i = 0; i < n; ++i) phi[i] = kervadec_value(abs_(phi[i]), phi[i] < 0);
}

void to_dtc(float* phi, const Volume& v) {
  const int64_t n = v.size(), step[3] = {v.n[1] * v.n[2], v.n[2], 1};
  float outside = 0, inside = 0;
  for (int64_t i = 0; i < n; ++i) {
    outside = max_(outside, phi[i]);
    inside = max_(inside, -phi[i]);
  }
  if (max_(outside, inside) == infinity<float>) return normalise(phi, n);
  // In place: a contour voxel becomes 0, which its neighbours still see as "not outside".
  for (int64_t at = 0; at < n; ++at) {
    if (phi[at] > 0) continue;
    bool edge = false;
    for (int d = 0; d < 3; ++d) {
      const int64_t i = at / step[d] % v.n[d];
      edge |= (i > 0 && phi[at - step[d]] > 0) || (i + 1 < v.n[d] && phi[at + step[d]] > 0);
    }
    if (edge) phi[at] = 0.f;
  }
  for (int64_t i = 0; i < n; ++i) phi[i] = phi[i] > 0 ? phi[i] / outside : phi[i] < 0 ? phi[i] / inside : 0.f;
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
  transform<T, false>(
      1, v, [&](int64_t) { return source; }, out, static_cast<char*>(workspace), threads, Finish::squared);
}

}  // namespace

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

size_t distance_workspace(const Array& mask, int spatial_dims, bool indices, bool contour, const Exec& exec) {
  const Batch batch(mask, spatial_dims, nullptr);
  const int threads = available_threads(exec);
  if (indices) return NearestScratch::bytes(batch.volume) * static_cast<size_t>(threads);
  return scratch_bytes(batch.volume, threads, false) + 64 +
         (contour ? static_cast<size_t>(batch.count * batch.volume.size()) : 0);
}

void distance_transform_edt(const Array& mask, int spatial_dims, const double* spacing, bool squared,
                            const Array& out, const Array& indices, void* workspace, const Exec& exec) {
  const Batch batch(mask, spatial_dims, spacing);
  const Volume& v = batch.volume;
  const int64_t voxels = v.size();
  float* to = static_cast<float*>(out.data);
  const int threads = threads_for(exec, batch.count * voxels);
  char* memory = static_cast<char*>(workspace);
  if (!indices) {
    transform<float, false>(
        batch.count, v, [&](int64_t i) { return batch.item(i); }, to, memory, threads,
        squared ? Finish::squared : Finish::root);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < batch.count; ++i) {
    const int thread = thread_number();
    nearest_sites(batch.item(i), v, to + i * voxels,
                  static_cast<int32_t*>(indices.data) + i * spatial_dims * voxels, spatial_dims,
                  NearestScratch(memory + thread * NearestScratch::bytes(v), v));
    if (!squared)
      for (int64_t at = 0; at < voxels; ++at) to[i * voxels + at] = sqrt_(to[i * voxels + at]);
  }
}

void signed_distance_map(const Array& mask, int spatial_dims, const double* spacing, SignedMap convention,
                         bool normalize, const Array& out, void* workspace, const Exec& exec) {
  const Batch batch(mask, spatial_dims, spacing);
  const Volume& v = batch.volume;
  const int64_t voxels = v.size(), slices = batch.count * v.n[0];
  float* phi = static_cast<float*>(out.data);
  const int threads = threads_for(exec, batch.count * voxels);
  char* memory = static_cast<char*>(workspace);
  if (convention == SignedMap::boundary) {
    uint8_t* codes = reinterpret_cast<uint8_t*>(memory) +
                     round_up(static_cast<int64_t>(scratch_bytes(v, available_threads(exec), false)), 64);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t slice = 0; slice < slices; ++slice)
      contour_codes(batch.item(slice / v.n[0]), v, codes + slice / v.n[0] * voxels, slice % v.n[0]);
    const auto coded = [&](int64_t i) {
      return Source{
          reinterpret_cast<const char*>(codes + i * voxels), DType::u8, {v.n[1] * v.n[2], v.n[2], 1}, false};
    };
    transform<float, false>(batch.count, v, coded, phi, memory, threads, Finish::root);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t at = slice * v.n[1] * v.n[2];
      for (int64_t i = at; i < at + v.n[1] * v.n[2]; ++i) phi[i] = codes[i] == 2 ? -phi[i] : phi[i];
    }
  } else {
    transform<float, true>(
        batch.count, v, [&](int64_t i) { return batch.item(i); }, phi, memory, threads, Finish::two_sided);
  }
  if (convention == SignedMap::two_sided && !normalize) return;
  if (convention == SignedMap::boundary && !normalize) return;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < batch.count; ++i) {
    float* item = phi + i * voxels;
    if (convention == SignedMap::kervadec) to_kervadec(item, voxels);
    if (convention == SignedMap::dtc)
      to_dtc(item, v);
    else if (normalize)
      normalise(item, voxels);
  }
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, distance_workspace,
             (const Array& mask, int spatial_dims, bool indices, bool contour, const Exec& exec),
             (mask, spatial_dims, indices, contour, exec))
NOISYSEG_API(void, distance_transform_edt,
             (const Array& mask, int spatial_dims, const double* spacing, bool squared, const Array& out,
              const Array& indices, void* workspace, const Exec& exec),
             (mask, spatial_dims, spacing, squared, out, indices, workspace, exec))
NOISYSEG_API(void, signed_distance_map,
             (const Array& mask, int spatial_dims, const double* spacing, SignedMap convention,
              bool normalize, const Array& out, void* workspace, const Exec& exec),
             (mask, spatial_dims, spacing, convention, normalize, out, workspace, exec))
