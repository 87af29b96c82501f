// load_rows and save_rows: all layers of an entry <-> pages, in one launch.
//
// A "row" is one head of one token: dim contiguous elements of the entry. Two ways to move rows:
// - vectors: 16-byte pieces, two per thread and row. Rotation needs the element half_rotary further on, so a thread
//   that turns keys holds a piece of the first half and its partner of the second; threads exchange nothing.
//   A block moves one group of rows and ends: the hardware hands groups to multiprocessors as they become free, which
//   balances better than a persistent grid and needs no knowledge of the device. Each thread has kUnroll x 32 bytes
//   under way before it stores the first: 32 KiB per block, and registers let 3 or 4 blocks run on a multiprocessor. An
//   H200 asks for about 25 KiB on each: 4.8 TB/s at a latency of 0.7 us, over 132 of them.
// - elements: everything else (order tables, dimensions that are no neighbours, 8-bit conversions, odd sizes or
//   addresses), one warp per row.
#pragma once

#include "elements.cuh"
#include "rows_plan.h"
#include "turns.cuh"

namespace vlcache {
namespace cuda {

// What turns the keys of type T that a thread moves.
template <typename T>
struct Turner {
  Angles<T> angles;

  VLCACHE_DEVICE void load(const RowsParams& params, const Pieces& pieces) {
    angles.template load<false>(params.turns, params.half_rotary, params.is_neox, pieces);
  }

  // Unpacked only where something turns: the registers of one branch are free for the other.
  VLCACHE_DEVICE void turn(const Pieces& pieces, bool is_neox, Vec16& first, Vec16& second) const {
    if (is_neox) {
      if (pieces.turns_first) turn_halves(first, second);
    } else {
      if (pieces.turns_first) turn_neighbours<0>(first);
      if (pieces.turns_second) turn_neighbours<kLanes / 2>(second);
    }
  }

 private:
  static constexpr int kLanes = Angles<T>::kLanes;

  VLCACHE_DEVICE void turn_halves(Vec16& x, Vec16& y) const {
    float a[kLanes], b[kLanes];
    unpack<T>(x, a);
    unpack<T>(y, b);
    angles.turn_halves(a, b);
    pack<T>(a, x);
    pack<T>(b, y);
  }

  template <int kFirst>
  VLCACHE_DEVICE void turn_neighbours(Vec16& piece) const {
    float a[kLanes];
    unpack<T>(piece, a);
    angles.template turn_neighbours<kFirst>(a);
    pack<T>(a, piece);
  }
};

// Copies need no arithmetic, whatever the type.
struct NoTurner {
  VLCACHE_DEVICE void load(const RowsParams&, const Pieces&) {}
  VLCACHE_DEVICE void turn(const Pieces&, bool, Vec16&, Vec16&) const {}
};

// A row that a thread moves: where it is staged, and the slot that it belongs into.
struct VectorRow {
  char* staged;
  int64_t slot;
  uint32_t head;
  bool exists;
};

VLCACHE_DEVICE VectorRow vector_row(const RowsParams& params, const RowsPlan& plan, char* entry, uint32_t row) {
  if (row >= plan.rows) return {entry, -1, 0, false};
  const uint32_t token = row / uint32_t(params.pages.heads), head = row - token * uint32_t(params.pages.heads);
  const int64_t offset = token * params.entry_token_stride + head * params.entry_head_stride;
  return {entry + offset * plan.itemsize, params.slots[token], head, true};
}

// The row's place in `cache`; null where there is nothing to do.
VLCACHE_DEVICE char* place_in_pages(const RowsParams& params, const RowsPlan& plan, char* cache, uint32_t kv,
                                    const VectorRow& row) {
  // RowsPlan::vectors promises that slots fit into 32 bits, whose division is five times cheaper.
  if (row.slot < 0 || row.slot >= params.num_blocks * params.pages.block_size) return nullptr;
  const uint32_t size = uint32_t(params.pages.block_size), block = uint32_t(row.slot) / size;
  const Strides& strides = params.pages.halves[kv];
  const int64_t offset = block * params.pages.block_stride + strides.origin +
                         (uint32_t(row.slot) - block * size) * strides.token + row.head * strides.head;
  return cache + offset * plan.itemsize;
}

// One block of a launch of plan.groups * layers * 2 blocks. Each step is done for all rows of a thread before the next
// step, so that their loads are under way together.
template <typename Turns, bool kLoad>
VLCACHE_DEVICE void move_vectors(const RowsParams& params, const RowsPlan& plan) {
  constexpr int kRows = RowsPlan::kUnroll;
  const uint32_t unit = thread_index() % plan.units, lane_row = thread_index() / plan.units;
  if (lane_row >= plan.rows_per_pass) return;  // what is left over when the units do not divide the block
  const uint32_t part = block_index().x / plan.groups, layer = part / 2, kv = part % 2;
  const uint32_t first_row = (block_index().x - part * plan.groups) * plan.rows_per_pass * kRows + lane_row;
  const Pieces pieces = pieces_of(plan, int(unit), kv == 0);
  char* entry = static_cast<char*>(params.entry) +
                (layer * params.entry_layer_stride + kv * params.entry_kv_stride) * plan.itemsize;
  char* cache = static_cast<char*>(params.caches[layer]);

  VectorRow rows[kRows];
  Vec16 first[kRows], second[kRows];
  char* paged[kRows];
  const auto load = [&](int i, const char* from) {
    first[i] = load_once(from + pieces.first * 16);
    if (pieces.has_second) second[i] = load_once(from + pieces.second * 16);
  };
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    rows[i] = vector_row(params, plan, entry, first_row + uint32_t(i) * plan.rows_per_pass);
  }
  if (kLoad) {  // without waiting for the slots: the row is there even when nobody wants it
    VLCACHE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (rows[i].exists) load(i, rows[i].staged);
    }
  }
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) paged[i] = place_in_pages(params, plan, cache, kv, rows[i]);
  if (!kLoad) {
    VLCACHE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (paged[i] != nullptr) load(i, paged[i]);
    }
  }
  Turns turns;
  if (kv == 0) turns.load(params, pieces);
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (paged[i] == nullptr) continue;
    if (kv == 0) turns.turn(pieces, plan.is_neox, first[i], second[i]);
    char* to = kLoad ? paged[i] : rows[i].staged;
    store(to + pieces.first * 16, first[i]);
    if (pieces.has_second) store(to + pieces.second * 16, second[i]);
  }
}

// Where a row lies on both sides.
struct RowAddress {
  int64_t layer, kv, token, head;
  int64_t entry;        // elements from the start of the entry
  int64_t block, slot;  // slot: within the block
};

VLCACHE_DEVICE void load_element(const RowsParams& params, const RowAddress& row, int64_t d) {
  void* cache = params.caches[row.layer];
  const int64_t to = row.block * params.pages.block_stride + params.pages.offset(row.kv, row.slot, row.head, d);
  const bool turns = params.turns != nullptr && row.kv == 0 && d < 2 * params.half_rotary;
  const bool converts = params.entry_type != params.cache_type;
  if (!turns && !converts) {
    copy_element(cache, to, params.entry, row.entry + d, itemsize_of(params.cache_type));
    return;
  }
  float value = read_element(params.entry, params.entry_type, row.entry + d);
  if (turns) {
    const int64_t half = params.half_rotary;
    const int64_t pair = params.is_neox ? d % half : d / 2;
    const bool is_x = params.is_neox ? d < half : d % 2 == 0;
    const int64_t step = params.is_neox ? half : 1;
    const float other = read_element(params.entry, params.entry_type, row.entry + (is_x ? d + step : d - step));
    const float cosine = params.turns[pair], sine = params.turns[half + pair];
    value = is_x ? value * cosine - other * sine : value * cosine + other * sine;
  }
  if (params.scales != nullptr) value /= params.scales[2 * row.layer + row.kv];
  write_element(cache, params.cache_type, to, value);
}

VLCACHE_DEVICE void save_element(const RowsParams& params, const RowAddress& row, int64_t d) {
  const void* cache = params.caches[row.layer];
  const int64_t from = row.block * params.pages.block_stride + params.pages.offset(row.kv, row.slot, row.head, d);
  if (params.entry_type == params.cache_type) {
    copy_element(params.entry, row.entry + d, cache, from, itemsize_of(params.cache_type));
    return;
  }
  const float scale = params.scales == nullptr ? 1.0f : params.scales[2 * row.layer + row.kv];
  write_element(params.entry, params.entry_type, row.entry + d, read_element(cache, params.cache_type, from) * scale);
}

// One thread of a launch of any size: each warp takes rows in turn.
template <bool kLoad>
VLCACHE_DEVICE void move_elements(const RowsParams& params) {
  const int64_t warps_per_block = num_threads() / kWarp;
  const int64_t first_warp = block_index().x * warps_per_block + thread_index() / kWarp;
  const int64_t heads = params.pages.heads, rows_per_part = params.tokens * heads;
  for (int64_t row = first_warp; row < params.layers * 2 * rows_per_part; row += warps_per_block * grid_size().x) {
    const int64_t part = row / rows_per_part, token = (row - part * rows_per_part) / heads;
    const int64_t slot = params.slots[token];
    if (slot < 0 || slot >= params.num_blocks * params.pages.block_size) continue;
    RowAddress address{part / 2, part % 2, token, row % heads, 0, slot / params.pages.block_size, 0};
    address.slot = slot - address.block * params.pages.block_size;
    address.entry = address.layer * params.entry_layer_stride + address.kv * params.entry_kv_stride +
                    token * params.entry_token_stride + address.head * params.entry_head_stride;
    for (int64_t d = thread_index() % kWarp; d < params.pages.dim; d += kWarp) {
      if (kLoad) {
        load_element(params, address, d);
      } else {
        save_element(params, address, d);
      }
    }
  }
}

// Calls the kernel that a plan asks for: launch.vectors<Turns>() or launch.elements(). Host code.
template <bool kLoad, typename Launch>
void choose_rows_kernel(const RowsParams& params, const RowsPlan& plan, const Launch& launch) {
  if (!plan.vectors) return launch.elements();
  if (params.turns == nullptr) return launch.template vectors<NoTurner>();
  if constexpr (kLoad) {  // what is saved is never turned
    if (params.cache_type == Type::kFloat32) return launch.template vectors<Turner<float>>();
    if (params.cache_type == Type::kBFloat16) return launch.template vectors<Turner<BFloat16>>();
    return launch.template vectors<Turner<Float16>>();
  }
}

}  // namespace cuda
}  // namespace vlcache
