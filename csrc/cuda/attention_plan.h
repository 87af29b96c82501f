// How a call of sparse_query_attention is cut into thread blocks. Plain C++: decided on the host, tested without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace vlcache {
namespace cuda {

// Dimensions are padded to 64, 128 or 256 (fp32: 128 or 256). Registers and shared memory bound the keys at a time; for
// fp32, which is not meant to be fast, what the compiler takes to unroll its loops does.
VLCACHE_HOST_DEVICE constexpr int keys_per_tile(int width, int itemsize) {
  return (itemsize == 4 ? 16 : 64) / (width > 128 ? 2 : 1);
}

// 16 bytes more than the row: then 8 rows of a matrix lie in different banks of shared memory.
VLCACHE_HOST_DEVICE constexpr int row_pitch(int width, int itemsize) { return width + 16 / itemsize; }

struct AttentionPlan {
  static constexpr int kRowsPerWarp = 16;
  static constexpr int kMaxRows = 128;
  static constexpr int64_t kMaxDim = 256;
  static constexpr int64_t kMaxSplits = 32;
  static constexpr int64_t kKeysWorthSplitting = 512, kKeysToSplit = 2048;

  Type type;         // in which queries, keys and values are multiplied
  int width;         // of a row in shared memory: 64, 128 or 256 dimensions
  bool vectors;      // queries and keys are copied in pieces of 16 bytes
  int block_shift;   // log2 of the block size, -1 when it is not a power of two
  int rows;          // (query, head) pairs of a tile; 16 per warp
  int tiles, splits; // of all rows; of each tile's keys
  int64_t total_rows;  // of one KV head: queries * (query heads per KV head)
  size_t shared_nbytes;

  int threads() const { return rows / kRowsPerWarp * 32; }
};

inline size_t attention_shared_nbytes(int rows, int width, int itemsize) {
  const size_t pitch_nbytes = size_t(row_pitch(width, itemsize)) * size_t(itemsize);
  const size_t key_rows = 4 * size_t(keys_per_tile(width, itemsize));  // two stages of keys and values
  return (size_t(rows) + key_rows) * pitch_nbytes + size_t(rows) * 2 * sizeof(int32_t);
}

// 8-bit values are exact in any query type. Other mixtures are computed in fp32.
inline Type type_to_multiply(Type query, Type cache) {
  const bool is_8bit = cache == Type::kFloat8E4M3 || cache == Type::kFloat8E5M2;
  return cache == query || is_8bit ? query : Type::kFloat32;
}

inline bool attention_allows_vectors(const AttentionParams& params, int64_t itemsize) {
  const PageLayout& pages = params.pages;
  if (params.cache_type != params.query_type || pages.order != nullptr) return false;
  const auto is_odd = [=](int64_t count) { return count * itemsize % 16 != 0; };
  for (const Strides& half : pages.halves) {
    if (pages.dim > 1 && half.dim != 1) return false;
    if (is_odd(half.origin) || is_odd(half.token) || is_odd(half.head)) return false;
  }
  if (is_odd(pages.dim) || is_odd(pages.block_stride)) return false;
  if (is_odd(params.query_stride) || is_odd(params.query_head_stride)) return false;
  return reinterpret_cast<uintptr_t>(params.cache) % 16 == 0 && reinterpret_cast<uintptr_t>(params.query) % 16 == 0;
}

// Large tiles read the keys less often, small ones and splits keep more multiprocessors busy. On an H100, 410 scattered
// queries of 8192 keys took 620 us without splits, 438 in five; 1024 of 20480 took 2029, in four 1626.
inline AttentionPlan plan_attention(const AttentionParams& params, int multiprocessors, size_t max_shared_nbytes) {
  AttentionPlan plan{};
  plan.type = type_to_multiply(params.query_type, params.cache_type);
  const int itemsize = plan.type == Type::kFloat32 ? 4 : 2;
  const int64_t heads = params.pages.heads;
  plan.width = params.pages.dim > 128 ? 256 : params.pages.dim > 64 || itemsize == 4 ? 128 : 64;
  plan.vectors = attention_allows_vectors(params, itemsize);
  plan.block_shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (params.pages.block_size == int64_t(1) << shift) plan.block_shift = shift;
  }
  plan.total_rows = params.queries * (params.query_heads / heads);
  const bool is_much = plan.total_rows * heads >= int64_t(AttentionPlan::kMaxRows) * multiprocessors;
  plan.rows = is_much ? AttentionPlan::kMaxRows : AttentionPlan::kMaxRows / 2;
  while (plan.rows > AttentionPlan::kRowsPerWarp &&
         attention_shared_nbytes(plan.rows, plan.width, itemsize) > max_shared_nbytes) {
    plan.rows /= 2;
  }
  plan.shared_nbytes = attention_shared_nbytes(plan.rows, plan.width, itemsize);
  const int64_t tiles = (plan.total_rows + plan.rows - 1) / plan.rows;
  plan.tiles = int(tiles);
  // Enough blocks for the device, and none so long that all others wait for it: tiles differ in their keys.
  const int64_t keys = params.blocks_per_request * params.pages.block_size;
  const int64_t fills = 2 * multiprocessors / (tiles * heads), evens = keys / AttentionPlan::kKeysToSplit;
  const int64_t useful = keys / AttentionPlan::kKeysWorthSplitting;
  int64_t splits = fills > evens ? fills : evens;
  if (splits > useful) splits = useful;
  if (splits > AttentionPlan::kMaxSplits) splits = AttentionPlan::kMaxSplits;
  const int64_t least = plan.type == params.query_type ? 1 : 2;  // `combine` converts
  plan.splits = int(splits < least ? least : splits);
  return plan;
}

// Floats that the splits leave for `combine`: an unscaled sum of values per row, its maximum score and sum of weights.
inline int64_t workspace_floats(const AttentionParams& params, const AttentionPlan& plan) {
  return plan.splits == 1 ? 0 : plan.splits * params.queries * params.query_heads * (params.pages.dim + 2);
}

}  // namespace cuda
}  // namespace vlcache
