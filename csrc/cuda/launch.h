// Runs launches on a CUDA device: csrc/cuda/rotate.cu, or csrc/cuda/absent.cpp in a build without CUDA.
#pragma once

#include <string>

#include "rotate.h"

namespace rope::cuda {

// Throws where this build has no CUDA kernels. operator_name, without its namespace, is for the message.
void check_available(const std::string& operator_name);

// Enqueues the launch on the current stream of the device.
void launch(const Launch& launch, int device);

}  // namespace rope::cuda
