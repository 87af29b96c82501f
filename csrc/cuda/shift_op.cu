// shift_rows of CUDA tensors.
#include "shift_op.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "launch.h"
#include "shift.cuh"

namespace vlcache {
namespace {

using cuda::RowsPlan;

// Blocks that a multiprocessor has registers for at least: told none, nvcc aims at more, and spills some for it.
template <typename T>
__global__ void __launch_bounds__(RowsPlan::kThreads, 2)
    vectors_kernel(const __grid_constant__ ShiftParams params, const __grid_constant__ RowsPlan plan) {
  cuda::shift_vectors<T>(params, plan);
}

__global__ void __launch_bounds__(RowsPlan::kThreads, 4) elements_kernel(const __grid_constant__ ShiftParams params) {
  cuda::shift_elements(params);
}

struct Launch {
  const ShiftParams& params;
  const RowsPlan& plan;
  cudaStream_t stream;

  template <typename T>
  void vectors() const {
    vectors_kernel<T><<<unsigned(plan.blocks), RowsPlan::kThreads, 0, stream>>>(params, plan);
  }

  void elements() const { elements_kernel<<<unsigned(plan.blocks), RowsPlan::kThreads, 0, stream>>>(params); }
};

void shift_rows(const Tensor& out, const Tensor& entry, const Tensor& shift, const Tensor& places,
                const std::optional<Tensor>& turns, bool is_neox) {
  const ShiftParams params = shift_params({out, entry, shift, places, turns, is_neox});
  if (params.tokens * params.heads * params.dim == 0) return;
  const int32_t device = entry.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const RowsPlan plan = cuda::plan_shift(params);
  cuda::choose_shift_kernel(params, plan, Launch{params, plan, cuda::current_stream(device)});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlcache, CUDA, m) { m.impl("shift_rows", TORCH_BOX(&shift_rows)); }

}  // namespace vlcache
