// Fusing the masks that several raters drew of one image.
//
// Annotations are (B, M, *S): M raters, dtypes u8, b8, i32, i64, any strides. A rater's vote on a pixel is a
// digit: its label, or `classes` for "no vote". The votes on a pixel are its pattern, the number
// sum_m digit_m base^m; images have few distinct ones, so that everything iterative works on their counts.
// `present` is null or (B, M), not 0 where the rater's mask counts. Throws std::invalid_argument on bad
// arguments; the caller owns all memory, workspaces included.
#pragma once
#include "noisyseg/array.h"

namespace noisyseg {

struct VoteOptions {
  int classes = 2;        // labels 0 to classes - 1, at most 255; any other is no vote
  bool binary = true;     // two classes, and whatever is not 0 is label 1
  bool can_miss = false;  // patterns have a digit for "no vote": needed for all of present, missing, !binary
  bool has_missing = false;  // the value `missing` is no vote
  int64_t missing = 0;
};

enum class Tie : int { value, lowest, highest };  // a given label, or the lowest or highest of the tied ones

struct StapleOptions {
  int64_t max_iter = 10000;
  double tol = 1e-7;  // stop when no entry of a rater's performance changes by more
};

// vote_patterns: index (B, pixels) u8 or i32, contiguous, each pixel's slot; counts (B, slots) i64, the
// pixels
//   of each slot. Without keys a slot is a pattern and slots = base^(raters). With keys (B, slots) i64, CPU
//   only, slots is a power of two from 2 on: a hash table, keys the patterns; false where more than half of
//   it would be filled. extra: null or (B, *S), one more rater, the last.
// vote_codes: codes (B, pixels) i64, each pixel's pattern.
// staple: EM (Warfield et al., 2004) over the patterns of slots whose count is not 0. prior: null (the mean
// of
//   all votes) or f64 (classes). values: f64 (B, slots, channels), the posterior of label 1 (channels = 1,
//   two classes) or of each label; labels: i64 (B, slots), the likeliest, the lowest of equals. performance:
//   f64 (B, M, classes, classes), P(rater says r | truth is t) at [m, t, r]; sensitivity, specificity: f64
//   (B, M, classes), each label against the rest; NaN for raters without a vote. status: i32 (B, 2),
//   iterations and whether they converged.
// spread: out (B, channels, pixels) f32 or f64 and labels_out (B, pixels) of any label dtype, contiguous:
// what
//   values and labels hold for each pixel's slot. Either pair may be null.
// majority_vote: out (B, *S) of the annotations' dtype, contiguous. slots: base^M if at most 65536, else 0.
// soft_average: sum_m w x / sum_m w over the votes on a pixel, 0 without any; out (B, channels, *S) f32 or
// f64,
//   contiguous. x is whether the value is not 0, the value itself in annotations of any floating-point dtype
//   (NaN is no vote), or with !binary whether it is the channel's label. weights: null or f64 (B, M).
#define NOISYSEG_LABEL_FUNCTIONS                                                                             \
  size_t vote_patterns_workspace(int64_t slots, const Exec& exec);                                           \
  bool vote_patterns(const Array& annotations, const Array& extra, const Array& present,                     \
                     const VoteOptions& options, const Array& index, const Array& keys, const Array& counts, \
                     void* workspace, const Exec& exec);                                                     \
  void vote_codes(const Array& annotations, const Array& extra, const Array& present,                        \
                  const VoteOptions& options, const Array& codes, const Exec& exec);                         \
  size_t staple_workspace(int64_t batch, int64_t slots, int64_t raters, int classes, const Exec& exec);      \
  void staple(const Array& keys, const Array& counts, int64_t raters, const VoteOptions& options,            \
              const StapleOptions& em, const Array& prior, const Array& values, const Array& labels,         \
              const Array& performance, const Array& sensitivity, const Array& specificity,                  \
              const Array& status, void* workspace, const Exec& exec);                                       \
  void spread(const Array& index, const Array& values, const Array& out, const Array& labels,                \
              const Array& labels_out, const Exec& exec);                                                    \
  size_t majority_vote_workspace(int64_t slots);                                                             \
  void majority_vote(const Array& annotations, const Array& present, const VoteOptions& options, Tie tie,    \
                     int64_t tie_value, int64_t slots, const Array& out, void* workspace, const Exec& exec); \
  void soft_average(const Array& annotations, const Array& present, const Array& weights,                    \
                    const VoteOptions& options, const Array& out, const Exec& exec);

namespace cpu {
NOISYSEG_LABEL_FUNCTIONS
}
namespace cuda {
NOISYSEG_LABEL_FUNCTIONS
}
#undef NOISYSEG_LABEL_FUNCTIONS

}  // namespace noisyseg
