// The layers for torch::nn. Their Python counterparts are in _layers.py, _norm_layers.py and
// _side_inputs.py of python/torch_rope/.
#include "rope/modules.h"

#include <ATen/ATen.h>
#include <c10/util/accumulate.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "messages.h"

namespace rope {

// ---- Frequencies ----

namespace {

bool is_dynamic(const FrequencyOptions& scheme) { return scheme.rope_type == "dynamic"; }

bool is_longrope(const FrequencyOptions& scheme) { return scheme.rope_type == "longrope"; }

// Rejects options that are invalid for every call.
template <typename Options>
void check_options(const char* name, std::int64_t rotary_dim, const Options& options) {
  TORCH_CHECK_VALUE(rotary_dim > 0 && rotary_dim % 2 == 0, expected(name, "rotary_dim"),
                    "be positive and a multiple of 2, but got ", rotary_dim);
  TORCH_CHECK_VALUE(options.max_wavelength > 0 && std::isfinite(options.max_wavelength),
                    expected(name, "max_wavelength"), "be positive and finite, but got ",
                    options.max_wavelength);
  TORCH_CHECK_VALUE(std::isfinite(options.attention_factor.value_or(1.0)),
                    expected(name, "attention_factor"), "be finite, but got ",
                    *options.attention_factor);
  TORCH_CHECK_VALUE(options.rotary_offset >= 0, expected(name, "rotary_offset"),
                    "be at least 0, but got ", options.rotary_offset);
}

void check_inv_freq(const char* name, std::int64_t rotary_dim, const at::Tensor& inv_freq) {
  TORCH_CHECK_TYPE(inv_freq.defined(), expected(name, "inv_freq"), "be a tensor, but got none");
  TORCH_CHECK_TYPE(inv_freq.scalar_type() == at::kFloat || inv_freq.scalar_type() == at::kDouble,
                   expected(name, "inv_freq"), "be float32 or float64, but got ",
                   name_of(inv_freq.scalar_type()));
  TORCH_CHECK_VALUE(inv_freq.dim() == 1 || inv_freq.dim() == 2, expected(name, "inv_freq"),
                    "have shape (N) or (A, N), but got ", inv_freq.sizes());
  TORCH_CHECK_VALUE(inv_freq.size(-1) == rotary_dim / 2, expected(name, "inv_freq"),
                    "have rotary_dim / 2 = ", rotary_dim / 2, " columns, but got ",
                    inv_freq.size(-1));
}

template <typename Value>
void print_value(std::ostream& stream, const Value& value) {
  stream << value;
}

void print_value(std::ostream& stream, const std::vector<double>& values) {
  constexpr std::size_t kShown = 6;
  const c10::ArrayRef<double> all(values);
  stream << all.slice(0, std::min(kShown, all.size())) << (all.size() > kShown ? "..." : "");
}

// Prints a member of a scheme if it is set.
template <typename Value>
void print_if_given(std::ostream& stream, const char* name, const std::optional<Value>& value) {
  if (value.has_value()) {
    stream << ", " << name << "=";
    print_value(stream, *value);
  }
}

void print_scheme(std::ostream& stream, const FrequencyOptions& scheme) {
  stream << ", rope_type=" << scheme.rope_type;
  print_if_given(stream, "rope_theta", scheme.rope_theta);
  print_if_given(stream, "factor", scheme.factor);
  print_if_given(stream, "low_freq_factor", scheme.low_freq_factor);
  print_if_given(stream, "high_freq_factor", scheme.high_freq_factor);
  print_if_given(stream, "original_max_position_embeddings",
                 scheme.original_max_position_embeddings);
  print_if_given(stream, "short_factor", scheme.short_factor);
  print_if_given(stream, "long_factor", scheme.long_factor);
  print_if_given(stream, "beta_fast", scheme.beta_fast);
  print_if_given(stream, "beta_slow", scheme.beta_slow);
  print_if_given(stream, "mscale", scheme.mscale);
  print_if_given(stream, "mscale_all_dim", scheme.mscale_all_dim);
  print_if_given(stream, "truncate", scheme.truncate);
  print_if_given(stream, "partial_rotary_factor", scheme.partial_rotary_factor);
  print_if_given(stream, "max_position_embeddings", scheme.max_position_embeddings);
}

}  // namespace

template <typename Derived, typename Options>
WithFrequencies<Derived, Options>::WithFrequencies(std::int64_t rotary_dim, Options given)
    : options(std::move(given)) {
  constexpr const char* kName = Derived::kName;
  FrequencyOptions& scheme = options.rope_parameters;
  check_options(kName, rotary_dim, options);
  TORCH_CHECK_VALUE(
      !options.inv_freq.has_value() || scheme.rope_type == FrequencyOptions().rope_type,
      "rope::", kName, "(): expected rope_parameters or inv_freq, but got both");
  TORCH_CHECK_VALUE(options.max_wavelength == Options().max_wavelength ||
                        !(scheme.rope_theta.has_value() || options.inv_freq.has_value()),
                    expected(kName, "max_wavelength"), "be left at its default together with ",
                    options.inv_freq.has_value() ? "inv_freq" : "rope_theta", ", but got ",
                    options.max_wavelength);
  TORCH_CHECK_VALUE(!options.learned || !(is_dynamic(scheme) || is_longrope(scheme)),
                    expected(kName, "learned"),
                    "be false for a rope_type whose frequencies depend on the sequence length, but "
                    "got true for ",
                    scheme.rope_type);
  if (options.inv_freq.has_value()) {
    check_inv_freq(kName, rotary_dim, *options.inv_freq);
  }
  scheme.rotary_dim = rotary_dim;
  scheme.rope_theta = scheme.rope_theta.value_or(options.max_wavelength);
  scheme.seq_len = std::nullopt;
}

template <typename Derived, typename Options>
void WithFrequencies<Derived, Options>::reset() {
  const FrequencyOptions& scheme = options.rope_parameters;
  const Frequencies formed = options.inv_freq.has_value()
                                 ? Frequencies{options.inv_freq->detach().clone(), 1.0}
                                 : frequencies(scheme);
  attention_factor = options.attention_factor.value_or(formed.attention_factor);
  inv_freq = options.learned ? this->register_parameter("inv_freq", formed.inv_freq)
                             : this->register_buffer("inv_freq", formed.inv_freq);
  if (!options.inv_freq.has_value() && is_longrope(scheme)) {
    FrequencyOptions beyond = scheme;
    beyond.seq_len = *scheme.original_max_position_embeddings + 1;
    long_inv_freq = this->register_buffer("long_inv_freq", frequencies(beyond).inv_freq);
  }
}

template <typename Derived, typename Options>
at::Tensor WithFrequencies<Derived, Options>::inv_freq_at(
    const at::Tensor& positions, std::optional<std::int64_t> seq_len) const {
  const FrequencyOptions& scheme = options.rope_parameters;
  const bool grows = !options.inv_freq.has_value() && is_dynamic(scheme);
  if (!(grows || long_inv_freq.defined()) || positions.numel() == 0) {
    return inv_freq;
  }
  const std::int64_t trained =
      grows ? *scheme.max_position_embeddings : *scheme.original_max_position_embeddings;
  if (seq_len.has_value() && *seq_len <= trained) {
    return inv_freq;
  }
  const at::Tensor length = seq_len.has_value()
                                ? at::scalar_tensor(*seq_len, inv_freq.options().dtype(at::kLong))
                                : positions.max().add(1);
  if (grows) {
    return dynamic_frequencies(length, scheme.rotary_dim, *scheme.rope_theta, *scheme.factor,
                               trained, scheme.dtype);
  }
  return seq_len.has_value() ? long_inv_freq
                             : at::where(length.gt(trained), long_inv_freq, inv_freq);
}

template <typename Derived, typename Options>
void WithFrequencies<Derived, Options>::to(torch::Device device, torch::Dtype dtype,
                                           bool non_blocking) {
  to(device, non_blocking);
  to(dtype, non_blocking);
}

template <typename Derived, typename Options>
void WithFrequencies<Derived, Options>::to(torch::Dtype dtype, bool non_blocking) {
  for (const auto& child : this->children()) {
    child->to(dtype, non_blocking);
  }
}

template <typename Derived, typename Options>
void WithFrequencies<Derived, Options>::to(torch::Device device, bool non_blocking) {
  torch::nn::Module::to(device, non_blocking);
}

template <typename Derived, typename Options>
void WithFrequencies<Derived, Options>::print_options(std::ostream& stream) const {
  stream << std::boolalpha << options.rope_parameters.rotary_dim;
  if (options.inv_freq.has_value()) {
    stream << ", inv_freq of shape " << inv_freq.sizes();
  } else {
    print_scheme(stream, options.rope_parameters);
  }
  if (attention_factor != 1.0) {
    stream << ", attention_factor=" << attention_factor;
  }
  if (options.embedding_axis != -1) {
    stream << ", embedding_axis=" << options.embedding_axis;
  }
  if (options.rotary_offset != 0) {
    stream << ", rotary_offset=" << options.rotary_offset;
  }
  if (options.interleaved) {
    stream << ", interleaved=true";
  }
  if (options.learned) {
    stream << ", learned=true";
  }
  if (inv_freq.scalar_type() != at::kFloat) {
    stream << ", dtype=" << name_of(inv_freq.scalar_type());
  }
}

template class WithFrequencies<RotaryEmbeddingImpl, RotaryEmbeddingOptions>;
template class WithFrequencies<QKNormRotaryEmbeddingImpl, QKNormRotaryEmbeddingOptions>;

// ---- RotaryEmbedding ----

RotaryEmbeddingImpl::RotaryEmbeddingImpl(std::int64_t rotary_dim, RotaryEmbeddingOptions given)
    : WithFrequencies(rotary_dim, std::move(given)) {
  reset();
}

ApplyOptions RotaryEmbeddingImpl::apply_options(const at::Tensor& positions,
                                                std::optional<std::int64_t> seq_len) const {
  return {.inv_freq = inv_freq_at(positions, seq_len),
          .embedding_axis = options.embedding_axis,
          .rotary_dim = options.rope_parameters.rotary_dim,
          .rotary_offset = options.rotary_offset,
          .attention_factor = attention_factor,
          .interleaved = options.interleaved};
}

at::Tensor RotaryEmbeddingImpl::forward(const at::Tensor& x, const at::Tensor& positions,
                                        std::optional<std::int64_t> seq_len) {
  return rope::apply(x, positions, apply_options(positions, seq_len));
}

std::tuple<at::Tensor, at::Tensor> RotaryEmbeddingImpl::forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& positions,
    std::optional<std::int64_t> seq_len) {
  return rope::apply_qk(q, k, positions, apply_options(positions, seq_len));
}

bool RotaryEmbeddingImpl::is_serializable() const { return options.learned; }

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "rope::" << kName << "(";
  print_options(stream);
  stream << ")";
}

// ---- QKNormRotaryEmbedding ----

NormWeightImpl::NormWeightImpl(std::vector<std::int64_t> shape, double neutral, bool exists,
                               at::TensorOptions options)
    : shape_(std::move(shape)), neutral_(neutral), exists_(exists), options_(options) {
  reset();
}

std::optional<at::Tensor> NormWeightImpl::viewed() const {
  if (!exists_) {
    return std::nullopt;
  }
  return shape_.size() == 1 ? weight : weight.view(shape_);
}

void NormWeightImpl::reset() {
  if (exists_) {
    const std::int64_t size = c10::multiply_integers(shape_);
    weight = register_parameter("weight", at::full({size}, neutral_, options_));
  }
}

void NormWeightImpl::pretty_print(std::ostream& stream) const {
  stream << "rope::NormWeight(";
  if (exists_) {
    stream << weight.numel() << ")";
  } else {
    stream << "no weight)";
  }
}

namespace {

constexpr const char* kNorm = QKNormRotaryEmbeddingImpl::kName;

// Rejects norms that are invalid for every call.
void check_norms(std::int64_t rotated, const QKNormRotaryEmbeddingOptions& options) {
  TORCH_CHECK_VALUE(options.head_dim.value_or(rotated) >= rotated, expected(kNorm, "head_dim"),
                    "be at least rotary_offset + rotary_dim = ", rotated, ", but got ",
                    *options.head_dim);
  TORCH_CHECK_VALUE(options.eps >= 0 && std::isfinite(options.eps), expected(kNorm, "eps"),
                    "be at least 0 and finite, but got ", options.eps);
  TORCH_CHECK_VALUE(std::isfinite(options.weight_offset), expected(kNorm, "weight_offset"),
                    "be finite, but got ", options.weight_offset);
  TORCH_CHECK_TYPE(at::isFloatingType(options.weight_dtype.value_or(at::kFloat)),
                   expected(kNorm, "weight_dtype"), "be a floating-point dtype, but got ",
                   name_of(*options.weight_dtype));
  if (options.norm_axes.has_value()) {
    const at::IntArrayRef axes = *options.norm_axes;
    const std::set<std::int64_t> distinct(axes.begin(), axes.end());
    TORCH_CHECK_VALUE(!axes.empty() && distinct.size() == axes.size(), expected(kNorm, "norm_axes"),
                      "be distinct dimensions, but got ", axes);
  }
  if (options.num_heads.has_value()) {
    const auto [num_q_heads, num_k_heads] = *options.num_heads;
    TORCH_CHECK_VALUE(std::min(num_q_heads, num_k_heads) >= 1, expected(kNorm, "num_heads"),
                      "be the numbers of query heads and of key heads, at least 1, but got ",
                      num_q_heads, " and ", num_k_heads);
    const at::IntArrayRef axes = *options.norm_axes;
    TORCH_CHECK_VALUE(
        axes.size() == 2 && std::max(axes[0], axes[1]) < 0 &&
            (axes[0] == options.embedding_axis || axes[1] == options.embedding_axis),
        expected(kNorm, "norm_axes"),
        "be two negative dimensions, that of heads and embedding_axis, together with num_heads, "
        "but got ",
        axes);
  }
}

QKNormRotaryEmbeddingOptions with_defaults(QKNormRotaryEmbeddingOptions options) {
  if (options.num_heads.has_value() && !options.norm_axes.has_value()) {
    options.norm_axes = {-2, -1};
  }
  return options;
}

}  // namespace

QKNormRotaryEmbeddingImpl::QKNormRotaryEmbeddingImpl(std::int64_t rotary_dim,
                                                     QKNormRotaryEmbeddingOptions given)
    : WithFrequencies(rotary_dim, with_defaults(std::move(given))) {
  const std::int64_t rotated = options.rotary_offset + rotary_dim;
  check_norms(rotated, options);
  options.head_dim = options.head_dim.value_or(rotated);
  reset();
}

NormWeight QKNormRotaryEmbeddingImpl::make_norm(std::int64_t num_heads, bool has_weight) const {
  std::vector<std::int64_t> shape = {*options.head_dim};
  if (options.num_heads.has_value()) {
    const std::vector<std::int64_t>& axes = *options.norm_axes;
    const std::int64_t heads = axes[0] + axes[1] - options.embedding_axis;
    // Weights have the dimensions of x without the embedding axis, and then that.
    const std::int64_t distance = heads > options.embedding_axis ? -heads : -heads - 1;
    shape.insert(shape.begin(), distance, 1);
    shape.front() = num_heads;
  }
  return NormWeight(
      std::move(shape), 1.0 - options.weight_offset, has_weight,
      at::TensorOptions(inv_freq.device())
          .dtype(options.weight_dtype.value_or(at::get_default_dtype_as_scalartype())));
}

void QKNormRotaryEmbeddingImpl::reset() {
  WithFrequencies::reset();
  const auto [num_q_heads, num_k_heads] = options.num_heads.value_or(std::pair(1, 1));
  q_norm = register_module("q_norm", make_norm(num_q_heads, options.q_weight));
  k_norm = register_module("k_norm", make_norm(num_k_heads, options.k_weight));
}

NormOptions QKNormRotaryEmbeddingImpl::norm_options(const at::Tensor& positions,
                                                    std::optional<std::int64_t> seq_len) const {
  return {.inv_freq = inv_freq_at(positions, seq_len),
          .embedding_axis = options.embedding_axis,
          .rotary_dim = options.rope_parameters.rotary_dim,
          .rotary_offset = options.rotary_offset,
          .attention_factor = attention_factor,
          .interleaved = options.interleaved,
          .eps = options.eps,
          .weight_offset = options.weight_offset,
          .norm_axes = options.norm_axes,
          .norm_last = options.norm_last};
}

at::Tensor QKNormRotaryEmbeddingImpl::forward(const at::Tensor& x, const at::Tensor& positions,
                                              std::optional<std::int64_t> seq_len) {
  return rope::norm_apply(x, q_norm->viewed(), positions, norm_options(positions, seq_len));
}

std::tuple<at::Tensor, at::Tensor> QKNormRotaryEmbeddingImpl::forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& positions,
    std::optional<std::int64_t> seq_len) {
  return rope::norm_apply_qk(q, k, q_norm->viewed(), k_norm->viewed(), positions,
                             norm_options(positions, seq_len));
}

at::Tensor QKNormRotaryEmbeddingImpl::rotate_key(const at::Tensor& x, const at::Tensor& positions,
                                                 std::optional<std::int64_t> seq_len) {
  return rope::norm_apply(x, k_norm->viewed(), positions, norm_options(positions, seq_len));
}

void QKNormRotaryEmbeddingImpl::save(torch::serialize::OutputArchive& archive) const {
  if (options.learned) {
    archive.write("inv_freq", inv_freq);
  }
  for (const auto& child : named_children()) {
    torch::serialize::OutputArchive nested(archive.compilation_unit());
    child.value()->save(nested);
    archive.write(child.key(), nested);
  }
}

void QKNormRotaryEmbeddingImpl::load(torch::serialize::InputArchive& archive) {
  if (options.learned) {
    archive.read("inv_freq", inv_freq);
  }
  for (const auto& child : named_children()) {
    torch::serialize::InputArchive nested;
    archive.read(child.key(), nested);
    child.value()->load(nested);
  }
}

void QKNormRotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "rope::" << kName << "(";
  print_options(stream);
  if (*options.head_dim != options.rotary_offset + options.rope_parameters.rotary_dim) {
    stream << ", head_dim=" << *options.head_dim;
  }
  if (options.eps != QKNormRotaryEmbeddingOptions().eps) {
    stream << ", eps=" << options.eps;
  }
  if (options.weight_offset != 0.0) {
    stream << ", weight_offset=" << options.weight_offset;
  }
  if (options.norm_axes.has_value()) {
    stream << ", norm_axes=[" << c10::Join(", ", *options.norm_axes) << "]";
  }
  if (options.norm_last) {
    stream << ", norm_last=true";
  }
  stream << ")";
}

// ---- Side inputs ----

namespace {

// The side inputs of this thread's enclosing handlers.
thread_local std::map<std::string, at::Tensor> side_inputs_here;

// Provides side inputs for its lifetime.
class Provided {
 public:
  Provided(const std::vector<std::string>& tags, const std::vector<at::Tensor>& side_inputs)
      : outer_(side_inputs_here) {
    std::map<std::string, at::Tensor> inner = outer_;
    for (std::size_t i = 0; i < tags.size(); ++i) {
      TORCH_CHECK_VALUE(inner.emplace(tags[i], side_inputs[i]).second,
                        "rope::WithSideInputsFromInputTuple(): expected each tag to be provided "
                        "once, but got ",
                        tags[i], " twice");
    }
    side_inputs_here = std::move(inner);
  }
  Provided(const Provided&) = delete;
  Provided& operator=(const Provided&) = delete;
  ~Provided() { side_inputs_here = std::move(outer_); }

 private:
  std::map<std::string, at::Tensor> outer_;
};

}  // namespace

WithSideInputsFromInputTupleImpl::WithSideInputsFromInputTupleImpl(torch::nn::Sequential model,
                                                                   std::vector<std::string> tags)
    : model(register_module("model", std::move(model))), tags(std::move(tags)) {
  for (auto tag = this->tags.begin(); tag != this->tags.end(); ++tag) {
    TORCH_CHECK_VALUE(std::find(this->tags.begin(), tag, *tag) == tag,
                      "rope::WithSideInputsFromInputTuple(): expected each tag to be provided "
                      "once, but got ",
                      *tag, " twice");
  }
}

at::Tensor WithSideInputsFromInputTupleImpl::forward(const at::Tensor& x,
                                                     const std::vector<at::Tensor>& side_inputs) {
  TORCH_CHECK_VALUE(side_inputs.size() == tags.size(),
                    "rope::WithSideInputsFromInputTuple(): expected side_inputs to be one for each "
                    "of the tags ",
                    tags, ", but got ", side_inputs.size());
  const Provided provided(tags, side_inputs);
  return model->forward(x);
}

std::shared_ptr<torch::nn::Module> WithSideInputsFromInputTupleImpl::clone(
    const std::optional<torch::Device>& device) const {
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone(device));
  return std::make_shared<WithSideInputsFromInputTupleImpl>(torch::nn::Sequential(copy), tags);
}

// ---- ApplyRoPE ----

ApplyRoPEImpl::ApplyRoPEImpl(std::int64_t embedding_axis, ApplyRoPEOptions options)
    : embedding_axis(embedding_axis), options(std::move(options)) {}

at::Tensor ApplyRoPEImpl::forward(const at::Tensor& x, const at::Tensor& positions) {
  TORCH_CHECK_VALUE(positions.defined() || options.positions_tag.has_value(),
                    "rope::ApplyRoPE(): expected positions to be given to a layer without "
                    "positions_tag, but got an undefined tensor");
  at::Tensor used = positions;
  if (!used.defined() && options.positions_tag.has_value()) {
    const auto provided = side_inputs_here.find(*options.positions_tag);
    TORCH_CHECK_VALUE(provided != side_inputs_here.end(), "rope::ApplyRoPE(): expected the tag ",
                      *options.positions_tag,
                      " to be provided by a WithSideInputsFromInputTuple around this layer, but "
                      "got none");
    used = provided->second;
  }
  return rope::apply(x, used,
                     {.embedding_axis = embedding_axis,
                      .rotary_dim = options.rotary_dim,
                      .max_wavelength = options.max_wavelength,
                      .scale_factor = options.scale_factor,
                      .interleaved = options.interleaved});
}

void ApplyRoPEImpl::pretty_print(std::ostream& stream) const {
  stream << "rope::ApplyRoPE(embedding_axis=" << embedding_axis
         << ", max_wavelength=" << options.max_wavelength;
  if (options.scale_factor != 1.0) {
    stream << ", scale_factor=" << options.scale_factor;
  }
  if (options.rotary_dim.has_value()) {
    stream << ", rotary_dim=" << *options.rotary_dim;
  }
  if (options.interleaved) {
    stream << ", interleaved=true";
  }
  if (options.positions_tag.has_value()) {
    stream << ", positions_tag=" << *options.positions_tag;
  }
  stream << ")";
}

}  // namespace rope
