#include "noisyseg/losses.h"

#include "bind.h"

namespace pybind11::detail {

// A tuple of numbers, in the order of losses.Options.
template <>
struct type_caster<noisyseg::LossOptions> {
  PYBIND11_TYPE_CASTER(noisyseg::LossOptions, const_name("tuple"));
  bool load(handle source, bool) {
    constexpr Py_ssize_t count = 17;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != count) return false;
    double x[count];
    for (Py_ssize_t i = 0; i < count; ++i) x[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(source.ptr(), i));
    if (PyErr_Occurred()) return false;
    const auto whole = [&](int i) { return static_cast<int>(x[i]); };
    value.activation = static_cast<noisyseg::Activation>(whole(0));
    value.region = static_cast<noisyseg::RegionLoss>(whole(1));
    value.region_scale = x[2];
    value.gamma = x[3];
    value.dice_power = x[4];
    value.volume_power = whole(5);
    value.squared = x[6] != 0;
    value.per_image = x[7] != 0;
    value.include_background = x[8] != 0;
    value.eps = x[9];
    value.pixel = static_cast<noisyseg::PixelLoss>(whole(10));
    value.pixel_scale = x[11];
    value.parameter = x[12];
    value.label_smoothing = x[13];
    value.has_ignore = x[14] != 0;
    value.ignore = static_cast<int64_t>(x[15]);
    value.target_is_logits = x[16] != 0;
    return true;
  }
};

}  // namespace pybind11::detail

namespace noisyseg {

using Address = std::uintptr_t;

void bind_losses(py::module_& m) {
  m.def("loss_workspace", &loss_workspace);
  m.def(
      "loss_forward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const Array& class_weight, const LossOptions& options, int reduction, const Array& loss,
         const Array& sums, const Array& keep, Address workspace, const Exec& exec) {
        const LossReport report = loss_forward(logits, target, weight, mask, class_weight, options,
                                               static_cast<Reduction>(reduction), loss, sums, keep,
                                               reinterpret_cast<void*>(workspace), exec);
        return std::make_pair(report.labels_in_range, report.kept);
      },
      release_gil());
  m.def(
      "loss_backward",
      [](const Array& logits, const Array& target, const Array& weight, const Array& mask,
         const Array& class_weight, const LossOptions& options, int reduction, const Array& grad_loss,
         const Array& sums, const Array& grad, bool kept, const Exec& exec) {
        loss_backward(logits, target, weight, mask, class_weight, options, static_cast<Reduction>(reduction),
                      grad_loss, sums, grad, kept, exec);
      },
      release_gil());
  m.def(
      "loss_tangent",
      [](const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
         const Array& mask, const Array& class_weight, const LossOptions& options, int reduction,
         const Array& loss_dot, const Array& sums, Address workspace, const Exec& exec) {
        loss_tangent(logits, logits_dot, target, weight, mask, class_weight, options,
                     static_cast<Reduction>(reduction), loss_dot, sums, reinterpret_cast<void*>(workspace),
                     exec);
      },
      release_gil());
  m.def(
      "loss_backward_tangent",
      [](const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
         const Array& mask, const Array& class_weight, const LossOptions& options, int reduction,
         const Array& grad_loss, const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
         const Exec& exec) {
        loss_backward_tangent(logits, logits_dot, target, weight, mask, class_weight, options,
                              static_cast<Reduction>(reduction), grad_loss, grad_loss_dot, sums, grad_dot,
                              exec);
      },
      release_gil());
}

}  // namespace noisyseg
