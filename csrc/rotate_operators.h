// The rotation operators, each described once: see NOTE [ Operators ] in operator.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "call.h"
#include "operator.h"

namespace rope {

// The members of a call that hold its arguments.
inline constexpr auto kQ = [](auto& call) -> auto& { return call.q; };
inline constexpr auto kK = [](auto& call) -> auto& { return call.k; };
inline constexpr auto kQWeight = [](auto& call) -> auto& { return call.q_weight; };
inline constexpr auto kKWeight = [](auto& call) -> auto& { return call.k_weight; };
inline constexpr auto kOptions = [](auto& call) -> auto& { return call.options; };

// How a family of operators forms its angles: its name, the tensors that follow x, its options.
struct AnglesFromPositions {
  using Options = ApplyOptions;
  using NormOptions = rope::NormOptions;
  static constexpr const char* kName = "apply";
  static constexpr bool kUsesTables = false;
  static constexpr bool kNormalizes = false;

  static constexpr auto tensors() {
    return std::tuple{
        argument<const at::Tensor&>("positions",
                                    [](auto& call) -> auto& { return call.positions; }),
        argument<const std::optional<at::Tensor>&>(
            "inv_freq", [](auto& call) -> auto& { return call.options.inv_freq; }, "None")};
  }
};

struct AnglesFromTables {
  using Options = CosSinOptions;
  using NormOptions = NormCosSinOptions;
  static constexpr const char* kName = "apply_cos_sin";
  static constexpr bool kUsesTables = true;
  static constexpr bool kNormalizes = false;

  static constexpr auto tensors() {
    return std::tuple{
        argument<const at::Tensor&>("cos", [](auto& call) -> auto& { return call.cos; }),
        argument<const at::Tensor&>("sin", [](auto& call) -> auto& { return call.sin; }),
        argument<const std::optional<at::Tensor>&>(
            "positions", [](auto& call) -> auto& { return call.positions; }, "None")};
  }
};

// The family that also normalizes: norm_apply and norm_apply_cos_sin.
template <typename Angles>
struct Normalized : Angles {
  using Options = typename Angles::NormOptions;
  static constexpr bool kNormalizes = true;
};

// The weights follow x, or q and k.
template <typename Family, bool is_pair>
constexpr auto weight_arguments() {
  using Weight = const std::optional<at::Tensor>&;
  if constexpr (!Family::kNormalizes) {
    return std::tuple{};
  } else if constexpr (is_pair) {
    return std::tuple{argument<Weight>("q_weight", kQWeight),
                      argument<Weight>("k_weight", kKWeight)};
  } else {
    return std::tuple{argument<Weight>("weight", kQWeight)};
  }
}

enum class Form {
  kSingle,         // apply
  kPair,           // apply_qk
  kSingleInPlace,  // apply_
  kPairInPlace,    // apply_qk_
  kDecomposed,     // apply_composed
};

template <typename Family, Form form>
struct RotateTraits {
  using Call = rope::Call;
  static constexpr bool kInPlace = form == Form::kSingleInPlace || form == Form::kPairInPlace;
  static constexpr bool kIsPair = form == Form::kPair || form == Form::kPairInPlace;
  using Result = std::conditional_t<
      kInPlace, void, std::conditional_t<kIsPair, std::tuple<at::Tensor, at::Tensor>, at::Tensor>>;

  static std::string name() {
    return c10::str(Family::kNormalizes ? "norm_" : "", Family::kName, kIsPair ? "_qk" : "",
                    kInPlace ? "_" : "", form == Form::kDecomposed ? "_composed" : "");
  }

  static Call empty_call() {
    Call call;
    call.is_pair = kIsPair;
    call.in_place = kInPlace;
    call.uses_tables = Family::kUsesTables;
    call.normalizes = Family::kNormalizes;
    return call;
  }

  static constexpr auto arguments() {
    return std::tuple_cat(rotated(), weight_arguments<Family, kIsPair>(), Family::tensors(),
                          option_arguments<typename Family::Options>(kOptions, true));
  }

  static Result results([[maybe_unused]] Outputs outputs) {
    if constexpr (kInPlace) {
      return;
    } else if constexpr (kIsPair) {
      return {std::move(outputs.q), std::move(outputs.k)};
    } else {
      return std::move(outputs.q);
    }
  }

 private:
  static constexpr auto rotated() {
    if constexpr (form == Form::kPairInPlace) {
      return std::tuple{mutable_argument("q", kQ, "Tensor(a!)"),
                        mutable_argument("k", kK, "Tensor(b!)")};
    } else if constexpr (form == Form::kPair) {
      return std::tuple{argument<const at::Tensor&>("q", kQ), argument<const at::Tensor&>("k", kK)};
    } else if constexpr (form == Form::kSingleInPlace) {
      return std::tuple{mutable_argument("x", kQ, "Tensor(a!)")};
    } else {
      return std::tuple{argument<const at::Tensor&>("x", kQ)};
    }
  }
};

template <typename Family, Form form>
using RotateOperator = Operator<RotateTraits<Family, form>>;

template <Form... forms>
struct Forms {
  template <typename Family>
  using Of = OperatorList<RotateOperator<Family, forms>...>;

  // Of every family.
  using All = decltype(Of<AnglesFromPositions>() + Of<AnglesFromTables>() +
                       Of<Normalized<AnglesFromPositions>>() + Of<Normalized<AnglesFromTables>>());
};

using FunctionalOperators = Forms<Form::kSingle, Form::kPair>::All;
using InPlaceOperators = Forms<Form::kSingleInPlace, Form::kPairInPlace>::All;
using AllOperators = decltype(FunctionalOperators() + InPlaceOperators());
using DecomposedOperators = Forms<Form::kDecomposed>::All;

}  // namespace rope
