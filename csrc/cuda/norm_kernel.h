// The CUDA kernels that normalize and rotate: their parameters, and what one thread of a block
// does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block.h"
#include "cuda/norm_columns.h"
#include "cuda/rotate_kernel.h"
#include "cuda/token_rotations.h"
#include "cuda/wide_norm.h"

namespace rope::cuda {

// NOTE [ How a block normalizes ]
//
// NormThread is for rows with a mean of their own and at most 32 columns, in vectors, with 32-bit
// indices and one weight for all rows: the usual calls. Its blocks are those of NOTE [ Blocks ],
// but for columns: a row has as many lanes as NOTE [ Sums over a row ] tells. Its phases:
//
// 0. read_frequencies: as in NOTE [ How a block rotates ].
// 1. prepare: issues the loads of the position and of the thread's first rows, and puts into shared
//    memory the rotations of the block's tokens and the gains (weight + weight_offset) of q and k.
// 2. After a barrier, for every few rows: sum_rows loads them and sums their squares; shuffles add
//    the sums of a row's lanes; store_rows normalizes, rotates and stores.
//
// Rows stay in registers as they were loaded. WideNormThread (cuda/wide_norm.h) is for all other
// calls.

template <typename Index>
struct NormRotateParams : RotateParams<Index> {
  NormParams norm;
};

// Gains of a block in shared memory, for each operand: kPairs elements of each lane for vector 0,
// then for vector 1.
template <typename scalar_t, bool kInterleaved, typename Index>
struct SharedGains {
  using Column = NormColumn<scalar_t, true, kInterleaved, Index>;
  using Real = typename Column::Real;
  static constexpr int kPairs = Column::kPairs;

  static constexpr int elements(int column_lanes) { return 2 * kPairs * column_lanes; }

  C10_HOST_DEVICE static int index(int v, int e, int column_lane, int column_lanes) {
    return (v * column_lanes + column_lane) * kPairs + e;
  }

  // Divides the elements of a column among `lanes` threads: calls visit(v, e) for those of `lane`.
  template <typename Visit>
  C10_HOST_DEVICE static void for_each_element_of_lane(int lane, int lanes, const Visit& visit) {
#pragma unroll 1
    for (int i = lane; i < 2 * kPairs; i += lanes) {
      visit(i / kPairs, i % kPairs);
    }
  }

  // Stores those of the thread's column that `lane` of `lanes` threads with this column has to.
  C10_HOST_DEVICE static void store(Real* shared, const NormWeight& weight, Real weight_offset,
                                    const Column& column, Index size, int column_lane,
                                    int column_lanes, int lane, int lanes) {
    for_each_element_of_lane(lane, lanes, [&](int v, int e) {
      Real gain = 1;  // multiplies exactly
      if (weight.values != nullptr && column.exists(v, e, size)) {
        gain =
            load_weight<Real>(weight, column.position(v, e) * weight.axis_stride) + weight_offset;
      }
      shared[index(v, e, column_lane, column_lanes)] = gain;
    });
  }

  // The gains of some pairs of a column, from the first on.
  template <int kCount>
  C10_HOST_DEVICE static void load(const Real* shared, int column_lane, int column_lanes, int first,
                                   Pairs<Real, kCount>& gains) {
    constexpr int kOneLoad = kChunkPairs<Real, kPairs>;
    static_assert(kCount % kOneLoad == 0);
#pragma unroll
    for (int n = 0; n < kCount; n += kOneLoad) {
      // Where these pairs are: all first elements and all second ones, or half of them each.
      const int begin[2] = {Column::register_of(first + n, 0),
                            kInterleaved ? Column::register_of(first + n + kOneLoad / 2, 0)
                                         : Column::register_of(first + n, 1)};
      Real elements[2][kOneLoad];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_aligned(
            shared + index(begin[i] / kPairs, begin[i] % kPairs, column_lane, column_lanes),
            elements[i]);
      }
#pragma unroll
      for (int m = 0; m < kOneLoad; ++m) {
        gains[n + m] = kInterleaved ? Pair<Real>{elements[2 * m / kOneLoad][2 * m % kOneLoad],
                                                 elements[2 * m / kOneLoad][(2 * m + 1) % kOneLoad]}
                                    : Pair<Real>{elements[0][m], elements[1][m]};
      }
    }
  }
};

// The registers that hold a row are read twice, before and after the shuffles. Without the empty
// statement, compilers keep the unpacked elements between, in twice as many registers.
template <typename V>
C10_HOST_DEVICE inline void stay_packed([[maybe_unused]] V (&vectors)[2]) {
#ifdef __CUDA_ARCH__
  constexpr int kUnits = sizeof(V) / sizeof(vectors[0].units[0]);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    asm volatile("" : "+r"(vectors[0].units[u]), "+r"(vectors[1].units[u]));
  }
#endif
}

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class NormThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = NormRotateParams<Index>;
  using IndexType = Index;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kUsualBlocks = 3;
#else
  static constexpr int kUsualBlocks = 4;
#endif
  static constexpr int kBlocksPerSm = kFullWidth ? 2 : kUsualBlocks;
  static constexpr int kRows = rows_in_flight(true);

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return Shared::elements(blocks) + 2 * Gains::elements(blocks.block_columns);
  }

  C10_HOST_DEVICE NormThread(const Params& params, const ThreadIndex& thread)
      : params_(params),
        tile_(find_tile(params.blocks, thread)),
        token_rotations_(
            params,
            {0, tile_.row_lane * params.blocks.block_columns + tile_.column_lane,
             tile_.token < params.blocks.tokens ? static_cast<int>(params.operands.num_pairs)
                                                : 0}) {}

  // Phase 0.
  C10_HOST_DEVICE void read_frequencies() { token_rotations_.read_frequency(); }

  // Phase 1.
  C10_HOST_DEVICE void prepare(Real* shared) {
    const auto& blocks = params_.blocks;
    Index token[kTokenArrays];
    params_.operands.tokens.offsets(tile_.token, token);
    token_rotations_.load_position(token);
    load(tile_.first_row, token);
    store_gains(shared + rotations_size());
    token_rotations_.find(token, pair_step(blocks), [&](int pair, const PairRotation& rotation) {
      Shared::store(shared, blocks, tile_.token_lane, 0, pair, rotation);
    });
  }

  // Phase 2: the sums of the thread's columns of the rows from first_row + row on.
  C10_HOST_DEVICE void sum_rows(const Real* shared, Index row) {
    if (row != 0) {
      Index token[kTokenArrays];
      params_.operands.tokens.offsets(tile_.token, token);
      load(tile_.first_row + row, token);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      stay_packed(vectors_[i]);
      ColumnSum<Real> sum;
      const Column of_row = column();
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk x;
        unpack(of_row, shared, i, first, x);
        sum.add(x, x);
        finish_chunk();
      }
      sums_[i] = sum.total();
    }
  }

  C10_HOST_DEVICE auto& sums() { return sums_; }

  // After sums() have been added across the lanes of a row.
  C10_HOST_DEVICE void store_rows(const Real* shared, Index row) {
    const NormParams& norm = params_.norm;
    Index token[kTokenArrays];  // again, to have the registers while rotations are found
    params_.operands.tokens.offsets(tile_.token, token);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index at = row_at(tile_.first_row + row, i);
      if (at < tile_.end_row) {
        const bool is_q = at < params_.blocks.q_rows;
        const auto inverse_count =
            static_cast<Real>(is_q ? norm.inverse_counts[0] : norm.inverse_counts[1]);
        const Real scale = reciprocal_root(sums_[i] * inverse_count + static_cast<Real>(norm.eps));
        const int columns = params_.blocks.block_columns;
        const Real* const gains_of_row =
            shared + rotations_size() + (is_q ? 0 : Gains::elements(columns));
        stay_packed(vectors_[i]);
        Pairs<Real, kPairs> result;
        const Column of_row = column();
#pragma unroll
        for (int first = 0; first < kPairs; first += kCount) {
          Chunk x, gains;
          unpack(of_row, shared, i, first, x);
          multiply(x, scale);
          Gains::load(gains_of_row, tile_.column_lane, columns, first, gains);
          multiply(x, gains);
          if (!norm.norm_last) {
            rotate(of_row, shared, first, x);
          }
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            result[first + n] = x[n];
          }
          finish_chunk();
        }
        const auto found =
            find_row<scalar_t, kPairs>(params_.operands, params_.blocks.q_rows, at, token);
        of_row.store(found.out, found.size, 1, result);
      }
    }
  }

  C10_HOST_DEVICE void finish() const {
    CUDA_KERNEL_ASSERT(!token_rotations_.lacks_row() && "positions name rows of the tables");
  }

 private:
  using PairRotation = rope::PairRotation<Real, kFullWidth>;
  using Shared = SharedPairs<Real, kPairs, kFullWidth, /*kHasRowLanes=*/false>;
  using Gains = SharedGains<scalar_t, kInterleaved, Index>;
  using Column = typename Gains::Column;
  using V = typename Column::V;
  static_assert(kPairs == Column::kPairs);
  static constexpr int kCount = kChunkPairs<Real, kPairs>;
  using Chunk = Pairs<Real, kCount>;

  // The thread's column, found anew wherever it is used: registers are scarce between.
  C10_HOST_DEVICE Column column() const {
    int lane = tile_.column_lane;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(lane));
#endif
    return {params_.operands, params_.blocks.rotated_columns, static_cast<Index>(lane)};
  }

  C10_HOST_DEVICE int rotations_size() const {
    return Shared::kNumbers * kPairs * params_.blocks.block_columns * params_.blocks.block_tokens;
  }

  C10_HOST_DEVICE Index row_at(Index row, int i) const {
    return row + i * params_.blocks.row_lanes;
  }

  C10_HOST_DEVICE void load(Index first, const Index (&token)[kTokenArrays]) {
    const Column of_rows = column();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index row = row_at(first, i);
      if (row < tile_.end_row) {
        const auto found =
            find_row<scalar_t, kPairs>(params_.operands, params_.blocks.q_rows, row, token);
        of_rows.load(found.in, found.size, 1, vectors_[i]);
      }
    }
  }

  C10_HOST_DEVICE void store_gains(Real* gains) const {
    const auto& blocks = params_.blocks;
    const int lanes = blocks.row_lanes * blocks.block_tokens;
    const int lane = tile_.token_lane * blocks.row_lanes + tile_.row_lane;
    const NormParams& norm = params_.norm;
    const auto store = [&](Real* to, const NormWeight& weight, Index size) {
      Gains::store(to, weight, static_cast<Real>(norm.weight_offset), column(), size,
                   tile_.column_lane, blocks.block_columns, lane, lanes);
    };
    store(gains, norm.weights[0], params_.operands.x[0].axis_size);
    if (blocks.q_rows < blocks.rows) {
      store(gains + Gains::elements(blocks.block_columns), norm.weights[1],
            params_.operands.x[1].axis_size);
    }
  }

  // Rotations stay in shared memory: in registers, they would be all that is left beside the rows.
  C10_HOST_DEVICE void rotate(const Column& of_row, const Real* shared, int first, Chunk& x) const {
    if (of_row.is_rotated()) {
      PairRotation rotations[kCount];
      Shared::load(shared, params_.blocks, tile_.token_lane, tile_.column_lane * kPairs + first,
                   rotations);
      rotate_pairs(x, rotations);
    }
  }

  // What is normalized of some pairs of a row: rotated if the norm is last.
  C10_HOST_DEVICE void unpack(const Column& of_row, const Real* shared, int i, int first,
                              Chunk& x) const {
    Column::unpack(vectors_[i], first, x);
    if (params_.norm.norm_last) {
      rotate(of_row, shared, first, x);
    }
  }

  const Params& params_;
  ThreadTile<Index> tile_;
  TokenRotations<Real, kFullWidth ? RotationKind::kFullWidth : RotationKind::kHalfWidth, Index,
                 Params>
      token_rotations_;
  V vectors_[kRows][2] = {};
  Real sums_[kRows] = {};
};

// ---- Norms of any kind ----

template <typename scalar_t, int kSize, bool kInterleaved, typename Index>
class WideNormThread : public WideThread<scalar_t, (kSize > 1), kInterleaved, Index, /*kSums=*/1,
                                         WideNormParams<Index>> {
 public:
  using Base = WideThread<scalar_t, (kSize > 1), kInterleaved, Index, 1, WideNormParams<Index>>;
  using Base::Base;
  using typename Base::Real;

  // Sums the squares of the thread's row among the members [first, end).
  C10_HOST_DEVICE void sum_row(const Real* shared, Index first, Index end) {
    const Index member = first + this->row_lane();
    this->sums_[0] = 0;
    if (member >= end || !this->has_row(member)) {
      return;
    }
    const auto row = find_row(member);
    const int steps = this->params_.wide.column_steps;
    LaneSum<Real> sum;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Column column = this->column(step);
      column.load(row.in, row.size, row.in_stride, x_);
      ColumnSum<Real> of_column;
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk x;
        unpack(column, step, first, shared, x);
        of_column.add(x, x);
        finish_chunk();
      }
      sum.add(step, of_column.total());
    }
    this->sums_[0] = sum.total(steps);
  }

  C10_HOST_DEVICE void store_row(const Real* shared, Index first_member) {
    const Index member = first_member + this->row_lane();
    if (!this->has_row(member)) {
      return;
    }
    const Real scale = this->scale();
    const bool has_weight = this->weight().values != nullptr;
    const auto row = find_row(member);
#pragma unroll 1
    for (int step = 0; step < this->params_.wide.column_steps; ++step) {
      const Column column = this->column(step);
      if (!this->keeps_row()) {
        column.load(row.in, row.size, row.in_stride, x_);
      }
      Pairs<Real, kPairs> result;
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk x;
        unpack(column, step, first, shared, x);
        multiply(x, scale);
        if (has_weight) {
          Chunk gains;
          this->load_gains(column, row.weight, first, gains);
          multiply(x, gains);
        }
        if (!this->params_.norm.norm_last && column.is_rotated()) {
          this->rotate(shared, step, first, x);
        }
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          result[first + n] = x[n];
        }
        finish_chunk();
      }
      column.store(row.out, row.size, row.out_stride, result);
    }
  }

 private:
  using Base::kCount;
  using Base::kPairs;
  using typename Base::Chunk;
  using typename Base::Column;
  using typename Base::V;

  struct WideRow : Row<scalar_t, Index> {
    Index weight;  // offset
  };

  C10_HOST_DEVICE WideRow find_row(Index member) const {
    Index head[kHeadArrays];
    this->find_head(member, head);
    const auto& [q, k] = this->params_.operands.x;
    const bool is_q = this->is_q_;
    const auto* in = static_cast<const scalar_t*>(is_q ? q.in : k.in);
    auto* out = static_cast<scalar_t*>(is_q ? q.out : k.out);
    return {
        {address_of<kSize>(in, this->token_in_ + head[kHeadIn]),
         address_of<kSize>(out, this->token_out_ + head[kHeadOut]), this->axis_size(),
         is_q ? q.in_axis_stride : k.in_axis_stride, is_q ? q.out_axis_stride : k.out_axis_stride},
        this->token_weight_ + head[kHeadWeight]};
  }

  // What is normalized of some pairs: rotated if the norm is last.
  C10_HOST_DEVICE void unpack(const Column& column, int step, int first, const Real* shared,
                              Chunk& x) const {
    Column::unpack(x_, first, x);
    if (this->params_.norm.norm_last && column.is_rotated()) {
      this->rotate(shared, step, first, x);
    }
  }

  V x_[2] = {};
};

// What a block does; wait() returns when the previous kernels have ended.
template <typename Block, typename Params, typename Real, typename Wait>
C10_HOST_DEVICE void normalize_block(Block& block, const Params& params, Real* shared,
                                     const Wait& wait) {
  block.run([](auto& thread) { thread.read_frequencies(); });
  wait();
  block.run([&](auto& thread) { thread.prepare(shared); });
  block.synchronize();
  const auto& blocks = params.blocks;
  const auto step = rows_in_flight(true) * blocks.row_lanes;
#pragma unroll 1
  for (decltype(blocks.rows) row = 0; row < blocks.rows_per_block; row += step) {
    block.run([&](auto& thread) { thread.sum_rows(shared, row); });
    block.add_across_lanes(blocks.block_columns,
                           [](auto& thread) -> auto& { return thread.sums(); });
    block.run([&](auto& thread) { thread.store_rows(shared, row); });
  }
  block.run([](auto& thread) { thread.finish(); });
}

}  // namespace rope::cuda
