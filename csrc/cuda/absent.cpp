// Stands in for the CUDA kernels in a build without them: has_kernels() is asked before any launch.
#include "cuda/kernels.h"

namespace rope::cuda {

namespace {

constexpr Status kNoKernelImage = 209;  // cudaErrorNoKernelImageForDevice

}  // namespace

bool are_compiled() { return false; }

const char* describe(Status) { return "torch-rope was built without CUDA kernels"; }

Status rotate(const Launch&, const Stream&) { return kNoKernelImage; }

Status normalize(const Launch&, const Stream&) { return kNoKernelImage; }

Status normalize_gradient(const Launch&, const Stream&, MakeWeightSums) { return kNoKernelImage; }

Status sum(const Launch&, const Stream&, MakeSums) { return kNoKernelImage; }

Status scatter_rows(const TableSums&, const Stream&) { return kNoKernelImage; }

}  // namespace rope::cuda
