// What every device shares: check, allocate, describe, launch. And Meta, which stops after the
// second step.
#include <ATen/ATen.h>

#include "call.h"
#include "checks.h"
#include "cpu/launch.h"
#include "cpu/memory.h"
#include "cuda/launch.h"
#include "describe.h"

namespace rope {

namespace {

Outputs check_and_allocate(const Call& call) {
  check(call);
  if (call.in_place) {
    return {call.q, call.k};
  }
  return {at::empty_like(call.q), call.is_pair ? at::empty_like(call.k) : at::Tensor()};
}

Outputs rotate_on_cpu(const Call& call) {
  Outputs outputs = check_and_allocate(call);
  check_rows_exist(call);
  if (!call.in_place) {
    cpu::prefer_huge_pages(outputs.q);
    if (call.is_pair) {
      cpu::prefer_huge_pages(outputs.k);
    }
  }
  for_each_launch(call, outputs, cpu::launch);
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
  Outputs outputs = check_and_allocate(call);
  for_each_launch(call, outputs,
                  [&](const Launch& launch) { cuda::launch(launch, call.q.get_device()); });
  return outputs;
}

}  // namespace

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CPU, library) {
  rope::Operators<rope::rotate_on_cpu>::register_all(library);
}

TORCH_LIBRARY_IMPL(rope, CUDA, library) {
  rope::Operators<rope::rotate_on_cuda>::register_all(library);
}

TORCH_LIBRARY_IMPL(rope, Meta, library) {
  rope::Operators<rope::check_and_allocate>::register_all(library);
}
