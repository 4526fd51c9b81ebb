// Gradients of positions, inv_freq, cos and sin.
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

// A gradient that was not asked for, or is zero, is undefined.
struct AngleGradients {
  at::Tensor positions = {};
  at::Tensor inv_freq = {};
  at::Tensor cos = {};
  at::Tensor sin = {};
};

// grads are the gradients of the outputs for x, or for q and k; any may be undefined. kept are the
// outputs, or the inputs where the call uses tables.
AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted);

// The same for a call that normalizes, with its tensors. The rotation's input or output is computed
// again.
AngleGradients angle_gradients_of_norm(const Call& call, at::TensorList grads,
                                       const WantedGradients& wanted);

}  // namespace rope
