// In-place calls carried out by the functional operator and copy_: under torch.func, for compilers,
// and on lazily negated views.
#include "call.h"
#include "checks.h"
#include "decomposition.h"
#include "rotate_operators.h"

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

}  // namespace

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, FuncTorchDynamicLayerFrontMode, library) {
  rope::InPlaceOperators::implement<rope::rotate_in_place_under_transforms>(library);
}

TORCH_LIBRARY_IMPL(rope, Functionalize, library) {
  rope::InPlaceOperators::implement<rope::rotate_functionally>(library);
}

TORCH_LIBRARY_IMPL(rope, Negative, library) {
  rope::InPlaceOperators::implement<rope::rotate_functionally>(library);
}
