// The CUDA kernels that add sums (cuda/sum_kernel.h) up to the gradients of cosine and sine tables:
// what one thread of a block does, on the device and in tests on the host.
#pragma once

#include <ATen/ceil_div.h>
#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#include "angle.h"
#include "cuda/kernels.h"
#include "unsupported_dtype.h"

namespace rope::cuda {

// NOTE [ Tables by row index ]
//
// Each token has the index of a row of the tables, to whose gradient its sums are added. A block
// owns every blocks-th row, and no other block writes it: there are no atomics, and each row adds
// its tokens in order, however blocks are scheduled. Each block reads the row indices of all
// tokens, one tile of tokens at a time, in phases that each end in a barrier (run_phases):
//
//   mark  threads set a bit in shared memory for each token whose row the block owns
//   list  these tokens are listed, in order
//   link  each is linked to the previous token of the same row
//   add   teams of threads, each thread with its columns of the tables, start at the first token of
//         each row and follow the links
//
// Reading the row indices takes blocks * tokens * 8 bytes from L2: 8 MiB for 4,096 tokens, 32 MiB
// for 16,384. It grows with the tokens just as the sums do, which are 512 bytes per token (64
// pairs, float32).

inline constexpr int kScatterThreads = 512;
inline constexpr int kTileTokens = 4096;
// About two per SM of the largest devices, and a power of two, so that a mask finds the owner. A
// constant: no device query per launch.
inline constexpr std::int64_t kMaxScatterBlocks = 256;

struct ScatterPlan {
  std::int64_t blocks;
  int block_bits;  // blocks is 1 << block_bits.
  int team_bits;   // A team has 1 << team_bits threads.
};

inline ScatterPlan make_scatter_plan(const TableSums& sums) {
  const auto power_of_two = [](std::int64_t count, std::int64_t most) {
    return static_cast<std::int64_t>(
        std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(count, 1, most))));
  };
  check_position_dtype(sums.rows_dtype);
  ScatterPlan plan{};
  plan.blocks = power_of_two(sums.num_rows, kMaxScatterBlocks);
  plan.block_bits = std::countr_zero(static_cast<std::uint64_t>(plan.blocks));
  plan.team_bits = std::countr_zero(static_cast<std::uint64_t>(
      power_of_two(sums.num_tables * sums.num_columns, kScatterThreads)));
  return plan;
}

// ---- Tables by row index ----

// Shared memory of a block.
struct ScatterShared {
  static constexpr int kBits = 64;

  unsigned long long marks[kTileTokens / kBits];  // a bit for each token of the tile
  int count;                                      // of listed tokens
  std::uint32_t rows[kTileTokens];                // of the listed tokens, among the block's own
  std::uint16_t tokens[kTileTokens];              // in the tile
  std::uint16_t next[kTileTokens];                // of the same row, in the list; or kTileTokens
  bool is_first[kTileTokens];                     // of its row
};

template <typename Real>
class ScatterThread;

// All phases of a block. run(phase) runs one phase of all threads, and a barrier.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Real, typename Run>
C10_HOST_DEVICE void run_phases(const TableSums& sums, const Run& run) {
  using Thread = ScatterThread<Real>;
  run([](Thread& thread) { thread.clear(); });
  for (std::int64_t first = 0; first < sums.num_tokens; first += kTileTokens) {
    run([=](Thread& thread) { thread.mark(first); });
    run([=](Thread& thread) { thread.list(first); });
    run([](Thread& thread) { thread.link(); });
    run([=](Thread& thread) { thread.add(first); });
  }
  run([](Thread& thread) { thread.convert(); });
}

template <typename Real>
C10_HOST_DEVICE void store_element(void* table, c10::ScalarType dtype, std::int64_t index,
                                   Real value);

// One thread of a block.
template <typename Real>
class ScatterThread {
 public:
  C10_HOST_DEVICE ScatterThread(const TableSums& sums, const ScatterPlan& plan,
                                ScatterShared& shared, std::int64_t block, int thread)
      : sums_(sums),
        plan_(plan),
        shared_(shared),
        block_(block),
        thread_(thread),
        lane_(thread & ((1 << plan.team_bits) - 1)),
        team_(thread >> plan.team_bits),
        teams_(kScatterThreads >> plan.team_bits) {}

  // Zeros the block's rows and the marks.
  C10_HOST_DEVICE void clear() {
    for_each_element([&](const TableSums::Table& table, std::int64_t index) {
      static_cast<Real*>(table.partial)[index] = 0;
    });
    clear_marks();
  }

  C10_HOST_DEVICE void mark(std::int64_t first_token) {
    bool all_exist = true;
#pragma unroll
    for (int i = 0; i < kTileTokens / kScatterThreads; ++i) {
      const int token = i * kScatterThreads + thread_;
      if (first_token + token < sums_.num_tokens) {
        const std::int64_t row = row_of(first_token + token);
        const bool exists = 0 <= row && row < sums_.num_rows;
        all_exist = all_exist && exists;
        if (exists && (row & (plan_.blocks - 1)) == block_) {
          set_mark(token);
        }
      }
    }
    CUDA_KERNEL_ASSERT(all_exist);
  }

  C10_HOST_DEVICE void list(std::int64_t first_token) {
    if (thread_ >= kMarks) {
      return;
    }
    unsigned long long marks = shared_.marks[thread_];
    if (marks == 0 && thread_ != kMarks - 1) {
      return;
    }
    int k = 0;
    for (int i = 0; i < thread_; ++i) {
      k += count_ones(shared_.marks[i]);
    }
    for (; marks != 0; marks &= marks - 1) {
      const int token = thread_ * ScatterShared::kBits + count_trailing_zeros(marks);
      shared_.rows[k] = static_cast<std::uint32_t>(row_of(first_token + token) >> plan_.block_bits);
      shared_.tokens[k] = static_cast<std::uint16_t>(token);
      shared_.next[k] = kTileTokens;
      ++k;
    }
    if (thread_ == kMarks - 1) {
      shared_.count = k;
    }
  }

  C10_HOST_DEVICE void link() {
    for (int k = thread_; k < shared_.count; k += kScatterThreads) {
      const std::uint32_t row = shared_.rows[k];
      int before = k - 1;
      while (before >= 0 && shared_.rows[before] != row) {
        --before;
      }
      shared_.is_first[k] = before < 0;
      if (before >= 0) {
        shared_.next[before] = static_cast<std::uint16_t>(k);
      }
    }
    clear_marks();
  }

  C10_HOST_DEVICE void add(std::int64_t first_token) const {
    for (int k = team_; k < shared_.count; k += teams_) {
      if (shared_.is_first[k]) {
        for_each_column([&](const TableSums::Table& table, std::int64_t column) {
          add_tokens(table, column, k, first_token);
        });
      }
    }
  }

  // From the opmath type to the dtype of the tables.
  C10_HOST_DEVICE void convert() const {
    for_each_element([&](const TableSums::Table& table, std::int64_t index) {
      if (table.partial != table.gradient) {
        store_element(table.gradient, sums_.dtype, index,
                      static_cast<const Real*>(table.partial)[index]);
      }
    });
  }

 private:
  static constexpr int kMarks = kTileTokens / ScatterShared::kBits;
  // Sums loaded before the first is added, to overlap their latencies.
  static constexpr int kInFlight = 32 / sizeof(Real);

  C10_HOST_DEVICE std::int64_t row_of(std::int64_t token) const {
    return load_position<std::int64_t>(sums_.rows, sums_.rows_dtype, token);
  }

  // Calls visit(table, column) for each column of this thread.
  template <typename Visit>
  C10_HOST_DEVICE void for_each_column(const Visit& visit) const {
    const std::int64_t columns = sums_.num_columns;
#pragma unroll 1
    for (std::int64_t column = lane_; column < sums_.num_tables * columns;
         column += 1 << plan_.team_bits) {
      const bool is_second = column >= columns;
      const TableSums::Table table = is_second ? sums_.tables[1] : sums_.tables[0];
      visit(table, is_second ? column - columns : column);
    }
  }

  // Calls visit(table, index) for each element of this thread in the block's rows.
  template <typename Visit>
  C10_HOST_DEVICE void for_each_element(const Visit& visit) const {
#pragma unroll 1
    for (std::int64_t row = block_ + (std::int64_t{team_} << plan_.block_bits);
         row < sums_.num_rows; row += std::int64_t{teams_} << plan_.block_bits) {
      for_each_column([&](const TableSums::Table& table, std::int64_t column) {
        visit(table, row * sums_.num_columns + column);
      });
    }
  }

  C10_HOST_DEVICE void clear_marks() {
    if (thread_ < kMarks) {
      shared_.marks[thread_] = 0;
    }
  }

  C10_HOST_DEVICE void set_mark(int token) {
    unsigned long long& marks = shared_.marks[token / ScatterShared::kBits];
    const unsigned long long bit = 1ull << (token % ScatterShared::kBits);
#ifdef __CUDA_ARCH__
    atomicOr(&marks, bit);
#else
    marks |= bit;
#endif
  }

  C10_HOST_DEVICE static int count_ones(unsigned long long bits) {
#ifdef __CUDA_ARCH__
    return __popcll(bits);
#else
    return std::popcount(bits);
#endif
  }

  C10_HOST_DEVICE static int count_trailing_zeros(unsigned long long bits) {
#ifdef __CUDA_ARCH__
    return __ffsll(static_cast<long long>(bits)) - 1;
#else
    return std::countr_zero(bits);
#endif
  }

  // Adds one column of a row's tokens, from the k-th listed token on: token by token, and for each
  // token group by group.
  C10_HOST_DEVICE void add_tokens(const TableSums::Table& table, std::int64_t column, int k,
                                  std::int64_t first_token) const {
    const std::int64_t row = block_ + (std::int64_t{shared_.rows[k]} << plan_.block_bits);
    const auto* elements = static_cast<const Real*>(table.sums) + column;
    Real& element = static_cast<Real*>(table.partial)[row * sums_.num_columns + column];
    Real total = element;
    std::int64_t group = 0;
    while (k < kTileTokens) {
      Real values[kInFlight];
      int loaded = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (k < kTileTokens) {
          values[i] = elements[group * sums_.group_stride +
                               (first_token + shared_.tokens[k]) * sums_.num_columns];
          loaded = i + 1;
          group += 1;
          if (group == sums_.num_groups) {
            group = 0;
            k = shared_.next[k];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (i < loaded) {
          total += values[i];
        }
      }
    }
    element = total;
  }

  const TableSums& sums_;
  const ScatterPlan& plan_;
  ScatterShared& shared_;
  std::int64_t block_;
  int thread_;
  int lane_;  // in its team
  int team_;
  int teams_;
};

// ---- Tables without row indices ----

inline constexpr int kGroupThreads = 256;  // of a block

inline std::int64_t group_blocks(const TableSums& sums) {
  const std::int64_t elements = sums.num_tables * sums.num_tokens * sums.num_columns;
  return at::ceil_div<std::int64_t>(elements, kGroupThreads);
}

// One element of a table, summed over the groups.
template <typename Real>
C10_HOST_DEVICE Real sum_of_groups(const TableSums& sums, const Real* element) {
  Real total = *element;
#pragma unroll 4
  for (std::int64_t group = 1; group < sums.num_groups; ++group) {
    total += element[group * sums.group_stride];
  }
  return total;
}

// One element of the tables. Token t has row t.
template <typename Real>
C10_HOST_DEVICE void add_groups(const TableSums& sums, std::int64_t index) {
  const std::int64_t numel = sums.num_tokens * sums.num_columns;
  if (index >= sums.num_tables * numel) {
    return;
  }
  const bool is_second = index >= numel;
  const TableSums::Table table = is_second ? sums.tables[1] : sums.tables[0];
  const std::int64_t element = is_second ? index - numel : index;
  store_element(table.gradient, sums.dtype, element,
                sum_of_groups(sums, static_cast<const Real*>(table.sums) + element));
}

template <typename Real>
C10_HOST_DEVICE void store_element(void* table, c10::ScalarType dtype, std::int64_t index,
                                   Real value) {
  switch (dtype) {
    case c10::ScalarType::Double:
      static_cast<double*>(table)[index] = value;
      return;
    case c10::ScalarType::Float:
      static_cast<float*>(table)[index] = static_cast<float>(value);
      return;
    case c10::ScalarType::Half:
      static_cast<c10::Half*>(table)[index] = static_cast<c10::Half>(static_cast<float>(value));
      return;
    case c10::ScalarType::BFloat16:
      static_cast<c10::BFloat16*>(table)[index] =
          static_cast<c10::BFloat16>(static_cast<float>(value));
      return;
    default:
      fail_for_dtype(dtype);
  }
}

}  // namespace rope::cuda
