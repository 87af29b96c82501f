// sparse_query_attention for pages in host memory: checks the values of index tensors, cuts the work into tiles and hands
// them to the threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>

#include "attention_op.h"
#include "cpu/attention_kernels.h"

namespace vlcache {
namespace {

constexpr int64_t kTilesPerThread = 4;            // tiles differ in cost: with several of them all threads stay busy
constexpr int64_t kLeastKeys = 4 * kKeysPerStep;  // of a part of a tile: below, joining the parts costs too much
constexpr int64_t kUnpackingRows = 16;            // unpacking a key costs about as much as so many rows looking at it

// The queries of one request, by position: queries[first ... end).
struct Group {
  size_t first, end;
};

// The tiles of `parts` neighbours in the list see different keys of the same rows.
struct Work {
  std::vector<AttentionTile> tiles;
  std::vector<size_t> split;  // first tile of each split one
  std::vector<int64_t> parts;
  std::vector<float> partial;
};

int64_t lowest_key(const AttentionParams& p, int32_t query) {
  return p.window > 0 ? std::max<int64_t>(0, p.position[query] - p.window + 1) : 0;
}

void check_indices(const AttentionParams& p) {
  const int64_t limit = p.blocks_per_request * p.pages.block_size;
  for (int64_t i = 0; i < p.queries; ++i) {
    require(p.request[i] >= 0 && p.request[i] < p.requests, "request: expected 0 to ", p.requests - 1,
            " (rows of block_table), found ", p.request[i], " for query ", i);
    require(p.position[i] >= 0 && p.position[i] < limit, "position: expected 0 to ", limit - 1,
            " (tokens that block_table covers), found ", p.position[i], " for query ", i);
  }
}

std::vector<int32_t> sorted_queries(const AttentionParams& p) {
  std::vector<int32_t> queries(p.queries);
  std::iota(queries.begin(), queries.end(), 0);
  const auto before = [&](int32_t a, int32_t b) {
    if (p.request[a] != p.request[b]) return p.request[a] < p.request[b];
    return p.position[a] != p.position[b] ? p.position[a] < p.position[b] : a < b;
  };
  if (!std::is_sorted(queries.begin(), queries.end(), before)) std::sort(queries.begin(), queries.end(), before);
  return queries;
}

// Also checks the blocks that a group's queries look at, and those between.
std::vector<Group> groups_of(const AttentionParams& p, const std::vector<int32_t>& queries) {
  std::vector<Group> groups;
  for (size_t first = 0, end; first < queries.size(); first = end) {
    const int32_t request = p.request[queries[first]];
    for (end = first + 1; end < queries.size() && p.request[queries[end]] == request;) ++end;
    groups.push_back({first, end});
    const int64_t last = p.position[queries[end - 1]] / p.pages.block_size;
    for (int64_t i = lowest_key(p, queries[first]) / p.pages.block_size; i <= last; ++i) {
      const int32_t block = p.block_table[request * p.blocks_per_request + i];
      require(block >= 0 && block < p.num_blocks, "block_table: expected 0 to ", p.num_blocks - 1,
              " (blocks of cache), found ", block, " at [", request, ", ", i, "]");
    }
  }
  return groups;
}

int64_t cost(const AttentionPlan& plan, const AttentionTile& tile) {
  int64_t rows = 0;
  for (int64_t i = 0; i < tile.count; ++i) {
    rows += int64_t(plan.params.position[tile.queries[i]]) + 1 - lowest_key(plan.params, tile.queries[i]);
  }
  return rows * plan.group + (tile.end - tile.begin) * kUnpackingRows;
}

std::vector<AttentionTile> whole_tiles(const AttentionPlan& plan, const std::vector<int32_t>& queries,
                                       const std::vector<Group>& groups) {
  const AttentionParams& p = plan.params;
  const int64_t most = rows_per_tile(plan) / plan.group;
  std::vector<AttentionTile> tiles;
  for (const Group& group : groups) {
    const int64_t count = group.end - group.first, parts = (count + most - 1) / most;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = group.first + count * part / parts, end = group.first + count * (part + 1) / parts;
      const int64_t begin = lowest_key(p, queries[first]) / kKeysPerStep * kKeysPerStep;
      const int64_t keys_end = int64_t(p.position[queries[end - 1]]) + 1;
      for (int64_t head = 0; head < p.pages.heads; ++head) {
        tiles.push_back({&queries[first], end - first, head, begin, keys_end, nullptr});
      }
    }
  }
  return tiles;
}

// Cuts the keys of tiles that would keep one thread busy while others have nothing left to do.
Work shared_out(const AttentionPlan& plan, const std::vector<AttentionTile>& tiles, int64_t threads) {
  int64_t total = 0;
  for (const AttentionTile& tile : tiles) total += cost(plan, tile);
  const int64_t target = threads > 1 ? total / (threads * kTilesPerThread) + 1 : total + 1;
  Work work;
  int64_t floats = 0;
  for (const AttentionTile& tile : tiles) {
    const int64_t steps = (tile.end - tile.begin + kKeysPerStep - 1) / kKeysPerStep;
    const int64_t parts = std::max<int64_t>(
        1, std::min((cost(plan, tile) + target - 1) / target, steps * kKeysPerStep / kLeastKeys));
    if (parts > 1) {
      work.split.push_back(work.tiles.size());
      work.parts.push_back(parts);
      floats += parts * tile.count * plan.group * (plan.params.pages.dim + 2);
    }
    for (int64_t part = 0; part < parts; ++part) {
      work.tiles.push_back(tile);
      work.tiles.back().begin = tile.begin + steps * part / parts * kKeysPerStep;
      work.tiles.back().end = std::min(tile.end, tile.begin + steps * (part + 1) / parts * kKeysPerStep);
    }
  }
  work.partial.resize(floats);
  float* next = work.partial.data();
  for (size_t i = 0; i < work.split.size(); ++i) {
    for (int64_t part = 0; part < work.parts[i]; ++part) {
      AttentionTile& tile = work.tiles[work.split[i] + part];
      tile.partial = next;
      next += tile.count * plan.group * (plan.params.pages.dim + 2);
    }
  }
  return work;
}

void compute(const AttentionPlan& plan, const Work& work, int64_t threads) {
  constexpr int64_t kAlignment = 16;  // floats: a cache line
  const int64_t each = (attention_scratch(plan) + kAlignment - 1) / kAlignment * kAlignment;
  const std::unique_ptr<float[]> memory(new float[threads * each + kAlignment]);
  void* start = memory.get();
  size_t space = (threads * each + kAlignment) * sizeof(float);
  float* scratch = static_cast<float*>(std::align(kAlignment * sizeof(float), threads * each * sizeof(float), start, space));
  std::atomic<int64_t> workers{0}, taken{0};
  const int64_t count = work.tiles.size();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    float* own = scratch + workers++ * each;
    // Later positions see more keys: with the long tiles first, the threads end together.
    for (int64_t i = taken++; i < count; i = taken++) VLCACHE_CALL(attend, plan, work.tiles[count - 1 - i], own);
  });
  torch::stable::parallel_for(0, work.split.size(), 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      VLCACHE_CALL(merge_attention, plan, &work.tiles[work.split[i]], work.parts[i]);
    }
  });
}

void attention(const Tensor& out, const Tensor& query, const Tensor& cache, const Tensor& block_table,
               const Tensor& request, const Tensor& position, const std::optional<Tensor>& scales, int64_t block_size,
               const std::vector<int64_t>& layout, const std::optional<Tensor>& order, double softmax_scale,
               int64_t window, double soft_cap) {
  AttentionPlan plan{};
  plan.params = attention_params({out, query, cache, block_table, request, position, scales, block_size, layout, order,
                                  softmax_scale, window, soft_cap});
  const AttentionParams& p = plan.params;
  check_indices(p);
  require_order_in_block(p.pages, cache);
  const std::vector<int32_t> queries = sorted_queries(p);
  const std::vector<Group> groups = groups_of(p, queries);
  if (queries.empty()) return;
  plan.group = p.query_heads / p.pages.heads;
  const int64_t threads = torch::stable::get_num_threads();
  const Work work = shared_out(plan, whole_tiles(plan, queries, groups), threads);
  compute(plan, work, std::min<int64_t>(threads, work.tiles.size()));
}

}  // namespace
}  // namespace vlcache

STABLE_TORCH_LIBRARY_IMPL(vlcache, CPU, m) { m.impl("sparse_query_attention", TORCH_BOX(&vlcache::attention)); }
