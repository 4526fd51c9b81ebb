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
bool code_can_wait() {
  // The query may load the module. During a capture that is legal in this mode only.
  const RelaxedCapture relaxed;
  // The first driver that can capture such launches into graphs.
  constexpr int kFirstDriver = 12030;
  cudaFuncAttributes attributes{};
  int driver = 0;
  if (cudaFuncGetAttributes(&attributes, representative) != cudaSuccess ||
      cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();
    return false;  // The launch that follows reports what is wrong.
  }
  return attributes.ptxVersion >= 90 && driver >= kFirstDriver;
}

}  // namespace

bool uses_dependent_launch(int device) {
  static const bool is_allowed = [] {
    const char* variable = std::getenv("ROPE_PDL");
    return variable == nullptr || std::string_view(variable) != "0";
  }();
  enum class Answer { kUnknown, kNo, kYes };
  static std::array<std::atomic<Answer>, kMaxDevices> answers{};
  if (!is_allowed) {
    return false;
  }
  std::atomic<Answer>& answer = answers.at(device);
  if (answer.load(std::memory_order_relaxed) == Answer::kUnknown) {
    answer.store(code_can_wait() ? Answer::kYes : Answer::kNo, std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) == Answer::kYes;
}

}  // namespace rope::cuda
