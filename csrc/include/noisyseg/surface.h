// Surface-distance and overlap metrics of pairs of masks.
//
// Masks are (..., *S): the last `spatial_dims` (1 to 3) axes are one mask, the leading ones a batch. dtypes
// u8, b8, i32, i64; nonzero is object; any strides. Label images (..., *S) with `classes` > 0 stand for
// `classes` masks each: item = image * classes + class, the mask of label first_label + class. Throws
// std::invalid_argument on bad arguments; the caller owns all memory, workspaces included.
#pragma once
#include <cmath>

#include "noisyseg/array.h"

namespace noisyseg {

// What a surface is made of.
//   faces: object voxels with a face neighbour outside the object (4 in 2D, 6 in 3D), each of weight 1
//   full:  object voxels with any neighbour outside it (8 in 2D, 26 in 3D), each of weight 1
//   cells: the cells between 2x2(x2) voxel centres that hold object and background, each weighted by the
//   length or
//          area of the marching-squares or -cubes contour in it (Nikolov et al., 2018)
enum class SurfaceKind : int { faces, full, cells };

struct SurfaceOptions {
  static constexpr int max_tolerances = 128;
  SurfaceKind surface = SurfaceKind::faces;
  bool border = true;   // what lies outside the image is background; false: it repeats the image's edge
  bool pooled = false;  // hd_percentile is of all distances; false: the larger of the directed percentiles
  bool interpolate = true;  // linearly between order statistics (not for cells); false: the smallest distance
                            // below or at which lies the share `percentile` of the weight
  bool mean_of_two = false;       // assd and nsd are means of the two directions; false: over all elements
  double missing = HUGE_VAL;      // all distances where one surface is missing
  double spacing[3] = {1, 1, 1};  // of the spatial axes, in their order
  double percentile = 95;         // 0 to 100
  int tolerances = 1;             // of nsd, in the units of spacing; compared in single precision
  int tolerance_classes = 1;      // an item's row of the table is its number modulo this
  double tolerance[max_tolerances] = {1};  // (tolerance_classes, tolerances)
  int64_t classes = 0, first_label = 0;    // of label images; 0: masks
  int64_t first = 0, count = 0;            // the items of this call; count 0: all
};

struct OverlapOptions {
  static constexpr int max_classes = 256;
  // What pred holds: masks or labels as above; logits f16, bf16, f32 or f64 of shape (..., classes, *S), of
  // which the largest wins (argmax; the first of equals) or which count on their own where above `threshold`.
  enum Pred : int { masks, argmax, above } pred = masks;
  double threshold = 0;
  int64_t classes = 0, first_label = 0;  // 0: masks
  bool target_labels = false;            // target (..., *S) holds labels; false: masks (..., classes, *S)
};

// Two steps, so that the second workspace can follow the surfaces' size instead of the image's:
//   surfaces  = alloc(surface_extract_workspace(...));
//   workspace = alloc(surface_extract(..., surfaces));
//   surface_metrics(..., surfaces, workspace, out);
// out: f64 (5 + tolerances, all items): hd, hd_percentile, asd, assd, asd from target to pred, nsd.
// Both buffers aligned to 16 bytes. On CUDA no step waits for the device: the second size is the worst case;
// at most 65535 items in one call.
#define NOISYSEG_SURFACE_FUNCTIONS                                                                         \
  size_t surface_extract_workspace(const Array& pred, int spatial_dims, const SurfaceOptions& options,     \
                                   const Exec& exec);                                                      \
  size_t surface_extract(const Array& pred, const Array& target, int spatial_dims,                         \
                         const SurfaceOptions& options, void* surfaces, const Exec& exec);                 \
  void surface_metrics(const Array& pred, int spatial_dims, const SurfaceOptions& options, void* surfaces, \
                       void* workspace, const Array& out, const Exec& exec);                               \
  /* counts: i64 (items, 3): |pred|, |target|, |pred and target|; out: f64 (6, items): dice, jaccard, */   \
  /* sensitivity, specificity, precision, volume_error */                                                  \
  void overlap_metrics(const Array& pred, const Array& target, int spatial_dims,                           \
                       const OverlapOptions& options, const Array& counts, const Array& out,               \
                       const Exec& exec);

namespace cpu {
NOISYSEG_SURFACE_FUNCTIONS
}
namespace cuda {
NOISYSEG_SURFACE_FUNCTIONS
}
#undef NOISYSEG_SURFACE_FUNCTIONS

}  // namespace noisyseg
