// Storage types <-> float, on the host and on the device: to nearest, ties to even, and 8-bit floats saturate (infinity
// becomes the largest value; NaN stays NaN).
//
// Everything sits in an unnamed namespace: kernel files are compiled once per instruction set, and a function with
// external linkage would survive in one copy only, whichever the linker meets first.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#endif

namespace vlcache {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

template <typename To, typename From>
VLCACHE_HOST_DEVICE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither added nor lost");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

VLCACHE_HOST_DEVICE float float_of_bits(uint32_t bits) { return bits_as<float>(bits); }

VLCACHE_HOST_DEVICE uint32_t bits_of_float(float value) { return bits_as<uint32_t>(value); }

// Floats and their bits: float and uint32_t, or vectors of them (cpu/lanes.h).

// An IEEE-like format of kMantissa + kExponent + 1 bits. Magnitudes past kLimit become kLimit, NaN becomes kNan;
// magnitudes from kSpecial on are infinity or NaN.
template <int kMantissa, int kExponent, uint32_t kSpecial, uint32_t kLimit, uint32_t kNan>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kMagnitude = (1u << (kMantissa + kExponent)) - 1;
  static constexpr uint32_t kRebias = uint32_t(127 - kBias) << 23;
  // The bits of a float whose last one is worth as much as the last bit of a subnormal number.
  static constexpr uint32_t kUnits = uint32_t(127 - (kBias - 1) - kMantissa + 23) << 23;

  template <typename Float, typename Bits>
  static VLCACHE_HOST_DEVICE Float decode(Bits bits) {
    const Bits magnitude = bits & kMagnitude;
    const Bits sign = (bits >> (kMantissa + kExponent)) << 31;
    const Bits normal = (magnitude << kShift) + kRebias;
    const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude | kUnits) - float_of_bits(kUnits));
    const Bits finite = magnitude < (1u << kMantissa) ? subnormal : normal;
    return bits_as<Float>(sign | (magnitude >= kSpecial ? normal | 0x7f800000u : finite));
  }

  template <typename Bits, typename Float>
  static VLCACHE_HOST_DEVICE Bits encode(Float value) {
    const Bits bits = bits_as<Bits>(value);
    const Bits magnitude = bits & 0x7fffffffu;
    const Bits sign = (bits >> 31) << (kMantissa + kExponent);
    const Bits odd = (magnitude >> kShift) & 1u;
    const Bits normal = (magnitude + odd + ((1u << (kShift - 1)) - 1 - kRebias)) >> kShift;
    // The adder rounds subnormals: the last bit of the sum is worth one unit of theirs.
    const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude) + float_of_bits(kUnits)) - kUnits;
    const Bits rounded = magnitude < kRebias + (1u << 23) ? subnormal : normal;
    const Bits limited = rounded < kLimit ? rounded : Bits{} + kLimit;
    return sign | (magnitude > 0x7f800000u ? Bits{} + kNan : limited);
  }
};

struct BFloat16Code {
  template <typename Float, typename Bits>
  static VLCACHE_HOST_DEVICE Float decode(Bits bits) {
    return bits_as<Float>(bits << 16);
  }

  template <typename Bits, typename Float>
  static VLCACHE_HOST_DEVICE Bits encode(Float value) {
    const Bits bits = bits_as<Bits>(value);
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded;
  }
};

using Float16Code = SmallFloat<10, 5, 0x7c00, 0x7c00, 0x7e00>;  // rounds to infinity, as IEEE says
using E4M3Code = SmallFloat<3, 4, 0x7f, 0x7e, 0x7f>;            // largest 448, no infinity
using E5M2Code = SmallFloat<2, 5, 0x7c, 0x7b, 0x7f>;            // largest finite 57344

VLCACHE_HOST_DEVICE float to_float(float value) { return value; }

VLCACHE_HOST_DEVICE float to_float(BFloat16 value) { return BFloat16Code::decode<float>(uint32_t(value.bits)); }

VLCACHE_HOST_DEVICE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return Float16Code::decode<float>(uint32_t(value.bits));
#endif
}

VLCACHE_HOST_DEVICE float to_float(Float8E4M3 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E4M3)));
#else
  return E4M3Code::decode<float>(uint32_t(value.bits));
#endif
}

VLCACHE_HOST_DEVICE float to_float(Float8E5M2 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E5M2)));
#else
  return E5M2Code::decode<float>(uint32_t(value.bits));
#endif
}

// from_float<T>(value): the nearest T.
template <typename T>
VLCACHE_HOST_DEVICE T from_float(float value);

template <>
VLCACHE_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
VLCACHE_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return {uint16_t(BFloat16Code::encode<uint32_t>(value))};
#endif
}

template <>
VLCACHE_HOST_DEVICE Float16 from_float<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  return {uint16_t(Float16Code::encode<uint32_t>(value))};
#endif
}

template <>
VLCACHE_HOST_DEVICE Float8E4M3 from_float<Float8E4M3>(float value) {
#if defined(__CUDA_ARCH__)
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
#else
  return {uint8_t(E4M3Code::encode<uint32_t>(value))};
#endif
}

template <>
VLCACHE_HOST_DEVICE Float8E5M2 from_float<Float8E5M2>(float value) {
#if defined(__CUDA_ARCH__)
  return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E5M2)};
#else
  return {uint8_t(E5M2Code::encode<uint32_t>(value))};
#endif
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls visit(TypeTag<T>{}) with the C++ type that stores `type`.
template <typename Visit>
inline void visit_type(Type type, Visit visit) {
  switch (type) {
    case Type::kFloat32: visit(TypeTag<float>{}); break;
    case Type::kBFloat16: visit(TypeTag<BFloat16>{}); break;
    case Type::kFloat16: visit(TypeTag<Float16>{}); break;
    case Type::kFloat8E4M3: visit(TypeTag<Float8E4M3>{}); break;
    case Type::kFloat8E5M2: visit(TypeTag<Float8E5M2>{}); break;
  }
}

inline bool is_float8(Type type) { return type == Type::kFloat8E4M3 || type == Type::kFloat8E5M2; }

inline int64_t nbytes_of(Type type) {
  if (is_float8(type)) return 1;
  return type == Type::kFloat32 ? 4 : 2;
}

}  // namespace
}  // namespace vlcache
