// The CUDA kernels for gradients of norms of any kind: thin wrappers around the blocks of
// cuda/wide_norm.h.
#include "cuda/cooperation.h"
#include "cuda/dispatch.h"
#include "cuda/norm_gradient_kernel.h"
#include "cuda/norm_launch.h"
#include "cuda/start.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxWideThreads<typename Thread::IndexType>, 1)
    wide_norm_gradient_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Thread thread(params, this_thread());
  DeviceBlock<Thread> block(thread);
  normalize_wide_block(block, params, reinterpret_cast<typename Thread::Real*>(memory),
                       StartAndWait());
}

// Threads add to their parts.
void clear(const Launch& launch, const NormGradientPlan& plan, const WeightSums& sums,
           Queue& queue) {
  const std::size_t size = launch.dtype == c10::ScalarType::Double ? 8 : 4;
  for (int i = 0; i < launch.num_operands; ++i) {
    if (sums.of_operand[i] != nullptr) {
      const std::size_t numel = plan.num_parts * launch.operands[i].norm.weight_numel;
      queue.check(cudaMemsetAsync(sums.of_operand[i], 0, numel * size, queue.stream()));
    }
  }
}

}  // namespace

void launch_wide_norm_gradient(const Launch& launch, const NormGradientPlan& plan,
                               const DeviceFrequencies& frequencies, const WeightSums& sums,
                               Queue& queue) {
  clear(launch, plan, sums, queue);
  dispatch_wide_norm_thread<WideNormGradientThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_kernel(wide_norm_gradient_kernel<Thread>, plan, shared_bytes<Thread>(plan), queue,
                  /*dependent=*/false,
                  wide_norm_gradient_params<typename Thread::IndexType>(launch, plan,
                                                                        frequencies.values, sums));
  });
}

}  // namespace rope::cuda
