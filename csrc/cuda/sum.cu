// The CUDA kernels that sum for gradients: a thin wrapper around the phases of a thread
// (cuda/sum_kernel.h).

#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/start.h"
#include "cuda/sum_kernel.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxThreads, 2)
    sum_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const shared = reinterpret_cast<typename Thread::Real*>(memory);
  Thread thread(params, this_thread());
  launch_dependents();
  wait_for_previous_kernels();
  thread.sum_rows(shared);
  __syncthreads();
  thread.store_sums(shared);
}

}  // namespace

Status sum(const Launch& launch, const Stream& stream, MakeSums make_sums) {
  Queue queue(stream);
  const Plan plan = make_sum_plan(launch);
  const Sums sums = make_sums(plan.grid_y);
  dispatch_thread<SumThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_kernel(sum_kernel<Thread>, plan, shared_bytes<Thread>(plan), queue,
                  /*dependent=*/true, sum_params<typename Thread::IndexType>(launch, plan, sums));
  });
  return queue.status();
}

}  // namespace rope::cuda
