#include "call.h"

#include <utility>

#include "messages.h"
#include "options.h"
#include "rotate_operators.h"

namespace rope {

namespace {

template <typename Family>
Outputs dispatch_family(const Call& call) {
  if (call.in_place) {
    if (call.is_pair) {
      RotateOperator<Family, Form::kPairInPlace>::dispatch(call);
    } else {
      RotateOperator<Family, Form::kSingleInPlace>::dispatch(call);
    }
    return {call.q, call.k};
  }
  if (call.is_pair) {
    auto [q, k] = RotateOperator<Family, Form::kPair>::dispatch(call);
    return {std::move(q), std::move(k)};
  }
  return {RotateOperator<Family, Form::kSingle>::dispatch(call), {}};
}

template <typename Options>
Call call_with_positions(const at::Tensor& positions, const Options& options) {
  Call call;
  call.positions = positions;
  call.options.inv_freq = options.inv_freq;
  copy_options(options, call.options);
  return call;
}

template <typename Options>
Call call_with_tables(const at::Tensor& cos, const at::Tensor& sin, const Options& options) {
  Call call;
  call.uses_tables = true;
  call.cos = cos;
  call.sin = sin;
  call.positions = options.positions.value_or(at::Tensor());
  copy_options(options, call.options);
  return call;
}

Call normalizing(Call call) {
  call.normalizes = true;
  return call;
}

}  // namespace

std::string Call::name() const {
  std::string name = normalizes ? "norm_" : "";
  name += uses_tables ? "apply_cos_sin" : "apply";
  name += is_pair ? "_qk" : "";
  name += in_place ? "_" : "";
  return name;
}

Call make_call(const at::Tensor& positions, const ApplyOptions& options) {
  return call_with_positions(positions, options);
}

Call make_call(const at::Tensor& cos, const at::Tensor& sin, const CosSinOptions& options) {
  return call_with_tables(cos, sin, options);
}

Call make_call(const at::Tensor& positions, const NormOptions& options) {
  return normalizing(call_with_positions(positions, options));
}

Call make_call(const at::Tensor& cos, const at::Tensor& sin, const NormCosSinOptions& options) {
  return normalizing(call_with_tables(cos, sin, options));
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

Call on_q(const Call& call) { return on(call, call.q); }

Call on_k(const Call& call) {
  Call one = on(call, call.k);
  one.q_weight = call.k_weight;
  return one;
}

Call in_place(Call call) {
  call.in_place = true;
  return call;
}

bool has_axes(const Call& call) {
  const auto& inv_freq = call.options.inv_freq;
  return inv_freq.has_value() && inv_freq->dim() == 2;
}

c10::SymIntArrayRef angle_sizes(const Call& call) {
  return call.positions.defined() ? call.positions.sym_sizes().slice(has_axes(call) ? 1 : 0)
                                  : call.cos.sym_sizes().slice(0, call.cos.dim() - 1);
}

Outputs dispatch(const Call& call) {
  // The check that comes first, here too: without any tensor the dispatcher finds no kernel.
  const char* argument = call.is_pair ? "q" : "x";
  TORCH_CHECK_TYPE(call.q.defined(), expected(call.name(), argument), "be a tensor, but got none");
  if (call.normalizes) {
    return call.uses_tables ? dispatch_family<Normalized<AnglesFromTables>>(call)
                            : dispatch_family<Normalized<AnglesFromPositions>>(call);
  }
  return call.uses_tables ? dispatch_family<AnglesFromTables>(call)
                          : dispatch_family<AnglesFromPositions>(call);
}

}  // namespace rope
