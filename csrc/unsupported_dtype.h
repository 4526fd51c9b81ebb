// How a switch over dtypes ends, for one that it does not name: the checks refuse such a dtype, or
// should.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

namespace rope {

// Throws an internal error. Out of line: the CPU kernel may use no inline function of others, as
// TORCH_INTERNAL_ASSERT does (cmake/CheckKernelSymbols.cmake).
[[noreturn]] void throw_unsupported_dtype(c10::ScalarType dtype);

// The same on host and device, where it stops the kernel.
C10_HOST_DEVICE inline void fail_for_dtype([[maybe_unused]] c10::ScalarType dtype) {
#ifdef __CUDA_ARCH__
  __trap();
#else
  throw_unsupported_dtype(dtype);
#endif
}

}  // namespace rope
