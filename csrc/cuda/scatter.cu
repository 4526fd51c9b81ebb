// The CUDA kernels that add sums up to gradients of tables: thin wrappers around what a thread does
// (cuda/scatter_kernel.h).
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#include "cuda/scatter_kernel.h"

namespace rope::cuda {

namespace {

template <typename Real>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_kernel(const __grid_constant__ TableSums sums,
                   const __grid_constant__ ScatterPlan plan) {
  __shared__ ScatterShared shared;
  ScatterThread<Real> thread(sums, plan, shared, blockIdx.x, threadIdx.x);
  run_phases<Real>(sums, [&](const auto& phase) {
    phase(thread);
    __syncthreads();
  });
}

template <typename Real>
__global__ void __launch_bounds__(kGroupThreads)
    groups_kernel(const __grid_constant__ TableSums sums) {
  add_groups<Real>(sums, std::int64_t{blockIdx.x} * kGroupThreads + threadIdx.x);
}

template <typename Real>
void launch_scatter(const TableSums& sums, cudaStream_t stream) {
  if (sums.rows == nullptr) {
    groups_kernel<Real>
        <<<static_cast<unsigned>(group_blocks(sums)), kGroupThreads, 0, stream>>>(sums);
  } else {
    const ScatterPlan plan = make_scatter_plan(sums);
    scatter_kernel<Real>
        <<<static_cast<unsigned>(plan.blocks), kScatterThreads, 0, stream>>>(sums, plan);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

void scatter_rows(const TableSums& sums, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (sums.sums_dtype == c10::ScalarType::Double) {
    launch_scatter<double>(sums, stream);
  } else {
    launch_scatter<float>(sums, stream);
  }
}

}  // namespace rope::cuda
