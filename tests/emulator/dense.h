// For the drivers: a view of a vector as a contiguous array.
#pragma once
#include <vector>

#include "noisyseg/array.h"

namespace {

template <class T>
noisyseg::Array dense(std::vector<T>& values, noisyseg::DType dtype, const std::vector<int64_t>& shape) {
  noisyseg::Array a;
  a.data = values.data();
  a.dtype = dtype;
  a.rank = static_cast<int>(shape.size());
  int64_t stride = 1;
  for (int d = a.rank - 1; d >= 0; --d) {
    a.shape[d] = shape[static_cast<size_t>(d)];
    a.strides[d] = stride;
    stride *= a.shape[d];
  }
  return a;
}

}  // namespace
