// How a launch that normalizes is divided into blocks, and which kernel runs it: NOTE [ Plans ].
#pragma once

#include <ATen/ceil_div.h>

#include <algorithm>
#include <cstdint>

#include "cuda/cooperation.h"
#include "cuda/norm_columns.h"
#include "cuda/plan.h"
#include "cuda/wide_norm.h"
#include "launch.h"

namespace rope::cuda {

struct NormPlan : Plan {
  bool is_wide;  // a kernel for norms of any kind, with `wide`
  WideBlocks wide;
};

// For tests, which compare the kernels.
enum class NormKernels : int { kAll, kWide, kWideByElements };

inline NormPlan make_norm_plan(const Launch& launch, NormKernels allowed = NormKernels::kAll);

// For gradients. blockIdx.x counts parts of the sums for the gradients of weights; num_parts may be
// larger: NOTE [ How a block differentiates norms ].
struct NormGradientPlan : NormPlan {
  std::int64_t num_parts;
  int row_lanes[2];
  int token_lanes[2];
  int token_steps[2];
  bool sums_in_registers[2];
  bool has_lane_parts[2];
};

inline NormGradientPlan make_norm_gradient_plan(const Launch& launch,
                                                NormKernels allowed = NormKernels::kAll);

// Declared in the order of calls.
inline NormPlan begin_plan(const Launch& launch);
inline bool has_usual_rows(const Launch& launch);
inline NormPlan make_wide_plan(const Launch& launch, NormKernels allowed);

// The lanes of a row: NOTE [ Sums over a row ].
inline int norm_lanes(std::int64_t columns) {
  int lanes = 1;
  while (lanes < columns && lanes < kWarpSize) {
    lanes *= 2;
  }
  return lanes;
}

// Whether all rows of the operand have the same weight, or none.
inline bool has_one_weight(const Operand& x) {
  return x.norm.weight == nullptr || x.norm.weight_numel == x.axis_size;
}

inline NormPlan make_norm_plan(const Launch& launch, NormKernels allowed) {
  constexpr std::int64_t kMinRows = 8;
  constexpr std::int64_t kMaxRows = 64;
  NormPlan plan = begin_plan(launch);
  if (plan.blocks.tokens == 0 || plan.blocks.rows == 0) {
    return plan;
  }
  if (allowed != NormKernels::kAll || !has_usual_rows(launch)) {
    return make_wide_plan(launch, allowed);
  }
  Blocks<std::int64_t>& blocks = plan.blocks;
  blocks.block_columns = norm_lanes(blocks.columns);
  blocks.column_groups = 1;
  group_rows(blocks.tokens, kMinRows, kMaxRows, plan);
  const std::int64_t rows = blocks.rows_per_block;
  blocks.row_lanes = balance_lanes(rows, rows <= 10 ? 1 : rows_in_flight(true),
                                   kMaxThreads / blocks.block_columns);
  group_tokens(1, plan);
  plan.grid_x = at::ceil_div<std::int64_t>(blocks.tokens, blocks.block_tokens);
  plan.block_x = blocks.block_columns;
  plan.block_y = blocks.row_lanes;
  plan.block_z = blocks.block_tokens;
  return needs_64bit_index(launch, plan) ? make_wide_plan(launch, allowed) : plan;
}

// Counts, without blocks.
inline NormPlan begin_plan(const Launch& launch) {
  NormPlan plan{};
  plan.uses_vectors = can_use_vectors(launch, /*with_others=*/true);
  Blocks<std::int64_t>& blocks = plan.blocks;
  count_rows(launch, plan);
  // Columns are those of vectors, also where elements are accessed one by one.
  const std::int64_t pairs = vector_elements(launch.dtype);
  std::int64_t others = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    others = std::max(others, launch.operands[i].axis_size - 2 * launch.num_pairs);
  }
  blocks.rotated_columns = at::ceil_div(launch.num_pairs, pairs);
  blocks.columns = blocks.rotated_columns + at::ceil_div(others, 2 * pairs);
  blocks.lanes = Lanes::kColumns;
  blocks.column_groups = 1;
  return plan;
}

// Whether every row has a mean of its own, which takes the lanes of a warp one vector each, and all
// rows of an operand have one weight.
inline bool has_usual_rows(const Launch& launch) {
  bool usual = can_use_vectors(launch, /*with_others=*/true);
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    usual = usual && x.norm.num_members == 1 && has_one_weight(x);
  }
  return usual && begin_plan(launch).blocks.columns <= kWarpSize;
}

// ---- Norms of any kind ----

// Shared memory for the rotations of a block's tokens, in elements of the opmath type.
inline constexpr std::int64_t kMostSharedRotations = 4096;

// The lanes of a token: row lanes of a mean, or one lane for each of some means.
inline void choose_wide_lanes(const Launch& launch, int max_threads, WideBlocks& wide) {
  std::int64_t members = 1;
  std::int64_t means = 1;
  for (int i = 0; i < launch.num_operands; ++i) {
    members = std::max(members, wide.members[i]);
    means = std::max(means, wide.means[i]);
  }
  wide.shares_mean = members > 1;
  wide.row_lanes = wide.mean_lanes = 1;
  if (!wide.shares_mean) {
    wide.mean_lanes = balance_lanes(means, 1, kMaxThreads / wide.column_lanes);
    return;
  }
  // Whole warps, which add up the sums of the rows.
  const int step = kWarpSize / wide.column_lanes;
  const int lanes = balance_lanes(members, 1, max_threads / wide.column_lanes);
  wide.row_lanes = at::ceil_div(lanes, step) * step;
}

// Groups of means, of one operand each: more where there are few tokens.
inline void group_means(const Launch& launch, std::int64_t tokens, WideBlocks& wide) {
  constexpr std::int64_t kMostMeans = 64;     // of a block, unless the grid is too large
  constexpr std::int64_t kMaxGroups = 32767;  // of an operand: gridDim.y is below 65,536
  std::int64_t means = 1;
  for (int i = 0; i < launch.num_operands; ++i) {
    means = std::max(means, wide.means[i]);
  }
  const std::int64_t wanted = at::ceil_div<std::int64_t>(kEnoughBlocks, tokens);
  const std::int64_t most = wide.shares_mean ? 1 : kMostMeans;
  wide.means_per_block = std::max({std::int64_t{1}, std::min(most, at::ceil_div(means, wanted)),
                                   at::ceil_div(means, kMaxGroups)});
  for (int i = 0; i < launch.num_operands; ++i) {
    wide.groups[i] = at::ceil_div(wide.means[i], wide.means_per_block);
  }
  wide.mean_lanes = static_cast<int>(std::min<std::int64_t>(wide.mean_lanes, wide.means_per_block));
}

inline NormPlan make_wide_plan(const Launch& launch, NormKernels allowed) {
  constexpr std::int64_t kUsualWideThreads = 128;
  NormPlan plan = begin_plan(launch);
  Blocks<std::int64_t>& blocks = plan.blocks;
  WideBlocks& wide = plan.wide;
  plan.is_wide = true;
  if (allowed == NormKernels::kWideByElements || needs_64bit_index(launch, plan)) {
    plan.uses_vectors = false;
  }
  plan.index_is_64bit = !plan.uses_vectors;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    wide.members[i] = x.norm.num_members;
    wide.means[i] = x.heads.count() / x.norm.num_members;
  }
  wide.column_lanes = norm_lanes(blocks.columns);
  wide.column_steps =
      static_cast<int>(at::ceil_div<std::int64_t>(blocks.columns, wide.column_lanes));
  choose_wide_lanes(
      launch, plan.index_is_64bit ? kMaxWideThreads<std::int64_t> : kMaxWideThreads<std::int32_t>,
      wide);
  group_means(launch, blocks.tokens, wide);

  plan.block_x = wide.column_lanes;
  plan.block_y = wide.mean_lanes * wide.row_lanes;
  plan.grid_y = wide.groups[0] + wide.groups[1];
  blocks.block_columns = static_cast<int>(blocks.rotated_columns);
  const std::int64_t rotations = 4 * blocks.rotated_columns * vector_elements(launch.dtype);
  blocks.block_tokens = 1;
  if (!wide.shares_mean) {
    const std::int64_t enough = blocks.tokens * plan.grid_y / kEnoughBlocks;
    const std::int64_t fit = kMostSharedRotations / std::max<std::int64_t>(rotations, 64);
    blocks.block_tokens = static_cast<int>(std::clamp<std::int64_t>(
        std::min({kUsualWideThreads / (plan.block_x * plan.block_y), enough, fit}), 1, 64));
  }
  plan.block_z = blocks.block_tokens;
  wide.token_steps = 1;
  wide.grid_x = plan.grid_x = at::ceil_div<std::int64_t>(blocks.tokens, blocks.block_tokens);
  return plan;
}

// ---- Gradients ----

// Blocks of each operand: enough for a large device, and few enough for their sums to be added up
// quickly.
inline constexpr std::int64_t kNormGradientBlocks = 512;

inline std::int64_t rows_of(const Blocks<std::int64_t>& blocks, int operand) {
  return operand == 0 ? blocks.q_rows : blocks.rows - blocks.q_rows;
}

inline NormGradientPlan make_usual_gradient_plan(const Launch& launch) {
  NormGradientPlan plan{};
  static_cast<NormPlan&>(plan) = begin_plan(launch);
  Blocks<std::int64_t>& blocks = plan.blocks;
  blocks.block_columns = norm_lanes(blocks.columns);
  const int most_lanes = kNormGradientThreads / blocks.block_columns;
  int most_row_lanes = 1;
  for (int i = 0; i < launch.num_operands; ++i) {
    plan.row_lanes[i] = balance_lanes(rows_of(blocks, i), rows_in_flight(true), most_lanes);
    most_row_lanes = std::max(most_row_lanes, plan.row_lanes[i]);
  }
  const std::int64_t lanes = most_lanes / most_row_lanes * most_row_lanes;
  const std::int64_t enough = std::clamp<std::int64_t>(blocks.tokens / kEnoughBlocks, 1, 64);
  blocks.row_lanes = blocks.block_tokens = 1;
  for (int i = 0; i < launch.num_operands; ++i) {
    plan.token_lanes[i] = static_cast<int>(std::min(lanes / plan.row_lanes[i], enough));
    blocks.block_tokens = std::max(blocks.block_tokens, plan.token_lanes[i]);
    blocks.row_lanes = std::max(blocks.row_lanes, plan.row_lanes[i] * plan.token_lanes[i]);
    plan.grid_x =
        std::max(plan.grid_x, at::ceil_div<std::int64_t>(blocks.tokens, plan.token_lanes[i]));
  }
  plan.grid_x = plan.num_parts = std::min(plan.grid_x, kNormGradientBlocks);
  for (int i = 0; i < launch.num_operands; ++i) {
    plan.token_steps[i] = static_cast<int>(
        at::ceil_div<std::int64_t>(blocks.tokens, plan.grid_x * plan.token_lanes[i]));
  }
  for (int i = launch.num_operands; i < 2; ++i) {
    plan.row_lanes[i] = plan.token_lanes[i] = 1;
  }
  plan.grid_y = launch.num_operands;
  plan.block_x = blocks.block_columns;
  plan.block_y = blocks.row_lanes;
  plan.block_z = 1;
  return plan;
}

inline NormGradientPlan make_wide_gradient_plan(const Launch& launch, NormKernels allowed) {
  constexpr std::int64_t kMostSums = std::int64_t{1} << 23;  // of all parts, of an operand
  NormGradientPlan plan{};
  static_cast<NormPlan&>(plan) = make_wide_plan(launch, allowed);
  Blocks<std::int64_t>& blocks = plan.blocks;
  WideBlocks& wide = plan.wide;
  const std::int64_t lanes = wide.mean_lanes * wide.row_lanes;
  std::int64_t parts_of_block = 1;
  std::int64_t sums = 1;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    const bool one_weight = has_one_weight(x);
    const bool own_row =
        wide.means_per_block == wide.mean_lanes && wide.members[i] <= wide.row_lanes;
    plan.sums_in_registers[i] = wide.column_steps == 1 && (one_weight || own_row);
    // Rows whose weights differ never meet in an element of a part.
    plan.has_lane_parts[i] =
        x.norm.weight != nullptr && x.norm.weight_numel != x.heads.count() * x.axis_size;
    if (plan.has_lane_parts[i]) {
      parts_of_block = std::max(parts_of_block, wide.groups[i] * lanes);
    }
    sums = std::max(sums, x.norm.weight_numel);
  }
  parts_of_block *= blocks.block_tokens;
  const std::int64_t most = std::min(at::ceil_div(2 * kNormGradientBlocks, plan.grid_y),
                                     kMostSums / (sums * parts_of_block));
  wide.token_steps =
      static_cast<int>(at::ceil_div(plan.grid_x, std::clamp<std::int64_t>(most, 1, plan.grid_x)));
  wide.grid_x = plan.grid_x = at::ceil_div<std::int64_t>(plan.grid_x, wide.token_steps);
  plan.num_parts = plan.grid_x * parts_of_block;
  return plan;
}

inline NormGradientPlan make_norm_gradient_plan(const Launch& launch, NormKernels allowed) {
  if (launch.tokens.count() == 0 || launch.operands[0].heads.count() == 0) {
    return {};
  }
  if (allowed == NormKernels::kAll && has_usual_rows(launch)) {
    const NormGradientPlan plan = make_usual_gradient_plan(launch);
    if (!needs_64bit_index(launch, plan)) {
      return plan;
    }
  }
  return make_wide_gradient_plan(launch, allowed);
}

}  // namespace rope::cuda
