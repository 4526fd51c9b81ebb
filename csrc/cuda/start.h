// Launches kernels, with programmatic dependent launch where the device supports it. For .cu files.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

#include "cuda/kernels.h"
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

// A stream, and the first error of what is enqueued on it.
class Queue {
 public:
  explicit Queue(const Stream& stream) : stream_(stream) {}

  int device() const { return stream_.device; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_.handle); }
  void* allocate(std::int64_t bytes) const { return stream_.allocate(bytes); }

  void check(cudaError_t status) {
    if (status_ == cudaSuccess && status != cudaSuccess) {
      status_ = status;
      cudaGetLastError();  // The caller reports it, and no later call.
    }
  }
  // After kernel<<<>>>.
  void check_launch() { check(cudaGetLastError()); }
  Status status() const { return status_; }

 private:
  const Stream& stream_;
  cudaError_t status_ = cudaSuccess;
};

// Lets the thread allocate and query in any capture, of its own and others.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline constexpr int kMaxDevices = 128;  // c10::DeviceIndex has 8 bits.

// Whether kernels on the device, the current one, are launched with the attribute: if their code
// has the instructions above and the environment variable ROPE_PDL is not 0. Cached after the first
// call.
bool uses_dependent_launch(int device);

// Enqueues a kernel with the grid and blocks of the plan. If
// `dependent`, it may start before the previous kernels have ended: see NOTE [ Programmatic
// dependent launch ].
template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Plan& plan, std::size_t shared_bytes,
                   Queue& queue, bool dependent,
                   const std::type_identity_t<Parameters>&... parameters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid_x), static_cast<unsigned>(plan.grid_y));
  config.blockDim = dim3(plan.block_x, plan.block_y, plan.block_z);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = queue.stream();
  config.attrs = &attribute;
  config.numAttrs = dependent && uses_dependent_launch(queue.device()) ? 1 : 0;
  queue.check(cudaLaunchKernelEx(&config, kernel, parameters...));
}

}  // namespace rope::cuda
