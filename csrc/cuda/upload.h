// Frequencies of max_wavelength in device memory, for the next launch on a stream.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/frequency_tables.h"

namespace rope::cuda {

struct DeviceFrequencies {
  const void* words;  // num_pairs of 64 bits each, aligned to 256 bytes
  // A kernel before the next one on this stream writes them. That one must then be launched without
  // the programmatic attribute (cuda/start.h), since it reads frequencies before it waits.
  bool is_new;
  c10::DataPtr owner;  // of words that are new: keep it until the kernel is launched
};

// Returns the frequencies of the key, of which values (host memory) are read during the call only,
// for the next launch on the stream, which is the current one of the current device. Legal while
// any stream is being captured; synchronizes nothing.
DeviceFrequencies frequencies_on_device(const FrequencyKey& key, const std::uint64_t* values,
                                        c10::cuda::CUDAStream stream);

// Enqueues stores of 64-bit words to device memory. They travel as kernel parameters: host memory
// that is not pinned would be copied synchronously, and a captured graph would read it again when
// it is replayed.
void upload(const std::uint64_t* values, std::int64_t count, void* to, cudaStream_t stream);

}  // namespace rope::cuda
