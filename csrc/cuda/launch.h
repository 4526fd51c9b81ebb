// Runs launches on a CUDA device: csrc/cuda/rotate.cu and sum.cu, or csrc/cuda/absent.cpp in a
// build without CUDA.
#pragma once

#include <cstdint>

#include "rope/rope.h"
#include "rotate.h"

namespace rope::cuda {

// Whether this build has the CUDA kernels.
ROPE_API bool has_kernels();

// Enqueues the launch on the current stream of the device.
void launch(const Launch& launch, int device);

// Likewise sums over the rows of the launch, of which each of sum_groups has tables of its own.
void sum(const Launch& launch, const Sums& sums, int device);
std::int64_t sum_groups(const Launch& launch);

}  // namespace rope::cuda
