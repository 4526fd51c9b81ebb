// Runs launches on a CUDA device: csrc/cuda/rotate.cu, sum.cu and scatter.cu, or
// csrc/cuda/absent.cpp in a build without CUDA.
#pragma once

#include <cstdint>

#include "launch.h"
#include "rope/rope.h"

namespace rope::cuda {

// Whether this build has the CUDA kernels.
ROPE_API bool has_kernels();

// Enqueues the launch on the current stream of the device.
void rotate(const Launch& launch, int device);

// Likewise sums over the rows of the launch, of which each of sum_groups has tables of its own.
void sum(const Launch& launch, const Sums& sums, int device);
std::int64_t sum_groups(const Launch& launch);

// Sums that are to become gradients of one table or of two of the same sizes, of cosines and sines.
// Every array is contiguous, and none is empty.
struct TableSums {
  struct Table {
    const void* sums;  // (groups, tokens, columns), as sum() leaves them
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
  const void* rows;  // null, or for each token its row of the tables: int32 or int64
  c10::ScalarType rows_dtype;
  std::int64_t num_rows;
};

// Adds up the groups of each token, and the tokens of each row, always in the same order.
void scatter_rows(const TableSums& sums, int device);

}  // namespace rope::cuda
