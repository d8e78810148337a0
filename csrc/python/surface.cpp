#include "noisyseg/surface.h"

#include <pybind11/stl.h>

#include "bind.h"
#include "formulas/surface.h"

#ifdef NOISYSEG_WITH_CUDA
#define NOISYSEG_CALL(function, ...) \
  (exec.device < 0 ? cpu::function(__VA_ARGS__) : cuda::function(__VA_ARGS__))
#else
#define NOISYSEG_CALL(function, ...) cpu::function(__VA_ARGS__)
#endif

namespace noisyseg {
namespace {

void* address(const Array& a) { return a.data; }

// Fields by name, as in the struct; what is not given keeps its default.
SurfaceOptions surface_options(const py::dict& given) {
  SurfaceOptions o;
  for (const auto& [key, value] : given) {
    const std::string name = py::str(key);
    if (name == "surface") {
      const std::string kind = py::str(value);
      o.surface = kind == "cells"  ? SurfaceKind::cells
                  : kind == "full" ? SurfaceKind::full
                                   : SurfaceKind::faces;
    } else if (name == "spacing") {
      int i = 0;
      for (const auto& x : value) o.spacing[i++] = x.cast<double>();
    } else if (name == "tolerance") {  // rows of equal length
      o.tolerances = o.tolerance_classes = 0;
      int i = 0;
      for (const auto& row : value) {
        ++o.tolerance_classes;
        o.tolerances = static_cast<int>(py::len(row));
        for (const auto& x : row) {
          if (i == SurfaceOptions::max_tolerances)
            throw std::invalid_argument("1 to 128 tolerances are supported, classes times tolerances");
          o.tolerance[i++] = x.cast<double>();
        }
      }
    } else if (name == "border") {
      o.border = value.cast<bool>();
    } else if (name == "pooled") {
      o.pooled = value.cast<bool>();
    } else if (name == "interpolate") {
      o.interpolate = value.cast<bool>();
    } else if (name == "mean_of_two") {
      o.mean_of_two = value.cast<bool>();
    } else if (name == "missing") {
      o.missing = value.cast<double>();
    } else if (name == "percentile") {
      o.percentile = value.cast<double>();
    } else if (name == "classes") {
      o.classes = value.cast<int64_t>();
    } else if (name == "first_label") {
      o.first_label = value.cast<int64_t>();
    } else if (name == "first") {
      o.first = value.cast<int64_t>();
    } else if (name == "count") {
      o.count = value.cast<int64_t>();
    } else {
      throw std::invalid_argument("no option " + name);
    }
  }
  return o;
}

OverlapOptions overlap_options(const py::dict& given) {
  OverlapOptions o;
  for (const auto& [key, value] : given) {
    const std::string name = py::str(key);
    if (name == "pred") {
      const std::string kind = py::str(value);
      o.pred = kind == "argmax"  ? OverlapOptions::argmax
               : kind == "above" ? OverlapOptions::above
                                 : OverlapOptions::masks;
    } else if (name == "threshold") {
      o.threshold = value.cast<double>();
    } else if (name == "classes") {
      o.classes = value.cast<int64_t>();
    } else if (name == "first_label") {
      o.first_label = value.cast<int64_t>();
    } else if (name == "target_labels") {
      o.target_labels = value.cast<bool>();
    } else {
      throw std::invalid_argument("no option " + name);
    }
  }
  return o;
}

}  // namespace

void bind_surface(py::module_& m) {
  m.def("surface_extract_workspace",
        [](const Array& pred, int dims, const py::dict& given, const Exec& exec) {
          const SurfaceOptions o = surface_options(given);
          return NOISYSEG_CALL(surface_extract_workspace, pred, dims, o, exec);
        });
  m.def("surface_extract", [](const Array& pred, const Array& target, int dims, const py::dict& given,
                              const Array& surfaces, const Exec& exec) {
    const SurfaceOptions o = surface_options(given);
    const py::gil_scoped_release release;
    return NOISYSEG_CALL(surface_extract, pred, target, dims, o, address(surfaces), exec);
  });
  m.def("surface_metrics", [](const Array& pred, int dims, const py::dict& given, const Array& surfaces,
                              const Array& workspace, const Array& out, const Exec& exec) {
    const SurfaceOptions o = surface_options(given);
    const py::gil_scoped_release release;
    NOISYSEG_CALL(surface_metrics, pred, dims, o, address(surfaces), address(workspace), out, exec);
  });
  m.def("overlap_metrics", [](const Array& pred, const Array& target, int dims, const py::dict& given,
                              const Array& counts, const Array& out, const Exec& exec) {
    const OverlapOptions o = overlap_options(given);
    const py::gil_scoped_release release;
    NOISYSEG_CALL(overlap_metrics, pred, target, dims, o, counts, out, exec);
  });
  m.def("overlap_result", [](int64_t pred, int64_t target, int64_t both, int64_t size) {
    std::array<double, 6> out;
    formulas::overlap_result(pred, target, both, size, out.data(), 1);
    return out;
  });
  // Areas of the cells' contours by code, for the tests.
  m.def("cell_areas", [](const std::array<double, 3>& spacing) {
    std::array<double, 256> areas;
    for (int code = 0; code < 256; ++code) areas[code] = formulas::cell_area(code, spacing.data());
    return areas;
  });
}

}  // namespace noisyseg
