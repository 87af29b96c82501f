// shift_rows: an entry of one layer with a change added, keys rotated, in one launch.
//
// Rows, pieces and groups are those of rows.cuh. What is written may be what was read: whatever a thread reads of a row,
// it alone writes. The tables (angles of a token, change of a head) are read anew for each row, from the caches: to keep
// a head's change in registers would tie threads to heads.
#pragma once

#include "elements.cuh"
#include "rows_plan.h"
#include "turns.cuh"

namespace vlcache {
namespace cuda {

// Adds the change to both pieces of a row, turned to the token's place where the row is a key.
template <typename T>
VLCACHE_DEVICE void add_shift(const ShiftParams& params, const RowsPlan& plan, const Pieces& pieces, uint32_t kv,
                              uint32_t token, uint32_t head, float (&a)[kPerPiece<T>], float (&b)[kPerPiece<T>]) {
  constexpr int kLanes = kPerPiece<T>;
  const float* shift = params.shift + (kv * params.heads + head) * params.dim;
  float first[kLanes], second[kLanes] = {};
  read_floats<kLanes>(shift + pieces.first * kLanes, first);
  if (pieces.has_second) read_floats<kLanes>(shift + pieces.second * kLanes, second);
  if (kv == 0) {
    Angles<T> place;
    place.template load<true>(params.places + int64_t(token) * 2 * params.half_rotary, params.half_rotary, plan.is_neox,
                              pieces);
    place.turn(pieces, plan.is_neox, first, second);
  }
  VLCACHE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    a[i] += first[i];
    b[i] += second[i];
  }
}

// One block of a launch of plan.groups * 2 blocks. The loads of all rows of a thread are under way together.
template <typename T>
VLCACHE_DEVICE void shift_vectors(const ShiftParams& params, const RowsPlan& plan) {
  constexpr int kRows = RowsPlan::kUnroll;
  const uint32_t unit = thread_index() % plan.units, lane_row = thread_index() / plan.units;
  if (lane_row >= plan.rows_per_pass) return;  // what is left over when the units do not divide the block
  const uint32_t kv = block_index().x / plan.groups, heads = uint32_t(params.heads);
  const uint32_t first_row = (block_index().x - kv * plan.groups) * plan.rows_per_pass * kRows + lane_row;
  const Pieces pieces = pieces_of(plan, int(unit), kv == 0);

  Vec16 first[kRows], second[kRows];
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const uint32_t row = first_row + uint32_t(i) * plan.rows_per_pass, token = row / heads, head = row - token * heads;
    if (row >= plan.rows) continue;
    const char* from = static_cast<const char*>(params.entry) +
                       (kv * params.entry_kv_stride + token * params.entry_token_stride +
                        head * params.entry_head_stride) * plan.itemsize;
    first[i] = load_once(from + pieces.first * 16);
    second[i] = pieces.has_second ? load_once(from + pieces.second * 16) : Vec16{};
  }
  const bool turns_keys = kv == 0 && params.turns != nullptr;
  Angles<T> turns;
  if (turns_keys) turns.template load<true>(params.turns, params.half_rotary, plan.is_neox, pieces);
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const uint32_t row = first_row + uint32_t(i) * plan.rows_per_pass, token = row / heads, head = row - token * heads;
    if (row >= plan.rows) continue;
    float a[kPerPiece<T>], b[kPerPiece<T>];
    unpack<T>(first[i], a);
    unpack<T>(second[i], b);
    if (turns_keys) turns.turn(pieces, plan.is_neox, a, b);
    add_shift<T>(params, plan, pieces, kv, token, head, a, b);
    pack<T>(a, first[i]);
    pack<T>(b, second[i]);
    char* to = static_cast<char*>(params.out) + (kv * params.out_kv_stride + token * params.out_token_stride +
                                                 head * params.out_head_stride) * plan.itemsize;
    store(to + pieces.first * 16, first[i]);
    if (pieces.has_second) store(to + pieces.second * 16, second[i]);
  }
}

VLCACHE_DEVICE void turn_pair(float& x, float& y, const float* table, int64_t half, int64_t pair) {
  const float cosine = table[pair], sine = table[half + pair], turned = x * cosine - y * sine;
  y = y * cosine + x * sine;
  x = turned;
}

// Where rows begin, in elements.
struct ShiftedRow {
  int64_t token, entry, out, shift;
};

VLCACHE_DEVICE void shift_pair(const ShiftParams& params, const ShiftedRow& row, int64_t pair) {
  const int64_t half = params.half_rotary;
  const int64_t d = params.is_neox ? pair : 2 * pair, other = d + (params.is_neox ? half : 1);
  float x = read_element(params.entry, params.type, row.entry + d);
  float y = read_element(params.entry, params.type, row.entry + other);
  if (params.turns != nullptr) turn_pair(x, y, params.turns, half, pair);
  float shift_x = params.shift[row.shift + d], shift_y = params.shift[row.shift + other];
  turn_pair(shift_x, shift_y, params.places + row.token * 2 * half, half, pair);
  write_element(params.out, params.type, row.out + d, x + shift_x);
  write_element(params.out, params.type, row.out + other, y + shift_y);
}

// One thread of a launch of any size: each warp takes rows in turn, each lane pairs and dimensions that do not turn.
VLCACHE_DEVICE void shift_elements(const ShiftParams& params) {
  const int64_t warps_per_block = num_threads() / kWarp;
  const int64_t first_warp = block_index().x * warps_per_block + thread_index() / kWarp;
  const int64_t heads = params.heads, rows_per_part = params.tokens * heads;
  for (int64_t row = first_warp; row < 2 * rows_per_part; row += warps_per_block * grid_size().x) {
    const int64_t kv = row / rows_per_part, token = (row - kv * rows_per_part) / heads, head = row % heads;
    const int64_t pairs = kv == 0 ? params.half_rotary : 0;
    ShiftedRow place{token, 0, 0, (kv * heads + head) * params.dim};
    place.entry = kv * params.entry_kv_stride + token * params.entry_token_stride + head * params.entry_head_stride;
    place.out = kv * params.out_kv_stride + token * params.out_token_stride + head * params.out_head_stride;
    for (int64_t i = thread_index() % kWarp; i < params.dim - pairs; i += kWarp) {
      if (i < pairs) {
        shift_pair(params, place, i);
        continue;
      }
      const int64_t d = i + pairs;
      const float value = read_element(params.entry, params.type, place.entry + d) + params.shift[place.shift + d];
      write_element(params.out, params.type, place.out + d, value);
    }
  }
}

// Calls the kernel that a plan asks for: launch.vectors<T>() or launch.elements(). Host code.
template <typename Launch>
void choose_shift_kernel(const ShiftParams& params, const RowsPlan& plan, const Launch& launch) {
  if (!plan.vectors) return launch.elements();
  if (params.type == Type::kFloat32) return launch.template vectors<float>();
  if (params.type == Type::kBFloat16) return launch.template vectors<BFloat16>();
  return launch.template vectors<Float16>();
}

}  // namespace cuda
}  // namespace vlcache
