#include "noisyseg/meta.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace noisyseg {
namespace {

using Address = std::uintptr_t;

// Parameters in the order of the structs in noisyseg/meta.h.
using MaskArrays = std::tuple<Array, Array, Array, Array, Array, Array>;
using MwArrays = std::tuple<Array, Array, Array, Array>;
template <class Net, class Arrays>
Net net_of(const Arrays& t) {
  return std::apply([](const auto&... array) { return Net{array...}; }, t);
}

}  // namespace

void bind_meta(py::module_& m) {
  m.def("ce_dual", &ce_dual, release_gil());
  m.def(
      "mask_net",
      [](const Array& loss, const MaskArrays& net, const Array& weight, const Exec& exec) {
        mask_net(loss, net_of<MaskNet>(net), weight, exec);
      },
      release_gil());
  m.def("mask_net_workspace", [](const Array& loss, const MaskArrays& net, bool attached, const Exec& exec) {
    return mask_net_workspace(loss, net_of<MaskNet>(net), attached, exec);
  });
  m.def(
      "mask_net_vjp",
      [](const Array& grad_weight, const Array& weight, const Array& loss, const MaskArrays& net,
         const Array& grad_net, const Array& grad_loss, Address workspace, const Exec& exec) {
        mask_net_vjp(grad_weight, weight, loss, net_of<MaskNet>(net), grad_net, grad_loss,
                     reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def("mw_net_workspace", [](const Array& loss, const MwArrays& net, const Exec& exec) {
    return mw_net_workspace(loss, net_of<MwNet>(net), exec);
  });
  m.def(
      "mw_net",
      [](const Array& loss, const MwArrays& net, const Array& weight, Address workspace, const Exec& exec) {
        mw_net(loss, net_of<MwNet>(net), weight, reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "mw_net_vjp",
      [](const Array& grad_weight, const Array& weight, const Array& loss, const MwArrays& net,
         const Array& grad_net, const Array& grad_loss, Address workspace, const Exec& exec) {
        mw_net_vjp(grad_weight, weight, loss, net_of<MwNet>(net), grad_net, grad_loss,
                   reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
}

}  // namespace noisyseg
