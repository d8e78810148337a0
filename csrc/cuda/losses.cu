// The losses on CUDA: one text for float (f16, bf16, f32 logits), double (f64) and dual numbers (derivatives
// along a direction). Nothing synchronises with the host; every sum has a fixed order; how many blocks share
// an image depends on the shapes alone.
//
// Launches. Forward: loss_pass and finish_loss, with loss_add between them where there are many partial sums,
// and label_count before where "mean" divides by what only the labels and the mask tell and the gradient is
// kept. Backward: loss_pass, or scale_grad where the forward call has kept the gradient.
//
// Which formula runs is decided at run time by branches that the whole grid takes alike, outside the loops
// over a thread's pixels.
#include "cuda/losses.cuh"
#include "noisyseg/losses.h"

namespace noisyseg::cuda {
namespace {

constexpr int64_t wanted_blocks = 2048;  // enough to fill a large GPU twice
constexpr int count_blocks = threads;    // of label_count: each gives one partial sum
template <class S>
constexpr int finish_threads = sizeof(S) == 8 ? 512 : 256;  // registers
constexpr int group = 32;  // classes whose partial sums a block keeps on chip

// What loss_pass computes: parts of the loss, and what of them.
enum : int { region_part = 1, pixel_part = 2 };
enum : int { want_sums = 1, want_grad = 2 };
// Which of the three ways through the classes; any: decided at run time.
enum class Mode { sigmoid, two, softmax, any };

// ---- formulas for a thread's pixels ---------------------------------------------------------------

// CASE(ratio, power) of the region loss.
#define NOISYSEG_REGION_FORMULAS(f, CASE)     \
  if ((f).ratio == Ratio::dice)               \
    CASE(Ratio::dice, Power::one)             \
  else if ((f).power == Power::three_halves)  \
    CASE(Ratio::nr_dice, Power::three_halves) \
  else if ((f).power == Power::one)           \
    CASE(Ratio::nr_dice, Power::one)          \
  else if ((f).power == Power::two)           \
    CASE(Ratio::nr_dice, Power::two)          \
  else                                        \
    CASE(Ratio::nr_dice, Power::any)

template <class T>
struct RegionPixel {
  Difference<T> difference;
  T p, g;
};
template <class T>
struct Terms {
  T n, d;
};

// n and d of each pixel.
template <class T>
__device__ inline void region_terms(const Call& call, const RegionPixel<T>* a, Terms<T>* out) {
  constexpr int n = per_thread<T>;
  const T gamma = T(call.options.gamma);
#define CASE(ratio, power)                                                     \
  {                                                                            \
    _Pragma("unroll") for (int k = 0; k < n; ++k) out[k].n =                   \
        ratio_numerator<ratio, power>(a[k].difference, a[k].p, a[k].g, gamma); \
  }
  NOISYSEG_REGION_FORMULAS(call.formula, CASE)
#undef CASE
#pragma unroll
  for (int k = 0; k < n; ++k) out[k].d = denominator(call.formula, a[k].p, a[k].g);
}

// dL/dp of each pixel of weight 1.
template <class T>
__device__ inline void region_slopes(const Call& call, const RegionPixel<T>* a, T by_n, T by_d, T* out) {
  constexpr int n = per_thread<T>;
  const T gamma = T(call.options.gamma);
#define CASE(ratio, power)                                                          \
  {                                                                                 \
    _Pragma("unroll") for (int k = 0; k < n; ++k) out[k] =                          \
        by_n * ratio_numerator_slope<ratio, power>(a[k].difference, a[k].g, gamma); \
  }
  NOISYSEG_REGION_FORMULAS(call.formula, CASE)
#undef CASE
#pragma unroll
  for (int k = 0; k < n; ++k) out[k] += by_d * denominator_slope(call.formula, a[k].p);
}

// sigmoid(z): h, r (formulas/losses.h), e = e^-|z| and 1 / (1 + e); h and r only for a region loss.
template <class T>
struct Exponentials {
  T h, large, e, inverse;
};
template <int parts, class T>
__device__ inline Exponentials<T> exponentials(T z) {
  Exponentials<T> x;
  if (parts & region_part) {
    x.h = half_exponential(z);
    x.large = larger_root(x.h);
    x.e = x.h * x.h;
    x.inverse = x.large * x.large;
  } else {
    x.e = exp_(-abs_(z));
    x.inverse = T(1) / (T(1) + x.e);
    x.h = x.large = T(0);
  }
  return x;
}

// What a pass is to do; known at compile time for most kernels.
struct Task {
  bool region, pixel, sums, grads;
};

// Whether a pixel loss needs logarithms.
NOISYSEG_FORMULA constexpr bool needs_log(PixelLoss kind, bool value) {
  return kind == PixelLoss::focal || kind == PixelLoss::gce ||
         (value && (kind == PixelLoss::ce || kind == PixelLoss::kl));
}

// Pixel losses of hard labels, by their sides: loss, and slope by z.
template <class T>
__device__ inline void hard_terms(const Call& call, bool value, const T* z, const T* side,
                                  const Exponentials<T>* x, LossSlope<T>* out) {
  constexpr int n = per_thread<T>;
  const T parameter = T(call.options.parameter);
#define CASE(kind)                                                                                      \
  {                                                                                                     \
    _Pragma("unroll") for (int k = 0; k < n; ++k) {                                                     \
      const T log_sum = needs_log(kind, value) ? log1p_(x[k].e, x[k].inverse) : T(0);                   \
      out[k] = binary_hard<kind>(binary_pixel(z[k], side[k], x[k].e, x[k].inverse, log_sum), parameter, \
                                 call.power);                                                           \
      out[k].slope = side[k] * out[k].slope;                                                            \
    }                                                                                                   \
  }
  NOISYSEG_PIXEL_KINDS(call.options.pixel, CASE)
#undef CASE
}

// The same with soft labels.
template <class T>
__device__ inline void soft_terms(const Call& call, bool value, const T* z, const T* g,
                                  const Exponentials<T>* x, LossSlope<T>* out) {
  constexpr int n = per_thread<T>;
  const T parameter = T(call.options.parameter);
#define CASE(kind)                                                                         \
  {                                                                                        \
    _Pragma("unroll") for (int k = 0; k < n; ++k) {                                        \
      const T log_sum = needs_log(kind, value) ? log1p_(x[k].e, x[k].inverse) : T(0);      \
      const BinaryPixel<T> a = binary_pixel(z[k], T(-1), x[k].e, x[k].inverse, log_sum);   \
      out[k] = binary_soft<kind>(a.t, a.s, a.nll_t, a.nll_s, g[k], parameter, call.power); \
    }                                                                                      \
  }
  NOISYSEG_PIXEL_KINDS(call.options.pixel, CASE)
#undef CASE
}

// Softmax, of the label's own class: 1 - p, p, -ln p.
template <class T>
struct Own {
  T s[per_thread<T>], t[per_thread<T>], nll[per_thread<T>];
};
template <class T>
__device__ inline void own_terms(const Call& call, const Own<T>& own, LossSlope<T>* out) {
  constexpr int n = per_thread<T>;
  const T parameter = T(call.options.parameter), inverse = T(call.inverse_channels);
#define CASE(kind)                                                                    \
  {                                                                                   \
    _Pragma("unroll") for (int k = 0; k < n; ++k) out[k] =                            \
        one_of<kind>(own.s[k], own.t[k], own.nll[k], parameter, call.power, inverse); \
  }
  NOISYSEG_PIXEL_KINDS(call.options.pixel, CASE)
#undef CASE
}
// Of any class.
template <class T>
__device__ inline void class_terms(const Call& call, const T* p, const T* nll, const T* g,
                                   LossSlope<T>* out) {
  constexpr int n = per_thread<T>;
  const T parameter = T(call.options.parameter), inverse = T(call.inverse_channels);
#define CASE(kind)                                                      \
  {                                                                     \
    _Pragma("unroll") for (int k = 0; k < n; ++k) out[k] =              \
        term<kind>(p[k], nll[k], g[k], parameter, call.power, inverse); \
  }
  NOISYSEG_PIXEL_KINDS(call.options.pixel, CASE)
#undef CASE
}

// ---- partial sums ---------------------------------------------------------------------------------

// Of a call: N, D, G of each class, and the pixel loss's total and count.
__host__ __device__ inline int64_t values_of(int64_t channels) { return 3 * channels + 2; }

// A block's sums. Two classes at most stay in each thread's registers from tile to tile; of more, a warp's
// sums of a tile are added in shared memory, and those of more than 32 classes from there in `partial`.
template <class T>
struct Totals {
  using S = Sum<T>;
  S (*slots)[3 * group + 2];  // of each warp
  S* partial;                 // this block's, value v at v * step
  int64_t step;
  S one[2][3], total, count;

  __device__ void begin(S (*shared)[3 * group + 2], S* memory, int64_t every, int64_t channels) {
    slots = shared, partial = memory, step = every;
#pragma unroll
    for (int v = 0; v < 3; ++v) one[0][v] = one[1][v] = S(0);
    total = count = S(0);
    for (int v = threadIdx.x; v < warps * (3 * group + 2); v += threads)
      slots[v / (3 * group + 2)][v % (3 * group + 2)] = S(0);
    for (int64_t v = threadIdx.x; v < values_of(channels); v += threads) partial[v * step] = S(0);
    __syncthreads();
  }

  // This thread's sums of one tile; c is the same for all threads.
  __device__ void add_class(int64_t c, T n, T d, T g, bool volumes) {
    n = warp_sum(n), d = warp_sum(d);
    if (volumes) g = warp_sum(g);
    if (threadIdx.x % 32 != 0) return;
    S* mine = slots[threadIdx.x / 32] + 3 * (c % group);
    mine[0] += S(n), mine[1] += S(d);
    if (volumes) mine[2] += S(g);
  }

  // The slots' values [0, count) belong to `first` onwards.
  __device__ void flush(int64_t first, int values) {
    __syncthreads();
    for (int v = threadIdx.x; v < values; v += threads) {
      S sum = S(0);
      for (int w = 0; w < warps; ++w) sum += slots[w][v], slots[w][v] = S(0);
      partial[(first + v) * step] += sum;
    }
    __syncthreads();
  }
  // After class c of a tile.
  __device__ void after_class(int64_t c, int64_t channels) {
    const int64_t begin = c / group * group;
    if (channels > group && (c == begin + group - 1 || c == channels - 1))
      flush(3 * begin, 3 * static_cast<int>(c - begin + 1));
  }

  // in_registers: classes that `one` holds.
  __device__ void end(int64_t channels, int in_registers) {
    if (in_registers == 0 && channels <= group) flush(0, 3 * static_cast<int>(channels));
    S* mine = slots[threadIdx.x / 32];
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int v = 0; v < 3; ++v)
        if (c < in_registers) {
          const S sum = warp_sum(one[c][v]);
          if (threadIdx.x % 32 == 0) mine[3 * c + v] = sum;
        }
    if (in_registers > 0) flush(0, 3 * in_registers);
    total = warp_sum(total), count = warp_sum(count);
    if (threadIdx.x % 32 == 0) mine[0] = total, mine[1] = count;
    flush(3 * channels, 2);
  }
};

// ---- one pass over the inputs ---------------------------------------------------------------------

// What a pass over the pixels needs besides the call.
template <class S>
struct Pass {
  S* partial;            // sums: (B, 3 C + 2, chunks)
  bool known;            // the count of "mean" is not wanted
  const double* counts;  // a gradient in the same pass: partial sums of that count, or nullptr: `pixels`
  double pixels;
  const S* sums;          // a gradient by itself: (B, C + 1, 5)
  const void* grad_loss;  // f32 or f64, one value or one for each image or class
  const void* grad_loss_dot;
  bool grad_f64, grad_dot_f64;
  int64_t by_image, by_class, dot_by_image, dot_by_class;
};

template <class T>
__device__ inline T select(bool yes, T a) {
  return yes ? a : T(0);
}

__device__ inline double grad_of(const Pass<double>& pass, int64_t b, int64_t c) {
  return scalar_at(pass.grad_loss, pass.grad_f64, b * pass.by_image + c * pass.by_class);
}
__device__ inline Dual<double> grad_of(const Pass<Dual<double>>& pass, int64_t b, int64_t c) {
  return {scalar_at(pass.grad_loss, pass.grad_f64, b * pass.by_image + c * pass.by_class),
          pass.grad_loss_dot ? scalar_at(pass.grad_loss_dot, pass.grad_dot_f64,
                                         b * pass.dot_by_image + c * pass.dot_by_class)
                             : 0.0};
}

// Each pixel's loss into the total and, if there is one, the loss map.
template <class T>
__device__ inline void put_losses(const Call& call, const Pixels<T>& px, const T* loss, Totals<T>& totals) {
  T sum = T(0), scaled[px.n];
#pragma unroll
  for (int k = 0; k < px.n; ++k) {
    const T weighted = select(px.weight[k] != Real<T>(0), T(px.weight[k]) * loss[k]);
    sum += weighted;
    scaled[k] = T(call.options.pixel_scale) * weighted;
  }
  totals.total += Sum<T>(sum);
  if (call.map) store<f32 | f64>(call, px, call.map, 0, scaled);
}

// Activation sigmoid: every class for itself.
template <int parts, class T>
__device__ inline void sigmoid_tile(const Call& call, const Pixels<T>& px, Task task, const Sum<T>* by,
                                    const T* factor, Totals<T>& totals) {
  constexpr int n = per_thread<T>;
  const int64_t channels = call.layout.channels;
  const bool volumes = call.options.region == RegionLoss::generalized_dice;
  T loss[n] = {};
  for (int64_t c = 0; c < channels; ++c) {
    T z[n], g[n], d[n];
    Exponentials<T> x[n];
    RegionPixel<T> a[n];
    T edge[n];
    LossSlope<T> terms[n];
    load_logits(call, px, c, z);
    if (!call.hard) load_target(call, px, Softmax<Real<T>>{}, c, g);
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = exponentials<parts>(z[k]), d[k] = T(0), terms[k] = {T(0), T(0)};
    if (call.hard) {
      const int wanted = channels == 1 ? 1 : static_cast<int>(c);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        g[k] = px.label[k] == wanted ? T(-1) : T(1);  // the side
        if (!(parts & region_part)) continue;
        const HardPixel<T> hard = hard_pixel(z[k], g[k], x[k].h, x[k].large);
        a[k] = {hard.difference, hard.p, hard.g};
        edge[k] = hard.edge * hard.edge;
      }
      if (task.pixel) hard_terms(call, task.sums, z, g, x, terms);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (!(parts & region_part)) continue;
        const Probability<T> p = sigmoid(z[k], x[k].h, x[k].large);
        a[k] = {difference<false>(p, g[k]), p.p, g[k]};
        edge[k] = p.p * p.q;
      }
      if (task.pixel) soft_terms(call, task.sums, z, g, x, terms);
    }
    if (task.region && c >= call.first) {
      if (task.sums) {
        Terms<T> of[n];
        region_terms(call, a, of);
        T sum_n = T(0), sum_d = T(0), sum_g = T(0);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const bool in = px.weight[k] != Real<T>(0);
          const T w = T(px.weight[k]);
          sum_n += select(in, w * of[k].n), sum_d += select(in, w * of[k].d);
          sum_g += select(in, w * a[k].g);
        }
        if (channels == 1) {
          totals.one[0][0] += Sum<T>(sum_n), totals.one[0][1] += Sum<T>(sum_d);
          if (volumes) totals.one[0][2] += Sum<T>(sum_g);
        } else {
          totals.add_class(c, sum_n, sum_d, sum_g, volumes);
        }
      }
      if (task.grads) {
        region_slopes(call, a, T(by[2 * c]), T(by[2 * c + 1]), d);
#pragma unroll
        for (int k = 0; k < n; ++k) d[k] = T(px.weight[k]) * d[k] * edge[k];
      }
    }
    if (task.sums && task.region && channels > 1) totals.after_class(c, channels);
    if (task.pixel) {
      const T share = T(class_weight(call, c) * call.inverse_channels);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (task.sums) loss[k] += share * terms[k].loss;
        d[k] += factor[k] * share * terms[k].slope;
      }
    }
    if (task.grads) {
#pragma unroll
      for (int k = 0; k < n; ++k) d[k] = select(px.weight[k] != Real<T>(0), d[k]);
      store_grad(call, px, c, d);
    }
  }
  if (task.sums && task.pixel) put_losses(call, px, loss, totals);
}

// Softmax over two classes with hard labels: everything from one sigmoid of the logits' difference.
template <int parts, class T>
__device__ inline void two_tile(const Call& call, const Pixels<T>& px, Task task, const Sum<T>* by,
                                const T* factor, Totals<T>& totals) {
  constexpr int n = per_thread<T>;
  T z[n], side[n], d[n];
  Exponentials<T> x[n];
  load_logits(call, px, 1, z);
  load_logits(call, px, 0, d);
#pragma unroll
  for (int k = 0; k < n; ++k) {
    z[k] -= d[k];
    d[k] = T(0);
    side[k] = px.label[k] == 1 ? T(-1) : T(1);
    x[k] = exponentials<parts>(z[k]);
  }
  if (task.region) {
    RegionPixel<T> a[n];
    T edge[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const HardPixel<T> hard = hard_pixel(z[k], side[k], x[k].h, x[k].large);
      a[k] = {hard.difference, hard.p, hard.g};
      edge[k] = hard.edge * hard.edge;
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int c = 1 - step;
      if (c == 0) {
        if (call.first == 1) break;
#pragma unroll
        for (int k = 0; k < n; ++k) {  // the other side of the same pixel
          const T g = T(1) - a[k].g;
          a[k] = {{-a[k].difference.value, a[k].difference.size, a[k].difference.root},
                  abs_(g - a[k].difference.size),
                  g};
        }
      }
      if (task.sums) {
        Terms<T> of[n];
        region_terms(call, a, of);
        T sum_n = T(0), sum_d = T(0), sum_g = T(0);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const bool in = px.weight[k] != Real<T>(0);
          const T w = T(px.weight[k]);
          sum_n += select(in, w * of[k].n), sum_d += select(in, w * of[k].d);
          sum_g += select(in, w * a[k].g);
        }
        totals.one[c][0] += Sum<T>(sum_n), totals.one[c][1] += Sum<T>(sum_d);
        if (call.options.region == RegionLoss::generalized_dice) totals.one[c][2] += Sum<T>(sum_g);
      }
      if (task.grads) {
        T slope[n];
        region_slopes(call, a, T(by[2 * c]), T(by[2 * c + 1]), slope);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const T of_z = T(px.weight[k]) * slope[k] * edge[k];
          d[k] += c == 1 ? of_z : -of_z;
        }
      }
    }
  }
  if (task.pixel) {
    LossSlope<T> terms[n];
    T loss[n];
#pragma unroll
    for (int k = 0; k < n; ++k) terms[k] = {T(0), T(0)};
    hard_terms(call, task.sums, z, side, x, terms);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const T share = T(class_weight(call, px.label[k] == 1));
      loss[k] = share * terms[k].loss;
      d[k] += factor[k] * share * terms[k].slope;
    }
    if (task.sums) put_losses(call, px, loss, totals);
  }
  if (task.grads) {
#pragma unroll
    for (int k = 0; k < n; ++k) d[k] = select(px.weight[k] != Real<T>(0), d[k]);
    store_grad(call, px, 1, d);
#pragma unroll
    for (int k = 0; k < n; ++k) d[k] = -d[k];
    store_grad(call, px, 0, d);
  }
}

// Any softmax: first maximum and sum in one reading, then the classes, and for a gradient that needs
// sum_k u_k, u_c = -p_c dL/dp_c, the classes once more: dL/dz_c = p_c sum_k u_k - u_c.
template <int parts, class T>
__device__ inline void softmax_tile(const Call& call, const Pixels<T>& px, Task task, const Sum<T>* by,
                                    const T* factor, Totals<T>& totals) {
  constexpr int n = per_thread<T>;
  const int64_t channels = call.layout.channels;
  const bool volumes = call.options.region == RegionLoss::generalized_dice;
  const bool of_label = task.pixel && call.labels_only, of_classes = task.pixel && !call.labels_only;
  T top[n] = {}, inverse[n], log_sum[n], usum[n], loss[n];
  LossSlope<T> own[n];
  {
    Own<T> mine{};
    T sum[n] = {}, z[n];  // sum: of the other classes where the label's own is wanted, else of all
    for (int64_t c = 0; c < channels; ++c) {
      load_logits(call, px, c, z);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        if (c == 0) top[k] = z[k];
        const bool larger = z[k] > top[k], is = of_label && px.label[k] == c;
        const T e = exp_(larger ? top[k] - z[k] : z[k] - top[k]);
        const T term = larger ? T(1) : e;
        sum[k] = (larger ? sum[k] * e : sum[k]) + (is ? T(0) : term);
        mine.t[k] = is ? z[k] : mine.t[k];
        top[k] = larger ? z[k] : top[k];
      }
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      usum[k] = loss[k] = T(0), own[k] = {T(0), T(0)};
      if (of_label) {
        const T z_own = mine.t[k] - top[k], others = sum[k];
        mine.t[k] = exp_(z_own);
        sum[k] = mine.t[k] + others;
        inverse[k] = T(1) / sum[k];
        mine.t[k] *= inverse[k];
        mine.s[k] = others * inverse[k];
        // The label's class on top: sum = 1 + others. Otherwise p < 1/2, and sum - 1 is good enough.
        mine.nll[k] = log1p_(z_own == T(0) ? others : sum[k] - T(1), inverse[k]) - z_own;
      } else {
        inverse[k] = T(1) / sum[k];
      }
      log_sum[k] = of_classes ? log_(sum[k]) : T(0);
    }
    if (of_label) {
      own_terms(call, mine, own);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T share = T(class_weight(call, px.label[k] < 0 ? 0 : px.label[k]));
        loss[k] = share * own[k].loss;
        usum[k] = factor[k] * share * own[k].slope;
        own[k] = {usum[k], mine.s[k]};  // what is left to do: the slope, and 1 - p
      }
    }
  }
  Softmax<Real<T>> targets{};
  if (call.options.target_is_logits) targets = target_softmax(call, px);
  for (int step = task.region || of_classes ? 0 : 1; step < (task.grads ? 2 : 1); ++step)
    for (int64_t c = 0; c < channels; ++c) {
      T z[n], p[n], u[n];
      load_logits(call, px, c, z);
#pragma unroll
      for (int k = 0; k < n; ++k) {
        z[k] -= top[k];
        p[k] = exp_(z[k]) * inverse[k];
        u[k] = T(0);
      }
      if (task.region || of_classes) {
        T g[n];
        load_target(call, px, targets, c, g);
        if (task.region && c >= call.first) {
          RegionPixel<T> a[n];
#pragma unroll
          for (int k = 0; k < n; ++k) a[k] = {difference<false>(given_probability(p[k]), g[k]), p[k], g[k]};
          if (task.sums) {
            Terms<T> of[n];
            region_terms(call, a, of);
            T sum_n = T(0), sum_d = T(0), sum_g = T(0);
#pragma unroll
            for (int k = 0; k < n; ++k) {
              const bool in = px.weight[k] != Real<T>(0);
              const T w = T(px.weight[k]);
              sum_n += select(in, w * of[k].n), sum_d += select(in, w * of[k].d);
              sum_g += select(in, w * g[k]);
            }
            totals.add_class(c, sum_n, sum_d, sum_g, volumes);
          }
          if (task.grads) {
            region_slopes(call, a, T(by[2 * c]), T(by[2 * c + 1]), u);
#pragma unroll
            for (int k = 0; k < n; ++k) u[k] = -(T(px.weight[k]) * u[k] * p[k]);
          }
        }
        if (task.sums && task.region) totals.after_class(c, channels);
        if (of_classes) {
          LossSlope<T> terms[n];
          T nll[n];
          const T share = T(class_weight(call, c));
#pragma unroll
          for (int k = 0; k < n; ++k) nll[k] = log_sum[k] - z[k];
          class_terms(call, p, nll, g, terms);
#pragma unroll
          for (int k = 0; k < n; ++k) {
            if (step == 0) loss[k] += share * terms[k].loss;
            u[k] += factor[k] * share * terms[k].slope;
          }
        }
      }
      if (step == 0) {
#pragma unroll
        for (int k = 0; k < n; ++k) usum[k] += u[k];
        continue;
      }
#pragma unroll
      for (int k = 0; k < n; ++k) {
        u[k] = p[k] * usum[k] - u[k];
        if (of_label && px.label[k] == c)
          u[k] = task.region ? u[k] - own[k].loss : -own[k].loss * own[k].slope;
        u[k] = select(px.weight[k] != Real<T>(0), u[k]);
      }
      store_grad(call, px, c, u);
    }
  if (task.sums && task.pixel) put_losses(call, px, loss, totals);
}

// Blocks that a processor must hold at once: enough loads under way, and no registers spilled.
template <class T, Mode mode, int parts>
constexpr int blocks_at_once = sizeof(T) > 4                                                          ? 1
                               : mode == Mode::two || (mode == Mode::sigmoid && parts == region_part) ? 3
                                                                                                      : 2;

// One pass over the inputs of one or both parts: partial sums and the loss map, or the gradient, or, of a
// pixel loss, both. Source: formulas/losses.h, csrc/cpu/losses_exact.cpp. Grid: B * chunks; a block takes
// every `chunks`th tile of an image. A gradient by itself goes through the pixels backwards: what the forward
// call has read last is still in the cache. Bytes per pixel and channel, fp32 logits and uint8 labels: sums 5
// read; gradient 5 read, 4 written; both 5 read, 4 written. Further reads of the same tile by softmax come
// from the caches.
template <class T, Mode mode, int parts, int wants>
__global__ void __launch_bounds__(threads, blocks_at_once<T, mode, parts>)
    loss_pass(Call call, Pass<Sum<T>> pass) {
  using S = Sum<T>;
  NOISYSEG_SHARED(S, by);  // a gradient by itself: the loss's derivatives by N and D of each class
  __shared__ S slots[wants & want_sums ? warps : 1][3 * group + 2];
  const bool all = parts == (region_part | pixel_part), either = wants == (want_sums | want_grad);
  Task task;
  task.region = parts == region_part || (all && call.options.region != RegionLoss::none);
  task.pixel = parts == pixel_part || (all && call.options.pixel != PixelLoss::none);
  task.sums = wants == want_sums || (either && pass.partial);
  task.grads = wants == want_grad || (either && call.grad);
  const bool alone = task.grads && !task.sums;
  const int64_t channels = call.layout.channels;
  const int64_t item = alone ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t b = item / call.chunks, chunk = item % call.chunks;
  S factor = S(0);
  Totals<T> totals;
  if (task.sums)
    totals.begin(slots, pass.partial + b * values_of(channels) * call.chunks + chunk, call.chunks, channels);
  if (alone) {
    const S* sums = pass.sums + b * (channels + 1) * sums_per_class;
    if (task.region) {
      for (int64_t c = threadIdx.x; c < channels; c += threads) {
        const bool in = c >= call.first;
        const S g = in ? grad_of(pass, b, c - call.first) : S(0);
        by[2 * c] = in ? g * sums[c * sums_per_class + 3] : S(0);
        by[2 * c + 1] = in ? g * sums[c * sums_per_class + 4] : S(0);
      }
      __syncthreads();
    }
    if (task.pixel) {
      factor = sums[channels * sums_per_class + 2];
      if (!call.map) factor *= grad_of(pass, b, 0);
    }
  } else if (task.grads) {
    factor = S(call.options.pixel_scale);
    if (pass.counts) {
      const double count = block_sum<threads>(pass.counts[threadIdx.x]);
      factor = count != 0 ? factor / S(count) : S(0);
    } else {
      factor = factor / S(pass.pixels);
    }
  }
  const int64_t tiles = (call.layout.pixels() + tile_pixels<T> - 1) / tile_pixels<T>;
  for (int64_t at = chunk; at < tiles; at += call.chunks) {
    const int64_t tile = alone ? tiles - 1 - at : at;
    const Pixels<T> px = load_pixels<T>(call, b, tile, task.sums && task.pixel && !pass.known);
    T k[px.n];  // with which a pixel's loss enters that of the call
#pragma unroll
    for (int i = 0; i < px.n; ++i) k[i] = T(0);
    if (task.pixel && task.grads) {
#pragma unroll
      for (int i = 0; i < px.n; ++i) k[i] = T(1);
      if (alone && call.map) load_map(call, px, k);
#pragma unroll
      for (int i = 0; i < px.n; ++i) k[i] *= T(factor) * T(px.weight[i]);
    }
    if (mode == Mode::two || (mode == Mode::any && call.two))
      two_tile<parts>(call, px, task, by, k, totals);
    else if (mode == Mode::softmax || (mode == Mode::any && call.softmax))
      softmax_tile<parts>(call, px, task, by, k, totals);
    else
      sigmoid_tile<parts>(call, px, task, by, k, totals);
    if (task.sums) totals.count += S(px.count);
  }
  if (task.sums) {
    const int in_registers = call.two ? 2 : !call.softmax && channels == 1 ? 1 : 0;
    totals.end(channels, task.region ? in_registers : 0);
  }
}

// What "mean" divides by, in partial sums: counts (256). Grid: at most 256. Bytes per pixel, uint8 labels: 1.
__global__ void __launch_bounds__(threads, 1) label_count(Call call, double* counts) {
  const int64_t tiles = (call.layout.pixels() + tile_pixels<float> - 1) / tile_pixels<float>;
  double count = 0;
  for (int64_t i = blockIdx.x; i < tiles * call.layout.batch; i += gridDim.x)
    count += static_cast<double>(load_pixels<float>(call, i / tiles, i % tiles, true).count);
  count = block_sum<threads>(count);
  for (int i = blockIdx.x + (threadIdx.x ? count_blocks : 0); i < count_blocks; i += gridDim.x)
    counts[i] = i == static_cast<int>(blockIdx.x) ? count : 0;
}

// ---- from partial sums to the loss ----------------------------------------------------------------

// sums (B, C + 1, 5) from the partial sums, by `width` neighbouring lanes each; chunks = 0: nothing to add.
template <class S>
__device__ inline void add_partial(const Call& call, const S* partial, int64_t chunks, bool known, int width,
                                   int64_t begin, int64_t all, S* sums) {
  const int64_t channels = call.layout.channels, entries = (channels + 1) * sums_per_class;
  const int64_t count = call.layout.batch * entries;
  const int lane = static_cast<int>(threadIdx.x) % width;
  for (int64_t first = 0; first < count; first += all) {
    const int64_t i = first + begin, b = i / entries, c = i % entries / sums_per_class;
    const int v = static_cast<int>(i % sums_per_class);
    const bool summed = i < count && (c < channels ? v < 3 : v < 2);
    S sum = S(0);
    if (summed) {
      const S* from = partial + (b * values_of(channels) + 3 * c + v) * chunks;
      for (int64_t k = lane; k < chunks; k += width) sum += from[k];
    }
    sum = group_sum(sum, width);
    if (summed && known && c == channels && v == 1) sum = S(static_cast<double>(call.layout.pixels()));
    if (i < count && lane == 0) sums[i] = sum;
  }
}

template <class S>
__global__ void __launch_bounds__(threads, 1)
    loss_add(Call call, const S* partial, int64_t chunks, bool known, int width, S* sums) {
  const int64_t at = (blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x) / width;
  add_partial(call, partial, chunks, known, width, at, gridDim.x * static_cast<int64_t>(threads) / width,
              sums);
}

// As finish_loss of csrc/cpu/losses.h: the loss, and the other entries of sums. One block; images go to
// groups of `width` neighbouring lanes, which share an image's classes. add: adds the partial sums first.
template <class S>
__global__ void __launch_bounds__(finish_threads<S>, 1)
    finish_loss(Call call, const S* partial, int64_t chunks, bool known, bool add, int add_width, int width,
                Reduction reduction, S* sums, void* loss, bool loss_f64) {
  const LossOptions& o = call.options;
  const int64_t batch = call.layout.batch, channels = call.layout.channels, first = call.first;
  const int64_t image = (channels + 1) * sums_per_class;
  const bool region = o.region != RegionLoss::none, joint = o.region == RegionLoss::generalized_dice;
  const auto put = [&](int64_t i, S value) {
    if (loss_f64)
      static_cast<double*>(loss)[i] = result(value);
    else
      static_cast<float*>(loss)[i] = static_cast<float>(result(value));
  };
  if (add) {
    add_partial(call, partial, chunks, known, add_width, threadIdx.x / add_width,
                finish_threads<S> / add_width, sums);
    __syncthreads();
  }
  if (region && !o.per_image) {  // every image's sums become the batch's
    const int lane = threadIdx.x % 32;
    for (int64_t i = threadIdx.x / 32; i < 3 * channels; i += finish_threads<S> / 32) {
      S* at = sums + i / 3 * sums_per_class + i % 3;
      S sum = S(0);
      for (int64_t b = lane; b < batch; b += 32) sum += at[b * image];
      sum = warp_sum(sum);
      __syncwarp();
      for (int64_t b = lane; b < batch; b += 32) at[b * image] = sum;
    }
    __syncthreads();
  }
  S count = S(0);
  for (int64_t b = threadIdx.x; b < batch; b += finish_threads<S>)
    count += sums[b * image + channels * sums_per_class + 1];
  count = block_sum<finish_threads<S>>(count);
  const int64_t items = o.per_image ? batch : 1, entries = joint ? 1 : channels - first;
  const double parts = reduction == Reduction::mean    ? static_cast<double>(items * entries)
                       : reduction == Reduction::image ? static_cast<double>(entries)
                                                       : 1.0;
  const S share = S(o.region_scale / parts);
  const int lane = static_cast<int>(threadIdx.x) % width;
  S total = S(0);
  for (int64_t begin = 0; begin < batch; begin += finish_threads<S> / width) {
    const int64_t b = begin + threadIdx.x / width;
    S of_image = S(0);
    const auto entry = [&](int64_t i, S value) {
      if (b < items) of_image += share * value;
      if (b < items && reduction == Reduction::none) put(b * entries + i, share * value);
    };
    if (region && b < batch) {
      S* at = sums + b * image;
      if (joint && lane == 0)
        entry(0, generalized_dice_value(at, first, channels, int64_t{sums_per_class}, o.volume_power, o.eps));
      for (int64_t c = first + lane; c < channels; c += width) {
        S* s = at + c * sums_per_class;
        if (!joint) {
          const RatioValue<S> value = o.region == RegionLoss::nr_dice
                                          ? nr_dice_value(s[0], s[1], o.eps)
                                          : dice_value(s[0], s[1], o.eps, o.dice_power);
          entry(c - first, value.loss);
          s[3] = value.by_numerator, s[4] = value.by_denominator;
        }
        s[3] = share * s[3], s[4] = share * s[4];
      }
    }
    of_image = group_sum(of_image, width);
    if (lane != 0 || b >= batch) continue;
    if (o.pixel != PixelLoss::none) {
      S* s = sums + b * image + channels * sums_per_class;
      const S divisor = reduction == Reduction::mean ? count : reduction == Reduction::image ? s[1] : S(1);
      s[2] = divisor == S(0) ? S(0) : S(o.pixel_scale) / divisor;
      of_image += divisor == S(0) ? S(0) : s[2] * s[0];
    }
    if (reduction == Reduction::image) put(b, of_image);
    total += of_image;
  }
  total = block_sum<finish_threads<S>>(total);
  if (threadIdx.x != 0) return;
  if (reduction == Reduction::mean || reduction == Reduction::sum) put(0, total);
  if (reduction == Reduction::none && region && !o.per_image && batch == 0)
    for (int64_t i = 0; i < entries; ++i) put(i, S(0));
}

// The gradient that the forward call has kept, times that of the loss: nothing to do where it is 1. Bytes per
// element otherwise: 4 read, 4 written.
__global__ void __launch_bounds__(threads, 1) scale_grad(Call call, const void* grad_loss, bool grad_f64) {
  const float factor = static_cast<float>(scalar_at(grad_loss, grad_f64, 0));
  if (factor == 1.f) return;
  const int64_t b = blockIdx.x / call.chunks;
  const int64_t tiles = (call.layout.pixels() + tile_pixels<float> - 1) / tile_pixels<float>;
  for (int64_t tile = blockIdx.x % call.chunks; tile < tiles; tile += call.chunks) {
    const Pixels<float> px = load_pixels<float>(call, b, tile, false);
    for (int64_t c = 0; c < call.layout.channels; ++c) {
      float x[px.n];
      load<f32>(call, px, call.grad, c, x);
#pragma unroll
      for (int k = 0; k < px.n; ++k) x[k] *= factor;
      store<f32>(call, px, call.grad, c, x);
    }
  }
}

// ---- calls ----------------------------------------------------------------------------------------

int64_t tiles_of(int64_t pixels) { return (pixels + tile_pixels<float> - 1) / tile_pixels<float>; }
// Blocks for each image.
int64_t chunks_of(int64_t batch, int64_t pixels) {
  const int64_t share = (wanted_blocks + batch - 1) / (batch > 0 ? batch : 1);
  const int64_t tiles = tiles_of(pixels);
  return tiles < share ? tiles : share;
}
// Lanes for n numbers: a power of two.
int width_of(int64_t n) {
  int width = 1;
  while (width < n && width < 32) width *= 2;
  return width;
}

Call make_call(const Array& logits, const Array& target, const Array& weight, const Array& mask,
               const Array& class_weight, const LossOptions& o, const Array& grad, const Array& map,
               const Array& direction = {}, const Array& map_direction = {}) {
  Call call;
  const Array arrays[8] = {logits, target, weight, mask, grad, map, direction, map_direction};
  Plane planes[8];
  call.layout = make_layout(arrays, planes, 8);
  call.logits = planes[0], call.target = planes[1], call.weight = planes[2], call.mask = planes[3],
  call.grad = planes[4], call.map = planes[5], call.direction = planes[6], call.map_direction = planes[7];
  const int64_t channels = call.layout.channels;
  if (channels > 1024) throw std::invalid_argument("logits has more than 1024 channels");
  call.options = o;
  call.formula = region_formula(o);
  call.power = pixel_power(o.pixel, o.parameter);
  call.class_weight = class_weight.data;
  call.class_weight_f64 = class_weight.dtype == DType::f64;
  call.class_weight_step = class_weight ? class_weight.strides[0] : 0;
  call.first = channels > 1 && !o.include_background;
  call.inverse_channels = 1.0 / static_cast<double>(channels);
  call.smoothed = o.label_smoothing / static_cast<double>(channels == 1 ? 2 : channels);
  call.chunks = chunks_of(call.layout.batch, call.layout.pixels());
  call.flat = call.layout.extent[0] * call.layout.extent[1] == 1;
  call.softmax = o.activation == Activation::softmax;
  call.labels = target.rank == logits.rank - 1;
  call.hard = call.labels && o.label_smoothing == 0 && o.pixel != PixelLoss::boundary;
  call.labels_only = call.hard && o.pixel != PixelLoss::mse && !(o.pixel == PixelLoss::mae && class_weight);
  call.two = call.softmax && channels == 2 && call.hard &&
             (call.labels_only || (o.pixel == PixelLoss::mse && !class_weight));
  call.count_by_class =
      class_weight && call.labels && call.softmax &&
      (o.pixel == PixelLoss::ce || o.pixel == PixelLoss::focal || o.pixel == PixelLoss::gce);
  call.count_all = !call.mask && !(call.labels && o.has_ignore) && !call.count_by_class;
  return call;
}

bool is_map(const LossOptions& o, Reduction reduction) {
  return o.pixel != PixelLoss::none && reduction == Reduction::none;
}
bool empty(const Layout& layout) { return layout.batch == 0 || layout.pixels() == 0; }

// The loss from the partial sums.
template <class S>
void finish(const Call& call, Reduction reduction, const S* partial, const Array& loss,
            const Array& sums_array, const Exec& exec) {
  const Layout& layout = call.layout;
  const bool known = call.options.pixel != PixelLoss::none && call.count_all;
  const int64_t chunks = empty(layout) ? 0 : call.chunks;
  S* sums = static_cast<S*>(sums_array.data);
  const int add_width = width_of(chunks);
  const int64_t entries = layout.batch * (layout.channels + 1) * sums_per_class * add_width;
  const bool few = entries * ((chunks + 31) / 32) <= 4 * finish_threads<S>;
  if (!few) {
    const int64_t blocks = (entries + threads - 1) / threads;
    NOISYSEG_LAUNCH((loss_add<S>), static_cast<unsigned>(blocks < 65536 ? blocks : 65536), threads, 0, exec,
                    call, partial, chunks, known, add_width, sums);
  }
  const bool joint = call.options.region == RegionLoss::generalized_dice;
  const int width =
      joint || call.options.region == RegionLoss::none ? 1 : width_of(layout.channels - call.first);
  NOISYSEG_LAUNCH((finish_loss<S>), 1, finish_threads<S>, 0, exec, call, partial, chunks, known, few,
                  add_width, width, reduction, sums, loss.data, loss.dtype == DType::f64);
}

// A float pass: the kernel for the call's mode and parts.
template <Mode mode>
void launch_float(const Call& call, const Pass<double>& pass, int wants, const Exec& exec) {
  const unsigned grid = static_cast<unsigned>(call.layout.batch * call.chunks);
  const bool region = call.options.region != RegionLoss::none, pixel = call.options.pixel != PixelLoss::none;
  const size_t by = static_cast<size_t>(2 * call.layout.channels) * sizeof(double);
  if (region && pixel && wants == want_sums)
    NOISYSEG_LAUNCH((loss_pass<float, mode, region_part | pixel_part, want_sums>), grid, threads, 0, exec,
                    call, pass);
  else if (region && pixel)
    NOISYSEG_LAUNCH((loss_pass<float, mode, region_part | pixel_part, want_grad>), grid, threads, by, exec,
                    call, pass);
  else if (region && wants == want_sums)
    NOISYSEG_LAUNCH((loss_pass<float, mode, region_part, want_sums>), grid, threads, 0, exec, call, pass);
  else if (region)
    NOISYSEG_LAUNCH((loss_pass<float, mode, region_part, want_grad>), grid, threads, by, exec, call, pass);
  else
    NOISYSEG_LAUNCH((loss_pass<float, mode, pixel_part, want_sums | want_grad>), grid, threads, 0, exec, call,
                    pass);
}
// In double or dual numbers.
template <class T>
void launch_exact(const Call& call, const Pass<T>& pass, int wants, const Exec& exec) {
  const unsigned grid = static_cast<unsigned>(call.layout.batch * call.chunks);
  const size_t by = static_cast<size_t>(2 * call.layout.channels) * sizeof(T);
  if (wants == want_sums)
    NOISYSEG_LAUNCH((loss_pass<T, Mode::any, region_part | pixel_part, want_sums>), grid, threads, 0, exec,
                    call, pass);
  else
    NOISYSEG_LAUNCH((loss_pass<T, Mode::any, region_part | pixel_part, want_grad>), grid, threads, by, exec,
                    call, pass);
}
void launch_pass(const Call& call, const Pass<double>& pass, int wants, bool f64_logits, const Exec& exec) {
  if (f64_logits) return launch_exact<double>(call, pass, wants, exec);
  if (call.two) return launch_float<Mode::two>(call, pass, wants, exec);
  if (call.softmax) return launch_float<Mode::softmax>(call, pass, wants, exec);
  launch_float<Mode::sigmoid>(call, pass, wants, exec);
}

template <class S>
Pass<S> make_pass() {
  Pass<S> pass;
  pass.partial = nullptr, pass.known = false, pass.counts = nullptr, pass.pixels = 1, pass.sums = nullptr;
  pass.grad_loss = pass.grad_loss_dot = nullptr, pass.grad_f64 = pass.grad_dot_f64 = false;
  pass.by_image = pass.by_class = pass.dot_by_image = pass.dot_by_class = 0;
  return pass;
}

// Strides of the gradient with respect to the loss, by image and by class.
void grad_strides(const LossOptions& o, Reduction reduction, const Array& grad_loss, int64_t* by_image,
                  int64_t* by_class) {
  *by_image = *by_class = 0;
  if (reduction == Reduction::image) *by_image = grad_loss.strides[0];
  if (reduction != Reduction::none || o.pixel != PixelLoss::none) return;
  if (o.per_image) *by_image = grad_loss.strides[0];
  if (o.region != RegionLoss::generalized_dice) *by_class = grad_loss.strides[grad_loss.rank - 1];
}

}  // namespace

size_t loss_workspace(const Array& logits, const Exec&) {
  int64_t pixels = 1;
  for (int i = 2; i < logits.rank; ++i) pixels *= logits.shape[i];
  const int64_t values = logits.shape[0] * chunks_of(logits.shape[0], pixels) * values_of(logits.shape[1]);
  return count_blocks * sizeof(double) + static_cast<size_t>(values) * sizeof(Dual<double>);
}

LossReport loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const LossOptions& o, Reduction reduction,
                        const Array& loss, const Array& sums, const Array& keep, void* workspace,
                        const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const bool has_region = o.region != RegionLoss::none, has_pixel = o.pixel != PixelLoss::none;
  // Only in fp32: half precision would round the gradient twice.
  const bool kept = keep && keep.dtype == DType::f32 && !has_region && has_pixel &&
                    (reduction == Reduction::mean || reduction == Reduction::sum);
  const Call call = make_call(logits, target, weight, mask, class_weight, o, kept ? keep : Array{},
                              is_map(o, reduction) ? loss : Array{});
  double* counts = static_cast<double*>(workspace);
  Pass<double> pass = make_pass<double>();
  pass.partial = counts + count_blocks;
  pass.known = call.count_all;
  if (!empty(call.layout)) {
    if (kept && reduction == Reduction::mean) {
      pass.pixels = static_cast<double>(call.layout.batch * call.layout.pixels());
      if (!call.count_all) {
        pass.counts = counts;
        const int64_t tiles = tiles_of(call.layout.pixels()) * call.layout.batch;
        NOISYSEG_LAUNCH((label_count), static_cast<unsigned>(tiles < count_blocks ? tiles : count_blocks),
                        threads, 0, exec, call, counts);
      }
    }
    launch_pass(call, pass, want_sums, logits.dtype == DType::f64, exec);
  }
  finish<double>(call, reduction, pass.partial, is_map(o, reduction) ? Array{} : loss, sums, exec);
  return {true, kept};
}

void loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                   const Array& class_weight, const LossOptions& o, Reduction reduction,
                   const Array& grad_loss, const Array& sums, const Array& grad, bool kept,
                   const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const bool map = is_map(o, reduction);
  Call call = make_call(logits, target, weight, mask, class_weight, o, grad, map ? grad_loss : Array{});
  if (empty(call.layout)) return;
  if (kept) {
    call.mask = call.weight = Plane{}, call.labels = false;  // the pixels alone
    NOISYSEG_LAUNCH((scale_grad), static_cast<unsigned>(call.layout.batch * call.chunks), threads, 0, exec,
                    call, grad_loss.data, grad_loss.dtype == DType::f64);
    return;
  }
  Pass<double> pass = make_pass<double>();
  pass.sums = static_cast<const double*>(sums.data);
  pass.grad_loss = grad_loss.data;
  pass.grad_f64 = grad_loss.dtype == DType::f64;
  grad_strides(o, reduction, grad_loss, &pass.by_image, &pass.by_class);
  launch_pass(call, pass, want_grad, logits.dtype == DType::f64, exec);
}

void loss_tangent(const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
                  const Array& mask, const Array& class_weight, const LossOptions& o, Reduction reduction,
                  const Array& loss_dot, const Array& sums, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const bool map = is_map(o, reduction);
  const Call call =
      make_call(logits, target, weight, mask, class_weight, o, Array{}, map ? loss_dot : Array{}, logits_dot);
  Pass<Dual<double>> pass = make_pass<Dual<double>>();
  pass.partial = reinterpret_cast<Dual<double>*>(static_cast<double*>(workspace) + count_blocks);
  pass.known = call.count_all;
  if (!empty(call.layout)) launch_exact<Dual<double>>(call, pass, want_sums, exec);
  finish<Dual<double>>(call, reduction, pass.partial, map ? Array{} : loss_dot, sums, exec);
}

void loss_backward_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                           const Array& weight, const Array& mask, const Array& class_weight,
                           const LossOptions& o, Reduction reduction, const Array& grad_loss,
                           const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
                           const Exec& exec) {
  const DeviceGuard guard(exec.device);
  const bool map = is_map(o, reduction);
  const Call call = make_call(logits, target, weight, mask, class_weight, o, grad_dot,
                              map ? grad_loss : Array{}, logits_dot, map ? grad_loss_dot : Array{});
  if (empty(call.layout)) return;
  Pass<Dual<double>> pass = make_pass<Dual<double>>();
  pass.sums = static_cast<const Dual<double>*>(sums.data);
  pass.grad_loss = grad_loss.data;
  pass.grad_f64 = grad_loss.dtype == DType::f64;
  grad_strides(o, reduction, grad_loss, &pass.by_image, &pass.by_class);
  if (grad_loss_dot) {
    pass.grad_loss_dot = grad_loss_dot.data;
    pass.grad_dot_f64 = grad_loss_dot.dtype == DType::f64;
    grad_strides(o, reduction, grad_loss_dot, &pass.dot_by_image, &pass.dot_by_class);
  }
  launch_exact<Dual<double>>(call, pass, want_grad, exec);
}

}  // namespace noisyseg::cuda
