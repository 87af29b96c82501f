// The arguments of load_rows and save_rows, checked and turned into what a kernel needs.
#pragma once

#include <string>

#include "check.h"
#include "numeric.h"

namespace vlcache {

struct RowsArguments {
  const Tensor& entry;
  const std::vector<Tensor>& caches;
  const Tensor& slots;
  const std::optional<Tensor>& turns;
  bool is_neox;
  const std::optional<Tensor>& scales;
  int64_t block_size;
  const std::vector<int64_t>& layout;
  const std::optional<Tensor>& order;
};

// Each layer's pages like those of the first.
inline void set_caches(const RowsArguments& args, RowsParams& params) {
  const Tensor& first = args.caches[0];
  const int64_t heads = args.entry.size(3), dim = args.entry.size(4);
  params.cache_type = require_float(first, "caches[0]");
  for (size_t i = 0; i < args.caches.size(); ++i) {
    const Tensor& cache = args.caches[i];
    const std::string name = "caches[" + std::to_string(i) + "]";
    params.pages = require_layout(cache, name, heads, dim, args.block_size, args.layout, args.order);
    require_type(cache, name, first.scalar_type());
    require_device(cache, name, first, "caches[0]");
    require(cache.size(0) == first.size(0), name, ": expected ", first.size(0), " blocks like caches[0], found ",
            cache.size(0));
    require(cache.stride(0) == first.stride(0), name, ": expected ", first.stride(0),
            " elements from block to block like caches[0], found ", cache.stride(0));
    params.caches[i] = cache.data_ptr();
  }
  params.num_blocks = first.size(0);
}

inline void set_scales(const RowsArguments& args, RowsParams& params) {
  const bool converts = is_float8(params.cache_type) && !is_float8(params.entry_type);
  require(params.entry_type == params.cache_type || converts, "entry: expected ",
          type_name(args.caches[0].scalar_type()), " like the pages (or float32, bfloat16 or float16 for 8-bit pages)",
          ", found ", type_name(args.entry.scalar_type()));
  if (!args.scales.has_value()) return;
  require(converts, "scales: expected none, since the pages hold what the entry holds (both ",
          type_name(args.entry.scalar_type()), ")");
  require_vector(*args.scales, "scales", ScalarType::Float, {params.layers, 2}, args.caches[0], "caches[0]");
  params.scales = static_cast<const float*>(args.scales->const_data_ptr());
}

inline void set_turns(const RowsArguments& args, RowsParams& params) {
  if (!args.turns.has_value()) return;
  require_vector(*args.turns, "turns", ScalarType::Float, {2, kAnySize}, args.caches[0], "caches[0]");
  params.half_rotary = args.turns->size(1);
  require(2 * params.half_rotary <= args.entry.size(4), "turns: expected at most dim / 2 = ", args.entry.size(4) / 2,
          " angles, found ", params.half_rotary);
  params.turns = static_cast<const float*>(args.turns->const_data_ptr());
  params.is_neox = args.is_neox;
}

// Throws an error that names the argument. Values in `slots` and `order` are not looked at here: they may be on a
// device. A call without layers or without tokens is checked as far as its arguments go.
inline RowsParams rows_params(const RowsArguments& args) {
  RowsParams params{};
  const Tensor& entry = args.entry;
  params.layers = static_cast<int64_t>(args.caches.size());
  require(params.layers <= kMaxLayers, "caches: expected at most ", kMaxLayers, " layers, found ", params.layers);
  params.entry_type = require_float(entry, "entry");
  require_shape(entry, "entry", {params.layers, 2, kAnySize, kAnySize, kAnySize});
  require_dense_rows(entry, "entry");
  params.tokens = entry.size(2);
  const Tensor& near = params.layers > 0 ? args.caches[0] : entry;
  require_device(entry, "entry", near, "caches[0]");
  require_vector(args.slots, "slots", ScalarType::Long, {params.tokens}, near, "caches[0]");
  if (params.layers == 0) return params;
  set_caches(args, params);
  set_scales(args, params);
  set_turns(args, params);
  params.entry = entry.data_ptr();
  params.entry_layer_stride = entry.stride(0);
  params.entry_kv_stride = entry.stride(1);
  params.entry_token_stride = entry.stride(2);
  params.entry_head_stride = entry.stride(3);
  params.slots = static_cast<const int64_t*>(args.slots.const_data_ptr());
  return params;
}

}  // namespace vlcache
