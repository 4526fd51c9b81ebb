// The module torch_rope._C: the operators, called through typed handles (torch.ops spends
// microseconds on parsing arguments), and the frequencies.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/run.h"
#include "rope/frequencies.h"
#include "rotate_operators.h"

namespace py = pybind11;

namespace {

// An argument as it comes from Python.
template <typename>
using FromPython = py::handle;

// The rule that a message states for an argument's type.
template <typename Value>
constexpr const char* kRule = nullptr;
template <>
constexpr const char* kRule<at::Tensor> = "be a tensor";
template <>
constexpr const char* kRule<std::optional<at::Tensor>> = "be a tensor or None";
template <>
constexpr const char* kRule<std::int64_t> = "be an integer";
template <>
constexpr const char* kRule<std::optional<std::int64_t>> = "be an integer or None";
template <>
constexpr const char* kRule<std::optional<std::vector<std::int64_t>>> =
    "be a sequence of integers or None";
template <>
constexpr const char* kRule<double> = "be a number";
template <>
constexpr const char* kRule<bool> = "be a bool";

constexpr std::string_view kIntegers = kRule<std::optional<std::vector<std::int64_t>>>;
constexpr std::string_view kNumber = kRule<double>;

// Suggests the fix for common mistakes.
std::string hint(std::string_view argument, py::handle value) {
  if (argument == "positions") {
    return value.is_none() ? " (for example torch.arange(seq_len).unsqueeze(-1))"
                           : " (torch.as_tensor(positions) makes one)";
  }
  if (argument == "inv_freq" && PyFloat_Check(value.ptr())) {
    return " (the base of the frequencies is max_wavelength=)";
  }
  return argument == "cos" || argument == "sin"
             ? c10::str(" (torch.as_tensor(", argument, ") makes one)")
             : "";
}

std::string kind_of(py::handle value, std::string_view rule) {
  int overflow = 0;
  if (PyLong_CheckExact(value.ptr())) {
    PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
  }
  return value.is_none() ? "None"
         : overflow != 0 ? (rule == kNumber ? "one beyond float64" : "one beyond 64 bits")
                         : Py_TYPE(value.ptr())->tp_name;
}

// The same, with the element of a list or tuple that is no integer.
std::string kind_of_integers(py::handle values) {
  const std::string kind = kind_of(values, kIntegers);
  if (PyList_Check(values.ptr()) || PyTuple_Check(values.ptr())) {
    for (const py::handle value : values) {
      if (!py::detail::make_caster<std::int64_t>().load(value, /*convert=*/true)) {
        return c10::str("a ", kind, " with ", kind_of(value, kIntegers));
      }
    }
  }
  return kind;
}

// pybind11's own message prints all arguments, including the values of tensors, for which it waits
// for the device.
[[noreturn, gnu::noinline, gnu::cold]] void throw_type_error(const std::string& function,
                                                             std::string_view argument,
                                                             std::string_view rule,
                                                             py::handle value) {
  TORCH_CHECK_TYPE(false, "rope::", function, "(): expected ", argument, " to ",
                   argument == "x" ? "be a tensor or a (q, k) tuple" : rule, ", but got ",
                   rule == kIntegers ? kind_of_integers(value) : kind_of(value, rule),
                   hint(argument, value));
}

// Whether the tensor is a subclass with __torch_dispatch__, such as DTensor.
bool is_subclass(const at::Tensor& tensor) {
  return tensor.defined() && tensor.key_set().has(c10::DispatchKey::Python);
}

bool is_subclass(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && is_subclass(*tensor);
}

template <typename Value>
bool is_subclass(const Value&) {
  return false;
}

// What holds an argument of a function's type while the function runs.
template <typename Value>
using Held = std::conditional_t<std::is_same_v<Value, at::OptionalIntArrayRef>,
                                std::optional<std::vector<std::int64_t>>, Value>;

// An argument, converted.
template <typename Value>
struct ReadArgument {
  ReadArgument(const std::string& function, const char* name, py::handle value) {
    if (!load(value)) [[unlikely]] {
      throw_type_error(function, name, kRule<Value>, value);
    }
  }

  const Value& value() { return py::detail::cast_op<const Value&>(caster_); }

 private:
  bool load(py::handle value) {
    if constexpr (std::is_same_v<Value, bool>) {
      // The caster accepts anything with a truth value, including None and tensors.
      if (!PyBool_Check(value.ptr()) && (value.is_none() || THPVariable_Check(value.ptr()))) {
        return false;
      }
    }
    if constexpr (std::is_same_v<Value, std::optional<std::vector<std::int64_t>>>) {
      // The caster accepts sets and generators too, which the dispatcher's own Python does not.
      if (!value.is_none() && PySequence_Check(value.ptr()) == 0) {
        return false;
      }
    }
    return caster_.load(value, /*convert=*/true);
  }

  py::detail::make_caster<Value> caster_;
};

// Defines an operator as a Python function, which takes arguments by position: keywords cost time.
template <typename Operator, typename Result, typename... Values, std::size_t... index>
void define(py::module_& module, Result (*)(Values...), std::index_sequence<index...>) {
  const std::string name = Operator::name();
  const auto call = [=](FromPython<Values>... values) -> Result {
    constexpr auto kArguments = Operator::Traits::arguments();
    std::tuple<ReadArgument<Held<std::decay_t<Values>>>...> read{
        ReadArgument<Held<std::decay_t<Values>>>(name, std::get<index>(kArguments).name,
                                                 values)...};
    if ((is_subclass(std::get<index>(read).value()) || ...)) [[unlikely]] {
      py::module_::import("torch_rope._subclasses").attr("register_with_dtensor")();
    }
    const py::gil_scoped_release no_gil;
    return Operator::handle().call(rope::load<Values>(std::get<index>(read).value())...);
  };
  module.def(name.c_str(), torch::wrap_pybind_function(call));
}

template <typename... Operators>
void define_all(py::module_& module, rope::OperatorList<Operators...>) {
  const auto define_one = [&]<typename Result, typename... Values>(auto which,
                                                                   Result (*signature)(Values...)) {
    define<decltype(which)>(module, signature, std::index_sequence_for<Values...>());
  };
  (define_one(Operators(), static_cast<typename Operators::Signature*>(nullptr)), ...);
}

// Sets a member of FrequencyOptions from a dictionary. None is the same as a missing key.
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
    // Other values are named by type: a tensor may be large, or on another device.
    const bool is_short =
        py::isinstance<py::str>(value) || PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr());
    const py::object got =
        is_short ? py::object(py::repr(value)) : py::type::of(value).attr("__name__");
    TORCH_CHECK_TYPE(false, "rope::frequencies(): expected ", name, " to be ",
                     kIsText      ? "a string"
                     : kIsFlag    ? "a bool"
                     : kIsInteger ? "an integer"
                     : kIsList    ? "a list of numbers"
                                  : "a number",
                     ", but got ", got.cast<std::string>());
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

// No lock for free-threaded Python: what the library keeps between calls is constant or
// thread-local.
PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "The operators of torch-rope. Use them through the functions of torch_rope.";
  module.attr("has_cuda") = rope::cuda::has_kernels();
  define_all(module, rope::AllOperators());
  module.def("frequencies", torch::wrap_pybind_function(frequencies));
  module.def("axial_frequencies", torch::wrap_pybind_function(axial_frequencies));
  module.def("mrope_frequencies", torch::wrap_pybind_function(mrope_frequencies));
  module.def("mixed_frequencies", torch::wrap_pybind_function(mixed_frequencies));
}
