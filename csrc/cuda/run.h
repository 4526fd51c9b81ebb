// Runs launches on the current stream of a CUDA device: the functions of cuda/kernels.h for torch.
// They throw c10::AcceleratorError where CUDA reports an error.
#pragma once

#include "cuda/kernels.h"
#include "launch.h"
#include "rope/rope.h"

namespace rope::cuda {

// Whether this build has the CUDA kernels.
ROPE_API bool has_kernels();

void rotate(const Launch& launch, int device);
void normalize(const Launch& launch, int device);
void normalize_gradient(const Launch& launch, int device, MakeWeightSums make_weight_sums);
void sum(const Launch& launch, int device, MakeSums make_sums);
void scatter_rows(const TableSums& sums, int device);

}  // namespace rope::cuda
