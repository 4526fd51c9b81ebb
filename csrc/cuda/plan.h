// How a launch is spread over the threads of a CUDA device: plain host code, so that tests see the
// same choices.
#pragma once

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/rotate_thread.h"
#include "cuda/turns.h"
#include "rotate.h"

namespace rope::cuda {

struct Plan {
  Work work;
  bool uses_words;  // 16 bytes at a time, instead of single elements
  bool index_is_64bit;
  std::int64_t blocks;
};

struct RotatePlan : Plan {
  Frequencies frequencies;
};

// Elements of a 16-byte word.
inline std::int64_t word_elements(c10::ScalarType dtype) {
  return 16 / static_cast<std::int64_t>(c10::elementSize(dtype));
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether each word of each row begins at a multiple of 16 bytes, and the slice and what is around
// it are whole words.
inline bool can_use_words(const Launch& launch) {
  const std::int64_t word = word_elements(launch.dtype);
  const std::int64_t second_half = launch.interleaved ? 2 * launch.num_pairs : launch.num_pairs;
  bool aligned =
      launch.num_pairs % word == 0 && second_half % word == 0 && launch.rotary_offset % word == 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    aligned = aligned && x.in_axis_stride == 1 && x.out_axis_stride == 1;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.in) % 16 == 0;
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x.out) % 16 == 0;
    for (int d = 0; d < x.shared.num_dims; ++d) {
      aligned = aligned && x.shared.strides[0][d] % word == 0 && x.shared.strides[1][d] % word == 0;
    }
    for (int d = 0; d < launch.tokens.num_dims; ++d) {
      aligned = aligned && launch.tokens.strides[kIn + 2 * i][d] % word == 0 &&
                launch.tokens.strides[kOut + 2 * i][d] % word == 0;
    }
  }
  return aligned;
}

// Whether each word of each row of the tables begins at a multiple of 16 bytes.
inline bool tables_have_words(const Launch& launch) {
  const TableAngles& table = launch.by_table;
  if (!launch.uses_tables || table.cos_stride != 1 || table.sin_stride != 1) {
    return false;
  }
  const std::int64_t word = word_elements(table.dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(table.cos) % 16 == 0 &&
                 reinterpret_cast<std::uintptr_t>(table.sin) % 16 == 0;
  if (table.rows != nullptr) {
    return aligned && table.cos_row_stride % word == 0 && table.sin_row_stride % word == 0;
  }
  for (int d = 0; d < launch.tokens.num_dims; ++d) {
    aligned = aligned && launch.tokens.strides[kAngle][d] % word == 0 &&
              launch.tokens.strides[kSin][d] % word == 0;
  }
  return aligned;
}

// The farthest that a nest leads for any of its arrays, in elements.
template <int kArrays>
std::int64_t extent(const Nest<kArrays>& nest) {
  std::int64_t farthest = 0;
  for (const auto& strides : nest.strides) {
    std::int64_t sum = 0;
    for (int d = 0; d < nest.num_dims; ++d) {
      sum += (nest.sizes[d] - 1) * strides[d];
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
    farthest = std::max({farthest, extent(launch.tokens) + extent(x.shared), x.axis_size});
  }
  return farthest;
}

// What every plan begins with: words or single elements, and the rows.
inline void describe_rows(const Launch& launch, Plan& plan) {
  plan.uses_words = can_use_words(launch);
  plan.work.q_rows = launch.operands[0].shared.count();
  for (int i = 0; i < launch.num_operands; ++i) {
    plan.work.shared_rows += launch.operands[i].shared.count();
  }
}

inline std::int64_t pairs_per_chunk(const Launch& launch, const Plan& plan) {
  return plan.uses_words ? word_elements(launch.dtype) : 1;
}

// Groups the rows, and spreads groups and chunks over blocks.
inline void spread(const Launch& launch, std::int64_t rows_per_thread, Plan& plan) {
  constexpr std::int64_t kLittleWork = std::int64_t{1} << 14;
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - kThreads;
  Work& work = plan.work;
  work.rows_per_thread = rows_per_thread;
  work.row_groups = ceil_div(work.shared_rows, rows_per_thread);
  work.items = launch.tokens.count() * (work.rotate_chunks + work.copy_chunks) * work.row_groups;
  work.threads = work.items <= kLittleWork ? kFewThreads : kThreads;
  plan.blocks = ceil_div(work.items, work.threads);
  plan.index_is_64bit = farthest_element(launch) > std::numeric_limits<std::int32_t>::max() ||
                        work.items > kMost || work.row_groups * rows_per_thread > kMost;
}

// The plan for the pairs [first_pair, last_pair) of a launch; the elements around them are copied
// with the first.
inline RotatePlan make_rotate_plan(const Launch& launch, std::int64_t first_pair,
                                   std::int64_t last_pair) {
  // Enough threads to fill the largest devices; beyond that, a thread takes more rows for the
  // angles it has found.
  constexpr std::int64_t kEnoughThreads = std::int64_t{1} << 18;
  constexpr std::int64_t kMaxRowsPerThread = 4 * kRowsInFlight;

  RotatePlan plan{};
  describe_rows(launch, plan);
  std::int64_t most_outside = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& x = launch.operands[i];
    // In place, what is around the slice is there already.
    if (x.in != x.out && first_pair == 0) {
      most_outside = std::max(most_outside, x.axis_size - 2 * launch.num_pairs);
    }
  }
  Work& work = plan.work;
  work.tables_have_words = plan.uses_words && tables_have_words(launch);
  work.first_pair = first_pair;
  work.last_pair = last_pair;
  work.rotate_chunks = ceil_div(last_pair - first_pair, pairs_per_chunk(launch, plan));
  work.copy_chunks = ceil_div(most_outside, 2 * pairs_per_chunk(launch, plan));
  const std::int64_t chunks = work.rotate_chunks + work.copy_chunks;
  spread(
      launch,
      std::clamp<std::int64_t>(launch.tokens.count() * chunks * work.shared_rows / kEnoughThreads,
                               1, kMaxRowsPerThread),
      plan);

  if (const std::uint64_t* turns = turns_of_wavelength(launch)) {
    work.in_turns = true;
    std::copy(turns + first_pair, turns + last_pair, plan.frequencies.turns);
  } else if (!launch.uses_tables && launch.by_position.wavelength_frequencies != nullptr) {
    std::copy(launch.by_position.wavelength_frequencies + first_pair,
              launch.by_position.wavelength_frequencies + last_pair, plan.frequencies.radians);
  }
  return plan;
}

// The plan for the sums of a launch (cuda/sum_thread.h), which has one operand.
inline Plan make_sum_plan(const Launch& launch) {
  // Rows of a token are cut into groups only where there are too few threads to keep the memory of
  // the largest devices busy: each has 128 bytes on their way, so that these have 8 MiB, where 8
  // TB/s and 800 ns take 6.4 MB.
  constexpr std::int64_t kEnoughThreads = std::int64_t{1} << 16;
  // What a group costs, sums that are written and read again, stays small beside its rows.
  constexpr std::int64_t kFewestRows = 4 * kRowsInFlight;

  Plan plan{};
  describe_rows(launch, plan);
  Work& work = plan.work;
  work.last_pair = launch.num_pairs;
  work.rotate_chunks = ceil_div(launch.num_pairs, pairs_per_chunk(launch, plan));
  const std::int64_t threads_of_a_group = launch.tokens.count() * work.rotate_chunks;
  const std::int64_t groups =
      ceil_div(kEnoughThreads, std::max<std::int64_t>(threads_of_a_group, 1));
  spread(launch, std::max(ceil_div(work.shared_rows, groups), kFewestRows), plan);
  return plan;
}

// Calls run with each plan that a rotation needs, one after the other.
template <typename Run>
void for_each_plan(const Launch& launch, const Run& run) {
  const bool limited = !launch.uses_tables && launch.by_position.wavelength_frequencies != nullptr;
  const std::int64_t step =
      limited ? std::int64_t{kMaxFrequencies} : std::max<std::int64_t>(launch.num_pairs, 1);
  std::int64_t first_pair = 0;
  do {
    const RotatePlan plan =
        make_rotate_plan(launch, first_pair, std::min(first_pair + step, launch.num_pairs));
    if (plan.work.items > 0) {
      run(plan);
    }
    first_pair += step;
  } while (first_pair < launch.num_pairs);
}

// Calls run(thread) with the kind of thread that the plan is for: on the host and on the device the
// same.
template <template <typename, int, bool, typename> typename Kind, typename scalar_t, typename Run>
void with_thread_of(const Launch& launch, const Plan& plan, const Run& run) {
  const auto choose = [](bool value, const auto& then) {
    value ? then(std::true_type{}) : then(std::false_type{});
  };
  choose(plan.index_is_64bit, [&](auto index_is_64bit) {
    using Index = std::conditional_t<index_is_64bit, std::int64_t, std::int32_t>;
    if (!plan.uses_words) {
      run(std::type_identity<Kind<scalar_t, 1, false, Index>>{});
      return;
    }
    choose(launch.interleaved, [&](auto interleaved) {
      constexpr int kPairs = 16 / sizeof(scalar_t);
      run(std::type_identity<Kind<scalar_t, kPairs, interleaved, Index>>{});
    });
  });
}

template <template <typename, int, bool, typename> typename Kind, typename Run>
void with_thread(const Launch& launch, const Plan& plan, const Run& run) {
  switch (launch.dtype) {
    case c10::ScalarType::Double:
      return with_thread_of<Kind, double>(launch, plan, run);
    case c10::ScalarType::Float:
      return with_thread_of<Kind, float>(launch, plan, run);
    case c10::ScalarType::Half:
      return with_thread_of<Kind, c10::Half>(launch, plan, run);
    default:
      return with_thread_of<Kind, c10::BFloat16>(launch, plan, run);
  }
}

}  // namespace rope::cuda
