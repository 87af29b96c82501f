// Kernel files (*_kernels.cpp) are compiled once per instruction set, each copy in a namespace of that name; what calls
// them picks the best copy that this processor runs. VLCACHE_ISA is set by setup.py: generic, avx2 or avx512.
#pragma once

#include <cstdlib>
#include <cstring>

namespace vlcache {

enum class Isa { kGeneric, kAvx2, kAvx512 };

// VLCACHE_CPU_ISA in the environment lowers the choice (for tests and bug reports); it never raises it.
inline Isa best_isa() {
  static const Isa chosen = [] {
    Isa isa = Isa::kGeneric;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      isa = Isa::kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        isa = Isa::kAvx512;
      }
    }
#endif
    if (const char* wish = std::getenv("VLCACHE_CPU_ISA")) {
      if (std::strcmp(wish, "generic") == 0) isa = Isa::kGeneric;
      if (std::strcmp(wish, "avx2") == 0 && isa == Isa::kAvx512) isa = Isa::kAvx2;
    }
    return isa;
  }();
  return chosen;
}

}  // namespace vlcache

// VLCACHE_DECLARE(f(arguments)): f exists in each namespace. VLCACHE_CALL(f, arguments): the copy for this processor.
#if defined(__x86_64__)
#define VLCACHE_DECLARE(signature) \
  namespace generic {              \
  void signature;                  \
  }                                \
  namespace avx2 {                 \
  void signature;                  \
  }                                \
  namespace avx512 {               \
  void signature;                  \
  }
#define VLCACHE_CALL(function, ...)              \
  switch (::vlcache::best_isa()) {               \
    case ::vlcache::Isa::kAvx512:                \
      ::vlcache::avx512::function(__VA_ARGS__);  \
      break;                                     \
    case ::vlcache::Isa::kAvx2:                  \
      ::vlcache::avx2::function(__VA_ARGS__);    \
      break;                                     \
    default:                                     \
      ::vlcache::generic::function(__VA_ARGS__); \
  }
#else
#define VLCACHE_DECLARE(signature) \
  namespace generic {              \
  void signature;                  \
  }
#define VLCACHE_CALL(function, ...) ::vlcache::generic::function(__VA_ARGS__)
#endif
