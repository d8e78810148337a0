#include "noisyseg/labels.h"

#include "bind.h"

#ifdef NOISYSEG_WITH_CUDA
#define NOISYSEG_CALL(function, ...) \
  (exec.device < 0 ? cpu::function(__VA_ARGS__) : cuda::function(__VA_ARGS__))
#else
#define NOISYSEG_CALL(function, ...) cpu::function(__VA_ARGS__)
#endif

namespace noisyseg {

void bind_labels(py::module_& m) {
  using Options = std::tuple<int, bool, bool, bool, int64_t>;  // in the order of VoteOptions
  const auto options_of = [](const Options& o) {
    return VoteOptions{std::get<0>(o), std::get<1>(o), std::get<2>(o), std::get<3>(o), std::get<4>(o)};
  };
  m.def("vote_patterns_workspace",
        [](int64_t slots, const Exec& exec) { return NOISYSEG_CALL(vote_patterns_workspace, slots, exec); });
  m.def(
      "vote_patterns",
      [=](const Array& annotations, const Array& extra, const Array& present, const Options& options,
          const Array& index, const Array& keys, const Array& counts, const Array& workspace,
          const Exec& exec) {
        return NOISYSEG_CALL(vote_patterns, annotations, extra, present, options_of(options), index, keys,
                             counts, workspace.data, exec);
      },
      release_gil());
  m.def(
      "vote_codes",
      [=](const Array& annotations, const Array& extra, const Array& present, const Options& options,
          const Array& codes, const Exec& exec) {
        NOISYSEG_CALL(vote_codes, annotations, extra, present, options_of(options), codes, exec);
      },
      release_gil());
  m.def("staple_workspace", [](int64_t batch, int64_t slots, int64_t raters, int classes, const Exec& exec) {
    return NOISYSEG_CALL(staple_workspace, batch, slots, raters, classes, exec);
  });
  m.def(
      "staple",
      [=](const Array& keys, const Array& counts, int64_t raters, const Options& options, int64_t max_iter,
          double tol, const Array& prior, const Array& values, const Array& labels, const Array& performance,
          const Array& sensitivity, const Array& specificity, const Array& status, const Array& workspace,
          const Exec& exec) {
        NOISYSEG_CALL(staple, keys, counts, raters, options_of(options), StapleOptions{max_iter, tol}, prior,
                      values, labels, performance, sensitivity, specificity, status, workspace.data, exec);
      },
      release_gil());
  m.def(
      "spread",
      [](const Array& index, const Array& values, const Array& out, const Array& labels,
         const Array& labels_out,
         const Exec& exec) { NOISYSEG_CALL(spread, index, values, out, labels, labels_out, exec); },
      release_gil());
  m.def("majority_vote_workspace", [](int64_t slots, const Exec& exec) {
    (void)exec;  // both need the same
    return cpu::majority_vote_workspace(slots);
  });
  m.def(
      "majority_vote",
      [=](const Array& annotations, const Array& present, const Options& options, int tie, int64_t tie_value,
          int64_t slots, const Array& out, const Array& workspace, const Exec& exec) {
        NOISYSEG_CALL(majority_vote, annotations, present, options_of(options), static_cast<Tie>(tie),
                      tie_value, slots, out, workspace.data, exec);
      },
      release_gil());
  m.def(
      "soft_average",
      [=](const Array& annotations, const Array& present, const Array& weights, const Options& options,
          const Array& out, const Exec& exec) {
        NOISYSEG_CALL(soft_average, annotations, present, weights, options_of(options), out, exec);
      },
      release_gil());
}

}  // namespace noisyseg
