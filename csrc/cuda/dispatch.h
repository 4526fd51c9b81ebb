// From a launch and its plan to the type of a kernel's threads and to its parameters. Plain host
// code, for cuda/*.cu and for tests that run the threads on the host.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "angle.h"
#include "cuda/norm_gradient_kernel.h"
#include "cuda/norm_kernel.h"
#include "cuda/norm_plan.h"
#include "cuda/plan.h"
#include "cuda/rotate_kernel.h"
#include "cuda/sum_kernel.h"
#include "launch.h"
#include "unsupported_dtype.h"

namespace rope::cuda {

// ---- The type of a thread ----

template <typename Run>
void dispatch_dtype(c10::ScalarType dtype, const Run& run) {
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

// Of launches that use vectors.
template <typename Run>
void dispatch_vector_dtype(c10::ScalarType dtype, const Run& run) {
  dispatch_dtype(dtype, [&](auto scalar) {
    if constexpr (std::is_same_v<decltype(scalar), double>) {
      throw_unsupported_dtype(dtype);
    } else {
      run(scalar);
    }
  });
}

template <typename Run>
void dispatch_bool(bool value, const Run& run) {
  value ? run(std::true_type{}) : run(std::false_type{});
}

// Calls run with the std::type_identity of a RotateThread or SumThread.
template <template <typename, int, bool, typename, bool> typename Thread, typename Run>
void dispatch_thread(const Launch& launch, const Plan& plan, const Run& run) {
  dispatch_bool(plan.index_is_64bit, [&](auto is_64bit) {
    using Index = std::conditional_t<is_64bit, std::int64_t, std::int32_t>;
    dispatch_bool(has_full_width(launch), [&](auto full_width) {
      if (!plan.uses_vectors) {
        return dispatch_dtype(launch.dtype, [&](auto scalar) {
          run(std::type_identity<Thread<decltype(scalar), 1, false, Index, full_width>>{});
        });
      }
      dispatch_vector_dtype(launch.dtype, [&](auto scalar) {
        using scalar_t = decltype(scalar);
        dispatch_bool(launch.interleaved, [&](auto interleaved) {
          run(std::type_identity<
              Thread<scalar_t, 16 / sizeof(scalar_t), interleaved, Index, full_width>>{});
        });
      });
    });
  });
}

// Likewise of a RotateFewRowsThread.
template <typename Run>
void dispatch_few_rows_thread(const Launch& launch, const Run& run) {
  dispatch_vector_dtype(launch.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    dispatch_bool(launch.interleaved, [&](auto interleaved) {
      run(std::type_identity<
          RotateFewRowsThread<scalar_t, 16 / sizeof(scalar_t), interleaved, std::int32_t>>{});
    });
  });
}

// Likewise of a NormThread or NormGradientThread, for plans that are not wide.
template <template <typename, int, bool, typename, bool> typename Thread, typename Run>
void dispatch_norm_thread(const Launch& launch, const Run& run) {
  dispatch_vector_dtype(launch.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    dispatch_bool(has_full_width(launch), [&](auto full_width) {
      dispatch_bool(launch.interleaved, [&](auto interleaved) {
        run(std::type_identity<
            Thread<scalar_t, 16 / sizeof(scalar_t), interleaved, std::int32_t, full_width>>{});
      });
    });
  });
}

// Likewise of a WideNormThread or WideNormGradientThread.
template <template <typename, int, bool, typename> typename Thread, typename Run>
void dispatch_wide_norm_thread(const Launch& launch, const NormPlan& plan, const Run& run) {
  if (!plan.uses_vectors) {
    return dispatch_dtype(launch.dtype, [&](auto scalar) {
      run(std::type_identity<Thread<decltype(scalar), 1, false, std::int64_t>>{});
    });
  }
  dispatch_vector_dtype(launch.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    dispatch_bool(launch.interleaved, [&](auto interleaved) {
      run(std::type_identity<Thread<scalar_t, 16 / sizeof(scalar_t), interleaved, std::int32_t>>{});
    });
  });
}

// Shared memory of a block.
template <typename Thread>
std::size_t shared_bytes(const Plan& plan) {
  return Thread::shared_elements(plan.blocks) * sizeof(typename Thread::Real);
}

// ---- Parameters ----

template <typename Index>
Blocks<Index> device_blocks(const Blocks<std::int64_t>& from) {
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

// The first kArrays arrays of the loops.
template <typename Index, int kArrays, int kAllArrays>
DeviceLoops<Index, kArrays> device_loops(const Loops<kAllArrays>& from) {
  static_assert(kArrays <= kAllArrays);
  if (from.num_dims > kLoopDims<Index>) {
    throw std::logic_error("rope: too many loops for a 32-bit index");
  }
  DeviceLoops<Index, kArrays> loops{};
  loops.num_dims = from.num_dims;
  for (int d = 0; d < from.num_dims; ++d) {
    loops.sizes[d] = static_cast<std::make_unsigned_t<Index>>(from.sizes[d]);
    for (int array = 0; array < kArrays; ++array) {
      loops.strides[array][d] = static_cast<Index>(from.strides[array][d]);
    }
  }
  return loops;
}

template <typename Index, int kHeads = kRotatedHeadArrays, int kTokens = kTokenArrays>
Operands<Index, kHeads, kTokens> device_operands(const Launch& launch, const Plan& plan) {
  const std::int64_t unit = offset_unit(launch, plan.uses_vectors);
  Operands<Index, kHeads, kTokens> operands{};
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    // In place, rows end with the rotated slice: nothing outside it is copied.
    const std::int64_t size =
        moves_others(launch, x) ? x.axis_size : launch.rotary_offset + 2 * launch.num_pairs;
    operands.x[i] = {x.in,
                     x.out,
                     static_cast<Index>(size),
                     static_cast<Index>(x.in_axis_stride),
                     static_cast<Index>(x.out_axis_stride),
                     device_loops<Index, kHeads>(in_units<HeadArray>(x.heads, unit))};
  }
  operands.tokens = device_loops<Index, kTokens>(in_units<TokenArray>(launch.tokens, unit));
  operands.num_pairs = static_cast<Index>(launch.num_pairs);
  operands.rotary_offset = static_cast<Index>(launch.rotary_offset);
  operands.interleaved = launch.interleaved;
  return operands;
}

// frequencies: those of max_wavelength in device memory, if the launch needs them; in turns if the
// source is kTurns.
inline AngleParams angle_params(const Launch& launch, const void* frequencies) {
  AngleParams params{};
  params.source = angle_source(launch);
  set_options(launch, params);
  if (launch.uses_tables) {
    params.table_angles = launch.table_angles;
    if (launch.table_angles.rows != nullptr) {
      check_position_dtype(launch.table_angles.rows_dtype);
    }
  } else {
    params.position_angles = launch.position_angles;
    check_position_dtype(launch.position_angles.positions_dtype);
    if (launch.position_angles.inv_freq == nullptr) {
      params.position_angles.inv_freq = frequencies;
      params.position_angles.inv_freq_stride = 1;
    }
  }
  return params;
}

template <typename Index>
RotateParams<Index> rotate_params(const Launch& launch, const Plan& plan, const void* frequencies) {
  return {device_blocks<Index>(plan.blocks), device_operands<Index>(launch, plan),
          angle_params(launch, frequencies)};
}

template <typename Index>
SumParams<Index> sum_params(const Launch& launch, const Plan& plan, const Sums& sums) {
  SumParams<Index> params{};
  params.blocks = device_blocks<Index>(plan.blocks);
  params.operands = device_operands<Index>(launch, plan);
  params.sums = sums;
  set_options(launch, params);
  return params;
}

inline NormParams norm_params(const Launch& launch) {
  NormParams params{};
  params.eps = launch.eps;
  params.weight_offset = launch.weight_offset;
  params.norm_last = launch.norm_last;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    const NormOperand& norm = x.norm;
    params.inverse_counts[i] = 1 / static_cast<double>(norm.num_members * x.axis_size);
    if (norm.weight == nullptr) {
      continue;
    }
    dispatch_weight(norm.weight_dtype, [](auto*) {});  // Throws for a dtype that has no case.
    params.weights[i] = {norm.weight, norm.weight_dtype, norm.weight_axis_stride};
  }
  return params;
}

inline NormRotateParams<std::int32_t> norm_rotate_params(const Launch& launch, const NormPlan& plan,
                                                         const void* frequencies) {
  return {rotate_params<std::int32_t>(launch, plan, frequencies), norm_params(launch)};
}

template <typename Index>
WideNormParams<Index> wide_norm_params(const Launch& launch, const NormPlan& plan,
                                       const void* frequencies) {
  return {device_blocks<Index>(plan.blocks), plan.wide,
          device_operands<Index, kHeadArrays, kAllTokenArrays>(launch, plan),
          angle_params(launch, frequencies), norm_params(launch)};
}

inline NormGradientParams norm_gradient_params(const Launch& launch, const WeightSums& sums) {
  NormGradientParams params{};
  for (int i = 0; i < launch.num_operands; ++i) {
    const NormOperand& norm = launch.operands[i].norm;
    params.grads[i] = norm.grad;
    params.grad_axis_strides[i] = norm.grad_axis_stride;
    params.weight_sums[i] = sums.of_operand[i];
  }
  return params;
}

inline UsualNormGradientParams<std::int32_t> usual_norm_gradient_params(
    const Launch& launch, const NormGradientPlan& plan, const void* frequencies,
    const WeightSums& sums) {
  return {device_blocks<std::int32_t>(plan.blocks),
          {plan.row_lanes[0], plan.row_lanes[1]},
          {plan.token_lanes[0], plan.token_lanes[1]},
          {plan.token_steps[0], plan.token_steps[1]},
          static_cast<std::int32_t>(plan.grid_x),
          device_operands<std::int32_t, kHeadGrad + 1, kAllTokenArrays>(launch, plan),
          angle_params(launch, frequencies),
          norm_params(launch),
          norm_gradient_params(launch, sums)};
}

template <typename Index>
WideNormGradientParams<Index> wide_norm_gradient_params(const Launch& launch,
                                                        const NormGradientPlan& plan,
                                                        const void* frequencies,
                                                        const WeightSums& sums) {
  return {wide_norm_params<Index>(launch, plan, frequencies),
          norm_gradient_params(launch, sums),
          {launch.operands[0].norm.weight_numel, launch.operands[1].norm.weight_numel},
          {plan.sums_in_registers[0], plan.sums_in_registers[1]},
          {plan.has_lane_parts[0], plan.has_lane_parts[1]}};
}

}  // namespace rope::cuda
