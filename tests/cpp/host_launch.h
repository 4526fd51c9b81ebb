// Calls as the operators make them, and the launches and plans of a CUDA device for them.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "call.h"
#include "checks.h"
#include "cuda/plan.h"
#include "make_launch.h"

namespace host {

// A call, and the same call on other tensors.
struct Call : rope::Call {
  Call on(const at::Tensor& x) const {
    Call call = *this;
    call.q = x;
    call.k = at::Tensor();
    call.k_weight = at::Tensor();
    call.is_pair = false;
    return call;
  }
  Call on(const at::Tensor& q, const at::Tensor& k) const {
    Call call = *this;
    call.q = q;
    call.k = k;
    call.is_pair = true;
    return call;
  }
  // With weights, for norms.
  Call weighted(const at::Tensor& q_weight, const at::Tensor& k_weight = {}) const {
    Call call = *this;
    call.q_weight = q_weight;
    call.k_weight = k_weight;
    return call;
  }
};

inline Call in_place(Call call) {
  call.in_place = true;
  return call;
}

// A call of apply or apply_qk, before it has tensors to rotate.
inline Call apply(const at::Tensor& positions, const rope::ApplyOptions& options = {}) {
  return {rope::make_call(positions, options)};
}

// Likewise of apply_cos_sin or apply_cos_sin_qk.
inline Call apply_cos_sin(const at::Tensor& cos, const at::Tensor& sin,
                          const rope::CosSinOptions& options = {}) {
  return {rope::make_call(cos, sin, options)};
}

using VisitPlan = std::function<void(const rope::Launch&, const rope::cuda::Plan&)>;

// Visits each kernel that the call would launch, in order.
inline void for_each_plan(const rope::Call& call, const rope::Outputs& outputs,
                          const VisitPlan& visit, std::int64_t few_rows = rope::cuda::kFewRows) {
  rope::check(call);
  rope::for_each_launch(call, outputs, [&](const rope::Launch& launch) {
    const rope::cuda::Plan plan = rope::cuda::make_rotate_plan(launch, few_rows);
    if (plan.grid_x > 0) {
      visit(launch, plan);
    }
  });
}

inline std::vector<rope::cuda::Plan> plans(const rope::Call& call, const rope::Outputs& outputs) {
  std::vector<rope::cuda::Plan> result;
  for_each_plan(call, outputs,
                [&](const rope::Launch&, const rope::cuda::Plan& plan) { result.push_back(plan); });
  return result;
}

}  // namespace host
