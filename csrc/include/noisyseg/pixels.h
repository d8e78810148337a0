// Statistics over all pixels of a batch that need no sorting: order statistics, and confident learning's
// estimate of which labels are wrong.
//
// An order statistic is found digit by digit: the values become unsigned keys in the same order, a pass
// counts the keys' leading digits, the wanted one's is looked up, the next pass counts the next digit of the
// keys that begin so. Every pass reads the values where they are (any strides with at most three separate
// axes); memory is a few tables of 2^4 to 2^11 counts. Counts are integers: the same bits whatever the
// device, the threads or the instruction set. Values equal to 0 count as +0. Throws std::invalid_argument on
// bad arguments; the caller owns all memory.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

enum class Interpolation : int { linear, lower, higher, midpoint, nearest };  // nearest: to even

struct Quantiles {
  static constexpr int most = 8;
  int count = 1;
  double q[most] = {};  // in [0, 1]
  Interpolation rule = Interpolation::linear;
};

struct TopK {
  int64_t k = 0;  // where no array of them is given
  bool largest = true;
};

enum class Prune : int { both, by_class, by_noise_rate };

// values (rows, 1, *S) of any floating-point dtype; NaN is left out, and so is what lies where mask (null or
// the same shape, any dtype) is 0. Results are contiguous.
// quantile: out (count, rows) of the values' dtype; NaN for rows without values. A workspace for `targets`
//   2 * count, or 1 in the others.
// top_k: counts: null or i64 (rows), a k for each. threshold: null or (rows) of the values' dtype, the k-th
//   largest (smallest) value, the last one where there are fewer, NaN for none or k < 1. chosen: null or u8
//   or b8 (rows, *S), the k largest (smallest), of equal ones the first in the order of the axes.
// confident_joint: probabilities (B, C, *S), C 2 to 255; label (B, *S) u8, b8, i32 or i64. Pixels with a
// label
//   that is no class, or with a probability that is NaN, are left out. counts: i64 (C, C).
// label_errors: wrong: u8 or b8 (B, *S).
#define NOISYSEG_PIXEL_FUNCTIONS                                                                             \
  size_t selection_workspace(const Array& values, int targets, const Exec& exec);                            \
  void quantile(const Array& values, const Array& mask, const Quantiles& quantiles, const Array& out,        \
                void* workspace, const Exec& exec);                                                          \
  void top_k(const Array& values, const Array& mask, const Array& counts, const TopK& options,               \
             const Array& threshold, const Array& chosen, void* workspace, const Exec& exec);                \
  size_t confident_workspace(const Array& probabilities, const Exec& exec);                                  \
  void confident_joint(const Array& probabilities, const Array& label, const Array& counts, void* workspace, \
                       const Exec& exec);                                                                    \
  void label_errors(const Array& probabilities, const Array& label, Prune prune, const Array& wrong,         \
                    void* workspace, const Exec& exec);

NOISYSEG_PIXEL_FUNCTIONS
namespace cpu {
NOISYSEG_PIXEL_FUNCTIONS
}
namespace cuda {
NOISYSEG_PIXEL_FUNCTIONS
}
#undef NOISYSEG_PIXEL_FUNCTIONS

}  // namespace noisyseg
