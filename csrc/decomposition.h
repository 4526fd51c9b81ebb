// The operators decomposed into ATen operators: differentiable in every way that ATen is, and open
// to fusion by a compiler.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"
#include "rotation.h"

namespace rope {

// The decomposition. The call is functional.
Outputs rotate_decomposed(const Call& call);

// Rotates in place by the functional operator and copy_, for derivatives that need the input or the
// output after the call.
Outputs rotate_and_copy(const Call& call);

// The two steps of rotate_and_copy. The first writes nothing; the second copies what it returned.
Outputs rotate_copies(const Call& call);
Outputs copy_back(const Call& call, const Outputs& outputs);

// Radians per unit of position, (N) or (A, N): inv_freq, or those of max_wavelength in float64, not
// yet divided by scale_factor.
at::Tensor frequencies(const Call& call);

// Where the pairs of x are along its dimensions.
struct SliceOptions {
  std::int64_t embedding_axis = -1;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
};

// The two elements of each pair of x, as views of shape (..., N): the embedding axis comes last.
Pair<at::Tensor> pairs(const SliceOptions& options, const c10::SymInt& rotary_dim,
                       const at::Tensor& x);

// The slice (..., 2 N) with these pairs.
at::Tensor slice_of(const Pair<at::Tensor>& pairs, bool interleaved);

}  // namespace rope
