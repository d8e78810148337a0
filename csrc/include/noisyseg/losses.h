// Fused losses: value and gradient with respect to the logits, on the CPU or a CUDA device.
//
// logits (B, C, *S) f16, bf16, f32 or f64. target: labels (B, *S) u8, b8, i32, i64, or one map for each
// class (B, C, *S) of any type. weight (B, *S) floats and mask (B, *S), 0 meaning "leave this pixel out",
// of any type, are optional. Strides are arbitrary. f64 logits are computed in double, others in float;
// sums are double, taken in an order that depends on the shapes alone.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class Activation : int { sigmoid, softmax };
enum class RegionLoss : int { nr_dice, dice };

struct RegionOptions {
  RegionLoss kind = RegionLoss::nr_dice;
  Activation activation = Activation::sigmoid;
  double gamma = 1.5;              // exponent of nr_dice, in [1, 2]
  bool squared = true;             // denominator sum p^2 + sum g^2, else sum p + sum g
  bool per_image = true;           // else sums run over the batch
  bool include_background = true;  // else channel 0 has no part in the loss
  double eps = 1e-5;
};

struct PixelOptions {
  Activation activation = Activation::softmax;
};

enum class Reduction : int { mean, sum, none };

// Bytes of scratch memory that the forward functions need, aligned to 16.
size_t loss_workspace(const Array& logits, const Exec& exec);

// sums: (B, C, 2) f64, kept for the backward call. loss: f32 or f64; one value, or with none one for each
// image (if per_image) and each class in the loss. Returns false when a label lies outside 0 .. C-1
// (0 .. 1 for C = 1); on a CUDA device, where knowing that would need a synchronisation, the loss is NaN.
bool region_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const RegionOptions& options, Reduction reduction, const Array& loss,
                         const Array& sums, void* workspace, const Exec& exec);
// grad_loss: as loss. grad: like logits, any strides.
void region_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                          const RegionOptions& options, Reduction reduction, const Array& grad_loss,
                          const Array& sums, const Array& grad, const Exec& exec);

// Cross-entropy. class_weight (C,) f32 or f64 on the same device, optional. sums: (2,) f64, the weighted sum
// and what "mean" divides by. loss: one value, or with none the loss map (B, *S), f32 or f64.
bool pixel_loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const PixelOptions& options, Reduction reduction,
                        const Array& loss, const Array& sums, void* workspace, const Exec& exec);
void pixel_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const Array& class_weight, const PixelOptions& options, Reduction reduction,
                         const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec);

}  // namespace noisyseg
