// Stores of whole cache lines that go past the processor's caches: what is not read again soon would only push other
// things out, and a line that is stored whole need not be read before. In an unnamed namespace for the reason given in
// numeric.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vlcache {
namespace {

constexpr int64_t kCacheLine = 64;

inline bool is_line(const void* at) { return reinterpret_cast<uintptr_t>(at) % kCacheLine == 0; }

#if defined(__AVX512F__)
static_assert(sizeof(Floats) == kCacheLine);

template <typename Vector>
inline void put_vector(void* to, const Vector& vector, bool streams) {
  if (streams && is_line(to)) {
    _mm512_stream_ps(static_cast<float*>(to), same_bits<__m512>(vector));
  } else {
    std::memcpy(to, &vector, sizeof(vector));
  }
}

// To be called by a thread behind its stores, before it tells others of them.
inline void end_stream() { _mm_sfence(); }
#else
// Shorter vectors are parts of a line, and parts that go past the caches are slower than all else.
template <typename Vector>
inline void put_vector(void* to, const Vector& vector, bool) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline void end_stream() {}
#endif

}  // namespace
}  // namespace vlcache
