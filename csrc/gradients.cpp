#include "gradients.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <numbers>
#include <tuple>
#include <utility>

#include "autograd.h"
#include "checks.h"
#include "cuda/kernels.h"
#include "decomposition.h"
#include "make_launch.h"

namespace rope {

namespace {

// -------------------------------------------------------------------------------------------------
// The sums

Pair<at::Tensor> real_pairs(const SumCall& call, const at::Tensor& x) {
  const at::ScalarType real = at::toOpMathType(x.scalar_type());
  const c10::SymInt columns = call.sizes.back();
  const Pair<at::Tensor> views = pairs(convert_options<SliceOptions>(call.options),
                                       call.options.full_width ? columns : columns * 2, x);
  return {views.a.to(real), views.b.to(real)};
}

void add(at::Tensor& sum, const at::Tensor& term) {
  if (term.defined()) {
    sum = sum.defined() ? sum + term : term;
  }
}

// What a function makes of each of the two that is defined.
template <typename Function>
Rotation<at::Tensor> map(const Rotation<at::Tensor>& tensors, const Function& function) {
  return {tensors.cos.defined() ? function(tensors.cos) : at::Tensor(),
          tensors.sin.defined() ? function(tensors.sin) : at::Tensor()};
}

// The sums of one tensor of the call.
Rotation<at::Tensor> sum_one(const SumCall& call, const at::Tensor& grad,
                             const at::Tensor& tensor) {
  const Pair<at::Tensor> g = real_pairs(call, grad);
  const Pair<at::Tensor> x = real_pairs(call, tensor);
  const bool conjugate = call.options.conjugate;
  Rotation<at::Tensor> sums;
  if (!call.options.full_width) {
    if (call.wants_cos()) {
      sums.cos = (g.a * x.a + g.b * x.b).sum_to_size_symint(call.sizes);
    }
    if (call.wants_sin()) {
      const at::Tensor sin = g.b * x.a - g.a * x.b;
      sums.sin = (conjugate ? -sin : sin).sum_to_size_symint(call.sizes);
    }
    return sums;
  }
  c10::SymDimVector sizes(call.sizes.begin(), call.sizes.end());
  sizes.back() = sizes.back() / 2;
  const auto product = [&](const at::Tensor& left, const at::Tensor& right) {
    return (left * right).sum_to_size_symint(sizes);
  };
  const bool interleaved = call.options.interleaved;
  if (call.wants_cos()) {
    sums.cos = slice_of({product(g.a, x.a), product(g.b, x.b)}, interleaved);
  }
  if (call.wants_sin()) {
    const at::Tensor of_a_and_b = product(g.a, x.b);
    const at::Tensor of_b_and_a = product(g.b, x.a);
    sums.sin = slice_of(conjugate ? Pair<at::Tensor>{-of_b_and_a, of_a_and_b}
                                  : Pair<at::Tensor>{-of_a_and_b, of_b_and_a},
                        interleaved);
  }
  return sums;
}

// Rows of a table add up the sums of all tokens that name them, in a fixed order on every device.
at::Tensor add_to_rows(const Finish& finish, const at::Tensor& sums) {
  return sums.new_zeros_symint({*finish.num_rows, sums.sym_size(-1)})
      .index_put({finish.rows.to(at::kLong)}, sums, /*accumulate=*/true);
}

// No product of matrices, which would flatten the tokens: DTensor cannot where they are sharded.
at::Tensor multiply_and_sum(const Finish& finish, const at::Tensor& sums) {
  const at::ScalarType dtype = finish.dtype.value_or(sums.scalar_type());
  const at::ScalarType of_factors = finish.factors.scalar_type();
  const at::ScalarType exact =
      at::isFloatingType(of_factors) ? at::promoteTypes(of_factors, dtype) : dtype;
  const at::Tensor products = sums.to(exact) * finish.factors.to(exact);
  return finish.dim.empty() ? products : products.sum(finish.dim);
}

at::Tensor finish_decomposed(const Finish& finish, const at::Tensor& sums) {
  at::Tensor result = sums;
  if (finish.factors.defined()) {
    result = multiply_and_sum(finish, sums);
  } else if (finish.rows.defined()) {
    result = add_to_rows(finish, sums);
  }
  return result.to(finish.dtype.value_or(sums.scalar_type()));
}

Rotation<at::Tensor> finish_decomposed(const Finish& finish, const Rotation<at::Tensor>& sums) {
  return map(sums, [&](const at::Tensor& one) { return finish_decomposed(finish, one); });
}

Rotation<at::Tensor> sum_decomposed(const SumCall& call) {
  check(call);
  Rotation<at::Tensor> total;
  for (const auto i : c10::irange(call.xs.size())) {
    const Rotation<at::Tensor> one = sum_one(call, call.grads[i], call.xs[i]);
    add(total.cos, one.cos);
    add(total.sin, one.sin);
  }
  return finish_decomposed(call.finish, total);
}

// The launch of tables that look like the sums: NOTE [ Sums ] in cuda/sum_kernel.h.
void for_each_sum_launch(const SumCall& call, const at::Tensor& like_sums,
                         c10::function_ref<void(const Launch&)> launch) {
  Call tables;
  tables.uses_tables = true;
  tables.cos = like_sums;
  tables.sin = like_sums;
  copy_options(call.options, tables.options);
  if (call.xs.size() == 1) {
    for_each_launch(on(tables, call.grads[0]), {call.xs[0], {}}, launch);
  } else {
    for_each_launch(on(tables, call.grads[0], call.grads[1]), {call.xs[0], call.xs[1]}, launch);
  }
}

// The sums of each group of rows, (groups, tokens..., N), multiplied by the factors of pairs if any
// are given, float64 (N). Of tables the kernel forms those of cosines and of sines.
Rotation<at::Tensor> sum_groups_on_cuda(const SumCall& call, const at::Tensor& factors) {
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(call.sizes);
  const at::Tensor& x = call.xs[0];
  const at::TensorOptions options = x.options().dtype(at::toOpMathType(x.scalar_type()));
  Rotation<at::Tensor> sums;
  for_each_sum_launch(call, at::empty(sizes, options.device(at::kMeta)), [&](const Launch& launch) {
    at::DimVector sizes_of_all = {cuda::sum_groups(launch)};
    sizes_of_all.append(sizes.begin(), sizes.end());
    const auto make = [&] { return at::empty(sizes_of_all, options); };
    sums = {call.uses_tables ? make() : at::Tensor(), make()};
    cuda::sum(launch,
              {call.uses_tables ? sums.cos.mutable_data_ptr() : nullptr,
               sums.sin.mutable_data_ptr(), c10::multiply_integers(sizes),
               factors.defined() ? factors.const_data_ptr<double>() : nullptr},
              x.get_device());
  });
  return sums;
}

// The sums of all groups, added to those of the rows that tokens name if they name any, in the
// dtype that is asked for.
Rotation<at::Tensor> scatter_on_cuda(const Finish& finish, const Rotation<at::Tensor>& sums) {
  const at::Tensor& any = sums.cos.defined() ? sums.cos : sums.sin;
  const at::ScalarType dtype = finish.dtype.value_or(any.scalar_type());
  const bool converts = dtype != any.scalar_type();
  const bool has_rows = finish.rows.defined();
  if (!has_rows && any.size(0) == 1 && !converts) {
    return map(sums, [](const at::Tensor& one) { return one.select(0, 0); });
  }
  cuda::TableSums launch{};
  launch.sums_dtype = any.scalar_type();
  launch.dtype = dtype;
  launch.num_groups = any.size(0);
  launch.group_stride = any.stride(0);
  launch.num_columns = any.size(-1);
  launch.num_tokens = launch.group_stride / launch.num_columns;
  at::DimVector sizes(any.sizes().begin() + 1, any.sizes().end());
  at::Tensor rows;
  if (has_rows) {
    rows = finish.rows.contiguous();
    launch.rows = rows.const_data_ptr();
    launch.rows_dtype = rows.scalar_type();
    launch.num_rows = finish.num_rows->expect_int();
    sizes = {launch.num_rows, launch.num_columns};
  }
  at::Tensor partial[2];
  const Rotation<at::Tensor> gradients = map(sums, [&](const at::Tensor& one) {
    const at::Tensor gradient = at::empty(sizes, any.options().dtype(dtype));
    at::Tensor& sum = partial[launch.num_tables];
    sum = has_rows && converts ? at::empty(sizes, any.options()) : gradient;
    launch.tables[launch.num_tables++] = {one.const_data_ptr(), sum.mutable_data_ptr(),
                                          gradient.mutable_data_ptr()};
    return gradient;
  });
  cuda::scatter_rows(launch, any.get_device());
  return gradients;
}

// The sums of an angle, with what is made of them.
at::Tensor angle_on_cuda(const SumCall& call) {
  const at::Tensor& factors = call.finish.factors;
  const at::DimVector& dim = call.finish.dim;
  if (!factors.defined()) {
    return scatter_on_cuda(call.finish, sum_groups_on_cuda(call, {})).sin;
  }
  const at::ScalarType real = at::toOpMathType(call.xs[0].scalar_type());
  const at::ScalarType dtype = call.finish.dtype.value_or(real);
  if (factors.dim() == 1 && factors.sym_size(0) == call.sizes.back() && dim == at::DimVector{-1} &&
      dtype == real) {
    // A factor for each pair: the kernel itself multiplies.
    return sum_groups_on_cuda(call, factors.to(at::kDouble).contiguous())
        .sin.sum(at::IntArrayRef({0, -1}));
  }
  const at::Tensor sums = sum_groups_on_cuda(call, {}).sin;
  // The groups are the first dimension of the products, whose type is already that of the result: a
  // sum of another type would take a kernel to convert them.
  at::DimVector sizes(sums.sizes().begin(), sums.sizes().end());
  while (std::ssize(sizes) <= factors.dim()) {
    sizes.insert(sizes.begin() + 1, 1);
  }
  at::Tensor products = at::empty({0}, sums.options().dtype(dtype));
  at::mul_out(products, sums.view(sizes), factors);
  at::DimVector summed = dim;
  summed.push_back(0);
  return products.sum(summed);
}

Rotation<at::Tensor> sum_on_cuda(const SumCall& call) {
  check(call);
  // Beyond kMaxDims a launch may be on copies of like_sums, which has no memory.
  const bool is_one_launch =
      std::ranges::all_of(call.xs, [](const at::Tensor& x) { return x.dim() <= kMaxDims; });
  if (!cuda::has_kernels() || !is_one_launch) {
    return sum_decomposed(call);
  }
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(call.sizes);
  const bool is_empty =
      std::ranges::all_of(call.xs, [](const at::Tensor& x) { return x.numel() == 0; }) ||
      c10::multiply_integers(sizes) == 0 || call.finish.num_rows == 0;
  if (is_empty || !(call.wants_cos() || call.wants_sin())) {
    return sum_decomposed(call);
  }
  if (!call.uses_tables) {
    return {at::Tensor(), angle_on_cuda(call)};
  }
  const Rotation<at::Tensor> sums = sum_groups_on_cuda(call, {});
  return scatter_on_cuda(call.finish, {call.wants_cos() ? sums.cos : at::Tensor(),
                                       call.wants_sin() ? sums.sin : at::Tensor()});
}

Rotation<at::Tensor> dispatch(const SumCall& call) {
  if (!call.uses_tables) {
    return {at::Tensor(), AngleGradient::dispatch(call)};
  }
  auto [cos, sin] = CosSinGradient::dispatch(call);
  return {std::move(cos), std::move(sin)};
}

// Whether a kernel serves a tensor: not subclasses, such as the tensors of compilers, which see
// ATen operators, and not what is to be differentiated.
bool is_plain(const at::Tensor& tensor) {
  return !tensor.defined() ||
         (!tensor.unsafeGetTensorImpl()->is_python_dispatch() && !has_tangent(tensor) &&
          !(at::GradMode::is_enabled() && requires_grad(tensor)));
}

// For a device with a kernel of its own, which ends what PyTorch does for composite operators by
// itself.
Rotation<at::Tensor> sum_with_autograd(const SumCall& call) {
  if (is_transformed() || !std::ranges::all_of(call.grads, is_plain) ||
      !std::ranges::all_of(call.xs, is_plain) || !is_plain(call.finish.factors) ||
      !is_plain(call.finish.rows)) {
    return sum_decomposed(call);
  }
  const at::AutoDispatchBelowAutograd guard;
  return dispatch(call);
}

// -------------------------------------------------------------------------------------------------
// The gradients

// The dimensions over which angles differ.
c10::SymIntArrayRef tokens_of(const Call& call) {
  if (call.positions.defined()) {
    const auto& inv_freq = call.options.inv_freq;
    const bool has_axes = inv_freq.has_value() && inv_freq->dim() == 2;
    return call.positions.sym_sizes().slice(has_axes ? 1 : 0);
  }
  return call.cos.sym_sizes().slice(0, call.cos.dim() - 1);
}

// Visits the tensors whose gradients are defined: two of the same dtype together.
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

// The sums of the call, which has an output whose gradient is defined, with what is made of them.
Rotation<at::Tensor> sum_to_tokens(const Call& call, at::TensorList grads, at::TensorList kept,
                                   const WantedGradients& wanted, const Finish& finish) {
  const c10::SymIntArrayRef tokens = tokens_of(call);
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

// The derivative of the angle by the position: (N), or (A, 1..., N) where there are axes.
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
  for (std::int64_t d = 0; d < std::ssize(tokens_of(call)); ++d) {
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
  // With y = R(t) x the derivative dy/dt is y turned by a right angle: of a call by positions the
  // output is all it takes.
  const Call one = on(call, kept[0]);
  if (wanted.positions && wanted.inv_freq) {
    const at::Tensor angle = sums({}).sin;
    return {.positions = finish_decomposed(of_positions(one), angle),
            .inv_freq = finish_decomposed(of_inv_freq(one), angle)};
  }
  return wanted.positions ? AngleGradients{.positions = sums(of_positions(one)).sin}
                          : AngleGradients{.inv_freq = sums(of_inv_freq(one)).sin};
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  rope::SumOperators::implement<rope::sum_decomposed>(library);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::SumOperators::implement<rope::sum_on_cuda>(library);
}

TORCH_LIBRARY_IMPL(rope, AutogradCUDA, library) {
  rope::SumOperators::implement<rope::sum_with_autograd>(library);
}

// vmap, and the older vmap of torch.autograd.grad(is_grads_batched=True).
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::SumOperators::implement<rope::sum_decomposed>(library);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::SumOperators::implement<rope::sum_decomposed>(library);
}
