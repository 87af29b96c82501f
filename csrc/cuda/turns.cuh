// Keys that threads hold in 16-byte pieces, rotated in fp32.
#pragma once

#include "rows_plan.h"
#include "simt.cuh"

namespace vlcache {
namespace cuda {

// Of a head: which two pieces a thread moves, and whether it turns them.
struct Pieces {
  int first, second;
  bool has_second, turns_first, turns_second;
};

VLCACHE_DEVICE Pieces pieces_of(const RowsPlan& plan, int unit, bool is_key) {
  const int rotary = is_key ? plan.rotary_pieces : 0;
  const int half = plan.is_neox ? rotary / 2 : 0;
  if (unit < half) return {unit, unit + half, true, true, true};
  // Behind the NeoX pairs: two runs of neighbours, so that consecutive threads still touch consecutive pieces.
  const int rest = plan.pieces - 2 * half, run = (rest + 1) / 2;
  const int first = 2 * half + unit - half, second = first + run;
  return {first, second, second < plan.pieces, half == 0 && first < rotary, half == 0 && second < rotary};
}

// Elements of T in a piece.
template <typename T>
constexpr int kPerPiece = 16 / int(sizeof(T));

template <typename T>
VLCACHE_DEVICE void unpack(const Vec16& piece, float (&values)[kPerPiece<T>]) {
  VLCACHE_UNROLL
  for (int i = 0; i < kPerPiece<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = float_of_bits(piece.words[i]);
    } else {
      values[i] = to_float(T{uint16_t(piece.words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

template <typename T>
VLCACHE_DEVICE void pack(const float (&values)[kPerPiece<T>], Vec16& piece) {
  VLCACHE_UNROLL
  for (int i = 0; i < kPerPiece<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      piece.words[i] = bits_of_float(values[i]);
    } else {
      const uint32_t bits = from_float<T>(values[i]).bits;
      piece.words[i / 2] = i % 2 == 0 ? bits : piece.words[i / 2] | bits << 16;
    }
  }
}

// kCount floats of a table at a multiple of 16 bytes, where so many of them fill pieces.
template <int kCount>
VLCACHE_DEVICE void read_floats(const float* from, float* to) {
  if constexpr (kCount % 4 == 0) {
    VLCACHE_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const Vec16 four = load_piece(from + i);
      VLCACHE_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = float_of_bits(four.words[j]);
    }
  } else {
    VLCACHE_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }
}

// By which a thread turns its two pieces.
template <typename T>
struct Angles {
  static constexpr int kLanes = kPerPiece<T>;

  // NeoX: of the pairs of both pieces. Else the first half belongs to the first piece, the second to the second.
  float cosines[kLanes], sines[kLanes];

  // Of a table [2, half]; `kAligned`: it begins at a multiple of 16 bytes.
  template <bool kAligned>
  VLCACHE_DEVICE void load(const float* table, int64_t half, bool is_neox, const Pieces& pieces) {
    if constexpr (kAligned) {
      if (is_neox) {
        if (pieces.turns_first) load_aligned<kLanes>(table + pieces.first * kLanes, half, 0);
        return;
      }
      if (pieces.turns_first) load_aligned<kLanes / 2>(table + pieces.first * (kLanes / 2), half, 0);
      if (pieces.turns_second) load_aligned<kLanes / 2>(table + pieces.second * (kLanes / 2), half, kLanes / 2);
    } else {
      VLCACHE_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const int piece = i < kLanes / 2 ? pieces.first : pieces.second;
        const int64_t pair = is_neox ? pieces.first * kLanes + i : piece * (kLanes / 2) + i % (kLanes / 2);
        cosines[i] = pair < half ? table[pair] : 1.0f;
        sines[i] = pair < half ? table[half + pair] : 0.0f;
      }
    }
  }

  // The elements of both pieces, as far as they turn.
  VLCACHE_DEVICE void turn(const Pieces& pieces, bool is_neox, float (&a)[kLanes], float (&b)[kLanes]) const {
    if (is_neox) {
      if (pieces.turns_first) turn_halves(a, b);
    } else {
      if (pieces.turns_first) turn_neighbours<0>(a);
      if (pieces.turns_second) turn_neighbours<kLanes / 2>(b);
    }
  }

  VLCACHE_DEVICE void turn_halves(float (&a)[kLanes], float (&b)[kLanes]) const {
    VLCACHE_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      const float turned = a[i] * cosines[i] - b[i] * sines[i];
      b[i] = b[i] * cosines[i] + a[i] * sines[i];
      a[i] = turned;
    }
  }

  template <int kFirst>
  VLCACHE_DEVICE void turn_neighbours(float (&a)[kLanes]) const {
    VLCACHE_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      const float x = a[2 * i], y = a[2 * i + 1];
      a[2 * i] = x * cosines[kFirst + i] - y * sines[kFirst + i];
      a[2 * i + 1] = y * cosines[kFirst + i] + x * sines[kFirst + i];
    }
  }

 private:
  template <int kCount>
  VLCACHE_DEVICE void load_aligned(const float* first, int64_t half, int to) {
    read_floats<kCount>(first, cosines + to);
    read_floats<kCount>(first + half, sines + to);
  }
};

}  // namespace cuda
}  // namespace vlcache
