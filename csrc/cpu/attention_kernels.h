// Loops of sparse_query_attention. A tile is some queries of one request, with the query heads that share one KV head:
// its rows read each key and value once. Calls for different tiles may run at the same time.
#pragma once

#include <cstdint>

#include "params.h"
#include "cpu/isa.h"

namespace vlcache {

constexpr int64_t kKeysPerStep = 128;  // keys and values that are unpacked at a time
constexpr int64_t kMaxLanes = 16;      // of any instruction set's vectors

struct AttentionPlan {
  AttentionParams params;
  int64_t group;  // query heads per KV head
};

// Queries `queries[0 ... count)` of one request, by ascending position, over its keys [begin, end) and one KV head.
struct AttentionTile {
  const int32_t* queries;
  int64_t count;
  int64_t head;
  int64_t begin, end;  // begin is a multiple of kKeysPerStep
  float* partial;      // null: these are all keys, write `out`; else [count * group, dim + 2]: for merge_attention
};

namespace {  // for the reason given in numeric.h

inline int64_t padded_dim(int64_t dim) { return (dim + 2 * kMaxLanes - 1) / (2 * kMaxLanes) * (2 * kMaxLanes); }

// Rows share the cost of unpacking keys and values; but their queries and sums should stay in the second-level cache.
inline int64_t rows_per_tile(const AttentionPlan& plan) {
  const int64_t fit = 32768 / padded_dim(plan.params.pages.dim);
  const int64_t rows = fit < 32 ? 32 : fit > 256 ? 256 : fit;
  return plan.group > rows ? plan.group : rows;  // the heads of a query stay together
}

// Floats of working memory that a tile needs, at an address that is a multiple of 64.
inline int64_t attention_scratch(const AttentionPlan& plan) {
  const int64_t rows = rows_per_tile(plan);
  return (2 * rows + 3 * kKeysPerStep) * padded_dim(plan.params.pages.dim) + rows * (kKeysPerStep + kMaxLanes + 5);
}

}  // namespace

VLCACHE_DECLARE(attend(const AttentionPlan& plan, const AttentionTile& tile, float* scratch))

// Joins the partial results of tiles[0 ... count), which differ in their keys only, and writes `out`.
VLCACHE_DECLARE(merge_attention(const AttentionPlan& plan, const AttentionTile* tiles, int64_t count))

}  // namespace vlcache
