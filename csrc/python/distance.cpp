#include "noisyseg/distance.h"

#include <array>

#include "bind.h"

namespace noisyseg {

void bind_distance(py::module_& m) {
  using Address = std::uintptr_t;
  using Spacing = std::tuple<double, double, double>;  // of the spatial axes first, padded with ones
  const auto values = [](const Spacing& s) {
    return std::array<double, 3>{std::get<0>(s), std::get<1>(s), std::get<2>(s)};
  };
  m.def("distance_workspace", &distance_workspace);
  m.def(
      "distance_transform_edt",
      [values](const Array& mask, int spatial_dims, const Spacing& spacing, bool squared, const Array& out,
               const Array& indices, Address workspace, const Exec& exec) {
        distance_transform_edt(mask, spatial_dims, values(spacing).data(), squared, out, indices,
                               reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "signed_distance_map",
      [values](const Array& mask, int spatial_dims, const Spacing& spacing, int convention, bool normalize,
               const Array& out, Address workspace, const Exec& exec) {
        signed_distance_map(mask, spatial_dims, values(spacing).data(), static_cast<SignedMap>(convention),
                            normalize, out, reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
}

}  // namespace noisyseg
