// The gradients of norm_apply and its siblings: what every device shares of the operators of
// norm_operators.h.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "autograd.h"
#include "checks.h"
#include "decomposition.h"
#include "norm_operators.h"

namespace rope {

namespace {

template <typename Angles>
NormGradients dispatch_family(const NormGradientCall& call) {
  if (call.is_pair) {
    auto [q, k, q_weight, k_weight] = NormGradientOperator<Angles, Form::kPair>::dispatch(call);
    return {std::move(q), std::move(k), std::move(q_weight), std::move(k_weight)};
  }
  auto [q, q_weight] = NormGradientOperator<Angles, Form::kSingle>::dispatch(call);
  return {.q = std::move(q), .q_weight = std::move(q_weight)};
}

// With R the rotation, n the normalized tensor and w the weight:
//   y = R (n * w):  grad of n = w * R^T grad
//   y = w * n, norm_last:  grad of n = w * grad
// and grad of x = (grad of n - n * mean(grad of n * n)) / root, with norm_last rotated back.
NormGradients decompose_one(const NormGradientCall& call) {
  const at::ScalarType real = at::toOpMathType(call.q.scalar_type());
  const bool norm_last = call.options.norm_last;
  const Norm norm(call);
  const auto rotate = [&](const at::Tensor& x, bool transposed) {
    Call rotation = rotation_of(call, x);
    rotation.options.conjugate ^= transposed;
    return rotate_decomposed(rotation).q;
  };
  const at::Tensor grad = call.q_grad.to(real);
  const at::Tensor x = call.q.to(real);
  const at::Tensor of_weighted = norm_last ? grad : rotate(grad, /*transposed=*/true);
  const at::Tensor before = norm_last ? rotate(x, /*transposed=*/false) : x;
  const at::Tensor reciprocal_root = norm.reciprocal_root(before);
  const at::Tensor normalized = before * reciprocal_root;

  NormGradients gradients;
  if (call.wants_q()) {
    const at::Tensor of_normalized = norm.weight(of_weighted);
    const at::Tensor of_before =
        reciprocal_root * (of_normalized - normalized * norm.mean(of_normalized * normalized));
    gradients.q =
        (norm_last ? rotate(of_before, /*transposed=*/true) : of_before).to(call.q.scalar_type());
  }
  if (call.wants_q_weight() && call.q_weight.defined()) {
    gradients.q_weight = (of_weighted * normalized)
                             .movedim(call.options.embedding_axis, -1)
                             .sum_to_size_symint(call.q_weight.sym_sizes())
                             .to(call.q_weight.scalar_type());
  }
  return gradients;
}

NormGradients allocate_gradients(const NormGradientCall& call) {
  check(call);
  return empty_gradients(call);
}

bool has_derivative(const NormGradientCall& call) {
  const auto differs = [](const at::Tensor& tensor) {
    return (at::GradMode::is_enabled() && requires_grad(tensor)) || has_tangent(tensor);
  };
  return differs(call.q_grad) || differs(call.k_grad) || differs(call.q) || differs(call.k) ||
         differs(call.q_weight) || differs(call.k_weight) || differs(call.positions) ||
         differs(call.options.inv_freq.value_or(at::Tensor())) || differs(call.cos) ||
         differs(call.sin);
}

// Second derivatives are those of ATen's operators.
NormGradients decompose_or_forward(const NormGradientCall& call) {
  if (is_transformed() || has_derivative(call)) {
    return decomposed_norm_gradients(call);
  }
  const at::AutoDispatchBelowAutograd guard;
  return dispatch(call);
}

}  // namespace

NormGradientCall on_q(const NormGradientCall& call) {
  NormGradientCall one = call;
  static_cast<Call&>(one) = on_q(static_cast<const Call&>(call));
  return one;
}

NormGradientCall on_k(const NormGradientCall& call) {
  NormGradientCall one = call;
  static_cast<Call&>(one) = on_k(static_cast<const Call&>(call));
  one.q_grad = call.k_grad;
  one.wants = {call.wants_k(), false, call.wants_k_weight(), false};
  return one;
}

NormGradients decomposed_norm_gradients(const NormGradientCall& call) {
  check(call);
  NormGradients gradients = decompose_one(on_q(call));
  if (call.is_pair) {
    NormGradients of_k = decompose_one(on_k(call));
    gradients.k = std::move(of_k.q);
    gradients.k_weight = std::move(of_k.q_weight);
  }
  return gradients;
}

NormGradients norm_gradients(const NormGradientCall& call) {
  const bool of_q = call.wants_q() || call.wants_q_weight();
  const bool of_k = call.wants_k() || call.wants_k_weight();
  if (of_q && of_k) {
    return dispatch(call);
  }
  if (of_k) {
    NormGradients gradients = dispatch(on_k(call));
    return {.k = std::move(gradients.q), .k_weight = std::move(gradients.q_weight)};
  }
  return of_q ? dispatch(on_q(call)) : NormGradients();
}

NormGradients dispatch(const NormGradientCall& call) {
  return call.uses_tables ? dispatch_family<AnglesFromTables>(call)
                          : dispatch_family<AnglesFromPositions>(call);
}

NormGradients empty_gradients(const NormGradientCall& call) {
  const auto empty_like = [](bool is_wanted, const at::Tensor& tensor) {
    return is_wanted && tensor.defined() ? at::empty_like(tensor) : at::Tensor();
  };
  const auto empty_weight = [](bool is_wanted, const at::Tensor& weight) {
    return is_wanted && weight.defined() ? at::empty_symint(weight.sym_sizes(), weight.options())
                                         : at::Tensor();
  };
  return {empty_like(call.wants_q(), call.q), empty_like(call.wants_k(), call.k),
          empty_weight(call.wants_q_weight(), call.q_weight),
          empty_weight(call.wants_k_weight(), call.k_weight)};
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, Meta, library) {
  rope::NormGradientOperators::implement(library, rope::allocate_gradients);
}

TORCH_LIBRARY_IMPL(rope, Autograd, library) {
  rope::NormGradientOperators::implement(library, rope::decompose_or_forward);
}

// vmap, and the older vmap of torch.autograd.grad(is_grads_batched=True).
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::NormGradientOperators::implement(library, rope::decomposed_norm_gradients);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::NormGradientOperators::implement(library, rope::decomposed_norm_gradients);
}
