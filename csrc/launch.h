// One launch: everything a kernel needs, as numbers and raw pointers.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>
#include <c10/util/FunctionRef.h>

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

  // The offset of each of the first arrays at iteration `index` of all loops, counted as one.
  template <typename Index, int kFirst>
  C10_HOST_DEVICE void offsets(Index index, Index (&result)[kFirst]) const {
    static_assert(kFirst <= kArrays);
    for (int array = 0; array < kFirst; ++array) {
      result[array] = 0;
    }
    for (int d = num_dims - 1; d >= 0; --d) {
      Index coordinate = index;  // of the outermost loop: the rest
      if (d > 0) {
        const auto size = static_cast<Index>(sizes[d]);
        coordinate = index % size;
        index /= size;
      }
      for (int array = 0; array < kFirst; ++array) {
        result[array] += coordinate * static_cast<Index>(strides[array][d]);
      }
    }
  }
};

// The arrays that Operand::heads steps through.
enum HeadArray : int {
  kHeadIn,
  kHeadOut,
  kRotatedHeadArrays,              // launches that only rotate have these two
  kHeadGain = kRotatedHeadArrays,  // a contiguous tensor of the shape of the weight
  kHeadGrad,
  kHeadWeight,
  kHeadArrays,
};

// What a launch that normalizes needs of an operand besides. See NOTE [ Norms ].
struct NormOperand {
  const void* weight;  // null: none
  c10::ScalarType weight_dtype;
  std::int64_t weight_axis_stride;
  std::int64_t weight_numel;
  std::int64_t num_members;  // so many consecutive iterations of the heads share a mean
  // For gradients. `in` is x then, and `out` its gradient, or null where that is not wanted.
  const void* grad;  // of what the forward call returned; null in forward calls
  std::int64_t grad_axis_stride;
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
  Loops<kHeadArrays> heads;
  NormOperand norm;
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
  // Of launches that normalize, each + i for operand i, as in HeadArray.
  kGrad = kTokenArrays,
  kGain = kGrad + 2,
  kWeight = kGain + 2,
  kAllTokenArrays = kWeight + 2,
};

// NOTE [ Norms ]
//
// Elements that share a mean are the rows (heads along the embedding axis) of some number of heads
// of one token, num_members of an operand: 1 for the norm of each head. The heads are sorted so
// that members of a mean follow each other, in the order of the dimensions of x whatever their
// strides, since the order of a sum shows in its bits. Norms over tokens are no launch, nor are
// weights that vary over tokens where a kernel does not support them: unfused_norm.h carries them
// out as a norm and a rotation.
//
// All backends compute, in the opmath type:
//
//   scale = 1 / sqrt(sum(x^2) / count + eps)      norm_last: of the rotated x
//   y = rotate((x * scale) * gain)                norm_last: y = (rotate(x) * scale) * gain
//
// where gain = weight + weight_offset. The CPU multiplies the cosines and sines by the gains, once
// for all heads with the same weight, and then rotates x * scale. The sum over a row is one of the
// opmath type, that over the rows of several heads is float64.
//
// The gradients, with g the gradient of y and R^T the transposed rotation:
//
//   t = R^T g                                     norm_last: t = g, and z = rotate(x) for x below
//   dx = scale * (t * gain - x * scale^2 * sum(t * gain * x) / count)     norm_last: R^T of that
//   dweight = sum over rows of t * (x * scale)

struct Launch {
  c10::ScalarType dtype;  // of all operands
  int num_operands;
  Operand operands[2];
  Loops<kAllTokenArrays> tokens;  // the dimensions over which angles differ
  std::int64_t num_pairs;
  std::int64_t rotary_offset;
  bool interleaved;
  bool conjugate;
  bool uses_tables;
  bool normalizes;
  bool norm_last;
  double eps;
  double weight_offset;
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

// Partial sums for the gradients of the operands' weights: (parts, weight_numel) of the opmath
// type, contiguous, each part of the shape of the weight. The sum over the parts is the gradient.
struct WeightSums {
  void* of_operand[2];  // null: not wanted
};

// Allocates them, for so many parts. How a launch is cut into parts depends on its sizes alone.
using MakeWeightSums = c10::function_ref<WeightSums(std::int64_t num_parts)>;

}  // namespace rope
