// CUDA kernels on the CPU, so that ThreadSanitizer and AddressSanitizer can watch them.
//
//   g++ -std=c++17 -x c++ -DNOISYSEG_EMULATOR -Itests/emulator -Icsrc -Icsrc/include kernel.cu driver.cpp
//
// csrc/cuda/launch.h includes this instead of the CUDA runtime. NOISYSEG_LAUNCH then runs the grid at
// once, block after block. Each CUDA thread is a fiber of one CPU thread, and to ThreadSanitizer a
// thread of its own: only what orders threads in CUDA orders them here (launches, __syncthreads and its
// kin, __syncwarp, __threadfence; shuffles and ballots order nothing), so a missing barrier is a data
// race whatever the schedule, within a block and, as a rule, between blocks. Reported and ended with exit
// code 70: a barrier or warp intrinsic that not all named threads reach, barriers that threads reach at
// different lines, launches that no GPU accepts. A block finds its shared memory filled with 0xFF (static
// arrays only under ThreadSanitizer or none; AddressSanitizer gets red zones around them instead), and a
// shuffle from a lane that is not there returns 0xFF. NOISYSEG_EMULATOR_REVERSE=1 in the environment runs
// blocks and threads in reverse order: same bits.
#pragma once
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "noisyseg/array.h"
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// ---- the language ------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local  // puts them all side by side, where they can be filled
#endif

#define NOISYSEG_VECTOR(T, name, alignment)                                              \
  struct alignas(alignment) name##2 { T x, y; };                                         \
  struct alignas(sizeof(T)) name##3 { T x, y, z; };                                      \
  struct alignas(2 * (alignment) > 16 ? 16 : 2 * (alignment)) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                             \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
NOISYSEG_VECTOR(signed char, char, 2)
NOISYSEG_VECTOR(unsigned char, uchar, 2)
NOISYSEG_VECTOR(short, short, 4)
NOISYSEG_VECTOR(unsigned short, ushort, 4)
NOISYSEG_VECTOR(int, int, 8)
NOISYSEG_VECTOR(unsigned, uint, 8)
NOISYSEG_VECTOR(long long, longlong, 16)
NOISYSEG_VECTOR(unsigned long long, ulonglong, 16)
NOISYSEG_VECTOR(float, float, 8)
NOISYSEG_VECTOR(double, double, 16)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- the scheduler -----------------------------------------------------------------------------
namespace noisyseg::emulator {

// The scheduler's own memory must not look like the kernels' to the sanitizers.
#define NOISYSEG_UNSEEN __attribute__((noinline, no_sanitize("thread", "address", "undefined")))

constexpr int max_threads = 1024;
constexpr size_t stack_size = 512 << 10;

enum class State { ready, barrier, warp, done };
enum class Vote { none, any, all, count };
enum class WarpOp { sync, shuffle, ballot, any, all };

struct Fiber {
  void* sp = nullptr;  // where its stack stands while it does not run
  void* tsan = nullptr;
  uint3 index;
  State state;
  int line;
  Vote vote;
  WarpOp op;
  unsigned mask;
  int source;  // lane, or -1 for a value that is not there
  uint64_t value;
};

inline Fiber fibers[2][max_threads];  // two sets, so that two blocks are unordered for ThreadSanitizer
inline Fiber* slot[max_threads];      // thread of the block -> fiber
inline void* scheduler_sp;
inline void* scheduler_tsan;
inline int current;  // linear index of the running thread
inline int block_size;
inline unsigned barriers;
inline unsigned warp_syncs[max_threads];
inline char begin_tag, end_tag, fence_tag;
alignas(8) inline char block_tags[2 * max_threads + 8];  // a pair for each warp, a pair for the block
inline unsigned char* dynamic_shared;
inline const char* kernel_name = "";
inline void (*run_thread)(void*);
inline void* run_argument;

#ifdef __SANITIZE_THREAD__
inline void before(void* tag) { __tsan_release(tag); }
inline void after(void* tag) { __tsan_acquire(tag); }
extern "C" void __tsan_java_alloc(void*, size_t);
extern "C" void __tsan_java_free(void*, size_t);
inline void forget(void* begin, size_t size) {  // what was done with this memory was done with another
  const uintptr_t from = reinterpret_cast<uintptr_t>(begin) & ~uintptr_t{7};
  const size_t whole = (reinterpret_cast<uintptr_t>(begin) + size - from + 7) & ~size_t{7};
  __tsan_java_free(reinterpret_cast<void*>(from), whole);
  __tsan_java_alloc(reinterpret_cast<void*>(from), whole);
}
inline void* new_tsan() { return __tsan_create_fiber(0); }
inline void* this_tsan() { return __tsan_get_current_fiber(); }
#define NOISYSEG_SWITCH_TSAN(to) __tsan_switch_to_fiber(to, __tsan_switch_to_fiber_no_sync)
#else
inline void before(void*) {}
inline void after(void*) {}
inline void forget(void*, size_t) {}
inline void* new_tsan() { return nullptr; }
inline void* this_tsan() { return nullptr; }
#define NOISYSEG_SWITCH_TSAN(to) (void)(to)
#endif

[[noreturn]] NOISYSEG_UNSEEN inline void fail(const char* what) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: %s, block (%u, %u, %u): %s\n", kernel_name, blockIdx.x, blockIdx.y,
               blockIdx.z, what);
  std::_Exit(70);
}

// Leaves the running stack, noting where it stands, for another that was left so.
#ifndef __x86_64__
#error "switch_stack is written for x86-64"
#endif
__attribute__((naked, noinline, used)) static void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"
      "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

// From the running fiber to the scheduler, until that resumes the fiber.
NOISYSEG_UNSEEN inline void pause() {
  NOISYSEG_SWITCH_TSAN(scheduler_tsan);
  switch_stack(&slot[current]->sp, scheduler_sp);
}

NOISYSEG_UNSEEN inline void fiber_main() {
  for (;;) {
    after(&begin_tag);
    run_thread(run_argument);
    before(&end_tag);
    slot[current]->state = State::done;
    pause();
  }
}

NOISYSEG_UNSEEN inline void start(Fiber& f) {
  void* stack =
      mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, 4096, PROT_NONE)) fail("no memory for a stack");
  void** sp = static_cast<void**>(stack) + stack_size / sizeof(void*) - 2;
  *sp = reinterpret_cast<void*>(&fiber_main);  // switch_stack's ret goes there
  f.sp = sp - 6;                               // the registers that it pops first
  f.tsan = new_tsan();
}

NOISYSEG_UNSEEN inline void resume(int thread) {
  Fiber& f = *slot[thread];
  current = thread;
  threadIdx = f.index;
  if (!f.sp) start(f);
  NOISYSEG_SWITCH_TSAN(f.tsan);
  switch_stack(&scheduler_sp, f.sp);
}

NOISYSEG_UNSEEN inline uint64_t barrier(int line, Vote vote = Vote::none, int predicate = 0) {
  Fiber& f = *slot[current];
  char* tag = &block_tags[2 * max_threads + (barriers & 1)];
  f.state = State::barrier;
  f.line = line;
  f.vote = vote;
  f.value = predicate != 0;
  before(tag);
  pause();
  after(tag);
  return f.value;
}

NOISYSEG_UNSEEN inline bool finish_barrier() {
  int count = 0;
  for (int t = 0; t < block_size; ++t) {
    if (slot[t]->state != State::barrier) return false;
    count += static_cast<int>(slot[t]->value);
  }
  for (int t = 0; t < block_size; ++t) {
    Fiber& f = *slot[t];
    if (f.line != slot[0]->line) {
      static char text[120];
      std::snprintf(text, sizeof text,
                    "threads wait at different barriers: thread 0 at line %d, thread %d at line %d",
                    slot[0]->line, t, f.line);
      fail(text);
    }
    f.value = f.vote == Vote::any ? count > 0 : f.vote == Vote::all ? count == block_size : count;
    f.state = State::ready;
  }
  ++barriers;
  return true;
}

NOISYSEG_UNSEEN inline unsigned lanes_of(int thread) {
  const int left = block_size - thread / 32 * 32;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

NOISYSEG_UNSEEN inline uint64_t warp_op(WarpOp op, int line, unsigned mask, uint64_t value, int source) {
  Fiber& f = *slot[current];
  if (!(mask >> (current & 31) & 1)) fail("a thread calls a warp intrinsic with a mask that leaves it out");
  mask &= lanes_of(current);
  const int group = current / 32 * 32 + __builtin_ctz(mask);
  char* tag = &block_tags[2 * group + (warp_syncs[group] & 1)];
  f.state = State::warp;
  f.line = line;
  f.op = op;
  f.mask = mask;
  f.value = value;
  f.source = source;
  if (op == WarpOp::sync) before(tag);
  pause();
  if (op == WarpOp::sync) after(tag);
  return f.value;
}

NOISYSEG_UNSEEN inline bool finish_warp(int first) {
  bool finished = false;
  const int lanes = std::min(32, block_size - first);
  for (int i = 0; i < lanes; ++i) {
    const Fiber leader = *slot[first + i];
    if (leader.state != State::warp || __builtin_ctz(leader.mask) != i) continue;
    bool all = true;
    unsigned votes = 0;
    uint64_t values[32];
    for (int l = 0; l < lanes; ++l) {
      if (!(leader.mask >> l & 1)) continue;
      const Fiber& f = *slot[first + l];
      all = all && f.state == State::warp && f.line == leader.line && f.op == leader.op &&
            f.mask == leader.mask;
      values[l] = f.value;
      votes |= static_cast<unsigned>(f.value != 0) << l;
    }
    if (!all) continue;
    for (int l = 0; l < lanes; ++l) {
      if (!(leader.mask >> l & 1)) continue;
      Fiber& f = *slot[first + l];
      switch (f.op) {
        case WarpOp::sync: break;
        case WarpOp::shuffle: f.value = leader.mask >> f.source & 1 ? values[f.source] : ~uint64_t{0}; break;
        case WarpOp::ballot: f.value = votes; break;
        case WarpOp::any: f.value = votes != 0; break;
        case WarpOp::all: f.value = votes == leader.mask; break;
      }
      f.state = State::ready;
    }
    if (leader.op == WarpOp::sync) ++warp_syncs[first + i];
    finished = true;
  }
  return finished;
}

[[noreturn]] NOISYSEG_UNSEEN inline void report_stuck() {
  static char text[400];
  int at = std::snprintf(text, sizeof text, "the threads cannot go on:");
  for (int t = 0, from = 0; t < block_size; ++t) {
    const Fiber &f = *slot[t], *next = t + 1 < block_size ? slot[t + 1] : nullptr;
    if (next && next->state == f.state && (f.state == State::done || next->line == f.line)) continue;
    if (at < static_cast<int>(sizeof text) - 60) {
      at += std::snprintf(text + at, sizeof text - at, " [%d to %d ", from, t);
      if (f.state == State::done)
        at += std::snprintf(text + at, sizeof text - at, "have ended]");
      else
        at += std::snprintf(text + at, sizeof text - at, "wait at the %s of line %d]",
                            f.state == State::barrier ? "barrier" : "warp intrinsic", f.line);
    }
    from = t + 1;
  }
  fail(text);
}

inline bool reversed() {
  static const bool wish = std::getenv("NOISYSEG_EMULATOR_REVERSE") != nullptr;
  return wish;
}

NOISYSEG_UNSEEN inline void run_block(uint64_t block) {
  const int set = __builtin_popcountll(block) & 1;  // neighbours at 1, 2, 4, ... often differ
  blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
              static_cast<unsigned>(block / gridDim.x / gridDim.y)};
  forget(block_tags, sizeof block_tags);
  barriers = 0;
  for (int t = 0; t < block_size; ++t) {
    slot[t] = &fibers[set][t];
    Fiber& f = *slot[t];
    f.state = State::ready;
    f.line = 0;
    const unsigned u = static_cast<unsigned>(t);
    f.index = {u % blockDim.x, u / blockDim.x % blockDim.y, u / (blockDim.x * blockDim.y)};
    warp_syncs[t] = 0;
  }
  const int warps = (block_size + 31) / 32;
  const bool reverse = reversed();
  for (;;) {
    bool moved = false;
    for (int i = 0; i < warps; ++i) {
      const int first = 32 * (reverse ? warps - 1 - i : i);
      const int lanes = std::min(32, block_size - first);
      do {
        for (int l = 0; l < lanes; ++l) {
          const int t = first + (reverse ? lanes - 1 - l : l);
          if (slot[t]->state == State::ready) {
            resume(t);
            moved = true;
          }
        }
      } while (finish_warp(first));
    }
    if (finish_barrier()) continue;
    int done = 0;
    for (int t = 0; t < block_size; ++t) done += slot[t]->state == State::done;
    if (done == block_size) return;
    if (!moved) report_stuck();
  }
}

NOISYSEG_UNSEEN inline void set_sizes(dim3 grid, dim3 block) {
  blockDim = block;
  gridDim = grid;
  blockIdx = {0, 0, 0};
}

// NOISYSEG_EMULATOR_LOG in the environment names a file that takes a line for each launch.
inline void log_launch(const char* name) {
  static std::FILE* const log = [] {
    const char* path = std::getenv("NOISYSEG_EMULATOR_LOG");
    return path ? std::fopen(path, "a") : nullptr;
  }();
  if (log) std::fprintf(log, "%s\n", name);
}

// The executable's thread-local variables: the static __shared__ arrays.
struct Range {
  void* begin = nullptr;
  size_t size = 0;
};
inline Range static_shared() {
  Range found;
#ifndef __SANITIZE_ADDRESS__
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS)
            *static_cast<Range*>(out) = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
        return 1;  // the executable comes first
      },
      &found);
#endif
  return found;
}

inline std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}
constexpr int default_shared = 48 << 10, most_shared = 99 << 10;  // compute capability 8.6

template <class... P, class... A>
void launch(const char* name, dim3 grid, dim3 block, size_t shared, void (*kernel)(P...), A&&... args) {
  kernel_name = name;
  log_launch(name);
  const auto limit = shared_limits().find(reinterpret_cast<const void*>(kernel));
  set_sizes(grid, block);
  if (size_t{block.x} * block.y * block.z - 1 >= max_threads || block.z > 64) fail("bad block size");
  if (grid.x - 1u >= 0x7fffffffu || grid.y - 1u >= 65535 || grid.z - 1u >= 65535) fail("bad grid size");
  if (shared > static_cast<size_t>(limit == shared_limits().end() ? default_shared : limit->second))
    fail("more dynamic shared memory than cudaFuncSetAttribute allows");
  std::tuple<P...> values(static_cast<P>(args)...);
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...>* values;
  } call{kernel, &values};
  run_thread = [](void* c) { std::apply(static_cast<Call*>(c)->kernel, *static_cast<Call*>(c)->values); };
  run_argument = &call;
  block_size = static_cast<int>(block.x * block.y * block.z);
  scheduler_tsan = this_tsan();
  static const Range statics = static_shared();
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  forget(&fence_tag, 1);
  dynamic_shared = static_cast<unsigned char*>(std::malloc(shared));
  for (uint64_t i = 0; i < blocks; ++i) {
    forget(statics.begin, statics.size);
    forget(dynamic_shared, shared);
    if (statics.size) std::memset(statics.begin, 0xFF, statics.size);
    std::memset(dynamic_shared, 0xFF, shared);
    before(&begin_tag);
    run_block(reversed() ? blocks - 1 - i : i);
  }
  after(&end_tag);
  std::free(dynamic_shared);
}

// ---- warps -------------------------------------------------------------------------------------
template <class T>
T shuffle(int line, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_op(WarpOp::shuffle, line, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() { return current & 31; }
template <class T>
T shuffle_from(int line, unsigned mask, T value, int from, int width = 32) {
  return shuffle(line, mask, value, (lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T>
T shuffle_up(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  const int from = lane() - static_cast<int>(delta);
  return shuffle(line, mask, value, from < (lane() & ~(width - 1)) ? lane() : from);
}
template <class T>
T shuffle_down(int line, unsigned mask, T value, unsigned delta, int width = 32) {
  const int from = lane() + static_cast<int>(delta);
  return shuffle(line, mask, value, from > (lane() | (width - 1)) ? lane() : from);
}
template <class T>
T shuffle_xor(int line, unsigned mask, T value, int lanes, int width = 32) {
  const int from = lane() ^ lanes;
  return shuffle(line, mask, value, from > (lane() | (width - 1)) ? lane() : from);
}
struct SyncWarp {
  int line;
  void operator()(unsigned mask = ~0u) const { warp_op(WarpOp::sync, line, mask, 0, 0); }
};
inline void fence() {
  after(&fence_tag);
  before(&fence_tag);
}

}  // namespace noisyseg::emulator

#define __syncthreads() ((void)::noisyseg::emulator::barrier(__LINE__))
#define __syncthreads_or(p) \
  (int(::noisyseg::emulator::barrier(__LINE__, ::noisyseg::emulator::Vote::any, (p) != 0)))
#define __syncthreads_and(p) \
  (int(::noisyseg::emulator::barrier(__LINE__, ::noisyseg::emulator::Vote::all, (p) != 0)))
#define __syncthreads_count(p) \
  (int(::noisyseg::emulator::barrier(__LINE__, ::noisyseg::emulator::Vote::count, (p) != 0)))
#define NOISYSEG_WARP(op, mask, value) \
  ::noisyseg::emulator::warp_op(::noisyseg::emulator::WarpOp::op, __LINE__, mask, value, 0)
#define __syncwarp \
  ::noisyseg::emulator::SyncWarp { __LINE__ }
#define __ballot_sync(mask, p) (unsigned(NOISYSEG_WARP(ballot, mask, (p) != 0)))
#define __any_sync(mask, p) (int(NOISYSEG_WARP(any, mask, (p) != 0)))
#define __all_sync(mask, p) (int(NOISYSEG_WARP(all, mask, (p) != 0)))
#define __shfl_sync(...) ::noisyseg::emulator::shuffle_from(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) ::noisyseg::emulator::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) ::noisyseg::emulator::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) ::noisyseg::emulator::shuffle_xor(__LINE__, __VA_ARGS__)
#define __threadfence() ::noisyseg::emulator::fence()
#define __threadfence_block() ::noisyseg::emulator::fence()

// ---- atomics: relaxed, on the types that CUDA has them for; none on floats, which have no fixed order ----
#define NOISYSEG_ATOMICS(T)                                                            \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); } \
  inline T atomicSub(T* p, T v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); } \
  NOISYSEG_ATOMIC_BITS(T)
#define NOISYSEG_ATOMIC_BITS(T)                                                        \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }   \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); } \
  inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); } \
  NOISYSEG_ATOMIC_ORDER(T)
#define NOISYSEG_ATOMIC_ORDER(T)                                                                            \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }                    \
  inline T atomicMin(T* p, T v) {                                                                           \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                           \
    while (v < old && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                       \
    return old;                                                                                             \
  }                                                                                                         \
  inline T atomicMax(T* p, T v) {                                                                           \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                           \
    while (old < v && !__atomic_compare_exchange_n(p, &old, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                       \
    return old;                                                                                             \
  }                                                                                                         \
  inline T atomicCAS(T* p, T expected, T v) {                                                               \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                \
    return expected;                                                                                        \
  }
NOISYSEG_ATOMICS(int)
NOISYSEG_ATOMICS(unsigned)
NOISYSEG_ATOMICS(unsigned long long)

// ---- arithmetic --------------------------------------------------------------------------------
template <class To, class From>
inline To noisyseg_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return noisyseg_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return noisyseg_bits<unsigned>(x); }
inline float __int_as_float(int x) { return noisyseg_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return noisyseg_bits<float>(x); }
inline long long __double_as_longlong(double x) { return noisyseg_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return noisyseg_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(std::fmin(T(a), T(b)));
  else
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(std::fmax(T(a), T(b)));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, T v) {
  *p = v;
}

// ---- the runtime: as much of it as host functions use -------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 3; break;  // few, so that loops over the grid do loop
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = noisyseg::emulator::most_shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = noisyseg::emulator::most_shared + 1024; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 6; break;
  }
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > noisyseg::emulator::most_shared) return cudaErrorInvalidValue;
  noisyseg::emulator::shared_limits()[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  return bytes ? std::memset(p, value, bytes) : p, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  return bytes ? std::memcpy(to, from, bytes) : to, cudaSuccess;
}

namespace noisyseg::cuda {
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}
struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};
}  // namespace noisyseg::cuda

#define NOISYSEG_LAUNCH(kernel, grid, block, shared, exec, ...) \
  ((void)(exec),                                                \
   ::noisyseg::emulator::launch(#kernel, grid, block, shared, NOISYSEG_UNPAREN kernel, __VA_ARGS__))
#define NOISYSEG_UNPAREN(...) __VA_ARGS__
#define NOISYSEG_SHARED(type, name) type* name = reinterpret_cast<type*>(::noisyseg::emulator::dynamic_shared)
