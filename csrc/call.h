// One call of a rotation operator, packed: which operator, its tensors and its options.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "rope/rope.h"

namespace rope {

// The options of all operators. A call leaves those that its operator does not have at their
// defaults.
struct CallOptions : ApplyOptions {
  bool full_width = CosSinOptions().full_width;
};

struct Call {
  at::Tensor q;  // x, where the call has one tensor
  at::Tensor k;  // undefined where the call has one tensor
  bool is_pair = false;
  bool in_place = false;
  bool uses_tables = false;
  at::Tensor positions;  // undefined where tables broadcast with x themselves
  at::Tensor cos;        // cos and sin are undefined where angles come from positions
  at::Tensor sin;
  CallOptions options;

  // The operator's name without its namespace.
  std::string name() const;
};

// A call without the tensors to rotate.
Call make_call(const at::Tensor& positions, const ApplyOptions& options);
Call make_call(const at::Tensor& cos, const at::Tensor& sin, const CosSinOptions& options);

// The call, made functional, on other tensors: one or two.
Call on(Call call, const at::Tensor& x);
Call on(Call call, const at::Tensor& q, const at::Tensor& k);

// The call in place.
Call in_place(Call call);

// What a call returns. In place, these are its arguments; the operator itself returns nothing.
struct Outputs {
  at::Tensor q;
  at::Tensor k;
};

// Calls the call's operator through the dispatcher.
Outputs dispatch(const Call& call);

}  // namespace rope
