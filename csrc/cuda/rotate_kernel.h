// The CUDA kernels that rotate: their parameters, and what one thread of a block does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/angles.h"
#include "cuda/block.h"
#include "cuda/token_rotations.h"

namespace rope::cuda {

// NOTE [ How a block rotates ]
//
// Blocks are those of NOTE [ Blocks ]. A kernel (cuda/rotate.cu) constructs a RotateThread and runs
// its phases:
//
// 0. read_frequencies: reads frequencies of max_wavelength, which no kernel on the stream writes,
//    while the previous kernels are still running.
// 1. find_rotations: each thread issues the loads of its token's position and of its first rows.
//    While they are in flight, the block computes the cosine and the sine of each pair of each of
//    its tokens once, one thread per pair, and puts them into shared memory.
// 2. rotate_rows: after a barrier each thread loads the rotations of its column into registers and
//    rotates its rows, a few at a time.
//
// If a token has only a few rows, they do not pay for a barrier: RotateFewRowsThread computes the
// rotations of its own column, for two tokens, in registers.
//
// Members of a thread are what it keeps between phases. Tests on the host run each phase of all
// threads of a block before the next phase.

template <typename Index>
struct RotateParams {
  Blocks<Index> blocks;
  Operands<Index> operands;
  AngleParams angles;
};

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, int kRows>
class RowsInFlight;

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
C10_HOST_DEVICE inline Column<scalar_t, kPairs, kInterleaved, Index> find_column(
    const RotateParams<Index>& params, Index column);

// ---- With rotations in shared memory ----

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class RotateThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = RotateParams<Index>;
  using IndexType = Index;

  // Blocks of kMaxThreads resident on an SM, which has 65,536 registers. The usual kernels need at
  // most 64 registers a thread; compiled for 10.0 and later, a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kUsualBlocks = 3;
#else
  static constexpr int kUsualBlocks = 4;
#endif
  static constexpr int kBlocksPerSm =
      sizeof(Real) == 4 && sizeof(Index) == 4 && !kFullWidth ? kUsualBlocks : 2;

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return Shared::elements(blocks);
  }

  C10_HOST_DEVICE RotateThread(const Params& params, const ThreadIndex& thread)
      : params_(params),
        tile_(find_tile(params.blocks, thread)),
        token_rotations_(params,
                         find_pairs<kPairs>(params.blocks, tile_, params.operands.num_pairs)) {}

  // Phase 0.
  C10_HOST_DEVICE void read_frequencies() { token_rotations_.read_frequency(); }

  // Phase 1.
  C10_HOST_DEVICE void find_rotations(Real* shared) {
    Index offsets[kTokenArrays];
    params_.operands.tokens.offsets(tile_.token, offsets);
#pragma unroll
    for (int array = kIn; array < kTokenArrays; ++array) {
      token_[array] = offsets[array];
    }
    column_ = find_column<scalar_t, kPairs, kInterleaved>(params_, tile_.column);
    token_rotations_.load_position(offsets);
    load(tile_.first_row);
    token_rotations_.find(
        offsets, pair_step(params_.blocks), [&](int pair, const PairRotation& rotation) {
          Shared::store(shared, params_.blocks, tile_.token_lane, 0, pair, rotation);
        });
  }

  // Phase 2, after a barrier.
  C10_HOST_DEVICE void rotate_rows(const Real* shared) {
    const bool is_rotated = tile_.column < params_.blocks.rotated_columns;
    PairRotation rotations[kPairs];
    if (is_rotated && tile_.first_row < tile_.end_row) {
      Shared::load(shared, params_.blocks, tile_.token_lane, tile_.column_lane * kPairs, rotations);
    }
    const Index step = kRows * params_.blocks.row_lanes;
#pragma unroll 1
    for (Index row = tile_.first_row; row < tile_.end_row; row += step) {
      if (row != tile_.first_row) {
        load(row);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row_at(row, i) < tile_.end_row) {
          if (is_rotated) {
            rows_.rotate(i, rotations);
          }
          store_row(params_, rows_, i, row_at(row, i), column_);
        }
      }
    }
    // Not where it is detected: a failed assertion is a call, and would spill the rows in flight.
    CUDA_KERNEL_ASSERT(!token_rotations_.lacks_row() && "positions name rows of the tables");
  }

 private:
  using PairRotation = rope::PairRotation<Real, kFullWidth>;
  using Shared = SharedPairs<Real, kPairs, kFullWidth, /*kHasRowLanes=*/false>;

  static constexpr int kRows = rows_in_flight(kPairs > 1);

  C10_HOST_DEVICE Index row_at(Index row, int i) const {
    return row + i * params_.blocks.row_lanes;
  }

  C10_HOST_DEVICE void load(Index first) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index row = row_at(first, i);
      if (row < tile_.end_row) {
        rows_.load(i,
                   find_row<scalar_t, kPairs>(params_.operands, params_.blocks.q_rows, row, token_),
                   column_);
      }
    }
  }

  const Params& params_;
  ThreadTile<Index> tile_;
  TokenRotations<Real, kFullWidth ? RotationKind::kFullWidth : RotationKind::kHalfWidth, Index,
                 Params>
      token_rotations_;
  Index token_[kTokenArrays] = {};
  Column<scalar_t, kPairs, kInterleaved, Index> column_;
  RowsInFlight<scalar_t, kPairs, kInterleaved, Index, kRows> rows_;
};

// ---- With rotations in registers, for two tokens ----

inline constexpr int kFewRowsThreads = 128;
inline constexpr int kFewRowsBlocksPerSm = 4;  // with 128 registers
inline constexpr int kTokensOfFewRows = 2;     // of a thread

// A block covers all columns (x), the tokens y and y + blockDim.y, and all rows of each token.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
class RotateFewRowsThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = RotateParams<Index>;
  using IndexType = Index;

  C10_HOST_DEVICE RotateFewRowsThread(const Params& params, const ThreadIndex& thread)
      : params_(params),
        column_index_(thread.x),
        token_step_(params.blocks.block_tokens / kTokens),
        first_token_(static_cast<Index>(thread.block_x) * params.blocks.block_tokens + thread.y),
        is_rotated_(column_index_ < params.blocks.rotated_columns) {}

  // Phase 0.
  C10_HOST_DEVICE void read_frequencies() {
    if (params_.angles.source == AngleSource::kTurns && is_rotated_) {
      using Two = Vector<double, 2>;  // 16 bytes
      const auto* frequencies =
          static_cast<const std::uint64_t*>(params_.angles.position_angles.inv_freq);
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        const Two two = *reinterpret_cast<const Two*>(frequencies + (column_index_ * kPairs + i));
        frequencies_[i] = two.bits(0);
        frequencies_[i + 1] = two.bits(1);
      }
    }
  }

  // Phase 1; there is no other.
  C10_HOST_DEVICE void rotate_rows() {
    column_ = find_column<scalar_t, kPairs, kInterleaved>(params_, column_index_);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // Threads beyond the last token rotate it again, but do not store it.
      const Index last = params_.blocks.tokens - 1;
      params_.operands.tokens.offsets(token(t) < last ? token(t) : last, tokens_[t]);
    }
    std::uint64_t positions[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      positions[t] = load_integer_position(params_.angles, tokens_[t][kAngle]);
    }
    load(0);
    Rotation<Real> rotations[kTokens][kPairs];
    if (is_rotated_) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        std::uint64_t turns[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          turns[i] = form_turns(positions[t], frequencies_[i]);
        }
        find_rotations_from_positions<false>(params_.angles, tokens_[t][kAngle],
                                             static_cast<Index>(column_index_ * kPairs), turns,
                                             rotations[t]);
      }
    }
#pragma unroll 1
    for (Index row = 0; row < params_.blocks.rows; ++row) {
      if (row > 0) {
        load(row);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (is_rotated_) {
          rows_.rotate(t, rotations[t]);
        }
        if (token(t) < params_.blocks.tokens) {
          store_row(params_, rows_, t, row, column_);
        }
      }
    }
  }

 private:
  static constexpr int kTokens = kTokensOfFewRows;

  C10_HOST_DEVICE Index token(int t) const { return first_token_ + t * token_step_; }

  C10_HOST_DEVICE void load(Index row) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      rows_.load(
          t, find_row<scalar_t, kPairs>(params_.operands, params_.blocks.q_rows, row, tokens_[t]),
          column_);
    }
  }

  const Params& params_;
  Index column_index_;
  int token_step_;
  Index first_token_;
  bool is_rotated_;
  std::uint64_t frequencies_[kPairs] = {};  // in turns
  Column<scalar_t, kPairs, kInterleaved, Index> column_;
  Index tokens_[kTokens][kTokenArrays];
  RowsInFlight<scalar_t, kPairs, kInterleaved, Index, kTokens> rows_;
};

// ---- Rows, from memory to memory ----

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
C10_HOST_DEVICE inline Column<scalar_t, kPairs, kInterleaved, Index> find_column(
    const RotateParams<Index>& params, Index column) {
  using Columns = Column<scalar_t, kPairs, kInterleaved, Index>;
  const Index rotated = params.blocks.rotated_columns;
  return column < rotated ? Columns::of_pairs(params.operands, column)
                          : Columns::of_others(params.operands, column - rotated);
}

// A thread's column of kRows rows, in registers.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, int kRows>
class RowsInFlight {
 public:
  using Columns = Column<scalar_t, kPairs, kInterleaved, Index>;

  C10_HOST_DEVICE void load(int i, const Row<scalar_t, Index>& row, const Columns& column) {
    out_[i] = row.out;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (has_vector(row.size, column.begin[v])) {
        vectors_[i][v] = column.load(row.in, row.in_stride, v);
      }
    }
  }

  template <typename AnyRotation>
  C10_HOST_DEVICE void rotate(int i, const AnyRotation (&rotations)[kPairs]) {
    Columns::rotate_pairs(vectors_[i], rotations);
  }

  // size and out_stride are those of the row, which are not kept: that would take registers.
  C10_HOST_DEVICE void store(int i, Index size, Index out_stride, const Columns& column) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (has_vector(size, column.begin[v])) {
        column.store(out_[i], out_stride, v, vectors_[i][v]);
      }
    }
  }

 private:
  // q and k may have different numbers of elements outside the rotated slice.
  C10_HOST_DEVICE static bool has_vector(Index size, Index begin) { return begin < size; }

  scalar_t* out_[kRows];
  Vector<scalar_t, kPairs> vectors_[kRows][2];
};

template <typename Rows, typename Columns, typename Index>
C10_HOST_DEVICE inline void store_row(const RotateParams<Index>& params, const Rows& rows, int i,
                                      Index row, const Columns& column) {
  const auto& [q, k] = params.operands.x;
  const bool is_q = row < params.blocks.q_rows;
  rows.store(i, is_q ? q.axis_size : k.axis_size, is_q ? q.out_axis_stride : k.out_axis_stride,
             column);
}

}  // namespace rope::cuda
