#include "noisyseg/surface.h"

#include <pybind11/stl.h>

#include "bind.h"

#ifdef NOISYSEG_WITH_CUDA
#define NOISYSEG_CALL(function, ...) \
  (exec.device < 0 ? cpu::function(__VA_ARGS__) : cuda::function(__VA_ARGS__))
#else
#define NOISYSEG_CALL(function, ...) cpu::function(__VA_ARGS__)
#endif

namespace noisyseg {
namespace {

using Spacing = std::array<double, 3>;

SurfaceOptions options_of(const std::string& definition, const Spacing& spacing, double percentile,
                          double tolerance) {
  SurfaceOptions options;
  options.definition = definition == "medpy" ? SurfaceDefinition::medpy : SurfaceDefinition::monai;
  for (int i = 0; i < 3; ++i) options.spacing[i] = spacing[i];
  options.percentile = percentile;
  options.tolerance = tolerance;
  return options;
}

void* address(const Array& a) { return a.data; }

}  // namespace

void bind_surface(py::module_& m) {
  m.def(
      "surface_extract_workspace",
      [](const Array& pred, int dims, const Exec& exec) {
        return NOISYSEG_CALL(surface_extract_workspace, pred, dims, exec);
      },
      release_gil());
  m.def(
      "surface_extract",
      [](const Array& pred, const Array& target, int dims, const std::string& definition,
         const Spacing& spacing, double percentile, double tolerance, const Array& surfaces,
         const Exec& exec) {
        const SurfaceOptions options = options_of(definition, spacing, percentile, tolerance);
        return NOISYSEG_CALL(surface_extract, pred, target, dims, options, address(surfaces), exec);
      },
      release_gil());
  m.def(
      "surface_metrics",
      [](const Array& pred, int dims, const std::string& definition, const Spacing& spacing,
         double percentile, double tolerance, const Array& surfaces, const Array& workspace, const Array& out,
         const Exec& exec) {
        const SurfaceOptions options = options_of(definition, spacing, percentile, tolerance);
        NOISYSEG_CALL(surface_metrics, pred, dims, options, address(surfaces), address(workspace), out, exec);
      },
      release_gil());
  m.def(
      "overlap_metrics_workspace",
      [](const Array& pred, int dims, const Exec& exec) {
        return NOISYSEG_CALL(overlap_metrics_workspace, pred, dims, exec);
      },
      release_gil());
  m.def(
      "overlap_metrics",
      [](const Array& pred, const Array& target, int dims, const Array& workspace, const Array& out,
         const Exec& exec) {
        NOISYSEG_CALL(overlap_metrics, pred, target, dims, address(workspace), out, exec);
      },
      release_gil());
}

}  // namespace noisyseg
