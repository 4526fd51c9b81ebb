// Gradients of what makes the angles: positions, inv_freq, cos and sin.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"

namespace rope {

struct WantedGradients {
  bool positions;
  bool inv_freq;
  bool cos;
  bool sin;
};

// Undefined where a gradient was not asked for, or is zero.
struct AngleGradients {
  at::Tensor positions;
  at::Tensor inv_freq;
  at::Tensor cos;
  at::Tensor sin;
};

// Of one tensor or of q and k: the gradient of each output, which may be undefined, and what was
// kept of the forward pass: the output, or the input where the call uses tables.
AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted);

}  // namespace rope
