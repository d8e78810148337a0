// The meta-gradient's pixel work on CUDA. No kernel synchronises with the host.
//
// Bytes per pixel, fp32: cross-entropy and its tangent 8 C + 1 (uint8 labels) read, 8 written; the weight
// nets 4 read, 4 written forward, 12 read in reverse. Hidden activations stay in registers and shared memory.
#include "cuda/planes.cuh"
#include "formulas/meta.h"

namespace noisyseg::cuda {
namespace {

constexpr int64_t most_blocks = 1 << 20;

// ---- cross-entropy and its tangent ----------------------------------------------------------------

struct CePlanes {
  Plane logits, logits_dot, target, loss, loss_dot;
  Layout layout;
  bool labels, softmax;
};

template <int n, class T>
__device__ inline void read_channel(const Spots<n>& at, const Plane& plane, int64_t b, int64_t c, T* out) {
  read_float(at, at.inside, plane, b * plane.batch + c * plane.channel, out);
}

// One thread for a few pixels; a block walks over tiles of the whole batch.
template <class T>
__global__ void __launch_bounds__(block_threads, 1) ce_dual_map(CePlanes in, int64_t tiles_of_image) {
  constexpr int n = pixels_per_thread<T>;
  const int64_t channels = in.layout.channels;
  for (int64_t item = blockIdx.x; item < in.layout.batch * tiles_of_image; item += gridDim.x) {
    const int64_t b = item / tiles_of_image;
    const Spots<n> at = spots_of<n>(in.layout, item - b * tiles_of_image);
    T y[n] = {}, g[n], z[n], dz[n], loss[n] = {}, dot[n] = {};
    if (in.labels) read(at, at.inside, in.target, b * in.target.batch, y);
    if (in.softmax && !(in.labels && channels == 2)) {
      T top[n], sum[n] = {}, sum_dot[n] = {}, mass[n] = {};
      for (int64_t c = 0; c < channels; ++c) {
        read_channel(at, in.logits, b, c, z);
#pragma unroll
        for (int k = 0; k < n; ++k) top[k] = c == 0 ? z[k] : max_(top[k], z[k]);
      }
      for (int64_t c = 0; c < channels; ++c) {
        read_channel(at, in.logits, b, c, z);
        read_channel(at, in.logits_dot, b, c, dz);
        if (!in.labels) read(at, at.inside, in.target, b * in.target.batch + c * in.target.channel, g);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          if (in.labels) g[k] = y[k] == static_cast<T>(c) ? T(1) : T(0);
          const T e = exp_(z[k] - top[k]);
          sum[k] += e, sum_dot[k] += e * dz[k], mass[k] += g[k];
          loss[k] += g[k] != T(0) ? g[k] * (z[k] - top[k]) : T(0);
          dot[k] += g[k] != T(0) ? g[k] * dz[k] : T(0);
        }
      }
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const LossDot<T> of_pixel = softmax_ce_dual(sum[k], sum_dot[k], mass[k], loss[k], dot[k]);
        loss[k] = of_pixel.loss, dot[k] = of_pixel.dot;
      }
    } else {
      const bool difference = in.softmax;  // of two classes: the sigmoid of the difference
      const int64_t terms = difference ? 1 : channels;
      for (int64_t c = 0; c < terms; ++c) {
        read_channel(at, in.logits, b, difference ? 1 : c, z);
        read_channel(at, in.logits_dot, b, difference ? 1 : c, dz);
        if (difference) {
          T other[n];
          read_channel(at, in.logits, b, 0, other);
#pragma unroll
          for (int k = 0; k < n; ++k) z[k] -= other[k];
          read_channel(at, in.logits_dot, b, 0, other);
#pragma unroll
          for (int k = 0; k < n; ++k) dz[k] -= other[k];
        }
        if (!in.labels) read(at, at.inside, in.target, b * in.target.batch + c * in.target.channel, g);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          if (in.labels) g[k] = terms == 1 ? y[k] : y[k] == static_cast<T>(c) ? T(1) : T(0);
          const LossDot<T> of_pixel = binary_ce_dual(z[k], dz[k], g[k], exp_(-abs_(z[k])));
          loss[k] += of_pixel.loss, dot[k] += of_pixel.dot;
        }
      }
      const T share = T(1) / static_cast<T>(terms);
#pragma unroll
      for (int k = 0; k < n; ++k) loss[k] *= share, dot[k] *= share;
    }
    const T most = static_cast<T>(channels == 1 ? 1 : channels - 1);
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (in.labels && !(y[k] >= T(0) && y[k] <= most)) loss[k] = dot[k] = static_cast<T>(NAN);
    write_as<T>(at, in.loss, b * in.loss.batch, loss);
    write_as<T>(at, in.loss_dot, b * in.loss_dot.batch, dot);
  }
}

// ---- the mask net ---------------------------------------------------------------------------------
//
// A block's tile is 32 x 8 pixels (3D: 16 x 4 x 4), one for each thread, with its border in shared memory;
// hidden channels come in groups of four, whose weights lie side by side in shared memory: one load serves
// four multiply-adds.

template <bool deep>
struct Box {
  static constexpr int x = deep ? 16 : 32, y = deep ? 4 : 8, z = deep ? 4 : 1;
};
template <bool deep, int border>
struct Bordered {  // a tile with a border
  enum : int {     // constants that nvcc does not miss where one is not used
    row = Box<deep>::x + 2 * border,
    rows = Box<deep>::y + 2 * border,
    size = row * rows * (Box<deep>::z + (deep ? 2 * border : 0))
  };
};
template <int N, bool deep>
constexpr int taps_of = deep ? N * N * N : N * N;

struct Tiles {
  Extent extent;
  int64_t count[3];
  NOISYSEG_HOST_DEVICE int64_t all() const { return extent.batch * count[0] * count[1] * count[2]; }
};
template <bool deep>
Tiles tiles_of(const Extent& e) {
  const int size[3] = {Box<deep>::z, Box<deep>::y, Box<deep>::x};
  Tiles t{e, {}};
  for (int k = 0; k < 3; ++k) t.count[k] = (e.size[k] + size[k] - 1) / size[k];
  return t;
}
// Blocks in reverse, by the shape alone: it decides the order of the sums.
int64_t parts_of(int64_t tiles) { return tiles < 1 ? 1 : tiles < 1024 ? tiles : 1024; }

struct Corner {
  int64_t b, z, y, x;
};
template <bool deep>
__device__ inline Corner corner_of(const Tiles& t, int64_t tile) {
  Corner c;
  c.x = tile % t.count[2] * Box<deep>::x, tile /= t.count[2];
  c.y = tile % t.count[1] * Box<deep>::y, tile /= t.count[1];
  c.z = tile % t.count[0] * Box<deep>::z, c.b = tile / t.count[0];
  return c;
}
__device__ inline bool inside(const Extent& e, int64_t z, int64_t y, int64_t x) {
  return z >= 0 && z < e.size[0] && y >= 0 && y < e.size[1] && x >= 0 && x < e.size[2];
}
template <class T>
__device__ inline T& at(const Volume& v, int64_t b, int64_t z, int64_t y, int64_t x) {
  return reinterpret_cast<T*>(
      v.data)[b * v.strides[0] + z * v.strides[1] + y * v.strides[2] + x * v.strides[3]];
}
// Pixel i of a tile with a border, in the image.
template <bool deep, int border>
__device__ inline Corner place_of(const Corner& c, int i) {
  using B = Bordered<deep, border>;
  return {c.b, c.z + i / (B::row * B::rows) - (deep ? border : 0), c.y + i / B::row % B::rows - border,
          c.x + i % B::row - border};
}

template <bool deep, int border, class T>
__device__ inline void load_tile(const Extent& e, const Volume& map, const Corner& c, T* tile) {
  for (int i = threadIdx.x; i < Bordered<deep, border>::size; i += block_threads) {
    const Corner p = place_of<deep, border>(c, i);
    tile[i] = inside(e, p.z, p.y, p.x) ? at<T>(map, p.b, p.z, p.y, p.x) : T(0);
  }
}

// G channels from `first` on: weights [tap][G], then biases and output weights; zeros behind the last
// channel.
template <int taps, int G, class T>
__device__ inline void load_group(const T* w, const T* b, const T* w1, int64_t first, int64_t channels,
                                  T* out) {
  for (int i = threadIdx.x; i < (taps + 2) * G; i += block_threads) {
    const int tap = i / G;
    const int64_t k = first + i % G;
    const T* from = tap < taps ? w + k * taps + tap : (tap == taps ? b : w1) + k;
    out[i] = k < channels ? *from : T(0);
  }
}

// The N-wide convolution before its ReLU. tile: where the stencil's first tap lies, in a tile with this
// border.
template <int N, bool deep, int border, int G, class T>
__device__ inline void convolve(const T* tile, const T* w, T* sum) {
  using B = Bordered<deep, border>;
#pragma unroll
  for (int k = 0; k < G; ++k) sum[k] = w[taps_of<N, deep> * G + k];
#pragma unroll 1
  for (int dz = 0; dz < (deep ? N : 1); ++dz)
#pragma unroll 1
    for (int dy = 0; dy < N; ++dy)
#pragma unroll
      for (int dx = 0; dx < N; ++dx, w += G) {
        const T in = tile[(dz * B::rows + dy) * B::row + dx];
#pragma unroll
        for (int k = 0; k < G; ++k) sum[k] += w[k] * in;
      }
}
// Where the stencil of pixel i of the box begins in a tile with this border.
template <int N, bool deep, int border>
__device__ inline int stencil_of(int i) {
  using X = Box<deep>;
  using B = Bordered<deep, border>;
  constexpr int off = border - N / 2;
  return ((i / (X::x * X::y) + (deep ? off : 0)) * B::rows + i / X::x % X::y + off) * B::row + i % X::x + off;
}

constexpr int group = 4;

template <int N, bool deep, class T>
__device__ inline void add_hidden(const T* tile, const T* w, const T* b, const T* w1, int64_t channels,
                                  T* weights, T& logit) {
  constexpr int taps = taps_of<N, deep>;
  for (int64_t k = 0; k < channels; k += group) {
    __syncthreads();  // the group before may still be read
    load_group<taps, group>(w, b, w1, k, channels, weights);
    __syncthreads();
    T h[group];
    convolve<N, deep, 2, group>(tile + stencil_of<N, deep, 2>(threadIdx.x), weights, h);
#pragma unroll
    for (int j = 0; j < group; ++j) logit += weights[(taps + 1) * group + j] * relu(h[j]);
  }
}

// R. Grid: blocks that walk over the tiles.
template <bool deep, class T>
__global__ void __launch_bounds__(block_threads, 1)
    mask_net_map(Tiles t, Volume loss, MaskWeights<T> net, Volume weight) {
  __shared__ T tile[Bordered<deep, 2>::size], weights[(taps_of<5, deep> + 2) * group];
  for (int64_t item = blockIdx.x; item < t.all(); item += gridDim.x) {
    const Corner c = corner_of<deep>(t, item);
    __syncthreads();
    load_tile<deep, 2>(t.extent, loss, c, tile);
    __syncthreads();
    const Corner p = place_of<deep, 0>(c, threadIdx.x);
    T logit = net.w1[net.at.k3 + net.at.k5] * tile[stencil_of<1, deep, 2>(threadIdx.x)] + net.b1[0];
    add_hidden<3, deep>(tile, net.w3, net.b3, net.w1, net.at.k3, weights, logit);
    add_hidden<5, deep>(tile, net.w5, net.b5, net.w1 + net.at.k3, net.at.k5, weights, logit);
    if (inside(t.extent, p.z, p.y, p.x)) at<T>(weight, p.b, p.z, p.y, p.x) = sigmoid_of(logit);
  }
}

// The gradient by a pixel's logit, 0 outside of the image.
template <class T>
__device__ inline T slope_at(const Extent& e, const Volume& grad, const Volume& weight, const Corner& p) {
  if (!inside(e, p.z, p.y, p.x)) return T(0);
  return by_logit(at<T>(grad, p.b, p.z, p.y, p.x), at<T>(weight, p.b, p.z, p.y, p.x));
}

// Partial sums (parts, parameters) of one convolution's parameters. Grid (parts, groups). First each thread
// has a pixel and computes its four slopes, which go to shared memory; then it has a tap and a share of the
// pixels.
template <int N, bool deep, class T>
__global__ void __launch_bounds__(block_threads, 1)
    mask_net_parts(Tiles t, Volume grad, Volume weight, Volume loss, MaskWeights<T> net, double* partial) {
  using B = Bordered<deep, 2>;
  constexpr int taps = taps_of<N, deep>, split = block_threads / taps;
  __shared__ T tile[B::size], weights[(taps + 2) * group], slopes[block_threads * group];
  __shared__ double shares[taps * split * group];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * group;
  const int64_t channels = N == 3 ? net.at.k3 : net.at.k5;
  const T* w1 = N == 3 ? net.w1 : net.w1 + net.at.k3;
  load_group<taps, group>(N == 3 ? net.w3 : net.w5, N == 3 ? net.b3 : net.b5, w1, first, channels, weights);
  const int me = threadIdx.x, tap = me % taps, share = me / taps;
  const int shift = (tap / (N * N) * B::rows + tap / N % N) * B::row + tap % N;  // 2D: tap / (N * N) is 0
  double by_w[group] = {}, by_b[group] = {}, by_w1[group] = {};
  for (int64_t item = blockIdx.x; item < t.all(); item += gridDim.x) {
    const Corner c = corner_of<deep>(t, item);
    __syncthreads();
    load_tile<deep, 2>(t.extent, loss, c, tile);
    __syncthreads();
    const T s = slope_at<T>(t.extent, grad, weight, place_of<deep, 0>(c, me));
    T h[group];
    convolve<N, deep, 2, group>(tile + stencil_of<N, deep, 2>(me), weights, h);
#pragma unroll
    for (int k = 0; k < group; ++k) {
      const T d = h[k] <= T(0) ? T(0) : s * weights[(taps + 1) * group + k];
      slopes[me * group + k] = d;
      by_b[k] += static_cast<double>(d), by_w1[k] += static_cast<double>(s * relu(h[k]));
    }
    __syncthreads();
    if (share < split) {
      T sum[group] = {};
      for (int i = share * block_threads / split; i < (share + 1) * block_threads / split; ++i) {
        const T in = tile[stencil_of<N, deep, 2>(i) + shift];
#pragma unroll
        for (int k = 0; k < group; ++k) sum[k] += slopes[i * group + k] * in;
      }
#pragma unroll
      for (int k = 0; k < group; ++k) by_w[k] += static_cast<double>(sum[k]);
    }
  }
  double* mine = partial + blockIdx.x * net.at.size;
  const int64_t w0 = N == 3 ? net.at.w3 : net.at.w5, b0 = N == 3 ? net.at.b3 : net.at.b5;
  const int64_t w10 = net.at.w1 + (N == 3 ? 0 : net.at.k3);
  if (share < split)
    for (int k = 0; k < group; ++k) shares[(share * taps + tap) * group + k] = by_w[k];
  __syncthreads();
  for (int i = me; i < taps * group; i += block_threads) {
    double total = 0;
    for (int part = 0; part < split; ++part) total += shares[part * taps * group + i];
    const int64_t k = first + i % group;
    if (k < channels) mine[w0 + k * taps + i / group] = total;
  }
#pragma unroll
  for (int k = 0; k < group; ++k) {
    const double b = sum_of_block(by_b[k]), w = sum_of_block(by_w1[k]);
    if (me == 0 && first + k < channels) mine[b0 + first + k] = b, mine[w10 + first + k] = w;
  }
}

// Partial sums of the two parameters that no hidden channel has: b1 and L's own weight.
template <bool deep, class T>
__global__ void __launch_bounds__(block_threads, 1)
    mask_net_rest(Tiles t, Volume grad, Volume weight, Volume loss, MaskNetLayout layout, double* partial) {
  double by_b = 0, by_w = 0;
  for (int64_t item = blockIdx.x; item < t.all(); item += gridDim.x) {
    const Corner p = place_of<deep, 0>(corner_of<deep>(t, item), threadIdx.x);
    if (!inside(t.extent, p.z, p.y, p.x)) continue;
    const T s = slope_at<T>(t.extent, grad, weight, p);
    by_b += static_cast<double>(s);
    by_w += static_cast<double>(s) * static_cast<double>(at<T>(loss, p.b, p.z, p.y, p.x));
  }
  by_b = sum_of_block(by_b), by_w = sum_of_block(by_w);
  double* mine = partial + blockIdx.x * layout.size;
  if (threadIdx.x == 0) mine[layout.b1] = by_b, mine[layout.b1 - 1] = by_w;
}

// out from partial sums (parts, values). Grid (values).
template <class T>
__global__ void __launch_bounds__(block_threads) mask_net_sums(const double* partial, int64_t parts, T* out) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < parts; i += block_threads) total += partial[i * gridDim.x + blockIdx.x];
  total = sum_of_block(total);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<T>(total);
}

// Adds one convolution's part of the gradient by L: the slopes of the tile and a border of 2, computed again,
// then the convolution turned round.
template <int N, int G, bool deep, class T>
__device__ inline void add_by_loss(const Tiles& t, const Corner& c, const Volume& grad, const Volume& weight,
                                   const T* tile, const T* w, const T* b, const T* w1, int64_t channels,
                                   T* weights, T* slopes, T& out) {
  using B = Bordered<deep, 2>;
  using W = Bordered<deep, 4>;
  constexpr int taps = taps_of<N, deep>, off = 2 - N / 2, off_z = deep ? off : 0, n_z = deep ? N : 1;
  for (int64_t first = 0; first < channels; first += G) {
    __syncthreads();
    load_group<taps, G>(w, b, w1, first, channels, weights);
    __syncthreads();
    for (int i = threadIdx.x; i < B::size; i += block_threads) {
      const int from = ((i / (B::row * B::rows) + off_z) * W::rows + i / B::row % B::rows + off) * W::row +
                       i % B::row + off;
      const T s = slope_at<T>(t.extent, grad, weight, place_of<deep, 2>(c, i));
      T h[G];
      convolve<N, deep, 4, G>(tile + from, weights, h);
#pragma unroll
      for (int k = 0; k < G; ++k) slopes[i * G + k] = h[k] <= T(0) ? T(0) : s * weights[(taps + 1) * G + k];
    }
    __syncthreads();
    const T* mine = slopes + stencil_of<N, deep, 2>(threadIdx.x) * G;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      const int z = n_z - 1 - tap / (N * N), y = N - 1 - tap / N % N, x = N - 1 - tap % N;
#pragma unroll
      for (int k = 0; k < G; ++k)
        out += weights[tap * G + k] * mine[((z * B::rows + y) * B::row + x) * G + k];
    }
  }
}

// The gradient by L. Grid: blocks that walk over the tiles.
template <bool deep, class T>
__global__ void __launch_bounds__(block_threads, 1)
    mask_net_by_loss(Tiles t, Volume grad, Volume weight, Volume loss, MaskWeights<T> net, Volume grad_loss) {
  constexpr int G = sizeof(T) == 4 ? group : 1;  // double: as many as 48 KiB hold
  __shared__ T tile[Bordered<deep, 4>::size], slopes[Bordered<deep, 2>::size * G];
  __shared__ T weights[(taps_of<5, deep> + 2) * G];
  for (int64_t item = blockIdx.x; item < t.all(); item += gridDim.x) {
    const Corner c = corner_of<deep>(t, item);
    __syncthreads();
    load_tile<deep, 4>(t.extent, loss, c, tile);
    const Corner p = place_of<deep, 0>(c, threadIdx.x);
    T out = net.w1[net.at.k3 + net.at.k5] * slope_at<T>(t.extent, grad, weight, p);
    add_by_loss<3, G, deep>(t, c, grad, weight, tile, net.w3, net.b3, net.w1, net.at.k3, weights, slopes,
                            out);
    add_by_loss<5, G, deep>(t, c, grad, weight, tile, net.w5, net.b5, net.w1 + net.at.k3, net.at.k5, weights,
                            slopes, out);
    if (inside(t.extent, p.z, p.y, p.x)) at<T>(grad_loss, p.b, p.z, p.y, p.x) = out;
  }
}

// ---- the pixel-wise MWNet -------------------------------------------------------------------------
//
// All units for all pixels: a GPU has the arithmetic, and the CPU's tables would need a launch of their own.

struct MwPlanes {
  Plane loss, weight, grad_weight, grad_loss;
  Layout layout;
};

NOISYSEG_FORMULA float fused(float a, float b, float c) { return fmaf(a, b, c); }
NOISYSEG_FORMULA double fused(double a, double b, double c) { return fma(a, b, c); }

// R, or with `reverse` the gradient by L. Grid: blocks that walk over the tiles; dynamic shared memory: w1,
// b1, w2.
template <bool reverse, class T>
__global__ void __launch_bounds__(block_threads, 1)
    mw_net_map(MwPlanes in, MwWeights<T> net, int64_t tiles_of_image) {
  NOISYSEG_SHARED(T, units);
  constexpr int n = pixels_per_thread<T>;
  const int hidden = static_cast<int>(net.hidden);
  for (int j = threadIdx.x; j < hidden; j += block_threads)
    units[3 * j] = net.w1[j], units[3 * j + 1] = net.b1[j], units[3 * j + 2] = net.w2[j];
  __syncthreads();
  for (int64_t item = blockIdx.x; item < in.layout.batch * tiles_of_image; item += gridDim.x) {
    const int64_t b = item / tiles_of_image;
    const Spots<n> at = spots_of<n>(in.layout, item - b * tiles_of_image);
    T x[n], out[n];
    read_as<T>(at, at.inside, in.loss, b * in.loss.batch, x);
#pragma unroll
    for (int k = 0; k < n; ++k) out[k] = reverse ? T(0) : net.b2[0];
    for (int j = 0; j < hidden; ++j) {
      const T w1 = units[3 * j], b1 = units[3 * j + 1], w2 = units[3 * j + 2];
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const T h = fused(w1, x[k], b1);
        out[k] += reverse ? (h <= T(0) ? T(0) : w1 * w2) : w2 * relu(h);
      }
    }
    if (reverse) {
      T d[n], r[n];
      read_as<T>(at, at.inside, in.grad_weight, b * in.grad_weight.batch, d);
      read_as<T>(at, at.inside, in.weight, b * in.weight.batch, r);
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] *= by_logit(d[k], r[k]);
      write_as<T>(at, in.grad_loss, b * in.grad_loss.batch, out);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) out[k] = sigmoid_of(out[k]);
      write_as<T>(at, in.weight, b * in.weight.batch, out);
    }
  }
}

// Partial sums (parts, H + 1, 2) of s and s L over the pixels where a unit is on; unit H is always on. Grid
// (parts, sets of 256 units). A thread first has a pixel, then a unit and a share of the block's pixels.
template <class T>
__global__ void __launch_bounds__(block_threads, 1)
    mw_net_parts(MwPlanes in, MwWeights<T> net, int64_t tiles_of_image, double* partial) {
  __shared__ T losses[block_threads], slopes[block_threads];
  __shared__ double shares[2 * block_threads];
  const int first = static_cast<int>(blockIdx.y) * block_threads;
  const int left = static_cast<int>(net.hidden) + 1 - first,
            units = left < block_threads ? left : block_threads;
  const int split = block_threads / units, me = threadIdx.x, unit = me % units, share = me / units;
  const bool always = first + unit == net.hidden;
  const T w1 = always ? T(0) : net.w1[first + unit], b1 = always ? T(1) : net.b1[first + unit];
  double total = 0, total_loss = 0;
  for (int64_t item = blockIdx.x; item < in.layout.batch * tiles_of_image; item += gridDim.x) {
    const int64_t b = item / tiles_of_image;
    const Spots<1> at = spots_of<1>(in.layout, item - b * tiles_of_image);
    T x[1], d[1], r[1];
    read_as<T>(at, at.inside, in.loss, b * in.loss.batch, x);
    read_as<T>(at, at.inside, in.grad_weight, b * in.grad_weight.batch, d);
    read_as<T>(at, at.inside, in.weight, b * in.weight.batch, r);
    __syncthreads();
    losses[me] = x[0], slopes[me] = by_logit(d[0], r[0]);
    __syncthreads();
    if (share < split) {
      T s = T(0), s_loss = T(0);
      for (int i = share * block_threads / split; i < (share + 1) * block_threads / split; ++i) {
        const T on = fused(w1, losses[i], b1) <= T(0) ? T(0) : slopes[i];
        s += on, s_loss += on * losses[i];
      }
      total += static_cast<double>(s), total_loss += static_cast<double>(s_loss);
    }
  }
  shares[2 * me] = total, shares[2 * me + 1] = total_loss;
  __syncthreads();
  for (int i = me; i < 2 * units; i += block_threads) {
    double sum = 0;
    for (int part = 0; part < split; ++part) sum += shares[2 * units * part + i];
    partial[blockIdx.x * 2 * (net.hidden + 1) + 2 * first + i] = sum;
  }
}

// The parameters' gradient. Grid (H + 1).
template <class T>
__global__ void __launch_bounds__(block_threads)
    mw_net_sums(const double* partial, int64_t parts, MwWeights<T> net, T* out) {
  const int64_t j = blockIdx.x;
  double s = 0, s_loss = 0;
  for (int64_t i = threadIdx.x; i < parts; i += block_threads) {
    s += partial[2 * (i * gridDim.x + j)];
    s_loss += partial[2 * (i * gridDim.x + j) + 1];
  }
  s = sum_of_block(s), s_loss = sum_of_block(s_loss);
  if (threadIdx.x != 0) return;
  if (j == net.hidden)
    out[3 * j] = static_cast<T>(s);
  else
    mw_unit_gradient(net, j, s, s_loss, out);
}

// ---- launches -------------------------------------------------------------------------------------

dim3 grid_of(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x < most_blocks ? x : most_blocks), static_cast<unsigned>(y));
}

template <bool deep, class T>
void forward_mask(const Array& loss, const MaskNet& net, const Array& weight, const Exec& exec) {
  const Tiles t = tiles_of<deep>(extent_of(loss));
  NOISYSEG_LAUNCH((mask_net_map<deep, T>), grid_of(t.all()), block_threads, 0, exec, t, volume_of(loss),
                  mask_weights<T>(net), volume_of(weight));
}
template <bool deep, class T>
void reverse_mask(const Array& grad_weight, const Array& weight, const Array& loss, const MaskNet& net,
                  const Array& grad_net, const Array& grad_loss, double* partial, const Exec& exec) {
  const Tiles t = tiles_of<deep>(extent_of(loss));
  const MaskWeights<T> w = mask_weights<T>(net);
  const Volume g = volume_of(grad_weight), r = volume_of(weight), l = volume_of(loss);
  const int64_t parts = parts_of(t.all());
  NOISYSEG_LAUNCH((mask_net_parts<3, deep, T>), grid_of(parts, (w.at.k3 + group - 1) / group), block_threads,
                  0, exec, t, g, r, l, w, partial);
  NOISYSEG_LAUNCH((mask_net_parts<5, deep, T>), grid_of(parts, (w.at.k5 + group - 1) / group), block_threads,
                  0, exec, t, g, r, l, w, partial);
  NOISYSEG_LAUNCH((mask_net_rest<deep, T>), grid_of(parts), block_threads, 0, exec, t, g, r, l, w.at,
                  partial);
  NOISYSEG_LAUNCH((mask_net_sums<T>), grid_of(w.at.size), block_threads, 0, exec, partial, parts,
                  static_cast<T*>(grad_net.data));
  if (grad_loss.rank && t.all())
    NOISYSEG_LAUNCH((mask_net_by_loss<deep, T>), grid_of(t.all()), block_threads, 0, exec, t, g, r, l, w,
                    volume_of(grad_loss));
}

MwPlanes make_planes(const Array& loss, const Array& weight, const Array& grad_weight,
                     const Array& grad_loss) {
  const Array arrays[4] = {loss, weight, grad_weight, grad_loss};
  Plane planes[4];
  MwPlanes p;
  p.layout = make_layout(arrays, planes, 4);
  p.loss = planes[0], p.weight = planes[1], p.grad_weight = planes[2], p.grad_loss = planes[3];
  return p;
}
template <bool reverse, class T>
void map_mw(const MwPlanes& p, const MwWeights<T>& net, const Exec& exec) {
  const int64_t tiles = tiles_of_image<T>(p.layout.pixels());
  if (!tiles || !p.layout.batch) return;
  NOISYSEG_LAUNCH((mw_net_map<reverse, T>), grid_of(p.layout.batch * tiles), block_threads,
                  static_cast<size_t>(3 * net.hidden) * sizeof(T), exec, p, net, tiles);
}
template <class T>
void reverse_mw(const MwPlanes& p, const MwWeights<T>& net, const Array& grad_net, double* partial,
                const Exec& exec) {
  const int64_t tiles = (p.layout.pixels() + block_threads - 1) / block_threads;
  const int64_t parts = parts_of(p.layout.batch * tiles);
  NOISYSEG_LAUNCH((mw_net_parts<T>), grid_of(parts, (net.hidden + block_threads) / block_threads),
                  block_threads, 0, exec, p, net, tiles, partial);
  NOISYSEG_LAUNCH((mw_net_sums<T>), grid_of(net.hidden + 1), block_threads, 0, exec, partial, parts, net,
                  static_cast<T*>(grad_net.data));
  if (p.grad_loss) map_mw<true>(p, net, exec);
}

}  // namespace

// ---- entry points ---------------------------------------------------------------------------------

bool ce_dual(const Array& logits, const Array& logits_dot, const Array& target, bool softmax,
             const Array& loss, const Array& loss_dot, const Exec& exec) {
  const Array arrays[5] = {logits, logits_dot, target, loss, loss_dot};
  Plane planes[5];
  CePlanes p;
  p.layout = make_layout(arrays, planes, 5);
  p.logits = planes[0], p.logits_dot = planes[1], p.target = planes[2], p.loss = planes[3];
  p.loss_dot = planes[4];
  p.labels = target.rank < logits.rank, p.softmax = softmax;
  if (!loss.size()) return true;
  const DeviceGuard guard(exec.device);
  const bool fp64 = loss.dtype == DType::f64;
  const int64_t tiles =
      fp64 ? tiles_of_image<double>(p.layout.pixels()) : tiles_of_image<float>(p.layout.pixels());
  const dim3 grid = grid_of(p.layout.batch * tiles);
  if (fp64)
    NOISYSEG_LAUNCH((ce_dual_map<double>), grid, block_threads, 0, exec, p, tiles);
  else
    NOISYSEG_LAUNCH((ce_dual_map<float>), grid, block_threads, 0, exec, p, tiles);
  return true;
}

// CASE(deep, T) for a map's axes and type.
#define NOISYSEG_MAP_CASES(map, CASE) \
  if ((map).dtype == DType::f64) {    \
    if ((map).rank == 4)              \
      CASE(true, double)              \
    else                              \
      CASE(false, double)             \
  } else {                            \
    if ((map).rank == 4)              \
      CASE(true, float)               \
    else                              \
      CASE(false, float)              \
  }

void mask_net(const Array& loss, const MaskNet& net, const Array& weight, const Exec& exec) {
  if (!loss.size()) return;
  const DeviceGuard guard(exec.device);
#define CASE(deep, T) forward_mask<deep, T>(loss, net, weight, exec);
  NOISYSEG_MAP_CASES(loss, CASE)
#undef CASE
}

size_t mask_net_workspace(const Array& loss, const MaskNet& net, bool, const Exec&) {
  const Extent e = extent_of(loss);
  const int64_t tiles = loss.rank == 4 ? tiles_of<true>(e).all() : tiles_of<false>(e).all();
  return static_cast<size_t>(parts_of(tiles) * mask_net_layout(net).size) * sizeof(double);
}

void mask_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MaskNet& net,
                  const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec) {
  const DeviceGuard guard(exec.device);
  double* partial = static_cast<double*>(workspace);
#define CASE(deep, T) \
  reverse_mask<deep, T>(grad_weight, weight, loss, net, grad_net, grad_loss, partial, exec);
  NOISYSEG_MAP_CASES(loss, CASE)
#undef CASE
}

size_t mw_net_workspace(const Array& loss, const MwNet& net, const Exec&) {
  int64_t pixels = 1;
  for (int i = 2; i < loss.rank; ++i) pixels *= loss.shape[i];
  const int64_t tiles = loss.shape[0] * ((pixels + block_threads - 1) / block_threads);
  return static_cast<size_t>(parts_of(tiles) * 2 * (net.w1.shape[0] + 1)) * sizeof(double);
}

void mw_net(const Array& loss, const MwNet& net, const Array& weight, void*, const Exec& exec) {
  const MwPlanes p = make_planes(loss, weight, Array{}, Array{});
  const DeviceGuard guard(exec.device);
  if (loss.dtype == DType::f64)
    map_mw<false>(p, mw_weights<double>(net), exec);
  else
    map_mw<false>(p, mw_weights<float>(net), exec);
}

void mw_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MwNet& net,
                const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec) {
  const MwPlanes p = make_planes(loss, weight, grad_weight, grad_loss);
  const DeviceGuard guard(exec.device);
  double* partial = static_cast<double*>(workspace);
  if (loss.dtype == DType::f64)
    reverse_mw(p, mw_weights<double>(net), grad_net, partial, exec);
  else
    reverse_mw(p, mw_weights<float>(net), grad_net, partial, exec);
}

}  // namespace noisyseg::cuda
