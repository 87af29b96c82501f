// Loads and stores of storage types as vectors of floats, whole vectors at a time on every path: compilers do not make
// vector code of the scalar conversions reliably. In an unnamed namespace for the reason given in numeric.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/vectors.h"
#include "numeric.h"

namespace vlcache {
namespace {

template <typename T>
struct CodeOf;
template <>
struct CodeOf<BFloat16> : BFloat16Code {};
template <>
struct CodeOf<Float16> : Float16Code {};
template <>
struct CodeOf<Float8E4M3> : E4M3Code {};
template <>
struct CodeOf<Float8E5M2> : E5M2Code {};

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

// kLanes neighbours.
template <typename T>
inline Floats load_stored(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return load(from);
  } else {
    typedef decltype(T::bits) Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    return CodeOf<T>::template decode<Floats>(__builtin_convertvector(narrow, Bits));
  }
}

template <typename T>
inline void store_rounded(T* to, Floats values) {
  if constexpr (std::is_same_v<T, float>) {
    store(to, values);
  } else {
    typedef decltype(T::bits) Narrow __attribute__((vector_size(kLanes * sizeof(T))));
    const Narrow narrow = __builtin_convertvector(CodeOf<T>::template encode<Bits>(values), Narrow);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
}

}  // namespace
}  // namespace vlcache
