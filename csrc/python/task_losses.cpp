#include "noisyseg/task_losses.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace noisyseg {
namespace {

using Address = std::uintptr_t;

// In the order of the structs in noisyseg/task_losses.h; the options as numbers.
using Arrays = std::tuple<Array, Array, Array, Array, Array, Array, Array>;
template <class Inputs>
Inputs inputs_of(const Arrays& t) {
  return std::apply([](const auto&... array) { return Inputs{array...}; }, t);
}
using UncertaintyNumbers = std::array<double, 5>;
UncertaintyOptions options_of(const UncertaintyNumbers& x) {
  return {x[0], x[1], x[2] != 0, x[3], static_cast<TaskReduction>(static_cast<int>(x[4]))};
}
using DualTaskNumbers = std::array<double, 6>;
DualTaskOptions options_of(const DualTaskNumbers& x) {
  return {x[0],
          x[1],
          static_cast<Routing>(static_cast<int>(x[2])),
          x[3] != 0,
          static_cast<TaskReduction>(static_cast<int>(x[4])),
          static_cast<int64_t>(x[5])};
}

}  // namespace

void bind_task_losses(py::module_& m) {
  m.def("uncertainty_workspace", [](const Arrays& in, const Exec& exec) {
    return uncertainty_workspace(inputs_of<UncertaintyInputs>(in), exec);
  });
  m.def(
      "uncertainty_forward",
      [](const Arrays& in, const UncertaintyNumbers& options, const Array& terms, const Array& scores,
         const Array& sums, Address workspace, const Exec& exec) {
        return static_cast<int>(uncertainty_forward(inputs_of<UncertaintyInputs>(in), options_of(options),
                                                    terms, scores, sums, reinterpret_cast<void*>(workspace),
                                                    exec));
      },
      release_gil());
  m.def(
      "uncertainty_backward",
      [](const Arrays& in, const UncertaintyNumbers& options, const Array& grad_terms,
         const Array& grad_terms_dot, const Array& sums, const Array& grad_logits,
         const Array& grad_uncertainty, const Exec& exec) {
        uncertainty_backward(inputs_of<UncertaintyInputs>(in), options_of(options), grad_terms,
                             grad_terms_dot, sums, grad_logits, grad_uncertainty, exec);
      },
      release_gil());
  m.def("dual_task_workspace", [](const Arrays& in, const Exec& exec) {
    return dual_task_workspace(inputs_of<DualTaskInputs>(in), exec);
  });
  m.def(
      "dual_task_forward",
      [](const Arrays& in, const DualTaskNumbers& options, const Array& terms, const Array& sums,
         Address workspace, const Exec& exec) {
        return static_cast<int>(dual_task_forward(inputs_of<DualTaskInputs>(in), options_of(options), terms,
                                                  sums, reinterpret_cast<void*>(workspace), exec));
      },
      release_gil());
  m.def(
      "dual_task_backward",
      [](const Arrays& in, const DualTaskNumbers& options, const Array& grad_terms,
         const Array& grad_terms_dot, const Array& sums, const Array& grad_logits, const Array& grad_sdf,
         const Exec& exec) {
        dual_task_backward(inputs_of<DualTaskInputs>(in), options_of(options), grad_terms, grad_terms_dot,
                           sums, grad_logits, grad_sdf, exec);
      },
      release_gil());
}

}  // namespace noisyseg
