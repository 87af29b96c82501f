// What the kernels ask of a GPU beyond plain C++, each as one small function. Kernels are written against these alone,
// so that a C++ compiler can build them too: tests/kernels/emulation implements the same functions for a CPU, threads
// of a block as fibers, and the kernels' logic is tested where there is no GPU.
#pragma once

#include <cstdint>
#include <type_traits>

#include "numeric.h"

namespace vlcache {
namespace cuda {

constexpr int kWarp = 32;

struct alignas(16) Vec16 {
  uint32_t words[4];
};

}  // namespace cuda
}  // namespace vlcache

#if !defined(__CUDACC__)
#include "simt_emulation.h"
#else

#define VLCACHE_DEVICE __device__ __forceinline__
#define VLCACHE_UNROLL _Pragma("unroll")
#define VLCACHE_PRAGMA(text) _Pragma(#text)
#define VLCACHE_UNROLL_BY(count) VLCACHE_PRAGMA(unroll count)

namespace vlcache {
namespace cuda {

VLCACHE_DEVICE int thread_index() { return int(threadIdx.x); }
VLCACHE_DEVICE int num_threads() { return int(blockDim.x); }
VLCACHE_DEVICE dim3 block_index() { return blockIdx; }
VLCACHE_DEVICE dim3 grid_size() { return gridDim; }

// The block's shared memory, whose size is a parameter of the launch.
VLCACHE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char vlcache_shared[];
  return vlcache_shared;
}

VLCACHE_DEVICE void barrier() { __syncthreads(); }

// `value` of another lane of the warp. All lanes take part.
VLCACHE_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
VLCACHE_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// 16 bytes that this kernel reads only once: they are the first to leave the caches.
VLCACHE_DEVICE Vec16 load_once(const void* from) {
  const uint4 value = __ldcs(static_cast<const uint4*>(from));
  return {{value.x, value.y, value.z, value.w}};
}

// 16 bytes that other threads read as well.
VLCACHE_DEVICE Vec16 load_piece(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}

VLCACHE_DEVICE void store(void* to, const Vec16& value) {
  *static_cast<uint4*>(to) = make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
}

// 2^x to about 2 units in the last place; -infinity gives 0.
VLCACHE_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

VLCACHE_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes into shared memory, or zeros when `valid` is false (`from` is not read then). They are there
// once the thread has waited for them, for other threads after a barrier behind that.
VLCACHE_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for all copies of this thread.
VLCACHE_DEVICE void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. Of each matrix a lane
// gets elements (row i / 4, columns 2 (i % 4) and the next), of its transpose where `kTransposed`.
template <bool kTransposed>
VLCACHE_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// c += a b for a of 16x16, b of 16x8 and c of 16x8 elements, spread over the warp as PTX lays out mma.m16n8k16.
template <typename T>
VLCACHE_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) != 2) {
    static_assert(sizeof(T) == 2, "tensor cores multiply 16-bit types here");
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace cuda
}  // namespace vlcache

#endif
