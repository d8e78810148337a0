// Votes on a pixel as a number, their plurality, and STAPLE's two steps on patterns of votes.
#pragma once
#include "formulas/host_device.h"
#include "noisyseg/labels.h"

namespace noisyseg::formulas {

constexpr int most_raters = 62;  // patterns are below 2^62

struct VoteRules {
  int64_t missing;
  int classes, base;
  bool binary, has_missing;
};

// A vote's digit: 0 to classes - 1, or classes for no vote.
template <class T>
NOISYSEG_FORMULA int digit_of(const VoteRules& rules, T value) {
  const bool none = rules.has_missing & (static_cast<int64_t>(value) == rules.missing);
  if (rules.binary) return none ? 2 : value != 0;
  const uint64_t label = static_cast<uint64_t>(static_cast<int64_t>(value));  // negative ones are huge
  const bool known = !none & (label < static_cast<uint64_t>(rules.classes));
  return known ? static_cast<int>(value) : rules.classes;
}

// base^m for the m-th rater.
NOISYSEG_FORMULA int64_t place_of(int base, int64_t m) {
  int64_t place = 1;
  for (int64_t i = 0; i < m; ++i) place *= base;
  return place;
}

// The label with most votes in a pattern; `tie` says what a tie gives. Without any vote: tie_value, or 0.
NOISYSEG_FORMULA int64_t plurality(int64_t code, int64_t raters, const VoteRules& rules, Tie tie,
                                   int64_t tie_value) {
  int64_t best = 0;
  int most = 0;
  bool tied = false;
  for (int label = 0; label < rules.classes; ++label) {
    int votes = 0;
    int64_t rest = code;
    for (int64_t m = 0; m < raters; ++m, rest /= rules.base) votes += rest % rules.base == label;
    if (votes == 0 || votes < most) continue;
    tied = votes == most;
    if (votes > most || tie == Tie::highest) best = label;
    most = votes;
  }
  if (most == 0) tied = true;
  return tied && tie == Tie::value ? tie_value : most == 0 ? 0 : best;
}

// STAPLE's E-step for one pattern: P(truth = t | votes), t below classes, into weights. theta (M, classes,
// classes): P(vote r | truth t). Warfield, Zou, Wells, IEEE TMI 23(7), 2004, eq. 15, for several labels. The
// product is kept off zero by powers of two, which are exact; votes that theta calls impossible say nothing.
NOISYSEG_FORMULA void posterior(const uint8_t* digits, int64_t raters, int classes, const double* prior,
                                const double* theta, double* weights) {
  for (int t = 0; t < classes; ++t) weights[t] = prior[t];
  for (int64_t m = 0; m < raters; ++m) {
    const int digit = digits[m];
    if (digit == classes) continue;
    double largest = 0;
    for (int t = 0; t < classes; ++t) {
      weights[t] *= theta[(m * classes + t) * classes + digit];
      largest = weights[t] > largest ? weights[t] : largest;
    }
    if (largest < 0x1p-400 && largest > 0)
      for (int t = 0; t < classes; ++t) weights[t] *= 0x1p400;
  }
  double sum = 0;
  for (int t = 0; t < classes; ++t) sum += weights[t];
  for (int t = 0; t < classes; ++t) weights[t] = sum > 0 ? weights[t] / sum : prior[t];
}

// The start of the iterations: the share of a pattern's votes for each label, the prior without any.
NOISYSEG_FORMULA void vote_shares(const uint8_t* digits, int64_t raters, int classes, const double* prior,
                                  double* weights) {
  int votes = 0;
  for (int t = 0; t < classes; ++t) weights[t] = 0;
  for (int64_t m = 0; m < raters; ++m)
    if (digits[m] < classes) weights[digits[m]] += 1, ++votes;
  for (int t = 0; t < classes; ++t) weights[t] = votes ? weights[t] / votes : prior[t];
}

// One rater's P(vote r | truth t) from the expected counts of its votes given t (classes). A truth that never
// occurs was never missed: 1 for r = t.
NOISYSEG_FORMULA double share_of(const double* expected, int classes, int t, int r) {
  double sum = 0;
  for (int s = 0; s < classes; ++s) sum += expected[s];
  return sum > 0 ? expected[r] / sum : r == t;
}

// One rater's sensitivity and specificity for a label against the rest, from expected (classes, classes) at
// [truth, vote]. 0/0 is 1, as in share_of; NaN without any vote.
NOISYSEG_FORMULA void rates_of(const double* expected, int classes, int label, double* sensitivity,
                               double* specificity) {
  double here = 0, others = 0, kept = 0;
  for (int t = 0; t < classes; ++t)
    for (int r = 0; r < classes; ++r) {
      const double n = expected[t * classes + r];
      if (t == label) here += n;
      if (t != label) others += n;
      if (t != label && r != label) kept += n;
    }
  const double nan = NAN;
  *sensitivity = here > 0 ? expected[label * classes + label] / here : here + others > 0 ? 1.0 : nan;
  *specificity = others > 0 ? kept / others : here + others > 0 ? 1.0 : nan;
}

static inline VoteRules rules_of(const VoteOptions& o) {
  if (o.classes < 2 || o.classes > 255) throw std::invalid_argument("classes must be 2 to 255");
  return {o.missing, o.classes, o.classes + o.can_miss, o.binary, o.has_missing};
}

// Patterns are int64: Python's callers stay below 2^62 too.
static inline void check_patterns(const VoteRules& rules, int64_t raters) {
  int64_t most = int64_t{1} << 62;
  for (int64_t m = 0; m < raters; ++m) most /= rules.base;
  if (most < 1)
    throw std::invalid_argument("there are 2^62 possible patterns or more; use fewer raters or classes");
}

}  // namespace noisyseg::formulas
