#include "noisyseg/distance.h"

#include <array>

#include "bind.h"

namespace noisyseg {

void bind_distance(py::module_& m) {
  using Address = std::uintptr_t;
  using Spacing = std::tuple<double, double, double>;  // of the spatial axes first, padded with ones
  // In the order of DistanceOptions.
  using Options = std::tuple<bool, double, bool, bool, int, bool, int64_t>;
  const auto values = [](const Spacing& s) {
    return std::array<double, 3>{std::get<0>(s), std::get<1>(s), std::get<2>(s)};
  };
  const auto options = [](const Options& o) {
    DistanceOptions to;
    to.border = std::get<0>(o);
    to.no_site = std::get<1>(o);
    to.squared = std::get<2>(o);
    to.multi_label = std::get<3>(o);
    to.convention = static_cast<SignedMap>(std::get<4>(o));
    to.normalize = std::get<5>(o);
    to.num_classes = std::get<6>(o);
    return to;
  };
  m.def("distance_workspace", [options](const Array& mask, int spatial_dims, const Options& o, bool indices,
                                        bool fp64, const Exec& exec) {
    return distance_workspace(mask, spatial_dims, options(o), indices, fp64, exec);
  });
  m.def(
      "distance_transform_edt",
      [=](const Array& mask, int spatial_dims, const Spacing& spacing, const Options& o, const Array& out,
          const Array& indices, Address workspace, const Exec& exec) {
        distance_transform_edt(mask, spatial_dims, values(spacing).data(), options(o), out, indices,
                               reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "signed_distance_map",
      [=](const Array& mask, int spatial_dims, const Spacing& spacing, const Options& o, const Array& out,
          Address workspace, const Exec& exec) {
        signed_distance_map(mask, spatial_dims, values(spacing).data(), options(o), out,
                            reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def("sampled_distance_workspace", &sampled_distance_workspace);
  m.def(
      "sampled_distance",
      [=](const Array& from, const Array& sites, int spatial_dims, const Spacing& spacing, const Array& out,
          const Array& apexes, Address workspace, const Exec& exec) {
        sampled_distance(from, sites, spatial_dims, values(spacing).data(), out, apexes,
                         reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "sampled_distance_backward",
      [](const Array& grad, const Array& apexes, int spatial_dims, const Array& grad_values,
         Address workspace, const Exec& exec) {
        sampled_distance_backward(grad, apexes, spatial_dims, grad_values, reinterpret_cast<void*>(workspace),
                                  exec);
      },
      release_gil());
}

}  // namespace noisyseg
