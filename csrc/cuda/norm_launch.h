// The launches of the kernels for norms of any kind, which have source files of their own:
// wide_norm.cu and wide_norm_gradient.cu.
#pragma once

#include "cuda/norm_plan.h"
#include "cuda/start.h"
#include "cuda/upload.h"
#include "launch.h"

namespace rope::cuda {

void launch_wide_norm(const Launch& launch, const NormPlan& plan,
                      const DeviceFrequencies& frequencies, Queue& queue);

void launch_wide_norm_gradient(const Launch& launch, const NormGradientPlan& plan,
                               const DeviceFrequencies& frequencies, const WeightSums& sums,
                               Queue& queue);

}  // namespace rope::cuda
