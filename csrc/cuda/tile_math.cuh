// The two products of attention on tiles in shared memory: scores of 16 queries and a tile of keys, and the weighted
// sum of values. A warp does both; what it holds is spread over its lanes as the tensor cores spread a 16x8 result:
// lane i has rows i / 4 and i / 4 + 8 (elements 0, 1 and 2, 3), columns 2 (i % 4) and the next.
#pragma once

#include "attention_plan.h"
#include "simt.cuh"

namespace vlcache {
namespace cuda {

template <typename T, int kWidth>
struct TileShape {
  static constexpr int kKeys = keys_per_tile(kWidth, sizeof(T));
  static constexpr int kPitch = row_pitch(kWidth, sizeof(T));
  using Scores = float[kKeys / 8][4];
  using Output = float[kWidth / 8][4];
};

// 16-bit types: on tensor cores, accumulated in fp32. Weights are rounded to T, as in every such implementation.
template <typename T, int kWidth>
struct TileMath : TileShape<T, kWidth> {
  using Shape = TileShape<T, kWidth>;
  static constexpr int kPitch = Shape::kPitch;

  static VLCACHE_DEVICE void scores(typename Shape::Scores& result, const T* queries, const T* keys) {
    const int lane = thread_index() % kWarp;
    const T* query = queries + lane % 16 * kPitch + lane / 16 * 8;
    const T* key = keys + (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
    VLCACHE_UNROLL
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t a[4];
      load_matrices<false>(a, query + step * 16);
      VLCACHE_UNROLL
      for (int tile = 0; tile < Shape::kKeys / 8; tile += 2) {
        uint32_t b[4];
        load_matrices<false>(b, key + tile * 8 * kPitch + step * 16);
        multiply_add<T>(result[tile], a, b[0], b[1]);
        multiply_add<T>(result[tile + 1], a, b[2], b[3]);
      }
    }
  }

  static VLCACHE_DEVICE void add_values(typename Shape::Output& result, const typename Shape::Scores& weights,
                                        const T* values) {
    const int lane = thread_index() % kWarp;
    const T* value = values + lane % 16 * kPitch + lane / 16 * 8;
    VLCACHE_UNROLL
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      // Two neighbouring results of the first product are, lane by lane, one left operand of the second.
      const float(&left)[4] = weights[2 * step];
      const float(&right)[4] = weights[2 * step + 1];
      const uint32_t a[4] = {pair(left[0], left[1]), pair(left[2], left[3]), pair(right[0], right[1]),
                             pair(right[2], right[3])};
      VLCACHE_UNROLL
      for (int tile = 0; tile < kWidth / 8; tile += 2) {
        uint32_t b[4];
        load_matrices<true>(b, value + step * 16 * kPitch + tile * 8);
        multiply_add<T>(result[tile], a, b[0], b[1]);
        multiply_add<T>(result[tile + 1], a, b[2], b[3]);
      }
    }
  }

  static VLCACHE_DEVICE uint32_t pair(float low, float high) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
  }
};

struct alignas(16) Float4 {
  float x, y, z, w;
};

// fp32 stays fp32: multiplied and added one by one.
template <int kWidth>
struct TileMath<float, kWidth> : TileShape<float, kWidth> {
  using Shape = TileShape<float, kWidth>;
  static constexpr int kPitch = Shape::kPitch;

  static VLCACHE_DEVICE void scores(typename Shape::Scores& result, const float* queries, const float* keys) {
    const int lane = thread_index() % kWarp;
    const float* query = queries + lane / 4 * kPitch;
    const float* key = keys + lane % 4 * 2 * kPitch;
    VLCACHE_UNROLL_BY(1)
    for (int d = 0; d < kWidth; d += 4) {
      const Float4 first = at(query + d), second = at(query + 8 * kPitch + d);
      VLCACHE_UNROLL
      for (int tile = 0; tile < Shape::kKeys / 8; ++tile) {
        const Float4 even = at(key + tile * 8 * kPitch + d), odd = at(key + (tile * 8 + 1) * kPitch + d);
        result[tile][0] += dot(first, even);
        result[tile][1] += dot(first, odd);
        result[tile][2] += dot(second, even);
        result[tile][3] += dot(second, odd);
      }
    }
  }

  static VLCACHE_DEVICE void add_values(typename Shape::Output& result, const typename Shape::Scores& weights,
                                        const float* values) {
    const int lane = thread_index() % kWarp;
    const float* value = values + lane % 4 * 2;
    VLCACHE_UNROLL
    for (int keys = 0; keys < Shape::kKeys / 8; ++keys) {
      VLCACHE_UNROLL_BY(1)
      for (int pair = 0; pair < 4; ++pair, value += 2 * kPitch) {
        // The weights of these two keys are with one lane of each four.
        const int owner = lane / 4 * 4 + pair;
        float weight[4];
        VLCACHE_UNROLL
        for (int i = 0; i < 4; ++i) weight[i] = shuffle(weights[keys][i], owner);
        VLCACHE_UNROLL
        for (int tile = 0; tile < kWidth / 8; ++tile) {
          VLCACHE_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float* column = value + tile * 8 + i % 2;
            result[tile][i] += weight[i / 2 * 2] * column[0] + weight[i / 2 * 2 + 1] * column[kPitch];
          }
        }
      }
    }
  }

  static VLCACHE_DEVICE Float4 at(const float* address) { return *reinterpret_cast<const Float4*>(address); }

  static VLCACHE_DEVICE float dot(const Float4& a, const Float4& b) {
    return (a.x * b.x + a.y * b.y) + (a.z * b.z + a.w * b.w);
  }
};

}  // namespace cuda
}  // namespace vlcache
