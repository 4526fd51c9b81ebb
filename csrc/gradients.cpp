#include "gradients.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numbers>

#include "autograd.h"
#include "checks.h"
#include "decomposition.h"
#include "gradient_sums.h"
#include "norm_operators.h"
#include "options.h"

namespace rope {

namespace {

// Visits the tensors whose gradients are defined, two of the same dtype together.
void for_each_dtype(at::TensorList grads, at::TensorList kept, bool is_mixed,
                    c10::function_ref<void(at::TensorList, at::TensorList)> visit) {
  if (grads.size() == 2 && grads[0].defined() && grads[1].defined() && !is_mixed) {
    visit(grads, kept);
    return;
  }
  for (const auto i : c10::irange(grads.size())) {
    if (grads[i].defined()) {
      visit(grads[i], kept[i]);
    }
  }
}

// The finished sums of a call with at least one defined gradient.
Rotation<at::Tensor> sum_to_tokens(const Call& call, at::TensorList grads, at::TensorList kept,
                                   const WantedGradients& wanted, const Finish& finish) {
  const c10::SymIntArrayRef tokens = angle_sizes(call);
  c10::SymDimVector sizes(tokens.begin(), tokens.end());
  const c10::SymInt dim = rotary_dim(call, kept[0]);
  sizes.push_back(call.options.full_width ? dim : dim / 2);
  const bool is_mixed = grads.size() == 2 && grads[0].defined() && grads[1].defined() &&
                        kept[0].scalar_type() != kept[1].scalar_type();
  Rotation<at::Tensor> total;
  for_each_dtype(grads, kept, is_mixed, [&](at::TensorList some_grads, at::TensorList some_kept) {
    const Rotation<at::Tensor> some =
        dispatch({.uses_tables = call.uses_tables,
                  .grads = some_grads,
                  .xs = some_kept,
                  .sizes = sizes,
                  .options = convert_options<SumOptions>(call.options),
                  .finish = is_mixed ? Finish() : finish,
                  .wants = {call.uses_tables && wanted.cos, !call.uses_tables || wanted.sin}});
    add(total.cos, some.cos);
    add(total.sin, some.sin);
  });
  return is_mixed ? finish_decomposed(finish, total) : total;
}

// The derivative of the angle with respect to the position: (N), or (A, 1..., N) where there are
// axes.
at::Tensor frequencies_of_positions(const Call& call) {
  const ApplyOptions& options = call.options;
  if (options.inv_freq.has_value()) {
    at::Tensor frequency = *options.inv_freq;
    if (frequency.dim() == 2) {
      for (std::int64_t d = 1; d < call.positions.dim(); ++d) {
        frequency = frequency.unsqueeze(1);
      }
    }
    return frequency;
  }
  if (call.positions.is_cuda() && is_plain(call.positions) && !is_transformed()) {
    // exp(-ln(scale_factor) - 2n / dim * ln(max_wavelength)), in one kernel.
    const std::int64_t num_pairs = rotary_dim(call, call.q).expect_int() / 2;
    const double first = -std::log(options.scale_factor);
    const double last = first - std::log(options.max_wavelength) *
                                    static_cast<double>(num_pairs - 1) /
                                    static_cast<double>(num_pairs);
    return at::logspace(first, last, num_pairs, std::numbers::e,
                        call.positions.options().dtype(at::kDouble));
  }
  const at::Tensor frequency = frequencies(call);
  return options.scale_factor == 1.0 ? frequency : frequency / options.scale_factor;
}

Finish of_positions(const Call& call) {
  return {.factors = frequencies_of_positions(call),
          .dim = {-1},
          .dtype = call.positions.scalar_type()};
}

Finish of_inv_freq(const Call& call) {
  Finish finish{.factors = call.positions.unsqueeze(-1),
                .dtype = call.options.inv_freq->scalar_type()};
  for (std::int64_t d = 0; d < std::ssize(angle_sizes(call)); ++d) {
    finish.dim.push_back(-2 - d);
  }
  return finish;
}

Finish of_tables(const Call& call) {
  Finish finish{.dtype = call.cos.scalar_type()};
  if (call.positions.defined()) {
    finish.rows = call.positions;
    finish.num_rows = call.cos.sym_size(0);
  }
  return finish;
}

}  // namespace

AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted) {
  if (std::ranges::none_of(grads, [](const at::Tensor& grad) { return grad.defined(); })) {
    return {};
  }
  const auto sums = [&](const Finish& finish) {
    return sum_to_tokens(call, grads, kept, wanted, finish);
  };
  if (call.uses_tables) {
    const Rotation<at::Tensor> gradients = sums(of_tables(call));
    return {.cos = gradients.cos, .sin = gradients.sin};
  }
  // With y = R(t) x the derivative dy/dt is y rotated by a right angle, so the output is enough.
  const Call one = on(call, kept[0]);
  if (wanted.positions && wanted.inv_freq) {
    const at::Tensor angle = sums({}).sin;
    return {.positions = finish_decomposed(of_positions(one), angle),
            .inv_freq = finish_decomposed(of_inv_freq(one), angle)};
  }
  return wanted.positions ? AngleGradients{.positions = sums(of_positions(one)).sin}
                          : AngleGradients{.inv_freq = sums(of_inv_freq(one)).sin};
}

AngleGradients angle_gradients_of_norm(const Call& call, at::TensorList grads,
                                       const WantedGradients& wanted) {
  c10::SmallVector<at::Tensor, 2> rotated_grads;
  c10::SmallVector<at::Tensor, 2> kept;
  for (const auto i : c10::irange(grads.size())) {
    Call one = i == 0 ? on_q(call) : on_k(call);
    // In the opmath type: what is computed again is not rounded to the dtype of x.
    const at::ScalarType real = at::toOpMathType(one.q.scalar_type());
    one.q = one.q.to(real);
    const at::Tensor grad = grads[i].defined() ? grads[i].to(real) : at::Tensor();
    if (!call.options.norm_last) {
      rotated_grads.push_back(grad);
      kept.push_back(dispatch(call.uses_tables ? norm_of(one, one.q) : one).q);
      continue;
    }
    const at::Tensor rotated = dispatch(rotation_of(one, one.q)).q;
    NormGradientCall of_norm{norm_of(one, rotated), grad};
    of_norm.wants = {grad.defined(), false, false, false};
    rotated_grads.push_back(norm_gradients(of_norm).q);
    kept.push_back(call.uses_tables ? one.q : rotated);
  }
  return angle_gradients(rotation_of(call, kept[0]), rotated_grads, kept, wanted);
}

}  // namespace rope
