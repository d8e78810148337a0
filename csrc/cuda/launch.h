// Launching kernels: the only place with <<<>>>, so that tests/emulator can run them on the CPU.
#pragma once
#ifdef NOISYSEG_EMULATOR
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "noisyseg/array.h"

namespace noisyseg::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

// Makes the caller's device current for the lifetime of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace noisyseg::cuda

// NOISYSEG_LAUNCH((kernel<T, 3>), grid, block, dynamic shared bytes, exec, arguments...)
#define NOISYSEG_LAUNCH(kernel, grid, block, shared, exec, ...)                                       \
  do {                                                                                                \
    NOISYSEG_UNPAREN kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>((exec).stream)>>>( \
        __VA_ARGS__);                                                                                 \
    ::noisyseg::cuda::check(cudaGetLastError(), #kernel);                                             \
  } while (0)
#define NOISYSEG_UNPAREN(...) __VA_ARGS__

// extern __shared__ memory of the given type: NOISYSEG_SHARED(float, tile);
#define NOISYSEG_SHARED(type, name)                                 \
  extern __shared__ __align__(16) unsigned char noisyseg_shared_[]; \
  type* name = reinterpret_cast<type*>(noisyseg_shared_)
#endif
