// The CUDA kernels for the gradients of norms: thin wrappers around the blocks of
// cuda/norm_gradient_kernel.h.

#include "cuda/cooperation.h"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/norm_gradient_kernel.h"
#include "cuda/norm_launch.h"
#include "cuda/start.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kNormGradientThreads, Thread::kBlocksPerSm)
    norm_gradient_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Thread thread(params, this_thread());
  DeviceBlock<Thread> block(thread);
  differentiate_norm_block(block, blockIdx.y == 0, params,
                           reinterpret_cast<typename Thread::Real*>(memory), StartAndWait());
}

}  // namespace

Status normalize_gradient(const Launch& launch, const Stream& stream,
                          MakeWeightSums make_weight_sums) {
  Queue queue(stream);
  const NormGradientPlan plan = make_norm_gradient_plan(launch);
  const DeviceFrequencies frequencies = frequencies_of(launch, queue);
  const WeightSums sums = make_weight_sums(plan.num_parts);
  if (plan.is_wide) {
    launch_wide_norm_gradient(launch, plan, frequencies, sums, queue);
    return queue.status();
  }
  dispatch_norm_thread<NormGradientThread>(launch, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_kernel(norm_gradient_kernel<Thread>, plan, shared_bytes<Thread>(plan), queue,
                  /*dependent=*/!frequencies.is_new,
                  usual_norm_gradient_params(launch, plan, frequencies.values, sums));
  });
  return queue.status();
}

}  // namespace rope::cuda
