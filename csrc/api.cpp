// The public C++ functions: each is one call through the dispatcher.
#include "call.h"
#include "rope/rope.h"

namespace rope {

namespace {

Call call_of(const at::Tensor& positions, const ApplyOptions& options) {
  Call call;
  call.positions = positions;
  call.options = options;
  return call;
}

Call call_of(const at::Tensor& cos, const at::Tensor& sin, const CosSinOptions& options) {
  return make_call(cos, sin, options.positions, options.embedding_axis, options.rotary_offset,
                   options.interleaved, options.conjugate);
}

std::tuple<at::Tensor, at::Tensor> both(Outputs outputs) {
  return {std::move(outputs.q), std::move(outputs.k)};
}

}  // namespace

at::Tensor apply(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(call_of(positions, options).on(x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& positions,
                                            const ApplyOptions& options) {
  return both(dispatch(call_of(positions, options).on(q, k)));
}

at::Tensor apply_(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(call_of(positions, options).in_place_on(x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk_(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             const ApplyOptions& options) {
  return both(dispatch(call_of(positions, options).in_place_on(q, k)));
}

at::Tensor apply_cos_sin(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         const CosSinOptions& options) {
  return dispatch(call_of(cos, sin, options).on(x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& cos, const at::Tensor& sin,
                                                    const CosSinOptions& options) {
  return both(dispatch(call_of(cos, sin, options).on(q, k)));
}

at::Tensor apply_cos_sin_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                          const CosSinOptions& options) {
  return dispatch(call_of(cos, sin, options).in_place_on(x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk_(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& cos, const at::Tensor& sin,
                                                     const CosSinOptions& options) {
  return both(dispatch(call_of(cos, sin, options).in_place_on(q, k)));
}

}  // namespace rope
