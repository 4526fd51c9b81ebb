// The public C++ functions: each is one call through the dispatcher.
#include "call.h"
#include "rope/rope.h"

namespace rope {

namespace {

std::tuple<at::Tensor, at::Tensor> both(Outputs outputs) {
  return {std::move(outputs.q), std::move(outputs.k)};
}

Call with_weight(Call call, const std::optional<at::Tensor>& weight) {
  call.q_weight = weight.value_or(at::Tensor());
  return call;
}

Call with_weights(Call call, const std::optional<at::Tensor>& q_weight,
                  const std::optional<at::Tensor>& k_weight) {
  call.k_weight = k_weight.value_or(at::Tensor());
  return with_weight(std::move(call), q_weight);
}

}  // namespace

at::Tensor apply(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(on(make_call(positions, options), x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& positions,
                                            const ApplyOptions& options) {
  return both(dispatch(on(make_call(positions, options), q, k)));
}

at::Tensor apply_(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(in_place(on(make_call(positions, options), x))).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk_(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             const ApplyOptions& options) {
  return both(dispatch(in_place(on(make_call(positions, options), q, k))));
}

at::Tensor apply_cos_sin(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         const CosSinOptions& options) {
  return dispatch(on(make_call(cos, sin, options), x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& cos, const at::Tensor& sin,
                                                    const CosSinOptions& options) {
  return both(dispatch(on(make_call(cos, sin, options), q, k)));
}

at::Tensor apply_cos_sin_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                          const CosSinOptions& options) {
  return dispatch(in_place(on(make_call(cos, sin, options), x))).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk_(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& cos, const at::Tensor& sin,
                                                     const CosSinOptions& options) {
  return both(dispatch(in_place(on(make_call(cos, sin, options), q, k))));
}

at::Tensor norm_apply(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const at::Tensor& positions, const NormOptions& options) {
  return dispatch(with_weight(on(make_call(positions, options), x), weight)).q;
}

std::tuple<at::Tensor, at::Tensor> norm_apply_qk(const at::Tensor& q, const at::Tensor& k,
                                                 const std::optional<at::Tensor>& q_weight,
                                                 const std::optional<at::Tensor>& k_weight,
                                                 const at::Tensor& positions,
                                                 const NormOptions& options) {
  return both(dispatch(with_weights(on(make_call(positions, options), q, k), q_weight, k_weight)));
}

at::Tensor norm_apply_(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                       const at::Tensor& positions, const NormOptions& options) {
  return dispatch(in_place(with_weight(on(make_call(positions, options), x), weight))).q;
}

std::tuple<at::Tensor, at::Tensor> norm_apply_qk_(const at::Tensor& q, const at::Tensor& k,
                                                  const std::optional<at::Tensor>& q_weight,
                                                  const std::optional<at::Tensor>& k_weight,
                                                  const at::Tensor& positions,
                                                  const NormOptions& options) {
  return both(dispatch(
      in_place(with_weights(on(make_call(positions, options), q, k), q_weight, k_weight))));
}

at::Tensor norm_apply_cos_sin(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                              const at::Tensor& cos, const at::Tensor& sin,
                              const NormCosSinOptions& options) {
  return dispatch(with_weight(on(make_call(cos, sin, options), x), weight)).q;
}

std::tuple<at::Tensor, at::Tensor> norm_apply_cos_sin_qk(const at::Tensor& q, const at::Tensor& k,
                                                         const std::optional<at::Tensor>& q_weight,
                                                         const std::optional<at::Tensor>& k_weight,
                                                         const at::Tensor& cos,
                                                         const at::Tensor& sin,
                                                         const NormCosSinOptions& options) {
  return both(dispatch(with_weights(on(make_call(cos, sin, options), q, k), q_weight, k_weight)));
}

at::Tensor norm_apply_cos_sin_(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const at::Tensor& cos, const at::Tensor& sin,
                               const NormCosSinOptions& options) {
  return dispatch(in_place(with_weight(on(make_call(cos, sin, options), x), weight))).q;
}

std::tuple<at::Tensor, at::Tensor> norm_apply_cos_sin_qk_(const at::Tensor& q, const at::Tensor& k,
                                                          const std::optional<at::Tensor>& q_weight,
                                                          const std::optional<at::Tensor>& k_weight,
                                                          const at::Tensor& cos,
                                                          const at::Tensor& sin,
                                                          const NormCosSinOptions& options) {
  return both(
      dispatch(in_place(with_weights(on(make_call(cos, sin, options), q, k), q_weight, k_weight))));
}

}  // namespace rope
