// How the threads of a block work together where sums need more than barriers between phases. A
// block's work is written once, as a function of a Block that runs phases of its threads: a
// DeviceBlock for the one thread that executes it, or a stand-in of the tests, which has all
// threads.
#pragma once

#include <c10/macros/Macros.h>

#include <type_traits>

namespace rope::cuda {

inline constexpr int kWarpSize = 32;

template <typename Thread>
class DeviceBlock {
 public:
  C10_HOST_DEVICE explicit DeviceBlock(Thread& thread) : thread_(thread) {}

  // Runs a phase: a function of a thread.
  template <typename Phase>
  C10_HOST_DEVICE void run(const Phase& phase) {
    phase(thread_);
  }

  C10_HOST_DEVICE void synchronize() {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }

  // Replaces each number of the array get(thread) by its sum over `lanes` neighboring threads, a
  // power of two, at most kWarpSize. All threads of the block call it.
  template <typename Get>
  C10_HOST_DEVICE void add_across_lanes(int lanes, const Get& get) {
#ifdef __CUDA_ARCH__
    auto& numbers = get(thread_);
    constexpr int kCount = std::extent_v<std::remove_reference_t<decltype(numbers)>>;
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        numbers[i] += __shfl_xor_sync(0xffffffff, numbers[i], distance);
      }
    }
#endif
  }

 private:
  Thread& thread_;
};

}  // namespace rope::cuda
