// The default case of every switch over dtypes. The checks reject dtypes that a switch does not
// name.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

namespace rope {

// Throws an internal error. Out of line because TORCH_INTERNAL_ASSERT uses inline functions, which
// the CPU kernel must not (cmake/CheckKernelSymbols.cmake).
[[noreturn]] void throw_unsupported_dtype(c10::ScalarType dtype);

// For host and device code. On the device it traps.
C10_HOST_DEVICE inline void fail_for_dtype([[maybe_unused]] c10::ScalarType dtype) {
#ifdef __CUDA_ARCH__
  __trap();
#else
  throw_unsupported_dtype(dtype);
#endif
}

// The same on the host only, for device code with rows in flight, where a trap would take
// registers: the host checks the dtype before it launches the kernel.
C10_HOST_DEVICE inline void fail_for_dtype_on_host([[maybe_unused]] c10::ScalarType dtype) {
#ifndef __CUDA_ARCH__
  throw_unsupported_dtype(dtype);
#endif
}

}  // namespace rope
