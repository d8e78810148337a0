// Arrays in a workspace, one behind the other.
#pragma once
#include <cstddef>
#include <cstdint>

namespace noisyseg::formulas {
namespace {

// Walks through a workspace; with a null base it only adds up.
struct Room {
  char* at;
  size_t bytes = 0;
  template <class T>
  T* take(int64_t n) {
    char* const here = at;
    const size_t taken = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    bytes += taken;
    if (at) at += taken;
    return reinterpret_cast<T*>(here);
  }
};

}  // namespace
}  // namespace noisyseg::formulas
