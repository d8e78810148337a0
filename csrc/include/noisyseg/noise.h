// What simulated annotation noise needs beyond array operations, on the CPU or a CUDA device: random numbers,
// connected components, contours, polygons and elastic deformation.
//
// Arrays are contiguous. All results are the same bits whatever the device, the threads or the instruction
// set: integer arithmetic, or double precision in a fixed order without contraction. Throws
// std::invalid_argument on bad arguments; the caller owns all memory.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

struct DeformOptions {
  static constexpr int max_points = 64;  // of the grid along one axis
  bool linear = false;                   // between voxels (f32, f64); false: the nearest voxel (any dtype)
  double fill = 0;                       // what lies outside the image
};

#define NOISYSEG_NOISE_FUNCTIONS                                                                             \
  /* out: f32 (B, n), uniform in [0, 1): 24 bits of word i % 4 of Philox4x32-10 at counter */                \
  /* (i / 4, stream) under keys[b]; keys: i64 (B). */                                                        \
  void uniforms(const Array& keys, int stream, const Array& out, const Exec& exec);                          \
  /* mask: u8 or b8 (B, n0, n1, n2), nonzero is object; full: over all 26 neighbours, not 6. labels: i32, */ \
  /* the mask's shape: 0 for background, else 1 + the smallest index within the item in the component. */    \
  void connected_components(const Array& mask, bool full, const Array& labels, const Exec& exec);            \
  /* labels: i32 (B, H, W) of connected_components(full); starts: i64 (P), a component's first pixel as an   \
   */                                                                                                        \
  /* index into labels; phases: f64 (P) in [0, 1). out: i32 (P, n, 2), row and column of n pixels at equal   \
   */                                                                                                        \
  /* arc length on each outer contour, clockwise, the first at `phases` of a step from the start. */         \
  void contour_vertices(const Array& labels, const Array& starts, const Array& phases, const Array& out,     \
                        const Exec& exec);                                                                   \
  size_t fill_workspace(const Array& out, const Exec& exec);                                                 \
  /* vertices: i32 (P, m, 2), row and column in 1/256 pixel, within +-2^29; first: i64 (B + 1), the */       \
  /* polygons of item b are                                                                                  \
   */                                                                                                        \
  /* first[b] to first[b + 1] - 1. out: u8 (B, H, W), zeroed; 1 where a pixel's centre is inside a polygon   \
   */                                                                                                        \
  /* (winding number not 0) or on its edge. */                                                               \
  void fill_polygons(const Array& vertices, const Array& first, const Array& out, void* workspace,           \
                     const Exec& exec);                                                                      \
  /* out(x) = image(affine (x, 1) + u(x)), images (B, n0, n1, n2) of one dtype. coefficients: f64 */         \
  /* (B, 3, p0, p1, p2) of the cubic B-spline u, whose grid spans the image from corner to corner, mirrored  \
   */                                                                                                        \
  /* at its ends; an axis with one point has none. affine: f64 (B, 3, 4). */                                 \
  void deform(const Array& image, const Array& coefficients, const Array& affine,                            \
              const DeformOptions& options, const Array& out, const Exec& exec);

NOISYSEG_NOISE_FUNCTIONS
namespace cpu {
NOISYSEG_NOISE_FUNCTIONS

// mask, out: u8 or b8 (B, n0, n1, n2). out: where sqrt(squared distance) in single precision, as the distance
// transform rounds it, to the nearest voxel of the mask is at most radii[b], or radii[0] for all: f32 (B) or
// (1); erode: where that to the nearest voxel outside the mask is more. dilate_workspace is 0 where so many
// rows of voxels lie within a radius that a distance transform is quicker.
size_t dilate_workspace(const Array& mask, const Array& radii, const double* spacing, const Exec& exec);
void dilate(const Array& mask, const Array& radii, const double* spacing, bool erode, const Array& out,
            void* workspace, const Exec& exec);
}  // namespace cpu
namespace cuda {
NOISYSEG_NOISE_FUNCTIONS
}
#undef NOISYSEG_NOISE_FUNCTIONS

}  // namespace noisyseg
