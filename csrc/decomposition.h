// The operators decomposed into ATen operators: differentiable in every way that ATen is, and open
// to fusion by a compiler.
#pragma once

#include <ATen/core/DimVector.h>
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

// The rotation of a call that also normalizes, on one tensor.
Call rotation_of(const Call& call, const at::Tensor& x);

// The norm of a call that also rotates, on one tensor: one that rotates no elements.
Call norm_of(const Call& call, const at::Tensor& x);

// The RMSNorm of a call on one tensor, in its steps. They take tensors of the opmath type.
class Norm {
 public:
  explicit Norm(const Call& call);

  // 1 / sqrt(mean(x^2) + eps)
  at::Tensor reciprocal_root(const at::Tensor& x) const;
  // Over the elements that share a mean.
  at::Tensor mean(const at::Tensor& x) const;
  at::Tensor normalize(const at::Tensor& x) const;
  // Multiplies by weight_offset + weight, where there is a weight.
  at::Tensor weight(const at::Tensor& x) const;

 private:
  const CallOptions& options_;
  at::DimVector axes_;
  at::Tensor gain_;
};

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
