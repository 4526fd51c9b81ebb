#include "gradient_sums.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

#include "autograd.h"
#include "checks.h"
#include "cuda/run.h"
#include "decomposition.h"
#include "make_launch.h"

namespace rope {

namespace {

Pair<at::Tensor> real_pairs(const SumCall& call, const at::Tensor& x) {
  const at::ScalarType real = at::toOpMathType(x.scalar_type());
  const c10::SymInt columns = call.sizes.back();
  const Pair<at::Tensor> views = pairs(convert_options<SliceOptions>(call.options),
                                       call.options.full_width ? columns : columns * 2, x);
  return {views.a.to(real), views.b.to(real)};
}

// Applies a function to each of the two that is defined.
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

// Adds each token's sums to the row it names, in a fixed order on every device.
at::Tensor add_to_rows(const Finish& finish, const at::Tensor& sums) {
  return sums.new_zeros_symint({*finish.num_rows, sums.sym_size(-1)})
      .index_put({finish.rows.to(at::kLong)}, sums, /*accumulate=*/true);
}

// Not a matrix product: that flattens the tokens, which DTensor cannot do where they are sharded.
at::Tensor multiply_and_sum(const Finish& finish, const at::Tensor& sums) {
  const at::ScalarType dtype = finish.dtype.value_or(sums.scalar_type());
  const at::ScalarType of_factors = finish.factors.scalar_type();
  const at::ScalarType exact =
      at::isFloatingType(of_factors) ? at::promoteTypes(of_factors, dtype) : dtype;
  const at::Tensor products = sums.to(exact) * finish.factors.to(exact);
  return finish.dim.empty() ? products : products.sum(finish.dim);
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

// The launch of a call with tables shaped like the sums: see NOTE [ Sums ] in cuda/sum_kernel.h.
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

// Sums over each group of rows, (groups, tokens..., N), times the factor of each pair, float64 (N),
// if factors are defined. For tables the kernel computes both sums.
Rotation<at::Tensor> sum_groups_on_cuda(const SumCall& call, const at::Tensor& factors) {
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(call.sizes);
  const at::Tensor& x = call.xs[0];
  const at::TensorOptions options = x.options().dtype(at::toOpMathType(x.scalar_type()));
  Rotation<at::Tensor> sums;
  for_each_sum_launch(call, at::empty(sizes, options.device(at::kMeta)), [&](const Launch& launch) {
    cuda::sum(launch, x.get_device(), [&](std::int64_t num_groups) -> Sums {
      at::DimVector sizes_of_all = {num_groups};
      sizes_of_all.append(sizes.begin(), sizes.end());
      const auto make = [&] { return at::empty(sizes_of_all, options); };
      sums = {call.uses_tables ? make() : at::Tensor(), make()};
      return {call.uses_tables ? sums.cos.mutable_data_ptr() : nullptr, sums.sin.mutable_data_ptr(),
              c10::multiply_integers(sizes),
              factors.defined() ? factors.const_data_ptr<double>() : nullptr};
    });
  });
  return sums;
}

// Adds up the groups, and the tokens that name a row if there are rows, and converts to the dtype
// of the result.
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
    // With one factor for each pair the kernel multiplies.
    return sum_groups_on_cuda(call, factors.to(at::kDouble).contiguous())
        .sin.sum(at::IntArrayRef({0, -1}));
  }
  const at::Tensor sums = sum_groups_on_cuda(call, {}).sin;
  // The products have the dtype of the result, so that their sum needs no kernel to convert.
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

// A backend kernel ends PyTorch's own decomposition of a composite operator, so what needs it is
// decomposed here.
Rotation<at::Tensor> sum_with_autograd(const SumCall& call) {
  if (is_transformed() || !std::ranges::all_of(call.grads, is_plain) ||
      !std::ranges::all_of(call.xs, is_plain) || !is_plain(call.finish.factors) ||
      !is_plain(call.finish.rows)) {
    return sum_decomposed(call);
  }
  const at::AutoDispatchBelowAutograd guard;
  return dispatch(call);
}

}  // namespace

Rotation<at::Tensor> dispatch(const SumCall& call) {
  if (!call.uses_tables) {
    return {at::Tensor(), AngleGradient::dispatch(call)};
  }
  auto [cos, sin] = CosSinGradient::dispatch(call);
  return {std::move(cos), std::move(sin)};
}

void add(at::Tensor& sum, const at::Tensor& term) {
  if (term.defined()) {
    sum = sum.defined() ? sum + term : term;
  }
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

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  rope::SumOperators::implement(library, rope::sum_decomposed);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::SumOperators::implement(library, rope::sum_on_cuda);
}

TORCH_LIBRARY_IMPL(rope, AutogradCUDA, library) {
  rope::SumOperators::implement(library, rope::sum_with_autograd);
}

// vmap, and the older vmap of torch.autograd.grad(is_grads_batched=True). Neither decomposes a
// composite operator by itself.
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::SumOperators::implement(library, rope::sum_decomposed);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::SumOperators::implement(library, rope::sum_decomposed);
}
