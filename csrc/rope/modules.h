// The layers, for torch::nn.
//
//   #include <rope/modules.h>
//
//   rope::RotaryEmbedding rotary(64, rope::RotaryEmbeddingOptions{.max_wavelength = 5e5});
//   auto [q2, k2] = rotary(q, k, positions);
//
//   rope::QKNormRotaryEmbedding norms(64, rope::QKNormRotaryEmbeddingOptions{.eps = 1e-5});
//   auto [q3, k3] = norms(q, k, positions);
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
#include <utility>
#include <vector>

#include "rope/frequencies.h"
#include "rope/rope.h"

namespace rope {

// The options of RotaryEmbedding.
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

// The frequencies of RotaryEmbedding and QKNormRotaryEmbedding. They keep their dtype through
// to(dtype), and are saved only if learned; torch::load skips them in an archive otherwise. For
// dynamic and longrope they depend on seq_len, by default the greatest position plus one (computed
// on the device without synchronisation). As everywhere in torch::nn, a module cannot leave the
// meta device: to(device) throws c10::NotImplementedError.
template <typename Derived, typename Options>
class ROPE_API WithFrequencies : public torch::nn::Cloneable<Derived> {
 public:
  void reset() override;
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  Options options;
  at::Tensor inv_freq;
  // longrope's frequencies beyond the trained length; undefined for other schemes.
  at::Tensor long_inv_freq;
  double attention_factor = 1.0;

 protected:
  WithFrequencies(std::int64_t rotary_dim, Options options);

  at::Tensor inv_freq_at(const at::Tensor& positions, std::optional<std::int64_t> seq_len) const;
  // Prints rotary_dim, the scheme, and the options that differ from their defaults.
  void print_options(std::ostream& stream) const;
};

// Holds frequencies and rotates queries and keys by them.
class ROPE_API RotaryEmbeddingImpl
    : public WithFrequencies<RotaryEmbeddingImpl, RotaryEmbeddingOptions> {
 public:
  static constexpr const char* kName = "RotaryEmbedding";

  explicit RotaryEmbeddingImpl(std::int64_t rotary_dim, RotaryEmbeddingOptions options = {});

  // Rotates one tensor, or q and k in one launch.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& positions,
                     std::optional<std::int64_t> seq_len = std::nullopt);
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             std::optional<std::int64_t> seq_len = std::nullopt);

  bool is_serializable() const override;
  void pretty_print(std::ostream& stream) const override;

 private:
  ApplyOptions apply_options(const at::Tensor& positions,
                             std::optional<std::int64_t> seq_len) const;
};

// Holds a RotaryEmbeddingImpl: TORCH_MODULE with support for overloads of forward.
class RotaryEmbedding : public torch::nn::ModuleHolder<RotaryEmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<RotaryEmbeddingImpl>::ModuleHolder;
  using Impl = RotaryEmbeddingImpl;

  template <typename... Arguments>
  auto operator()(const Arguments&... arguments) {
    return impl_->forward(arguments...);
  }
};

// The options of RotaryEmbedding, with the same meanings, and of the norms.
struct QKNormRotaryEmbeddingOptions {
  FrequencyOptions rope_parameters = {};
  double max_wavelength = 10000.0;
  std::optional<at::Tensor> inv_freq = std::nullopt;
  std::optional<double> attention_factor = std::nullopt;
  bool learned = false;
  std::int64_t embedding_axis = -1;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
  // The size of the embedding axis; by default rotary_offset + rotary_dim.
  std::optional<std::int64_t> head_dim = std::nullopt;
  // The options of norm_apply.
  double eps = 1e-6;
  double weight_offset = 0.0;
  std::optional<std::vector<std::int64_t>> norm_axes = std::nullopt;
  bool norm_last = false;
  // For norms over all heads, the numbers of query and key heads: each weight then has
  // num_heads * head_dim elements. norm_axes are by default {-2, -1}, for (B, S, H, D); for
  // (B, H, S, D) set {-3, -1}.
  std::optional<std::pair<std::int64_t, std::int64_t>> num_heads = std::nullopt;
  // Whether the norms have weights.
  bool q_weight = true;
  bool k_weight = true;
  // By default PyTorch's default dtype. The weights are on the device of the frequencies.
  std::optional<at::ScalarType> weight_dtype = std::nullopt;
};

// Holds the weight of an RMSNorm, undefined if there is none. It has one dimension, as in models.
class ROPE_API NormWeightImpl : public torch::nn::Cloneable<NormWeightImpl> {
 public:
  // shape is that in which the weight broadcasts, neutral the initial value of its elements.
  NormWeightImpl(std::vector<std::int64_t> shape, double neutral, bool exists,
                 at::TensorOptions options);

  // The weight in the shape in which it broadcasts.
  std::optional<at::Tensor> viewed() const;

  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor weight;

 private:
  std::vector<std::int64_t> shape_;
  double neutral_;
  bool exists_;
  at::TensorOptions options_;
};

TORCH_MODULE(NormWeight);

// Holds frequencies and norm weights; normalizes and rotates queries and keys by them. The weights
// are the parameters q_norm.weight and k_norm.weight, as in checkpoints, and follow to(dtype).
// Frequencies that are not learned are not saved.
class ROPE_API QKNormRotaryEmbeddingImpl
    : public WithFrequencies<QKNormRotaryEmbeddingImpl, QKNormRotaryEmbeddingOptions> {
 public:
  static constexpr const char* kName = "QKNormRotaryEmbedding";

  explicit QKNormRotaryEmbeddingImpl(std::int64_t rotary_dim,
                                     QKNormRotaryEmbeddingOptions options = {});

  // Queries alone.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& positions,
                     std::optional<std::int64_t> seq_len = std::nullopt);
  std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             std::optional<std::int64_t> seq_len = std::nullopt);
  // Keys alone.
  at::Tensor rotate_key(const at::Tensor& x, const at::Tensor& positions,
                        std::optional<std::int64_t> seq_len = std::nullopt);

  void reset() override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;
  void pretty_print(std::ostream& stream) const override;

  NormWeight q_norm = nullptr;
  NormWeight k_norm = nullptr;

 private:
  NormOptions norm_options(const at::Tensor& positions, std::optional<std::int64_t> seq_len) const;
  NormWeight make_norm(std::int64_t num_heads, bool has_weight) const;
};

// Holds a QKNormRotaryEmbeddingImpl: TORCH_MODULE with support for overloads of forward.
class QKNormRotaryEmbedding : public torch::nn::ModuleHolder<QKNormRotaryEmbeddingImpl> {
 public:
  using torch::nn::ModuleHolder<QKNormRotaryEmbeddingImpl>::ModuleHolder;
  using Impl = QKNormRotaryEmbeddingImpl;

  template <typename... Arguments>
  auto operator()(const Arguments&... arguments) {
    return impl_->forward(arguments...);
  }
};

// The options of ApplyRoPE: those of ApplyOptions, with the same meanings, and positions_tag.
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

// Holds an ApplyRoPEImpl: TORCH_MODULE with from_config.
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

// Holds a WithSideInputsFromInputTupleImpl.
class WithSideInputsFromInputTuple
    : public torch::nn::ModuleHolder<WithSideInputsFromInputTupleImpl> {
 public:
  using torch::nn::ModuleHolder<WithSideInputsFromInputTupleImpl>::ModuleHolder;
  using Impl = WithSideInputsFromInputTupleImpl;

  // Wraps a model in a handler that provides these tags.
  static WithSideInputsFromInputTuple handling(torch::nn::Sequential model,
                                               std::vector<std::string> tags) {
    return WithSideInputsFromInputTuple(std::move(model), std::move(tags));
  }

  at::Tensor operator()(const at::Tensor& x, const std::vector<at::Tensor>& side_inputs) {
    return impl_->forward(x, side_inputs);
  }
};

}  // namespace rope
