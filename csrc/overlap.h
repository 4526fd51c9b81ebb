// Whether strided tensors share memory. Exact for the views people make: see NOTE [ Overlap ].
#pragma once

#include <ATen/core/Tensor.h>

namespace rope {

// Two indices of x lead to one element.
bool overlaps_itself(const at::Tensor& x);

// Some element of x and some element of y have a byte in common.
bool overlap(const at::Tensor& x, const at::Tensor& y);

}  // namespace rope
