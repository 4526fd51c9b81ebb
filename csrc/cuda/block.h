// Where a block of the CUDA kernels is in a launch, and where its threads find their rows. For the
// device, and for tests that run every thread of every block on the host.
#pragma once

#include <ATen/cuda/detail/IntegerDivider.cuh>
#include <cstdint>
#include <type_traits>

#include "cuda/vector.h"
#include "launch.h"
#include "rotation.h"

namespace rope::cuda {

// NOTE [ Blocks ]
//
// A row (the elements of q or k along the embedding axis) is cut into columns. A column of the
// rotated slice has as many pairs as a 16-byte vector has elements, or one pair where vectors
// cannot be used; a column of the elements around the slice has twice as many elements. So a thread
// has two vectors of each of its rows in either case.
//
// A block has a few tokens, some or all columns, and some or all of the rows that share a token's
// angles: those of q, then those of k. Its three dimensions are columns, rows and tokens; the one
// along which memory is contiguous is x, so that a warp reads and writes whole cache lines. Threads
// along the rows are row lanes: lane i has the rows i, i + lanes, i + 2 lanes... of its block's.
// blockIdx.x counts groups of tokens, and of columns where one block does not have them all;
// blockIdx.y counts groups of rows.

inline constexpr int kMaxThreads = 256;

// Rows that a thread loads before it uses the first, so that their latencies overlap.
constexpr int rows_in_flight(bool uses_vectors) { return uses_vectors ? 2 : 4; }

// What threadIdx.x counts.
enum class Lanes : int {
  kColumns,  // (column, row, token)
  kTokens,   // (token, column, row)
  kRows,     // (row, column, token)
};

// How a launch is cut into blocks.
template <typename Index>
struct Blocks {
  Index tokens;
  Index rows;    // of one token, of q and k
  Index q_rows;  // the first ones
  Index rows_per_block;
  Index columns;          // of a row
  Index rotated_columns;  // the first ones
  int block_columns;
  int row_lanes;
  int block_tokens;
  Lanes lanes;
  at::cuda::detail::IntDivider<std::uint32_t> column_groups;
};

// threadIdx and blockIdx.
struct ThreadIndex {
  int x, y, z;
  std::uint32_t block_x, block_y;
};

// The part of a launch that a thread has.
template <typename Index>
struct Part {
  int column_lane, row_lane, token_lane;
  Index first_column;  // of the block
  Index column;
  Index token;
  Index row_group;
  Index first_row;  // of the thread
  Index last_row;   // one past; first_row where the thread has none
};

template <typename Index>
C10_HOST_DEVICE inline Part<Index> find_part(const Blocks<Index>& blocks,
                                             const ThreadIndex& thread) {
  Part<Index> part;
  const bool along_columns = blocks.lanes == Lanes::kColumns;
  const bool along_tokens = blocks.lanes == Lanes::kTokens;
  part.column_lane = along_columns ? thread.x : thread.y;
  part.row_lane = along_columns ? thread.y : along_tokens ? thread.z : thread.x;
  part.token_lane = along_tokens ? thread.x : thread.z;

  std::uint32_t token_group = thread.block_x;
  std::uint32_t column_group = 0;
  if (blocks.column_groups.divisor > 1) {
    const auto both = blocks.column_groups.divmod(thread.block_x);
    token_group = both.div;
    column_group = both.mod;
  }
  part.first_column = static_cast<Index>(column_group) * blocks.block_columns;
  part.column = part.first_column + part.column_lane;
  part.token = static_cast<Index>(token_group) * blocks.block_tokens + part.token_lane;
  part.row_group = static_cast<Index>(thread.block_y);
  const Index begin = part.row_group * blocks.rows_per_block;
  const Index end = begin + blocks.rows_per_block;
  part.first_row = begin + part.row_lane;
  part.last_row = part.token >= blocks.tokens || part.column >= blocks.columns ? begin
                  : end < blocks.rows                                          ? end
                                                                               : blocks.rows;
  return part;
}

// Dimensions that the parameters of a launch hold of each loops: two with 32-bit indices, say batch
// and sequence, or batch and heads; any number with 64-bit ones.
template <typename Index>
inline constexpr int kLoopDims = sizeof(Index) == 4 ? 2 : kMaxDims;

// A Loops whose numbers are of type Index.
template <typename Index, int kArrays>
struct LoopsOf {
  int num_dims;
  at::cuda::detail::IntDivider<std::make_unsigned_t<Index>> sizes[kLoopDims<Index>];
  Index strides[kArrays][kLoopDims<Index>];

  // Where each array is at the index-th element of the loops.
  C10_HOST_DEVICE void offsets(Index index, Index (&result)[kArrays]) const {
#pragma unroll
    for (int array = 0; array < kArrays; ++array) {
      result[array] = 0;
    }
    // Short code where there may be many dimensions, since it stands in a kernel for each row.
#pragma unroll 1
    for (int d = kLoopDims<Index> == 2 ? 1 : num_dims - 1; d > 0; --d) {
      if (d < num_dims) {
        const auto both = sizes[d].divmod(index);
        index = both.div;
        const auto coordinate = static_cast<Index>(both.mod);
#pragma unroll
        for (int array = 0; array < kArrays; ++array) {
          result[array] += coordinate * strides[array][d];
        }
      }
    }
#pragma unroll
    for (int array = 0; array < kArrays; ++array) {
      result[array] += index * strides[array][0];  // 0 without dimensions.
    }
  }
};

// q or k.
template <typename Index>
struct OperandOf {
  const void* in;
  void* out;
  Index axis_size;
  Index in_axis_stride;
  Index out_axis_stride;
  LoopsOf<Index, 2> rows;  // in, out
};

// The operands of a launch and where their tokens are.
template <typename Index>
struct Operands {
  OperandOf<Index> x[2];
  LoopsOf<Index, kTokenArrays> tokens;
  Index num_pairs;
  Index rotary_offset;
  bool interleaved;
};

// A row of an operand. By value, since a reference to a kernel's parameter that is not known until
// the kernel runs would be read through global memory.
template <typename scalar_t, typename Index>
struct Row {
  const scalar_t* in;
  scalar_t* out;
  Index size;
  Index in_stride;  // along the embedding axis
  Index out_stride;
};

template <typename scalar_t, typename Index>
C10_HOST_DEVICE inline Row<scalar_t, Index> find_row(const OperandOf<Index>& x, Index row,
                                                     Index token_in, Index token_out) {
  Index offsets[2];
  x.rows.offsets(row, offsets);
  return {static_cast<const scalar_t*>(x.in) + (token_in + offsets[0]),
          static_cast<scalar_t*>(x.out) + (token_out + offsets[1]), x.axis_size, x.in_axis_stride,
          x.out_axis_stride};
}

// A row counted over q and k. (No index into an array of registers.)
template <typename scalar_t, typename Index>
C10_HOST_DEVICE inline Row<scalar_t, Index> find_row(const Operands<Index>& operands, Index q_rows,
                                                     Index row,
                                                     const Index (&token)[kTokenArrays]) {
  return row < q_rows ? find_row<scalar_t>(operands.x[0], row, token[kIn], token[kOut])
                      : find_row<scalar_t>(operands.x[1], static_cast<Index>(row - q_rows),
                                           token[kIn + 2], token[kOut + 2]);
}

// What a thread has of each of its rows: two vectors, each of kPairs elements. For single pairs
// kInterleaved is without meaning: one code serves both orders.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
struct Column {
  using Real = at::opmath_type<scalar_t>;
  using V = Vector<scalar_t, kPairs>;

  Index begin[2];  // of each vector in the row

  // A column of the rotated slice: the first elements of its pairs and the second ones, or, where
  // pairs are interleaved, the first half of them and the second.
  C10_HOST_DEVICE static Column of_pairs(const Operands<Index>& operands, Index column) {
    const Index first = column * kPairs;
    const bool interleaved = kPairs == 1 ? operands.interleaved : kInterleaved;
    const Index begin = operands.rotary_offset + (interleaved ? 2 * first : first);
    return {{begin, begin + (interleaved ? Index{kPairs} : operands.num_pairs)}};
  }

  // The column-th column of the elements around the slice.
  C10_HOST_DEVICE static Column of_others(const Operands<Index>& operands, Index column) {
    const auto skip_slice = [&](Index outside) {
      return outside < operands.rotary_offset ? outside : outside + 2 * operands.num_pairs;
    };
    const Index first = 2 * column * kPairs;
    return {{skip_slice(first), skip_slice(first + kPairs)}};
  }

  // Vectors of more than one element lie at steps of 1: the plan sees to it.
  C10_HOST_DEVICE static Index offset(Index element, Index stride) {
    return kPairs == 1 ? element * stride : element;
  }

  C10_HOST_DEVICE V load(const scalar_t* row, Index stride, int i) const {
    return load_streaming<V>(row + offset(begin[i], stride));
  }

  C10_HOST_DEVICE void store(scalar_t* row, Index stride, int i, const V& vector) const {
    store_streaming(row + offset(begin[i], stride), vector);
  }

  // Where the elements of the n-th pair are. Interleaved, they are elements 2n and 2n + 1 of the
  // two vectors together; else element n of each.
  C10_HOST_DEVICE static constexpr int first_of_pair(int n) { return kInterleaved ? 2 * n : n; }
  C10_HOST_DEVICE static constexpr int second_of_pair(int n) {
    return kInterleaved ? 2 * n + 1 : kPairs + n;
  }

  C10_HOST_DEVICE static Pair<Real> get_pair(const V (&vectors)[2], int n) {
    const int a = first_of_pair(n);
    const int b = second_of_pair(n);
    return {vectors[a / kPairs].get(a % kPairs), vectors[b / kPairs].get(b % kPairs)};
  }

  // Rotates the pairs of two vectors by an angle each: a Rotation, or a FullRotation.
  template <typename Angle>
  C10_HOST_DEVICE static void rotate_pairs(V (&vectors)[2], const Angle (&angles)[kPairs]) {
    Real rotated[2][kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const Pair<Real> pair = rotate<Real>(get_pair(vectors, n), angles[n]);
      const int a = first_of_pair(n);
      const int b = second_of_pair(n);
      rotated[a / kPairs][a % kPairs] = pair.a;
      rotated[b / kPairs][b % kPairs] = pair.b;
    }
    vectors[0] = V::round(rotated[0]);
    vectors[1] = V::round(rotated[1]);
  }
};

}  // namespace rope::cuda
