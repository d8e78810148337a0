#include "noisyseg/losses.h"

#include "bind.h"

namespace noisyseg {
namespace {

using Address = std::uintptr_t;

RegionOptions region_options(int kind, int activation, double gamma, bool squared, bool per_image,
                             bool include_background, double eps) {
  return {static_cast<RegionLoss>(kind),
          static_cast<Activation>(activation),
          gamma,
          squared,
          per_image,
          include_background,
          eps};
}
using RegionTuple = std::tuple<int, int, double, bool, bool, bool, double>;

}  // namespace

void bind_losses(py::module_& m) {
  m.def("loss_workspace", &loss_workspace);
  m.def(
      "region_loss_forward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const RegionTuple& options, int reduction, const Array& loss, const Array& sums, Address workspace,
         const Exec& exec) {
        return region_loss_forward(logits, target, weight, mask, std::apply(region_options, options),
                                   static_cast<Reduction>(reduction), loss, sums,
                                   reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "region_loss_backward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const RegionTuple& options, int reduction, const Array& grad_loss, const Array& sums,
         const Array& grad, const Exec& exec) {
        region_loss_backward(logits, target, weight, mask, std::apply(region_options, options),
                             static_cast<Reduction>(reduction), grad_loss, sums, grad, exec);
      },
      release_gil());
  m.def(
      "pixel_loss_forward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const Array& class_weight, int activation, int reduction, const Array& loss, const Array& sums,
         Address workspace, const Exec& exec) {
        return pixel_loss_forward(logits, target, weight, mask, class_weight,
                                  {static_cast<Activation>(activation)}, static_cast<Reduction>(reduction),
                                  loss, sums, reinterpret_cast<void*>(workspace), exec);
      },
      release_gil());
  m.def(
      "pixel_loss_backward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const Array& class_weight, int activation, int reduction, const Array& grad_loss, const Array& sums,
         const Array& grad, const Exec& exec) {
        pixel_loss_backward(logits, target, weight, mask, class_weight, {static_cast<Activation>(activation)},
                            static_cast<Reduction>(reduction), grad_loss, sums, grad, exec);
      },
      release_gil());
}

}  // namespace noisyseg
