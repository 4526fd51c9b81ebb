// The place of the CUDA kernels in a build without them.
#include <c10/util/Exception.h>

#include "cuda/kernels.h"

namespace rope::cuda {

bool has_kernels() { return false; }

namespace {

[[noreturn]] void fail() {
  TORCH_INTERNAL_ASSERT(false, "a build without CUDA kernels has nothing to launch");
}

}  // namespace

void rotate(const Launch&, int) { fail(); }

void sum(const Launch&, const Sums&, int) { fail(); }

std::int64_t sum_groups(const Launch&) { fail(); }

void scatter_rows(const TableSums&, int) { fail(); }

}  // namespace rope::cuda
