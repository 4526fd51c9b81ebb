// The argument checks. All backends and Meta call them before anything is allocated or written.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"

namespace rope {

struct NormGradientCall;
struct SumCall;

// Throws the contract's error if an argument is invalid. Sizes may be symbolic.
void check(const Call& call);

// The same for the operators of norm_operators.h and gradient_sums.h.
void check(const NormGradientCall& call);
void check(const SumCall& call);

// Guards memory on the CPU, where values can be read: every row of a table that positions name
// exists.
void check_rows_exist(const Call& call);

// The number of elements of x that the call rotates, 2 N.
c10::SymInt rotary_dim(const Call& call, const at::Tensor& x);

}  // namespace rope
