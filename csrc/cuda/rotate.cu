// The CUDA kernels that rotate: shells around the phases of a thread (cuda/rotate_kernel.h).
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/rotate_kernel.h"
#include "cuda/start.h"
#include "cuda/turns.h"
#include "cuda/upload.h"

namespace rope::cuda {

namespace {

template <typename Thread>
__global__ void __launch_bounds__(kMaxThreads, Thread::kBlocksPerProcessor)
    rotate_kernel(const __grid_constant__ typename Thread::Params params) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* const shared = reinterpret_cast<typename Thread::Real*>(memory);
  Thread thread(params, this_thread());
  thread.read_frequencies();
  let_next_kernel_start();
  wait_for_kernels_in_front();
  thread.find_rotations(shared);
  __syncthreads();
  thread.rotate_rows(shared);
}

template <typename Thread>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocksPerProcessor)
    rotate_few_rows_kernel(const __grid_constant__ typename Thread::Params params) {
  Thread thread(params, this_thread());
  thread.read_frequencies();
  let_next_kernel_start();
  wait_for_kernels_in_front();
  thread.rotate_rows();
}

// The frequencies of max_wavelength, for launches that have them.
DeviceFrequencies find_frequencies(const Launch& launch, c10::cuda::CUDAStream stream) {
  const PositionAngles& source = launch.position_angles;
  if (launch.uses_tables || source.wavelength_frequencies == nullptr || launch.num_pairs == 0) {
    return {};
  }
  const bool in_turns = has_turns(launch);
  const FrequencyKey key{source.max_wavelength, in_turns ? source.scale_factor : 1.0,
                         launch.num_pairs, in_turns};
  const auto* radians = reinterpret_cast<const std::uint64_t*>(source.wavelength_frequencies);
  return frequencies_on_device(key, in_turns ? turns_of_wavelength(launch) : radians, stream);
}

}  // namespace

bool has_kernels() { return true; }

void rotate(const Launch& launch, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Plan plan = make_rotate_plan(launch);
  if (plan.grid_x == 0) {
    return;
  }
  const DeviceFrequencies frequencies = find_frequencies(launch, stream);
  const auto start_kernel = [&](auto kernel, std::size_t shared_bytes, auto index) {
    start(kernel, plan, shared_bytes, stream,
          /*dependent=*/!frequencies.is_new,
          rotate_params<decltype(index)>(launch, plan, frequencies.words));
  };
  if (plan.has_few_rows) {
    return with_few_rows_thread(launch, [&](auto type) {
      using Thread = typename decltype(type)::type;
      start_kernel(rotate_few_rows_kernel<Thread>, 0, std::int32_t{});
    });
  }
  with_thread<RotateThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    start_kernel(rotate_kernel<Thread>, shared_bytes<Thread>(plan), typename Thread::IndexType{});
  });
}

}  // namespace rope::cuda
