// The part of a launch that a block of the CUDA kernels covers, and the rows, columns and pairs of
// each of its threads. For the device, and for tests that run every thread on the host.
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
// A row (the elements of q or k along the embedding axis) is divided into columns. A column of the
// rotated slice has as many pairs as a 16-byte vector has elements, or one pair where vectors
// cannot be used. A column of the elements outside the rotated slice has twice as many elements.
// Either way a thread has two vectors of each of its rows.
//
// A block covers a few tokens, some or all columns, and some or all of the rows that have a token's
// angles in common: those of q, then those of k. Its three dimensions are columns, rows and tokens;
// x is the one along which memory is contiguous, so that a warp reads and writes whole cache lines.
// Threads along the rows are row lanes: lane i takes rows i, i + lanes, i + 2 lanes... of the
// block. blockIdx.x counts groups of tokens, and of columns where one block does not cover them
// all; blockIdx.y counts groups of rows.

inline constexpr int kMaxThreads = 256;

// Rows that a thread loads before it uses the first, to overlap their latencies.
constexpr int rows_in_flight(bool uses_vectors) { return uses_vectors ? 2 : 4; }

// What threadIdx.x counts.
enum class Lanes : int {
  kColumns,  // (column, row, token)
  kTokens,   // (token, column, row)
  kRows,     // (row, column, token)
};

// How a launch is divided into blocks.
template <typename Index>
struct Blocks {
  Index tokens;
  Index rows;    // of one token, of q and k
  Index q_rows;  // the first of these
  Index rows_per_block;
  Index columns;          // of a row
  Index rotated_columns;  // the first of these
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

// ---- The rows of a thread ----

// One column of one token, and every row_lanes-th row from first_row to end_row.
template <typename Index>
struct ThreadTile {
  int column_lane, row_lane, token_lane;
  Index first_column;  // of the block
  Index column;
  Index token;
  Index row_group;
  Index first_row;
  Index end_row;  // at most first_row where the thread has no rows
};

template <typename Index>
C10_HOST_DEVICE inline ThreadTile<Index> find_tile(const Blocks<Index>& blocks,
                                                   const ThreadIndex& thread) {
  ThreadTile<Index> tile;
  const bool along_columns = blocks.lanes == Lanes::kColumns;
  const bool along_tokens = blocks.lanes == Lanes::kTokens;
  tile.column_lane = along_columns ? thread.x : thread.y;
  tile.row_lane = along_columns ? thread.y : along_tokens ? thread.z : thread.x;
  tile.token_lane = along_tokens ? thread.x : thread.z;

  std::uint32_t token_group = thread.block_x;
  std::uint32_t column_group = 0;
  if (blocks.column_groups.divisor > 1) {
    const auto both = blocks.column_groups.divmod(thread.block_x);
    token_group = both.div;
    column_group = both.mod;
  }
  tile.first_column = static_cast<Index>(column_group) * blocks.block_columns;
  tile.column = tile.first_column + tile.column_lane;
  tile.token = static_cast<Index>(token_group) * blocks.block_tokens + tile.token_lane;
  tile.row_group = static_cast<Index>(thread.block_y);
  const Index begin = tile.row_group * blocks.rows_per_block;
  const Index end = begin + blocks.rows_per_block;
  tile.first_row = begin + tile.row_lane;
  tile.end_row = tile.token >= blocks.tokens || tile.column >= blocks.columns ? begin
                 : end < blocks.rows                                          ? end
                                                                              : blocks.rows;
  return tile;
}

// Most dimensions of a DeviceLoops: with 32-bit indices two, such as batch and sequence, or batch
// and heads; with 64-bit indices as many as a launch has.
template <typename Index>
inline constexpr int kLoopDims = sizeof(Index) == 4 ? 2 : kMaxDims;

// Loops as a kernel's parameter: numbers of type Index, and division by multiplication.
template <typename Index, int kArrays>
struct DeviceLoops {
  int num_dims;
  at::cuda::detail::IntDivider<std::make_unsigned_t<Index>> sizes[kLoopDims<Index>];
  Index strides[kArrays][kLoopDims<Index>];

  // The offset of each array at iteration `index` of all loops, counted as one.
  C10_HOST_DEVICE void offsets(Index index, Index (&result)[kArrays]) const {
#pragma unroll
    for (int array = 0; array < kArrays; ++array) {
      result[array] = 0;
    }
    // Not unrolled: this is inlined for every row of a thread.
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

// q or k, and the arrays that its heads step through: the first kHeads.
template <typename Index, int kHeads>
struct DeviceOperand {
  const void* in;
  void* out;
  Index axis_size;
  Index in_axis_stride;
  Index out_axis_stride;
  DeviceLoops<Index, kHeads> heads;
};

template <typename Index, int kHeads = kRotatedHeadArrays, int kTokens = kTokenArrays>
struct Operands {
  DeviceOperand<Index, kHeads> x[2];
  DeviceLoops<Index, kTokens> tokens;
  Index num_pairs;
  Index rotary_offset;
  bool interleaved;
};

// The address of a row: offsets of rows count vectors of kSize elements.
template <int kSize, typename scalar_t, typename Index>
C10_HOST_DEVICE inline scalar_t* address_of(scalar_t* base, Index offset) {
  return base + std::int64_t{kSize} * offset;
}

// A row of an operand. By value: a reference to an operand selected at run time would be read
// through global memory instead of the constant bank of the parameters.
template <typename scalar_t, typename Index>
struct Row {
  const scalar_t* in;
  scalar_t* out;
  Index size;
  Index in_stride;  // along the embedding axis
  Index out_stride;
};

template <typename scalar_t, int kSize, typename Index>
C10_HOST_DEVICE inline Row<scalar_t, Index> find_head(
    const DeviceOperand<Index, kRotatedHeadArrays>& x, Index head, Index token_in,
    Index token_out) {
  Index offsets[kRotatedHeadArrays];
  x.heads.offsets(head, offsets);
  return {address_of<kSize>(static_cast<const scalar_t*>(x.in), token_in + offsets[kHeadIn]),
          address_of<kSize>(static_cast<scalar_t*>(x.out), token_out + offsets[kHeadOut]),
          x.axis_size, x.in_axis_stride, x.out_axis_stride};
}

// Rows are the heads of q, then those of k. `token` holds the token's offset in each array.
template <typename scalar_t, int kSize, typename Index>
C10_HOST_DEVICE inline Row<scalar_t, Index> find_row(const Operands<Index>& operands, Index q_rows,
                                                     Index row,
                                                     const Index (&token)[kTokenArrays]) {
  return row < q_rows ? find_head<scalar_t, kSize>(operands.x[0], row, token[kIn], token[kOut])
                      : find_head<scalar_t, kSize>(operands.x[1], static_cast<Index>(row - q_rows),
                                                   token[kIn + 2], token[kOut + 2]);
}

// ---- The column of a thread ----

// Two vectors of a row, each of kPairs elements. With kPairs = 1 kInterleaved is ignored: one
// instantiation serves both orders.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
struct Column {
  using Real = at::opmath_type<scalar_t>;
  using V = Vector<scalar_t, kPairs>;

  Index begin[2];  // of each vector in the row

  // A column of the rotated slice: the first elements of its pairs and the second ones, or, if
  // pairs are interleaved, the first half of the pairs and the second half.
  template <typename AnyOperands>
  C10_HOST_DEVICE static Column of_pairs(const AnyOperands& operands, Index column) {
    const Index first = column * kPairs;
    const bool interleaved = kPairs == 1 ? operands.interleaved : kInterleaved;
    const Index begin = operands.rotary_offset + (interleaved ? 2 * first : first);
    return {{begin, begin + (interleaved ? Index{kPairs} : operands.num_pairs)}};
  }

  // A column of the elements outside the rotated slice.
  template <typename AnyOperands>
  C10_HOST_DEVICE static Column of_others(const AnyOperands& operands, Index column) {
    const auto skip_slice = [&](Index outside) {
      return outside < operands.rotary_offset ? outside : outside + 2 * operands.num_pairs;
    };
    const Index first = 2 * column * kPairs;
    return {{skip_slice(first), skip_slice(first + kPairs)}};
  }

  // The plan uses vectors of more than one element only where the stride is 1.
  C10_HOST_DEVICE static Index offset(Index element, Index stride) {
    return kPairs == 1 ? element * stride : element;
  }

  C10_HOST_DEVICE V load(const scalar_t* row, Index stride, int i) const {
    return load_streaming<V>(row + offset(begin[i], stride));
  }

  C10_HOST_DEVICE void store(scalar_t* row, Index stride, int i, const V& vector) const {
    store_streaming(row + offset(begin[i], stride), vector);
  }

  // Both elements of the n-th pair, counted over the two vectors.
  C10_HOST_DEVICE static constexpr int first_of_pair(int n) { return kInterleaved ? 2 * n : n; }
  C10_HOST_DEVICE static constexpr int second_of_pair(int n) {
    return kInterleaved ? 2 * n + 1 : kPairs + n;
  }

  C10_HOST_DEVICE static Pair<Real> get_pair(const V (&vectors)[2], int n) {
    const int a = first_of_pair(n);
    const int b = second_of_pair(n);
    return {vectors[a / kPairs].get(a % kPairs), vectors[b / kPairs].get(b % kPairs)};
  }

  // Rotates each pair of two vectors by its Rotation or FullRotation.
  template <typename AnyRotation>
  C10_HOST_DEVICE static void rotate_pairs(V (&vectors)[2],
                                           const AnyRotation (&rotations)[kPairs]) {
    Real rotated[2][kPairs];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const Pair<Real> pair = rotate<Real>(get_pair(vectors, n), rotations[n]);
      const int a = first_of_pair(n);
      const int b = second_of_pair(n);
      rotated[a / kPairs][a % kPairs] = pair.a;
      rotated[b / kPairs][b % kPairs] = pair.b;
    }
    vectors[0] = V::round(rotated[0]);
    vectors[1] = V::round(rotated[1]);
  }
};

// ---- The pairs of a block ----

// The threads of a token divide the block's pairs among themselves: each takes first,
// first + step... below count, counted from the block's first pair.
template <typename Index>
struct ThreadPairs {
  Index block_first;
  int first;
  int count;  // 0 beyond the last token
};

template <int kPairs, typename Index>
C10_HOST_DEVICE inline ThreadPairs<Index> find_pairs(const Blocks<Index>& blocks,
                                                     const ThreadTile<Index>& tile,
                                                     Index num_pairs) {
  const Index block_first = tile.first_column * kPairs;
  const Index left = num_pairs - block_first;
  const int most = blocks.block_columns * kPairs;
  const int count = tile.token >= blocks.tokens || left <= 0 ? 0
                    : left < most                            ? static_cast<int>(left)
                                                             : most;
  return {block_first, tile.row_lane * blocks.block_columns + tile.column_lane, count};
}

template <typename Index>
C10_HOST_DEVICE inline int pair_step(const Blocks<Index>& blocks) {
  return blocks.row_lanes * blocks.block_columns;
}

// The layout of shared memory: for each token of a block, and with kHasRowLanes for each of its row
// lanes, kNumbers arrays of the block's pairs, one for each cosine and sine of a pair.
template <typename Real, int kPairs, bool kFullWidth, bool kHasRowLanes>
struct SharedPairs {
  using PairRotation = rope::PairRotation<Real, kFullWidth>;

  static constexpr int kNumbers = kFullWidth ? 4 : 2;

  static std::int64_t elements(const Blocks<std::int64_t>& blocks) {
    return std::int64_t{kNumbers} * blocks.block_columns * kPairs * blocks.block_tokens *
           (kHasRowLanes ? blocks.row_lanes : 1);
  }

  // The index of number i of a pair. Neighboring threads access neighboring elements.
  template <typename Index>
  C10_HOST_DEVICE static int index(const Blocks<Index>& blocks, int token_lane, int row_lane,
                                   int pair, int i) {
    const int pairs = blocks.block_columns * kPairs;
    const int array = row_lane * kNumbers + i;
    if (kPairs == 1 && blocks.lanes == Lanes::kTokens) {
      return (array * pairs + pair) * blocks.block_tokens + token_lane;
    }
    const int lanes = kHasRowLanes ? blocks.row_lanes : 1;
    return (token_lane * lanes * kNumbers + array) * pairs + pair;
  }

  C10_HOST_DEVICE static PairRotation to_rotation(const Real (&numbers)[kNumbers]) {
    if constexpr (kFullWidth) {
      return {{numbers[0], numbers[1]}, {numbers[2], numbers[3]}};
    } else {
      return {numbers[0], numbers[1]};
    }
  }

  template <typename Index>
  C10_HOST_DEVICE static void store(Real* shared, const Blocks<Index>& blocks, int token_lane,
                                    int row_lane, int pair, const PairRotation& rotation) {
    const auto number = [&](int i) -> Real& {
      return shared[index(blocks, token_lane, row_lane, pair, i)];
    };
    if constexpr (kFullWidth) {
      number(0) = rotation.a.cos;
      number(1) = rotation.a.sin;
      number(2) = rotation.b.cos;
      number(3) = rotation.b.sin;
    } else {
      number(0) = rotation.cos;
      number(1) = rotation.sin;
    }
  }

  // The rotations of kCount neighboring pairs, 16 bytes at a time.
  template <typename Index, int kCount>
  C10_HOST_DEVICE static void load(const Real* shared, const Blocks<Index>& blocks, int token_lane,
                                   int first_pair, PairRotation (&rotations)[kCount]) {
    Real numbers[kNumbers][kCount];
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      load_aligned(shared + index(blocks, token_lane, 0, first_pair, i), numbers[i]);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      Real of_pair[kNumbers];
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        of_pair[i] = numbers[i][n];
      }
      rotations[n] = to_rotation(of_pair);
    }
  }
};

}  // namespace rope::cuda
