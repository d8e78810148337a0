// Label noise on CUDA: the same bits as csrc/cpu/noise.cpp, by the same formulas.
#include "cuda/launch.h"
#include "formulas/noise.h"

namespace noisyseg {
namespace {
using formulas::Crossing;
using formulas::Deformation;
using formulas::LabelImage;

constexpr int threads = 256;
constexpr int64_t most_blocks = 65535;

unsigned blocks_for(int64_t n, int64_t each) {
  const int64_t blocks = (n + each - 1) / each;
  return static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks);
}

// A thread per four numbers. Writes 4 B per number.
__global__ void __launch_bounds__(threads)
    write_uniforms(const int64_t* key, int stream, int64_t items, int64_t n, float* out) {
  const int64_t blocks = (n + 3) / 4, step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < items * blocks; i += step) {
    const int64_t item = i / blocks, first = i % blocks * 4;
    const formulas::Words words = formulas::random_words(key[item], stream, i % blocks);
    float* to = out + item * n + first;
    if (first < n) to[0] = formulas::uniform(words.x[0]);
    if (first + 1 < n) to[1] = formulas::uniform(words.x[1]);
    if (first + 2 < n) to[2] = formulas::uniform(words.x[2]);
    if (first + 3 < n) to[3] = formulas::uniform(words.x[3]);
  }
}

// ---- components ------------------------------------------------------------------------------------
// Union-find with atomics (Komura, 2015; Playne and Hawick, 2018): whatever the order of the threads, the
// root of a component is its smallest index. Background is -1 until the last kernel. 4 B per voxel written
// and read in each of four kernels, the mask (1 B) read once.

__device__ inline int load(const int* p) {
#ifdef NOISYSEG_EMULATOR
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#else
  return *static_cast<const volatile int*>(p);
#endif
}

__device__ inline int root_of(const int* parent, int i) {
  for (int next = load(parent + i); next != i; next = load(parent + i)) i = next;
  return i;
}

__device__ inline void unite(int* parent, int a, int b) {
  a = root_of(parent, a);
  b = root_of(parent, b);
  while (a != b) {
    if (a < b) {
      const int t = a;
      a = b;
      b = t;
    }
    const int before = atomicMin(parent + a, b);  // a > b: a's parent becomes b, unless it had a smaller one
    if (before == a) return;
    a = before;
  }
}

// Every voxel points at the first of its run along the last axis, or at one 32 voxels back, where a run is
// longer.
__global__ void __launch_bounds__(threads)
    start_labels(const uint8_t* mask, int64_t total, int64_t size, int64_t columns, int32_t* labels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step) {
    const int64_t before = i % columns;
    int back = 0;
    while (back < 32 && back < before && mask[i] && mask[i - back - 1]) ++back;
    labels[i] = mask[i] ? static_cast<int32_t>(i % size) - back : -1;
  }
}

// Joins each voxel with those of the rows before that no voxel to its left has joined already.
__global__ void __launch_bounds__(threads)
    join_labels(int64_t items, int64_t n0, int64_t n1, int64_t n2, bool full, int32_t* labels) {
  const int64_t size = n0 * n1 * n2, total = items * size, step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step) {
    const int64_t item = i / size, at = i % size, z = at / (n1 * n2), y = at / n2 % n1, x = at % n2;
    int32_t* parent = labels + item * size;
    if (load(parent + at) < 0) continue;
    const bool left = x > 0 && load(parent + at - 1) >= 0;
    for (int k = 0; k < (full ? 4 : 2); ++k) {  // rows (0, -1), (-1, 0), (-1, -1), (-1, 1)
      const int64_t v = k == 0 ? z : z - 1, u = k == 0 || k == 2 ? y - 1 : k == 1 ? y : y + 1;
      if (v < 0 || u < 0 || u >= n1) continue;
      const int64_t other = (v * n1 + u) * n2 + x;
      const bool here = load(parent + other) >= 0, before = x > 0 && load(parent + other - 1) >= 0;
      if (here && !(left && before)) unite(parent, static_cast<int>(at), static_cast<int>(other));
      if (!full || here) continue;
      if (before && !left) unite(parent, static_cast<int>(at), static_cast<int>(other - 1));
      if (x + 1 < n2 && load(parent + other + 1) >= 0)
        unite(parent, static_cast<int>(at), static_cast<int>(other + 1));
    }
  }
}

__global__ void __launch_bounds__(threads) flatten_labels(int64_t total, int64_t size, int32_t* labels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step) {
    int32_t* parent = labels + i / size * size;
    const int at = static_cast<int>(i % size);
    if (load(parent + at) >= 0) atomicExch(parent + at, root_of(parent, at));
  }
}

__global__ void __launch_bounds__(threads) number_labels(int64_t total, int32_t* labels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += step)
    ++labels[i];
}

// ---- contours and polygons -------------------------------------------------------------------------

// A thread per contour, which it walks twice: up to 8 labels (4 B) read for each step, from L1 and L2. At
// least one block: left alone, ptxas 13.0 aims at 32 registers and spills.
constexpr int walk_threads = 64;
__global__ void __launch_bounds__(walk_threads, 1)
    walk_contours(const int32_t* labels, int64_t rows, int64_t columns, const int64_t* starts,
                  const double* phases, int64_t count, int64_t n, int32_t* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * walk_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * walk_threads + threadIdx.x; i < count; i += step) {
    const int64_t item = starts[i] / (rows * columns), at = starts[i] % (rows * columns);
    const LabelImage image = {labels + item * rows * columns, rows, columns};
    formulas::contour_vertices(image, at / columns, at % columns, n, phases[i], out + i * n * 2);
  }
}

constexpr int fill_threads = 128, fill_pixels = 8, fill_width = fill_threads * fill_pixels;

// A block per row and item, which it goes through in pieces of fill_width pixels: for each polygon the
// threads put its edges' crossings into shared memory, then sum them up along the row. Reads the vertices (8
// B each) once for each row, writes at most 1 B per pixel.
__global__ void __launch_bounds__(fill_threads)
    fill_rows(const int32_t* vertices, int64_t m, const int64_t* first, int64_t items, int64_t rows,
              int64_t columns, uint8_t* out) {
  __shared__ int turns[fill_width], on[fill_width], sums[fill_threads];
  const int t = static_cast<int>(threadIdx.x);
  for (int64_t job = blockIdx.x; job < items * rows; job += gridDim.x) {
    const int64_t item = job / rows, y = job % rows;
    uint8_t* row = out + job * columns;
    for (int64_t p = first[item]; p < first[item + 1]; ++p) {
      const int32_t* v = vertices + p * m * 2;
      for (int64_t from = 0; from < columns; from += fill_width) {
        const int64_t to = from + fill_width < columns ? from + fill_width : columns;
        for (int k = t; k < fill_width; k += fill_threads) turns[k] = on[k] = 0;
        __syncthreads();
        bool any = false;
        for (int64_t i = t; i < m; i += fill_threads) {
          const Crossing c = formulas::crossing(v + 2 * i, v + 2 * (i + 1 < m ? i + 1 : 0), y);
          any = any || c.turns || c.on < c.on_end;
          for (int64_t x = c.on < from ? from : c.on; x < (c.on_end < to ? c.on_end : to); ++x)
            atomicOr(on + (x - from), 1);
          if (c.turns && c.first < to) atomicAdd(turns + (c.first < from ? 0 : c.first - from), c.turns);
        }
        if (!__syncthreads_or(any)) break;  // the polygon does not reach this row
        int sum = 0;
        for (int k = 0; k < fill_pixels; ++k) sum += turns[t * fill_pixels + k];
        sums[t] = sum;
        __syncthreads();
        for (int reach = 1; reach < fill_threads; reach *= 2) {
          const int other = t >= reach ? sums[t - reach] : 0;
          __syncthreads();
          sums[t] += other;
          __syncthreads();
        }
        sum = sums[t] - sum;
        for (int k = 0; k < fill_pixels; ++k) {
          const int64_t x = from + t * fill_pixels + k;
          sum += turns[t * fill_pixels + k];
          if (x < to && (sum != 0 || on[t * fill_pixels + k])) row[x] = 1;
        }
        __syncthreads();
      }
    }
  }
}

// ---- deformation -----------------------------------------------------------------------------------

constexpr int deform_threads = 128;

// A block per row of voxels: the grid summed up over the first two axes in shared memory, then a thread per
// voxel. Per voxel one gathered read and one write.
template <class T, bool linear>
__global__ void __launch_bounds__(deform_threads)
    deform_rows(Deformation d, const T* image, T fill, double fill_value, T* out) {
  __shared__ double columns[3][DeformOptions::max_points];
  const int64_t rows = d.n[0] * d.n[1], size = rows * d.n[2];
  const int points = d.points[2];
  const int64_t cells = int64_t{d.points[0]} * d.points[1] * points;
  for (int64_t r = blockIdx.x; r < d.items * rows; r += gridDim.x) {
    const int64_t item = r / rows, z = r % rows / d.n[1], y = r % d.n[1];
    const double* affine = d.affine + item * 12;
    for (int k = static_cast<int>(threadIdx.x); k < 3 * points; k += deform_threads)
      columns[k / points][k % points] =
          formulas::column(d, d.coefficients + (item * 3 + k / points) * cells, z, y, k % points);
    __syncthreads();
    for (int64_t x = threadIdx.x; x < d.n[2]; x += deform_threads) {
      double w[4] = {1, 0, 0, 0}, place;
      int i = 0;
      if (points > 1) {
        i = formulas::interval(d, 2, x, &place);
        formulas::spline_weights(formulas::plus(place, -static_cast<double>(i)), w);
      }
      double p[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const double along = formulas::plus(formulas::row_base(affine + 4 * k, z, y),
                                            formulas::times(affine[4 * k + 2], static_cast<double>(x)));
        double u = columns[k][0];
        if (points > 1) {
          u = formulas::times(w[0], columns[k][formulas::mirrored(i - 1, points)]);
          u = formulas::plus(u, formulas::times(w[1], columns[k][i]));
          u = formulas::plus(u, formulas::times(w[2], columns[k][i + 1]));
          u = formulas::plus(u, formulas::times(w[3], columns[k][formulas::mirrored(i + 2, points)]));
        }
        p[k] = formulas::plus(along, u);
      }
      T* to = out + r * d.n[2] + x;
      if constexpr (linear) {
        *to = static_cast<T>(formulas::linear_value(d, image + item * size, p, fill_value));
      } else {
        const int64_t at = formulas::nearest_voxel(d, p);
        *to = at < 0 ? fill : image[item * size + at];
      }
    }
    __syncthreads();
  }
}

template <class T, bool linear>
void launch_deform(const Deformation& d, const Array& image, T fill, const DeformOptions& o, const Array& out,
                   const Exec& exec) {
  NOISYSEG_LAUNCH((deform_rows<T, linear>), blocks_for(d.items * d.n[0] * d.n[1], 1), deform_threads, 0, exec,
                  d, static_cast<const T*>(image.data), fill, o.fill, static_cast<T*>(out.data));
}

}  // namespace

namespace cuda {

void uniforms(const Array& keys, int stream, const Array& out, const Exec& exec) {
  formulas::check_uniforms(keys, out);
  const int64_t items = out.shape[0], n = out.shape[1];
  if (items * n == 0) return;
  const DeviceGuard guard(exec.device);
  NOISYSEG_LAUNCH((write_uniforms), blocks_for(items * ((n + 3) / 4), threads), threads, 0, exec,
                  static_cast<const int64_t*>(keys.data), stream, items, n, static_cast<float*>(out.data));
}

void connected_components(const Array& mask, bool full, const Array& labels, const Exec& exec) {
  formulas::check_components(mask, labels);
  const int64_t *n = mask.shape + 1, size = n[0] * n[1] * n[2], total = mask.shape[0] * size;
  if (total == 0) return;
  const DeviceGuard guard(exec.device);
  int32_t* to = static_cast<int32_t*>(labels.data);
  const unsigned blocks = blocks_for(total, threads);
  NOISYSEG_LAUNCH((start_labels), blocks, threads, 0, exec, static_cast<const uint8_t*>(mask.data), total,
                  size, n[2], to);
  NOISYSEG_LAUNCH((join_labels), blocks, threads, 0, exec, mask.shape[0], n[0], n[1], n[2], full, to);
  NOISYSEG_LAUNCH((flatten_labels), blocks, threads, 0, exec, total, size, to);
  NOISYSEG_LAUNCH((number_labels), blocks, threads, 0, exec, total, to);
}

void contour_vertices(const Array& labels, const Array& starts, const Array& phases, const Array& out,
                      const Exec& exec) {
  formulas::check_contours(labels, starts, phases, out);
  const int64_t count = starts.shape[0];
  if (count == 0) return;
  const DeviceGuard guard(exec.device);
  NOISYSEG_LAUNCH((walk_contours), blocks_for(count, walk_threads), walk_threads, 0, exec,
                  static_cast<const int32_t*>(labels.data), labels.shape[1], labels.shape[2],
                  static_cast<const int64_t*>(starts.data), static_cast<const double*>(phases.data), count,
                  out.shape[1], static_cast<int32_t*>(out.data));
}

size_t fill_workspace(const Array&, const Exec&) { return 0; }

void fill_polygons(const Array& vertices, const Array& first, const Array& out, void*, const Exec& exec) {
  formulas::check_polygons(vertices, first, out);
  if (out.size() == 0) return;
  const DeviceGuard guard(exec.device);
  NOISYSEG_LAUNCH((fill_rows), blocks_for(out.shape[0] * out.shape[1], 1), fill_threads, 0, exec,
                  static_cast<const int32_t*>(vertices.data), vertices.shape[1],
                  static_cast<const int64_t*>(first.data), out.shape[0], out.shape[1], out.shape[2],
                  static_cast<uint8_t*>(out.data));
}

void deform(const Array& image, const Array& coefficients, const Array& affine, const DeformOptions& options,
            const Array& out, const Exec& exec) {
  const Deformation d = formulas::deformation(image, coefficients, affine, options);
  if (image.size() == 0) return;
  const DeviceGuard guard(exec.device);
  if (options.linear) {
    if (image.dtype == DType::f64)
      launch_deform<double, true>(d, image, 0.0, options, out, exec);
    else
      launch_deform<float, true>(d, image, 0.f, options, out, exec);
    return;
  }
  const uint64_t fill = formulas::fill_bits(image.dtype, options.fill);
  switch (dtype_size(image.dtype)) {
    case 1: launch_deform<uint8_t, false>(d, image, static_cast<uint8_t>(fill), options, out, exec); break;
    case 2: launch_deform<uint16_t, false>(d, image, static_cast<uint16_t>(fill), options, out, exec); break;
    case 4: launch_deform<uint32_t, false>(d, image, static_cast<uint32_t>(fill), options, out, exec); break;
    default: launch_deform<uint64_t, false>(d, image, fill, options, out, exec);
  }
}

}  // namespace cuda
}  // namespace noisyseg
