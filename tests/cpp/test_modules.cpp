// Frequencies and layers from C++. tests/test_frequencies.py tests the values: Python calls the
// same functions.
#include <gtest/gtest.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/functional.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <barrier>
#include <cmath>
#include <sstream>
#include <thread>

#include "reference.h"
#include "rope/frequencies.h"
#include "rope/modules.h"

namespace {

using reference::is_rotated;
using reference::random_inv_freq;
using reference::random_values;
using reference::same_bits;
using rope::ApplyRoPE;
using rope::FrequencyOptions;
using rope::QKNormRotaryEmbedding;
using rope::QKNormRotaryEmbeddingOptions;
using rope::RotaryEmbedding;
using rope::RotaryEmbeddingOptions;
using rope::WithSideInputsFromInputTuple;

const FrequencyOptions kLinear = {.rope_type = "linear", .rope_theta = 1e4, .factor = 2.0};
const FrequencyOptions kDynamic = {
    .rope_type = "dynamic", .rope_theta = 1e4, .factor = 2.0, .max_position_embeddings = 64};
const FrequencyOptions kLongrope = {.rope_type = "longrope",
                                    .rope_theta = 1e4,
                                    .factor = 4.0,
                                    .original_max_position_embeddings = 64,
                                    .short_factor = std::vector<double>(16, 1.5),
                                    .long_factor = std::vector<double>(16, 5.0)};

at::Tensor inv_freq_of(FrequencyOptions scheme, std::optional<std::int64_t> seq_len = {}) {
  scheme.rotary_dim = 32;
  scheme.seq_len = seq_len;
  return rope::frequencies(scheme).inv_freq;
}

at::Tensor positions_from(std::int64_t first) { return at::arange(first, first + 9).unsqueeze(-1); }

testing::AssertionResult same_pair(const std::tuple<at::Tensor, at::Tensor>& actual,
                                   const std::tuple<at::Tensor, at::Tensor>& expected) {
  const auto of_q = same_bits(std::get<0>(actual), std::get<0>(expected));
  return of_q ? same_bits(std::get<1>(actual), std::get<1>(expected)) : of_q;
}

// Expects the statement to throw, with a message that has the text.
#define EXPECT_THROW_WITH(statement, type, text)                                        \
  try {                                                                                 \
    statement;                                                                          \
    FAIL() << "nothing was thrown";                                                     \
  } catch (const type& error) {                                                         \
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what(); \
  }

TEST(Frequencies, OptionsAreAggregates) {
  EXPECT_TRUE(std::is_aggregate_v<FrequencyOptions>);
  EXPECT_TRUE(std::is_aggregate_v<RotaryEmbeddingOptions>);
  EXPECT_TRUE(std::is_aggregate_v<rope::ApplyRoPEOptions>);
  EXPECT_TRUE(std::is_aggregate_v<QKNormRotaryEmbeddingOptions>);
}

TEST(Frequencies, AreThoseOfTheFormula) {
  const auto [inv_freq, attention_factor] =
      rope::frequencies({.rotary_dim = 64, .rope_theta = 5e5, .dtype = at::kDouble});
  ASSERT_EQ(inv_freq.sizes(), at::IntArrayRef({32}));
  for (int n = 0; n < 32; ++n) {
    const double expected = std::pow(5e5, -2.0 * n / 64);
    EXPECT_NEAR(inv_freq[n].item<double>(), expected, expected * 0x1p-48);
  }
  EXPECT_EQ(attention_factor, 1.0);
  EXPECT_TRUE(same_bits(inv_freq_of(kLinear), inv_freq_of({.rope_theta = 1e4}) / 2));
}

TEST(Frequencies, RefuseWhatIsMissingOrUnknown) {
  EXPECT_THROW_WITH(rope::frequencies({.rotary_dim = 64}), c10::ValueError,
                    "rope::frequencies(): expected rope_theta to be given for rope_type default");
  EXPECT_THROW_WITH(rope::frequencies({.rotary_dim = 64, .rope_type = "ntk", .rope_theta = 1e4}),
                    c10::ValueError,
                    "expected rope_type to be one of default, linear, dynamic, yarn");
}

TEST(Frequencies, RefuseNumbersThatGiveNone) {
  FrequencyOptions yarn = {.rotary_dim = 64,
                           .rope_type = "yarn",
                           .rope_theta = 1e4,
                           .factor = 2.0,
                           .original_max_position_embeddings = 64,
                           .attention_factor = std::nan("")};
  EXPECT_THROW_WITH(rope::frequencies(yarn), c10::ValueError,
                    "rope::frequencies(): expected attention_factor to be finite, but got nan");
  yarn.attention_factor = std::nullopt;
  yarn.beta_fast = -1.0;
  EXPECT_THROW_WITH(rope::frequencies(yarn), c10::ValueError,
                    "expected beta_fast to be positive and finite, but got -1");
  EXPECT_THROW_WITH(rope::frequencies({.rotary_dim = 64, .rope_theta = 1e4, .seq_len = -1}),
                    c10::ValueError, "expected seq_len to be at least 0, but got -1");
  EXPECT_THROW_WITH(rope::frequencies({.rotary_dim = 64, .rope_theta = 1e4, .dtype = at::kHalf}),
                    c10::TypeError, "expected dtype to be float32 or float64, but got float16");
  EXPECT_THROW_WITH(rope::mrope_frequencies(at::ones(4, at::kInt), {2, 2}), c10::TypeError,
                    "expected inv_freq to be float32 or float64, but got int32");
}

TEST(Frequencies, OfSeveralAxesHaveARowForEach) {
  EXPECT_EQ(rope::axial_frequencies({16, 24, 24}).sizes(), at::IntArrayRef({3, 32}));
  EXPECT_TRUE(same_bits(rope::mrope_frequencies(at::ones(32), {16, 8, 8}, true).sum(1),
                        at::tensor({16.f, 8.f, 8.f})));
  EXPECT_EQ(rope::mixed_frequencies(32, {.num_heads = 4}).sizes(), at::IntArrayRef({2, 64}));
}

TEST(RotaryEmbedding, RotatesAPairAndOneTensorByItsFrequencies) {
  const at::Tensor q = random_values({2, 9, 4, 40});
  const at::Tensor k = random_values({2, 9, 2, 40}, at::kFloat, 1);
  const at::Tensor positions = positions_from(100);
  RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                    .attention_factor = 1.5,
                                                    .rotary_offset = 5,
                                                    .interleaved = true});
  const rope::ApplyOptions options = {.inv_freq = inv_freq_of(kLinear),
                                      .rotary_offset = 5,
                                      .attention_factor = 1.5,
                                      .interleaved = true};
  EXPECT_TRUE(same_pair(rotary(q, k, positions), rope::apply_qk(q, k, positions, options)));
  EXPECT_TRUE(is_rotated(rotary(q, positions), reference::apply(q, positions, options)));
}

TEST(RotaryEmbedding, HasTheFrequenciesOfTheDefaultsAndOfAWavelength) {
  EXPECT_TRUE(same_bits(RotaryEmbedding(32)->inv_freq, inv_freq_of({.rope_theta = 1e4})));
  EXPECT_TRUE(
      same_bits(RotaryEmbedding(32, RotaryEmbeddingOptions{.max_wavelength = 500.0})->inv_freq,
                inv_freq_of({.rope_theta = 500.0})));
}

TEST(RotaryEmbedding, TakesFrequenciesOfSeveralAxes) {
  const at::Tensor q = random_values({9, 32});
  const at::Tensor inv_freq = random_inv_freq({3, 16});
  const at::Tensor positions = at::arange(27).view({3, 9});
  RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.inv_freq = inv_freq});
  EXPECT_TRUE(same_bits(rotary(q, positions), rope::apply(q, positions, {.inv_freq = inv_freq})));
}

TEST(RotaryEmbedding, FollowsTheLengthThatIsGivenOrTheGreatestPosition) {
  const at::Tensor q = random_values({9, 4, 32});
  for (const FrequencyOptions& scheme : {kDynamic, kLongrope}) {
    RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.rope_parameters = scheme});
    for (const std::int64_t length : {9, 64, 65, 200}) {
      SCOPED_TRACE(c10::str(scheme.rope_type, " for ", length));
      const auto expected = [&](const at::Tensor& positions) {
        return rope::apply(q, positions,
                           {.inv_freq = inv_freq_of(scheme, length),
                            .attention_factor = rotary->attention_factor});
      };
      const at::Tensor first = positions_from(0);
      const at::Tensor last = positions_from(length - 9);
      EXPECT_TRUE(same_bits(rotary(q, first, length), expected(first)));
      EXPECT_TRUE(same_bits(rotary(q, last), expected(last)));
    }
  }
}

// A model with a layer of each kind.
struct Model : torch::nn::Module {
  explicit Model(bool learned)
      : linear(register_module("linear", torch::nn::Linear(2, 2))),
        rotary(register_module(
            "rotary", RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                                 .learned = learned}))) {}
  torch::nn::Linear linear;
  RotaryEmbedding rotary;
};

TEST(RotaryEmbedding, KeepsTheDtypeOfItsFrequencies) {
  for (const bool learned : {false, true}) {
    Model model(learned);
    model.to(at::kBFloat16);
    model.to(at::Device(at::kCPU), at::kHalf);
    EXPECT_EQ(model.linear->weight.scalar_type(), at::kHalf);
    const at::Tensor held =
        learned ? model.rotary->parameters().at(0) : model.rotary->buffers().at(0);
    EXPECT_TRUE(same_bits(held, inv_freq_of(kLinear)));
    EXPECT_TRUE(held.is_same(model.rotary->inv_freq));
  }
}

TEST(RotaryEmbedding, LearnsWhereItIsTo) {
  const at::Tensor q = random_values({9, 32});
  RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.learned = true});
  rotary(q, at::arange(9)).square().mul(random_values({9, 32}, at::kFloat, 1)).sum().backward();
  ASSERT_TRUE(rotary->inv_freq.grad().defined());
  EXPECT_GT(rotary->inv_freq.grad().abs().min().item<float>(), 0.0f);
  EXPECT_TRUE(RotaryEmbedding(32)->parameters().empty());
}

TEST(RotaryEmbedding, IsSavedOnlyWhereItIsLearned) {
  for (const bool learned : {false, true}) {
    const auto saved = std::make_shared<Model>(learned);
    {
      const at::NoGradGuard no_grad;
      saved->rotary->inv_freq.fill_(3.0);
    }
    std::stringstream stream;
    torch::save(saved, stream);
    auto loaded = std::make_shared<Model>(learned);
    torch::load(loaded, stream);
    EXPECT_TRUE(same_bits(loaded->linear->weight, saved->linear->weight));
    EXPECT_TRUE(
        same_bits(loaded->rotary->inv_freq, learned ? at::full(16, 3.0) : inv_freq_of(kLinear)));
  }
}

TEST(RotaryEmbedding, HasCopiesOfItsOwnFrequencies) {
  const at::Tensor q = random_values({9, 32});
  RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.rope_parameters = kLongrope});
  const auto copy = std::dynamic_pointer_cast<rope::RotaryEmbeddingImpl>(rotary->clone());
  EXPECT_FALSE(copy->inv_freq.is_same(rotary->inv_freq));
  for (const std::int64_t first : {0, 100}) {
    const at::Tensor positions = at::arange(first, first + 9);
    EXPECT_TRUE(same_bits(copy->forward(q, positions), rotary(q, positions)));
  }
}

TEST(RotaryEmbedding, RefusesOptionsThatExcludeEachOther) {
  EXPECT_THROW_WITH(RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                               .max_wavelength = 5e5}),
                    c10::ValueError,
                    "expected max_wavelength to be left at its default together with rope_theta");
  EXPECT_THROW_WITH(
      RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kDynamic, .learned = true}),
      c10::ValueError, "expected learned to be false");
  EXPECT_THROW_WITH(RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                               .inv_freq = random_inv_freq({16})}),
                    c10::ValueError, "expected rope_parameters or inv_freq, but got both");
}

TEST(RotaryEmbedding, RefusesOptionsOfNoUse) {
  const auto of = [](const at::Tensor& inv_freq) {
    return RotaryEmbedding(32, RotaryEmbeddingOptions{.inv_freq = inv_freq});
  };
  EXPECT_THROW_WITH(RotaryEmbedding(31), c10::ValueError,
                    "rope::RotaryEmbedding(): expected rotary_dim to be positive and a multiple of "
                    "2, but got 31");
  EXPECT_THROW_WITH(of(at::ones(8)), c10::ValueError,
                    "expected inv_freq to have rotary_dim / 2 = 16 columns, but got 8");
  EXPECT_THROW_WITH(of(at::ones({1, 3, 16})), c10::ValueError,
                    "expected inv_freq to have shape (N) or (A, N), but got [1, 3, 16]");
  EXPECT_THROW_WITH(of(at::ones(16, at::kBFloat16)), c10::TypeError,
                    "expected inv_freq to be float32 or float64, but got bfloat16");
  EXPECT_THROW_WITH(of(at::Tensor()), c10::TypeError, "but got none");
  EXPECT_THROW_WITH(RotaryEmbedding(32, RotaryEmbeddingOptions{.attention_factor = std::nan("")}),
                    c10::ValueError, "expected attention_factor to be finite, but got nan");
  EXPECT_THROW_WITH(RotaryEmbedding(32, RotaryEmbeddingOptions{.max_wavelength = -1.0}),
                    c10::ValueError, "expected max_wavelength to be positive and finite");
  EXPECT_THROW_WITH(RotaryEmbedding(32, RotaryEmbeddingOptions{.rotary_offset = -2}),
                    c10::ValueError, "expected rotary_offset to be at least 0, but got -2");
}

TEST(RotaryEmbedding, NeverLeavesTheMetaDeviceWithoutValues) {
  FrequencyOptions scheme = kLinear;
  scheme.device = at::kMeta;
  for (const bool learned : {false, true}) {
    RotaryEmbedding rotary(32,
                           RotaryEmbeddingOptions{.rope_parameters = scheme, .learned = learned});
    ASSERT_TRUE(rotary->inv_freq.is_meta());
    EXPECT_THROW(rotary->to(at::kCPU), c10::NotImplementedError);
    EXPECT_TRUE(rotary->inv_freq.is_meta());
  }
}

TEST(RotaryEmbedding, SkipsFrequenciesOfAnArchive) {
  const auto saved = std::make_shared<Model>(true);
  {
    const at::NoGradGuard no_grad;
    saved->rotary->inv_freq.fill_(3.0);
  }
  std::stringstream stream;
  torch::save(saved, stream);
  auto loaded = std::make_shared<Model>(false);
  torch::load(loaded, stream);
  EXPECT_TRUE(same_bits(loaded->linear->weight, saved->linear->weight));
  EXPECT_TRUE(same_bits(loaded->rotary->inv_freq, inv_freq_of(kLinear)));
}

TEST(RotaryEmbedding, MayHaveFloat64Frequencies) {
  const at::Tensor q = random_values({9, 4, 32});
  for (FrequencyOptions scheme : {kLinear, kDynamic, kLongrope}) {
    scheme.dtype = at::kDouble;
    RotaryEmbedding rotary(32, RotaryEmbeddingOptions{.rope_parameters = scheme});
    rotary->to(at::kHalf);
    for (const std::int64_t first : {0, 200}) {
      const at::Tensor positions = positions_from(first);
      const at::Tensor inv_freq = inv_freq_of(scheme, first + 9);
      EXPECT_EQ(inv_freq.scalar_type(), at::kDouble);
      EXPECT_TRUE(same_bits(
          rotary(q, positions),
          rope::apply(q, positions,
                      {.inv_freq = inv_freq, .attention_factor = rotary->attention_factor})));
    }
  }
}

std::string printed(const auto& module) {
  std::ostringstream stream;
  stream << module;
  return stream.str();
}

TEST(RotaryEmbedding, IsPrintedWithItsSchemeAndItsOptions) {
  EXPECT_EQ(printed(RotaryEmbedding(32, RotaryEmbeddingOptions{.interleaved = true})),
            "rope::RotaryEmbedding(32, rope_type=default, rope_theta=10000, interleaved=true)");
  EXPECT_EQ(printed(RotaryEmbedding(32, RotaryEmbeddingOptions{.max_wavelength = 5e5})),
            "rope::RotaryEmbedding(32, rope_type=default, rope_theta=500000)");
  EXPECT_EQ(printed(RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                               .attention_factor = 1.5,
                                                               .learned = true,
                                                               .embedding_axis = 1,
                                                               .rotary_offset = 4})),
            "rope::RotaryEmbedding(32, rope_type=linear, rope_theta=10000, factor=2, "
            "attention_factor=1.5, embedding_axis=1, rotary_offset=4, learned=true)");
  EXPECT_EQ(printed(RotaryEmbedding(32, RotaryEmbeddingOptions{.rope_parameters = kLongrope})),
            "rope::RotaryEmbedding(32, rope_type=longrope, rope_theta=10000, factor=4, "
            "original_max_position_embeddings=64, short_factor=[1.5, 1.5, 1.5, 1.5, 1.5, 1.5]..., "
            "long_factor=[5, 5, 5, 5, 5, 5]..., attention_factor=1.1547)");
  EXPECT_EQ(printed(RotaryEmbedding(
                32, RotaryEmbeddingOptions{.inv_freq = random_inv_freq({3, 16}, at::kDouble)})),
            "rope::RotaryEmbedding(32, inv_freq of shape [3, 16], dtype=float64)");
}

// Sets the weights to random values.
QKNormRotaryEmbedding with_random_weights(QKNormRotaryEmbedding layer) {
  const at::NoGradGuard no_grad;
  std::uint64_t seed = 10;
  for (at::Tensor& weight : layer->parameters()) {
    weight.copy_(random_values(weight.sizes(), at::kFloat, seed++));
  }
  return layer;
}

TEST(QKNormRotaryEmbedding, CallsTheOperatorWithItsOptions) {
  const at::Tensor q = random_values({2, 40, 9});
  const at::Tensor k = random_values({40, 9}, at::kFloat, 1);
  const at::Tensor positions = at::arange(100, 109);
  auto layer = with_random_weights(
      QKNormRotaryEmbedding(32, QKNormRotaryEmbeddingOptions{.rope_parameters = kLinear,
                                                             .attention_factor = 1.5,
                                                             .embedding_axis = -2,
                                                             .rotary_offset = 5,
                                                             .interleaved = true,
                                                             .head_dim = 40,
                                                             .eps = 0.1,
                                                             .weight_offset = 0.5,
                                                             .norm_axes = {{-2, -1}},
                                                             .norm_last = true}));
  const rope::NormOptions options = {.inv_freq = inv_freq_of(kLinear),
                                     .embedding_axis = -2,
                                     .rotary_offset = 5,
                                     .attention_factor = 1.5,
                                     .interleaved = true,
                                     .eps = 0.1,
                                     .weight_offset = 0.5,
                                     .norm_axes = {{-2, -1}},
                                     .norm_last = true};
  EXPECT_EQ(layer->q_norm->weight.sizes(), at::IntArrayRef({40}));
  const at::Tensor q_expected = rope::norm_apply(q, layer->q_norm->weight, positions, options);
  const at::Tensor k_expected = rope::norm_apply(k, layer->k_norm->weight, positions, options);
  EXPECT_TRUE(same_pair(layer(q, k, positions), {q_expected, k_expected}));
  EXPECT_TRUE(same_bits(layer(q, positions), q_expected));
  EXPECT_TRUE(same_bits(layer->rotate_key(k, positions), k_expected));
}

TEST(QKNormRotaryEmbedding, FollowsTheLength) {
  const at::Tensor q = random_values({9, 4, 32});
  QKNormRotaryEmbedding layer(32, QKNormRotaryEmbeddingOptions{.rope_parameters = kDynamic});
  for (const std::int64_t length : {9, 200}) {
    const at::Tensor expected = rope::norm_apply(q, std::nullopt, positions_from(0),
                                                 {.inv_freq = inv_freq_of(kDynamic, length)});
    EXPECT_TRUE(same_bits(layer(q, positions_from(0), length), expected));
  }
}

TEST(QKNormRotaryEmbedding, NormalizesOverHeadsInAnyLayout) {
  const at::Tensor q = random_values({2, 9, 4, 32});
  const at::Tensor k = random_values({2, 9, 2, 32}, at::kFloat, 1);
  auto layer = with_random_weights(
      QKNormRotaryEmbedding(32, QKNormRotaryEmbeddingOptions{.num_heads = {{4, 2}}}));
  auto heads_first = with_random_weights(QKNormRotaryEmbedding(
      32, QKNormRotaryEmbeddingOptions{.norm_axes = {{-3, -1}}, .num_heads = {{4, 2}}}));
  EXPECT_EQ(layer->q_norm->weight.sizes(), at::IntArrayRef({4 * 32}));
  EXPECT_EQ(layer->k_norm->weight.sizes(), at::IntArrayRef({2 * 32}));
  const auto [q_result, k_result] = layer(q, k, positions_from(0));
  const rope::NormOptions options = {.inv_freq = layer->inv_freq, .norm_axes = {{-2, -1}}};
  EXPECT_TRUE(same_bits(q_result, rope::norm_apply(q, layer->q_norm->weight.view({4, 32}),
                                                   positions_from(0), options)));
  const auto [q_other, k_other] =
      heads_first(q.transpose(1, 2), k.transpose(1, 2), positions_from(0).squeeze(-1));
  EXPECT_TRUE(at::allclose(q_other.transpose(1, 2), q_result, 0, 1e-5));
  EXPECT_TRUE(at::allclose(k_other.transpose(1, 2), k_result, 0, 1e-5));
  // (B, D, H, S): the heads follow the embedding axis.
  auto heads_later = with_random_weights(QKNormRotaryEmbedding(
      32, QKNormRotaryEmbeddingOptions{
              .embedding_axis = -3, .norm_axes = {{-3, -2}}, .num_heads = {{4, 2}}}));
  const at::Tensor moved = heads_later(q.permute({0, 3, 2, 1}), positions_from(0).squeeze(-1));
  EXPECT_TRUE(at::allclose(moved.permute({0, 3, 2, 1}), q_result, 0, 1e-5));
}

TEST(QKNormRotaryEmbedding, HasTheParametersOfModels) {
  const auto names = [](const QKNormRotaryEmbedding& layer) {
    return layer->named_parameters().keys();
  };
  using Names = std::vector<std::string>;
  EXPECT_EQ(names(QKNormRotaryEmbedding(32)), Names({"q_norm.weight", "k_norm.weight"}));
  EXPECT_EQ(names(QKNormRotaryEmbedding(
                32, QKNormRotaryEmbeddingOptions{.learned = true, .q_weight = false})),
            Names({"inv_freq", "k_norm.weight"}));
  const at::Tensor q = random_values({9, 32});
  QKNormRotaryEmbedding plain(32, QKNormRotaryEmbeddingOptions{.q_weight = false});
  EXPECT_FALSE(plain->q_norm->weight.defined());
  EXPECT_TRUE(same_bits(plain(q, at::arange(9)), rope::norm_apply(q, std::nullopt, at::arange(9),
                                                                  {.inv_freq = plain->inv_freq})));
  // Neutral weights.
  EXPECT_TRUE(at::equal(QKNormRotaryEmbedding(32)->q_norm->weight, at::ones(32)));
  const QKNormRotaryEmbeddingOptions gemma = {.weight_offset = 1};
  EXPECT_TRUE(at::equal(QKNormRotaryEmbedding(32, gemma)->k_norm->weight, at::zeros(32)));
}

TEST(QKNormRotaryEmbedding, ConvertsItsWeightsAndKeepsItsFrequencies) {
  QKNormRotaryEmbedding layer(
      32, QKNormRotaryEmbeddingOptions{.rope_parameters = kLinear, .weight_dtype = at::kDouble});
  EXPECT_EQ(layer->q_norm->weight.scalar_type(), at::kDouble);
  torch::nn::ModuleList model(layer);
  model->to(at::kBFloat16);
  EXPECT_EQ(layer->q_norm->weight.scalar_type(), at::kBFloat16);
  model->to(at::Device(at::kCPU), at::kHalf);
  EXPECT_EQ(layer->k_norm->weight.scalar_type(), at::kHalf);
  EXPECT_TRUE(same_bits(layer->inv_freq, inv_freq_of(kLinear)));
}

TEST(QKNormRotaryEmbedding, SavesItsWeightsAndNotItsFrequencies) {
  for (const bool learned : {false, true}) {
    const QKNormRotaryEmbeddingOptions options = {.rope_parameters = kLinear, .learned = learned};
    auto saved = with_random_weights(QKNormRotaryEmbedding(32, options));
    {
      const at::NoGradGuard no_grad;
      saved->inv_freq.fill_(3.0);
    }
    std::stringstream stream;
    torch::save(torch::nn::ModuleList(saved), stream);
    QKNormRotaryEmbedding loaded(32, options);
    torch::nn::ModuleList model(loaded);
    torch::load(model, stream);
    EXPECT_TRUE(same_bits(loaded->q_norm->weight, saved->q_norm->weight));
    EXPECT_TRUE(same_bits(loaded->k_norm->weight, saved->k_norm->weight));
    EXPECT_TRUE(same_bits(loaded->inv_freq, learned ? at::full(16, 3.0) : inv_freq_of(kLinear)));
  }
}

TEST(QKNormRotaryEmbedding, HasCopiesWithTheirOwnWeights) {
  const at::Tensor q = random_values({9, 4, 32});
  auto layer = with_random_weights(
      QKNormRotaryEmbedding(32, QKNormRotaryEmbeddingOptions{.num_heads = {{4, 2}}}));
  torch::nn::ModuleList model(layer);
  const auto copy = std::dynamic_pointer_cast<torch::nn::ModuleListImpl>(model->clone());
  const auto copied = copy->ptr<rope::QKNormRotaryEmbeddingImpl>(0);
  EXPECT_TRUE(same_bits(copied->forward(q, positions_from(0)), layer(q, positions_from(0))));
  EXPECT_FALSE(copied->q_norm->weight.is_same(layer->q_norm->weight));
  EXPECT_TRUE(copied->parameters()[0].is_same(copied->q_norm->weight));
}

TEST(QKNormRotaryEmbedding, TrainsItsWeights) {
  const at::Tensor q = random_values({9, 4, 32});
  QKNormRotaryEmbedding layer(32, QKNormRotaryEmbeddingOptions{.num_heads = {{4, 2}}});
  layer(q, positions_from(0)).square().sum().backward();
  EXPECT_EQ(layer->q_norm->weight.grad().sizes(), at::IntArrayRef({4 * 32}));
  EXPECT_FALSE(layer->k_norm->weight.grad().defined());
}

TEST(QKNormRotaryEmbedding, RefusesOptionsOfNoUse) {
  const auto expect = [](const QKNormRotaryEmbeddingOptions& options, const std::string& message) {
    EXPECT_THROW_WITH(QKNormRotaryEmbedding(32, options), c10::ValueError,
                      "rope::QKNormRotaryEmbedding(): expected " + message);
  };
  expect({.head_dim = 30}, "head_dim to be at least rotary_offset + rotary_dim = 32, but got 30");
  expect({.eps = -1}, "eps to be at least 0 and finite, but got -1");
  expect({.weight_offset = std::nan("")}, "weight_offset to be finite, but got nan");
  expect({.norm_axes = {{-1, -1}}}, "norm_axes to be distinct dimensions, but got [-1, -1]");
  expect({.num_heads = {{4, 0}}},
         "num_heads to be the numbers of query heads and of key heads, at least 1, but got 4 and "
         "0");
  const std::string two_negative =
      "norm_axes to be two negative dimensions, that of heads and embedding_axis, together with "
      "num_heads, but got ";
  expect({.norm_axes = {{-1}}, .num_heads = {{4, 2}}}, two_negative + "[-1]");
  expect({.norm_axes = {{-3, -2}}, .num_heads = {{4, 2}}}, two_negative + "[-3, -2]");
  // Those of RotaryEmbedding.
  expect({.rotary_offset = -2}, "rotary_offset to be at least 0, but got -2");
  expect({.rope_parameters = kDynamic, .learned = true}, "learned to be false for a rope_type");
  EXPECT_THROW_WITH(
      QKNormRotaryEmbedding(32, QKNormRotaryEmbeddingOptions{.weight_dtype = at::kInt}),
      c10::TypeError, "expected weight_dtype to be a floating-point dtype, but got int32");
}

TEST(QKNormRotaryEmbedding, IsPrintedWithItsOptions) {
  EXPECT_EQ(printed(QKNormRotaryEmbedding(
                32, QKNormRotaryEmbeddingOptions{.interleaved = true, .k_weight = false})),
            "rope::QKNormRotaryEmbedding(32, rope_type=default, rope_theta=10000, "
            "interleaved=true)(\n"
            "  (q_norm): rope::NormWeight(32)\n"
            "  (k_norm): rope::NormWeight(no weight)\n"
            ")");
  const std::string shown =
      printed(QKNormRotaryEmbedding(32, QKNormRotaryEmbeddingOptions{.head_dim = 64,
                                                                     .eps = 1e-5,
                                                                     .weight_offset = 1,
                                                                     .norm_last = true,
                                                                     .num_heads = {{4, 2}}}));
  EXPECT_EQ(shown.substr(0, shown.find('\n')),
            "rope::QKNormRotaryEmbedding(32, rope_type=default, rope_theta=10000, head_dim=64, "
            "eps=1e-05, weight_offset=1, norm_axes=[-2, -1], norm_last=true)(");
}

TEST(ApplyRoPE, IsPrintedWithItsOptions) {
  EXPECT_EQ(printed(ApplyRoPE(-1, rope::ApplyRoPEOptions{})),
            "rope::ApplyRoPE(embedding_axis=-1, max_wavelength=10000)");
  EXPECT_EQ(printed(ApplyRoPE(1, rope::ApplyRoPEOptions{.max_wavelength = 500.0,
                                                        .scale_factor = 4.0,
                                                        .rotary_dim = 16,
                                                        .interleaved = true,
                                                        .positions_tag = "tokens"})),
            "rope::ApplyRoPE(embedding_axis=1, max_wavelength=500, scale_factor=4, rotary_dim=16, "
            "interleaved=true, positions_tag=tokens)");
}

TEST(ApplyRoPE, NeedsPositions) {
  EXPECT_THROW_WITH(ApplyRoPE(-1, rope::ApplyRoPEOptions{})(random_values({9, 32})),
                    c10::ValueError, "expected positions to be given to a layer without");
}

TEST(ApplyRoPE, TakesEachOption) {
  const at::Tensor x = random_values({3, 40, 7});
  const at::Tensor positions = at::arange(7);
  const at::Tensor actual = ApplyRoPE(1, rope::ApplyRoPEOptions{.max_wavelength = 500.0,
                                                                .scale_factor = 4.0,
                                                                .rotary_dim = 16,
                                                                .interleaved = true})(x, positions);
  EXPECT_TRUE(same_bits(actual, rope::apply(x, positions,
                                            {.embedding_axis = 1,
                                             .rotary_dim = 16,
                                             .max_wavelength = 500.0,
                                             .scale_factor = 4.0,
                                             .interleaved = true})));
}

// Ordinary layers with rotations between them.
torch::nn::Sequential make_layers(const std::vector<std::string>& tags) {
  torch::nn::Sequential layers(torch::nn::Linear(32, 32));
  for (const std::string& tag : tags) {
    layers->push_back(ApplyRoPE::from_config(tag, -1));
  }
  layers->push_back(torch::nn::Tanh());
  return layers;
}

at::Tensor expected_of(torch::nn::Sequential& layers, at::Tensor x,
                       const std::vector<at::Tensor>& positions) {
  x = layers->ptr<torch::nn::LinearImpl>(0)->forward(x);
  for (const at::Tensor& each : positions) {
    x = rope::apply(x, each);
  }
  return x.tanh();
}

TEST(SideInputs, ReachTheLayersOfTheirTags) {
  const at::Tensor x = random_values({9, 32});
  const at::Tensor first = at::arange(9);
  const at::Tensor second = 3 * first;
  torch::nn::Sequential layers = make_layers({"first", "second", "first"});
  auto model = WithSideInputsFromInputTuple::handling(layers, {"first", "second"});
  EXPECT_TRUE(same_bits(model(x, {first, second}), expected_of(layers, x, {first, second, first})));
}

TEST(SideInputs, OfAllHandlersAroundALayerAreThere) {
  // A layer that runs a model with one more side input.
  struct InnerImpl : torch::nn::Cloneable<InnerImpl> {
    InnerImpl(WithSideInputsFromInputTuple inner, at::Tensor positions)
        : inner(register_module("inner", std::move(inner))), positions(std::move(positions)) {}
    at::Tensor forward(const at::Tensor& x) { return inner(x, {positions}); }
    void reset() override {}
    WithSideInputsFromInputTuple inner;
    at::Tensor positions;
  };
  const at::Tensor x = random_values({9, 32});
  const at::Tensor first = at::arange(9);
  const at::Tensor second = 3 * first;
  torch::nn::Sequential layers = make_layers({"first", "second"});
  const auto inner = std::make_shared<InnerImpl>(
      WithSideInputsFromInputTuple::handling(layers, {"second"}), second);
  auto outer = WithSideInputsFromInputTuple::handling(torch::nn::Sequential(inner), {"first"});
  EXPECT_TRUE(same_bits(outer(x, {first}), expected_of(layers, x, {first, second})));
}

TEST(SideInputs, ThatNobodyProvidesAreNamed) {
  const at::Tensor x = random_values({9, 32});
  torch::nn::Sequential layers = make_layers({"first"});
  constexpr const char* kMessage = "expected the tag first to be provided by";
  EXPECT_THROW_WITH(layers->forward(x), c10::ValueError, kMessage);
  auto model = WithSideInputsFromInputTuple::handling(layers, {"first"});
  EXPECT_ANY_THROW(model(x, {at::arange(3)}));
  EXPECT_THROW_WITH(layers->forward(x), c10::ValueError, kMessage);
  EXPECT_THROW_WITH(model(x, {}), c10::ValueError, "expected side_inputs to be one for each");
}

TEST(SideInputs, ProvidedTwiceAreNamed) {
  EXPECT_THROW_WITH(
      WithSideInputsFromInputTuple::handling(make_layers({"first"}), {"first", "first"}),
      c10::ValueError, "expected each tag to be provided once, but got first twice");
  struct OuterImpl : torch::nn::Cloneable<OuterImpl> {
    explicit OuterImpl(WithSideInputsFromInputTuple inner)
        : inner(register_module("inner", std::move(inner))) {}
    at::Tensor forward(const at::Tensor& x) { return inner(x, {at::arange(9)}); }
    void reset() override {}
    WithSideInputsFromInputTuple inner;
  };
  const auto inner = std::make_shared<OuterImpl>(
      WithSideInputsFromInputTuple::handling(make_layers({"first"}), {"first"}));
  auto outer = WithSideInputsFromInputTuple::handling(torch::nn::Sequential(inner), {"first"});
  EXPECT_THROW_WITH(outer(random_values({9, 32}), {at::arange(9)}), c10::ValueError,
                    "expected each tag to be provided once, but got first twice");
}

TEST(SideInputs, BelongToAThread) {
  const at::Tensor x = random_values({9, 32});
  const at::Tensor positions = at::arange(9);
  constexpr int kNumThreads = 4;
  std::barrier all_are_here(kNumThreads);
  const auto meet = [&](const at::Tensor& tensor) {
    all_are_here.arrive_and_wait();
    return tensor;
  };
  auto model = WithSideInputsFromInputTuple::handling(
      torch::nn::Sequential(torch::nn::Functional(meet), ApplyRoPE::from_config("first", -1),
                            torch::nn::Functional(meet)),
      {"first"});
  std::vector<at::Tensor> results(kNumThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kNumThreads; ++i) {
    threads.emplace_back([&, i] { results[i] = model(x, {i * positions}); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int i = 0; i < kNumThreads; ++i) {
    EXPECT_TRUE(same_bits(results[i], rope::apply(x, i * positions)));
  }
}

TEST(SideInputs, ReachACopyOfTheModel) {
  const at::Tensor x = random_values({9, 32});
  const at::Tensor positions = at::arange(9);
  auto model = WithSideInputsFromInputTuple::handling(make_layers({"first"}), {"first"});
  const auto copy =
      std::dynamic_pointer_cast<rope::WithSideInputsFromInputTupleImpl>(model->clone());
  EXPECT_TRUE(same_bits(copy->forward(x, {positions}), model(x, {positions})));
  EXPECT_EQ(copy->parameters().size(), 2U);
  EXPECT_FALSE(copy->parameters()[0].is_same(model->parameters()[0]));
}

}  // namespace
