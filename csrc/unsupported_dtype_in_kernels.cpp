// For librope_kernels.so, which has no TORCH_INTERNAL_ASSERT.
#include <stdexcept>

#include "unsupported_dtype.h"

namespace rope {

void throw_unsupported_dtype(c10::ScalarType) {
  throw std::logic_error("rope: internal error: a kernel got a dtype that it does not have");
}

}  // namespace rope
