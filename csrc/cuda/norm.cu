// The CUDA kernels that normalize and rotate: thin wrappers around the blocks of
// cuda/norm_kernel.h.

#include "cuda/cooperation.h"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/norm_kernel.h"
#include "cuda/norm_launch.h"
#include "cuda/start.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxThreads, Thread::kBlocksPerSm)
    norm_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Thread thread(params, this_thread());
  DeviceBlock<Thread> block(thread);
  normalize_block(block, params, reinterpret_cast<typename Thread::Real*>(memory), StartAndWait());
}

}  // namespace

Status normalize(const Launch& launch, const Stream& stream) {
  Queue queue(stream);
  const NormPlan plan = make_norm_plan(launch);
  if (plan.grid_x == 0) {
    return queue.status();
  }
  const DeviceFrequencies frequencies = frequencies_of(launch, queue);
  if (plan.is_wide) {
    launch_wide_norm(launch, plan, frequencies, queue);
    return queue.status();
  }
  dispatch_norm_thread<NormThread>(launch, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_kernel(norm_kernel<Thread>, plan, shared_bytes<Thread>(plan), queue,
                  /*dependent=*/!frequencies.is_new,
                  norm_rotate_params(launch, plan, frequencies.values));
  });
  return queue.status();
}

}  // namespace rope::cuda
