// Gradients of what makes the angles: positions, inv_freq, cos and sin.
//
// The heavy part is common to all: sums over the rows (heads, say) that share an angle, for each
// token and pair. Two private operators form them and what is made of them, _angle_gradient and
// _cos_sin_gradient: on CUDA in at most three kernels, elsewhere in ATen operators.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>

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
  at::Tensor positions = {};
  at::Tensor inv_freq = {};
  at::Tensor cos = {};
  at::Tensor sin = {};
};

// Of one tensor or of q and k: the gradient of each output, which may be undefined, and what was
// kept of the forward pass: the output, or the input where the call uses tables.
AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted);

// What is made of sums; by default nothing.
struct Finish {
  // Of those of an angle: (sums * factors).sum(dim), where dim counts from the end. Undefined:
  // none.
  at::Tensor factors = {};
  at::DimVector dim = {};
  // Of those of tables: each token's are added to the row that it names of num_rows.
  at::Tensor rows = {};
  std::optional<c10::SymInt> num_rows = {};
  // By default that in which the sums are.
  std::optional<at::ScalarType> dtype = {};
};

// One call of either operator, on one tensor or on two of the same dtype, such as q and k, whose
// sums are added. With g the gradient of what came out of a rotation of x, they are
//   cos: sum(g.a * x.a + g.b * x.b)    sin: sum(g.b * x.a - g.a * x.b)
// over the pairs (a, b) that share an angle, in the type in which x is computed with. They are the
// gradients of cos t and sin t; where x is what came out, the sine's is that of the angle t. With
// full_width they are the gradients of full-width tables:
//   cos: sum(g.a * x.a), sum(g.b * x.b)    sin: sum(-g.a * x.b), sum(g.b * x.a)
struct SumCall {
  const char* operator_name = "";
  const char* xs_name = "";
  at::TensorList grads;
  at::TensorList xs;
  // Of a sum: (tokens..., N), or (tokens..., 2 N) with full_width, where tokens broadcast with each
  // x as tables do.
  c10::SymIntArrayRef sizes;
  ApplyOptions options;      // embedding_axis, rotary_offset, interleaved, conjugate
  bool uses_tables = false;  // else only sin is wanted, of the angle
  bool wants_cos = false;
  bool wants_sin = true;
  bool full_width = false;
  Finish finish = {};
};

}  // namespace rope
