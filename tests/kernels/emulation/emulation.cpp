// The CUDA operations on CPU tensors: the same arguments, plans and kernels as in csrc/cuda/*_op.cu, each thread of a
// launch emulated. tests/kernels/cuda_emulation.py compiles this and defines the schemas.
#include <torch/csrc/stable/library.h>

#include "attention_op.h"
#include "cuda/attention.cuh"
#include "cuda/rows.cuh"
#include "cuda/shift.cuh"
#include "rows_op.h"
#include "shift_op.h"

namespace vlcache {
namespace {

using cuda::AttentionPlan;
using cuda::RowsPlan;
using cuda::emulation::Launch;

// The device that is emulated, and what the last call did; for the tests.
struct Device {
  int32_t seed = 0, multiprocessors = 4;
  int64_t max_shared_nbytes = 227 << 10;
  int32_t vectors = 0, rows = 0, splits = 0;
} device;

template <bool kLoad>
struct RowsLaunch {
  const RowsParams& params;
  const RowsPlan& plan;

  template <typename Turns>
  void vectors() const {
    launch().run_apart([this] { cuda::move_vectors<Turns, kLoad>(params, plan); });
  }

  void elements() const {
    launch().run_apart([this] { cuda::move_elements<kLoad>(params); });
  }

  Launch launch() const { return {{unsigned(plan.blocks), 1, 1}, RowsPlan::kThreads, 0, unsigned(device.seed)}; }
};

template <bool kLoad>
void move_rows(const RowsArguments& args) {
  const RowsParams params = rows_params(args);
  if (params.layers * params.tokens * params.pages.heads * params.pages.dim == 0 || params.num_blocks == 0) return;
  const RowsPlan plan = cuda::plan_rows(params);
  device.vectors = plan.vectors;
  cuda::choose_rows_kernel<kLoad>(params, plan, RowsLaunch<kLoad>{params, plan});
}

void load_rows(const Tensor& entry, const std::vector<Tensor>& caches, const Tensor& slots,
               const std::optional<Tensor>& turns, bool is_neox, const std::optional<Tensor>& scales,
               int64_t block_size, const std::vector<int64_t>& layout, const std::optional<Tensor>& order) {
  move_rows<true>({entry, caches, slots, turns, is_neox, scales, block_size, layout, order});
}

void save_rows(const Tensor& entry, const std::vector<Tensor>& caches, const Tensor& slots,
               const std::optional<Tensor>& scales, int64_t block_size, const std::vector<int64_t>& layout,
               const std::optional<Tensor>& order) {
  const std::optional<Tensor> turns;
  move_rows<false>({entry, caches, slots, turns, true, scales, block_size, layout, order});
}

struct ShiftLaunch {
  const ShiftParams& params;
  const RowsPlan& plan;

  template <typename T>
  void vectors() const {
    launch().run_apart([this] { cuda::shift_vectors<T>(params, plan); });
  }

  void elements() const {
    launch().run_apart([this] { cuda::shift_elements(params); });
  }

  Launch launch() const { return {{unsigned(plan.blocks), 1, 1}, RowsPlan::kThreads, 0, unsigned(device.seed)}; }
};

void shift_rows(const Tensor& out, const Tensor& entry, const Tensor& shift, const Tensor& places,
                const std::optional<Tensor>& turns, bool is_neox) {
  const ShiftParams params = shift_params({out, entry, shift, places, turns, is_neox});
  if (params.tokens * params.heads * params.dim == 0) return;
  const RowsPlan plan = cuda::plan_shift(params);
  device.vectors = plan.vectors;
  cuda::choose_shift_kernel(params, plan, ShiftLaunch{params, plan});
}

struct AttentionLaunch {
  const AttentionParams& params;
  const AttentionPlan& plan;
  float* workspace;

  template <typename T, int kWidth>
  void attend() const {
    Launch({unsigned(plan.tiles), unsigned(params.pages.heads), unsigned(plan.splits)}, plan.threads(),
           plan.shared_nbytes, unsigned(device.seed))
        .run_together([this] { cuda::attend<T, kWidth>(params, plan, workspace); });
  }

  void combine() const {
    Launch({2, 1, 1}, 64, 0, unsigned(device.seed)).run_apart([this] {
      cuda::combine(params, plan, workspace);
    });
  }
};

void sparse_query_attention(const Tensor& out, const Tensor& query, const Tensor& cache, const Tensor& block_table,
                            const Tensor& request, const Tensor& position, const std::optional<Tensor>& scales,
                            int64_t block_size, const std::vector<int64_t>& layout, const std::optional<Tensor>& order,
                            double softmax_scale, int64_t window, double soft_cap) {
  const AttentionParams params = attention_params({out, query, cache, block_table, request, position, scales,
                                                   block_size, layout, order, softmax_scale, window, soft_cap});
  if (params.queries == 0) return;
  const AttentionPlan plan =
      cuda::plan_attention(params, device.multiprocessors, size_t(device.max_shared_nbytes));
  device.vectors = plan.vectors;
  device.rows = plan.rows;
  device.splits = plan.splits;
  std::vector<float> workspace(size_t(cuda::workspace_floats(params, plan)), float_of_bits(0xffffffffu));
  cuda::choose_attention_kernels(plan, AttentionLaunch{params, plan, workspace.data()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlcache_emulated, CPU, m) {
  m.impl("load_rows", TORCH_BOX(&load_rows));
  m.impl("save_rows", TORCH_BOX(&save_rows));
  m.impl("shift_rows", TORCH_BOX(&shift_rows));
  m.impl("sparse_query_attention", TORCH_BOX(&sparse_query_attention));
}

}  // namespace vlcache

extern "C" __attribute__((visibility("default"))) vlcache::Device* vlcache_emulated_device() {
  return &vlcache::device;
}
