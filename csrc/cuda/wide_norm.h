// What the kernels for norms of any kind share: rows of any length, in vectors or element by
// element, that share a mean with others or not.
#pragma once

#include <cstdint>

#include "cuda/block.h"
#include "cuda/cooperation.h"
#include "cuda/norm_columns.h"
#include "cuda/token_rotations.h"

namespace rope::cuda {

// NOTE [ Wide norms ]
//
// A mean is that of num_members rows of a token. A block has a few tokens and some or all means of
// one operand. Its x counts the lanes of a row (NOTE [ Sums over a row ]), its y mean lanes, if
// every row has a mean of its own, or row lanes, which have the rows of one mean at a time; z
// counts tokens. blockIdx.x counts groups of tokens (a block of the gradient kernel has several,
// one after the other), blockIdx.y groups of means, those of q first.
//
// For each mean, a thread sums the squares of its rows, chunk by chunk. Where rows share a mean,
// the sums of a chunk of rows meet in shared memory, and every warp adds them up. Then the thread
// goes through its rows again; it keeps an only row with an only column in registers.

// Rows whose sums are in shared memory at the same time. A multiple of kWarpSize: chunks then do
// not show in the order of a sum.
inline constexpr int kChunkRows = 256;

// With 64-bit indices, threads take twice as many registers.
template <typename Index>
inline constexpr int kMaxWideThreads = sizeof(Index) == 4 ? 512 : 256;

struct WideBlocks {
  std::int64_t means[2];    // of a token, for each operand
  std::int64_t members[2];  // rows of a mean
  std::int64_t means_per_block;
  std::int64_t groups[2];  // of means
  std::int64_t grid_x;
  int token_steps;  // groups of tokens that a block has, one after the other
  int column_lanes;
  int column_steps;  // columns of a lane
  int mean_lanes;
  int row_lanes;
  bool shares_mean;  // num_members > 1 for some operand
};

template <typename Index>
struct WideNormParams {
  Blocks<Index> blocks;  // tokens, rotated columns
  WideBlocks wide;
  Operands<Index, kHeadArrays, kAllTokenArrays> operands;
  AngleParams angles;
  NormParams norm;
};

// A lane's sum over its columns. There is no float64 if there is one column.
template <typename Real>
class LaneSum {
 public:
  C10_HOST_DEVICE void add(int step, Real sum_of_column) {
    if (step == 0) {
      first_ = sum_of_column;
    } else {
      all_ = (step == 1 ? static_cast<double>(first_) : all_) + static_cast<double>(sum_of_column);
    }
  }
  C10_HOST_DEVICE Real total(int steps) const {
    return steps == 1 ? first_ : static_cast<Real>(all_);
  }

 private:
  Real first_ = 0;
  double all_ = 0;
};

// The part of a thread that does not depend on what is summed: kSums sums of each row, which
// Derived computes.
template <typename scalar_t, bool kVectors, bool kInterleaved, typename Index, int kSums,
          typename AnyParams>
class WideThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using IndexType = Index;
  using Params = AnyParams;
  static constexpr int kPairs = static_cast<int>(16 / sizeof(scalar_t));

  // Rotations, then the sums of a chunk of rows.
  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return Shared::elements(blocks) + kSums * kChunkRows;
  }

  C10_HOST_DEVICE WideThread(const Params& params, const ThreadIndex& thread)
      : params_(params),
        thread_(thread),
        is_q_(thread.block_y < params.wide.groups[0]),
        token_rotations_(params, {0, thread.y * params.wide.column_lanes + thread.x,
                                  static_cast<int>(params.operands.num_pairs)}) {}

  C10_HOST_DEVICE void read_frequencies() { token_rotations_.read_frequency(); }

  // The token of a step. A barrier follows.
  C10_HOST_DEVICE void begin_token(Real* shared, int step) {
    const Index group = static_cast<Index>(thread_.block_x) + step * narrow(params_.wide.grid_x);
    token_ = group * params_.blocks.block_tokens + thread_.z;
    if (!has_token()) {
      return;
    }
    Index offsets[kAllTokenArrays];
    params_.operands.tokens.offsets(token_, offsets);
    token_in_ = is_q_ ? offsets[kIn] : offsets[kIn + 2];
    token_out_ = is_q_ ? offsets[kOut] : offsets[kOut + 2];
    token_grad_ = is_q_ ? offsets[kGrad] : offsets[kGrad + 1];
    token_weight_ = is_q_ ? offsets[kWeight] : offsets[kWeight + 1];
    token_rotations_.load_position(offsets);
    token_rotations_.find(offsets, params_.wide.column_lanes * lanes(),
                          [&](int pair, const PairRotation& rotation) {
                            Shared::store(shared, params_.blocks, thread_.z, 0, pair, rotation);
                          });
  }

  C10_HOST_DEVICE void begin_mean(Index step) {
    find_mean(step);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      totals_[i] = 0;
    }
  }

  C10_HOST_DEVICE auto& sums() { return sums_; }
  C10_HOST_DEVICE auto& totals() { return totals_; }

  // The sums of a row, after they have been added across its lanes.
  C10_HOST_DEVICE void put_sums(Real* shared, Index first, Index end) {
    const Index member = first + row_lane();
    if (params_.wide.shares_mean && thread_.x == 0 && member < end && has_row(member)) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        row_sums(shared)[i * kChunkRows + member % kChunkRows] = sums_[i];
      }
    }
  }

  // Adds the sums of the chunk of rows that begins with the member.
  C10_HOST_DEVICE void add_chunk(const Real* shared, Index first) {
    const int lane = (thread_.y * params_.wide.column_lanes + thread_.x) % kWarpSize;
    const Index left = members() - first;
    const auto count =
        has_token() && is_mean_ ? static_cast<int>(left < kChunkRows ? left : kChunkRows) : 0;
#pragma unroll 1
    for (int row = lane; row < count; row += kWarpSize) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        totals_[i] += static_cast<double>(row_sums(shared)[i * kChunkRows + row]);
      }
    }
  }

  // After totals() have been added across the lanes of a warp: the sums of the mean.
  C10_HOST_DEVICE void take_totals() {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      sums_[i] = static_cast<Real>(totals_[i]);
    }
  }

  C10_HOST_DEVICE void finish() const {
    CUDA_KERNEL_ASSERT(!token_rotations_.lacks_row() && "positions name rows of the tables");
  }

 protected:
  using PairRotation = FullRotation<Real>;
  using Shared = SharedPairs<Real, kPairs, /*kFullWidth=*/true, /*kHasRowLanes=*/false>;
  using Column = NormColumn<scalar_t, kVectors, kInterleaved, Index>;
  using V = typename Column::V;
  static constexpr int kCount = 2;  // pairs of which a thread has gains and rotations at a time
  using Chunk = Pairs<Real, kCount>;

  C10_HOST_DEVICE static Index narrow(std::int64_t number) { return static_cast<Index>(number); }

  // Of means, among those of the operand.
  C10_HOST_DEVICE Index group() const {
    return static_cast<Index>(thread_.block_y) - (is_q_ ? 0 : narrow(params_.wide.groups[0]));
  }
  C10_HOST_DEVICE Index members() const {
    return narrow(is_q_ ? params_.wide.members[0] : params_.wide.members[1]);
  }
  C10_HOST_DEVICE Index axis_size() const {
    return is_q_ ? params_.operands.x[0].axis_size : params_.operands.x[1].axis_size;
  }
  C10_HOST_DEVICE NormWeight weight() const { return find_weight(params_.norm, is_q_); }
  C10_HOST_DEVICE bool has_token() const { return token_ < params_.blocks.tokens; }

  C10_HOST_DEVICE void find_mean(Index step) {
    const Index in_block = step * params_.wide.mean_lanes + mean_lane();
    const Index means = narrow(params_.wide.means_per_block);
    mean_ = group() * means + in_block;
    is_mean_ =
        in_block < means && mean_ < narrow(is_q_ ? params_.wide.means[0] : params_.wide.means[1]);
  }
  // Whether the mean has that row, whatever the token.
  C10_HOST_DEVICE bool is_row(Index member) const { return is_mean_ && member < members(); }
  C10_HOST_DEVICE bool has_row(Index member) const { return has_token() && is_row(member); }

  // The only row of the thread, which has an only column, stays in registers.
  C10_HOST_DEVICE bool keeps_row() const {
    return params_.wide.column_steps == 1 && members() <= params_.wide.row_lanes;
  }

  // The offset of a row in each array of its heads.
  C10_HOST_DEVICE void find_head(Index member, Index (&offsets)[kHeadArrays]) const {
    const Index head = mean_ * members() + member;
    is_q_ ? params_.operands.x[0].heads.offsets(head, offsets)
          : params_.operands.x[1].heads.offsets(head, offsets);
  }

  C10_HOST_DEVICE Column column(int step) const {
    return {params_.operands, params_.blocks.rotated_columns,
            static_cast<Index>(step) * params_.wide.column_lanes + thread_.x};
  }

  // Rotates some pairs of a column of the rotated slice, or rotates them back.
  C10_HOST_DEVICE void rotate(const Real* shared, int step, int first, Chunk& x) const {
    rotate_by(shared, step, first, x, [](const PairRotation& rotation) { return rotation; });
  }
  C10_HOST_DEVICE void rotate_back(const Real* shared, int step, int first, Chunk& x) const {
    rotate_by(shared, step, first, x,
              [](const PairRotation& rotation) { return transpose(rotation); });
  }

  C10_HOST_DEVICE void load_gains(const Column& column, Index offset, int first,
                                  Chunk& gains) const {
    column.load_gains(weight(), static_cast<Real>(params_.norm.weight_offset), offset, axis_size(),
                      first, gains);
  }

  C10_HOST_DEVICE Real inverse_count() const {
    return static_cast<Real>(is_q_ ? params_.norm.inverse_counts[0]
                                   : params_.norm.inverse_counts[1]);
  }
  C10_HOST_DEVICE Real scale() const {
    return reciprocal_root(sums_[0] * inverse_count() + static_cast<Real>(params_.norm.eps));
  }

  C10_HOST_DEVICE int mean_lane() const { return params_.wide.shares_mean ? 0 : thread_.y; }
  C10_HOST_DEVICE int row_lane() const { return params_.wide.shares_mean ? thread_.y : 0; }
  C10_HOST_DEVICE int lanes() const { return params_.wide.mean_lanes * params_.wide.row_lanes; }

  const Params& params_;
  ThreadIndex thread_;
  bool is_q_;
  TokenRotations<Real, RotationKind::kAny, Index, Params> token_rotations_;
  Index token_ = 0;
  Index token_in_ = 0;  // offsets of the token in x, the output, the gradient and the weight
  Index token_out_ = 0;
  Index token_grad_ = 0;
  Index token_weight_ = 0;
  Index mean_ = 0;
  bool is_mean_ = false;
  Real sums_[kSums] = {};
  double totals_[kSums] = {};

 private:
  template <typename Change>
  C10_HOST_DEVICE void rotate_by(const Real* shared, int step, int first, Chunk& x,
                                 const Change& change) const {
    const int pair = (step * params_.wide.column_lanes + thread_.x) * kPairs + first;
    PairRotation rotations[kCount];
    Shared::load(shared, params_.blocks, thread_.z, pair, rotations);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      // Nothing was stored for pairs that the column lacks.
      const bool exists = kVectors || pair + n < params_.operands.num_pairs;
      x[n] = exists ? rope::rotate<Real>(x[n], change(rotations[n])) : Pair<Real>{};
    }
  }

  C10_HOST_DEVICE Real* row_sums(Real* shared) const { return shared + rotations_size(); }
  C10_HOST_DEVICE const Real* row_sums(const Real* shared) const {
    return shared + rotations_size();
  }
  C10_HOST_DEVICE int rotations_size() const {
    return Shared::kNumbers * kPairs * params_.blocks.block_columns * params_.blocks.block_tokens;
  }
};

// What a block does; wait() returns when the previous kernels have ended.
template <typename Block, typename Params, typename Real, typename Wait>
C10_HOST_DEVICE void normalize_wide_block(Block& block, const Params& params, Real* shared,
                                          const Wait& wait) {
  const WideBlocks& wide = params.wide;
  using Index = decltype(params.blocks.tokens);
  const auto members =
      static_cast<Index>(wide.members[0] > wide.members[1] ? wide.members[0] : wide.members[1]);
  const auto means = static_cast<Index>(wide.means_per_block);
  block.run([](auto& thread) { thread.read_frequencies(); });
  wait();
#pragma unroll 1
  for (int step = 0; step < wide.token_steps; ++step) {
    block.synchronize();  // The rotations of the token before are no longer used.
    block.run([&](auto& thread) { thread.begin_token(shared, step); });
    block.synchronize();
#pragma unroll 1
    for (Index mean = 0; mean * wide.mean_lanes < means; ++mean) {
      block.run([&](auto& thread) { thread.begin_mean(mean); });
#pragma unroll 1
      for (Index chunk = 0; chunk < members; chunk += kChunkRows) {
        const Index end = chunk + kChunkRows < members ? chunk + kChunkRows : members;
#pragma unroll 1
        for (Index row = chunk; row < end; row += wide.row_lanes) {
          block.run([&](auto& thread) { thread.sum_row(shared, row, end); });
          block.add_across_lanes(wide.column_lanes,
                                 [](auto& thread) -> auto& { return thread.sums(); });
          block.run([&](auto& thread) { thread.put_sums(shared, row, end); });
        }
        if (wide.shares_mean) {
          block.synchronize();
          block.run([&](auto& thread) { thread.add_chunk(shared, chunk); });
          block.synchronize();
        }
      }
      if (wide.shares_mean) {
        block.add_across_lanes(kWarpSize, [](auto& thread) -> auto& { return thread.totals(); });
        block.run([](auto& thread) { thread.take_totals(); });
      }
#pragma unroll 1
      for (Index row = 0; row < members; row += wide.row_lanes) {
        block.run([&](auto& thread) { thread.store_row(shared, row); });
      }
    }
  }
  block.run([](auto& thread) { thread.finish(); });
}

}  // namespace rope::cuda
