// A tile of attention: its rows, what they see, and how queries, keys and values get into shared memory.
#pragma once

#include "elements.cuh"
#include "tile_math.cuh"

namespace vlcache {
namespace cuda {

// Keys that a row sees or a tile loads: [first, last], empty when first > last.
struct KeySpan {
  int first, last;
};

// What a block keeps in shared memory.
template <typename T, int kWidth>
struct AttentionTile {
  using Math = TileMath<T, kWidth>;
  int rows;
  T* queries;
  T* stages;  // per stage: keys, then values
  int32_t* requests;   // of each row; -1: sees nothing
  int32_t* positions;

  explicit VLCACHE_DEVICE AttentionTile(const AttentionPlan& plan) : rows(plan.rows) {
    queries = reinterpret_cast<T*>(shared_memory());
    stages = queries + rows * Math::kPitch;
    requests = reinterpret_cast<int32_t*>(stages + 4 * Math::kKeys * Math::kPitch);
    positions = requests + rows;
  }

  VLCACHE_DEVICE T* keys(int stage) const { return stages + 2 * stage * Math::kKeys * Math::kPitch; }
  VLCACHE_DEVICE T* values(int stage) const { return keys(stage) + Math::kKeys * Math::kPitch; }
};

// The query and the head of a tile's row.
struct RowOrigin {
  int64_t query, head;
  bool exists;
};

VLCACHE_DEVICE RowOrigin origin_of(const AttentionParams& params, const AttentionPlan& plan, int row) {
  // The last tiles first: queries mostly come in the order of their positions, and those have the most keys.
  const int64_t index = int64_t(plan.tiles - 1 - int(block_index().x)) * plan.rows + row;
  const int64_t group = params.query_heads / params.pages.heads, query = index / group;
  return {query, block_index().y * group + index - query * group, index < plan.total_rows};
}

VLCACHE_DEVICE KeySpan seen_from(const AttentionParams& params, int position) {
  const int64_t first = int64_t(position) + 1 - params.window;
  return {params.window > 0 && first > 0 ? int(first) : 0, position};
}

template <typename T, int kWidth>
VLCACHE_DEVICE void load_queries(const AttentionParams& params, const AttentionPlan& plan,
                                 const AttentionTile<T, kWidth>& tile) {
  constexpr int kLanes = 16 / sizeof(T), kPieces = kWidth / kLanes;
  const T* query = static_cast<const T*>(params.query);  // unless it is converted
  for (int i = thread_index(); i < tile.rows * kPieces; i += num_threads()) {
    const int row = i / kPieces, first = i % kPieces * kLanes;
    const RowOrigin origin = origin_of(params, plan, row);
    const int64_t from = origin.query * params.query_stride + origin.head * params.query_head_stride;
    T* to = tile.queries + row * TileMath<T, kWidth>::kPitch + first;
    const int64_t dim = origin.exists ? params.pages.dim : 0;
    if (plan.vectors) {
      copy_async(to, first < dim ? query + from + first : query, first < dim);
    } else {
      VLCACHE_UNROLL_BY(1)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t d = first + lane;
        to[lane] = from_float<T>(d < dim ? read_element(params.query, params.query_type, from + d) : 0.0f);
      }
    }
  }
  for (int row = thread_index(); row < tile.rows; row += num_threads()) {
    const RowOrigin origin = origin_of(params, plan, row);
    const int64_t capacity = params.blocks_per_request * params.pages.block_size;
    const int32_t request = origin.exists ? params.request[origin.query] : -1;
    const int32_t position = origin.exists ? params.position[origin.query] : -1;
    tile.requests[row] = position >= 0 && request >= 0 && request < params.requests ? request : -1;
    tile.positions[row] = position < capacity ? position : int(capacity - 1);
  }
  copies_wait();
  barrier();
}

// The lowest request above `last` among the tile's rows, or -1.
template <typename Tile>
VLCACHE_DEVICE int next_request(const Tile& tile, int last) {
  int next = -1;
  VLCACHE_UNROLL_BY(4)
  for (int row = 0; row < tile.rows; ++row) {
    const int request = tile.requests[row];
    if (request > last && (next < 0 || request < next)) next = request;
  }
  return next;
}

// What rows [begin, end) see of a request.
struct Sight {
  KeySpan any;  // from the first key that a row sees to the last
  KeySpan all;  // keys that every row sees
};

template <typename Tile>
VLCACHE_DEVICE Sight sight_of(const AttentionParams& params, const Tile& tile, int request, int begin, int end) {
  constexpr int kMax = 0x7fffffff;
  Sight sight{{kMax, -1}, {0, kMax}};
  VLCACHE_UNROLL_BY(2)
  for (int row = begin; row < end; ++row) {
    const bool is_here = tile.requests[row] == request;
    const KeySpan seen = seen_from(params, tile.positions[row]);
    if (is_here && seen.first < sight.any.first) sight.any.first = seen.first;
    if (is_here && seen.last > sight.any.last) sight.any.last = seen.last;
    if (seen.first > sight.all.first) sight.all.first = seen.first;
    if (!is_here || seen.last < sight.all.last) sight.all.last = is_here ? seen.last : -1;
  }
  return sight;
}

// A block of the table, and the key's place in it. Blocks that do not exist are -1.
struct KeyPlace {
  int64_t block;
  int slot;
};

VLCACHE_DEVICE KeyPlace place_of(const AttentionParams& params, const AttentionPlan& plan, int request, int key) {
  const int size = int(params.pages.block_size);
  const int index = plan.block_shift >= 0 ? key >> plan.block_shift : key / size;
  const int64_t block = params.block_table[request * params.blocks_per_request + index];
  return {block >= 0 && block < params.num_blocks ? block : -1, key - index * size};
}

// Dimension d of a key (kv 0) or value (1), whatever the layout and type of the pages; 0 where there is none.
VLCACHE_DEVICE float key_element(const AttentionParams& params, const KeyPlace& place, int kv, int64_t d) {
  if (place.block < 0 || d >= params.pages.dim) return 0.0f;
  const int64_t offset = params.pages.offset(kv, place.slot, block_index().y, d);
  return read_element(params.cache, params.cache_type, place.block * params.pages.block_stride + offset);
}

// Of pages whose dimensions are neighbours: where a row starts in its block.
VLCACHE_DEVICE int64_t dense_row(const AttentionParams& params, const KeyPlace& place, int kv) {
  const Strides& strides = params.pages.halves[kv];
  return strides.origin + place.slot * strides.token + block_index().y * strides.head;
}

template <typename T>
VLCACHE_DEVICE void gather_piece(const AttentionParams& params, const KeyPlace& place, int kv, int first, T* to) {
  VLCACHE_UNROLL_BY(1)
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) to[i] = from_float<T>(key_element(params, place, kv, first + i));
}

// Starts loading kKeys keys and values from `first` on; those outside of `wanted` become zeros.
template <typename T, int kWidth>
VLCACHE_DEVICE void load_keys(const AttentionParams& params, const AttentionPlan& plan,
                              const AttentionTile<T, kWidth>& tile, int stage, int request, int first,
                              const KeySpan& wanted) {
  using Math = TileMath<T, kWidth>;
  constexpr int kLanes = 16 / sizeof(T), kPieces = kWidth / kLanes;
  VLCACHE_UNROLL_BY(2)
  for (int i = thread_index(); i < Math::kKeys * kPieces; i += num_threads()) {
    const int row = i / kPieces, d = i % kPieces * kLanes, key = first + row;
    const bool exists = key >= wanted.first && key <= wanted.last;
    const KeyPlace place = exists ? place_of(params, plan, request, key) : KeyPlace{-1, 0};
    T* key_piece = tile.keys(stage) + row * Math::kPitch + d;
    T* value_piece = tile.values(stage) + row * Math::kPitch + d;
    if (plan.vectors) {
      const bool valid = place.block >= 0 && d < params.pages.dim;
      const T* cache = static_cast<const T*>(params.cache);
      const int64_t block = place.block * params.pages.block_stride + d;
      copy_async(key_piece, valid ? cache + block + dense_row(params, place, 0) : cache, valid);
      copy_async(value_piece, valid ? cache + block + dense_row(params, place, 1) : cache, valid);
    } else {
      gather_piece(params, place, 0, d, key_piece);
      gather_piece(params, place, 1, d, value_piece);
    }
  }
}

// The tiles of keys [first, end) of a request that this block's split takes.
struct TileRange {
  int first, end;
};

VLCACHE_DEVICE TileRange split_of(const AttentionPlan& plan, const KeySpan& keys, int keys_per_tile) {
  if (keys.first > keys.last) return {0, 0};
  const int first = keys.first / keys_per_tile, count = keys.last / keys_per_tile + 1 - first;
  const int64_t split = block_index().z;
  return {first + int(count * split / plan.splits), first + int(count * (split + 1) / plan.splits)};
}

}  // namespace cuda
}  // namespace vlcache
