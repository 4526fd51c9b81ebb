// The operators in ATen operators: plain, differentiable in every way that ATen is, and open to
// fusion by a compiler.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"
#include "rotation.h"

namespace rope {

// Rotates without a kernel of ours. The call is not in place.
Outputs rotate_decomposed(const Call& call);

// Rotates in place by the functional operator and a copy: for derivatives that read the input or
// the output, which must both outlive the change.
Outputs rotate_and_copy(const Call& call);

// The two steps of that: the first writes nothing, the second what the first returned.
Outputs rotate_copies(const Call& call);
Outputs copy_back(const Call& call, const Outputs& outputs);

// Radians per unit of position, (N) or (A, N): inv_freq, or what max_wavelength and scale_factor
// stand for, in float64.
at::Tensor frequencies(const Call& call);

// Where the pairs of x are.
struct SliceOptions {
  std::int64_t embedding_axis = -1;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
};

// The two elements of each pair of x, as views of shape (..., N): the embedding axis comes last.
Pair<at::Tensor> pairs(const SliceOptions& options, const c10::SymInt& rotary_dim,
                       const at::Tensor& x);

// The slice (..., 2 N) that has these for its pairs.
at::Tensor slice_of(const Pair<at::Tensor>& pairs, bool interleaved);

}  // namespace rope
