// The losses in double, pixel by pixel: f64 logits, and derivatives along a direction in dual numbers, which
// give forward-mode tangents and, of the backward call, products with the loss's Hessian. Right before fast:
// one plain loop for all formulas.
//
// Bytes per pixel and channel, fp64 logits and uint8 labels: forward 9 read; backward 9 read, 8 written;
// along a direction 8 more read.
#include "cpu/losses.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

double value_of(double x) { return x; }
double value_of(Dual<double> x) { return x.slope; }  // what a call along a direction is to give

template <class S>
struct Exact {
  const Planes& p;
  const LossOptions& o;
  const Array& class_weight;
  int64_t channels = p.layout.channels, first = first_class(o, channels), chunks = chunks_of(p.layout);
  int block = channels > buffer_values / 64 ? lanes : 64;
  bool softmax = o.activation == Activation::softmax;
  RegionFormula formula = region_formula(o);
  Power power = pixel_power(o.pixel, o.parameter);

  bool has_region() const { return o.region != RegionLoss::none; }
  bool has_pixel() const { return o.pixel != PixelLoss::none; }
  double class_weight_of(int64_t c) const { return class_weight ? scalar(class_weight, c) : 1.0; }

  // A block in double: z, dz and g (C, block), and of each pixel weight, what it counts, label.
  struct Block {
    alignas(64) double z[buffer_values], dz[buffer_values], g[buffer_values], out[buffer_values];
    double weight[block_pixels], count[block_pixels], label[block_pixels], map[block_pixels];
  };

  // Returns whether all labels of pixels with a weight are in range.
  bool read(int64_t b, int64_t q, int n, Block& x, bool map) const {
    const auto fetch = [&](const Plane& plane, int64_t c, double* out) {
      const double* from = load(plane, p.layout, b * plane.batch + c * plane.channel, q, n, out);
      if (from != out)
        for (int i = 0; i < n; ++i) out[i] = from[i];
    };
    for (int i = 0; i < n; ++i) x.weight[i] = x.count[i] = 1;
    if (p.weight) fetch(p.weight, 0, x.weight);
    if (p.mask) {
      fetch(p.mask, 0, x.map);
      for (int i = 0; i < n; ++i)
        if (!(x.map[i] != 0)) x.weight[i] = x.count[i] = 0;
    }
    if (map) fetch(p.map, 0, x.map);
    for (int64_t c = 0; c < channels; ++c) {
      fetch(p.logits, c, x.z + c * block);
      if (p.direction) fetch(p.direction, c, x.dz + c * block);
      if (!p.labels) fetch(p.target, c, x.g + c * block);
    }
    const double s = o.label_smoothing, k = classes_of(channels);
    if (p.labels) {
      fetch(p.target, 0, x.label);
      bool good = true;
      const bool by_class = counts_class_weights(p, o, class_weight);
      for (int i = 0; i < n; ++i) {
        if (o.has_ignore && x.label[i] == static_cast<double>(o.ignore)) x.weight[i] = x.count[i] = 0;
        const bool in = x.label[i] >= 0 && x.label[i] < k;
        good &= in || x.weight[i] == 0;
        if (by_class) x.count[i] *= in ? class_weight_of(static_cast<int64_t>(x.label[i])) : 0.0;
        for (int64_t c = 0; c < channels; ++c)
          x.g[c * block + i] =
              (x.label[i] == (channels == 1 ? 1.0 : static_cast<double>(c)) ? 1 - s : 0.0) + s / k;
      }
      return good;
    }
    for (int i = 0; i < n; ++i) {
      double* g = x.g + i;
      if (o.target_is_logits && softmax) {
        double top = g[0], sum = 0;
        for (int64_t c = 1; c < channels; ++c) top = max_(top, g[c * block]);
        for (int64_t c = 0; c < channels; ++c) sum += g[c * block] = exp_(g[c * block] - top);
        for (int64_t c = 0; c < channels; ++c) g[c * block] /= sum;
      } else if (o.target_is_logits) {
        for (int64_t c = 0; c < channels; ++c) g[c * block] = sigmoid(g[c * block]).p;
      } else if (s != 0) {
        for (int64_t c = 0; c < channels; ++c) g[c * block] = (1 - s) * g[c * block] + s / k;
      }
    }
    return true;
  }

  static S number(double z, double dz) {
    if constexpr (sizeof(S) == sizeof(double))
      return z;
    else
      return {z, dz};
  }

  // One pixel's probabilities and their negative logarithms.
  struct Classes {
    Probability<S> a[max_channels];
    S nll[max_channels], nll_q[max_channels];
  };
  void classes_of_pixel(const Block& x, int i, Classes& r) const {
    const auto z = [&](int64_t c) { return number(x.z[c * block + i], x.dz[c * block + i]); };
    if (!softmax || channels == 2)
      for (int64_t c = 0; c < channels; ++c) {
        const S at = softmax ? z(c) - z(1 - c) : z(c);
        const BinaryPixel<S> pixel = binary_pixel(at, S(-1));
        r.a[c] = sigmoid(at);
        r.nll[c] = pixel.nll_t, r.nll_q[c] = pixel.nll_s;
      }
    else {
      S top = z(0), sum = S(0);
      for (int64_t c = 1; c < channels; ++c) top = max_(top, z(c));
      for (int64_t c = 0; c < channels; ++c) sum += exp_(z(c) - top);
      for (int64_t c = 0; c < channels; ++c) {
        r.a[c] = given_probability(exp_(z(c) - top) / sum);
        r.nll[c] = log_(sum) - (z(c) - top);
      }
    }
  }

  // Loss and slope of the pixel part of class c, with its share in the pixel's loss.
  LossSlope<S> pixel_term(const Classes& r, int64_t c, double g) const {
    const S parameter = S(o.parameter), target = S(g), inverse = S(1.0 / static_cast<double>(channels));
    LossSlope<S> of{S(0), S(0)};
#define CASE(kind)                                                                 \
  of = softmax ? term<kind>(r.a[c].p, r.nll[c], target, parameter, power, inverse) \
               : binary_soft<kind>(r.a[c].p, r.a[c].q, r.nll[c], r.nll_q[c], target, parameter, power);
    NOISYSEG_PIXEL_KINDS(o.pixel, CASE)
#undef CASE
    const S share = S(class_weight_of(c) / (softmax ? 1.0 : static_cast<double>(channels)));
    return {share * of.loss, share * of.slope};
  }

  bool forward_chunk(int64_t b, int64_t chunk, S* partial, double* count) const {
    Block x;
    Classes r;
    bool good = true;
    for (int64_t v = 0; v < sums_per_chunk * (channels + 1); ++v) partial[v] = S(0);
    *count = 0;
    const int64_t stop = (chunk + 1) * chunk_pixels,
                  end = stop < p.layout.pixels() ? stop : p.layout.pixels();
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      good &= read(b, q, n, x, false);
      for (int i = 0; i < n; ++i) {
        *count += x.count[i];
        x.map[i] = 0;
        if (x.weight[i] == 0) continue;
        const S w = S(x.weight[i]);
        classes_of_pixel(x, i, r);
        for (int64_t c = first; has_region() && c < channels; ++c) {
          const S g = S(x.g[c * block + i]);
          S* sums = partial + sums_per_chunk * c;
          sums[0] += w * numerator(formula, difference<false>(r.a[c], g), r.a[c].p, g, S(o.gamma));
          sums[1] += w * denominator(formula, r.a[c].p, g);
          sums[2] += w * g;
        }
        if (!has_pixel()) continue;
        S loss = S(0);
        for (int64_t c = 0; c < channels; ++c) loss += pixel_term(r, c, x.g[c * block + i]).loss;
        loss = w * loss;
        partial[sums_per_chunk * channels] += loss;
        x.map[i] = o.pixel_scale * value_of(loss);
      }
      if (p.map) store(p.map, p.layout, b * p.map.batch, q, n, x.map);
    }
    return good;
  }

  // by, factor: see upstream.
  void backward_chunk(int64_t b, int64_t chunk, const S* by, S factor) const {
    Block x;
    Classes r;
    double dot[block_pixels] = {};
    S u[max_channels];
    const int64_t stop = (chunk + 1) * chunk_pixels,
                  end = stop < p.layout.pixels() ? stop : p.layout.pixels();
    for (int64_t q = chunk * chunk_pixels; q < end; q += block) {
      const int n = end - q < block ? static_cast<int>(end - q) : block;
      read(b, q, n, x, static_cast<bool>(p.map));
      if (p.map_direction) {
        const double* from = load(p.map_direction, p.layout, b * p.map_direction.batch, q, n, dot);
        for (int i = 0; i < n; ++i) dot[i] = from[i];
      }
      for (int i = 0; i < n; ++i) {
        double* out = x.out + i;
        if (x.weight[i] == 0) {
          for (int64_t c = 0; c < channels; ++c) out[c * block] = 0;
          continue;
        }
        const S w = S(x.weight[i]);
        const S k = w * factor * (p.map ? number(x.map[i], dot[i]) : S(1));
        classes_of_pixel(x, i, r);
        S sum = S(0);
        for (int64_t c = 0; c < channels; ++c) {
          const S g = S(x.g[c * block + i]);
          const Probability<S>& a = r.a[c];
          S slope = S(0);  // by p
          if (has_region() && c >= first)
            slope = w * (by[2 * c] * numerator_slope(formula, difference<false>(a, g), g, S(o.gamma)) +
                         by[2 * c + 1] * denominator_slope(formula, a.p));
          const S pixel = has_pixel() ? k * pixel_term(r, c, x.g[c * block + i]).slope : S(0);
          u[c] = softmax ? pixel - a.p * slope : pixel + a.p * a.q * slope;
          sum += u[c];
        }
        for (int64_t c = 0; c < channels; ++c)
          out[c * block] = value_of(softmax ? r.a[c].p * sum - u[c] : u[c]);
      }
      for (int64_t c = 0; c < channels; ++c)
        store(p.other, p.layout, b * p.other.batch + c * p.other.channel, q, n, x.out + c * block);
    }
  }

  bool forward(Reduction reduction, const Array& loss, S* sums, void* workspace, const Exec& exec) const {
    const int64_t batch = p.layout.batch, image = (channels + 1) * sums_per_class;
    const int64_t values = sums_per_chunk * (channels + 1);
    S* partial = static_cast<S*>(workspace);
    const int threads = threads_for(exec, batch * channels * p.layout.pixels());
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      double count;
      S* part = partial + item * values;
      bad |= !forward_chunk(item / chunks, item % chunks, part, &count);
      part[channels * sums_per_chunk + 1] = S(count);
    }
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t c = 0; c <= channels; ++c)
        for (int v = 0; v < sums_per_class; ++v) {
          S total = S(0);
          for (int64_t chunk = 0; v < sums_per_chunk && chunk < chunks; ++chunk)
            total += partial[(b * chunks + chunk) * values + c * sums_per_chunk + v];
          sums[b * image + c * sums_per_class + v] = total;
        }
    finish_loss(o, reduction, batch, channels, sums, [&](int64_t i, S value) {
      if (!p.map) set_scalar(loss, i, value_of(value));
    });
    return !bad;
  }

  template <class Get>
  void backward(Reduction reduction, const Get& get, const S* sums, const Exec& exec) const {
    const int64_t batch = p.layout.batch;
    const int threads = threads_for(exec, batch * channels * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      S by[2 * max_channels], factor;
      const int64_t b = item / chunks;
      upstream(o, reduction, b, channels, sums, [&](int64_t c) { return get(b, c); }, by, &factor);
      backward_chunk(item / chunks, item % chunks, by, factor);
    }
  }
};

bool is_map(const LossOptions& o, Reduction reduction) {
  return o.pixel != PixelLoss::none && reduction == Reduction::none;
}

}  // namespace

LossReport exact_loss_forward(const Array& logits, const Array& target, const Array& weight,
                              const Array& mask, const Array& class_weight, const LossOptions& o,
                              Reduction reduction, const Array& loss, const Array& sums, void* workspace,
                              const Exec& exec) {
  const Planes p = make_planes(logits, target, weight, mask, Array{}, is_map(o, reduction) ? loss : Array{});
  const Exact<double> exact{p, o, class_weight};
  return {exact.forward(reduction, loss, static_cast<double*>(sums.data), workspace, exec), false};
}

void exact_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const Array& class_weight, const LossOptions& o, Reduction reduction,
                         const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec) {
  const Planes p =
      make_planes(logits, target, weight, mask, grad, is_map(o, reduction) ? grad_loss : Array{});
  const Exact<double> exact{p, o, class_weight};
  exact.backward(
      reduction, [&](int64_t b, int64_t c) { return entry(grad_loss, o, reduction, b, c); },
      static_cast<const double*>(sums.data), exec);
}

void exact_loss_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                        const Array& weight, const Array& mask, const Array& class_weight,
                        const LossOptions& o, Reduction reduction, const Array& loss_dot, const Array& sums,
                        void* workspace, const Exec& exec) {
  const Planes p = make_planes(logits, target, weight, mask, Array{},
                               is_map(o, reduction) ? loss_dot : Array{}, logits_dot);
  const Exact<Dual<double>> exact{p, o, class_weight};
  exact.forward(reduction, loss_dot, static_cast<Dual<double>*>(sums.data), workspace, exec);
}

void exact_loss_backward_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                                 const Array& weight, const Array& mask, const Array& class_weight,
                                 const LossOptions& o, Reduction reduction, const Array& grad_loss,
                                 const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
                                 const Exec& exec) {
  const bool map = is_map(o, reduction);
  const Planes p = make_planes(logits, target, weight, mask, grad_dot, map ? grad_loss : Array{}, logits_dot,
                               map ? grad_loss_dot : Array{});
  const Exact<Dual<double>> exact{p, o, class_weight};
  exact.backward(
      reduction,
      [&](int64_t b, int64_t c) -> Dual<double> {
        return {entry(grad_loss, o, reduction, b, c),
                grad_loss_dot ? entry(grad_loss_dot, o, reduction, b, c) : 0.0};
      },
      static_cast<const Dual<double>*>(sums.data), exec);
}

}  // namespace noisyseg::NOISYSEG_ISA
