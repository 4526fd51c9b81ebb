// The CUDA kernel of gradients: a thin shell around what a thread does (cuda/sum_thread.h).
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/sum_thread.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    sum_kernel(const __grid_constant__ Launch launch, const __grid_constant__ Work work,
               const __grid_constant__ Sums sums) {
  Thread(launch, work, sums).run(blockIdx.x, threadIdx.x);
}

}  // namespace

std::int64_t sum_groups(const Launch& launch) { return make_sum_plan(launch).work.row_groups; }

void sum(const Launch& launch, const Sums& sums, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Plan plan = make_sum_plan(launch);
  with_thread<SumThread>(launch, plan, [&](auto thread) {
    using Thread = typename decltype(thread)::type;
    sum_kernel<Thread><<<static_cast<unsigned>(plan.blocks), plan.work.threads, 0, stream>>>(
        launch, plan.work, sums);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace rope::cuda
