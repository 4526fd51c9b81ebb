// Runs launches on a CUDA device: csrc/cuda/rotate.cu, or csrc/cuda/absent.cpp in a build without
// CUDA.
#pragma once

#include "rope/rope.h"
#include "rotate.h"

namespace rope::cuda {

// Whether this build has the CUDA kernels.
ROPE_API bool has_kernels();

// Enqueues the launch on the current stream of the device.
void launch(const Launch& launch, int device);

}  // namespace rope::cuda
