// Calls in place as the functional operator followed by copy_: under torch.func, for compilers, and
// for lazily negated views.
#include "call.h"
#include "checks.h"
#include "decomposition.h"
#include "rotate_operators.h"

// NOTE [ Functionalization ]
//
// Without a kernel for the key Functionalize, PyTorch would wrap the operators in
// auto_functionalized_v2, from which TorchInductor recovers the call in place. That would save the
// copy, but it gives wrong results for any operator that mutates its arguments (torch 2.11 to 2.15,
// docs/upstream/mutated_views.py):
//
// - for a view whose storage offset is a symbol: TorchInductor drops the offset;
// - for a slice of an argument that has a storage offset of its own, as packed[1] has: the slice is
//   recorded as if its base began at 0;
// - for a clone of such an argument: TorchInductor removes the clone as redundant, and clones the
//   argument again without its offset (absent from 2.11). The rule for the key cannot detect this
//   case, since the clone is still there when it runs.
//
// Without a kernel for the key Negative, PyTorch's fallback treats what the operator returns as the
// tensor it changed, and corrupts the dispatcher's stack for operators that return nothing
// (docs/upstream/negative_fallback.py).

namespace rope {

namespace {

// Writes x to itself, masked by y, so that every level of torch.func raises if x may not become y.
void check_can_become(const at::Tensor& x, const at::Tensor& y) {
  const at::Tensor never = x.new_zeros({}, at::kBool);
  x.copy_(y.where(never, x));
}

// Runs before any level of torch.func sees the call. copy_ enforces the rules of each level, such
// as that a differentiated function must not modify a tensor it captures.
Outputs rotate_in_place_under_transforms(const Call& call) {
  check(call);
  const Outputs outputs = rotate_copies(call);
  if (call.is_pair) {
    check_can_become(call.k, outputs.k);  // before q is written
  }
  return copy_back(call, outputs);
}

// For torch.compile and torch.export, whose graphs have no mutation, and for lazily negated views
// (such as x.conj().imag). See NOTE [ Functionalization ].
Outputs rotate_functionally(const Call& call) {
  check(call);
  return copy_back(call, dispatch(call.is_pair ? on(call, call.q, call.k) : on(call, call.q)));
}

}  // namespace

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, FuncTorchDynamicLayerFrontMode, library) {
  rope::InPlaceOperators::implement(library, rope::rotate_in_place_under_transforms);
}

TORCH_LIBRARY_IMPL(rope, Functionalize, library) {
  rope::InPlaceOperators::implement(library, rope::rotate_functionally);
}

TORCH_LIBRARY_IMPL(rope, Negative, library) {
  rope::InPlaceOperators::implement(library, rope::rotate_functionally);
}
