// What the fast (losses.cpp) and the exact (losses_exact.cpp) kernels of the losses have in common.
#pragma once
#include "cpu/planes.h"
#include "formulas/dual.h"
#include "formulas/losses.h"

namespace noisyseg::NOISYSEG_ISA {
namespace {

constexpr int buffer_values = 16384;  // a block of all channels
constexpr int64_t max_channels = buffer_values / lanes;
constexpr int sums_per_chunk = 3;  // of each class N, D, G; of the pixel loss the total

struct Planes {
  Plane logits, target, weight, mask, other;  // other: the gradient
  Plane map;                                  // the loss map or the gradient with respect to it
  Plane direction, map_direction;             // of the logits and of that gradient, for derivatives
  bool labels;                                // target holds class numbers
  Layout layout;
};

inline Planes make_planes(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                          const Array& other, const Array& map, const Array& direction = {},
                          const Array& map_direction = {}) {
  Planes p;
  const Array arrays[8] = {logits, target, weight, mask, other, map, direction, map_direction};
  Plane planes[8];
  p.layout = make_layout(arrays, planes, 8);
  p.logits = planes[0], p.target = planes[1], p.weight = planes[2], p.mask = planes[3], p.other = planes[4],
  p.map = planes[5], p.direction = planes[6], p.map_direction = planes[7];
  p.labels = target.rank == logits.rank - 1;
  if (p.layout.channels > max_channels) throw std::invalid_argument("logits has more than 1024 channels");
  return p;
}

inline int64_t first_class(const LossOptions& o, int64_t channels) {
  return channels > 1 && !o.include_background;
}
inline int classes_of(int64_t channels) { return channels == 1 ? 2 : static_cast<int>(channels); }

// Whether "mean" divides by the labels' class weights, as torch does, rather than by the pixels.
inline bool counts_class_weights(const Planes& p, const LossOptions& o, const Array& class_weight) {
  return class_weight && p.labels && o.activation == Activation::softmax &&
         (o.pixel == PixelLoss::ce || o.pixel == PixelLoss::focal || o.pixel == PixelLoss::gce);
}

// From sums of all images (B, C + 1, 5) with N, D, G and the pixel loss's total and count in place: the loss,
// by put(i, value), and the other entries of the sums.
template <class S, class Put>
void finish_loss(const LossOptions& o, Reduction reduction, int64_t batch, int64_t channels, S* sums,
                 const Put& put) {
  const int64_t stride = sums_per_class, image = (channels + 1) * stride, first = first_class(o, channels);
  const auto at = [&](int64_t b, int64_t c) { return sums + b * image + c * stride; };
  const bool region = o.region != RegionLoss::none, joint = o.region == RegionLoss::generalized_dice;
  if (region && !o.per_image)  // every image's sums become the batch's
    for (int64_t c = 0; c < channels; ++c)
      for (int v = 0; v < 3; ++v) {
        S sum = S(0);
        for (int64_t b = 0; b < batch; ++b) sum += at(b, c)[v];
        for (int64_t b = 0; b < batch; ++b) at(b, c)[v] = sum;
      }
  const int64_t items = o.per_image ? batch : 1, entries = joint ? 1 : channels - first;
  const double parts = reduction == Reduction::mean    ? static_cast<double>(items * entries)
                       : reduction == Reduction::image ? static_cast<double>(entries)
                                                       : 1.0;
  const S share = S(o.region_scale / parts);
  S count = S(0), total = S(0);
  for (int64_t b = 0; b < batch; ++b) count += at(b, channels)[1];
  for (int64_t b = 0; b < batch; ++b) {
    S of_image = S(0);
    const auto entry = [&](int64_t i, S loss) {
      if (b < items) of_image += share * loss;
      if (b < items && reduction == Reduction::none) put(b * entries + i, share * loss);
    };
    if (region && joint)
      entry(0, generalized_dice_value(at(b, 0), first, channels, stride, o.volume_power, o.eps));
    for (int64_t c = first; region && c < channels; ++c) {
      S* s = at(b, c);
      if (!joint) {
        const RatioValue<S> value = o.region == RegionLoss::nr_dice
                                        ? nr_dice_value(s[0], s[1], o.eps)
                                        : dice_value(s[0], s[1], o.eps, o.dice_power);
        entry(c - first, value.loss);
        s[3] = value.by_numerator, s[4] = value.by_denominator;
      }
      s[3] = share * s[3], s[4] = share * s[4];
    }
    if (o.pixel != PixelLoss::none) {
      S* s = at(b, channels);
      const S divisor = reduction == Reduction::mean ? count : reduction == Reduction::image ? s[1] : S(1);
      s[2] = divisor == S(0) ? S(0) : S(o.pixel_scale) / divisor;
      of_image += divisor == S(0) ? S(0) : s[2] * s[0];
    }
    if (reduction == Reduction::image) put(b, of_image);
    total += of_image;
  }
  if (reduction == Reduction::mean || reduction == Reduction::sum) put(0, total);
  if (reduction == Reduction::none && region && !o.per_image && batch == 0)
    for (int64_t i = 0; i < entries; ++i) put(i, S(0));
}

// Entry of image b and class c (of those in the loss) of a gradient with respect to the loss; a loss map
// aside.
inline double entry(const Array& grad_loss, const LossOptions& o, Reduction reduction, int64_t b, int64_t c) {
  if (reduction == Reduction::image) return value_at(grad_loss, b * grad_loss.strides[0]);
  if (reduction != Reduction::none) return value_at(grad_loss, 0);
  const bool joint = o.region == RegionLoss::generalized_dice;
  return value_at(grad_loss, (o.per_image ? b * grad_loss.strides[0] : 0) +
                                 (joint ? 0 : c * grad_loss.strides[grad_loss.rank - 1]));
}

// The gradient of image b's parts, from get(c), the entry of class c: by (C, 2) for N and D of each class,
// factor for the pixel loss's sum; with a loss map, factor is to be multiplied by the map's gradient.
template <class S, class Get>
void upstream(const LossOptions& o, Reduction reduction, int64_t b, int64_t channels, const S* sums,
              const Get& get, S* by, S* factor) {
  const int64_t first = first_class(o, channels), image = (channels + 1) * sums_per_class;
  for (int64_t c = 0; c < channels; ++c) {
    const bool in = o.region != RegionLoss::none && c >= first;
    const S g = in ? get(c - first) : S(0);
    const S* s = sums + b * image + c * sums_per_class;
    by[2 * c] = in ? g * s[3] : S(0);
    by[2 * c + 1] = in ? g * s[4] : S(0);
  }
  const S f = sums[b * image + channels * sums_per_class + 2];
  *factor = o.pixel == PixelLoss::none ? S(0) : reduction == Reduction::none ? f : get(0) * f;
}

}  // namespace

// f64 logits, and derivatives along a direction: losses_exact.cpp.
LossReport exact_loss_forward(const Array& logits, const Array& target, const Array& weight,
                              const Array& mask, const Array& class_weight, const LossOptions& options,
                              Reduction reduction, const Array& loss, const Array& sums, void* workspace,
                              const Exec& exec);
void exact_loss_backward(const Array& logits, const Array& target, const Array& weight, const Array& mask,
                         const Array& class_weight, const LossOptions& options, Reduction reduction,
                         const Array& grad_loss, const Array& sums, const Array& grad, const Exec& exec);
void exact_loss_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                        const Array& weight, const Array& mask, const Array& class_weight,
                        const LossOptions& options, Reduction reduction, const Array& loss_dot,
                        const Array& sums, void* workspace, const Exec& exec);
void exact_loss_backward_tangent(const Array& logits, const Array& logits_dot, const Array& target,
                                 const Array& weight, const Array& mask, const Array& class_weight,
                                 const LossOptions& options, Reduction reduction, const Array& grad_loss,
                                 const Array& grad_loss_dot, const Array& sums, const Array& grad_dot,
                                 const Exec& exec);

}  // namespace noisyseg::NOISYSEG_ISA
