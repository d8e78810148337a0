#include "noisyseg/noise.h"

#include <array>

#include "bind.h"

namespace noisyseg {

void bind_noise(py::module_& m) {
  using Spacing = std::tuple<double, double, double>;
  const auto values = [](const Spacing& s) {
    return std::array<double, 3>{std::get<0>(s), std::get<1>(s), std::get<2>(s)};
  };
  m.def("uniforms", &uniforms, release_gil());
  m.def("connected_components", &connected_components, release_gil());
  m.def("dilate_workspace",
        [=](const Array& mask, const Array& radii, const Spacing& spacing, const Exec& exec) {
          return cpu::dilate_workspace(mask, radii, values(spacing).data(), exec);
        });
  m.def(
      "dilate",
      [=](const Array& mask, const Array& radii, const Spacing& spacing, bool erode, const Array& out,
          std::uintptr_t workspace, const Exec& exec) {
        cpu::dilate(mask, radii, values(spacing).data(), erode, out, reinterpret_cast<void*>(workspace),
                    exec);
      },
      release_gil());
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
