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

inline RowStrides row_strides(const Tensor& rows) { return {rows.stride(0), rows.stride(1), rows.stride(2)}; }

// Keys and values as those of `entry`.
inline RowStrides require_rows(const Tensor& rows, const std::string& name, const Tensor& entry,
                               const ShiftParams& params) {
  require_type(rows, name, entry.scalar_type());
  require_shape(rows, name, {2, params.tokens, params.heads, params.dim});
  require_device(rows, name, entry, "entry");
  require_dense_rows(rows, name);
  return row_strides(rows);
}

inline void set_rows(const ShiftArguments& args, ShiftParams& params) {
  const Tensor& entry = args.entry;
  params.type = require_float(entry, "entry");
  require_shape(entry, "entry", {2, kAnySize, kAnySize, kAnySize});
  require_dense_rows(entry, "entry");
  params.tokens = entry.size(1);
  params.heads = entry.size(2);
  params.dim = entry.size(3);
  params.entry_strides = row_strides(entry);
  params.out_strides = require_rows(args.out, "out", entry, params);
  params.shift_strides = require_rows(args.shift, "shift", entry, params);
  params.entry = entry.const_data_ptr();
  params.out = args.out.data_ptr();
  params.shift = args.shift.const_data_ptr();
}

// Throws an error that names the argument.
inline ShiftParams shift_params(const ShiftArguments& args) {
  ShiftParams params{};
  set_rows(args, params);
  require_vector(args.places, "places", ScalarType::Float, {params.tokens, 2, kAnySize}, args.entry, "entry");
  params.half_rotary = args.places.size(2);
  require(2 * params.half_rotary <= params.dim, "places: expected at most dim / 2 = ", params.dim / 2,
          " angles, found ", params.half_rotary);
  params.places = static_cast<const float*>(args.places.const_data_ptr());
  params.is_neox = args.is_neox;
  if (args.turns.has_value()) {
    require_vector(*args.turns, "turns", ScalarType::Float, {2, params.half_rotary}, args.entry, "entry");
    params.turns = static_cast<const float*>(args.turns->const_data_ptr());
  }
  return params;
}

}  // namespace vlcache
