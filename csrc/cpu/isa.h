// One source, three instruction sets. CMake compiles every file of csrc/cpu three times with
// NOISYSEG_ISA = baseline, avx2 and avx512; each copy lives in the namespace of that name, and
// NOISYSEG_DISPATCH makes the function noisyseg::cpu::NAME that calls the best copy this CPU runs.
//
// Rule: everything in these files and in csrc/formulas is in an unnamed namespace, or static, or
// in namespace NOISYSEG_ISA, and no std:: container or algorithm is instantiated here. A weak symbol
// compiled for AVX-512 could be the one the linker keeps for everybody (tests/test_build.py looks).
#pragma once
#include "noisyseg/array.h"

#ifndef NOISYSEG_ISA
#define NOISYSEG_ISA baseline
#define NOISYSEG_ISA_BASELINE 1
#endif

namespace noisyseg {
enum class Isa : int { baseline, avx2, avx512 };
Isa isa();  // the best one this CPU runs, or what NOISYSEG_ISA in the environment allows
}  // namespace noisyseg

#ifdef NOISYSEG_ISA_BASELINE
#ifdef NOISYSEG_MULTI_ISA
#define NOISYSEG_DISPATCH(Return, name, params, args) \
  namespace noisyseg {                                \
  namespace avx2 {                                    \
  Return name params;                                 \
  }                                                   \
  namespace avx512 {                                  \
  Return name params;                                 \
  }                                                   \
  namespace cpu {                                     \
  Return name params {                                \
    switch (isa()) {                                  \
      case Isa::avx512: return avx512::name args;     \
      case Isa::avx2: return avx2::name args;         \
      default: return baseline::name args;            \
    }                                                 \
  }                                                   \
  }                                                   \
  }
#else
#define NOISYSEG_DISPATCH(Return, name, params, args) \
  namespace noisyseg {                                \
  namespace cpu {                                     \
  Return name params { return baseline::name args; }  \
  }                                                   \
  }
#endif
#else
#define NOISYSEG_DISPATCH(Return, name, params, args)
#endif

// NOISYSEG_API(Return, name, params, args): the dispatch above and the public function noisyseg::name,
// which runs it, or noisyseg::cuda::name, by its last parameter `exec`.
#ifdef NOISYSEG_ISA_BASELINE
#ifdef NOISYSEG_WITH_CUDA
#define NOISYSEG_CALL_CUDA(call) return call
#else
#define NOISYSEG_CALL_CUDA(call) throw std::runtime_error("noisyseg was built without CUDA")
#endif
#define NOISYSEG_API(Return, name, params, args) \
  NOISYSEG_DISPATCH(Return, name, params, args)  \
  namespace noisyseg {                           \
  namespace cuda {                               \
  Return name params;                            \
  }                                              \
  Return name params {                           \
    if (exec.device < 0) return cpu::name args;  \
    NOISYSEG_CALL_CUDA(cuda::name args);         \
  }                                              \
  }
#else
#define NOISYSEG_API(Return, name, params, args)
#endif
