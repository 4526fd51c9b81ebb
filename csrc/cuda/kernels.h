// Runs launches on a CUDA device: cuda/rotate.cu, norm.cu, sum.cu and scatter.cu, or
// cuda/absent.cpp in a build without CUDA.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

#include "launch.h"
#include "rope/rope.h"

namespace rope::cuda {

// Whether this build has the CUDA kernels.
ROPE_API bool has_kernels();

// Enqueues the launch on the current stream of the device.
void rotate(const Launch& launch, int device);

// Pairs of a token up to which normalize() and normalize_gradient() have room for its rotations.
inline constexpr std::int64_t kMostNormPairs = 1024;

// Likewise for a launch that normalizes.
void normalize(const Launch& launch, int device);

// Likewise for the gradients of such a launch. Those of weights go into what make_weight_sums
// allocates.
void normalize_gradient(const Launch& launch, int device, MakeWeightSums make_weight_sums);

// Allocates the tables of sums, one for each of so many groups of rows.
using MakeSums = c10::function_ref<Sums(std::int64_t num_groups)>;

// Likewise enqueues sums over the rows of the launch, into what make_sums allocates.
void sum(const Launch& launch, int device, MakeSums make_sums);

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
void scatter_rows(const TableSums& sums, int device);

}  // namespace rope::cuda
