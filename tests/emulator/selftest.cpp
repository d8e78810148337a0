// The emulator itself: shuffles, votes, barriers, atomics and shared memory against what CUDA documents.
// One argument plants a bug, which the sanitizer or the emulator must report (tests/test_emulator.py):
//   race, warp-race, block-race, shared-overrun, static-overrun, global-overrun, diverge, exit, lanes, limit
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

// Each block's sum; BARRIERS = false is the planted bug: the tree reads what nobody has waited for.
template <bool BARRIERS>
__global__ void __launch_bounds__(256) block_sum(const int* __restrict__ in, int* out, int64_t n) {
  __shared__ int tile[256];
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i < n ? in[i] : 0;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) tile[threadIdx.x] += tile[threadIdx.x + half];
    if (BARRIERS) __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = tile[0];
}

__global__ void shared_write(int* out, int at) {
  NOISYSEG_SHARED(int, tile);
  tile[threadIdx.x] = 1;
  tile[at] = 2;
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void static_write(int* out, int at) {
  __shared__ int tile[8];
  if (threadIdx.x == 0) tile[at] = 2;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void all_write(int* out, int at) {
  if (threadIdx.x == 0) out[at] = static_cast<int>(blockIdx.x);
}
__global__ void divergent(int* out, int split) {
  if (static_cast<int>(threadIdx.x) < split)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void early_exit(int* out, int split) {
  if (static_cast<int>(threadIdx.x) >= split) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void partial_warp(int* out, int split) {
  if (static_cast<int>(threadIdx.x) < split) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}

int failures = 0;
void expect(bool right, const char* what, long long i) {
  if (!right && ++failures <= 20) std::fprintf(stderr, "selftest: %s is wrong at %lld\n", what, i);
}

struct Warp {
  int from, up, down, exchanged, narrow, wide_down;
  unsigned ballot, lower;
  int any, all;
  double real;
  int voted_or, voted_and, voted_count, poison;
};
__global__ void warp_functions(Warp* out, int n) {
  __shared__ int fresh[77];
  const unsigned full = 0xffffffffu;
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  Warp w;
  w.poison = fresh[t];
  w.from = __shfl_sync(full, t, 5);
  w.up = __shfl_up_sync(full, t, 3);
  w.down = __shfl_down_sync(full, t, 1);
  w.exchanged = __shfl_xor_sync(full, t, 1);
  w.narrow = __shfl_sync(full, t, 1, 8);
  w.wide_down = __shfl_down_sync(full, t, 2, 8);
  w.ballot = __ballot_sync(full, t & 1);
  w.lower = lane < 4 ? __ballot_sync(0xfu, lane == 2) : __ballot_sync(~0xfu, lane == 9);
  w.any = __any_sync(full, t == 33);
  w.all = __all_sync(full, t < 32);
  w.real = __shfl_sync(full, 0.1 * t, 2);
  w.voted_or = __syncthreads_or(t == 7);
  w.voted_and = __syncthreads_and(t < n - 1);
  w.voted_count = __syncthreads_count(t % 3 == 0);
  fresh[t] = 0;
  __syncwarp();
  out[blockIdx.x * blockDim.x + threadIdx.x] = w;
}

__global__ void atomics(int* i, unsigned* u, unsigned long long* l) {
  const int t = static_cast<int>(threadIdx.x + blockDim.x * blockIdx.x);
  atomicAdd(&i[0], t);
  atomicMin(&i[1], -t);
  atomicMax(&i[2], t);
  atomicOr(&u[0], 1u << (t % 32));
  atomicAnd(&u[1], ~(1u << (t % 32)));
  atomicMax(&u[2], static_cast<unsigned>(t));
  atomicAdd(&l[0], 1ull << 33);
  atomicMin(&l[1], static_cast<unsigned long long>(100 + t));
  unsigned long long old = l ? 0 : 1, seen;
  do {  // a sum by compare-and-swap
    seen = old;
    old = atomicCAS(&l[2], seen, seen + static_cast<unsigned long long>(t));
  } while (old != seen);
  atomicExch(&i[3], 42);
}

// Neighbours exchange through memory inside a warp: right with __syncwarp, a race without.
template <bool SYNC>
__global__ void warp_exchange(int* out) {
  NOISYSEG_SHARED(int, tile);
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (SYNC) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void indices(int* out, dim3 grid) {
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[b * blockDim.x * blockDim.y * blockDim.z + t] += gridDim.x == grid.x ? 1 : 100;
}

void check_all(const noisyseg::Exec& exec) {
  std::vector<int> in(1000), out(4);
  for (int i = 0; i < 1000; ++i) in[i] = i;
  NOISYSEG_LAUNCH((block_sum<true>), 4, 256, 0, exec, in.data(), out.data(), int64_t{1000});
  for (int b = 0; b < 4; ++b) {
    int sum = 0;
    for (int i = 256 * b; i < 256 * (b + 1) && i < 1000; ++i) sum += i;
    expect(out[b] == sum, "block_sum", b);
  }

  const int n = 77;  // two full warps and a tail of 13
  std::vector<Warp> w(2 * n);
  NOISYSEG_LAUNCH((warp_functions), 2, n, 0, exec, w.data(), n);
  for (int t = 0; t < n; ++t) {
    const int base = t / 32 * 32, lane = t % 32, lanes = base + 32 <= n ? 32 : n - base;
    unsigned odd = 0;
    for (int l = 0; l < lanes; ++l) odd |= static_cast<unsigned>((base + l) & 1) << l;
    expect(w[t].from == base + 5, "__shfl_sync", t);
    expect(w[t].up == (lane < 3 ? t : t - 3), "__shfl_up_sync", t);
    expect(w[t].down == (lane == 31 ? t : lane + 1 < lanes ? t + 1 : -1), "__shfl_down_sync", t);
    expect(w[t].exchanged == ((lane ^ 1) < lanes ? t ^ 1 : -1), "__shfl_xor_sync", t);
    expect(w[t].narrow == ((lane & ~7) + 1 < lanes ? (t & ~7) + 1 : -1), "__shfl_sync of width 8", t);
    expect(w[t].wide_down == ((lane & 7) + 2 > 7 ? t
                              : lane + 2 < lanes ? t + 2
                                                 : -1),
           "__shfl_down_sync of width 8", t);
    expect(w[t].ballot == odd, "__ballot_sync", t);
    expect(w[t].lower == (lane < 4 ? 1u << 2 : 1u << 9), "__ballot_sync of part of a warp", t);
    expect(w[t].any == (base == 32), "__any_sync", t);
    expect(w[t].all == (base == 0), "__all_sync", t);
    expect(w[t].real == 0.1 * (base + 2), "__shfl_sync of double", t);
    expect(w[t].voted_or == 1, "__syncthreads_or", t);
    expect(w[t].voted_and == 0, "__syncthreads_and", t);
    expect(w[t].voted_count == (n + 2) / 3, "__syncthreads_count", t);
#ifndef __SANITIZE_ADDRESS__
    expect(w[t].poison == -1, "uninitialised shared memory", t);
#endif
  }

  std::vector<int> i(4);
  std::vector<unsigned> u{0, ~0u, 0};
  std::vector<unsigned long long> l{0, ~0ull, 0};
  NOISYSEG_LAUNCH((atomics), 3, 100, 0, exec, i.data(), u.data(), l.data());
  expect(i[0] == 299 * 150 && i[1] == -299 && i[2] == 299 && i[3] == 42, "an atomic on int", 0);
  expect(u[0] == ~0u && u[1] == 0 && u[2] == 299, "an atomic on unsigned", 0);
  expect(l[0] == 300ull << 33 && l[1] == 100 && l[2] == 299 * 150, "an atomic on unsigned long long", 0);

  std::vector<int> exchanged(64);
  NOISYSEG_LAUNCH((warp_exchange<true>), 1, 64, 64 * sizeof(int), exec, exchanged.data());
  for (int t = 0; t < 64; ++t) expect(exchanged[t] == (t ^ 1), "__syncwarp", t);

  const dim3 grid(2, 3, 2), block(4, 5, 6);
  std::vector<int> hits(2 * 3 * 2 * 4 * 5 * 6);
  NOISYSEG_LAUNCH((indices), grid, block, 0, exec, hits.data(), grid);
  for (size_t h = 0; h < hits.size(); ++h) expect(hits[h] == 1, "an index", static_cast<long long>(h));

  expect(__clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __popc(0xf0u) == 4 && __brev(1u) == 1u << 31,
         "bits", 0);
  expect(__umulhi(1u << 31, 6) == 3 && __float_as_uint(1.0f) == 0x3f800000u && min(2, 3u) == 2, "bits", 1);
}

}  // namespace

int main(int argc, char** argv) {
  const noisyseg::Exec exec{0, nullptr, 0};
  const std::string bug = argc > 1 ? argv[1] : "";
  std::vector<int> in(512, 1), out(64);
  if (bug.empty()) check_all(exec);
  if (bug == "race")
    NOISYSEG_LAUNCH((block_sum<false>), 2, 256, 0, exec, in.data(), out.data(), int64_t{512});
  if (bug == "warp-race") NOISYSEG_LAUNCH((warp_exchange<false>), 1, 64, 64 * sizeof(int), exec, out.data());
  if (bug == "block-race") NOISYSEG_LAUNCH((all_write), 2, 32, 0, exec, out.data(), 3);
  if (bug == "shared-overrun") NOISYSEG_LAUNCH((shared_write), 1, 8, 8 * sizeof(int), exec, out.data(), 8);
  if (bug == "static-overrun") NOISYSEG_LAUNCH((static_write), 1, 8, 0, exec, out.data(), 8);
  if (bug == "global-overrun") NOISYSEG_LAUNCH((all_write), 1, 8, 0, exec, out.data(), 64);
  if (bug == "diverge") NOISYSEG_LAUNCH((divergent), 1, 64, 0, exec, out.data(), 20);
  if (bug == "exit") NOISYSEG_LAUNCH((early_exit), 1, 64, 0, exec, out.data(), 40);
  if (bug == "lanes") NOISYSEG_LAUNCH((partial_warp), 1, 64, 0, exec, out.data(), 40);
  if (bug == "limit") NOISYSEG_LAUNCH((shared_write), 1, 8, 60000, exec, out.data(), 7);
  if (failures == 0) std::puts("selftest: all right");
  return failures != 0;
}
