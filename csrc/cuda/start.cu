#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "cuda/start.h"

namespace rope::cuda {

namespace {

// Compiled for the same architectures as all other kernels.
__global__ void representative() {}

// The compute capability of the device is not enough: code that the driver compiles from PTX of an
// older architecture has no griddepcontrol.wait, and must not start early.
bool code_can_wait(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  // The query may load the module. During a capture that is legal in this mode only.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  cudaFuncAttributes attributes{};
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, representative));
  // The first driver that can capture such launches into graphs.
  constexpr int kFirstDriver = 12030;
  int driver = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return attributes.ptxVersion >= 90 && driver >= kFirstDriver;
}

}  // namespace

bool uses_dependent_launch(int device) {
  static const bool is_allowed = [] {
    const char* variable = std::getenv("ROPE_PDL");
    return variable == nullptr || std::string_view(variable) != "0";
  }();
  enum class Answer { kUnknown, kNo, kYes };
  static std::array<std::atomic<Answer>, C10_COMPILE_TIME_MAX_GPUS> answers{};
  if (!is_allowed) {
    return false;
  }
  std::atomic<Answer>& answer = answers.at(device);
  if (answer.load(std::memory_order_relaxed) == Answer::kUnknown) {
    answer.store(code_can_wait(device) ? Answer::kYes : Answer::kNo, std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) == Answer::kYes;
}

}  // namespace rope::cuda
