// The place of the CUDA kernels in a build without them.
#include <c10/util/Exception.h>

#include "cuda/launch.h"

namespace rope::cuda {

bool has_kernels() { return false; }

void launch(const Launch&, int) {
  TORCH_INTERNAL_ASSERT(false, "a build without CUDA kernels refuses CUDA tensors");
}

}  // namespace rope::cuda
