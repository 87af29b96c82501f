// sparse_query_attention: a thread block takes a tile of rows of one KV head, a row being a query and one of the query
// heads that share the KV head, and reads each tile of keys once for all of them.
//
// Rows come in the order of the queries, of any request: a block goes through the requests of its tile one after the
// other, and rows of other requests see nothing meanwhile. Keys and values arrive in shared memory a tile ahead of
// their use (cp.async, two stages); softmax is computed as the tiles pass, in fp32 and to base 2. Where there are too
// few tiles for the device, several blocks share the keys of a tile and `combine` puts their results together.
#pragma once

#include "attention_result.cuh"

namespace vlcache {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

// To base 2, so that weights are powers of 2.
VLCACHE_DEVICE float scaled_score(const AttentionParams& params, float product, float scale) {
  const float score = product * scale;
  return (params.soft_cap > 0.0f ? params.soft_cap * tanhf(score / params.soft_cap) : score) * kLog2E;
}

// Turns scores into weights relative to the new maximum; returns by what earlier results shrink.
template <typename Scores>
VLCACHE_DEVICE void soften(const AttentionParams& params, LaneRows& rows, Scores& scores, float scale, int first_key,
                           bool sees_all, float (&shrink)[2]) {
  constexpr int kTiles = sizeof(Scores) / sizeof(scores[0]);
  float max[2] = {rows.max[0], rows.max[1]};
  VLCACHE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    VLCACHE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + tile * 8 + thread_index() % 4 * 2 + i % 2;
      const float score = scaled_score(params, scores[tile][i], scale);
      const KeySpan& seen = rows.seen[i / 2];
      scores[tile][i] = sees_all || (key >= seen.first && key <= seen.last) ? score : -kInfinity;
      max[i / 2] = fmaxf(max[i / 2], scores[tile][i]);
    }
  }
  VLCACHE_UNROLL
  for (int r = 0; r < 2; ++r) {
    max[r] = fmaxf(max[r], shuffle_xor(max[r], 1));
    max[r] = fmaxf(max[r], shuffle_xor(max[r], 2));
    const float base = max[r] == -kInfinity ? 0.0f : max[r];  // no key seen yet: infinity minus itself is NaN
    shrink[r] = exp2_fast(rows.max[r] - base);
    rows.max[r] = max[r];
    rows.sum[r] *= shrink[r];
    VLCACHE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      VLCACHE_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[tile][i] = exp2_fast(scores[tile][i] - base);
        rows.sum[r] += scores[tile][i];
      }
    }
  }
}

template <typename T, int kWidth>
VLCACHE_DEVICE void attend_request(const AttentionParams& params, const AttentionPlan& plan,
                                   const AttentionTile<T, kWidth>& tile, int request, float scale, LaneRows& rows,
                                   typename TileMath<T, kWidth>::Output& output) {
  using Math = TileMath<T, kWidth>;
  const int warp_row = thread_index() / kWarp * AttentionPlan::kRowsPerWarp;
  const Sight wanted = sight_of(params, tile, request, 0, tile.rows);
  const Sight mine = sight_of(params, tile, request, warp_row, warp_row + AttentionPlan::kRowsPerWarp);
  VLCACHE_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + thread_index() % kWarp / 4 + 8 * r;
    rows.seen[r] = tile.requests[row] == request ? seen_from(params, tile.positions[row]) : KeySpan{1, 0};
  }
  const TileRange range = split_of(plan, wanted.any, Math::kKeys);
  int stage = 1;
  for (int index = range.first - 1; index < range.end; ++index, stage = 1 - stage) {
    const int first = index * Math::kKeys, last = first + Math::kKeys - 1;
    if (index >= range.first) {
      copies_wait();
      barrier();  // this tile has arrived, and nobody needs the one before any more
    }
    if (index + 1 < range.end) load_keys(params, plan, tile, 1 - stage, request, first + Math::kKeys, wanted.any);
    if (index < range.first || last < mine.any.first || first > mine.any.last) continue;  // nothing for this warp
    typename Math::Scores scores = {};
    Math::scores(scores, tile.queries + warp_row * Math::kPitch, tile.keys(stage));
    float shrink[2];
    soften(params, rows, scores, scale, first, first >= mine.all.first && last <= mine.all.last, shrink);
    VLCACHE_UNROLL
    for (int i = 0; i < kWidth / 8 * 4; ++i) output[i / 4][i % 4] *= shrink[i % 4 / 2];
    Math::add_values(output, scores, tile.values(stage));
  }
  barrier();  // the next request begins with stage 0
}

// A warp computes one row again, from the keys that it sees and no others: 32 dimensions of the result at a time, in
// little code, since it hardly ever runs.
template <typename T, int kWidth>
VLCACHE_DEVICE void attend_row(const AttentionParams& params, const AttentionPlan& plan,
                               const AttentionTile<T, kWidth>& tile, const RowSink<T>& sink, int row, float scale) {
  const int lane = thread_index() % kWarp, request = tile.requests[row], dim = int(params.pages.dim);
  const RowOrigin origin = origin_of(params, plan, row);
  const KeySpan seen = seen_from(params, tile.positions[row]);
  const Sight wanted = sight_of(params, tile, request, 0, tile.rows);
  const TileRange range = split_of(plan, wanted.any, TileMath<T, kWidth>::kKeys);
  const int begin = range.first * TileMath<T, kWidth>::kKeys, end = range.end * TileMath<T, kWidth>::kKeys;
  const T* query = tile.queries + row * TileMath<T, kWidth>::kPitch;
  for (int first = 0; first < dim; first += kWarp) {
    float output = 0.0f, max = -kInfinity, sum = 0.0f;
    for (int key = seen.first > begin ? seen.first : begin; key <= seen.last && key < end; ++key) {
      const KeyPlace place = place_of(params, plan, request, key);
      float product = 0.0f;
      VLCACHE_UNROLL_BY(1)
      for (int d = lane; d < dim; d += kWarp) product += to_float(query[d]) * key_element(params, place, 0, d);
      VLCACHE_UNROLL
      for (int mask = 1; mask < kWarp; mask *= 2) product += shuffle_xor(product, mask);
      const float score = scaled_score(params, product, scale), new_max = fmaxf(max, score);
      const float base = new_max == -kInfinity ? 0.0f : new_max;
      const float shrink = exp2_fast(max - base), weight = exp2_fast(score - base);
      max = new_max;
      sum = sum * shrink + weight;
      output = output * shrink + weight * key_element(params, place, 1, first + lane);
    }
    if (first + lane < dim) sink.write(origin, first + lane, output, sum);
    if (lane == 0) sink.write_state(origin, max, sum);
  }
}

// One block of a launch of (tiles, KV heads, splits) blocks.
template <typename T, int kWidth>
VLCACHE_DEVICE void attend(const AttentionParams& params, const AttentionPlan& plan, float* workspace) {
  const AttentionTile<T, kWidth> tile(plan);
  load_queries(params, plan, tile);
  const float scale = params.softmax_scale * (params.scales == nullptr ? 1.0f : params.scales[0]);
  typename TileMath<T, kWidth>::Output output = {};
  LaneRows rows{{}, {-kInfinity, -kInfinity}, {0.0f, 0.0f}};
  int request = -1;
  while ((request = next_request(tile, request)) >= 0) {
    attend_request(params, plan, tile, request, scale, rows, output);
  }
  const RowSink<T> sink{params, plan, workspace};
  float odd[2];
  write_rows<T, kWidth>(params, plan, sink, rows, output, odd);
  // A NaN among the values of a tile spoils all its rows, since 0 times NaN is NaN, also those that do not see the key.
  VLCACHE_UNROLL_BY(1)
  for (int i = 0; i < AttentionPlan::kRowsPerWarp; ++i) {
    const float is_odd = shuffle(i < 8 ? odd[0] : odd[1], i % 8 * 4);
    const int row = thread_index() / kWarp * AttentionPlan::kRowsPerWarp + i;
    if (is_odd > 0.0f && tile.requests[row] >= 0) attend_row(params, plan, tile, sink, row, scale);
  }
}

// Calls the kernel that a plan asks for, launch.attend<T, kWidth>(), and then launch.combine(). Host code.
template <typename T, typename Launch>
void choose_width(const AttentionPlan& plan, const Launch& launch) {
  if constexpr (sizeof(T) == 2) {
    if (plan.width == 64) launch.template attend<T, 64>();
  }
  if (plan.width == 128) launch.template attend<T, 128>();
  if (plan.width == 256) launch.template attend<T, 256>();
}

template <typename Launch>
void choose_attention_kernels(const AttentionPlan& plan, const Launch& launch) {
  switch (plan.type) {
    case Type::kFloat32: choose_width<float>(plan, launch); break;
    case Type::kBFloat16: choose_width<BFloat16>(plan, launch); break;
    default: choose_width<Float16>(plan, launch);
  }
  if (plan.splits > 1) launch.combine();
}

}  // namespace cuda
}  // namespace vlcache
