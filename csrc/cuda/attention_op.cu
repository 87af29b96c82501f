// sparse_query_attention of CUDA tensors.
#include "attention_op.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "attention.cuh"
#include "launch.h"

namespace vlcache {
namespace {

using cuda::AttentionPlan;

constexpr int kMaxThreads = AttentionPlan::kMaxRows / AttentionPlan::kRowsPerWarp * 32;
constexpr int kCombineThreads = 256;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1)
    attend_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ AttentionPlan plan,
                  float* workspace) {
  cuda::attend<T, kWidth>(params, plan, workspace);
}

__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ AttentionPlan plan,
                   const float* workspace) {
  cuda::combine(params, plan, workspace);
}

struct Launch {
  const AttentionParams& params;
  const AttentionPlan& plan;
  float* workspace;
  cudaStream_t stream;

  template <typename T, int kWidth>
  void attend() const {
    const auto kernel = attend_kernel<T, kWidth>;
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_nbytes)));
    const dim3 grid(unsigned(plan.tiles), unsigned(params.pages.heads), unsigned(plan.splits));
    kernel<<<grid, unsigned(plan.threads()), plan.shared_nbytes, stream>>>(params, plan, workspace);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void combine() const {
    const int64_t elements = params.queries * params.query_heads * params.pages.dim;
    combine_kernel<<<unsigned((elements + kCombineThreads - 1) / kCombineThreads), kCombineThreads, 0, stream>>>(
        params, plan, workspace);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

void sparse_query_attention(const Tensor& out, const Tensor& query, const Tensor& cache, const Tensor& block_table,
                            const Tensor& request, const Tensor& position, const std::optional<Tensor>& scales,
                            int64_t block_size, const std::vector<int64_t>& layout, const std::optional<Tensor>& order,
                            double softmax_scale, int64_t window, double soft_cap) {
  const AttentionParams params =
      attention_params({out, query, cache, block_table, request, position, scales, block_size, layout, order,
                        softmax_scale, window, soft_cap});
  require(params.pages.dim <= AttentionPlan::kMaxDim, "query: expected at most ", AttentionPlan::kMaxDim,
          " dimensions on CUDA, found ", params.pages.dim);
  require(params.pages.heads <= 65535, "cache: expected at most 65535 heads on CUDA, found ", params.pages.heads);
  if (params.queries == 0) return;
  const int32_t device = query.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const AttentionPlan plan =
      cuda::plan_attention(params, device_attribute(cudaDevAttrMultiProcessorCount, device),
                           size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  const Tensor workspace =
      torch::stable::new_empty(query, {cuda::workspace_floats(params, plan)}, ScalarType::Float);
  cuda::choose_attention_kernels(plan, Launch{params, plan, static_cast<float*>(workspace.mutable_data_ptr()),
                                              cuda::current_stream(device)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vlcache, CUDA, m) { m.impl("sparse_query_attention", TORCH_BOX(&sparse_query_attention)); }

}  // namespace vlcache
