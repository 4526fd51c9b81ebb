#include "unsupported_dtype.h"

#include <c10/util/Exception.h>

namespace rope {

void throw_unsupported_dtype(c10::ScalarType dtype) {
  TORCH_INTERNAL_ASSERT(false, "rope has no kernel for ", dtype);
}

}  // namespace rope
