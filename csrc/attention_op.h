// The arguments of sparse_query_attention, checked and turned into what a kernel needs.
#pragma once

#include <cmath>

#include "check.h"
#include "numeric.h"

namespace vlcache {

struct AttentionArguments {
  const Tensor& out;
  const Tensor& query;
  const Tensor& cache;
  const Tensor& block_table;
  const Tensor& request;
  const Tensor& position;
  const std::optional<Tensor>& scales;
  int64_t block_size;
  const std::vector<int64_t>& layout;
  const std::optional<Tensor>& order;
  double softmax_scale;
  int64_t window;
  double soft_cap;
};

// KV heads: a block of `cache` (or the order table) has 2 * block_size * heads * dim elements.
inline int64_t kv_heads(const AttentionArguments& args) {
  const int64_t dim = args.query.size(2), query_heads = args.query.size(1);
  require(dim >= 1 && query_heads >= 1, "query: expected at least one head and one dimension, found shape ",
          list_text(args.query.sizes()));
  require(args.cache.dim() >= 1, "cache: expected at least one dimension (blocks), found none");
  require(args.block_size >= 1 && args.block_size <= std::numeric_limits<int32_t>::max(),
          "block_size: expected 1 to 2147483647, found ", args.block_size);
  int64_t elements = 1;
  if (args.order.has_value()) {
    elements = args.order->numel();
  } else {
    for (int64_t i = 1; i < args.cache.dim(); ++i) elements *= args.cache.size(i);
  }
  // Divided one by one: a product of what a caller may send could overflow.
  const bool whole = elements % 2 == 0 && elements / 2 % args.block_size == 0 &&
                     elements / 2 / args.block_size % dim == 0;
  const int64_t heads = elements / 2 / args.block_size / dim;
  const char* name = args.order.has_value() ? "order" : "cache";
  require(whole && heads >= 1, name, ": expected 2 * ", args.block_size, " (block_size) * heads * ", dim,
          " (dimensions of query) elements of a block, found ", elements);
  require(query_heads % heads == 0, "query: expected a multiple of the ", heads, " KV heads of ", name, ", found ",
          query_heads, " heads");
  return heads;
}

inline void set_query(const AttentionArguments& args, AttentionParams& params) {
  const Tensor &query = args.query, &out = args.out;
  require_shape(query, "query", {kAnySize, kAnySize, kAnySize});
  params.query_type = require_float(query, "query");
  require(!is_float8(params.query_type), "query: expected float32, bfloat16 or float16, found ",
          type_name(query.scalar_type()));
  require_dense_rows(query, "query");
  require_type(out, "out", query.scalar_type());
  require_shape(out, "out", {query.size(0), query.size(1), query.size(2)});
  require_contiguous(out, "out");
  require_device(out, "out", query, "query");
  params.queries = query.size(0);
  params.query_heads = query.size(1);
  params.query = query.const_data_ptr();
  params.out = out.data_ptr();
  params.query_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
}

// Throws an error that names the argument. Values in `block_table`, `request`, `position` and `order` are not looked at
// here: they may be on a device.
inline AttentionParams attention_params(const AttentionArguments& args) {
  AttentionParams params{};
  set_query(args, params);
  const Tensor& cache = args.cache;
  params.cache_type = require_float(cache, "cache");
  require_device(cache, "cache", args.query, "query");
  params.pages = require_layout(cache, "cache", kv_heads(args), args.query.size(2), args.block_size, args.layout,
                                args.order);
  params.cache = cache.const_data_ptr();
  params.num_blocks = cache.size(0);
  require_vector(args.block_table, "block_table", ScalarType::Int, {kAnySize, kAnySize}, args.query, "query");
  require_vector(args.request, "request", ScalarType::Int, {params.queries}, args.query, "query");
  require_vector(args.position, "position", ScalarType::Int, {params.queries}, args.query, "query");
  params.requests = args.block_table.size(0);
  params.blocks_per_request = args.block_table.size(1);
  params.block_table = static_cast<const int32_t*>(args.block_table.const_data_ptr());
  params.request = static_cast<const int32_t*>(args.request.const_data_ptr());
  params.position = static_cast<const int32_t*>(args.position.const_data_ptr());
  if (args.scales.has_value()) {
    require(is_float8(params.cache_type), "scales: expected none, since the pages hold values as they are (",
            type_name(cache.scalar_type()), ")");
    require_vector(*args.scales, "scales", ScalarType::Float, {2}, args.query, "query");
    params.scales = static_cast<const float*>(args.scales->const_data_ptr());
  }
  constexpr double kLargest = std::numeric_limits<float>::max();
  require(std::abs(args.softmax_scale) <= kLargest, "softmax_scale: expected a finite float32 number, found ",
          args.softmax_scale);
  require(args.window >= 0, "window: expected 0 (all keys) or more, found ", args.window);
  require(args.soft_cap >= 0 && args.soft_cap <= kLargest, "soft_cap: expected 0 (none) or more, found ",
          args.soft_cap);
  params.softmax_scale = static_cast<float>(args.softmax_scale);
  params.window = args.window;
  params.soft_cap = static_cast<float>(args.soft_cap);
  return params;
}

}  // namespace vlcache
