// The CUDA kernel: a thin shell around what a thread does (cuda/rotate_thread.h).
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/rotate_thread.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    rotate_kernel(const __grid_constant__ Launch launch, const __grid_constant__ Work work,
                  const __grid_constant__ Frequencies frequencies) {
  Thread(launch, work, frequencies).run(blockIdx.x, threadIdx.x);
}

// Parameters of a kernel may take 4 KiB on every device.
static_assert(sizeof(Launch) + sizeof(Work) + sizeof(Frequencies) <= 4096);

}  // namespace

bool has_kernels() { return true; }

void launch(const Launch& launch, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for_each_plan(launch, [&](const RotatePlan& plan) {
    with_thread<RotateThread>(launch, plan, [&](auto thread) {
      using Thread = typename decltype(thread)::type;
      rotate_kernel<Thread><<<static_cast<unsigned>(plan.blocks), plan.work.threads, 0, stream>>>(
          launch, plan.work, plan.frequencies);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace rope::cuda
