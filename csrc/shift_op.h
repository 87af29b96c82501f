// The arguments of shift_rows, checked and turned into what a kernel needs.
#pragma once

#include "check.h"
#include "numeric.h"

namespace vlcache {

struct ShiftArguments {
  const Tensor& out;
  const Tensor& entry;
  const Tensor& shift;
  const Tensor& places;
  const std::optional<Tensor>& turns;
  bool is_neox;
};

inline void set_rows(const ShiftArguments& args, ShiftParams& params) {
  const Tensor &entry = args.entry, &out = args.out;
  params.type = require_float(entry, "entry");
  require_shape(entry, "entry", {2, kAnySize, kAnySize, kAnySize});
  require_dense_rows(entry, "entry");
  params.tokens = entry.size(1);
  params.heads = entry.size(2);
  params.dim = entry.size(3);
  require_shape(out, "out", {2, params.tokens, params.heads, params.dim});
  require_type(out, "out", entry.scalar_type());
  require_device(out, "out", entry, "entry");
  require_dense_rows(out, "out");
  params.entry = entry.const_data_ptr();
  params.entry_kv_stride = entry.stride(0);
  params.entry_token_stride = entry.stride(1);
  params.entry_head_stride = entry.stride(2);
  params.out = out.data_ptr();
  params.out_kv_stride = out.stride(0);
  params.out_token_stride = out.stride(1);
  params.out_head_stride = out.stride(2);
}

// Throws an error that names the argument.
inline ShiftParams shift_params(const ShiftArguments& args) {
  ShiftParams params{};
  set_rows(args, params);
  require_vector(args.shift, "shift", ScalarType::Float, {2, params.heads, params.dim}, args.entry, "entry");
  require_vector(args.places, "places", ScalarType::Float, {params.tokens, 2, kAnySize}, args.entry, "entry");
  params.half_rotary = args.places.size(2);
  require(2 * params.half_rotary <= params.dim, "places: expected at most dim / 2 = ", params.dim / 2,
          " angles, found ", params.half_rotary);
  params.shift = static_cast<const float*>(args.shift.const_data_ptr());
  params.places = static_cast<const float*>(args.places.const_data_ptr());
  params.is_neox = args.is_neox;
  if (args.turns.has_value()) {
    require_vector(*args.turns, "turns", ScalarType::Float, {2, params.half_rotary}, args.entry, "entry");
    params.turns = static_cast<const float*>(args.turns->const_data_ptr());
  }
  return params;
}

}  // namespace vlcache
