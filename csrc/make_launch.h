// From a checked call to the launches that carry it out.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cstdint>

#include "call.h"
#include "launch.h"
#include "norm_operators.h"

namespace rope {

// For each dimension of x whether it is among the norm_axes of the call; none where it names none.
c10::SmallVector<bool, 8> norm_axes(const Call& call, const at::Tensor& x);

// Whether the angles differ along a dimension of x without its embedding axis, counted from the
// right. Along one that they broadcast or are expanded over they are the same.
bool angles_differ(const Call& call, std::int64_t from_right);

// Calls launch for each launch that the call needs: one, or two for a pair whose tensors differ in
// dtype. Tensors with more than kMaxDims dimensions that do not coalesce are copied first. The
// pointers of a launch are valid during the call of launch.
void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch);

// The same for the gradients of norms, into outputs. launch also gets the gradients of the weights
// of the launch's operands, which it has to fill where they are defined.
using NormGradientLaunch =
    c10::function_ref<void(const Launch&, const std::array<at::Tensor, 2>& weight_grads)>;
void for_each_launch(const NormGradientCall& call, const NormGradients& outputs,
                     NormGradientLaunch launch);

}  // namespace rope
