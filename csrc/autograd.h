// What kernels of the Autograd key ask of a tensor, and of where they are called.
#pragma once

#include <ATen/core/Tensor.h>

namespace rope {

// Whether the tensor is defined and requires grad.
bool requires_grad(const at::Tensor& tensor);

// Whether the tensor is defined and has a tangent of forward-mode differentiation.
bool has_tangent(const at::Tensor& tensor);

// Whether a level of torch.func differentiates. (Levels of vmap are gone when this is asked.)
bool is_transformed();

}  // namespace rope
