// Attention of a tile of rows (queries times the query heads of one KV head) over paged keys and values, in the manner
// of flash attention: a step unpacks some keys and values to fp32 panels, all rows of the tile use them, and the softmax
// is kept up to date as larger scores come. Compiled once per instruction set (isa.h).

#include <cmath>

#include "cpu/attention_kernels.h"
#include "cpu/attention_products.h"
#include "cpu/attention_unpack.h"
#include "cpu/vectors.h"

namespace vlcache {
namespace VLCACHE_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;

void write_row(const AttentionPlan& plan, const AttentionTile& tile, int64_t row, const float* sums, float weight) {
  const AttentionParams& p = plan.params;
  const int64_t head = tile.head * plan.group + row % plan.group;
  const int64_t start = (tile.queries[row / plan.group] * p.query_heads + head) * p.pages.dim;
  const float scale = p.scales == nullptr ? 1.0f : p.scales[1];
  visit_type(p.query_type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* to = static_cast<T*>(p.out) + start;
#pragma omp simd
    for (int64_t d = 0; d < p.pages.dim; ++d) to[d] = from_float<T>(sums[d] / weight * scale);
  });
}

// One tile at work. Rows are ordered by the position of their query.
class TileWork {
 public:
  TileWork(const AttentionPlan& plan, const AttentionTile& tile, float* scratch)
      : plan_(plan), p_(plan.params), tile_(tile), rows_(tile.count * plan.group), width_(padded_dim(p_.pages.dim)) {
    auto take = [&](int64_t count) {
      float* part = scratch;
      scratch += count;
      return part;
    };
    query_ = take(rows_ * width_);
    sums_ = take(rows_ * width_);
    keys_ = take(kKeysPerStep * width_);
    values_ = take(kKeysPerStep * width_);
    staged_ = take(kKeysPerStep * width_);
    scores_ = take(rows_ * kKeysPerStep);
    weights_ = take(rows_ * kLanes);
    maxima_ = take(rows_);
    keep_ = take(rows_);
    position_ = reinterpret_cast<int32_t*>(take(rows_));
    first_ = reinterpret_cast<int32_t*>(take(rows_));
    last_ = reinterpret_cast<int32_t*>(take(rows_));
    pairs_ = p_.query_type == Type::kBFloat16 && p_.cache_type == Type::kBFloat16 && has_pairs();
  }

  void run() {
    visit_type(p_.query_type, [&](auto tag) { load_queries<typename decltype(tag)::type>(); });
    for (int64_t begin = tile_.begin; begin < tile_.end; begin += kKeysPerStep) step(begin);
  }

  // Unnormalised sums, then maximum and weight of each row.
  void write_partial() const {
    const int64_t dim = p_.pages.dim;
    for (int64_t r = 0; r < rows_; ++r) {
      float* to = tile_.partial + r * (dim + 2);
      std::memcpy(to, sums_ + r * width_, dim * sizeof(float));
      to[dim] = maxima_[r];
      to[dim + 1] = sum_of_lanes(load(weights_ + r * kLanes));
    }
  }

  void write_out() const {
    for (int64_t r = 0; r < rows_; ++r) {
      write_row(plan_, tile_, r, sums_ + r * width_, sum_of_lanes(load(weights_ + r * kLanes)));
    }
  }

 private:
  template <typename T>
  void load_queries() {
    const int64_t dim = p_.pages.dim;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t query = tile_.queries[r / plan_.group];
      const int64_t head = tile_.head * plan_.group + r % plan_.group;
      const T* from = static_cast<const T*>(p_.query) + query * p_.query_stride + head * p_.query_head_stride;
      float* to = query_ + r * width_;
      if (pairs_) {
        to[(dim - 1) / 2] = 0.0f;  // the other half of an odd last pair
        std::memcpy(to, from, dim * sizeof(T));
      } else {
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) to[d] = to_float(from[d]);
      }
      position_[r] = p_.position[query];
      maxima_[r] = -INFINITY;
      store(weights_ + r * kLanes, Floats{});
      for (int64_t d = 0; d < width_; d += kLanes) store(sums_ + r * width_ + d, Floats{});
    }
  }

  void step(int64_t begin) {
    const int64_t count = tile_.end - begin < kKeysPerStep ? tile_.end - begin : kKeysPerStep;
    int64_t from = rows_, to = 0;  // rows that see a key of this step
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t seen = position_[r] - begin + 1;
      const int64_t hidden = p_.window > 0 ? seen - p_.window : 0;
      last_[r] = seen < 0 ? 0 : seen < count ? seen : count;
      first_[r] = hidden < 0 ? 0 : hidden < count ? hidden : count;
      if (first_[r] >= last_[r]) continue;
      from = r < from ? r : from;
      to = r + 1;
    }
    if (from >= to) return;
    const Step step{p_.block_table + p_.request[tile_.queries[0]] * p_.blocks_per_request, tile_.head, begin,
                    first_[from], last_[to - 1]};
    visit_type(p_.cache_type, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (pairs_) unpack<uint32_t, T>(step);
      }
      if (!pairs_) unpack<float, T>(step);
    });
    score(step, from, to);
    for (int64_t r = from; r < to; ++r) {
      soften(r);
      if (pairs_) pack_pairs(scores_ + r * kKeysPerStep, first_[r], last_[r]);
    }
    add_values(from, to);
  }

  // Unit: float, or uint32_t for pairs of bfloat16.
  template <typename Unit, typename T>
  void unpack(const Step& step) {
    unpack_keys<Unit, T>(plan_, step, staged_, keys_);
    unpack_values<Unit, T>(plan_, step, staged_, values_);
  }

  void score(const Step& step, int64_t from, int64_t to) {
    const int64_t depth = pairs_ ? (p_.pages.dim + 1) / 2 : p_.pages.dim;
    for (int64_t column = step.skip / kColumns * kColumns; column < step.count; column += kColumns) {
      int64_t r = from, end = to;
      while (r < end && last_[r] <= column) ++r;
      while (end > r && first_[end - 1] >= column + kColumns) --end;
      for (int64_t k = 0; k < depth; k += kDepthAtOnce) {
        const int64_t some = depth - k < kDepthAtOnce ? depth - k : kDepthAtOnce;
        multiply_all({query_ + r * width_ + k, width_, keys_ + column * depth + k * kColumns, some,
                      scores_ + r * kKeysPerStep + column, kKeysPerStep, k == 0 ? nullptr : &kOne, 0},
                     end - r, step.count - column > kLanes ? 2 : 1, pairs_);
      }
    }
  }

  // Scores of row r, in place, become powers of 2 relative to the largest so far; `keep` is what older ones shrink by.
  void soften(int64_t r) {
    const int64_t first = first_[r], last = last_[r];
    float* scores = scores_ + r * kKeysPerStep;
    const float scale = p_.softmax_scale * (p_.scales == nullptr ? 1.0f : p_.scales[0]);
    const float factor = p_.soft_cap > 0 ? p_.soft_cap * kLog2E : scale * kLog2E;
    Floats top = all(-INFINITY);
    for (int64_t i = first / kLanes * kLanes; i < last; i += kLanes) {
      Floats value = load(scores + i);
      if (p_.soft_cap > 0) value = tanh_of(value * (scale / p_.soft_cap));
      value *= factor;
      if (i < first || i + kLanes > last) {
        const Ints lane = lane_numbers(LaneNumbers{}) + int32_t(i);
        value = (lane >= int32_t(first)) & (lane < int32_t(last)) ? value : all(-INFINITY);
      }
      store(scores + i, value);
      top = largest(top, value);
    }
    const float old = maxima_[r], highest = largest_lane(top);
    const float now = highest > old ? highest : old;
    const float base = now == -INFINITY ? 0.0f : now;  // infinite keys: all weights are 0 so far
    maxima_[r] = now;
    keep_[r] = now == old ? 1.0f : exp2_of_negative(all(old - base))[0];
    Floats weight = load(weights_ + r * kLanes) * keep_[r];
    for (int64_t i = first / kLanes * kLanes; i < last; i += kLanes) {
      const Floats value = exp2_of_negative(load(scores + i) - base);
      store(scores + i, value);
      weight += value;
    }
    store(weights_ + r * kLanes, weight);
  }

  // Each row adds exactly the values it sees: a hidden one may be anything, and 0 * NaN is NaN.
  void add_values(int64_t from, int64_t to) {
    for (int64_t d = 0; d < p_.pages.dim; d += kColumns) {
      const int vectors = p_.pages.dim - d > kLanes ? 2 : 1;
      for (int64_t r = from; r < to; r += kRowsAtOnce) {
        const int64_t end = r + kRowsAtOnce < to ? r + kRowsAtOnce : to;
        const int64_t first = first_[end - 1], last = last_[r];  // what all these rows see
        if (first < last) add_range(d, vectors, r, end, first, last, keep_ + r);
        for (int64_t same = r, next; same < end; same = next) {  // rows of one query see the same
          next = same + 1;
          while (next < end && position_[next] == position_[same]) ++next;
          if (first >= last) {
            add_range(d, vectors, same, next, first_[same], last_[same], keep_ + same);
          } else {
            add_range(d, vectors, same, next, first_[same], first, nullptr);
            add_range(d, vectors, same, next, last, last_[same], nullptr);
          }
        }
      }
    }
  }

  void add_range(int64_t d, int vectors, int64_t from, int64_t to, int64_t first, int64_t last, const float* keep) {
    if (first >= last) return;
    Product all{scores_ + from * kKeysPerStep, kKeysPerStep, values_ + d * kKeysPerStep / (pairs_ ? 2 : 1), 0,
                sums_ + from * width_ + d, width_, keep == nullptr ? &kOne : keep, keep != nullptr};
    const auto part = [&](int64_t start, int64_t depth) {
      Product some = all;
      some.rows += start;
      some.panel += start * kColumns;
      some.depth = depth;
      all.keep = &kOne;  // the first part has scaled the sums
      all.keep_stride = 0;
      return some;
    };
    if (!pairs_) {
      multiply_all(part(first, last - first), to - from, vectors);
      return;
    }
    const int64_t pair = (first + 1) / 2, pairs_end = last / 2;
    if (first % 2 == 1) add_half(part(first / 2, 1), to - from, vectors, 1);
    if (pair < pairs_end) multiply_all(part(pair, pairs_end - pair), to - from, vectors, true);
    if (last % 2 == 1) add_half(part(last / 2, 1), to - from, vectors, 0);
  }

  const AttentionPlan& plan_;
  const AttentionParams& p_;
  const AttentionTile& tile_;
  const int64_t rows_, width_;
  float *query_, *sums_, *keys_, *values_, *staged_, *scores_, *weights_, *maxima_, *keep_;
  int32_t *position_, *first_, *last_;
  bool pairs_;
};

}  // namespace

void attend(const AttentionPlan& plan, const AttentionTile& tile, float* scratch) {
  TileWork work(plan, tile, scratch);
  work.run();
  if (tile.partial != nullptr) {
    work.write_partial();
    return;
  }
  work.write_out();
}

void merge_attention(const AttentionPlan& plan, const AttentionTile* tiles, int64_t count) {
  const AttentionParams& p = plan.params;
  const int64_t dim = p.pages.dim, rows = tiles[0].count * plan.group;
  for (int64_t r = 0; r < rows; ++r) {
    const auto part = [&](int64_t i) { return tiles[i].partial + r * (dim + 2); };
    float highest = -INFINITY, weight = 0;
    for (int64_t i = 0; i < count; ++i) highest = part(i)[dim] > highest ? part(i)[dim] : highest;
    for (int64_t i = 0; i < count; ++i) {
      const float factor = exp2_of_negative(all(part(i)[dim] - highest))[0];
      weight += part(i)[dim + 1] * factor;
      if (i == 0) {
        for (int64_t d = 0; d < dim; ++d) part(0)[d] *= factor;
      } else {
        for (int64_t d = 0; d < dim; ++d) part(0)[d] += part(i)[d] * factor;
      }
    }
    write_row(plan, tiles[0], r, part(0), weight);
  }
}

}  // namespace VLCACHE_ISA
}  // namespace vlcache
