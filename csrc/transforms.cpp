// The transforms of torch.func, the older vmap by which torch.autograd.grad maps a backward pass
// over many gradients (is_grads_batched), and what compilers and lazily negated views make of calls
// in place.
//
// What differentiates is in autograd.cpp and gradients.cpp. In Python, torch_rope/_vmap.py replaces
// the rule for torch.vmap by one that keeps the kernel.
#include <ATen/LegacyVmapTransforms.h>

#include <vector>

#include "call.h"
#include "checks.h"
#include "composed.h"

namespace rope {

namespace {

// Has every level of torch.func say whether x may become y, by writing to x what it holds.
void check_can_become(const at::Tensor& x, const at::Tensor& y) {
  const at::Tensor never = x.new_zeros({}, at::kBool);
  x.copy_(y.where(never, x));
}

// Before any level of torch.func sees the call: copy_ knows at each what may be changed, such as no
// tensor that a function to be differentiated captures.
Outputs rotate_in_place_under_transforms(const Call& call) {
  check(call);
  const Outputs outputs = rotate_copies(call);
  if (call.is_pair) {
    check_can_become(call.k, outputs.k);  // before q is written
  }
  return copy_back(call, outputs);
}

// For torch.compile and torch.export, whose graphs change nothing in place. The wrapper that
// PyTorch has for operators without a rule of their own (auto_functionalized) would spare the copy
// into views and arguments, but TorchInductor forgets where a view begins when that is a symbol.
//
// And for views that are negated lazily, such as the imaginary part of a conjugate. What PyTorch
// does for operators without a rule of their own takes what they return for the tensor that they
// changed, and corrupts the stack of the dispatcher where they return nothing.
Outputs rotate_functionally(const Call& call) {
  check(call);
  return copy_back(call, dispatch(call.is_pair ? on(call, call.q, call.k) : on(call, call.q)));
}

bool is_batched(const at::Tensor& tensor) {
  return tensor.defined() && at::isBatchedTensor(tensor);
}

// The older vmap. A backward pass maps what is rotated, and nothing else.
Outputs rotate_batched(const Call& call) {
  check(call);
  if (is_batched(call.positions) || is_batched(call.options.inv_freq.value_or(at::Tensor())) ||
      is_batched(call.cos) || is_batched(call.sin)) {
    return rotate_composed(call);
  }
  if (call.is_pair && call.q.dim() != call.k.dim()) {
    return {dispatch(on(call, call.q)).q, dispatch(on(call, call.k)).q};
  }
  // The views have the batch in front: the axis is the same from the end.
  Call physical = call;
  if (physical.options.embedding_axis >= 0) {
    physical.options.embedding_axis -= call.q.dim();
  }
  if (!call.is_pair) {
    const at::VmapPhysicalView x = at::MultiBatchVmapTransform::logicalToPhysical(call.q);
    return {x.getPhysicalToLogicalMap().apply(dispatch(on(physical, x.tensor())).q), {}};
  }
  const std::vector<at::Tensor> pair{call.q, call.k};
  const auto views = at::MultiBatchVmapTransform::logicalToPhysical(at::ITensorListRef(pair));
  const Outputs outputs = dispatch(on(physical, views[0].tensor(), views[1].tensor()));
  return {views[0].getPhysicalToLogicalMap().apply(outputs.q),
          views[1].getPhysicalToLogicalMap().apply(outputs.k)};
}

}  // namespace

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, FuncTorchDynamicLayerFrontMode, library) {
  rope::Operators<rope::rotate_in_place_under_transforms>::register_in_place(library);
}

TORCH_LIBRARY_IMPL(rope, Functionalize, library) {
  rope::Operators<rope::rotate_functionally>::register_in_place(library);
}

TORCH_LIBRARY_IMPL(rope, Negative, library) {
  rope::Operators<rope::rotate_functionally>::register_in_place(library);
}

TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::Operators<rope::rotate_composed>::register_functional(library);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::Operators<rope::rotate_batched>::register_functional(library);
}
