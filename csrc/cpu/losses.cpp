// Fused losses on the CPU: f16, bf16 and f32 logits, computed in float. (f64: losses_exact.cpp.)
//
// An image's pixels are cut into chunks of a fixed size; a chunk is one thread's work and gives one set of
// partial sums, and the partial sums are added in order: the same bits whatever the threads. Within a chunk,
// blocks of up to 512 pixels are brought to float in the L1 cache, where that is not what they are, and every
// formula is then a few plain loops that the compiler vectorises: short ones, because a CPU looks only some
// forty operations ahead, and a loop with everything in it would wait for its own long chain.
//
// Bytes per pixel and channel, fp32 logits and uint8 labels. Pixel loss, value and gradient in the forward
// call: 5 read, 4 written; the backward call then has nothing to do. Region loss: forward 5 read; backward 5
// read, 4 written. (Keeping |p - g| for the backward call would save its exponentials, but the memory that it
// goes through costs as much: 5 to 10 % faster, tried and left out.)
#include "cpu/losses.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

// As many pixels as fit a quarter of the buffer with all their channels; never less than the lanes.
int block_of(int64_t channels) {
  const int64_t fit = buffer_values / 4 / channels / lanes * lanes;
  return static_cast<int>(fit < lanes ? lanes : fit < block_pixels ? fit : block_pixels);
}

// A block's weights and labels, and the target of each class without ever expanding labels in memory.
class Block {
 public:
  const float* w = nullptr;  // weight where the pixel is in, else 0, zeros behind the last; nullptr: all once
  bool good = true;          // whether all labels of pixels with a weight are in range
  int n = 0, np = 0;         // pixels, and up to a multiple of the lanes

  Block(const Planes& planes, const LossOptions& options, int64_t b) : p_(planes), o_(options), b_(b) {}

  void begin(int64_t q, int count) {
    q_ = q, n = count, np = padded(n), w = nullptr;
    if (o_.target_is_logits && o_.activation == Activation::softmax) target_softmax();
    const bool ignored = p_.labels && load_labels();
    if (!p_.weight && !p_.mask && !ignored && n % lanes == 0) {
      fix_labels();
      return;
    }
    const float* weight =
        p_.weight ? load(p_.weight, p_.layout, b_ * p_.weight.batch, q, n, scratch_) : nullptr;
    for (int i = 0; i < np; ++i) weights_[i] = i >= n ? 0.f : weight ? weight[i] : 1.f;
    if (p_.mask) {
      const float* keep = load(p_.mask, p_.layout, b_ * p_.mask.batch, q, n, scratch_);
      for (int i = 0; i < np; ++i) weights_[i] = choose(keep[i] != 0.f, weights_[i], 0.f);
    }
    if (ignored)
      for (int i = 0; i < n; ++i) weights_[i] = choose(ignored_[i] != 0.f, 0.f, weights_[i]);
    w = weights_;
    fix_labels();
  }

  // What each pixel counts in the mean: 1 where it is in, whatever its weight; its label's class weight.
  void count(const float* class_weights, float* out) {
    for (int i = 0; i < np; ++i) out[i] = i < n ? 1.f : 0.f;
    if (p_.mask) {
      const float* keep = load(p_.mask, p_.layout, b_ * p_.mask.batch, q_, n, scratch_);
      for (int i = 0; i < n; ++i) out[i] = choose(keep[i] != 0.f, out[i], 0.f);
    }
    if (p_.labels && o_.has_ignore)
      for (int i = 0; i < n; ++i) out[i] = choose(ignored_[i] != 0.f, 0.f, out[i]);
    if (class_weights)
      for (int i = 0; i < n; ++i)
        out[i] = out[i] != 0.f && label_[i] >= 0.f ? class_weights[static_cast<int>(label_[i])] : 0.f;
  }

  const float* label() const { return label_; }

  // The target of class c.
  const float* target(int64_t c, float* buffer) const {
    const float s = static_cast<float>(o_.label_smoothing),
                k = static_cast<float>(classes_of(p_.layout.channels));
    if (p_.labels) return select(c, 1.f - s + s / k, s / k, buffer);
    const float* g = load(p_.target, p_.layout, b_ * p_.target.batch + c * p_.target.channel, q_, n, buffer);
    if (o_.target_is_logits && o_.activation == Activation::softmax) {
      for (int i = 0; i < np; ++i) buffer[i] = exp_(g[i] - top_[i]) * inverse_[i];
      return buffer;
    }
    if (o_.target_is_logits) {
      for (int i = 0; i < np; ++i) {
        const float e = exp_(-abs_(g[i]));
        buffer[i] = (g[i] >= 0.f ? 1.f : e) / (1.f + e);
      }
      return buffer;
    }
    if (s != 0.f) {
      for (int i = 0; i < np; ++i) buffer[i] = (1.f - s) * g[i] + s / k;
      return buffer;
    }
    return g;
  }

  // -1 where the class is c, else 1; see hard_pixel.
  const float* sides(int64_t c, float* buffer) const { return select(c, -1.f, 1.f, buffer); }

 private:
  const float* select(int64_t c, float there, float elsewhere, float* buffer) const {
    const float wanted = p_.layout.channels == 1 ? 1.f : static_cast<float>(c);
    for (int i = 0; i < np; ++i) buffer[i] = label_[i] == wanted ? there : elsewhere;
    return buffer;
  }

  void target_softmax() {
    for (int64_t c = 0; c < p_.layout.channels; ++c) {
      const float* z =
          load(p_.target, p_.layout, b_ * p_.target.batch + c * p_.target.channel, q_, n, scratch_);
      for (int i = 0; i < np; ++i) top_[i] = c == 0 ? z[i] : max_(top_[i], z[i]);
    }
    for (int i = 0; i < np; ++i) inverse_[i] = 0.f;
    for (int64_t c = 0; c < p_.layout.channels; ++c) {
      const float* z =
          load(p_.target, p_.layout, b_ * p_.target.batch + c * p_.target.channel, q_, n, scratch_);
      for (int i = 0; i < np; ++i) inverse_[i] += exp_(z[i] - top_[i]);
    }
    for (int i = 0; i < np; ++i) inverse_[i] = 1.f / inverse_[i];
  }

  // Returns whether some labels are the ignored one.
  bool load_labels() {
    low_ = 0, high_ = 0;
    bool ignored = false;
    for_rows(p_.target, p_.layout, b_ * p_.target.batch, q_, n, [&](int64_t offset, int done, int m) {
      if (p_.target.dtype == DType::i64)
        ignored |= read<int64_t>(offset, m, done);
      else if (p_.target.dtype == DType::i32)
        ignored |= read<int32_t>(offset, m, done);
      else
        ignored |= read<uint8_t>(offset, m, done);
    });
    for (int i = n; i < np; ++i) label_[i] = 0.f;
    return ignored;
  }

  template <class From>
  bool read(int64_t offset, int m, int done) {
    const From* from = reinterpret_cast<const From*>(p_.target.data) + offset;
    const int64_t step = p_.target.step[2];
    float* __restrict out = label_ + done;
    if (step != 1 || sizeof(From) == 8) {  // eight bytes: narrowed first, where the processor can compare
      int32_t* __restrict narrow = narrow_;
      int64_t lost = 0;
      for (int i = 0; i < m; ++i) {
        const From x = from[i * step];
        narrow[i] = static_cast<int32_t>(x);
        lost |= static_cast<int64_t>(x) ^ static_cast<int64_t>(narrow[i]);
      }
      if (lost != 0)  // rare
        for (int i = 0; i < m; ++i)
          if (static_cast<int64_t>(from[i * step]) != static_cast<int64_t>(narrow[i]))
            narrow[i] = o_.has_ignore && static_cast<int64_t>(from[i * step]) == o_.ignore ? far_ignored : -1;
      return take(narrow, m, out, done);
    }
    return take(from, m, out, done);
  }
  static constexpr int32_t far_ignored = INT32_MIN;  // stands for an ignored label that int32 cannot hold

  template <class From>
  bool take(const From* __restrict from, int m, float* __restrict out, int done) {
    From low = 0, high = 0;
    for (int i = 0; i < m; ++i) high = from[i] > high ? from[i] : high;
    if (sizeof(From) > 1)
      for (int i = 0; i < m; ++i) low = from[i] < low ? from[i] : low;
    for (int i = 0; i < m; ++i) out[i] = static_cast<float>(from[i]);
    low_ = static_cast<int32_t>(low) < low_ ? static_cast<int32_t>(low) : low_;
    high_ = static_cast<int32_t>(high) > high_ ? static_cast<int32_t>(high) : high_;
    if (!o_.has_ignore) return false;
    float* __restrict ignored = ignored_ + done;
    const bool fits = o_.ignore == static_cast<int64_t>(static_cast<From>(o_.ignore));
    const From wanted = fits ? static_cast<From>(o_.ignore) : static_cast<From>(far_ignored);
    const bool possible = fits || sizeof(From) == 4;
    float any = 0.f;
    for (int i = 0; i < m; ++i) {
      ignored[i] = possible && from[i] == wanted ? 1.f : 0.f;
      any = ignored[i] > any ? ignored[i] : any;
    }
    return any != 0.f;
  }

  // A label out of range is fine where the pixel is out; such a pixel is of no class, -1.
  void fix_labels() {
    good = true;
    const int classes = classes_of(p_.layout.channels);
    if (!p_.labels || (low_ >= 0 && high_ < classes)) return;
    float bad = 0.f;
    for (int i = 0; i < n; ++i) {
      const bool stray = !(label_[i] >= 0.f && label_[i] < static_cast<float>(classes));
      bad = stray && (w == nullptr || w[i] != 0.f) ? 1.f : bad;
      label_[i] = stray ? -1.f : label_[i];
    }
    good = bad == 0.f;
  }

  const Planes& p_;
  const LossOptions& o_;
  int64_t b_, q_ = 0;
  int32_t low_ = 0, high_ = 0;
  alignas(64) float label_[block_pixels], weights_[block_pixels], ignored_[block_pixels],
      scratch_[block_pixels], top_[block_pixels], inverse_[block_pixels];
  int32_t narrow_[block_pixels];
};

// ---- region losses --------------------------------------------------------------------------------

// h and r of a block's sigmoids; see formulas/losses.h.
void half_sigmoids(const float* z, int n, float* h, float* large) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) h[i] = half_exponential(z[i]);
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) large[i] = larger_root(h[i]);
}

// What a block's pixels are given as.
enum Given : int {
  hard,          // logits and the sides of hard labels (hard_pixel)
  soft,          // logits and targets
  probabilities  // probabilities and targets
};

// Loops over a block, chosen once for a call: no loop branches.
struct RegionLoops {
  void (*sums[3][2])(const float* x, const float* g, const float* w, int n, float gamma, double* out);
  void (*slopes[3][2])(const float* x, const float* g, const float* w, int n, float gamma, float by_numerator,
                       float by_denominator, float* out);
};

template <Ratio ratio, Power power, bool squared>
struct Region {
  // Adds N and D of a block to out.
  template <Given given, bool weighted>
  static void sums(const float* x, const float* g, const float* w, int n, float gamma, double* out) {
    float numerator[lanes] = {}, denominator[lanes] = {}, h[block_pixels], large[block_pixels];
    if (given != probabilities) half_sigmoids(x, n, h, large);
    for (int i = 0; i < n; i += lanes) {
#pragma GCC ivdep
      for (int l = 0; l < lanes; ++l) {
        float nu, de;
        if (given == hard) {
          const HardPixel<float> a = hard_pixel(x[i + l], g[i + l], h[i + l], large[i + l]);
          nu = ratio_numerator<ratio, power>(a.difference, a.p, a.g, gamma);
          de = ratio_denominator<squared>(a.p, a.g);
        } else {
          const Probability<float> a =
              given == soft ? sigmoid(x[i + l], h[i + l], large[i + l]) : given_probability(x[i + l]);
          nu = ratio_numerator<ratio, power>(difference<false>(a, g[i + l]), a.p, g[i + l], gamma);
          de = ratio_denominator<squared>(a.p, g[i + l]);
        }
        if (weighted) {
          numerator[l] += choose(w[i + l] != 0.f, w[i + l] * nu, 0.f);
          denominator[l] += choose(w[i + l] != 0.f, w[i + l] * de, 0.f);
        } else {
          numerator[l] += nu;
          denominator[l] += de;
        }
      }
    }
    out[0] += sum_lanes(numerator);
    out[1] += sum_lanes(denominator);
  }

  // dL/dp, times dp/dz unless probabilities are given. x may be out.
  template <Given given, bool weighted>
  static void slopes(const float* x, const float* g, const float* w, int n, float gamma, float by_numerator,
                     float by_denominator, float* out) {
    float h[block_pixels], large[block_pixels];
    if (given != probabilities) half_sigmoids(x, n, h, large);
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      float d;
      if (given == hard) {
        const HardPixel<float> a = hard_pixel(x[i], g[i], h[i], large[i]);
        d = by_numerator * ratio_numerator_slope<ratio, power>(a.difference, a.g, gamma) +
            by_denominator * ratio_denominator_slope<squared>(a.p);
        d *= a.edge * a.edge;
      } else {
        const Probability<float> a = given == soft ? sigmoid(x[i], h[i], large[i]) : given_probability(x[i]);
        d = by_numerator * ratio_numerator_slope<ratio, power>(difference<false>(a, g[i]), g[i], gamma) +
            by_denominator * ratio_denominator_slope<squared>(a.p);
        if (given == soft) d *= a.p * a.q;
      }
      if (weighted) d = choose(w[i] != 0.f, d * w[i], 0.f);
      out[i] = d;
    }
  }

  static RegionLoops loops() {
    return {{{sums<hard, false>, sums<hard, true>},
             {sums<soft, false>, sums<soft, true>},
             {sums<probabilities, false>, sums<probabilities, true>}},
            {{slopes<hard, false>, slopes<hard, true>},
             {slopes<soft, false>, slopes<soft, true>},
             {slopes<probabilities, false>, slopes<probabilities, true>}}};
  }
};

RegionLoops region_loops(const LossOptions& o) {
  const RegionFormula f = region_formula(o);
  if (f.ratio == Ratio::dice)
    return f.squared ? Region<Ratio::dice, Power::one, true>::loops()
                     : Region<Ratio::dice, Power::one, false>::loops();
  switch (f.power) {
    case Power::one:
      return f.squared ? Region<Ratio::nr_dice, Power::one, true>::loops()
                       : Region<Ratio::nr_dice, Power::one, false>::loops();
    case Power::two:
      return f.squared ? Region<Ratio::nr_dice, Power::two, true>::loops()
                       : Region<Ratio::nr_dice, Power::two, false>::loops();
    case Power::three_halves:
      return f.squared ? Region<Ratio::nr_dice, Power::three_halves, true>::loops()
                       : Region<Ratio::nr_dice, Power::three_halves, false>::loops();
    default:
      return f.squared ? Region<Ratio::nr_dice, Power::any, true>::loops()
                       : Region<Ratio::nr_dice, Power::any, false>::loops();
  }
}

// ---- pixel losses ---------------------------------------------------------------------------------

// What a loop is to give.
enum Wanted : int { value, slope, both };

struct PixelLoops {
  // Hard labels, by their sides. slope: by z.
  void (*hard[3])(const float* z, const float* side, int n, float parameter, float* loss, float* slope);
  // Soft labels. slope: by z.
  void (*soft[3])(const float* z, const float* g, int n, float parameter, float* loss, float* slope);
  // Softmax, hard labels: 1 - p, p and -ln p of the label's class.
  void (*one_of)(const float* s, const float* t, const float* nll, int n, float parameter,
                 float inverse_classes, float* loss, float* slope);
  // Softmax, soft labels: adds share * loss to loss; slope = share * u.
  void (*term)(const float* p, const float* nll, const float* g, int n, float parameter,
               float inverse_classes, float share, float* loss, float* slope);
};

// What binary_pixel takes.
template <bool needs_log>
void exponentials(const float* __restrict z, int n, float* __restrict e, float* __restrict inverse,
                  float* __restrict log_sum) {
  for (int i = 0; i < n; ++i) e[i] = exp_(-abs_(z[i]));
  for (int i = 0; i < n; ++i) inverse[i] = 1.f / (1.f + e[i]);
  if (needs_log)
    for (int i = 0; i < n; ++i) log_sum[i] = log1p_(e[i], inverse[i]);
}

template <PixelLoss kind, Power power>
struct Pixel {
  static constexpr bool powers = kind == PixelLoss::focal || kind == PixelLoss::gce;
  static constexpr bool logs = powers || kind == PixelLoss::ce || kind == PixelLoss::kl;

  template <Wanted wanted>
  static void hard(const float* __restrict z, const float* __restrict side, int n, float parameter,
                   float* __restrict loss, float* __restrict slope) {
    float e[block_pixels], inverse[block_pixels], log_sum[block_pixels];
    constexpr bool needs_log = powers || (logs && wanted != Wanted::slope);
    exponentials<needs_log>(z, n, e, inverse, log_sum);
    for (int i = 0; i < n; ++i) {
      const LossSlope<float> r = binary_hard<kind>(
          binary_pixel(z[i], side[i], e[i], inverse[i], needs_log ? log_sum[i] : 0.f), parameter, power);
      if (wanted != Wanted::slope) loss[i] = r.loss;
      if (wanted != Wanted::value) slope[i] = side[i] * r.slope;
    }
  }

  template <Wanted wanted>
  static void soft(const float* __restrict z, const float* __restrict g, int n, float parameter,
                   float* __restrict loss, float* __restrict slope) {
    float e[block_pixels], inverse[block_pixels], log_sum[block_pixels];
    constexpr bool needs_log = powers || (logs && wanted != Wanted::slope);
    exponentials<needs_log>(z, n, e, inverse, log_sum);
    for (int i = 0; i < n; ++i) {  // of class 1: s = q, t = p
      const BinaryPixel<float> a = binary_pixel(z[i], -1.f, e[i], inverse[i], needs_log ? log_sum[i] : 0.f);
      const LossSlope<float> r = binary_soft<kind>(a.t, a.s, a.nll_t, a.nll_s, g[i], parameter, power);
      if (wanted != Wanted::slope) loss[i] = r.loss;
      if (wanted != Wanted::value) slope[i] = r.slope;
    }
  }

  static void of_label(const float* __restrict s, const float* __restrict t, const float* __restrict nll,
                       int n, float parameter, float inverse_classes, float* __restrict loss,
                       float* __restrict slope) {
    for (int i = 0; i < n; ++i) {
      const LossSlope<float> r = one_of<kind>(s[i], t[i], nll[i], parameter, power, inverse_classes);
      loss[i] = r.loss;
      slope[i] = r.slope;
    }
  }

  static void of_class(const float* __restrict p, const float* __restrict nll, const float* __restrict g,
                       int n, float parameter, float inverse_classes, float share, float* __restrict loss,
                       float* __restrict slope) {
    for (int i = 0; i < n; ++i) {
      const LossSlope<float> r = formulas::term<kind>(p[i], nll[i], g[i], parameter, power, inverse_classes);
      loss[i] += share * r.loss;
      slope[i] = share * r.slope;
    }
  }

  static PixelLoops loops() {
    return {{hard<Wanted::value>, hard<Wanted::slope>, hard<Wanted::both>},
            {soft<Wanted::value>, soft<Wanted::slope>, soft<Wanted::both>},
            of_label,
            of_class};
  }
};

PixelLoops pixel_loops(const LossOptions& o) {
  const Power power = pixel_power(o.pixel, o.parameter);
  if (o.pixel == PixelLoss::focal) {
    if (power == Power::one) return Pixel<PixelLoss::focal, Power::one>::loops();
    if (power == Power::two) return Pixel<PixelLoss::focal, Power::two>::loops();
  }
#define CASE(kind) return Pixel<kind, Power::any>::loops();
  NOISYSEG_PIXEL_KINDS(o.pixel, CASE)
#undef CASE
  return {};
}

// ---- one call -------------------------------------------------------------------------------------

struct Loss {
  const Planes& p;
  const LossOptions& o;
  RegionLoops region;
  PixelLoops pixel;
  float class_weights[max_channels];
  bool has_class_weight;
  int64_t channels, first, chunks;
  int block;
  bool labels_only;  // hard labels, and under softmax the label's own probability is all the pixel loss needs
  bool binary;       // softmax over two classes with hard labels: one sigmoid of the difference
  bool general;      // softmax otherwise

  Loss(const Planes& planes, const LossOptions& options, const Array& class_weight)
      : p(planes), o(options), has_class_weight(static_cast<bool>(class_weight)) {
    channels = p.layout.channels, first = first_class(o, channels), chunks = chunks_of(p.layout);
    const bool hard = p.labels && o.label_smoothing == 0, softmax = o.activation == Activation::softmax;
    labels_only = hard && o.pixel != PixelLoss::boundary && o.pixel != PixelLoss::mse &&
                  !(o.pixel == PixelLoss::mae && class_weight);
    binary =
        softmax && channels == 2 && hard && (labels_only || (o.pixel == PixelLoss::mse && !class_weight));
    general = softmax && !binary;
    block = softmax ? block_of(channels) : block_pixels;
    if (o.region != RegionLoss::none) region = region_loops(o);
    if (o.pixel != PixelLoss::none) pixel = pixel_loops(o);
    for (int64_t c = 0; c < channels; ++c)
      class_weights[c] = class_weight ? static_cast<float>(scalar(class_weight, c)) : 1.f;
  }

  bool has_region() const { return o.region != RegionLoss::none; }
  bool has_pixel() const { return o.pixel != PixelLoss::none; }
  bool hard() const { return p.labels && o.label_smoothing == 0 && o.pixel != PixelLoss::boundary; }
  bool one_of() const { return labels_only; }

  int64_t end_of(int64_t chunk) const {
    const int64_t end = (chunk + 1) * chunk_pixels;
    return end < p.layout.pixels() ? end : p.layout.pixels();
  }
  const float* logits(int64_t b, int64_t c, int64_t q, int n, float* buffer) const {
    return load(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q, n, buffer);
  }
  int64_t other(int64_t b, int64_t c) const { return b * p.other.batch + c * p.other.channel; }
  // A block's loss of class c of a sigmoid counts so much.
  float share(int64_t c) const { return class_weights[c] / static_cast<float>(channels); }

  double count_chunk(int64_t b, int64_t chunk, bool by_class) const {
    Block pixels(p, o, b);
    alignas(64) float count[block_pixels];
    double total = 0;
    for (int64_t q = chunk * chunk_pixels, end = end_of(chunk); q < end; q += block_pixels) {
      pixels.begin(q, end - q < block_pixels ? static_cast<int>(end - q) : block_pixels);
      pixels.count(by_class ? class_weights : nullptr, count);
      float sums[lanes] = {};
      for (int i = 0; i < pixels.np; i += lanes)
        for (int l = 0; l < lanes; ++l) sums[l] += count[i + l];
      total += sum_lanes(sums);
    }
    return total;
  }

  // What softmax leaves of a block: e^(z - top) of each class, and of each pixel top, 1 / sum and, with hard
  // labels, what `one_of` takes.
  struct Softmax {
    alignas(64) float e[buffer_values];
    float top[block_pixels], sum[block_pixels], inverse[block_pixels];
    float s[block_pixels], t[block_pixels], nll[block_pixels];
  };

  void softmax(const Block& pixels, int64_t b, int64_t q, Softmax& x) const {
    const int n = pixels.n, np = pixels.np;
    const bool own = has_pixel() && one_of();
    alignas(64) float buffer[block_pixels], mine[block_pixels], others[block_pixels];
    const float* __restrict label = pixels.label();
    for (int64_t c = 0; c < channels; ++c) {
      const float* z = logits(b, c, q, n, buffer);
      float* __restrict top = x.top;
      float* __restrict row = x.e + c * block;
      // A copy: the classes' planes are often a power of two apart, which the caches bear only once.
      if (c == 0)
        for (int i = 0; i < np; ++i) row[i] = top[i] = z[i];
      else
        for (int i = 0; i < np; ++i) row[i] = z[i], top[i] = max_(top[i], z[i]);
    }
    for (int i = 0; i < np; ++i) mine[i] = 0.f, others[i] = 0.f;
    for (int64_t c = 0; c < channels; ++c) {
      if (p.other) prefetch<true>(p.other, p.layout, other(b, c), q, n);
      prefetch<false>(p.logits, p.layout, b * p.logits.batch + c * p.logits.channel, q + n, n);
      const float* __restrict top = x.top;
      float* __restrict e = x.e + c * block;
      const float wanted = static_cast<float>(c);
      if (own)
        for (int i = 0; i < np; ++i) {
          const float centred = e[i] - top[i], exponential = exp_(centred);
          e[i] = exponential;
          mine[i] += choose(label[i] == wanted, centred, 0.f);
          others[i] += choose(label[i] == wanted, 0.f, exponential);
        }
      else
        for (int i = 0; i < np; ++i) {
          e[i] = exp_(e[i] - top[i]);
          others[i] += e[i];
        }
    }
    if (!own) {
      for (int i = 0; i < np; ++i) x.sum[i] = others[i], x.inverse[i] = 1.f / others[i];
      return;
    }
    for (int i = 0; i < np; ++i) x.t[i] = exp_(mine[i]);
    for (int i = 0; i < np; ++i) {
      x.sum[i] = x.t[i] + others[i];
      x.inverse[i] = 1.f / x.sum[i];
      x.t[i] *= x.inverse[i];
      x.s[i] = others[i] * x.inverse[i];
    }
    // The label's class on top: sum = 1 + others. Otherwise p < 1/2, and sum - 1 is good enough.
    for (int i = 0; i < np; ++i)
      x.nll[i] = log1p_(mine[i] == 0.f ? others[i] : x.sum[i] - 1.f, x.inverse[i]) - mine[i];
  }

  void normalise(Softmax& x, int np) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < np; ++i) x.e[c * block + i] *= x.inverse[i];
  }
  // Whether x.e must hold probabilities: for all but a pixel loss of the label's own probability.
  bool needs_probabilities() const { return has_region() || !one_of(); }

  // The difference of two logits, and the sides of its labels.
  void difference_of_two(const Block& pixels, int64_t b, int64_t q, float* z, float* side) const {
    alignas(64) float one[block_pixels], other[block_pixels];
    const float* z0 = logits(b, 0, q, pixels.n, one);
    const float* z1 = logits(b, 1, q, pixels.n, other);
    for (int i = 0; i < pixels.np; ++i) z[i] = z1[i] - z0[i];
    pixels.sides(1, side);
  }

  // x[i] *= the class weight of pixel i's label
  void times_class_weight(const Block& pixels, float* x) const {
    if (!has_class_weight) return;
    const float* label = pixels.label();
    for (int i = 0; i < pixels.np; ++i)
      x[i] *= class_weights[label[i] > 0.f ? static_cast<int>(label[i]) : 0];
  }

  void pixel_terms(const Block& pixels, int64_t b, int64_t c, int64_t q, const Softmax& x, float* loss,
                   float* u) const {
    alignas(64) float zs[block_pixels], gs[block_pixels], nll[block_pixels];
    const float* z = logits(b, c, q, pixels.n, zs);
    for (int i = 0; i < pixels.np; ++i) nll[i] = log_(x.sum[i]) - (z[i] - x.top[i]);
    pixel.term(x.e + c * block, nll, pixels.target(c, gs), pixels.np, static_cast<float>(o.parameter),
               1.f / static_cast<float>(channels), class_weights[c], loss, u);
  }

  // partial: (C + 1, 3). slopes: whether to write the gradient too; factor: with which the pixel loss's sum
  // then enters the loss.
  bool forward_chunk(int64_t b, int64_t chunk, bool slopes, double factor, double* partial) const {
    Softmax x;
    alignas(64) float z[block_pixels], g[block_pixels], buffer[block_pixels];
    alignas(64) float loss[block_pixels], part[block_pixels], slope[block_pixels], k[block_pixels];
    const float parameter = static_cast<float>(o.parameter), gamma = static_cast<float>(o.gamma);
    Block pixels(p, o, b);
    bool good = true;
    for (int64_t v = 0; v < sums_per_chunk * (channels + 1); ++v) partial[v] = 0;
    for (int64_t q = chunk * chunk_pixels, end = end_of(chunk); q < end; q += block) {
      pixels.begin(q, end - q < block ? static_cast<int>(end - q) : block);
      good &= pixels.good;
      const int n = pixels.n, np = pixels.np;
      const float* w = pixels.w;
      const bool weighted = w != nullptr;
      if (slopes)
        for (int i = 0; i < np; ++i) k[i] = static_cast<float>(factor) * (weighted ? w[i] : 1.f);
      if (has_pixel())
        for (int i = 0; i < np; ++i) loss[i] = 0.f;

      if (binary) {
        difference_of_two(pixels, b, q, z, g);
        if (has_region()) {
          region.sums[Given::hard][weighted](z, g, w, np, gamma, partial + sums_per_chunk);
          if (first == 0) {
            for (int i = 0; i < np; ++i) buffer[i] = -z[i], part[i] = -g[i];
            region.sums[Given::hard][weighted](buffer, part, w, np, gamma, partial);
          }
        }
        if (has_pixel()) {
          pixel.hard[slopes ? Wanted::both : Wanted::value](z, g, np, parameter, loss, slope);
          times_class_weight(pixels, loss);
          if (slopes) {
            times_class_weight(pixels, k);
            put_binary(pixels, b, q, slope, k);
          }
        }
      } else if (general) {
        softmax(pixels, b, q, x);
        if (needs_probabilities()) normalise(x, np);
        for (int64_t c = first; has_region() && c < channels; ++c)
          region.sums[Given::probabilities][weighted](x.e + c * block, pixels.target(c, g), w, np, gamma,
                                                      partial + sums_per_chunk * c);
        if (has_pixel() && one_of()) {
          pixel.one_of(x.s, x.t, x.nll, np, parameter, 1.f / static_cast<float>(channels), loss, slope);
          times_class_weight(pixels, loss);
        } else if (has_pixel()) {
          for (int64_t c = 0; c < channels; ++c) pixel_terms(pixels, b, c, q, x, loss, slope);
        }
        if (slopes) general_gradient(pixels, b, q, x, k, nullptr);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const float* from = logits(b, c, q, n, z);
          const float* to = hard() ? pixels.sides(c, g) : pixels.target(c, g);
          if (has_region() && c >= first)
            region.sums[hard() ? Given::hard : Given::soft][weighted](from, to, w, np, gamma,
                                                                      partial + sums_per_chunk * c);
          if (!has_pixel()) continue;
          const auto run = (hard() ? pixel.hard : pixel.soft)[slopes ? Wanted::both : Wanted::value];
          run(from, to, np, parameter, part, slope);
          for (int i = 0; i < np; ++i) loss[i] += share(c) * part[i];
          if (slopes) put_sigmoid(pixels, b, c, q, slope, k);
        }
      }

      if (o.region == RegionLoss::generalized_dice)
        for (int64_t c = first; c < channels; ++c) {
          const float* to = pixels.target(c, g);
          float volume[lanes] = {};
          for (int i = 0; i < np; i += lanes)
            for (int l = 0; l < lanes; ++l)
              volume[l] += weighted ? choose(w[i + l] != 0.f, w[i + l] * to[i + l], 0.f) : to[i + l];
          partial[sums_per_chunk * c + 2] += sum_lanes(volume);
        }
      if (!has_pixel()) continue;
      if (weighted)
        for (int i = 0; i < np; ++i) loss[i] = choose(w[i] != 0.f, w[i] * loss[i], 0.f);
      float total[lanes] = {};
      for (int i = 0; i < np; i += lanes) {
#pragma GCC ivdep
        for (int l = 0; l < lanes; ++l) total[l] += loss[i + l];
      }
      partial[sums_per_chunk * channels] += sum_lanes(total);
      if (p.map) {
        if (o.pixel_scale != 1)
          for (int i = 0; i < np; ++i) loss[i] *= static_cast<float>(o.pixel_scale);
        store(p.map, p.layout, b * p.map.batch, q, n, loss);
      }
    }
    return good;
  }

  // A masked pixel stays out even if its logits are NaN.
  void put(const Block& pixels, int64_t b, int64_t c, int64_t q, float* values) const {
    if (const float* w = pixels.w)
      for (int i = 0; i < pixels.np; ++i) values[i] = choose(w[i] != 0.f, values[i], 0.f);
    store(p.other, p.layout, other(b, c), q, pixels.n, values);
  }
  void put_binary(const Block& pixels, int64_t b, int64_t q, float* slope, const float* k) const {
    if (k)
      for (int i = 0; i < pixels.np; ++i) slope[i] *= k[i];
    put(pixels, b, 1, q, slope);
    for (int i = 0; i < pixels.np; ++i) slope[i] = -slope[i];
    store(p.other, p.layout, other(b, 0), q, pixels.n, slope);
  }
  void put_sigmoid(const Block& pixels, int64_t b, int64_t c, int64_t q, const float* slope,
                   const float* k) const {
    alignas(64) float buffer[block_pixels];
    float* out = destination(p.other, p.layout, other(b, c), q, pixels.n, buffer);
    const float* w = pixels.w;
    const float part = share(c);
    if (w)
      for (int i = 0; i < pixels.np; ++i) out[i] = choose(w[i] != 0.f, slope[i] * (k[i] * part), 0.f);
    else
      for (int i = 0; i < pixels.np; ++i) out[i] = slope[i] * (k[i] * part);
    if (out == buffer) store(p.other, p.layout, other(b, c), q, pixels.n, buffer);
  }

  // The gradient of a softmax block: p_c sum_k u_k - u_c with u_c = -p_c dL/dp_c. by: (C, 2), see
  // backward_chunk; k: the pixel loss's factor of each pixel.
  void general_gradient(const Block& pixels, int64_t b, int64_t q, const Softmax& x, const float* k,
                        const double* by) const {
    const int np = pixels.np;
    const float* w = pixels.w;
    const float* __restrict label = pixels.label();
    alignas(64) float out[block_pixels], own[block_pixels], unused[block_pixels], sum[block_pixels];
    const bool labels_only = has_pixel() && one_of();
    if (labels_only) {
      pixel.one_of(x.s, x.t, x.nll, np, static_cast<float>(o.parameter), 1.f / static_cast<float>(channels),
                   unused, own);
      times_class_weight(pixels, own);
      for (int i = 0; i < np; ++i) own[i] *= k[i];
    }
    if (!needs_probabilities()) {
      for (int i = 0; i < np; ++i) sum[i] = own[i] * x.inverse[i], own[i] *= -x.s[i];
      for (int64_t c = 0; c < channels; ++c) {
        const float* __restrict e = x.e + c * block;
        float* __restrict to = destination(p.other, p.layout, other(b, c), q, pixels.n, out);
        const float wanted = static_cast<float>(c);
        if (w)
          for (int i = 0; i < np; ++i)
            to[i] = choose(w[i] != 0.f, choose(label[i] == wanted, own[i], sum[i] * e[i]), 0.f);
        else
          for (int i = 0; i < np; ++i) to[i] = choose(label[i] == wanted, own[i], sum[i] * e[i]);
        if (to == out) store(p.other, p.layout, other(b, c), q, pixels.n, out);
      }
      return;
    }
    alignas(64) float u[buffer_values], g[block_pixels];
    for (int i = 0; i < np; ++i) sum[i] = 0.f;
    for (int64_t c = 0; c < channels; ++c) {
      const float* __restrict e = x.e + c * block;
      float* __restrict uc = u + c * block;
      for (int i = 0; i < np; ++i) uc[i] = 0.f;
      if (has_region() && c >= first) {
        region.slopes[Given::probabilities][w != nullptr](
            e, pixels.target(c, g), w, np, static_cast<float>(o.gamma), static_cast<float>(by[2 * c]),
            static_cast<float>(by[2 * c + 1]), out);
        for (int i = 0; i < np; ++i) uc[i] = -e[i] * out[i];
      }
      const float wanted = static_cast<float>(c);
      if (labels_only) {
        for (int i = 0; i < np; ++i) uc[i] += choose(label[i] == wanted, own[i], 0.f);
      } else if (has_pixel()) {
        for (int i = 0; i < np; ++i) unused[i] = 0.f;
        pixel_terms(pixels, b, c, q, x, unused, out);
        for (int i = 0; i < np; ++i) uc[i] += k[i] * out[i];
      }
      for (int i = 0; i < np; ++i) sum[i] += uc[i];
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int i = 0; i < np; ++i) out[i] = x.e[c * block + i] * sum[i] - u[c * block + i];
      put(pixels, b, c, q, out);
    }
  }

  // by: (C, 2), the loss's derivatives with respect to N and D of each class, times the gradient of the loss.
  // factor: with which the pixel loss's sum enters, or its map's gradient, likewise.
  void backward_chunk(int64_t b, int64_t chunk, const double* by, double factor) const {
    Softmax x;
    alignas(64) float z[block_pixels], g[block_pixels], d[block_pixels], k[block_pixels];
    alignas(64) float buffer[block_pixels], unused[block_pixels], slope[block_pixels];
    const float parameter = static_cast<float>(o.parameter), gamma = static_cast<float>(o.gamma);
    Block pixels(p, o, b);
    for (int64_t q = chunk * chunk_pixels, end = end_of(chunk); q < end; q += block) {
      pixels.begin(q, end - q < block ? static_cast<int>(end - q) : block);
      const int n = pixels.n, np = pixels.np;
      const float* w = pixels.w;
      if (has_pixel()) {
        const float* map = p.map ? load(p.map, p.layout, b * p.map.batch, q, n, buffer) : nullptr;
        for (int i = 0; i < np; ++i)
          k[i] = static_cast<float>(factor) * (map ? map[i] : 1.f) * (w ? w[i] : 1.f);
      }
      if (binary) {
        difference_of_two(pixels, b, q, z, g);
        for (int i = 0; i < np; ++i) d[i] = 0.f;
        if (has_region()) {
          const auto run = region.slopes[Given::hard][w != nullptr];
          run(z, g, w, np, gamma, static_cast<float>(by[2]), static_cast<float>(by[3]), d);
          if (first == 0) {
            for (int i = 0; i < np; ++i) buffer[i] = -z[i], unused[i] = -g[i];
            run(buffer, unused, w, np, gamma, static_cast<float>(by[0]), static_cast<float>(by[1]), slope);
            for (int i = 0; i < np; ++i) d[i] -= slope[i];
          }
        }
        if (has_pixel()) {
          pixel.hard[Wanted::slope](z, g, np, parameter, unused, slope);
          times_class_weight(pixels, k);
          for (int i = 0; i < np; ++i) d[i] += k[i] * slope[i];
        }
        put_binary(pixels, b, q, d, nullptr);
      } else if (general) {
        softmax(pixels, b, q, x);
        if (needs_probabilities()) normalise(x, np);
        general_gradient(pixels, b, q, x, k, by);
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          const float* from = logits(b, c, q, n, z);
          const float* to = hard() ? pixels.sides(c, g) : pixels.target(c, g);
          float* out = destination(p.other, p.layout, other(b, c), q, n, d);
          if (has_region() && c >= first)
            region.slopes[hard() ? Given::hard : Given::soft][w != nullptr](
                from, to, w, np, gamma, static_cast<float>(by[2 * c]), static_cast<float>(by[2 * c + 1]),
                out);
          else
            for (int i = 0; i < np; ++i) out[i] = 0.f;
          if (has_pixel()) {
            (hard() ? pixel.hard : pixel.soft)[Wanted::slope](from, to, np, parameter, unused, slope);
            const float part = share(c);
            for (int i = 0; i < np; ++i) {
              const float sum = out[i] + slope[i] * (k[i] * part);
              out[i] = w ? choose(w[i] != 0.f, sum, 0.f) : sum;
            }
          }
          if (out == d) store(p.other, p.layout, other(b, c), q, n, d);
        }
      }
    }
  }

  // The gradient that a forward call left, times that of the loss.
  void scale_chunk(int64_t b, int64_t chunk, float factor) const {
    alignas(64) float buffer[block_pixels];
    for (int64_t q = chunk * chunk_pixels, end = end_of(chunk); q < end; q += block_pixels) {
      const int n = end - q < block_pixels ? static_cast<int>(end - q) : block_pixels;
      for (int64_t c = 0; c < channels; ++c) {
        const float* from = load(p.other, p.layout, other(b, c), q, n, buffer);
        for (int i = 0; i < padded(n); ++i) buffer[i] = factor * from[i];
        store(p.other, p.layout, other(b, c), q, n, buffer);
      }
    }
  }
};

template <class F>
void for_chunks(const Loss& loss, const Exec& exec, const F& f) {
  const int64_t items = loss.p.layout.batch * loss.chunks;
  const int threads = threads_for(exec, loss.p.layout.batch * loss.channels * loss.p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items; ++item) f(item / loss.chunks, item % loss.chunks, item);
}

}  // namespace

size_t loss_workspace(const Array& logits, const Exec&) {
  int64_t pixels = 1;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  const int64_t chunks = (pixels + chunk_pixels - 1) / chunk_pixels;
  const int64_t numbers = 2;  // loss_tangent's sums are value and derivative
  return static_cast<size_t>(logits.shape[0] * chunks * (logits.shape[1] + 1) * sums_per_chunk * numbers) *
         sizeof(double);
}

LossReport loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const LossOptions& o, Reduction reduction,
                        const Array& loss_array, const Array& sums_array, const Array& keep_array,
                        void* workspace, const Exec& exec) {
  if (logits.dtype == DType::f64)
    return exact_loss_forward(logits, target, weight, mask, class_weight, o, reduction, loss_array,
                              sums_array, workspace, exec);
  const bool map = o.pixel != PixelLoss::none && reduction == Reduction::none;
  const Planes p = make_planes(logits, target, weight, mask, keep_array, map ? loss_array : Array{});
  const Loss loss(p, o, class_weight);
  const int64_t batch = p.layout.batch, channels = loss.channels, chunks = loss.chunks;
  const int64_t image = (channels + 1) * sums_per_class;
  double* partial = static_cast<double*>(workspace);
  double* sums = static_cast<double*>(sums_array.data);
  for (int64_t i = 0; i < batch * image; ++i) sums[i] = 0;

  // What "mean" divides by first, so that the gradient can be written in the same pass.
  double count = 0;
  if (loss.has_pixel()) {
    const bool by_class = counts_class_weights(p, o, class_weight);
    const bool all = !p.mask && !(p.labels && o.has_ignore) && !by_class;
    if (!all)
      for_chunks(loss, exec, [&](int64_t b, int64_t chunk, int64_t item) {
        partial[item] = loss.count_chunk(b, chunk, by_class);
      });
    for (int64_t b = 0; b < batch; ++b) {
      double of_image = all ? static_cast<double>(p.layout.pixels()) : 0;
      for (int64_t chunk = 0; !all && chunk < chunks; ++chunk) of_image += partial[b * chunks + chunk];
      sums[b * image + channels * sums_per_class + 1] = of_image;
      count += of_image;
    }
  }
  // Only in fp32: half precision would round the gradient twice.
  const bool slopes = keep_array && keep_array.dtype == DType::f32 && !loss.has_region() &&
                      (reduction == Reduction::mean || reduction == Reduction::sum);
  const double factor =
      reduction == Reduction::mean ? (count != 0 ? o.pixel_scale / count : 0.0) : o.pixel_scale;
  const int64_t values = sums_per_chunk * (channels + 1);
  int bad = 0;
  for_chunks(loss, exec, [&](int64_t b, int64_t chunk, int64_t item) {
    if (!loss.forward_chunk(b, chunk, slopes, factor, partial + item * values)) {
#pragma omp atomic write
      bad = 1;
    }
  });
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const double* part = partial + (b * chunks + chunk) * values;
      double* s = sums + b * image;
      for (int64_t c = 0; c < channels; ++c)
        for (int v = 0; v < sums_per_chunk; ++v) s[c * sums_per_class + v] += part[c * sums_per_chunk + v];
      s[channels * sums_per_class] += part[channels * sums_per_chunk];
    }
  finish_loss(o, reduction, batch, channels, sums, [&](int64_t i, double value) {
    if (!map) set_scalar(loss_array, i, value);
  });
  return {!bad, slopes};
}

void loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                   const Array& class_weight, const LossOptions& o, Reduction reduction,
                   const Array& grad_loss, const Array& sums_array, const Array& grad, bool kept,
                   const Exec& exec) {
  if (logits.dtype == DType::f64)
    return exact_loss_backward(logits, target, weight, mask, class_weight, o, reduction, grad_loss,
                               sums_array, grad, exec);
  const bool map = o.pixel != PixelLoss::none && reduction == Reduction::none;
  const Planes p = make_planes(logits, target, weight, mask, grad, map ? grad_loss : Array{});
  const Loss loss(p, o, class_weight);
  const double* sums = static_cast<const double*>(sums_array.data);
  if (kept) {
    const float factor = static_cast<float>(scalar(grad_loss));
    if (factor != 1.f)
      for_chunks(loss, exec, [&](int64_t b, int64_t chunk, int64_t) { loss.scale_chunk(b, chunk, factor); });
    return;
  }
  for_chunks(loss, exec, [&](int64_t b, int64_t chunk, int64_t) {
    double by[2 * max_channels];
    double factor = 0;
    upstream(
        o, reduction, b, loss.channels, sums, [&](int64_t c) { return entry(grad_loss, o, reduction, b, c); },
        by, &factor);
    loss.backward_chunk(b, chunk, by, factor);
  });
}

void loss_tangent(const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
                  const Array& mask, const Array& class_weight, const LossOptions& options,
                  Reduction reduction, const Array& loss_dot, const Array& sums, void* workspace,
                  const Exec& exec) {
  exact_loss_tangent(logits, logits_dot, target, weight, mask, class_weight, options, reduction, loss_dot,
                     sums, workspace, exec);
}

void loss_backward_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                           const Array& weight, const Array& mask, const Array& class_weight,
                           const LossOptions& options, Reduction reduction, const Array& grad_loss,
                           const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
                           const Exec& exec) {
  exact_loss_backward_tangent(logits, logits_dot, target, weight, mask, class_weight, options, reduction,
                              grad_loss, grad_loss_dot, sums, grad_dot, exec);
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, loss_workspace, (const Array& logits, const Exec& exec), (logits, exec))
NOISYSEG_API(LossReport, loss_forward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const Array& class_weight, const LossOptions& options, Reduction reduction, const Array& loss,
              const Array& sums, const Array& keep, void* workspace, const Exec& exec),
             (logits, target, weight, mask, class_weight, options, reduction, loss, sums, keep, workspace,
              exec))
NOISYSEG_API(void, loss_backward,
             (const Array& logits, const Array& target, const Array& weight, const Array& mask,
              const Array& class_weight, const LossOptions& options, Reduction reduction,
              const Array& grad_loss, const Array& sums, const Array& grad, bool kept, const Exec& exec),
             (logits, target, weight, mask, class_weight, options, reduction, grad_loss, sums, grad, kept,
              exec))
NOISYSEG_API(void, loss_tangent,
             (const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
              const Array& mask, const Array& class_weight, const LossOptions& options, Reduction reduction,
              const Array& loss_dot, const Array& sums, void* workspace, const Exec& exec),
             (logits, logits_dot, target, weight, mask, class_weight, options, reduction, loss_dot, sums,
              workspace, exec))
NOISYSEG_API(void, loss_backward_tangent,
             (const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
              const Array& mask, const Array& class_weight, const LossOptions& options, Reduction reduction,
              const Array& grad_loss, const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
              const Exec& exec),
             (logits, logits_dot, target, weight, mask, class_weight, options, reduction, grad_loss,
              grad_loss_dot, sums, grad_dot, exec))
