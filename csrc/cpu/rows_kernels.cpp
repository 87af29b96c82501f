// Rows between staged entries and pages on the CPU: copied, converted, keys rotated. Compiled once per instruction set.
//
// Tokens are the outer loop and heads the inner one, so that an entry is read or written from front to back, which the
// processor's prefetcher likes: the other order costs half of the speed. Pages whose neighbours are the tokens of one
// dimension are reached by way of squares of some tokens and dimensions, which are transposed in registers.

#include "cpu/rows_kernels.h"

#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/row.h"
#include "cpu/transpose.h"

namespace vlcache {
namespace VLCACHE_ISA {
namespace {

// Of pages that are reached by way of a tile: the rows that it has room for.
constexpr int64_t kTokensAtOnce = 64;

// How keys or values lie in a block.
enum class Way { kDense, kScattered, kTransposed };

inline Way way_of(const PageLayout& pages, int64_t kv) {
  if (pages.order != nullptr) return Way::kScattered;
  if (pages.halves[kv].dim == 1) return Way::kDense;
  return pages.halves[kv].token == 1 ? Way::kTransposed : Way::kScattered;
}

// Neighbouring tokens of a layer that go into neighbouring slots of a block.
template <typename Page, typename Staged>
struct Run {
  int64_t layer;
  Staged* staged;  // keys of the first token
  Page* block;
  int64_t offset, count;
  Page* next;  // block of the token behind them; null: there is none
};

// Calls visit(run) for the rows of [first, end) with a slot, kTokensAtOnce of them at most.
template <typename Page, typename Staged, typename Visit>
inline void for_runs(const RowsParams& params, int64_t first, int64_t end, Visit visit) {
  const PageLayout& pages = params.pages;
  while (first < end) {
    const int64_t layer = first / params.tokens, token = first % params.tokens, slot = params.slots[token];
    if (slot < 0) {
      ++first;
      continue;
    }
    int64_t most = kTokensAtOnce;
    for (int64_t limit : {pages.block_size - slot % pages.block_size, params.tokens - token, end - first}) {
      most = limit < most ? limit : most;
    }
    int64_t count = 1;
    while (count < most && params.slots[token + count] == slot + count) ++count;
    const auto block_of = [&](int64_t s) {
      return static_cast<Page*>(params.caches[layer]) + s / pages.block_size * pages.block_stride;
    };
    const int64_t next = token + count < params.tokens ? params.slots[token + count] : -1;
    Staged* entry = static_cast<Staged*>(params.entry);
    visit(Run<Page, Staged>{layer, entry + layer * params.entry_layer_stride + token * params.entry_token_stride,
                            block_of(slot), slot % pages.block_size, count, next < 0 ? nullptr : block_of(next)});
    first += count;
  }
}

// Calls visit(token of the run, head, row of the entry) for keys (kv 0) or values (1).
template <typename Run, typename Visit>
inline void for_rows(const RowsParams& params, const Run& run, int64_t kv, Visit visit) {
  for (int64_t i = 0; i < run.count; ++i) {
    auto* staged = run.staged + kv * params.entry_kv_stride + i * params.entry_token_stride;
    for (int64_t head = 0; head < params.pages.heads; ++head, staged += params.entry_head_stride) visit(i, head, staged);
  }
}

inline float scale_of(const RowsParams& params, int64_t layer, int64_t kv) {
  return params.scales == nullptr ? 1.0f : params.scales[2 * layer + kv];
}

// A step that walks through transposed pages asks for what the next one needs: other pages lie in runs of which the
// processor finds out by itself.
template <typename Page>
inline void prefetch_square(const Page* first, int64_t step, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(first + i * step, 0, 2);
}

// Calls visit(page's side, tile's side, rows = dims, columns = tokens of both) for squares of a run's transposed pages.
// `tile` is [token][head][dim]; `entry` are rows that will be needed next (there may be none: to prefetch is no access).
// What is written past the caches need not be there: `reads_pages`, `reads_entry`.
template <typename Page, typename Staged, typename Visit>
inline void for_transposed(const RowsParams& params, const Run<Page, Staged>& run, int64_t kv, Staged* entry,
                           Page* tile, bool reads_pages, bool reads_entry, Visit visit) {
  const PageLayout& pages = params.pages;
  const Strides& strides = pages.halves[kv];
  for (int64_t head = 0; head < pages.heads; ++head) {
    Page* first = run.block + row_start(strides, run.offset, head);
    const Page* next = head + 1 < pages.heads ? first + strides.head
                       : run.next != nullptr  ? run.next + row_start(strides, 0, 0)
                                              : first;
    for_squares<Page>(pages.dim, run.count, [&](int64_t d, int64_t token, int64_t dims, int64_t tokens) {
      const Page* ahead = d + dims < pages.dim ? first + (d + dims) * strides.dim : next;
      if (reads_pages) prefetch_square(ahead + token, strides.dim, dims < pages.dim - d ? dims : pages.dim - d);
      if (reads_entry) {
        prefetch_square(entry + token * params.entry_token_stride + head * params.entry_head_stride + d,
                        params.entry_token_stride, tokens);
      }
      visit(first + d * strides.dim + token, tile + (token * pages.heads + head) * pages.dim + d, dims, tokens);
    });
  }
}

// Loads or saves rows of a call, those of transposed pages by way of a tile: kTokensAtOnce rows of all heads, of the type
// of the pages, small enough for the second-level cache. The entry is read or written from front to back. (A tile for the
// first-level cache, one head at a time, was slower.)
template <typename Page, typename Staged>
class Mover {
 public:
  Mover(const RowsParams& params, bool streams)
      : params_(params), pages_(params.pages), ways_{way_of(pages_, 0), way_of(pages_, 1)}, streams_(streams) {
    if (has_tile(0) || has_tile(1)) tile_.reset(new Page[kTokensAtOnce * pages_.heads * pages_.dim]);
  }

  template <Turn turn>
  void load(int64_t first, int64_t end) {
    for_runs<Page, const Staged>(params_, first, end, [&](const auto& run) {
      if (has_tile(0)) load_tile<turn>(run, 0);
      if (has_tile(1)) load_tile<Turn::kNone>(run, 1);
      // A token's keys and values one after the other: they are often neighbours in the pages.
      for_rows_without_tile(run, [&](int64_t kv, auto row, const Staged* staged) {
        const float scale = scale_of(params_, run.layer, kv);
        kv == 0 ? load_row<turn>(params_, row, staged, scale) : load_row<Turn::kNone>(params_, row, staged, scale);
      });
    });
  }

  void save(int64_t first, int64_t end) {
    for_runs<Page, Staged>(params_, first, end, [&](const auto& run) {
      if (has_tile(0)) save_tile(run, 0);
      if (has_tile(1)) save_tile(run, 1);
      for_rows_without_tile(run, [&](int64_t kv, auto row, Staged* staged) {
        save_row(row, staged, pages_.dim, scale_of(params_, run.layer, kv));
      });
    });
  }

 private:
  bool has_tile(int64_t kv) const { return ways_[kv] == Way::kTransposed; }
  DenseRow<Page> tile_row(int64_t token, int64_t head, bool streams) const {
    return DenseRow<Page>(tile_.get() + (token * pages_.heads + head) * pages_.dim, streams);
  }

  template <typename Run, typename Visit>
  void for_rows_without_tile(const Run& run, Visit visit) {
    if (has_tile(0) && has_tile(1)) return;
    for_rows(params_, run, 0, [&](int64_t i, int64_t head, auto* staged) {
      for (int64_t kv = 0; kv < 2; ++kv, staged += params_.entry_kv_stride) {
        if (ways_[kv] == Way::kDense) {
          visit(kv, DenseRow<Page>(pages_, run.block, kv, run.offset + i, head, streams_), staged);
        }
        if (ways_[kv] == Way::kScattered) {
          visit(kv, ScatteredRow<Page>(pages_, run.block, kv, run.offset + i, head), staged);
        }
      }
    });
  }

  template <Turn turn>
  void load_tile(const Run<Page, const Staged>& run, int64_t kv) {
    const float scale = scale_of(params_, run.layer, kv);
    for_rows(params_, run, kv, [&](int64_t i, int64_t head, const Staged* staged) {
      load_row<turn>(params_, tile_row(i, head, false), staged, scale);
    });
    const Staged* next = run.staged + kv * params_.entry_kv_stride + run.count * params_.entry_token_stride;
    const int64_t page_step = pages_.halves[kv].dim, tile_step = pages_.heads * pages_.dim;
    for_transposed(params_, run, kv, next, tile_.get(), !streams_, true,
                   [=](Page* page, Page* square, int64_t dims, int64_t tokens) {
                     transpose_part(square, tile_step, tokens, dims, page, page_step, streams_);
                   });
  }

  void save_tile(const Run<Page, Staged>& run, int64_t kv) {
    const float scale = scale_of(params_, run.layer, kv);
    Staged* staged = run.staged + kv * params_.entry_kv_stride;
    const int64_t page_step = pages_.halves[kv].dim, tile_step = pages_.heads * pages_.dim;
    for_transposed(params_, run, kv, staged, tile_.get(), true, !streams_,
                   [=](Page* page, Page* square, int64_t dims, int64_t tokens) {
                     transpose_part(page, page_step, dims, tokens, square, tile_step, false);
                   });
    for_rows(params_, run, kv, [&](int64_t i, int64_t head, Staged* staged) {
      save_row(tile_row(i, head, streams_), staged, pages_.dim, scale);
    });
  }

  const RowsParams& params_;
  const PageLayout& pages_;
  const Way ways_[2];
  const bool streams_;
  std::unique_ptr<Page[]> tile_;
};

template <typename Page, typename Staged>
struct Rows {
  static void load(const RowsParams& params, int64_t first, int64_t end, bool streams) {
    Mover<Page, Staged> mover(params, streams);
    if (params.turns == nullptr) return mover.template load<Turn::kNone>(first, end);
    if (params.is_neox) return mover.template load<Turn::kHalves>(first, end);
    mover.template load<Turn::kPairs>(first, end);
  }

  static void save(const RowsParams& params, int64_t first, int64_t end, bool streams) {
    Mover<Page, Staged>(params, streams).save(first, end);
  }
};

// Calls visit(Rows<Page, Staged>{}) for the types of a call. Entries have the type of the pages; those of 8-bit pages
// may also be wider.
template <typename Page, typename Staged, typename Visit>
void visit_if_possible(Visit visit) {
  if constexpr (std::is_same_v<Page, Staged> || (sizeof(Page) == 1 && sizeof(Staged) > 1)) visit(Rows<Page, Staged>{});
}

template <typename Page, typename Visit>
void visit_staged(const RowsParams& params, Visit visit) {
  visit_type(params.entry_type, [&](auto tag) { visit_if_possible<Page, typename decltype(tag)::type>(visit); });
}

template <typename Visit>
void visit_rows(const RowsParams& params, Visit visit) {
  visit_type(params.cache_type, [&](auto tag) { visit_staged<typename decltype(tag)::type>(params, visit); });
}

}  // namespace

void load_rows(const RowsParams& params, int64_t first, int64_t end, bool streams) {
  visit_rows(params, [&](auto rows) { rows.load(params, first, end, streams); });
  if (streams) end_stream();
}

void save_rows(const RowsParams& params, int64_t first, int64_t end, bool streams) {
  visit_rows(params, [&](auto rows) { rows.save(params, first, end, streams); });
  if (streams) end_stream();
}

}  // namespace VLCACHE_ISA
}  // namespace vlcache
