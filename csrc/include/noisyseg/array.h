// Array views and execution context: the types that every function of the C++ API takes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace noisyseg {

enum class DType : int { u8, b8, i32, i64, f16, bf16, f32, f64 };

inline constexpr int dtype_size(DType t) {
  switch (t) {
    case DType::u8:
    case DType::b8: return 1;
    case DType::f16:
    case DType::bf16: return 2;
    case DType::i32:
    case DType::f32: return 4;
    default: return 8;
  }
}

// A strided view of memory that somebody else owns. Strides count elements, may be 0 or negative.
// data == nullptr with rank 0 stands for "not given" where an argument is optional.
struct Array {
  static constexpr int max_rank = 8;
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  int64_t shape[max_rank] = {};
  int64_t strides[max_rank] = {};

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

// Where a call runs. The caller owns the stream and all memory, workspaces included.
struct Exec {
  int device = -1;         // -1: CPU, otherwise the CUDA device's ordinal
  void* stream = nullptr;  // cudaStream_t
  int threads = 0;         // CPU threads; 0: OpenMP's own default
};

}  // namespace noisyseg
