// How a call of load_rows, save_rows or shift_rows is cut into thread blocks. Plain C++: decided on the host, tested without a GPU.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "numeric.h"

namespace vlcache {
namespace cuda {

struct RowsPlan {
  static constexpr int kThreads = 256;
  static constexpr int kUnroll = 4;       // rows that a thread has under way
  static constexpr int kShiftUnroll = 2;  // in shift_rows, where each comes with its change

  bool vectors;  // 16-byte accesses; false: one element at a time, and of the rest only `blocks` counts
  bool is_neox;
  int itemsize;
  int pieces;         // 16-byte pieces of a row
  int rotary_pieces;  // of those, the ones that are turned, of keys
  uint32_t units;     // threads per row: two pieces each
  uint32_t rows;      // of K or of V of one layer
  uint32_t rows_per_pass, groups;
  int64_t blocks;
};

inline bool are_multiples(int64_t divisor, std::initializer_list<int64_t> values) {
  for (int64_t value : values) {
    if (value % divisor != 0) return false;
  }
  return true;
}

// Whether every piece of every row starts at a multiple of 16 bytes, and nothing needs converting.
inline bool rows_allow_vectors(const RowsParams& params, int64_t itemsize) {
  const PageLayout& pages = params.pages;
  if (params.entry_type != params.cache_type || pages.order != nullptr) return false;
  for (const Strides& half : pages.halves) {
    if (pages.dim > 1 && half.dim != 1) return false;
    if (!are_multiples(16, {half.origin * itemsize, half.token * itemsize, half.head * itemsize})) return false;
  }
  if (!are_multiples(16, {pages.dim * itemsize, pages.block_stride * itemsize, params.entry_layer_stride * itemsize,
                          params.entry_kv_stride * itemsize, params.entry_token_stride * itemsize,
                          params.entry_head_stride * itemsize, int64_t(reinterpret_cast<uintptr_t>(params.entry))})) {
    return false;
  }
  for (int64_t layer = 0; layer < params.layers; ++layer) {
    if (reinterpret_cast<uintptr_t>(params.caches[layer]) % 16 != 0) return false;
  }
  if (params.turns != nullptr) {
    if (itemsize == 1) return false;
    if ((params.is_neox ? 1 : 2) * params.half_rotary * itemsize % 16 != 0) return false;
  }
  constexpr int64_t k31Bits = int64_t(1) << 31;
  return params.tokens * pages.heads < k31Bits && params.num_blocks * pages.block_size < k31Bits &&
         pages.dim * itemsize <= 32 * RowsPlan::kThreads;
}

// `layers` times `rows` of K and as many of V, of `dim` elements each, `unroll` to a thread; `rotary_dim` of keys turn.
inline RowsPlan plan_of(bool vectors, int64_t itemsize, int64_t layers, int64_t rows, int unroll, int64_t dim,
                        int64_t rotary_dim, bool is_neox) {
  RowsPlan plan{};
  plan.itemsize = int(itemsize);
  plan.vectors = vectors;
  if (!vectors) {
    constexpr int64_t kWarps = RowsPlan::kThreads / 32, kMostBlocks = 1 << 16;
    const int64_t blocks = (layers * 2 * rows + kWarps - 1) / kWarps;
    plan.blocks = blocks < kMostBlocks ? blocks : kMostBlocks;
    return plan;
  }
  plan.is_neox = is_neox;
  plan.pieces = int(dim * itemsize / 16);
  plan.rotary_pieces = int(rotary_dim * itemsize / 16);
  plan.units = uint32_t(plan.pieces + 1) / 2;
  plan.rows = uint32_t(rows);
  plan.rows_per_pass = RowsPlan::kThreads / plan.units;
  const int64_t rows_per_group = int64_t(plan.rows_per_pass) * unroll;
  plan.groups = uint32_t((rows + rows_per_group - 1) / rows_per_group);
  plan.blocks = layers * 2 * plan.groups;
  return plan;
}

// Needs at least one layer, token, head and dimension.
inline RowsPlan plan_rows(const RowsParams& params) {
  const int64_t itemsize = nbytes_of(params.cache_type), rows = params.tokens * params.pages.heads;
  const int64_t rotary_dim = params.turns == nullptr ? 0 : 2 * params.half_rotary;
  return plan_of(rows_allow_vectors(params, itemsize), itemsize, params.layers, rows, RowsPlan::kUnroll,
                 params.pages.dim, rotary_dim, params.is_neox);
}

// As `rows_allow_vectors`; the tables of angles are read 16 bytes at a time as well.
inline bool shift_allows_vectors(const ShiftParams& params, int64_t itemsize) {
  if (itemsize == 1) return false;
  for (const void* address : {params.entry, params.shift, static_cast<const void*>(params.out),
                              static_cast<const void*>(params.places), static_cast<const void*>(params.turns)}) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  }
  for (const RowStrides& strides : {params.entry_strides, params.shift_strides, params.out_strides}) {
    if (!are_multiples(16, {strides.kv * itemsize, strides.token * itemsize, strides.head * itemsize})) return false;
  }
  if (!are_multiples(16, {params.dim * itemsize, (params.is_neox ? 1 : 2) * params.half_rotary * itemsize})) {
    return false;
  }
  return params.tokens * params.heads < (int64_t(1) << 31) && params.dim * itemsize <= 32 * RowsPlan::kThreads;
}

// Needs at least one token, head and dimension.
inline RowsPlan plan_shift(const ShiftParams& params) {
  const int64_t itemsize = nbytes_of(params.type);
  return plan_of(shift_allows_vectors(params, itemsize), itemsize, 1, params.tokens * params.heads,
                 RowsPlan::kShiftUnroll, params.dim, 2 * params.half_rotary, params.is_neox);
}

}  // namespace cuda
}  // namespace vlcache
