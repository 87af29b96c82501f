// One row: dim elements of an entry, side by side, to or from a page of any type and layout, turned on the way. In an
// unnamed namespace for the reason given in numeric.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "numeric.h"

namespace vlcache {
namespace {

// Calls some(i) for kStep numbers from i on, until all of [first, end) had their turn, some of the last ones twice.
// There are at least kStep of them.
template <int64_t kStep, typename Some>
inline void in_steps(int64_t first, int64_t end, Some some) {
  for (int64_t i = first; i < end; i += kStep) some(i + kStep <= end ? i : end - kStep);
}

// Rows are short: a call of memcpy takes longer than to move one.
template <typename T>
inline void copy_elements(T* to, const T* from, int64_t count, bool streams) {
  constexpr int64_t kWhole = sizeof(Floats) / sizeof(T);
  if (count < kWhole) {
    std::memcpy(to, from, count * sizeof(T));
    return;
  }
  in_steps<kWhole>(0, count, [&](int64_t i) {
    Floats some;
    std::memcpy(&some, from + i, sizeof(some));
    put_vector(to + i, some, streams);
  });
}

// (Not PageLayout::offset: it has external linkage, see numeric.h.)
inline int64_t row_start(const Strides& strides, int64_t token, int64_t head) {
  return strides.origin + token * strides.token + head * strides.head;
}

// A row of a page: its elements side by side, or wherever the layout says. `streams`: what is put into it, and all of it in
// an entry, goes past the caches.
template <typename T>
struct DenseRow {
  using Page = T;
  T* start;
  bool streams;

  DenseRow(T* row, bool streams) : start(row), streams(streams) {}
  DenseRow(const PageLayout& pages, T* block, int64_t kv, int64_t token, int64_t head, bool streams)
      : start(block + row_start(pages.halves[kv], token, head)), streams(streams) {}

  void get(int64_t first, int64_t count, T* values) const { copy_elements(values, start + first, count, false); }
  void get_all(int64_t count, T* to) const { copy_elements(to, start, count, streams); }
  void put(int64_t first, int64_t count, const T* values) const { copy_elements(start + first, values, count, streams); }
};

template <typename T>
struct ScatteredRow {
  using Page = T;
  T* start;
  int64_t step;
  const int32_t* order = nullptr;  // null: in equal steps

  ScatteredRow(const PageLayout& pages, T* block, int64_t kv, int64_t token, int64_t head)
      : start(block), step(pages.halves[kv].dim) {
    if (pages.order == nullptr) {
      start += row_start(pages.halves[kv], token, head);
    } else {
      order = pages.order + ((kv * pages.block_size + token) * pages.heads + head) * pages.dim;
    }
  }

  int64_t offset(int64_t d) const { return order != nullptr ? order[d] : d * step; }
  void get(int64_t first, int64_t count, T* values) const {
    for (int64_t i = 0; i < count; ++i) values[i] = start[offset(first + i)];
  }
  void get_all(int64_t count, T* to) const { get(0, count, to); }
  void put(int64_t first, int64_t count, const T* values) const {
    for (int64_t i = 0; i < count; ++i) start[offset(first + i)] = values[i];
  }
};

template <typename Row>
inline void put_lanes(Row row, int64_t first, Floats values) {
  typename Row::Page rounded[kLanes];
  store_rounded(rounded, values);
  row.put(first, kLanes, rounded);
}

template <typename Row>
inline void put_one(Row row, int64_t d, float value) {
  const auto rounded = from_float<typename Row::Page>(value);
  row.put(d, 1, &rounded);
}

// `in_steps` of kLanes; one(i) for each number where they are fewer.
template <typename Lanes, typename One>
inline void for_range(int64_t first, int64_t end, Lanes lanes, One one) {
  if (end - first >= kLanes) return in_steps<kLanes>(first, end, lanes);
  for (int64_t i = first; i < end; ++i) one(i);
}

// Dimensions first ... dim - 1 of an entry's row into a page's row. With one type on both sides the bits are copied.
template <typename Row, typename Staged>
inline void copy_row(Row row, const Staged* staged, int64_t first, int64_t dim, float scale) {
  if constexpr (std::is_same_v<typename Row::Page, Staged>) {
    row.put(first, dim - first, staged + first);
  } else {
    for_range(
        first, dim, [&](int64_t d) { put_lanes(row, d, load_stored(staged + d) / scale); },
        [&](int64_t d) { put_one(row, d, to_float(staged[d]) / scale); });
  }
}

template <typename Row, typename Staged>
inline void save_row(Row row, Staged* staged, int64_t dim, float scale) {
  using Page = typename Row::Page;
  if constexpr (std::is_same_v<Page, Staged>) {
    row.get_all(dim, staged);
  } else {
    Page values[kLanes];
    for_range(
        0, dim,
        [&](int64_t d) {
          row.get(d, kLanes, values);
          store_rounded(staged + d, load_stored(values) * scale);
        },
        [&](int64_t d) {
          row.get(d, 1, values);
          staged[d] = from_float<Staged>(to_float(values[0]) * scale);
        });
  }
}

// How rows turn. kPairs: (2i, 2i + 1) belong together, else (i, i + half).
enum class Turn { kNone, kHalves, kPairs };

// Of one pair (Float is float) or of kLanes of them. What is stored of a page's own type is not scaled.
template <typename Float, bool kIsScaled>
inline void turn_pairs(Float& x, Float& y, Float cosine, Float sine, float scale) {
  const Float turned_x = x * cosine - y * sine, turned_y = y * cosine + x * sine;
  x = kIsScaled ? turned_x / scale : turned_x;
  y = kIsScaled ? turned_y / scale : turned_y;
}

// bfloat16 is the upper half of a float, so the elements in the halves of 32-bit lanes are taken apart and put together
// without a shuffle: half the instructions of the general way.
inline Floats even_halves(Bits lanes) { return bits_as<Floats>(lanes << 16); }
inline Floats odd_halves(Bits lanes) { return bits_as<Floats>(lanes & 0xffff0000u); }

// Rounded as by BFloat16Code, but left in the upper half.
inline Bits rounded_upper(Floats value) {
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value == value ? rounded : Bits{} + 0x7fc00000u;
}

inline Bits joined_halves(Floats even, Floats odd) {
  return (rounded_upper(even) >> 16) | (rounded_upper(odd) & 0xffff0000u);
}

inline Bits load_halves(const BFloat16* from) {
  Bits lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

template <typename Row>
inline void put_halves(Row row, int64_t first, Bits lanes) {
  BFloat16 elements[2 * kLanes];
  std::memcpy(elements, &lanes, sizeof(lanes));
  row.put(first, 2 * kLanes, elements);
}

// How many pairs of bfloat16 elements are turned at once.
template <Turn turn>
constexpr int64_t kPairsAtOnce = turn == Turn::kHalves ? 2 * kLanes : kLanes;

// All pairs of a row, which are kPairsAtOnce or more.
template <Turn turn, typename Row>
inline void turn_bfloat16(const RowsParams& params, Row row, const BFloat16* staged) {
  const int64_t half = params.half_rotary;
  const float* cosines = params.turns;
  const float* sines = params.turns + half;
  in_steps<kPairsAtOnce<turn>>(0, half, [&](int64_t i) {
    if constexpr (turn == Turn::kHalves) {
      Floats even_cosines = load(cosines + i), odd_cosines = load(cosines + i + kLanes);
      Floats even_sines = load(sines + i), odd_sines = load(sines + i + kLanes);
      separate(even_cosines, odd_cosines);
      separate(even_sines, odd_sines);
      const Bits x = load_halves(staged + i), y = load_halves(staged + i + half);
      Floats even_x = even_halves(x), odd_x = odd_halves(x), even_y = even_halves(y), odd_y = odd_halves(y);
      turn_pairs<Floats, false>(even_x, even_y, even_cosines, even_sines, 1.0f);
      turn_pairs<Floats, false>(odd_x, odd_y, odd_cosines, odd_sines, 1.0f);
      put_halves(row, i, joined_halves(even_x, odd_x));
      put_halves(row, i + half, joined_halves(even_y, odd_y));
    } else {
      const Bits pairs = load_halves(staged + 2 * i);
      Floats x = even_halves(pairs), y = odd_halves(pairs);
      turn_pairs<Floats, false>(x, y, load(cosines + i), load(sines + i), 1.0f);
      put_halves(row, 2 * i, joined_halves(x, y));
    }
  });
}

// Pairs of any type, in any number.
template <Turn turn, typename Row, typename Staged>
inline void turn_row(const RowsParams& params, Row row, const Staged* staged, float scale) {
  constexpr bool kIsScaled = !std::is_same_v<typename Row::Page, Staged>;
  const int64_t half = params.half_rotary;
  const float* cosines = params.turns;
  const float* sines = params.turns + half;
  for_range(
      0, half,
      [&](int64_t i) {
        const int64_t first = turn == Turn::kPairs ? 2 * i : i;
        const int64_t second = turn == Turn::kPairs ? 2 * i + kLanes : i + half;
        Floats x = load_stored(staged + first), y = load_stored(staged + second);
        if constexpr (turn == Turn::kPairs) separate(x, y);
        turn_pairs<Floats, kIsScaled>(x, y, load(cosines + i), load(sines + i), scale);
        if constexpr (turn == Turn::kPairs) interleave(x, y);
        put_lanes(row, first, x);
        put_lanes(row, second, y);
      },
      [&](int64_t i) {
        const int64_t first = turn == Turn::kPairs ? 2 * i : i;
        const int64_t second = turn == Turn::kPairs ? 2 * i + 1 : i + half;
        float x = to_float(staged[first]), y = to_float(staged[second]);
        turn_pairs<float, kIsScaled>(x, y, cosines[i], sines[i], scale);
        put_one(row, first, x);
        put_one(row, second, y);
      });
}

template <Turn turn, typename Row, typename Staged>
inline void load_row(const RowsParams& params, Row row, const Staged* staged, float scale) {
  constexpr bool kIsBFloat16 = std::is_same_v<typename Row::Page, BFloat16> && std::is_same_v<Staged, BFloat16>;
  if constexpr (turn == Turn::kNone) return copy_row(row, staged, 0, params.pages.dim, scale);
  bool is_turned = false;
  if constexpr (kIsBFloat16 && turn != Turn::kNone) {
    is_turned = params.half_rotary >= kPairsAtOnce<turn>;
    if (is_turned) turn_bfloat16<turn>(params, row, staged);
  }
  if (!is_turned) turn_row<turn>(params, row, staged, scale);
  if (2 * params.half_rotary < params.pages.dim) {
    copy_row(row, staged, 2 * params.half_rotary, params.pages.dim, scale);
  }
}

}  // namespace
}  // namespace vlcache
