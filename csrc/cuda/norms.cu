// Normalisation and activation on CUDA. A block takes a tile of 8 pixels (4 in double) a thread: of one
// channel, of eight channels with small images, or of 32 neighbouring channels where the channels are last,
// so that loads are coalesced. It keeps its pixels in registers, sums the deviations from their own mean, and
// leaves four sums for each channel, which one block for each group joins in a fixed order around the group's
// mean.
//
// Bytes per pixel, fp32, with a direction: statistics 8 read, results 8 read and 8 written; without one half
// of that. Backward: 8 read for the sums, 8 read and 4 written for the gradient. fp16 and bf16: half of all.
#include "cuda/launch.h"
#include "formulas/norms.h"
#include "noisyseg/norms.h"

namespace noisyseg::cuda {
namespace {

using namespace formulas;

constexpr int block_threads = 256;
constexpr int block_warps = block_threads / 32;
template <class T>
constexpr int values_per_thread = sizeof(T) == 4 ? 8 : 4;

// How blocks lie on the array: each takes `channels` channels times `lanes` * values_per_thread pixels.
struct Tiling {
  int channels = 1, lanes = block_threads;  // their product is block_threads
  bool columns = false;                     // neighbouring threads take neighbouring channels
  int64_t pixels = 0, chunks = 0, channel_tiles = 0;
};
template <class T>
Tiling tiling_of(const NormShape& s) {
  Tiling t;
  t.columns = s.last;
  if (s.last)
    t.channels = 32;
  else if (s.pixels <= 32 * values_per_thread<T>)
    t.channels = block_warps;
  t.lanes = block_threads / t.channels;
  t.pixels = static_cast<int64_t>(t.lanes) * values_per_thread<T>;
  t.chunks = (s.pixels + t.pixels - 1) / t.pixels;
  t.channel_tiles = (s.channels + t.channels - 1) / t.channels;
  return t;
}

// This thread's channel and first pixel.
struct Place {
  int64_t b, c, k, q;
  int channel, lane;  // within the tile
  bool inside;        // the channel exists
};
__device__ inline Place place_of(const NormShape& s, const Tiling& t) {
  const int tid = static_cast<int>(threadIdx.x);
  Place at;
  const int64_t i = blockIdx.x, tile = i / t.chunks;
  at.k = i - tile * t.chunks;
  at.b = tile / t.channel_tiles;
  at.channel = t.columns ? tid % t.channels : tid / t.lanes;
  at.lane = t.columns ? tid / t.channels : tid % t.lanes;
  at.c = (tile - at.b * t.channel_tiles) * t.channels + at.channel;
  at.q = at.k * t.pixels + at.lane;
  at.inside = at.c < s.channels;
  return at;
}
__device__ inline int64_t part_of(const NormShape& s, const Tiling& t, int64_t b, int64_t c, int64_t k) {
  return ((b * s.channels + c) * t.chunks + k) * 4;
}
NOISYSEG_FORMULA double pixels_in(const NormShape& s, const Tiling& t, int64_t k) {
  const int64_t left = s.pixels - k * t.pixels;
  return static_cast<double>(left < t.pixels ? left : t.pixels);
}

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
};
View view_of(const Array& a) { return {a.data, a.dtype}; }

template <class From, class T, int n>
__device__ inline void load_as(const From* from, int64_t step, int valid, T (&out)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) out[j] = j < valid ? to_real<T>(from[j * step]) : T(0);
}
template <class T, int n>
__device__ inline void load(const View& v, int64_t offset, int64_t step, int valid, T (&out)[n]) {
  if (!v.data) {
#pragma unroll
    for (int j = 0; j < n; ++j) out[j] = T(0);
    return;
  }
  if (sizeof(T) == 8) return load_as(static_cast<const double*>(v.data) + offset, step, valid, out);
  switch (v.dtype) {
    case DType::f16: return load_as(static_cast<const Half*>(v.data) + offset, step, valid, out);
    case DType::bf16: return load_as(static_cast<const BFloat16*>(v.data) + offset, step, valid, out);
    default: return load_as(static_cast<const float*>(v.data) + offset, step, valid, out);
  }
}
template <class To, class T, int n>
__device__ inline void store_as(To* to, int64_t step, int valid, const T (&in)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j)
    if (j < valid) assign(to[j * step], in[j]);
}
template <class T, int n>
__device__ inline void store(const View& v, int64_t offset, int64_t step, int valid, const T (&in)[n]) {
  if (!v.data) return;
  if (sizeof(T) == 8) return store_as(static_cast<double*>(v.data) + offset, step, valid, in);
  switch (v.dtype) {
    case DType::f16: return store_as(static_cast<Half*>(v.data) + offset, step, valid, in);
    case DType::bf16: return store_as(static_cast<BFloat16*>(v.data) + offset, step, valid, in);
    default: return store_as(static_cast<float*>(v.data) + offset, step, valid, in);
  }
}

// Where this thread's pixels lie and how many of them exist.
struct Run {
  int64_t offset, step;
  int valid;
};
template <int n>
__device__ inline Run run_of(const NormShape& s, const Tiling& t, const Place& at) {
  const int64_t left = s.pixels - at.q;
  const int64_t valid = left <= 0 || !at.inside ? 0 : (left + t.lanes - 1) / t.lanes;
  return {s.offset(at.b, at.c, at.q), s.last ? t.lanes * s.channels : t.lanes,
          static_cast<int>(valid < n ? valid : n)};
}

__device__ inline double sum_of_warp(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The sums over all threads of a channel, in all of them.
template <int n>
__device__ inline void sum_of_channel(const Tiling& t, double (&x)[n]) {
  __shared__ double parts[n][block_threads];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
  if (!t.columns) {
#pragma unroll
    for (int v = 0; v < n; ++v) x[v] = sum_of_warp(x[v]);
    if (t.lanes == 32) return;
  }
  __syncthreads();  // an earlier sum may still be read
  const int slot = t.columns ? tid % 32 : 0;
#pragma unroll
  for (int v = 0; v < n; ++v)
    if (t.columns || tid % 32 == 0) parts[v][warp * 32 + slot] = x[v];
  __syncthreads();
#pragma unroll
  for (int v = 0; v < n; ++v) {
    x[v] = 0;
    for (int w = 0; w < block_warps; ++w) x[v] += parts[v][w * 32 + slot];
  }
}

// partial (B, C, chunks, 4): the moments of each chunk. Grid B * channel tiles * chunks.
template <class T, bool dual>
__global__ void __launch_bounds__(block_threads, 1)
    norm_moments(NormShape s, Tiling t, View x, View x_dot, double* partial) {
  constexpr int n = values_per_thread<T>;
  const Place at = place_of(s, t);
  const Run run = run_of<n>(s, t, at);
  T v[n], w[n];
  load(x, run.offset, run.step, run.valid, v);
  if (dual) load(x_dot, run.offset, run.step, run.valid, w);
  T sum = T(0), sum_dot = T(0);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    sum += v[j];
    if (dual) sum_dot += w[j];
  }
  double first[2] = {static_cast<double>(sum), static_cast<double>(sum_dot)};
  sum_of_channel(t, first);
  const double count = pixels_in(s, t, at.k);
  const T shift = static_cast<T>(first[0] / count);
  T d = T(0), dd = T(0), dt = T(0);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (j >= run.valid) continue;
    const T off = v[j] - shift;
    d += off, dd += off * off;
    if (dual) dt += off * w[j];
  }
  double unit = 1;
  if (sizeof(T) == 4 && dd - dd != 0) {  // squares beyond T: all of it in a larger unit
    constexpr T small = T(1) / T(1ull << 35) / T(1ull << 35);
    unit = 1 / static_cast<double>(small);
    d = dd = dt = T(0);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if (j >= run.valid) continue;
      const T off = v[j] * small - shift * small;
      d += off, dd += off * off;
      if (dual) dt += off * w[j];
    }
  }
  double second[3] = {static_cast<double>(d) * unit, static_cast<double>(dd) * unit * unit,
                      static_cast<double>(dt) * unit};
  sum_of_channel(t, second);
  if (!at.inside || at.lane != 0) return;
  const NormMoments m =
      moments_from(count, static_cast<double>(shift), second[0], second[1], first[1], second[2]);
  double* to = partial + part_of(s, t, at.b, at.c, at.k);
  to[0] = m.mean, to[1] = m.squares, to[2] = m.sum_dot, to[3] = m.product;
}

// The i-th partial result of group u, and its number of pixels.
__device__ inline const double* member_of(const NormShape& s, const Tiling& t, const double* partial,
                                          int64_t u, int64_t i, double& pixels, int64_t& c) {
  const int64_t row = i / t.chunks, k = i - row * t.chunks;
  c = s.over_batch ? u : u % s.groups * s.per_group() + row;
  pixels = pixels_in(s, t, k);
  return partial + part_of(s, t, s.over_batch ? row : u / s.groups, c, k);
}

// The statistics of group blockIdx.x, joined from its chunks', and the running ones. given: only these.
__global__ void __launch_bounds__(block_threads, 1)
    norm_join(NormShape s, Tiling t, const double* partial, NormVector mean, NormVector var, bool given,
              double momentum, double eps, double* stats) {
  const int64_t u = blockIdx.x, members = s.images() * s.per_group() * t.chunks;
  double* of = stats + u * norm_stats;
  if (given) {
    if (threadIdx.x == 0)
      of[0] = value_at(mean, u, 0), of[1] = 1 / sqrt(value_at(var, u, 1) + eps), of[2] = of[3] = 0;
    return;
  }
  const Tiling whole{};  // all threads together
  double pixels = 0;
  int64_t c = 0;
  double first[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < members; i += block_threads) {
    const double* m = member_of(s, t, partial, u, i, pixels, c);
    first[0] += pixels * m[0], first[1] += m[2];
  }
  sum_of_channel(whole, first);
  const double count = s.count(), middle = first[0] / count;
  double second[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < members; i += block_threads) {
    const double* m = member_of(s, t, partial, u, i, pixels, c);
    const double off = m[0] - middle;
    second[0] += m[1] + pixels * off * off, second[1] += m[3] + off * m[2];
  }
  sum_of_channel(whole, second);
  if (threadIdx.x != 0) return;
  const NormMoments all{middle, second[0], first[1], second[1]};
  statistics_from(count, all, eps, of);
  update_running(mean, var, u, count, all, momentum);
}

// y and y_dot. Grid as norm_moments.
template <class T, bool dual>
__global__ void __launch_bounds__(block_threads, 1)
    norm_apply(NormShape s, Tiling t, View x, View x_dot, NormParameters p, const double* stats, View y,
               View y_dot) {
  constexpr int n = values_per_thread<T>;
  __shared__ NormCoefficients<T> shared[32];
  const Place at = place_of(s, t);
  if (at.lane == 0 && at.inside)
    shared[at.channel] = coefficients_of<T>(stats + s.statistic_of(at.b, at.c) * norm_stats, p, at.c);
  __syncthreads();
  if (!at.inside) return;
  const NormCoefficients<T> k = shared[at.channel];
  const Run run = run_of<n>(s, t, at);
  T v[n], w[n];
  load(x, run.offset, run.step, run.valid, v);
  if (dual) load(x_dot, run.offset, run.step, run.valid, w);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const T d = v[j] - k.mean, before = k.scale * d + k.shift;
    if (dual) {
      const T along = k.scale * (w[j] - k.mean_dot) + (k.bend * d + k.shift_dot);
      w[j] = before > T(0) ? along : k.slope * along + k.slope_dot * before;
    }
    v[j] = k.slope == T(0) ? relu(before) : activate(before, k.slope);
  }
  store(y, run.offset, run.step, run.valid, v);
  if (dual) store(y_dot, run.offset, run.step, run.valid, w);
}

// partial (B, C, chunks, 4): the three sums of each chunk. Grid as norm_moments.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    norm_backward_sums(NormShape s, Tiling t, View x, View grad_y, NormParameters p, const double* stats,
                       double* partial) {
  constexpr int n = values_per_thread<T>;
  __shared__ NormCoefficients<T> shared[32];
  const Place at = place_of(s, t);
  if (at.lane == 0 && at.inside)
    shared[at.channel] = coefficients_of<T>(stats + s.statistic_of(at.b, at.c) * norm_stats, p, at.c);
  __syncthreads();
  const NormCoefficients<T> k = shared[at.inside ? at.channel : 0];
  const Run run = run_of<n>(s, t, at);
  T v[n], g[n];
  load(x, run.offset, run.step, run.valid, v);
  load(grad_y, run.offset, run.step, run.valid, g);
  T a = T(0), b = T(0), e = T(0);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    if (j >= run.valid) continue;
    const T d = v[j] - k.mean, before = k.scale * d + k.shift;
    const T h = before > T(0) ? g[j] : k.slope * g[j];
    a += h, b += h * d, e += before > T(0) ? T(0) : g[j] * before;
  }
  double sums[norm_grad_sums] = {static_cast<double>(a), static_cast<double>(b), static_cast<double>(e)};
  sum_of_channel(t, sums);
  if (!at.inside || at.lane != 0) return;
  const double mean = stats[s.statistic_of(at.b, at.c) * norm_stats];
  double* to = partial + part_of(s, t, at.b, at.c, at.k);
  to[0] = sums[0], to[1] = sums[1] + (static_cast<double>(k.mean) - mean) * sums[0], to[2] = sums[2];
}

// projections (groups, 2): what the gradient loses to the statistics of group blockIdx.x.
__global__ void __launch_bounds__(block_threads, 1)
    norm_projections(NormShape s, Tiling t, const double* partial, NormVector weight, bool given,
                     const double* stats, double* projections) {
  const int64_t u = blockIdx.x, members = given ? 0 : s.images() * s.per_group() * t.chunks;
  double sums[2] = {0, 0}, pixels = 0;
  int64_t c = 0;
  for (int64_t i = threadIdx.x; i < members; i += block_threads) {
    const double* m = member_of(s, t, partial, u, i, pixels, c);
    const double by = value_at(weight, c, 1);
    sums[0] += by * m[0], sums[1] += by * m[1];
  }
  sum_of_channel(Tiling{}, sums);
  if (threadIdx.x != 0) return;
  const double r = stats[u * norm_stats + 1];
  projections[2 * u] = r * sums[0] / s.count();
  projections[2 * u + 1] = r * r * r * sums[1] / s.count();
}

// The gradients of the parameters of channel blockIdx.x; block C, if there is one, that of the one slope.
__global__ void __launch_bounds__(block_threads, 1)
    norm_parameter_gradients(NormShape s, Tiling t, const double* partial, const double* stats,
                             NormVector grad_weight, NormVector grad_bias, NormVector grad_slope,
                             bool one_slope) {
  const bool all = blockIdx.x == s.channels;
  const int64_t channels = all ? s.channels : 1, members = s.batch * channels * t.chunks;
  double sums[norm_grad_sums] = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < members; i += block_threads) {
    const int64_t row = i / t.chunks, b = row / channels, c = all ? row - b * channels : blockIdx.x;
    const double* m = partial + part_of(s, t, b, c, i - row * t.chunks);
    sums[0] += m[0], sums[1] += stats[s.statistic_of(b, c) * norm_stats + 1] * m[1], sums[2] += m[2];
  }
  sum_of_channel(Tiling{}, sums);
  if (threadIdx.x != 0) return;
  if (all) return set_value(grad_slope, 0, sums[2]);
  if (grad_bias.data) set_value(grad_bias, blockIdx.x, sums[0]);
  if (grad_weight.data) set_value(grad_weight, blockIdx.x, sums[1]);
  if (grad_slope.data && !one_slope) set_value(grad_slope, blockIdx.x, sums[2]);
}

// The gradient with respect to x. Grid as norm_moments.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    norm_gradient(NormShape s, Tiling t, View x, View grad_y, NormParameters p, const double* stats,
                  const double* projections, View grad_x) {
  constexpr int n = values_per_thread<T>;
  __shared__ NormGradient<T> shared[32];
  const Place at = place_of(s, t);
  if (at.lane == 0 && at.inside) {
    const int64_t u = s.statistic_of(at.b, at.c);
    shared[at.channel] = gradient_of<T>(stats + u * norm_stats, p, at.c, projections + 2 * u);
  }
  __syncthreads();
  if (!at.inside) return;
  const NormGradient<T> k = shared[at.channel];
  const Run run = run_of<n>(s, t, at);
  T v[n], g[n];
  load(x, run.offset, run.step, run.valid, v);
  load(grad_y, run.offset, run.step, run.valid, g);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const T d = v[j] - k.mean, before = k.scale * d + k.shift;
    const T h = before > T(0) ? g[j] : k.slope * g[j];
    v[j] = k.scale * h - (k.constant + k.linear * d);
  }
  store(grad_x, run.offset, run.step, run.valid, v);
}

// ---- calls ----------------------------------------------------------------------------------------

int64_t partials(const NormShape& s, const Tiling& t) { return s.batch * s.channels * t.chunks * 4; }

template <class T>
void forward(const NormInputs& in, const NormOptions& o, const Array& y, const Array& y_dot,
             const Array& stats, double* partial, const Exec& exec) {
  const NormShape s = norm_shape(in.x, o);
  const Tiling t = tiling_of<T>(s);
  const NormParameters p = norm_parameters(in, o);
  const View x = view_of(in.x), x_dot = view_of(in.x_dot);
  double* const of = static_cast<double*>(stats.data);
  const unsigned blocks = static_cast<unsigned>(s.batch * t.channel_tiles * t.chunks);
  const bool dual = static_cast<bool>(y_dot);
  if (!o.given) {
    if (dual)
      NOISYSEG_LAUNCH((norm_moments<T, true>), blocks, block_threads, 0, exec, s, t, x, x_dot, partial);
    else
      NOISYSEG_LAUNCH((norm_moments<T, false>), blocks, block_threads, 0, exec, s, t, x, x_dot, partial);
  }
  NOISYSEG_LAUNCH((norm_join), static_cast<unsigned>(s.statistics()), block_threads, 0, exec, s, t, partial,
                  norm_vector(in.running_mean), norm_vector(in.running_var), o.given, o.momentum, o.eps, of);
  if (dual)
    NOISYSEG_LAUNCH((norm_apply<T, true>), blocks, block_threads, 0, exec, s, t, x, x_dot, p, of, view_of(y),
                    view_of(y_dot));
  else
    NOISYSEG_LAUNCH((norm_apply<T, false>), blocks, block_threads, 0, exec, s, t, x, x_dot, p, of, view_of(y),
                    view_of(y_dot));
}

template <class T>
void backward(const NormInputs& in, const NormOptions& o, const Array& grad_y, const Array& stats,
              const Array& grad_x, const Array& grad_weight, const Array& grad_bias, const Array& grad_slope,
              double* partial, const Exec& exec) {
  const NormShape s = norm_shape(in.x, o);
  const Tiling t = tiling_of<T>(s);
  const NormParameters p = norm_parameters(in, o);
  const View x = view_of(in.x), g = view_of(grad_y);
  const double* const of = static_cast<const double*>(stats.data);
  double* const projections = partial + partials(s, t);
  const unsigned blocks = static_cast<unsigned>(s.batch * t.channel_tiles * t.chunks);
  const bool one_slope = grad_slope && grad_slope.shape[0] == 1 && s.channels != 1;
  NOISYSEG_LAUNCH((norm_backward_sums<T>), blocks, block_threads, 0, exec, s, t, x, g, p, of, partial);
  if (grad_weight || grad_bias || grad_slope)
    NOISYSEG_LAUNCH((norm_parameter_gradients), static_cast<unsigned>(s.channels + one_slope), block_threads,
                    0, exec, s, t, partial, of, norm_vector(grad_weight), norm_vector(grad_bias),
                    norm_vector(grad_slope), one_slope);
  if (!grad_x) return;
  NOISYSEG_LAUNCH((norm_projections), static_cast<unsigned>(s.statistics()), block_threads, 0, exec, s, t,
                  partial, p.weight, o.given, of, projections);
  NOISYSEG_LAUNCH((norm_gradient<T>), blocks, block_threads, 0, exec, s, t, x, g, p, of, projections,
                  view_of(grad_x));
}

}  // namespace

size_t norm_workspace(const NormInputs& in, const NormOptions& o, const Exec&) {
  const NormShape s = norm_shape(in.x, o);
  const Tiling t = in.x.dtype == DType::f64 ? tiling_of<double>(s) : tiling_of<float>(s);
  if (s.batch * t.channel_tiles * t.chunks > INT32_MAX || s.statistics() > INT32_MAX)
    throw std::invalid_argument("x is too large for one launch");
  return static_cast<size_t>(partials(s, t) + 2 * s.statistics()) * sizeof(double);
}

void norm_forward(const NormInputs& in, const NormOptions& options, const Array& y, const Array& y_dot,
                  const Array& stats, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  double* const partial = static_cast<double*>(workspace);
  if (in.x.dtype == DType::f64)
    forward<double>(in, options, y, y_dot, stats, partial, exec);
  else
    forward<float>(in, options, y, y_dot, stats, partial, exec);
}

void norm_backward(const NormInputs& in, const NormOptions& options, const Array& grad_y, const Array& stats,
                   const Array& grad_x, const Array& grad_weight, const Array& grad_bias,
                   const Array& grad_slope, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  double* const partial = static_cast<double*>(workspace);
  if (in.x.dtype == DType::f64)
    backward<double>(in, options, grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope, partial, exec);
  else
    backward<float>(in, options, grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope, partial, exec);
}

}  // namespace noisyseg::cuda
