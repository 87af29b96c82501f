// load_rows and save_rows of CUDA tensors.
#include "rows_op.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "launch.h"
#include "rows.cuh"

namespace vlcache {
namespace {

using cuda::RowsPlan;

template <typename Turns, bool kLoad>
__global__ void __launch_bounds__(RowsPlan::kThreads)
    vectors_kernel(const __grid_constant__ RowsParams params, const __grid_constant__ RowsPlan plan) {
  cuda::move_vectors<Turns, kLoad>(params, plan);
}

template <bool kLoad>
__global__ void __launch_bounds__(RowsPlan::kThreads) elements_kernel(const __grid_constant__ RowsParams params) {
  cuda::move_elements<kLoad>(params);
}

template <bool kLoad>
struct Launch {
  const RowsParams& params;
  const RowsPlan& plan;
  cudaStream_t stream;

  template <typename Turns>
  void vectors() const {
    vectors_kernel<Turns, kLoad><<<unsigned(plan.blocks), RowsPlan::kThreads, 0, stream>>>(params, plan);
  }

  void elements() const {
    elements_kernel<kLoad><<<unsigned(plan.blocks), RowsPlan::kThreads, 0, stream>>>(params);
  }
};

template <bool kLoad>
void move_rows(const RowsArguments& args) {
  const RowsParams params = rows_params(args);
  if (params.layers * params.tokens * params.pages.heads * params.pages.dim == 0 || params.num_blocks == 0) return;
  const int32_t device = args.entry.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const RowsPlan plan = cuda::plan_rows(params);
  cuda::choose_rows_kernel<kLoad>(params, plan, Launch<kLoad>{params, plan, cuda::current_stream(device)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlcache, CUDA, m) {
  m.impl("load_rows", TORCH_BOX(&load_rows));
  m.impl("save_rows", TORCH_BOX(&save_rows));
}

}  // namespace vlcache
