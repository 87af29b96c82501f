// load_rows and save_rows for pages in host memory.

#include "rows_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/grain.h"
#include "cpu/rows_kernels.h"

namespace vlcache {
namespace {

void require_slots_in_pages(const RowsParams& params) {
  const int64_t end = params.num_blocks * params.pages.block_size;
  for (int64_t token = 0; token < params.tokens; ++token) {
    const int64_t slot = params.slots[token];
    require(slot >= -1 && slot < end, "slots: expected -1 to ", end - 1, ", found ", slot, " for token ", token);
  }
}

// Nothing is written before all arguments are found to be right.
RowsParams checked_params(const RowsArguments& args) {
  const RowsParams params = rows_params(args);
  if (params.layers == 0) return params;
  require_slots_in_pages(params);
  const auto has_smaller_blocks = [](const Tensor& a, const Tensor& b) {
    return last_element_of_block(a) < last_element_of_block(b);
  };
  require_order_in_block(params.pages, *std::min_element(args.caches.begin(), args.caches.end(), has_smaller_blocks));
  return params;
}

// Of several layers: the last ones would push the first ones out of the caches before those are read. One layer is read
// at once.
constexpr int64_t kStreamedBytes = 4 << 20;

template <typename Move>
void move_rows(const RowsParams& params, Move move) {
  const int64_t row_nbytes = 2 * params.pages.heads * params.pages.dim * nbytes_of(params.entry_type);
  if (row_nbytes == 0) return;
  const int64_t rows = params.layers * params.tokens;
  const bool streams = params.layers > 1 && rows >= kStreamedBytes / row_nbytes;
  torch::stable::parallel_for(0, rows, grain(row_nbytes), [&](int64_t first, int64_t end) { move(first, end, streams); });
}

void load_rows(const Tensor& entry, const std::vector<Tensor>& caches, const Tensor& slots,
               const std::optional<Tensor>& turns, bool is_neox, const std::optional<Tensor>& scales,
               int64_t block_size, const std::vector<int64_t>& layout, const std::optional<Tensor>& order) {
  const RowsParams params =
      checked_params({entry, caches, slots, turns, is_neox, scales, block_size, layout, order});
  move_rows(params, [&](int64_t first, int64_t end, bool streams) {
    VLCACHE_CALL(load_rows, params, first, end, streams)
  });
}

void save_rows(const Tensor& entry, const std::vector<Tensor>& caches, const Tensor& slots,
               const std::optional<Tensor>& scales, int64_t block_size, const std::vector<int64_t>& layout,
               const std::optional<Tensor>& order) {
  const RowsParams params =
      checked_params({entry, caches, slots, std::nullopt, true, scales, block_size, layout, order});
  move_rows(params, [&](int64_t first, int64_t end, bool streams) {
    VLCACHE_CALL(save_rows, params, first, end, streams)
  });
}

}  // namespace
}  // namespace vlcache

STABLE_TORCH_LIBRARY_IMPL(vlcache, CPU, m) {
  m.impl("load_rows", TORCH_BOX(&vlcache::load_rows));
  m.impl("save_rows", TORCH_BOX(&vlcache::save_rows));
}
