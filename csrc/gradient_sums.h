// The sums that gradients of angles and tables need: for each token and pair, over the rows (heads)
// that share the angle. Two private operators compute them and what follows from them, on CUDA in
// at most three kernels, elsewhere in ATen operators.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "operator.h"
#include "rotation.h"

namespace rope {

// What follows the sums; by default nothing.
struct Finish {
  // For an angle: (sums * factors).sum(dim); dim counts from the end. Undefined: none.
  at::Tensor factors = {};
  at::DimVector dim = {};
  // For tables: each token's sums are added to the row it names, of num_rows.
  at::Tensor rows = {};
  std::optional<c10::SymInt> num_rows = {};
  // Of the result; by default that of the sums.
  std::optional<at::ScalarType> dtype = {};
};

struct AngleSumOptions {
  std::int64_t embedding_axis = -1;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
  bool conjugate = false;
};

struct SumOptions : AngleSumOptions {
  bool full_width = false;
};

// One call of either operator, on one tensor or on two of the same dtype, such as q and k, whose
// sums are added. With g the gradient of what came out of a rotation of x, they are
//   cos: sum(g.a * x.a + g.b * x.b)    sin: sum(g.b * x.a - g.a * x.b)
// over the pairs (a, b) that share an angle, in the opmath type of x. They are the gradients of
// cos t and sin t; where x is what came out, the sine's is that of the angle t. With full_width
// they are the gradients of full-width tables:
//   cos: sum(g.a * x.a), sum(g.b * x.b)    sin: sum(-g.a * x.b), sum(g.b * x.a)
struct SumCall {
  bool uses_tables = false;  // false: _angle_gradient, which only wants sin
  at::TensorList grads = {};
  at::TensorList xs = {};
  // Of the sums: (tokens..., N), or (tokens..., 2 N) with full_width. They broadcast with each x as
  // tables do.
  c10::SymIntArrayRef sizes = {};
  SumOptions options = {};
  Finish finish = {};
  std::array<bool, 2> wants = {false, true};  // cos, sin

  bool wants_cos() const { return wants[0]; }
  bool wants_sin() const { return wants[1]; }
  const char* name() const { return uses_tables ? "_cos_sin_gradient" : "_angle_gradient"; }
  const char* xs_name() const { return uses_tables ? "xs" : "ys"; }
};

// The arguments that both operators begin with.
constexpr auto sum_arguments(const char* xs_name) {
  return std::tuple{
      argument<at::TensorList>("grads", [](auto& call) -> auto& { return call.grads; }),
      argument<at::TensorList>(xs_name, [](auto& call) -> auto& { return call.xs; }),
      argument<c10::SymIntArrayRef>("sizes", [](auto& call) -> auto& { return call.sizes; })};
}

// The two operators: see NOTE [ Operators ] in operator.h.
struct AngleGradientTraits {
  using Call = SumCall;
  using Result = at::Tensor;
  static std::string name() { return empty_call().name(); }
  static Call empty_call() { return {}; }
  static Result results(Rotation<at::Tensor> sums) { return std::move(sums.sin); }

  static constexpr auto arguments() {
    return std::tuple_cat(
        sum_arguments("ys"),
        option_arguments<AngleSumOptions>([](auto& call) -> auto& { return call.options; }, false),
        std::tuple{argument<const std::optional<at::Tensor>&>(
                       "factors", [](auto& call) -> auto& { return call.finish.factors; }, "None"),
                   argument<at::IntArrayRef>(
                       "dim", [](auto& call) -> auto& { return call.finish.dim; }, "[]"),
                   argument<std::optional<at::ScalarType>>(
                       "dtype", [](auto& call) -> auto& { return call.finish.dtype; }, "None")});
  }
};

struct CosSinGradientTraits {
  using Call = SumCall;
  using Result = std::tuple<at::Tensor, at::Tensor>;
  static std::string name() { return empty_call().name(); }
  static Call empty_call() { return {.uses_tables = true}; }
  static Result results(Rotation<at::Tensor> sums) {
    return {std::move(sums.cos), std::move(sums.sin)};
  }

  static constexpr auto arguments() {
    return std::tuple_cat(
        sum_arguments("xs"),
        option_arguments<SumOptions>([](auto& call) -> auto& { return call.options; }, false),
        std::tuple{
            argument<const std::optional<at::Tensor>&>(
                "rows", [](auto& call) -> auto& { return call.finish.rows; }, "None"),
            argument<const std::optional<c10::SymInt>&>(
                "num_rows", [](auto& call) -> auto& { return call.finish.num_rows; }, "None"),
            argument<std::optional<at::ScalarType>>(
                "dtype", [](auto& call) -> auto& { return call.finish.dtype; }, "None"),
            argument<std::array<bool, 2>>(
                "output_mask", [](auto& call) -> auto& { return call.wants; }, "[True, True]")});
  }
};

using AngleGradient = Operator<AngleGradientTraits>;
using CosSinGradient = Operator<CosSinGradientTraits>;
using SumOperators = OperatorList<AngleGradient, CosSinGradient>;

// Calls the operator through the dispatcher.
Rotation<at::Tensor> dispatch(const SumCall& call);

// Adds a term, either of which may be undefined.
void add(at::Tensor& sum, const at::Tensor& term);

// Applies `finish` to sums in ATen operators.
at::Tensor finish_decomposed(const Finish& finish, const at::Tensor& sums);
Rotation<at::Tensor> finish_decomposed(const Finish& finish, const Rotation<at::Tensor>& sums);

}  // namespace rope
