// Label fusion on CUDA, without waiting for the device: patterns of votes are counted in one pass over the
// image (integer atomics, so in any order), EM runs on the counts in one block for each image, a last pass
// looks the results up. Bytes per pixel for M uint8 masks and a float posterior: M read and 1 written, then 1
// read and 4 written (and once more 1 and 1 for the labels), whatever the number of iterations.
#include "cuda/launch.h"
#include "formulas/dtype.h"
#include "formulas/labels.h"
#include "layout.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;
using u64 = unsigned long long;

constexpr int threads = 256;
constexpr int em_threads = 512;
constexpr int64_t most_shared = 4096;  // slots that are counted in shared memory
constexpr int64_t most_blocks = 2048;
constexpr int64_t most_items = 65535;  // gridDim.y
constexpr unsigned all_lanes = 0xffffffffu;

// The annotations of one call: M raters, and perhaps an extra one, the last.
struct Votes {
  Layout layout;
  Plane annotations, extra;
  const uint8_t* present;
  int64_t present_step[2];
  VoteRules rules;
};

Votes votes_of(const Array& annotations, const Array& extra, const Array& present,
               const VoteOptions& options) {
  const Array arrays[2] = {annotations, extra ? extra : annotations};
  Plane planes[2];
  Votes v{};
  v.layout = make_layout(arrays, planes, 2);
  v.annotations = planes[0];
  if (extra) v.extra = planes[1];
  v.rules = rules_of(options);
  if (v.layout.channels + (extra ? 1 : 0) > most_raters)
    throw std::invalid_argument("at most 62 raters are supported");
  if (present) {
    v.present = static_cast<const uint8_t*>(present.data);
    for (int i = 0; i < 2; ++i) v.present_step[i] = present.strides[i];
  }
  return v;
}

dim3 grid_of(int64_t items, int64_t pixels) {
  const int64_t y = items < most_items ? items : most_items;
  const int64_t wanted = (most_blocks + y - 1) / y, blocks = (pixels + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < wanted ? blocks : wanted), static_cast<unsigned>(y));
}

struct Spot {
  int64_t row0, row1, column;
};
__device__ inline Spot spot_of(const Layout& layout, int64_t q) {
  if (layout.extent[0] * layout.extent[1] == 1) return {0, 0, q};
  const int64_t row = q / layout.extent[2];
  return {row / layout.extent[1], row % layout.extent[1], q - row * layout.extent[2]};
}
__device__ inline int64_t offset_at(const Spot& at, const Plane& plane) {
  return at.row0 * plane.step[0] + at.row1 * plane.step[1] + at.column * plane.step[2];
}
__device__ inline bool here(const Votes& v, int64_t b, int64_t m) {
  return !v.present || v.present[b * v.present_step[0] + m * v.present_step[1]];
}

// The pattern of pixel q.
template <class T, class Code>
__device__ inline Code code_at(const Votes& v, int64_t b, int64_t q) {
  const Spot at = spot_of(v.layout, q);
  const T* from =
      reinterpret_cast<const T*>(v.annotations.data) + b * v.annotations.batch + offset_at(at, v.annotations);
  Code code = 0, place = 1;
#pragma unroll 2
  for (int64_t m = 0; m < v.layout.channels; ++m) {
    const int digit = digit_of(v.rules, from[m * v.annotations.channel]);
    code += place * static_cast<Code>(here(v, b, m) ? digit : v.rules.classes);
    place *= v.rules.base;
  }
  if (v.extra) {
    const int64_t offset = b * v.extra.batch + offset_at(at, v.extra);
    int64_t value;
    if (v.extra.dtype == DType::i64)
      value = reinterpret_cast<const int64_t*>(v.extra.data)[offset];
    else if (v.extra.dtype == DType::i32)
      value = reinterpret_cast<const int32_t*>(v.extra.data)[offset];
    else
      value = reinterpret_cast<const uint8_t*>(v.extra.data)[offset];
    code += place * static_cast<Code>(digit_of(v.rules, value));
  }
  return code;
}

__global__ void __launch_bounds__(threads, 2) clear_counts(u64* counts, int64_t n) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * threads)
    counts[i] = 0;
}

// A thread per pixel; a block counts in shared memory where the table fits. In most warps all pixels have one
// pattern: those equal to the first lane's are counted in one addition. Reads M B, writes 1 (or 4) B per
// pixel.
template <class T, class Index>
__global__ void __launch_bounds__(threads, 2) count_votes(Votes v, Index* index, int64_t slots, u64* counts) {
  NOISYSEG_SHARED(unsigned, table);
  const bool shared = slots <= most_shared;
  const int64_t pixels = v.layout.pixels();
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int64_t b = blockIdx.y; b < v.layout.batch; b += gridDim.y) {
    u64* const count = counts + b * slots;
    if (shared)
      for (int64_t s = threadIdx.x; s < slots; s += threads) table[s] = 0;
    __syncthreads();
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * threads; first < pixels;
         first += static_cast<int64_t>(gridDim.x) * threads) {
      const int64_t q = first + threadIdx.x;
      int code = -1;
      if (q < pixels) {
        code = code_at<T, int>(v, b, q);
        index[b * pixels + q] = static_cast<Index>(code);
      }
      const int leader = __shfl_sync(all_lanes, code, 0);
      const unsigned same = __ballot_sync(all_lanes, code == leader);
      const unsigned n = lane == 0 ? static_cast<unsigned>(__popc(same)) : 1u;
      if (code >= 0 && (lane == 0 || code != leader)) {
        if (shared)
          atomicAdd(table + code, n);
        else
          atomicAdd(count + code, static_cast<u64>(n));
      }
    }
    __syncthreads();
    if (shared)
      for (int64_t s = threadIdx.x; s < slots; s += threads)
        if (table[s]) atomicAdd(count + s, static_cast<u64>(table[s]));
    __syncthreads();
  }
}

// Reads M B, writes 8 B per pixel.
template <class T>
__global__ void __launch_bounds__(threads, 2) write_codes(Votes v, int64_t* codes) {
  const int64_t pixels = v.layout.pixels();
  for (int64_t b = blockIdx.y; b < v.layout.batch; b += gridDim.y)
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; q < pixels;
         q += static_cast<int64_t>(gridDim.x) * threads)
      codes[b * pixels + q] = code_at<T, int64_t>(v, b, q);
}

// ---- STAPLE ----------------------------------------------------------------------------------------

// One item's memory: the patterns that occur.
struct Em {
  double *weights, *count;   // (slots, classes), (slots)
  double *theta, *expected;  // (M, classes, classes)
  double* prior;             // (classes)
  int32_t* slot;             // (slots)
  uint8_t* digits;           // (slots, M)
};

__host__ __device__ inline int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
__host__ __device__ inline int64_t em_bytes(int64_t slots, int64_t raters, int64_t classes) {
  return rounded(slots * classes * 8) + rounded(slots * 8) + 2 * rounded(raters * classes * classes * 8) +
         rounded(classes * 8) + rounded(slots * 4) + rounded(slots * raters);
}
__device__ inline Em em_at(char* p, int64_t slots, int64_t raters, int64_t classes) {
  Em em;
  em.weights = reinterpret_cast<double*>(p);
  p += rounded(slots * classes * 8);
  em.count = reinterpret_cast<double*>(p);
  p += rounded(slots * 8);
  em.theta = reinterpret_cast<double*>(p);
  p += rounded(raters * classes * classes * 8);
  em.expected = reinterpret_cast<double*>(p);
  p += rounded(raters * classes * classes * 8);
  em.prior = reinterpret_cast<double*>(p);
  p += rounded(classes * 8);
  em.slot = reinterpret_cast<int32_t*>(p);
  p += rounded(slots * 4);
  em.digits = reinterpret_cast<uint8_t*>(p);
  return em;
}

__device__ inline double sum_of_lanes(double x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(all_lanes, x, step);
  return x;
}

struct EmResults {
  double *values, *performance, *sensitivity, *specificity;
  int64_t* labels;
  int32_t* status;
  int64_t channels;
};

// A block for each image, all iterations in it. E-step: a thread per pattern. M-step: a warp for each entry
// of the raters' tables, its lanes along the patterns, so that the order of the sums is fixed. Everything is
// a few kilobytes that stay in L1 and L2. Warfield et al., IEEE TMI 23(7), 2004.
__global__ void __launch_bounds__(em_threads, 1)
    fit_staple(const int64_t* keys, const int64_t* counts, int64_t slots, int raters, VoteRules rules,
               StapleOptions options, const double* prior, int64_t prior_step, char* workspace,
               EmResults to) {
  constexpr int warps = em_threads / 32;
  __shared__ int in_warp[warps];
  const int classes = rules.classes, square = classes * classes;
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t b = blockIdx.x;
  const Em em = em_at(workspace + b * em_bytes(slots, raters, classes), slots, raters, classes);

  // The slots that occur, in their order.
  int64_t used = 0;
  for (int64_t first = 0; first < slots; first += em_threads) {
    const int64_t s = first + threadIdx.x;
    const int64_t n = s < slots ? counts[b * slots + s] : 0;
    const unsigned mine = __ballot_sync(all_lanes, n != 0);
    if (lane == 0) in_warp[warp] = __popc(mine);
    __syncthreads();
    int64_t at = used + __popc(mine & ((1u << lane) - 1u));
    for (int w = 0; w < warps; ++w) {
      if (w < warp) at += in_warp[w];
      used += in_warp[w];
    }
    if (n != 0) {
      int64_t code = keys ? keys[b * slots + s] : s;
      for (int m = 0; m < raters; ++m, code /= rules.base)
        em.digits[at * raters + m] = static_cast<uint8_t>(code % rules.base);
      em.slot[at] = static_cast<int32_t>(s);
      em.count[at] = static_cast<double>(n);
    }
    __syncthreads();
  }

  for (int t = warp; t < classes; t += warps) {
    double sum = 0;
    for (int64_t k = lane; k < used; k += 32)
      for (int m = 0; m < raters; ++m)
        if (em.digits[k * raters + m] == t) sum += em.count[k];
    sum = sum_of_lanes(sum);
    if (lane == 0) em.expected[t] = sum;  // whole numbers: exact in any order
  }
  __syncthreads();
  for (int t = static_cast<int>(threadIdx.x); t < classes; t += em_threads) {
    double votes = 0;
    for (int s = 0; s < classes; ++s) votes += em.expected[s];
    em.prior[t] = prior ? prior[t * prior_step] : votes > 0 ? em.expected[t] / votes : t == 0;
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < used; k += em_threads)
    vote_shares(em.digits + k * raters, raters, classes, em.prior, em.weights + k * classes);
  __syncthreads();

  int64_t iteration = 0;
  bool moving = true;
  for (; iteration < options.max_iter && moving; ++iteration) {
    for (int j = warp; j < raters * square; j += warps) {
      const int m = j / square, t = j / classes % classes, r = j % classes;
      double sum = 0;
      for (int64_t k = lane; k < used; k += 32)
        if (em.digits[k * raters + m] == r) sum += em.count[k] * em.weights[k * classes + t];
      sum = sum_of_lanes(sum);
      if (lane == 0) em.expected[j] = sum;
    }
    __syncthreads();
    bool moved = iteration == 0;
    for (int j = static_cast<int>(threadIdx.x); j < raters * square; j += em_threads) {
      const double share =
          share_of(em.expected + j / classes * classes, classes, j / classes % classes, j % classes);
      if (iteration > 0 && fabs(share - em.theta[j]) > options.tol) moved = true;
      em.theta[j] = share;
    }
    moving = __syncthreads_or(moved);
    for (int64_t k = threadIdx.x; k < used; k += em_threads)
      posterior(em.digits + k * raters, raters, classes, em.prior, em.theta, em.weights + k * classes);
    __syncthreads();
  }

  for (int64_t k = threadIdx.x; k < used; k += em_threads) {
    const double* w = em.weights + k * classes;
    const int64_t at = b * slots + em.slot[k];
    int best = 0;
    for (int t = 1; t < classes; ++t)
      if (w[t] > w[best]) best = t;
    to.labels[at] = best;
    for (int64_t c = 0; c < to.channels; ++c) to.values[at * to.channels + c] = w[to.channels == 1 ? 1 : c];
  }
  for (int j = static_cast<int>(threadIdx.x); j < raters * classes; j += em_threads) {
    const int64_t at = b * raters * classes + j;
    double sensitivity, specificity;
    rates_of(em.expected + j / classes * square, classes, j % classes, &sensitivity, &specificity);
    to.sensitivity[at] = sensitivity;
    to.specificity[at] = specificity;
    for (int r = 0; r < classes; ++r)
      to.performance[at * classes + r] = sensitivity == sensitivity ? em.theta[j * classes + r] : sensitivity;
  }
  if (threadIdx.x == 0) {
    to.status[2 * b] = static_cast<int32_t>(iteration);
    to.status[2 * b + 1] = !moving;
  }
}

// What the table holds for each pixel's slot. Reads 1 (or 4) B, writes the result's bytes per pixel; the
// table stays in L1.
template <class Index, class Value, class Out>
__global__ void __launch_bounds__(threads, 2)
    spread_values(const Index* index, int64_t batch, int64_t pixels, const Value* table, int64_t slots,
                  int64_t channels, Out* out) {
  for (int64_t b = blockIdx.y; b < batch; b += gridDim.y)
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; q < pixels;
         q += static_cast<int64_t>(gridDim.x) * threads) {
      const int64_t slot = static_cast<int64_t>(index[b * pixels + q]);
      for (int64_t c = 0; c < channels; ++c)
        out[(b * channels + c) * pixels + q] = static_cast<Out>(table[(b * slots + slot) * channels + c]);
    }
}

// ---- majority, average -----------------------------------------------------------------------------

// The label of every possible pattern.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    vote_on_patterns(int64_t slots, int raters, VoteRules rules, Tie tie, int64_t tie_value, T* table) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (s < slots) table[s] = static_cast<T>(plurality(s, raters, rules, tie, tie_value));
}

// A thread per pixel. table: from vote_on_patterns, or null for too many patterns. Reads M times, writes once
// the annotations' bytes per pixel.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    vote_on_pixels(Votes v, Tie tie, int64_t tie_value, const T* table, T* out) {
  const int64_t pixels = v.layout.pixels();
  for (int64_t b = blockIdx.y; b < v.layout.batch; b += gridDim.y)
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; q < pixels;
         q += static_cast<int64_t>(gridDim.x) * threads) {
      const int64_t code = code_at<T, int64_t>(v, b, q);
      out[b * pixels + q] =
          table ? table[code] : static_cast<T>(plurality(code, v.layout.channels, v.rules, tie, tie_value));
    }
}

// A thread per pixel and channel, in double. Reads M values, writes one.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    average_votes(Votes v, bool soft, const double* weights, int64_t weight_step0, int64_t weight_step1,
                  int64_t channels, Array out) {
  const int64_t pixels = v.layout.pixels();
  const double missing = static_cast<double>(v.rules.missing);
  for (int64_t item = blockIdx.y; item < v.layout.batch * channels; item += gridDim.y) {
    const int64_t b = item / channels;
    const double channel = static_cast<double>(item % channels);
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; q < pixels;
         q += static_cast<int64_t>(gridDim.x) * threads) {
      const int64_t offset = offset_at(spot_of(v.layout, q), v.annotations) + b * v.annotations.batch;
      const T* from = reinterpret_cast<const T*>(v.annotations.data) + offset;
      double sum = 0, total = 0;
      for (int64_t m = 0; m < v.layout.channels; ++m) {
        const double x = to_real<double>(from[m * v.annotations.channel]);
        bool known = here(v, b, m) && x == x && !(v.rules.has_missing && x == missing);
        if (!v.rules.binary) known = known && x >= 0 && x < v.rules.classes;
        const double value = !v.rules.binary ? x == channel : soft ? x : x != 0;
        const double weight = weights ? weights[b * weight_step0 + m * weight_step1] : 1.0;
        sum += known ? weight * value : 0;
        total += known ? weight : 0;
      }
      sum = total > 0 ? sum / total : 0;
      if (out.dtype == DType::f32)
        static_cast<float*>(out.data)[item * pixels + q] = static_cast<float>(sum);
      else
        static_cast<double*>(out.data)[item * pixels + q] = sum;
    }
  }
}

// CASE(type) for a label type.
#define NOISYSEG_LABEL_CASES(dtype, CASE) \
  switch (dtype) {                        \
    case DType::i32: CASE(int32_t) break; \
    case DType::i64: CASE(int64_t) break; \
    default: CASE(uint8_t) break;         \
  }

template <class Index>
void spread_all(const Array& index, const Array& values, const Array& out, const Array& labels,
                const Array& labels_out, const Exec& exec) {
  const int64_t batch = index.shape[0], pixels = index.shape[1];
  const dim3 grid = grid_of(batch, pixels);
  const Index* from = static_cast<const Index*>(index.data);
  if (values) {
    const double* table = static_cast<const double*>(values.data);
    if (out.dtype == DType::f32)
      NOISYSEG_LAUNCH((spread_values<Index, double, float>), grid, threads, 0, exec, from, batch, pixels,
                      table, values.shape[1], values.shape[2], static_cast<float*>(out.data));
    else
      NOISYSEG_LAUNCH((spread_values<Index, double, double>), grid, threads, 0, exec, from, batch, pixels,
                      table, values.shape[1], values.shape[2], static_cast<double*>(out.data));
  }
  if (!labels) return;
  const int64_t* table = static_cast<const int64_t*>(labels.data);
#define CASE(T)                                                                                           \
  NOISYSEG_LAUNCH((spread_values<Index, int64_t, T>), grid, threads, 0, exec, from, batch, pixels, table, \
                  labels.shape[1], int64_t{1}, static_cast<T*>(labels_out.data));
  NOISYSEG_LABEL_CASES(labels_out.dtype, CASE)
#undef CASE
}

}  // namespace

size_t vote_patterns_workspace(int64_t, const Exec&) { return 0; }

bool vote_patterns(const Array& annotations, const Array& extra, const Array& present,
                   const VoteOptions& options, const Array& index, const Array& keys, const Array& counts,
                   void*, const Exec& exec) {
  if (keys) throw std::invalid_argument("keys are for the CPU; use vote_codes");
  const DeviceGuard guard(exec.device);
  const Votes v = votes_of(annotations, extra, present, options);
  formulas::check_patterns(v.rules, v.layout.channels + (extra ? 1 : 0));
  const int64_t slots = counts.shape[1], pixels = v.layout.pixels();
  u64* const count = static_cast<u64*>(counts.data);
  NOISYSEG_LAUNCH((clear_counts), grid_of(1, counts.size()), threads, 0, exec, count, counts.size());
  const dim3 grid = grid_of(v.layout.batch, pixels);
  const size_t shared = slots <= most_shared ? static_cast<size_t>(slots) * 4 : 0;
#define CASE(T)                                                                \
  if (index.dtype == DType::u8)                                                \
    NOISYSEG_LAUNCH((count_votes<T, uint8_t>), grid, threads, shared, exec, v, \
                    static_cast<uint8_t*>(index.data), slots, count);          \
  else                                                                         \
    NOISYSEG_LAUNCH((count_votes<T, int32_t>), grid, threads, shared, exec, v, \
                    static_cast<int32_t*>(index.data), slots, count);
  NOISYSEG_LABEL_CASES(annotations.dtype, CASE)
#undef CASE
  return true;
}

void vote_codes(const Array& annotations, const Array& extra, const Array& present,
                const VoteOptions& options, const Array& codes, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Votes v = votes_of(annotations, extra, present, options);
  formulas::check_patterns(v.rules, v.layout.channels + (extra ? 1 : 0));
#define CASE(T)                                                                                      \
  NOISYSEG_LAUNCH((write_codes<T>), grid_of(v.layout.batch, v.layout.pixels()), threads, 0, exec, v, \
                  static_cast<int64_t*>(codes.data));
  NOISYSEG_LABEL_CASES(annotations.dtype, CASE)
#undef CASE
}

size_t staple_workspace(int64_t batch, int64_t slots, int64_t raters, int classes, const Exec&) {
  return static_cast<size_t>(batch * em_bytes(slots, raters, classes));
}

void staple(const Array& keys, const Array& counts, int64_t raters, const VoteOptions& options,
            const StapleOptions& em, const Array& prior, const Array& values, const Array& labels,
            const Array& performance, const Array& sensitivity, const Array& specificity, const Array& status,
            void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const EmResults to = {static_cast<double*>(values.data),
                        static_cast<double*>(performance.data),
                        static_cast<double*>(sensitivity.data),
                        static_cast<double*>(specificity.data),
                        static_cast<int64_t*>(labels.data),
                        static_cast<int32_t*>(status.data),
                        values.shape[2]};
  NOISYSEG_LAUNCH((fit_staple), dim3(static_cast<unsigned>(counts.shape[0])), em_threads, 0, exec,
                  static_cast<const int64_t*>(keys.data), static_cast<const int64_t*>(counts.data),
                  counts.shape[1], static_cast<int>(raters), rules_of(options), em,
                  static_cast<const double*>(prior.data), prior ? prior.strides[0] : 0,
                  static_cast<char*>(workspace), to);
}

void spread(const Array& index, const Array& values, const Array& out, const Array& labels,
            const Array& labels_out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  if (index.dtype == DType::u8)
    spread_all<uint8_t>(index, values, out, labels, labels_out, exec);
  else
    spread_all<int32_t>(index, values, out, labels, labels_out, exec);
}

size_t majority_vote_workspace(int64_t slots) { return static_cast<size_t>(slots * 8); }

void majority_vote(const Array& annotations, const Array& present, const VoteOptions& options, Tie tie,
                   int64_t tie_value, int64_t slots, const Array& out, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Votes v = votes_of(annotations, {}, present, options);
  formulas::check_patterns(v.rules, v.layout.channels);
#define CASE(T)                                                                                              \
  {                                                                                                          \
    T* const table = slots ? static_cast<T*>(workspace) : nullptr;                                           \
    if (slots)                                                                                               \
      NOISYSEG_LAUNCH((vote_on_patterns<T>), dim3(static_cast<unsigned>((slots + threads - 1) / threads)),   \
                      threads, 0, exec, slots, static_cast<int>(v.layout.channels), v.rules, tie, tie_value, \
                      table);                                                                                \
    NOISYSEG_LAUNCH((vote_on_pixels<T>), grid_of(v.layout.batch, v.layout.pixels()), threads, 0, exec, v,    \
                    tie, tie_value, static_cast<const T*>(table), static_cast<T*>(out.data));                \
  }
  NOISYSEG_LABEL_CASES(annotations.dtype, CASE)
#undef CASE
}

void soft_average(const Array& annotations, const Array& present, const Array& weights,
                  const VoteOptions& options, const Array& out, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Votes v = votes_of(annotations, {}, present, options);
  const int64_t channels = options.binary ? 1 : options.classes;
  const dim3 grid = grid_of(v.layout.batch * channels, v.layout.pixels());
#define CASE(T)                                                                                   \
  NOISYSEG_LAUNCH((average_votes<T>), grid, threads, 0, exec, v, annotations.dtype >= DType::f16, \
                  static_cast<const double*>(weights.data), weights ? weights.strides[0] : 0,     \
                  weights ? weights.strides[1] : 0, channels, out);
  NOISYSEG_DTYPE_CASES(annotations.dtype, CASE)
#undef CASE
}

}  // namespace noisyseg::cuda
