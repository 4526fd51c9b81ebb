// The kernels of the backends. All of them check and allocate in the same way; Meta stops there,
// CPU and CUDA make launches and run them.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include "call.h"
#include "checks.h"
#include "cpu/memory.h"
#include "cpu/rotate.h"
#include "cuda/kernels.h"
#include "decomposition.h"
#include "make_launch.h"
#include "norm_operators.h"
#include "rotate_operators.h"

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

Outputs normalize_decomposed(const Call& call, const Outputs& outputs) {
  Call functional = call;
  functional.in_place = false;
  const Outputs results = rotate_decomposed(functional);
  outputs.q.copy_(results.q);
  if (call.is_pair) {
    outputs.k.copy_(results.k);
  }
  return outputs;
}

Outputs rotate_on_cpu(const Call& call) {
  Outputs outputs = check_and_allocate<empty_like_on_cpu>(call);
  check_rows_exist(call);
  if (!call.in_place) {
    cpu::prefer_huge_pages(outputs.q);
    if (call.is_pair) {
      cpu::prefer_huge_pages(outputs.k);
    }
  }
  if (call.normalizes) {
    return normalize_decomposed(call, outputs);
  }
  for_each_launch(call, outputs, cpu::rotate);
  return outputs;
}

Outputs rotate_on_cuda(const Call& call) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      cuda::has_kernels(), "rope::", call.name(),
      "(): expected tensors on the CPU, since this torch-rope was built without CUDA kernels, but "
      "got tensors on ",
      call.q.device(),
      ". For the kernels, build where torch is a CUDA build and nvcc is there, from the CUDA "
      "toolkit or ",
      "the pip packages cuda-toolkit[cccl,crt,nvcc,nvvm]: ROPE_CUDA=1 pip install "
      "--no-build-isolation .");
  Outputs outputs = check_and_allocate<empty_like>(call);
  if (call.normalizes) {
    return normalize_decomposed(call, outputs);
  }
  for_each_launch(call, outputs,
                  [&](const Launch& launch) { cuda::rotate(launch, call.q.get_device()); });
  return outputs;
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
  rope::AllOperators::implement<rope::rotate_on_cpu>(library);
  rope::NormGradientOperators::implement<rope::decomposed_norm_gradients>(library);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::AllOperators::implement<rope::rotate_on_cuda>(library);
  rope::NormGradientOperators::implement<rope::decomposed_norm_gradients>(library);
}

// Without these, the fallback of the key would give another error than the operators do elsewhere.
TORCH_LIBRARY_IMPL(rope, NestedTensorCPU, library) {
  rope::AllOperators::implement<rope::refuse_strided_nested>(library);
}

TORCH_LIBRARY_IMPL(rope, NestedTensorCUDA, library) {
  rope::AllOperators::implement<rope::refuse_strided_nested>(library);
}

// Fake tensors get the checks, messages and strides of the backends.
TORCH_LIBRARY_IMPL(rope, Meta, library) {
  rope::AllOperators::implement<rope::check_and_allocate<rope::empty_like>>(library);
}
