// What a formula needs to be one text for g++, nvcc and the emulator.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define NOISYSEG_HOST_DEVICE __host__ __device__
#define NOISYSEG_FORMULA static __host__ __device__ __forceinline__
#else
#define NOISYSEG_HOST_DEVICE
#define NOISYSEG_FORMULA static inline __attribute__((always_inline))
#endif
