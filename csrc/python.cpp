// The module torch_rope._C: the operators, called through a typed handle. torch.ops would do the
// same, but its parsing of arguments costs microseconds.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "call.h"
#include "cuda/launch.h"

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

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The operators of torch-rope. Use them through the functions of torch_rope.";
  module.attr("has_cuda") = rope::cuda::has_kernels();
  define_family<Operators::Apply>(module, "apply", "positions", "inv_freq", "embedding_axis",
                                  "rotary_dim", "rotary_offset", "max_wavelength", "scale_factor",
                                  "attention_factor", "interleaved", "conjugate");
  define_family<Operators::ApplyCosSin>(module, "apply_cos_sin", "cos", "sin", "positions",
                                        "embedding_axis", "rotary_offset", "interleaved",
                                        "conjugate");
}
