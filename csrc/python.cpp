// The module torch_rope._C: the operators, called through a typed handle (torch.ops would do the
// same, but its parsing of arguments costs microseconds), and the frequencies.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "cuda/launch.h"
#include "rope/frequencies.h"

namespace py = pybind11;

namespace {

using Operators = rope::Operators<rope::dispatch>;

// Defines the four functions of a family, with the arguments of its schemas. They are called by
// position, since keywords cost time; the names are for error messages.
template <typename Family, typename... Arguments>
void define_family(py::module_& module, const std::string& name, const Arguments&... arguments) {
  const auto define = [&](const std::string& suffix, auto* function, const auto&... rotated) {
    module.def((name + suffix).c_str(), torch::wrap_pybind_function_no_gil(function), rotated...,
               py::arg(arguments)...);
  };
  define("", Family::single, py::arg("x"));
  define("_qk", Family::pair, py::arg("q"), py::arg("k"));
  define("_", Family::single_in_place, py::arg("x"));
  define("_qk_", Family::pair_in_place, py::arg("q"), py::arg("k"));
}

// Sets a member of FrequencyOptions to what a dictionary has under its name; None is as good as
// nothing.
template <typename Member>
void read(const py::dict& rope_parameters, const char* name, Member& member) {
  if (!rope_parameters.contains(name) || rope_parameters[name].is_none()) {
    return;
  }
  const py::object value = rope_parameters[name];
  try {
    member = py::cast<Member>(value);
  } catch (const py::cast_error&) {
    constexpr bool kIsText = std::is_same_v<Member, std::string>;
    constexpr bool kIsFlag = std::is_same_v<Member, std::optional<bool>>;
    constexpr bool kIsInteger = std::is_same_v<Member, std::optional<std::int64_t>>;
    constexpr bool kIsList = std::is_same_v<Member, std::optional<std::vector<double>>>;
    TORCH_CHECK_TYPE(false, "rope::frequencies(): expected ", name, " to be ",
                     kIsText      ? "a string"
                     : kIsFlag    ? "a bool"
                     : kIsInteger ? "an integer"
                     : kIsList    ? "a list of numbers"
                                  : "a number",
                     ", but got ", py::repr(value).cast<std::string>());
  }
}

std::pair<at::Tensor, double> frequencies(const py::dict& rope_parameters, std::int64_t rotary_dim,
                                          std::optional<std::int64_t> max_position_embeddings,
                                          std::optional<std::int64_t> seq_len, at::ScalarType dtype,
                                          at::Device device) {
  rope::FrequencyOptions options = {.rotary_dim = rotary_dim,
                                    .max_position_embeddings = max_position_embeddings,
                                    .seq_len = seq_len,
                                    .dtype = dtype,
                                    .device = device};
  read(rope_parameters, "type", options.rope_type);  // The older name.
  read(rope_parameters, "rope_type", options.rope_type);
  read(rope_parameters, "rope_theta", options.rope_theta);
  read(rope_parameters, "factor", options.factor);
  read(rope_parameters, "low_freq_factor", options.low_freq_factor);
  read(rope_parameters, "high_freq_factor", options.high_freq_factor);
  read(rope_parameters, "original_max_position_embeddings",
       options.original_max_position_embeddings);
  read(rope_parameters, "short_factor", options.short_factor);
  read(rope_parameters, "long_factor", options.long_factor);
  read(rope_parameters, "attention_factor", options.attention_factor);
  read(rope_parameters, "beta_fast", options.beta_fast);
  read(rope_parameters, "beta_slow", options.beta_slow);
  read(rope_parameters, "mscale", options.mscale);
  read(rope_parameters, "mscale_all_dim", options.mscale_all_dim);
  read(rope_parameters, "truncate", options.truncate);
  read(rope_parameters, "partial_rotary_factor", options.partial_rotary_factor);
  rope::Frequencies formed = rope::frequencies(options);
  return {std::move(formed.inv_freq), formed.attention_factor};
}

at::Tensor axial_frequencies(const std::vector<std::int64_t>& rotary_dims, double max_wavelength,
                             at::ScalarType dtype, at::Device device) {
  return rope::axial_frequencies(
      rotary_dims, {.max_wavelength = max_wavelength, .dtype = dtype, .device = device});
}

at::Tensor mrope_frequencies(const at::Tensor& inv_freq, const std::vector<std::int64_t>& sections,
                             bool interleaved) {
  return rope::mrope_frequencies(inv_freq, sections, interleaved);
}

at::Tensor mixed_frequencies(std::int64_t rotary_dim, std::int64_t num_heads, double max_wavelength,
                             std::optional<at::Generator> generator, at::ScalarType dtype,
                             at::Device device) {
  return rope::mixed_frequencies(rotary_dim, {.num_heads = num_heads,
                                              .max_wavelength = max_wavelength,
                                              .generator = std::move(generator),
                                              .dtype = dtype,
                                              .device = device});
}

}  // namespace

// Free-threaded Python needs no lock here: whatever the library keeps between calls is constant, or
// belongs to one thread.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "The operators of torch-rope. Use them through the functions of torch_rope.";
  module.attr("has_cuda") = rope::cuda::has_kernels();
  define_family<Operators::Apply>(module, "apply", "positions", "inv_freq", "embedding_axis",
                                  "rotary_dim", "rotary_offset", "max_wavelength", "scale_factor",
                                  "attention_factor", "interleaved", "conjugate");
  define_family<Operators::ApplyCosSin>(module, "apply_cos_sin", "cos", "sin", "positions",
                                        "embedding_axis", "rotary_offset", "interleaved",
                                        "conjugate");
  module.def("frequencies", torch::wrap_pybind_function(frequencies));
  module.def("axial_frequencies", torch::wrap_pybind_function(axial_frequencies));
  module.def("mrope_frequencies", torch::wrap_pybind_function(mrope_frequencies));
  module.def("mixed_frequencies", torch::wrap_pybind_function(mixed_frequencies));
}
