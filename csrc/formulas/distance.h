// What the CPU and the CUDA distance transforms share.
//
// Both go axis by axis. Along a line, with f_j the squared distance found so far at j, the new one is
// min_j f_j + w^2 (i-j)^2 (Felzenszwalb and Huttenlocher 2012). It is found by looking outwards from i, k =
// 1, 2, ..., until w^2 k^2 alone is no better: exact, and as short as the distance itself.
//
// A signed map takes one such transform, not two: f carries its voxel's class as its sign (f > 0: object).
// Seen from a voxel of class s, a voxel j of the other class is a site itself, so the candidate is max(s f_j,
// 0) + w^2 k^2.
//
// In an image of many labels a voxel j of another label is a site too: candidate w^2 k^2. Within a run of one
// label the lower envelope holds that run's own parabolas; the two voxels next to the run are the sites
// outside it.
#pragma once
#include "formulas/host_device.h"

namespace noisyseg::formulas {

template <class T>
NOISYSEG_FORMULA T squared_step(int64_t k, T w2) {
  return static_cast<T>(k) * static_cast<T>(k) * w2;
}

// The first integer from which parabola j (right of v) lies below parabola v; `end` if that is not before it.
template <class T>
NOISYSEG_FORMULA int64_t first_below(T fj, T fv, int64_t j, int64_t v, T w2, int64_t end) {
  const double crossing = (static_cast<double>(fj) - static_cast<double>(fv)) /
                              (2.0 * static_cast<double>(w2) * static_cast<double>(j - v)) +
                          0.5 * static_cast<double>(j + v);
  if (!(crossing < static_cast<double>(end))) return end;
  return crossing < -1.0 ? -1 : static_cast<int64_t>(crossing + 2.0) - 1;
}

// The lower envelope of the parabolas f(j) + w^2 (i-j)^2 over a <= i, j < b (Felzenszwalb and Huttenlocher
// 2012, algorithm 1, with the integer regions of Meijster et al. 2000): put(i, j of the lowest, -1 if f is
// inf throughout), for i downwards. Linear in b - a. Entry k of the stack is set before and read no later
// than put(a + k): the stack may lie where put writes.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class T, class F, class Stack, class Put>
NOISYSEG_FORMULA void lower_envelope(int64_t a, int64_t b, T w2, const F& f, const Stack& stack,
                                     const Put& put) {
  int64_t top = -1, apex = 0, start = 0;  // the topmost entry
  T at_apex = T(0);
  for (int64_t j = a; j < b; ++j) {
    const T fj = f(j);
    if (!(fj < static_cast<T>(INFINITY))) continue;
    int64_t from = a;
    while (top >= 0) {
      from = first_below(fj, at_apex, j, apex, w2, b);
      if (from > start) break;
      from = a;
      if (--top >= 0) {
        stack.get(top, apex, start);
        at_apex = f(apex);
      }
    }
    if (from >= b) continue;
    ++top, apex = j, start = from, at_apex = fj;
    stack.set(top, apex, start);
  }
  for (int64_t i = b - 1; i >= a; --i) {
    while (top > 0 && i < start) stack.get(--top, apex, start);
    put(i, top < 0 ? int64_t{-1} : apex);
  }
}

// Squared distance from position i of a line of n to the voxel outside the nearer end.
template <class T>
NOISYSEG_FORMULA T squared_to_edge(int64_t i, int64_t n, T w2) {
  return squared_step(i + 1 < n - i ? i + 1 : n - i, w2);
}

// A signed map's value from the distance d >= 0 of a voxel that is inside the object or not.
template <class T>
NOISYSEG_FORMULA T kervadec_value(T d, bool inside) {
  return inside ? T(1) - d : d;
}

}  // namespace noisyseg::formulas
