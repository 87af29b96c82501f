// Single elements of tensors whose type is known only when a kernel runs.
#pragma once

#include "simt.cuh"

namespace vlcache {
namespace cuda {

VLCACHE_DEVICE int itemsize_of(Type type) {
  return type == Type::kFloat32 ? 4 : type == Type::kBFloat16 || type == Type::kFloat16 ? 2 : 1;
}

VLCACHE_DEVICE float read_element(const void* base, Type type, int64_t index) {
  switch (type) {
    case Type::kFloat32: return static_cast<const float*>(base)[index];
    case Type::kBFloat16: return to_float(static_cast<const BFloat16*>(base)[index]);
    case Type::kFloat16: return to_float(static_cast<const Float16*>(base)[index]);
    case Type::kFloat8E4M3: return to_float(static_cast<const Float8E4M3*>(base)[index]);
    default: return to_float(static_cast<const Float8E5M2*>(base)[index]);
  }
}

VLCACHE_DEVICE void write_element(void* base, Type type, int64_t index, float value) {
  switch (type) {
    case Type::kFloat32: static_cast<float*>(base)[index] = value; break;
    case Type::kBFloat16: static_cast<BFloat16*>(base)[index] = from_float<BFloat16>(value); break;
    case Type::kFloat16: static_cast<Float16*>(base)[index] = from_float<Float16>(value); break;
    case Type::kFloat8E4M3: static_cast<Float8E4M3*>(base)[index] = from_float<Float8E4M3>(value); break;
    default: static_cast<Float8E5M2*>(base)[index] = from_float<Float8E5M2>(value); break;
  }
}

// Bit for bit: through a float, NaNs would change.
VLCACHE_DEVICE void copy_element(void* to, int64_t to_index, const void* from, int64_t from_index, int itemsize) {
  if (itemsize == 4) {
    static_cast<uint32_t*>(to)[to_index] = static_cast<const uint32_t*>(from)[from_index];
  } else if (itemsize == 2) {
    static_cast<uint16_t*>(to)[to_index] = static_cast<const uint16_t*>(from)[from_index];
  } else {
    static_cast<uint8_t*>(to)[to_index] = static_cast<const uint8_t*>(from)[from_index];
  }
}

}  // namespace cuda
}  // namespace vlcache
