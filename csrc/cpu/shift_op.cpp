// shift_rows for entries in host memory.

#include "shift_op.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/grain.h"
#include "cpu/shift_kernels.h"

namespace vlcache {
namespace {

void shift_rows(const Tensor& out, const Tensor& entry, const Tensor& shift, const Tensor& places,
                const std::optional<Tensor>& turns, bool is_neox) {
  const ShiftParams params = shift_params({out, entry, shift, places, turns, is_neox});
  const int64_t token_nbytes = 2 * params.heads * params.dim * nbytes_of(params.type);
  if (token_nbytes == 0) return;
  torch::stable::parallel_for(0, params.tokens, grain(token_nbytes), [&](int64_t first, int64_t end) {
    VLCACHE_CALL(shift_rows, params, first, end)
  });
}

}  // namespace
}  // namespace vlcache

STABLE_TORCH_LIBRARY_IMPL(vlcache, CPU, m) { m.impl("shift_rows", TORCH_BOX(&vlcache::shift_rows)); }
