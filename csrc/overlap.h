// Whether strided tensors have elements in one place of memory: exact, and quick for the views
// people make.
#pragma once

#include <ATen/core/Tensor.h>

namespace rope {

// Two different indices of x lead to one element.
bool overlaps_itself(const at::Tensor& x);

// Some element of x and some element of y have a byte in common.
bool share_memory(const at::Tensor& x, const at::Tensor& y);

}  // namespace rope
