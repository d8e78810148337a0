// Threads and vectors for the CPU kernels.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/isa.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// How many threads `work` elementary steps deserve: below about 32,000 a wake-up costs more than it saves.
inline int threads_for(const Exec& exec, int64_t work) {
#ifdef _OPENMP
  const int available = exec.threads > 0 ? exec.threads : omp_get_max_threads();
  return work < 32768 ? 1 : available;
#else
  (void)exec, (void)work;
  return 1;
#endif
}

}  // namespace
}  // namespace noisyseg::NOISYSEG_ISA
