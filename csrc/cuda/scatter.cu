// The CUDA kernels that add sums up to gradients of tables: thin wrappers around what a thread does
// (cuda/scatter_kernel.h).

#include "cuda/kernels.h"
#include "cuda/scatter_kernel.h"
#include "cuda/start.h"

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
void launch_scatter(const TableSums& sums, Queue& queue) {
  if (sums.rows == nullptr) {
    groups_kernel<Real>
        <<<static_cast<unsigned>(group_blocks(sums)), kGroupThreads, 0, queue.stream()>>>(sums);
  } else {
    const ScatterPlan plan = make_scatter_plan(sums);
    scatter_kernel<Real>
        <<<static_cast<unsigned>(plan.blocks), kScatterThreads, 0, queue.stream()>>>(sums, plan);
  }
  queue.check_launch();
}

}  // namespace

Status scatter_rows(const TableSums& sums, const Stream& stream) {
  Queue queue(stream);
  if (sums.sums_dtype == c10::ScalarType::Double) {
    launch_scatter<double>(sums, queue);
  } else {
    launch_scatter<float>(sums, queue);
  }
  return queue.status();
}

}  // namespace rope::cuda
