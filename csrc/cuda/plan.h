// How a launch is cut into blocks for a CUDA device, and the parameters of its kernel: plain host
// code, so that tests see the same choices.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/rotate_kernel.h"
#include "cuda/sum_kernel.h"
#include "cuda/turns.h"
#include "launch.h"

namespace rope::cuda {

// What threadIdx and blockIdx count up to, and the choice of a kernel.
struct Plan {
  Blocks<std::int64_t> blocks;
  std::int64_t grid_x;  // 0: there is nothing to do
  std::int64_t grid_y;
  int block_x, block_y, block_z;
  bool uses_vectors;  // 16 bytes at a time, instead of single elements
  bool index_is_64bit;
  bool has_few_rows;  // RotateFewRowsThread
};

// ---- Vectors ----

// Elements of 16 bytes.
inline std::int64_t vector_elements(c10::ScalarType dtype) {
  return 16 / static_cast<std::int64_t>(c10::elementSize(dtype));
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether x has elements around the rotated slice that have to be copied. In place they are where
// they belong.
inline bool copies_others(const Operand& x) { return x.in != x.out; }

// Whether every row begins at a multiple of 16 bytes, and the slice and what is around it are whole
// vectors.
inline bool can_use_vectors(const Launch& launch, bool with_others) {
  const std::int64_t size = vector_elements(launch.dtype);
  bool aligned = launch.num_pairs % size == 0 && launch.rotary_offset % size == 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    aligned = aligned && x.in_axis_stride == 1 && x.out_axis_stride == 1;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.in) % 16 == 0;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.out) % 16 == 0;
    aligned = aligned && !(with_others && copies_others(x) && x.axis_size % size != 0);
    for (int d = 0; d < x.heads.num_dims; ++d) {
      aligned = aligned && x.heads.strides[0][d] % size == 0 && x.heads.strides[1][d] % size == 0;
    }
    for (int d = 0; d < launch.tokens.num_dims; ++d) {
      aligned = aligned && launch.tokens.strides[kIn + 2 * i][d] % size == 0 &&
                launch.tokens.strides[kOut + 2 * i][d] % size == 0;
    }
  }
  return aligned;
}

inline std::int64_t pairs_per_column(const Launch& launch, const Plan& plan) {
  return plan.uses_vectors ? vector_elements(launch.dtype) : 1;
}

// ---- Indices ----

// The farthest that a loops leads for any of its arrays, in elements.
template <int kArrays>
std::int64_t extent(const Loops<kArrays>& loops) {
  std::int64_t farthest = 0;
  for (const auto& strides : loops.strides) {
    std::int64_t sum = 0;
    for (int d = 0; d < loops.num_dims; ++d) {
      sum += (loops.sizes[d] - 1) * strides[d];
    }
    farthest = std::max(farthest, sum);
  }
  return farthest;
}

// The farthest that an element of the launch is from where its array begins, in elements.
inline std::int64_t farthest_element(const Launch& launch) {
  std::int64_t farthest = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    const std::int64_t along_axis =
        (x.axis_size - 1) * std::max({x.in_axis_stride, x.out_axis_stride, std::int64_t{1}});
    farthest = std::max(farthest, extent(launch.tokens) + extent(x.heads) + along_axis);
  }
  return farthest;
}

inline bool needs_64bit_index(const Launch& launch, const Plan& plan) {
  bool few_dims = launch.tokens.num_dims <= kLoopDims<std::int32_t>;
  for (int i = 0; i < launch.num_operands; ++i) {
    few_dims = few_dims && launch.operands[i].heads.num_dims <= kLoopDims<std::int32_t>;
  }
  // Counters go beyond the last element by a block's worth.
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - (1 << 16);
  const Blocks<std::int64_t>& blocks = plan.blocks;
  const std::int64_t most_counted = std::max({blocks.tokens, blocks.rows + blocks.rows_per_block,
                                              2 * blocks.columns * pairs_per_column(launch, plan)});
  return !few_dims || most_counted > kMost ||
         farthest_element(launch) > std::numeric_limits<std::int32_t>::max();
}

// ---- Blocks ----

// A large device has some 130 to 150 processors, and each takes several blocks. (Nobody asks the
// device: results of few tokens would then depend on it.)
inline constexpr std::int64_t kEnoughBlocks = 256;

// A block whose rows fit would not gain by more threads.
inline constexpr std::int64_t kUsualThreads = 160;

// Along which dimension memory is contiguous.
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
  const Loops<kTokenArrays>& tokens = launch.tokens;
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

// Cuts the rows of a token into groups, one for each block: at most max_rows in one, and where
// there are few blocks, down to min_rows.
inline void group_rows(std::int64_t blocks_of_a_group, std::int64_t min_rows, std::int64_t max_rows,
                       Plan& plan) {
  constexpr std::int64_t kMostGroups = 65535;  // of a grid's second dimension
  Blocks<std::int64_t>& blocks = plan.blocks;
  const std::int64_t fewest = ceil_div(blocks.rows, max_rows);
  const std::int64_t most = std::max(ceil_div(blocks.rows, min_rows), fewest);
  const std::int64_t groups = std::clamp(
      ceil_div(kEnoughBlocks, std::max<std::int64_t>(blocks_of_a_group, 1)), fewest, most);
  blocks.rows_per_block = ceil_div(blocks.rows, std::clamp<std::int64_t>(groups, 1, kMostGroups));
  plan.grid_y = ceil_div(blocks.rows, blocks.rows_per_block);
}

// Lanes for the rows of a block, each of which takes rows_at_once at a time: at most max_lanes,
// and as few as take no longer.
inline int balance_lanes(std::int64_t rows, std::int64_t rows_at_once, std::int64_t max_lanes) {
  const std::int64_t rounds = ceil_div(rows, rows_at_once * max_lanes);
  return static_cast<int>(ceil_div(rows, rows_at_once * rounds));
}

// The plan for columns of which some are rotated, and the rows of every operand.
inline Plan make_plan(const Launch& launch, bool uses_vectors, std::int64_t rotated_columns,
                      std::int64_t other_columns, std::int64_t min_rows, std::int64_t max_rows) {
  Plan plan{};
  plan.uses_vectors = uses_vectors;
  Blocks<std::int64_t>& blocks = plan.blocks;
  blocks.tokens = launch.tokens.count();
  blocks.q_rows = launch.operands[0].heads.count();
  for (int i = 0; i < launch.num_operands; ++i) {
    blocks.rows += launch.operands[i].heads.count();
  }
  blocks.rotated_columns = rotated_columns;
  blocks.columns = rotated_columns + other_columns;
  blocks.lanes = choose_lanes(launch, uses_vectors);
  if (blocks.tokens == 0 || blocks.rows == 0 || blocks.columns == 0) {
    return plan;
  }

  // The two dimensions with which memory is contiguous first, then the third.
  constexpr std::int64_t kWarp = 32;
  constexpr std::int64_t kMostColumns = 128;
  const auto split_columns = [&](std::int64_t most) {
    const std::int64_t groups = ceil_div(blocks.columns, most);
    blocks.block_columns = static_cast<int>(ceil_div(blocks.columns, groups));
    blocks.column_groups =
        static_cast<std::uint32_t>(ceil_div(blocks.columns, blocks.block_columns));
    return static_cast<std::int64_t>(blocks.column_groups.divisor);
  };
  // As many tokens as make up for few rows and columns, while there are blocks enough.
  const auto join_tokens = [&](std::int64_t column_groups) {
    const std::int64_t threads = blocks.block_columns * blocks.row_lanes;
    const std::int64_t enough = blocks.tokens * column_groups * plan.grid_y / kEnoughBlocks;
    blocks.block_tokens = static_cast<int>(std::clamp<std::int64_t>(
        std::min(kUsualThreads / threads, enough), 1, 64));  // 64: the limit of blockDim.z
  };
  if (blocks.lanes == Lanes::kTokens) {
    blocks.block_tokens = static_cast<int>(std::min(blocks.tokens, kWarp));
    const std::int64_t groups = split_columns(kMaxThreads / blocks.block_tokens);
    group_rows(ceil_div(blocks.tokens, blocks.block_tokens) * groups, min_rows, max_rows, plan);
    blocks.row_lanes = 1;
  } else if (blocks.lanes == Lanes::kRows) {
    const std::int64_t warp = std::min(blocks.rows, kWarp);
    const std::int64_t groups = split_columns(kMaxThreads / warp);
    group_rows(blocks.tokens * groups, std::max(min_rows, warp), std::max(max_rows, warp), plan);
    blocks.row_lanes = static_cast<int>(std::min(blocks.rows_per_block, warp));
    join_tokens(groups);
  } else {
    const std::int64_t groups = split_columns(kMostColumns);
    group_rows(blocks.tokens * groups, min_rows, max_rows, plan);
    // A few rows have a lane each.
    const std::int64_t rows = blocks.rows_per_block;
    const std::int64_t most_lanes = kMaxThreads / blocks.block_columns;
    blocks.row_lanes =
        balance_lanes(rows, rows <= 10 ? 1 : rows_in_flight(uses_vectors), most_lanes);
    join_tokens(groups);
  }
  plan.grid_x = ceil_div(blocks.tokens, blocks.block_tokens) * blocks.column_groups.divisor;
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

// ---- Rotation ----

inline AngleSource angle_source(const Launch& launch) {
  if (launch.uses_tables) {
    return AngleSource::kTables;
  }
  if (has_turns(launch)) {
    return AngleSource::kTurns;
  }
  return launch.position_angles.inv_freq_dtype == c10::ScalarType::Float ? AngleSource::kFloat32
                                                                         : AngleSource::kFloat64;
}

// Rows of a token up to which each thread finds its own rotations.
inline constexpr std::int64_t kFewRows = 4;

// Whether each thread is to find its own rotations, and how many tokens a block then has.
inline void use_few_rows(const Launch& launch, std::int64_t few_rows, Plan& plan) {
  Blocks<std::int64_t>& blocks = plan.blocks;
  const AngleSource source = angle_source(launch);
  if (!plan.uses_vectors || plan.index_is_64bit || launch.dtype == c10::ScalarType::Double ||
      !(source == AngleSource::kTurns || source == AngleSource::kFloat32) ||
      blocks.rows > few_rows || blocks.column_groups.divisor > 1) {
    return;
  }
  plan.has_few_rows = true;
  const std::int64_t most = kFewRowsThreads / blocks.block_columns;
  const std::int64_t least = std::min<std::int64_t>(ceil_div(32, blocks.block_columns), most);
  const std::int64_t lanes =
      std::clamp(ceil_div(blocks.tokens, kTokensOfFewRows * kEnoughBlocks), least, most);
  blocks.block_tokens = static_cast<int>(kTokensOfFewRows * lanes);
  blocks.rows_per_block = blocks.rows;
  plan.grid_x = ceil_div(blocks.tokens, blocks.block_tokens);
  plan.grid_y = 1;
  plan.block_x = blocks.block_columns;
  plan.block_y = static_cast<int>(lanes);
  plan.block_z = 1;
}

// few_rows is for tests alone, which compare the two kernels.
inline Plan make_rotate_plan(const Launch& launch, std::int64_t few_rows = kFewRows) {
  // Rows of a block: what a rotation costs is little beside that of 64 rows.
  constexpr std::int64_t kMostRows = 64;
  constexpr std::int64_t kFewestRows = 8;
  const bool uses_vectors = can_use_vectors(launch, /*with_others=*/true);
  const std::int64_t pairs = uses_vectors ? vector_elements(launch.dtype) : 1;
  std::int64_t others = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    if (copies_others(x)) {
      others = std::max(others, x.axis_size - 2 * launch.num_pairs);
    }
  }
  Plan plan = make_plan(launch, uses_vectors, ceil_div(launch.num_pairs, pairs),
                        ceil_div(others, 2 * pairs), kFewestRows, kMostRows);
  if (plan.grid_x > 0) {
    use_few_rows(launch, few_rows, plan);
  }
  return plan;
}

// ---- Sums ----

// The plan for the sums of a launch: NOTE [ Sums ].
inline Plan make_sum_plan(const Launch& launch) {
  // What a group of rows costs, sums that are written and read again, stays small beside its rows.
  constexpr std::int64_t kFewestRows = 16;
  constexpr std::int64_t kMostRows = std::numeric_limits<std::int64_t>::max() / 2;
  const bool uses_vectors = can_use_vectors(launch, /*with_others=*/false);
  const std::int64_t pairs = uses_vectors ? vector_elements(launch.dtype) : 1;
  return make_plan(launch, uses_vectors, ceil_div(launch.num_pairs, pairs), 0, kFewestRows,
                   kMostRows);
}

// ---- Parameters ----

template <typename Index>
Blocks<Index> blocks_of(const Plan& plan) {
  const Blocks<std::int64_t>& from = plan.blocks;
  const auto narrow = [](std::int64_t number) { return static_cast<Index>(number); };
  return {.tokens = narrow(from.tokens),
          .rows = narrow(from.rows),
          .q_rows = narrow(from.q_rows),
          .rows_per_block = narrow(from.rows_per_block),
          .columns = narrow(from.columns),
          .rotated_columns = narrow(from.rotated_columns),
          .block_columns = from.block_columns,
          .row_lanes = from.row_lanes,
          .block_tokens = from.block_tokens,
          .lanes = from.lanes,
          .column_groups = from.column_groups};
}

template <typename Index, int kArrays>
LoopsOf<Index, kArrays> loops_of(const Loops<kArrays>& from) {
  TORCH_INTERNAL_ASSERT(from.num_dims <= kLoopDims<Index>);
  LoopsOf<Index, kArrays> loops{};
  loops.num_dims = from.num_dims;
  for (int d = 0; d < from.num_dims; ++d) {
    loops.sizes[d] = static_cast<std::make_unsigned_t<Index>>(from.sizes[d]);
    for (int array = 0; array < kArrays; ++array) {
      loops.strides[array][d] = static_cast<Index>(from.strides[array][d]);
    }
  }
  return loops;
}

template <typename Index>
Operands<Index> operands_of(const Launch& launch) {
  Operands<Index> operands{};
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    // In place there is nothing to do around the slice.
    const std::int64_t size =
        copies_others(x) ? x.axis_size : launch.rotary_offset + 2 * launch.num_pairs;
    operands.x[i] = {x.in,
                     x.out,
                     static_cast<Index>(size),
                     static_cast<Index>(x.in_axis_stride),
                     static_cast<Index>(x.out_axis_stride),
                     loops_of<Index>(x.heads)};
  }
  operands.tokens = loops_of<Index>(launch.tokens);
  operands.num_pairs = static_cast<Index>(launch.num_pairs);
  operands.rotary_offset = static_cast<Index>(launch.rotary_offset);
  operands.interleaved = launch.interleaved;
  return operands;
}

// frequencies: device memory with those of max_wavelength, in turns where the source is kTurns.
template <typename Index>
RotateParams<Index> rotate_params(const Launch& launch, const Plan& plan, const void* frequencies) {
  RotateParams<Index> params{};
  params.blocks = blocks_of<Index>(plan);
  params.operands = operands_of<Index>(launch);
  params.source = angle_source(launch);
  params.conjugate = launch.conjugate;
  if (launch.uses_tables) {
    params.table_angles = launch.table_angles;
  } else {
    params.position_angles = launch.position_angles;
    if (launch.position_angles.inv_freq == nullptr) {
      params.position_angles.inv_freq = frequencies;
      params.position_angles.inv_freq_stride = 1;
    }
  }
  return params;
}

template <typename Index>
SumParams<Index> sum_params(const Launch& launch, const Plan& plan, const Sums& sums) {
  return {blocks_of<Index>(plan), operands_of<Index>(launch), launch.conjugate, sums};
}

// ---- Kernels ----

// Calls run with the type of a thread, for the dtype, the kind of indices and the order of pairs:
// on the host and on the device the same.
template <typename Run>
void with_scalar(c10::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return run(double{});
    case c10::ScalarType::Float:
      return run(float{});
    case c10::ScalarType::Half:
      return run(c10::Half{});
    case c10::ScalarType::BFloat16:
      return run(c10::BFloat16{});
    default:
      throw_unsupported_dtype(dtype);
  }
}

template <typename Run>
void with_bool(bool value, const Run& run) {
  value ? run(std::true_type{}) : run(std::false_type{});
}

template <template <typename, int, bool, typename, bool> typename Thread, typename Run>
void with_thread(const Launch& launch, const Plan& plan, const Run& run) {
  with_scalar(launch.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    constexpr int kPairs = 16 / sizeof(scalar_t);
    with_bool(plan.index_is_64bit, [&](auto is_64bit) {
      using Index = std::conditional_t<is_64bit, std::int64_t, std::int32_t>;
      with_bool(has_full_width(launch), [&](auto full_width) {
        if (!plan.uses_vectors) {
          return run(std::type_identity<Thread<scalar_t, 1, false, Index, full_width>>{});
        }
        with_bool(launch.interleaved, [&](auto interleaved) {
          run(std::type_identity<Thread<scalar_t, kPairs, interleaved, Index, full_width>>{});
        });
      });
    });
  });
}

template <typename Run>
void with_few_rows_thread(const Launch& launch, const Run& run) {
  with_scalar(launch.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if constexpr (std::is_same_v<scalar_t, double>) {
      TORCH_INTERNAL_ASSERT(false, "float64 has no such kernel");
    } else {
      with_bool(launch.interleaved, [&](auto interleaved) {
        run(std::type_identity<
            RotateFewRowsThread<scalar_t, 16 / sizeof(scalar_t), interleaved, std::int32_t>>{});
      });
    }
  });
}

// Shared memory of a block.
template <typename Thread>
std::size_t shared_bytes(const Plan& plan) {
  return Thread::shared_elements(plan.blocks) * sizeof(typename Thread::Real);
}

}  // namespace rope::cuda
