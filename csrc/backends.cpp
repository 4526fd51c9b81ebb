// The kernels of the backends. All of them check and allocate in the same way; Meta stops there,
// CPU and CUDA make launches and run them.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <c10/util/irange.h>

#include <array>
#include <string>

#include "call.h"
#include "checks.h"
#include "cpu/memory.h"
#include "cpu/rotate.h"
#include "cuda/run.h"
#include "decomposition.h"
#include "make_launch.h"
#include "norm_operators.h"
#include "rotate_operators.h"
#include "unfused_norm.h"

namespace rope {

namespace {

template <at::Tensor (*empty_like)(const at::Tensor&)>
Outputs check_and_allocate(const Call& call) {
  check(call);
  if (call.in_place) {
    return {call.q, call.k};
  }
  return {empty_like(call.q), call.is_pair ? empty_like(call.k) : at::Tensor()};
}

at::Tensor empty_like(const at::Tensor& x) { return at::empty_like(x); }

// The same without the dispatcher, whose cost shows in small calls.
at::Tensor empty_like_on_cpu(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense()
             ? at::Tensor(at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type()))
             : at::empty_like(x);
}

// The gradients of a norm that is fused. Finishes those of weights: run(launch, make_weight_sums)
// carries out a launch.
template <typename Run>
NormGradients fused_norm_gradients(const NormGradientCall& call, const Run& run) {
  NormGradients outputs = empty_gradients(call);
  for_each_launch(
      call, outputs, [&](const Launch& launch, const std::array<at::Tensor, 2>& weight_grads) {
        at::Tensor sums[2];
        run(launch, [&](std::int64_t num_parts) -> WeightSums {
          WeightSums pointers{};
          for (const auto i : c10::irange(2)) {
            if (weight_grads[i].defined()) {
              sums[i] = at::empty({num_parts, weight_grads[i].numel()},
                                  weight_grads[i].options().dtype(at::toOpMathType(launch.dtype)));
              pointers.of_operand[i] = sums[i].mutable_data_ptr();
            }
          }
          return pointers;
        });
        for (const auto i : c10::irange(2)) {
          if (weight_grads[i].defined()) {
            weight_grads[i].view(-1).copy_(sums[i].size(0) == 1 ? sums[i][0] : sums[i].sum(0));
          }
        }
      });
  return outputs;
}

Outputs rotate_on_cpu(const Call& call) {
  Outputs outputs = check_and_allocate<empty_like_on_cpu>(call);
  check_rows_exist(call);
  if (call.normalizes && is_unfused(call, /*weights_may_vary=*/true)) {
    normalize_unfused(call, outputs);
    return outputs;
  }
  if (!call.in_place) {
    cpu::prefer_huge_pages(outputs.q);
    if (call.is_pair) {
      cpu::prefer_huge_pages(outputs.k);
    }
  }
  for_each_launch(call, outputs, call.normalizes ? cpu::normalize : cpu::rotate);
  return outputs;
}

NormGradients norm_gradients_on_cpu(const NormGradientCall& call) {
  check(call);
  check_rows_exist(call);
  return is_unfused_gradient(call) ? unfused_norm_gradients(call)
                                   : fused_norm_gradients(call, cpu::normalize_gradient);
}

void check_has_kernels(const std::string& name, const at::Tensor& x) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      cuda::has_kernels(), "rope::", name,
      "(): expected tensors on the CPU, since this torch-rope was built without CUDA kernels, but "
      "got tensors on ",
      x.device(),
      ". For the kernels, build where torch is a CUDA build and nvcc is there, from the CUDA "
      "toolkit or ",
      "the pip packages cuda-toolkit[cccl,crt,nvcc,nvvm]: ROPE_CUDA=1 pip install .");
}

// Norms with more angles than a block has room for are a norm and a rotation too.
bool has_too_many_pairs(const Call& call) {
  return rotary_dim(call, call.q) > 2 * cuda::kMostNormPairs;
}

Outputs rotate_on_cuda(const Call& call) {
  check_has_kernels(call.name(), call.q);
  Outputs outputs = check_and_allocate<empty_like>(call);
  if (call.normalizes &&
      (is_unfused(call, /*weights_may_vary=*/true) || has_too_many_pairs(call))) {
    normalize_unfused(call, outputs);
    return outputs;
  }
  const int device = call.q.get_device();
  for_each_launch(call, outputs, [&](const Launch& launch) {
    launch.normalizes ? cuda::normalize(launch, device) : cuda::rotate(launch, device);
  });
  return outputs;
}

NormGradients norm_gradients_on_cuda(const NormGradientCall& call) {
  check_has_kernels(call.name(), call.q);
  check(call);
  if (is_unfused_gradient(call) || has_too_many_pairs(call)) {
    return unfused_norm_gradients(call);
  }
  return fused_norm_gradients(call, [&](const Launch& launch, MakeWeightSums make_weight_sums) {
    cuda::normalize_gradient(launch, call.q.get_device(), make_weight_sums);
  });
}

// The strided layout of nested tensors, which check() refuses. torch_rope/_nested.py has the jagged
// layout.
Outputs refuse_strided_nested(const Call& call) {
  check(call);
  TORCH_INTERNAL_ASSERT(false, "rope::", call.name(), " accepted a strided nested tensor");
}

}  // namespace

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CPU, library) {
  rope::AllOperators::implement(library, rope::rotate_on_cpu);
  rope::NormGradientOperators::implement(library, rope::norm_gradients_on_cpu);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::AllOperators::implement(library, rope::rotate_on_cuda);
  rope::NormGradientOperators::implement(library, rope::norm_gradients_on_cuda);
}

// Without these, the fallback of the key would give another error than the operators do elsewhere.
TORCH_LIBRARY_IMPL(rope, NestedTensorCPU, library) {
  rope::AllOperators::implement(library, rope::refuse_strided_nested);
}

TORCH_LIBRARY_IMPL(rope, NestedTensorCUDA, library) {
  rope::AllOperators::implement(library, rope::refuse_strided_nested);
}

// Fake tensors get the checks, messages and strides of the backends.
TORCH_LIBRARY_IMPL(rope, Meta, library) {
  rope::AllOperators::implement(library, rope::check_and_allocate<rope::empty_like>);
}
