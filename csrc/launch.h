// One launch: everything a kernel needs, as numbers and raw pointers.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

#include <cstdint>

namespace rope {

// The maximum number of loops, after coalescing.
inline constexpr int kMaxDims = 12;

// Nested loops, outermost first, over several arrays, each with its own strides (in elements).
template <int kArrays>
struct Loops {
  int num_dims;
  std::int64_t sizes[kMaxDims];
  std::int64_t strides[kArrays][kMaxDims];

  C10_HOST_DEVICE std::int64_t count() const {
    std::int64_t product = 1;
    for (int d = 0; d < num_dims; ++d) {
      product *= sizes[d];
    }
    return product;
  }

  // The offset of each array at iteration `index` of all loops, counted as one.
  template <typename Index>
  C10_HOST_DEVICE void offsets(Index index, Index (&result)[kArrays]) const {
    for (int array = 0; array < kArrays; ++array) {
      result[array] = 0;
    }
    for (int d = num_dims - 1; d >= 0; --d) {
      Index coordinate = index;  // of the outermost loop: the rest
      if (d > 0) {
        const auto size = static_cast<Index>(sizes[d]);
        coordinate = index % size;
        index /= size;
      }
      for (int array = 0; array < kArrays; ++array) {
        result[array] += coordinate * static_cast<Index>(strides[array][d]);
      }
    }
  }
};

// A tensor to rotate: q or k. Its elements are the product of the launch's tokens, its own heads
// (the dimensions that share a token's angles, whatever the caller calls them) and the embedding
// axis.
struct Operand {
  const void* in;
  void* out;
  std::int64_t axis_size;
  std::int64_t in_axis_stride;
  std::int64_t out_axis_stride;
  Loops<2> heads;  // in, out
};

// Positions times frequencies.
struct PositionAngles {
  const void* positions;
  c10::ScalarType positions_dtype;
  int num_axes;  // A: rows of inv_freq and leading size of positions
  std::int64_t positions_axis_stride;
  const void* inv_freq;  // null: the frequencies of max_wavelength
  c10::ScalarType inv_freq_dtype;
  std::int64_t inv_freq_axis_stride;
  std::int64_t inv_freq_stride;
  const double* wavelength_frequencies;  // host memory, num_pairs of them; null with inv_freq
  double max_wavelength;                 // their base
  double scale_factor;
  double attention_factor;
};

// Tables of cosines and sines, which tokens index directly, or through rows.
struct TableAngles {
  const void* cos;
  const void* sin;
  c10::ScalarType dtype;
  bool full_width;          // a column for each element of the slice, not for each pair
  std::int64_t cos_stride;  // from one column to the next
  std::int64_t sin_stride;
  const void* rows;  // null, or for each token the row of the (num_rows, N) tables
  c10::ScalarType rows_dtype;
  std::int64_t num_rows;
  std::int64_t cos_row_stride;
  std::int64_t sin_row_stride;
};

// The arrays that Launch::tokens steps through.
enum TokenArray : int {
  kAngle,  // positions, rows, or cos
  kSin,    // sin, where there are no rows
  kIn,     // in and out of operand i are kIn + 2 * i and kOut + 2 * i
  kOut,
  kTokenArrays = kIn + 4,
};

struct Launch {
  c10::ScalarType dtype;  // of all operands
  int num_operands;
  Operand operands[2];
  Loops<kTokenArrays> tokens;  // the dimensions over which angles differ
  std::int64_t num_pairs;
  std::int64_t rotary_offset;
  bool interleaved;
  bool conjugate;
  bool uses_tables;
  PositionAngles position_angles;
  TableAngles table_angles;
};

// Whether a token has a cosine and a sine for each element, not for each pair.
inline bool has_full_width(const Launch& launch) {
  return launch.uses_tables && launch.table_angles.full_width;
}

// The output of a sum over the heads of a launch: tables shaped like the launch's own, in the
// opmath type. See NOTE [ Sums ] in cuda/sum_kernel.h.
struct Sums {
  void* cos;  // null: not wanted
  void* sin;
  std::int64_t group_stride;        // between the tables of two groups of rows, in elements
  const double* factors = nullptr;  // device memory, one for each pair; null: none
};

}  // namespace rope
