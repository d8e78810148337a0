// Order statistics and confident learning on the CPU, by counting digits. Compiled with -ffp-contract=off, so
// that every instruction set gives the same bits. Each pass reads the values once (4 B for float); three find
// any float, one writes a mask. Confident learning reads probabilities and labels in two passes for the
// joint, three or four for the digits (one more where values tie) and a last one, which writes 1 B per pixel.
#include "formulas/pixels.h"

#include <cstring>

#include "cpu/planes.h"

#pragma GCC diagnostic ignored \
    "-Wmaybe-uninitialized"  // of make_layout's strides: every given array's are set

namespace noisyseg::NOISYSEG_ISA {
namespace {

constexpr int block = block_pixels;
constexpr int copies = 4;  // of each count: neighbours of one value need not wait for each other's addition
constexpr int64_t least_slice = 1 << 16, most_slice = 1 << 30;  // pixels; counts of a slice have 32 bits

int most_threads(const Exec& exec) { return threads_for(exec, int64_t{1} << 40); }

// f(row, first pixel, end, worker) for slices of all rows, in parallel.
template <class F>
void for_slices(int64_t rows, int64_t pixels, const Exec& exec, int64_t work, const F& f) {
  if (rows < 1) return;
  const int threads = threads_for(exec, rows * pixels * work);
  int64_t slices = smaller(pixels / least_slice, (4 * threads + rows - 1) / rows);
  if (threads == 1 || slices < 1) slices = 1;
  if (slices * most_slice < pixels) slices = (pixels + most_slice - 1) / most_slice;
  const int64_t size = (pixels + slices * block - 1) / (slices * block) * block;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < rows * slices; ++i) {
    int worker = 0;
#ifdef _OPENMP
    worker = omp_get_thread_num();
#endif
    const int64_t first = i % slices * size;
    if (first < pixels) f(i / slices, first, smaller(first + size, pixels), worker);
  }
}

void add(int64_t& sum, int64_t x) {
#pragma omp atomic
  sum += x;
}

// ---- the search ------------------------------------------------------------------------------------

struct Search {
  Digits digits;
  int64_t rows, bins;
  int targets;      // of each row
  Target* target;   // (rows, targets)
  int64_t* counts;  // (rows, targets, bins)
  int64_t* valid;   // (rows)

  Search(const Digits& d, int64_t n, int per_row, Room& room)
      : digits(d), rows(n), bins(int64_t{1} << d.width), targets(per_row) {
    target = room.take<Target>(rows * targets);
    counts = room.take<int64_t>(rows * targets * bins);
    valid = room.take<int64_t>(rows);
  }
  void begin() const {
    for (int64_t i = 0; i < rows * targets; ++i) target[i] = {0, 0, 0, 0, 1};
  }
  void clear_counts() const { memset(counts, 0, static_cast<size_t>(rows * targets * bins * 8)); }
};

// After a pass: looks each target's next digit up in the counts, and clears them.
void narrow(const Search& s, const Step& step, const Wanted& wanted, bool to_choose, const Exec& exec) {
  const int threads = threads_for(exec, s.rows * s.targets * s.bins);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < s.rows; ++row) {
    Target* const target = s.target + row * s.targets;
    int64_t* const counts = s.counts + row * s.targets * s.bins;
    for (int r = 0; r < s.targets; ++r) {
      Target& t = target[r];
      if (!t.open) continue;
      const int64_t* const count = counts + t.slot * s.bins;
      if (step.first) {
        s.valid[row] = 0;
        for (int64_t d = 0; d < s.bins; ++d) s.valid[row] += count[d];
        t.rank = first_rank(wanted, row, r, s.valid[row]);
      }
      if (t.rank < 0) {
        find_none(t);
        continue;
      }
      int64_t before = 0, d = 0;
      while (before + count[d] <= t.rank) before += count[d++];
      advance(t, step, static_cast<int>(d), before, count[d], to_choose);
    }
    memset(counts, 0, static_cast<size_t>(s.targets * s.bins * 8));
    for (int r = 0; r < s.targets; ++r)
      for (int l = r; l >= 0; --l)
        if (target[l].key == target[r].key && target[l].open == target[r].open) target[r].slot = l;
  }
}

bool is_open(const Target* target, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (target[i].open) return true;
  return false;
}

struct Rows {
  Layout layout;
  Plane planes[2];  // values, mask

  Rows(const Array& values, const Array& mask) {
    if (values.dtype < DType::f16) throw std::invalid_argument("values must have a floating-point dtype");
    const Array arrays[2] = {values, mask};
    layout = make_layout(arrays, planes, 2);
  }
};

template <class T, class Key>
void load_keys(const Rows& from, int64_t row, int64_t q, int n, Key flip, Key* keys) {
  const Plane &values = from.planes[0], &mask = from.planes[1];
  for_rows(values, from.layout, row * values.batch, q, n, [&](int64_t offset, int done, int m) {
    const T* x = reinterpret_cast<const T*>(values.data) + offset;
    const int64_t step = values.step[2];
    if (step == 1)
      for (int i = 0; i < m; ++i) keys[done + i] = key_of(x[i], flip);
    else
      for (int i = 0; i < m; ++i) keys[done + i] = key_of(x[i * step], flip);
  });
  if (!mask) return;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  for_rows(mask, from.layout, row * mask.batch, q, n, [&](int64_t offset, int done, int m) {
#define CASE(From)                                                         \
  {                                                                        \
    const From* x = reinterpret_cast<const From*>(mask.data) + offset;     \
    for (int i = 0; i < m; ++i)                                            \
      if (to_real<float>(x[i * mask.step[2]]) == 0) keys[done + i] = none; \
  }
    NOISYSEG_DTYPE_CASES(mask.dtype, CASE)
#undef CASE
  });
}

// Adds the digits of n keys, pixels q and on, that begin as the target's: table (bins, copies).
template <class Key>
void count_keys(const Step& step, const Target& t, const Key* keys, int n, int64_t q, Key none,
                uint32_t* table) {
  const Key mask = static_cast<Key>(last_with(step.width)), key = static_cast<Key>(t.key);
  const int shift = step.shift, width = step.width;
  if (step.first) {
    for (int i = 0; i < n; ++i)
      if (keys[i] != none) ++table[(keys[i] >> shift & mask) * copies + i % copies];
    return;
  }
  const int above = step.place ? 0 : shift;
  const int further = step.place ? 0 : width;  // two shifts: together they may be as wide as the key
  for (int i = 0; i < n; i += 32) {
    const int end = i + 32 < n ? i + 32 : n;
    Key some = 0;
    for (int k = i; k < end; ++k) some |= static_cast<Key>((keys[k] >> above >> further) == key);
    if (!some) continue;
    int found[32], m = 0;  // gathered first: whether a key begins so is not to be guessed by the processor
    for (int k = i; k < end; ++k) {
      found[m] = digit_of(step, t, keys[k], q + k, none);
      m += found[m] >= 0;
    }
    for (int k = 0; k < m; ++k) ++table[found[k] * copies + k % copies];
  }
}

template <class T>
void count_pass(const Rows& from, const Search& s, const Step& step, typename KeyOf<T>::Key flip,
                uint32_t* tables, const Exec& exec) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t size = s.targets * s.bins * copies;
  for_slices(s.rows, from.layout.pixels(), exec, 1, [&](int64_t row, int64_t first, int64_t end, int worker) {
    const Target* const target = s.target + row * s.targets;
    if (!is_open(target, s.targets)) return;
    uint32_t* const table = tables + worker * size;
    Key keys[block];
    for (int64_t q = first; q < end; q += block) {
      const int n = static_cast<int>(smaller(block, end - q));
      if (s.targets == 1 && !may_hold(step, *target, q, n)) continue;
      load_keys<T>(from, row, q, n, flip, keys);
      for (int r = 0; r < s.targets; ++r)
        if (target[r].open && target[r].slot == r)
          count_keys(step, target[r], keys, n, q, none, table + r * s.bins * copies);
    }
    for (int r = 0; r < s.targets; ++r) {
      if (!target[r].open || target[r].slot != r) continue;
      uint32_t* const counted = table + r * s.bins * copies;
      int64_t* const counts = s.counts + (row * s.targets + r) * s.bins;
      for (int64_t d = 0; d < s.bins; ++d) {
        uint32_t* const four = counted + d * copies;
        const int64_t sum = int64_t{four[0]} + four[1] + four[2] + four[3];
        if (!sum) continue;
        add(counts[d], sum);
        four[0] = four[1] = four[2] = four[3] = 0;
      }
    }
  });
}

// ---- a bracket from a sample -----------------------------------------------------------------------

// Between which keys a row's targets lie is guessed from a sample of it, by three standard deviations on
// either side. One pass then counts what lies below and lists the few keys between, where the targets are
// found. A row whose guess was wrong, or whose list overflows, is left to the search over all its values: the
// answer is the same.
constexpr int64_t least_bracketed = 1 << 14;  // pixels

int64_t sample_of(int64_t pixels) { return pixels < 1 << 18 ? 1024 : pixels < 1 << 20 ? 4096 : 16384; }
// 4 / sqrt(sample) of the pixels: a bracket around the median takes 3 / sqrt(sample) of them.
int64_t listed_of(int64_t pixels) {
  const int64_t sample = sample_of(pixels);
  return sample == 1024 ? pixels / 8 : sample == 4096 ? pixels / 16 : pixels / 32;
}

struct Counted {
  uint64_t low, high;  // the bracket's ends
  int64_t below_low, to_low, below_high, to_high, valid, listed;
  int64_t open;  // whether there is a bracket
};

struct Brackets {
  int64_t pixels, capacity;
  Counted* rows = nullptr;
  void* lists = nullptr;    // (rows, capacity) keys
  void* samples = nullptr;  // (threads, sample) keys

  Brackets(DType dtype, int64_t n, int64_t all_pixels, int targets, const Exec& exec, Room& room)
      : pixels(all_pixels), capacity(pixels < least_bracketed || targets > 2 ? 0 : listed_of(pixels)) {
    if (!capacity) return;
    const int64_t size = dtype == DType::f64 ? 8 : 4;
    rows = room.take<Counted>(n);
    lists = room.take<char>(n * capacity * size);
    samples = room.take<char>(most_threads(exec) * sample_of(pixels) * size);
  }
};

// The r-th (from 0) of n keys that differ in their lowest `bits` bits only; how many are the same, and r
// among them; the least of those above it, if there is any. Moves keys about.
template <class Key>
struct Found {
  Key key, next;
  int64_t rank, here;
  bool has_next;
};
template <class Key>
Found<Key> find_listed(Key* keys, int64_t n, int64_t r, int bits) {
  Found<Key> found = {0, static_cast<Key>(~Key{0}), r, n, false};
  while (bits > 0 && found.here > 1) {
    constexpr int most = 11;
    const int width = bits < most ? bits : most, shift = bits - width;
    const Key mask = static_cast<Key>(last_with(width));
    uint32_t count[1 << most];
    memset(count, 0, sizeof(uint32_t) << width);
    for (int64_t i = 0; i < found.here; ++i) ++count[keys[i] >> shift & mask];
    Key digit = 0;
    while (count[digit] <= found.rank) found.rank -= count[digit++];
    int64_t kept = 0;
    Key next = found.next;
    for (int64_t i = 0; i < found.here; ++i) {
      const Key key = keys[i], own = key >> shift & mask;
      next = own > digit && key < next ? key : next;
      keys[i] = keys[kept];  // an exchange, so that no key is lost
      keys[kept] = key;
      kept += own == digit;
    }
    found.has_next |= next < found.next;
    found.next = next;
    found.here = kept;
    bits = shift;
  }
  found.key = keys[0];
  return found;
}

// A bracket for each row.
template <class T>
void guess(const Rows& from, const Search& s, const Wanted& wanted, typename KeyOf<T>::Key flip,
           const Brackets& b, const Exec& exec) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t size = sample_of(b.pixels), runs = size / 16;
  for_slices(s.rows, 1, exec, size * 16, [&](int64_t row, int64_t, int64_t, int worker) {
    Key* const keys = static_cast<Key*>(b.samples) + worker * size;
    Counted& counted = b.rows[row];
    counted = {};
    int64_t valid = 0;
    for (int64_t i = 0; i < runs; ++i) {  // 16 neighbours at a time, from places without a period
      const uint64_t mixed = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u >> 32;
      const int64_t step = b.pixels / runs, room = step - 16;
      Key found[16];
      load_keys<T>(from, row, i * step + static_cast<int64_t>(mixed % static_cast<uint64_t>(room + 1)), 16,
                   flip, found);
      for (const Key key : found) {
        keys[valid] = key;
        valid += key != none;
      }
    }
    if (valid < size / 4) return;
    const double n = static_cast<double>(valid);
    const double all = static_cast<double>(b.pixels) * n / static_cast<double>(size);
    const double first = static_cast<double>(first_rank(wanted, row, 0, static_cast<int64_t>(all))) / all;
    const double share = first < 0 ? 0 : first > 1 ? 1 : first;
    const double margin = 4 + 3 * sqrt(n * share * (1 - share));
    const int64_t low = static_cast<int64_t>(share * n - margin),
                  high = static_cast<int64_t>(share * n + margin) + 1;
    counted.open = 1;
    counted.low = low < 0 ? 0 : find_listed(keys, valid, low, KeyOf<T>::bits).key;
    counted.high = high >= valid ? none : find_listed(keys, valid, high, KeyOf<T>::bits).key;
  });
}

template <class T>
void count_brackets(const Rows& from, const Search& s, typename KeyOf<T>::Key flip, const Brackets& b,
                    const Exec& exec) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  for_slices(s.rows, b.pixels, exec, 1, [&](int64_t row, int64_t first, int64_t end, int) {
    Counted& counted = b.rows[row];
    if (!counted.open) return;
    Key* const list = static_cast<Key*>(b.lists) + row * b.capacity;
    const Key low = static_cast<Key>(counted.low), high = static_cast<Key>(counted.high);
    int64_t sums[5] = {};
    for (int64_t q = first; q < end; q += block) {
      const int n = static_cast<int>(smaller(block, end - q));
      Key keys[block + 32];
      uint8_t between[block];
      load_keys<T>(from, row, q, n, flip, keys);
      for (int i = n; i % 32; ++i) keys[i] = none;
      Key below_low = 0, to_low = 0, below_high = 0, to_high = 0, valid = 0;
      for (int i = 0; i < n; ++i) {
        const Key key = keys[i];
        below_low += key < low, to_low += key <= low;
        below_high += key < high, to_high += key <= high;
        valid += key != none;
      }
      const Key found = below_high - to_low;
      sums[0] += below_low, sums[1] += to_low, sums[2] += below_high, sums[3] += to_high, sums[4] += valid;
      if (!found || low >= high) continue;
      for (int i = 0; i < (n + 7) / 8 * 8; ++i) between[i] = (keys[i] > low) & (keys[i] < high);
      int64_t at;
#pragma omp atomic capture
      {
        at = counted.listed;
        counted.listed += static_cast<int64_t>(found);
      }
      if (at + static_cast<int64_t>(found) > b.capacity) continue;
      for (int i = 0; i < n; i += 8) {
        uint64_t eight;
        memcpy(&eight, between + i, 8);
        for (; eight; eight &= eight - 1) list[at++] = keys[i + __builtin_ctzll(eight) / 8];
      }
    }
    int64_t* const to[5] = {&counted.below_low, &counted.to_low, &counted.below_high, &counted.to_high,
                            &counted.valid};
    for (int k = 0; k < 5; ++k) add(*to[k], sums[k]);
  });
}

// Finds a row's targets in its bracket, if they are there. Places are left to be searched, to_choose, where
// not all of the values that tie with the last are in: such a target is `pending`.
constexpr int64_t pending = -2;

template <class T>
void find_in_bracket(const Search& s, const Wanted& wanted, bool to_choose, const Brackets& b, int64_t row) {
  using Key = typename KeyOf<T>::Key;
  const Counted& c = b.rows[row];
  if (!c.open || c.listed > b.capacity) return;
  Target* const target = s.target + row * s.targets;
  Target found[2] = {};
  const Key low = static_cast<Key>(c.low), high = static_cast<Key>(c.high);
  const bool has_high = c.to_high > c.below_high && c.below_high < c.valid;
  Key* const list = static_cast<Key*>(b.lists) + row * b.capacity;
  bool has_next = false;
  Key key = 0, next = high;
  int64_t here = 0, place_in = 0;  // how many have the key, and the rank among them
  for (int r = 0; r < s.targets; ++r) {
    const int64_t rank = first_rank(wanted, row, r, c.valid);
    if (rank < 0) {
      find_none(found[r]);
      continue;
    }
    if (r > 0 && rank == found[0].rank + 1 && place_in + 1 < here) {
      ++place_in;
    } else if (r > 0 && rank == found[0].rank + 1) {  // the neighbour
      if (!has_next) return;
      key = next;
    } else if (r > 0) {
      if (rank != found[0].rank) return;
    } else if (rank >= c.below_low && rank < c.to_low) {
      key = low, here = c.to_low - c.below_low, place_in = rank - c.below_low;
      has_next = c.listed > 0 || has_high;
      for (int64_t i = 0; i < c.listed; ++i) next = list[i] < next ? list[i] : next;
    } else if (rank >= c.to_low && rank < c.below_high && c.listed > 0) {
      int bits = 0;
      while (bits < KeyOf<T>::bits && (low ^ high) >> bits) ++bits;
      const Found<Key> f = find_listed(list, c.listed, rank - c.to_low, bits);
      key = f.key, here = f.here, place_in = f.rank;
      has_next = f.has_next || has_high;
      next = f.has_next ? f.next : high;
    } else if (rank >= c.below_high && rank < c.to_high && has_high) {
      key = high, here = c.to_high - c.below_high, place_in = rank - c.below_high;
    } else {
      return;
    }
    found[r].key = key;
    found[r].rank = to_choose ? place_in : rank;
    found[r].place = to_choose && place_in + 1 < here ? pending : INT64_MAX;
  }
  s.valid[row] = c.valid;
  for (int r = 0; r < s.targets; ++r) target[r] = found[r];
}

// Finds the targets of each row.
template <class T>
void search(const Rows& from, const Search& s, const Wanted& wanted, bool to_choose,
            typename KeyOf<T>::Key flip, const Brackets& brackets, uint32_t* tables, const Exec& exec) {
  s.begin();
  if (brackets.capacity) {
    guess<T>(from, s, wanted, flip, brackets, exec);
    count_brackets<T>(from, s, flip, brackets, exec);
    const int threads = threads_for(exec, s.rows * brackets.capacity);
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < s.rows; ++row) find_in_bracket<T>(s, wanted, to_choose, brackets, row);
  }
  const bool closed = !is_open(s.target, s.rows * s.targets);
  bool waiting = false;
  for (int64_t k = 0; k < s.rows * s.targets; ++k) waiting |= s.target[k].place == pending;
  if (closed && !waiting) return;
  s.clear_counts();
  const int64_t threads = threads_for(exec, s.rows * from.layout.pixels());
  memset(tables, 0, static_cast<size_t>(threads * s.targets * s.bins * copies * 4));
  const int key_steps = s.digits.key_steps(), steps = to_choose ? s.digits.steps() : key_steps;
  for (int i = closed ? key_steps : 0; i < steps; ++i) {
    const Step step = s.digits.step(i);
    if (i == key_steps)
      for (int64_t k = 0; k < s.rows * s.targets; ++k)
        if (s.target[k].place == pending) s.target[k].open = 1, s.target[k].place = 0;
    if (!is_open(s.target, s.rows * s.targets)) {
      if (i >= key_steps) break;
      i = key_steps - 1;
      continue;
    }
    count_pass<T>(from, s, step, flip, tables, exec);
    narrow(s, step, wanted, to_choose, exec);
  }
}

template <class T>
void write_quantiles(const Search& s, const Quantiles& quantiles, T* out) {
  for (int64_t row = 0; row < s.rows; ++row)
    for (int i = 0; i < quantiles.count; ++i) {
      const Target* const t = s.target + row * s.targets + 2 * i;
      T low, high;
      value_of(t[0].key, low);
      value_of(t[1].key, high);
      const double x = t->rank < 0 ? NAN
                                   : interpolate(quantiles.rule, quantiles.q[i], s.valid[row],
                                                 to_real<double>(low), to_real<double>(high));
      assign(out[i * s.rows + row], x);
    }
}

template <class T, class Key>
void write_chosen(const Rows& from, const Search& s, Key flip, uint8_t* out, const Exec& exec) {
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t pixels = from.layout.pixels();
  for_slices(s.rows, pixels, exec, 1, [&](int64_t row, int64_t first, int64_t end, int) {
    const Target t = s.target[row];
    const Key last = static_cast<Key>(t.key), with_ties = last < none ? last : none - 1;
    Key keys[block];
    for (int64_t q = first; q < end; q += block) {
      const int n = static_cast<int>(smaller(block, end - q));
      load_keys<T>(from, row, q, n, flip, keys);
      // Places are compared once for a block: 64 bits wide, they would quarter the vectors.
      const int first = t.place < q ? 0 : 1 + static_cast<int>(smaller(t.place - q, n - 1));
      uint8_t* const to = out + row * pixels + q;
#pragma GCC ivdep
      for (int i = 0; i < first; ++i) to[i] = keys[i] <= with_ties;  // is_in, in vectors
#pragma GCC ivdep
      for (int i = first; i < n; ++i) to[i] = keys[i] < last;
    }
  });
}

// ---- confident learning ----------------------------------------------------------------------------

// T: float, or double for double probabilities.
template <class T>
struct Block {
  int n;
  int32_t given[block];  // the label; -1 where it is none or a probability is NaN
  T own[block];          // the label's probability
};

struct Labelled {
  Layout layout;
  Plane planes[2];  // probabilities, label
  int classes;

  Labelled(const Array& p, const Array& label) {
    check_probabilities(p);
    const Array arrays[2] = {p, label};
    layout = make_layout(arrays, planes, 2);
    classes = static_cast<int>(layout.channels);
  }
  template <class T>
  const T* probability(int64_t b, int c, int64_t q, int n, T* buffer) const {
    return load<T>(planes[0], layout, b * planes[0].batch + c * planes[0].channel, q, n, buffer);
  }
  template <class T>
  void read(int64_t b, int64_t q, int n, Block<T>& to) const {
    to.n = n;
    const Plane& label = planes[1];
    for_rows(label, layout, b * label.batch, q, n, [&](int64_t offset, int done, int m) {
#define ROW(From)                                                                                     \
  {                                                                                                   \
    const From* x = reinterpret_cast<const From*>(label.data) + offset;                               \
    for (int i = 0; i < m; ++i) {                                                                     \
      const uint64_t value = static_cast<uint64_t>(static_cast<int64_t>(x[i * label.step[2]]));       \
      to.given[done + i] = value < static_cast<uint64_t>(classes) ? static_cast<int32_t>(value) : -1; \
    }                                                                                                 \
  }
      switch (label.dtype) {
        case DType::i32: ROW(int32_t) break;
        case DType::i64: ROW(int64_t) break;
        default: ROW(uint8_t)
      }
#undef ROW
    });
    T buffer[block];
    int32_t bad[block];
    for (int i = 0; i < n; ++i) bad[i] = 0, to.own[i] = 0;
    for (int c = 0; c < classes; ++c) {
      const T* x = probability(b, c, q, n, buffer);
      for (int i = 0; i < n; ++i) {
        bad[i] |= -static_cast<int32_t>(x[i] != x[i]);
        to.own[i] = to.given[i] == c ? x[i] : to.own[i];
      }
    }
    for (int i = 0; i < n; ++i) to.given[i] |= bad[i];
  }
  // f(block, image, first pixel, worker): all blocks, read; `finish(worker)` after each slice.
  template <class T, class F, class G>
  void for_blocks(const Exec& exec, const F& f, const G& finish) const {
    for_slices(layout.batch, layout.pixels(), exec, classes,
               [&](int64_t b, int64_t first, int64_t end, int worker) {
                 Block<T> x;
                 for (int64_t q = first; q < end; q += block) {
                   read(b, q, static_cast<int>(smaller(block, end - q)), x);
                   f(x, b, q, worker);
                 }
                 finish(worker);
               });
  }
};

struct Confident {
  int64_t classes, squares;
  int64_t *sums, *counts, *numbers;  // (C, 3), (C, C), (C, C)
  double* threshold;                 // (C)
  Search search;                     // a row for each pair of classes
  int64_t* tables;                   // of each thread: (C, C) or (C, 3) numbers, or (C, C, bins) of 32 bits
  int64_t table;

  Confident(const Array& p, const Exec& exec, Room room)
      : classes(p.shape[1]),
        squares(classes * classes),
        sums(room.take<int64_t>(classes * 3)),
        counts(room.take<int64_t>(squares)),
        numbers(room.take<int64_t>(squares)),
        threshold(room.take<double>(classes)),
        search(digits_of(p.dtype == DType::f64 ? DType::f64 : DType::f32, p.size() / (classes ? classes : 1),
                         squares),
               squares, 1, room) {
    table = squares * search.bins / 2 + classes * 3;
    tables = room.take<int64_t>(table * most_threads(exec));
    bytes = room.bytes;
  }
  size_t bytes;
};

// sums (C, 3) of the labels' own probabilities, and the thresholds from them.
template <class T>
void find_thresholds(const Labelled& from, const Confident& c, const Exec& exec) {
  memset(c.sums, 0, static_cast<size_t>(c.classes * 24));
  const int64_t threads = threads_for(exec, from.layout.batch * from.layout.pixels() * from.classes);
  memset(c.tables, 0, static_cast<size_t>(c.table * threads * 8));
  from.for_blocks<T>(
      exec,
      [&](const Block<T>& x, int64_t, int64_t, int worker) {
        int64_t* const sums = c.tables + worker * c.table;
        int32_t high[block], low[block];
        for (int i = 0; i < x.n; ++i) {
          const Fixed p = fixed_of(x.own[i]);
          high[i] = p.high;
          low[i] = p.low;
        }
        for (int k = 0; k < c.classes; ++k) {
          int64_t h = 0, l = 0, n = 0;
          for (int i = 0; i < x.n; ++i) {
            const int32_t mine = -static_cast<int32_t>(x.given[i] == k);
            h += high[i] & mine;
            l += low[i] & mine;
            n -= mine;
          }
          sums[3 * k] += h;
          sums[3 * k + 1] += l;
          sums[3 * k + 2] += n;
        }
      },
      [&](int worker) {
        int64_t* const sums = c.tables + worker * c.table;
        for (int64_t i = 0; i < 3 * c.classes; ++i) add(c.sums[i], sums[i]), sums[i] = 0;
      });
  for (int64_t k = 0; k < c.classes; ++k) c.threshold[k] = threshold_of(c.sums + 3 * k);
}

// counts (C, C), given label and the class that the pixel is confidently of.
template <class T>
void count_joint(const Labelled& from, const Confident& c, int64_t* counts, const Exec& exec) {
  memset(counts, 0, static_cast<size_t>(c.squares * 8));
  from.for_blocks<T>(
      exec,
      [&](const Block<T>& x, int64_t b, int64_t q, int worker) {
        int32_t reached[block], guess[block], best[block];
        T most[block], buffer[block];
        for (int i = 0; i < x.n; ++i) reached[i] = 0, guess[i] = 0, best[i] = 0, most[i] = -INFINITY;
        for (int k = 0; k < from.classes; ++k) {
          const T* p = from.probability(b, k, q, x.n, buffer);
          const double least = c.threshold[k];
          for (int i = 0; i < x.n; ++i) {
            const bool reaches = static_cast<double>(p[i]) >= least, more = p[i] > most[i];
            guess[i] = reaches & (reached[i] == 0) ? k : guess[i];
            reached[i] += reaches;
            best[i] = more ? k : best[i];
            most[i] = more ? p[i] : most[i];
          }
        }
        int64_t* const table = c.tables + worker * c.table;
        for (int i = 0; i < x.n; ++i)
          if (x.given[i] >= 0 && reached[i])
            ++table[x.given[i] * from.classes + (reached[i] > 1 ? best[i] : guess[i])];
      },
      [&](int worker) {
        int64_t* const table = c.tables + worker * c.table;
        for (int64_t i = 0; i < c.squares; ++i) add(counts[i], table[i]), table[i] = 0;
      });
  for (int64_t i = 0; i < c.squares; i += c.classes + 1)
    if (counts[i] < 1) counts[i] = 1;
}

// The pixels labelled i are sought by p_i - p_j for each other class j, and by p_i, from the smallest.
template <class T>
void count_margins(const Labelled& from, const Confident& c, const Step& step, const Exec& exec) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t pixels = from.layout.pixels(), bins = c.search.bins;
  from.for_blocks<T>(
      exec,
      [&](const Block<T>& x, int64_t b, int64_t q, int worker) {
        uint32_t* const table = reinterpret_cast<uint32_t*>(c.tables + worker * c.table);
        const int64_t place = b * pixels + q;
        T buffer[block];
        Key keys[block];
        for (int j = 0; j < from.classes; ++j) {
          const T* p = from.probability(b, j, q, x.n, buffer);
          for (int i = 0; i < x.n; ++i) keys[i] = key_of(x.own[i] - (x.given[i] == j ? T(0) : p[i]), Key(0));
          for (int i = 0; i < x.n; ++i) {
            if (x.given[i] < 0) continue;
            const int64_t pair = static_cast<int64_t>(x.given[i]) * from.classes + j;
            const Target& t = c.search.target[pair];
            if (!t.open) continue;
            const int digit = digit_of(step, t, keys[i], place + i, none);
            if (digit >= 0) ++table[pair * bins + digit];
          }
        }
      },
      [&](int worker) {
        uint32_t* const table = reinterpret_cast<uint32_t*>(c.tables + worker * c.table);
        for (int64_t i = 0; i < c.squares * bins; ++i)
          if (table[i]) add(c.search.counts[i], table[i]), table[i] = 0;
      });
}

template <class T>
void write_errors(const Labelled& from, const Confident& c, Prune prune, uint8_t* wrong, const Exec& exec) {
  using Key = typename KeyOf<T>::Key;
  const Key none = no_key<Key>(KeyOf<T>::bits);
  const int64_t pixels = from.layout.pixels();
  from.for_blocks<T>(
      exec,
      [&](const Block<T>& x, int64_t b, int64_t q, int) {
        const int64_t place = b * pixels + q;
        int32_t best[block];
        T most[block], buffer[block];
        uint8_t by_class[block], by_rate[block];
        for (int i = 0; i < x.n; ++i) by_class[i] = by_rate[i] = 0, best[i] = 0, most[i] = -INFINITY;
        for (int j = 0; j < from.classes; ++j) {
          const T* p = from.probability(b, j, q, x.n, buffer);
          for (int i = 0; i < x.n; ++i) {
            const T believed = x.given[i] == j ? p[i] + T(tolerance) : p[i];
            best[i] = believed > most[i] ? j : best[i];
            most[i] = believed > most[i] ? believed : most[i];
          }
          for (int i = 0; i < x.n; ++i) {
            if (x.given[i] < 0) continue;
            const bool mine = x.given[i] == j;
            const Target& t = c.search.target[static_cast<int64_t>(x.given[i]) * from.classes + j];
            const bool in = is_in(t, key_of(x.own[i] - (mine ? T(0) : p[i]), Key(0)), place + i, none);
            (mine ? by_class : by_rate)[i] |= in;
          }
        }
        for (int i = 0; i < x.n; ++i) {
          const bool chosen = prune == Prune::both       ? by_class[i] & by_rate[i]
                              : prune == Prune::by_class ? by_class[i]
                                                         : by_rate[i];
          wrong[place + i] = chosen && best[i] != x.given[i] && c.sums[3 * x.given[i] + 2] > 1;
        }
      },
      [](int) {});
}

template <class T>
void find_errors(const Labelled& from, const Confident& c, Prune prune, uint8_t* wrong, const Exec& exec) {
  find_thresholds<T>(from, c, exec);
  count_joint<T>(from, c, c.counts, exec);
  for (int64_t i = 0; i < c.classes; ++i)
    numbers_of_row(c.counts + i * c.classes, c.sums[3 * i + 2], static_cast<int>(i), from.classes, prune,
                   c.numbers + i * c.classes);
  c.search.begin();
  c.search.clear_counts();
  for (int64_t i = 0; i < c.squares; ++i)
    if (c.numbers[i] < 1) find_none(c.search.target[i]);
  const Wanted wanted{nullptr, c.numbers, 0};
  for (int i = 0; i < c.search.digits.steps() && is_open(c.search.target, c.squares); ++i) {
    const Step step = c.search.digits.step(i);
    count_margins<T>(from, c, step, exec);
    narrow(c.search, step, wanted, true, exec);
  }
  write_errors<T>(from, c, prune, wrong, exec);
}

uint32_t* tables_of(const Search& s, Room& room, const Exec& exec) {
  return room.take<uint32_t>(most_threads(exec) * s.targets * s.bins * copies);
}

}  // namespace

size_t selection_workspace(const Array& values, int targets, const Exec& exec) {
  Room room{nullptr};
  const int64_t rows = values.shape[0];
  const Search s(digits_of(values.dtype, values.size() / (rows ? rows : 1), targets), rows, targets, room);
  tables_of(s, room, exec);
  Brackets(values.dtype, rows, values.size() / (rows ? rows : 1), targets, exec, room);
  return room.bytes;
}

void quantile(const Array& values, const Array& mask, const Quantiles& quantiles, const Array& out,
              void* workspace, const Exec& exec) {
  if (quantiles.count < 1 || quantiles.count > Quantiles::most)
    throw std::invalid_argument("there must be 1 to 8 quantiles");
  const Rows from(values, mask);
  Room room{static_cast<char*>(workspace)};
  const int targets = 2 * quantiles.count;
  const Search s(digits_of(values.dtype, from.layout.pixels(), targets), from.layout.batch, targets, room);
  uint32_t* const tables = tables_of(s, room, exec);
  const Brackets brackets(values.dtype, s.rows, from.layout.pixels(), s.targets, exec, room);
#define CASE(T)                                                                            \
  {                                                                                        \
    search<T>(from, s, Wanted{quantiles.q, nullptr, 0}, false, 0, brackets, tables, exec); \
    write_quantiles(s, quantiles, static_cast<T*>(out.data));                              \
  }
  NOISYSEG_FLOAT_CASES(values.dtype, CASE)
#undef CASE
}

void top_k(const Array& values, const Array& mask, const Array& counts, const TopK& options,
           const Array& threshold, const Array& chosen, void* workspace, const Exec& exec) {
  const Rows from(values, mask);
  Room room{static_cast<char*>(workspace)};
  const Search s(digits_of(values.dtype, from.layout.pixels(), 1), from.layout.batch, 1, room);
  uint32_t* const tables = tables_of(s, room, exec);
  const Brackets brackets(values.dtype, s.rows, from.layout.pixels(), 1, exec, room);
  const Wanted wanted{nullptr, static_cast<const int64_t*>(counts.data), options.k};
#define CASE(T)                                                                 \
  {                                                                             \
    using Key = KeyOf<T>::Key;                                                  \
    const Key flip = options.largest ? no_key<Key>(KeyOf<T>::bits) : Key(0);    \
    if (threshold) {                                                            \
      search<T>(from, s, wanted, false, flip, brackets, tables, exec);          \
      for (int64_t row = 0; row < s.rows; ++row) {                              \
        T& to = static_cast<T*>(threshold.data)[row];                           \
        value_of(s.target[row].key ^ flip, to);                                 \
        if (s.target[row].rank < 0) assign(to, static_cast<float>(NAN));        \
      }                                                                         \
    }                                                                           \
    if (chosen) {                                                               \
      search<T>(from, s, wanted, true, flip, brackets, tables, exec);           \
      write_chosen<T>(from, s, flip, static_cast<uint8_t*>(chosen.data), exec); \
    }                                                                           \
  }
  NOISYSEG_FLOAT_CASES(values.dtype, CASE)
#undef CASE
}

size_t confident_workspace(const Array& p, const Exec& exec) {
  check_probabilities(p);
  return Confident(p, exec, Room{nullptr}).bytes;
}

void confident_joint(const Array& p, const Array& label, const Array& counts, void* workspace,
                     const Exec& exec) {
  const Labelled from(p, label);
  const Confident c(p, exec, Room{static_cast<char*>(workspace)});
  if (p.dtype == DType::f64) {
    find_thresholds<double>(from, c, exec);
    count_joint<double>(from, c, static_cast<int64_t*>(counts.data), exec);
  } else {
    find_thresholds<float>(from, c, exec);
    count_joint<float>(from, c, static_cast<int64_t*>(counts.data), exec);
  }
}

void label_errors(const Array& p, const Array& label, Prune prune, const Array& wrong, void* workspace,
                  const Exec& exec) {
  const Labelled from(p, label);
  const Confident c(p, exec, Room{static_cast<char*>(workspace)});
  if (p.dtype == DType::f64)
    find_errors<double>(from, c, prune, static_cast<uint8_t*>(wrong.data), exec);
  else
    find_errors<float>(from, c, prune, static_cast<uint8_t*>(wrong.data), exec);
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, selection_workspace, (const Array& values, int targets, const Exec& exec),
             (values, targets, exec))
NOISYSEG_API(void, quantile,
             (const Array& values, const Array& mask, const Quantiles& quantiles, const Array& out,
              void* workspace, const Exec& exec),
             (values, mask, quantiles, out, workspace, exec))
NOISYSEG_API(void, top_k,
             (const Array& values, const Array& mask, const Array& counts, const TopK& options,
              const Array& threshold, const Array& chosen, void* workspace, const Exec& exec),
             (values, mask, counts, options, threshold, chosen, workspace, exec))
NOISYSEG_API(size_t, confident_workspace, (const Array& probabilities, const Exec& exec),
             (probabilities, exec))
NOISYSEG_API(void, confident_joint,
             (const Array& probabilities, const Array& label, const Array& counts, void* workspace,
              const Exec& exec),
             (probabilities, label, counts, workspace, exec))
NOISYSEG_API(void, label_errors,
             (const Array& probabilities, const Array& label, Prune prune, const Array& wrong,
              void* workspace, const Exec& exec),
             (probabilities, label, prune, wrong, workspace, exec))
