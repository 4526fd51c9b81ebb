// Stands in for the CUDA kernels in a build without them.
#include <c10/util/Exception.h>

#include "cuda/kernels.h"

namespace rope::cuda {

bool has_kernels() { return false; }

namespace {

[[noreturn]] void fail() { TORCH_INTERNAL_ASSERT(false, "this build has no CUDA kernels"); }

}  // namespace

void rotate(const Launch&, int) { fail(); }

void normalize(const Launch&, int) { fail(); }

void normalize_gradient(const Launch&, int, MakeWeightSums) { fail(); }

void sum(const Launch&, int, MakeSums) { fail(); }

void scatter_rows(const TableSums&, int) { fail(); }

}  // namespace rope::cuda
