// Runs every thread of every block of the kernels for gradients of norms on the host.
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "cuda/dispatch.h"
#include "cuda/norm_plan.h"
#include "host_launch.h"
#include "host_norm.h"
#include "host_threads.h"
#include "norm_operators.h"
#include "random_calls.h"
#include "reference.h"

namespace {

using host::Call;
using host::for_each_dtype;
using host::for_each_form;
using host::kGuard;
using host::norm_apply;
using host::norm_apply_cos_sin;
using host::storage_of;
using host::strided_values;
using reference::random_positions;
using reference::random_values;
using reference::same_bits;
using rope::Launch;
using rope::NormGradientCall;
using rope::NormGradients;
using rope::WeightSums;
using rope::cuda::NormGradientPlan;
using rope::cuda::NormKernels;

// How the threads of a launch are run.
struct Running : host::Running {
  NormKernels kernels = NormKernels::kAll;
};

void run_threads(const Launch& launch, const NormGradientPlan& plan, const WeightSums& sums,
                 const Running& running) {
  const void* frequencies = host::frequencies(launch);
  const std::int64_t blocks = plan.grid_x * plan.grid_y;
  if (plan.is_wide) {
    rope::cuda::dispatch_wide_norm_thread<rope::cuda::WideNormGradientThread>(
        launch, plan, [&](auto type) {
          using Thread = typename decltype(type)::type;
          host::run_cooperative<Thread>(
              rope::cuda::wide_norm_gradient_params<typename Thread::IndexType>(launch, plan,
                                                                                frequencies, sums),
              plan, 0, blocks, running,
              [](auto& block, const auto& params, auto* shared, std::int64_t) {
                rope::cuda::normalize_wide_block(block, params, shared, [] {});
              });
        });
    return;
  }
  rope::cuda::dispatch_norm_thread<rope::cuda::NormGradientThread>(launch, [&](auto type) {
    using Thread = typename decltype(type)::type;
    host::run_cooperative<Thread>(
        rope::cuda::usual_norm_gradient_params(launch, plan, frequencies, sums), plan, 0, blocks,
        running, [](auto& block, const auto& params, auto* shared, std::int64_t block_y) {
          rope::cuda::differentiate_norm_block(block, block_y == 0, params, shared, [] {});
        });
  });
}

// Sums of parts between guards. Wide kernels find zeros, the others write every element.
at::Tensor guarded_parts(const NormGradientPlan& plan, std::int64_t numel, at::ScalarType real) {
  const at::Tensor parts = at::full({plan.num_parts * numel + 2 * kGuard},
                                    std::numeric_limits<double>::quiet_NaN(), at::dtype(real));
  if (plan.is_wide) {
    parts.slice(0, kGuard, -kGuard).zero_();
  }
  return parts;
}

void run_launch(const Launch& launch, const std::array<at::Tensor, 2>& weight_grads,
                const Running& running) {
  const NormGradientPlan plan = rope::cuda::make_norm_gradient_plan(launch, running.kernels);
  const at::ScalarType real = launch.dtype == at::kDouble ? at::kDouble : at::kFloat;
  std::array<at::Tensor, 2> parts;
  WeightSums sums{};
  for (int i = 0; i < 2; ++i) {
    if (weight_grads[i].defined()) {
      parts[i] = guarded_parts(plan, weight_grads[i].numel(), real);
      sums.of_operand[i] = parts[i].slice(0, kGuard).data_ptr();
    }
  }
  run_threads(launch, plan, sums, running);
  for (int i = 0; i < 2; ++i) {
    if (weight_grads[i].defined()) {
      EXPECT_EQ(parts[i].slice(0, 0, kGuard).isnan().sum().item<std::int64_t>(), kGuard);
      EXPECT_EQ(parts[i].slice(0, -kGuard).isnan().sum().item<std::int64_t>(), kGuard);
      weight_grads[i].view(-1).copy_(
          parts[i].slice(0, kGuard, -kGuard).view({plan.num_parts, -1}).sum(0));
    }
  }
}

struct Arguments {
  Call call;
  at::Tensor q_grad;
  at::Tensor k_grad = {};
  std::array<bool, 4> wants = {true, true, true, true};
};

NormGradientCall gradient_call(const Arguments& arguments) {
  NormGradientCall call;
  static_cast<rope::Call&>(call) = arguments.call;
  call.q_grad = arguments.q_grad;
  call.k_grad = arguments.k_grad;
  call.wants = arguments.wants;
  return call;
}

// The gradients of weights are float64 or float32, to see their sums.
NormGradients gradients(const Arguments& arguments, const Running& running = {}) {
  const Call& call = arguments.call;
  const auto like_x = [](bool is_wanted, const at::Tensor& x) {
    return is_wanted && x.defined() ? host::poisoned_like(x) : at::Tensor();
  };
  const auto like_weight = [&](bool is_wanted, const at::Tensor& weight) {
    const at::ScalarType real = call.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    return is_wanted && weight.defined() ? at::empty(weight.sizes(), at::dtype(real))
                                         : at::Tensor();
  };
  const NormGradients outputs = {like_x(arguments.wants[0], call.q),
                                 like_x(arguments.wants[1], call.k),
                                 like_weight(arguments.wants[2], call.q_weight),
                                 like_weight(arguments.wants[3], call.k_weight)};
  const NormGradientCall of_call = gradient_call(arguments);
  rope::check(of_call);
  rope::for_each_launch(of_call, outputs,
                        [&](const Launch& launch, const std::array<at::Tensor, 2>& weight_grads) {
                          run_launch(launch, weight_grads, running);
                        });
  return outputs;
}

std::vector<NormGradientPlan> plans(const Arguments& arguments) {
  std::vector<NormGradientPlan> result;
  const Call& call = arguments.call;
  rope::for_each_launch(gradient_call(arguments),
                        {at::empty_like(call.q), call.is_pair ? at::empty_like(call.k) : call.k,
                         call.q_weight, call.k_weight},
                        [&](const Launch& launch, const std::array<at::Tensor, 2>&) {
                          result.push_back(rope::cuda::make_norm_gradient_plan(launch));
                        });
  return result;
}

// The gradients of x and of the weight by their formula, in float64.
std::pair<at::Tensor, at::Tensor> formula(const Call& call, const at::Tensor& x,
                                          const at::Tensor& weight, const at::Tensor& grad) {
  const at::Tensor g = grad.to(at::kDouble);
  const auto rotate = [&](const at::Tensor& tensor, bool transposed) {
    Call rotation = call;
    rotation.options.conjugate ^= transposed;
    return host::expected_rotation(rotation, tensor).values;
  };
  const reference::Norm norm = host::norm_of(call, x, weight);
  const at::Tensor t = norm.is_last ? g : rotate(g, true);
  const at::Tensor z = norm.is_last ? rotate(x.to(at::kDouble), false) : x.to(at::kDouble);
  const at::Tensor gain =
      norm.weight.defined() ? norm.weight.to(at::kDouble) + norm.weight_offset : at::ones_like(z);
  const auto mean = [&](const at::Tensor& of) { return of.mean(norm.axes, /*keepdim=*/true); };
  const at::Tensor scale = (mean(z * z) + norm.eps).rsqrt();
  const at::Tensor d = scale * (t * gain - z * scale * scale * mean(t * gain * z));
  at::Tensor of_weight;
  if (weight.defined()) {
    of_weight =
        (t * z * scale).movedim(call.options.embedding_axis, -1).sum_to_size(weight.sizes());
  }
  return {norm.is_last ? rotate(d, true) : d, of_weight};
}

// Relative to the largest element, before the one rounding.
testing::AssertionResult is_gradient(const at::Tensor& actual, const at::Tensor& expected,
                                     at::ScalarType dtype) {
  if (actual.numel() == 0) {
    return testing::AssertionSuccess();
  }
  const double relative = dtype == at::kDouble ? 1e-11 : 2e-5;
  const at::Tensor tolerance =
      at::full_like(expected, relative * expected.abs().max().item<double>() + 1e-30);
  return reference::is_rotated(actual, {expected, tolerance});
}

void expect_same_bits(const NormGradients& actual, const NormGradients& wanted,
                      const std::string& what, bool with_weights = true) {
  const auto expect = [&](const at::Tensor& left, const at::Tensor& right, const char* name) {
    if (left.defined() && right.defined()) {
      EXPECT_TRUE(same_bits(left, right)) << what << ", " << name;
    }
  };
  expect(actual.q, wanted.q, "q");
  expect(actual.k, wanted.k, "k");
  if (with_weights) {
    expect(actual.q_weight, wanted.q_weight, "q_weight");
    expect(actual.k_weight, wanted.k_weight, "k_weight");
  }
}

// Those that are defined.
void expect_gradients(const Arguments& arguments, const NormGradients& actual,
                      const std::string& what) {
  const Call& call = arguments.call;
  const auto expect = [&](const at::Tensor& gradient, const at::Tensor& expected,
                          const char* name) {
    if (gradient.defined()) {
      EXPECT_TRUE(is_gradient(gradient, expected, call.q.scalar_type())) << what << ", " << name;
    }
  };
  const auto [q, q_weight] = formula(call, call.q, call.q_weight, arguments.q_grad);
  expect(actual.q, q, "q");
  expect(actual.q_weight, q_weight, "q_weight");
  if (call.is_pair) {
    const auto [k, k_weight] = formula(call, call.k, call.k_weight, arguments.k_grad);
    expect(actual.k, k, "k");
    expect(actual.k_weight, k_weight, "k_weight");
  }
}

void expect_only_what_is_wanted(const Arguments& arguments, const NormGradients& all) {
  const std::size_t count = 4;
  for (std::size_t i = 0; i < count; ++i) {
    Arguments one = arguments;
    one.wants = {};
    one.wants[i] = true;
    const NormGradients alone = gradients(one);
    // Those of weights may be summed in another order.
    expect_same_bits(alone, all, c10::str("only gradient ", i), /*with_weights=*/false);
    expect_gradients(arguments, alone, c10::str("only gradient ", i));
  }
}

// What must hold for every call: the gradients are right, and do not depend on how threads are run;
// those of x do not depend on the kernel and the layout either.
void expect_right(const Arguments& arguments) {
  const Call& call = arguments.call;
  const at::Tensor x_before = storage_of(call.q).clone();
  const at::Tensor grad_before = storage_of(arguments.q_grad).clone();
  const NormGradients result = gradients(arguments);
  EXPECT_TRUE(same_bits(storage_of(call.q), x_before)) << "x was written";
  EXPECT_TRUE(same_bits(storage_of(arguments.q_grad), grad_before)) << "the gradient was written";
  expect_gradients(arguments, result, "as planned");
  if (testing::Test::HasFailure()) {
    return;
  }
  expect_same_bits(gradients(arguments, {{.last_thread_first = true}}), result,
                   "the last thread first");
  for (const NormKernels kernels : {NormKernels::kWide, NormKernels::kWideByElements}) {
    const NormGradients wide = gradients(arguments, {{}, kernels});
    expect_same_bits(wide, result, "as a wide norm", /*with_weights=*/false);
    expect_gradients(arguments, wide, "as a wide norm");
    expect_same_bits(gradients(arguments, {{.last_thread_first = true}, kernels}), wide,
                     "as a wide norm, the last thread first");
  }
  expect_only_what_is_wanted(arguments, result);
  const std::int64_t axis = call.options.embedding_axis;
  const auto q_layouts = host::other_layouts(call.q, axis);
  const auto grad_layouts = host::other_layouts(arguments.q_grad, axis);
  for (std::size_t i = 0; i < q_layouts.size(); ++i) {
    Arguments q_alone = {call.on(q_layouts[i]), grad_layouts[(i + 1) % grad_layouts.size()]};
    const NormGradients alone = gradients(q_alone);
    expect_same_bits({.q = alone.q}, result, c10::str("alone, layout ", i));
    expect_gradients(q_alone, alone, c10::str("alone, layout ", i));
  }
}

// A gradient for x.
at::Tensor gradient_for(const at::Tensor& x) {
  return random_values(x.sizes(), x.scalar_type(), 17);
}

Arguments of(const Call& call) {
  return {call, gradient_for(call.q), call.is_pair ? gradient_for(call.k) : at::Tensor()};
}

at::Tensor weight_of(const at::Tensor& x, at::ScalarType dtype, std::uint64_t seed = 5) {
  return random_values({x.size(-1)}, dtype, seed);
}

TEST(CudaNormGradient, IsRightForEveryDtypeInEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      for (const bool norm_last : {false, true}) {
        const Call call = norm_apply(
            random_positions({5, 1}),
            {.interleaved = interleaved, .conjugate = conjugate, .norm_last = norm_last});
        const at::Tensor x = random_values({2, 5, 3, 64}, dtype);
        expect_right(of(call.on(x)));
        expect_right(of(call.weighted(weight_of(x, dtype)).on(x)));
        EXPECT_EQ(plans(of(call.on(x))).at(0).is_wide, dtype == at::kDouble);
      }
    });
  });
}

TEST(CudaNormGradient, IsRightForRowsOfAnySizeAndSlice) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [size, offset, dim] : {std::tuple(80, 0, 80),
                                            {96, 16, 64},
                                            {72, 8, 48},
                                            {67, 16, 48},
                                            {33, 0, 32},
                                            {20, 5, 6},
                                            {7, 0, 0},
                                            {64, 0, 0},
                                            {16, 0, 16},
                                            {2, 0, 2},
                                            {320, 0, 320},
                                            {1030, 0, 512},
                                            {2048, 0, 2048}}) {
      SCOPED_TRACE(c10::str("size = ", size, ", offset = ", offset, ", dim = ", dim));
      for (const bool interleaved : {false, true}) {
        for (const bool norm_last : {false, true}) {
          const Call call = norm_apply(random_positions({3, 1}), {.rotary_dim = dim,
                                                                  .rotary_offset = offset,
                                                                  .interleaved = interleaved,
                                                                  .weight_offset = 1,
                                                                  .norm_last = norm_last});
          const at::Tensor x = random_values({2, 3, 2, size}, dtype);
          expect_right(of(call.weighted(weight_of(x, at::kFloat)).on(x)));
        }
      }
    }
  });
}

TEST(CudaNormGradient, SharesAMeanAmongHeads) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool norm_last : {false, true}) {
      for (const std::int64_t heads : {1, 5, 32, 70}) {
        SCOPED_TRACE(c10::str("heads = ", heads, ", norm_last = ", norm_last));
        const at::Tensor x = random_values({2, 3, heads, 64}, dtype);
        const at::Tensor k = random_values({2, 3, 3, 64}, dtype, 1);
        const Call call =
            norm_apply(random_positions({3, 1}), {.norm_axes = {{-2, -1}}, .norm_last = norm_last});
        expect_right(of(call.weighted(random_values({heads, 64}, dtype, 6)).on(x)));
        expect_right(
            of(call.weighted(weight_of(x, dtype), random_values({3, 64}, dtype, 6)).on(x, k)));
        const Call heads_first =
            norm_apply(random_positions({3}), {.norm_axes = {{1, -1}}, .norm_last = norm_last});
        expect_right(of(heads_first.weighted(random_values({heads, 1, 64}, at::kFloat, 6))
                            .on(x.transpose(1, 2))));
      }
    }
  });
}

TEST(CudaNormGradient, SharesAMeanAmongMoreRowsThanAChunk) {
  const at::Tensor x = random_values({3, 211, 2, 24});
  for (const std::vector<std::int64_t>& axes :
       std::vector<std::vector<std::int64_t>>{{0, 1, 2, 3}, {0, 1, 3}, {1, 2, 3}}) {
    SCOPED_TRACE(c10::str("axes = ", axes));
    const Call call = norm_apply(random_positions({}), {.norm_axes = axes});
    expect_right(of(call.weighted(random_values({2, 24}, at::kFloat, 6)).on(x)));
  }
}

TEST(CudaNormGradient, IsSummedToAnyShapeOfTheWeight) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 5, 3, 32}, dtype);
    const Call call = norm_apply(random_positions({5, 1}), {.weight_offset = 0.5});
    for (const std::vector<std::int64_t>& sizes : std::vector<std::vector<std::int64_t>>{
             {32}, {3, 32}, {1, 32}, {2, 1, 1, 32}, {2, 1, 3, 32}, {1, 1, 3, 32}}) {
      SCOPED_TRACE(c10::str("sizes = ", sizes));
      expect_right(of(call.weighted(random_values(sizes, dtype)).on(x)));
      expect_right(of(call.weighted(random_values(sizes, at::kDouble)).on(x)));
      expect_right(of(call.weighted(random_values({1}).expand(sizes)).on(x)));
    }
  });
}

TEST(CudaNormGradient, HasTwoWeightsForAPair) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = norm_apply(random_positions({5, 1}), {.rotary_dim = 32, .rotary_offset = 16});
    const at::Tensor q = random_values({2, 5, 6, 64}, dtype);
    for (const std::int64_t k_size : {64, 48, 128, 51}) {
      SCOPED_TRACE(c10::str("k_size = ", k_size));
      const at::Tensor k = random_values({2, 5, 2, k_size}, dtype, 1);
      const at::Tensor q_weight = random_values({64}, dtype, 2);
      const at::Tensor k_weight = random_values({k_size}, at::kFloat, 3);
      expect_right(of(call.weighted(q_weight, k_weight).on(q, k)));
      expect_right(of(call.weighted({}, k_weight).on(q, k)));
      expect_right(of(call.weighted(q_weight, {}).on(q, k)));
    }
  });
}

TEST(CudaNormGradient, UsesTablesOfEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool full_width : {false, true}) {
      for_each_form([&](bool interleaved, bool conjugate) {
        for (const bool norm_last : {false, true}) {
          const std::int64_t columns = full_width ? 32 : 16;
          const at::Tensor cos = random_values({5, 1, columns}, at::kFloat, 1);
          const at::Tensor sin = random_values({5, 1, columns}, at::kFloat, 2);
          const Call call = norm_apply_cos_sin(cos, sin,
                                               {.rotary_offset = 8,
                                                .interleaved = interleaved,
                                                .conjugate = conjugate,
                                                .full_width = full_width,
                                                .norm_last = norm_last});
          const at::Tensor x = random_values({2, 5, 3, 48}, dtype);
          expect_right(of(call.weighted(weight_of(x, dtype)).on(x)));
        }
      });
    }
  });
}

TEST(CudaNormGradient, DividesManyRowsAndTokensAmongBlocks) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [tokens, heads, size] :
         {std::tuple(1, 138, 32), {3, 70, 32}, {530, 1, 16}, {600, 9, 96}, {300, 9, 6}}) {
      SCOPED_TRACE(c10::str("(", tokens, ", ", heads, ", ", size, ")"));
      const Call call = norm_apply(random_positions({tokens, 1}));
      const at::Tensor q = random_values({tokens, heads, size}, dtype);
      const at::Tensor k = random_values({tokens, 2, size}, dtype, 1);
      expect_right(of(call.weighted(weight_of(q, dtype), weight_of(k, dtype, 6)).on(q, k)));
    }
  }
}

TEST(CudaNormGradient, IsZeroForZeros) {
  const at::Tensor x = at::zeros({3, 2, 32});
  const Call call = norm_apply(random_positions({3, 1})).weighted(weight_of(x, at::kFloat)).on(x);
  EXPECT_TRUE(at::equal(gradients(of(call)).q_weight, at::zeros({32})));
  EXPECT_TRUE(gradients(of(call)).q.isfinite().all().item<bool>());
}

constexpr std::size_t kSharedLimit = 48 << 10;

TEST(CudaNormGradient, HasSharedMemoryWithoutAsking) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t size : {2, 16, 32, 64, 128, 256, 512, 1024, 2048}) {
      for (const std::int64_t heads : {1, 2, 8, 40}) {
        for (const std::int64_t tokens : {1, 300, 5000, 70000}) {
          const at::Tensor x = at::empty({tokens, 1, 1}, dtype).expand({tokens, heads, size});
          const at::Tensor dense = x.stride(1) == 0 && tokens * heads * size < 4'000'000
                                       ? at::empty({tokens, heads, size}, dtype)
                                       : x;
          const at::Tensor table = at::empty({tokens, 1, 1}).expand({tokens, 1, size});
          const Arguments arguments = {
              norm_apply_cos_sin(table, table, {.full_width = true}).on(dense), dense};
          rope::for_each_launch(
              gradient_call(arguments), {.q = dense},
              [&](const Launch& launch, const std::array<at::Tensor, 2>&) {
                for (const NormKernels allowed : {NormKernels::kAll, NormKernels::kWide}) {
                  const NormGradientPlan plan =
                      rope::cuda::make_norm_gradient_plan(launch, allowed);
                  const auto expect_fits = [&](auto type) {
                    using Thread = typename decltype(type)::type;
                    EXPECT_LE(rope::cuda::shared_bytes<Thread>(plan), kSharedLimit)
                        << dtype << ' ' << size << ' ' << heads << ' ' << tokens;
                  };
                  const int threads = plan.block_x * plan.block_y * plan.block_z;
                  if (plan.is_wide) {
                    EXPECT_LE(threads, plan.index_is_64bit
                                           ? rope::cuda::kMaxWideThreads<std::int64_t>
                                           : rope::cuda::kMaxWideThreads<std::int32_t>);
                    rope::cuda::dispatch_wide_norm_thread<rope::cuda::WideNormGradientThread>(
                        launch, plan, expect_fits);
                  } else {
                    EXPECT_LE(threads, rope::cuda::kNormGradientThreads);
                    rope::cuda::dispatch_norm_thread<rope::cuda::NormGradientThread>(launch,
                                                                                     expect_fits);
                  }
                }
              });
        }
      }
    }
  });
}

TEST(CudaNormGradient, ReachesTokensThatAreBillionsOfElementsApart) {
  const at::Tensor x = random_values({2, 3, 64}, at::kBFloat16);
  const at::Tensor grad = gradient_for(x);
  const at::Tensor far_x = host::far_apart(x);
  const at::Tensor far_grad = host::far_apart(grad);
  if (!far_x.defined() || !far_grad.defined()) {
    GTEST_SKIP() << "not enough addresses here";
  }
  for (const std::vector<std::int64_t>& axes :
       std::vector<std::vector<std::int64_t>>{{-1}, {-2, -1}}) {
    const Call call = norm_apply(random_positions({2, 1}), {.norm_axes = axes})
                          .weighted(random_values({64}, at::kFloat));
    const NormGradients wanted = gradients({call.on(x), grad});
    expect_same_bits(gradients({call.on(far_x), grad}), wanted, "x from afar");
    expect_same_bits(gradients({call.on(x), far_grad}), wanted, "the gradient from afar");
  }
}

TEST(CudaNormGradient, IsRightForRandomCalls) {
  constexpr std::uint64_t kCalls = 25;
  for (std::uint64_t seed = 0; seed < kCalls; ++seed) {
    host::Draw draw(seed);
    const Call call = host::random_norm_call(draw, /*weights_may_vary=*/false);
    const auto grad = [&](const at::Tensor& x) {
      return host::in_any_layout(draw, gradient_for(x));
    };
    const Arguments arguments = {call, grad(call.q), call.is_pair ? grad(call.k) : at::Tensor()};
    SCOPED_TRACE(c10::str("seed = ", seed, ": ", host::describe(call)));
    expect_right(arguments);
    if (HasFailure()) {
      return;
    }
  }
}

}  // namespace
