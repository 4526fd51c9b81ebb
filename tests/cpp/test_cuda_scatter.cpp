// Gradients of tables from sums: the kernels of csrc/cuda/scatter.cu, every thread run on the host.
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cuda/launch.h"
#include "cuda/scatter_kernel.h"
#include "host_threads.h"
#include "reference.h"

namespace {

using host::kGuard;
using host::Running;
using reference::random_values;
using reference::same_bits;
using rope::cuda::ScatterPlan;
using rope::cuda::ScatterShared;
using rope::cuda::TableSums;

template <typename Real>
void run_block(const TableSums& sums, const ScatterPlan& plan, std::int64_t block,
               const Running& running) {
  using Thread = rope::cuda::ScatterThread<Real>;
  const auto shared = std::make_unique<ScatterShared>();
  std::memset(shared.get(), 0xa5, sizeof(ScatterShared));
  std::vector<Thread> threads;
  for (int thread = 0; thread < rope::cuda::kScatterThreads; ++thread) {
    threads.emplace_back(sums, plan, *shared, block, thread);
  }
  rope::cuda::run_phases<Real>(sums, [&](const auto& phase) {
    for (std::size_t t = 0; t < threads.size(); ++t) {
      phase(threads[running.last_thread_first ? threads.size() - 1 - t : t]);
    }
  });
}

template <typename Real>
void run(const TableSums& sums, const Running& running) {
  const auto in_order = [&](std::int64_t count, const auto& visit) {
    for (std::int64_t i = 0; i < count; ++i) {
      visit(running.last_thread_first ? count - 1 - i : i);
    }
  };
  if (sums.rows == nullptr) {
    in_order(rope::cuda::group_blocks(sums) * rope::cuda::kGroupThreads,
             [&](std::int64_t thread) { rope::cuda::add_groups<Real>(sums, thread); });
    return;
  }
  const ScatterPlan plan = rope::cuda::make_scatter_plan(sums);
  in_order(plan.blocks, [&](std::int64_t block) { run_block<Real>(sums, plan, block, running); });
}

void run_scatter(const TableSums& sums, const Running& running = {}) {
  if (sums.sums_dtype == at::kDouble) {
    run<double>(sums, running);
  } else {
    run<float>(sums, running);
  }
}

}  // namespace

// In the place of csrc/cuda/scatter.cu.
namespace rope::cuda {

void scatter_rows(const TableSums& sums, int) { run_scatter(sums); }

}  // namespace rope::cuda

namespace {

// Sums of one table or of two, and which rows the tokens name.
struct Case {
  std::vector<at::Tensor> sums;  // (groups, tokens, columns)
  at::Tensor rows;               // undefined: token t has row t
  std::int64_t num_rows = 0;
  at::ScalarType dtype = at::kFloat;

  at::ScalarType real() const { return sums[0].scalar_type(); }
  at::IntArrayRef sizes() const { return sizes_; }

  Case(std::vector<at::Tensor> of_tables, at::Tensor of_tokens, std::int64_t count,
       at::ScalarType of_result = at::kFloat)
      : sums(std::move(of_tables)),
        rows(std::move(of_tokens)),
        num_rows(rows.defined() ? count : sums[0].size(1)),
        dtype(of_result),
        sizes_{num_rows, sums[0].size(2)} {}

 private:
  std::vector<std::int64_t> sizes_;
};

// Plain additions in the order of tokens, and of groups within a token.
template <typename Real>
at::Tensor add_in_order(const Case& of, const at::Tensor& sums) {
  const at::Tensor total = at::zeros(of.sizes(), of.real());
  const auto from = sums.accessor<Real, 3>();
  auto to = total.accessor<Real, 2>();
  for (std::int64_t token = 0; token < sums.size(1); ++token) {
    const std::int64_t row = of.rows.defined() ? of.rows[token].item<std::int64_t>() : token;
    for (std::int64_t group = 0; group < sums.size(0); ++group) {
      for (std::int64_t column = 0; column < sums.size(2); ++column) {
        to[row][column] += from[group][token][column];
      }
    }
  }
  return total.to(of.dtype);
}

at::Tensor expected(const Case& of, const at::Tensor& sums) {
  return of.real() == at::kDouble ? add_in_order<double>(of, sums) : add_in_order<float>(of, sums);
}

// A tensor of the given sizes between guards, all of it NaN.
struct Guarded {
  Guarded(at::IntArrayRef sizes, at::ScalarType dtype)
      : buffer(at::full({c10::multiply_integers(sizes) + 2 * kGuard},
                        std::numeric_limits<double>::quiet_NaN(), at::dtype(dtype))),
        tensor(buffer.slice(0, kGuard, buffer.numel() - kGuard).view(sizes)) {}

  bool guards_are_whole() const {
    return buffer.slice(0, 0, kGuard).isnan().all().item<bool>() &&
           buffer.slice(0, buffer.numel() - kGuard).isnan().all().item<bool>();
  }

  at::Tensor buffer;
  at::Tensor tensor;
};

std::vector<at::Tensor> scatter(const Case& of, const Running& running) {
  TableSums launch{};
  launch.sums_dtype = of.real();
  launch.dtype = of.dtype;
  launch.num_groups = of.sums[0].size(0);
  launch.group_stride = of.sums[0].stride(0);
  launch.num_tokens = of.sums[0].size(1);
  launch.num_columns = of.sums[0].size(2);
  if (of.rows.defined()) {
    launch.rows = of.rows.const_data_ptr();
    launch.rows_dtype = of.rows.scalar_type();
    launch.num_rows = of.num_rows;
  }
  std::vector<Guarded> buffers;
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& sums : of.sums) {
    gradients.push_back(buffers.emplace_back(of.sizes(), of.dtype).tensor);
    const bool converts = of.rows.defined() && of.dtype != of.real();
    const at::Tensor partial =
        converts ? buffers.emplace_back(of.sizes(), of.real()).tensor : gradients.back();
    launch.tables[launch.num_tables++] = {sums.const_data_ptr(), partial.mutable_data_ptr(),
                                          gradients.back().mutable_data_ptr()};
  }
  run_scatter(launch, running);
  for (const Guarded& buffer : buffers) {
    EXPECT_TRUE(buffer.guards_are_whole());
  }
  return gradients;
}

// The bits of plain additions, however the threads are run.
void expect_in_order(const Case& of) {
  for (const bool last_thread_first : {false, true}) {
    SCOPED_TRACE(c10::str("last_thread_first = ", last_thread_first));
    const std::vector<at::Tensor> gradients = scatter(of, {.last_thread_first = last_thread_first});
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_TRUE(same_bits(gradients[i], expected(of, of.sums[i]))) << "table " << i;
    }
  }
}

// Sums of two tables.
std::vector<at::Tensor> sums_of(std::int64_t groups, std::int64_t tokens, std::int64_t columns,
                                at::ScalarType dtype = at::kFloat) {
  return {random_values({groups, tokens, columns}, dtype, 1),
          random_values({groups, tokens, columns}, dtype, 2)};
}

at::Tensor random_rows(std::int64_t tokens, std::int64_t num_rows) {
  return random_values({tokens}, at::kDouble, 3).mul(1e6).abs().to(at::kLong).remainder(num_rows);
}

TEST(CudaScatter, AddsTokensToTheirRowsInOrderForEveryDtype) {
  for (const at::ScalarType real : {at::kFloat, at::kDouble}) {
    for (const at::ScalarType dtype : reference::kFloatDtypes) {
      for (const at::ScalarType of_rows : {at::kInt, at::kLong}) {
        SCOPED_TRACE(c10::str(real, " to ", dtype, " by ", of_rows));
        expect_in_order({sums_of(1, 70, 12, real), random_rows(70, 30).to(of_rows), 30, dtype});
        expect_in_order({sums_of(3, 70, 12, real), random_rows(70, 30).to(of_rows), 30, dtype});
      }
    }
  }
}

TEST(CudaScatter, OfTokensWithRowsOfTheirOwnAddsGroupsInOrder) {
  for (const at::ScalarType real : {at::kFloat, at::kDouble}) {
    for (const at::ScalarType dtype : reference::kFloatDtypes) {
      for (const std::int64_t groups : {1, 2, 9}) {
        SCOPED_TRACE(c10::str(real, " to ", dtype, ", groups = ", groups));
        expect_in_order({sums_of(groups, 37, 20, real), {}, 0, dtype});
      }
    }
  }
}

TEST(CudaScatter, TakesOneTable) {
  expect_in_order({{random_values({2, 70, 12})}, random_rows(70, 30), 30});
  expect_in_order({{random_values({2, 70, 12})}, {}, 0, at::kHalf});
}

TEST(CudaScatter, TakesAnyNumberOfRowsTokensAndColumns) {
  for (const std::int64_t num_rows : {1, 2, 255, 256, 257, 3000}) {
    for (const std::int64_t tokens : {1, 63, 64, 65, 4095, 4096, 4097}) {
      SCOPED_TRACE(c10::str("num_rows = ", num_rows, ", tokens = ", tokens));
      expect_in_order({sums_of(1, tokens, 3), random_rows(tokens, num_rows), num_rows});
    }
  }
  for (const std::int64_t columns : {1, 2, 31, 64, 255, 256, 257, 600}) {
    SCOPED_TRACE(c10::str("columns = ", columns));
    expect_in_order({sums_of(2, 40, columns), random_rows(40, 10), 10, at::kBFloat16});
  }
}

TEST(CudaScatter, AddsAllTokensOfOneRowAndOfRowsThatOneBlockOwns) {
  const std::int64_t tokens = 2 * rope::cuda::kTokensOfPiece + 100;
  const at::Tensor token = at::arange(tokens);
  expect_in_order({sums_of(1, tokens, 2), at::full({tokens}, 7, at::kLong), 300});
  const std::int64_t far = 300 * rope::cuda::kMaxScatterBlocks;
  expect_in_order(
      {sums_of(1, tokens, 2), token.remainder(299).mul(rope::cuda::kMaxScatterBlocks).add(5), far});
}

TEST(CudaScatter, AddsTheShapesOfModels) {
  expect_in_order({sums_of(2, 4096, 64), at::arange(4096), 4096});
  expect_in_order({sums_of(1, 16384, 64), at::arange(16384).add(100000), 131072, at::kBFloat16});
  expect_in_order({sums_of(9, 64, 64), at::full({64}, 2047, at::kInt), 2048});
}

TEST(CudaScatter, KeepsNaNInItsElement) {
  std::vector<at::Tensor> sums = sums_of(2, 9, 4);
  sums[1][1][5][2] = std::numeric_limits<double>::quiet_NaN();
  const auto gradients = scatter({sums, at::arange(9).remainder(4), 4}, {});
  EXPECT_EQ(gradients[0].isnan().sum().item<std::int64_t>(), 0);
  EXPECT_EQ(gradients[1].isnan().sum().item<std::int64_t>(), 1);
  EXPECT_TRUE(gradients[1][1][2].isnan().item<bool>());
}

TEST(CudaScatterDeathTest, StopsAtARowThatIsNotThere) {
  for (const std::int64_t row : {std::int64_t{-1}, std::int64_t{30}, std::int64_t{1} << 40}) {
    const at::Tensor rows = random_rows(70, 30);
    rows[69] = row;
    EXPECT_DEATH(scatter({sums_of(1, 70, 12), rows, 30}, {}), "all_exist");
  }
}

}  // namespace
