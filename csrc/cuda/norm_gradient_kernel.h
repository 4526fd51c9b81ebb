// The CUDA kernels for the gradients of norms: their parameters, and what one thread of a block
// does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/block.h"
#include "cuda/norm_columns.h"
#include "cuda/norm_kernel.h"
#include "cuda/token_rotations.h"
#include "cuda/wide_norm.h"

namespace rope::cuda {

// NOTE [ How a block differentiates norms ]
//
// With g the gradient of the output, R the rotation and R^T its transpose (NOTE [ Norms ]):
//
//   z = x, t = R^T g                       norm_last: z = R x, t = g
//   d = scale * (t * gain - z * scale^2 * mean(t * gain * z))
//   gradient of x = d                      norm_last: R^T d
//   gradient of the weight = sum of t * (z * scale) over rows and tokens
//
// Each row takes two sums, of z^2 and of t * gain * z, in the order of NOTE [ Sums over a row ].
// Blocks have many tokens, one group of them after the other, so that few partial sums of the
// gradient of the weight leave them: each block, or each lane, adds up those of its rows and writes
// them as a part. How tokens are divided among parts depends on the sizes of the call alone.
//
// NormGradientThread is for the calls that NormThread is for. blockIdx.x counts parts, blockIdx.y
// operands: a block has rows of q or of k. Its y lanes are divided into token lanes and row lanes.
// Its phases:
//
// 0. read_frequencies; then put_gains, as those of NormThread.
// 1. begin_token: issues the loads of a token's position and first rows, and finds its rotations.
//    They have two places in shared memory: slower warps may still read those of the token before.
// 2. After a barrier, for every few rows: sum_rows, shuffles, store_rows.
// 3. After all tokens: put_weight_sums, a barrier, store_weight_sums.

// What the gradient of a norm reads and writes besides x and its gradient.
struct NormGradientParams {
  const void* grads[2];
  std::int64_t grad_axis_strides[2];
  void* weight_sums[2];  // (parts, numel) of the opmath type; null: not wanted
};

template <typename Index>
struct UsualNormGradientParams {
  Blocks<Index> blocks;  // row_lanes: all y lanes; block_tokens: the most token lanes
  int row_lanes[2];
  int token_lanes[2];
  int token_steps[2];  // groups of tokens that a block has
  Index parts;
  Operands<Index, kHeadGrad + 1, kAllTokenArrays> operands;
  AngleParams angles;
  NormParams norm;
  NormGradientParams gradient;
};

inline constexpr int kNormGradientThreads = 128;

// From t * gain to d; mean is that of t * gain * z.
template <typename Real, int kPairs>
C10_HOST_DEVICE inline void find_gradient(const Pairs<Real, kPairs>& z, Pairs<Real, kPairs>& t,
                                          Real scale, Real mean) {
  const Real factor = scale * (scale * mean);
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    t[n] = {scale * fmadd(-factor, z[n].a, t[n].a), scale * fmadd(-factor, z[n].b, t[n].b)};
  }
}

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class NormGradientThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = UsualNormGradientParams<Index>;
  using IndexType = Index;

  static constexpr int kBlocksPerSm = kFullWidth ? 3 : 4;  // with 168 and 128 registers
  static constexpr int kRows = rows_in_flight(true);

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return Gains::elements(blocks.block_columns) +
           std::max(2 * Shared::elements(blocks),
                    std::int64_t{blocks.row_lanes} * Gains::elements(blocks.block_columns));
  }

  C10_HOST_DEVICE NormGradientThread(const Params& params, const ThreadIndex& thread)
      : params_(params),
        is_q_(thread.block_y == 0),
        column_lane_(thread.x),
        lane_(thread.y),
        token_lane_(thread.y / row_lanes()),
        row_lane_(thread.y % row_lanes()),
        part_(static_cast<Index>(thread.block_x)),
        token_rotations_(params, {0, row_lane_ * params.blocks.block_columns + column_lane_,
                                  static_cast<int>(params.operands.num_pairs)}),
        column_(params.operands, params.blocks.rotated_columns, static_cast<Index>(thread.x)) {}

  // Phase 0.
  C10_HOST_DEVICE void read_frequencies() { token_rotations_.read_frequency(); }

  C10_HOST_DEVICE void put_gains(Real* shared) const {
    const NormParams& norm = params_.norm;
    const NormWeight weight = find_weight(norm, is_q_);
    Gains::store(shared, weight, static_cast<Real>(norm.weight_offset), column_, size(),
                 column_lane_, columns(), lane_, params_.blocks.row_lanes);
  }

  // Phase 1.
  C10_HOST_DEVICE void begin_token(Real* shared, int step) {
    const int lanes = is_q_ ? params_.token_lanes[0] : params_.token_lanes[1];
    token_ = (part_ + step * params_.parts) * lanes + token_lane_;
    end_row_ = token_lane_ < lanes && token_ < params_.blocks.tokens
                   ? (is_q_ ? params_.blocks.q_rows : params_.blocks.rows - params_.blocks.q_rows)
                   : 0;
    if (end_row_ == 0) {
      return;
    }
    Index token[kAllTokenArrays];
    params_.operands.tokens.offsets(token_, token);
    token_rotations_.load_position(token);
    load(row_lane_, token);
    Real* rotations = rotations_of(shared, step);
    token_rotations_.find(
        token, row_lanes() * columns(), [&](int pair, const PairRotation& rotation) {
          Shared::store(rotations, params_.blocks, token_lane_, 0, pair, rotation);
        });
  }

  // Phase 2: the sums of the thread's rows from row_lane + row on.
  C10_HOST_DEVICE void sum_rows(const Real* shared, int step, Index row) {
    if (row != 0 && row_lane_ + row < end_row_) {
      Index token[kAllTokenArrays];
      params_.operands.tokens.offsets(token_, token);
      load(row_lane_ + row, token);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      stay_packed(x_[i]);
      stay_packed(grad_[i]);
      ColumnSum<Real> of_squares;
      ColumnSum<Real> of_products;
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk z, t, gains;
        unpack(shared, step, i, first, z, t);
        Gains::load(shared, column_lane_, columns(), first, gains);
        multiply(t, gains);
        of_squares.add(z, z);
        of_products.add(t, z);
        finish_chunk();
      }
      sums_[2 * i] = of_squares.total();
      sums_[2 * i + 1] = of_products.total();
    }
  }

  C10_HOST_DEVICE auto& sums() { return sums_; }

  C10_HOST_DEVICE void store_rows(const Real* shared, int step, Index row) {
    if (row_lane_ + row >= end_row_) {
      return;
    }
    const NormParams& norm = params_.norm;
    const auto inverse_count =
        static_cast<Real>(is_q_ ? norm.inverse_counts[0] : norm.inverse_counts[1]);
    Index token[kAllTokenArrays];
    params_.operands.tokens.offsets(token_, token);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index at = row_at(row_lane_ + row, i);
      if (at < end_row_) {
        const Real scale =
            reciprocal_root(sums_[2 * i] * inverse_count + static_cast<Real>(norm.eps));
        const Real mean = sums_[2 * i + 1] * inverse_count;
        stay_packed(x_[i]);
        stay_packed(grad_[i]);
        Pairs<Real, kPairs> gradient;
#pragma unroll
        for (int first = 0; first < kPairs; first += kCount) {
          Chunk z, t, gains;
          unpack(shared, step, i, first, z, t);
          add_to_weight_sums(first, z, t, scale);
          Gains::load(shared, column_lane_, columns(), first, gains);
          multiply(t, gains);
          find_gradient(z, t, scale, mean);
          if (norm.norm_last) {
            rotate_back(shared, step, first, t);
          }
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            gradient[first + n] = t[n];
          }
          finish_chunk();
        }
        store(at, token, gradient);
      }
    }
  }

  // Phase 3.
  C10_HOST_DEVICE void put_weight_sums(Real* shared) const {
    Real* sums = sums_of(shared, lane_);
    Column::for_each_element(0, weight_sums_, [&](int v, int e, const Real& sum) {
      sums[Gains::index(v, e, column_lane_, columns())] = sum;
    });
  }

  // After a barrier.
  C10_HOST_DEVICE void store_weight_sums(const Real* shared) const {
    void* const parts = is_q_ ? params_.gradient.weight_sums[0] : params_.gradient.weight_sums[1];
    if (parts == nullptr) {
      return;
    }
    Real* const part = static_cast<Real*>(parts) + static_cast<std::int64_t>(part_) * size();
    Gains::for_each_element_of_lane(lane_, params_.blocks.row_lanes, [&](int v, int e) {
      if (column_.exists(v, e, size())) {
        Real sum = 0;
#pragma unroll 1
        for (int lane = 0; lane < params_.blocks.row_lanes; ++lane) {
          sum += sums_of(shared, lane)[Gains::index(v, e, column_lane_, columns())];
        }
        part[column_.position(v, e)] = sum;
      }
    });
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

  C10_HOST_DEVICE int columns() const { return params_.blocks.block_columns; }
  C10_HOST_DEVICE int row_lanes() const {
    return is_q_ ? params_.row_lanes[0] : params_.row_lanes[1];
  }
  C10_HOST_DEVICE Index size() const {
    return is_q_ ? params_.operands.x[0].axis_size : params_.operands.x[1].axis_size;
  }
  C10_HOST_DEVICE Index row_at(Index row, int i) const { return row + i * row_lanes(); }

  // Shared memory: gains; then both places of rotations, or the sums of every lane.
  template <typename Pointer>
  C10_HOST_DEVICE Pointer rotations_of(Pointer shared, int step) const {
    const int one = Shared::kNumbers * kPairs * columns() * params_.blocks.block_tokens;
    return shared + (Gains::elements(columns()) + step % 2 * one);
  }
  template <typename Pointer>
  C10_HOST_DEVICE Pointer sums_of(Pointer shared, int lane) const {
    return shared + (lane + 1) * Gains::elements(columns());
  }

  C10_HOST_DEVICE void load(Index first, const Index (&token)[kAllTokenArrays]) {
    const auto& [q, k] = params_.operands.x;
    const auto* in = static_cast<const scalar_t*>(is_q_ ? q.in : k.in);
    const auto* grad =
        static_cast<const scalar_t*>(is_q_ ? params_.gradient.grads[0] : params_.gradient.grads[1]);
    const Index token_in = is_q_ ? token[kIn] : token[kIn + 2];
    const Index token_grad = is_q_ ? token[kGrad] : token[kGrad + 1];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index row = row_at(first, i);
      if (row < end_row_) {
        Index head[kHeadGrad + 1];
        find_head(row, head);
        column_.load(address_of<kPairs>(in, token_in + head[kHeadIn]), size(), 1, x_[i]);
        column_.load(address_of<kPairs>(grad, token_grad + head[kHeadGrad]), size(), 1, grad_[i]);
      }
    }
  }

  C10_HOST_DEVICE void find_head(Index row, Index (&head)[kHeadGrad + 1]) const {
    is_q_ ? params_.operands.x[0].heads.offsets(row, head)
          : params_.operands.x[1].heads.offsets(row, head);
  }

  C10_HOST_DEVICE void store(Index row, const Index (&token)[kAllTokenArrays],
                             const Pairs<Real, kPairs>& gradient) const {
    const auto& [q, k] = params_.operands.x;
    auto* out = static_cast<scalar_t*>(is_q_ ? q.out : k.out);
    if (out != nullptr) {
      Index head[kHeadGrad + 1];
      find_head(row, head);
      const Index token_out = is_q_ ? token[kOut] : token[kOut + 2];
      column_.store(address_of<kPairs>(out, token_out + head[kHeadOut]), size(), 1, gradient);
    }
  }

  C10_HOST_DEVICE void load_rotations(const Real* shared, int step, int first,
                                      PairRotation (&rotations)[kCount]) const {
    Shared::load(rotations_of(shared, step), params_.blocks, token_lane_,
                 column_lane_ * kPairs + first, rotations);
  }

  C10_HOST_DEVICE void rotate_back(const Real* shared, int step, int first, Chunk& t) const {
    if (column_.is_rotated()) {
      PairRotation rotations[kCount];
      load_rotations(shared, step, first, rotations);
      rope::cuda::rotate_back(t, rotations);
    }
  }

  // z and t of some pairs of a row.
  C10_HOST_DEVICE void unpack(const Real* shared, int step, int i, int first, Chunk& z,
                              Chunk& t) const {
    Column::unpack(x_[i], first, z);
    Column::unpack(grad_[i], first, t);
    if (column_.is_rotated()) {
      PairRotation rotations[kCount];
      load_rotations(shared, step, first, rotations);
      if (params_.norm.norm_last) {
        rotate_pairs(z, rotations);
      } else {
        rope::cuda::rotate_back(t, rotations);
      }
    }
  }

  C10_HOST_DEVICE void add_to_weight_sums(int first, const Chunk& z, const Chunk& t, Real scale) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      Pair<Real>& sum = weight_sums_[first + n];
      sum = {fmadd(t[n].a, z[n].a * scale, sum.a), fmadd(t[n].b, z[n].b * scale, sum.b)};
    }
  }

  const Params& params_;
  bool is_q_;
  int column_lane_;
  int lane_;
  int token_lane_;
  int row_lane_;
  Index part_;
  TokenRotations<Real, kFullWidth ? RotationKind::kFullWidth : RotationKind::kHalfWidth, Index,
                 Params>
      token_rotations_;
  Column column_;
  Index token_ = 0;
  Index end_row_ = 0;  // 0 without a token
  V x_[kRows][2] = {};
  V grad_[kRows][2] = {};
  Pairs<Real, kPairs> weight_sums_ = {};
  Real sums_[2 * kRows] = {};
};

// What a block does; wait() returns when the previous kernels have ended.
template <typename Block, typename Params, typename Real, typename Wait>
C10_HOST_DEVICE void differentiate_norm_block(Block& block, bool is_q, const Params& params,
                                              Real* shared, const Wait& wait) {
  const auto& blocks = params.blocks;
  const auto rows = is_q ? blocks.q_rows : blocks.rows - blocks.q_rows;
  const auto row_step = rows_in_flight(true) * (is_q ? params.row_lanes[0] : params.row_lanes[1]);
  const int token_steps = is_q ? params.token_steps[0] : params.token_steps[1];
  block.run([](auto& thread) { thread.read_frequencies(); });
  wait();
  block.run([&](auto& thread) { thread.put_gains(shared); });
#pragma unroll 1
  for (int step = 0; step < token_steps; ++step) {
    block.run([&](auto& thread) { thread.begin_token(shared, step); });
    block.synchronize();
#pragma unroll 1
    for (std::remove_const_t<decltype(rows)> row = 0; row < rows; row += row_step) {
      block.run([&](auto& thread) { thread.sum_rows(shared, step, row); });
      block.add_across_lanes(blocks.block_columns,
                             [](auto& thread) -> auto& { return thread.sums(); });
      block.run([&](auto& thread) { thread.store_rows(shared, step, row); });
    }
  }
  block.synchronize();
  block.run([&](auto& thread) { thread.put_weight_sums(shared); });
  block.synchronize();
  block.run([&](auto& thread) { thread.store_weight_sums(shared); });
  block.run([](auto& thread) { thread.finish(); });
}

// ---- Norms of any kind ----

template <typename Index>
struct WideNormGradientParams : WideNormParams<Index> {
  NormGradientParams gradient;
  std::int64_t weight_numel[2];
  bool sums_in_registers[2];  // else each thread adds to its part in memory, which is zero at first
  bool has_lane_parts[2];     // a part for each y lane of each group of means, not for all of them
};

template <typename scalar_t, int kSize, bool kInterleaved, typename Index>
class WideNormGradientThread : public WideThread<scalar_t, (kSize > 1), kInterleaved, Index,
                                                 /*kSums=*/2, WideNormGradientParams<Index>> {
 public:
  using Base =
      WideThread<scalar_t, (kSize > 1), kInterleaved, Index, 2, WideNormGradientParams<Index>>;
  using Base::Base;
  using typename Base::Real;

  // Sums over the thread's row among the members [first, end).
  C10_HOST_DEVICE void sum_row(const Real* shared, Index first, Index end) {
    const Index member = first + this->row_lane();
    this->sums_[0] = this->sums_[1] = 0;
    if (member >= end || !this->has_row(member)) {
      return;
    }
    const auto row = find_row(member);
    const int steps = this->params_.wide.column_steps;
    LaneSum<Real> of_squares;
    LaneSum<Real> of_products;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Column column = this->column(step);
      load(row, column);
      ColumnSum<Real> squares;
      ColumnSum<Real> products;
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk z, t;
        unpack(column, step, first, shared, z, t);
        weigh(row, column, first, t);
        squares.add(z, z);
        products.add(t, z);
        finish_chunk();
      }
      of_squares.add(step, squares.total());
      of_products.add(step, products.total());
    }
    this->sums_[0] = of_squares.total(steps);
    this->sums_[1] = of_products.total(steps);
  }

  C10_HOST_DEVICE void store_row(const Real* shared, Index first_member) {
    const Index member = first_member + this->row_lane();
    if (!this->has_row(member)) {
      return;
    }
    const Real scale = this->scale();
    const Real mean = this->sums_[1] * this->inverse_count();
    const auto row = find_row(member);
#pragma unroll 1
    for (int step = 0; step < this->params_.wide.column_steps; ++step) {
      const Column column = this->column(step);
      if (!this->keeps_row()) {
        load(row, column);
      }
      Pairs<Real, kPairs> gradient;
#pragma unroll
      for (int first = 0; first < kPairs; first += kCount) {
        Chunk z, t;
        unpack(column, step, first, shared, z, t);
        add_to_weight_sums(row, column, first, z, t, scale);
        weigh(row, column, first, t);
        find_gradient(z, t, scale, mean);
        if (this->params_.norm.norm_last && column.is_rotated()) {
          this->rotate_back(shared, step, first, t);
        }
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          gradient[first + n] = t[n];
        }
        finish_chunk();
      }
      if (row.out != nullptr) {
        column.store(row.out, row.size, row.out_stride, gradient);
      }
    }
  }

  C10_HOST_DEVICE void finish() {
    Real* const part = find_part();
    const Index member = this->row_lane();
    this->find_mean(0);
    if (part != nullptr && sums_in_registers() && this->is_row(member)) {
      Index head[kHeadArrays];
      this->find_head(member, head);
      const Column column = this->column(0);
      const Index size = this->axis_size();
      column.for_each_element(0, weight_sums_, [&](int v, int e, const Real& sum) {
        if (column.exists(v, e, size)) {
          part[head[kHeadGain] + column.position(v, e)] = sum;
        }
      });
    }
    Base::finish();
  }

 private:
  using Base::kCount;
  using Base::kPairs;
  using typename Base::Chunk;
  using typename Base::Column;
  using typename Base::V;

  struct WideRow {
    const scalar_t* in;
    scalar_t* out;  // null: not wanted
    const scalar_t* grad;
    Index size, in_stride, out_stride, grad_stride;
    Index weight;  // offset
    Index gain;    // offset in a contiguous tensor of the shape of the weight
  };

  C10_HOST_DEVICE WideRow find_row(Index member) const {
    Index head[kHeadArrays];
    this->find_head(member, head);
    const auto& [q, k] = this->params_.operands.x;
    const auto& gradient = this->params_.gradient;
    const bool is_q = this->is_q_;
    const auto* in = static_cast<const scalar_t*>(is_q ? q.in : k.in);
    auto* out = static_cast<scalar_t*>(is_q ? q.out : k.out);
    const auto* grad = static_cast<const scalar_t*>(is_q ? gradient.grads[0] : gradient.grads[1]);
    return {
        address_of<kSize>(in, this->token_in_ + head[kHeadIn]),
        out == nullptr ? nullptr : address_of<kSize>(out, this->token_out_ + head[kHeadOut]),
        address_of<kSize>(grad, this->token_grad_ + head[kHeadGrad]),
        this->axis_size(),
        is_q ? q.in_axis_stride : k.in_axis_stride,
        is_q ? q.out_axis_stride : k.out_axis_stride,
        static_cast<Index>(is_q ? gradient.grad_axis_strides[0] : gradient.grad_axis_strides[1]),
        head[kHeadWeight],
        head[kHeadGain]};
  }

  C10_HOST_DEVICE void load(const WideRow& row, const Column& column) {
    column.load(row.in, row.size, row.in_stride, x_);
    column.load(row.grad, row.size, row.grad_stride, grad_);
  }

  // z and t of some pairs of a column.
  C10_HOST_DEVICE void unpack(const Column& column, int step, int first, const Real* shared,
                              Chunk& z, Chunk& t) const {
    Column::unpack(x_, first, z);
    Column::unpack(grad_, first, t);
    if (column.is_rotated()) {
      if (this->params_.norm.norm_last) {
        this->rotate(shared, step, first, z);
      } else {
        this->rotate_back(shared, step, first, t);
      }
    }
  }

  // From t to t * gain.
  C10_HOST_DEVICE void weigh(const WideRow& row, const Column& column, int first, Chunk& t) const {
    if (this->weight().values != nullptr) {
      Chunk gains;
      this->load_gains(column, row.weight, first, gains);
      multiply(t, gains);
    }
  }

  C10_HOST_DEVICE bool sums_in_registers() const {
    return this->is_q_ ? this->params_.sums_in_registers[0] : this->params_.sums_in_registers[1];
  }

  // Null: the gradient of the weight is not wanted.
  C10_HOST_DEVICE Real* find_part() const {
    const auto& params = this->params_;
    const bool is_q = this->is_q_;
    void* const parts = is_q ? params.gradient.weight_sums[0] : params.gradient.weight_sums[1];
    if (parts == nullptr) {
      return nullptr;
    }
    const std::int64_t numel = is_q ? params.weight_numel[0] : params.weight_numel[1];
    std::int64_t part =
        static_cast<std::int64_t>(this->thread_.block_x) * params.blocks.block_tokens +
        this->thread_.z;
    if (is_q ? params.has_lane_parts[0] : params.has_lane_parts[1]) {
      part = (part * (is_q ? params.wide.groups[0] : params.wide.groups[1]) + this->group()) *
                 this->lanes() +
             this->thread_.y;
    }
    return static_cast<Real*>(parts) + part * numel;
  }

  C10_HOST_DEVICE void add_to_weight_sums(const WideRow& row, const Column& column, int first,
                                          const Chunk& z, const Chunk& t, Real scale) {
    if (sums_in_registers()) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        Pair<Real>& sum = weight_sums_[first + n];
        sum = {fmadd(t[n].a, z[n].a * scale, sum.a), fmadd(t[n].b, z[n].b * scale, sum.b)};
      }
      return;
    }
    Real* const part = find_part();
    if (part == nullptr) {
      return;
    }
    Chunk products;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      products[n] = {t[n].a * (z[n].a * scale), t[n].b * (z[n].b * scale)};
    }
    column.for_each_element(first, products, [&](int v, int e, const Real& product) {
      if (column.exists(v, e, row.size)) {
        part[row.gain + column.position(v, e)] += product;
      }
    });
  }

  V x_[2] = {};
  V grad_[2] = {};
  Pairs<Real, kPairs> weight_sums_ = {};
};

}  // namespace rope::cuda
