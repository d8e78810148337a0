// Fused losses on the CPU.
//
// An image's pixels are cut into chunks of a fixed size; a chunk is one thread's work and gives one partial
// sum, and the partial sums are added in order: the same bits whatever the threads. Within a chunk, blocks
// of up to 256 pixels are brought to float (or double) in the L1 cache, where that is not what they are,
// and every formula is then a plain loop over 16 lanes that the compiler vectorises.
//
// Bytes per pixel and channel, fp32 logits and uint8 labels: forward 5 read; backward 5 read, 4 written.
#include "noisyseg/losses.h"

#include "cpu/parallel.h"
#include "formulas/dtype.h"
#include "formulas/losses.h"
#include "layout.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

using namespace formulas;

constexpr int lanes = 16;
constexpr int block_pixels = 512;
constexpr int64_t chunk_pixels = 4096;  // fixed: it decides the order of the sums
constexpr int buffer_values = 16384;    // a block of all channels: 64 KB of float
constexpr int64_t max_channels = buffer_values / lanes;

int64_t chunks_of(const Layout& layout) { return (layout.pixels() + chunk_pixels - 1) / chunk_pixels; }

// As many pixels as fit the buffer with all their channels.
int block_of(int64_t channels) {
  const int64_t fit = buffer_values / (channels > 0 ? channels : 1) / lanes * lanes;
  return static_cast<int>(fit < block_pixels ? fit : block_pixels);
}

int padded(int n) { return (n + lanes - 1) / lanes * lanes; }

template <class T, class From>
void load_row(const char* data, int64_t offset, int64_t step, int n, T* out) {
  const From* from = reinterpret_cast<const From*>(data) + offset;
  if (step == 1)
    for (int i = 0; i < n; ++i) out[i] = to_real<T>(from[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = to_real<T>(from[i * step]);
}

template <class T, class To>
void store_row(char* data, int64_t offset, int64_t step, int n, const T* in) {
  To* to = reinterpret_cast<To*>(data) + offset;
  if (step == 1)
    for (int i = 0; i < n; ++i) assign(to[i], in[i]);
  else
    for (int i = 0; i < n; ++i) assign(to[i * step], in[i]);
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

// Calls f(offset, done, m) for each run of m pixels that lie in one row, among pixels [q, q + n).
template <class F>
inline void for_rows(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, const F& f) {
  const int64_t width = layout.extent[2];
  if (layout.extent[0] * layout.extent[1] == 1) return f(base + q * plane.step[2], 0, n);  // no division
  int64_t row = q / width, column = q % width;
  for (int done = 0; done < n; ++row, column = 0) {
    const int64_t left = width - column;
    const int m = left < n - done ? static_cast<int>(left) : n - done;
    const int64_t offset = base + (row / layout.extent[1]) * plane.step[0] +
                           (row % layout.extent[1]) * plane.step[1] + column * plane.step[2];
    f(offset, done, m);
    done += m;
  }
}

// The address of pixels [q, q + n) if they are T, without gaps and a multiple of the lanes; else `buffer`.
template <class T>
const T* load_direct(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n,
                     const T* buffer) {
  if (plane.dtype != dtype_of<T>() || plane.step[2] != 1 || n % lanes != 0 ||
      (layout.extent[0] * layout.extent[1] > 1 && q % layout.extent[2] + n > layout.extent[2]))
    return buffer;
  const T* direct = nullptr;
  for_rows(plane, layout, base, q, n,
           [&](int64_t offset, int, int) { direct = reinterpret_cast<const T*>(plane.data) + offset; });
  return direct;
}

// Pixels [q, q + n) of one plane as T, zeros behind them up to a multiple of the lanes: where they lie, if
// they lie there as T already, otherwise in `buffer`.
template <class T>
const T* load(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, T* buffer) {
  const T* direct = load_direct<T>(plane, layout, base, q, n, buffer);
  if (direct != buffer) return direct;
  for_rows(plane, layout, base, q, n, [&](int64_t offset, int done, int m) {
#define CASE(From) load_row<T, From>(plane.data, offset, plane.step[2], m, buffer + done);
    NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
  });
  for (int i = n; i < padded(n); ++i) buffer[i] = T(0);
  return buffer;
}

template <class T>
void store(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, const T* values) {
  for_rows(plane, layout, base, q, n, [&](int64_t offset, int done, int m) {
#define CASE(To) store_row<T, To>(plane.data, offset, plane.step[2], m, values + done);
    NOISYSEG_DTYPE_CASES(plane.dtype, CASE)
#undef CASE
  });
}

// Where to compute a block's results: in place, if the plane holds T without gaps there, otherwise `buffer`,
// to be stored afterwards.
template <class T>
T* destination(const Plane& plane, const Layout& layout, int64_t base, int64_t q, int n, T* buffer) {
  return const_cast<T*>(load_direct<T>(plane, layout, base, q, n, buffer));
}

struct Planes {
  Plane logits, target, weight, mask, other;  // other: the gradient or the loss map
  Plane map;                                  // the gradient with respect to the loss map
  bool labels;                                // target holds class numbers
  Layout layout;
};

Planes make_planes(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                   const Array& other, const Array& map) {
  Planes p;
  const Array arrays[6] = {logits, target, weight, mask, other, map};
  Plane planes[6];
  p.layout = make_layout(arrays, planes, 6);
  p.logits = planes[0], p.target = planes[1], p.weight = planes[2], p.mask = planes[3], p.other = planes[4],
  p.map = planes[5];
  p.labels = target.rank == logits.rank - 1;
  if (p.layout.channels > max_channels) throw std::invalid_argument("logits has more than 1024 channels");
  return p;
}

// The target of a block as one map for each class, without ever expanding labels in memory.
template <class T>
class Target {
 public:
  Target(const Planes& planes, int64_t b) : planes_(planes), base_(b * planes.target.batch) {}

  // Returns whether all labels of pixels with a weight are in range.
  bool begin(int64_t q, int n, const T* w) {
    q_ = q, n_ = n, stray_ = false;
    if (!planes_.labels) return true;
    const int classes = planes_.layout.channels == 1 ? 2 : static_cast<int>(planes_.layout.channels);
    return classes < 256 ? begin_as(classes, q, n, w, narrow_) : begin_as(classes, q, n, w, wide_);
  }

  // Whether the block has labels out of range: such a pixel is of no class.
  bool stray() const { return stray_; }

  const T* channel(int64_t c, T* buffer) const {
    if (!planes_.labels)
      return load(planes_.target, planes_.layout, base_ + c * planes_.target.channel, q_, n_, buffer);
    return select(c, T(1), T(0), buffer);
  }

  // With labels: -1 where the class is c, else 1; see hard_pixel.
  const T* sides(int64_t c, T* buffer) const { return select(c, T(-1), T(1), buffer); }

 private:
  const T* select(int64_t c, T there, T elsewhere, T* buffer) const {
    const int wanted = planes_.layout.channels == 1 ? 1 : static_cast<int>(c);
    const int np = padded(n_);
    if (planes_.layout.channels < 256)
      for (int i = 0; i < np; ++i) buffer[i] = narrow_[i] == wanted ? there : elsewhere;
    else
      for (int i = 0; i < np; ++i) buffer[i] = wide_[i] == wanted ? there : elsewhere;
    return buffer;
  }

  template <class Label>
  bool begin_as(int classes, int64_t q, int n, const T* w, Label* out) {
    const Plane& target = planes_.target;
    int64_t least = 0, most = 0;
    for_rows(target, planes_.layout, base_, q, n, [&](int64_t offset, int done, int m) {
      if (target.dtype == DType::i64)
        read<int64_t>(offset, m, out + done, least, most);
      else if (target.dtype == DType::i32)
        read<int32_t>(offset, m, out + done, least, most);
      else
        read<uint8_t>(offset, m, out + done, least, most);
    });
    for (int i = n; i < padded(n); ++i) out[i] = 0;
    if (least >= 0 && most < classes) return true;
    // Rare. A label out of range is fine where the mask leaves it out; 255 is the usual "unlabelled".
    bool good = stray_ = true;
    for_rows(target, planes_.layout, base_, q, n, [&](int64_t offset, int done, int m) {
      for (int i = 0; i < m; ++i) {
        const int64_t label = label_at(offset + i * target.step[2]);
        if (label >= 0 && label < classes) continue;
        out[done + i] = static_cast<Label>(classes);  // no class
        good &= w != nullptr && w[done + i] == T(0);
      }
    });
    return good;
  }

  int64_t label_at(int64_t offset) const {
    const char* data = planes_.target.data;
    if (planes_.target.dtype == DType::i64) return reinterpret_cast<const int64_t*>(data)[offset];
    if (planes_.target.dtype == DType::i32) return reinterpret_cast<const int32_t*>(data)[offset];
    return reinterpret_cast<const uint8_t*>(data)[offset];
  }

  template <class From, class Label>
  void read(int64_t offset, int m, Label* out, int64_t& least, int64_t& most) const {
    const From* from = reinterpret_cast<const From*>(planes_.target.data) + offset;
    const int64_t step = planes_.target.step[2];
    From low = 0, high = 0;
    if (step == 1 &&
        sizeof(From) == sizeof(Label)) {  // bytes: no loop that both reads and writes, for the vectoriser
      __builtin_memcpy(out, from, static_cast<size_t>(m) * sizeof(From));
      for (int i = 0; i < m; ++i) high = from[i] > high ? from[i] : high;
      if (sizeof(From) > 1)
        for (int i = 0; i < m; ++i) low = from[i] < low ? from[i] : low;
    } else if (step == 1) {
      for (int i = 0; i < m; ++i) {
        out[i] = static_cast<Label>(from[i]);
        low = from[i] < low ? from[i] : low;
        high = from[i] > high ? from[i] : high;
      }
    } else {
      for (int i = 0; i < m; ++i) {
        const From x = from[i * step];
        out[i] = static_cast<Label>(x);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
    }
    least = low < least ? static_cast<int64_t>(low) : least;
    most = high > most ? static_cast<int64_t>(high) : most;
  }

  const Planes& planes_;
  int64_t base_, q_ = 0;
  int n_ = 0;
  bool stray_ = false;
  union {
    uint8_t narrow_[block_pixels];
    int32_t wide_[block_pixels];
  };
};

// weight where mask is not 0, else 0; zeros behind the last pixel. nullptr: every pixel counts once.
template <class T>
const T* load_weight(const Planes& p, int64_t b, int64_t q, int n, T* buffer, T* scratch) {
  if (!p.weight && !p.mask && n % lanes == 0) return nullptr;
  const T* weight = p.weight ? load(p.weight, p.layout, b * p.weight.batch, q, n, scratch) : nullptr;
  for (int i = 0; i < padded(n); ++i) buffer[i] = i >= n ? T(0) : weight ? weight[i] : T(1);
  if (p.mask) {
    const T* keep = load(p.mask, p.layout, b * p.mask.batch, q, n, scratch);
    for (int i = 0; i < padded(n); ++i) buffer[i] = keep[i] != T(0) ? buffer[i] : T(0);
  }
  return buffer;
}

template <class T>
double sum_lanes(const T* x) {
  double half[lanes / 2];
  for (int l = 0; l < lanes / 2; ++l)
    half[l] = static_cast<double>(x[l]) + static_cast<double>(x[l + lanes / 2]);
  for (int width = lanes / 4; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) half[l] += half[l + width];
  return half[0];
}

// p = softmax over channels of a block, in place: x[c * stride + i].
template <class T>
void softmax(T* x, int64_t channels, int stride, int n) {
  T top[block_pixels], sum[block_pixels];
  for (int i = 0; i < n; ++i) top[i] = x[i], sum[i] = T(0);
  for (int64_t c = 1; c < channels; ++c)
    for (int i = 0; i < n; ++i) top[i] = max_(top[i], x[c * stride + i]);
  for (int64_t c = 0; c < channels; ++c) {
    T* row = x + c * stride;
    for (int i = 0; i < n; ++i) {
      row[i] = exp_(row[i] - top[i]);
      sum[i] += row[i];
    }
  }
  for (int i = 0; i < n; ++i) sum[i] = T(1) / sum[i];
  for (int64_t c = 0; c < channels; ++c)
    for (int i = 0; i < n; ++i) x[c * stride + i] *= sum[i];
}

template <class T>
void load_channels(const Planes& p, int64_t b, int64_t q, int n, int stride, T* x) {
  for (int64_t c = 0; c < p.layout.channels; ++c) {
    T* row = x + c * stride;
    const T* from = load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, row);
    if (from != row)
      for (int i = 0; i < n; ++i) row[i] = from[i];
  }
}

// ---- ratio losses ---------------------------------------------------------------------------------

// h and r of a block's sigmoids (formulas/losses.h), in loops of their own: a CPU looks only some forty
// operations ahead, and one loop with everything in it would wait for its own long chain (1.4 times slower).
template <class T>
void half_sigmoids(const T* z, int n, T* h, T* large) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) h[i] = half_exponential(z[i]);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) large[i] = larger_root(h[i]);
}

// What a block's pixels are given as.
enum class Given {
  hard,          // logits and the sides of hard labels (hard_pixel)
  soft,          // logits and targets
  probabilities  // probabilities and targets
};

template <class T, Ratio ratio, Power power, bool squared>
struct Region {
  template <Given given, bool weighted>
  static void sums(const T* x, const T* g, const T* w, int n, T gamma, double* out) {
    T numerator[lanes] = {}, denominator[lanes] = {}, h[block_pixels], large[block_pixels];
    if (given != Given::probabilities) half_sigmoids(x, n, h, large);
    for (int i = 0; i < n; i += lanes) {
#pragma GCC ivdep
      for (int l = 0; l < lanes; ++l) {
        T nu, de;
        if (given == Given::hard) {
          const HardPixel<T> a = hard_pixel(x[i + l], g[i + l], h[i + l], large[i + l]);
          nu = ratio_numerator<ratio, power>(a.difference, a.p, a.g, gamma);
          de = ratio_denominator<squared>(a.p, a.g);
        } else {
          const Probability<T> a =
              given == Given::soft ? sigmoid(x[i + l], h[i + l], large[i + l]) : given_probability(x[i + l]);
          nu = ratio_numerator<ratio, power>(difference<false>(a, g[i + l]), a.p, g[i + l], gamma);
          de = ratio_denominator<squared>(a.p, g[i + l]);
        }
        if (weighted) {
          numerator[l] += w[i + l] != T(0) ? w[i + l] * nu : T(0);
          denominator[l] += w[i + l] != T(0) ? w[i + l] * de : T(0);
        } else {
          numerator[l] += nu;
          denominator[l] += de;
        }
      }
    }
    out[0] += sum_lanes(numerator);
    out[1] += sum_lanes(denominator);
  }

  // dL/dp, times dp/dz if logits are given
  template <Given given, bool weighted>
  static void slopes(const T* x, const T* g, const T* w, int n, T gamma, T by_numerator, T by_denominator,
                     T* out) {
    T h[block_pixels], large[block_pixels];
    if (given != Given::probabilities) half_sigmoids(x, n, h, large);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      T d;
      if (given == Given::hard) {
        const HardPixel<T> a = hard_pixel(x[i], g[i], h[i], large[i]);
        d = by_numerator * ratio_numerator_slope<ratio, power>(a.difference, a.g, gamma) +
            by_denominator * ratio_denominator_slope<squared>(a.p);
        d *= a.edge * a.edge;
      } else {
        const Probability<T> a =
            given == Given::soft ? sigmoid(x[i], h[i], large[i]) : given_probability(x[i]);
        d = by_numerator * ratio_numerator_slope<ratio, power>(difference<false>(a, g[i]), g[i], gamma) +
            by_denominator * ratio_denominator_slope<squared>(a.p);
        if (given == Given::soft) d *= a.p * a.q;
      }
      if (weighted) d = w[i] != T(0) ? d * w[i] : T(0);
      out[i] = d;
    }
  }

  static bool forward_chunk(const Planes& p, const RegionOptions& o, int64_t b, int64_t chunk,
                            double* partial) {
    const int64_t channels = p.layout.channels, first = channels > 1 && !o.include_background;
    const int64_t end =
        (chunk + 1) * chunk_pixels < p.layout.pixels() ? (chunk + 1) * chunk_pixels : p.layout.pixels();
    const bool soft = o.activation == Activation::softmax;
    const int block = soft ? block_of(channels) : block_pixels;
    const T gamma = static_cast<T>(o.gamma);
    alignas(64) T x[buffer_values], zs[block_pixels], gs[block_pixels], ws[block_pixels];
    Target<T> target(p, b);
    bool good = true;
    for (int64_t c = 0; c < 2 * channels; ++c) partial[c] = 0;
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      const int np = padded(n);
      const T* w = load_weight(p, b, q, n, ws, zs);
      good &= target.begin(q, n, w);
      if (soft) {
        load_channels(p, b, q, n, block, x);
        if (channels == 2) {  // one sigmoid of the difference, exact at both ends
          for (int i = 0; i < np; ++i) x[i] = x[block + i] - x[i], x[block + i] = x[i];
          for (int i = 0; i < np; ++i) x[i] = -x[i];
        } else {
          softmax(x, channels, block, np);
        }
      }
      for (int64_t c = first; c < channels; ++c) {
        const T* z = soft ? x + c * block
                          : load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, zs);
        const Given given = soft && channels > 2 ? Given::probabilities
                            : p.labels           ? Given::hard
                                                 : Given::soft;
        const T* g = given == Given::hard ? target.sides(c, gs) : target.channel(c, gs);
        const auto run = given == Given::hard ? (w ? sums<Given::hard, true> : sums<Given::hard, false>)
                         : given == Given::soft
                             ? (w ? sums<Given::soft, true> : sums<Given::soft, false>)
                             : (w ? sums<Given::probabilities, true> : sums<Given::probabilities, false>);
        run(z, g, w, np, gamma, partial + 2 * c);
      }
    }
    return good;
  }

  // coefficients: (C, 2), the loss's derivatives with respect to the two sums of each class
  static void backward_chunk(const Planes& p, const RegionOptions& o, int64_t b, int64_t chunk,
                             const double* coefficients) {
    const int64_t channels = p.layout.channels, first = channels > 1 && !o.include_background;
    const int64_t end =
        (chunk + 1) * chunk_pixels < p.layout.pixels() ? (chunk + 1) * chunk_pixels : p.layout.pixels();
    const bool soft = o.activation == Activation::softmax;
    const int block = soft ? block_of(channels) : block_pixels;
    const T gamma = static_cast<T>(o.gamma);
    alignas(64) T x[buffer_values], d[buffer_values], zs[block_pixels], gs[block_pixels], ws[block_pixels];
    Target<T> target(p, b);
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      const int np = padded(n);
      const T* w = load_weight(p, b, q, n, ws, zs);
      target.begin(q, n, w);
      const auto slope = [&](int64_t c, bool logits, const T* z, T* out) {
        if (c < first) {
          for (int i = 0; i < np; ++i) out[i] = T(0);
          return;
        }
        const Given given = !logits ? Given::probabilities : p.labels ? Given::hard : Given::soft;
        const T* g = given == Given::hard ? target.sides(c, gs) : target.channel(c, gs);
        const T bn = static_cast<T>(coefficients[2 * c]), bd = static_cast<T>(coefficients[2 * c + 1]);
        const auto run = given == Given::hard ? (w ? slopes<Given::hard, true> : slopes<Given::hard, false>)
                         : given == Given::soft
                             ? (w ? slopes<Given::soft, true> : slopes<Given::soft, false>)
                             : (w ? slopes<Given::probabilities, true> : slopes<Given::probabilities, false>);
        run(z, g, w, np, gamma, bn, bd, out);
      };
      if (soft) {
        load_channels(p, b, q, n, block, x);
        if (channels == 2) {  // p1 = sigmoid(z1 - z0), p0 = 1 - p1: each class's slope counts for both logits
          for (int i = 0; i < np; ++i) x[i] = x[block + i] - x[i], x[block + i] = x[i];
          for (int i = 0; i < np; ++i) x[i] = -x[i];
          slope(0, true, x, d);
          slope(1, true, x + block, d + block);
          for (int i = 0; i < np; ++i) d[block + i] -= d[i];
          for (int i = 0; i < np; ++i) d[i] = -d[block + i];
        } else {
          softmax(x, channels, block, np);
          T mean[block_pixels] = {};
          for (int64_t c = 0; c < channels; ++c) {
            slope(c, false, x + c * block, d + c * block);
            for (int i = 0; i < np; ++i) mean[i] += x[c * block + i] * d[c * block + i];
          }
          for (int64_t c = 0; c < channels; ++c)
            for (int i = 0; i < np; ++i) d[c * block + i] = x[c * block + i] * (d[c * block + i] - mean[i]);
          if (w)  // a masked pixel stays out even if its logits are NaN
            for (int64_t c = 0; c < channels; ++c)
              for (int i = 0; i < np; ++i) d[c * block + i] = w[i] != T(0) ? d[c * block + i] : T(0);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t base = b * p.other.batch + c * p.other.channel;
        if (soft) {
          store(p.other, p.layout, base, q, n, d + c * block);
          continue;
        }
        T* out = destination(p.other, p.layout, base, q, n, d);
        slope(c, true, load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, zs), out);
        if (out == d) store(p.other, p.layout, base, q, n, d);
      }
    }
  }
};

// Calls f with the Region that the options ask for.
template <class T, class F>
void with_region(const RegionOptions& o, const F& f) {
  if (o.kind == RegionLoss::dice)
    return o.squared ? f(Region<T, Ratio::dice, Power::one, true>{})
                     : f(Region<T, Ratio::dice, Power::one, false>{});
  if (o.gamma == 1.5)
    return o.squared ? f(Region<T, Ratio::nr_dice, Power::three_halves, true>{})
                     : f(Region<T, Ratio::nr_dice, Power::three_halves, false>{});
  if (o.gamma == 1)
    return o.squared ? f(Region<T, Ratio::nr_dice, Power::one, true>{})
                     : f(Region<T, Ratio::nr_dice, Power::one, false>{});
  if (o.gamma == 2)
    return o.squared ? f(Region<T, Ratio::nr_dice, Power::two, true>{})
                     : f(Region<T, Ratio::nr_dice, Power::two, false>{});
  return o.squared ? f(Region<T, Ratio::nr_dice, Power::any, true>{})
                   : f(Region<T, Ratio::nr_dice, Power::any, false>{});
}

double scalar(const Array& a, int64_t i = 0) {
  const int64_t at = i * (a.rank ? a.strides[a.rank - 1] : 0);
  return a.dtype == DType::f64 ? static_cast<const double*>(a.data)[at]
                               : static_cast<const float*>(a.data)[at];
}
void set_scalar(const Array& a, int64_t i, double x) {
  if (a.dtype == DType::f64)
    static_cast<double*>(a.data)[i] = x;
  else
    static_cast<float*>(a.data)[i] = static_cast<float>(x);
}
// Value (b, c) of a loss that has one for each image (if per_image) and class.
double entry(const Array& a, bool per_image, int64_t b, int64_t c) {
  const int64_t at = per_image ? b * a.strides[0] + c * a.strides[1] : c * a.strides[0];
  return a.dtype == DType::f64 ? static_cast<const double*>(a.data)[at]
                               : static_cast<const float*>(a.data)[at];
}

// Adds the chunks' partial sums in their order: sums (items, values).
void add_chunks(const double* partial, int64_t items, int64_t chunks, int64_t values, double* sums) {
  for (int64_t b = 0; b < items; ++b)
    for (int64_t v = 0; v < values; ++v) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) total += partial[(b * chunks + k) * values + v];
      sums[b * values + v] = total;
    }
}

// ---- cross-entropy --------------------------------------------------------------------------------

template <class T>
struct CrossEntropy {
  const Planes& p;
  const PixelOptions& o;
  const Array& class_weight;

  T class_weight_of(int64_t c) const { return class_weight ? static_cast<T>(scalar(class_weight, c)) : T(1); }

  // The loss of each pixel of a block, unweighted, and what it counts in the mean.
  void block_loss(Target<T>& target, int64_t b, int64_t q, int n, int block, T* x, T* loss, T* count) const {
    const int64_t channels = p.layout.channels;
    const int np = padded(n);
    T buffer[block_pixels];
    for (int i = 0; i < np; ++i) loss[i] = T(0), count[i] = T(1);
    if (o.activation == Activation::sigmoid) {
      const T share = T(1) / static_cast<T>(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const T* z = load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, x);
        const T* g = target.channel(c, buffer);
        const T k = class_weight_of(c) * share;
        T e[block_pixels];
        for (int i = 0; i < np; ++i) e[i] = exp_(-abs_(z[i]));
        for (int i = 0; i < np; ++i) loss[i] += k * binary_cross_entropy(z[i], g[i], e[i]);
      }
      return;
    }
    load_channels(p, b, q, n, block, x);
    if (p.labels && channels == 2) {
      const T* g = target.channel(1, buffer);
      const T w0 = class_weight_of(0), w1 = class_weight_of(1);
      for (int i = 0; i < np; ++i) x[i] = x[block + i] - x[i];
      for (int i = 0; i < np; ++i) x[block + i] = exp_(-abs_(x[i]));
      for (int i = 0; i < np; ++i) {
        count[i] = g[i] != T(0) ? w1 : w0;
        loss[i] = binary_cross_entropy(x[i], g[i], x[block + i]) * count[i];
      }
      if (target.stray()) {
        for (int i = 0; i < np; ++i) count[i] = T(0);
        for (int64_t c = 0; c < 2; ++c) {
          target.channel(c, buffer);
          for (int i = 0; i < np; ++i) count[i] += class_weight_of(c) * buffer[i];
        }
      }
      return;
    }
    T top[block_pixels], sum[block_pixels], mass[block_pixels];
    for (int i = 0; i < np; ++i) top[i] = x[i], sum[i] = T(0), mass[i] = T(0);
    for (int64_t c = 1; c < channels; ++c)
      for (int i = 0; i < np; ++i) top[i] = max_(top[i], x[c * block + i]);
    for (int64_t c = 0; c < channels; ++c) {
      const T* row = x + c * block;
      const T* g = target.channel(c, buffer);
      const T k = class_weight_of(c);
      for (int i = 0; i < np; ++i) {
        const T centred = row[i] - top[i], share = k * g[i];
        sum[i] += exp_(centred);
        loss[i] -= share != T(0) ? share * centred : T(0);
        mass[i] += share;
      }
    }
    for (int i = 0; i < np; ++i) loss[i] += mass[i] * log_(sum[i]);
    if (p.labels)
      for (int i = 0; i < np; ++i) count[i] = mass[i];
  }

  bool forward_chunk(int64_t b, int64_t chunk, bool map, double* partial) const {
    const int64_t end =
        (chunk + 1) * chunk_pixels < p.layout.pixels() ? (chunk + 1) * chunk_pixels : p.layout.pixels();
    const int block = block_of(p.layout.channels);
    alignas(64) T x[buffer_values];
    T loss[block_pixels], count[block_pixels], ws[block_pixels], scratch[block_pixels];
    Target<T> target(p, b);
    bool good = true;
    partial[0] = partial[1] = 0;
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      const int np = padded(n);
      const T* w = load_weight(p, b, q, n, ws, scratch);
      good &= target.begin(q, n, w);
      block_loss(target, b, q, n, block, x, loss, count);
      if (w)
        for (int i = 0; i < np; ++i) loss[i] = w[i] != T(0) ? w[i] * loss[i] : T(0);
      // "mean" counts the pixels that are in, whatever their weight
      for (int i = n; i < np; ++i) count[i] = T(0);
      if (p.mask) {
        const T* keep = load(p.mask, p.layout, b * p.mask.batch, q, n, scratch);
        for (int i = 0; i < np; ++i) count[i] = keep[i] != T(0) ? count[i] : T(0);
      }
      T total[lanes] = {}, counted[lanes] = {};
      for (int i = 0; i < np; i += lanes) {
#pragma GCC ivdep
        for (int l = 0; l < lanes; ++l) total[l] += loss[i + l], counted[l] += count[i + l];
      }
      partial[0] += sum_lanes(total);
      partial[1] += sum_lanes(counted);
      if (map) store(p.other, p.layout, b * p.other.batch, q, n, loss);
    }
    return good;
  }

  // scale: dL/d(sum of the weighted loss map), unless p.map holds dL/d(loss map)
  void backward_chunk(int64_t b, int64_t chunk, T scale) const {
    const int64_t channels = p.layout.channels;
    const int64_t end =
        (chunk + 1) * chunk_pixels < p.layout.pixels() ? (chunk + 1) * chunk_pixels : p.layout.pixels();
    const int block = block_of(channels);
    alignas(64) T x[buffer_values], d[block_pixels];
    T k[block_pixels], ws[block_pixels], scratch[block_pixels], mass[block_pixels];
    T h[block_pixels], large[block_pixels];
    Target<T> target(p, b);
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      const int np = padded(n);
      for (int i = 0; i < np; ++i) k[i] = scale;
      if (p.map) {
        const T* given = load(p.map, p.layout, b * p.map.batch, q, n, scratch);
        for (int i = 0; i < np; ++i) k[i] = given[i];
      }
      const T* w = load_weight(p, b, q, n, ws, scratch);
      target.begin(q, n, w);
      if (w)
        for (int i = 0; i < np; ++i) k[i] = w[i] != T(0) ? k[i] * w[i] : T(0);
      const auto put = [&](int64_t c, T* values) {
        if (w)  // a masked pixel stays out even if its logits are NaN
          for (int i = 0; i < np; ++i) values[i] = w[i] != T(0) ? values[i] : T(0);
        store(p.other, p.layout, b * p.other.batch + c * p.other.channel, q, n, values);
      };
      if (o.activation == Activation::sigmoid) {
        for (int64_t c = 0; c < channels; ++c) {
          const T* z = load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, x);
          const T* g = target.channel(c, scratch);
          const T share = class_weight_of(c) / static_cast<T>(channels);
          half_sigmoids(z, np, h, large);
#pragma GCC ivdep
          for (int i = 0; i < np; ++i)
            d[i] = k[i] * share * difference<false>(sigmoid(z[i], h[i], large[i]), g[i]).value;
          put(c, d);
        }
        continue;
      }
      load_channels(p, b, q, n, block, x);
      if (p.labels && channels == 2) {
        const T* g = target.channel(1, scratch);
        const T w0 = class_weight_of(0), w1 = class_weight_of(1);
        for (int i = 0; i < np; ++i) x[i] = x[block + i] - x[i];
        half_sigmoids(x, np, h, large);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i)
          d[i] =
              k[i] * (g[i] != T(0) ? w1 : w0) * difference<true>(sigmoid(x[i], h[i], large[i]), g[i]).value;
        put(1, d);
        for (int i = 0; i < np; ++i) d[i] = -d[i];
        put(0, d);
        continue;
      }
      softmax(x, channels, block, np);
      for (int i = 0; i < np; ++i) mass[i] = T(0);
      for (int64_t c = 0; c < channels; ++c) {
        const T* g = target.channel(c, scratch);
        const T cw = class_weight_of(c);
        for (int i = 0; i < np; ++i) mass[i] += cw * g[i];
      }
      for (int64_t c = 0; c < channels; ++c) {
        const T* g = target.channel(c, scratch);
        const T cw = class_weight_of(c);
        for (int i = 0; i < np; ++i) d[i] = k[i] * (x[c * block + i] * mass[i] - cw * g[i]);
        put(c, d);
      }
    }
  }
};

}  // namespace

// ---- entry points ---------------------------------------------------------------------------------

size_t loss_workspace(const Array& logits, const Exec&) {
  int64_t pixels = 1;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  const int64_t chunks = (pixels + chunk_pixels - 1) / chunk_pixels;
  return static_cast<size_t>(logits.shape[0] * chunks * logits.shape[1] * 2) * sizeof(double);
}

bool region_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const RegionOptions& options, Reduction reduction, const Array& loss,
                         const Array& sums_array, void* workspace, const Exec& exec) {
  const Planes p = make_planes(logits, target, weight, mask, Array{}, Array{});
  const int64_t batch = p.layout.batch, channels = p.layout.channels, chunks = chunks_of(p.layout);
  double* partial = static_cast<double*>(workspace);
  double* sums = static_cast<double*>(sums_array.data);
  int bad = 0;
  const auto run = [&](auto region) {
    using R = decltype(region);
    const int threads = threads_for(exec, batch * channels * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item)
      bad |= !R::forward_chunk(p, options, item / chunks, item % chunks, partial + item * 2 * channels);
  };
  if (logits.dtype == DType::f64)
    with_region<double>(options, run);
  else
    with_region<float>(options, run);
  add_chunks(partial, batch, chunks, 2 * channels, sums);

  if (!options.per_image)  // every image's sums become the batch's
    for (int64_t v = 0; v < 2 * channels; ++v) {
      double total = 0;
      for (int64_t b = 0; b < batch; ++b) total += sums[b * 2 * channels + v];
      for (int64_t b = 0; b < batch; ++b) sums[b * 2 * channels + v] = total;
    }
  const int64_t first = channels > 1 && !options.include_background;
  const int64_t items = options.per_image ? batch : (batch > 0 ? 1 : 0);
  const Ratio ratio = options.kind == RegionLoss::dice ? Ratio::dice : Ratio::nr_dice;
  double total = 0;
  for (int64_t b = 0; b < items; ++b)
    for (int64_t c = first; c < channels; ++c) {
      const double* s = sums + (b * channels + c) * 2;
      const double value = ratio_value(ratio, s[0], s[1], options.eps).loss;
      if (reduction == Reduction::none) set_scalar(loss, b * (channels - first) + c - first, value);
      total += value;
    }
  const int64_t count = items * (channels - first);
  if (reduction == Reduction::mean) set_scalar(loss, 0, count ? total / static_cast<double>(count) : 0.0);
  if (reduction == Reduction::sum) set_scalar(loss, 0, total);
  if (reduction == Reduction::none && items == 0 && !options.per_image)
    for (int64_t c = first; c < channels; ++c) set_scalar(loss, c - first, 0.0);
  return !bad;
}

void region_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                          const RegionOptions& options, Reduction reduction, const Array& grad_loss,
                          const Array& sums_array, const Array& grad, const Exec& exec) {
  const Planes p = make_planes(logits, target, weight, mask, grad, Array{});
  const int64_t batch = p.layout.batch, channels = p.layout.channels, chunks = chunks_of(p.layout);
  const int64_t first = channels > 1 && !options.include_background;
  const double count = static_cast<double>((options.per_image ? batch : 1) * (channels - first));
  const double* sums = static_cast<const double*>(sums_array.data);
  const Ratio ratio = options.kind == RegionLoss::dice ? Ratio::dice : Ratio::nr_dice;
  const auto run = [&](auto region) {
    using R = decltype(region);
    const int threads = threads_for(exec, batch * channels * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t b = item / chunks;
      double coefficients[2 * max_channels];
      for (int64_t c = first; c < channels; ++c) {
        const double* s = sums + (b * channels + c) * 2;
        const RatioValue value = ratio_value(ratio, s[0], s[1], options.eps);
        const double g = reduction == Reduction::none   ? entry(grad_loss, options.per_image, b, c - first)
                         : reduction == Reduction::mean ? scalar(grad_loss) / count
                                                        : scalar(grad_loss);
        coefficients[2 * c] = g * value.by_numerator;
        coefficients[2 * c + 1] = g * value.by_denominator;
      }
      R::backward_chunk(p, options, b, item % chunks, coefficients);
    }
  };
  if (logits.dtype == DType::f64)
    with_region<double>(options, run);
  else
    with_region<float>(options, run);
}

namespace {

template <class T>
bool pixel_forward(const Planes& p, const Array& class_weight, const PixelOptions& options,
                   Reduction reduction, double* partial, const Exec& exec) {
  const CrossEntropy<T> ce{p, options, class_weight};
  const int64_t chunks = chunks_of(p.layout), items = p.layout.batch * chunks;
  const int threads = threads_for(exec, items * chunk_pixels * p.layout.channels);
  int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
  for (int64_t item = 0; item < items; ++item)
    bad |= !ce.forward_chunk(item / chunks, item % chunks, reduction == Reduction::none, partial + 2 * item);
  return !bad;
}

template <class T>
void pixel_backward(const Planes& p, const Array& class_weight, const PixelOptions& options, double scale,
                    const Exec& exec) {
  const CrossEntropy<T> ce{p, options, class_weight};
  const int64_t chunks = chunks_of(p.layout), items = p.layout.batch * chunks;
  const int threads = threads_for(exec, items * chunk_pixels * p.layout.channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item)
    ce.backward_chunk(item / chunks, item % chunks, static_cast<T>(scale));
}

}  // namespace

bool pixel_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const PixelOptions& options, Reduction reduction,
                        const Array& loss, const Array& sums_array, void* workspace, const Exec& exec) {
  const Planes p =
      make_planes(logits, target, weight, mask, reduction == Reduction::none ? loss : Array{}, Array{});
  double* partial = static_cast<double*>(workspace);
  double* sums = static_cast<double*>(sums_array.data);
  const bool good = logits.dtype == DType::f64
                        ? pixel_forward<double>(p, class_weight, options, reduction, partial, exec)
                        : pixel_forward<float>(p, class_weight, options, reduction, partial, exec);
  add_chunks(partial, 1, p.layout.batch * chunks_of(p.layout), 2, sums);
  if (reduction == Reduction::mean) set_scalar(loss, 0, sums[1] != 0 ? sums[0] / sums[1] : 0.0);
  if (reduction == Reduction::sum) set_scalar(loss, 0, sums[0]);
  return good;
}

void pixel_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const Array& class_weight, const PixelOptions& options, Reduction reduction,
                         const Array& grad_loss, const Array& sums_array, const Array& grad,
                         const Exec& exec) {
  const bool map = reduction == Reduction::none;
  const Planes p = make_planes(logits, target, weight, mask, grad, map ? grad_loss : Array{});
  const double* sums = static_cast<const double*>(sums_array.data);
  double scale = map ? 0.0 : scalar(grad_loss);
  if (reduction == Reduction::mean) scale = sums[1] != 0 ? scale / sums[1] : 0.0;
  if (logits.dtype == DType::f64)
    pixel_backward<double>(p, class_weight, options, scale, exec);
  else
    pixel_backward<float>(p, class_weight, options, scale, exec);
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, loss_workspace, (const Array& logits, const Exec& exec), (logits, exec))
NOISYSEG_API(bool, region_loss_forward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const RegionOptions& options, Reduction reduction, const Array& loss, const Array& sums,
              void* workspace, const Exec& exec),
             (logits, target, weight, mask, options, reduction, loss, sums, workspace, exec))
NOISYSEG_API(void, region_loss_backward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const RegionOptions& options, Reduction reduction, const Array& grad_loss, const Array& sums,
              const Array& grad, const Exec& exec),
             (logits, target, weight, mask, options, reduction, grad_loss, sums, grad, exec))
NOISYSEG_API(bool, pixel_loss_forward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const Array& class_weight, const PixelOptions& options, Reduction reduction, const Array& loss,
              const Array& sums, void* workspace, const Exec& exec),
             (logits, target, weight, mask, class_weight, options, reduction, loss, sums, workspace, exec))
NOISYSEG_API(void, pixel_loss_backward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const Array& class_weight, const PixelOptions& options, Reduction reduction,
              const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec),
             (logits, target, weight, mask, class_weight, options, reduction, grad_loss, sums, grad, exec))
