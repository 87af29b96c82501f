// shift_rows: an entry of one layer with changes added, keys rotated, in one launch.
//
// Rows, pieces and groups are those of rows.cuh, but half as many rows are under way to a thread: each comes with its
// change, which takes as many registers and as many bytes from memory. What is written may be what was read of the
// entry: whatever a thread reads of a row, it alone writes. Angles of a token are read anew for each row, from the
// caches: to keep them in registers would tie threads to tokens.
#pragma once

#include "elements.cuh"
#include "rows_plan.h"
#include "turns.cuh"

namespace vlcache {
namespace cuda {

// What a thread holds of a row.
struct PieceValues {
  Vec16 first, second;
};

VLCACHE_DEVICE PieceValues load_pieces(const void* rows, int64_t offset, int itemsize, const Pieces& pieces) {
  const char* row = static_cast<const char*>(rows) + offset * itemsize;
  return {load_once(row + pieces.first * 16), pieces.has_second ? load_once(row + pieces.second * 16) : Vec16{}};
}

// Adds the change to both pieces of a row, turned to the token's place where the row is a key.
template <typename T>
VLCACHE_DEVICE void add_shift(const ShiftParams& params, const RowsPlan& plan, const Pieces& pieces, bool is_key,
                              uint32_t token, const PieceValues& shift, float (&a)[kPerPiece<T>],
                              float (&b)[kPerPiece<T>]) {
  float first[kPerPiece<T>], second[kPerPiece<T>];
  unpack<T>(shift.first, first);
  unpack<T>(shift.second, second);
  if (is_key) {
    Angles<T> place;
    place.template load<true>(params.places + int64_t(token) * 2 * params.half_rotary, params.half_rotary, plan.is_neox,
                              pieces);
    place.turn(pieces, plan.is_neox, first, second);
  }
  VLCACHE_UNROLL
  for (int i = 0; i < kPerPiece<T>; ++i) {
    a[i] += first[i];
    b[i] += second[i];
  }
}

// One block of a launch of plan.groups * 2 blocks. The loads of all rows of a thread are under way together.
template <typename T>
VLCACHE_DEVICE void shift_vectors(const ShiftParams& params, const RowsPlan& plan) {
  constexpr int kRows = RowsPlan::kShiftUnroll;
  const uint32_t unit = thread_index() % plan.units, lane_row = thread_index() / plan.units;
  if (lane_row >= plan.rows_per_pass) return;  // what is left over when the units do not divide the block
  const uint32_t kv = block_index().x / plan.groups, heads = uint32_t(params.heads);
  const uint32_t first_row = (block_index().x - kv * plan.groups) * plan.rows_per_pass * kRows + lane_row;
  const Pieces pieces = pieces_of(plan, int(unit), kv == 0);

  PieceValues values[kRows], shifts[kRows];
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const uint32_t row = first_row + uint32_t(i) * plan.rows_per_pass, token = row / heads, head = row - token * heads;
    if (row >= plan.rows) continue;
    values[i] = load_pieces(params.entry, params.entry_strides.offset(kv, token, head), plan.itemsize, pieces);
    shifts[i] = load_pieces(params.shift, params.shift_strides.offset(kv, token, head), plan.itemsize, pieces);
  }
  const bool turns_keys = kv == 0 && params.turns != nullptr;
  Angles<T> turns;
  if (turns_keys) turns.template load<true>(params.turns, params.half_rotary, plan.is_neox, pieces);
  VLCACHE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const uint32_t row = first_row + uint32_t(i) * plan.rows_per_pass, token = row / heads, head = row - token * heads;
    if (row >= plan.rows) continue;
    float a[kPerPiece<T>], b[kPerPiece<T>];
    unpack<T>(values[i].first, a);
    unpack<T>(values[i].second, b);
    if (turns_keys) turns.turn(pieces, plan.is_neox, a, b);
    add_shift<T>(params, plan, pieces, kv == 0, token, shifts[i], a, b);
    pack<T>(a, values[i].first);
    pack<T>(b, values[i].second);
    char* to = static_cast<char*>(params.out) + params.out_strides.offset(kv, token, head) * plan.itemsize;
    store(to + pieces.first * 16, values[i].first);
    if (pieces.has_second) store(to + pieces.second * 16, values[i].second);
  }
}

VLCACHE_DEVICE void turn_pair(float& x, float& y, const float* table, int64_t half, int64_t pair) {
  const float cosine = table[pair], sine = table[half + pair], turned = x * cosine - y * sine;
  y = y * cosine + x * sine;
  x = turned;
}

// A row: of which token, where it begins, in elements, and how many of its pairs turn.
struct ShiftedRow {
  int64_t token, entry, shift, out, pairs;
};

// Pair i of a row or, behind the pairs, the dimension that is as far from the last of them.
VLCACHE_DEVICE void shift_pair_or_element(const ShiftParams& params, const ShiftedRow& row, int64_t i) {
  const int64_t half = params.half_rotary;
  const int64_t d = i >= row.pairs ? i + row.pairs : params.is_neox ? i : 2 * i;
  float x = read_element(params.entry, params.type, row.entry + d);
  float shift_x = read_element(params.shift, params.type, row.shift + d);
  if (i < row.pairs) {
    const int64_t other = d + (params.is_neox ? half : 1);
    float y = read_element(params.entry, params.type, row.entry + other);
    float shift_y = read_element(params.shift, params.type, row.shift + other);
    if (params.turns != nullptr) turn_pair(x, y, params.turns, half, i);
    turn_pair(shift_x, shift_y, params.places + row.token * 2 * half, half, i);
    write_element(params.out, params.type, row.out + other, y + shift_y);
  }
  write_element(params.out, params.type, row.out + d, x + shift_x);
}

// One thread of a launch of any size: each warp takes rows in turn, each lane pairs and dimensions that do not turn.
VLCACHE_DEVICE void shift_elements(const ShiftParams& params) {
  const int64_t warps_per_block = num_threads() / kWarp;
  const int64_t first_warp = block_index().x * warps_per_block + thread_index() / kWarp;
  const int64_t heads = params.heads, rows_per_part = params.tokens * heads;
  for (int64_t row = first_warp; row < 2 * rows_per_part; row += warps_per_block * grid_size().x) {
    const int64_t kv = row / rows_per_part, token = (row - kv * rows_per_part) / heads, head = row % heads;
    const ShiftedRow place{token, params.entry_strides.offset(kv, token, head),
                           params.shift_strides.offset(kv, token, head), params.out_strides.offset(kv, token, head),
                           kv == 0 ? params.half_rotary : 0};
    for (int64_t i = thread_index() % kWarp; i < params.dim - place.pairs; i += kWarp) {
      shift_pair_or_element(params, place, i);
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
