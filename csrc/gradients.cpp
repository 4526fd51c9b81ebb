#include "gradients.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/util/irange.h>

#include <numeric>
#include <vector>

#include "checks.h"
#include "composed.h"

namespace rope {

namespace {

// The shape of what the pairs' gradients are summed to: one row of pairs for each position, or for
// each row of tables that move along with x.
c10::SymDimVector token_sizes(const Call& call) {
  c10::SymIntArrayRef sizes;
  if (call.positions.defined()) {
    const auto& inv_freq = call.options.inv_freq;
    sizes = call.positions.sym_sizes().slice(inv_freq.has_value() && inv_freq->dim() == 2 ? 1 : 0);
  } else {
    sizes = call.cos.sym_sizes().slice(0, call.cos.dim() - 1);
  }
  c10::SymDimVector result(sizes.begin(), sizes.end());
  result.push_back(rotary_dim(call, call.q) / 2);
  return result;
}

at::Tensor sum_to_tokens(const Call& call, const at::Tensor& gradient) {
  return gradient.sum_to_size_symint(token_sizes(call));
}

Pair<at::Tensor> real_pairs(const Call& call, const at::Tensor& x) {
  const at::ScalarType real = at::toOpMathType(x.scalar_type());
  const Pair<at::Tensor> views = pairs(call, x);
  return {views.a.to(real), views.b.to(real)};
}

// The gradient with respect to the angle of each pair, summed over what shares the angle. With y =
// R(t) x the derivative dy/dt is y turned by a right angle, so that the output is all it takes.
at::Tensor angle_gradient(const Call& call, const at::Tensor& grad, const at::Tensor& y) {
  const Pair<at::Tensor> g = real_pairs(call, grad);
  const Pair<at::Tensor> turned = real_pairs(call, y);
  const at::Tensor gradient = g.b * turned.a - g.a * turned.b;
  return sum_to_tokens(call, call.options.conjugate ? -gradient : gradient);
}

// The gradients with respect to the cosine and the sine of each pair, summed likewise.
Rotation<at::Tensor> cos_sin_gradient(const Call& call, const at::Tensor& grad,
                                      const at::Tensor& x) {
  const Pair<at::Tensor> g = real_pairs(call, grad);
  const Pair<at::Tensor> pair = real_pairs(call, x);
  const at::Tensor sin = g.b * pair.a - g.a * pair.b;
  return {sum_to_tokens(call, g.a * pair.a + g.b * pair.b),
          sum_to_tokens(call, call.options.conjugate ? -sin : sin)};
}

at::Tensor positions_gradient(const Call& call, const at::Tensor& angle) {
  const at::Tensor frequency = frequencies(call);
  const at::Tensor scaled = (angle / call.options.scale_factor).to(frequency.scalar_type());
  // No product of matrices, which would flatten the tokens: DTensor cannot where they are sharded.
  const at::Tensor gradient = frequency.dim() == 1
                                  ? (scaled * frequency).sum(-1)
                                  : (scaled.unsqueeze(-2) * frequency).sum(-1).movedim(-1, 0);
  return gradient.to(call.positions.scalar_type());
}

at::Tensor inv_freq_gradient(const Call& call, const at::Tensor& angle) {
  const at::Tensor& inv_freq = *call.options.inv_freq;
  const at::Tensor scaled = angle.to(inv_freq.scalar_type());
  const at::Tensor positions = call.positions.to(inv_freq.scalar_type()).unsqueeze(-1);
  if (inv_freq.dim() == 1) {
    return (scaled * positions).sum_to_size_symint(inv_freq.sym_sizes());
  }
  const at::Tensor products = scaled * positions;  // (A, tokens..., N)
  std::vector<std::int64_t> tokens(products.dim() - 2);
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens.empty() ? products : products.sum(tokens);
}

// Rows of a table gather the gradients of all positions that used them, in a fixed order on every
// device.
at::Tensor table_rows_gradient(const Call& call, const at::Tensor& table,
                               const at::Tensor& gradient) {
  if (!call.positions.defined()) {
    return gradient.to(table.scalar_type());
  }
  return gradient.new_zeros_symint(table.sym_sizes())
      .index_put({call.positions.to(at::kLong)}, gradient, /*accumulate=*/true)
      .to(table.scalar_type());
}

void add(at::Tensor& sum, const at::Tensor& term) { sum = sum.defined() ? sum + term : term; }

AngleGradients gradients_of_tables(const Call& call, at::TensorList grads, at::TensorList inputs,
                                   const WantedGradients& wanted) {
  Rotation<at::Tensor> total;
  for (const auto i : c10::irange(grads.size())) {
    if (grads[i].defined()) {
      const Rotation<at::Tensor> one = cos_sin_gradient(on(call, inputs[i]), grads[i], inputs[i]);
      add(total.cos, one.cos);
      add(total.sin, one.sin);
    }
  }
  AngleGradients result;
  if (total.cos.defined() && wanted.cos) {
    result.cos = table_rows_gradient(call, call.cos, total.cos);
  }
  if (total.sin.defined() && wanted.sin) {
    result.sin = table_rows_gradient(call, call.sin, total.sin);
  }
  return result;
}

AngleGradients gradients_of_positions(const Call& call, at::TensorList grads,
                                      at::TensorList outputs, const WantedGradients& wanted) {
  AngleGradients result;
  // Tensors of different rotary_dim have angles of their own, so that each adds to the gradients by
  // itself.
  for (const auto i : c10::irange(grads.size())) {
    if (!grads[i].defined()) {
      continue;
    }
    const Call one = on(call, outputs[i]);
    const at::Tensor angle = angle_gradient(one, grads[i], outputs[i]);
    if (wanted.positions) {
      add(result.positions, positions_gradient(one, angle));
    }
    if (wanted.inv_freq) {
      add(result.inv_freq, inv_freq_gradient(one, angle));
    }
  }
  return result;
}

}  // namespace

AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted) {
  return call.uses_tables ? gradients_of_tables(call, grads, kept, wanted)
                          : gradients_of_positions(call, grads, kept, wanted);
}

}  // namespace rope
