// The functions of csrc/cuda/simt.cuh for a CPU: a block's threads are fibers, which take turns in random order.
//
// It behaves as badly as a GPU may, so that a kernel which is right by luck fails here:
// - whichever thread can go on may be the next to run, up to its next barrier or warp operation;
// - a started copy happens at once or, with garbage in its place until then, when the thread waits for it;
// - shared memory begins as garbage (every float in it a NaN) and ends where it was asked to;
// - a barrier or warp operation that not all threads reach is an error.
// Warp operations follow the tables of the PTX manual for ldmatrix and mma.m16n8k16.
#pragma once

#include <cmath>
#include <cstring>

#include "fibers.h"

#define VLCACHE_DEVICE inline
#define VLCACHE_UNROLL
#define VLCACHE_UNROLL_BY(count)

namespace vlcache {
namespace cuda {

inline int thread_index() { return emulation::Block::current()->thread(); }
inline int num_threads() { return emulation::Block::current()->threads(); }
inline emulation::Index block_index() { return emulation::Block::current()->index(); }
inline emulation::Index grid_size() { return emulation::Block::current()->grid(); }
inline char* shared_memory() { return emulation::Block::current()->shared(); }
inline void barrier() { emulation::Block::current()->wait(emulation::Status::kAtBarrier); }

inline float shuffle(float value, int lane) {
  return emulation::Block::current()->exchange({emulation::Operation::kShuffle, value, nullptr, {}, {}})[lane].value;
}

inline float shuffle_xor(float value, int mask) { return shuffle(value, (thread_index() % 32) ^ mask); }

inline Vec16 load_piece(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::Block::current()->fail("an unaligned load of 16 bytes");
  Vec16 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline Vec16 load_once(const void* from) { return load_piece(from); }

inline void store(void* to, const Vec16& value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::Block::current()->fail("an unaligned store of 16 bytes");
  std::memcpy(to, &value, sizeof(value));
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void copy_async(void* to, const void* from, bool valid) {
  emulation::Block& block = *emulation::Block::current();
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
    block.fail("an unaligned copy of 16 bytes");
  }
  if (!valid) {
    std::memset(to, 0, 16);
  } else if (block.toss()) {
    std::memcpy(to, from, 16);
  } else {
    std::memset(to, 0xff, 16);
    block.fiber().copies.push_back({to, from});
  }
}

inline void copies_wait() {
  std::vector<emulation::Copy>& copies = emulation::Block::current()->fiber().copies;
  for (const emulation::Copy& copy : copies) std::memcpy(copy.to, copy.from, 16);
  copies.clear();
}

template <bool kTransposed>
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::Block& block = *emulation::Block::current();
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) block.fail("an unaligned row of a matrix");
  const emulation::Deposit* lanes =
      block.exchange({emulation::Operation::kMatrices, 0, static_cast<const uint16_t*>(row), {}, {}});
  const int lane = thread_index() % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int wide = lane / 4, narrow = 2 * (lane % 4) + i;
      pair[i] = kTransposed ? lanes[8 * matrix + narrow].row[wide] : lanes[8 * matrix + wide].row[narrow];
    }
    to[matrix] = pair[0] | pair[1] << 16;
  }
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulation::Deposit* lanes = emulation::Block::current()->exchange(
      {emulation::Operation::kMultiply, 0, nullptr, {a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = thread_index() % 32;
  const auto half = [](uint32_t word, int k) { return to_float(T{uint16_t(word >> (16 * (k % 2)))}); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const float x = half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k);
      const float y = half(lanes[column * 4 + k % 8 / 2].b[k / 8], k);
      c[i] += x * y;
    }
  }
}

}  // namespace cuda
}  // namespace vlcache
