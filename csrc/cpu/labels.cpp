// Label fusion on the CPU: one pass turns the votes on each pixel into a pattern and counts the patterns, EM
// runs on the counts, one pass looks the results up. Bytes per pixel for M uint8 masks and a float posterior:
// M read and 1 written, then 1 read and 4 written, whatever the number of iterations.
#include "formulas/labels.h"

#include <cstring>
#include <type_traits>

#include "cpu/planes.h"

#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // of make_layout's strides: every given array's are set

namespace noisyseg::NOISYSEG_ISA {
namespace {

constexpr int64_t part = 4096;  // pixels at once: their patterns stay in the L1 cache

int64_t parts_of(int64_t pixels) { return (pixels + part - 1) / part; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The annotations of one call: M raters, the extra one last.
struct Votes {
  Layout layout;
  Plane planes[2];  // annotations, extra
  const uint8_t* present = nullptr;
  int64_t present_step[2] = {};
  VoteRules rules;
  int64_t raters = 0;

  Votes(const Array& annotations, const Array& extra, const Array& given, const VoteOptions& options)
      : rules(rules_of(options)) {
    const Array arrays[2] = {annotations, extra ? extra : annotations};
    layout = make_layout(arrays, planes, 2);
    raters = layout.channels + (extra ? 1 : 0);
    if (raters > most_raters) throw std::invalid_argument("at most 62 raters are supported");
    if (given) {
      present = static_cast<const uint8_t*>(given.data);
      for (int i = 0; i < 2; ++i) present_step[i] = given.strides[i];
    }
  }
  bool here(int64_t b, int64_t m) const {
    return !present || m == layout.channels || present[b * present_step[0] + m * present_step[1]];
  }
};

template <class Code, class Digit>
void add_row(int n, bool first, Code place, Code* codes, const Digit& digit) {
  if (first)
    for (int i = 0; i < n; ++i) codes[i] = static_cast<Code>(digit(i));
  else
    for (int i = 0; i < n; ++i) codes[i] = static_cast<Code>(codes[i] + place * static_cast<Code>(digit(i)));
}

template <class T, class Code>
void add_votes(const T* from, int64_t step, int n, const VoteRules& rules, bool first, Code place,
               Code* codes) {
  if (rules.binary && !rules.has_missing && step == 1)  // the usual one, in as many lanes as there are bytes
    add_row(n, first, place, codes, [&](int i) { return static_cast<Code>(from[i] != 0); });
  else
    add_row(n, first, place, codes, [&](int i) { return digit_of(rules, from[i * step]); });
}

// The patterns of pixels [q, q + n).
template <class Code>
void make_codes(const Votes& votes, int64_t b, int64_t q, int n, Code* codes) {
  int64_t place = 1;
  for (int64_t m = 0; m < votes.raters; ++m, place *= votes.rules.base) {
    const Code at = static_cast<Code>(place);
    if (!votes.here(b, m)) {
      add_row(n, m == 0, at, codes, [&](int) { return votes.rules.classes; });
      continue;
    }
    const Plane& plane = votes.planes[m == votes.layout.channels];
    const int64_t base = b * plane.batch + (m == votes.layout.channels ? 0 : m * plane.channel);
    for_rows(plane, votes.layout, base, q, n, [&](int64_t offset, int done, int count) {
#define ADD(T)                                                                                              \
  add_votes(reinterpret_cast<const T*>(plane.data) + offset, plane.step[2], count, votes.rules, m == 0, at, \
            codes + done)
      switch (plane.dtype) {
        case DType::i32: ADD(int32_t); break;
        case DType::i64: ADD(int64_t); break;
        default: ADD(uint8_t);
      }
#undef ADD
    });
  }
}

// f(i, n): runs of n equal codes.
template <class Code, class F>
void for_runs(const Code* codes, int n, const F& f) {
  for (int i = 0; i < n;) {
    int end = i + 1;
    while (end < n && codes[end] == codes[i]) ++end;
    f(i, end - i);
    i = end;
  }
}

void count_codes(const uint8_t* codes, int n, int64_t* counts) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, codes + i, 8);
    if (eight == codes[i] * 0x0101010101010101u)
      counts[codes[i]] += 8;
    else
      for (int k = 0; k < 8; ++k) ++counts[codes[i + k]];
  }
  for (; i < n; ++i) ++counts[codes[i]];
}
void count_codes(const int32_t* codes, int n, int64_t* counts) {
  for_runs(codes, n, [&](int i, int count) { counts[codes[i]] += count; });
}

// f(item, part, worker) for all parts of all items, in parallel.
template <class F>
void for_parts(int64_t items, int64_t parts, int threads, const F& f) {
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < items * parts; ++i) {
#ifdef _OPENMP
    f(i / parts, i % parts, omp_get_thread_num());
#else
    f(i / parts, i % parts, 0);
#endif
  }
}

int most_threads(const Exec& exec) { return threads_for(exec, int64_t{1} << 40); }

// tables: (threads, slots), for counts of parts of one image.
template <class Index>
void count_direct(const Votes& votes, int threads, Index* index, int64_t slots, int64_t* counts,
                  int64_t* tables) {
  const int64_t pixels = votes.layout.pixels(), parts = parts_of(pixels), batch = votes.layout.batch;
  const auto count_part = [&](int64_t b, int64_t p, int64_t* table) {
    const int n = static_cast<int>(least(part, pixels - p * part));
    Index* const codes = index + b * pixels + p * part;
    make_codes(votes, b, p * part, n, codes);
    count_codes(codes, n, table);
  };
  memset(counts, 0, static_cast<size_t>(batch * slots * 8));
  if (batch >= threads)
    return for_parts(batch, 1, threads, [&](int64_t b, int64_t, int) {
      for (int64_t p = 0; p < parts; ++p) count_part(b, p, counts + b * slots);
    });
  for (int64_t b = 0; b < batch; ++b) {
    memset(tables, 0, static_cast<size_t>(threads * slots * 8));
    for_parts(1, parts, threads,
              [&](int64_t, int64_t p, int worker) { count_part(b, p, tables + worker * slots); });
    for (int w = 0; w < threads; ++w)
      for (int64_t s = 0; s < slots; ++s) counts[b * slots + s] += tables[w * slots + s];
  }
}

// A hash table with linear probing for each item; keys hold patterns + 1 while it fills.
bool count_hashed(const Votes& votes, int threads, int32_t* index, int64_t slots, int64_t* keys,
                  int64_t* counts) {
  const int64_t pixels = votes.layout.pixels(), batch = votes.layout.batch;
  int shift = 64;
  for (int64_t s = slots; s > 1; s /= 2) --shift;
  bool fits = true;
  (void)threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < batch; ++b) {
    int64_t *const key = keys + b * slots, *const count = counts + b * slots;
    memset(key, 0, static_cast<size_t>(slots * 8));
    memset(count, 0, static_cast<size_t>(slots * 8));
    int64_t codes[part], filled = 0;
    for (int64_t q = 0; q < pixels && 2 * filled <= slots; q += part) {
      const int n = static_cast<int>(least(part, pixels - q));
      make_codes(votes, b, q, n, codes);
      for_runs(codes, n, [&](int i, int run) {
        if (2 * filled > slots) return;
        const uint64_t mixed = static_cast<uint64_t>(codes[i]) * 0x9e3779b97f4a7c15u;
        int64_t slot = static_cast<int64_t>(mixed >> shift);
        while (key[slot] != 0 && key[slot] != codes[i] + 1) slot = (slot + 1) & (slots - 1);
        filled += key[slot] == 0;
        key[slot] = codes[i] + 1;
        count[slot] += run;
        for (int k = 0; k < run; ++k) index[b * pixels + q + i + k] = static_cast<int32_t>(slot);
      });
    }
    if (2 * filled > slots) {
#pragma omp atomic write
      fits = false;
    }
    for (int64_t s = 0; s < slots; ++s) --key[s];
  }
  return fits;
}

// ---- STAPLE ----------------------------------------------------------------------------------------

// One item's memory: the patterns that occur.
struct Em {
  double* weights;   // (slots, classes)
  double* theta;     // (M, classes, classes)
  double* expected;  // (M, classes, classes)
  double* prior;     // (classes)
  int32_t* slot;     // (slots)
  uint8_t* digits;   // (slots, M)
};

Em em_at(char* begin, int64_t slots, int64_t raters, int64_t classes, int64_t* bytes) {
  int64_t at = 0;
  const auto take = [&](int64_t n) {
    char* const here = begin ? begin + at : nullptr;  // null: only how much
    at += (n + 63) / 64 * 64;
    return here;
  };
  Em em;
  em.weights = reinterpret_cast<double*>(take(slots * classes * 8));
  em.theta = reinterpret_cast<double*>(take(raters * classes * classes * 8));
  em.expected = reinterpret_cast<double*>(take(raters * classes * classes * 8));
  em.prior = reinterpret_cast<double*>(take(classes * 8));
  em.slot = reinterpret_cast<int32_t*>(take(slots * 4));
  em.digits = reinterpret_cast<uint8_t*>(take(slots * raters));
  if (bytes) *bytes = at;
  return em;
}

void fit(const Em& em, const int64_t* keys, const int64_t* counts, int64_t slots, int64_t raters,
         const VoteRules& rules, const StapleOptions& options, const Array& prior, int32_t* status) {
  const int classes = rules.classes;
  const int64_t square = static_cast<int64_t>(classes) * classes;
  int64_t used = 0;
  for (int64_t s = 0; s < slots; ++s) {
    if (counts[s] == 0) continue;
    int64_t code = keys ? keys[s] : s;
    for (int64_t m = 0; m < raters; ++m, code /= rules.base)
      em.digits[used * raters + m] = static_cast<uint8_t>(code % rules.base);
    em.slot[used++] = static_cast<int32_t>(s);
  }
  for (int t = 0; t < classes; ++t) em.prior[t] = 0;
  double votes = 0;
  for (int64_t k = 0; k < used; ++k)
    for (int64_t m = 0; m < raters; ++m)
      if (em.digits[k * raters + m] < classes) {
        em.prior[em.digits[k * raters + m]] += static_cast<double>(counts[em.slot[k]]);
        votes += static_cast<double>(counts[em.slot[k]]);
      }
  for (int t = 0; t < classes; ++t)
    em.prior[t] = prior ? scalar(prior, t) : votes > 0 ? em.prior[t] / votes : t == 0;
  for (int64_t k = 0; k < used; ++k)
    vote_shares(em.digits + k * raters, raters, classes, em.prior, em.weights + k * classes);
  status[0] = status[1] = 0;
  for (int64_t i = 0; i < options.max_iter && !status[1]; ++i) {
    memset(em.expected, 0, static_cast<size_t>(raters * square * 8));
    for (int64_t k = 0; k < used; ++k) {
      const double count = static_cast<double>(counts[em.slot[k]]);
      for (int64_t m = 0; m < raters; ++m) {
        const int digit = em.digits[k * raters + m];
        if (digit == classes) continue;
        for (int t = 0; t < classes; ++t)
          em.expected[m * square + t * classes + digit] += count * em.weights[k * classes + t];
      }
    }
    double change = i == 0 ? HUGE_VAL : 0;
    for (int64_t j = 0; j < raters * classes; ++j)
      for (int r = 0; r < classes; ++r) {
        const double share = share_of(em.expected + j * classes, classes, static_cast<int>(j % classes), r);
        if (i > 0) change = max_(change, fabs(share - em.theta[j * classes + r]));
        em.theta[j * classes + r] = share;
      }
    for (int64_t k = 0; k < used; ++k)
      posterior(em.digits + k * raters, raters, classes, em.prior, em.theta, em.weights + k * classes);
    status[0] = static_cast<int32_t>(i + 1);
    status[1] = change <= options.tol;
  }
}

template <class Out, class Value>
void look_up(const uint8_t* index, int n, const Value* table, int64_t channels, Out* out) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t eight;
    memcpy(&eight, index + i, 8);
    if (eight == index[i] * 0x0101010101010101u) {
      const Out value = static_cast<Out>(table[index[i] * channels]);
      for (int k = 0; k < 8; ++k) out[i + k] = value;
    } else {
      for (int k = 0; k < 8; ++k) out[i + k] = static_cast<Out>(table[index[i + k] * channels]);
    }
  }
  for (; i < n; ++i) out[i] = static_cast<Out>(table[index[i] * channels]);
}
template <class Out, class Value>
void look_up(const int32_t* index, int n, const Value* table, int64_t channels, Out* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<Out>(table[index[i] * channels]);
}

template <class Index>
void spread_part(const Array& index, int64_t b, int64_t q, int n, const Array& values, const Array& out,
                 const Array& labels, const Array& labels_out) {
  const int64_t pixels = index.shape[1];
  const Index* from = static_cast<const Index*>(index.data) + b * pixels + q;
  const int64_t slots = values ? values.shape[1] : labels.shape[1];
  const int64_t channels = values ? values.shape[2] : 1;
  for (int64_t c = 0; values && c < channels; ++c) {
    const double* table = static_cast<const double*>(values.data) + b * slots * channels + c;
    const int64_t at = (b * channels + c) * pixels + q;
    if (out.dtype == DType::f32)
      look_up(from, n, table, channels, static_cast<float*>(out.data) + at);
    else
      look_up(from, n, table, channels, static_cast<double*>(out.data) + at);
  }
  if (!labels) return;
  const int64_t* table = static_cast<const int64_t*>(labels.data) + b * slots;
  const int64_t at = b * pixels + q;
  switch (labels_out.dtype) {
    case DType::i32: look_up(from, n, table, 1, static_cast<int32_t*>(labels_out.data) + at); break;
    case DType::i64: look_up(from, n, table, 1, static_cast<int64_t*>(labels_out.data) + at); break;
    default: look_up(from, n, table, 1, static_cast<uint8_t*>(labels_out.data) + at);
  }
}

// ---- majority, average -----------------------------------------------------------------------------

template <class Code, class T>
void vote_parts(const Votes& votes, const T* table, const Exec& exec, T* out) {
  const int64_t pixels = votes.layout.pixels();
  const int threads = threads_for(exec, votes.layout.batch * pixels * votes.raters);
  for_parts(votes.layout.batch, parts_of(pixels), threads, [&](int64_t b, int64_t p, int) {
    const int n = static_cast<int>(least(part, pixels - p * part));
    Code codes[part];
    make_codes(votes, b, p * part, n, codes);
    look_up(codes, n, table, 1, out + b * pixels + p * part);
  });
}

template <class T>
void vote(const Votes& votes, Tie tie, int64_t tie_value, int64_t slots, T* out, T* table, const Exec& exec) {
  for (int64_t s = 0; s < slots; ++s)
    table[s] = static_cast<T>(plurality(s, votes.raters, votes.rules, tie, tie_value));
  if (slots > 256) return vote_parts<int32_t>(votes, table, exec, out);
  if (slots > 0) return vote_parts<uint8_t>(votes, table, exec, out);
  const int64_t pixels = votes.layout.pixels();
  const int threads = threads_for(exec, votes.layout.batch * pixels * votes.raters);
  for_parts(votes.layout.batch, parts_of(pixels), threads, [&](int64_t b, int64_t p, int) {
    const int n = static_cast<int>(least(part, pixels - p * part));
    int64_t codes[part];
    make_codes(votes, b, p * part, n, codes);
    T* const to = out + b * pixels + p * part;
    for_runs(codes, n, [&](int i, int run) {
      const T label = static_cast<T>(plurality(codes[i], votes.raters, votes.rules, tie, tie_value));
      for (int k = 0; k < run; ++k) to[i + k] = label;
    });
  });
}

}  // namespace

size_t vote_patterns_workspace(int64_t slots, const Exec& exec) {
  return static_cast<size_t>(most_threads(exec) * slots * 8);
}

bool vote_patterns(const Array& annotations, const Array& extra, const Array& present,
                   const VoteOptions& options, const Array& index, const Array& keys, const Array& counts,
                   void* workspace, const Exec& exec) {
  const Votes votes(annotations, extra, present, options);
  formulas::check_patterns(votes.rules, votes.raters);
  const int64_t slots = counts.shape[1];
  const int threads = threads_for(exec, votes.layout.batch * votes.layout.pixels() * votes.raters);
  int64_t* const count = static_cast<int64_t*>(counts.data);
  if (keys && slots < 2) throw std::invalid_argument("a hash table needs two slots or more");
  if (keys)
    return count_hashed(votes, threads, static_cast<int32_t*>(index.data), slots,
                        static_cast<int64_t*>(keys.data), count);
  int64_t* const tables = static_cast<int64_t*>(workspace);
  if (index.dtype == DType::u8)
    count_direct(votes, threads, static_cast<uint8_t*>(index.data), slots, count, tables);
  else
    count_direct(votes, threads, static_cast<int32_t*>(index.data), slots, count, tables);
  return true;
}

void vote_codes(const Array& annotations, const Array& extra, const Array& present,
                const VoteOptions& options, const Array& codes, const Exec& exec) {
  const Votes votes(annotations, extra, present, options);
  formulas::check_patterns(votes.rules, votes.raters);
  const int64_t pixels = votes.layout.pixels();
  const int threads = threads_for(exec, votes.layout.batch * pixels * votes.raters);
  for_parts(votes.layout.batch, parts_of(pixels), threads, [&](int64_t b, int64_t p, int) {
    make_codes(votes, b, p * part, static_cast<int>(least(part, pixels - p * part)),
               static_cast<int64_t*>(codes.data) + b * pixels + p * part);
  });
}

size_t staple_workspace(int64_t batch, int64_t slots, int64_t raters, int classes, const Exec& exec) {
  int64_t bytes;
  em_at(nullptr, slots, raters, classes, &bytes);
  return static_cast<size_t>(bytes * least(batch, most_threads(exec)));
}

void staple(const Array& keys, const Array& counts, int64_t raters, const VoteOptions& options,
            const StapleOptions& em_options, const Array& prior, const Array& values, const Array& labels,
            const Array& performance, const Array& sensitivity, const Array& specificity, const Array& status,
            void* workspace, const Exec& exec) {
  const VoteRules rules = rules_of(options);
  const int64_t batch = counts.shape[0], slots = counts.shape[1], channels = values.shape[2];
  const int64_t classes = rules.classes, square = classes * classes;
  int64_t bytes;
  em_at(nullptr, slots, raters, classes, &bytes);
  const int threads = static_cast<int>(least(batch, most_threads(exec)));
  for_parts(batch, 1, threads, [&](int64_t b, int64_t, int worker) {
    const Em em = em_at(static_cast<char*>(workspace) + worker * bytes, slots, raters, classes, nullptr);
    const int64_t* const count = static_cast<const int64_t*>(counts.data) + b * slots;
    fit(em, keys ? static_cast<const int64_t*>(keys.data) + b * slots : nullptr, count, slots, raters, rules,
        em_options, prior, static_cast<int32_t*>(status.data) + 2 * b);
    double* const value = static_cast<double*>(values.data) + b * slots * channels;
    int64_t* const label = static_cast<int64_t*>(labels.data) + b * slots;
    for (int64_t s = 0, k = 0; s < slots; ++s) {
      if (count[s] == 0) continue;
      const double* w = em.weights + classes * k++;
      int best = 0;
      for (int t = 1; t < classes; ++t)
        if (w[t] > w[best]) best = t;
      label[s] = best;
      for (int64_t c = 0; c < channels; ++c) value[s * channels + c] = w[channels == 1 ? 1 : c];
    }
    for (int64_t m = 0; m < raters; ++m)
      for (int64_t t = 0; t < classes; ++t) {
        const int64_t at = (b * raters + m) * classes + t;
        rates_of(em.expected + m * square, rules.classes, static_cast<int>(t),
                 static_cast<double*>(sensitivity.data) + at, static_cast<double*>(specificity.data) + at);
        const bool silent =
            static_cast<double*>(sensitivity.data)[at] != static_cast<double*>(sensitivity.data)[at];
        for (int64_t r = 0; r < classes; ++r)
          static_cast<double*>(performance.data)[at * classes + r] =
              silent ? NAN : em.theta[m * square + t * classes + r];
      }
  });
}

void spread(const Array& index, const Array& values, const Array& out, const Array& labels,
            const Array& labels_out, const Exec& exec) {
  const int64_t pixels = index.shape[1];
  const int threads = threads_for(exec, index.shape[0] * pixels);
  for_parts(index.shape[0], parts_of(pixels), threads, [&](int64_t b, int64_t p, int) {
    const int n = static_cast<int>(least(part, pixels - p * part));
    if (index.dtype == DType::u8)
      spread_part<uint8_t>(index, b, p * part, n, values, out, labels, labels_out);
    else
      spread_part<int32_t>(index, b, p * part, n, values, out, labels, labels_out);
  });
}

size_t majority_vote_workspace(int64_t slots) { return static_cast<size_t>(slots * 8); }

void majority_vote(const Array& annotations, const Array& present, const VoteOptions& options, Tie tie,
                   int64_t tie_value, int64_t slots, const Array& out, void* workspace, const Exec& exec) {
  const Votes votes(annotations, {}, present, options);
  formulas::check_patterns(votes.rules, votes.raters);
#define VOTE(T) \
  vote(votes, tie, tie_value, slots, static_cast<T*>(out.data), static_cast<T*>(workspace), exec)
  switch (out.dtype) {
    case DType::i32: VOTE(int32_t); break;
    case DType::i64: VOTE(int64_t); break;
    default: VOTE(uint8_t);
  }
#undef VOTE
}

void soft_average(const Array& annotations, const Array& present, const Array& weights,
                  const VoteOptions& options, const Array& out, const Exec& exec) {
  const Votes votes(annotations, {}, present, options);
  const Plane& plane = votes.planes[0];
  const int64_t pixels = votes.layout.pixels(), channels = options.binary ? 1 : options.classes;
  const double missing = static_cast<double>(options.missing);
  const bool soft = plane.dtype >= DType::f16;
  const int threads = threads_for(exec, votes.layout.batch * pixels * votes.raters * channels);
  for_parts(votes.layout.batch * channels, parts_of(pixels), threads, [&](int64_t item, int64_t p, int) {
    const int64_t b = item / channels;
    const double channel = static_cast<double>(item % channels), classes = options.classes;
    for (int64_t q = p * part; q < least(pixels, (p + 1) * part); q += block_pixels) {
      const int count = static_cast<int>(least(block_pixels, least(pixels, (p + 1) * part) - q));
      double buffer[block_pixels], sum[block_pixels], total[block_pixels];
      for (int i = 0; i < count; ++i) sum[i] = total[i] = 0;
      for (int64_t m = 0; m < votes.raters; ++m) {
        if (!votes.here(b, m)) continue;
        const double weight =
            weights
                ? static_cast<const double*>(weights.data)[b * weights.strides[0] + m * weights.strides[1]]
                : 1.0;
        const double* x =
            load<double>(plane, votes.layout, b * plane.batch + m * plane.channel, q, count, buffer);
        for (int i = 0; i < count; ++i) {
          bool known = x[i] == x[i] && !(options.has_missing && x[i] == missing);
          if (!options.binary) known = known && x[i] >= 0 && x[i] < classes;
          const double value = !options.binary ? x[i] == channel : soft ? x[i] : x[i] != 0;
          sum[i] += known ? weight * value : 0;
          total[i] += known ? weight : 0;
        }
      }
      for (int i = 0; i < count; ++i) sum[i] = total[i] > 0 ? sum[i] / total[i] : 0;
      const int64_t at = item * pixels + q;
      if (out.dtype == DType::f32)
        for (int i = 0; i < count; ++i) static_cast<float*>(out.data)[at + i] = static_cast<float>(sum[i]);
      else
        for (int i = 0; i < count; ++i) static_cast<double*>(out.data)[at + i] = sum[i];
    }
  });
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_DISPATCH(size_t, vote_patterns_workspace, (int64_t slots, const Exec& exec), (slots, exec))
NOISYSEG_DISPATCH(bool, vote_patterns,
                  (const Array& annotations, const Array& extra, const Array& present,
                   const VoteOptions& options, const Array& index, const Array& keys, const Array& counts,
                   void* workspace, const Exec& exec),
                  (annotations, extra, present, options, index, keys, counts, workspace, exec))
NOISYSEG_DISPATCH(void, vote_codes,
                  (const Array& annotations, const Array& extra, const Array& present,
                   const VoteOptions& options, const Array& codes, const Exec& exec),
                  (annotations, extra, present, options, codes, exec))
NOISYSEG_DISPATCH(size_t, staple_workspace,
                  (int64_t batch, int64_t slots, int64_t raters, int classes, const Exec& exec),
                  (batch, slots, raters, classes, exec))
NOISYSEG_DISPATCH(void, staple,
                  (const Array& keys, const Array& counts, int64_t raters, const VoteOptions& options,
                   const StapleOptions& em, const Array& prior, const Array& values, const Array& labels,
                   const Array& performance, const Array& sensitivity, const Array& specificity,
                   const Array& status, void* workspace, const Exec& exec),
                  (keys, counts, raters, options, em, prior, values, labels, performance, sensitivity,
                   specificity, status, workspace, exec))
NOISYSEG_DISPATCH(void, spread,
                  (const Array& index, const Array& values, const Array& out, const Array& labels,
                   const Array& labels_out, const Exec& exec),
                  (index, values, out, labels, labels_out, exec))
NOISYSEG_DISPATCH(size_t, majority_vote_workspace, (int64_t slots), (slots))
NOISYSEG_DISPATCH(void, majority_vote,
                  (const Array& annotations, const Array& present, const VoteOptions& options, Tie tie,
                   int64_t tie_value, int64_t slots, const Array& out, void* workspace, const Exec& exec),
                  (annotations, present, options, tie, tie_value, slots, out, workspace, exec))
NOISYSEG_DISPATCH(void, soft_average,
                  (const Array& annotations, const Array& present, const Array& weights,
                   const VoteOptions& options, const Array& out, const Exec& exec),
                  (annotations, present, weights, options, out, exec))
