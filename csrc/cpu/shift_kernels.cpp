// Rows of an entry with their changes added, keys rotated, on the CPU. Compiled once per instruction set.
//
// A row may be written where it was read. So no element is read again once it was written: the last elements of a row
// that fill no vector go through one that is filled up with zeros, where row.h takes whole vectors that overlap.

#include "cpu/shift_kernels.h"

#include <cstdint>
#include <type_traits>

#include "cpu/row.h"

namespace vlcache {
namespace VLCACHE_ISA {
namespace {

// Calls some(i, count) for the numbers of [first, end): count is kLanes, known to the compiler, and less at the end.
template <typename Some>
inline void for_parts(int64_t first, int64_t end, Some some) {
  int64_t i = first;
  for (; i + kLanes <= end; i += kLanes) some(i, std::integral_constant<int64_t, kLanes>());
  if (i < end) some(i, end - i);
}

template <typename T>
inline Floats load_part(const T* from, int64_t count) {
  if (count >= kLanes) return load_stored(from);
  T part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load_stored(part);
}

template <typename T>
inline void store_part(T* to, Floats values, int64_t count) {
  if (count >= kLanes) return store_rounded(to, values);
  T part[kLanes];
  store_rounded(part, values);
  for (int64_t i = 0; i < count; ++i) to[i] = part[i];
}

// Both members of `count` pairs from pair i on.
template <Turn turn, typename T>
inline void load_pairs(const T* row, int64_t half, int64_t i, int64_t count, Floats& x, Floats& y) {
  constexpr bool kHalves = turn == Turn::kHalves;
  x = load_part(row + (kHalves ? i : 2 * i), kHalves ? count : 2 * count);
  y = load_part(row + (kHalves ? half + i : 2 * i + kLanes), kHalves ? count : 2 * count - kLanes);
  if constexpr (!kHalves) separate(x, y);
}

template <Turn turn, typename T>
inline void store_pairs(T* row, int64_t half, int64_t i, int64_t count, Floats x, Floats y) {
  constexpr bool kHalves = turn == Turn::kHalves;
  if constexpr (!kHalves) interleave(x, y);
  store_part(row + (kHalves ? i : 2 * i), x, kHalves ? count : 2 * count);
  store_part(row + (kHalves ? half + i : 2 * i + kLanes), y, kHalves ? count : 2 * count - kLanes);
}

// Dimensions first ... dim - 1, which do not turn.
template <typename T>
inline void add_row(const T* from, T* to, const T* shift, int64_t first, int64_t dim) {
  for_parts(first, dim, [&](int64_t d, auto count) {
    store_part(to + d, load_part(from + d, count) + load_part(shift + d, count), count);
  });
}

template <Turn turn, bool kTurnsKeys, typename T>
inline void shift_key(const ShiftParams& params, const T* from, T* to, const T* shift, const float* place) {
  const int64_t half = params.half_rotary;
  for_parts(0, half, [&](int64_t i, auto count) {
    Floats x, y, shift_x, shift_y;
    load_pairs<turn>(from, half, i, count, x, y);
    if constexpr (kTurnsKeys) {
      const float* turns = params.turns;
      turn_pairs<Floats, false>(x, y, load_part(turns + i, count), load_part(turns + half + i, count), 1.0f);
    }
    load_pairs<turn>(shift, half, i, count, shift_x, shift_y);
    turn_pairs<Floats, false>(shift_x, shift_y, load_part(place + i, count), load_part(place + half + i, count), 1.0f);
    store_pairs<turn>(to, half, i, count, x + shift_x, y + shift_y);
  });
  add_row(from, to, shift, 2 * half, params.dim);
}

template <Turn turn, bool kTurnsKeys, typename T>
void shift_tokens(const ShiftParams& params, int64_t first, int64_t end) {
  // (Not RowStrides::offset: it has external linkage, see numeric.h.)
  const RowStrides &froms = params.entry_strides, &shifts = params.shift_strides, &tos = params.out_strides;
  for (int64_t token = first; token < end; ++token) {
    const T* from = static_cast<const T*>(params.entry) + token * froms.token;
    const T* shift = static_cast<const T*>(params.shift) + token * shifts.token;
    T* to = static_cast<T*>(params.out) + token * tos.token;
    const float* place = params.places + token * 2 * params.half_rotary;
    // All heads of keys come first: changes of keys and values may be neighbours, and read in turns they took 1.7 times
    // as long.
    for (int64_t head = 0; head < params.heads; ++head) {
      shift_key<turn, kTurnsKeys>(params, from + head * froms.head, to + head * tos.head, shift + head * shifts.head,
                                  place);
    }
    for (int64_t head = 0; head < params.heads; ++head) {
      add_row(from + froms.kv + head * froms.head, to + tos.kv + head * tos.head,
              shift + shifts.kv + head * shifts.head, 0, params.dim);
    }
  }
}

template <Turn turn, typename T>
void shift_rows_of(const ShiftParams& params, int64_t first, int64_t end) {
  params.turns == nullptr ? shift_tokens<turn, false, T>(params, first, end)
                          : shift_tokens<turn, true, T>(params, first, end);
}

}  // namespace

void shift_rows(const ShiftParams& params, int64_t first, int64_t end) {
  visit_type(params.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    params.is_neox ? shift_rows_of<Turn::kHalves, T>(params, first, end)
                   : shift_rows_of<Turn::kPairs, T>(params, first, end);
  });
}

}  // namespace VLCACHE_ISA
}  // namespace vlcache
