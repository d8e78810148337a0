#include "noisyseg/pixels.h"

#include <pybind11/stl.h>

#include "bind.h"

namespace noisyseg {

void bind_pixels(py::module_& m) {
  m.def("selection_workspace", &selection_workspace);
  m.def(
      "quantile",
      [](const Array& values, const Array& mask, const std::vector<double>& q, int rule, const Array& out,
         const Array& workspace, const Exec& exec) {
        Quantiles quantiles;
        quantiles.count = static_cast<int>(q.size());
        quantiles.rule = static_cast<Interpolation>(rule);
        for (size_t i = 0; i < q.size() && i < Quantiles::most; ++i) quantiles.q[i] = q[i];
        quantile(values, mask, quantiles, out, workspace.data, exec);
      },
      release_gil());
  m.def(
      "top_k",
      [](const Array& values, const Array& mask, const Array& counts, int64_t k, bool largest,
         const Array& threshold, const Array& chosen, const Array& workspace, const Exec& exec) {
        TopK options;
        options.k = k;
        options.largest = largest;
        top_k(values, mask, counts, options, threshold, chosen, workspace.data, exec);
      },
      release_gil());
  m.def("confident_workspace", &confident_workspace);
  m.def(
      "confident_joint",
      [](const Array& probabilities, const Array& label, const Array& counts, const Array& workspace,
         const Exec& exec) { confident_joint(probabilities, label, counts, workspace.data, exec); },
      release_gil());
  m.def(
      "label_errors",
      [](const Array& probabilities, const Array& label, int prune, const Array& wrong,
         const Array& workspace, const Exec& exec) {
        label_errors(probabilities, label, static_cast<Prune>(prune), wrong, workspace.data, exec);
      },
      release_gil());
}

}  // namespace noisyseg
