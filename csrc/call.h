// One call of a rotation operator, packed: which operator, its tensors and its options.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rope/rope.h"

namespace rope {

// The options of all operators. A call leaves those that its operator does not have at their
// defaults.
struct RotateOptions : ApplyOptions {
  bool full_width = CosSinOptions().full_width;
};

struct CallOptions : RotateOptions {
  double eps = NormOptions().eps;
  double weight_offset = NormOptions().weight_offset;
  std::optional<std::vector<std::int64_t>> norm_axes = NormOptions().norm_axes;
  bool norm_last = NormOptions().norm_last;
};

struct Call {
  at::Tensor q;  // x, where the call has one tensor
  at::Tensor k;  // undefined where the call has one tensor
  bool is_pair = false;
  bool in_place = false;
  bool uses_tables = false;
  bool normalizes = false;  // norm_apply and its siblings
  at::Tensor q_weight;      // weight, where the call has one tensor; undefined: none
  at::Tensor k_weight;
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
Call make_call(const at::Tensor& positions, const NormOptions& options);
Call make_call(const at::Tensor& cos, const at::Tensor& sin, const NormCosSinOptions& options);

// The call, made functional, on other tensors: one, with the weight of q, or two.
Call on(Call call, const at::Tensor& x);
Call on(Call call, const at::Tensor& q, const at::Tensor& k);

// The call for q alone, or for k alone, made functional.
Call on_q(const Call& call);
Call on_k(const Call& call);

// The call in place.
Call in_place(Call call);

// Whether positions have a leading dimension of axes: those of an (A, N) inv_freq.
bool has_axes(const Call& call);

// The sizes of positions, or of tables that they do not index, that broadcast with x without the
// embedding axis.
c10::SymIntArrayRef angle_sizes(const Call& call);

// What a call returns. In place, these are its arguments; the operator itself returns nothing.
struct Outputs {
  at::Tensor q;
  at::Tensor k;
};

// Calls the call's operator through the dispatcher.
Outputs dispatch(const Call& call);

}  // namespace rope
