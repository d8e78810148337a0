#include "noisyseg/noise.h"

#include "bind.h"

namespace noisyseg {

void bind_noise(py::module_& m) {
  m.def("uniforms", &uniforms, release_gil());
  m.def("connected_components", &connected_components, release_gil());
  m.def("contour_vertices", &contour_vertices, release_gil());
  m.def("fill_workspace", &fill_workspace);
  m.def(
      "fill_polygons",
      [](const Array& vertices, const Array& first, const Array& out, std::uintptr_t workspace,
         const Exec& exec) { fill_polygons(vertices, first, out, reinterpret_cast<void*>(workspace), exec); },
      release_gil());
  m.def(
      "deform",
      [](const Array& image, const Array& coefficients, const Array& affine, bool linear, double fill,
         const Array& out, const Exec& exec) {
        DeformOptions options;
        options.linear = linear;
        options.fill = fill;
        deform(image, coefficients, affine, options, out, exec);
      },
      release_gil());
}

}  // namespace noisyseg
