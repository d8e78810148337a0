// Normalisation and activation in one step, y = act((x - mean) / sqrt(var + eps) * weight + bias), with its
// directional derivative and its gradients. Definition: noisyseg_fast/reference.py.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

// x (B, C, *S) of any floating type, contiguous or channels_last; x_dot of the same type and strides. The
// others are optional, floating: vectors of C values, slope (of the activation where its input is negative)
// of C or one. running_mean and running_var, f32 or f64: the statistics to use, or to update, as the options
// say.
struct NormInputs {
  Array x, x_dot, weight, weight_dot, bias, bias_dot, slope, slope_dot, running_mean, running_var;
};
struct NormOptions {
  bool over_batch = true;  // statistics of a channel over the batch; else of each group of each image
  int64_t groups = 1;      // per image: C is instance norm; not read with over_batch
  bool given = false;      // use the running statistics (with over_batch), which are then left alone
  double momentum = 0.1;   // running = (1 - momentum) running + momentum new
  double eps = 1e-5;
  double slope = 1;  // where no slope array is given: 1 no activation, 0 ReLU, else leaky ReLU
};
// Of each channel (over_batch) or each group of each image: mean, 1 / sqrt(var + eps), and along x_dot the
// mean's derivative and the mean of (x - mean) x_dot.
constexpr int norm_stats = 4;

// Bytes of scratch memory for either call, aligned to 16.
size_t norm_workspace(const NormInputs& in, const NormOptions& options, const Exec& exec);
// y and y_dot like x; either may be absent. stats (C or B groups, norm_stats) f64.
void norm_forward(const NormInputs& in, const NormOptions& options, const Array& y, const Array& y_dot,
                  const Array& stats, void* workspace, const Exec& exec);
// grad_y and grad_x like x; grad_weight, grad_bias (C,) and grad_slope (C,) or (1,), f32 or f64. The
// gradients may be absent. Reads x, weight, bias, slope and the stats of the forward call.
void norm_backward(const NormInputs& in, const NormOptions& options, const Array& grad_y, const Array& stats,
                   const Array& grad_x, const Array& grad_weight, const Array& grad_bias,
                   const Array& grad_slope, void* workspace, const Exec& exec);

}  // namespace noisyseg
