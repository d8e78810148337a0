// The meta-gradient's pixel work on the CPU.
//
// Bytes per pixel, fp32: cross-entropy and its tangent 8 C + 1 (uint8 labels) read, 8 written; the weight
// nets 4 read, 4 written forward, 12 read in reverse (and 4 written for the gradient by the loss map). The
// hidden activations never leave the L1 cache.
#include "noisyseg/meta.h"

#include "cpu/planes.h"
#include "formulas/meta.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

// NumPy's memory begins at multiples of 16 bytes, vectors do at multiples of 64.
int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
void* align(void* p) {
  return reinterpret_cast<void*>(aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p))));
}

// ---- cross-entropy and its tangent ----------------------------------------------------------------

struct CePlanes {
  Plane logits, logits_dot, target, loss, loss_dot;
  Layout layout;
  bool labels, softmax;
};

template <class T>
struct CeDual {
  const CePlanes& p;

  template <class F>
  const F* plane(const Plane& x, int64_t b, int64_t c, int64_t q, int n, F* buffer) const {
    return load(x, p.layout, b * x.batch + c * x.channel, q, n, buffer);
  }

  // loss += the binary cross-entropy of z along dz, in loops of their own: a CPU looks only some forty
  // operations ahead.
  static void add_binary(const T* z, const T* dz, const T* g, int n, T* loss, T* dot) {
    T e[block_pixels];
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) e[i] = exp_(-abs_(z[i]));
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
      const LossDot<T> of_pixel = binary_ce_dual(z[i], dz[i], g[i], e[i]);
      loss[i] += of_pixel.loss, dot[i] += of_pixel.dot;
    }
  }

  void softmax(int64_t b, int64_t q, int n, const T* label, T* loss, T* dot) const {
    T zs[block_pixels], ds[block_pixels], gs[block_pixels], top[block_pixels], e[block_pixels];
    T sum[block_pixels], sum_dot[block_pixels], mass[block_pixels];
    const int np = padded(n);
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      const T* z = plane(p.logits, b, c, q, n, zs);
      for (int i = 0; i < np; ++i) top[i] = c == 0 ? z[i] : max_(top[i], z[i]);
    }
    // loss and dot hold the picked sums for the time being
    for (int i = 0; i < np; ++i) sum[i] = sum_dot[i] = mass[i] = T(0);
    for (int64_t c = 0; c < p.layout.channels; ++c) {
      const T* z = plane(p.logits, b, c, q, n, zs);
      const T* dz = plane(p.logits_dot, b, c, q, n, ds);
      const T* g = gs;
      if (label)
        for (int i = 0; i < np; ++i) gs[i] = label[i] == static_cast<T>(c) ? T(1) : T(0);
      else
        g = plane(p.target, b, c, q, n, gs);
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) e[i] = exp_(z[i] - top[i]);
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) {
        sum[i] += e[i], sum_dot[i] += e[i] * dz[i], mass[i] += g[i];
        loss[i] += g[i] != T(0) ? g[i] * (z[i] - top[i]) : T(0);
        dot[i] += g[i] != T(0) ? g[i] * dz[i] : T(0);
      }
    }
#pragma GCC ivdep
    for (int i = 0; i < np; ++i) {
      const LossDot<T> of_pixel = softmax_ce_dual(sum[i], sum_dot[i], mass[i], loss[i], dot[i]);
      loss[i] = of_pixel.loss, dot[i] = of_pixel.dot;
    }
  }

  // Returns whether all labels are classes.
  bool block(int64_t b, int64_t q, int n) const {
    T zs[block_pixels], ds[block_pixels], ys[block_pixels], gs[block_pixels], losses[block_pixels],
        dots[block_pixels];
    const int64_t channels = p.layout.channels;
    const int np = padded(n);
    T* loss = destination(p.loss, p.layout, b * p.loss.batch, q, n, losses);
    T* dot = destination(p.loss_dot, p.layout, b * p.loss_dot.batch, q, n, dots);
    const T* y = p.labels ? plane(p.target, b, 0, q, n, ys) : nullptr;
    T stray = T(0);
    if (y) {
      const T most = static_cast<T>(channels == 1 ? 1 : channels - 1);
      for (int i = 0; i < np; ++i) stray = y[i] < T(0) || y[i] > most ? T(1) : stray;
    }
    for (int i = 0; i < np; ++i) loss[i] = dot[i] = T(0);
    if (p.softmax && channels == 2 && y) {  // the sigmoid of the difference
      const T *z0 = plane(p.logits, b, 0, q, n, zs), *d0 = plane(p.logits_dot, b, 0, q, n, ds);
      T other[block_pixels], other_dot[block_pixels];
      const T *z1 = plane(p.logits, b, 1, q, n, other), *d1 = plane(p.logits_dot, b, 1, q, n, other_dot);
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) zs[i] = z1[i] - z0[i], ds[i] = d1[i] - d0[i];
      add_binary(zs, ds, y, np, loss, dot);
    } else if (p.softmax) {
      softmax(b, q, n, y, loss, dot);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const T *z = plane(p.logits, b, c, q, n, zs), *dz = plane(p.logits_dot, b, c, q, n, ds);
        const T* g = y;
        if (!y) g = plane(p.target, b, c, q, n, gs);
        if (y && channels > 1) {
          for (int i = 0; i < np; ++i) gs[i] = y[i] == static_cast<T>(c) ? T(1) : T(0);
          g = gs;
        }
        add_binary(z, dz, g, np, loss, dot);
      }
      const T share = T(1) / static_cast<T>(channels);
      for (int i = 0; i < np; ++i) loss[i] *= share, dot[i] *= share;
    }
    if (loss == losses) store(p.loss, p.layout, b * p.loss.batch, q, n, loss);
    if (dot == dots) store(p.loss_dot, p.layout, b * p.loss_dot.batch, q, n, dot);
    return stray == T(0);
  }

  bool run(const Exec& exec) const {
    const int64_t chunks = chunks_of(p.layout), pixels = p.layout.pixels();
    const int threads = threads_for(exec, p.layout.batch * p.layout.channels * pixels);
    int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad) if (threads > 1)
    for (int64_t item = 0; item < p.layout.batch * chunks; ++item) {
      const int64_t b = item / chunks, begin = item % chunks * chunk_pixels;
      const int64_t end = begin + chunk_pixels < pixels ? begin + chunk_pixels : pixels;
      for (int64_t q = begin; q < end; q += block_pixels)
        bad |= !block(b, q, static_cast<int>(end - q < block_pixels ? end - q : block_pixels));
    }
    return !bad;
  }
};

// ---- the mask net ---------------------------------------------------------------------------------
//
// Work goes by tiles of 8 x 64 pixels (3D: 2 x 4 x 64), brought into the L1 cache with a border of 2. A
// hidden channel's activations and slopes exist for one tile only, four channels at a time; vectors lie along
// x. In reverse every parameter has one running sum for each lane, which go into sums in double every eight
// tiles.

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(vector_bytes)));
  typedef float Anywhere __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(vector_bytes)));
  typedef double Anywhere __attribute__((vector_size(vector_bytes), aligned(8), may_alias));
};
template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
constexpr int width_of = vector_bytes / static_cast<int>(sizeof(T));
#define NOISYSEG_VECTOR(T, p) (*reinterpret_cast<const typename Simd<T>::Anywhere*>(p))
#define NOISYSEG_PUT(T, p) (*reinterpret_cast<typename Simd<T>::Anywhere*>(p))

constexpr int border = 2, tile_x = 64, tile_rows = 8, tile_pixels = tile_x * tile_rows;
constexpr int pitch = tile_x + 16;             // of the loss map's tile
constexpr int wide = tile_x + 32, margin = 8;  // of the slopes' tile, zeros on either side
constexpr int most_rows = 48;                  // of a tile with its border
constexpr int pair = 2;                        // vectors that are computed together
constexpr int64_t flush_tiles = 8, most_items = 256;

struct Tiling {
  Extent extent;
  bool deep;
  int tz, ty;        // a tile's extent
  int64_t count[3];  // tiles along each axis

  explicit Tiling(const Array& map) : extent(extent_of(map)), deep(map.rank == 4) {
    tz = deep ? 2 : 1, ty = tile_rows / tz;
    const int size[3] = {tz, ty, tile_x};
    for (int k = 0; k < 3; ++k) count[k] = (extent.size[k] + size[k] - 1) / size[k];
  }
  int64_t tiles() const { return extent.batch * count[0] * count[1] * count[2]; }
  int border_z() const { return deep ? border : 0; }
  int planes() const { return tz + 2 * border_z(); }
  int rows() const { return ty + 2 * border; }  // of a plane, with the border
  int padded_rows() const { return planes() * rows(); }
  int plane() const { return rows() * pitch; }
  // Where an N-wide stencil begins, for the tile's first pixel.
  int corner(int n) const {
    return ((deep ? border - n / 2 : 0) * rows() + border - n / 2) * pitch + border - n / 2;
  }
  int64_t tiles_of_item() const {
    const int64_t least = (tiles() + most_items - 1) / most_items;
    return least < 4 ? 4 : least;
  }
  int64_t items() const { return (tiles() + tiles_of_item() - 1) / tiles_of_item(); }
};

struct Place {
  int64_t b, z, y, x;  // where the tile begins
  int nz, ny, nx;      // how much of it lies in the image
  int row[tile_rows];  // where its rows begin, for a stencil's corner at 0
};
Place place_of(const Tiling& t, int64_t tile) {
  Place p;
  p.x = tile % t.count[2] * tile_x, tile /= t.count[2];
  p.y = tile % t.count[1] * t.ty, tile /= t.count[1];
  p.z = tile % t.count[0] * t.tz, p.b = tile / t.count[0];
  const auto part = [](int64_t left, int most) { return static_cast<int>(left < most ? left : most); };
  p.nz = part(t.extent.size[0] - p.z, t.tz), p.ny = part(t.extent.size[1] - p.y, t.ty);
  p.nx = part(t.extent.size[2] - p.x, tile_x);
  for (int row = 0; row < p.nz * p.ny; ++row) p.row[row] = row / p.ny * t.plane() + row % p.ny * pitch;
  return p;
}

template <class T>
T* row_of(const Volume& v, int64_t b, int64_t z, int64_t y, int64_t x) {
  return reinterpret_cast<T*>(v.data) + b * v.strides[0] + z * v.strides[1] + y * v.strides[2] +
         x * v.strides[3];
}

// A tile of the loss map with its border, zeros outside of the image.
template <class T>
void load_tile(const Tiling& t, const Place& p, const Volume& map, T* out) {
  const int64_t first = p.x < border ? 0 : p.x - border;
  const int64_t last = p.x + tile_x + border < t.extent.size[2] ? p.x + tile_x + border : t.extent.size[2];
  const int skip = static_cast<int>(first - (p.x - border)), n = static_cast<int>(last - first);
  for (int k = 0; k < t.padded_rows(); ++k, out += pitch) {
    const int64_t z = p.z + k / t.rows() - t.border_z(), y = p.y + k % t.rows() - border;
    for (int i = 0; i < pitch; ++i) out[i] = T(0);
    if (z < 0 || z >= t.extent.size[0] || y < 0 || y >= t.extent.size[1]) continue;
    const T* from = row_of<T>(map, p.b, z, y, first);
    const int64_t step = map.strides[3];
    if (step == 1)
      for (int i = 0; i < n; ++i) out[skip + i] = from[i];
    else
      for (int i = 0; i < n; ++i) out[skip + i] = from[i * step];
  }
}

// The N-wide convolution of channels `first` to first + K at `pair` vectors. from: the first tap's first
// number; plane: how far its next plane lies.
template <int N, int K, class T>
inline __attribute__((always_inline)) void convolve(const T* from, int nz, int plane, const T* w,
                                                    int64_t taps, const T* b, Vector<T> (&sum)[K][pair]) {
  constexpr int lanes_ = width_of<T>;
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
    for (int i = 0; i < pair; ++i) sum[k][i] = Vector<T>{} + b[k];
  for (int dz = 0; dz < nz; ++dz, from += plane - N * pitch)
    for (int dy = 0; dy < N; ++dy, w += N, from += pitch)
#pragma GCC unroll 5
      for (int dx = 0; dx < N; ++dx) {
        Vector<T> in[pair];
#pragma GCC unroll 2
        for (int i = 0; i < pair; ++i) in[i] = NOISYSEG_VECTOR(T, from + dx + i * lanes_);
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
          for (int i = 0; i < pair; ++i) sum[k][i] += w[k * taps + dx] * in[i];
      }
}

// Four channels at a time, then one by one: f(how many, first)
template <int K>
struct Count {
  static constexpr int value = K;
};
template <class F>
inline __attribute__((always_inline)) void in_groups(int64_t channels, const F& f) {
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4) f(Count<4>{}, k);
  for (; k < channels; ++k) f(Count<1>{}, k);
}

template <class T>
struct Mask {
  static constexpr int lanes_ = width_of<T>, step = pair * lanes_;
  const Tiling t;
  const MaskWeights<T> net;

  template <int N>
  inline __attribute__((always_inline)) void add_hidden(const T* from, const T* w, const T* b, const T* w1,
                                                        int64_t channels, int64_t taps,
                                                        Vector<T> (&logit)[pair]) const {
    const int nz = t.deep ? N : 1, plane = t.plane();
    from += t.corner(N);
    in_groups(channels, [&](auto count, int64_t k) __attribute__((always_inline)) {
      constexpr int K = decltype(count)::value;
      Vector<T> h[K][pair];
      convolve<N, K, T>(from, nz, plane, w + k * taps, taps, b + k, h);
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j)
#pragma GCC unroll 2
        for (int i = 0; i < pair; ++i) logit[i] += w1[k + j] * (h[j][i] < T(0) ? Vector<T>{} : h[j][i]);
    });
  }

  void forward(const Volume& loss, const Volume& weight, const Exec& exec) const {
    const int threads = threads_for(exec, 64 * t.extent.batch * t.extent.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t number = 0; number < t.tiles(); ++number) {
      alignas(64) T tile[most_rows * pitch], logits[tile_x];
      const Place p = place_of(t, number);
      load_tile(t, p, loss, tile);
      for (int row = 0; row < p.nz * p.ny; ++row) {
        const int z = row / p.ny, y = row % p.ny;
        const T *corner = tile + p.row[row], *centre = corner + t.corner(1);
        for (int x = 0; x < p.nx; x += step) {
          Vector<T> logit[pair];
#pragma GCC unroll 2
          for (int i = 0; i < pair; ++i)
            logit[i] =
                net.w1[net.at.k3 + net.at.k5] * NOISYSEG_VECTOR(T, centre + x + i * lanes_) + net.b1[0];
          add_hidden<3>(corner + x, net.w3, net.b3, net.w1, net.at.k3, net.at.taps3, logit);
          add_hidden<5>(corner + x, net.w5, net.b5, net.w1 + net.at.k3, net.at.k5, net.at.taps5, logit);
#pragma GCC unroll 2
          for (int i = 0; i < pair; ++i) NOISYSEG_PUT(T, logits + x + i * lanes_) = logit[i];
        }
        for (int i = 0; i < (p.nx + lanes_ - 1) / lanes_ * lanes_; ++i) logits[i] = sigmoid_of(logits[i]);
        T* to = row_of<T>(weight, p.b, p.z + z, p.y + y, p.x);
        if (weight.strides[3] == 1)
          for (int i = 0; i < p.nx; ++i) to[i] = logits[i];
        else
          for (int i = 0; i < p.nx; ++i) to[i * weight.strides[3]] = logits[i];
      }
    }
  }

  // What one thread works with.
  struct Scratch {
    alignas(64) T tile[most_rows * pitch];
    alignas(64) T by_tile[most_rows * pitch];    // the gradient by `tile`
    alignas(64) T slope[tile_pixels];            // by the logit
    alignas(64) T hidden[4 * tile_rows * wide];  // slopes by the activations
  };

  // A group of K channels of one convolution; the three running sums are those of its first channel.
  template <int N, int K>
  void group(const Place& p, Scratch& s, bool attached, const T* w, const T* b, const T* w1, int64_t taps,
             Vector<T>* by_w, Vector<T>* by_b, Vector<T>* by_w1) const {
    constexpr int off = border - N / 2, G = N == 3 ? K : (K < 2 ? K : 2);
    const int nx = attached ? tile_x : (p.nx + step - 1) / step * step, rows = p.nz * p.ny;
    const int nz = t.deep ? N : 1, plane = t.plane(), corner = t.corner(N);
    Vector<T> sum_b[K] = {}, sum_1[K] = {};
    for (int row = 0; row < rows; ++row)
      for (int x = 0; x < nx; x += step) {
        Vector<T> h[K][pair];
        convolve<N, K, T>(s.tile + corner + p.row[row] + x, nz, plane, w, taps, b, h);
#pragma GCC unroll 2
        for (int i = 0; i < pair; ++i) {
          const Vector<T> slope = NOISYSEG_VECTOR(T, s.slope + row * tile_x + x + i * lanes_);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) {
            sum_1[k] += slope * (h[k][i] < T(0) ? Vector<T>{} : h[k][i]);
            const Vector<T> d = h[k][i] <= T(0) ? Vector<T>{} : slope * w1[k];
            sum_b[k] += d;
            NOISYSEG_PUT(T, s.hidden + (k * tile_rows + row) * wide + margin + x + i * lanes_) = d;
          }
        }
      }
    for (int k = 0; k < K; ++k) by_b[k] += sum_b[k], by_w1[k] += sum_1[k];
    for (int g = 0; g < K; g += G)
      for (int dz = 0; dz < nz; ++dz)
        for (int dy = 0; dy < N; ++dy) {
          Vector<T> sum[G][N] = {};
          for (int row = 0; row < rows; ++row) {
            const T* from = s.tile + corner + p.row[row] + dz * plane + dy * pitch;
            const T* d = s.hidden + (g * tile_rows + row) * wide + margin;
            for (int x = 0; x < nx; x += lanes_) {
              Vector<T> slope[G];
#pragma GCC unroll 4
              for (int k = 0; k < G; ++k) slope[k] = NOISYSEG_VECTOR(T, d + k * tile_rows * wide + x);
#pragma GCC unroll 5
              for (int dx = 0; dx < N; ++dx) {
                const Vector<T> in = NOISYSEG_VECTOR(T, from + x + dx);
#pragma GCC unroll 4
                for (int k = 0; k < G; ++k) sum[k][dx] += slope[k] * in;
              }
            }
          }
#pragma GCC unroll 4
          for (int k = 0; k < G; ++k)
#pragma GCC unroll 5
            for (int dx = 0; dx < N; ++dx) by_w[(g + k) * taps + (dz * N + dy) * N + dx] += sum[k][dx];
        }
    if (!attached) return;
    for (int row = 0; row < rows; ++row)
      for (int dz = 0; dz < nz; ++dz)
        for (int dy = 0; dy < N; ++dy) {
          T* to = s.by_tile + corner - off + p.row[row] + dz * plane + dy * pitch;
          const T* tap = w + (dz * N + dy) * N;
          for (int x = 0; x < pitch; x += lanes_) {
            Vector<T> sum = NOISYSEG_VECTOR(T, to + x);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k)
#pragma GCC unroll 5
              for (int dx = 0; dx < N; ++dx)
                sum += tap[k * taps + dx] *
                       NOISYSEG_VECTOR(T, s.hidden + (k * tile_rows + row) * wide + margin + x - dx - off);
            NOISYSEG_PUT(T, to + x) = sum;
          }
        }
  }

  void reverse_tile(const Place& p, const Volume& grad, const Volume& weight, const Volume& loss,
                    bool attached, Scratch& s, Vector<T>* sums) const {
    const MaskNetLayout& at = net.at;
    const T own = net.w1[at.k3 + at.k5];
    load_tile(t, p, loss, s.tile);
    if (attached)
      for (int i = 0; i < t.padded_rows() * pitch; ++i) s.by_tile[i] = T(0);
    for (int row = 0; row < p.nz * p.ny; ++row) {
      const int64_t z = p.z + row / p.ny, y = p.y + row % p.ny;
      const T *dr = row_of<T>(grad, p.b, z, y, p.x), *r = row_of<T>(weight, p.b, z, y, p.x);
      const int64_t dr_step = grad.strides[3], r_step = weight.strides[3];
      T* slope = s.slope + row * tile_x;
      if (dr_step == 1 && r_step == 1)
        for (int i = 0; i < p.nx; ++i) slope[i] = by_logit(dr[i], r[i]);
      else
        for (int i = 0; i < p.nx; ++i) slope[i] = by_logit(dr[i * dr_step], r[i * r_step]);
      for (int i = p.nx; i < tile_x; ++i) slope[i] = T(0);
      const int from = t.corner(1) + p.row[row];
      for (int x = 0; x < tile_x; x += lanes_) {
        const Vector<T> sv = NOISYSEG_VECTOR(T, slope + x);
        sums[at.b1] += sv, sums[at.w1 + at.k3 + at.k5] += sv * NOISYSEG_VECTOR(T, s.tile + from + x);
        if (attached) NOISYSEG_PUT(T, s.by_tile + from + x) = own * sv;
      }
    }
    in_groups(at.k3, [&](auto count, int64_t k) {
      group<3, decltype(count)::value>(p, s, attached, net.w3 + k * at.taps3, net.b3 + k, net.w1 + k,
                                       at.taps3, sums + at.w3 + k * at.taps3, sums + at.b3 + k,
                                       sums + at.w1 + k);
    });
    in_groups(at.k5, [&](auto count, int64_t k) {
      group<5, decltype(count)::value>(p, s, attached, net.w5 + k * at.taps5, net.b5 + k, net.w1 + at.k3 + k,
                                       at.taps5, sums + at.w5 + k * at.taps5, sums + at.b5 + k,
                                       sums + at.w1 + at.k3 + k);
    });
  }

  // Workspace: partial sums (items, parameters) in double, running sums (threads, parameters) in vectors, and
  // if attached the gradient by each tile with its border.
  int64_t partial_bytes() const { return aligned(t.items() * net.at.size * 8); }
  int64_t running_bytes() const { return aligned(net.at.size * vector_bytes); }
  int64_t tile_values() const { return t.padded_rows() * pitch; }
  size_t workspace(bool attached, int threads) const {
    return static_cast<size_t>(64 + partial_bytes() + threads * running_bytes() +
                               (attached ? t.tiles() * tile_values() * static_cast<int64_t>(sizeof(T)) : 0));
  }
  int threads(const Exec& exec) const { return threads_for(exec, 128 * t.extent.batch * t.extent.pixels()); }

  void reverse(const Volume& grad, const Volume& weight, const Volume& loss, const Array& grad_net,
               const Array& grad_loss, void* workspace, const Exec& exec) const {
    const int64_t size = net.at.size, items = t.items(), per = t.tiles_of_item();
    const int threads = this->threads(exec);
    const bool attached = grad_loss.rank > 0;
    char* memory = static_cast<char*>(align(workspace));
    double* partial = reinterpret_cast<double*>(memory);
    char* running = memory + partial_bytes();
    T* by_tiles = reinterpret_cast<T*>(running + threads * running_bytes());
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
      const int me = omp_get_thread_num();
#else
      const int me = 0;
#endif
      Scratch s;
      for (int i = 0; i < 4 * tile_rows * wide; ++i) s.hidden[i] = T(0);
      Vector<T>* sums = reinterpret_cast<Vector<T>*>(running + me * running_bytes());
#pragma omp for schedule(static)
      for (int64_t item = 0; item < items; ++item) {
        const int64_t end = (item + 1) * per < t.tiles() ? (item + 1) * per : t.tiles();
        double* mine = partial + item * size;
        for (int64_t v = 0; v < size; ++v) mine[v] = 0, sums[v] = Vector<T>{};
        for (int64_t tile = item * per; tile < end; ++tile) {
          reverse_tile(place_of(t, tile), grad, weight, loss, attached, s, sums);
          if (attached)
            for (int64_t i = 0; i < tile_values(); ++i) by_tiles[tile * tile_values() + i] = s.by_tile[i];
          if ((tile + 1 - item * per) % flush_tiles && tile + 1 < end) continue;
          for (int64_t v = 0; v < size; ++v) {
            double total = 0;
            for (int l = 0; l < lanes_; ++l) total += static_cast<double>(sums[v][l]);
            mine[v] += total, sums[v] = Vector<T>{};
          }
        }
      }
      if (attached) {
        const Volume to = volume_of(grad_loss);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < t.tiles(); ++tile) gather_tile(place_of(t, tile), tile, by_tiles, to);
      }
    }
    T* out = static_cast<T*>(grad_net.data);
    for (int64_t v = 0; v < size; ++v) {
      double total = 0;
      for (int64_t item = 0; item < items; ++item) total += partial[item * size + v];
      out[v] = static_cast<T>(total);
    }
  }

  // The gradient by a tile's pixels: of this tile and of its neighbours' borders, in their order.
  void gather_tile(const Place& p, int64_t tile, const T* by_tiles, const Volume& to) const {
    const int64_t row_tiles = t.count[2], plane_tiles = t.count[1] * row_tiles;
    for (int row = 0; row < p.nz * p.ny; ++row) {
      const int z = row / p.ny, y = row % p.ny;
      T sum[tile_x] = {};
      for (int nz = -1; nz <= 1; ++nz)
        for (int ny = -1; ny <= 1; ++ny)
          for (int nx = -1; nx <= 1; ++nx) {
            const int64_t tz = p.z / t.tz + nz, ty = p.y / t.ty + ny, tx = p.x / tile_x + nx;
            if (tz < 0 || tz >= t.count[0] || ty < 0 || ty >= t.count[1] || tx < 0 || tx >= t.count[2])
              continue;
            // where this row lies in the neighbour, its border included
            const int from_z = z - nz * t.tz + t.border_z(), from_y = y - ny * t.ty + border;
            if (from_z < 0 || from_z >= t.planes() || from_y < 0 || from_y >= t.rows()) continue;
            const T* from = by_tiles + (tile + nz * plane_tiles + ny * row_tiles + nx) * tile_values() +
                            (from_z * t.rows() + from_y) * pitch;
            const int shift = border - nx * tile_x;
            const int first = nx > 0 ? tile_x - border : 0, last = nx < 0 ? border : tile_x;
            for (int x = first; x < last && x < p.nx; ++x) sum[x] += from[x + shift];
          }
      T* out = row_of<T>(to, p.b, p.z + z, p.y + y, p.x);
      for (int x = 0; x < p.nx; ++x) out[x * to.strides[3]] = sum[x];
    }
  }
};

// ---- the pixel-wise MWNet -------------------------------------------------------------------------
//
// An MLP of one number is piecewise linear before its sigmoid: sorted by the thresholds where the H units
// switch, every segment has one slope and one intercept. So a pixel costs one look-up instead of H units, and
// reverse needs only each segment's sums of s and s L, of which the units' gradients are partial sums: the
// same numbers but for the order of additions.

constexpr int cells_of_half = 448;  // 28 binary orders of magnitude, 16 cells each
constexpr int cells = 2 * cells_of_half;
constexpr int64_t most_groups = 256;

template <class T>
struct Pieces {
  T threshold[most_hidden + 1];                          // of the units that switch, ascending, then infinity
  T slope[most_hidden + 1], intercept[most_hidden + 1];  // of the segment below each threshold
  double edge[most_hidden];                              // unsorted, as the doubles that compare alike
  uint16_t rank[most_hidden];  // of each unit's threshold; `never` for one that does not switch
  uint16_t start[cells];       // thresholds in all cells before this one
  int count, steps;            // thresholds; the most of them in one cell
};
constexpr uint16_t never = 0xffff;

// Cells that follow the numbers' own spacing: sixteen for each power of two from 2^-20 to 2^8, of either
// sign.
inline int cell_of(float x) {
  const int32_t bits = float_to_bits(x);
  int32_t at = ((bits & 0x7fffffff) >> 19) - ((127 - 20) << 4);
  at = at < 0 ? 0 : at;
  at = at < cells_of_half ? at : cells_of_half - 1;
  return bits < 0 ? cells_of_half - 1 - at : cells_of_half + at;
}
inline int cell_of(double x) { return cell_of(static_cast<float>(x)); }

inline float next_after(float x, float to) { return __builtin_nextafterf(x, to); }
inline double next_after(double x, double to) { return __builtin_nextafter(x, to); }

// The smallest x from which on the unit is on (w > 0) or off (w < 0): relu'(0) = 0, so w x + b > 0 is "on".
template <class T>
T threshold_of(T w, T b) {
  const T infinity = static_cast<T>(__builtin_inf());
  const auto above = [&](T x) {  // whether x belongs to the segment above the threshold; the sign is exact
    const double sum =
        sizeof(T) == 4
            ? static_cast<double>(w) * static_cast<double>(x) + static_cast<double>(b)
            : __builtin_fma(static_cast<double>(w), static_cast<double>(x), static_cast<double>(b));
    return w > T(0) ? sum > 0 : !(sum > 0);
  };
  T x = -b / w;
  if (!(abs_(x) < infinity)) return x;
  for (int i = 0; i < 4 && above(x); ++i) x = next_after(x, -infinity);
  for (int i = 0; i < 8 && !above(x); ++i) x = next_after(x, infinity);
  return x == T(0) ? T(0) : x;  // -0 has another cell
}

// Whether a unit is on at the far left: w < 0 is, and of those that never switch the ones with b > 0.
template <class T>
bool on_at_left(T w, T b) {
  return w < T(0) || (!(w > T(0)) && !(b <= T(0)));
}

template <class T>
struct Mw {
  const MwWeights<T> net;

  void prepare(Pieces<T>& p) const {
    const T *w1 = net.w1, *b1 = net.b1, *w2 = net.w2;
    const int64_t hidden = net.hidden;
    const double infinity = __builtin_inf();
    double slope = 0, intercept = static_cast<double>(net.b2[0]);
    double by_slope[most_hidden], by_intercept[most_hidden];  // what changes at each threshold
    p.count = 0;
    for (int64_t j = 0; j < hidden; ++j) {
      const double a = static_cast<double>(w2[j]) * static_cast<double>(w1[j]);
      const double c = static_cast<double>(w2[j]) * static_cast<double>(b1[j]);
      p.edge[j] = w1[j] != T(0) ? static_cast<double>(threshold_of(w1[j], b1[j])) : infinity;
      const bool switches = p.edge[j] < infinity;
      p.count += switches;
      p.rank[j] = switches ? 0 : never;
      intercept += 0 * (a + c);  // NaN spreads
      if (on_at_left(w1[j], b1[j])) slope += a, intercept += c;
    }
    for (int64_t j = 0; j < hidden; ++j) {
      if (p.rank[j] == never) continue;
      int rank = 0;
      for (int64_t i = 0; i < j; ++i) rank += p.edge[i] <= p.edge[j];
      for (int64_t i = j + 1; i < hidden; ++i) rank += p.edge[i] < p.edge[j];
      p.rank[j] = static_cast<uint16_t>(rank);
      const double sign = w1[j] > T(0) ? 1 : -1;
      by_slope[rank] = sign * static_cast<double>(w2[j]) * static_cast<double>(w1[j]);
      by_intercept[rank] = sign * static_cast<double>(w2[j]) * static_cast<double>(b1[j]);
      p.threshold[rank] = static_cast<T>(p.edge[j]);
    }
    p.threshold[p.count] = static_cast<T>(__builtin_nan(""));  // above every x, the infinite ones too
    for (int k = 0; k <= p.count; ++k) {
      p.slope[k] = static_cast<T>(slope), p.intercept[k] = static_cast<T>(intercept);
      if (k < p.count) slope += by_slope[k], intercept += by_intercept[k];
    }
    for (int i = 0; i < cells; ++i) p.start[i] = 0;
    for (int k = 0; k < p.count; ++k) ++p.start[cell_of(p.threshold[k])];
    p.steps = 0;
    for (int i = 0, total = 0; i < cells; ++i) {
      const int here = p.start[i];
      p.steps = here > p.steps ? here : p.steps;
      p.start[i] = static_cast<uint16_t>(total), total += here;
    }
  }

  // The segments of n numbers.
  static void find(const Pieces<T>& p, const T* x, int n, int32_t* segment) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) segment[i] = cell_of(x[i]);
    for (int i = 0; i < n; ++i) {
      int at = p.start[segment[i]];
      for (int k = 0; k < p.steps; ++k) at += p.threshold[at] <= x[i];
      segment[i] = at;
    }
  }
};

struct MwPlanes {
  Plane loss, weight, grad_weight, grad_loss;
  Layout layout;
};

// f(b, q, n) for the blocks of group `g` of `groups`, in order.
template <class F>
void for_blocks(const Layout& layout, int64_t g, int64_t groups, const F& f) {
  const int64_t chunks = chunks_of(layout), items = layout.batch * chunks, pixels = layout.pixels();
  for (int64_t item = g * items / groups; item < (g + 1) * items / groups; ++item) {
    const int64_t begin = item % chunks * chunk_pixels;
    const int64_t end = begin + chunk_pixels < pixels ? begin + chunk_pixels : pixels;
    for (int64_t q = begin; q < end; q += block_pixels)
      f(item / chunks, q, static_cast<int>(end - q < block_pixels ? end - q : block_pixels));
  }
}
int64_t groups_of(const Layout& layout) {
  const int64_t items = layout.batch * chunks_of(layout);
  return items < most_groups ? items : most_groups;
}

template <class T>
void mw_forward(const MwPlanes& p, const MwWeights<T>& net, Pieces<T>& pieces, const Exec& exec) {
  Mw<T>{net}.prepare(pieces);
  const int64_t groups = groups_of(p.layout);
  const int threads = threads_for(exec, 4 * p.layout.batch * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; ++g)
    for_blocks(p.layout, g, groups, [&](int64_t b, int64_t q, int n) {
      T xs[block_pixels], rs[block_pixels];
      int32_t segment[block_pixels];
      const T* x = load(p.loss, p.layout, b * p.loss.batch, q, n, xs);
      T* r = destination(p.weight, p.layout, b * p.weight.batch, q, n, rs);
      const int np = padded(n);
      Mw<T>::find(pieces, x, np, segment);
      for (int i = 0; i < np; ++i) r[i] = pieces.slope[segment[i]] * x[i] + pieces.intercept[segment[i]];
#pragma GCC ivdep
      for (int i = 0; i < np; ++i) r[i] = sigmoid_of(r[i]);
      if (r == rs) store(p.weight, p.layout, b * p.weight.batch, q, n, r);
    });
}

constexpr int copies = 4;  // of a group's sums, so that additions need not wait for each other

template <class T>
void mw_reverse(const MwPlanes& p, const MwWeights<T>& net, Pieces<T>& pieces, double* partial, T* grad_net,
                const Exec& exec) {
  Mw<T>{net}.prepare(pieces);
  typedef double Two __attribute__((vector_size(16)));
  const int64_t groups = groups_of(p.layout), segments = pieces.count + 1;
  const int64_t size = 2 * copies * (net.hidden + 1);
  const int threads = threads_for(exec, 4 * p.layout.batch * p.layout.pixels());
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; ++g) {
    Two* sums = reinterpret_cast<Two*>(partial + g * size);  // (segments, copies) of s and s x
    for (int64_t k = 0; k < copies * segments; ++k) sums[k] = Two{};
    for_blocks(p.layout, g, groups, [&](int64_t b, int64_t q, int n) {
      T xs[block_pixels], rs[block_pixels], ds[block_pixels], s[block_pixels], out[block_pixels];
      int32_t segment[block_pixels];
      const T* x = load(p.loss, p.layout, b * p.loss.batch, q, n, xs);
      const T* r = load(p.weight, p.layout, b * p.weight.batch, q, n, rs);
      const T* d = load(p.grad_weight, p.layout, b * p.grad_weight.batch, q, n, ds);
      const int np = padded(n);
      for (int i = 0; i < np; ++i) s[i] = by_logit(d[i], r[i]);  // 0 behind the last pixel
      Mw<T>::find(pieces, x, np, segment);
      for (int i = 0; i < np; ++i) {
        const double slope = static_cast<double>(s[i]);
        sums[copies * segment[i] + i % copies] += Two{slope, slope * static_cast<double>(x[i])};
      }
      if (!p.grad_loss) return;
      for (int i = 0; i < np; ++i) out[i] = s[i] * pieces.slope[segment[i]];
      store(p.grad_loss, p.layout, b * p.grad_loss.batch, q, n, out);
    });
  }
  // below[k]: the sums of all segments up to k
  double below[most_hidden + 1][2], total[2] = {};
  for (int64_t k = 0; k < segments; ++k)
    for (int v = 0; v < 2; ++v) {
      for (int64_t g = 0; g < groups; ++g)
        for (int c = 0; c < copies; ++c) total[v] += partial[g * size + 2 * (copies * k + c) + v];
      below[k][v] = total[v];
    }
  const int64_t hidden = net.hidden;
  for (int64_t j = 0; j < hidden; ++j) {
    const uint16_t rank = pieces.rank[j];
    double on[2];  // sums over the pixels where the unit is on
    for (int v = 0; v < 2; ++v) {
      const T w1 = net.w1[j];
      on[v] = rank == never ? (on_at_left(w1, net.b1[j]) ? total[v] : 0.0)
              : w1 > T(0)   ? total[v] - below[rank][v]
                            : below[rank][v];
    }
    mw_unit_gradient(net, j, on[0], on[1], grad_net);
  }
  grad_net[3 * hidden] = static_cast<T>(total[0]);
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
  return loss.dtype == DType::f64 ? CeDual<double>{p}.run(exec) : CeDual<float>{p}.run(exec);
}

void mask_net(const Array& loss, const MaskNet& net, const Array& weight, const Exec& exec) {
  if (!loss.size()) return;
  if (loss.dtype == DType::f64)
    Mask<double>{Tiling(loss), mask_weights<double>(net)}.forward(volume_of(loss), volume_of(weight), exec);
  else
    Mask<float>{Tiling(loss), mask_weights<float>(net)}.forward(volume_of(loss), volume_of(weight), exec);
}

size_t mask_net_workspace(const Array& loss, const MaskNet& net, bool attached, const Exec& exec) {
  if (loss.dtype == DType::f64) {
    const Mask<double> mask{Tiling(loss), mask_weights<double>(net)};
    return mask.workspace(attached, mask.threads(exec));
  }
  const Mask<float> mask{Tiling(loss), mask_weights<float>(net)};
  return mask.workspace(attached, mask.threads(exec));
}

void mask_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MaskNet& net,
                  const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec) {
  const auto run = [&](const auto& mask) {
    mask.reverse(volume_of(grad_weight), volume_of(weight), volume_of(loss), grad_net, grad_loss, workspace,
                 exec);
  };
  if (loss.dtype == DType::f64)
    run(Mask<double>{Tiling(loss), mask_weights<double>(net)});
  else
    run(Mask<float>{Tiling(loss), mask_weights<float>(net)});
}

size_t mw_net_workspace(const Array& loss, const MwNet& net, const Exec&) {
  const int64_t pieces =
      static_cast<int64_t>(loss.dtype == DType::f64 ? sizeof(Pieces<double>) : sizeof(Pieces<float>));
  int64_t pixels = 1;
  for (int i = 2; i < loss.rank; ++i) pixels *= loss.shape[i];
  const int64_t items = loss.shape[0] * ((pixels + chunk_pixels - 1) / chunk_pixels);
  const int64_t groups = items < most_groups ? items : most_groups;
  return static_cast<size_t>(64 + aligned(pieces) + groups * 2 * copies * (net.w1.shape[0] + 1) * 8);
}

void mw_net(const Array& loss, const MwNet& net, const Array& weight, void* workspace, const Exec& exec) {
  const MwPlanes p = make_planes(loss, weight, Array{}, Array{});
  if (loss.dtype == DType::f64)
    mw_forward(p, mw_weights<double>(net), *static_cast<Pieces<double>*>(align(workspace)), exec);
  else
    mw_forward(p, mw_weights<float>(net), *static_cast<Pieces<float>*>(align(workspace)), exec);
}

void mw_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MwNet& net,
                const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec) {
  const MwPlanes p = make_planes(loss, weight, grad_weight, grad_loss);
  const auto run = [&](const auto& mw, auto& pieces) {
    using T = decltype(pieces.slope[0] + pieces.slope[0]);
    double* partial = reinterpret_cast<double*>(reinterpret_cast<char*>(&pieces) +
                                                aligned(static_cast<int64_t>(sizeof pieces)));
    mw_reverse(p, mw, pieces, partial, static_cast<T*>(grad_net.data), exec);
  };
  if (loss.dtype == DType::f64)
    run(mw_weights<double>(net), *static_cast<Pieces<double>*>(align(workspace)));
  else
    run(mw_weights<float>(net), *static_cast<Pieces<float>*>(align(workspace)));
}

}  // namespace noisyseg::NOISYSEG_ISA

NOISYSEG_API(bool, ce_dual,
             (const Array& logits, const Array& logits_dot, const Array& target, bool softmax,
              const Array& loss, const Array& loss_dot, const Exec& exec),
             (logits, logits_dot, target, softmax, loss, loss_dot, exec))
NOISYSEG_API(void, mask_net, (const Array& loss, const MaskNet& net, const Array& weight, const Exec& exec),
             (loss, net, weight, exec))
NOISYSEG_API(size_t, mask_net_workspace,
             (const Array& loss, const MaskNet& net, bool attached, const Exec& exec),
             (loss, net, attached, exec))
NOISYSEG_API(void, mask_net_vjp,
             (const Array& grad_weight, const Array& weight, const Array& loss, const MaskNet& net,
              const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec),
             (grad_weight, weight, loss, net, grad_net, grad_loss, workspace, exec))
NOISYSEG_API(size_t, mw_net_workspace, (const Array& loss, const MwNet& net, const Exec& exec),
             (loss, net, exec))
NOISYSEG_API(void, mw_net,
             (const Array& loss, const MwNet& net, const Array& weight, void* workspace, const Exec& exec),
             (loss, net, weight, workspace, exec))
NOISYSEG_API(void, mw_net_vjp,
             (const Array& grad_weight, const Array& weight, const Array& loss, const MwNet& net,
              const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec),
             (grad_weight, weight, loss, net, grad_net, grad_loss, workspace, exec))
