// Fused losses: value and gradient with respect to the logits, on the CPU or a CUDA device.
//
// logits (B, C, *S) f16, bf16, f32 or f64. target: labels (B, *S) u8, b8, i32, i64, or one map for each
// class (B, C, *S) of any type. weight (B, *S) floats and mask (B, *S), 0 meaning "leave this pixel out",
// of any type, are optional. Strides are arbitrary. f64 logits are computed in double, others in float;
// sums are double, taken in an order that depends on the shapes alone.
//
// A loss is region_scale * (a function of sums over pixels) + pixel_scale * (a sum over pixels); either may
// be absent. Both come from one reading of the inputs.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class Activation : int { sigmoid, softmax };
enum class RegionLoss : int { none, nr_dice, dice, focal_dice, generalized_dice };
enum class PixelLoss : int { none, ce, focal, mae, gce, mse, kl, boundary };

struct LossOptions {
  Activation activation = Activation::sigmoid;
  // region part
  RegionLoss region = RegionLoss::none;
  double region_scale = 1;
  double gamma = 1.5;              // exponent of nr_dice, in [1, 2]
  double dice_power = 1;           // focal Dice: 1 / beta
  int volume_power = 2;            // generalized Dice: class weights 1 / volume^this
  bool squared = true;             // denominator sum p^2 + sum g^2, else sum p + sum g
  bool per_image = true;           // else sums run over the batch
  bool include_background = true;  // else channel 0 has no part in the region loss
  double eps = 1e-5;
  // pixel part
  PixelLoss pixel = PixelLoss::none;
  double pixel_scale = 1;
  double parameter = 0;  // q of gce, gamma of focal
  // both
  double label_smoothing = 0;  // g becomes (1 - s) g + s / classes
  bool has_ignore = false;     // pixels with this label are left out
  int64_t ignore = 0;
  bool target_is_logits = false;  // target (B, C, *S) goes through the activation first
};

// image: one value for each image, the mean over its classes or pixels. none: one for each image (if
// per_image) and class in the loss (generalized Dice: each image), or the loss map; not for both parts at
// once.
enum class Reduction : int { mean, sum, none, image };

// Of each image: for each class N, D, G (formulas/losses.h) and the loss's derivatives by N and D; then, as
// if one class more, the pixel loss's weighted sum, what "mean" divides it by, and the factor with which that
// sum enters the loss. The derivatives are those of loss for mean and sum, else of an entry of loss.
constexpr int sums_per_class = 5;

// What a forward call reports.
struct LossReport {
  bool labels_in_range =
      true;           // on a CUDA device, where knowing would need a synchronisation, the loss is NaN
  bool kept = false;  // `keep` holds the gradient for grad_loss = 1
};

// Bytes of scratch memory that the functions with a workspace need, aligned to 16.
size_t loss_workspace(const Array& logits, const Exec& exec);

// loss: f32 or f64, see Reduction. sums: (B, C + 1, 5) f64, for the backward call. class_weight (C,) f32 or
// f64, for the pixel part. keep: like logits, or not given; memory for the gradient, which this call may
// write already: a pixel loss's with mean or sum, in fp32.
LossReport loss_forward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                        const Array& class_weight, const LossOptions& options, Reduction reduction,
                        const Array& loss, const Array& sums, const Array& keep, void* workspace,
                        const Exec& exec);
// grad_loss: as loss. grad: like logits, any strides; if `kept`, the forward call's `keep`, to be scaled.
void loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                   const Array& class_weight, const LossOptions& options, Reduction reduction,
                   const Array& grad_loss, const Array& sums, const Array& grad, bool kept, const Exec& exec);

// Derivatives along a direction logits_dot (like logits), of the two calls above. All in double.
// loss_dot: as loss, the loss's. sums: (B, C + 1, 5, 2) f64, value and derivative.
void loss_tangent(const Array& logits, const Array& logits_dot, const Array& target, const Array& weight,
                  const Array& mask, const Array& class_weight, const LossOptions& options,
                  Reduction reduction, const Array& loss_dot, const Array& sums, void* workspace,
                  const Exec& exec);
// grad_dot: like logits, the gradient's; grad_loss_dot may be absent (0). The loss's Hessian is symmetric, so
// that with grad_loss_dot absent this is its product with logits_dot, times grad_loss.
void loss_backward_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                           const Array& weight, const Array& mask, const Array& class_weight,
                           const LossOptions& options, Reduction reduction, const Array& grad_loss,
                           const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
                           const Exec& exec);

}  // namespace noisyseg
