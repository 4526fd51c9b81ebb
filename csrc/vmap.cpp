// vmap where there is no Python, and the older vmap by which torch.autograd.grad maps a backward
// pass over many gradients (is_grads_batched). In Python, torch_rope/_vmap.py replaces the rule for
// torch.vmap by one that keeps the kernel.
#include <ATen/LegacyVmapTransforms.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call.h"
#include "checks.h"
#include "decomposition.h"
#include "rotate_operators.h"

namespace rope {

namespace {

bool is_batched(const at::Tensor& tensor) {
  return tensor.defined() && at::isBatchedTensor(tensor);
}

// Counts the axes of q, which are also those of k, from the end: physical views have the batch
// dimensions first.
void count_from_end(CallOptions& options, std::int64_t dims) {
  const auto wrap = [=](std::int64_t& axis) { axis -= axis >= 0 ? dims : 0; };
  wrap(options.embedding_axis);
  if (options.norm_axes.has_value()) {
    std::ranges::for_each(*options.norm_axes, wrap);
  }
}

// The older vmap. In a backward pass only the rotated tensors are batched. Without a rule, PyTorch
// loops over the batch and warns.
Outputs rotate_batched(const Call& call) {
  check(call);
  if (is_batched(call.positions) || is_batched(call.options.inv_freq.value_or(at::Tensor())) ||
      is_batched(call.cos) || is_batched(call.sin) || is_batched(call.q_weight) ||
      is_batched(call.k_weight)) {
    return rotate_decomposed(call);
  }
  if (call.is_pair && call.q.dim() != call.k.dim()) {
    return {dispatch(on_q(call)).q, dispatch(on_k(call)).q};
  }
  Call physical = call;
  count_from_end(physical.options, call.q.dim());
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

// The decomposition: functorch's headers for C++ batching rules may change between releases.
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::FunctionalOperators::implement(library, rope::rotate_decomposed);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::FunctionalOperators::implement(library, rope::rotate_batched);
}
