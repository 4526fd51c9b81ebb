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
  return make_call(cos, sin, options.positions, options.embedding_axis, options.rotary_dim,
                   options.rotary_offset, options.interleaved, options.conjugate,
                   options.full_width);
}

std::tuple<at::Tensor, at::Tensor> both(Outputs outputs) {
  return {std::move(outputs.q), std::move(outputs.k)};
}

}  // namespace

at::Tensor apply(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(on(call_of(positions, options), x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk(const at::Tensor& q, const at::Tensor& k,
                                            const at::Tensor& positions,
                                            const ApplyOptions& options) {
  return both(dispatch(on(call_of(positions, options), q, k)));
}

at::Tensor apply_(const at::Tensor& x, const at::Tensor& positions, const ApplyOptions& options) {
  return dispatch(in_place(on(call_of(positions, options), x))).q;
}

std::tuple<at::Tensor, at::Tensor> apply_qk_(const at::Tensor& q, const at::Tensor& k,
                                             const at::Tensor& positions,
                                             const ApplyOptions& options) {
  return both(dispatch(in_place(on(call_of(positions, options), q, k))));
}

at::Tensor apply_cos_sin(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                         const CosSinOptions& options) {
  return dispatch(on(call_of(cos, sin, options), x)).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk(const at::Tensor& q, const at::Tensor& k,
                                                    const at::Tensor& cos, const at::Tensor& sin,
                                                    const CosSinOptions& options) {
  return both(dispatch(on(call_of(cos, sin, options), q, k)));
}

at::Tensor apply_cos_sin_(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                          const CosSinOptions& options) {
  return dispatch(in_place(on(call_of(cos, sin, options), x))).q;
}

std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk_(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& cos, const at::Tensor& sin,
                                                     const CosSinOptions& options) {
  return both(dispatch(in_place(on(call_of(cos, sin, options), q, k))));
}

}  // namespace rope
