// Products of the rows of an attention tile with panels of keys or values (attention_unpack.h), a few rows by 1 or 2
// vectors of columns in registers.
#pragma once

#include "cpu/vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vlcache {
namespace {

constexpr int64_t kColumns = 2 * kLanes;  // of a panel
constexpr int kRowsAtOnce = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;  // with 2 vectors of sums each, in the registers
constexpr int64_t kDepthAtOnce = 64;  // longer sums are taken in parts: errors would grow beyond PyTorch's

// out[r] = keep[r * keep_stride] * out[r] + rows[r] . panel
struct Product {
  const float* rows;
  int64_t row_stride;
  const float* panel;  // [depth][kColumns]
  int64_t depth;
  float* out;
  int64_t out_stride;
  const float* keep;  // null: out is overwritten
  int64_t keep_stride;
};

constexpr float kOne = 1.0f;

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void put(const Product& p, const Floats (&sums)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* out = p.out + r * p.out_stride + v * kLanes;
      store(out, p.keep == nullptr ? sums[r][v] : load(out) * p.keep[r * p.keep_stride] + sums[r][v]);
    }
  }
}

template <int kRows, int kVectors>
void multiply(const Product& p) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    Floats column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = load(p.panel + k * kColumns + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += column[v] * p.rows[r * p.row_stride + k];
    }
  }
  put(p, sums);
}

#if defined(__AVX512F__)
// The same for pairs of bfloat16: products are exact, sums in fp32. Only for processors with AVX512-BF16.
template <int kRows, int kVectors>
__attribute__((target("avx512bf16"))) void multiply_pairs(const Product& p) {
  Floats sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < p.depth; ++k) {
    __m512bh column[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) column[v] = same_bits<__m512bh>(load(p.panel + k * kColumns + v * kLanes));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto pair = same_bits<__m512bh>(_mm512_set1_ps(p.rows[r * p.row_stride + k]));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, column[v]);
    }
  }
  put(p, sums);
}

bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }

// Elements [first, last) of a row of kKeysPerStep floats become bfloat16, in place, at the row's beginning; so may others.
__attribute__((target("avx512bf16"))) inline void pack_pairs(float* row, int64_t first, int64_t last) {
  for (int64_t i = first / kColumns * kColumns; i < last; i += kColumns) {
    const Floats low = load(row + i), high = load(row + i + kLanes);
    const __m512bh packed = _mm512_cvtne2ps_pbh(same_bits<__m512>(high), same_bits<__m512>(low));
    store(row + i / 2, same_bits<Floats>(packed));
  }
}
#else
template <int kRows, int kVectors>
void multiply_pairs(const Product&) {}

bool has_pairs() { return false; }

inline void pack_pairs(float*, int64_t, int64_t) {}
#endif

// Product with one half of a pair of bfloat16: half 0 or 1 of each row's first unit and of the panel's first line.
inline void add_half(const Product& p, int64_t rows, int vectors, int half) {
  const auto float_of = [half](auto pairs) { return half == 0 ? pairs << 16 : pairs & 0xffff0000u; };
  for (int64_t r = 0; r < rows; ++r) {
    const float weight = same_bits<float>(float_of(same_bits<uint32_t>(p.rows[r * p.row_stride])));
    for (int v = 0; v < vectors; ++v) {
      float* out = p.out + r * p.out_stride + v * kLanes;
      const auto column = same_bits<Floats>(float_of(same_bits<Bits>(load(p.panel + v * kLanes))));
      store(out, load(out) * p.keep[r * p.keep_stride] + column * weight);
    }
  }
}

template <int kRows>
void multiply_rows(Product& p, int64_t& rows, int vectors, bool pairs) {
  while (rows >= kRows) {
    if (pairs) {
      vectors == 2 ? multiply_pairs<kRows, 2>(p) : multiply_pairs<kRows, 1>(p);
    } else {
      vectors == 2 ? multiply<kRows, 2>(p) : multiply<kRows, 1>(p);
    }
    rows -= kRows;
    p.rows += kRows * p.row_stride;
    p.out += kRows * p.out_stride;
    if (p.keep != nullptr) p.keep += kRows * p.keep_stride;
  }
}

void multiply_all(Product p, int64_t rows, int vectors, bool pairs = false) {
  multiply_rows<kRowsAtOnce>(p, rows, vectors, pairs);
  if (kRowsAtOnce > 4) multiply_rows<4>(p, rows, vectors, pairs);
  multiply_rows<2>(p, rows, vectors, pairs);
  multiply_rows<1>(p, rows, vectors, pairs);
}

}  // namespace
}  // namespace vlcache
