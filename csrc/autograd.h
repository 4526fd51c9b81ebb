// Queries for kernels of the Autograd keys.
#pragma once

#include <ATen/core/Tensor.h>

namespace rope {

// Whether the tensor is defined and requires grad.
bool requires_grad(const at::Tensor& tensor);

// Whether the tensor is defined and has a tangent of forward-mode differentiation.
bool has_tangent(const at::Tensor& tensor);

// Whether a torch.func transform differentiates. (vmap levels have been peeled off by then.)
bool is_transformed();

// Whether a kernel can serve the tensor: it is no subclass, such as a compiler's tensor, which has
// to see ATen operators, and has nothing to differentiate.
bool is_plain(const at::Tensor& tensor);

}  // namespace rope
