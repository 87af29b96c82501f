// Vectors of floats in the width of the instruction set that a kernel file is compiled for, through the vector extensions
// of GCC and Clang. In an unnamed namespace for the reason given in numeric.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "numeric.h"

namespace vlcache {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));

using LaneNumbers = std::make_integer_sequence<int, kLanes>;

inline Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

inline Floats all(float value) { return value - Floats{}; }

inline Floats largest(Floats a, Floats b) { return a > b ? a : b; }

template <typename To, typename From>
inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// Lane i of the result is lane kIndex[i] of a and b, one behind the other.
template <int... kIndex>
inline Floats shuffled(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, Ints{kIndex...});
#endif
}

template <int... kLane>
inline Ints lane_numbers(std::integer_sequence<int, kLane...>) {
  return Ints{kLane...};
}

// a0 b0 a1 b1 ...: the first or the second half of both.
template <bool kSecond, int... kLane>
inline Floats interleaved(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  return shuffled<(kLane / 2 + kLane % 2 * kLanes + (kSecond ? kLanes / 2 : 0))...>(a, b);
}

template <int kDistance, int... kLane>
inline Floats rotated(Floats a, std::integer_sequence<int, kLane...>) {
  return shuffled<((kLane + kDistance) % kLanes)...>(a, a);
}

template <int kDistance = kLanes / 2>
inline float largest_lane(Floats a) {
  a = largest(a, rotated<kDistance>(a, LaneNumbers{}));
  if constexpr (kDistance > 1) return largest_lane<kDistance / 2>(a);
  return a[0];
}

inline float sum_of_lanes(Floats a) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += a[i];
  return sum;
}

// Rows become columns: log2(kLanes) rounds, each interleaves row i with row i + kLanes / 2.
inline void transpose(Floats (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleaved<false>(rows[i], rows[i + kLanes / 2], LaneNumbers{});
      next[2 * i + 1] = interleaved<true>(rows[i], rows[i + kLanes / 2], LaneNumbers{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// 2^x for x <= 0, to about one unit in the last place; what is no normal float becomes 0, NaN stays NaN.
// x = n + f with |f| <= 1/2; the polynomial is the minimax fit of (2^f - 1) / f by relative error of 2^f.
inline Floats exp2_of_negative(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats p = all(1.32647273e-3f);
  p = p * f + 9.67151279e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  const Bits exponent = (same_bits<Bits>(shifted) << 23) + 0x3f800000u;
  return x < -126.0f ? Floats{} : p * same_bits<Floats>(exponent);
}

// Small arguments by a minimax fit of (tanh(x) - x) / x^3 in x^2, since 1 - 2^... would cancel there.
inline Floats tanh_of(Floats x) {
  const Floats square = x * x;
  Floats p = all(-5.90587e-3f);
  p = p * square + 2.080538e-2f;
  p = p * square - 5.378668e-2f;
  p = p * square + 1.3331958e-1f;
  p = p * square - 3.3333299e-1f;
  const Floats small = x + x * square * p;
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats e = exp2_of_negative(magnitude * -2.885390082f);  // e^(-2 |x|)
  const Floats big = (1.0f - e) / (1.0f + e);
  return magnitude < 0.6f ? small : (x < 0.0f ? -big : big);
}

// kLanes elements of any storage type. They are widened before anything else, so that all is done in whole vectors.
template <typename T>
inline Floats load_lanes(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return load(from);
  } else {
    typedef decltype(T::bits) Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    const Bits wide = __builtin_convertvector(narrow, Bits);
    if constexpr (std::is_same_v<T, BFloat16>) return same_bits<Floats>(wide << 16);
    float values[kLanes];
    uint32_t bits[kLanes];
    std::memcpy(bits, &wide, sizeof(bits));
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) values[i] = to_float(T{decltype(T::bits)(bits[i])});
    return load(values);
  }
}

}  // namespace
}  // namespace vlcache
