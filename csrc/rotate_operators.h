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

// How a family of operators forms its angles: its name, the tensors that follow x, its options.
struct AnglesFromPositions {
  using Options = ApplyOptions;
  static constexpr const char* kName = "apply";
  static constexpr bool kUsesTables = false;

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
  static constexpr const char* kName = "apply_cos_sin";
  static constexpr bool kUsesTables = true;

  static constexpr auto tensors() {
    return std::tuple{
        argument<const at::Tensor&>("cos", [](auto& call) -> auto& { return call.cos; }),
        argument<const at::Tensor&>("sin", [](auto& call) -> auto& { return call.sin; }),
        argument<const std::optional<at::Tensor>&>(
            "positions", [](auto& call) -> auto& { return call.positions; }, "None")};
  }
};

enum class Form {
  kSingle,         // apply
  kPair,           // apply_qk
  kSingleInPlace,  // apply_
  kPairInPlace,    // apply_qk_
  kDecomposed,     // apply_composed
};

template <typename Angles, Form form>
struct RotateTraits {
  using Call = rope::Call;
  static constexpr bool kInPlace = form == Form::kSingleInPlace || form == Form::kPairInPlace;
  static constexpr bool kIsPair = form == Form::kPair || form == Form::kPairInPlace;
  using Result = std::conditional_t<
      kInPlace, void, std::conditional_t<kIsPair, std::tuple<at::Tensor, at::Tensor>, at::Tensor>>;

  static std::string name() {
    return c10::str(Angles::kName, kIsPair ? "_qk" : "", kInPlace ? "_" : "",
                    form == Form::kDecomposed ? "_composed" : "");
  }

  static Call empty_call() {
    Call call;
    call.is_pair = kIsPair;
    call.in_place = kInPlace;
    call.uses_tables = Angles::kUsesTables;
    return call;
  }

  static constexpr auto arguments() {
    return std::tuple_cat(rotated(), Angles::tensors(),
                          option_arguments<typename Angles::Options>(
                              [](auto& call) -> auto& { return call.options; }, true));
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
    constexpr auto kQ = [](auto& call) -> auto& { return call.q; };
    constexpr auto kK = [](auto& call) -> auto& { return call.k; };
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

template <typename Angles, Form form>
using RotateOperator = Operator<RotateTraits<Angles, form>>;

using FunctionalOperators = OperatorList<RotateOperator<AnglesFromPositions, Form::kSingle>,
                                         RotateOperator<AnglesFromPositions, Form::kPair>,
                                         RotateOperator<AnglesFromTables, Form::kSingle>,
                                         RotateOperator<AnglesFromTables, Form::kPair>>;
using InPlaceOperators = OperatorList<RotateOperator<AnglesFromPositions, Form::kSingleInPlace>,
                                      RotateOperator<AnglesFromPositions, Form::kPairInPlace>,
                                      RotateOperator<AnglesFromTables, Form::kSingleInPlace>,
                                      RotateOperator<AnglesFromTables, Form::kPairInPlace>>;
using AllOperators = decltype(FunctionalOperators() + InPlaceOperators());
using DecomposedOperators = OperatorList<RotateOperator<AnglesFromPositions, Form::kDecomposed>,
                                         RotateOperator<AnglesFromTables, Form::kDecomposed>>;

}  // namespace rope
