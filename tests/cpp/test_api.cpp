// The C++ functions of rope/rope.h: what they compute, what they refuse, and their derivatives.
#include <ATen/Context.h>
#include <ATen/core/DimVector.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <rope/rope.h>

#include <functional>
#include <map>
#include <string>
#include <type_traits>

#include "reference.h"

namespace {

using reference::is_rotated;
using reference::kFloatDtypes;
using reference::kPositionDtypes;
using reference::random_inv_freq;
using reference::random_positions;
using reference::random_values;
using reference::same_bits;

const char* const kOperators[] = {"apply",
                                  "apply_qk",
                                  "apply_",
                                  "apply_qk_",
                                  "apply_cos_sin",
                                  "apply_cos_sin_qk",
                                  "apply_cos_sin_",
                                  "apply_cos_sin_qk_",
                                  "norm_apply",
                                  "norm_apply_qk",
                                  "norm_apply_",
                                  "norm_apply_qk_",
                                  "norm_apply_cos_sin",
                                  "norm_apply_cos_sin_qk",
                                  "norm_apply_cos_sin_",
                                  "norm_apply_cos_sin_qk_"};

const c10::FunctionSchema& schema_of(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("rope::" + name).c_str(), "").schema();
}

// The members of the options, by their names in the schemas.
using Members = std::map<std::string, c10::IValue>;

template <typename Options>
Members members_for_positions(const Options& options) {
  return {{"inv_freq", options.inv_freq},
          {"embedding_axis", options.embedding_axis},
          {"rotary_dim", options.rotary_dim},
          {"rotary_offset", options.rotary_offset},
          {"max_wavelength", options.max_wavelength},
          {"scale_factor", options.scale_factor},
          {"attention_factor", options.attention_factor},
          {"interleaved", options.interleaved},
          {"conjugate", options.conjugate}};
}

template <typename Options>
Members members_for_tables(const Options& options) {
  return {{"positions", options.positions},     {"embedding_axis", options.embedding_axis},
          {"rotary_dim", options.rotary_dim},   {"rotary_offset", options.rotary_offset},
          {"interleaved", options.interleaved}, {"conjugate", options.conjugate},
          {"full_width", options.full_width}};
}

template <typename Options>
Members with_norm(Members members, const Options& options) {
  members.insert({{"eps", options.eps},
                  {"weight_offset", options.weight_offset},
                  {"norm_axes", options.norm_axes},
                  {"norm_last", options.norm_last}});
  return members;
}

// The arguments of a schema that have a default, and the default.
Members defaults(const c10::FunctionSchema& schema) {
  Members result;
  for (const c10::Argument& argument : schema.arguments()) {
    if (argument.default_value().has_value()) {
      result.emplace(argument.name(), *argument.default_value());
    }
  }
  return result;
}

TEST(Options, HaveTheMembersAndDefaultsOfTheSchemas) {
  for (const std::string name : kOperators) {
    SCOPED_TRACE(name);
    const bool uses_tables = name.find("cos_sin") != std::string::npos;
    Members expected = uses_tables ? members_for_tables(rope::CosSinOptions())
                                   : members_for_positions(rope::ApplyOptions());
    if (name.starts_with("norm_")) {
      const rope::NormOptions by_positions;
      const rope::NormCosSinOptions by_tables;
      expected = uses_tables ? with_norm(members_for_tables(by_tables), by_tables)
                             : with_norm(members_for_positions(by_positions), by_positions);
    }
    EXPECT_EQ(defaults(schema_of(name)), expected);
  }
}

TEST(Options, AreAggregates) {
  EXPECT_TRUE(std::is_aggregate_v<rope::ApplyOptions>);
  EXPECT_TRUE(std::is_aggregate_v<rope::CosSinOptions>);
  EXPECT_TRUE(std::is_aggregate_v<rope::NormOptions>);
  EXPECT_TRUE(std::is_aggregate_v<rope::NormCosSinOptions>);
}

TEST(Apply, RotatesEveryDtypeByPositionsOfEveryDtype) {
  for (const at::ScalarType dtype : kFloatDtypes) {
    for (const at::ScalarType positions_dtype : kPositionDtypes) {
      SCOPED_TRACE(c10::str(dtype, " by ", positions_dtype));
      const at::Tensor x = random_values({2, 7, 3, 32}, dtype);
      const at::Tensor positions = random_positions({7, 1}, positions_dtype);
      const at::Tensor y = rope::apply(x, positions);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_TRUE(is_rotated(y, reference::apply(x, positions)));
    }
  }
}

TEST(Apply, TakesEachOption) {
  const at::Tensor x = random_values({3, 40, 7});
  const at::Tensor positions = random_positions({7});
  const at::Tensor axes = random_positions({3, 3, 7});
  for (const rope::ApplyOptions& options :
       {rope::ApplyOptions{.embedding_axis = 1}, rope::ApplyOptions{.embedding_axis = -2},
        rope::ApplyOptions{.embedding_axis = 1, .rotary_dim = 16},
        rope::ApplyOptions{.embedding_axis = 1, .rotary_offset = 8},
        rope::ApplyOptions{.embedding_axis = 1, .rotary_dim = 16, .rotary_offset = 3},
        rope::ApplyOptions{.embedding_axis = 1, .max_wavelength = 5e5},
        rope::ApplyOptions{.embedding_axis = 1, .scale_factor = 4},
        rope::ApplyOptions{.embedding_axis = 1, .attention_factor = 1.5},
        rope::ApplyOptions{.embedding_axis = 1, .interleaved = true},
        rope::ApplyOptions{.embedding_axis = 1, .conjugate = true},
        rope::ApplyOptions{.inv_freq = random_inv_freq({12}), .embedding_axis = 1},
        rope::ApplyOptions{.inv_freq = random_inv_freq({12}, at::kDouble), .embedding_axis = 1}}) {
    EXPECT_TRUE(
        is_rotated(rope::apply(x, positions, options), reference::apply(x, positions, options)));
  }
  const rope::ApplyOptions of_axes = {.inv_freq = random_inv_freq({3, 12}), .embedding_axis = 1};
  EXPECT_TRUE(is_rotated(rope::apply(x, axes, of_axes), reference::apply(x, axes, of_axes)));
}

TEST(Apply, KeepsTheStridesOfATransposedInput) {
  const at::Tensor x = random_values({2, 3, 7, 32}).transpose(1, 2);
  const at::Tensor positions = random_positions({7, 1});
  const at::Tensor y = rope::apply(x, positions);
  EXPECT_EQ(y.strides(), x.strides());
  EXPECT_TRUE(is_rotated(y, reference::apply(x, positions)));
}

TEST(Apply, LeavesItsInputAlone) {
  const at::Tensor x = random_values({7, 32});
  const at::Tensor before = x.clone();
  rope::apply(x, random_positions({7}));
  EXPECT_TRUE(same_bits(x, before));
}

TEST(Apply, IsUndoneByItsConjugate) {
  const at::Tensor x = random_values({7, 32}, at::kDouble);
  const at::Tensor positions = random_positions({7});
  const at::Tensor back = rope::apply(rope::apply(x, positions), positions, {.conjugate = true});
  EXPECT_TRUE(at::allclose(back, x, 0, 1e-10));
}

TEST(Apply, RotatesEmptyTensorsAndByAScalarPosition) {
  EXPECT_EQ(rope::apply(at::empty({0, 32}), at::arange(0)).sizes(), at::IntArrayRef({0, 32}));
  EXPECT_EQ(rope::apply(at::empty({3, 0}), at::arange(3)).sizes(), at::IntArrayRef({3, 0}));
  const at::Tensor x = random_values({7, 32});
  EXPECT_TRUE(is_rotated(rope::apply(x, at::tensor(5)), reference::apply(x, at::tensor(5))));
}

TEST(Apply, KeepsNaNInItsOwnPair) {
  at::Tensor x = random_values({7, 32});
  x[2][3] = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor wrong = rope::apply(x, random_positions({7})).isnan();
  EXPECT_EQ(wrong.sum().item<int>(), 2);
  EXPECT_TRUE(wrong[2][3].item<bool>());
  EXPECT_TRUE(wrong[2][19].item<bool>());
}

TEST(Apply, WorksOnMetaTensors) {
  const at::Tensor x = at::empty({7, 32}, at::dtype(at::kHalf).device(at::kMeta));
  const at::Tensor y = rope::apply(x, at::empty({7}, at::dtype(at::kLong).device(at::kMeta)));
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), x.sizes());
  EXPECT_EQ(y.scalar_type(), at::kHalf);
}

TEST(ApplyQk, RotatesEachAsAlone) {
  const at::Tensor q = random_values({2, 7, 6, 32});
  const at::Tensor k = random_values({2, 7, 2, 32}, at::kFloat, 1);
  const at::Tensor positions = random_positions({7, 1});
  const rope::ApplyOptions options = {.inv_freq = random_inv_freq({12}), .attention_factor = 1.2};
  const auto [q_rotated, k_rotated] = rope::apply_qk(q, k, positions, options);
  EXPECT_TRUE(is_rotated(q_rotated, reference::apply(q, positions, options)));
  EXPECT_TRUE(same_bits(q_rotated, rope::apply(q, positions, options)));
  EXPECT_TRUE(same_bits(k_rotated, rope::apply(k, positions, options)));
}

TEST(ApplyQk, RotatesTensorsThatDiffer) {
  const at::Tensor positions = random_positions({7, 1});
  const at::Tensor q = random_values({2, 7, 6, 32});
  for (const at::Tensor& k :
       {random_values({7, 2, 32}, at::kHalf), random_values({3, 2, 7, 1, 32}, at::kDouble),
        random_values({2, 2, 7, 32}).transpose(1, 2), random_values({2, 7, 2, 64})}) {
    const rope::ApplyOptions options = {.rotary_dim = 32};
    const auto [q_rotated, k_rotated] = rope::apply_qk(q, k, positions, options);
    EXPECT_TRUE(same_bits(q_rotated, rope::apply(q, positions, options)));
    EXPECT_TRUE(same_bits(k_rotated, rope::apply(k, positions, options)));
  }
}

TEST(ApplyInPlace, RotatesWhatItIsGivenAndReturnsIt) {
  const at::Tensor x = random_values({7, 2, 32});
  const at::Tensor positions = random_positions({7, 1});
  const rope::ApplyOptions options = {.rotary_dim = 16, .rotary_offset = 5, .interleaved = true};
  const at::Tensor expected = rope::apply(x, positions, options);
  const at::Tensor returned = rope::apply_(x, positions, options);
  EXPECT_TRUE(returned.is_same(x));
  EXPECT_TRUE(same_bits(x, expected));
}

TEST(ApplyInPlace, RotatesAPairAndReturnsIt) {
  const at::Tensor packed = random_values({7, 3, 32});
  const at::Tensor before = packed.clone();
  const at::Tensor q = packed.select(1, 0);
  const at::Tensor k = packed.select(1, 1);
  const at::Tensor positions = random_positions({7});
  const auto [q_returned, k_returned] = rope::apply_qk_(q, k, positions);
  EXPECT_TRUE(q_returned.is_same(q));
  EXPECT_TRUE(k_returned.is_same(k));
  EXPECT_TRUE(same_bits(q, rope::apply(before.select(1, 0), positions)));
  EXPECT_TRUE(same_bits(k, rope::apply(before.select(1, 1), positions)));
  EXPECT_TRUE(same_bits(packed.select(1, 2), before.select(1, 2)));
}

TEST(ApplyCosSin, UsesTablesOfEveryDtype) {
  for (const at::ScalarType dtype : kFloatDtypes) {
    for (const at::ScalarType table : kFloatDtypes) {
      SCOPED_TRACE(c10::str(dtype, " by ", table));
      const at::Tensor x = random_values({2, 7, 3, 32}, dtype);
      const at::Tensor cos = random_values({7, 1, 16}, table, 1);
      const at::Tensor sin = random_values({7, 1, 16}, table, 2);
      EXPECT_TRUE(
          is_rotated(rope::apply_cos_sin(x, cos, sin), reference::apply_cos_sin(x, cos, sin)));
    }
  }
}

TEST(ApplyCosSin, TakesEachOption) {
  const at::Tensor x = random_values({3, 40, 7});
  const at::Tensor cos = random_values({7, 12}, at::kFloat, 1);
  const at::Tensor sin = random_values({7, 12}, at::kFloat, 2);
  const at::Tensor rows = random_positions({3, 7}, at::kInt, 0, 7);
  for (const rope::CosSinOptions& options :
       {rope::CosSinOptions{.embedding_axis = 1}, rope::CosSinOptions{.embedding_axis = -2},
        rope::CosSinOptions{.positions = rows, .embedding_axis = 1},
        rope::CosSinOptions{.embedding_axis = 1, .rotary_dim = 24, .rotary_offset = 5},
        rope::CosSinOptions{.embedding_axis = 1, .interleaved = true},
        rope::CosSinOptions{.embedding_axis = 1, .conjugate = true}}) {
    EXPECT_TRUE(is_rotated(rope::apply_cos_sin(x, cos, sin, options),
                           reference::apply_cos_sin(x, cos, sin, options)));
  }
}

TEST(ApplyCosSin, TakesFullWidthTables) {
  const at::Tensor x = random_values({3, 7, 24}, at::kDouble);
  const at::Tensor cos = random_values({7, 24}, at::kDouble, 1);
  const at::Tensor sin = random_values({7, 24}, at::kDouble, 2);
  const at::Tensor half = at::cat({-x.slice(2, 12), x.slice(2, 0, 12)}, 2);
  const rope::CosSinOptions options{.rotary_dim = 24, .full_width = true};
  EXPECT_TRUE(at::allclose(rope::apply_cos_sin(x, cos, sin, options), x * cos + half * sin));
  // The transpose: sines belong to the elements that they came from.
  const at::Tensor moved = x * sin;
  const at::Tensor transposed = at::cat({moved.slice(2, 12), -moved.slice(2, 0, 12)}, 2);
  EXPECT_TRUE(
      at::allclose(rope::apply_cos_sin(x, cos, sin, {.conjugate = true, .full_width = true}),
                   x * cos + transposed));
}

TEST(ApplyCosSin, RotatesPairsAndInPlaceAlike) {
  const at::Tensor q = random_values({7, 6, 32});
  const at::Tensor k = random_values({7, 2, 32}, at::kFloat, 1);
  const at::Tensor cos = random_values({9, 16}, at::kDouble, 2);
  const at::Tensor sin = random_values({9, 16}, at::kDouble, 3);
  const rope::CosSinOptions options = {.positions = random_positions({7, 1}, at::kLong, 0, 9)};
  const at::Tensor q_expected = rope::apply_cos_sin(q, cos, sin, options);
  const at::Tensor k_expected = rope::apply_cos_sin(k, cos, sin, options);
  EXPECT_TRUE(is_rotated(q_expected, reference::apply_cos_sin(q, cos, sin, options)));

  const auto [q_rotated, k_rotated] = rope::apply_cos_sin_qk(q, k, cos, sin, options);
  EXPECT_TRUE(same_bits(q_rotated, q_expected));
  EXPECT_TRUE(same_bits(k_rotated, k_expected));

  const at::Tensor x = q.clone();
  EXPECT_TRUE(rope::apply_cos_sin_(x, cos, sin, options).is_same(x));
  EXPECT_TRUE(same_bits(x, q_expected));

  const auto [q_returned, k_returned] = rope::apply_cos_sin_qk_(q, k, cos, sin, options);
  EXPECT_TRUE(q_returned.is_same(q));
  EXPECT_TRUE(k_returned.is_same(k));
  EXPECT_TRUE(same_bits(q, q_expected));
  EXPECT_TRUE(same_bits(k, k_expected));
}

TEST(NormApply, NormalizesAndRotatesEveryDtypeWithWeightsOfEveryDtype) {
  for (const at::ScalarType dtype : kFloatDtypes) {
    for (const at::ScalarType weight_dtype : kFloatDtypes) {
      SCOPED_TRACE(c10::str(dtype, " with a weight of ", weight_dtype));
      const at::Tensor x = random_values({2, 7, 3, 32}, dtype);
      const at::Tensor weight = random_values({32}, weight_dtype, 1);
      const at::Tensor positions = random_positions({7, 1});
      const at::Tensor y = rope::norm_apply(x, weight, positions);
      EXPECT_EQ(y.scalar_type(), dtype);
      EXPECT_TRUE(is_rotated(y, reference::norm_apply(x, weight, positions)));
    }
  }
}

TEST(NormApply, TakesEachOption) {
  const at::Tensor x = random_values({3, 40, 7});
  const at::Tensor weight = random_values({40}, at::kFloat, 1);
  const at::Tensor positions = random_positions({7});
  const at::Tensor axes = random_positions({3, 3, 7});
  for (const bool norm_last : {false, true}) {
    SCOPED_TRACE(norm_last);
    for (rope::NormOptions options :
         {rope::NormOptions{.embedding_axis = 1}, rope::NormOptions{.embedding_axis = -2},
          rope::NormOptions{.rotary_dim = 16}, rope::NormOptions{.rotary_offset = 8},
          rope::NormOptions{.rotary_dim = 16, .rotary_offset = 3},
          rope::NormOptions{.max_wavelength = 5e5}, rope::NormOptions{.scale_factor = 4},
          rope::NormOptions{.attention_factor = 1.5}, rope::NormOptions{.interleaved = true},
          rope::NormOptions{.conjugate = true}, rope::NormOptions{.eps = 0.3},
          rope::NormOptions{.eps = 0}, rope::NormOptions{.weight_offset = 1},
          rope::NormOptions{.norm_axes = {{1}}}, rope::NormOptions{.norm_axes = {{-2, 2}}},
          rope::NormOptions{.norm_axes = {{0, 1, 2}}},
          rope::NormOptions{.inv_freq = random_inv_freq({12})},
          rope::NormOptions{.inv_freq = random_inv_freq({12}, at::kDouble)}}) {
      options.embedding_axis = options.embedding_axis == -2 ? -2 : 1;
      options.norm_last = norm_last;
      for (const std::optional<at::Tensor>& used : {std::optional(weight), {}}) {
        EXPECT_TRUE(is_rotated(rope::norm_apply(x, used, positions, options),
                               reference::norm_apply(x, used, positions, options)));
      }
    }
    const rope::NormOptions of_axes = {
        .inv_freq = random_inv_freq({3, 12}), .embedding_axis = 1, .norm_last = norm_last};
    EXPECT_TRUE(is_rotated(rope::norm_apply(x, weight, axes, of_axes),
                           reference::norm_apply(x, weight, axes, of_axes)));
  }
}

TEST(NormApply, TakesWeightsThatBroadcast) {
  const at::Tensor x = random_values({2, 7, 3, 32});
  const at::Tensor positions = random_positions({7, 1});
  for (const at::Tensor& weight :
       {random_values({3, 32}), random_values({7, 1, 32}), random_values({2, 7, 3, 32}),
        random_values({32, 3}).t(), random_values({1}).expand({32})}) {
    EXPECT_TRUE(is_rotated(rope::norm_apply(x, weight, positions),
                           reference::norm_apply(x, weight, positions)));
  }
}

TEST(NormApply, NormalizesOverAllHeads) {
  const at::Tensor x = random_values({2, 7, 3, 32});
  const at::Tensor weight = random_values({3, 32}, at::kFloat, 1);
  const at::Tensor positions = random_positions({7, 1});
  const at::Tensor y = rope::norm_apply(x, weight, positions, {.norm_axes = {{-2, -1}}});
  const at::Tensor flat = x.flatten(2).to(at::kDouble);
  const at::Tensor normalized =
      flat / (flat.square().mean(-1, true) + 1e-6).sqrt() * weight.flatten();
  const at::Tensor expected = rope::apply(normalized.view_as(x), positions);
  EXPECT_TRUE(at::allclose(y.to(at::kDouble), expected, 0, 1e-5));
}

TEST(NormApply, OfNoRotationIsANorm) {
  const at::Tensor x = random_values({7, 32}, at::kDouble);
  const at::Tensor weight = random_values({32}, at::kDouble, 1);
  const at::Tensor y = rope::norm_apply(x, weight, at::tensor(3), {.rotary_dim = 0, .eps = 0.1});
  EXPECT_TRUE(at::allclose(y, at::rms_norm(x, {32}, weight, 0.1), 0, 1e-13));
}

TEST(NormApply, KeepsTheStridesOfATransposedInputAndLeavesItAlone) {
  const at::Tensor x = random_values({2, 3, 7, 32}).transpose(1, 2);
  const at::Tensor before = x.clone();
  const at::Tensor y = rope::norm_apply(x, std::nullopt, random_positions({7, 1}));
  EXPECT_EQ(y.strides(), x.strides());
  EXPECT_TRUE(same_bits(x, before));
}

TEST(NormApply, TakesEmptyTensorsAndAScalarPosition) {
  const at::Tensor weight = at::ones({32});
  EXPECT_EQ(rope::norm_apply(at::empty({0, 32}), weight, at::arange(0)).sizes(),
            at::IntArrayRef({0, 32}));
  EXPECT_EQ(rope::norm_apply(at::empty({3, 0}), at::empty({0}), at::arange(3)).sizes(),
            at::IntArrayRef({3, 0}));
  const at::Tensor x = random_values({7, 32});
  EXPECT_TRUE(is_rotated(rope::norm_apply(x, weight, at::tensor(5)),
                         reference::norm_apply(x, weight, at::tensor(5))));
}

TEST(NormApply, KeepsNaNInItsOwnMean) {
  at::Tensor x = random_values({7, 32});
  x[2][3] = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor wrong = rope::norm_apply(x, std::nullopt, random_positions({7})).isnan();
  EXPECT_TRUE(wrong[2].all().item<bool>());
  EXPECT_EQ(wrong.sum().item<int>(), 32);
}

TEST(NormApply, WorksOnMetaTensors) {
  const auto meta = [](at::IntArrayRef sizes, at::ScalarType dtype) {
    return at::empty(sizes, at::dtype(dtype).device(at::kMeta));
  };
  const at::Tensor y =
      rope::norm_apply(meta({7, 32}, at::kHalf), meta({32}, at::kFloat), meta({7}, at::kLong));
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), at::IntArrayRef({7, 32}));
  EXPECT_EQ(y.scalar_type(), at::kHalf);
}

TEST(NormApplyQk, TreatsEachAsAlone) {
  const at::Tensor q = random_values({2, 7, 6, 32});
  const at::Tensor positions = random_positions({7, 1});
  const at::Tensor q_weight = random_values({32}, at::kFloat, 2);
  for (const at::Tensor& k :
       {random_values({2, 7, 2, 32}, at::kFloat, 1), random_values({7, 2, 32}, at::kHalf, 1),
        random_values({2, 2, 7, 32}).transpose(1, 2)}) {
    for (const std::optional<at::Tensor>& k_weight :
         {std::optional(random_values({2, 32}, at::kDouble, 3)), {}}) {
      const rope::NormOptions options = {.inv_freq = random_inv_freq({12}), .weight_offset = 1};
      const auto [q_result, k_result] =
          rope::norm_apply_qk(q, k, q_weight, k_weight, positions, options);
      EXPECT_TRUE(is_rotated(q_result, reference::norm_apply(q, q_weight, positions, options)));
      EXPECT_TRUE(is_rotated(k_result, reference::norm_apply(k, k_weight, positions, options)));
      EXPECT_TRUE(same_bits(q_result, rope::norm_apply(q, q_weight, positions, options)));
      EXPECT_TRUE(same_bits(k_result, rope::norm_apply(k, k_weight, positions, options)));
    }
  }
}

TEST(NormApplyInPlace, WritesWhatItIsGivenAndReturnsIt) {
  const at::Tensor packed = random_values({7, 3, 32});
  const at::Tensor before = packed.clone();
  const at::Tensor q = packed.select(1, 0);
  const at::Tensor k = packed.select(1, 1);
  const at::Tensor weight = random_values({32}, at::kFloat, 1);
  const at::Tensor positions = random_positions({7});
  const rope::NormOptions options = {.rotary_dim = 16, .rotary_offset = 5, .norm_last = true};
  const at::Tensor q_expected = rope::norm_apply(q, weight, positions, options);
  const at::Tensor k_expected = rope::norm_apply(k, std::nullopt, positions, options);

  const auto [q_returned, k_returned] =
      rope::norm_apply_qk_(q, k, weight, std::nullopt, positions, options);
  EXPECT_TRUE(q_returned.is_same(q));
  EXPECT_TRUE(k_returned.is_same(k));
  EXPECT_TRUE(same_bits(q, q_expected));
  EXPECT_TRUE(same_bits(k, k_expected));
  EXPECT_TRUE(same_bits(packed.select(1, 2), before.select(1, 2)));

  const at::Tensor x = before.select(1, 0).clone();
  EXPECT_TRUE(rope::norm_apply_(x, weight, positions, options).is_same(x));
  EXPECT_TRUE(same_bits(x, q_expected));
}

TEST(NormApplyCosSin, TakesEachOption) {
  const at::Tensor x = random_values({3, 40, 7});
  const at::Tensor weight = random_values({7, 40}, at::kFloat, 3);
  const at::Tensor cos = random_values({7, 12}, at::kFloat, 1);
  const at::Tensor sin = random_values({7, 12}, at::kFloat, 2);
  const at::Tensor rows = random_positions({3, 7}, at::kInt, 0, 7);
  for (const bool norm_last : {false, true}) {
    SCOPED_TRACE(norm_last);
    for (rope::NormCosSinOptions options :
         {rope::NormCosSinOptions{}, rope::NormCosSinOptions{.positions = rows},
          rope::NormCosSinOptions{.rotary_dim = 24, .rotary_offset = 5},
          rope::NormCosSinOptions{.interleaved = true}, rope::NormCosSinOptions{.conjugate = true},
          rope::NormCosSinOptions{.full_width = true}, rope::NormCosSinOptions{.eps = 0.3},
          rope::NormCosSinOptions{.weight_offset = -2},
          rope::NormCosSinOptions{.norm_axes = {{0, -2}}}}) {
      options.embedding_axis = 1;
      options.norm_last = norm_last;
      EXPECT_TRUE(is_rotated(rope::norm_apply_cos_sin(x, weight, cos, sin, options),
                             reference::norm_apply_cos_sin(x, weight, cos, sin, options)));
    }
  }
}

TEST(NormApplyCosSin, TreatsPairsAndInPlaceAlike) {
  const at::Tensor q = random_values({7, 6, 32});
  const at::Tensor k = random_values({7, 2, 32}, at::kFloat, 1);
  const at::Tensor k_weight = random_values({2, 32}, at::kFloat, 4);
  const at::Tensor cos = random_values({9, 16}, at::kDouble, 2);
  const at::Tensor sin = random_values({9, 16}, at::kDouble, 3);
  const rope::NormCosSinOptions options = {.positions = random_positions({7, 1}, at::kLong, 0, 9)};
  const at::Tensor q_expected = rope::norm_apply_cos_sin(q, std::nullopt, cos, sin, options);
  const at::Tensor k_expected = rope::norm_apply_cos_sin(k, k_weight, cos, sin, options);
  EXPECT_TRUE(
      is_rotated(q_expected, reference::norm_apply_cos_sin(q, std::nullopt, cos, sin, options)));

  const auto [q_result, k_result] =
      rope::norm_apply_cos_sin_qk(q, k, std::nullopt, k_weight, cos, sin, options);
  EXPECT_TRUE(same_bits(q_result, q_expected));
  EXPECT_TRUE(same_bits(k_result, k_expected));

  const at::Tensor x = q.clone();
  EXPECT_TRUE(rope::norm_apply_cos_sin_(x, std::nullopt, cos, sin, options).is_same(x));
  EXPECT_TRUE(same_bits(x, q_expected));

  const auto [q_returned, k_returned] =
      rope::norm_apply_cos_sin_qk_(q, k, std::nullopt, k_weight, cos, sin, options);
  EXPECT_TRUE(q_returned.is_same(q));
  EXPECT_TRUE(k_returned.is_same(k));
  EXPECT_TRUE(same_bits(q, q_expected));
  EXPECT_TRUE(same_bits(k, k_expected));
}

// Expects a call to throw exactly this message, as exactly this type.
template <typename Error>
void expect_error(const std::function<void()>& call, const std::string& message) {
  try {
    call();
    ADD_FAILURE() << "nothing was thrown instead of: " << message;
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what_without_backtrace()), message);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an error of another kind than expected: " << error.what();
  }
}

TEST(Errors, OfValuesAreValueErrors) {
  const at::Tensor x = at::ones({2, 7, 3, 16});
  const at::Tensor positions = at::arange(7).unsqueeze(1);
  const auto expect = [&](const rope::ApplyOptions& options, const std::string& message) {
    expect_error<c10::ValueError>([&] { rope::apply(x, positions, options); },
                                  "rope::apply(): expected " + message);
  };
  expect({.rotary_dim = 7}, "rotary_dim to be even, but got 7");
  expect({.rotary_dim = -2}, "rotary_dim to be at least 0, but got -2");
  expect({.rotary_dim = 12, .rotary_offset = 8},
         "rotary_dim to be at most 8, the elements of x from rotary_offset on, but got 12");
  expect({.rotary_offset = -1}, "rotary_offset to be at least 0, but got -1");
  expect({.max_wavelength = 0}, "max_wavelength to be positive and finite, but got 0");
  expect({.scale_factor = -1}, "scale_factor to be positive and finite, but got -1");
  expect({.inv_freq = at::ones({8}), .scale_factor = 2},
         "scale_factor to be left at its default together with inv_freq, but got 2");
  expect({.inv_freq = at::ones({2, 2, 2})},
         "inv_freq to have shape (N) or (A, N), but got [2, 2, 2]");
  expect_error<c10::ValueError>([&] { rope::apply(x, at::arange(5)); },
                                "rope::apply(): expected positions to be broadcastable with the "
                                "shape of x without embedding_axis, [2, 7, 3], but got [5]");
}

TEST(Errors, OfDtypesAreTypeErrors) {
  const at::Tensor x = at::ones({7, 16});
  expect_error<c10::TypeError>(
      [&] { rope::apply(x.to(at::kLong), at::arange(7)); },
      "rope::apply(): expected x to be float64, float32, float16 or bfloat16, but got int64");
  expect_error<c10::TypeError>(
      [&] { rope::apply(x, at::arange(7).to(at::kHalf)); },
      "rope::apply(): expected positions to be int32, int64, float32 or float64 (float16 loses "
      "integers above 2048), but got float16");
  expect_error<c10::TypeError>(
      [&] { rope::apply_cos_sin(x, at::ones({7, 8}), at::ones({7, 8}, at::kDouble)); },
      "rope::apply_cos_sin(): expected sin to have the dtype of cos, float32, but got float64");
}

TEST(Errors, OfIndicesAreIndexErrors) {
  const at::Tensor x = at::ones({7, 16});
  expect_error<c10::IndexError>(
      [&] { rope::apply(x, at::arange(7), {.embedding_axis = 2}); },
      "rope::apply(): expected embedding_axis to be in [-2, 1] for the dimensions of x, but got 2");
  for (const std::int64_t row : {-1, 5}) {
    expect_error<c10::IndexError>(
        [&] {
          rope::apply_cos_sin(x, at::ones({5, 8}), at::ones({5, 8}),
                              {.positions = at::full({7}, row, at::kLong)});
        },
        "rope::apply_cos_sin(): expected positions to be in [0, 5), the rows of cos and sin, but "
        "got " +
            std::to_string(row));
  }
}

TEST(Errors, OfCallsInPlaceAreFoundBeforeAnythingIsWritten) {
  const at::Tensor x = random_values({7, 16});
  const at::Tensor before = x.clone();
  const at::Tensor expanded = at::ones({1, 16}).expand({7, 16});
  expect_error<c10::ValueError>([&] { rope::apply_(expanded, at::arange(7)); },
                                "rope::apply_(): expected x to have each element at its own place "
                                "in memory, but got sizes [7, 16] with strides [0, 1]");
  EXPECT_THROW(rope::apply_qk_(x, x, at::arange(7)), c10::ValueError);
  EXPECT_THROW(rope::apply_qk_(x, at::ones({7, 15}), at::arange(7)), c10::ValueError);
  EXPECT_TRUE(same_bits(x, before));
}

TEST(Errors, NameTheOperatorAndTheArgumentOfAPair) {
  expect_error<c10::ValueError>(
      [&] { rope::apply_qk(at::ones({7, 16}), at::ones({5, 16}), at::arange(7)); },
      "rope::apply_qk(): expected positions to be broadcastable with the shape of k without "
      "embedding_axis, [5], but got [7]");
}

TEST(Errors, TellThatATensorIsMissing) {
  const at::Tensor none;
  const at::Tensor x = at::ones({7, 16});
  const at::Tensor table = at::ones({7, 8});
  const auto expect = [](const std::function<void()>& call, const std::string& where) {
    expect_error<c10::TypeError>(call, where + " to be a tensor, but got none");
  };
  expect([&] { rope::apply(none, at::arange(7)); }, "rope::apply(): expected x");
  expect([&] { rope::apply(x, none); }, "rope::apply(): expected positions");
  expect([&] { rope::apply_qk(none, x, at::arange(7)); }, "rope::apply_qk(): expected q");
  expect([&] { rope::apply_qk(x, none, at::arange(7)); }, "rope::apply_qk(): expected k");
  expect([&] { rope::apply_(none, at::arange(7)); }, "rope::apply_(): expected x");
  expect([&] { rope::apply_cos_sin(x, none, table); }, "rope::apply_cos_sin(): expected cos");
  expect([&] { rope::apply_cos_sin(x, table, none); }, "rope::apply_cos_sin(): expected sin");
  // Without a defined tensor the dispatcher has no key to dispatch on.
  expect([&] { rope::apply(none, none); }, "rope::apply(): expected x");
  expect([&] { rope::apply_cos_sin_qk_(none, none, none, none); },
         "rope::apply_cos_sin_qk_(): expected q");
}

// Sizes and strides whose product overflows, as no storage has them.
TEST(Errors, OfElementsBeyondAnyStorage) {
  const at::Tensor positions = at::arange(1);
  for (const std::int64_t stride : {std::int64_t{1} << 61, std::int64_t{1} << 62}) {
    const at::Tensor x = at::ones({8}).as_strided({4, 2}, {2, 1});
    x.unsafeGetTensorImpl()->set_sizes_and_strides(at::DimVector({5, 2}),
                                                   at::DimVector({stride, 1}));
    EXPECT_THROW(rope::apply(x, positions), c10::ValueError);
    EXPECT_THROW(rope::apply_(x, positions), c10::ValueError);
  }
}

TEST(Errors, OfNormsNameWhatIsWrong) {
  const at::Tensor x = at::ones({2, 7, 3, 16});
  const at::Tensor weight = at::ones({16});
  const at::Tensor positions = at::arange(7).unsqueeze(1);
  const auto expect = [&](const rope::NormOptions& options, const std::string& message) {
    expect_error<c10::ValueError>([&] { rope::norm_apply(x, weight, positions, options); },
                                  "rope::norm_apply(): expected " + message);
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  expect({.eps = -1}, "eps to be at least 0 and finite, but got -1");
  expect({.eps = kInfinity}, "eps to be at least 0 and finite, but got inf");
  expect({.weight_offset = -kInfinity}, "weight_offset to be finite, but got -inf");
  expect({.norm_axes = std::vector<std::int64_t>()},
         "norm_axes to contain embedding_axis, -1, but got []");
  expect({.norm_axes = {{-2}}}, "norm_axes to contain embedding_axis, -1, but got [-2]");
  expect({.norm_axes = {{-1, 3}}}, "norm_axes to be distinct dimensions of x, but got [-1, 3]");
  // The rules of the rotation, under the name of this operator.
  expect({.rotary_dim = 7}, "rotary_dim to be even, but got 7");
  expect_error<c10::IndexError>(
      [&] { rope::norm_apply(x, weight, positions, {.norm_axes = {{-1, 4}}}); },
      "rope::norm_apply(): expected norm_axes to be in [-4, 3] for the dimensions of x, but got "
      "[-1, 4]");
}

TEST(Errors, OfWeightsNameTheOperatorAndTheWeight) {
  const at::Tensor q = at::ones({2, 7, 3, 16});
  const at::Tensor k = at::ones({7, 1, 16});
  const at::Tensor weight = at::ones({16});
  const at::Tensor positions = at::arange(7).unsqueeze(1);
  expect_error<c10::ValueError>(
      [&] { rope::norm_apply(q, at::ones({8}), positions); },
      "rope::norm_apply(): expected weight to have a last dimension of size 16, that of x along "
      "embedding_axis, but got [8]");
  expect_error<c10::ValueError>(
      [&] { rope::norm_apply_qk(q, k, weight, at::ones({3, 16}), positions); },
      "rope::norm_apply_qk(): expected k_weight to be broadcastable, without the last dimension, "
      "with [7, 1], the shape of k without embedding_axis, but got [3, 16]");
  expect_error<c10::TypeError>(
      [&] { rope::norm_apply_qk_(q, k, at::ones({16}, at::kInt), weight, positions); },
      "rope::norm_apply_qk_(): expected q_weight to be float64, float32, float16 or bfloat16, but "
      "got int32");
  const at::Tensor table = at::ones({7, 1, 8});
  const at::Tensor elsewhere = at::ones({16}, at::kMeta);
  expect_error<c10::TypeError>(
      [&] { rope::norm_apply_cos_sin_(q, elsewhere, table, table); },
      "rope::norm_apply_cos_sin_(): expected weight to be on cpu with x, but got a tensor on "
      "meta");
  EXPECT_TRUE(at::equal(q, at::ones_like(q)));
}

TEST(Autograd, TheGradientOfXIsTheConjugateRotation) {
  const at::Tensor x = random_values({7, 2, 32}).requires_grad_();
  const at::Tensor positions = random_positions({7, 1});
  const at::Tensor gradient = random_values({7, 2, 32}, at::kFloat, 1);
  const rope::ApplyOptions options = {.rotary_dim = 16, .attention_factor = 1.3};
  rope::apply(x, positions, options).backward(gradient);
  rope::ApplyOptions conjugate = options;
  conjugate.conjugate = true;
  EXPECT_TRUE(same_bits(x.grad(), rope::apply(gradient, positions, conjugate)));
}

TEST(Autograd, TheGradientsOfAPairAreThoseOfEach) {
  const at::Tensor q = random_values({7, 6, 32}).requires_grad_();
  const at::Tensor k = random_values({7, 2, 32}, at::kFloat, 1).requires_grad_();
  const at::Tensor positions = random_positions({7, 1});
  const auto [q_rotated, k_rotated] = rope::apply_qk(q, k, positions);
  (q_rotated.sum() + 2 * k_rotated.sum()).backward();
  const rope::ApplyOptions conjugate = {.conjugate = true};
  EXPECT_TRUE(same_bits(q.grad(), rope::apply(at::ones_like(q), positions, conjugate)));
  EXPECT_TRUE(same_bits(k.grad(), rope::apply(at::full_like(k, 2), positions, conjugate)));
}

TEST(Autograd, GivesTheGradientsOfWhatMakesTheAngle) {
  const at::Tensor x = random_values({7, 32}, at::kDouble);
  const at::Tensor weight = random_values({7, 32}, at::kDouble, 1);
  const at::Tensor positions = random_positions({7}, at::kDouble, -9, 9).requires_grad_();
  const at::Tensor inv_freq = random_inv_freq({16}, at::kDouble).requires_grad_();
  (rope::apply(x, positions, {.inv_freq = inv_freq}) * weight).sum().backward();

  const at::Tensor plain_positions = positions.detach().clone().requires_grad_();
  const at::Tensor plain_inv_freq = inv_freq.detach().clone().requires_grad_();
  const at::Tensor angle = plain_positions.unsqueeze(-1) * plain_inv_freq;
  const at::Tensor a = x.slice(-1, 0, 16);
  const at::Tensor b = x.slice(-1, 16, 32);
  const at::Tensor plain =
      at::cat({a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()}, -1);
  (plain * weight).sum().backward();
  EXPECT_TRUE(at::allclose(positions.grad(), plain_positions.grad(), 1e-9, 1e-9));
  EXPECT_TRUE(at::allclose(inv_freq.grad(), plain_inv_freq.grad(), 1e-9, 1e-9));
}

TEST(Autograd, GivesTheGradientsOfTables) {
  const at::Tensor x = random_values({7, 2, 32}, at::kDouble);
  const at::Tensor cos = random_values({7, 1, 16}, at::kDouble, 1).requires_grad_();
  const at::Tensor sin = random_values({7, 1, 16}, at::kDouble, 2).requires_grad_();
  rope::apply_cos_sin(x, cos, sin).sum().backward();
  const at::Tensor a = x.slice(-1, 0, 16);
  const at::Tensor b = x.slice(-1, 16, 32);
  EXPECT_TRUE(at::allclose(cos.grad(), (a + b).sum(1, true)));
  EXPECT_TRUE(at::allclose(sin.grad(), (a - b).sum(1, true)));
}

// The norm and the rotation in plain operators, of pairs in halves.
at::Tensor plainly(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& angle) {
  const at::Tensor y = x / (x.square().mean(-1, true) + 1e-6).sqrt() * (1 + weight);
  const std::vector<at::Tensor> halves = y.chunk(2, -1);
  return at::cat({halves[0] * angle.cos() - halves[1] * angle.sin(),
                  halves[1] * angle.cos() + halves[0] * angle.sin()},
                 -1);
}

TEST(Autograd, GivesTheGradientsOfNormsAndWeightsAndAngles) {
  const auto leaves = [] {
    return std::vector{random_values({7, 3, 32}, at::kDouble).requires_grad_(),
                       random_values({7, 2, 32}, at::kDouble, 1).requires_grad_(),
                       random_values({32}, at::kDouble, 2).requires_grad_(),
                       random_values({2, 32}, at::kDouble, 3).requires_grad_(),
                       random_inv_freq({16}, at::kDouble).requires_grad_()};
  };
  const at::Tensor positions = random_positions({7, 1}, at::kDouble, -9, 9);
  const at::Tensor q_gradient = random_values({7, 3, 32}, at::kDouble, 4);
  const at::Tensor k_gradient = random_values({7, 2, 32}, at::kDouble, 5);

  const std::vector<at::Tensor> ours = leaves();
  const auto [q, k] = rope::norm_apply_qk(ours[0], ours[1], ours[2], ours[3], positions,
                                          {.inv_freq = ours[4], .weight_offset = 1});
  ((q * q_gradient).sum() + (k * k_gradient).sum()).backward();

  const std::vector<at::Tensor> plain = leaves();
  const at::Tensor angle = positions.unsqueeze(-1) * plain[4];
  ((plainly(plain[0], plain[2], angle) * q_gradient).sum() +
   (plainly(plain[1], plain[3], angle) * k_gradient).sum())
      .backward();
  for (std::size_t i = 0; i < ours.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(ours[i].grad().sizes(), ours[i].sizes());
    EXPECT_TRUE(at::allclose(ours[i].grad(), plain[i].grad(), 1e-9, 1e-9));
  }
}

TEST(Autograd, GivesOnlyTheGradientsThatAreWanted) {
  const at::Tensor x = random_values({7, 32}, at::kDouble);
  const at::Tensor weight = random_values({32}, at::kDouble, 1).requires_grad_();
  rope::norm_apply(x, weight, random_positions({7})).sum().backward();
  EXPECT_TRUE(weight.grad().defined());
  EXPECT_FALSE(x.grad().defined());
}

TEST(Autograd, FollowsANormInPlace) {
  const at::Tensor positions = random_positions({7});
  std::vector<at::Tensor> gradients;
  for (const bool in_place : {false, true}) {
    const at::Tensor x = random_values({7, 32}).requires_grad_();
    const at::Tensor weight = random_values({32}, at::kFloat, 1).requires_grad_();
    const at::Tensor y = x * 3;
    const at::Tensor z =
        in_place ? rope::norm_apply_(y, weight, positions) : rope::norm_apply(y, weight, positions);
    (z * random_values({7, 32}, at::kFloat, 2)).sum().backward();
    gradients.insert(gradients.end(), {x.grad(), weight.grad()});
  }
  EXPECT_TRUE(same_bits(gradients[2], gradients[0]));
  EXPECT_TRUE(same_bits(gradients[3], gradients[1]));
  const at::Tensor leaf = random_values({7, 32}).requires_grad_();
  EXPECT_THROW(rope::norm_apply_(leaf, std::nullopt, positions), c10::Error);
}

TEST(Autograd, FollowsARotationInPlace) {
  const at::Tensor x = random_values({7, 32}).requires_grad_();
  const at::Tensor positions = random_positions({7});
  const at::Tensor y = x * 3;
  rope::apply_(y, positions);
  y.sum().backward();
  const at::Tensor conjugate = rope::apply(at::ones_like(x), positions, {.conjugate = true});
  EXPECT_TRUE(at::allclose(x.grad(), 3 * conjugate));
}

TEST(Autograd, RefusesALeafInPlace) {
  const at::Tensor x = random_values({7, 32}).requires_grad_();
  EXPECT_THROW(rope::apply_(x, random_positions({7})), c10::Error);
}

TEST(Cuda, GivesWhatTheContractAsksForOrSaysHowToGetIt) {
  if (!at::hasCUDA()) {
    GTEST_SKIP() << "no CUDA device here";
  }
  for (const at::ScalarType dtype : kFloatDtypes) {
    const at::Tensor x = random_values({2, 7, 3, 32}, dtype);
    const at::Tensor positions = random_positions({7, 1});
    try {
      const at::Tensor y = rope::apply(x.to(at::kCUDA), positions.to(at::kCUDA));
      EXPECT_TRUE(is_rotated(y, reference::apply(x, positions)));
    } catch (const c10::NotImplementedError& error) {
      EXPECT_NE(error.msg().find("built without CUDA"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
