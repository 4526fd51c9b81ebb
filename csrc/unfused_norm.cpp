#include "unfused_norm.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/core/WrapDimMinimal.h>

#include <cstdint>
#include <utility>

#include "decomposition.h"
#include "make_launch.h"

namespace rope {

namespace {

// The size along a dimension counted from the right, of sizes that broadcast.
std::int64_t size_from_right(at::IntArrayRef sizes, std::int64_t from_right) {
  return from_right < std::ssize(sizes) ? sizes[sizes.size() - 1 - from_right] : 1;
}

bool is_unfused_one(const Call& call, const at::Tensor& x, const at::Tensor& weight,
                    bool weights_may_vary) {
  const at::IntArrayRef weights = weight.defined() && !weights_may_vary
                                      ? weight.sizes().slice(0, weight.dim() - 1)
                                      : at::IntArrayRef();
  const std::int64_t axis = c10::maybe_wrap_dim(call.options.embedding_axis, x.dim());
  const auto shares_mean = norm_axes(call, x);
  std::int64_t from_right = 0;
  for (std::int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == axis) {
      continue;
    }
    if (angles_differ(call, from_right) &&
        (size_from_right(weights, from_right) != 1 || shares_mean[d])) {
      return true;
    }
    ++from_right;
  }
  return false;
}

// Kernels sum the gradients of all weights in each block: those of a weight for each token would
// take more memory than all else.
bool has_many_weights(bool is_wanted, const at::Tensor& weight) {
  constexpr std::int64_t kMostWeights = 128;  // as of heads
  return is_wanted && weight.defined() && weight.numel() > kMostWeights * weight.size(-1);
}

at::Tensor normalize_and_rotate(const Call& call) {
  const at::Tensor x = call.q.to(at::toOpMathType(call.q.scalar_type()));
  return call.options.norm_last ? dispatch(norm_of(call, dispatch(rotation_of(call, x)).q)).q
                                : dispatch(rotation_of(call, dispatch(norm_of(call, x)).q)).q;
}

NormGradients gradients_of_one(const NormGradientCall& call) {
  if (has_many_weights(call.wants_q_weight(), call.q_weight)) {
    NormGradientCall of_x = call;
    NormGradientCall of_weight = call;
    of_x.wants = {call.wants_q(), false, false, false};
    of_weight.wants = {false, false, true, false};
    return {.q = norm_gradients(of_x).q, .q_weight = decomposed_norm_gradients(of_weight).q_weight};
  }
  const at::ScalarType real = at::toOpMathType(call.q.scalar_type());
  const auto rotate = [&](const at::Tensor& x, bool transposed) {
    Call rotation = rotation_of(call, x);
    rotation.options.conjugate ^= transposed;
    return dispatch(rotation).q;
  };
  const bool norm_last = call.options.norm_last;
  const at::Tensor x = call.q.to(real);
  const at::Tensor grad = call.q_grad.to(real);
  NormGradientCall norm;
  static_cast<Call&>(norm) = norm_of(call, norm_last ? rotate(x, /*transposed=*/false) : x);
  norm.q_grad = norm_last ? grad : rotate(grad, /*transposed=*/true);
  norm.wants = call.wants;
  NormGradients gradients = dispatch(norm);
  if (gradients.q.defined()) {
    gradients.q = norm_last ? rotate(gradients.q, /*transposed=*/true) : std::move(gradients.q);
  }
  return gradients;
}

}  // namespace

bool is_unfused(const Call& call, bool weights_may_vary) {
  return is_unfused_one(call, call.q, call.q_weight, weights_may_vary) ||
         (call.is_pair && is_unfused_one(call, call.k, call.k_weight, weights_may_vary));
}

bool is_unfused_gradient(const NormGradientCall& call) {
  return is_unfused(call, /*weights_may_vary=*/false) ||
         has_many_weights(call.wants_q_weight(), call.q_weight) ||
         has_many_weights(call.wants_k_weight(), call.k_weight);
}

// Of a pair, each is a call of its own: one of them may be a launch, and then has the bits of one.
void normalize_unfused(const Call& call, const Outputs& outputs) {
  if (!call.is_pair) {
    outputs.q.copy_(normalize_and_rotate(call));
    return;
  }
  const at::Tensor q = dispatch(on_q(call)).q;
  outputs.k.copy_(dispatch(on_k(call)).q);
  outputs.q.copy_(q);
}

NormGradients unfused_norm_gradients(const NormGradientCall& call) {
  if (call.is_pair) {
    NormGradients of_q = dispatch(on_q(call));
    NormGradients of_k = dispatch(on_k(call));
    return {std::move(of_q.q), std::move(of_k.q), std::move(of_q.q_weight),
            std::move(of_k.q_weight)};
  }
  NormGradients outputs = empty_gradients(call);
  const NormGradients gradients = gradients_of_one(call);
  if (outputs.q.defined()) {
    outputs.q.copy_(gradients.q);
  }
  if (outputs.q_weight.defined()) {
    outputs.q_weight.copy_(gradients.q_weight);
  }
  return outputs;
}

}  // namespace rope
