// How a launch is divided into blocks, and which kernel runs it. Plain host code: tests without a
// device make the same plans.
#pragma once

#include <ATen/ceil_div.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/angles.h"
#include "cuda/block.h"
#include "cuda/rotate_kernel.h"
#include "cuda/turns.h"
#include "launch.h"
#include "unsupported_dtype.h"

namespace rope::cuda {

// NOTE [ Plans ]
//
// make_rotate_plan and make_sum_plan choose, in this order:
//
//   vectors  16 bytes at a time where every row is aligned, else single elements; of float64
//            always elements, as a vector has no more than two
//   lanes    which of columns, tokens and rows threadIdx.x counts: the contiguous one
//   groups   how many blocks the rows of a token, and the columns of a row, are divided among:
//            more where there are few tokens
//   block    how many columns, row lanes and tokens the threads of a block cover
//   indices  32 bits where they suffice, else 64; offsets of rows count vectors where those are
//            used, so that 32 bits reach 32 GiB
//
// For rotations of a few rows, use_few_rows then replaces the blocks by those of
// RotateFewRowsThread. Nothing depends on the device: results of few tokens would then differ
// between devices.

// The extents of threadIdx and blockIdx, and the choice of a kernel.
struct Plan {
  Blocks<std::int64_t> blocks;
  std::int64_t grid_x;  // 0: there is nothing to do
  std::int64_t grid_y;
  int block_x, block_y, block_z;
  bool uses_vectors;  // 16 bytes at a time, instead of single elements
  bool index_is_64bit;
  bool has_few_rows;  // RotateFewRowsThread
};

// Rows of a token up to which each thread computes its own rotations.
inline constexpr std::int64_t kFewRows = 4;

// few_rows is for tests, which compare the two kernels.
inline Plan make_rotate_plan(const Launch& launch, std::int64_t few_rows = kFewRows);

// The plan for the sums of a launch: NOTE [ Sums ].
inline Plan make_sum_plan(const Launch& launch);

// Declared in the order of calls.
inline bool can_use_vectors(const Launch& launch, bool with_others);
inline bool moves_others(const Launch& launch, const Operand& x);
inline Plan make_plan(const Launch& launch, bool uses_vectors, std::int64_t rotated_columns,
                      std::int64_t other_columns, std::int64_t min_rows, std::int64_t max_rows);
inline void use_few_rows(const Launch& launch, std::int64_t few_rows, Plan& plan);
inline void count_rows(const Launch& launch, Plan& plan);
inline Lanes choose_lanes(const Launch& launch, bool uses_vectors);
inline void group_rows(std::int64_t blocks_of_a_group, std::int64_t min_rows, std::int64_t max_rows,
                       Plan& plan);
inline void group_tokens(std::int64_t column_groups, Plan& plan);
inline int balance_lanes(std::int64_t rows, std::int64_t rows_at_once, std::int64_t max_lanes);
inline bool needs_64bit_index(const Launch& launch, const Plan& plan);

// Elements in 16 bytes.
inline std::int64_t vector_elements(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return 2;
    case c10::ScalarType::Float:
      return 4;
    case c10::ScalarType::Half:
    case c10::ScalarType::BFloat16:
      return 8;
    default:
      throw_unsupported_dtype(dtype);
  }
}

inline AngleSource angle_source(const Launch& launch) {
  if (launch.uses_tables) {
    return AngleSource::kTables;
  }
  if (uses_turns(launch)) {
    return AngleSource::kTurns;
  }
  return launch.position_angles.inv_freq_dtype == c10::ScalarType::Float ? AngleSource::kFloat32
                                                                         : AngleSource::kFloat64;
}

// ---- The two plans ----

inline Plan make_rotate_plan(const Launch& launch, std::int64_t few_rows) {
  // Rows per block: computing a rotation costs little compared with 64 rows.
  constexpr std::int64_t kMaxRows = 64;
  constexpr std::int64_t kMinRows = 8;
  const bool uses_vectors = can_use_vectors(launch, /*with_others=*/true);
  const std::int64_t pairs = uses_vectors ? vector_elements(launch.dtype) : 1;
  std::int64_t others = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    if (moves_others(launch, x)) {
      others = std::max(others, x.axis_size - 2 * launch.num_pairs);
    }
  }
  Plan plan = make_plan(launch, uses_vectors, at::ceil_div(launch.num_pairs, pairs),
                        at::ceil_div(others, 2 * pairs), kMinRows, kMaxRows);
  if (plan.grid_x > 0) {
    use_few_rows(launch, few_rows, plan);
  }
  return plan;
}

inline Plan make_sum_plan(const Launch& launch) {
  // Each group writes sums that are read again, so it must have enough rows.
  constexpr std::int64_t kMinRows = 16;
  constexpr std::int64_t kMaxRows = std::numeric_limits<std::int64_t>::max() / 2;
  const bool uses_vectors = can_use_vectors(launch, /*with_others=*/false);
  const std::int64_t pairs = uses_vectors ? vector_elements(launch.dtype) : 1;
  return make_plan(launch, uses_vectors, at::ceil_div(launch.num_pairs, pairs), 0, kMinRows,
                   kMaxRows);
}

// ---- Vectors ----

// Whether every row begins at a multiple of 16 bytes, and the rotated slice and, with_others, the
// elements outside it are whole vectors.
inline bool can_use_vectors(const Launch& launch, bool with_others) {
  if (launch.dtype == c10::ScalarType::Double) {
    return false;
  }
  const std::int64_t size = vector_elements(launch.dtype);
  bool aligned = launch.num_pairs % size == 0 && launch.rotary_offset % size == 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    aligned = aligned && x.in_axis_stride == 1 && x.out_axis_stride == 1;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.in) % 16 == 0;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.out) % 16 == 0;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.norm.grad) % 16 == 0;
    aligned = aligned && (x.norm.grad == nullptr || x.norm.grad_axis_stride == 1);
    aligned = aligned && !(with_others && moves_others(launch, x) && x.axis_size % size != 0);
    for (int d = 0; d < x.heads.num_dims; ++d) {
      for (const HeadArray array : {kHeadIn, kHeadOut, kHeadGrad}) {
        aligned = aligned && x.heads.strides[array][d] % size == 0;
      }
    }
    for (int d = 0; d < launch.tokens.num_dims; ++d) {
      for (const int array : {kIn + 2 * i, kOut + 2 * i, kGrad + i}) {
        aligned = aligned && launch.tokens.strides[array][d] % size == 0;
      }
    }
  }
  return aligned;
}

// Whether elements outside the rotated slice have to be written: not those of a rotation in place.
inline bool moves_others(const Launch& launch, const Operand& x) {
  return launch.normalizes || x.in != x.out;
}

// ---- Blocks ----

// A large device has 130 to 150 SMs, each of which runs several blocks at a time.
inline constexpr std::int64_t kEnoughBlocks = 256;

// More threads do not help a block whose rows fit.
inline constexpr std::int64_t kUsualThreads = 160;

inline Plan make_plan(const Launch& launch, bool uses_vectors, std::int64_t rotated_columns,
                      std::int64_t other_columns, std::int64_t min_rows, std::int64_t max_rows) {
  Plan plan{};
  plan.uses_vectors = uses_vectors;
  Blocks<std::int64_t>& blocks = plan.blocks;
  count_rows(launch, plan);
  blocks.rotated_columns = rotated_columns;
  blocks.columns = rotated_columns + other_columns;
  blocks.lanes = choose_lanes(launch, uses_vectors);
  if (blocks.tokens == 0 || blocks.rows == 0 || blocks.columns == 0) {
    return plan;
  }

  // The contiguous dimension and the columns first, then the third dimension.
  constexpr std::int64_t kWarp = 32;
  constexpr std::int64_t kMaxColumns = 128;
  const auto split_columns = [&](std::int64_t most) {
    const std::int64_t groups = at::ceil_div(blocks.columns, most);
    blocks.block_columns = static_cast<int>(at::ceil_div(blocks.columns, groups));
    blocks.column_groups = static_cast<std::uint32_t>(
        at::ceil_div<std::int64_t>(blocks.columns, blocks.block_columns));
    return static_cast<std::int64_t>(blocks.column_groups.divisor);
  };
  if (blocks.lanes == Lanes::kTokens) {
    blocks.block_tokens = static_cast<int>(std::min(blocks.tokens, kWarp));
    const std::int64_t groups = split_columns(kMaxThreads / blocks.block_tokens);
    group_rows(at::ceil_div<std::int64_t>(blocks.tokens, blocks.block_tokens) * groups, min_rows,
               max_rows, plan);
    blocks.row_lanes = 1;
  } else if (blocks.lanes == Lanes::kRows) {
    const std::int64_t warp = std::min(blocks.rows, kWarp);
    const std::int64_t groups = split_columns(kMaxThreads / warp);
    group_rows(blocks.tokens * groups, std::max(min_rows, warp), std::max(max_rows, warp), plan);
    blocks.row_lanes = static_cast<int>(std::min(blocks.rows_per_block, warp));
    group_tokens(groups, plan);
  } else {
    const std::int64_t groups = split_columns(kMaxColumns);
    group_rows(blocks.tokens * groups, min_rows, max_rows, plan);
    // Up to 10 rows have a lane each.
    const std::int64_t rows = blocks.rows_per_block;
    const std::int64_t most_lanes = kMaxThreads / blocks.block_columns;
    blocks.row_lanes =
        balance_lanes(rows, rows <= 10 ? 1 : rows_in_flight(uses_vectors), most_lanes);
    group_tokens(groups, plan);
  }
  plan.grid_x =
      at::ceil_div<std::int64_t>(blocks.tokens, blocks.block_tokens) * blocks.column_groups.divisor;
  const auto set_block = [&](int x, int y, int z) {
    plan.block_x = x;
    plan.block_y = y;
    plan.block_z = z;
  };
  switch (blocks.lanes) {
    case Lanes::kColumns:
      set_block(blocks.block_columns, blocks.row_lanes, blocks.block_tokens);
      break;
    case Lanes::kTokens:
      set_block(blocks.block_tokens, blocks.block_columns, blocks.row_lanes);
      break;
    case Lanes::kRows:
      set_block(blocks.row_lanes, blocks.block_columns, blocks.block_tokens);
      break;
  }
  plan.index_is_64bit = needs_64bit_index(launch, plan);
  return plan;
}

inline void count_rows(const Launch& launch, Plan& plan) {
  plan.blocks.tokens = launch.tokens.count();
  plan.blocks.q_rows = launch.operands[0].heads.count();
  for (int i = 0; i < launch.num_operands; ++i) {
    plan.blocks.rows += launch.operands[i].heads.count();
  }
}

// The dimension along which memory is contiguous.
inline Lanes choose_lanes(const Launch& launch, bool uses_vectors) {
  const auto all_contiguous = [&](const auto& is_contiguous) {
    bool all = true;
    for (int i = 0; i < launch.num_operands; ++i) {
      all = all && is_contiguous(launch.operands[i], i);
    }
    return all;
  };
  if (uses_vectors || all_contiguous([](const Operand& x, int) {
        return x.in_axis_stride == 1 && x.out_axis_stride == 1;
      })) {
    return Lanes::kColumns;
  }
  const auto& tokens = launch.tokens;
  if (tokens.num_dims > 0 && all_contiguous([&](const Operand&, int i) {
        return tokens.strides[kIn + 2 * i][tokens.num_dims - 1] == 1 &&
               tokens.strides[kOut + 2 * i][tokens.num_dims - 1] == 1;
      })) {
    return Lanes::kTokens;
  }
  if (all_contiguous([](const Operand& x, int) {
        const int last = x.heads.num_dims - 1;
        return last >= 0 && x.heads.strides[0][last] == 1 && x.heads.strides[1][last] == 1;
      })) {
    return Lanes::kRows;
  }
  return Lanes::kColumns;
}

// Divides the rows of a token into groups, one per block: at most max_rows in each and, while there
// are too few blocks, as few as min_rows.
inline void group_rows(std::int64_t blocks_of_a_group, std::int64_t min_rows, std::int64_t max_rows,
                       Plan& plan) {
  constexpr std::int64_t kMaxGroups = 65535;  // the limit of gridDim.y
  Blocks<std::int64_t>& blocks = plan.blocks;
  const std::int64_t fewest = at::ceil_div(blocks.rows, max_rows);
  const std::int64_t most = std::max(at::ceil_div(blocks.rows, min_rows), fewest);
  const std::int64_t groups = std::clamp(
      at::ceil_div(kEnoughBlocks, std::max<std::int64_t>(blocks_of_a_group, 1)), fewest, most);
  blocks.rows_per_block =
      at::ceil_div(blocks.rows, std::clamp<std::int64_t>(groups, 1, kMaxGroups));
  plan.grid_y = at::ceil_div(blocks.rows, blocks.rows_per_block);
}

// Enough tokens to make up for few rows and columns, as long as there are enough blocks.
inline void group_tokens(std::int64_t column_groups, Plan& plan) {
  Blocks<std::int64_t>& blocks = plan.blocks;
  const std::int64_t threads = blocks.block_columns * blocks.row_lanes;
  const std::int64_t enough = blocks.tokens * column_groups * plan.grid_y / kEnoughBlocks;
  blocks.block_tokens = static_cast<int>(std::clamp<std::int64_t>(
      std::min(kUsualThreads / threads, enough), 1, 64));  // 64: the limit of blockDim.z
}

// Row lanes for the rows of a block, each lane taking rows_at_once rows per iteration: the fewest
// that need no more iterations than max_lanes.
inline int balance_lanes(std::int64_t rows, std::int64_t rows_at_once, std::int64_t max_lanes) {
  const std::int64_t iterations = at::ceil_div(rows, rows_at_once * max_lanes);
  return static_cast<int>(at::ceil_div(rows, rows_at_once * iterations));
}

// Lets each thread compute its own rotations if that kernel supports the launch and a token has at
// most few_rows rows.
inline void use_few_rows(const Launch& launch, std::int64_t few_rows, Plan& plan) {
  Blocks<std::int64_t>& blocks = plan.blocks;
  const AngleSource source = angle_source(launch);
  if (!plan.uses_vectors || plan.index_is_64bit ||
      !(source == AngleSource::kTurns || source == AngleSource::kFloat32) ||
      blocks.rows > few_rows || blocks.column_groups.divisor > 1) {
    return;
  }
  plan.has_few_rows = true;
  const std::int64_t most = kFewRowsThreads / blocks.block_columns;
  const std::int64_t least = std::min(at::ceil_div<std::int64_t>(32, blocks.block_columns), most);
  const std::int64_t lanes =
      std::clamp(at::ceil_div(blocks.tokens, kTokensOfFewRows * kEnoughBlocks), least, most);
  blocks.block_tokens = static_cast<int>(kTokensOfFewRows * lanes);
  blocks.rows_per_block = blocks.rows;
  plan.grid_x = at::ceil_div<std::int64_t>(blocks.tokens, blocks.block_tokens);
  plan.grid_y = 1;
  plan.block_x = blocks.block_columns;
  plan.block_y = static_cast<int>(lanes);
  plan.block_z = 1;
}

// ---- Indices ----

// What a kernel's offsets count: elements in arrays of weights and angles, and in operands vectors
// of so many elements.
inline std::int64_t offset_unit(const Launch& launch, bool uses_vectors) {
  return uses_vectors ? vector_elements(launch.dtype) : 1;
}

inline bool is_of_operand(HeadArray array) {
  return array == kHeadIn || array == kHeadOut || array == kHeadGrad;
}

inline bool is_of_operand(TokenArray array) { return array >= kIn && array < kGain; }

// The loops with strides that count units. Strides of operands are multiples of the unit.
template <typename Array, int kArrays>
Loops<kArrays> in_units(Loops<kArrays> loops, std::int64_t unit) {
  for (int array = 0; array < kArrays; ++array) {
    if (is_of_operand(static_cast<Array>(array))) {
      for (int d = 0; d < loops.num_dims; ++d) {
        loops.strides[array][d] /= unit;
      }
    }
  }
  return loops;
}

template <int kArrays>
std::int64_t largest_offset(const Loops<kArrays>& loops) {
  std::int64_t largest = 0;
  for (const auto& strides : loops.strides) {
    std::int64_t sum = 0;
    for (int d = 0; d < loops.num_dims; ++d) {
      sum += (loops.sizes[d] - 1) * strides[d];
    }
    largest = std::max(largest, sum);
  }
  return largest;
}

// Of any array, and within rows.
inline std::int64_t largest_offset(const Launch& launch, std::int64_t unit) {
  const std::int64_t of_tokens = largest_offset(in_units<TokenArray>(launch.tokens, unit));
  std::int64_t largest = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    const std::int64_t along_axis =
        (x.axis_size - 1) * std::max({x.in_axis_stride, x.out_axis_stride, std::int64_t{1}});
    largest = std::max(
        {largest, along_axis, of_tokens + largest_offset(in_units<HeadArray>(x.heads, unit))});
  }
  return largest;
}

inline bool needs_64bit_index(const Launch& launch, const Plan& plan) {
  bool few_dims = launch.tokens.num_dims <= kLoopDims<std::int32_t>;
  for (int i = 0; i < launch.num_operands; ++i) {
    few_dims = few_dims && launch.operands[i].heads.num_dims <= kLoopDims<std::int32_t>;
  }
  // Counters exceed the last element by up to a block.
  constexpr std::int64_t kMaxCount = std::numeric_limits<std::int32_t>::max() - (1 << 16);
  const Blocks<std::int64_t>& blocks = plan.blocks;
  const std::int64_t unit = offset_unit(launch, plan.uses_vectors);
  const std::int64_t count =
      std::max({blocks.tokens, blocks.rows + blocks.rows_per_block, 2 * blocks.columns * unit});
  return !few_dims || count > kMaxCount ||
         largest_offset(launch, unit) > std::numeric_limits<std::int32_t>::max();
}

}  // namespace rope::cuda
