// What a block of the CUDA kernel does that adds sums of gradients (cuda/sum_kernel.h) up to the
// gradients of cosine and sine tables: a thread's part of each phase, for the device and for tests
// that run every block on the host.
#pragma once

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
// Each token names a row of the tables, and adds its sums to that row's gradient. A block owns
// every blocks-th row, and no other block writes these: there are no atomic additions, and a row
// adds up its tokens in their order whatever the device does. Each block reads the rows of all
// tokens, a piece of them at a time, in phases with a barrier behind each:
//
//   mark  each token of the piece that names one of the block's rows sets its bit in shared memory
//   list  these tokens are listed, in order
//   link  each is linked to the one before it that names the same row
//   add   teams of threads, with a column of the tables each, take the first token of each row and
//         follow the links
//
// Reading the rows costs blocks * tokens * 8 bytes from the L2: 8 MiB for 4,096 tokens, 32 MiB for
// 16,384. It grows with the tokens as the sums do, of which a token has 512 bytes (64 pairs,
// float32).

inline constexpr int kScatterThreads = 512;
inline constexpr int kTokensOfPiece = 4096;
// Two for each SM of the largest devices, and a power of two: ownership is a mask. A constant, so
// that a launch asks the device nothing.
inline constexpr std::int64_t kMaxScatterBlocks = 256;

// Threads of a block where tokens have rows of their own.
inline constexpr int kGroupThreads = 256;

inline std::int64_t group_blocks(const TableSums& sums) {
  const std::int64_t elements = sums.num_tables * sums.num_tokens * sums.num_columns;
  return (elements + kGroupThreads - 1) / kGroupThreads;
}

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
  ScatterPlan plan{};
  plan.blocks = power_of_two(sums.num_rows, kMaxScatterBlocks);
  plan.block_bits = std::countr_zero(static_cast<std::uint64_t>(plan.blocks));
  plan.team_bits = std::countr_zero(static_cast<std::uint64_t>(
      power_of_two(sums.num_tables * sums.num_columns, kScatterThreads)));
  return plan;
}

// What the threads of a block share.
struct ScatterShared {
  static constexpr int kBits = 64;

  unsigned long long marks[kTokensOfPiece / kBits];  // a bit for each token of the piece
  int count;                                         // of what is listed
  std::uint32_t rows[kTokensOfPiece];                // of the listed tokens, among the block's own
  std::uint16_t tokens[kTokensOfPiece];              // in the piece
  std::uint16_t next[kTokensOfPiece];  // in the list, with the same row; kTokensOfPiece: none
  bool is_first[kTokensOfPiece];       // of its row
};

// The sum over the groups of rows, of one element of a table. For tables without row indices.
template <typename Real>
C10_HOST_DEVICE Real sum_of_groups(const TableSums& sums, const Real* element) {
  Real total = *element;
#pragma unroll 4
  for (std::int64_t group = 1; group < sums.num_groups; ++group) {
    total += element[group * sums.group_stride];
  }
  return total;
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

// One element of the tables, where token t has row t.
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

// One thread of one block, where tokens name their rows.
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

  // Zeros in the block's rows, and no marks.
  C10_HOST_DEVICE void clear() {
    for_each_element([&](const TableSums::Table& table, std::int64_t index) {
      static_cast<Real*>(table.partial)[index] = 0;
    });
    clear_marks();
  }

  C10_HOST_DEVICE void mark(std::int64_t first_token) {
    bool all_exist = true;
#pragma unroll
    for (int i = 0; i < kTokensOfPiece / kScatterThreads; ++i) {
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
    if (thread_ >= kWords) {
      return;
    }
    unsigned long long marks = shared_.marks[thread_];
    if (marks == 0 && thread_ != kWords - 1) {
      return;
    }
    int k = 0;
    for (int word = 0; word < thread_; ++word) {
      k += count_ones(shared_.marks[word]);
    }
    for (; marks != 0; marks &= marks - 1) {
      const int token = thread_ * ScatterShared::kBits + count_trailing_zeros(marks);
      shared_.rows[k] = static_cast<std::uint32_t>(row_of(first_token + token) >> plan_.block_bits);
      shared_.tokens[k] = static_cast<std::uint16_t>(token);
      shared_.next[k] = kTokensOfPiece;
      ++k;
    }
    if (thread_ == kWords - 1) {
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

  // From the type that is computed with to that of the tables.
  C10_HOST_DEVICE void convert() const {
    for_each_element([&](const TableSums::Table& table, std::int64_t index) {
      if (table.partial != table.gradient) {
        store_element(table.gradient, sums_.dtype, index,
                      static_cast<const Real*>(table.partial)[index]);
      }
    });
  }

 private:
  static constexpr int kWords = kTokensOfPiece / ScatterShared::kBits;
  // Sums that are loaded before the first is added, so that their latencies overlap.
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
    if (thread_ < kWords) {
      shared_.marks[thread_] = 0;
    }
  }

  C10_HOST_DEVICE void set_mark(int token) {
    unsigned long long& word = shared_.marks[token / ScatterShared::kBits];
    const unsigned long long bit = 1ull << (token % ScatterShared::kBits);
#ifdef __CUDA_ARCH__
    atomicOr(&word, bit);
#else
    word |= bit;
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

  // Adds to a row what its tokens in the list have for the column, from the k-th on: token by
  // token, of each group by group.
  C10_HOST_DEVICE void add_tokens(const TableSums::Table& table, std::int64_t column, int k,
                                  std::int64_t first_token) const {
    const std::int64_t row = block_ + (std::int64_t{shared_.rows[k]} << plan_.block_bits);
    const auto* elements = static_cast<const Real*>(table.sums) + column;
    Real& element = static_cast<Real*>(table.partial)[row * sums_.num_columns + column];
    Real total = element;
    std::int64_t group = 0;
    while (k < kTokensOfPiece) {
      Real values[kInFlight];
      int loaded = 0;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (k < kTokensOfPiece) {
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

// All phases of a block: run(phase) runs one for all of its threads.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <typename Real, typename Run>
C10_HOST_DEVICE void run_phases(const TableSums& sums, const Run& run) {
  using Thread = ScatterThread<Real>;
  run([](Thread& thread) { thread.clear(); });
  for (std::int64_t first = 0; first < sums.num_tokens; first += kTokensOfPiece) {
    run([=](Thread& thread) { thread.mark(first); });
    run([=](Thread& thread) { thread.list(first); });
    run([](Thread& thread) { thread.link(); });
    run([=](Thread& thread) { thread.add(first); });
  }
  run([](Thread& thread) { thread.convert(); });
}

}  // namespace rope::cuda
