// Bytes to bits and back.
#pragma once
#include "cpu/isa.h"
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace noisyseg {
namespace {

// Bits of the 64 bytes equal to `value`.
inline uint64_t equal64(const uint8_t* p, uint8_t value) {
#if defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi8(static_cast<char>(value));
  const auto part = [&](const uint8_t* q) -> uint32_t {
    return static_cast<uint32_t>(_mm256_movemask_epi8(
        _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), wanted)));
  };
  return part(p) | static_cast<uint64_t>(part(p + 32)) << 32;
#elif defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(value));
  uint64_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(
                _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)), wanted))))
            << 16 * i;
  return word;
#else
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(p[i] == value) << i;
  return word;
#endif
}

// The lowest eight bits as bytes of 0 and 1: each ends in a byte of its own, and adding 127 carries it to the
// byte's top.
inline uint64_t spread8(uint64_t bits) {
  const uint64_t spread = ((bits & 255) * 0x0101010101010101u & 0x8040201008040201u) + 0x7f7f7f7f7f7f7f7fu;
  return spread >> 7 & 0x0101010101010101u;
}

}  // namespace
}  // namespace noisyseg
