// What the operators refuse. Every device and Meta call the same checks before anything is
// allocated or written.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"

namespace rope {

struct SumCall;

// Throws where the arguments of the call do not fit. Sizes may be symbolic.
void check(const Call& call);

// Likewise of the operators of gradients.h.
void check(const SumCall& call);

// The rest of the checks where values can be read without waiting for a device: every row of a
// table that positions ask for exists. The kernels rely on it for not reading past the tables.
void check_rows_exist(const Call& call);

// Twice the number of pairs of x that the call rotates.
c10::SymInt rotary_dim(const Call& call, const at::Tensor& x);

}  // namespace rope
