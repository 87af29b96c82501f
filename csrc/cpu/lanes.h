// Loads and stores of storage types as whole vectors of floats. Written out rather than left to the compiler: GCC does not
// make vector code of the scalar conversions reliably, and splits the widening ones. In an unnamed namespace for the
// reason given in numeric.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of the header's own vectors: GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/vectors.h"
#include "numeric.h"

namespace vlcache {
namespace {

// kLanes unsigned numbers of 16 or 8 bits.
template <typename T>
struct NarrowLanes {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
using Shorts = NarrowLanes<uint16_t>::type;
using Bytes = NarrowLanes<uint8_t>::type;

#if defined(__AVX512F__)
inline Bits widened(Shorts lanes) { return bits_as<Bits>(_mm512_cvtepu16_epi32(bits_as<__m256i>(lanes))); }
inline Bits widened(Bytes lanes) { return bits_as<Bits>(_mm512_cvtepu8_epi32(bits_as<__m128i>(lanes))); }
inline Shorts low_shorts(Bits lanes) { return bits_as<Shorts>(_mm512_cvtepi32_epi16(bits_as<__m512i>(lanes))); }
inline Bytes low_bytes(Bits lanes) { return bits_as<Bytes>(_mm512_cvtepi32_epi8(bits_as<__m512i>(lanes))); }
#elif defined(__AVX2__)
inline Bits widened(Shorts lanes) { return bits_as<Bits>(_mm256_cvtepu16_epi32(bits_as<__m128i>(lanes))); }
inline Bits widened(Bytes lanes) {
  return bits_as<Bits>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(lanes))));
}
inline Shorts low_shorts(Bits lanes) { return __builtin_convertvector(lanes, Shorts); }
inline Bytes low_bytes(Bits lanes) { return __builtin_convertvector(low_shorts(lanes), Bytes); }
#else
inline Bits widened(Shorts lanes) { return __builtin_convertvector(lanes, Bits); }
inline Bits widened(Bytes lanes) { return __builtin_convertvector(lanes, Bits); }
inline Shorts low_shorts(Bits lanes) { return __builtin_convertvector(lanes, Shorts); }
inline Bytes low_bytes(Bits lanes) { return __builtin_convertvector(lanes, Bytes); }
#endif

inline Floats decoded(Shorts lanes, BFloat16) { return BFloat16Code::decode<Floats>(widened(lanes)); }
inline Shorts encoded(Floats values, BFloat16) { return low_shorts(BFloat16Code::encode<Bits>(values)); }

#if defined(__AVX512F__)
inline Floats decoded(Shorts lanes, Float16) { return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(lanes))); }
inline Shorts encoded(Floats values, Float16) {
  return bits_as<Shorts>(_mm512_cvtps_ph(bits_as<__m512>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Floats decoded(Shorts lanes, Float16) { return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(lanes))); }
inline Shorts encoded(Floats values, Float16) {
  return bits_as<Shorts>(_mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Floats decoded(Shorts lanes, Float16) { return Float16Code::decode<Floats>(widened(lanes)); }
inline Shorts encoded(Floats values, Float16) { return low_shorts(Float16Code::encode<Bits>(values)); }
#endif

inline Floats decoded(Bytes lanes, Float8E4M3) { return E4M3Code::decode<Floats>(widened(lanes)); }
inline Bytes encoded(Floats values, Float8E4M3) { return low_bytes(E4M3Code::encode<Bits>(values)); }
inline Floats decoded(Bytes lanes, Float8E5M2) { return E5M2Code::decode<Floats>(widened(lanes)); }
inline Bytes encoded(Floats values, Float8E5M2) { return low_bytes(E5M2Code::encode<Bits>(values)); }

// kLanes neighbours.
template <typename T>
inline Floats load_stored(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return load(from);
  } else {
    typename NarrowLanes<decltype(T::bits)>::type lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return decoded(lanes, T{});
  }
}

template <typename T>
inline void store_rounded(T* to, Floats values) {
  if constexpr (std::is_same_v<T, float>) {
    store(to, values);
  } else {
    const auto lanes = encoded(values, T{});
    std::memcpy(to, &lanes, sizeof(lanes));
  }
}

// x0 y0 x1 y1 ... in two vectors becomes x0 x1 ... and y0 y1 ...
template <int... kLane>
inline void separate(Floats& a, Floats& b, std::integer_sequence<int, kLane...>) {
  const Floats evens = shuffled<(2 * kLane)...>(a, b);
  b = shuffled<(2 * kLane + 1)...>(a, b);
  a = evens;
}

inline void separate(Floats& a, Floats& b) { separate(a, b, LaneNumbers{}); }

// The inverse of `separate`.
inline void interleave(Floats& a, Floats& b) {
  const Floats first = interleaved<false>(a, b, LaneNumbers{});
  b = interleaved<true>(a, b, LaneNumbers{});
  a = first;
}

}  // namespace
}  // namespace vlcache
