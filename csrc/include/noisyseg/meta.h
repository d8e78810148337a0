// What a per-pixel meta-gradient needs besides the network: cross-entropy with its derivative along a
// direction, and the nets that make weights R from a loss map L, forward and reverse, on the CPU or a CUDA
// device.
//
// Strides are arbitrary unless said otherwise. Sums are taken in an order that depends on the shapes alone.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

// loss_dot is the derivative of loss along logits_dot. logits, logits_dot (B, C, *S) floats; target (B, *S)
// labels u8, b8, i32, i64 or one map for each class, of any type; loss, loss_dot (B, *S) f32 or f64, in which
// all is computed. Without softmax each channel counts for itself, and the loss is their mean. Returns
// whether all labels are classes; on a CUDA device, where looking would mean waiting, the loss is NaN where
// they are not.
bool ce_dual(const Array& logits, const Array& logits_dot, const Array& target, bool softmax,
             const Array& loss, const Array& loss_dot, const Exec& exec);

// In all that follows, maps and parameters are all f32 or all f64; parameters are contiguous, and their
// gradient is one contiguous array, in the order of the struct.

// R = sigmoid(w1 . [relu(conv3(L) + b3), relu(conv5(L) + b5), L] + b1) with zeros around L (MCPM's mask net).
struct MaskNet {
  Array w3;  // (K3, 3, 3) or (K3, 3, 3, 3)
  Array b3;  // (K3,)
  Array w5;  // (K5, 5, 5) or (K5, 5, 5, 5)
  Array b5;  // (K5,)
  Array w1;  // (K3 + K5 + 1,)
  Array b1;  // (1,)
};
// maps: (B, H, W) or (B, D, H, W)
void mask_net(const Array& loss, const MaskNet& net, const Array& weight, const Exec& exec);
// Bytes of scratch memory for mask_net_vjp, aligned to 16.
size_t mask_net_workspace(const Array& loss, const MaskNet& net, bool attached, const Exec& exec);
// From the gradient by weight = mask_net(loss): by the parameters, and by loss, if grad_loss is given
// (attached).
void mask_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MaskNet& net,
                  const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec);

// R = sigmoid(w2 . relu(w1 L + b1) + b2), pixel by pixel (Meta-Weight-Net).
struct MwNet {
  Array w1, b1, w2;  // (H,)
  Array b2;          // (1,)
};
constexpr int64_t most_hidden = 1024;
// maps: (B, 1, *S)
size_t mw_net_workspace(const Array& loss, const MwNet& net, const Exec& exec);  // for both, aligned to 16
void mw_net(const Array& loss, const MwNet& net, const Array& weight, void* workspace, const Exec& exec);
void mw_net_vjp(const Array& grad_weight, const Array& weight, const Array& loss, const MwNet& net,
                const Array& grad_net, const Array& grad_loss, void* workspace, const Exec& exec);

}  // namespace noisyseg
