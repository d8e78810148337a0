// Surface-distance and overlap metrics of pairs of binary masks.
//
// Masks are (..., *S): the last `spatial_dims` (1 to 3) axes are one mask, the leading ones a batch of
// `items` pairs. dtypes u8, b8, i32, i64; nonzero is object; any strides. The surface of a mask is the
// mask without its erosion by the face-connected cross; what lies outside the image is background.
// Throws std::invalid_argument on bad arguments; the caller owns all memory, workspaces included.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class SurfaceDefinition : int { monai, medpy };

struct SurfaceOptions {
  SurfaceDefinition definition = SurfaceDefinition::monai;
  double spacing[3] = {1, 1, 1};  // of the spatial axes, in their order
  double percentile = 95;         // 0 to 100
  double tolerance = 1;           // of nsd, in the units of spacing
};

// Two steps, so that the second workspace can follow the surfaces' size instead of the image's:
//   surfaces  = alloc(surface_extract_workspace(...));
//   workspace = alloc(surface_extract(..., surfaces));
//   surface_metrics(..., surfaces, workspace, out);   out: f64 (5, items): hd, hd_percentile, asd, assd, nsd
// Both buffers aligned to 16 bytes. On CUDA no step waits for the device: the second size is the worst case.
#define NOISYSEG_SURFACE_FUNCTIONS                                                                         \
  size_t surface_extract_workspace(const Array& pred, int spatial_dims, const Exec& exec);                 \
  size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,                         \
                         const SurfaceOptions& options, void* surfaces, const Exec& exec);                 \
  void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces, \
                       void* workspace, const Array& out, const Exec& exec);                               \
  /* out: f64 (6, items): dice, jaccard, sensitivity, specificity, precision, volume_error */              \
  size_t overlap_metrics_workspace(const Array& pred, int spatial_dims, const Exec& exec);                 \
  void overlap_metrics(const Array& pred, const Array& target, int spatial_dims, void* workspace,          \
                       const Array& out, const Exec& exec);

namespace cpu {
NOISYSEG_SURFACE_FUNCTIONS
}
namespace cuda {
NOISYSEG_SURFACE_FUNCTIONS
}
#undef NOISYSEG_SURFACE_FUNCTIONS

}  // namespace noisyseg
