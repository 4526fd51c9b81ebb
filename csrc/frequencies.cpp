// The frequency schemes.
//
// NOTE [ The bits of transformers ]
// float32 results match transformers bit for bit, since models are trained with those: the same
// tensor operations in the same order, with scalars in float64 as in Python. PyTorch divides a
// scalar by a tensor by multiplying with the reciprocal; so does quotient().
#include "rope/frequencies.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <sstream>
#include <string_view>

#include "messages.h"

namespace rope {

namespace {

void check_dtype(const char* function, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, expected(function, "dtype"),
                   "be float32 or float64, but got ", name_of(dtype));
}

void check_positive(const char* function, std::string_view argument, double value) {
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), expected(function, argument),
                    "be positive and finite, but got ", value);
}

void check_finite(const char* function, std::string_view argument, std::optional<double> value) {
  TORCH_CHECK_VALUE(std::isfinite(value.value_or(0.0)), expected(function, argument),
                    "be finite, but got ", *value);
}

void check_dim(const char* function, std::string_view argument, std::int64_t dim,
               std::int64_t divisor = 2) {
  TORCH_CHECK_VALUE(dim > 0 && dim % divisor == 0, expected(function, argument),
                    "be positive and a multiple of ", divisor, ", but got ", dim);
}

at::Tensor quotient(double numerator, const at::Tensor& denominator) {
  return denominator.reciprocal().mul(numerator);
}

// 2n / rotary_dim for the first num_pairs pairs.
at::Tensor exponents(std::int64_t num_pairs, std::int64_t rotary_dim,
                     const at::TensorOptions& options) {
  return at::arange(0, 2 * num_pairs, 2, options.dtype(at::kLong)).to(options).div(rotary_dim);
}

// rope_theta^(2n / rotary_dim): the wavelengths divided by 2 pi.
at::Tensor powers(const FrequencyOptions& options) {
  return at::pow(*options.rope_theta,
                 exponents(options.rotary_dim / 2, options.rotary_dim, options.dtype));
}

at::Tensor unscaled(const FrequencyOptions& options) { return quotient(1.0, powers(options)); }

// ---- The schemes ----

Frequencies default_frequencies(const FrequencyOptions& options) {
  return {unscaled(options), 1.0};
}

Frequencies linear(const FrequencyOptions& options) {
  return {unscaled(options).div(*options.factor), 1.0};
}

Frequencies dynamic(const FrequencyOptions& options) {
  const std::int64_t trained = *options.max_position_embeddings;
  const at::Tensor seq_len = at::scalar_tensor(options.seq_len.value_or(trained), at::kDouble);
  return {dynamic_frequencies(seq_len, options.rotary_dim, *options.rope_theta, *options.factor,
                              trained, options.dtype),
          1.0};
}

// YaRN's scaling of the attention logits (arXiv 2309.00071, equation 22).
double attention_scale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double yarn_attention_factor(const FrequencyOptions& options) {
  if (options.attention_factor.has_value()) {
    return *options.attention_factor;
  }
  const double mscale = options.mscale.value_or(0.0);
  const double mscale_all_dim = options.mscale_all_dim.value_or(0.0);
  if (mscale != 0.0 && mscale_all_dim != 0.0) {
    return attention_scale(*options.factor, mscale) /
           attention_scale(*options.factor, mscale_all_dim);
  }
  return attention_scale(*options.factor, 1.0);
}

// The (fractional) index of the pair that makes this many turns over the trained length.
double dim_of_turns(const FrequencyOptions& options, double turns) {
  const auto trained = static_cast<double>(*options.original_max_position_embeddings);
  return static_cast<double>(options.rotary_dim) *
         std::log(trained / (turns * 2 * std::numbers::pi)) / (2 * std::log(*options.rope_theta));
}

Frequencies yarn(const FrequencyOptions& options) {
  TORCH_CHECK_VALUE(*options.rope_theta > 1, expected("frequencies", "rope_theta"),
                    "be greater than 1 for rope_type yarn, but got ", *options.rope_theta);
  for (const auto& [name, turns] :
       {std::pair("beta_fast", options.beta_fast), {"beta_slow", options.beta_slow}}) {
    if (turns.value_or(0.0) != 0.0) {
      check_positive("frequencies", name, *turns);
    }
  }
  check_finite("frequencies", "mscale", options.mscale);
  check_finite("frequencies", "mscale_all_dim", options.mscale_all_dim);
  const auto or_default = [](std::optional<double> value, double otherwise) {
    return value.value_or(0.0) != 0.0 ? *value : otherwise;
  };
  double low = dim_of_turns(options, or_default(options.beta_fast, 32));
  double high = dim_of_turns(options, or_default(options.beta_slow, 1));
  if (options.truncate.value_or(true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(options.rotary_dim - 1));
  if (low == high) {
    high += 0.001;  // Avoids division by zero.
  }

  const at::Tensor ramp =
      at::arange(options.rotary_dim / 2, options.dtype).sub(low).div(high - low).clamp(0, 1);
  const at::Tensor kept = at::rsub(ramp, 1);
  const at::Tensor wavelengths = powers(options);
  const at::Tensor interpolated = quotient(1.0, wavelengths.mul(*options.factor));
  const at::Tensor extrapolated = quotient(1.0, wavelengths);
  return {interpolated * at::rsub(kept, 1) + extrapolated * kept, yarn_attention_factor(options)};
}

double longrope_attention_factor(const FrequencyOptions& options) {
  if (options.attention_factor.has_value()) {
    return *options.attention_factor;
  }
  const auto trained = static_cast<double>(*options.original_max_position_embeddings);
  TORCH_CHECK_VALUE(options.factor.has_value() || options.max_position_embeddings.has_value(),
                    expected("frequencies", "factor"),
                    "be given for rope_type longrope, or attention_factor, or "
                    "max_position_embeddings as its multiple of original_max_position_embeddings, "
                    "but got none of them");
  const double factor = options.factor.has_value()
                            ? *options.factor
                            : static_cast<double>(*options.max_position_embeddings) / trained;
  return factor <= 1.0 ? 1.0 : std::sqrt(1 + std::log(factor) / std::log(trained));
}

Frequencies longrope(const FrequencyOptions& options) {
  for (const auto& [divisors, name] :
       {std::pair(&options.short_factor, "short_factor"), {&options.long_factor, "long_factor"}}) {
    TORCH_CHECK_VALUE(static_cast<std::int64_t>((*divisors)->size()) == options.rotary_dim / 2,
                      expected("frequencies", name),
                      "have rotary_dim / 2 = ", options.rotary_dim / 2, " elements, but got ",
                      (*divisors)->size());
    for (const double divisor : **divisors) {
      TORCH_CHECK_VALUE(divisor > 0 && std::isfinite(divisor), expected("frequencies", name),
                        "have positive and finite elements, but got ", divisor);
    }
  }
  const bool is_long = options.seq_len.value_or(0) > *options.original_max_position_embeddings;
  const std::vector<double>& divisors = is_long ? *options.long_factor : *options.short_factor;
  return {quotient(1.0, at::tensor(divisors, options.dtype) * powers(options)),
          longrope_attention_factor(options)};
}

Frequencies llama3(const FrequencyOptions& options) {
  const double factor = *options.factor;
  const double low = *options.low_freq_factor;
  const double high = *options.high_freq_factor;
  const auto trained = static_cast<double>(*options.original_max_position_embeddings);

  TORCH_CHECK_VALUE(high > low, expected("frequencies", "high_freq_factor"),
                    "be greater than low_freq_factor = ", low, ", but got ", high);
  const at::Tensor inv_freq = unscaled(options);
  const at::Tensor wavelengths = quotient(2 * std::numbers::pi, inv_freq);
  const at::Tensor is_long = wavelengths.gt(trained / low);
  const at::Tensor is_short = wavelengths.lt(trained / high);
  const at::Tensor scaled = at::where(is_long, inv_freq.div(factor), inv_freq);
  const at::Tensor kept = quotient(trained, wavelengths).sub(low).div(high - low);
  const at::Tensor between = at::rsub(kept, 1) * scaled / factor + kept * scaled;
  return {at::where(is_long.logical_or(is_short), scaled, between), 1.0};
}

Frequencies proportional(const FrequencyOptions& options) {
  const double share = options.partial_rotary_factor.value_or(1.0);
  TORCH_CHECK_VALUE(0 <= share && share <= 1, expected("frequencies", "partial_rotary_factor"),
                    "be in [0, 1], but got ", share);
  const std::int64_t num_pairs = options.rotary_dim / 2;
  const auto num_rotated =
      static_cast<std::int64_t>(std::floor(share * static_cast<double>(options.rotary_dim) / 2));
  const at::Tensor rotated = quotient(
      1.0, at::pow(*options.rope_theta, exponents(num_rotated, options.rotary_dim, options.dtype)));
  const at::Tensor constant = at::zeros(num_pairs - num_rotated, options.dtype);
  return {at::cat({rotated, constant}).div(options.factor.value_or(1.0)), 1.0};
}

// ---- The options of each scheme ----

struct Scheme {
  const char* rope_type;
  Frequencies (*form)(const FrequencyOptions&);
  std::vector<const char*> required;
  std::vector<const char*> optional;
};

const std::vector<Scheme>& schemes() {
  static const std::vector<Scheme> all = {
      {"default", default_frequencies, {"rope_theta"}, {}},
      {"linear", linear, {"rope_theta", "factor"}, {}},
      {"dynamic", dynamic, {"rope_theta", "factor", "max_position_embeddings"}, {"seq_len"}},
      {"yarn",
       yarn,
       {"rope_theta", "factor", "original_max_position_embeddings"},
       {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}},
      {"longrope",
       longrope,
       {"rope_theta", "short_factor", "long_factor", "original_max_position_embeddings"},
       {"factor", "attention_factor", "max_position_embeddings", "seq_len"}},
      {"llama3",
       llama3,
       {"rope_theta", "factor", "low_freq_factor", "high_freq_factor",
        "original_max_position_embeddings"},
       {}},
      {"proportional", proportional, {"rope_theta"}, {"partial_rotary_factor", "factor"}},
  };
  return all;
}

std::string join(const std::vector<const char*>& words) {
  std::ostringstream joined;
  for (const char* word : words) {
    joined << (joined.tellp() > 0 ? ", " : "") << word;
  }
  return joined.str();
}

// Calls visit(name, member) for each member that a scheme can require.
template <typename Visit>
void for_each_requirable(const FrequencyOptions& options, const Visit& visit) {
  visit("rope_theta", options.rope_theta);
  visit("factor", options.factor);
  visit("low_freq_factor", options.low_freq_factor);
  visit("high_freq_factor", options.high_freq_factor);
  visit("original_max_position_embeddings", options.original_max_position_embeddings);
  visit("max_position_embeddings", options.max_position_embeddings);
  visit("short_factor", options.short_factor);
  visit("long_factor", options.long_factor);
}

const Scheme& checked_scheme(const FrequencyOptions& options) {
  const auto scheme = std::ranges::find_if(
      schemes(), [&](const Scheme& each) { return options.rope_type == each.rope_type; });
  if (scheme == schemes().end()) {
    std::vector<const char*> known;
    for (const Scheme& each : schemes()) {
      known.push_back(each.rope_type);
    }
    TORCH_CHECK_VALUE(false, expected("frequencies", "rope_type"), "be one of ", join(known),
                      ", but got ", options.rope_type);
  }

  for_each_requirable(options, [&](std::string_view name, const auto& member) {
    const bool is_required = std::ranges::find(scheme->required, name) != scheme->required.end();
    TORCH_CHECK_VALUE(member.has_value() || !is_required, expected("frequencies", name),
                      "be given for rope_type ", scheme->rope_type, ", which takes ",
                      join(scheme->required), scheme->optional.empty() ? "" : " and optionally ",
                      join(scheme->optional), ", but it is missing");
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(*member)>>) {
      if (member.has_value()) {
        check_positive("frequencies", name, static_cast<double>(*member));
      }
    }
  });
  return *scheme;
}

}  // namespace

Frequencies frequencies(const FrequencyOptions& options) {
  check_dtype("frequencies", options.dtype);
  check_dim("frequencies", "rotary_dim", options.rotary_dim);
  TORCH_CHECK_VALUE(options.seq_len.value_or(0) >= 0, expected("frequencies", "seq_len"),
                    "be at least 0, but got ", *options.seq_len);
  const Scheme& scheme = checked_scheme(options);
  check_finite("frequencies", "attention_factor", options.attention_factor);
  Frequencies result = scheme.form(options);
  TORCH_CHECK_VALUE(std::isfinite(result.attention_factor),
                    expected("frequencies", "rope_parameters"),
                    "give a finite attention_factor, but got ", result.attention_factor);
  result.inv_freq = result.inv_freq.to(options.device);
  return result;
}

at::Tensor dynamic_frequencies(const at::Tensor& seq_len, std::int64_t rotary_dim,
                               double rope_theta, double factor,
                               std::int64_t max_position_embeddings, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(rotary_dim >= 4, expected("frequencies", "rotary_dim"),
                    "be at least 4 for rope_type dynamic, but got ", rotary_dim);
  const at::TensorOptions options = seq_len.options().dtype(dtype);
  const at::Tensor length = seq_len.to(at::kDouble).clamp_min(max_position_embeddings);
  const at::Tensor growth =
      length.mul(factor).div(static_cast<double>(max_position_embeddings)).sub(factor - 1);
  // A tensor exponent: pow with a scalar exponent of 2 multiplies, which gives other bits.
  const at::Tensor power = at::scalar_tensor(
      static_cast<double>(rotary_dim) / static_cast<double>(rotary_dim - 2), length.options());
  const at::Tensor theta = at::pow(growth, power).mul(rope_theta).to(dtype);
  return quotient(1.0, at::pow(theta, exponents(rotary_dim / 2, rotary_dim, options)));
}

at::Tensor axial_frequencies(at::IntArrayRef rotary_dims, const AxialOptions& options) {
  constexpr const char* kFunction = "axial_frequencies";
  check_dtype(kFunction, options.dtype);
  check_positive(kFunction, "max_wavelength", options.max_wavelength);
  TORCH_CHECK_VALUE(!rotary_dims.empty(), expected(kFunction, "rotary_dims"),
                    "have an element for each axis, but got none");
  std::vector<at::Tensor> blocks;
  for (const std::int64_t rotary_dim : rotary_dims) {
    check_dim(kFunction, "rotary_dims", rotary_dim);
    blocks.push_back(unscaled({.rotary_dim = rotary_dim,
                               .rope_theta = options.max_wavelength,
                               .dtype = options.dtype})
                         .unsqueeze(0));
  }
  return at::block_diag(blocks).to(options.device);
}

at::Tensor mrope_frequencies(const at::Tensor& inv_freq, at::IntArrayRef sections,
                             bool interleaved) {
  constexpr const char* kFunction = "mrope_frequencies";
  TORCH_CHECK_TYPE(inv_freq.scalar_type() == at::kFloat || inv_freq.scalar_type() == at::kDouble,
                   expected(kFunction, "inv_freq"), "be float32 or float64, but got ",
                   name_of(inv_freq.scalar_type()));
  TORCH_CHECK_VALUE(inv_freq.dim() == 1, expected(kFunction, "inv_freq"),
                    "have shape (N), but got ", inv_freq.sizes());
  const auto num_axes = static_cast<std::int64_t>(sections.size());
  const std::int64_t num_pairs = inv_freq.size(0);
  std::int64_t sum = 0;
  for (const std::int64_t section : sections) {
    TORCH_CHECK_VALUE(section >= 0, expected(kFunction, "sections"),
                      "hold numbers of pairs, at least 0, but got ", sections);
    sum += section;
  }
  TORCH_CHECK_VALUE(sum == num_pairs, expected(kFunction, "sections"), "have the sum ", num_pairs,
                    ", the number of frequencies, but got ", sections);

  std::vector<std::int64_t> axis_of_pair(num_pairs, 0);
  auto next = axis_of_pair.begin();
  for (std::int64_t axis = 0; axis < num_axes; ++axis) {
    if (!interleaved) {
      next = std::fill_n(next, sections[axis], axis);
      continue;
    }
    TORCH_CHECK_VALUE(axis == 0 || axis + num_axes * (sections[axis] - 1) < num_pairs,
                      expected(kFunction, "sections"), "keep axis ", axis, " within ", num_pairs,
                      " pairs at a stride of ", num_axes, ", but got ", sections);
    for (std::int64_t i = 0; axis > 0 && i < sections[axis]; ++i) {
      axis_of_pair[axis + num_axes * i] = axis;
    }
  }
  const at::Tensor axes = at::tensor(axis_of_pair, at::kLong).to(inv_freq.device());
  const at::Tensor follows = at::arange(num_axes, axes.options()).unsqueeze(-1).eq(axes);  // (A, N)
  return at::where(follows, inv_freq, at::zeros({}, inv_freq.options()));
}

at::Tensor mixed_frequencies(std::int64_t rotary_dim, const MixedOptions& options) {
  constexpr const char* kFunction = "mixed_frequencies";
  check_dtype(kFunction, options.dtype);
  check_dim(kFunction, "rotary_dim", rotary_dim, 4);
  check_positive(kFunction, "max_wavelength", options.max_wavelength);
  TORCH_CHECK_VALUE(options.num_heads > 0, expected(kFunction, "num_heads"),
                    "be positive, but got ", options.num_heads);
  TORCH_CHECK_TYPE(!options.generator.has_value() || options.generator->device().is_cpu(),
                   expected(kFunction, "generator"), "be on the CPU, but got one on ",
                   options.generator->device());
  const at::Tensor magnitudes = quotient(
      1.0,
      at::pow(options.max_wavelength, exponents(rotary_dim / 4, rotary_dim / 2, options.dtype)));
  const at::Tensor first =
      at::rand({options.num_heads, 1}, options.generator, options.dtype).mul(2 * std::numbers::pi);
  // (H, 2, 1) times (rotary_dim / 4): the second half of a head's pairs uses the direction
  // perpendicular to the first.
  const at::Tensor directions = at::stack({first, first.add(std::numbers::pi / 2)}, /*dim=*/1);
  const at::Tensor rows = at::stack({directions.cos() * magnitudes, directions.sin() * magnitudes});
  return rows.flatten(1).to(options.device);
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  library.impl("_dynamic_frequencies", TORCH_FN(rope::dynamic_frequencies));
}
