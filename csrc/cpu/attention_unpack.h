// Keys and values of one step of an attention tile: from pages of any layout and type into the panels that the products
// of attention_products.h read. A panel has 2 * kLanes columns:
//   keys    [panel of keys][depth][column]   depth counts dimensions, or pairs of bfloat16 ones (32 bits a pair)
//   values  [panel of dimensions][depth][column]   depth counts keys, or pairs of bfloat16 ones
#pragma once

#include <type_traits>

#include "cpu/attention_kernels.h"
#include "cpu/attention_products.h"
#include "cpu/vectors.h"

namespace vlcache {
namespace {

// Keys [begin, begin + count) of one request and head; only those from `begin + skip` on are read.
struct Step {
  const int32_t* blocks;
  int64_t head, begin, skip, count;
};

// Calls visit(column, number, block, token) for each run of keys that lie in one block.
template <typename Visit>
inline void visit_blocks(const PageLayout& pages, const Step& step, Visit visit) {
  int64_t column = step.skip;
  while (column < step.count) {
    const int64_t key = step.begin + column;
    const int64_t token = key % pages.block_size;
    const int64_t room = pages.block_size - token;
    const int64_t number = room < step.count - column ? room : step.count - column;
    visit(column, number, step.blocks[key / pages.block_size] * pages.block_stride, token);
    column += number;
  }
}

// rows[i]: the dimensions of key (kv 0) or value (kv 1) i, in the pages where they are neighbours there, else copied to
// `staged`.
template <typename T>
inline void find_rows(const AttentionParams& p, int64_t kv, const Step& step, T* staged, const T** rows) {
  const T* cache = static_cast<const T*>(p.cache);
  const int64_t dim = p.pages.dim;
  const Strides& strides = p.pages.halves[kv];
  visit_blocks(p.pages, step, [&](int64_t column, int64_t number, int64_t block, int64_t token) {
    for (int64_t i = 0; i < number; ++i) {
      const T* from = cache + block;
      T* copy = staged + (column + i) * dim;
      if (p.pages.order != nullptr) {
        const int64_t row = (kv * p.pages.block_size + token + i) * p.pages.heads + step.head;
        const int32_t* order = p.pages.order + row * dim;
        for (int64_t d = 0; d < dim; ++d) copy[d] = from[order[d]];
      } else {
        from += strides.origin + (token + i) * strides.token + step.head * strides.head;
        if (strides.dim != 1) {
          for (int64_t d = 0; d < dim; ++d) copy[d] = from[d * strides.dim];
        }
      }
      rows[column + i] = p.pages.order == nullptr && strides.dim == 1 ? from : copy;
    }
  });
}

// kLanes units of 32 bits; units past the end of the row are 0.
template <typename Unit, typename T>
inline Floats load_units(const T* row, int64_t first, int64_t dim) {
  constexpr int64_t kPerUnit = std::is_same_v<Unit, float> ? 1 : 2;
  const T* from = row + first * kPerUnit;
  const int64_t left = dim - first * kPerUnit;
  T padded[kPerUnit * kLanes] = {};
  if (left < kPerUnit * kLanes) {
    std::memcpy(padded, from, left * sizeof(T));
    from = padded;
  }
  if constexpr (kPerUnit == 1) return load_lanes(from);
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Unit: float, or uint32_t for pairs of bfloat16.
template <typename Unit, typename T>
inline void transpose_keys(const T* const* rows, const Step& step, int64_t dim, float* keys) {
  const int64_t depth = std::is_same_v<Unit, float> ? dim : (dim + 1) / 2;
  for (int64_t column = step.skip / kLanes * kLanes; column < step.count; column += kLanes) {
    float* panel = keys + column / kColumns * kColumns * depth + column % kColumns;
    for (int64_t first = 0; first < depth; first += kLanes) {
      Floats units[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        int64_t key = column + i < step.count ? column + i : step.count - 1;  // past the end: any, they are not looked at
        if (key < step.skip) key = step.skip;
        units[i] = load_units<Unit>(rows[key], first, dim);
      }
      transpose(units);
      const int64_t number = depth - first < kLanes ? depth - first : kLanes;
      for (int64_t i = 0; i < number; ++i) store(panel + (first + i) * kColumns, units[i]);
    }
  }
}

// Pages whose neighbours are the keys of one dimension, the order of the panels.
template <typename Unit, typename T>
inline void copy_keys(const AttentionParams& p, const Step& step, float* keys) {
  const Strides& strides = p.pages.halves[0];
  const int64_t dim = p.pages.dim;
  constexpr int64_t kPerUnit = std::is_same_v<Unit, float> ? 1 : 2;
  const int64_t depth = (dim + kPerUnit - 1) / kPerUnit;
  visit_blocks(p.pages, step, [&](int64_t column, int64_t number, int64_t block, int64_t token) {
    const T* from = static_cast<const T*>(p.cache) + block + strides.origin + token + step.head * strides.head;
    for (const int64_t end = column + number; column < end;) {
      const int64_t room = kColumns - column % kColumns;
      const int64_t part = room < end - column ? room : end - column;
      float* to = keys + column / kColumns * kColumns * depth + column % kColumns;
      for (int64_t unit = 0; unit < depth; ++unit) {
        const T* first = from + unit * kPerUnit * strides.dim;
        if constexpr (kPerUnit == 1) {
#pragma omp simd
          for (int64_t i = 0; i < part; ++i) to[unit * kColumns + i] = to_float(first[i]);
        } else {
          const T* second = first + strides.dim;
          const bool has_second = 2 * unit + 1 < dim;
#pragma omp simd
          for (int64_t i = 0; i < part; ++i) {
            const uint32_t high = has_second ? uint32_t(second[i].bits) << 16 : 0;
            to[unit * kColumns + i] = float_of_bits(first[i].bits | high);
          }
        }
      }
      column += part;
      from += part;
    }
  });
}

template <typename Unit, typename T>
inline void unpack_keys(const AttentionPlan& plan, const Step& step, float* staged, float* keys) {
  const PageLayout& pages = plan.params.pages;
  if (pages.order == nullptr && pages.halves[0].dim != 1 && pages.halves[0].token == 1) {
    copy_keys<Unit, T>(plan.params, step, keys);
    return;
  }
  const T* rows[kKeysPerStep];
  find_rows(plan.params, 0, step, reinterpret_cast<T*>(staged), rows);
  transpose_keys<Unit>(rows, step, pages.dim, keys);
}

// Pairs of kLanes neighbours of two rows, the first row's in the low halves; of a missing row all are 0.
inline Floats load_pairs(const BFloat16* low, const BFloat16* high, int64_t first, int64_t dim) {
  const auto bits = [&](const BFloat16* row) {
    return row == nullptr ? Bits{} : same_bits<Bits>(load_units<float>(row, first, dim));  // shifted up by 16
  };
  return same_bits<Floats>(bits(low) >> 16 | bits(high));
}

template <typename Unit, typename T>
inline void unpack_values(const AttentionPlan& plan, const Step& step, float* staged, float* values) {
  const T* rows[kKeysPerStep];
  const int64_t dim = plan.params.pages.dim;
  find_rows(plan.params, 1, step, reinterpret_cast<T*>(staged), rows);
  for (int64_t first = 0; first < dim; first += kLanes) {
    constexpr int64_t kPerUnit = std::is_same_v<Unit, float> ? 1 : 2;
    float* panel = values + first / kColumns * kColumns * (kKeysPerStep / kPerUnit) + first % kColumns;
    for (int64_t unit = step.skip / kPerUnit; unit * kPerUnit < step.count; ++unit) {
      float* to = panel + unit * kColumns;
      if constexpr (kPerUnit == 1) {
        store(to, load_units<float>(rows[unit], first, dim));
      } else {
        const auto row = [&](int64_t key) { return key < step.skip || key >= step.count ? nullptr : rows[key]; };
        store(to, load_pairs(row(2 * unit), row(2 * unit + 1), first, dim));
      }
    }
  }
}

}  // namespace
}  // namespace vlcache
