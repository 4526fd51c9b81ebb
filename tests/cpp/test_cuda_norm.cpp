// Runs every thread of every block of the kernels that normalize on the host.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

#include "cuda/dispatch.h"
#include "cuda/norm_plan.h"
#include "host_launch.h"
#include "host_norm.h"
#include "host_threads.h"
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
using host::with_storage;
using reference::random_inv_freq;
using reference::random_positions;
using reference::random_values;
using reference::same_bits;
using rope::Launch;
using rope::Outputs;
using rope::cuda::NormKernels;
using rope::cuda::NormPlan;

// How the threads of a launch are run. The bits must not depend on it.
struct Running : host::Running {
  NormKernels kernels = NormKernels::kAll;
};

void run_threads(const Launch& launch, const NormPlan& plan, std::int64_t first_block,
                 std::int64_t last_block, const Running& running) {
  const void* frequencies = host::frequencies(launch);
  if (plan.is_wide) {
    rope::cuda::dispatch_wide_norm_thread<rope::cuda::WideNormThread>(launch, plan, [&](auto type) {
      using Thread = typename decltype(type)::type;
      host::run_cooperative<Thread>(
          rope::cuda::wide_norm_params<typename Thread::IndexType>(launch, plan, frequencies), plan,
          first_block, last_block, running,
          [](auto& block, const auto& params, auto* shared, std::int64_t) {
            rope::cuda::normalize_wide_block(block, params, shared, [] {});
          });
    });
    return;
  }
  rope::cuda::dispatch_norm_thread<rope::cuda::NormThread>(launch, [&](auto type) {
    using Thread = typename decltype(type)::type;
    host::run_cooperative<Thread>(rope::cuda::norm_rotate_params(launch, plan, frequencies), plan,
                                  first_block, last_block, running,
                                  [](auto& block, const auto& params, auto* shared, std::int64_t) {
                                    rope::cuda::normalize_block(block, params, shared, [] {});
                                  });
  });
}

void run(const Call& call, const Outputs& outputs, const Running& running = {}) {
  rope::check(call);
  rope::for_each_launch(call, outputs, [&](const Launch& launch) {
    const NormPlan plan = rope::cuda::make_norm_plan(launch, running.kernels);
    run_threads(launch, plan, 0, plan.grid_x * plan.grid_y, running);
  });
}

// The plans of a call.
std::vector<NormPlan> plans(const Call& call) {
  std::vector<NormPlan> result;
  const Outputs outputs = host::poisoned_outputs(call);
  rope::for_each_launch(call, outputs, [&](const Launch& launch) {
    result.push_back(rope::cuda::make_norm_plan(launch));
  });
  return result;
}

NormPlan plan(const Call& call) {
  const auto all = plans(call);
  EXPECT_EQ(all.size(), 1);
  return all.at(0);
}

Outputs normalized(const Call& call, const Running& running = {}) {
  const Outputs outputs = host::poisoned_outputs(call);
  run(call, outputs, running);
  return outputs;
}

void expect_same_bits(const Outputs& actual, const Outputs& wanted, const std::string& what) {
  EXPECT_TRUE(same_bits(actual.q, wanted.q)) << what;
  if (wanted.k.defined()) {
    EXPECT_TRUE(same_bits(actual.k, wanted.k)) << what << ", k";
  }
}

// The result is right and complete, and nothing else is written.
void expect_normalizes(const Call& call, const Outputs& outputs) {
  std::vector<at::Tensor> inputs_before;
  for (const at::Tensor& input : host::tensors(call)) {
    inputs_before.push_back(storage_of(input).clone());
  }
  const at::Tensor q_before = storage_of(outputs.q).clone();
  const at::Tensor k_before = call.is_pair ? storage_of(outputs.k).clone() : at::Tensor();
  run(call, outputs);
  EXPECT_TRUE(reference::is_rotated(outputs.q, host::expected_norm(call, call.q, call.q_weight)));
  EXPECT_TRUE(host::surroundings_are(q_before, outputs.q)) << "around the output";
  if (call.is_pair) {
    EXPECT_TRUE(reference::is_rotated(outputs.k, host::expected_norm(call, call.k, call.k_weight)))
        << "k";
    EXPECT_TRUE(host::surroundings_are(k_before, outputs.k)) << "around the output of k";
  }
  const std::vector<at::Tensor> inputs = host::tensors(call);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor now = storage_of(inputs[i]);
    EXPECT_TRUE(at::equal(now, inputs_before[i]) || same_bits(now, inputs_before[i]))
        << "an input was written: " << i;
  }
}

void expect_the_same_in_place(const Call& call, const Outputs& wanted) {
  for (const bool last_thread_first : {false, true}) {
    for (const NormKernels kernels : {NormKernels::kAll, NormKernels::kWide}) {
      const at::Tensor q = host::copy_with_layout(call.q);
      const at::Tensor k = call.is_pair ? host::copy_with_layout(call.k) : at::Tensor();
      const Call on_copies = call.is_pair ? call.on(q, k) : call.on(q);
      run(host::in_place(on_copies), {q, k}, {{last_thread_first}, kernels});
      expect_same_bits({q, k}, wanted, "in place");
      EXPECT_TRUE(host::surroundings_are(storage_of(call.q), q)) << "around x in place";
      if (call.is_pair) {
        EXPECT_TRUE(host::surroundings_are(storage_of(call.k), k)) << "around k in place";
      }
    }
  }
}

// What must hold for every call: the result is right, and has the same bits however it is run.
void expect_right(const Call& call) {
  const Outputs outputs = host::poisoned_outputs(call);
  expect_normalizes(call, outputs);
  if (testing::Test::HasFailure()) {
    return;
  }
  expect_same_bits(normalized(call, {{.last_thread_first = true}}), outputs,
                   "the last thread first");
  expect_same_bits(normalized(call, {{}, NormKernels::kWide}), outputs, "as a wide norm");
  expect_same_bits(normalized(call, {{}, NormKernels::kWideByElements}), outputs,
                   "as a wide norm, element by element");
  const std::int64_t axis = call.options.embedding_axis;
  const auto q_layouts = host::other_layouts(call.q, axis);
  for (std::size_t i = 0; i < q_layouts.size(); ++i) {
    if (!call.is_pair) {
      expect_same_bits(normalized(call.on(q_layouts[i])), outputs, c10::str("layout ", i));
    } else {
      expect_same_bits(normalized(call.on(q_layouts[i], host::other_layouts(call.k, axis)[i])),
                       outputs, c10::str("layout ", i));
    }
  }
  if (call.is_pair) {
    Call k_alone = call.on(call.k);
    k_alone.q_weight = call.k_weight;
    expect_same_bits({normalized(call.on(call.q)).q, normalized(k_alone).q}, outputs, "alone");
  }
  if (!host::overlaps_itself(call.q) && !(call.is_pair && host::overlaps_itself(call.k))) {
    expect_the_same_in_place(call, outputs);
  }
}

at::Tensor weight_of(const at::Tensor& x, at::ScalarType dtype, std::uint64_t seed = 5) {
  return random_values({x.size(-1)}, dtype, seed);
}

TEST(CudaNorm, NormalizesEveryDtypeInEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      for (const bool norm_last : {false, true}) {
        const Call call = norm_apply(
            random_positions({5, 1}),
            {.interleaved = interleaved, .conjugate = conjugate, .norm_last = norm_last});
        const at::Tensor x = random_values({2, 5, 3, 64}, dtype);
        expect_right(call.on(x));
        expect_right(call.weighted(weight_of(x, dtype)).on(x));
        EXPECT_EQ(plan(call.on(x)).is_wide, dtype == at::kDouble);
      }
    });
  });
}

TEST(CudaNorm, NormalizesRowsOfAnySizeAndSlice) {
  struct Case {
    std::int64_t size, offset, dim;
  };
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [size, offset, dim] :
         {Case{80, 0, 80}, Case{96, 0, 96}, Case{320, 0, 320}, Case{96, 32, 32}, Case{96, 16, 64},
          Case{72, 8, 48}, Case{67, 16, 48}, Case{64, 1, 62}, Case{33, 0, 32}, Case{20, 5, 6},
          Case{1, 0, 0}, Case{7, 0, 0}, Case{64, 0, 0}, Case{16, 0, 16}, Case{8, 0, 8},
          Case{2, 0, 2}, Case{264, 0, 256}}) {
      SCOPED_TRACE(c10::str("size = ", size, ", offset = ", offset, ", dim = ", dim));
      for (const bool interleaved : {false, true}) {
        for (const bool norm_last : {false, true}) {
          const Call call = norm_apply(random_positions({3, 1}), {.rotary_dim = dim,
                                                                  .rotary_offset = offset,
                                                                  .interleaved = interleaved,
                                                                  .weight_offset = 1,
                                                                  .norm_last = norm_last});
          const at::Tensor x = random_values({2, 3, 2, size}, dtype);
          expect_right(call.weighted(weight_of(x, at::kFloat)).on(x));
        }
      }
    }
  });
}

TEST(CudaNorm, NormalizesLongRows) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t size : {520, 1024, 4128, 4099}) {
      for (const std::int64_t dim : {std::int64_t{0}, std::int64_t{500}, size / 4 * 2}) {
        SCOPED_TRACE(c10::str("size = ", size, ", dim = ", dim));
        const at::Tensor x = random_values({3, 2, size}, dtype);
        const Call call = norm_apply(random_positions({3, 1}), {.rotary_dim = dim});
        EXPECT_EQ(plan(call.on(x)).is_wide,
                  size > (dtype == at::kHalf || dtype == at::kBFloat16 ? 512
                          : dtype == at::kFloat                        ? 256
                                                                       : 128));
        expect_right(call.weighted(weight_of(x, dtype)).on(x));
      }
    }
  });
}

TEST(CudaNorm, SharesAMeanAmongHeads) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool interleaved : {false, true}) {
      for (const bool norm_last : {false, true}) {
        for (const std::int64_t heads : {1, 2, 5, 32, 40, 70}) {
          SCOPED_TRACE(c10::str("heads = ", heads, ", norm_last = ", norm_last));
          const at::Tensor x = random_values({2, 3, heads, 64}, dtype);
          const at::Tensor k = random_values({2, 3, 3, 64}, dtype, 1);
          const Call call = norm_apply(
              random_positions({3, 1}),
              {.interleaved = interleaved, .norm_axes = {{-2, -1}}, .norm_last = norm_last});
          expect_right(call.weighted(random_values({heads, 64}, dtype, 6)).on(x));
          expect_right(
              call.weighted(weight_of(x, dtype), random_values({3, 64}, dtype, 6)).on(x, k));
          const Call heads_first =
              norm_apply(random_positions({3}), {.norm_axes = {{1, -1}}, .norm_last = norm_last});
          expect_right(heads_first.weighted(random_values({heads, 1, 64}, at::kFloat, 6))
                           .on(x.transpose(1, 2)));
        }
      }
    }
  });
}

TEST(CudaNorm, SharesAMeanAmongMoreRowsThanAChunk) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({3, 211, 2, 24}, dtype);
    for (const std::vector<std::int64_t>& axes :
         std::vector<std::vector<std::int64_t>>{{0, 1, 2, 3}, {0, 1, 3}, {1, 2, 3}, {0, 3}}) {
      SCOPED_TRACE(c10::str("axes = ", axes));
      const Call call = norm_apply(random_positions({}), {.norm_axes = axes});
      expect_right(call.weighted(random_values({2, 24}, dtype, 6)).on(x));
    }
  });
}

TEST(CudaNorm, ReadsWeightsOfAnyDtypeShapeAndStrides) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 5, 3, 32}, dtype);
    const Call call = norm_apply(random_positions({5, 1}), {.weight_offset = 0.5});
    for_each_dtype([&](at::ScalarType of) {
      expect_right(call.weighted(random_values({32}, of)).on(x));
      expect_right(call.weighted(random_values({3, 32}, of)).on(x));
      expect_right(call.weighted(random_values({2, 1, 1, 32}, of)).on(x));
      expect_right(call.weighted(random_values({2, 1, 3, 32}, of)).on(x));
      expect_right(call.weighted(random_values({33}, of).slice(0, 1)).on(x));
      expect_right(call.weighted(random_values({32, 2}, of).select(1, 1)).on(x));
      expect_right(call.weighted(random_values({32, 3}, of).t()).on(x));
      expect_right(call.weighted(random_values({1}, of).expand({32})).on(x));
      expect_right(call.weighted(random_values({1, 32}, of).expand({3, 32})).on(x));
    });
  });
}

TEST(CudaNorm, ReadsWeightsThatDifferBetweenTokens) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 5, 3, 32}, dtype);
    const Call call = norm_apply(random_positions({5, 1}), {.weight_offset = 0.5});
    for (const std::vector<std::int64_t>& sizes :
         std::vector<std::vector<std::int64_t>>{{5, 1, 32}, {5, 3, 32}, {2, 5, 1, 32}}) {
      const at::Tensor weight = random_values(sizes, dtype);
      expect_right(call.weighted(weight).on(x));
      expect_right(call.weighted(weight, weight).on(x, x.flip(1)));
    }
  });
}

TEST(CudaNorm, HasTwoWeightsForAPair) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = norm_apply(random_positions({5, 1}), {.rotary_dim = 32, .rotary_offset = 16});
    const at::Tensor q = random_values({2, 5, 6, 64}, dtype);
    for (const std::int64_t k_size : {64, 48, 80, 128, 51}) {
      SCOPED_TRACE(c10::str("k_size = ", k_size));
      const at::Tensor k = random_values({2, 5, 2, k_size}, dtype, 1);
      const at::Tensor q_weight = random_values({64}, dtype, 2);
      const at::Tensor k_weight = random_values({k_size}, at::kFloat, 3);
      expect_right(call.weighted(q_weight, k_weight).on(q, k));
      expect_right(call.weighted({}, k_weight).on(q, k));
      expect_right(call.weighted(q_weight, {}).on(q, k));
    }
    expect_right(call.weighted(random_values({64}, dtype, 2), {})
                     .on(q, random_values({2, 5, 2, 64}, at::kHalf, 1)));
  });
}

TEST(CudaNorm, UsesTablesOfEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool full_width : {false, true}) {
      for_each_form([&](bool interleaved, bool conjugate) {
        for (const bool norm_last : {false, true}) {
          const std::int64_t columns = full_width ? 32 : 16;
          const at::Tensor cos = random_values({5, 1, columns}, at::kFloat, 1);
          const at::Tensor sin = random_values({5, 1, columns}, at::kFloat, 2);
          rope::NormCosSinOptions options{.rotary_offset = 8,
                                          .interleaved = interleaved,
                                          .conjugate = conjugate,
                                          .full_width = full_width,
                                          .norm_last = norm_last};
          const at::Tensor x = random_values({2, 5, 3, 48}, dtype);
          expect_right(norm_apply_cos_sin(cos, sin, options).weighted(weight_of(x, dtype)).on(x));
          options.positions = random_positions({2, 5, 1}, at::kInt, 0, 5);
          expect_right(norm_apply_cos_sin(cos.select(1, 0), sin.select(1, 0), options).on(x));
        }
      });
    }
  });
}

TEST(CudaNorm, FormsAnglesFromEverySource) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({2, 5, 3, 32}, dtype);
    for (const at::ScalarType position : reference::kPositionDtypes) {
      const at::Tensor positions = random_positions({5, 1}, position);
      expect_right(norm_apply(positions,
                              {.max_wavelength = 5e5, .scale_factor = 8, .attention_factor = 1.25})
                       .on(x));
      for (const at::ScalarType frequency : {at::kFloat, at::kDouble}) {
        expect_right(norm_apply(positions, {.inv_freq = random_inv_freq({16}, frequency)}).on(x));
        expect_right(norm_apply(random_positions({2, 5, 1}, position),
                                {.inv_freq = random_inv_freq({2, 16}, frequency)})
                         .on(x));
      }
    }
  });
}

TEST(CudaNorm, NormalizesAnyLayout) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = norm_apply(random_positions({3, 1}));
    for (const std::int64_t offset : {0, 1, 4, 8}) {
      expect_right(call.on(strided_values({3, 2, 32}, {64, 32, 1}, offset, dtype)));
    }
    expect_right(call.on(strided_values({3, 2, 32}, {66, 33, 1}, 0, dtype)));
    expect_right(call.on(strided_values({2, 3, 4, 32}, {960, 320, 64, 1}, 0, dtype)));
    expect_right(call.on(strided_values({2, 3, 4, 32}, {768, 256, 64, 2}, 0, dtype)));
    expect_right(call.on(strided_values({2, 3, 4, 32}, {1, 2, 6, 24}, 0, dtype)));
    expect_right(call.on(random_values({2, 3, 1, 32}, dtype).expand({2, 3, 4, 32})));
    expect_right(call.on(random_values({2, 3, 4, 1}, dtype).expand({2, 3, 4, 32})));
    for (std::int64_t axis = -4; axis < 4; ++axis) {
      SCOPED_TRACE(c10::str("axis = ", axis));
      std::vector<std::int64_t> sizes = {2, 3, 4};
      sizes.insert(sizes.begin() + (axis + 4) % 4, 20);
      const Call by_axis = norm_apply(
          random_positions({3, 1}), {.embedding_axis = axis, .rotary_dim = 16, .rotary_offset = 1});
      expect_right(by_axis.weighted(random_values({20}, dtype)).on(random_values(sizes, dtype)));
    }
  });
}

TEST(CudaNorm, DividesManyRowsAndTokensAmongBlocks) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [tokens, heads, size] :
         {std::tuple(1, 138, 32), {3, 70, 32}, {530, 1, 16}, {300, 3, 48}, {300, 9, 6}}) {
      SCOPED_TRACE(c10::str("(", tokens, ", ", heads, ", ", size, ")"));
      const Call call = norm_apply(random_positions({tokens, 1}));
      const at::Tensor q = random_values({tokens, heads, size}, dtype);
      const at::Tensor k = random_values({tokens, 2, size}, dtype, 1);
      expect_right(call.weighted(weight_of(q, dtype), weight_of(k, dtype, 6)).on(q, k));
    }
  });
}

// Where every partial sum is rounded in the same direction.
TEST(CudaNorm, SumsLongRowsOfEqualValues) {
  for (const double value : {1.0, 0.1, 1.0 / 3, 1.7}) {
    for (const std::int64_t size : {128, 512, 4096, 16384}) {
      const at::Tensor x = at::full({2, size}, value);
      const Call call = norm_apply(random_positions({}), {.rotary_dim = 0, .eps = 0});
      expect_right(call.on(x));
      const at::Tensor heads = at::full({2, size / 64, 64}, value);
      expect_right(norm_apply(random_positions({}), {.eps = 0, .norm_axes = {{-2, -1}}}).on(heads));
    }
  }
}

TEST(CudaNorm, TurnsZerosIntoZeros) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = norm_apply(random_positions({3, 1}));
    const at::Tensor x = random_values({3, 2, 32}, dtype);
    x[1][1].zero_();
    expect_right(call.on(x));
    EXPECT_TRUE(at::equal(normalized(call.on(x)).q[1][1], at::zeros({32}, dtype)));
  });
}

TEST(CudaNorm, KeepsNaNAndInfinityInTheirMean) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool over_heads : {false, true}) {
      rope::NormOptions options;
      if (over_heads) {
        options.norm_axes = {-2, -1};
      }
      const Call call = norm_apply(random_positions({3, 1}), options);
      const at::Tensor finite = random_values({3, 2, 32}, dtype);
      const at::Tensor x = finite.clone();
      x[1][0][5] = std::numeric_limits<double>::quiet_NaN();
      x[2][1][4] = std::numeric_limits<double>::infinity();
      const at::Tensor y = normalized(call.on(x)).q;
      const at::Tensor unharmed = normalized(call.on(finite)).q;
      at::Tensor harmed = at::zeros({3, 2, 32}, at::kBool);
      (over_heads ? harmed[1] : harmed[1][0]).fill_(true);
      (over_heads ? harmed[2] : harmed[2][1]).fill_(true);
      EXPECT_TRUE(same_bits(y.masked_fill(harmed, 0), unharmed.masked_fill(harmed, 0)));
      EXPECT_TRUE(y[1][0][5].isnan().item<bool>());
    }
  });
}

constexpr std::size_t kSharedLimit = 48 << 10;

TEST(CudaNorm, HasSharedMemoryWithoutAsking) {
  int launches = 0;
  for_each_dtype([&](at::ScalarType dtype) {
    for (const std::int64_t size : {2, 16, 32, 64, 128, 256, 512, 1024, 2048}) {
      for (const std::int64_t heads : {1, 2, 8, 40}) {
        for (const std::int64_t tokens : {1, 300, 5000}) {
          if (tokens * heads * size > 4'000'000) {
            continue;
          }
          const at::Tensor x = at::empty({tokens, heads, size}, dtype);
          const at::Tensor table = at::empty({tokens, 1, size});
          const Call call = norm_apply_cos_sin(table, table, {.full_width = true}).on(x);
          rope::for_each_launch(call, {x, {}}, [&](const Launch& launch) {
            launches += 1;
            for (const NormKernels allowed : {NormKernels::kAll, NormKernels::kWide}) {
              const NormPlan some = rope::cuda::make_norm_plan(launch, allowed);
              const auto expect_fits = [&](auto type) {
                EXPECT_LE(rope::cuda::shared_bytes<typename decltype(type)::type>(some),
                          kSharedLimit)
                    << dtype << ' ' << size << ' ' << heads << ' ' << tokens;
                EXPECT_LE(some.block_x * some.block_y * some.block_z,
                          !some.is_wide         ? rope::cuda::kMaxThreads
                          : some.index_is_64bit ? rope::cuda::kMaxWideThreads<std::int64_t>
                                                : rope::cuda::kMaxWideThreads<std::int32_t>);
              };
              if (some.is_wide) {
                rope::cuda::dispatch_wide_norm_thread<rope::cuda::WideNormThread>(launch, some,
                                                                                  expect_fits);
              } else {
                rope::cuda::dispatch_norm_thread<rope::cuda::NormThread>(launch, expect_fits);
              }
            }
          });
        }
      }
    }
  });
  EXPECT_GT(launches, 200);
}

// A contiguous tensor without memory.
at::Tensor fake(at::IntArrayRef sizes) {
  return at::for_blob(reinterpret_cast<void*>(std::int64_t{1} << 40), sizes)
      .options(at::dtype(at::kBFloat16))
      .target_device(at::kCPU)
      .make_tensor();
}

TEST(CudaNorm, StaysWithinTheGridUpTo2To33Elements) {
  constexpr std::int64_t kMost = std::int64_t{1} << 33;
  for (const std::vector<std::int64_t>& sizes :
       std::vector<std::vector<std::int64_t>>{{kMost / 128, 1, 128},
                                              {1, kMost / 128, 128},
                                              {1 << 13, 1 << 13, 128},
                                              {kMost, 1, 1},
                                              {1, kMost, 1},
                                              {1, 1, kMost},
                                              {2, 3, 4096},
                                              {1 << 20, 40, 128}}) {
    for (const bool over_heads : {false, true}) {
      SCOPED_TRACE(c10::str("sizes = ", sizes, ", over_heads = ", over_heads));
      rope::NormOptions options{.rotary_dim = 0};
      if (over_heads) {
        options.norm_axes = {-2, -1};
      }
      const at::Tensor x = fake(sizes);
      const Call call = norm_apply(at::arange(2).slice(0, 0, 1).expand({sizes[0], 1}), options);
      int launches = 0;
      rope::for_each_launch(call.on(x), {x, {}}, [&](const Launch& launch) {
        launches += 1;
        const NormPlan some = rope::cuda::make_norm_plan(launch);
        const auto gradient = rope::cuda::make_norm_gradient_plan(launch);
        for (const NormPlan* each : {&some, static_cast<const NormPlan*>(&gradient)}) {
          EXPECT_GE(each->grid_x, 1);
          EXPECT_LT(each->grid_x, std::int64_t{1} << 31);
          EXPECT_GE(each->grid_y, 1);
          EXPECT_LE(each->grid_y, 65535);
          EXPECT_LE(each->block_z, 64);
          EXPECT_LE(each->block_x * each->block_y * each->block_z, 512);
          EXPECT_EQ(each->index_is_64bit, !each->uses_vectors);
        }
        EXPECT_LE(gradient.num_parts, std::int64_t{1} << 20);
      });
      EXPECT_EQ(launches, 1);
    }
  }
}

// The norm of each row, and that of all rows of a token.
TEST(CudaNorm, ReachesTokensThatAreBillionsOfElementsApart) {
  const at::Tensor x = random_values({2, 3, 64}, at::kBFloat16);
  const at::Tensor far = host::far_apart(x);
  if (!far.defined()) {
    GTEST_SKIP() << "not enough addresses here";
  }
  for (const std::vector<std::int64_t>& axes :
       std::vector<std::vector<std::int64_t>>{{-1}, {-2, -1}}) {
    const Call call = norm_apply(random_positions({2, 1}), {.norm_axes = axes});
    EXPECT_EQ(plan(call.on(far)).is_wide, axes.size() == 2);
    EXPECT_TRUE(plan(call.on(far)).uses_vectors);
    const Outputs wanted = normalized(call.on(x));
    expect_same_bits(normalized(call.on(far)), wanted, "from afar");
    run(host::in_place(call.on(far)), {far, {}});
    expect_same_bits({far, {}}, wanted, "in place");
    far.copy_(x);
  }
}

TEST(CudaNorm, HasTheUsualKernelBeyond2To31Elements) {
  const at::Tensor x = fake({1 << 20, 40, 128});
  const Call call = norm_apply(at::arange(2).slice(0, 0, 1).expand({1 << 20, 1}));
  rope::for_each_launch(call.on(x), {x, {}}, [](const Launch& launch) {
    EXPECT_FALSE(rope::cuda::make_norm_plan(launch).is_wide);
    EXPECT_FALSE(rope::cuda::make_norm_gradient_plan(launch).is_wide);
  });
}

TEST(CudaNorm, IsRightForRandomCalls) {
  constexpr std::uint64_t kCalls = 60;
  for (std::uint64_t seed = 0; seed < kCalls; ++seed) {
    host::Draw draw(seed);
    const Call call = host::random_norm_call(draw, /*weights_may_vary=*/true);
    SCOPED_TRACE(c10::str("seed = ", seed, ": ", host::describe(call)));
    expect_right(call);
    if (HasFailure()) {
      return;
    }
  }
}

TEST(CudaNorm, DoesNothingForEmptyTensors) {
  const Call call = norm_apply(random_positions({5, 1}));
  for (const at::Tensor& x :
       {at::empty({0, 5, 2, 32}), at::empty({5, 0, 32}), at::empty({5, 2, 0})}) {
    EXPECT_TRUE(plans(call.on(x)).empty());
    EXPECT_TRUE(plans(call.on(x, x)).empty());
  }
}

}  // namespace
