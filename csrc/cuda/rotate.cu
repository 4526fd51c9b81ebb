// The CUDA kernels that rotate: thin wrappers around the phases of a thread (cuda/rotate_kernel.h).

#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/rotate_kernel.h"
#include "cuda/start.h"
#include "cuda/upload.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxThreads, Thread::kBlocksPerSm)
    rotate_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const shared = reinterpret_cast<typename Thread::Real*>(memory);
  Thread thread(params, this_thread());
  thread.read_frequencies();
  launch_dependents();
  wait_for_previous_kernels();
  thread.find_rotations(shared);
  __syncthreads();
  thread.rotate_rows(shared);
}

template <typename Thread>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerSm)
    rotate_few_rows_kernel(const __grid_constant__ typename Thread::Params params) {
  Thread thread(params, this_thread());
  thread.read_frequencies();
  launch_dependents();
  wait_for_previous_kernels();
  thread.rotate_rows();
}

}  // namespace

bool are_compiled() { return true; }

const char* describe(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status rotate(const Launch& launch, const Stream& stream) {
  Queue queue(stream);
  const Plan plan = make_rotate_plan(launch);
  if (plan.grid_x == 0) {
    return queue.status();
  }
  const DeviceFrequencies frequencies = frequencies_of(launch, queue);
  const auto launch_rotation = [&](auto kernel, std::size_t shared_bytes, auto index) {
    launch_kernel(kernel, plan, shared_bytes, queue,
                  /*dependent=*/!frequencies.is_new,
                  rotate_params<decltype(index)>(launch, plan, frequencies.values));
  };
  if (plan.has_few_rows) {
    dispatch_few_rows_thread(launch, [&](auto type) {
      using Thread = typename decltype(type)::type;
      launch_rotation(rotate_few_rows_kernel<Thread>, 0, std::int32_t{});
    });
    return queue.status();
  }
  dispatch_thread<RotateThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    launch_rotation(rotate_kernel<Thread>, shared_bytes<Thread>(plan),
                    typename Thread::IndexType{});
  });
  return queue.status();
}

}  // namespace rope::cuda
