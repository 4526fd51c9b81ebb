// Adding sums up to gradients (csrc/gradient_sums.cpp), with every thread of the CUDA kernels run
// on the host.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cuda/run.h"
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

// Launches since it was last set to 0.
int launches = 0;

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
  launches += 1;
  if (sums.sums_dtype == at::kDouble) {
    run<double>(sums, running);
  } else {
    run<float>(sums, running);
  }
}

}  // namespace

// Replaces csrc/cuda/scatter.cu.
namespace rope::cuda {

void scatter_rows(const TableSums& sums, int) { run_scatter(sums); }

}  // namespace rope::cuda

namespace {

// Sums of one or two tables, and the row index of each token.
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
  const std::int64_t tokens = 2 * rope::cuda::kTileTokens + 100;
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

// ---- The operators ----

using Tables = std::tuple<at::Tensor, at::Tensor>;

struct Slice {
  std::vector<at::Tensor> grads;
  std::vector<at::Tensor> xs;
  std::vector<std::int64_t> sizes;
  bool full_width = false;
};

at::Tensor angle_gradient(const Slice& of, const at::Tensor& factors, at::IntArrayRef dim,
                          at::ScalarType dtype, c10::DispatchKey key) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rope::_angle_gradient", "")
          .typed<at::Tensor(at::TensorList, at::TensorList, c10::SymIntArrayRef, std::int64_t,
                            std::int64_t, bool, bool, const std::optional<at::Tensor>&,
                            at::IntArrayRef, std::optional<at::ScalarType>)>();
  return handle.redispatch(c10::DispatchKeySet(key), of.grads, of.xs,
                           c10::fromIntArrayRefSlow(of.sizes), -1, 0, false, true, factors, dim,
                           dtype);
}

Tables table_gradients(const Slice& of, const std::optional<at::Tensor>& rows,
                       std::optional<c10::SymInt> num_rows, at::ScalarType dtype,
                       c10::DispatchKey key, std::array<bool, 2> output_mask = {true, true}) {
  static const auto handle =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rope::_cos_sin_gradient", "")
          .typed<Tables(at::TensorList, at::TensorList, c10::SymIntArrayRef, std::int64_t,
                        std::int64_t, bool, bool, bool, const std::optional<at::Tensor>&,
                        const std::optional<c10::SymInt>&, std::optional<at::ScalarType>,
                        std::array<bool, 2>)>();
  return handle.redispatch(c10::DispatchKeySet(key), of.grads, of.xs,
                           c10::fromIntArrayRefSlow(of.sizes), -1, 0, false, true, of.full_width,
                           rows, num_rows, dtype, output_mask);
}

// q and k. With few tokens, a launch divides the rows into groups.
Slice q_and_k(std::int64_t tokens, std::int64_t batch, at::ScalarType dtype, bool full_width) {
  const auto values = [&](std::int64_t heads, int seed) {
    return random_values({batch, tokens, heads, 16}, dtype, seed);
  };
  return {{values(5, 1), values(2, 2)},
          {values(5, 3), values(2, 4)},
          {tokens, 1, full_width ? 16 : 8},
          full_width};
}

// Up to the rounding of sums, which the device and ATen add in different orders.
void expect_close(const at::Tensor& actual, const at::Tensor& wanted, at::ScalarType of_x) {
  ASSERT_EQ(actual.scalar_type(), wanted.scalar_type());
  ASSERT_EQ(actual.sizes(), wanted.sizes());
  const bool exact = of_x == at::kDouble && wanted.scalar_type() == at::kDouble;
  const double unit = wanted.scalar_type() == at::kBFloat16 ? 0x1p-8
                      : wanted.scalar_type() == at::kHalf   ? 0x1p-10
                      : exact                               ? 0x1p-48
                                                            : 0x1p-19;
  const at::Tensor expected = wanted.to(at::kDouble);
  const double error = (actual.to(at::kDouble) - expected).abs().max().item<double>();
  EXPECT_LE(error, 2 * unit * expected.abs().max().item<double>());
}

template <typename Run>
void for_each_slice(const Run& run) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    for (const auto& [tokens, batch] : {std::pair(7, 2), {7, 90}}) {
      for (const bool full_width : {false, true}) {
        SCOPED_TRACE(c10::str(dtype, ", batch = ", batch, ", full_width = ", full_width));
        run(q_and_k(tokens, batch, dtype, full_width), dtype);
      }
    }
  }
}

TEST(CudaGradients, OfTablesAreThoseInATenOperators) {
  for_each_slice([](const Slice& of, at::ScalarType of_x) {
    for (const at::ScalarType dtype : reference::kFloatDtypes) {
      for (const bool by_row : {false, true}) {
        SCOPED_TRACE(c10::str("dtype = ", dtype, ", by_row = ", by_row));
        std::optional<at::Tensor> rows;
        std::optional<c10::SymInt> num_rows;
        if (by_row) {
          // Not contiguous.
          rows = at::tensor({4, 0, 4, 0, 1, 0, 9, 0, 9, 0, 4, 0, 0}, at::kInt)
                     .slice(0, 0, 13, 2)
                     .unsqueeze(-1);
          num_rows = 11;
        }
        launches = 0;
        const auto [cos, sin] = table_gradients(of, rows, num_rows, dtype, c10::DispatchKey::CUDA);
        EXPECT_LE(launches, 1);
        const auto [cos_in_aten, sin_in_aten] =
            table_gradients(of, rows, num_rows, dtype, c10::DispatchKey::CPU);
        expect_close(cos, cos_in_aten, of_x);
        expect_close(sin, sin_in_aten, of_x);
        const auto [only_cos, none] =
            table_gradients(of, rows, num_rows, dtype, c10::DispatchKey::CUDA, {true, false});
        EXPECT_TRUE(same_bits(only_cos, cos));
        EXPECT_FALSE(none.defined());
        const auto [no, only_sin] =
            table_gradients(of, rows, num_rows, dtype, c10::DispatchKey::CUDA, {false, true});
        EXPECT_FALSE(no.defined());
        EXPECT_TRUE(same_bits(only_sin, sin));
      }
    }
  });
}

TEST(CudaGradients, OfTablesWithoutTokensOrRowsAreZeroOrEmpty) {
  const Slice none = {{at::empty({0, 3, 16})}, {at::empty({0, 3, 16})}, {0, 1, 8}};
  const at::Tensor rows = at::empty({0, 1}, at::kLong);
  const auto key = c10::DispatchKey::CUDA;
  EXPECT_TRUE(same_bits(std::get<0>(table_gradients(none, rows, 4, at::kHalf, key)),
                        at::zeros({4, 8}, at::kHalf)));
  EXPECT_EQ(std::get<1>(table_gradients(none, rows, 0, at::kHalf, key)).numel(), 0);
}

TEST(CudaGradients, OfPositionsAndFrequenciesAreThoseInATenOperators) {
  for_each_slice([](const Slice& of, at::ScalarType of_x) {
    if (of.full_width) {
      return;
    }
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      for (const at::ScalarType of_factors : {at::kInt, at::kLong, at::kFloat, at::kDouble}) {
        SCOPED_TRACE(c10::str("dtype = ", dtype, ", factors of ", of_factors));
        const auto factors = [&](at::IntArrayRef sizes) {
          return random_values(sizes, at::kDouble, 5).mul(9).to(of_factors);
        };
        const auto expect_same = [&](const at::Tensor& with, at::IntArrayRef dim) {
          const auto in = [&](c10::DispatchKey key) {
            return angle_gradient(of, with, dim, dtype, key);
          };
          expect_close(in(c10::DispatchKey::CUDA), in(c10::DispatchKey::CPU), of_x);
        };
        expect_same(factors({8}), {-1});            // of positions
        expect_same(factors({8, 2}).t()[0], {-1});  // not contiguous
        expect_same(factors({3, 1, 1, 8}), {-1});   // of positions, several axes
        expect_same(factors({7, 1, 1}), {-2, -3});  // of inv_freq
        expect_same(factors({3, 7, 1, 1}), {-2, -3});
        expect_same(factors({3, 7, 1, 1}), {});
        expect_same(factors({1}), {-1});
      }
    }
  });
}

}  // namespace
