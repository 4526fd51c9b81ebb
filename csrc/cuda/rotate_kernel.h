// The CUDA kernels that rotate: what a launch is given, and what one thread of a block does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "angle.h"
#include "cuda/block.h"
#include "cuda/sincos.h"

namespace rope::cuda {

// NOTE [ How a block rotates ]
//
// Blocks are those of NOTE [ Blocks ].
//
// 0. Frequencies of max_wavelength, which no kernel on the stream has written, are read while the
//    kernels in front are still running.
// 1. Each thread asks for its token's position and for its first rows. While they are on their
//    way, the block finds the cosine and the sine of each pair of each of its tokens once, one
//    thread for a pair, and puts them into shared memory.
// 2. After a barrier each thread reads those of its column, and keeps them in registers while it
//    rotates its rows, a few at a time.
//
// Where a token has but a few rows there is little to share, and what a barrier costs is a good
// part of the whole: RotateFewRowsThread finds the rotations of its column in registers, for two
// tokens.
//
// Each phase is a function of one thread, and what a thread keeps between phases are its members:
// a test on the host calls a phase of all threads of a block before it goes on to the next.

// How an angle is formed.
enum class AngleSource : int {
  kTurns,    // integer positions, frequencies in turns: see NOTE [ Angles in turns ]
  kFloat32,  // float32 inv_freq
  kFloat64,  // float64 inv_freq, or frequencies of max_wavelength
  kTables,
};

template <typename Index>
struct RotateParams {
  Blocks<Index> blocks;
  Operands<Index> operands;
  AngleSource source;
  bool conjugate;
  union {
    PositionAngles position_angles;  // inv_freq is device memory, whatever the source
    TableAngles table_angles;
  };
};

// ---- The cosines and sines of a token ----

template <typename Frequency, int kCount, typename Index>
C10_HOST_DEVICE inline void form_angles(const PositionAngles& source, Index position_offset,
                                        Index first_pair, Frequency (&angles)[kCount]) {
  const auto load = [&](int axis) {
    return load_position<Frequency>(source.positions, source.positions_dtype,
                                    position_offset + axis * source.positions_axis_stride);
  };
  const Frequency first = load(0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    angles[i] = sum_products<Frequency>(
        source.num_axes, [&](int axis) { return axis == 0 ? first : load(axis); },
        [&](int axis) {
          return static_cast<const Frequency*>(
              source.inv_freq)[axis * source.inv_freq_axis_stride +
                               (first_pair + i) * source.inv_freq_stride];
        });
  }
}

// The position of a token, for angles in turns; 0 for others.
template <typename Index>
C10_HOST_DEVICE inline std::uint64_t load_position_in_turns(const RotateParams<Index>& params,
                                                            Index offset) {
  const PositionAngles& source = params.position_angles;
  return params.source == AngleSource::kTurns
             ? static_cast<std::uint64_t>(
                   load_position<std::int64_t>(source.positions, source.positions_dtype, offset))
             : 0;
}

// Those of kCount neighbouring pairs. Angles in turns were formed before. Without float64 for x of
// other dtypes, unless the source is kFloat64.
template <bool kHasFloat64, typename Real, int kCount, typename Index>
C10_HOST_DEVICE inline void find_rotations_by_position(const RotateParams<Index>& params,
                                                       Index position_offset, Index first_pair,
                                                       const std::uint64_t (&turns)[kCount],
                                                       Rotation<Real> (&rotations)[kCount]) {
  const PositionAngles& source = params.position_angles;
  if (std::is_same_v<Real, float> && params.source == AngleSource::kTurns) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Rotation<float> rotation = rotation_of_turns(turns[i]);
      rotations[i] = {rotation.cos, rotation.sin};
    }
  } else if (std::is_same_v<Real, float> &&
             (!kHasFloat64 || params.source == AngleSource::kFloat32)) {
    float angles[kCount];
    form_angles(source, position_offset, first_pair, angles);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Rotation<float> rotation = rotation_of_float32(angles[i]);
      rotations[i] = {rotation.cos, rotation.sin};
    }
  } else if constexpr (kHasFloat64) {
    double angles[kCount];
    if (params.source == AngleSource::kFloat32) {
      float rounded[kCount];
      form_angles(source, position_offset, first_pair, rounded);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        angles[i] = static_cast<double>(rounded[i]);
      }
    } else {
      form_angles(source, position_offset, first_pair, angles);
    }
    find_rotations(angles, source.scale_factor, rotations);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    rotations[i] =
        scale(rotations[i], static_cast<Real>(source.attention_factor), params.conjugate);
  }
}

template <typename Table, typename Real>
C10_HOST_DEVICE inline void load_angle(const TableAngles& table, const TableRow<Table>& row,
                                       std::int64_t n, std::int64_t /*num_pairs*/,
                                       bool /*interleaved*/, bool conjugate,
                                       Rotation<Real>& angle) {
  angle = scale(load_rotation<Real>(table, row, n), Real(1), conjugate);
}

template <typename Table, typename Real>
C10_HOST_DEVICE inline void load_angle(const TableAngles& table, const TableRow<Table>& row,
                                       std::int64_t n, std::int64_t num_pairs, bool interleaved,
                                       bool conjugate, FullRotation<Real>& angle) {
  angle = load_full_rotation<Real>(table, row, n, num_pairs, interleaved);
  if (conjugate) {
    angle = transpose(angle);
  }
}

template <typename Angle, typename Index>
C10_HOST_DEVICE inline Angle find_angle_by_table(const RotateParams<Index>& params,
                                                 Index angle_offset, Index sin_offset, Index n) {
  const TableAngles& table = params.table_angles;
  Angle angle;
  const auto load = [&](auto element) {
    using Table = decltype(element);
    load_angle(table, find_table_row<Table>(table, angle_offset, sin_offset), n,
               params.operands.num_pairs, params.operands.interleaved, params.conjugate, angle);
  };
  switch (table.dtype) {
    case c10::ScalarType::Double:
      load(double{});
      break;
    case c10::ScalarType::Float:
      load(float{});
      break;
    case c10::ScalarType::Half:
      load(c10::Half{});
      break;
    case c10::ScalarType::BFloat16:
      load(c10::BFloat16{});
      break;
    default:
      fail_for_dtype(table.dtype);
  }
  return angle;
}

// ---- A few rows of a thread, from memory to memory ----

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

  template <typename Angle>
  C10_HOST_DEVICE void rotate(int i, const Angle (&angles)[kPairs]) {
    Columns::rotate_pairs(vectors_[i], angles);
  }

  // size and out_stride are those of the row. (To keep them would take registers.)
  C10_HOST_DEVICE void store(int i, Index size, Index out_stride, const Columns& column) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (has_vector(size, column.begin[v])) {
        column.store(out_[i], out_stride, v, vectors_[i][v]);
      }
    }
  }

 private:
  // q and k may have different numbers of elements around the slice.
  C10_HOST_DEVICE static bool has_vector(Index size, Index begin) { return begin < size; }

  scalar_t* out_[kRows];
  Vector<scalar_t, kPairs> vectors_[kRows][2];
};

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
C10_HOST_DEVICE inline Column<scalar_t, kPairs, kInterleaved, Index> find_column(
    const RotateParams<Index>& params, Index column) {
  using Columns = Column<scalar_t, kPairs, kInterleaved, Index>;
  const Index rotated = params.blocks.rotated_columns;
  return column < rotated ? Columns::of_pairs(params.operands, column)
                          : Columns::of_others(params.operands, column - rotated);
}

template <typename Rows, typename Columns, typename Index>
C10_HOST_DEVICE inline void store_row(const RotateParams<Index>& params, const Rows& rows, int i,
                                      Index row, const Columns& column) {
  const auto& [q, k] = params.operands.x;
  const bool is_q = row < params.blocks.q_rows;
  rows.store(i, is_q ? q.axis_size : k.axis_size, is_q ? q.out_axis_stride : k.out_axis_stride,
             column);
}

// ---- A thread of a block that shares its rotations ----

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index, bool kFullWidth>
class RotateThread {
 public:
  using Real = at::opmath_type<scalar_t>;
  using Params = RotateParams<Index>;
  using IndexType = Index;

  C10_HOST_DEVICE RotateThread(const Params& params, const ThreadIndex& thread)
      : params_(params), part_(find_part(params.blocks, thread)) {
    const Blocks<Index>& blocks = params.blocks;
    first_slot_ = part_.row_lane * blocks.block_columns + part_.column_lane;
    first_pair_ = part_.first_column * kPairs;
    const Index pairs = params.operands.num_pairs - first_pair_;
    const int slots = blocks.block_columns * kPairs;
    num_slots_ = part_.token >= blocks.tokens || pairs <= 0 ? 0
                 : pairs < slots                            ? static_cast<int>(pairs)
                                                            : slots;
  }

  // Phase 0.
  C10_HOST_DEVICE void read_frequencies() {
    if (params_.source == AngleSource::kTurns && first_slot_ < num_slots_) {
      turns_ = load_turns(first_slot_);
    }
  }

  // Phase 1. Shared memory holds kNumbers for each pair of the block and each of its tokens.
  C10_HOST_DEVICE void find_rotations(Real* shared) {
    Index offsets[kTokenArrays];
    params_.operands.tokens.offsets(part_.token, offsets);
#pragma unroll
    for (int array = kIn; array < kTokenArrays; ++array) {
      token_[array] = offsets[array];
    }
    column_ = find_column<scalar_t, kPairs, kInterleaved>(params_, part_.column);
    if (num_slots_ > 0) {
      position_ = load_position_in_turns(params_, offsets[kAngle]);
    }
    load(part_.first_row);
    const int step = params_.blocks.row_lanes * params_.blocks.block_columns;
#pragma unroll 1
    for (int slot = first_slot_; slot < num_slots_; slot += step) {
      put(shared, slot, find_angle(offsets[kAngle], offsets[kSin], slot));
    }
  }

  // Phase 2, after a barrier.
  C10_HOST_DEVICE void rotate_rows(const Real* shared) {
    const bool is_rotated = part_.column < params_.blocks.rotated_columns;
    Angle angles[kPairs];
    if (is_rotated && part_.first_row < part_.last_row) {
      get(shared, part_.column_lane * kPairs, angles);
    }
    const Index step = kRows * params_.blocks.row_lanes;
#pragma unroll 1
    for (Index row = part_.first_row; row < part_.last_row; row += step) {
      if (row != part_.first_row) {
        load(row);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (row_at(row, i) < part_.last_row) {
          if (is_rotated) {
            rows_.rotate(i, angles);
          }
          store_row(params_, rows_, i, row_at(row, i), column_);
        }
      }
    }
    // Here and not where it is found out: a failed assertion is a call, around which the rows on
    // their way would have to be kept in memory.
    CUDA_KERNEL_ASSERT(!lacks_row_ && "positions name rows of the tables");
  }

  // Blocks of kMaxThreads on a processor at a time, which has 65,536 registers. Usual calls need no
  // more than 64 in a thread; what the compiler makes for 10.0 and later takes a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kUsualBlocks = 3;
#else
  static constexpr int kUsualBlocks = 4;
#endif
  static constexpr int kBlocksPerProcessor =
      sizeof(Real) == 4 && sizeof(Index) == 4 && !kFullWidth ? kUsualBlocks : 2;

  static std::int64_t shared_elements(const Blocks<std::int64_t>& blocks) {
    return std::int64_t{kNumbers} * blocks.block_columns * kPairs * blocks.block_tokens;
  }

 private:
  static constexpr int kNumbers = kFullWidth ? 4 : 2;

  using Angle = std::conditional_t<kFullWidth, FullRotation<Real>, Rotation<Real>>;

  static constexpr int kRows = rows_in_flight(kPairs > 1);

  C10_HOST_DEVICE Index row_at(Index row, int i) const {
    return row + i * params_.blocks.row_lanes;
  }

  C10_HOST_DEVICE void load(Index first) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Index row = row_at(first, i);
      if (row < part_.last_row) {
        rows_.load(i, find_row<scalar_t>(params_.operands, params_.blocks.q_rows, row, token_),
                   column_);
      }
    }
  }

  C10_HOST_DEVICE std::uint64_t load_turns(int slot) const {
    return static_cast<const std::uint64_t*>(params_.position_angles.inv_freq)[first_pair_ + slot];
  }

  C10_HOST_DEVICE Angle find_angle(Index angle_offset, Index sin_offset, int slot) {
    if constexpr (!kFullWidth) {
      if (params_.source != AngleSource::kTables) {
        const std::uint64_t turns[1] = {params_.source != AngleSource::kTurns ? 0
                                        : slot == first_slot_ ? position_ * turns_
                                                              : position_ * load_turns(slot)};
        Rotation<Real> rotations[1];
        find_rotations_by_position<true>(params_, angle_offset,
                                         static_cast<Index>(first_pair_ + slot), turns, rotations);
        return rotations[0];
      }
    }
    if (!has_table_row(params_.table_angles, angle_offset)) {
      lacks_row_ = true;
      return {};
    }
    return find_angle_by_table<Angle>(params_, angle_offset, sin_offset,
                                      static_cast<Index>(first_pair_ + slot));
  }

  // Where number i of a pair is: neighbouring lanes read and write neighbouring elements.
  C10_HOST_DEVICE int place(int slot, int i) const {
    const Blocks<Index>& blocks = params_.blocks;
    const int slots = blocks.block_columns * kPairs;
    if (kPairs == 1 && blocks.lanes == Lanes::kTokens) {
      return (i * slots + slot) * blocks.block_tokens + part_.token_lane;
    }
    return (part_.token_lane * kNumbers + i) * slots + slot;
  }

  C10_HOST_DEVICE void put(Real* shared, int slot, const Angle& angle) const {
    if constexpr (kFullWidth) {
      shared[place(slot, 0)] = angle.a.cos;
      shared[place(slot, 1)] = angle.a.sin;
      shared[place(slot, 2)] = angle.b.cos;
      shared[place(slot, 3)] = angle.b.sin;
    } else {
      shared[place(slot, 0)] = angle.cos;
      shared[place(slot, 1)] = angle.sin;
    }
  }

  // Those of a column, 16 bytes at a time.
  C10_HOST_DEVICE void get(const Real* shared, int first_slot, Angle (&angles)[kPairs]) const {
    constexpr int kOneLoad = static_cast<int>(16 / sizeof(Real));
    constexpr int kSize = kPairs < kOneLoad ? kPairs : kOneLoad;
    using V = Vector<Real, kSize>;
#pragma unroll
    for (int n = 0; n < kPairs; n += kSize) {
      V numbers[kNumbers];
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        numbers[i] = *reinterpret_cast<const V*>(shared + place(first_slot + n, i));
      }
#pragma unroll
      for (int m = 0; m < kSize; ++m) {
        if constexpr (kFullWidth) {
          angles[n + m] = {{numbers[0].get(m), numbers[1].get(m)},
                           {numbers[2].get(m), numbers[3].get(m)}};
        } else {
          angles[n + m] = {numbers[0].get(m), numbers[1].get(m)};
        }
      }
    }
  }

  const Params& params_;
  Part<Index> part_;
  int first_slot_;  // of the pairs of the block, for which the thread finds rotations
  int num_slots_;
  Index first_pair_;            // of the block
  std::uint64_t turns_ = 0;     // the frequency of the first slot
  std::uint64_t position_ = 0;  // of the token
  bool lacks_row_ = false;
  Index token_[kTokenArrays] = {};
  Column<scalar_t, kPairs, kInterleaved, Index> column_;
  RowsInFlight<scalar_t, kPairs, kInterleaved, Index, kRows> rows_;
};

// ---- A thread that finds its own rotations, for two tokens ----

inline constexpr int kFewRowsThreads = 128;
inline constexpr int kFewRowsBlocksPerProcessor = 4;  // with 128 registers
inline constexpr int kTokensOfFewRows = 2;            // of a thread

// Its block has all columns (x), and tokens (y, and y + blockDim.y); of a token all rows.
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

  C10_HOST_DEVICE void read_frequencies() {
    if (params_.source == AngleSource::kTurns && is_rotated_) {
      using Two = Vector<double, 2>;  // 16 bytes
      const auto* words = static_cast<const std::uint64_t*>(params_.position_angles.inv_freq);
#pragma unroll
      for (int i = 0; i < kPairs; i += 2) {
        const Two two = *reinterpret_cast<const Two*>(words + (column_index_ * kPairs + i));
        turns_[i] = two.bits(0);
        turns_[i + 1] = two.bits(1);
      }
    }
  }

  C10_HOST_DEVICE void rotate_rows() {
    column_ = find_column<scalar_t, kPairs, kInterleaved>(params_, column_index_);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      // Beyond the last token the last one is rotated again, and not stored.
      const Index last = params_.blocks.tokens - 1;
      params_.operands.tokens.offsets(token(t) < last ? token(t) : last, tokens_[t]);
    }
    std::uint64_t positions[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      positions[t] = load_position_in_turns(params_, tokens_[t][kAngle]);
    }
    load(0);
    Rotation<Real> angles[kTokens][kPairs];
    if (is_rotated_) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        std::uint64_t turns[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          turns[i] = positions[t] * turns_[i];
        }
        find_rotations_by_position<false>(params_, tokens_[t][kAngle],
                                          static_cast<Index>(column_index_ * kPairs), turns,
                                          angles[t]);
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
          rows_.rotate(t, angles[t]);
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
      rows_.load(t, find_row<scalar_t>(params_.operands, params_.blocks.q_rows, row, tokens_[t]),
                 column_);
    }
  }

  const Params& params_;
  Index column_index_;
  int token_step_;
  Index first_token_;
  bool is_rotated_;
  std::uint64_t turns_[kPairs] = {};
  Column<scalar_t, kPairs, kInterleaved, Index> column_;
  Index tokens_[kTokens][kTokenArrays];
  RowsInFlight<scalar_t, kPairs, kInterleaved, Index, kTokens> rows_;
};

}  // namespace rope::cuda
