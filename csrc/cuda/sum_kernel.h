// The CUDA kernels that sum for the gradients of cosines, sines and angles: what a launch is given,
// and what one thread of a block does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block.h"
#include "launch.h"
#include "rotation.h"

namespace rope::cuda {

// NOTE [ Sums ]
//
// The launch is that of apply_cos_sin, with the roles turned round. `in` of an operand is the
// gradient and `out` is x (or, for angles, what came out): both are read, neither is written. The
// tables, which have a row for each token, are what comes out.
//
// Blocks are those of NOTE [ Blocks ], without columns around the slice.
//
// 1. Each thread sums over its rows, in registers, and puts its sums into shared memory.
// 2. After a barrier, the block adds the sums of its row lanes, one thread for a pair, and stores
//    them.
//
// Where the rows of a token are cut into groups, each group has tables of its own, which are added
// up afterwards. The order of every sum is fixed, so that the same call has the same bits every
// time.

template <typename Index>
struct SumParams {
  Blocks<Index> blocks;
  Operands<Index> operands;
  bool conjugate;
  Sums sums;
};

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class SumThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = SumParams<Index>;
  using IndexType = Index;

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return std::int64_t{kNumbers} * blocks.block_columns * kPairs * blocks.block_tokens *
           blocks.row_lanes;
  }

  C10_HOST_DEVICE SumThread(const Params& params, const ThreadIndex& thread)
      : params_(params), part_(find_part(params.blocks, thread)) {
    params.operands.tokens.offsets(part_.token, token_);
  }

  // Phase 1. Shared memory holds kNumbers for each pair of the block, each of its tokens and each
  // row lane.
  C10_HOST_DEVICE void sum_rows(Real* shared) {
    const auto column = Columns::of_pairs(params_.operands, part_.column);
    Angle total[kPairs] = {};
    const int lanes = params_.blocks.row_lanes;
#pragma unroll 1
    for (Index first = part_.first_row; first < part_.last_row; first += kRows * lanes) {
      V gradients[kRows][2];
      V values[kRows][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (first + i * lanes < part_.last_row) {
          const auto row = find_row<scalar_t>(params_.operands, params_.blocks.q_rows,
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
        if (first + i * lanes < part_.last_row) {
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
      put(shared, part_.column_lane * kPairs + n, total[n]);
    }
  }

  // Phase 2, after a barrier.
  C10_HOST_DEVICE void store_sums(const Real* shared) const {
    const Blocks<Index>& blocks = params_.blocks;
    const Index first_pair = part_.first_column * kPairs;
    const Index pairs = params_.operands.num_pairs - first_pair;
    const int slots = pairs < num_slots() ? static_cast<int>(pairs) : num_slots();
    if (part_.token >= blocks.tokens) {
      return;
    }
#pragma unroll 1
    for (int slot = part_.row_lane * blocks.block_columns + part_.column_lane; slot < slots;
         slot += blocks.row_lanes * blocks.block_columns) {
      Real numbers[kNumbers] = {};
#pragma unroll 1
      for (int lane = 0; lane < blocks.row_lanes; ++lane) {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) {
          numbers[i] += shared[place(lane, slot, i)];
        }
      }
      store(first_pair + slot, numbers);
    }
  }

 private:
  static constexpr int kNumbers = kFullWidth ? 4 : 2;

  using Columns = Column<scalar_t, kPairs, kInterleaved, Index>;
  using V = Vector<scalar_t, kPairs>;
  using Angle = std::conditional_t<kFullWidth, FullRotation<Real>, Rotation<Real>>;

  static constexpr int kRows = rows_in_flight(kPairs > 1);

  C10_HOST_DEVICE int num_slots() const { return params_.blocks.block_columns * kPairs; }

  // Where number i of a pair is: neighbouring lanes read and write neighbouring elements.
  C10_HOST_DEVICE int place(int lane, int slot, int i) const {
    const Blocks<Index>& blocks = params_.blocks;
    const int row = (lane * kNumbers + i) * num_slots() + slot;
    if (kPairs == 1 && blocks.lanes == Lanes::kTokens) {
      return row * blocks.block_tokens + part_.token_lane;
    }
    return part_.token_lane * blocks.row_lanes * kNumbers * num_slots() + row;
  }

  C10_HOST_DEVICE void put(Real* shared, int slot, const Angle& sum) const {
    const int lane = part_.row_lane;
    if constexpr (kFullWidth) {
      shared[place(lane, slot, 0)] = sum.a.cos;
      shared[place(lane, slot, 1)] = sum.a.sin;
      shared[place(lane, slot, 2)] = sum.b.cos;
      shared[place(lane, slot, 3)] = sum.b.sin;
    } else {
      shared[place(lane, slot, 0)] = sum.cos;
      shared[place(lane, slot, 1)] = sum.sin;
    }
  }

  C10_HOST_DEVICE void store(Index pair, const Real (&numbers)[kNumbers]) const {
    const std::int64_t group = part_.row_group * params_.sums.group_stride;
    Real* cos = static_cast<Real*>(params_.sums.cos) + group + token_[kAngle];
    Real* sin = static_cast<Real*>(params_.sums.sin) + group + token_[kSin];
    if constexpr (kFullWidth) {
      const bool interleaved = params_.operands.interleaved;
      const Index a = interleaved ? 2 * pair : pair;
      const Index b = interleaved ? 2 * pair + 1 : pair + params_.operands.num_pairs;
      const Angle sum{{numbers[0], numbers[1]}, {numbers[2], numbers[3]}};
      const Angle turned = params_.conjugate ? transpose(sum) : sum;
      cos[a] = turned.a.cos;
      cos[b] = turned.b.cos;
      sin[a] = turned.a.sin;
      sin[b] = turned.b.sin;
    } else {
      if (params_.sums.cos != nullptr) {
        cos[pair] = numbers[0];
      }
      const Real sum = params_.conjugate ? -numbers[1] : numbers[1];
      const double* factors = params_.sums.factors;
      sin[pair] = factors == nullptr ? sum : static_cast<Real>(sum * factors[pair]);
    }
  }

  const Params& params_;
  Part<Index> part_;
  Index token_[kTokenArrays];
};

}  // namespace rope::cuda
