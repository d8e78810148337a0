// Normalisation and activation on the CPU. A group's statistics come from chunks of its pixels, each of which
// sums the deviations from its own mean; the chunks' size and the order in which they are joined are fixed.
//
// Where there are groups enough for the threads, a thread takes a group through all its passes, the later
// ones backwards, so that they begin in the cache. Bytes per pixel from and to memory then, fp32, with a
// direction: 8 read for the statistics, 8 read (mostly from the caches) and 8 written; without one half of
// that. Backward: 8 read, 8 read (mostly from the caches), 4 written.
#include "noisyseg/norms.h"

#include "cpu/planes.h"
#include "formulas/norms.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

constexpr int64_t tile_values = 4096;   // of channels_last arrays: pixels times channels
constexpr int64_t tile_channels = 256;  // at most
constexpr int64_t row_pixels = 1024;    // of channels-first arrays: one channel
constexpr int64_t small_image = 64;     // pixels: of a batch's statistics several images make a tile

// Pixels of a chunk, and chunks of an image.
int64_t chunk_of(const NormShape& s) {
  if (!s.last) return row_pixels;
  const int64_t wide = s.channels < tile_channels ? s.channels : tile_channels;
  return tile_values / (wide > 0 ? wide : 1);
}
int64_t chunks_of(const NormShape& s) { return (s.pixels + chunk_of(s) - 1) / chunk_of(s); }

// A tile of `wide` channels of `rows` pixels, step apart: in place if it is T, otherwise converted into
// `buffer`. Channels first: one row, whose `wide` values are pixels.
template <class T>
struct Tile {
  const T* data;
  int64_t step;
};
template <class T>
Tile<T> fetch(const Array& a, int64_t offset, int64_t step, int64_t rows, int64_t wide, T* buffer) {
  if (!a) {
    for (int64_t i = 0; i < wide; ++i) buffer[i] = T(0);
    return {buffer, 0};
  }
  if (a.dtype == dtype_of<T>()) return {static_cast<const T*>(a.data) + offset, step};
  for (int64_t r = 0; r < rows; ++r) {
#define CASE(From)                                                                                  \
  load_row<T, From>(static_cast<const char*>(a.data), offset + r * step, 1, static_cast<int>(wide), \
                    buffer + r * wide);
    NOISYSEG_FLOAT_CASES(a.dtype, CASE)
#undef CASE
  }
  return {buffer, wide};
}
// Where to compute a tile's results, and what brings them home.
template <class T>
struct Target {
  T* data;
  int64_t step;
};
template <class T>
Target<T> place(const Array& a, int64_t offset, int64_t step, int64_t wide, T* buffer) {
  if (a && a.dtype == dtype_of<T>()) return {static_cast<T*>(a.data) + offset, step};
  return {buffer, wide};
}
template <class T>
void deliver(const Array& a, int64_t offset, int64_t step, int64_t rows, int64_t wide, const T* buffer) {
  if (!a || a.dtype == dtype_of<T>()) return;
  for (int64_t r = 0; r < rows; ++r) {
#define CASE(To)                                                                             \
  store_row<T, To>(static_cast<char*>(a.data), offset + r * step, 1, static_cast<int>(wide), \
                   buffer + r * wide);
    NOISYSEG_FLOAT_CASES(a.dtype, CASE)
#undef CASE
  }
}

template <class T>
constexpr int sum_lanes_of = 128 / sizeof(T);

template <class T>
double total_of(const T* x) {
  double half[sum_lanes_of<T> / 2];
  for (int l = 0; l < sum_lanes_of<T> / 2; ++l)
    half[l] = static_cast<double>(x[l]) + static_cast<double>(x[l + sum_lanes_of<T> / 2]);
  for (int width = sum_lanes_of<T> / 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) half[l] += half[l + width];
  return half[0];
}

// ---- one channel's row of n pixels ----------------------------------------------------------------

// value(i) and dot(i) of n pixels, one after the other in double.
template <bool dual, class Value, class Dot>
NormMoments exact_moments(int64_t n, const Value& value, const Dot& dot) {
  double s = 0, d = 0, dd = 0, t = 0, dt = 0;
  for (int64_t i = 0; i < n; ++i) s += static_cast<double>(value(i));
  const double shift = s / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    const double v = static_cast<double>(value(i)) - shift, w = dual ? static_cast<double>(dot(i)) : 0;
    d += v, dd += v * v, t += w, dt += v * w;
  }
  return moments_from(static_cast<double>(n), shift, d, dd, t, dt);
}

template <class T, bool dual>
NormMoments row_moments(const T* x, const T* x_dot, int64_t n) {
  constexpr int L = sum_lanes_of<T>;
  const auto exact = [&] {
    return exact_moments<dual>(n, [&](int64_t i) { return x[i]; }, [&](int64_t i) { return x_dot[i]; });
  };
  if (n < L) return exact();  // small images: the lanes' sums would take longer than the pixels
  T s[L] = {}, t[L] = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
#pragma GCC ivdep
    for (int l = 0; l < L; ++l) s[l] += x[i + l];
    if (dual) {
#pragma GCC ivdep
      for (int l = 0; l < L; ++l) t[l] += x_dot[i + l];
    }
  }
  const int64_t whole = i;
  for (; i < n; ++i) {
    s[i - whole] += x[i];
    if (dual) t[i - whole] += x_dot[i];
  }
  const T shift = static_cast<T>(total_of(s) / static_cast<double>(n));
  T d[L] = {}, dd[L] = {}, dt[L] = {};
  for (i = 0; i < whole; i += L) {
#pragma GCC ivdep
    for (int l = 0; l < L; ++l) {
      const T v = x[i + l] - shift;
      d[l] += v;
      dd[l] += v * v;
      if (dual) dt[l] += v * x_dot[i + l];
    }
  }
  for (; i < n; ++i) {
    const T v = x[i] - shift;
    d[i - whole] += v;
    dd[i - whole] += v * v;
    if (dual) dt[i - whole] += v * x_dot[i];
  }
  const double squares = total_of(dd);
  if (squares - squares != 0) return exact();  // beyond T
  return moments_from(static_cast<double>(n), static_cast<double>(shift), total_of(d), squares,
                      dual ? total_of(t) : 0, dual ? total_of(dt) : 0);
}

template <class T, bool dual, bool is_relu>
void row_apply(const T* x, const T* x_dot, int64_t n, const NormCoefficients<T>& k, T* y, T* y_dot) {
  const T mean = k.mean, mean_dot = k.mean_dot, scale = k.scale, bend = k.bend, shift = k.shift;
  const T shift_dot = k.shift_dot, slope = k.slope, slope_dot = k.slope_dot;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T d = x[i] - mean, v = scale * d + shift;
    if (dual) {
      const T w = scale * (x_dot[i] - mean_dot) + (bend * d + shift_dot),
              negative = slope * w + slope_dot * v;
      y_dot[i] = v > T(0) ? w : (is_relu ? slope_dot * v : negative);
    }
    y[i] = is_relu ? relu(v) : activate(v, slope);
  }
}

template <class T>
void row_sums(const T* x, const T* grad_y, int64_t n, const NormCoefficients<T>& k, double* sums) {
  constexpr int L = sum_lanes_of<T>;
  if (n < L) {
    double a = 0, b = 0, e = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T d = x[i] - k.mean, v = k.scale * d + k.shift;
      const double h = static_cast<double>(v > T(0) ? grad_y[i] : k.slope * grad_y[i]);
      a += h, b += h * static_cast<double>(d);
      e += v > T(0) ? 0.0 : static_cast<double>(grad_y[i]) * static_cast<double>(v);
    }
    sums[0] = a, sums[1] = b, sums[2] = e;
    return;
  }
  T a[L] = {}, b[L] = {}, e[L] = {};
  const T mean = k.mean, scale = k.scale, shift = k.shift, slope = k.slope;
  const auto add = [&](T from, T g, int l) {
    const T d = from - mean, v = scale * d + shift, h = v > T(0) ? g : slope * g;
    a[l] += h;
    b[l] += h * d;
    e[l] += v > T(0) ? T(0) : g * v;
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) {
#pragma GCC ivdep
    for (int l = 0; l < L; ++l) add(x[i + l], grad_y[i + l], l);
  }
  for (int l = 0; i < n; ++i, ++l) add(x[i], grad_y[i], l);
  sums[0] = total_of(a), sums[1] = total_of(b), sums[2] = total_of(e);
}

template <class T>
void row_gradient(const T* x, const T* grad_y, int64_t n, const NormGradient<T>& k, T* grad_x) {
  const T mean = k.mean, scale = k.scale, shift = k.shift, slope = k.slope;
  const T constant = k.constant, linear = k.linear, low = scale * slope;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T d = x[i] - mean, v = scale * d + shift;
    grad_x[i] = (v > T(0) ? scale : low) * grad_y[i] - (constant + linear * d);
  }
}

// ---- a tile: rows of `wide` columns, each with sums of its own ------------------------------------

// f(r, l): what to add for channel l of row r. Four rows at a time, so that the sums are seldom stored.
template <class T, class F>
void tile_sum(int64_t rows, int64_t wide, T* sum, const F& f) {
  for (int64_t c = 0; c < wide; ++c) sum[c] = T(0);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
#pragma GCC ivdep
    for (int64_t c = 0; c < wide; ++c) sum[c] += (f(r, c) + f(r + 1, c)) + (f(r + 2, c) + f(r + 3, c));
  }
  for (; r < rows; ++r) {
#pragma GCC ivdep
    for (int64_t c = 0; c < wide; ++c) sum[c] += f(r, c);
  }
}

// Part of an array. Channels last: rows are pixels, columns channels. Small images of a batch, channels
// first: rows are images, columns the pixels of neighbouring channels.
struct Block {
  int64_t at, step, rows;        // offset of the first row, from one row to the next, their number
  int64_t c, channels, columns;  // first channel, number of them, columns of each
  int64_t wide() const { return channels * columns; }
};

template <class T>
double channel_total(const T* sums, const Block& t, int64_t j) {
  double total = 0;
  for (int64_t i = 0; i < t.columns; ++i) total += static_cast<double>(sums[j * t.columns + i]);
  return total;
}

// The 8 coefficients of neighbouring columns, each in a row of its own.
template <class T>
struct Coefficients {
  const T* of;
  int64_t step;
  const T* row(int which) const { return of + which * step; }
};

// ---- whole arrays ---------------------------------------------------------------------------------

// The passes over one call's arrays in T. Partial sums: (B, C, chunks, 4); coefficients: (B or 1, 8, C).
template <class T>
struct Norm {
  const NormInputs& in;
  const NormOptions& o;
  NormShape s;
  NormParameters p;
  bool dual;
  double* partial;
  T* coefficients;
  int64_t chunk, chunks;
  int64_t fold, blocks;  // images of a tile, 1: tiles only of channels_last; how often that makes the batch
  int64_t fold_channels, channel_blocks;  // channels of such a tile; how many tiles make all

  Norm(const NormInputs& in, const NormOptions& o, bool dual, void* workspace)
      : in(in),
        o(o),
        s(norm_shape(in.x, o)),
        p(norm_parameters(in, o)),
        dual(dual),
        partial(static_cast<double*>(workspace)),
        chunk(chunk_of(s)),
        chunks(chunks_of(s)),
        fold(1),
        fold_channels(1) {
    if (!s.last && s.over_batch && s.batch > 1 && s.pixels > 0 && s.pixels < small_image) {
      constexpr int64_t most = tile_values / tile_channels;
      fold = s.batch < most ? s.batch : most;
      fold_channels = tile_channels / s.pixels;
    }
    blocks = (s.batch + fold - 1) / fold;
    channel_blocks = (s.channels + fold_channels - 1) / fold_channels;
    coefficients = reinterpret_cast<T*>(partial + s.batch * s.channels * chunks * 4);
  }

  double* part(int64_t b, int64_t c, int64_t k) const {
    return partial + ((b * s.channels + c) * chunks + k) * 4;
  }
  bool tiled() const { return s.last || fold > 1; }
  int64_t images_in(int64_t b) const { return s.batch - b * fold < fold ? s.batch - b * fold : fold; }
  int64_t pixels_in(int64_t b, int64_t k) const {
    if (fold > 1) return images_in(b) * s.pixels;
    const int64_t left = s.pixels - k * chunk;
    return left < chunk ? left : chunk;
  }
  // f(block, k of its partial sums) for tile k of images b: of channels_last, or of folded images.
  template <class F>
  void tiles(int64_t b, int64_t k, const F& f) const {
    if (fold > 1) {
      const int64_t c = k * fold_channels, left = s.channels - c;
      f(Block{s.offset(b * fold, c, 0), s.channels * s.pixels, images_in(b), c,
              left < fold_channels ? left : fold_channels, s.pixels},
        0);
      return;
    }
    for (int64_t c = 0; c < s.channels; c += tile_channels) {
      const int64_t left = s.channels - c;
      f(Block{s.offset(b, c, k * chunk), s.channels, pixels_in(b, k), c,
              left < tile_channels ? left : tile_channels, 1},
        k);
    }
  }
  // A channel's row of n pixels: where it lies or in `buffer`; where to compute one; what brings it home.
  const T* row(const Array& a, int64_t b, int64_t c, int64_t k, int64_t n, T* buffer) const {
    return fetch<T>(a, s.offset(b, c, k * chunk), 0, 1, n, buffer).data;
  }
  T* row_target(const Array& a, int64_t b, int64_t c, int64_t k, int64_t n, T* buffer) const {
    return place(a, s.offset(b, c, k * chunk), 0, n, buffer).data;
  }
  void put_row(const Array& a, int64_t b, int64_t c, int64_t k, int64_t n, const T* from) const {
    deliver(a, s.offset(b, c, k * chunk), 0, 1, n, from);
  }
  T* coefficient(int64_t b, int which) const {
    return coefficients + ((s.over_batch ? 0 : b) * norm_coefficients + which) * s.channels;
  }
  // Of a block's columns; `space` for what columns of one channel share.
  Coefficients<T> columns(int64_t b, const Block& t, T* space) const {
    if (t.columns == 1) return {coefficient(b, 0) + t.c, s.channels};
    for (int which = 0; which < norm_coefficients; ++which)
      for (int64_t j = 0; j < t.channels; ++j)
        for (int64_t i = 0; i < t.columns; ++i)
          space[which * tile_channels + j * t.columns + i] = coefficient(b, which)[t.c + j];
    return {space, tile_channels};
  }
  NormCoefficients<T> gather(int64_t b, int64_t c) const {
    const T* k = coefficient(b, 0) + c;
    const int64_t n = s.channels;
    return {k[0], k[n], k[2 * n], k[3 * n], k[4 * n], k[5 * n], k[6 * n], k[7 * n]};
  }
  NormGradient<T> gather_gradient(int64_t b, int64_t c) const {
    const T* k = coefficient(b, 0) + c;
    const int64_t n = s.channels;
    return {k[0], k[n], k[2 * n], k[3 * n], k[4 * n], k[5 * n]};
  }
  bool relu_only() const { return !in.slope && o.slope == 0; }

  int64_t images() const { return s.over_batch ? blocks : 1; }
  // f(b, c) for the channels of group u, of all images that share its statistics.
  template <class F>
  void members(int64_t u, const F& f) const {
    const int64_t first_b = s.over_batch ? 0 : u / s.groups;
    const int64_t first_c = s.over_batch ? u : u % s.groups * s.per_group();
    for (int64_t b = first_b; b < first_b + images(); ++b)
      for (int64_t c = first_c; c < first_c + s.per_group(); ++c) f(b, c);
  }
  template <class F>
  void members_backwards(int64_t u, const F& f) const {
    const int64_t first_b = s.over_batch ? 0 : u / s.groups;
    const int64_t first_c = s.over_batch ? u : u % s.groups * s.per_group();
    for (int64_t b = first_b + images() - 1; b >= first_b; --b)
      for (int64_t c = first_c + s.per_group() - 1; c >= first_c; --c) f(b, c);
  }

  // pass1(b, c, k) over channels-first rows or tiles (c = -1), finish(u) of each group, pass2. The second
  // pass goes backwards.
  template <class Pass1, class Finish, class Pass2>
  void run(const Exec& exec, const Pass1& pass1, const Finish& finish, const Pass2& pass2) const {
    const int threads = threads_for(exec, s.batch * s.channels * s.pixels);
    const int64_t units = s.statistics();
    if (!tiled() && units >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t u = 0; u < units; ++u) {
        members(u, [&](int64_t b, int64_t c) {
          for (int64_t k = 0; k < chunks; ++k) pass1(b, c, k);
        });
        finish(u);
        members_backwards(u, [&](int64_t b, int64_t c) {
          for (int64_t k = chunks - 1; k >= 0; --k) pass2(b, c, k);
        });
      }
      return;
    }
    if (fold > 1 && channel_blocks >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t k = 0; k < channel_blocks; ++k) {
        for (int64_t b = 0; b < blocks; ++b) pass1(b, -1, k);
        for (int64_t u = k * fold_channels; u < units && u < (k + 1) * fold_channels; ++u) finish(u);
        for (int64_t b = blocks - 1; b >= 0; --b) pass2(b, -1, k);
      }
      return;
    }
    const int64_t rows = tiled() ? 1 : s.channels, parts = fold > 1 ? channel_blocks : chunks;
    const int64_t all = blocks * rows * parts;
    const auto each = [&](const auto& pass, int64_t i) {
      pass(i / (rows * parts), tiled() ? -1 : i / parts % rows, i % parts);
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < all; ++i) each(pass1, i);
    for (int64_t u = 0; u < units; ++u) finish(u);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = all - 1; i >= 0; --i) each(pass2, i);
  }

  // ---- forward

  void row_statistics(int64_t b, int64_t c, int64_t k) const {
    T space[2][row_pixels];
    const int64_t n = pixels_in(b, k);
    const T* x = row(in.x, b, c, k, n, space[0]);
    double* to = part(b, c, k);
    const NormMoments m = dual ? row_moments<T, true>(x, row(in.x_dot, b, c, k, n, space[1]), n)
                               : row_moments<T, false>(x, nullptr, n);
    to[0] = m.mean, to[1] = m.squares, to[2] = m.sum_dot, to[3] = m.product;
  }
  void tile_statistics(int64_t b, int64_t k) const {
    T space[2][tile_values], shift[tile_channels], d[tile_channels], dd[tile_channels], t[tile_channels],
        dt[tile_channels];
    tiles(b, k, [&](const Block& block, int64_t at) {
      const int64_t n = block.rows, wide = block.wide();
      const double count = static_cast<double>(n * block.columns);
      const Tile<T> x = fetch<T>(in.x, block.at, block.step, n, wide, space[0]);
      tile_sum(n, wide, d, [&](int64_t r, int64_t l) { return x.data[r * x.step + l]; });
      for (int64_t j = 0; j < block.channels; ++j) {
        const T mean = static_cast<T>(channel_total(d, block, j) / count);
        for (int64_t i = 0; i < block.columns; ++i) shift[j * block.columns + i] = mean;
      }
      const auto off = [&](int64_t r, int64_t l) { return x.data[r * x.step + l] - shift[l]; };
      tile_sum(n, wide, d, off);
      tile_sum(n, wide, dd, [&](int64_t r, int64_t l) { return off(r, l) * off(r, l); });
      Tile<T> y{};
      if (dual) {
        y = fetch<T>(in.x_dot, block.at, block.step, n, wide, space[1]);
        tile_sum(n, wide, t, [&](int64_t r, int64_t l) { return y.data[r * y.step + l]; });
        tile_sum(n, wide, dt, [&](int64_t r, int64_t l) { return off(r, l) * y.data[r * y.step + l]; });
      }
      for (int64_t j = 0; j < block.channels; ++j) {
        const int64_t first = j * block.columns;
        const double squares = channel_total(dd, block, j);
        NormMoments m;
        if (squares - squares == 0) {
          m = moments_from(count, static_cast<double>(shift[first]), channel_total(d, block, j), squares,
                           dual ? channel_total(t, block, j) : 0, dual ? channel_total(dt, block, j) : 0);
        } else {  // beyond T
          const auto of = [&](const Tile<T>& a) {
            return [&](int64_t i) { return a.data[i / block.columns * a.step + first + i % block.columns]; };
          };
          m = dual ? exact_moments<true>(n * block.columns, of(x), of(y))
                   : exact_moments<false>(n * block.columns, of(x), of(x));
        }
        double* to = part(b, block.c + j, at);
        to[0] = m.mean, to[1] = m.squares, to[2] = m.sum_dot, to[3] = m.product;
      }
    });
  }

  // The group's moments, joined from its chunks' around the common mean.
  NormMoments join(int64_t u) const {
    double mean = 0, t = 0;
    members(u, [&](int64_t b, int64_t c) {
      for (int64_t k = 0; k < chunks; ++k) {
        const double* m = part(b, c, k);
        mean += static_cast<double>(pixels_in(b, k)) * m[0];
        t += m[2];
      }
    });
    mean /= s.count();
    double squares = 0, product = 0;
    members(u, [&](int64_t b, int64_t c) {
      for (int64_t k = 0; k < chunks; ++k) {
        const double* m = part(b, c, k);
        const double off = m[0] - mean;
        squares += m[1] + static_cast<double>(pixels_in(b, k)) * off * off;
        product += m[3] + off * m[2];
      }
    });
    return {mean, squares, t, product};
  }

  void finish_forward(int64_t u, double* stats) const {
    double* of = stats + u * norm_stats;
    const NormVector mean = norm_vector(in.running_mean), var = norm_vector(in.running_var);
    if (o.given) {
      of[0] = value_at(mean, u, 0), of[1] = 1 / sqrt(value_at(var, u, 1) + o.eps), of[2] = of[3] = 0;
    } else {
      const NormMoments whole = join(u);
      statistics_from(s.count(), whole, o.eps, of);
      update_running(mean, var, u, s.count(), whole, o.momentum);
    }
    set_coefficients(u, of);
  }
  void set_coefficients(int64_t u, const double* of) const {
    members(u, [&](int64_t b, int64_t c) {
      if (s.over_batch && b > 0) return;
      const NormCoefficients<T> k = coefficients_of<T>(of, p, c);
      const T values[norm_coefficients] = {k.mean,  k.mean_dot,  k.scale, k.bend,
                                           k.shift, k.shift_dot, k.slope, k.slope_dot};
      for (int v = 0; v < norm_coefficients; ++v) coefficient(b, v)[c] = values[v];
    });
  }

  void row_forward(int64_t b, int64_t c, int64_t k, const Array& y, const Array& y_dot) const {
    T space[4][row_pixels];
    const int64_t n = pixels_in(b, k);
    const T* x = row(in.x, b, c, k, n, space[0]);
    T* to = row_target(y, b, c, k, n, space[2]);
    const NormCoefficients<T> q = gather(b, c);
    if (!dual) {
      if (relu_only())
        row_apply<T, false, true>(x, nullptr, n, q, to, nullptr);
      else
        row_apply<T, false, false>(x, nullptr, n, q, to, nullptr);
    } else {
      const T* x_dot = row(in.x_dot, b, c, k, n, space[1]);
      T* to_dot = row_target(y_dot, b, c, k, n, space[3]);
      if (relu_only())
        row_apply<T, true, true>(x, x_dot, n, q, to, to_dot);
      else
        row_apply<T, true, false>(x, x_dot, n, q, to, to_dot);
      put_row(y_dot, b, c, k, n, to_dot);
    }
    put_row(y, b, c, k, n, to);
  }
  void tile_forward(int64_t b, int64_t k, const Array& y, const Array& y_dot) const {
    T space[4][tile_values], shared[norm_coefficients * tile_channels];
    tiles(b, k, [&](const Block& block, int64_t) {
      const int64_t n = block.rows, wide = block.wide(), at = block.at, step = block.step;
      const Coefficients<T> q = columns(b, block, shared);
      const Tile<T> x = fetch<T>(in.x, at, step, n, wide, space[0]);
      const Target<T> to = place(y, at, step, wide, space[2]);
      Tile<T> x_dot{};
      Target<T> to_dot{};
      if (dual) {
        x_dot = fetch<T>(in.x_dot, at, step, n, wide, space[1]);
        to_dot = place(y_dot, at, step, wide, space[3]);
      }
      const T *mean = q.row(0), *mean_dot = q.row(1), *scale = q.row(2), *bend = q.row(3), *shift = q.row(4),
              *shift_dot = q.row(5), *slope = q.row(6), *slope_dot = q.row(7);
      const bool only_relu = relu_only();
      for (int64_t r = 0; r < n; ++r) {
        const T* from = x.data + r * x.step;
        T* out = to.data + r * to.step;
        if (dual) {
          const T* from_dot = x_dot.data + r * x_dot.step;
          T* out_dot = to_dot.data + r * to_dot.step;
#pragma GCC ivdep
          for (int64_t l = 0; l < wide; ++l) {
            const T d = from[l] - mean[l], v = scale[l] * d + shift[l];
            const T w = scale[l] * (from_dot[l] - mean_dot[l]) + (bend[l] * d + shift_dot[l]);
            const T negative = slope[l] * w + slope_dot[l] * v;
            out_dot[l] = v > T(0) ? w : negative;
            out[l] = v;
          }
        } else {
#pragma GCC ivdep
          for (int64_t l = 0; l < wide; ++l) out[l] = scale[l] * (from[l] - mean[l]) + shift[l];
        }
        if (only_relu) {
#pragma GCC ivdep
          for (int64_t l = 0; l < wide; ++l) out[l] = relu(out[l]);
        } else {
#pragma GCC ivdep
          for (int64_t l = 0; l < wide; ++l) out[l] = activate(out[l], slope[l]);
        }
      }
      deliver(y, at, step, n, wide, to.data);
      if (dual) deliver(y_dot, at, step, n, wide, to_dot.data);
    });
  }

  void forward(const Array& y, const Array& y_dot, const Array& stats, const Exec& exec) const {
    double* const all = static_cast<double*>(stats.data);
    run(
        exec,
        [&](int64_t b, int64_t c, int64_t k) {
          if (o.given) return;
          tiled() ? tile_statistics(b, k) : row_statistics(b, c, k);
        },
        [&](int64_t u) { finish_forward(u, all); },
        [&](int64_t b, int64_t c, int64_t k) {
          tiled() ? tile_forward(b, k, y, y_dot) : row_forward(b, c, k, y, y_dot);
        });
  }

  // ---- backward

  void row_backward_sums(int64_t b, int64_t c, int64_t k, const Array& grad_y) const {
    T space[2][row_pixels];
    const int64_t n = pixels_in(b, k);
    row_sums(row(in.x, b, c, k, n, space[0]), row(grad_y, b, c, k, n, space[1]), n, gather(b, c),
             part(b, c, k));
  }
  void tile_backward_sums(int64_t b, int64_t k, const Array& grad_y) const {
    T space[2][tile_values], sums[norm_grad_sums][tile_channels], shared[norm_coefficients * tile_channels];
    tiles(b, k, [&](const Block& block, int64_t at) {
      const int64_t n = block.rows, wide = block.wide();
      const Tile<T> x = fetch<T>(in.x, block.at, block.step, n, wide, space[0]);
      const Tile<T> g = fetch<T>(grad_y, block.at, block.step, n, wide, space[1]);
      const Coefficients<T> q = columns(b, block, shared);
      const T *mean = q.row(0), *scale = q.row(2), *shift = q.row(4), *slope = q.row(6);
      // By value, and both of a choice's ends before it: only then do these become vectors.
      const auto off = [=](int64_t r, int64_t l) { return x.data[r * x.step + l] - mean[l]; };
      const auto before = [=](int64_t r, int64_t l) { return scale[l] * off(r, l) + shift[l]; };
      const auto through = [=](int64_t r, int64_t l) {
        const T h = g.data[r * g.step + l], low = slope[l] * h;
        return before(r, l) > T(0) ? h : low;
      };
      tile_sum(n, wide, sums[0], through);
      tile_sum(n, wide, sums[1], [=](int64_t r, int64_t l) { return through(r, l) * off(r, l); });
      if (in.slope)
        tile_sum(n, wide, sums[2], [=](int64_t r, int64_t l) {
          const T v = before(r, l), h = g.data[r * g.step + l] * v;
          return v > T(0) ? T(0) : h;
        });
      for (int64_t j = 0; j < block.channels; ++j) {
        double* to = part(b, block.c + j, at);
        for (int v = 0; v < norm_grad_sums - !in.slope; ++v) to[v] = channel_total(sums[v], block, j);
        if (!in.slope) to[2] = 0;
      }
    });
  }

  // The group's projections; the gradient's coefficients take the place of the forward ones.
  void finish_backward(int64_t u, const double* stats) const {
    const double* of = stats + u * norm_stats;
    double a = 0, ax = 0;
    members(u, [&](int64_t b, int64_t c) {
      const double weight = value_at(p.weight, c, 1),
                   off = static_cast<double>(static_cast<T>(of[0])) - of[0];
      for (int64_t k = 0; k < chunks; ++k) {
        double* sums = part(b, c, k);
        sums[1] += off * sums[0];
        a += weight * sums[0], ax += weight * sums[1];
      }
    });
    const double r = of[1];
    const double projections[2] = {o.given ? 0 : r * a / s.count(), o.given ? 0 : r * r * r * ax / s.count()};
    members(u, [&](int64_t b, int64_t c) {
      if (s.over_batch && b > 0) return;
      const NormGradient<T> k = gradient_of<T>(of, p, c, projections);
      const T values[6] = {k.mean, k.scale, k.shift, k.slope, k.constant, k.linear};
      for (int v = 0; v < 6; ++v) coefficient(b, v)[c] = values[v];
    });
  }

  void row_backward(int64_t b, int64_t c, int64_t k, const Array& grad_y, const Array& grad_x) const {
    T space[3][row_pixels];
    const int64_t n = pixels_in(b, k);
    T* to = row_target(grad_x, b, c, k, n, space[2]);
    row_gradient(row(in.x, b, c, k, n, space[0]), row(grad_y, b, c, k, n, space[1]), n, gather_gradient(b, c),
                 to);
    put_row(grad_x, b, c, k, n, to);
  }
  void tile_backward(int64_t b, int64_t k, const Array& grad_y, const Array& grad_x) const {
    T space[3][tile_values], shared[norm_coefficients * tile_channels];
    tiles(b, k, [&](const Block& block, int64_t) {
      const int64_t n = block.rows, wide = block.wide(), at = block.at, step = block.step;
      const Tile<T> x = fetch<T>(in.x, at, step, n, wide, space[0]);
      const Tile<T> g = fetch<T>(grad_y, at, step, n, wide, space[1]);
      const Target<T> to = place(grad_x, at, step, wide, space[2]);
      const Coefficients<T> q = columns(b, block, shared);
      const T *mean = q.row(0), *scale = q.row(1), *shift = q.row(2), *slope = q.row(3), *constant = q.row(4),
              *linear = q.row(5);
      for (int64_t r = 0; r < n; ++r) {
        const T *from = x.data + r * x.step, *grad = g.data + r * g.step;
        T* out = to.data + r * to.step;
#pragma GCC ivdep
        for (int64_t l = 0; l < wide; ++l) {
          const T d = from[l] - mean[l], v = scale[l] * d + shift[l], low = slope[l] * scale[l];
          out[l] = (v > T(0) ? scale[l] : low) * grad[l] - (constant[l] + linear[l] * d);
        }
      }
      deliver(grad_x, at, step, n, wide, to.data);
    });
  }

  void backward(const Array& grad_y, const Array& stats, const Array& grad_x, const Array& grad_weight,
                const Array& grad_bias, const Array& grad_slope, const Exec& exec) const {
    const double* const all = static_cast<const double*>(stats.data);
    for (int64_t u = 0; u < s.statistics(); ++u) set_coefficients(u, all + u * norm_stats);
    run(
        exec,
        [&](int64_t b, int64_t c, int64_t k) {
          tiled() ? tile_backward_sums(b, k, grad_y) : row_backward_sums(b, c, k, grad_y);
        },
        [&](int64_t u) { finish_backward(u, all); },
        [&](int64_t b, int64_t c, int64_t k) {
          if (!grad_x) return;
          tiled() ? tile_backward(b, k, grad_y, grad_x) : row_backward(b, c, k, grad_y, grad_x);
        });
    const NormVector to[3] = {norm_vector(grad_bias), norm_vector(grad_weight), norm_vector(grad_slope)};
    double slope = 0;
    for (int64_t c = 0; c < s.channels; ++c) {
      double sums[norm_grad_sums] = {};
      for (int64_t b = 0; b < blocks; ++b) {
        const double r = all[s.statistic_of(b, c) * norm_stats + 1];
        for (int64_t k = 0; k < chunks; ++k) {
          const double* of = part(b, c, k);
          sums[0] += of[0], sums[1] += r * of[1], sums[2] += of[2];
        }
      }
      slope += sums[2];
      for (int v = 0; v < 3; ++v)
        if (to[v].data && (v < 2 || grad_slope.shape[0] == s.channels)) set_value(to[v], c, sums[v]);
    }
    if (to[2].data && grad_slope.shape[0] == 1) set_value(to[2], 0, slope);
  }
};

}  // namespace

size_t norm_workspace(const NormInputs& in, const NormOptions& o, const Exec&) {
  const NormShape s = norm_shape(in.x, o);
  const int64_t partial = s.batch * s.channels * chunks_of(s) * 4;
  const int64_t coefficients = (s.over_batch ? 1 : s.batch) * s.channels * norm_coefficients;
  return static_cast<size_t>(partial + coefficients) * sizeof(double);
}

void norm_forward(const NormInputs& in, const NormOptions& options, const Array& y, const Array& y_dot,
                  const Array& stats, void* workspace, const Exec& exec) {
  const bool dual = static_cast<bool>(y_dot);
  if (in.x.dtype == DType::f64)
    Norm<double>(in, options, dual, workspace).forward(y, y_dot, stats, exec);
  else
    Norm<float>(in, options, dual, workspace).forward(y, y_dot, stats, exec);
}

void norm_backward(const NormInputs& in, const NormOptions& options, const Array& grad_y, const Array& stats,
                   const Array& grad_x, const Array& grad_weight, const Array& grad_bias,
                   const Array& grad_slope, void* workspace, const Exec& exec) {
  if (in.x.dtype == DType::f64)
    Norm<double>(in, options, false, workspace)
        .backward(grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope, exec);
  else
    Norm<float>(in, options, false, workspace)
        .backward(grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope, exec);
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, norm_workspace, (const NormInputs& in, const NormOptions& options, const Exec& exec),
             (in, options, exec))
NOISYSEG_API(void, norm_forward,
             (const NormInputs& in, const NormOptions& options, const Array& y, const Array& y_dot,
              const Array& stats, void* workspace, const Exec& exec),
             (in, options, y, y_dot, stats, workspace, exec))
NOISYSEG_API(void, norm_backward,
             (const NormInputs& in, const NormOptions& options, const Array& grad_y, const Array& stats,
              const Array& grad_x, const Array& grad_weight, const Array& grad_bias, const Array& grad_slope,
              void* workspace, const Exec& exec),
             (in, options, grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope, workspace, exec))
