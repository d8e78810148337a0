// planes.cuh by itself, without the families that are made of it: pixels of any type and strides read and
// written, the rest of a block's tile left alone, and sums over a block, one after the other.
#include "cuda/planes.cuh"

#include "tensors.h"

namespace {

template <class T>
__global__ void __launch_bounds__(cuda::block_threads) copy(Layout layout, Plane in, Plane out) {
  constexpr int n = cuda::pixels_per_thread<T>;
  T values[n];
  for (int64_t tile = blockIdx.x; tile < cuda::tiles_of_image<T>(layout.pixels()); tile += gridDim.x) {
    const auto at = cuda::spots_of<n>(layout, tile);
    for (int64_t c = 0; c < layout.channels; ++c) {
      cuda::read(at, at.inside, in, blockIdx.y * in.batch + c * in.channel, values);
      cuda::write_float(at, out, blockIdx.y * out.batch + c * out.channel, values);
    }
  }
}

// (gridDim.x, 3): the sum of all threads' numbers, of their squares, and of their slopes.
__global__ void __launch_bounds__(cuda::block_threads) sums(double* out) {
  const double x = blockIdx.x * blockDim.x + threadIdx.x;
  const double first = cuda::sum_of_block(x);
  const auto dual =
      cuda::sum_of_block(formulas::Dual<double>{x * x, 2 * x});  // in the memory of the one before
  if (threadIdx.x == 0) {
    out[3 * blockIdx.x] = first;
    out[3 * blockIdx.x + 1] = dual.value;
    out[3 * blockIdx.x + 2] = dual.slope;
  }
}

template <class T>
void check_copy(const Shape& shape, DType from, Order order, DType to, Order other) {
  const std::string name = "copy of type " + std::to_string(static_cast<int>(from)) + " to " +
                           std::to_string(static_cast<int>(to));
  Tensor in(shape, from, order), out(shape, to, other), wanted(shape, to, other);
  fill(in, static_cast<int>(shape.size()), [&](int64_t, int64_t) { return static_cast<double>(pick(200)); });
  const std::vector<double> values = in.values();
  size_t next = 0;
  wanted.each(-1, [&](auto& x, int64_t, int64_t) { formulas::assign(x, static_cast<T>(values[next++])); });
  Plane planes[2];
  const Array arrays[2] = {in.array(), out.array()};
  const Layout layout = make_layout(arrays, planes, 2);
  const dim3 grid(static_cast<unsigned>(cuda::blocks_of_image<T>(layout.batch, layout.pixels())),
                  static_cast<unsigned>(layout.batch));
  NOISYSEG_LAUNCH((copy<T>), grid, cuda::block_threads, 0, device, layout, planes[0], planes[1]);
  if (out.bytes != wanted.bytes) fail(name, "the gaps between the values were written to, or other values");
}

void check_sums(int blocks) {
  std::vector<double> out(static_cast<size_t>(3 * blocks), -7);
  NOISYSEG_LAUNCH((sums), blocks, cuda::block_threads, 0, device, out.data());
  for (int b = 0; b < blocks; ++b) {
    double sum = 0, squares = 0;
    for (int t = 0; t < cuda::block_threads; ++t) {
      const double x = b * cuda::block_threads + t;
      sum += x, squares += x * x;
    }
    const double* found = &out[static_cast<size_t>(3 * b)];
    if (found[0] != sum || found[1] != squares || found[2] != 2 * sum) fail("sum of a block", "is wrong");
  }
}

}  // namespace

int main() {
  for (const DType from :
       {DType::u8, DType::b8, DType::i32, DType::i64, DType::f16, DType::bf16, DType::f32, DType::f64})
    for (const Order order : {Order::contiguous, Order::channels_last, Order::strided, Order::expanded})
      for (const Shape& shape : {Shape{2, 3, 5, 7}, Shape{1, 2, 33, 35}, Shape{2, 1, 3, 5, 9}}) {
        const DType to = pick({DType::f16, DType::bf16, DType::f32, DType::f64});
        const Order other = pick({Order::contiguous, Order::channels_last, Order::strided});
        check_copy<float>(shape, from, order, to, other);
        check_copy<double>(shape, from, order, to, other);
      }
  check_sums(3);
  std::fprintf(stderr, failures ? "planes: %d differences\n" : "planes: as it should be\n", failures);
  return failures != 0;
}
