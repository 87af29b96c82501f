// For `vlcache env`: which copies of the kernels this process calls.
#include "cpu/isa.h"

extern "C" __attribute__((visibility("default"))) const char* vlcache_cpu_isa() {
  switch (vlcache::best_isa()) {
    case vlcache::Isa::kAvx512: return "avx512";
    case vlcache::Isa::kAvx2: return "avx2";
    default: return "generic";
  }
}
