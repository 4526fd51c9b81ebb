// From a dtype to the functions for it. Part of the kernels: compiled once for each CPU capability.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/step.h"
#include "launch.h"
#include "unsupported_dtype.h"

namespace rope::cpu {

namespace {

// Calls run with a number of the dtype.
template <typename Run>
ROPE_INLINE void dispatch_dtype(c10::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case c10::ScalarType::Double:
      run(double());
      break;
    case c10::ScalarType::Float:
      run(float());
      break;
    case c10::ScalarType::Half:
      run(c10::Half());
      break;
    case c10::ScalarType::BFloat16:
      run(c10::BFloat16());
      break;
    default:
      throw_unsupported_dtype(dtype);
  }
}

// Likewise of the launch's dtype.
template <typename Run>
ROPE_INLINE void dispatch_launch_dtype(const Launch& launch, const Run& run) {
#ifdef __AVX512BF16__  // for bfloat16 alone
  (void)launch;
  run(c10::BFloat16());
#else
  dispatch_dtype(launch.dtype, run);
#endif
}

}  // namespace

}  // namespace rope::cpu
