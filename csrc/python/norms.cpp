#include "noisyseg/norms.h"

#include <pybind11/stl.h>

#include <memory>

#include "bind.h"

namespace noisyseg {
namespace {

using Address = std::uintptr_t;

// In the order of the structs in noisyseg/norms.h.
using Arrays = std::array<Array, 10>;
NormInputs inputs_of(const Arrays& a) { return {a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]}; }
using Numbers = std::array<double, 6>;
NormOptions options_of(const Numbers& x) {
  return {x[0] != 0, static_cast<int64_t>(x[1]), x[2] != 0, x[3], x[4], x[5]};
}

// What the caller gives, or on the CPU what is needed.
struct Workspace {
  std::unique_ptr<char[]> own;
  void* data;
  Workspace(Address given, const NormInputs& in, const NormOptions& options, const Exec& exec)
      : own(given || exec.device >= 0 ? nullptr : new char[norm_workspace(in, options, exec)]),
        data(own ? own.get() : reinterpret_cast<void*>(given)) {}
};

}  // namespace

void bind_norms(py::module_& m) {
  m.def("norm_workspace", [](const Arrays& in, const Numbers& options, const Exec& exec) {
    return norm_workspace(inputs_of(in), options_of(options), exec);
  });
  m.def(
      "norm_forward",
      [](const Arrays& in, const Numbers& options, const Array& y, const Array& y_dot, const Array& stats,
         Address workspace, const Exec& exec) {
        const NormInputs inputs = inputs_of(in);
        const NormOptions o = options_of(options);
        norm_forward(inputs, o, y, y_dot, stats, Workspace(workspace, inputs, o, exec).data, exec);
      },
      release_gil());
  m.def(
      "norm_backward",
      [](const Arrays& in, const Numbers& options, const Array& grad_y, const Array& stats,
         const Array& grad_x, const Array& grad_weight, const Array& grad_bias, const Array& grad_slope,
         Address workspace, const Exec& exec) {
        const NormInputs inputs = inputs_of(in);
        const NormOptions o = options_of(options);
        norm_backward(inputs, o, grad_y, stats, grad_x, grad_weight, grad_bias, grad_slope,
                      Workspace(workspace, inputs, o, exec).data, exec);
      },
      release_gil());
}

}  // namespace noisyseg
