// Order statistics and confident learning on CUDA, by counting digits, without waiting for the device: for
// each digit a pass over the pixels counts (integer atomics, so in any order) and a small kernel looks the
// wanted one up. What is found early lets the later passes return at once. Bytes per pixel: 4 in each of
// three passes for float, and 1 written for a mask; confident learning reads probabilities and label in two
// passes for the joint, three or four for the digits (one more where values tie) and a last one, which writes
// 1 B.
#include "cuda/launch.h"
#include "formulas/pixels.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;
using u64 = unsigned long long;

constexpr int threads = 256, warps = threads / 32;
constexpr int per_thread = 4;  // pixels whose loads are in flight
constexpr int64_t tile = threads * per_thread;
constexpr int64_t most_blocks = 2048, most_items = 65535;
constexpr int64_t most_shared = 48 << 10;  // bytes of tables that are counted in shared memory
constexpr int most_targets = 2 * Quantiles::most;
constexpr unsigned all_lanes = 0xffffffffu;

// Blocks along x for the pixels of each of `items`; the second index is the item.
dim3 grid_of(int64_t items, int64_t pixels, int64_t per_block) {
  const int64_t y = items < most_items ? items : most_items;
  const int64_t wanted = (most_blocks + y - 1) / y, blocks = (pixels + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < wanted ? blocks : wanted), static_cast<unsigned>(y));
}
dim3 line_of(int64_t n) {
  const int64_t blocks = (n + threads - 1) / threads;
  return dim3(static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks));
}

__device__ inline int64_t offset_at(const Layout& layout, const Plane& plane, int64_t q) {
  if (layout.extent[0] * layout.extent[1] == 1) return q * plane.step[2];
  const int64_t row = q / layout.extent[2];
  return row / layout.extent[1] * plane.step[0] + row % layout.extent[1] * plane.step[1] +
         (q - row * layout.extent[2]) * plane.step[2];
}

// ---- the search ------------------------------------------------------------------------------------

struct Search {
  Digits digits;
  int64_t rows, bins;
  int targets;     // of each row
  Target* target;  // (rows, targets)
  u64* counts;     // (rows, targets, bins)
  int64_t* valid;  // (rows)
  double* q;       // of the quantiles: an index into a kernel's argument would copy it to local memory
};

Search search_at(const Digits& digits, int64_t rows, int targets, Room& room) {
  Search s{digits, rows, int64_t{1} << digits.width, targets, nullptr, nullptr, nullptr, nullptr};
  s.target = room.take<Target>(rows * targets);
  s.counts = room.take<u64>(rows * targets * s.bins);
  s.valid = room.take<int64_t>(rows);
  s.q = room.take<double>(Quantiles::most);
  return s;
}

// Every target at its start; none where `wanted` is given and not positive.
__global__ void __launch_bounds__(threads, 2)
    begin_search(Search s, Quantiles quantiles, const int64_t* wanted) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads, n = s.rows * s.targets;
  for (int64_t i = first; i < n; i += step) {
    Target t{0, 0, 0, 0, 1};
    if (wanted && wanted[i] < 1) find_none(t);
    s.target[i] = t;
  }
  for (int64_t i = first; i < n * s.bins; i += step) s.counts[i] = 0;
  if (first != 0) return;
#pragma unroll
  for (int i = 0; i < Quantiles::most; ++i) s.q[i] = quantiles.q[i];
}

// Adds 1 to each lane's digit, none where it is negative. The lanes that have the first one's are counted in
// one addition: values are often alike.
template <class Count>
__device__ inline void add_digit(Count* table, int64_t digit) {
  const unsigned some = __ballot_sync(all_lanes, digit >= 0);
  if (some == 0) return;
  const int leader = __ffs(static_cast<int>(some)) - 1;
  const int64_t first = __shfl_sync(all_lanes, digit, leader);
  const unsigned same = __ballot_sync(all_lanes, digit == first);
  if (digit < 0) return;
  if (digit != first)
    atomicAdd(table + digit, Count{1});
  else if (static_cast<int>(threadIdx.x & 31) == leader)
    atomicAdd(table + first, static_cast<Count>(__popc(same)));
}

// After a pass, a block for each row: the next digit of each target from the counts, which it clears.
__global__ void __launch_bounds__(threads, 2) narrow(Search s, Step step, Wanted wanted, bool to_choose) {
  __shared__ int64_t of_warp[warps];
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t per = (s.bins + threads - 1) / threads, first = threadIdx.x * per;
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    Target* const target = s.target + row * s.targets;
    u64* const counts = s.counts + row * s.targets * s.bins;
    for (int r = 0; r < s.targets; ++r) {
      Target t = target[r];
      if (!t.open) continue;
      const u64* const count = counts + t.slot * s.bins;
      int64_t mine = 0;
      for (int64_t d = first; d < first + per && d < s.bins; ++d) mine += static_cast<int64_t>(count[d]);
      int64_t through = mine;  // of the bins up to this thread's
      for (int delta = 1; delta < 32; delta *= 2) {
        const int64_t left = __shfl_up_sync(all_lanes, through, delta);
        if (lane >= delta) through += left;
      }
      if (lane == 31) of_warp[warp] = through;
      __syncthreads();
      int64_t total = 0;
      for (int w = 0; w < warps; ++w) {
        if (w < warp) through += of_warp[w];
        total += of_warp[w];
      }
      if (step.first) {
        t.rank = first_rank(wanted, row, r, total);
        if (threadIdx.x == 0) s.valid[row] = total;
      }
      if (t.rank < 0) {
        if (threadIdx.x == 0) {
          find_none(t);
          target[r] = t;
        }
      } else if (t.rank < through && t.rank >= through - mine) {
        int64_t before = through - mine, d = first;
        while (before + static_cast<int64_t>(count[d]) <= t.rank) before += static_cast<int64_t>(count[d++]);
        advance(t, step, static_cast<int>(d), before, static_cast<int64_t>(count[d]), to_choose);
        target[r] = t;
      }
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < s.targets * s.bins; i += threads) counts[i] = 0;
    __syncthreads();  // whoever found all closed may still read
    if (threadIdx.x == 0)
      for (int r = 0; r < s.targets; ++r) {
        int l = 0;
        while (target[l].key != target[r].key || target[l].open != target[r].open) ++l;
        target[r].slot = l;
      }
    __syncthreads();
  }
}

struct Rows {
  Layout layout;
  Plane values, mask;
};
Rows rows_of(const Array& values, const Array& mask) {
  if (values.dtype < DType::f16) throw std::invalid_argument("values must have a floating-point dtype");
  const Array arrays[2] = {values, mask};
  Plane planes[2];
  Rows rows;
  rows.layout = make_layout(arrays, planes, 2);
  rows.values = planes[0];
  rows.mask = planes[1];
  return rows;
}

__device__ inline bool is_inside(const Rows& rows, int64_t row, int64_t q) {
  if (!rows.mask) return true;
  const int64_t offset = row * rows.mask.batch + offset_at(rows.layout, rows.mask, q);
#define CASE(T) return to_real<float>(reinterpret_cast<const T*>(rows.mask.data)[offset]) != 0;
  NOISYSEG_DTYPE_CASES(rows.mask.dtype, CASE)
#undef CASE
  return true;
}

template <class T>
__device__ inline typename KeyOf<T>::Key key_at(const Rows& rows, int64_t row, int64_t q,
                                                typename KeyOf<T>::Key flip) {
  using Key = typename KeyOf<T>::Key;
  const T x = reinterpret_cast<const T*>(
      rows.values.data)[row * rows.values.batch + offset_at(rows.layout, rows.values, q)];
  return is_inside(rows, row, q) ? key_of(x, flip) : no_key<Key>(KeyOf<T>::bits);
}

// A digit of each row's values, for each of its targets that has digits of its own. Tables in shared memory.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    count_values(Rows rows, Search s, Step step, typename KeyOf<T>::Key flip) {
  using Key = typename KeyOf<T>::Key;
  NOISYSEG_SHARED(unsigned, table);  // (targets, bins)
  __shared__ Target kept[most_targets];
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t pixels = rows.layout.pixels();
  for (int64_t row = blockIdx.y; row < s.rows; row += gridDim.y) {
    bool open = false;
    if (static_cast<int>(threadIdx.x) < s.targets) {
      kept[threadIdx.x] = s.target[row * s.targets + threadIdx.x];
      open = kept[threadIdx.x].open;
    }
    for (int64_t i = threadIdx.x; i < s.targets * s.bins; i += threads) table[i] = 0;
    if (!__syncthreads_or(open)) continue;
    for (int64_t first = blockIdx.x * tile; first < pixels; first += gridDim.x * tile) {
      if (s.targets == 1 && !may_hold(step, kept[0], first, tile)) continue;
      Key keys[per_thread];
#pragma unroll
      for (int k = 0; k < per_thread; ++k) {
        const int64_t q = first + k * threads + threadIdx.x;
        keys[k] = q < pixels ? key_at<T>(rows, row, q, flip) : none;
      }
      for (int r = 0; r < s.targets; ++r) {
        if (!kept[r].open || kept[r].slot != r) continue;
        const Target t = kept[r];
#pragma unroll
        for (int k = 0; k < per_thread; ++k)
          add_digit(table + r * s.bins, digit_of(step, t, keys[k], first + k * threads + threadIdx.x, none));
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < s.targets * s.bins; i += threads)
      if (table[i]) atomicAdd(s.counts + row * s.targets * s.bins + i, static_cast<u64>(table[i]));
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 2)
    write_quantiles(Search s, int count, Interpolation rule, T* out) {
  const int64_t n = s.rows * count;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; k < n;
       k += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t i = k / s.rows, row = k % s.rows;
    const Target* const t = s.target + row * s.targets + 2 * i;
    T low, high;
    value_of(t[0].key, low);
    value_of(t[1].key, high);
    const double x =
        t->rank < 0 ? static_cast<double>(NAN)
                    : interpolate(rule, s.q[i], s.valid[row], to_real<double>(low), to_real<double>(high));
    assign(out[k], x);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 2)
    write_thresholds(Search s, typename KeyOf<T>::Key flip, T* out) {
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; row < s.rows;
       row += static_cast<int64_t>(gridDim.x) * threads) {
    T x;
    value_of(s.target[row].key ^ flip, x);
    if (s.target[row].rank < 0) assign(x, static_cast<float>(NAN));
    out[row] = x;
  }
}

// Where the values are among the first k. Reads the values, writes 1 B per pixel.
template <class T>
__global__ void __launch_bounds__(threads, 2)
    write_chosen(Rows rows, Search s, typename KeyOf<T>::Key flip, uint8_t* out) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t pixels = rows.layout.pixels();
  for (int64_t row = blockIdx.y; row < s.rows; row += gridDim.y) {
    const Target t = s.target[row];
    for (int64_t q = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; q < pixels;
         q += static_cast<int64_t>(gridDim.x) * threads)
      out[row * pixels + q] = is_in(t, key_at<T>(rows, row, q, flip), q, none);
  }
}

template <class T>
void search(const Rows& rows, const Search& s, const Quantiles& quantiles, const Wanted& wanted,
            bool to_choose, typename KeyOf<T>::Key flip, const Exec& exec) {
  NOISYSEG_LAUNCH((begin_search), line_of(s.rows * s.targets * s.bins), threads, 0, exec, s, quantiles,
                  static_cast<const int64_t*>(nullptr));
  const dim3 grid = grid_of(s.rows, rows.layout.pixels(), tile);
  const size_t shared = static_cast<size_t>(s.targets * s.bins) * sizeof(unsigned);
  const int steps = to_choose ? s.digits.steps() : s.digits.key_steps();
  for (int i = 0; i < steps; ++i) {
    const Step step = s.digits.step(i);
    NOISYSEG_LAUNCH((count_values<T>), grid, threads, shared, exec, rows, s, step, flip);
    NOISYSEG_LAUNCH((narrow), line_of(s.rows * threads), threads, 0, exec, s, step, wanted, to_choose);
  }
}

// ---- confident learning ----------------------------------------------------------------------------

struct Labelled {
  Layout layout;
  Plane p, label;
  int classes;
};
Labelled labelled_of(const Array& p, const Array& label) {
  check_probabilities(p);
  const Array arrays[2] = {p, label};
  Plane planes[2];
  Labelled x;
  x.layout = make_layout(arrays, planes, 2);
  x.p = planes[0];
  x.label = planes[1];
  x.classes = static_cast<int>(x.layout.channels);
  return x;
}

struct Confident {
  int classes;
  int64_t *sums, *counts, *numbers;  // (C, 3), (C, C), (C, C)
  double* threshold;                 // (C)
  Search search;                     // a row for each pair of classes
  size_t bytes;
};
Confident confident_at(const Array& p, void* workspace) {
  Room room{static_cast<char*>(workspace)};
  Confident c;
  c.classes = static_cast<int>(p.shape[1]);
  const int64_t squares = static_cast<int64_t>(c.classes) * c.classes;
  c.sums = room.take<int64_t>(c.classes * 3);
  c.counts = room.take<int64_t>(squares);
  c.numbers = room.take<int64_t>(squares);
  c.threshold = room.take<double>(c.classes);
  const DType dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  c.search = search_at(digits_of(dtype, p.size() / (c.classes ? c.classes : 1), squares), squares, 1, room);
  c.bytes = room.bytes;
  return c;
}

// What is computed in: float, or double for double probabilities.
template <class From>
struct ComputedIn {
  using T = float;
};
template <>
struct ComputedIn<double> {
  using T = double;
};

// One pixel: its label, -1 where it is none or a probability is NaN, and the label's probability.
template <class From>
struct Pixel {
  using T = typename ComputedIn<From>::T;
  const From* p;
  int64_t step;
  int given;
  T own;
  __device__ T operator()(int c) const { return to_real<T>(p[c * step]); }
};
template <class From>
__device__ inline Pixel<From> pixel_at(const Labelled& x, int64_t place) {
  using T = typename Pixel<From>::T;
  const int64_t pixels = x.layout.pixels();
  const int64_t b = x.layout.batch == 1 ? 0 : place / pixels, q = place - b * pixels;
  Pixel<From> pixel;
  pixel.p = reinterpret_cast<const From*>(x.p.data) + b * x.p.batch + offset_at(x.layout, x.p, q);
  pixel.step = x.p.channel;
  const int64_t offset = b * x.label.batch + offset_at(x.layout, x.label, q);
  int64_t label;
  if (x.label.dtype == DType::i64)
    label = reinterpret_cast<const int64_t*>(x.label.data)[offset];
  else if (x.label.dtype == DType::i32)
    label = reinterpret_cast<const int32_t*>(x.label.data)[offset];
  else
    label = reinterpret_cast<const uint8_t*>(x.label.data)[offset];
  pixel.given = label >= 0 && label < x.classes ? static_cast<int>(label) : -1;
  pixel.own = T(0);
  bool bad = false;
  for (int c = 0; c < x.classes; ++c) {
    const T p = pixel(c);
    bad |= p != p;
    if (c == pixel.given) pixel.own = p;
  }
  if (bad) pixel.given = -1;
  return pixel;
}

__device__ inline void add_sums(u64* sums, int given, int64_t high, int64_t low, int64_t n) {
  if (n == 0) return;
  atomicAdd(sums + 3 * given, static_cast<u64>(high));
  atomicAdd(sums + 3 * given + 1, static_cast<u64>(low));
  atomicAdd(sums + 3 * given + 2, static_cast<u64>(n));
}

__global__ void __launch_bounds__(threads, 2) clear_joint(Confident c, int64_t* counts) {
  const int squares = c.classes * c.classes;
  for (int i = static_cast<int>(blockIdx.x * threads + threadIdx.x); i < squares;
       i += static_cast<int>(gridDim.x) * threads)
    counts[i] = 0;
  for (int i = static_cast<int>(threadIdx.x); blockIdx.x == 0 && i < 3 * c.classes; i += threads)
    c.sums[i] = 0;
}

// A thread per pixel: the labels' own probabilities as whole numbers, added by class; a thread adds to shared
// memory when the class changes. Dynamic shared memory: (C, 3) sums.
template <class From>
__global__ void __launch_bounds__(threads, 2) sum_labels(Labelled x, Confident c) {
  NOISYSEG_SHARED(u64, sums);
  for (int i = static_cast<int>(threadIdx.x); i < 3 * c.classes; i += threads) sums[i] = 0;
  __syncthreads();
  const int64_t places = x.layout.batch * x.layout.pixels();
  int64_t high = 0, low = 0, n = 0;
  int now = -1;
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; place < places;
       place += static_cast<int64_t>(gridDim.x) * threads) {
    const Pixel<From> pixel = pixel_at<From>(x, place);
    if (pixel.given < 0) continue;
    if (pixel.given != now) {
      add_sums(sums, now, high, low, n);
      high = low = n = 0;
      now = pixel.given;
    }
    const Fixed p = fixed_of(pixel.own);
    high += p.high;
    low += p.low;
    ++n;
  }
  add_sums(sums, now, high, low, n);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 3 * c.classes; i += threads)
    if (sums[i]) atomicAdd(reinterpret_cast<u64*>(c.sums) + i, sums[i]);
}

__global__ void __launch_bounds__(threads, 1) find_thresholds(Confident c) {
  for (int k = static_cast<int>(threadIdx.x); k < c.classes; k += threads)
    c.threshold[k] = threshold_of(c.sums + 3 * k);
}

// A thread per pixel: its label and the class that it is confidently of, counted.
template <class From>
__global__ void __launch_bounds__(threads, 2) count_joint(Labelled x, Confident c, int64_t* counts) {
  const int64_t places = x.layout.batch * x.layout.pixels();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * threads; first < places;
       first += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t place = first + threadIdx.x;
    int64_t pair = -1;
    if (place < places) {
      const Pixel<From> pixel = pixel_at<From>(x, place);
      int reached = 0, guess = 0, best = 0;
      typename Pixel<From>::T most = -INFINITY;
      for (int k = 0; k < x.classes; ++k) {
        const auto p = pixel(k);
        if (static_cast<double>(p) >= c.threshold[k]) guess = reached++ ? guess : k;
        if (p > most) most = p, best = k;
      }
      if (pixel.given >= 0 && reached)
        pair = static_cast<int64_t>(pixel.given) * x.classes + (reached > 1 ? best : guess);
    }
    add_digit(reinterpret_cast<u64*>(counts), pair);
  }
}

// A thread per class.
__global__ void __launch_bounds__(threads, 1) raise_diagonal(Confident c, int64_t* counts) {
  for (int k = static_cast<int>(threadIdx.x); k < c.classes; k += threads)
    if (counts[k * (c.classes + 1)] < 1) counts[k * (c.classes + 1)] = 1;
}
__global__ void __launch_bounds__(threads, 1) find_numbers(Confident c, Prune prune) {
  for (int k = static_cast<int>(threadIdx.x); k < c.classes; k += threads)
    numbers_of_row(c.counts + k * c.classes, c.sums[3 * k + 2], k, c.classes, prune,
                   c.numbers + k * c.classes);
}

// A thread per pixel, a digit for each search that it takes part in: the pixels labelled i are sought by p_i
// - p_j for each other class j, and by p_i, from the smallest. Tables in shared memory where they fit.
template <class From>
__global__ void __launch_bounds__(threads, 2) count_margins(Labelled x, Confident c, Step step, bool shared) {
  using T = typename Pixel<From>::T;
  using Key = typename KeyOf<T>::Key;
  NOISYSEG_SHARED(unsigned, table);  // (C, C, bins)
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t squares = c.search.rows, bins = c.search.bins, places = x.layout.batch * x.layout.pixels();
  bool open = false;
  for (int64_t i = threadIdx.x; i < squares; i += threads) open |= c.search.target[i].open != 0;
  if (shared)
    for (int64_t i = threadIdx.x; i < squares * bins; i += threads) table[i] = 0;
  if (!__syncthreads_or(open)) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * threads; first < places;
       first += static_cast<int64_t>(gridDim.x) * threads) {
    const int64_t place = first + threadIdx.x;
    Pixel<From> pixel{nullptr, 0, -1, T(0)};
    if (place < places) pixel = pixel_at<From>(x, place);
    for (int j = 0; j < x.classes; ++j) {
      int64_t at = -1;
      if (pixel.given >= 0) {
        const int64_t pair = static_cast<int64_t>(pixel.given) * x.classes + j;
        const Target t = c.search.target[pair];
        const Key key = key_of(pixel.own - (pixel.given == j ? T(0) : pixel(j)), Key(0));
        const int digit = t.open ? digit_of(step, t, key, place, none) : -1;
        if (digit >= 0) at = pair * bins + digit;
      }
      if (shared)
        add_digit(table, at);
      else
        add_digit(c.search.counts, at);
    }
  }
  __syncthreads();
  if (shared)
    for (int64_t i = threadIdx.x; i < squares * bins; i += threads)
      if (table[i]) atomicAdd(c.search.counts + i, static_cast<u64>(table[i]));
}

// A thread per pixel. Reads probabilities and label, writes 1 B.
template <class From>
__global__ void __launch_bounds__(threads, 2)
    write_errors(Labelled x, Confident c, Prune prune, uint8_t* wrong) {
  using T = typename Pixel<From>::T;
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t places = x.layout.batch * x.layout.pixels();
  for (int64_t place = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; place < places;
       place += static_cast<int64_t>(gridDim.x) * threads) {
    const Pixel<From> pixel = pixel_at<From>(x, place);
    bool by_class = false, by_rate = false;
    int best = 0;
    T most = -INFINITY;
    for (int j = 0; j < x.classes && pixel.given >= 0; ++j) {
      const bool mine = j == pixel.given;
      const T p = pixel(j), believed = mine ? p + T(tolerance) : p;
      if (believed > most) most = believed, best = j;
      const Target t = c.search.target[static_cast<int64_t>(pixel.given) * x.classes + j];
      const bool in = is_in(t, key_of(pixel.own - (mine ? T(0) : p), Key(0)), place, none);
      by_class |= mine && in;
      by_rate |= !mine && in;
    }
    const bool chosen = prune == Prune::both       ? by_class && by_rate
                        : prune == Prune::by_class ? by_class
                                                   : by_rate;
    wrong[place] = chosen && best != pixel.given && c.sums[3 * pixel.given + 2] > 1;
  }
}

template <class From>
void find_joint(const Labelled& x, const Confident& c, int64_t* counts, const Exec& exec) {
  const dim3 grid = grid_of(1, x.layout.batch * x.layout.pixels(), threads);
  NOISYSEG_LAUNCH((clear_joint), line_of(c.search.rows), threads, 0, exec, c, counts);
  NOISYSEG_LAUNCH((sum_labels<From>), grid, threads, static_cast<size_t>(c.classes) * 24, exec, x, c);
  NOISYSEG_LAUNCH((find_thresholds), 1, threads, 0, exec, c);
  NOISYSEG_LAUNCH((count_joint<From>), grid, threads, 0, exec, x, c, counts);
  NOISYSEG_LAUNCH((raise_diagonal), 1, threads, 0, exec, c, counts);
}

template <class From>
void find_errors(const Labelled& x, const Confident& c, Prune prune, uint8_t* wrong, const Exec& exec) {
  const dim3 grid = grid_of(1, x.layout.batch * x.layout.pixels(), threads);
  const Search& s = c.search;
  find_joint<From>(x, c, c.counts, exec);
  NOISYSEG_LAUNCH((find_numbers), 1, threads, 0, exec, c, prune);
  NOISYSEG_LAUNCH((begin_search), line_of(s.rows * s.bins), threads, 0, exec, s, Quantiles{},
                  static_cast<const int64_t*>(c.numbers));
  const int64_t bytes = s.rows * s.bins * static_cast<int64_t>(sizeof(unsigned));
  const bool shared = bytes <= most_shared;
  for (int i = 0; i < s.digits.steps(); ++i) {
    const Step step = s.digits.step(i);
    NOISYSEG_LAUNCH((count_margins<From>), grid, threads, shared ? static_cast<size_t>(bytes) : 0, exec, x, c,
                    step, shared);
    NOISYSEG_LAUNCH((narrow), line_of(s.rows * threads), threads, 0, exec, s, step,
                    (Wanted{nullptr, c.numbers, 0}), true);
  }
  NOISYSEG_LAUNCH((write_errors<From>), grid, threads, 0, exec, x, c, prune, wrong);
}

}  // namespace

size_t selection_workspace(const Array& values, int targets, const Exec&) {
  Room room{nullptr};
  const int64_t rows = values.shape[0];
  search_at(digits_of(values.dtype, values.size() / (rows ? rows : 1), targets), rows, targets, room);
  return room.bytes;
}

void quantile(const Array& values, const Array& mask, const Quantiles& quantiles, const Array& out,
              void* workspace, const Exec& exec) {
  if (quantiles.count < 1 || quantiles.count > Quantiles::most)
    throw std::invalid_argument("there must be 1 to 8 quantiles");
  const DeviceGuard guard(exec.device);
  const Rows rows = rows_of(values, mask);
  Room room{static_cast<char*>(workspace)};
  const int targets = 2 * quantiles.count;
  const Search s =
      search_at(digits_of(values.dtype, rows.layout.pixels(), targets), rows.layout.batch, targets, room);
#define CASE(T)                                                                                   \
  {                                                                                               \
    search<T>(rows, s, quantiles, Wanted{s.q, nullptr, 0}, false, 0, exec);                       \
    NOISYSEG_LAUNCH((write_quantiles<T>), line_of(s.rows * quantiles.count), threads, 0, exec, s, \
                    quantiles.count, quantiles.rule, static_cast<T*>(out.data));                  \
  }
  NOISYSEG_FLOAT_CASES(values.dtype, CASE)
#undef CASE
}

void top_k(const Array& values, const Array& mask, const Array& counts, const TopK& options,
           const Array& threshold, const Array& chosen, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Rows rows = rows_of(values, mask);
  Room room{static_cast<char*>(workspace)};
  const Search s = search_at(digits_of(values.dtype, rows.layout.pixels(), 1), rows.layout.batch, 1, room);
  const Wanted wanted{nullptr, static_cast<const int64_t*>(counts.data), options.k};
#define CASE(T)                                                                                            \
  {                                                                                                        \
    using Key = KeyOf<T>::Key;                                                                             \
    const Key flip = options.largest ? no_key<Key>(KeyOf<T>::bits) : Key(0);                               \
    if (threshold) {                                                                                       \
      search<T>(rows, s, Quantiles{}, wanted, false, flip, exec);                                          \
      NOISYSEG_LAUNCH((write_thresholds<T>), line_of(s.rows), threads, 0, exec, s, flip,                   \
                      static_cast<T*>(threshold.data));                                                    \
    }                                                                                                      \
    if (chosen) {                                                                                          \
      search<T>(rows, s, Quantiles{}, wanted, true, flip, exec);                                           \
      NOISYSEG_LAUNCH((write_chosen<T>), grid_of(s.rows, rows.layout.pixels(), threads), threads, 0, exec, \
                      rows, s, flip, static_cast<uint8_t*>(chosen.data));                                  \
    }                                                                                                      \
  }
  NOISYSEG_FLOAT_CASES(values.dtype, CASE)
#undef CASE
}

size_t confident_workspace(const Array& p, const Exec&) {
  check_probabilities(p);
  return confident_at(p, nullptr).bytes;
}

void confident_joint(const Array& p, const Array& label, const Array& counts, void* workspace,
                     const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Labelled x = labelled_of(p, label);
  const Confident c = confident_at(p, workspace);
#define CASE(T) find_joint<T>(x, c, static_cast<int64_t*>(counts.data), exec);
  NOISYSEG_FLOAT_CASES(p.dtype, CASE)
#undef CASE
}

void label_errors(const Array& p, const Array& label, Prune prune, const Array& wrong, void* workspace,
                  const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const Labelled x = labelled_of(p, label);
  const Confident c = confident_at(p, workspace);
#define CASE(T) find_errors<T>(x, c, prune, static_cast<uint8_t*>(wrong.data), exec);
  NOISYSEG_FLOAT_CASES(p.dtype, CASE)
#undef CASE
}

}  // namespace noisyseg::cuda
