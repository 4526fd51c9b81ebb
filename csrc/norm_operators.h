// The private operators that differentiate norm_apply and its siblings: the gradients of x and of
// the weight in one pass over memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>

#include "rotate_operators.h"

namespace rope {

// The gradients of the tensors of a call; undefined where not wanted.
struct NormGradients {
  at::Tensor q = {};
  at::Tensor k = {};
  at::Tensor q_weight = {};
  at::Tensor k_weight = {};
};

// A functional call, the gradients of what it returned, and which gradients are wanted of it.
struct NormGradientCall : Call {
  at::Tensor q_grad = {};
  at::Tensor k_grad = {};
  std::array<bool, 4> wants = {true, true, true, true};  // q, k, q_weight, k_weight

  bool wants_q() const { return wants[0]; }
  bool wants_k() const { return wants[1]; }
  bool wants_q_weight() const { return wants[2]; }
  bool wants_k_weight() const { return wants[3]; }

  // The operator's name without its namespace.
  std::string name() const { return c10::str("_", Call::name(), "_backward"); }
};

// The part of a pair's call for q, or for k.
NormGradientCall on_q(const NormGradientCall& call);
NormGradientCall on_k(const NormGradientCall& call);

inline constexpr auto kQGrad = [](auto& call) -> auto& { return call.q_grad; };
inline constexpr auto kKGrad = [](auto& call) -> auto& { return call.k_grad; };
inline constexpr auto kWants = [](auto& call) -> auto& { return call.wants; };

// _norm_apply_backward, _norm_apply_qk_backward and those for tables: see NOTE [ Operators ] in
// operator.h.
template <typename Angles, Form form>
struct NormGradientTraits {
  using Family = Normalized<Angles>;
  using Forward = RotateTraits<Family, form>;
  using Call = NormGradientCall;
  static constexpr bool kIsPair = Forward::kIsPair;
  using Result =
      std::conditional_t<kIsPair, std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>,
                         std::tuple<at::Tensor, at::Tensor>>;

  static std::string name() { return empty_call().name(); }

  static Call empty_call() {
    Call call;
    static_cast<rope::Call&>(call) = Forward::empty_call();
    return call;
  }

  static constexpr auto arguments() {
    return std::tuple_cat(
        gradients(), Forward::arguments(),
        std::tuple{argument<std::array<bool, 4>>("output_mask", kWants, "[True, True, True, True]")
                       .as_keyword()});
  }

  static Result results(NormGradients gradients) {
    if constexpr (kIsPair) {
      return {std::move(gradients.q), std::move(gradients.k), std::move(gradients.q_weight),
              std::move(gradients.k_weight)};
    } else {
      return {std::move(gradients.q), std::move(gradients.q_weight)};
    }
  }

 private:
  static constexpr auto gradients() {
    if constexpr (kIsPair) {
      return std::tuple{argument<const at::Tensor&>("grad_q", kQGrad),
                        argument<const at::Tensor&>("grad_k", kKGrad)};
    } else {
      return std::tuple{argument<const at::Tensor&>("grad", kQGrad)};
    }
  }
};

template <typename Angles, Form form>
using NormGradientOperator = Operator<NormGradientTraits<Angles, form>>;

using NormGradientOperators = OperatorList<NormGradientOperator<AnglesFromPositions, Form::kSingle>,
                                           NormGradientOperator<AnglesFromPositions, Form::kPair>,
                                           NormGradientOperator<AnglesFromTables, Form::kSingle>,
                                           NormGradientOperator<AnglesFromTables, Form::kPair>>;

// Memory for the wanted gradients: those of weights are contiguous.
NormGradients empty_gradients(const NormGradientCall& call);

// The gradients in ATen operators.
NormGradients decomposed_norm_gradients(const NormGradientCall& call);

// Calls the operator on what has a gradient and a wanted result: both of a pair, one or none.
NormGradients norm_gradients(const NormGradientCall& call);

// Calls the call's operator through the dispatcher.
NormGradients dispatch(const NormGradientCall& call);

}  // namespace rope
