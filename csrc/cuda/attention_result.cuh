// From what a thread block has computed to the output of attention.
#pragma once

#include "attention_tile.cuh"

namespace vlcache {
namespace cuda {

constexpr float kInfinity = __builtin_huge_valf();

// A lane's two rows: what they see of the current request, and their softmax so far.
struct LaneRows {
  KeySpan seen[2];
  float max[2], sum[2];  // scores to base 2; the sum is over this lane's columns
};

// Where a row's result goes: the output, or this split's part of the workspace, which holds unscaled sums
// [splits, rows, dim], then maxima and sums of weights [splits, rows, 2].
template <typename T>
struct RowSink {
  const AttentionParams& params;
  const AttentionPlan& plan;
  float* workspace;

  // A result of the weighted sum; to be divided by the sum of weights.
  VLCACHE_DEVICE void write(const RowOrigin& origin, int64_t d, float value, float sum) const {
    if (plan.splits == 1) {
      static_cast<T*>(params.out)[index_of(origin) * params.pages.dim + d] = from_float<T>(result_of(value, sum));
    } else {
      workspace[part_of(origin) * params.pages.dim + d] = value;
    }
  }

  VLCACHE_DEVICE void write_state(const RowOrigin& origin, float max, float sum) const {
    if (plan.splits == 1) return;
    float* state = workspace + plan.splits * num_rows() * params.pages.dim + 2 * part_of(origin);
    state[0] = max;
    state[1] = sum;
  }

  // A row that sees nothing is zero.
  VLCACHE_DEVICE float result_of(float value, float sum) const {
    const float value_scale = params.scales == nullptr ? 1.0f : params.scales[1];
    return sum == 0.0f ? 0.0f : value * (value_scale / sum);
  }

  VLCACHE_DEVICE int64_t num_rows() const { return params.queries * params.query_heads; }
  VLCACHE_DEVICE int64_t index_of(const RowOrigin& origin) const {
    return origin.query * params.query_heads + origin.head;
  }
  VLCACHE_DEVICE int64_t part_of(const RowOrigin& origin) const {
    return block_index().z * num_rows() + index_of(origin);
  }
};

VLCACHE_DEVICE bool is_finite(float value) { return fabsf(value) <= 3.4e38f; }

// Writes this lane's part of two rows; says of which the result is not finite (for all lanes that share the row).
template <typename T, int kWidth>
VLCACHE_DEVICE void write_rows(const AttentionParams& params, const AttentionPlan& plan, const RowSink<T>& sink,
                               LaneRows& rows, const typename TileMath<T, kWidth>::Output& output, float (&odd)[2]) {
  const int lane = thread_index() % kWarp;
  VLCACHE_UNROLL
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += shuffle_xor(rows.sum[r], 1);
    rows.sum[r] += shuffle_xor(rows.sum[r], 2);
    odd[r] = is_finite(rows.sum[r]) ? 0.0f : 1.0f;
    const int row = thread_index() / kWarp * AttentionPlan::kRowsPerWarp + lane / 4 + 8 * r;
    const RowOrigin origin = origin_of(params, plan, row);
    VLCACHE_UNROLL
    for (int i = 0; i < kWidth / 4; ++i) {
      const int64_t d = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const float value = output[i / 2][2 * r + i % 2];
      if (!is_finite(value)) odd[r] = 1.0f;
      if (origin.exists && d < params.pages.dim) sink.write(origin, d, value, rows.sum[r]);
    }
    if (origin.exists && lane % 4 == 0) sink.write_state(origin, rows.max[r], rows.sum[r]);
    odd[r] = fmaxf(odd[r], shuffle_xor(odd[r], 1));
    odd[r] = fmaxf(odd[r], shuffle_xor(odd[r], 2));
  }
}

// One thread of a launch of any size: elements of the output, in its own type, from what the splits left.
VLCACHE_DEVICE void combine(const AttentionParams& params, const AttentionPlan& plan, const float* workspace) {
  const RowSink<float> sink{params, plan, nullptr};
  const int64_t dim = params.pages.dim, num_rows = sink.num_rows();
  const float* states = workspace + plan.splits * num_rows * dim;
  for (int64_t i = int64_t(block_index().x) * num_threads() + thread_index(); i < num_rows * dim;
       i += int64_t(grid_size().x) * num_threads()) {
    const int64_t row = i / dim;
    float max = -kInfinity, sum = 0.0f, value = 0.0f;
    for (int split = 0; split < plan.splits; ++split) max = fmaxf(max, states[2 * (split * num_rows + row)]);
    for (int split = 0; split < plan.splits; ++split) {
      const float* state = states + 2 * (split * num_rows + row);
      const float share = state[1] == 0.0f ? 0.0f : exp2_fast(state[0] - max);
      sum += share * state[1];
      value += share * workspace[split * num_rows * dim + i];
    }
    write_element(params.out, params.query_type, i, sink.result_of(value, sum));
  }
}

}  // namespace cuda
}  // namespace vlcache
