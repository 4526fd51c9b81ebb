// The public C++ functions: each is one call through the dispatcher.
#include "call.h"
#include "rope/rope.h"

namespace rope {

namespace {

std::tuple<at::Tensor, at::Tensor> both(Outputs outputs) {
  return {std::move(outputs.q), std::move(outputs.k)};
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

}  // namespace rope
