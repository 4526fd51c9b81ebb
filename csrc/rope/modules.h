// The layers, for torch::nn.
//
//   #include <rope/modules.h>
//
//   rope::RotaryEmbedding rotary(64, rope::RotaryEmbeddingOptions{.max_wavelength = 5e5});
//   auto [q2, k2] = rotary(q, k, positions);
//
//   auto model = rope::WithSideInputsFromInputTuple::handling(
//       torch::nn::Sequential(torch::nn::Linear(64, 64), rope::ApplyRoPE::from_config("tokens",
//       -1)),
//       {"tokens"});
//   at::Tensor y = model(x, {positions});
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "rope/frequencies.h"
#include "rope/rope.h"

namespace rope {

struct RotaryEmbeddingOptions {
  // The scheme of the frequencies. The module sets its rotary_dim and, if missing, its rope_theta
  // (to max_wavelength); seq_len comes with each call. dtype is that of the frequencies and angles:
  // float32, which models are trained with, or float64, which is closer to rope::apply without
  // inv_freq (by up to 2e-4 at position 4095 with a base of 5e5).
  FrequencyOptions rope_parameters = {};
  double max_wavelength = 10000.0;
  // Frequencies to use instead of a scheme: (N) or (A, N), float32 or float64.
  std::optional<at::Tensor> inv_freq = std::nullopt;
  // Multiplies the rotated elements; the scheme's by default.
  std::optional<double> attention_factor = std::nullopt;
  // Makes the frequencies a parameter. Not for dynamic and longrope.
  bool learned = false;
  std::int64_t embedding_axis = -1;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
};

// Holds frequencies and rotates queries and keys by them. They keep their dtype through to(dtype),
// and are saved only if learned; torch::load skips them in an archive otherwise. For dynamic and
// longrope they depend on seq_len, by default the greatest position plus one (computed on the
// device without synchronisation). As everywhere in torch::nn, a module cannot leave the meta
// device: to(device) throws c10::NotImplementedError.
class ROPE_API RotaryEmbeddingImpl : public torch::nn::Cloneable<RotaryEmbeddingImpl> {
 public:
  explicit RotaryEmbeddingImpl(std::int64_t rotary_dim, RotaryEmbeddingOptions options = {});

  at::Tensor forward(const at::Tensor& x, const at::Tensor& positions,
                     std::optional<std::int64_t> seq_len = std::nullopt);
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             std::optional<std::int64_t> seq_len = std::nullopt);

  void reset() override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;
  bool is_serializable() const override;
  void pretty_print(std::ostream& stream) const override;

  RotaryEmbeddingOptions options;
  at::Tensor inv_freq;
  // longrope's frequencies beyond the trained length; undefined for other schemes.
  at::Tensor long_inv_freq;
  double attention_factor = 1.0;

 private:
  ApplyOptions apply_options(const at::Tensor& positions,
                             std::optional<std::int64_t> seq_len) const;
  at::Tensor inv_freq_at(const at::Tensor& positions, std::optional<std::int64_t> seq_len) const;
};

// TORCH_MODULE(RotaryEmbedding) with support for overloads of forward.
class RotaryEmbedding : public torch::nn::ModuleHolder<RotaryEmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<RotaryEmbeddingImpl>::ModuleHolder;
  using Impl = RotaryEmbeddingImpl;

  template <typename... Arguments>
  auto operator()(const Arguments&... arguments) {
    return impl_->forward(arguments...);
  }
};

struct ApplyRoPEOptions {
  double max_wavelength = 10000.0;
  double scale_factor = 1.0;
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  bool interleaved = false;
  // The tag of the side input to use in calls without positions.
  std::optional<std::string> positions_tag = std::nullopt;
};

// rope::apply as a layer. Without positions it uses the side input with positions_tag.
class ROPE_API ApplyRoPEImpl : public torch::nn::Cloneable<ApplyRoPEImpl> {
 public:
  explicit ApplyRoPEImpl(std::int64_t embedding_axis, ApplyRoPEOptions options = {});

  // Throws c10::ValueError if no enclosing handler provides the tag.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& positions = {});

  void reset() override {}
  void pretty_print(std::ostream& stream) const override;

  std::int64_t embedding_axis;
  ApplyRoPEOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())})
};

// TORCH_MODULE(ApplyRoPE) with from_config.
class ApplyRoPE : public torch::nn::ModuleHolder<ApplyRoPEImpl> {
 public:
  using torch::nn::ModuleHolder<ApplyRoPEImpl>::ModuleHolder;
  using Impl = ApplyRoPEImpl;

  // A layer whose positions are the side input with this tag.
  static ApplyRoPE from_config(std::string positions_tag, std::int64_t embedding_axis,
                               double max_wavelength = 10000.0) {
    return ApplyRoPE(embedding_axis, ApplyRoPEOptions{.max_wavelength = max_wavelength,
                                                      .positions_tag = std::move(positions_tag)});
  }
};

// Runs a model with side inputs: values that reach every layer with their tag, on the same thread,
// without passing through the layers in between. Layers see those of all enclosing handlers, which
// must have different tags.
class ROPE_API WithSideInputsFromInputTupleImpl
    : public torch::nn::Cloneable<WithSideInputsFromInputTupleImpl> {
 public:
  WithSideInputsFromInputTupleImpl(torch::nn::Sequential model, std::vector<std::string> tags);

  // Takes one side input per tag. Throws c10::ValueError if the numbers differ, or an enclosing
  // handler provides one of the tags too.
  at::Tensor forward(const at::Tensor& x, const std::vector<at::Tensor>& side_inputs);

  void reset() override {}
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  torch::nn::Sequential model;
  std::vector<std::string> tags;
};

class WithSideInputsFromInputTuple
    : public torch::nn::ModuleHolder<WithSideInputsFromInputTupleImpl> {
 public:
  using torch::nn::ModuleHolder<WithSideInputsFromInputTupleImpl>::ModuleHolder;
  using Impl = WithSideInputsFromInputTupleImpl;

  static WithSideInputsFromInputTuple handling(torch::nn::Sequential model,
                                               std::vector<std::string> tags) {
    return WithSideInputsFromInputTuple(std::move(model), std::move(tags));
  }

  at::Tensor operator()(const at::Tensor& x, const std::vector<at::Tensor>& side_inputs) {
    return impl_->forward(x, side_inputs);
  }
};

}  // namespace rope
