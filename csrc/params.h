// What a kernel needs to know, as plain data: no torch here, so that C++ and CUDA code share it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VLCACHE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VLCACHE_HOST_DEVICE inline
#endif

namespace vlcache {

constexpr int64_t kMaxLayers = 256;  // of one call: the pointers travel with a CUDA launch, which carries 4 KiB

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16, kFloat8E4M3, kFloat8E5M2 };

// Where the keys or the values of a block lie, in elements.
struct Strides {
  int64_t origin, token, head, dim;
};

// Where the elements of a block lie. Offsets and strides count elements.
struct PageLayout {
  int64_t block_size;
  int64_t block_stride;
  Strides halves[2];     // of keys, of values
  const int32_t* order;  // packed pages: element (K or V, token, head, dim) -> offset in the block; else null
  int64_t heads, dim;

  VLCACHE_HOST_DEVICE int64_t offset(int64_t kv, int64_t token, int64_t head, int64_t d) const {
    if (order != nullptr) return order[((kv * block_size + token) * heads + head) * dim + d];
    const Strides& strides = halves[kv];
    return strides.origin + token * strides.token + head * strides.head + d * strides.dim;
  }
};

// Rows between a staged entry [layers, 2, tokens, heads, dim] and the pages of those layers.
struct RowsParams {
  int64_t layers, tokens;
  void* entry;
  Type entry_type;
  int64_t entry_layer_stride, entry_kv_stride, entry_token_stride, entry_head_stride;  // dim is contiguous
  void* caches[kMaxLayers];
  Type cache_type;
  int64_t num_blocks;
  PageLayout pages;
  const int64_t* slots;        // [tokens], -1: leave this token alone
  const float* turns;          // [2, rotary_dim / 2]: cosines, then sines; null: keys are copied
  int64_t half_rotary;         // rotary_dim / 2
  bool is_neox;                // pairs (i, i + rotary_dim / 2), else (2i, 2i + 1)
  const float* scales;         // [layers, 2]: a page holds value / scale; null: all 1
};

// Of keys and values [2, tokens, heads, dim] of one layer, in elements; dim is contiguous.
struct RowStrides {
  int64_t kv, token, head;

  VLCACHE_HOST_DEVICE int64_t offset(int64_t k_or_v, int64_t t, int64_t h) const {
    return k_or_v * kv + t * token + h * head;
  }
};

// Rows of one layer, each moved by a change of its own: entry [2, tokens, heads, dim] and as many changes -> out, which
// may be the memory of entry, but not of the changes.
struct ShiftParams {
  int64_t tokens, heads, dim;
  Type type;  // of entry, shift and out
  const void* entry;
  const void* shift;  // of keys before their places turn them, of values
  void* out;
  RowStrides entry_strides, shift_strides, out_strides;
  const float* places;  // [tokens, 2, rotary_dim / 2]: cosines, then sines
  const float* turns;   // [2, rotary_dim / 2]; null: keys stay as they are before the shift is added
  int64_t half_rotary;  // rotary_dim / 2
  bool is_neox;         // pairs (i, i + rotary_dim / 2), else (2i, 2i + 1)
};

// Queries at arbitrary positions against the pages of one layer.
struct AttentionParams {
  int64_t queries, query_heads;
  const void* query;  // [queries, query_heads, dim]
  void* out;          // the same shape and type, contiguous
  Type query_type;
  int64_t query_stride, query_head_stride;
  const void* cache;
  Type cache_type;
  int64_t num_blocks;
  PageLayout pages;
  const int32_t* block_table;  // [requests, blocks_per_request]
  int64_t requests, blocks_per_request;
  const int32_t* request;      // [queries]: row of the block table
  const int32_t* position;     // [queries]: a query sees the keys 0 ... position of its request
  const float* scales;         // [2] for K and V, or null
  float softmax_scale;
  int64_t window;              // a query sees its last `window` keys only; 0: all
  float soft_cap;              // scores become soft_cap * tanh(score / soft_cap); 0: as they are
};

}  // namespace vlcache
