// Puts frequencies of max_wavelength into device memory.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

#include "cuda/frequency_tables.h"
#include "cuda/start.h"
#include "launch.h"

namespace rope::cuda {

struct DeviceFrequencies {
  const void* values;  // num_pairs of 64 bits each, aligned to 256 bytes
  // The previous kernel on the stream writes them. The next one must then be launched without the
  // programmatic attribute (cuda/start.h): it reads frequencies before it waits.
  bool is_new;
};

// Returns the frequencies of the key for the next launch on the stream. Calls make_values, which
// returns them in host memory, only if they have to be uploaded. Legal while any stream is being
// captured; never synchronizes.
DeviceFrequencies frequencies_on_device(const FrequencyKey& key,
                                        c10::function_ref<const std::uint64_t*()> make_values,
                                        Queue& queue);

// Likewise those of max_wavelength for a launch, if it needs them.
DeviceFrequencies frequencies_of(const Launch& launch, Queue& queue);

// Enqueues stores of 64-bit values to device memory; cudaGetLastError() returns any error. They are
// passed as kernel parameters: a copy from pageable host memory synchronizes, and a captured graph
// reads the host memory again at every replay.
void upload(const std::uint64_t* values, std::int64_t count, void* to, cudaStream_t stream);

}  // namespace rope::cuda
