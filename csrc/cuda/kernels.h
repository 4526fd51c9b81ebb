// The functions of the CUDA kernels, which librope_kernels.so exports: cuda/rotate.cu, norm.cu,
// norm_gradient.cu, sum.cu and scatter.cu, or cuda/absent.cpp in a build without CUDA. They call
// nothing of torch; cuda/run.h has them with a torch device.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

#include "kernels_api.h"
#include "launch.h"

namespace rope::cuda {

// Whether the kernels were compiled.
ROPE_KERNELS_API bool are_compiled();

// Where a launch is enqueued.
struct Stream {
  int device;    // the current device
  void* handle;  // a cudaStream_t of it
  // Returns device memory that stays allocated until the function that got the stream returns, and
  // is not reused before what that enqueues has run.
  c10::function_ref<void*(std::int64_t bytes)> allocate;
};

// The first error of a function: a cudaError_t, 0 for none.
using Status = int;
ROPE_KERNELS_API const char* describe(Status status);

// Enqueues the launch.
ROPE_KERNELS_API Status rotate(const Launch& launch, const Stream& stream);

// Pairs of a token up to which normalize() and normalize_gradient() have room for its rotations.
inline constexpr std::int64_t kMostNormPairs = 1024;

// Likewise for a launch that normalizes.
ROPE_KERNELS_API Status normalize(const Launch& launch, const Stream& stream);

// Likewise for the gradients of such a launch. Those of weights go into what make_weight_sums
// allocates.
ROPE_KERNELS_API Status normalize_gradient(const Launch& launch, const Stream& stream,
                                           MakeWeightSums make_weight_sums);

// Allocates the tables of sums, one for each of so many groups of rows.
using MakeSums = c10::function_ref<Sums(std::int64_t num_groups)>;

// Likewise enqueues sums over the rows of the launch, into what make_sums allocates.
ROPE_KERNELS_API Status sum(const Launch& launch, const Stream& stream, MakeSums make_sums);

// Sums to be turned into gradients of one table, or of two tables of the same sizes (cosines and
// sines). Every array is contiguous, and none is empty.
struct TableSums {
  struct Table {
    const void* sums;  // (groups, tokens, columns), from sum()
    void* partial;     // like gradient, in sums_dtype; gradient itself where it has that dtype
    void* gradient;    // (num_rows, columns); without rows (tokens, columns)
  };
  Table tables[2];
  int num_tables;
  c10::ScalarType sums_dtype;  // float64 or float32
  c10::ScalarType dtype;       // of the gradients
  std::int64_t num_groups;
  std::int64_t group_stride;  // in elements
  std::int64_t num_tokens;
  std::int64_t num_columns;
  const void* rows;  // null, or the row index of each token: int32 or int64
  c10::ScalarType rows_dtype;
  std::int64_t num_rows;
};

// Enqueues the sum over the groups of each token and the tokens of each row, in a fixed order.
ROPE_KERNELS_API Status scatter_rows(const TableSums& sums, const Stream& stream);

}  // namespace rope::cuda
