#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace noisyseg {
#if defined(__x86_64__)
namespace {
bool has_f16c() {  // __builtin_cpu_supports does not know it in Clang before 15
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
}  // namespace
#endif

Isa isa() {
  static const Isa best = [] {
    Isa found = Isa::baseline;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
        __builtin_cpu_supports("bmi2"))
      found = Isa::avx2;
    if (found == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      found = Isa::avx512;
    if (const char* wish = std::getenv("NOISYSEG_ISA")) {
      if (!std::strcmp(wish, "baseline")) found = Isa::baseline;
      if (!std::strcmp(wish, "avx2") && found == Isa::avx512) found = Isa::avx2;
    }
#endif
    return found;
  }();
  return best;
}

}  // namespace noisyseg
