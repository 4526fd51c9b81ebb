// One call of any of the eight operators as one value, and the two ways between it and the
// dispatcher: Operators turns the arguments of a schema into a Call, dispatch sends a Call to the
// operator it stands for.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "rope/rope.h"

namespace rope {

struct Call {
  at::Tensor q;  // x, where the call has one tensor
  at::Tensor k;  // undefined where the call has one tensor
  bool is_pair = false;
  bool in_place = false;
  bool uses_tables = false;
  at::Tensor positions;  // undefined where tables broadcast with x themselves
  at::Tensor cos;        // both undefined where angles come from positions and frequencies
  at::Tensor sin;
  bool full_width = false;  // tables have a column for each element, not for each pair
  ApplyOptions options;     // a call with tables leaves what makes an angle at its defaults

  // The operator's name without its namespace.
  std::string name() const;
};

// The call, functional, on other tensors: on one or on two.
Call on(Call call, const at::Tensor& x);
Call on(Call call, const at::Tensor& q, const at::Tensor& k);

// The call in place.
Call in_place(Call call);

// What a call returns. An in-place call returns what it was given, in C++; its operator returns
// nothing.
struct Outputs {
  at::Tensor q;
  at::Tensor k;
};

// An undefined tensor is none, as schemas have it.
std::optional<at::Tensor> as_optional(const at::Tensor& tensor);

// Calls the operator through the dispatcher of PyTorch. (The module torch_rope._C uses this and
// make_call too.)
Outputs dispatch(const Call& call);

// The arguments behind x (or q and k) in each family of schemas, in the schemas' order.
template <template <typename...> typename Template>
using WithPositionArguments =
    Template<const at::Tensor& /*positions*/, const std::optional<at::Tensor>& /*inv_freq*/,
             std::int64_t /*embedding_axis*/, std::optional<std::int64_t> /*rotary_dim*/,
             std::int64_t /*rotary_offset*/, double /*max_wavelength*/, double /*scale_factor*/,
             double /*attention_factor*/, bool /*interleaved*/, bool /*conjugate*/>;
template <template <typename...> typename Template>
using WithTableArguments =
    Template<const at::Tensor& /*cos*/, const at::Tensor& /*sin*/,
             const std::optional<at::Tensor>& /*positions*/, std::int64_t /*embedding_axis*/,
             std::optional<std::int64_t> /*rotary_dim*/, std::int64_t /*rotary_offset*/,
             bool /*interleaved*/, bool /*conjugate*/, bool /*full_width*/>;

Call make_call(const at::Tensor& positions, const std::optional<at::Tensor>& inv_freq,
               std::int64_t embedding_axis, std::optional<std::int64_t> rotary_dim,
               std::int64_t rotary_offset, double max_wavelength, double scale_factor,
               double attention_factor, bool interleaved, bool conjugate);
Call make_call(const at::Tensor& cos, const at::Tensor& sin,
               const std::optional<at::Tensor>& positions, std::int64_t embedding_axis,
               std::optional<std::int64_t> rotary_dim, std::int64_t rotary_offset, bool interleaved,
               bool conjugate, bool full_width);

// The kernels that one function over calls makes, with the signatures of the schemas.
template <Outputs (*rotate)(const Call&)>
struct Operators {
  template <typename... Arguments>
  struct Family {
    static at::Tensor single(const at::Tensor& x, Arguments... arguments) {
      return rotate(make(x, {}, false, arguments...)).q;
    }
    static std::tuple<at::Tensor, at::Tensor> pair(const at::Tensor& q, const at::Tensor& k,
                                                   Arguments... arguments) {
      Outputs outputs = rotate(make(q, k, true, arguments...));
      return {std::move(outputs.q), std::move(outputs.k)};
    }
    static void single_in_place(const at::Tensor& x, Arguments... arguments) {
      rotate(in_place(make(x, {}, false, arguments...)));
    }
    static void pair_in_place(const at::Tensor& q, const at::Tensor& k, Arguments... arguments) {
      rotate(in_place(make(q, k, true, arguments...)));
    }

   private:
    // What on() does, without moving the call: it is made for each step of its way to a kernel.
    static Call make(const at::Tensor& q, const at::Tensor& k, bool is_pair,
                     Arguments... arguments) {
      Call call = make_call(arguments...);
      call.q = q;
      call.k = k;
      call.is_pair = is_pair;
      return call;
    }
  };
  using Apply = WithPositionArguments<Family>;
  using ApplyCosSin = WithTableArguments<Family>;

  static void register_functional(torch::Library& library) {
    library.impl("apply", TORCH_FN(Apply::single));
    library.impl("apply_qk", TORCH_FN(Apply::pair));
    library.impl("apply_cos_sin", TORCH_FN(ApplyCosSin::single));
    library.impl("apply_cos_sin_qk", TORCH_FN(ApplyCosSin::pair));
  }
  static void register_in_place(torch::Library& library) {
    library.impl("apply_", TORCH_FN(Apply::single_in_place));
    library.impl("apply_qk_", TORCH_FN(Apply::pair_in_place));
    library.impl("apply_cos_sin_", TORCH_FN(ApplyCosSin::single_in_place));
    library.impl("apply_cos_sin_qk_", TORCH_FN(ApplyCosSin::pair_in_place));
  }
  static void register_all(torch::Library& library) {
    register_functional(library);
    register_in_place(library);
  }
};

}  // namespace rope
