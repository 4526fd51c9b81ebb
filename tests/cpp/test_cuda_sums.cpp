// The sums for gradients of cosines, sines and angles (csrc/gradient_sums.cpp), with every thread
// of the CUDA kernel run on the host.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <tuple>

#include "cuda/dispatch.h"
#include "cuda/plan.h"
#include "cuda/run.h"
#include "host_launch.h"
#include "host_threads.h"
#include "random_calls.h"
#include "reference.h"

namespace {

using host::for_each_dtype;
using host::for_each_form;
using host::kGuard;
using host::Running;
using host::storage_of;
using host::strided_values;
using reference::random_values;
using reference::same_bits;
using rope::Launch;
using rope::Sums;
using rope::cuda::Plan;

// The plan of the last launch.
Plan last_plan;

void run_sums(const Launch& launch, const Sums& sums, const Running& running = {}) {
  Plan plan = rope::cuda::make_sum_plan(launch);
  last_plan = plan;
  plan.index_is_64bit = plan.index_is_64bit || running.index_is_64bit;
  rope::cuda::dispatch_thread<rope::cuda::SumThread>(launch, plan, [&](auto type) {
    using Thread = typename decltype(type)::type;
    const host::SharedMemory<Thread> shared(plan);
    host::run_blocks<Thread>(
        rope::cuda::sum_params<typename Thread::IndexType>(launch, plan, sums), plan, 0,
        plan.grid_x * plan.grid_y, running, [&] { shared.clear(); },
        [&](Thread& thread) { thread.sum_rows(shared.get()); },
        [&](Thread& thread) { thread.store_sums(shared.get()); });
  });
}

}  // namespace

// Replaces csrc/cuda/sum.cu.
namespace rope::cuda {

bool has_kernels() { return true; }

void sum(const Launch& launch, int, MakeSums make_sums) {
  run_sums(launch, make_sums(make_sum_plan(launch).grid_y));
}

}  // namespace rope::cuda

namespace {

// The arguments of the operators.
struct Arguments {
  at::Tensor grad;
  at::Tensor x;
  std::vector<std::int64_t> sizes;
  reference::Slice slice = {-1, 0, false};
  bool conjugate = false;
  bool full_width = false;
  // A second tensor, summed over with the first.
  at::Tensor grad_k = {};
  at::Tensor k = {};

  std::vector<at::Tensor> grads() const { return with(grad, grad_k); }
  std::vector<at::Tensor> xs() const { return with(x, k); }

 private:
  static std::vector<at::Tensor> with(const at::Tensor& first, const at::Tensor& second) {
    return second.defined() ? std::vector<at::Tensor>{first, second} : std::vector{first};
  }
};

struct Result {
  at::Tensor cos;  // undefined if not requested
  at::Tensor sin;
};

// Calls the kernel of an operator for a device, on CPU tensors.
template <typename Output, typename... Rest>
Output call(const char* name, const Arguments& arguments, c10::DispatchKey key, Rest... rest) {
  const reference::Slice& slice = arguments.slice;
  const auto handle = c10::Dispatcher::singleton()
                          .findSchemaOrThrow(name, "")
                          .typed<Output(at::TensorList, at::TensorList, c10::SymIntArrayRef,
                                        std::int64_t, std::int64_t, bool, bool, Rest...)>();
  return handle.redispatch(c10::DispatchKeySet(key), arguments.grads(), arguments.xs(),
                           c10::fromIntArrayRefSlow(arguments.sizes), slice.embedding_axis,
                           slice.rotary_offset, slice.interleaved, arguments.conjugate, rest...);
}

Result call_cos_sin(const Arguments& arguments, c10::DispatchKey key = c10::DispatchKey::CUDA) {
  auto [cos, sin] =
      call<std::tuple<at::Tensor, at::Tensor>, bool, const std::optional<at::Tensor>&,
           const std::optional<c10::SymInt>&, std::optional<at::ScalarType>, std::array<bool, 2>>(
          "rope::_cos_sin_gradient", arguments, key, arguments.full_width, std::nullopt,
          std::nullopt, std::nullopt, {true, true});
  return {cos, sin};
}

Result call_angle(const Arguments& arguments, c10::DispatchKey key = c10::DispatchKey::CUDA) {
  return {{},
          call<at::Tensor, const std::optional<at::Tensor>&, at::IntArrayRef,
               std::optional<at::ScalarType>>("rope::_angle_gradient", arguments, key, std::nullopt,
                                              {}, std::nullopt)};
}

// Visits the launch of the sums of a call.
void for_each_launch(const Arguments& arguments, const std::function<void(const Launch&)>& visit) {
  const reference::Slice& slice = arguments.slice;
  const auto real = at::toOpMathType(arguments.x.scalar_type());
  const at::Tensor like_sums = at::empty(arguments.sizes, at::dtype(real).device(at::kMeta));
  const host::Call call = host::apply_cos_sin(like_sums, like_sums,
                                              {.embedding_axis = slice.embedding_axis,
                                               .rotary_offset = slice.rotary_offset,
                                               .interleaved = slice.interleaved,
                                               .conjugate = arguments.conjugate,
                                               .full_width = arguments.full_width});
  const auto& [grad, x] = std::tie(arguments.grad, arguments.x);
  if (arguments.k.defined()) {
    rope::for_each_launch(call.on(grad, arguments.grad_k), {x, arguments.k}, visit);
  } else {
    rope::for_each_launch(call.on(grad), {x, {}}, visit);
  }
}

// The sums by the threads of one launch, written between guards.
Result run_guarded(const Arguments& arguments, const Running& running) {
  const auto real = at::toOpMathType(arguments.x.scalar_type());
  const std::int64_t numel = c10::multiply_integers(arguments.sizes);
  Result result;
  int launches = 0;
  for_each_launch(arguments, [&](const Launch& launch) {
    launches += 1;
    const std::int64_t groups = rope::cuda::make_sum_plan(launch).grid_y;
    const auto poisoned = [&] {
      return at::full({groups * numel + 2 * kGuard}, std::numeric_limits<double>::quiet_NaN(),
                      at::dtype(real));
    };
    const auto middle = [&](const at::Tensor& buffer) {
      return buffer.slice(0, kGuard, kGuard + groups * numel);
    };
    const at::Tensor cos = poisoned();
    const at::Tensor sin = poisoned();
    run_sums(launch, {middle(cos).data_ptr(), middle(sin).data_ptr(), numel}, running);
    const auto total = [&](const at::Tensor& buffer) {
      EXPECT_EQ(buffer.isnan().sum().item<std::int64_t>(), 2 * kGuard)
          << "around the sums, or a sum that nothing wrote";
      std::vector<std::int64_t> sizes = arguments.sizes;
      sizes.insert(sizes.begin(), groups);
      const at::Tensor parts = middle(buffer).view(sizes);
      at::Tensor sum = parts[0];
      for (std::int64_t group = 1; group < groups; ++group) {
        sum = sum + parts[group];  // as the kernel of scatter.cu adds them
      }
      return sum;
    };
    result = {total(cos), total(sin)};
  });
  EXPECT_EQ(launches, 1);
  return result;
}

struct Expected {
  at::Tensor value;      // float64
  at::Tensor magnitude;  // the sum of the absolute values
};

Expected operator+(const Expected& left, const Expected& right) {
  return {left.value + right.value, left.magnitude + right.magnitude};
}

// The sums of one tensor by their formula, for cosines and for sines.
std::pair<Expected, Expected> formula(const Arguments& arguments, const at::Tensor& grad,
                                      const at::Tensor& x) {
  const reference::Slice& slice = arguments.slice;
  std::vector<std::int64_t> sizes = arguments.sizes;
  sizes.back() /= arguments.full_width ? 2 : 1;
  const std::int64_t num_pairs = sizes.back();
  const at::Tensor n = at::arange(num_pairs);
  const at::Tensor first = slice.rotary_offset + (slice.interleaved ? 2 * n : n);
  const at::Tensor second = first + (slice.interleaved ? 1 : num_pairs);
  const auto part = [&](const at::Tensor& of, const at::Tensor& index) {
    return of.to(at::kDouble).movedim(slice.embedding_axis, -1).index_select(-1, index);
  };
  const auto sum = [&](double sign, const at::Tensor& of_grad, const at::Tensor& of_x) {
    const at::Tensor product = part(grad, of_grad) * part(x, of_x);
    return Expected{sign * product.sum_to_size(sizes), product.abs().sum_to_size(sizes)};
  };
  const double sign = arguments.conjugate ? -1 : 1;
  const Expected cos_a = sum(1, first, first);
  const Expected cos_b = sum(1, second, second);
  const Expected ba = sum(sign, second, first);
  const Expected ab = sum(-sign, first, second);
  if (!arguments.full_width) {
    return {cos_a + cos_b, ba + ab};
  }
  // The columns of the first elements of all pairs and those of the second.
  const auto columns = [&](const Expected& a, const Expected& b) {
    const auto join = [&](const at::Tensor& left, const at::Tensor& right) {
      return slice.interleaved ? at::stack({left, right}, -1).flatten(-2)
                               : at::cat({left, right}, -1);
    };
    return Expected{join(a.value, b.value), join(a.magnitude, b.magnitude)};
  };
  return {columns(cos_a, cos_b), arguments.conjugate ? columns(ba, ab) : columns(ab, ba)};
}

std::pair<Expected, Expected> formula(const Arguments& arguments) {
  const auto of_x = formula(arguments, arguments.grad, arguments.x);
  if (!arguments.k.defined()) {
    return of_x;
  }
  const auto of_k = formula(arguments, arguments.grad_k, arguments.k);
  return {of_x.first + of_k.first, of_x.second + of_k.second};
}

// Each addition rounds once, in the kernel and in the formula.
testing::AssertionResult is_sum(const at::Tensor& actual, const Expected& expected,
                                const Arguments& arguments) {
  const auto real = at::toOpMathType(arguments.x.scalar_type());
  if (actual.scalar_type() != real || actual.sizes() != at::IntArrayRef(arguments.sizes)) {
    return testing::AssertionFailure() << actual.scalar_type() << " of " << actual.sizes();
  }
  const double additions =
      2.0 *
      static_cast<double>(arguments.x.numel() + (arguments.k.defined() ? arguments.k.numel() : 0)) /
      static_cast<double>(std::max<std::int64_t>(c10::multiply_integers(arguments.sizes), 1));
  const double epsilon = real == at::kDouble ? 0x1p-51 : 0x1p-24;
  const at::Tensor wrong = ((actual.to(at::kDouble) - expected.value).abs() <=
                            expected.magnitude * (additions + 2) * epsilon)
                               .logical_not();
  const auto count = wrong.sum().item<std::int64_t>();
  return count == 0 ? testing::AssertionSuccess()
                    : testing::AssertionFailure()
                          << count << " of " << actual.numel() << " sums are wrong";
}

void expect_same_bits(const Result& actual, const Result& wanted, const std::string& what) {
  EXPECT_TRUE(same_bits(actual.sin, wanted.sin)) << what << ", sin";
  if (actual.cos.defined()) {
    EXPECT_TRUE(same_bits(actual.cos, wanted.cos)) << what << ", cos";
  }
}

// What must hold for every call: the sums are right, the inputs are unchanged, and the bits do not
// depend on how the threads are run.
void expect_right(const Arguments& arguments) {
  const at::Tensor grad_before = storage_of(arguments.grad).clone();
  const at::Tensor x_before = storage_of(arguments.x).clone();
  const Result result = call_cos_sin(arguments);
  EXPECT_TRUE(same_bits(storage_of(arguments.grad), grad_before)) << "the gradient was written";
  EXPECT_TRUE(same_bits(storage_of(arguments.x), x_before)) << "x was written";
  const auto [cos, sin] = formula(arguments);
  EXPECT_TRUE(is_sum(result.cos, cos, arguments)) << "cos";
  EXPECT_TRUE(is_sum(result.sin, sin, arguments)) << "sin";
  const Result composed = call_cos_sin(arguments, c10::DispatchKey::CPU);
  EXPECT_TRUE(is_sum(composed.cos, cos, arguments)) << "cos in ATen operators";
  EXPECT_TRUE(is_sum(composed.sin, sin, arguments)) << "sin in ATen operators";
  if (testing::Test::HasFailure()) {
    return;
  }
  if (!arguments.full_width) {
    expect_same_bits(call_angle(arguments), result, "alone");
  }
  expect_same_bits(run_guarded(arguments, {}), result, "between guards");
  expect_same_bits(run_guarded(arguments, {.last_thread_first = true}), result,
                   "the last thread first");
  expect_same_bits(run_guarded(arguments, {.index_is_64bit = true}), result, "with 64-bit indices");
}

// A gradient for x.
at::Tensor gradient_for(const at::Tensor& x) {
  return random_values(x.sizes(), x.scalar_type(), 7);
}

TEST(CudaSums, AreRightForEveryDtypeInEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const at::Tensor x = random_values({2, 5, 3, 64}, dtype);
      expect_right({gradient_for(x), x, {5, 1, 32}, {-1, 0, interleaved}, conjugate});
      EXPECT_EQ(last_plan.uses_vectors, dtype != at::kDouble);
    });
  });
}

TEST(CudaSums, AreOverAllThatSharesAnAngle) {
  const at::Tensor x = random_values({2, 5, 3, 16});
  for (const std::vector<std::int64_t>& tokens : std::vector<std::vector<std::int64_t>>{
           {}, {1}, {3}, {5, 1}, {5, 3}, {2, 1, 1}, {2, 1, 3}, {2, 5, 1}, {2, 5, 3}}) {
    SCOPED_TRACE(c10::str("tokens = ", tokens));
    std::vector<std::int64_t> sizes = tokens;
    sizes.push_back(8);
    expect_right({gradient_for(x), x, sizes});
  }
}

TEST(CudaSums, AreOverHeadsBeforeTokens) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 3, 7, 32}, dtype);
    expect_right({gradient_for(x), x, {7, 16}});
    expect_right({gradient_for(x), x.transpose(1, 2).contiguous().transpose(1, 2), {7, 16}});
    expect_right({gradient_for(x).transpose(1, 2).contiguous().transpose(1, 2), x, {2, 1, 7, 16}});
  });
}

TEST(CudaSums, ReadAnySlice) {
  struct Case {
    std::int64_t size, offset, pairs;
  };
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [size, offset, pairs] :
         {Case{64, 0, 16}, Case{96, 32, 16}, Case{96, 16, 32}, Case{72, 8, 24}, Case{67, 16, 24},
          Case{64, 3, 16}, Case{64, 1, 31}, Case{33, 0, 16}, Case{20, 17, 1}, Case{20, 5, 3},
          Case{14, 0, 7}, Case{2, 0, 1}, Case{259, 1, 129}}) {
      SCOPED_TRACE(c10::str("size = ", size, ", offset = ", offset, ", pairs = ", pairs));
      for_each_form(
          [&, size = size, offset = offset, pairs = pairs](bool interleaved, bool conjugate) {
            const at::Tensor x = random_values({2, 3, 2, size}, dtype);
            expect_right({gradient_for(x), x, {3, 1, pairs}, {-1, offset, interleaved}, conjugate});
          });
    }
  });
}

TEST(CudaSums, ReadAnyStrides) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool interleaved : {false, true}) {
      const reference::Slice slice = {-1, 0, interleaved};
      for (const std::vector<std::int64_t>& strides : std::vector<std::vector<std::int64_t>>{
               {960, 320, 64, 1}, {768, 256, 64, 2}, {1, 2, 6, 24}, {396, 132, 33, 1}}) {
        SCOPED_TRACE(c10::str("strides = ", strides, ", interleaved = ", interleaved));
        const at::Tensor dense = random_values({2, 3, 4, 32}, dtype, 3);
        const at::Tensor strided = strided_values({2, 3, 4, 32}, strides, 0, dtype);
        expect_right({dense, strided, {3, 1, 16}, slice});
        expect_right({strided, dense, {3, 1, 16}, slice});
        const at::Tensor unaligned = strided_values({2, 3, 4, 32}, {384, 128, 32, 1}, 1, dtype);
        expect_right({unaligned, dense, {3, 1, 16}, slice});
        EXPECT_FALSE(last_plan.uses_vectors);
      }
    }
  });
}

TEST(CudaSums, ReadExpandedGradients) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 3, 4, 32}, dtype);
    for (const std::vector<std::int64_t>& sizes : std::vector<std::vector<std::int64_t>>{
             {2, 3, 1, 32}, {1, 1, 4, 32}, {2, 3, 4, 1}, {1, 1, 1, 1}}) {
      SCOPED_TRACE(c10::str("sizes = ", sizes));
      expect_right({random_values(sizes, dtype, 7).expand_as(x), x, {3, 1, 16}});
    }
  });
}

TEST(CudaSums, AreAlongAnyAxis) {
  for_each_dtype([](at::ScalarType dtype) {
    for (std::int64_t axis = -4; axis < 4; ++axis) {
      SCOPED_TRACE(c10::str("axis = ", axis));
      std::vector<std::int64_t> sizes = {2, 3, 4};
      sizes.insert(sizes.begin() + (axis + 4) % 4, 20);
      const at::Tensor x = random_values(sizes, dtype);
      expect_right({gradient_for(x), x, {3, 1, 8}, {axis, 1, false}});
    }
  });
}

TEST(CudaSums, AreOfOneDimensionAndOfOneHead) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor row = random_values({64}, dtype);
    expect_right({gradient_for(row), row, {32}});
    const at::Tensor head = random_values({9, 64}, dtype);
    expect_right({gradient_for(head), head, {9, 32}});
    expect_right({gradient_for(head), head, {32}});
  });
}

TEST(CudaSums, AreCutIntoGroupsWhereFewTokensHaveManyRows) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [batch, tokens, heads, size] :
         {std::tuple(65, 3, 7, 32), {67, 1, 1, 6}, {1, 2, 35, 64}}) {
      SCOPED_TRACE(c10::str("(", batch, ", ", tokens, ", ", heads, ", ", size, ")"));
      const at::Tensor x = random_values({batch, tokens, heads, size}, dtype);
      expect_right({gradient_for(x), x, {tokens, 1, size / 2}, {-1, 0, true}});
      EXPECT_GT(last_plan.grid_y, 1);
      // The last group has fewer rows than the others.
      EXPECT_NE(last_plan.blocks.rows % last_plan.blocks.rows_per_block, 0);
    }
  });
}

TEST(CudaSums, AreOfOneGroupWhereTokensAreEnough) {
  const at::Tensor x = random_values({5, 16384, 2, 32}, at::kHalf);
  const Arguments arguments = {gradient_for(x), x, {16384, 1, 16}};
  const Result result = call_cos_sin(arguments);
  const auto [cos, sin] = formula(arguments);
  EXPECT_TRUE(is_sum(result.cos, cos, arguments));
  EXPECT_TRUE(is_sum(result.sin, sin, arguments));
  expect_right({gradient_for(x), x, {16384, 2, 16}});
  EXPECT_EQ(last_plan.grid_y, 1);
}

TEST(CudaSums, AreOverTwoTensorsAtOnce) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const at::Tensor q = random_values({2, 5, 7, 64}, dtype);
      for (const at::Tensor& k :
           {random_values({2, 5, 2, 64}, dtype, 3), random_values({5, 1, 48}, dtype, 3),
            strided_values({2, 5, 2, 45}, {960, 192, 90, 2}, 0, dtype)}) {
        for (const bool full_width : {false, true}) {
          SCOPED_TRACE(c10::str("k: ", k.sizes(), ", full_width = ", full_width));
          expect_right({.grad = gradient_for(q),
                        .x = q,
                        .sizes = {5, 1, full_width ? 32 : 16},
                        .slice = {-1, 8, interleaved},
                        .conjugate = conjugate,
                        .full_width = full_width,
                        .grad_k = gradient_for(k),
                        .k = k});
        }
      }
    });
  });
}

TEST(CudaSums, AreOfEachElementForTablesOfFullWidth) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const at::Tensor x = random_values({2, 35, 3, 40}, dtype);
      const auto expect = [&](const at::Tensor& some, std::vector<std::int64_t> sizes,
                              const reference::Slice& slice) {
        expect_right({.grad = gradient_for(some),
                      .x = some,
                      .sizes = std::move(sizes),
                      .slice = slice,
                      .conjugate = conjugate,
                      .full_width = true});
      };
      expect(x, {35, 1, 32}, {-1, 8, interleaved});
      expect(x, {35, 3, 30}, {-1, 1, interleaved});
      expect(x.transpose(1, 3), {35, 32}, {1, 3, interleaved});
    });
  });
}

TEST(CudaSums, AreRightForRandomCalls) {
  constexpr std::uint64_t kCalls = 60;
  for (std::uint64_t seed = 0; seed < kCalls; ++seed) {
    host::Draw draw(seed);
    const host::Shapes shapes = host::random_shapes(draw);
    const std::int64_t axis = host::random_axis(draw, shapes);
    const host::RandomSlice slice(draw);
    if (slice.num_pairs == 0) {
      continue;
    }
    const at::ScalarType dtype = draw.one_of(reference::kFloatDtypes);
    const auto tensor = [&](const host::Sizes& others, std::int64_t size, std::uint64_t of) {
      return host::in_any_layout(draw,
                                 random_values(host::with_dim(others, size, axis), dtype, of));
    };
    const std::int64_t q_size = slice.axis_size(draw);
    Arguments arguments{.grad = tensor(shapes.q, q_size, 1),
                        .x = tensor(shapes.q, q_size, 2),
                        .sizes = shapes.tokens,
                        .slice = {axis, slice.offset, draw.one_in(2)},
                        .conjugate = draw.one_in(2),
                        .full_width = draw.one_in(2)};
    arguments.sizes.push_back(arguments.full_width ? 2 * slice.num_pairs : slice.num_pairs);
    if (draw.one_in(2)) {
      const std::int64_t k_size = slice.axis_size(draw);
      arguments.grad_k = tensor(shapes.k, k_size, 3);
      arguments.k = tensor(shapes.k, k_size, 4);
    }
    SCOPED_TRACE(c10::str("seed = ", seed, ": ", dtype, ", x: ", arguments.x.sizes(),
                          ", sums: ", arguments.sizes, ", axis = ", axis,
                          ", offset = ", slice.offset, ", full_width = ", arguments.full_width));
    expect_right(arguments);
    if (HasFailure()) {
      return;
    }
  }
}

TEST(CudaSums, OfNothingAreZero) {
  for (const auto& [sizes_of_x, sizes] :
       {std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>>{{5, 0, 32}, {5, 1, 16}},
        {{0, 5, 2, 32}, {5, 1, 16}},
        {{0, 5, 2, 32}, {0, 5, 1, 16}},
        {{5, 2, 32}, {5, 1, 0}},
        {{5, 2, 0}, {5, 1, 0}}}) {
    SCOPED_TRACE(c10::str("sizes = ", sizes));
    const at::Tensor x = random_values(sizes_of_x, at::kHalf);
    for (const Result& result : {call_cos_sin({x, x, sizes}), call_angle({x, x, sizes})}) {
      EXPECT_TRUE(same_bits(result.sin, at::zeros(sizes)));
      EXPECT_TRUE(!result.cos.defined() || same_bits(result.cos, at::zeros(sizes)));
    }
  }
}

TEST(CudaSums, KeepNaNAndInfinityInTheirPair) {
  const at::Tensor x = random_values({3, 4, 32}, at::kHalf);
  x[1][2][5] = std::numeric_limits<double>::quiet_NaN();
  x[2][0][4] = std::numeric_limits<double>::infinity();
  const Result result = call_cos_sin({gradient_for(x), x, {3, 1, 16}});
  at::Tensor harmed = at::zeros({3, 1, 16}, at::kBool);
  harmed[1][0][5] = harmed[2][0][4] = true;
  EXPECT_TRUE(at::equal(result.cos.isfinite(), harmed.logical_not()));
  EXPECT_TRUE(at::equal(result.sin.isfinite(), harmed.logical_not()));
}

TEST(CudaSums, OfMoreDimensionsThanALaunchHasAreInATenOperators) {
  const std::vector<std::int64_t> sizes_of_x(16, 2);
  std::vector<std::int64_t> permuted(16);
  for (std::int64_t d = 0; d < 16; ++d) {
    permuted[d] = d < 15 ? (d * 7) % 15 : 15;
  }
  const at::Tensor x = random_values(sizes_of_x).permute(permuted);
  const Arguments arguments = {gradient_for(x), x, {1}};
  last_plan = {};
  const Result result = call_cos_sin(arguments);
  EXPECT_EQ(last_plan.grid_x, 0);
  const auto [cos, sin] = formula(arguments);
  EXPECT_TRUE(is_sum(result.cos, cos, arguments));
  EXPECT_TRUE(is_sum(result.sin, sin, arguments));
}

TEST(CudaSums, AreInATenOperatorsWhereTheyAreToBeDifferentiated) {
  const auto key = c10::DispatchKey::AutogradCUDA;
  const at::Tensor plain = random_values({5, 3, 16}, at::kDouble);
  const at::Tensor leaf = plain.clone().requires_grad_();
  EXPECT_FALSE(call_angle({plain, plain, {5, 1, 8}}, key).sin.requires_grad());
  for (const auto& [grad, x] : {std::pair(leaf, plain), {plain, leaf}}) {
    EXPECT_TRUE(call_angle({grad, x, {5, 1, 8}}, key).sin.requires_grad());
    EXPECT_TRUE(call_cos_sin({grad, x, {5, 1, 8}}, key).cos.requires_grad());
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(call_angle({grad, x, {5, 1, 8}}, key).sin.requires_grad());
  }
}

TEST(CudaSums, RefuseWhatDoesNotFitBeforeAnythingIsRead) {
  const at::Tensor x = random_values({5, 3, 16});
  last_plan = {};
  const auto refused = [](const Arguments& arguments, const std::string& message) {
    for (const auto key : {c10::DispatchKey::CUDA, c10::DispatchKey::CPU}) {
      try {
        call_angle(arguments, key);
        ADD_FAILURE() << "nothing was thrown instead of: " << message;
      } catch (const c10::Error& error) {
        EXPECT_NE(std::string(error.what_without_backtrace()).find(message), std::string::npos)
            << error.what_without_backtrace();
      }
    }
  };
  const std::string expected = "rope::_angle_gradient(): expected ";
  refused({x.to(at::kLong), x.to(at::kLong), {5, 1, 8}}, expected + "ys[0] to be float64");
  refused({x.to(at::kHalf), x, {5, 1, 8}}, expected + "grads[0] to be float32 on cpu");
  refused({x.slice(0, 1), x, {5, 1, 8}}, expected + "grads[0] to have the shape of ys[0]");
  refused({x[0], x, {5, 1, 8}}, expected + "grads[0] to have the shape of ys[0]");
  refused({x, x, {5, 1, 8}, {3, 0, false}}, expected + "embedding_axis to be a dimension of ys[0]");
  refused({x, x, {}}, expected + "sizes to end in the number of pairs");
  refused({x, x, {5, 1, 9}}, expected + "sizes to end in the number of pairs");
  refused({x, x, {5, 1, -1}}, expected + "sizes to end in the number of pairs");
  refused({x, x, {5, 1, 8}, {-1, 1, false}}, expected + "sizes to end in the number of pairs");
  refused({x, x, {5, 1, 8}, {-1, -1, false}}, expected + "sizes to end in the number of pairs");
  refused({x, x, {4, 1, 8}}, expected + "sizes to be broadcastable");
  refused({x, x, {1, 5, 1, 8}}, expected + "sizes to be broadcastable");
  EXPECT_EQ(last_plan.grid_x, 0);
}

}  // namespace
