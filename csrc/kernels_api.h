// What librope_kernels.so exports: functions over the plain description of a launch. The library
// has all kernels and calls nothing of torch, so that one serves every version of it.
#pragma once

#if defined(_WIN32)
#define ROPE_KERNELS_API
#else
#define ROPE_KERNELS_API __attribute__((visibility("default")))
#endif
