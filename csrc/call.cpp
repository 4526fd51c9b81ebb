#include "call.h"

#include <utility>

#include "rotate_operators.h"

namespace rope {

namespace {

template <typename Angles>
Outputs dispatch_family(const Call& call) {
  if (call.in_place) {
    if (call.is_pair) {
      RotateOperator<Angles, Form::kPairInPlace>::dispatch(call);
    } else {
      RotateOperator<Angles, Form::kSingleInPlace>::dispatch(call);
    }
    return {call.q, call.k};
  }
  if (call.is_pair) {
    auto [q, k] = RotateOperator<Angles, Form::kPair>::dispatch(call);
    return {std::move(q), std::move(k)};
  }
  return {RotateOperator<Angles, Form::kSingle>::dispatch(call), {}};
}

}  // namespace

std::string Call::name() const {
  std::string name = uses_tables ? "apply_cos_sin" : "apply";
  name += is_pair ? "_qk" : "";
  name += in_place ? "_" : "";
  return name;
}

Call make_call(const at::Tensor& positions, const ApplyOptions& options) {
  Call call;
  call.positions = positions;
  static_cast<ApplyOptions&>(call.options) = options;
  return call;
}

Call make_call(const at::Tensor& cos, const at::Tensor& sin, const CosSinOptions& options) {
  Call call;
  call.uses_tables = true;
  call.cos = cos;
  call.sin = sin;
  call.positions = options.positions.value_or(at::Tensor());
  copy_options(options, call.options);
  return call;
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

Outputs dispatch(const Call& call) {
  return call.uses_tables ? dispatch_family<AnglesFromTables>(call)
                          : dispatch_family<AnglesFromPositions>(call);
}

}  // namespace rope
