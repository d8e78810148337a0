// (B, C, *S) arrays of one call as (B, C, rows0, rows1, columns): neighbouring spatial axes that lie
// one behind the other in every array are merged, so that contiguous and channels_last arrays alike
// become one long row, and any other strides still work without a copy.
#pragma once
#include "formulas/host_device.h"
#include "noisyseg/array.h"

namespace noisyseg {

struct Plane {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, channel = 0;
  int64_t step[3] = {};  // strides of the three pixel axes
  NOISYSEG_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

struct Layout {
  int64_t batch = 0, channels = 0;
  int64_t extent[3] = {1, 1, 1};
  NOISYSEG_HOST_DEVICE int64_t pixels() const { return extent[0] * extent[1] * extent[2]; }
};

// At most eight arrays. planes[i] receives arrays[i]; arrays of rank one less than the first have no channel
// axis.
static inline Layout make_layout(const Array* arrays, Plane* planes, int count) {
  const Array& first = arrays[0];
  Layout layout;
  layout.batch = first.shape[0];
  layout.channels = first.shape[1];
  int64_t extent[Array::max_rank], step[8][Array::max_rank];
  int axes = 0;
  for (int axis = 2; axis < first.rank; ++axis) {
    if (first.shape[axis] == 1) continue;
    extent[axes] = first.shape[axis];
    bool merge = axes > 0;
    for (int i = 0; i < count; ++i) {
      const Array& a = arrays[i];
      if (!a) continue;
      step[i][axes] = a.strides[axis - (first.rank - a.rank)];
      merge = merge && step[i][axes - (axes > 0)] == step[i][axes] * extent[axes];
    }
    if (merge) {
      extent[axes - 1] *= extent[axes];
      for (int i = 0; i < count; ++i) step[i][axes - 1] = step[i][axes];
    } else {
      ++axes;
    }
  }
  if (axes > 3)
    throw std::invalid_argument(
        "the arrays' strides leave more than three separate pixel axes; make them contiguous");
  for (int k = 0; k < axes; ++k) layout.extent[3 - axes + k] = extent[k];
  for (int i = 0; i < count; ++i) {
    const Array& a = arrays[i];
    if (!a) continue;
    Plane& p = planes[i];
    p.data = static_cast<char*>(a.data);
    p.dtype = a.dtype;
    p.batch = a.strides[0];
    p.channel = a.rank == first.rank ? a.strides[1] : 0;
    for (int k = 0; k < axes; ++k) p.step[3 - axes + k] = step[i][k];
  }
  return layout;
}

}  // namespace noisyseg
