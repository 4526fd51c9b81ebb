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

// Defines the four functions of a family, which take the arguments of its schemas by position:
// keywords cost time.
template <typename Family>
void define_family(py::module_& module, const std::string& name) {
  const auto define = [&](const std::string& suffix, auto* function) {
    module.def((name + suffix).c_str(), torch::wrap_pybind_function_no_gil(function));
  };
  define("", Family::single);
  define("_qk", Family::pair);
  define("_", Family::single_in_place);
  define("_qk_", Family::pair_in_place);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The operators of torch-rope. Use them through the functions of torch_rope.";
  module.attr("has_cuda") = rope::cuda::has_kernels();
  define_family<Operators::Apply>(module, "apply");
  define_family<Operators::ApplyCosSin>(module, "apply_cos_sin");
}
