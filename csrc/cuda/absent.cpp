// The place of the CUDA kernels in a build without them.
#include <c10/util/Exception.h>

#include "cuda/launch.h"

namespace rope::cuda {

void check_available(const std::string& operator_name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "rope::", operator_name,
      "(): expected the tensors to be on the CPU, since this torch-rope was built without CUDA, but got CUDA tensors. "
      "To get the CUDA kernels, install torch-rope where torch is a CUDA build and nvcc is there (the CUDA toolkit, or "
      "the pip packages cuda-toolkit[nvcc,cccl]): ROPE_CUDA=1 pip install --no-build-isolation .");
}

void launch(const Launch&, int) { TORCH_INTERNAL_ASSERT(false, "check_available refuses every call"); }

}  // namespace rope::cuda
