#include "call.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <utility>

namespace rope {

namespace {

// The four operators of one family, looked up once.
template <typename... Arguments>
class Handles {
 public:
  explicit Handles(const std::string& name)
      : single_(find<at::Tensor(const at::Tensor&, Arguments...)>(name)),
        pair_(find<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                      Arguments...)>(name + "_qk")),
        single_in_place_(find<void(const at::Tensor&, Arguments...)>(name + "_")),
        pair_in_place_(
            find<void(const at::Tensor&, const at::Tensor&, Arguments...)>(name + "_qk_")) {}

  Outputs operator()(const Call& call, Arguments... arguments) const {
    if (call.in_place) {
      if (call.is_pair) {
        pair_in_place_.call(call.q, call.k, arguments...);
      } else {
        single_in_place_.call(call.q, arguments...);
      }
      return {call.q, call.k};
    }
    if (call.is_pair) {
      auto [q, k] = pair_.call(call.q, call.k, arguments...);
      return {std::move(q), std::move(k)};
    }
    return {single_.call(call.q, arguments...), {}};
  }

 private:
  template <typename Signature>
  static c10::TypedOperatorHandle<Signature> find(const std::string& name) {
    return c10::Dispatcher::singleton()
        .findSchemaOrThrow(("rope::" + name).c_str(), "")
        .typed<Signature>();
  }

  c10::TypedOperatorHandle<at::Tensor(const at::Tensor&, Arguments...)> single_;
  c10::TypedOperatorHandle<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                              Arguments...)>
      pair_;
  c10::TypedOperatorHandle<void(const at::Tensor&, Arguments...)> single_in_place_;
  c10::TypedOperatorHandle<void(const at::Tensor&, const at::Tensor&, Arguments...)> pair_in_place_;
};

}  // namespace

std::string Call::name() const {
  std::string name = uses_tables ? "apply_cos_sin" : "apply";
  name += is_pair ? "_qk" : "";
  name += in_place ? "_" : "";
  return name;
}

Call on(Call call, const at::Tensor& x) {
  call.q = x;
  call.k = at::Tensor();
  call.is_pair = false;
  call.in_place = false;
  return call;
}

Call on(Call call, const at::Tensor& q, const at::Tensor& k) {
  call = on(std::move(call), q);
  call.k = k;
  call.is_pair = true;
  return call;
}

Call in_place(Call call) {
  call.in_place = true;
  return call;
}

Call make_call(const at::Tensor& positions, const std::optional<at::Tensor>& inv_freq,
               std::int64_t embedding_axis, std::optional<std::int64_t> rotary_dim,
               std::int64_t rotary_offset, double max_wavelength, double scale_factor,
               double attention_factor, bool interleaved, bool conjugate) {
  Call call;
  call.positions = positions;
  call.options = {inv_freq,     embedding_axis,   rotary_dim,  rotary_offset, max_wavelength,
                  scale_factor, attention_factor, interleaved, conjugate};
  return call;
}

Call make_call(const at::Tensor& cos, const at::Tensor& sin,
               const std::optional<at::Tensor>& positions, std::int64_t embedding_axis,
               std::optional<std::int64_t> rotary_dim, std::int64_t rotary_offset, bool interleaved,
               bool conjugate, bool full_width) {
  Call call;
  call.uses_tables = true;
  call.positions = positions.value_or(at::Tensor());
  call.cos = cos;
  call.sin = sin;
  call.full_width = full_width;
  call.options.embedding_axis = embedding_axis;
  call.options.rotary_dim = rotary_dim;
  call.options.rotary_offset = rotary_offset;
  call.options.interleaved = interleaved;
  call.options.conjugate = conjugate;
  return call;
}

std::optional<at::Tensor> as_optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

Outputs dispatch(const Call& call) {
  const ApplyOptions& options = call.options;
  if (call.uses_tables) {
    static const WithTableArguments<Handles> apply_cos_sin("apply_cos_sin");
    return apply_cos_sin(call, call.cos, call.sin, as_optional(call.positions),
                         options.embedding_axis, options.rotary_dim, options.rotary_offset,
                         options.interleaved, options.conjugate, call.full_width);
  }
  static const WithPositionArguments<Handles> apply("apply");
  return apply(call, call.positions, options.inv_freq, options.embedding_axis, options.rotary_dim,
               options.rotary_offset, options.max_wavelength, options.scale_factor,
               options.attention_factor, options.interleaved, options.conjugate);
}

}  // namespace rope
