// Fresh output memory on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace rope::cpu {

// Asks the system to back the tensor's memory, before it is written, with huge pages where they are
// on offer by madvise (Linux). The C library returns large blocks to the system, so that each call
// has its output's pages faulted in anew, and a page of 2 MiB is one fault instead of 512.
// ROPE_HUGE_PAGES=0 in the environment, read at the first call, turns it off.
void prefer_huge_pages(const at::Tensor& fresh);

}  // namespace rope::cpu
