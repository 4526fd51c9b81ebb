// The CUDA kernels that sum for the gradients of cosines, sines and angles: their parameters, and
// what one thread of a block does.
#pragma once

#include <cstdint>

#include "angle.h"
#include "cuda/block.h"
#include "launch.h"
#include "rotation.h"

namespace rope::cuda {

// NOTE [ Sums ]
//
// The launch is that of apply_cos_sin with inputs and outputs exchanged. `in` of an operand is the
// gradient of the output and `out` is x (for angles, the output itself): both are only read. The
// tables, with a row for each token, are what is written.
//
// Blocks are those of NOTE [ Blocks ], without columns outside the rotated slice. A kernel
// (cuda/sum.cu) constructs a SumThread and runs its phases:
//
// 1. sum_rows: each thread sums over its rows in registers and puts its sums into shared memory.
// 2. store_sums: after a barrier, the block adds the sums of its row lanes, one thread per pair,
//    and stores them.
//
// If the rows of a token are divided into groups, each group has tables of its own, which are added
// up afterwards. The order of every sum is fixed: the same call gives the same bits every time.

template <typename Index>
struct SumParams {
  Blocks<Index> blocks;
  Operands<Index> operands;
  bool conjugate;
  Sums sums;
};

template <typename Index>
void set_options(const Launch& launch, SumParams<Index>& params) {
  params.conjugate = launch.conjugate;
}

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class SumThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = SumParams<Index>;
  using IndexType = Index;

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return Shared::elements(blocks);
  }

  C10_HOST_DEVICE SumThread(const Params& params, const ThreadIndex& thread)
      : params_(params), tile_(find_tile(params.blocks, thread)) {
    params.operands.tokens.offsets(tile_.token, token_);
  }

  // Phase 1.
  C10_HOST_DEVICE void sum_rows(Real* shared) {
    const auto column = Columns::of_pairs(params_.operands, tile_.column);
    PairRotation total[kPairs] = {};
    const int lanes = params_.blocks.row_lanes;
#pragma unroll 1
    for (Index first = tile_.first_row; first < tile_.end_row; first += kRows * lanes) {
      V gradients[kRows][2];
      V values[kRows][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * lanes < tile_.end_row) {
          const auto row =
              find_row<scalar_t, kPairs>(params_.operands, params_.blocks.q_rows,
                                         static_cast<Index>(first + i * lanes), token_);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            gradients[i][v] = column.load(row.in, row.in_stride, v);
            values[i][v] = column.load(row.out, row.out_stride, v);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * lanes < tile_.end_row) {
#pragma unroll
          for (int n = 0; n < kPairs; ++n) {
            total[n] = add_gradient<Real>(Columns::get_pair(gradients[i], n),
                                          Columns::get_pair(values[i], n), total[n]);
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      Shared::store(shared, params_.blocks, tile_.token_lane, tile_.row_lane,
                    tile_.column_lane * kPairs + n, total[n]);
    }
  }

  // Phase 2, after a barrier.
  C10_HOST_DEVICE void store_sums(const Real* shared) const {
    const Blocks<Index>& blocks = params_.blocks;
    const auto pairs = find_pairs<kPairs>(blocks, tile_, params_.operands.num_pairs);
    const int step = pair_step(blocks);
#pragma unroll 1
    for (int pair = pairs.first; pair < pairs.count; pair += step) {
      Real numbers[kNumbers] = {};
#pragma unroll 1
      for (int lane = 0; lane < blocks.row_lanes; ++lane) {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) {
          numbers[i] += shared[Shared::index(blocks, tile_.token_lane, lane, pair, i)];
        }
      }
      store(pairs.block_first + pair, Shared::to_rotation(numbers));
    }
  }

 private:
  using Columns = Column<scalar_t, kPairs, kInterleaved, Index>;
  using V = Vector<scalar_t, kPairs>;
  using PairRotation = rope::PairRotation<Real, kFullWidth>;
  using Shared = SharedPairs<Real, kPairs, kFullWidth, /*kHasRowLanes=*/true>;

  static constexpr int kNumbers = Shared::kNumbers;
  static constexpr int kRows = rows_in_flight(kPairs > 1);

  C10_HOST_DEVICE void store(Index n, const PairRotation& sum) const {
    const std::int64_t group = tile_.row_group * params_.sums.group_stride;
    Real* cos = static_cast<Real*>(params_.sums.cos) + group + token_[kAngle];
    Real* sin = static_cast<Real*>(params_.sums.sin) + group + token_[kSin];
    if constexpr (kFullWidth) {
      const auto [a, b] =
          full_width_columns(n, params_.operands.num_pairs, params_.operands.interleaved);
      const PairRotation gradient = params_.conjugate ? transpose(sum) : sum;
      cos[a] = gradient.a.cos;
      cos[b] = gradient.b.cos;
      sin[a] = gradient.a.sin;
      sin[b] = gradient.b.sin;
    } else {
      if (params_.sums.cos != nullptr) {
        cos[n] = sum.cos;
      }
      const Real gradient = params_.conjugate ? -sum.sin : sum.sin;
      const double* factors = params_.sums.factors;
      sin[n] = factors == nullptr ? gradient : static_cast<Real>(gradient * factors[n]);
    }
  }

  const Params& params_;
  ThreadTile<Index> tile_;
  Index token_[kTokenArrays];
};

}  // namespace rope::cuda
