// Starts kernels, with programmatic dependent launch where the device has it. For .cu files.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "cuda/plan.h"

namespace rope::cuda {

__device__ inline ThreadIndex this_thread() {
  return {static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y),
          static_cast<int>(threadIdx.z), blockIdx.x, blockIdx.y};
}

// NOTE [ Programmatic dependent launch ]
// On compute capability 9.0 and later a kernel that is launched with an attribute may start before
// the kernel in front of it on the stream has ended: as soon as each of its blocks has ended or has
// called let_next_kernel_start(). It then prepares, and calls wait_for_kernels_in_front(), which
// returns when all kernels in front have ended and what they wrote is visible.
//
// Every thread of a kernel calls wait_for_kernels_in_front(), whether it has work or not, before it
// touches memory that another kernel may read or write. Only what was complete before the launch
// may be read earlier, such as tables of frequencies. This also keeps kernels ending in order: if
// one ended without waiting, the one after it could start while the one in front still ran.
//
// let_next_kernel_start() can be called at any time: the next kernel waits for the end of this one,
// not for the call.

__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_kernels_in_front() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether kernels are launched with the attribute on the device: if their code has the instructions
// above, and the environment variable ROPE_PDL is not 0. Cheap after the first call.
bool uses_dependent_launch(int device);

// Enqueues a kernel on a stream of the current device, with the grid and the blocks of the plan. If
// `dependent`, it may start before the kernels in front have ended: see NOTE [ Programmatic
// dependent launch ].
template <typename... Parameters>
void start(void (*kernel)(Parameters...), const Plan& plan, std::size_t shared_bytes,
           c10::cuda::CUDAStream stream, bool dependent,
           const std::type_identity_t<Parameters>&... parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  config.blockDim = dim3(plan.block_x, plan.block_y, plan.block_z);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent && uses_dependent_launch(stream.device_index()) ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, parameters...));
}

}  // namespace rope::cuda
