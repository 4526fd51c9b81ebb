#include "gradients.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd.h"
#include "checks.h"
#include "composed.h"
#include "cuda/launch.h"
#include "describe.h"

namespace rope {

namespace {

// -------------------------------------------------------------------------------------------------
// The sums

Pair<at::Tensor> real_pairs(const SumCall& call, const at::Tensor& x) {
  const at::ScalarType real = at::toOpMathType(x.scalar_type());
  const c10::SymInt columns = call.sizes.back();
  const Pair<at::Tensor> views = pairs(call.options, call.full_width ? columns : columns * 2, x);
  return {views.a.to(real), views.b.to(real)};
}

void add(at::Tensor& sum, const at::Tensor& term) {
  if (term.defined()) {
    sum = sum.defined() ? sum + term : term;
  }
}

// The sums of one tensor of the call.
Rotation<at::Tensor> sum_one(const SumCall& call, const at::Tensor& grad,
                             const at::Tensor& tensor) {
  const Pair<at::Tensor> g = real_pairs(call, grad);
  const Pair<at::Tensor> x = real_pairs(call, tensor);
  if (call.full_width) {
    c10::SymDimVector sizes(call.sizes.begin(), call.sizes.end());
    sizes.back() = sizes.back() / 2;
    const auto product = [&](const at::Tensor& left, const at::Tensor& right) {
      return (left * right).sum_to_size_symint(sizes);
    };
    const at::Tensor of_a_and_b = product(g.a, x.b);
    const at::Tensor of_b_and_a = product(g.b, x.a);
    const Pair<at::Tensor> sin = call.options.conjugate ? Pair<at::Tensor>{-of_b_and_a, of_a_and_b}
                                                        : Pair<at::Tensor>{-of_a_and_b, of_b_and_a};
    const bool interleaved = call.options.interleaved;
    return {slice_of({product(g.a, x.a), product(g.b, x.b)}, interleaved),
            slice_of(sin, interleaved)};
  }
  const auto summed = [&](const at::Tensor& products) {
    return products.sum_to_size_symint(call.sizes);
  };
  const at::Tensor sin = g.b * x.a - g.a * x.b;
  return {call.wants_cos ? summed(g.a * x.a + g.b * x.b) : at::Tensor(),
          summed(call.options.conjugate ? -sin : sin)};
}

Rotation<at::Tensor> sum_composed(const SumCall& call) {
  check(call);
  Rotation<at::Tensor> total;
  for (const auto i : c10::irange(call.xs.size())) {
    const Rotation<at::Tensor> one = sum_one(call, call.grads[i], call.xs[i]);
    add(total.cos, one.cos);
    add(total.sin, one.sin);
  }
  return total;
}

// The launch of tables that look like the sums: NOTE [ Sums ] in cuda/sum_thread.h.
void for_each_sum_launch(const SumCall& call, const at::Tensor& like_sums,
                         c10::function_ref<void(const Launch&)> launch) {
  const ApplyOptions& options = call.options;
  const Call tables =
      make_call(like_sums, like_sums, std::nullopt, options.embedding_axis, std::nullopt,
                options.rotary_offset, options.interleaved, options.conjugate, call.full_width);
  if (call.xs.size() == 1) {
    for_each_launch(on(tables, call.grads[0]), {call.xs[0], {}}, launch);
  } else {
    for_each_launch(on(tables, call.grads[0], call.grads[1]), {call.xs[0], call.xs[1]}, launch);
  }
}

Rotation<at::Tensor> sum_on_cuda(const SumCall& call) {
  check(call);
  // With so many dimensions a launch may be split, and the parts have sums in common.
  const bool is_one_launch =
      std::ranges::all_of(call.xs, [](const at::Tensor& x) { return x.dim() <= kMaxDims; });
  if (!cuda::has_kernels() || !is_one_launch) {
    return sum_composed(call);
  }
  const at::IntArrayRef sizes = C10_AS_INTARRAYREF_SLOW(call.sizes);
  const std::int64_t numel = c10::multiply_integers(sizes);
  const at::Tensor& x = call.xs[0];
  const at::TensorOptions options = x.options().dtype(at::toOpMathType(x.scalar_type()));
  const auto only_wanted = [&](const auto& make) {
    return Rotation<at::Tensor>{call.wants_cos ? make() : at::Tensor(), make()};
  };
  const bool is_empty =
      std::ranges::all_of(call.xs, [](const at::Tensor& x) { return x.numel() == 0; });
  if (is_empty || numel == 0) {
    return only_wanted([&] { return at::zeros(sizes, options); });
  }
  Rotation<at::Tensor> sums;
  for_each_sum_launch(call, at::empty(sizes, options.device(at::kMeta)), [&](const Launch& launch) {
    const std::int64_t groups = cuda::sum_groups(launch);
    at::DimVector sizes_of_all(sizes.begin(), sizes.end());
    if (groups > 1) {
      sizes_of_all.insert(sizes_of_all.begin(), groups);
    }
    sums = only_wanted([&] { return at::empty(sizes_of_all, options); });
    cuda::sum(launch,
              {call.wants_cos ? sums.cos.mutable_data_ptr() : nullptr, sums.sin.mutable_data_ptr(),
               numel},
              x.get_device());
    if (groups > 1) {
      sums = {call.wants_cos ? sums.cos.sum(0) : at::Tensor(), sums.sin.sum(0)};
    }
  });
  return sums;
}

// The operators that one function over calls makes, with the signatures of the schemas.
template <Rotation<at::Tensor> (*sum)(const SumCall&)>
struct SumOperators {
  static at::Tensor angle(at::TensorList grads, at::TensorList ys, c10::SymIntArrayRef sizes,
                          std::int64_t embedding_axis, std::int64_t rotary_offset, bool interleaved,
                          bool conjugate) {
    return sum({"_angle_gradient", "ys", grads, ys, sizes,
                slice(embedding_axis, rotary_offset, interleaved, conjugate)})
        .sin;
  }
  static std::tuple<at::Tensor, at::Tensor> cos_sin(at::TensorList grads, at::TensorList xs,
                                                    c10::SymIntArrayRef sizes,
                                                    std::int64_t embedding_axis,
                                                    std::int64_t rotary_offset, bool interleaved,
                                                    bool conjugate, bool full_width) {
    Rotation<at::Tensor> sums =
        sum({"_cos_sin_gradient", "xs", grads, xs, sizes,
             slice(embedding_axis, rotary_offset, interleaved, conjugate), true, full_width});
    return {std::move(sums.cos), std::move(sums.sin)};
  }
  static void register_all(torch::Library& library) {
    library.impl("_angle_gradient", TORCH_FN(angle));
    library.impl("_cos_sin_gradient", TORCH_FN(cos_sin));
  }

 private:
  static ApplyOptions slice(std::int64_t embedding_axis, std::int64_t rotary_offset,
                            bool interleaved, bool conjugate) {
    return {.embedding_axis = embedding_axis,
            .rotary_offset = rotary_offset,
            .interleaved = interleaved,
            .conjugate = conjugate};
  }
};

// Calls the operator through the dispatcher.
Rotation<at::Tensor> dispatch(const SumCall& call) {
  using Composed = SumOperators<sum_composed>;
  const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  const auto send = [&](const auto& handle, auto... full_width) {
    const ApplyOptions& options = call.options;
    return handle.call(call.grads, call.xs, call.sizes, options.embedding_axis,
                       options.rotary_offset, options.interleaved, options.conjugate,
                       full_width...);
  };
  if (call.wants_cos) {
    static const auto cos_sin =
        find("rope::_cos_sin_gradient").typed<decltype(Composed::cos_sin)>();
    auto [cos, sin] = send(cos_sin, call.full_width);
    return {std::move(cos), std::move(sin)};
  }
  static const auto angle = find("rope::_angle_gradient").typed<decltype(Composed::angle)>();
  return {at::Tensor(), send(angle)};
}

// For a device with a kernel of its own, which ends what PyTorch does for composite operators by
// itself. Subclasses, such as the tensors of compilers, see ATen operators, as elsewhere.
Rotation<at::Tensor> sum_with_autograd(const SumCall& call) {
  const auto is_plain = [](const at::Tensor& tensor) {
    return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && !has_tangent(tensor) &&
           !(at::GradMode::is_enabled() && requires_grad(tensor));
  };
  if (is_transformed() || !std::ranges::all_of(call.grads, is_plain) ||
      !std::ranges::all_of(call.xs, is_plain)) {
    return sum_composed(call);
  }
  const at::AutoDispatchBelowAutograd guard;
  return dispatch(call);
}

// -------------------------------------------------------------------------------------------------
// The gradients

// The sums of the call's tensors, which have the same dtype.
Rotation<at::Tensor> sum_to_tokens(const Call& call, at::TensorList grads, at::TensorList xs) {
  c10::SymIntArrayRef tokens;
  if (call.positions.defined()) {
    const auto& inv_freq = call.options.inv_freq;
    tokens = call.positions.sym_sizes().slice(inv_freq.has_value() && inv_freq->dim() == 2 ? 1 : 0);
  } else {
    tokens = call.cos.sym_sizes().slice(0, call.cos.dim() - 1);
  }
  c10::SymDimVector sizes(tokens.begin(), tokens.end());
  const c10::SymInt dim = rotary_dim(call, xs[0]);
  sizes.push_back(call.full_width ? dim : dim / 2);
  return dispatch({.grads = grads,
                   .xs = xs,
                   .sizes = sizes,
                   .options = call.options,
                   .wants_cos = call.uses_tables,
                   .full_width = call.full_width});
}

// Visits the tensors whose gradients are defined: two of the same dtype together.
void for_each_dtype(at::TensorList grads, at::TensorList kept,
                    c10::function_ref<void(at::TensorList, at::TensorList)> visit) {
  const bool together = grads.size() == 2 && grads[0].defined() && grads[1].defined() &&
                        kept[0].scalar_type() == kept[1].scalar_type();
  if (together) {
    visit(grads, kept);
    return;
  }
  for (const auto i : c10::irange(grads.size())) {
    if (grads[i].defined()) {
      visit(grads[i], kept[i]);
    }
  }
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

}  // namespace

AngleGradients angle_gradients(const Call& call, at::TensorList grads, at::TensorList kept,
                               const WantedGradients& wanted) {
  // With y = R(t) x the derivative dy/dt is y turned by a right angle: of a call by positions the
  // output is all it takes.
  Rotation<at::Tensor> total;
  for_each_dtype(grads, kept, [&](at::TensorList some_grads, at::TensorList some_kept) {
    const Rotation<at::Tensor> some = sum_to_tokens(call, some_grads, some_kept);
    add(total.cos, some.cos);
    add(total.sin, some.sin);
  });
  AngleGradients result;
  if (!total.sin.defined()) {
    return result;
  }
  if (wanted.positions) {
    result.positions = positions_gradient(on(call, kept[0]), total.sin);
  }
  if (wanted.inv_freq) {
    result.inv_freq = inv_freq_gradient(call, total.sin);
  }
  if (wanted.cos) {
    result.cos = table_rows_gradient(call, call.cos, total.cos);
  }
  if (wanted.sin) {
    result.sin = table_rows_gradient(call, call.sin, total.sin);
  }
  return result;
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  rope::SumOperators<rope::sum_composed>::register_all(library);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::SumOperators<rope::sum_on_cuda>::register_all(library);
}

TORCH_LIBRARY_IMPL(rope, AutogradCUDA, library) {
  rope::SumOperators<rope::sum_with_autograd>::register_all(library);
}

// vmap, and the older vmap of torch.autograd.grad(is_grads_batched=True).
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  rope::SumOperators<rope::sum_composed>::register_all(library);
}

TORCH_LIBRARY_IMPL(rope, Batched, library) {
  rope::SumOperators<rope::sum_composed>::register_all(library);
}
