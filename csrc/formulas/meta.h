// Cross-entropy with its derivative along a direction, and the last step of the weight nets, one pixel at a
// time: the only place where these formulas stand in C++. Definitions: noisyseg_fast/reference.py.
#pragma once
#include "formulas/dtype.h"
#include "noisyseg/meta.h"

namespace noisyseg::formulas {

template <class T>
struct LossDot {
  T loss, dot;
};

// softplus(z) - g z and (sigmoid(z) - g) dz, for labels g in [0, 1]; e = e^-|z|. No cancellation at either
// end.
template <class T>
NOISYSEG_FORMULA LossDot<T> binary_ce_dual(T z, T dz, T g, T e) {
  const T large = T(1) / (T(1) + e), small = e * large;
  const T p = z >= T(0) ? large : small, q = z >= T(0) ? small : large;
  const T off = q < p ? (T(1) - g) - q : p - g;
  return {max_(z, T(0)) - g * z + log1p_(e, large), off * dz};
}

// -sum g ln p and its derivative for p = softmax(z), from the sums over the classes: e^(z - top), that times
// dz, g, g (z - top), g dz.
template <class T>
NOISYSEG_FORMULA LossDot<T> softmax_ce_dual(T sum, T sum_dot, T mass, T picked, T picked_dot) {
  return {mass * log_(sum) - picked, mass * (sum_dot / sum) - picked_dot};
}

template <class T>
NOISYSEG_FORMULA T sigmoid_of(T z) {
  const T e = exp_(-abs_(z));
  return (z >= T(0) ? T(1) : e) / (T(1) + e);
}
// The gradient by the logit of r = sigmoid(logit).
template <class T>
NOISYSEG_FORMULA T by_logit(T grad, T r) {
  return grad * (r * (T(1) - r));
}
template <class T>
NOISYSEG_FORMULA T relu(T x) {
  return x < T(0) ? T(0) : x;  // NaN stays NaN
}

// Where the parameters of a mask net begin in its gradient.
struct MaskNetLayout {
  int64_t k3, k5, taps3, taps5;
  int64_t w3, b3, w5, b5, w1, b1, size;
};
NOISYSEG_FORMULA MaskNetLayout mask_net_layout(const MaskNet& net) {
  MaskNetLayout o;
  o.k3 = net.w3.shape[0], o.k5 = net.w5.shape[0];
  o.taps3 = net.w3.rank == 4 ? 27 : 9, o.taps5 = net.w3.rank == 4 ? 125 : 25;
  o.w3 = 0, o.b3 = o.w3 + o.k3 * o.taps3;
  o.w5 = o.b3 + o.k3, o.b5 = o.w5 + o.k5 * o.taps5;
  o.w1 = o.b5 + o.k5, o.b1 = o.w1 + o.k3 + o.k5 + 1;
  o.size = o.b1 + 1;
  return o;
}

// The nets' parameters.
template <class T>
struct MaskWeights {
  const T *w3, *b3, *w5, *b5, *w1, *b1;
  MaskNetLayout at;
};
template <class T>
NOISYSEG_FORMULA MaskWeights<T> mask_weights(const MaskNet& net) {
  const auto of = [](const Array& a) { return static_cast<const T*>(a.data); };
  return {of(net.w3), of(net.b3), of(net.w5), of(net.b5), of(net.w1), of(net.b1), mask_net_layout(net)};
}
template <class T>
struct MwWeights {
  const T *w1, *b1, *w2, *b2;
  int64_t hidden;
};
template <class T>
NOISYSEG_FORMULA MwWeights<T> mw_weights(const MwNet& net) {
  const auto of = [](const Array& a) { return static_cast<const T*>(a.data); };
  return {of(net.w1), of(net.b1), of(net.w2), of(net.b2), net.w1.shape[0]};
}
// The gradient of unit j's parameters from the sums of s and s L over the pixels where it is on, s the
// gradient by the logit: grad (w1, b1, w2), H numbers each.
template <class T>
NOISYSEG_FORMULA void mw_unit_gradient(const MwWeights<T>& net, int64_t j, double s, double s_loss, T* grad) {
  const double w1 = static_cast<double>(net.w1[j]), b1 = static_cast<double>(net.b1[j]);
  const double w2 = static_cast<double>(net.w2[j]);
  grad[j] = static_cast<T>(w2 * s_loss);
  grad[net.hidden + j] = static_cast<T>(w2 * s);
  grad[2 * net.hidden + j] = static_cast<T>(w1 * s_loss + b1 * s);
}

// A map as (B, D, H, W), D = 1 in two dimensions.
struct Volume {
  char* data;
  int64_t strides[4];
};
struct Extent {
  int64_t batch, size[3];  // D, H, W
  NOISYSEG_HOST_DEVICE int64_t pixels() const { return size[0] * size[1] * size[2]; }
};
NOISYSEG_FORMULA Volume volume_of(const Array& a) {
  const bool deep = a.rank == 4;
  return {static_cast<char*>(a.data),
          {a.strides[0], deep ? a.strides[1] : 0, a.strides[a.rank - 2], a.strides[a.rank - 1]}};
}
NOISYSEG_FORMULA Extent extent_of(const Array& a) {
  return {a.shape[0], {a.rank == 4 ? a.shape[1] : 1, a.shape[a.rank - 2], a.shape[a.rank - 1]}};
}

}  // namespace noisyseg::formulas
