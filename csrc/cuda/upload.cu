#include <algorithm>
#include <array>

#include "cuda/turns.h"
#include "cuda/upload.h"

namespace rope::cuda {

namespace {

struct Values {
  static constexpr int kCapacity = 256;
  std::uint64_t array[kCapacity];
};

// Every device accepts 4 KiB of kernel parameters.
static_assert(sizeof(Values) + 16 <= 4096);

__global__ void store_values(const __grid_constant__ Values values, int count, std::uint64_t* to) {
  const int n = threadIdx.x;
  if (n < count) {
    to[n] = values.array[n];
  }
}

// Fills tables on a stream of its own, so that no capture is affected. In relaxed mode a thread may
// allocate memory and query events during any capture. Neither becomes part of a graph, and need
// not: a table is complete before a launch reads it.
class CudaDevice {
 public:
  struct Upload {
    const void* values;
    cudaEvent_t done;
  };

  // The current device.
  Upload start_upload(int device, const std::uint64_t* values, std::int64_t count) {
    const RelaxedCapture relaxed;
    cudaStream_t& stream = streams_.at(device);
    cudaEvent_t done = nullptr;
    void* to = nullptr;
    const bool has_room =
        (stream != nullptr ||
         cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess) &&
        cudaEventCreateWithFlags(&done, cudaEventDisableTiming) == cudaSuccess &&
        cudaMalloc(&to, count * sizeof(std::uint64_t)) == cudaSuccess;
    if (has_room) {
      upload(values, count, to, stream);
      if (cudaGetLastError() == cudaSuccess && cudaEventRecord(done, stream) == cudaSuccess) {
        return {to, done};
      }
    }
    cudaGetLastError();
    return {nullptr, nullptr};
  }

  bool is_complete(const Upload& upload) const {
    const RelaxedCapture relaxed;
    if (cudaEventQuery(upload.done) != cudaSuccess) {
      cudaGetLastError();  // Most likely cudaErrorNotReady. The launch reports any other.
      return false;
    }
    return true;
  }

 private:
  std::array<cudaStream_t, kMaxDevices> streams_{};
};

}  // namespace

DeviceFrequencies frequencies_on_device(const FrequencyKey& key,
                                        c10::function_ref<const std::uint64_t*()> make_values,
                                        Queue& queue) {
  // Never destroyed: at exit, other threads and static destructors may still launch kernels, and
  // CUDA may already be shut down. Memory, streams and events end with the process.
  static auto& tables = *new FrequencyTables<CudaDevice>;
  if (const void* values = tables.find(queue.device(), key, make_values)) {
    return {values, false};
  }
  const auto bytes = key.num_pairs * static_cast<std::int64_t>(sizeof(std::uint64_t));
  void* buffer = queue.allocate(bytes);
  upload(make_values(), key.num_pairs, buffer, queue.stream());
  queue.check_launch();
  return {buffer, true};
}

DeviceFrequencies frequencies_of(const Launch& launch, Queue& queue) {
  const PositionAngles& source = launch.position_angles;
  if (launch.uses_tables || source.wavelength_frequencies == nullptr || launch.num_pairs == 0) {
    return {};
  }
  const bool in_turns = uses_turns(launch);
  const FrequencyKey key{source.max_wavelength, in_turns ? source.scale_factor : 1.0,
                         launch.num_pairs, in_turns};
  return frequencies_on_device(
      key,
      [&] {
        return in_turns ? frequencies_in_turns(launch)
                        : reinterpret_cast<const std::uint64_t*>(source.wavelength_frequencies);
      },
      queue);
}

void upload(const std::uint64_t* values, std::int64_t count, void* to, cudaStream_t stream) {
  Values part{};
  for (std::int64_t first = 0; first < count; first += Values::kCapacity) {
    const auto length = static_cast<int>(std::min<std::int64_t>(count - first, Values::kCapacity));
    std::copy_n(values + first, length, part.array);
    store_values<<<1, Values::kCapacity, 0, stream>>>(part, length,
                                                      static_cast<std::uint64_t*>(to) + first);
  }
}

}  // namespace rope::cuda
