// Fused losses that join several maps: UMA-Net's uncertainty-weighted loss and DTML's dual-task loss, values
// and gradients, on the CPU or a CUDA device.
//
// Floats are f16, bf16, f32 or f64, annotations and labels of any type; integers must be 0 or 1. Strides are
// arbitrary. Computed in double if a differentiable input is f64, else in float; sums are double, taken in an
// order that depends on the shapes alone.
//
// With a direction (a `_dot` array of an input, like that input) every result is its derivative along that
// direction instead, computed in double; all `sums` are then pairs (value, derivative).
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class TaskReduction : int { mean, sum, image };  // image: one value for each image
enum class TaskFault : int { none, labels, raters };

constexpr int64_t max_raters = 512;

struct UncertaintyInputs {
  Array logits;                       // (B, 1, *S)
  Array uncertainty;                  // (B, M, *S)
  Array annotations;                  // (B, M, *S)
  Array raters;                       // (B, M), weights >= 0, 0 for a map that is not there; optional
  Array mask;                         // (B, *S), 0 meaning "leave this pixel out"; optional
  Array logits_dot, uncertainty_dot;  // a direction; either or both may be absent
  bool direction() const { return logits_dot.rank > 0 || uncertainty_dot.rank > 0; }  // even if of no pixels
};
struct UncertaintyOptions {
  double dice_weight = 1, consistency_weight = 1;
  bool binary_entropy = false;  // confidence: the mean binary entropy, else the paper's eq. 6
  double eps = 1e-5;            // added to the Dice terms' denominators
  TaskReduction reduction = TaskReduction::mean;
};
constexpr int uncertainty_sums(int64_t maps) { return static_cast<int>(7 + 2 * maps); }

// Bytes of scratch memory for uncertainty_forward, aligned to 16.
size_t uncertainty_workspace(const UncertaintyInputs& in, const Exec& exec);
// terms: total, ce, dice, consistency, (4,) or (4, B), f32 or f64. scores: confidence, agreement (2, B), like
// terms; absent with a direction. sums: (B, uncertainty_sums(M)) f64, for the backward call. On a CUDA
// device, where looking at values would mean waiting, a fault makes the terms NaN instead.
TaskFault uncertainty_forward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                              const Array& terms, const Array& scores, const Array& sums, void* workspace,
                              const Exec& exec);
// grad_terms (and its direction, optional): as terms. grad_logits, grad_uncertainty: like their inputs, any
// strides; either may be absent.
void uncertainty_backward(const UncertaintyInputs& in, const UncertaintyOptions& options,
                          const Array& grad_terms, const Array& grad_terms_dot, const Array& sums,
                          const Array& grad_logits, const Array& grad_uncertainty, const Exec& exec);

// Which network the consistency term teaches, and how much.
enum class Routing : int { own, shared, logits, sdf };

struct DualTaskInputs {
  Array logits, sdf;          // (B, 1, *S)
  Array target;               // (B, 1, *S)
  Array labelled;             // (B,), not 0 for a labelled image; optional: else the first labelled_count
  Array mask;                 // as above
  Array logits_dot, sdf_dot;  // a direction
  bool direction() const { return logits_dot.rank > 0 || sdf_dot.rank > 0; }
};
struct DualTaskOptions {
  double k = 1500;  // the distance map becomes sigmoid(-k sdf)
  double eps = 1e-5;
  Routing routing = Routing::own;
  bool per_image = false;  // else all sums run over the batch
  TaskReduction reduction = TaskReduction::mean;
  int64_t labelled_count = 0;
};
constexpr int dual_task_sums = 10;

size_t dual_task_workspace(const DualTaskInputs& in, const Exec& exec);
// terms: seg, mask, consistency, (3,) or (3, B). sums: (B, 10) f64.
TaskFault dual_task_forward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& terms,
                            const Array& sums, void* workspace, const Exec& exec);
void dual_task_backward(const DualTaskInputs& in, const DualTaskOptions& options, const Array& grad_terms,
                        const Array& grad_terms_dot, const Array& sums, const Array& grad_logits,
                        const Array& grad_sdf, const Exec& exec);

}  // namespace noisyseg
