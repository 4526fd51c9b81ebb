#include "decomposition.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include "angle.h"
#include "checks.h"
#include "rotate_operators.h"

namespace rope {

namespace {

Rotation<at::Tensor> rotations_from_positions(const Call& call, at::ScalarType real) {
  const ApplyOptions& options = call.options;
  const at::Tensor frequency = frequencies(call);
  const at::Tensor position = call.positions.to(frequency.scalar_type()).unsqueeze(-1);
  const bool has_axes = frequency.dim() == 2;
  const int num_axes = has_axes ? static_cast<int>(frequency.size(0)) : 1;
  const auto along_axes = [=](const at::Tensor& x) {
    return [=, &x](int axis) { return has_axes ? x.select(0, axis) : x; };
  };
  const at::Tensor angle = form_angle<at::Tensor>(num_axes, along_axes(position),
                                                  along_axes(frequency), options.scale_factor)
                               .to(at::kDouble);
  return {(angle.cos() * options.attention_factor).to(real),
          (angle.sin() * options.attention_factor).to(real)};
}

Rotation<at::Tensor> rotations_from_tables(const Call& call, at::ScalarType real) {
  if (!call.positions.defined()) {
    return {call.cos.to(real), call.sin.to(real)};
  }
  const at::Tensor rows = call.positions.to(at::kLong);
  return {at::embedding(call.cos, rows).to(real), at::embedding(call.sin, rows).to(real)};
}

// The cosines and sines of both elements of each pair.
FullRotation<at::Tensor> full_rotations(const Call& call, at::ScalarType real) {
  const ApplyOptions& options = call.options;
  const Rotation<at::Tensor> angle =
      call.uses_tables ? rotations_from_tables(call, real) : rotations_from_positions(call, real);
  if (!call.options.full_width) {
    const Rotation<at::Tensor> rotation{angle.cos, options.conjugate ? -angle.sin : angle.sin};
    return {rotation, rotation};
  }
  const SliceOptions columns{.interleaved = options.interleaved};
  const Pair<at::Tensor> cos = pairs(columns, angle.cos.sym_size(-1), angle.cos);
  const Pair<at::Tensor> sin = pairs(columns, angle.sin.sym_size(-1), angle.sin);
  const FullRotation<at::Tensor> full{{cos.a, sin.a}, {cos.b, sin.b}};
  return options.conjugate ? transpose(full) : full;
}

// Rotates one tensor. Those of a pair may differ in dtype, and then need different cosines and
// sines.
at::Tensor rotate_one(const Call& call) {
  const ApplyOptions& options = call.options;
  const at::Tensor& x = call.q;
  const at::ScalarType real = at::toOpMathType(x.scalar_type());
  const FullRotation<at::Tensor> angle = full_rotations(call, real);
  const c10::SymInt dim = rotary_dim(call, x);
  const Pair<at::Tensor> pair = pairs(convert_options<SliceOptions>(options), dim, x);
  const at::Tensor a = pair.a.to(real);
  const at::Tensor b = pair.b.to(real);
  const at::Tensor rotated_a = (a * angle.a.cos - b * angle.a.sin).to(x.scalar_type());
  const at::Tensor rotated_b = (b * angle.b.cos + a * angle.b.sin).to(x.scalar_type());
  const at::Tensor rotated = slice_of({rotated_a, rotated_b}, options.interleaved);

  const at::Tensor last = x.movedim(options.embedding_axis, -1);
  const c10::SymInt end = dim + options.rotary_offset;
  const at::Tensor before = last.narrow_symint(-1, 0, options.rotary_offset);
  const at::Tensor after = last.narrow_symint(-1, end, last.sym_size(-1) - end);
  return at::cat({before, rotated, after}, -1).movedim(-1, options.embedding_axis);
}

at::Tensor normalize_and_rotate_one(const Call& call) {
  const at::Tensor x = call.q.to(at::toOpMathType(call.q.scalar_type()));
  const Norm norm(call);
  const at::Tensor result =
      call.options.norm_last
          ? norm.weight(norm.normalize(rotate_decomposed(rotation_of(call, x)).q))
          : rotate_decomposed(rotation_of(call, norm.weight(norm.normalize(x)))).q;
  return result.to(call.q.scalar_type());
}

at::Tensor decompose_one(const Call& call) {
  return call.normalizes ? normalize_and_rotate_one(call) : rotate_one(call);
}

}  // namespace

Call rotation_of(const Call& call, const at::Tensor& x) {
  Call rotation = on(call, x);
  rotation.normalizes = false;
  rotation.q_weight = at::Tensor();
  return rotation;
}

Call norm_of(const Call& call, const at::Tensor& x) {
  Call norm;
  norm.normalizes = true;
  norm.q = x;
  norm.q_weight = call.q_weight;
  norm.positions = x.new_zeros({}, at::kLong);
  norm.options.embedding_axis = call.options.embedding_axis;
  norm.options.rotary_dim = 0;
  norm.options.eps = call.options.eps;
  norm.options.weight_offset = call.options.weight_offset;
  norm.options.norm_axes = call.options.norm_axes;
  return norm;
}

Norm::Norm(const Call& call) : options_(call.options), axes_{call.options.embedding_axis} {
  if (options_.norm_axes.has_value()) {
    axes_ = *options_.norm_axes;
  }
  if (call.q_weight.defined()) {
    // The dimensions of x, with the embedding axis in its place.
    at::Tensor weight = call.q_weight.to(at::toOpMathType(call.q.scalar_type()));
    while (weight.dim() < call.q.dim()) {
      weight = weight.unsqueeze(0);
    }
    gain_ = weight.movedim(-1, options_.embedding_axis);
    if (options_.weight_offset != 0) {
      gain_ = gain_ + options_.weight_offset;
    }
  }
}

at::Tensor Norm::reciprocal_root(const at::Tensor& x) const {
  return (mean(x * x) + options_.eps).rsqrt();
}

at::Tensor Norm::mean(const at::Tensor& x) const { return x.mean(axes_, /*keepdim=*/true); }

at::Tensor Norm::normalize(const at::Tensor& x) const { return x * reciprocal_root(x); }

at::Tensor Norm::weight(const at::Tensor& x) const { return gain_.defined() ? x * gain_ : x; }

at::Tensor frequencies(const Call& call) {
  const ApplyOptions& options = call.options;
  if (options.inv_freq.has_value()) {
    return *options.inv_freq;
  }
  const c10::SymInt dim = rotary_dim(call, call.q);
  // Not arange: what is made from positions is a DTensor where they are. (Inductor turns it into
  // one.)
  const at::Tensor one_to_n = call.positions.new_ones_symint({dim / 2}, at::kLong).cumsum(0);
  const at::Tensor two_n = (one_to_n - 1).to(at::kDouble) * 2;
  return at::pow(options.max_wavelength, -two_n / dim);
}

Pair<at::Tensor> pairs(const SliceOptions& options, const c10::SymInt& rotary_dim,
                       const at::Tensor& x) {
  const c10::SymInt begin = options.rotary_offset;
  const c10::SymInt end = begin + rotary_dim;
  const at::Tensor last = x.movedim(options.embedding_axis, -1);
  if (options.interleaved) {
    return {last.slice_symint(-1, begin, end, 2), last.slice_symint(-1, begin + 1, end, 2)};
  }
  const c10::SymInt half = begin + rotary_dim / 2;
  return {last.slice_symint(-1, begin, half), last.slice_symint(-1, half, end)};
}

at::Tensor slice_of(const Pair<at::Tensor>& pairs, bool interleaved) {
  if (!interleaved) {
    return at::cat({pairs.a, pairs.b}, -1);
  }
  // Not flatten, which the older vmap does not support.
  c10::SymDimVector sizes(pairs.a.sym_sizes().begin(), pairs.a.sym_sizes().end());
  sizes.back() = sizes.back() * 2;
  return at::stack({pairs.a, pairs.b}, -1).reshape_symint(sizes);
}

Outputs rotate_decomposed(const Call& call) {
  check(call);
  return {decompose_one(on_q(call)), call.is_pair ? decompose_one(on_k(call)) : at::Tensor()};
}

Outputs rotate_copies(const Call& call) {
  return dispatch(call.is_pair ? on(call, call.q.clone(), call.k.clone())
                               : on(call, call.q.clone()));
}

Outputs copy_back(const Call& call, const Outputs& outputs) {
  call.q.copy_(outputs.q);
  if (call.is_pair) {
    call.k.copy_(outputs.k);
  }
  return {call.q, call.k};
}

Outputs rotate_and_copy(const Call& call) { return copy_back(call, rotate_copies(call)); }

}  // namespace rope

// Operators of their own, which torch_rope.composed() puts into a compiler's graph: a switch
// between a kernel and its decomposition would not be part of the compiler's cache key.
TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  rope::DecomposedOperators::implement(library, rope::rotate_decomposed);
}
