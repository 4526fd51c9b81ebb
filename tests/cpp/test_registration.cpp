// A program that references no symbol of the library, but links to it and runs TorchScript, has the
// operators.
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/script.h>

#include <cmath>
#include <memory>
#include <sstream>
#include <string>

namespace {

// `rope` in TorchScript: torch.ops.rope in Python.
struct Operators : torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(
      const std::string& name, torch::jit::GraphFunction& method,
      const torch::jit::SourceRange& location) override {
    if (name == "rope") {
      return std::make_shared<torch::jit::BuiltinModule>("rope");
    }
    return torch::jit::nativeResolver()->resolveValue(name, method, location);
  }
};

torch::jit::Module scripted(const std::string& forward) {
  torch::jit::Module module("Rotation");
  module.define(forward, std::make_shared<Operators>());
  return module;
}

torch::jit::Module saved_and_loaded(const torch::jit::Module& module) {
  std::stringstream file;
  module.save(file);
  return torch::jit::load(file);
}

const char* const kRotateNeighbours = R"(
def forward(self, x, positions):
    return rope.apply(x, positions, interleaved=True)
)";

const char* const kRotatePair = R"(
def forward(self, q, k, positions):
    return rope.apply_qk(q, k, positions)
)";

const char* const kRotateInPlace = R"(
def forward(self, x, positions):
    y = x.clone()
    rope.apply_(y, positions, interleaved=True)
    return y
)";

const char* const kRotateByTables = R"(
def forward(self, x, cos, sin):
    return rope.apply_cos_sin(x, cos, sin, interleaved=True)
)";

const char* const kNormalizePair = R"(
def forward(self, q, k, weight, positions):
    return rope.norm_apply_qk(q, k, weight, None, positions, eps=0.5, weight_offset=1.0)
)";

const char* const kNormalizeInPlace = R"(
def forward(self, x, weight, cos, sin):
    y = x.clone()
    rope.norm_apply_cos_sin_(y, weight, cos, sin, eps=0.5, norm_axes=[-2, -1], norm_last=True)
    return y
)";

// One pair, so one frequency: 1 radian per unit of position.
at::Tensor rotated(const at::Tensor& x, double angle) {
  const at::Tensor a = x.select(-1, 0);
  const at::Tensor b = x.select(-1, 1);
  return at::stack(
      {a * std::cos(angle) - b * std::sin(angle), b * std::cos(angle) + a * std::sin(angle)}, -1);
}

at::Tensor normalized(const at::Tensor& x, at::IntArrayRef axes) {
  return x / (x.square().mean(axes, /*keepdim=*/true) + 0.5).sqrt();
}

TEST(Registration, DefinesAllSixteenOperators) {
  for (const char* family : {"apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin"}) {
    for (const char* form : {"", "_qk", "_", "_qk_"}) {
      const std::string name = std::string("rope::") + family + form;
      EXPECT_TRUE(c10::Dispatcher::singleton().findSchema({name, ""}).has_value()) << name;
    }
  }
}

TEST(Registration, ALoadedModelRuns) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotateNeighbours));
  const at::Tensor x = at::randn({4, 2}, at::kDouble);
  const at::Tensor y = model.forward({x, at::tensor(3)}).toTensor();
  EXPECT_TRUE(at::allclose(y, rotated(x, 3.0), 0, 1e-11));
}

TEST(Registration, ALoadedModelRotatesAPair) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotatePair));
  const at::Tensor q = at::randn({4, 2}, at::kDouble);
  const at::Tensor k = at::randn({3, 4, 2}, at::kDouble);
  const auto result = model.forward({q, k, at::tensor(-2)}).toTuple();
  EXPECT_TRUE(at::allclose(result->elements()[0].toTensor(), rotated(q, -2.0), 0, 1e-11));
  EXPECT_TRUE(at::allclose(result->elements()[1].toTensor(), rotated(k, -2.0), 0, 1e-11));
}

TEST(Registration, ALoadedModelRotatesInPlace) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotateInPlace));
  const at::Tensor x = at::randn({4, 2}, at::kDouble);
  const at::Tensor y = model.forward({x, at::tensor(3)}).toTensor();
  EXPECT_TRUE(at::allclose(y, rotated(x, 3.0), 0, 1e-11));
}

TEST(Registration, ALoadedModelUsesTables) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotateByTables));
  const at::Tensor x = at::randn({4, 2}, at::kDouble);
  const at::Tensor angle = at::full({1}, 0.7, at::kDouble);
  const at::Tensor y = model.forward({x, angle.cos(), angle.sin()}).toTensor();
  EXPECT_TRUE(at::allclose(y, rotated(x, 0.7), 0, 1e-11));
}

TEST(Registration, ALoadedModelNormalizesAPairAndDifferentiates) {
  torch::jit::Module model = saved_and_loaded(scripted(kNormalizePair));
  const at::Tensor gradient = at::randn({4, 2}, at::kDouble);
  // The first runs are profiled, the later ones optimised.
  for (int i = 0; i < 4; ++i) {
    const at::Tensor q = at::randn({4, 2}, at::kDouble).requires_grad_();
    const at::Tensor k = at::randn({3, 4, 2}, at::kDouble);
    const at::Tensor weight = at::randn({2}, at::kDouble).requires_grad_();
    const auto result = model.forward({q, k, weight, at::tensor(3)}).toTuple();
    const at::Tensor q_result = result->elements()[0].toTensor();
    const at::Tensor expected = rotated(normalized(q, {-1}) * (1 + weight), 3.0);
    EXPECT_TRUE(at::allclose(q_result, expected, 0, 1e-11));
    EXPECT_TRUE(at::allclose(result->elements()[1].toTensor(), rotated(normalized(k, {-1}), 3.0), 0,
                             1e-11));
    const auto ours = torch::autograd::grad({q_result}, {q, weight}, {gradient});
    const auto plain = torch::autograd::grad({expected}, {q, weight}, {gradient});
    EXPECT_TRUE(at::allclose(ours[0], plain[0], 0, 1e-11));
    EXPECT_TRUE(at::allclose(ours[1], plain[1], 0, 1e-11));
  }
}

TEST(Registration, ALoadedModelNormalizesInPlaceAfterTheRotation) {
  torch::jit::Module model = saved_and_loaded(scripted(kNormalizeInPlace));
  const at::Tensor x = at::randn({5, 4, 2}, at::kDouble);
  const at::Tensor weight = at::randn({4, 2}, at::kDouble);
  const at::Tensor angle = at::full({1}, 0.7, at::kDouble);
  const at::Tensor y = model.forward({x, weight, angle.cos(), angle.sin()}).toTensor();
  EXPECT_TRUE(at::allclose(y, normalized(rotated(x, 0.7), {-2, -1}) * weight, 0, 1e-11));
}

TEST(Registration, ALoadedModelDifferentiates) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotateNeighbours));
  const at::Tensor gradient = at::randn({4, 2}, at::kDouble);
  // The first runs are profiled, the later ones optimised.
  for (int i = 0; i < 4; ++i) {
    const at::Tensor x = at::randn({4, 2}, at::kDouble).requires_grad_();
    model.forward({x, at::tensor(3)}).toTensor().backward(gradient);
    EXPECT_TRUE(at::allclose(x.grad(), rotated(gradient, -3.0), 0, 1e-11));
  }
}

TEST(Registration, ALoadedModelRefusesWhatTheOperatorRefuses) {
  torch::jit::Module model = saved_and_loaded(scripted(kRotateNeighbours));
  try {
    model.forward({at::ones({4, 3}), at::tensor(3)});
    FAIL() << "nothing was thrown";
  } catch (const std::exception& error) {
    EXPECT_NE(
        std::string(error.what()).find("rope::apply(): expected rotary_dim to be even, but got 3"),
        std::string::npos)
        << error.what();
  }
}

}  // namespace
