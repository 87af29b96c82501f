// Transposition of matrices of storage types, whatever their bits mean. In an unnamed namespace for the reason given in
// numeric.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/stream.h"
#include "cpu/vectors.h"

namespace vlcache {
namespace {

typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));  // of the 32-bit lanes of a vector

// Elements of T that share a 32-bit lane, the unit in which vectors.h transposes.
template <typename T>
constexpr int64_t kPerLane = 4 / int64_t(sizeof(T));

// Side of the squares that are transposed at once: a whole cache line with 64-byte vectors.
template <typename T>
constexpr int64_t kSquare = kLanes * kPerLane<T>;

template <int... kIndex>
inline Halves shuffled_halves(Halves a, Halves b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, Halves{kIndex...});
#endif
}

// x0 y0 x1 y1 ... in two vectors becomes x0 x1 ... and y0 y1 ...
template <int... kHalf>
inline void separate_halves(Halves& a, Halves& b, std::integer_sequence<int, kHalf...>) {
  const Halves evens = shuffled_halves<(2 * kHalf)...>(a, b);
  b = shuffled_halves<(2 * kHalf + 1)...>(a, b);
  a = evens;
}

// Squares and halves of them: to[j][i] = from[i][j]. `streams`: past the caches. Of 32-bit elements:
inline void transpose_square(const float* from, int64_t from_step, float* to, int64_t to_step, bool streams) {
  Floats rows[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * from_step);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) put_vector(to + i * to_step, rows[i], streams);
}

// kLanes rows of 16-bit elements as pairs of neighbours; lane j of pairs[i] becomes element (2i, 2i + 1) of row j.
inline void transpose_pairs(const uint16_t* from, int64_t from_step, Floats (&pairs)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&pairs[i], from + i * from_step, sizeof(Floats));
  transpose(pairs);
}

// Writes the two rows of `to` from `first` on: the even and the odd halves of both vectors' lanes.
inline void put_pairs(Floats a, Floats b, uint16_t* to, int64_t first, int64_t to_step, bool streams) {
  Halves evens = same_bits<Halves>(a), odds = same_bits<Halves>(b);
  separate_halves(evens, odds, std::make_integer_sequence<int, 2 * kLanes>{});
  put_vector(to + first * to_step, evens, streams);
  put_vector(to + (first + 1) * to_step, odds, streams);
}

inline void transpose_square(const uint16_t* from, int64_t from_step, uint16_t* to, int64_t to_step, bool streams) {
  Floats upper[kLanes], lower[kLanes];
  transpose_pairs(from, from_step, upper);
  transpose_pairs(from + kLanes * from_step, from_step, lower);
  for (int i = 0; i < kLanes; ++i) put_pairs(upper[i], lower[i], to, 2 * i, to_step, streams);
}

// The upper half of a square: kLanes rows, 2 * kLanes columns.
inline void transpose_wide(const uint16_t* from, int64_t from_step, uint16_t* to, int64_t to_step) {
  Floats pairs[kLanes];
  transpose_pairs(from, from_step, pairs);
  for (int i = 0; i < kLanes; ++i) {
    uint16_t both[2][2 * kLanes];
    put_pairs(pairs[i], pairs[i], both[0], 0, 2 * kLanes, false);
    for (int odd = 0; odd < 2; ++odd) std::memcpy(to + (2 * i + odd) * to_step, both[odd], sizeof(Floats) / 2);
  }
}

// The left half of a square: 2 * kLanes rows, kLanes columns. A vector holds row i beside row i + kLanes.
inline void transpose_tall(const uint16_t* from, int64_t from_step, uint16_t* to, int64_t to_step) {
  Floats pairs[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    uint16_t row[2 * kLanes];
    std::memcpy(row, from + i * from_step, sizeof(row) / 2);
    std::memcpy(row + kLanes, from + (i + kLanes) * from_step, sizeof(row) / 2);
    std::memcpy(&pairs[i], row, sizeof(row));
  }
  transpose(pairs);
  for (int i = 0; i < kLanes / 2; ++i) put_pairs(pairs[i], pairs[i + kLanes / 2], to, 2 * i, to_step, false);
}

template <typename T>
inline void transpose_one_by_one(const T* from, int64_t from_step, int64_t rows, int64_t columns, T* to,
                                 int64_t to_step) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * to_step + row] = from[row * from_step + column];
  }
}

// A square, or less of one: to[column][row] = from[row][column]. Parts of it may be written twice.
template <typename T>
inline void transpose_part(const T* from, int64_t from_step, int64_t rows, int64_t columns, T* to, int64_t to_step,
                           bool streams) {
  if constexpr (sizeof(T) == 4) {
    if (rows == kSquare<T> && columns == kSquare<T>) return transpose_square(from, from_step, to, to_step, streams);
  }
  if constexpr (sizeof(T) == 2) {
    const auto* source = reinterpret_cast<const uint16_t*>(from);
    auto* target = reinterpret_cast<uint16_t*>(to);
    if (rows == kSquare<T> && columns == kSquare<T>) return transpose_square(source, from_step, target, to_step, streams);
    if (rows >= kLanes && columns == kSquare<T>) {
      transpose_wide(source, from_step, target, to_step);
      const int64_t rest = rows - kLanes;
      if (rest > 0) transpose_wide(source + rest * from_step, from_step, target + rest, to_step);
      return;
    }
    if (rows == kSquare<T> && columns >= kLanes) {
      transpose_tall(source, from_step, target, to_step);
      const int64_t rest = columns - kLanes;
      if (rest > 0) transpose_tall(source + rest, from_step, target + rest * to_step, to_step);
      return;
    }
  }
  transpose_one_by_one(from, from_step, rows, columns, to, to_step);
}

// Calls visit(first row, first column, rows, columns) for parts of a matrix that together are all of it: squares where
// it is large enough, the last ones overlapping others. Columns are the inner loop.
template <typename T, typename Visit>
inline void for_squares(int64_t rows, int64_t columns, Visit visit) {
  const int64_t height = rows < kSquare<T> ? rows : kSquare<T>, width = columns < kSquare<T> ? columns : kSquare<T>;
  for (int64_t i = 0; i < rows; i += height) {
    const int64_t row = i + height <= rows ? i : rows - height;
    for (int64_t j = 0; j < columns; j += width) visit(row, j + width <= columns ? j : columns - width, height, width);
  }
}

}  // namespace
}  // namespace vlcache
