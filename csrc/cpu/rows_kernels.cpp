// Rows between staged entries and pages on the CPU: copied, converted, keys rotated. Compiled once per instruction set.
//
// Tokens are the outer loop and heads the inner one, so that an entry is read or written from front to back, which the
// processor's prefetcher likes: the other order costs half of the speed. Pages are reached in runs of a head's rows.

#include "cpu/rows_kernels.h"

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "numeric.h"

namespace vlcache {
namespace VLCACHE_ISA {
namespace {

// A row of a page: its elements side by side, or wherever the layout says. (Not PageLayout::offset: it has external
// linkage, see numeric.h.)
template <typename T>
struct DenseRow {
  using Page = T;
  T* start;

  DenseRow(const PageLayout& pages, T* block, int64_t kv, int64_t token, int64_t head)
      : start(block + pages.origin + kv * pages.kv_stride + token * pages.token_stride + head * pages.head_stride) {}

  void get(int64_t first, int64_t count, T* values) const { std::memcpy(values, start + first, count * sizeof(T)); }
  void put(int64_t first, int64_t count, const T* values) const { std::memcpy(start + first, values, count * sizeof(T)); }
};

template <typename T>
struct ScatteredRow {
  using Page = T;
  T* start;
  int64_t step;
  const int32_t* order = nullptr;  // null: in equal steps

  ScatteredRow(const PageLayout& pages, T* block, int64_t kv, int64_t token, int64_t head)
      : start(block), step(pages.dim_stride) {
    if (pages.order == nullptr) {
      start = DenseRow<T>(pages, block, kv, token, head).start;
    } else {
      order = pages.order + ((kv * pages.block_size + token) * pages.heads + head) * pages.dim;
    }
  }

  int64_t offset(int64_t d) const { return order != nullptr ? order[d] : d * step; }
  void get(int64_t first, int64_t count, T* values) const {
    for (int64_t i = 0; i < count; ++i) values[i] = start[offset(first + i)];
  }
  void put(int64_t first, int64_t count, const T* values) const {
    for (int64_t i = 0; i < count; ++i) start[offset(first + i)] = values[i];
  }
};

template <typename Row>
inline void put_lanes(Row row, int64_t first, Floats values) {
  typename Row::Page rounded[kLanes];
  store_rounded(rounded, values);
  row.put(first, kLanes, rounded);
}

template <typename Row>
inline void put_one(Row row, int64_t d, float value) {
  const auto rounded = from_float<typename Row::Page>(value);
  row.put(d, 1, &rounded);
}

// Calls lanes(i) for kLanes numbers from i on, until all of [first, end) had their turn, some of the last ones twice;
// one(i) for each number where they are fewer than kLanes.
template <typename Lanes, typename One>
inline void for_range(int64_t first, int64_t end, Lanes lanes, One one) {
  if (end - first < kLanes) {
    for (int64_t i = first; i < end; ++i) one(i);
  } else {
    for (int64_t i = first; i < end; i += kLanes) lanes(i + kLanes <= end ? i : end - kLanes);
  }
}

// Dimensions first ... dim - 1 of an entry's row into a page's row. With one type on both sides the bits are copied.
template <typename Row, typename Staged>
inline void load_row(Row row, const Staged* staged, int64_t first, int64_t dim, float scale) {
  if constexpr (std::is_same_v<typename Row::Page, Staged>) {
    row.put(first, dim - first, staged + first);
  } else {
    for_range(
        first, dim, [&](int64_t d) { put_lanes(row, d, load_stored(staged + d) / scale); },
        [&](int64_t d) { put_one(row, d, to_float(staged[d]) / scale); });
  }
}

template <typename Row, typename Staged>
inline void save_row(Row row, Staged* staged, int64_t dim, float scale) {
  using Page = typename Row::Page;
  if constexpr (std::is_same_v<Page, Staged>) {
    row.get(0, dim, staged);
  } else {
    Page values[kLanes];
    for_range(
        0, dim,
        [&](int64_t d) {
          row.get(d, kLanes, values);
          store_rounded(staged + d, load_stored(values) * scale);
        },
        [&](int64_t d) {
          row.get(d, 1, values);
          staged[d] = from_float<Staged>(to_float(values[0]) * scale);
        });
  }
}

// How the keys of a call turn. kPairs: (2i, 2i + 1) belong together, else (i, i + half).
enum class Turn { kNone, kHalves, kPairs };

// Of one pair (Float is float) or of kLanes of them. What is stored of a page's own type is not scaled.
template <typename Float, bool kIsScaled>
inline void turn_pairs(Float& x, Float& y, Float cosine, Float sine, float scale) {
  const Float turned_x = x * cosine - y * sine, turned_y = y * cosine + x * sine;
  x = kIsScaled ? turned_x / scale : turned_x;
  y = kIsScaled ? turned_y / scale : turned_y;
}

template <Turn turn, typename Row, typename Staged>
inline void load_key(const RowsParams& params, Row row, const Staged* staged, float scale) {
  constexpr bool kIsScaled = !std::is_same_v<typename Row::Page, Staged>;
  const int64_t half = turn == Turn::kNone ? 0 : params.half_rotary;
  const float* cosines = params.turns;
  const float* sines = params.turns + half;
  for_range(
      0, half,
      [&](int64_t i) {
        const int64_t first = turn == Turn::kPairs ? 2 * i : i;
        const int64_t second = turn == Turn::kPairs ? 2 * i + kLanes : i + half;
        Floats x = load_stored(staged + first), y = load_stored(staged + second);
        if constexpr (turn == Turn::kPairs) separate(x, y);
        turn_pairs<Floats, kIsScaled>(x, y, load(cosines + i), load(sines + i), scale);
        if constexpr (turn == Turn::kPairs) interleave(x, y);
        put_lanes(row, first, x);
        put_lanes(row, second, y);
      },
      [&](int64_t i) {
        const int64_t first = turn == Turn::kPairs ? 2 * i : i;
        const int64_t second = turn == Turn::kPairs ? 2 * i + 1 : i + half;
        float x = to_float(staged[first]), y = to_float(staged[second]);
        turn_pairs<float, kIsScaled>(x, y, cosines[i], sines[i], scale);
        put_one(row, first, x);
        put_one(row, second, y);
      });
  if (2 * half < params.pages.dim) load_row(row, staged, 2 * half, params.pages.dim, scale);
}

struct Scales {
  float key, value;
};

inline Scales scales_of(const RowsParams& params, int64_t layer) {
  if (params.scales == nullptr) return {1.0f, 1.0f};
  return {params.scales[2 * layer], params.scales[2 * layer + 1]};
}

// Calls visit(layer, entry rows of the token, block, offset in the block) for each row of [first, end) with a slot.
template <typename Page, typename Staged, typename Visit>
inline void for_rows(const RowsParams& params, int64_t first, int64_t end, Visit visit) {
  const PageLayout& pages = params.pages;
  int64_t layer = first / params.tokens, token = first % params.tokens;
  for (int64_t row = first; row < end; ++row) {
    const int64_t slot = params.slots[token];
    if (slot >= 0) {
      Page* cache = static_cast<Page*>(params.caches[layer]);
      Staged* entry = static_cast<Staged*>(params.entry);
      visit(layer, entry + layer * params.entry_layer_stride + token * params.entry_token_stride,
            cache + slot / pages.block_size * pages.block_stride, slot % pages.block_size);
    }
    if (++token == params.tokens) {
      token = 0;
      ++layer;
    }
  }
}

template <Turn turn, typename Row, typename Staged>
void load(const RowsParams& params, int64_t first, int64_t end) {
  using Page = typename Row::Page;
  const PageLayout& pages = params.pages;
  for_rows<Page, const Staged>(
      params, first, end, [&](int64_t layer, const Staged* staged, Page* block, int64_t offset) {
        const Scales scales = scales_of(params, layer);
        for (int64_t head = 0; head < pages.heads; ++head, staged += params.entry_head_stride) {
          load_key<turn>(params, Row(pages, block, 0, offset, head), staged, scales.key);
          load_row(Row(pages, block, 1, offset, head), staged + params.entry_kv_stride, 0, pages.dim, scales.value);
        }
      });
}

template <typename Row, typename Staged>
void save(const RowsParams& params, int64_t first, int64_t end) {
  using Page = typename Row::Page;
  const PageLayout& pages = params.pages;
  for_rows<Page, Staged>(params, first, end, [&](int64_t layer, Staged* staged, Page* block, int64_t offset) {
    const Scales scales = scales_of(params, layer);
    for (int64_t head = 0; head < pages.heads; ++head, staged += params.entry_head_stride) {
      save_row(Row(pages, block, 0, offset, head), staged, pages.dim, scales.key);
      save_row(Row(pages, block, 1, offset, head), staged + params.entry_kv_stride, pages.dim, scales.value);
    }
  });
}

template <typename Row, typename Staged>
struct Rows {
  static void load(const RowsParams& params, int64_t first, int64_t end) {
    if (params.turns == nullptr) return VLCACHE_ISA::load<Turn::kNone, Row, Staged>(params, first, end);
    if (params.is_neox) return VLCACHE_ISA::load<Turn::kHalves, Row, Staged>(params, first, end);
    VLCACHE_ISA::load<Turn::kPairs, Row, Staged>(params, first, end);
  }
  static void save(const RowsParams& params, int64_t first, int64_t end) {
    VLCACHE_ISA::save<Row, Staged>(params, first, end);
  }
};

// Calls visit(Rows<Row, Staged>{}) for the layout and the types of a call. Entries have the type of the pages; those of
// 8-bit pages may also be wider.
template <typename Page, typename Staged, typename Visit>
void visit_layout(const RowsParams& params, Visit visit) {
  if constexpr (std::is_same_v<Page, Staged> || (sizeof(Page) == 1 && sizeof(Staged) > 1)) {
    const bool is_dense = params.pages.order == nullptr && params.pages.dim_stride == 1;
    if (is_dense) return visit(Rows<DenseRow<Page>, Staged>{});
    visit(Rows<ScatteredRow<Page>, Staged>{});
  }
}

template <typename Page, typename Visit>
void visit_staged(const RowsParams& params, Visit visit) {
  visit_type(params.entry_type, [&](auto tag) { visit_layout<Page, typename decltype(tag)::type>(params, visit); });
}

template <typename Visit>
void visit_rows(const RowsParams& params, Visit visit) {
  visit_type(params.cache_type, [&](auto tag) { visit_staged<typename decltype(tag)::type>(params, visit); });
}

}  // namespace

void load_rows(const RowsParams& params, int64_t first, int64_t end) {
  visit_rows(params, [&](auto rows) { rows.load(params, first, end); });
}

void save_rows(const RowsParams& params, int64_t first, int64_t end) {
  visit_rows(params, [&](auto rows) { rows.save(params, first, end); });
}

}  // namespace VLCACHE_ISA
}  // namespace vlcache
