// Launches kernels, with programmatic dependent launch where the device supports it. For .cu files.
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
//
// On compute capability 9.0 and later, a kernel launched with this attribute may start before the
// previous kernel on the stream has ended, as soon as every block of that kernel has exited or
// called launch_dependents(). It runs its prologue and calls wait_for_previous_kernels(), which
// returns when all previous kernels have ended and their writes are visible.
//
// Every thread, whether it has work or not, calls wait_for_previous_kernels() before it accesses
// memory that another kernel may read or write. Only data that was complete before the launch, such
// as tables of frequencies, may be read earlier. This also makes kernels end in order: if one ended
// without waiting, the next could start while the previous one is still running.
//
// launch_dependents() may be called at any time: dependents wait for the end of this kernel, not
// for the call.

__device__ inline void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Both, for blocks that are run by functions of cuda/cooperation.h.
struct StartAndWait {
  C10_HOST_DEVICE void operator()() const {
#ifdef __CUDA_ARCH__
    launch_dependents();
    wait_for_previous_kernels();
#endif
  }
};

// Whether kernels on the device are launched with the attribute: if their code has the instructions
// above and the environment variable ROPE_PDL is not 0. Cached after the first call.
bool uses_dependent_launch(int device);

// Enqueues a kernel on a stream of the current device, with the grid and blocks of the plan. If
// `dependent`, it may start before the previous kernels have ended: see NOTE [ Programmatic
// dependent launch ].
template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Plan& plan, std::size_t shared_bytes,
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
