// The CUDA kernels for norms of any kind: thin wrappers around the blocks of cuda/wide_norm.h.
#include "cuda/cooperation.h"
#include "cuda/dispatch.h"
#include "cuda/norm_kernel.h"
#include "cuda/norm_launch.h"
#include "cuda/start.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxWideThreads<typename Thread::IndexType>, 1)
    wide_norm_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Thread thread(params, this_thread());
  DeviceBlock<Thread> block(thread);
  normalize_wide_block(block, params, reinterpret_cast<typename Thread::Real*>(memory),
                       StartAndWait());
}

}  // namespace

void launch_wide_norm(const Launch& launch, const NormPlan& plan,
                      const DeviceFrequencies& frequencies, Queue& queue) {
  dispatch_wide_norm_thread<WideNormThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_kernel(wide_norm_kernel<Thread>, plan, shared_bytes<Thread>(plan), queue,
                  /*dependent=*/!frequencies.is_new,
                  wide_norm_params<typename Thread::IndexType>(launch, plan, frequencies.values));
  });
}

}  // namespace rope::cuda
