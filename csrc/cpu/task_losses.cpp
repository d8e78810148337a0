// Losses of several maps on the CPU: chunks, blocks and lanes as in losses.cpp.
//
// Bytes per pixel, fp32 logits and uncertainties, uint8 annotations of M raters: uncertainty-weighted loss
// forward 4 + 5 M read, backward as many read and 4 + 4 M written; dual-task loss forward 9 read, backward 9
// read, 8 written.
#include "noisyseg/task_losses.h"

#include "cpu/planes.h"
#include "formulas/task_losses.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

constexpr int stack_values = 8192;  // a block's calibration maps

// An input and its direction, if there is one.
struct Source {
  Plane value, slope;
};

// Pixels [q, q + n) of channel c, zeros behind them; pixels that `keep` leaves out are zeros too.
template <class T>
const T* fetch(const Source& from, const Layout& layout, int64_t b, int64_t c, int64_t q, int n,
               const T* keep, T* buffer) {
  const Plane& plane = from.value;
  const T* x = load(plane, layout, b * plane.batch + c * plane.channel, q, n, buffer);
  if (!keep) return x;
  const int np = padded(n);
#pragma GCC ivdep
  for (int i = 0; i < np; ++i) buffer[i] = keep[i] != T(0) ? x[i] : T(0);
  return buffer;
}
const Dual<double>* fetch(const Source& from, const Layout& layout, int64_t b, int64_t c, int64_t q, int n,
                          const double* keep, Dual<double>* buffer) {
  double values[block_pixels], slopes[block_pixels];
  const double* x = fetch(Source{from.value, {}}, layout, b, c, q, n, keep, values);
  const double* dx = from.slope ? fetch(Source{from.slope, {}}, layout, b, c, q, n, keep, slopes) : nullptr;
  for (int i = 0; i < padded(n); ++i) buffer[i] = {x[i], dx ? dx[i] : 0.0};
  return buffer;
}

// 1 for the pixels that count, 0 for the others and behind the last one. nullptr: all count.
template <class T>
const T* load_keep(const Plane& mask, const Layout& layout, int64_t b, int64_t q, int n, T* buffer) {
  if (!mask && n % lanes == 0) return nullptr;
  for (int i = 0; i < padded(n); ++i) buffer[i] = i < n ? T(1) : T(0);
  if (mask) {
    T values[block_pixels];
    const T* x = load(mask, layout, b * mask.batch, q, n, values);
    for (int i = 0; i < padded(n); ++i) buffer[i] = x[i] != T(0) ? buffer[i] : T(0);
  }
  return buffer;
}

// Where to put T's of a block: in place if possible, otherwise `buffer`. Derivatives are always stored.
template <class T>
T* target_of(const Plane& plane, const Layout& layout, int64_t b, int64_t c, int64_t q, int n, T* buffer) {
  return destination(plane, layout, b * plane.batch + c * plane.channel, q, n, buffer);
}
Dual<double>* target_of(const Plane&, const Layout&, int64_t, int64_t, int64_t, int, Dual<double>* buffer) {
  return buffer;
}
template <class T>
void put(const Plane& plane, const Layout& layout, int64_t b, int64_t c, int64_t q, int n, const T* values) {
  store(plane, layout, b * plane.batch + c * plane.channel, q, n, values);
}
void put(const Plane& plane, const Layout& layout, int64_t b, int64_t c, int64_t q, int n,
         const Dual<double>* values) {
  double slopes[block_pixels];
  for (int i = 0; i < n; ++i) slopes[i] = values[i].slope;
  put(plane, layout, b, c, q, n, slopes);
}
template <class T>
void put_unless(const T* placed, const T* buffer, const Plane& plane, const Layout& layout, int64_t b,
                int64_t c, int64_t q, int n) {
  if (placed == buffer) put(plane, layout, b, c, q, n, buffer);
}

Dual<double> sum_lanes(const Dual<double>* x) {
  double values[lanes], slopes[lanes];
  for (int l = 0; l < lanes; ++l) values[l] = x[l].value, slopes[l] = x[l].slope;
  return {sum_lanes(values), sum_lanes(slopes)};
}

// Whether integers hold anything but 0 and 1 among pixels [q, q + n).
template <class From>
bool beyond_one(const Plane& plane, int64_t offset, int m) {
  const From* from = reinterpret_cast<const From*>(plane.data) + offset;
  From any = 0;
  if (plane.step[2] == 1)
    for (int i = 0; i < m; ++i) any = static_cast<From>(any | from[i]);
  else
    for (int i = 0; i < m; ++i) any = static_cast<From>(any | from[i * plane.step[2]]);
  return (any & ~From(1)) != 0;
}
// values: the same pixels as `fetch` gave them.
template <class T>
bool labels_good(const Plane& plane, const Layout& layout, int64_t b, int64_t c, int64_t q, int n,
                 const T* values) {
  if (static_cast<int>(plane.dtype) >= static_cast<int>(DType::f16)) return true;
  bool suspect = false;
  for_rows(plane, layout, b * plane.batch + c * plane.channel, q, n, [&](int64_t offset, int, int m) {
    suspect |= plane.dtype == DType::i64   ? beyond_one<int64_t>(plane, offset, m)
               : plane.dtype == DType::i32 ? beyond_one<int32_t>(plane, offset, m)
                                           : beyond_one<uint8_t>(plane, offset, m);
  });
  bool good = true;
  if (suspect)  // rare; fine where the mask leaves it out
    for (int i = 0; i < n; ++i) good &= values[i] == T(0) || values[i] == T(1);
  return good;
}

// p, q and the two logarithms of a block's logits, in loops of their own: a CPU looks only some forty
// operations ahead.
template <class T>
void predict(const T* z, int n, T* p, T* q) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) q[i] = exp_(-abs_(z[i]));
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const Prediction<T> a = prediction(z[i], q[i]);
    p[i] = a.p, q[i] = a.q;
  }
}
template <class T>
void predict(const T* z, int n, T* p, T* q, T* nll_p, T* nll_q) {
  T e[block_pixels];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) e[i] = exp_(-abs_(z[i]));
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const Prediction<T> a = prediction(z[i], e[i]);
    p[i] = a.p, q[i] = a.q;
  }
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const T log_sum = log_sum_of(e[i], max_(p[i], q[i]));
    nll_p[i] = minus_log_p(z[i], log_sum), nll_q[i] = minus_log_q(z[i], log_sum);
  }
}

// sum of f(i) over a block
template <class T, class F>
SumOf<T> block_sum(int n, const F& f) {
  T total[lanes] = {};
  for (int i = 0; i < n; i += lanes) {
#pragma GCC ivdep
    for (int l = 0; l < lanes; ++l) total[l] += f(i + l);
  }
  return sum_lanes(total);
}

int64_t chunk_end(const Layout& layout, int64_t chunk) {
  const int64_t end = (chunk + 1) * chunk_pixels;
  return end < layout.pixels() ? end : layout.pixels();
}

int64_t chunks_of_shape(const Array& logits) {
  int64_t pixels = 1;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  return logits.shape[0] * ((pixels + chunk_pixels - 1) / chunk_pixels);
}

void set_term(const Array& terms, int64_t at, double value) { set_scalar(terms, at, value); }
void set_term(const Array& terms, int64_t at, Dual<double> value) { set_scalar(terms, at, value.slope); }

// Runs f(T) with the number type to compute with.
template <class F>
void with_number(bool direction, bool fp64, const F& f) {
  if (direction)
    f(Dual<double>{});
  else if (fp64)
    f(double{});
  else
    f(float{});
}

// ---- uncertainty-weighted loss --------------------------------------------------------------------

struct UncertaintyPlanes {
  Source logits, uncertainty;
  Plane annotations, mask, grad_logits, grad_uncertainty;
  ImageWeights raters;
  Layout layout;
  int64_t maps;
  bool direction, fp64;
};

UncertaintyPlanes make_planes(const UncertaintyInputs& in, const Array& grad_logits,
                              const Array& grad_uncertainty) {
  const Array arrays[8] = {in.logits,     in.annotations,     in.uncertainty, in.mask,
                           in.logits_dot, in.uncertainty_dot, grad_logits,    grad_uncertainty};
  Plane planes[8];
  UncertaintyPlanes p;
  p.layout = make_layout(arrays, planes, 8);
  p.logits = {planes[0], planes[4]}, p.uncertainty = {planes[2], planes[5]};
  p.annotations = planes[1], p.mask = planes[3], p.grad_logits = planes[6], p.grad_uncertainty = planes[7];
  p.raters = image_weights(in.raters);
  p.maps = in.annotations.shape[1];
  p.direction = in.direction();
  p.fp64 = in.logits.dtype == DType::f64 || in.uncertainty.dtype == DType::f64;
  if (p.maps > max_raters) throw std::invalid_argument("annotations has more than 512 maps");
  return p;
}

template <class T>
struct Uncertainty {
  using Real = RealOf<T>;
  using Sum = SumOf<T>;
  const UncertaintyPlanes& p;
  const UncertaintyOptions& o;

  int block() const {
    const int64_t fit = stack_values / (p.maps > 0 ? p.maps : 1) / lanes * lanes;
    return static_cast<int>(fit < block_pixels ? fit : block_pixels);
  }

  const T* annotation(int64_t b, int64_t m, int64_t q, int n, const Real* keep, T* buffer) const {
    return fetch(Source{p.annotations, {}}, p.layout, b, m, q, n, keep, buffer);
  }
  const T* sigma(int64_t b, int64_t m, int64_t q, int n, const Real* keep, T* buffer) const {
    return fetch(p.uncertainty, p.layout, b, m, q, n, keep, buffer);
  }

  bool forward_chunk(int64_t b, int64_t chunk, Sum* partial) const {
    const int64_t end = chunk_end(p.layout, chunk);
    const double mass = raters_mass(p.raters, b, p.maps);
    const T share = mass != 0 ? number<T>(1 / mass) : T(0);
    const int step = block();
    alignas(64) T s[stack_values];
    T zs[block_pixels], pp[block_pixels], pq[block_pixels], nll_p[block_pixels], nll_q[block_pixels];
    T ys[block_pixels], ss[block_pixels], w[block_pixels], mean[block_pixels];
    Real ks[block_pixels];
    bool good = true;
    for (int64_t v = 0; v < uncertainty_sums(p.maps); ++v) partial[v] = Sum(0);
    for (int64_t q = chunk * chunk_pixels; q < end; q += step) {
      const int n = end - q < step ? static_cast<int>(end - q) : step;
      const int np = padded(n);
      const Real* keep = load_keep(p.mask, p.layout, b, q, n, ks);
      predict(fetch(p.logits, p.layout, b, 0, q, n, keep, zs), np, pp, pq, nll_p, nll_q);
      if (keep) {  // pixels left out add nothing: no p, no cross-entropy; their y and sigma are 0 already
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) {
          const bool in = keep[i] != Real(0);
          pp[i] = in ? pp[i] : T(0), pq[i] = in ? pq[i] : T(1);
          nll_p[i] = in ? nll_p[i] : T(0), nll_q[i] = in ? nll_q[i] : T(0);
        }
      }
      for (int i = 0; i < np; ++i) mean[i] = T(0);
      for (int64_t m = 0; m < p.maps; ++m) {
        const double weight = image_weight(p.raters, b, m);
        if (weight == 0) continue;
        const T r = number<T>(weight);
        const T* y = annotation(b, m, q, n, keep, ys);
        const T* sg = sigma(b, m, q, n, keep, ss);
        T* row = s + m * step;
        good &= labels_good(p.annotations, p.layout, b, m, q, n, y);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) w[i] = exp_(-sg[i]);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) row[i] = calibration_of(y[i], sg[i]);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) mean[i] += r * row[i];
        T ce[lanes] = {}, total[lanes] = {}, off[lanes] = {}, square[lanes] = {};
        for (int i = 0; i < np; i += lanes) {
#pragma GCC ivdep
          for (int l = 0; l < lanes; ++l) {
            const int j = i + l;
            const T d = apart(pp[j], pq[j], y[j], T(1) - y[j]);
            ce[l] += w[j] * soft_cross_entropy(nll_p[j], nll_q[j], y[j]);
            total[l] += sg[j];
            off[l] += w[j] * d * d;
            square[l] += y[j] * y[j];
          }
        }
        partial[weighted_ce] += Sum(weight) * sum_lanes(ce);
        partial[sigmas] += Sum(weight) * sum_lanes(total);
        partial[by_rater + 2 * m] += sum_lanes(off);
        partial[by_rater + 2 * m + 1] += sum_lanes(square);
      }
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) mean[i] *= share;
      for (int64_t m = 0; m < p.maps; ++m) {
        const double weight = image_weight(p.raters, b, m);
        if (weight == 0) continue;
        const T* row = s + m * step;
        partial[variance] += Sum(weight / mass) *
                             block_sum<T>(np, [&](int i) { return (row[i] - mean[i]) * (row[i] - mean[i]); });
      }
      partial[squares] += block_sum<T>(np, [&](int i) { return pp[i] * pp[i]; });
      partial[calibration] += block_sum<T>(np, [&](int i) { return mean[i]; });
      if (!p.direction)
        partial[entropy] += o.binary_entropy
                                ? block_sum<T>(np, [&](int i) { return entropy_of(mean[i], true); })
                                : block_sum<T>(np, [&](int i) { return entropy_of(mean[i], false); });
      partial[in_mask] += keep ? Sum(block_sum<Real>(np, [&](int i) { return keep[i]; })) : Sum(n);
    }
    return good;
  }

  void backward_chunk(int64_t b, int64_t chunk, const UncertaintySlopes<Sum>& slopes, const Sum* dice) const {
    const int64_t end = chunk_end(p.layout, chunk);
    const double mass = raters_mass(p.raters, b, p.maps);
    const T share = mass != 0 ? number<T>(1 / mass) : T(0);
    const T by_ce = number<T>(slopes.ce), constant = number<T>(slopes.constant);
    const T consistency = number<T>(slopes.consistency), shrink = number<T>(slopes.shrink);
    const int step = block();
    alignas(64) T s[stack_values];
    T zs[block_pixels], pp[block_pixels], pq[block_pixels], nll_p[block_pixels], nll_q[block_pixels];
    T ys[block_pixels], ss[block_pixels], w[block_pixels], off[block_pixels], mean[block_pixels];
    T pull[block_pixels], lean[block_pixels], out[block_pixels];
    Real ks[block_pixels];
    for (int64_t q = chunk * chunk_pixels; q < end; q += step) {
      const int n = end - q < step ? static_cast<int>(end - q) : step;
      const int np = padded(n);
      const Real* keep = load_keep(p.mask, p.layout, b, q, n, ks);
      const auto leave_out = [&](T* x) {
        if (keep)
          for (int i = 0; i < np; ++i) x[i] = keep[i] != Real(0) ? x[i] : T(0);
      };
      const T* z = fetch(p.logits, p.layout, b, 0, q, n, keep, zs);
      if (p.grad_uncertainty)
        predict(z, np, pp, pq, nll_p, nll_q);
      else
        predict(z, np, pp, pq);
      for (int i = 0; i < np; ++i) mean[i] = pull[i] = lean[i] = T(0);
      if (p.grad_uncertainty) {
        for (int64_t m = 0; m < p.maps; ++m) {
          const double weight = image_weight(p.raters, b, m);
          if (weight == 0) continue;
          const T r = number<T>(weight) * share;
          const T* y = annotation(b, m, q, n, keep, ys);
          const T* sg = sigma(b, m, q, n, keep, ss);
          T* row = s + m * step;
#pragma GCC ivdep
          for (int i = 0; i < np; ++i) row[i] = calibration_of(y[i], sg[i]);
#pragma GCC ivdep
          for (int i = 0; i < np; ++i) mean[i] += r * row[i];
        }
      }
      for (int64_t m = 0; m < p.maps; ++m) {
        const double weight = image_weight(p.raters, b, m);
        if (weight == 0) {
          if (p.grad_uncertainty) {
            for (int i = 0; i < np; ++i) out[i] = T(0);
            put(p.grad_uncertainty, p.layout, b, m, q, n, out);
          }
          continue;
        }
        const T r = number<T>(weight), by_dice = number<T>(dice[m]);
        const T* y = annotation(b, m, q, n, keep, ys);
        const T* sg = sigma(b, m, q, n, keep, ss);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) w[i] = exp_(-sg[i]);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) {
          off[i] = apart(pp[i], pq[i], y[i], T(1) - y[i]);
          pull[i] += r * (w[i] * off[i]);
          lean[i] += by_dice * (w[i] * off[i]);
        }
        if (!p.grad_uncertainty) continue;
        T* to = target_of(p.grad_uncertainty, p.layout, b, m, q, n, out);
        const T* row = s + m * step;
#pragma GCC ivdep
        for (int i = 0; i < np; ++i)
          to[i] = uncertainty_slope(r, by_ce, constant, consistency, by_dice, w[i], off[i],
                                    soft_cross_entropy(nll_p[i], nll_q[i], y[i]), row[i] - mean[i],
                                    calibration_slope(y[i], sg[i]));
        leave_out(to);
        put_unless(to, out, p.grad_uncertainty, p.layout, b, m, q, n);
      }
      if (!p.grad_logits) continue;
      T* to = target_of(p.grad_logits, p.layout, b, 0, q, n, out);
#pragma GCC ivdep
      for (int i = 0; i < np; ++i)
        to[i] = uncertainty_logit_slope(pp[i], pq[i], pull[i], lean[i], by_ce, shrink);
      leave_out(to);
      put_unless(to, out, p.grad_logits, p.layout, b, 0, q, n);
    }
  }

  TaskFault forward(const Array& terms, const Array& scores, const Array& sums_array, void* workspace,
                    const Exec& exec) const {
    const int64_t batch = p.layout.batch, chunks = chunks_of(p.layout), values = uncertainty_sums(p.maps);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t m = 0; m < p.maps; ++m) {
        const double r = image_weight(p.raters, b, m);
        if (!(r >= 0 && r <= 1.7976931348623157e308)) return TaskFault::raters;
      }
    Sum* partial = static_cast<Sum*>(workspace);
    Sum* sums = static_cast<Sum*>(sums_array.data);
    const int threads = threads_for(exec, batch * p.layout.pixels() * p.maps);
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item)
      bad |= !forward_chunk(item / chunks, item % chunks, partial + item * values);
    constexpr int64_t doubles = sizeof(Sum) / sizeof(double);
    add_chunks(static_cast<const double*>(workspace), batch, chunks, values * doubles,
               static_cast<double*>(sums_array.data));
    Sum total[4] = {Sum(0), Sum(0), Sum(0), Sum(0)};
    for (int64_t b = 0; b < batch; ++b) {
      Sum of_image[4];
      uncertainty_terms(sums + b * values, p.raters, b, p.maps, o, of_image);
      for (int t = 0; t < 4; ++t) {
        total[t] += of_image[t];
        if (o.reduction == TaskReduction::image) set_term(terms, t * batch + b, of_image[t]);
      }
      if (!p.direction) {
        double plain[by_rater];
        for (int v = 0; v < by_rater; ++v) plain[v] = value_of(sums[b * values + v]);
        set_scalar(scores, b, confidence_of(plain, o.binary_entropy));
        set_scalar(scores, batch + b, agreement_of(plain));
      }
    }
    if (o.reduction != TaskReduction::image)
      for (int t = 0; t < 4; ++t) {
        const double count =
            o.reduction == TaskReduction::mean && batch > 0 ? static_cast<double>(batch) : 1.0;
        set_term(terms, t, total[t] * Sum(1 / count));
      }
    return bad ? TaskFault::labels : TaskFault::none;
  }

  void backward(const GradTerms& grad_terms, const Array& sums_array, const Exec& exec) const {
    const int64_t batch = p.layout.batch, chunks = chunks_of(p.layout), values = uncertainty_sums(p.maps);
    const Sum* sums = static_cast<const Sum*>(sums_array.data);
    const int threads = threads_for(exec, batch * p.layout.pixels() * p.maps);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t b = item / chunks;
      Sum dice[max_raters];
      const UncertaintySlopes<Sum> slopes = uncertainty_slopes(sums + b * values, p.raters, b, p.maps, o,
                                                               grad_terms, static_cast<double>(batch), dice);
      backward_chunk(b, item % chunks, slopes, dice);
    }
  }
};

// ---- dual-task loss -------------------------------------------------------------------------------

struct DualTaskPlanes {
  Source logits, sdf;
  Plane target, mask, grad_logits, grad_sdf;
  ImageWeights labelled;
  Layout layout;
  bool direction, fp64;
};

DualTaskPlanes make_planes(const DualTaskInputs& in, const Array& grad_logits, const Array& grad_sdf) {
  const Array arrays[8] = {in.logits,     in.target,  in.sdf,      in.mask,
                           in.logits_dot, in.sdf_dot, grad_logits, grad_sdf};
  Plane planes[8];
  DualTaskPlanes p;
  p.layout = make_layout(arrays, planes, 8);
  p.logits = {planes[0], planes[4]}, p.sdf = {planes[2], planes[5]};
  p.target = planes[1], p.mask = planes[3], p.grad_logits = planes[6], p.grad_sdf = planes[7];
  p.labelled = image_weights(in.labelled);
  p.direction = in.direction();
  p.fp64 = in.logits.dtype == DType::f64 || in.sdf.dtype == DType::f64;
  return p;
}

template <class T>
struct DualTask {
  using Real = RealOf<T>;
  using Sum = SumOf<T>;
  const DualTaskPlanes& p;
  const DualTaskOptions& o;

  bool labelled(int64_t b) const { return is_labelled(p.labelled, o.labelled_count, b); }

  // t = sigmoid(-k d) and u = 1 - t
  void transform(int64_t b, int64_t q, int n, const Real* keep, T* ds, T* t, T* u) const {
    const T* d = fetch(p.sdf, p.layout, b, 0, q, n, keep, ds);
    const T k = number<T>(-o.k);
    const int np = padded(n);
#pragma GCC ivdep
    for (int i = 0; i < np; ++i) ds[i] = k * d[i];
    predict(ds, np, t, u);
  }

  // p - t of the consistency term: the side that learns nothing from it has no derivative
  T off_transform(T p_, T q, T t, T u) const {
    if (o.routing == Routing::logits) return apart(p_, q, frozen(t), frozen(u));
    if (o.routing == Routing::sdf) return apart(frozen(p_), frozen(q), t, u);
    return apart(p_, q, t, u);
  }

  bool forward_chunk(int64_t b, int64_t chunk, Sum* partial) const {
    const int64_t end = chunk_end(p.layout, chunk);
    const bool known = labelled(b);
    T zs[block_pixels], pp[block_pixels], pq[block_pixels], nll_p[block_pixels], nll_q[block_pixels];
    T ds[block_pixels], t[block_pixels], u[block_pixels], ys[block_pixels];
    Real ks[block_pixels];
    bool good = true;
    for (int v = 0; v < dual_task_sums; ++v) partial[v] = Sum(0);
    for (int64_t q = chunk * chunk_pixels; q < end; q += block_pixels) {
      const int n = end - q < block_pixels ? static_cast<int>(end - q) : block_pixels;
      const int np = padded(n);
      const Real* keep = load_keep(p.mask, p.layout, b, q, n, ks);
      const T* z = fetch(p.logits, p.layout, b, 0, q, n, keep, zs);
      if (known)
        predict(z, np, pp, pq, nll_p, nll_q);
      else
        predict(z, np, pp, pq);
      transform(b, q, n, keep, ds, t, u);
      if (keep) {  // pixels left out add nothing
#pragma GCC ivdep
        for (int i = 0; i < np; ++i) {
          const bool in = keep[i] != Real(0);
          pp[i] = in ? pp[i] : T(0), pq[i] = in ? pq[i] : T(1);
          nll_p[i] = in ? nll_p[i] : T(0), nll_q[i] = in ? nll_q[i] : T(0);
          t[i] = in ? t[i] : T(0), u[i] = in ? u[i] : T(1);
        }
      }
      partial[mismatch] += block_sum<T>(np, [&](int i) {
        const T off = off_transform(pp[i], pq[i], t[i], u[i]);
        return off * off;
      });
      const Sum count = keep ? Sum(block_sum<Real>(np, [&](int i) { return keep[i]; })) : Sum(n);
      partial[all_pixels] += count;
      if (!known) continue;
      partial[pixels] += count;
      const T* y = fetch(Source{p.target, {}}, p.layout, b, 0, q, n, keep, ys);
      good &= labels_good(p.target, p.layout, b, 0, q, n, y);
      T bce[lanes] = {}, p_y[lanes] = {}, p_p[lanes] = {}, t_y[lanes] = {}, t_t[lanes] = {}, y_y[lanes] = {};
      for (int i = 0; i < np; i += lanes) {
#pragma GCC ivdep
        for (int l = 0; l < lanes; ++l) {
          const int j = i + l;
          bce[l] += soft_cross_entropy(nll_p[j], nll_q[j], y[j]);
          p_y[l] += pp[j] * y[j], p_p[l] += pp[j] * pp[j];
          t_y[l] += t[j] * y[j], t_t[l] += t[j] * t[j];
          y_y[l] += y[j] * y[j];
        }
      }
      partial[ce] += sum_lanes(bce);
      partial[py] += sum_lanes(p_y), partial[DualTaskSum::pp] += sum_lanes(p_p);
      partial[ty] += sum_lanes(t_y), partial[tt] += sum_lanes(t_t), partial[yy] += sum_lanes(y_y);
    }
    return good;
  }

  void backward_chunk(int64_t b, int64_t chunk, const DualTaskSlopes<Sum>& slopes) const {
    const int64_t end = chunk_end(p.layout, chunk);
    const bool known = labelled(b);
    const T by_ce = known ? number<T>(slopes.ce) : T(0);
    const T seg_y = known ? number<T>(slopes.seg_y) : T(0), seg_p = known ? number<T>(slopes.seg_p) : T(0);
    const T mask_y = known ? number<T>(slopes.mask_y) : T(0),
            mask_t = known ? number<T>(slopes.mask_t) : T(0);
    const T to_logits = number<T>(routing_to_logits(o.routing)) * number<T>(slopes.consistency);
    const T to_sdf = number<T>(routing_to_sdf(o.routing)) * number<T>(slopes.consistency);
    const T k = number<T>(o.k);
    T zs[block_pixels], pp[block_pixels], pq[block_pixels], ds[block_pixels], t[block_pixels],
        u[block_pixels];
    T ys[block_pixels], off[block_pixels], out[block_pixels];
    Real ks[block_pixels];
    for (int64_t q = chunk * chunk_pixels; q < end; q += block_pixels) {
      const int n = end - q < block_pixels ? static_cast<int>(end - q) : block_pixels;
      const int np = padded(n);
      const Real* keep = load_keep(p.mask, p.layout, b, q, n, ks);
      const auto leave_out = [&](T* x) {
        if (keep)
          for (int i = 0; i < np; ++i) x[i] = keep[i] != Real(0) ? x[i] : T(0);
      };
      predict(fetch(p.logits, p.layout, b, 0, q, n, keep, zs), np, pp, pq);
      transform(b, q, n, keep, ds, t, u);
      const T* y = ys;
      if (known)
        y = fetch(Source{p.target, {}}, p.layout, b, 0, q, n, keep, ys);
      else
        for (int i = 0; i < np; ++i) ys[i] = T(0);
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) off[i] = off_transform(pp[i], pq[i], t[i], u[i]);
      if (p.grad_logits) {
        T* to = target_of(p.grad_logits, p.layout, b, 0, q, n, out);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i)
          to[i] = dual_task_logit_slope(pp[i], pq[i], y[i], apart(pp[i], pq[i], y[i], T(1) - y[i]), off[i],
                                        by_ce, seg_y, seg_p, to_logits);
        leave_out(to);
        put_unless(to, out, p.grad_logits, p.layout, b, 0, q, n);
      }
      if (p.grad_sdf) {
        T* to = target_of(p.grad_sdf, p.layout, b, 0, q, n, out);
#pragma GCC ivdep
        for (int i = 0; i < np; ++i)
          to[i] = dual_task_sdf_slope(t[i], u[i], y[i], off[i], mask_y, mask_t, to_sdf, k);
        leave_out(to);
        put_unless(to, out, p.grad_sdf, p.layout, b, 0, q, n);
      }
    }
  }

  TaskFault forward(const Array& terms, const Array& sums_array, void* workspace, const Exec& exec) const {
    const int64_t batch = p.layout.batch, chunks = chunks_of(p.layout);
    Sum* partial = static_cast<Sum*>(workspace);
    Sum* sums = static_cast<Sum*>(sums_array.data);
    const int threads = threads_for(exec, 2 * batch * p.layout.pixels());
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item)
      bad |= !forward_chunk(item / chunks, item % chunks, partial + item * dual_task_sums);
    constexpr int64_t doubles = sizeof(Sum) / sizeof(double);
    add_chunks(static_cast<const double*>(workspace), batch, chunks, dual_task_sums * doubles,
               static_cast<double*>(sums_array.data));
    int64_t known = 0;
    for (int64_t b = 0; b < batch; ++b) known += labelled(b);
    for (int64_t b = 0; b < batch; ++b)
      sums[b * dual_task_sums + labelled_images] = Sum(static_cast<double>(known));
    if (!o.per_image)  // every image's sums become the batch's
      for (int v = 0; v < labelled_images; ++v) {
        Sum total = Sum(0);
        for (int64_t b = 0; b < batch; ++b) total += sums[b * dual_task_sums + v];
        for (int64_t b = 0; b < batch; ++b) sums[b * dual_task_sums + v] = total;
      }
    Sum total[3] = {Sum(0), Sum(0), Sum(0)};
    for (int64_t b = 0; b < (o.per_image || batch == 0 ? batch : 1); ++b) {
      Sum of_image[3];
      dual_task_terms(sums + b * dual_task_sums, o, of_image);
      for (int i = 0; i < 3; ++i) {
        total[i] += of_image[i];
        if (o.reduction == TaskReduction::image) set_term(terms, i * batch + b, of_image[i]);
      }
    }
    if (o.reduction != TaskReduction::image)
      for (int i = 0; i < 3; ++i) {
        const int64_t items = !o.per_image ? 1 : i < 2 ? known : batch;
        set_term(terms, i, items ? total[i] * Sum(1 / static_cast<double>(items)) : Sum(0));
      }
    return bad ? TaskFault::labels : TaskFault::none;
  }

  void backward(const GradTerms& grad_terms, const Array& sums_array, const Exec& exec) const {
    const int64_t batch = p.layout.batch, chunks = chunks_of(p.layout);
    const Sum* sums = static_cast<const Sum*>(sums_array.data);
    const int threads = threads_for(exec, 2 * batch * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < batch * chunks; ++item) {
      const int64_t b = item / chunks;
      backward_chunk(
          b, item % chunks,
          dual_task_slopes(sums + b * dual_task_sums, o, grad_terms, b, static_cast<double>(batch)));
    }
  }
};

}  // namespace

// ---- entry points ---------------------------------------------------------------------------------

size_t uncertainty_workspace(const UncertaintyInputs& in, const Exec&) {
  const int64_t doubles = in.direction() ? 2 : 1;
  return static_cast<size_t>(chunks_of_shape(in.logits) * uncertainty_sums(in.annotations.shape[1]) *
                             doubles) *
         sizeof(double);
}

TaskFault uncertainty_forward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                              const Array& terms, const Array& scores, const Array& sums, void* workspace,
                              const Exec& exec) {
  const UncertaintyPlanes p = make_planes(in, Array{}, Array{});
  TaskFault fault = TaskFault::none;
  with_number(p.direction, p.fp64, [&](auto number) {
    fault = Uncertainty<decltype(number)>{p, options}.forward(terms, scores, sums, workspace, exec);
  });
  return fault;
}

void uncertainty_backward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                          const Array& grad_terms, const Array& grad_terms_dot, const Array& sums,
                          const Array& grad_logits, const Array& grad_uncertainty, const Exec& exec) {
  const UncertaintyPlanes p = make_planes(in, grad_logits, grad_uncertainty);
  with_number(p.direction, p.fp64, [&](auto number) {
    Uncertainty<decltype(number)>{p, options}.backward(grad_terms_of(grad_terms, grad_terms_dot), sums, exec);
  });
}

size_t dual_task_workspace(const DualTaskInputs& in, const Exec&) {
  const int64_t doubles = in.direction() ? 2 : 1;
  return static_cast<size_t>(chunks_of_shape(in.logits) * dual_task_sums * doubles) * sizeof(double);
}

TaskFault dual_task_forward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& terms,
                            const Array& sums, void* workspace, const Exec& exec) {
  const DualTaskPlanes p = make_planes(in, Array{}, Array{});
  TaskFault fault = TaskFault::none;
  with_number(p.direction, p.fp64, [&](auto number) {
    fault = DualTask<decltype(number)>{p, options}.forward(terms, sums, workspace, exec);
  });
  return fault;
}

void dual_task_backward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& grad_terms,
                        const Array& grad_terms_dot, const Array& sums, const Array& grad_logits,
                        const Array& grad_sdf, const Exec& exec) {
  const DualTaskPlanes p = make_planes(in, grad_logits, grad_sdf);
  with_number(p.direction, p.fp64, [&](auto number) {
    DualTask<decltype(number)>{p, options}.backward(grad_terms_of(grad_terms, grad_terms_dot), sums, exec);
  });
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(size_t, uncertainty_workspace, (const UncertaintyInputs& in, const Exec& exec), (in, exec))
NOISYSEG_API(TaskFault, uncertainty_forward,
             (const UncertaintyInputs& in, const UncertaintyOptions& options, const Array& terms,
              const Array& scores, const Array& sums, void* workspace, const Exec& exec),
             (in, options, terms, scores, sums, workspace, exec))
NOISYSEG_API(void, uncertainty_backward,
             (const UncertaintyInputs& in, const UncertaintyOptions& options, const Array& grad_terms,
              const Array& grad_terms_dot, const Array& sums, const Array& grad_logits,
              const Array& grad_uncertainty, const Exec& exec),
             (in, options, grad_terms, grad_terms_dot, sums, grad_logits, grad_uncertainty, exec))
NOISYSEG_API(size_t, dual_task_workspace, (const DualTaskInputs& in, const Exec& exec), (in, exec))
NOISYSEG_API(TaskFault, dual_task_forward,
             (const DualTaskInputs& in, const DualTaskOptions& options, const Array& terms, const Array& sums,
              void* workspace, const Exec& exec),
             (in, options, terms, sums, workspace, exec))
NOISYSEG_API(void, dual_task_backward,
             (const DualTaskInputs& in, const DualTaskOptions& options, const Array& grad_terms,
              const Array& grad_terms_dot, const Array& sums, const Array& grad_logits, const Array& grad_sdf,
              const Exec& exec),
             (in, options, grad_terms, grad_terms_dot, sums, grad_logits, grad_sdf, exec))
