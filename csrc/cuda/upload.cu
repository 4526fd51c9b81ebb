#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAMacros.h>

#include <algorithm>
#include <array>

#include "cuda/upload.h"

namespace rope::cuda {

namespace {

struct Words {
  static constexpr int kCapacity = 256;
  std::uint64_t values[kCapacity];
};

// Parameters of a kernel may take 4 KiB on every device.
static_assert(sizeof(Words) + 16 <= 4096);

__global__ void store_words(const __grid_constant__ Words words, int count, std::uint64_t* to) {
  const int n = threadIdx.x;
  if (n < count) {
    to[n] = words.values[n];
  }
}

// Makes tables on a stream of its own, so that no captured stream has a part in it. In relaxed mode
// a thread may allocate memory and query events whatever is being captured, by itself or by others:
// neither becomes part of a graph, nor needs to, since a table is complete before a launch reads
// it.
class CudaDevice {
 public:
  struct Upload {
    const void* words;
    cudaEvent_t done;
  };

  Upload start_upload(int device, const std::uint64_t* values, std::int64_t count) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    cudaStream_t& stream = streams_.at(device);
    cudaEvent_t done = nullptr;
    void* words = nullptr;
    const bool has_room =
        (stream != nullptr ||
         cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess) &&
        cudaEventCreateWithFlags(&done, cudaEventDisableTiming) == cudaSuccess &&
        cudaMalloc(&words, count * sizeof(std::uint64_t)) == cudaSuccess;
    if (!has_room) {
      C10_CUDA_CLEAR_ERROR();
      return {nullptr, nullptr};
    }
    upload(values, count, words, stream);
    C10_CUDA_CHECK(cudaEventRecord(done, stream));
    return {words, done};
  }

  bool is_complete(const Upload& upload) const {
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const cudaError_t status = cudaEventQuery(upload.done);
    if (status == cudaErrorNotReady) {
      C10_CUDA_CLEAR_ERROR();
      return false;
    }
    C10_CUDA_CHECK(status);
    return true;
  }

 private:
  std::array<cudaStream_t, C10_COMPILE_TIME_MAX_GPUS> streams_{};
};

}  // namespace

DeviceFrequencies frequencies_on_device(const FrequencyKey& key, const std::uint64_t* values,
                                        c10::cuda::CUDAStream stream) {
  // Never destroyed: other threads and static destructors may still launch kernels at exit, when
  // CUDA may be shut down already. Memory, streams and events go with the process.
  static auto& tables = *new FrequencyTables<CudaDevice>;
  if (const void* words = tables.find(stream.device_index(), key, values)) {
    return {words, false, {}};
  }
  c10::DataPtr buffer =
      c10::cuda::CUDACachingAllocator::get()->allocate(key.num_pairs * sizeof(std::uint64_t));
  upload(values, key.num_pairs, buffer.get(), stream);
  return {buffer.get(), true, std::move(buffer)};
}

void upload(const std::uint64_t* values, std::int64_t count, void* to, cudaStream_t stream) {
  Words words{};
  for (std::int64_t first = 0; first < count; first += Words::kCapacity) {
    const auto length = static_cast<int>(std::min<std::int64_t>(count - first, Words::kCapacity));
    std::copy_n(values + first, length, words.values);
    store_words<<<1, Words::kCapacity, 0, stream>>>(words, length,
                                                    static_cast<std::uint64_t*>(to) + first);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace rope::cuda
