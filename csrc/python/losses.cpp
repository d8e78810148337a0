#include "noisyseg/losses.h"

#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>

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

namespace {

// A loss on the CPU, of arrays of which all but the addresses is known from an earlier call.
class LossCall {
  static constexpr const char* names[] = {"logits", "target", "weight", "mask", "class_weight"};
  using Addresses = std::array<Address, 5>;  // 0: not given

 public:
  LossCall(const std::array<Array, 5>& inputs, const LossOptions& options, int reduction, const Array& loss,
           const Array& grad)
      : inputs_(inputs),
        loss_(loss),
        grad_(grad),
        options_(options),
        reduction_(static_cast<Reduction>(reduction)),
        sums_(sizeof(double) * 5 * inputs[0].shape[0] * (inputs[0].shape[1] + 1)),
        workspace_(loss_workspace(inputs[0], Exec{})) {}

  // (labels_in_range, kept, sums as a bytearray)
  py::tuple forward(const Addresses& addresses, Address loss, Address keep, int threads) const {
    py::bytearray sums(nullptr, sums_);
    const auto in = inputs(addresses);
    LossReport report;
    {
      py::gil_scoped_release release;
      const std::unique_ptr<char[]> workspace(new char[workspace_]);
      report = run(in, loss, PyByteArray_AS_STRING(sums.ptr()), keep, workspace.get(), threads);
    }
    return py::make_tuple(report.labels_in_range, report.kept, sums);
  }

  // The gradient times grad_loss, which is like the loss.
  void backward(const Addresses& addresses, Address grad_loss, const py::bytearray& sums, Address grad,
                int threads) const {
    const auto in = inputs(addresses);
    py::gil_scoped_release release;
    run_back(in, reinterpret_cast<void*>(grad_loss), PyByteArray_AS_STRING(sums.ptr()), grad, threads);
  }

  // A scalar loss and its gradient; `keeps` says whether the forward call may write the gradient.
  // labels_in_range
  bool value_and_grad(const Addresses& addresses, Address loss, Address grad, bool keeps, int threads) const {
    const auto in = inputs(addresses);
    py::gil_scoped_release release;
    const std::unique_ptr<char[]> workspace(new char[workspace_ + sums_]);
    char* sums = workspace.get() + workspace_;
    const LossReport report = run(in, loss, sums, keeps ? grad : 0, workspace.get(), threads);
    float one = 1;
    double wide_one = 1;
    void* const grad_loss = loss_.dtype == DType::f64 ? static_cast<void*>(&wide_one) : &one;
    if (report.labels_in_range && !report.kept) run_back(in, grad_loss, sums, grad, threads);
    return report.labels_in_range;
  }

 private:
  std::array<Array, 5> inputs(const Addresses& addresses) const {
    std::array<Array, 5> in = inputs_;
    for (size_t i = 0; i < in.size(); ++i) {
      if (in[i].data && !addresses[i])
        throw std::invalid_argument(
            std::string(names[i]) +
            " has no memory of its own (freed, fake or wrapped); pass a plain tensor");
      in[i].data = reinterpret_cast<void*>(addresses[i]);
    }
    return in;
  }
  static Array at(Array array, void* address) {
    array.data = address;
    return array;
  }
  static Array at(const Array& array, Address address) { return at(array, reinterpret_cast<void*>(address)); }

  LossReport run(const std::array<Array, 5>& in, Address loss, void* sums, Address keep, void* workspace,
                 int threads) const {
    return loss_forward(in[0], in[1], in[2], in[3], in[4], options_, reduction_, at(loss_, loss),
                        at(Array{}, sums), at(grad_, keep), workspace, Exec{-1, nullptr, threads});
  }
  void run_back(const std::array<Array, 5>& in, void* grad_loss, void* sums, Address grad,
                int threads) const {
    loss_backward(in[0], in[1], in[2], in[3], in[4], options_, reduction_, at(loss_, grad_loss),
                  at(Array{}, sums), at(grad_, grad), false, Exec{-1, nullptr, threads});
  }

  std::array<Array, 5> inputs_;
  Array loss_, grad_;
  LossOptions options_;
  Reduction reduction_;
  size_t sums_, workspace_;
};

}  // namespace

void bind_losses(py::module_& m) {
  py::class_<LossCall>(m, "LossCall")
      .def(py::init<const std::array<Array, 5>&, const LossOptions&, int, const Array&, const Array&>())
      .def("forward", &LossCall::forward)
      .def("backward", &LossCall::backward)
      .def("value_and_grad", &LossCall::value_and_grad);
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
