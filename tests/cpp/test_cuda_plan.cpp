// How launches are spread over the threads of a CUDA device. No memory is touched: addresses are
// made up.
#include <cmath>
#include <numbers>

#include "host_launch.h"
#include "reference.h"

namespace {

using host::Call;
using rope::Outputs;
using rope::cuda::Plan;
using rope::cuda::RotatePlan;

constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;  // of a grid's first dimension
constexpr std::int64_t kGiga = std::int64_t{1} << 30;

// Where tensors seem to lie, far from each other: multiples of 2 MiB.
constexpr std::int64_t kInput = std::int64_t{1} << 40;
constexpr std::int64_t kKey = std::int64_t{1} << 39;
constexpr std::int64_t kOutput = std::int64_t{1} << 41;
constexpr std::int64_t kPositions = std::int64_t{1} << 42;

// A tensor that looks like one of a device.
at::Tensor fake(at::IntArrayRef sizes, at::ScalarType dtype = at::kBFloat16,
                std::int64_t address = kInput, at::OptionalIntArrayRef strides = std::nullopt) {
  std::vector<std::int64_t> contiguous(sizes.size(), 1);
  for (auto d = std::ssize(sizes) - 2; d >= 0; --d) {
    contiguous[d] = contiguous[d + 1] * sizes[d + 1];
  }
  return at::for_blob(reinterpret_cast<void*>(address), sizes)
      .strides(strides.value_or(contiguous))
      .options(at::dtype(dtype))
      .target_device(at::kCPU)
      .make_tensor();
}

// The plans of a call whose outputs are aligned.
std::vector<RotatePlan> plans(const Call& call) {
  if (call.in_place) {
    return host::plans(call, {call.q, call.k});
  }
  const auto output = [](const at::Tensor& x) {
    return x.defined() ? fake(x.sizes(), x.scalar_type(), kOutput) : at::Tensor();
  };
  return host::plans(call, {output(call.q), output(call.k)});
}

RotatePlan plan(const Call& call) {
  const std::vector<RotatePlan> all = plans(call);
  EXPECT_EQ(all.size(), 1);
  return all.at(0);
}

Call by_tokens(std::int64_t tokens, const rope::ApplyOptions& options = {}) {
  return host::apply(fake({tokens, 1}, at::kLong, kPositions), options);
}

TEST(CudaPlan, ParametersOfTheKernelFitInto4KiB) {
  EXPECT_LE(sizeof(rope::Launch) + sizeof(rope::cuda::Work) + sizeof(rope::cuda::Frequencies),
            4096);
}

TEST(CudaPlan, IsOneLaunchForAPairOfDifferentHeads) {
  const RotatePlan one = plan(by_tokens(1).on(fake({1, 1, 32, 128}), fake({1, 1, 8, 128})));
  EXPECT_TRUE(one.uses_words);
  EXPECT_FALSE(one.index_is_64bit);
  EXPECT_EQ(one.work.shared_rows, 40);
  EXPECT_EQ(one.work.rows_per_thread, 1);
  EXPECT_EQ(one.work.items, 40 * 8);  // 8 pairs of bfloat16 are two words of 16 bytes.
}

TEST(CudaPlan, UsesWordsWhereEveryRowIsAligned) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    const std::int64_t word = rope::cuda::word_elements(dtype);
    for (const bool interleaved : {false, true}) {
      SCOPED_TRACE(c10::str("dtype = ", dtype, ", interleaved = ", interleaved));
      const Call call = by_tokens(5, {.interleaved = interleaved});
      EXPECT_TRUE(plan(call.on(fake({2, 5, 3, 8 * word}, dtype))).uses_words);
      const Call part =
          by_tokens(5, {.rotary_dim = 4 * word, .rotary_offset = word, .interleaved = interleaved});
      EXPECT_TRUE(plan(part.on(fake({2, 5, 3, 8 * word}, dtype))).uses_words);
      EXPECT_TRUE(plan(call.on(fake({5, 3, 8 * word}, dtype, kInput + 16))).uses_words);
      const std::vector<std::int64_t> gaps = {30 * word, 9 * word, 1};
      EXPECT_TRUE(plan(call.on(fake({5, 3, 8 * word}, dtype, kInput, gaps))).uses_words);
    }
  }
}

TEST(CudaPlan, UsesSingleElementsWhereSomeRowIsNotAligned) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    const std::int64_t word = rope::cuda::word_elements(dtype);
    const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype));
    for (const bool interleaved : {false, true}) {
      SCOPED_TRACE(c10::str("dtype = ", dtype, ", interleaved = ", interleaved));
      const auto uses_words = [&](const rope::ApplyOptions& options, const at::Tensor& x) {
        rope::ApplyOptions all = options;
        all.interleaved = interleaved;
        return plan(by_tokens(5, all).on(x)).uses_words;
      };
      const std::vector<std::int64_t> sizes = {5, 3, 8 * word};
      EXPECT_FALSE(uses_words({}, fake(sizes, dtype, kInput + bytes)));
      EXPECT_FALSE(uses_words({}, fake(sizes, dtype, kInput, {{24 * word, 8 * word + 1, 1}})));
      EXPECT_FALSE(uses_words({}, fake(sizes, dtype, kInput, {{24 * word + 1, 8 * word, 1}})));
      EXPECT_FALSE(uses_words({}, fake(sizes, dtype, kInput, {{48 * word, 16 * word, 2}})));
      EXPECT_FALSE(uses_words({}, fake({5, 3, 7 * word}, dtype)));
      EXPECT_FALSE(uses_words({.rotary_dim = 2 * word, .rotary_offset = 1}, fake(sizes, dtype)));
      EXPECT_FALSE(uses_words({.rotary_dim = 2 * word + 2}, fake(sizes, dtype)));
      EXPECT_FALSE(uses_words({.rotary_dim = 2 * word}, fake({5, 3, 2 * word + 1}, dtype)));
    }
  }
}

TEST(CudaPlan, UsesSingleElementsForAPairWhereOneIsNotAligned) {
  const at::Tensor aligned = fake({5, 3, 64});
  const at::Tensor unaligned = fake({5, 3, 64}, at::kBFloat16, kInput + 2);
  EXPECT_TRUE(plan(by_tokens(5).on(aligned, aligned)).uses_words);
  EXPECT_FALSE(plan(by_tokens(5).on(aligned, unaligned)).uses_words);
  EXPECT_FALSE(plan(by_tokens(5).on(unaligned, aligned)).uses_words);
}

TEST(CudaPlan, UsesSingleElementsWhereTheOutputIsNotAligned) {
  const Call call = by_tokens(5).on(fake({5, 3, 64}));
  EXPECT_FALSE(
      host::plans(call, {fake({5, 3, 64}, at::kBFloat16, kOutput + 2), {}}).at(0).uses_words);
}

TEST(CudaPlan, CopiesWhatIsOutsideTheSliceOnlyOutOfPlace) {
  const Call call = by_tokens(5, {.rotary_dim = 64});
  const at::Tensor x = fake({5, 3, 128});
  EXPECT_EQ(plan(call.on(x)).work.copy_chunks, 4);
  EXPECT_EQ(plan(host::in_place(call.on(x))).work.copy_chunks, 0);
}

TEST(CudaPlan, CarriesEveryFrequencyOfTheWavelengthOnce) {
  for (const std::int64_t pairs : {1, 64, 255, 256, 257, 512, 513, 1000}) {
    SCOPED_TRACE(c10::str("pairs = ", pairs));
    const Call call =
        host::apply(fake({5, 1}, at::kFloat, kPositions),
                    {.rotary_dim = 2 * pairs, .max_wavelength = 5e5, .scale_factor = 8.0});
    const Call in_turns =
        by_tokens(5, {.rotary_dim = 2 * pairs, .max_wavelength = 5e5, .scale_factor = 8.0});
    const std::vector<RotatePlan> all_in_turns = plans(in_turns.on(fake({5, 3, 2 * pairs + 16})));
    const std::vector<RotatePlan> all = plans(call.on(fake({5, 3, 2 * pairs + 16})));
    EXPECT_EQ(std::ssize(all), (pairs + 255) / 256);
    EXPECT_EQ(all_in_turns.size(), all.size());
    std::int64_t next = 0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const RotatePlan& some = all[i];
      EXPECT_FALSE(some.work.in_turns);
      EXPECT_TRUE(all_in_turns[i].work.in_turns);
      EXPECT_EQ(some.work.first_pair, next);
      EXPECT_EQ(some.work.copy_chunks > 0, next == 0);
      for (std::int64_t n = next; n < some.work.last_pair; ++n) {
        const double exponent = -2.0 * static_cast<double>(n) / (2.0 * static_cast<double>(pairs));
        const double frequency = std::pow(5e5, exponent);
        ASSERT_NEAR(some.frequencies.radians[n - next], frequency, 1e-15 * frequency);
        // The scale factor is counted in.
        const double turns = std::ldexp(frequency / 8.0 / (2 * std::numbers::pi), 64);
        ASSERT_NEAR(static_cast<double>(all_in_turns[i].frequencies.turns[n - next]), turns,
                    1e-15 * turns + 1);
      }
      next = some.work.last_pair;
    }
    EXPECT_EQ(next, pairs);
  }
}

TEST(CudaPlan, FormsAnglesInTurnsOfIntegerPositionsAlone) {
  const auto in_turns = [](at::ScalarType positions, const rope::ApplyOptions& options,
                           at::ScalarType dtype = at::kBFloat16) {
    const at::Tensor p = fake({5, 1}, positions, kPositions);
    return plan(host::apply(p, options).on(fake({5, 3, 64}, dtype))).work.in_turns;
  };
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
    EXPECT_TRUE(in_turns(at::kLong, {}, dtype));
    EXPECT_TRUE(in_turns(at::kInt, {.max_wavelength = 1.0, .scale_factor = 1.0}, dtype));
  }
  EXPECT_FALSE(in_turns(at::kFloat, {}));
  EXPECT_FALSE(in_turns(at::kDouble, {}));
  EXPECT_FALSE(in_turns(at::kLong, {}, at::kDouble));
  EXPECT_FALSE(in_turns(at::kLong, {.inv_freq = fake({32}, at::kFloat)}));
  // Frequencies above 1.
  EXPECT_FALSE(in_turns(at::kLong, {.max_wavelength = 0.5}));
  EXPECT_FALSE(in_turns(at::kLong, {.scale_factor = 0.5}));
}

TEST(CudaPlan, KeepsTheFrequenciesOfSeveralWavelengths) {
  const at::Tensor x = fake({5, 3, 64});
  const std::vector<double> wavelengths = {1e4, 5e5, 1e6, 100, 1e4, 2e4, 1e4, 5e5};
  for (const double wavelength : wavelengths) {
    const RotatePlan some = plan(by_tokens(5, {.max_wavelength = wavelength}).on(x));
    const double turns = std::ldexp(std::pow(wavelength, -31.0 / 32) / (2 * std::numbers::pi), 64);
    EXPECT_NEAR(static_cast<double>(some.frequencies.turns[31]), turns, 1e-14 * turns + 1);
  }
}

TEST(CudaPlan, IsOneLaunchForAnyNumberOfGivenFrequenciesOrColumns) {
  const at::Tensor x = fake({5, 3, 4096});
  EXPECT_EQ(plan(by_tokens(5, {.inv_freq = fake({2048}, at::kFloat)}).on(x)).work.last_pair, 2048);
  const at::Tensor table = fake({5, 1, 2048}, at::kFloat);
  EXPECT_EQ(plan(host::apply_cos_sin(table, table).on(x)).work.last_pair, 2048);
}

TEST(CudaPlan, GivesLargeLaunchesMoreRowsPerThread) {
  std::int64_t last = 1;
  for (std::int64_t tokens = 1; tokens <= std::int64_t{1} << 20; tokens *= 4) {
    const RotatePlan some =
        plan(by_tokens(tokens).on(fake({tokens, 32, 128}), fake({tokens, 8, 128})));
    EXPECT_GE(some.work.rows_per_thread, last);
    last = some.work.rows_per_thread;
  }
  EXPECT_GT(last, 1);
}

TEST(CudaPlan, StaysWithinTheGridUpTo2To33Elements) {
  for (const at::ScalarType dtype : {at::kDouble, at::kHalf}) {
    for (std::int64_t elements = 1024; elements <= 8 * kGiga; elements *= 2) {
      for (const std::int64_t size : {2, 6, 128, 1024}) {
        for (const std::int64_t heads : {1, 32}) {
          const std::int64_t tokens = elements / size / heads;
          for (const std::int64_t offset : {0, 8}) {
            SCOPED_TRACE(c10::str("(", tokens, ", ", heads, ", ", size, ") + ", offset));
            if (tokens == 0) {
              continue;
            }
            const at::Tensor x = fake({tokens, heads, size}, dtype, kInput + offset);
            for (const RotatePlan& some : plans(by_tokens(tokens).on(x))) {
              EXPECT_GE(some.blocks, 1);
              EXPECT_LE(some.blocks, kMostBlocks);
              EXPECT_GE(some.blocks * some.work.threads, some.work.items);
              EXPECT_LT((some.blocks - 1) * some.work.threads, some.work.items);
            }
          }
        }
      }
    }
  }
}

TEST(CudaPlan, CountsIn64BitsExactlyWhereSomeOffsetNeedsThem) {
  const Call call = by_tokens(2);
  const auto index_is_64bit = [&](std::int64_t stride, at::ScalarType dtype) {
    return plan(call.on(fake({2, 3, 64}, dtype, kInput, {{stride, 64, 1}}))).index_is_64bit;
  };
  // The last row begins at the stride and two heads more.
  EXPECT_FALSE(index_is_64bit(2 * kGiga - 1 - 128, at::kFloat));
  EXPECT_TRUE(index_is_64bit(2 * kGiga - 128, at::kFloat));
  EXPECT_FALSE(plan(by_tokens(1 << 16).on(fake({1 << 16, 255, 128}))).index_is_64bit);
  EXPECT_TRUE(plan(by_tokens(1 << 16).on(fake({1 << 16, 257, 128}))).index_is_64bit);
}

TEST(CudaPlan, CountsIn64BitsWherePositionsOrTablesNeedThem) {
  const at::Tensor x = fake({2, 1, 64});
  const at::Tensor near = fake({2, 1}, at::kLong, kPositions, {{2 * kGiga - 1, 1}});
  const at::Tensor far = fake({2, 1}, at::kLong, kPositions, {{2 * kGiga, 1}});
  EXPECT_FALSE(plan(host::apply(near).on(x)).index_is_64bit);
  EXPECT_TRUE(plan(host::apply(far).on(x)).index_is_64bit);
  const at::Tensor table = fake({2, 1, 32}, at::kFloat);
  const at::Tensor far_table = fake({2, 1, 32}, at::kFloat, kPositions, {{2 * kGiga, 1, 1}});
  EXPECT_FALSE(plan(host::apply_cos_sin(table, table).on(x)).index_is_64bit);
  EXPECT_TRUE(plan(host::apply_cos_sin(far_table, table).on(x)).index_is_64bit);
  EXPECT_TRUE(plan(host::apply_cos_sin(table, far_table).on(x)).index_is_64bit);
}

TEST(CudaPlan, CountsIn64BitsWhereKNeedsThem) {
  const at::Tensor q = fake({2, 3, 64});
  const at::Tensor k = fake({2, 3, 64}, at::kBFloat16, kInput, {{2 * kGiga, 64, 1}});
  EXPECT_TRUE(plan(by_tokens(2).on(q, k)).index_is_64bit);
}

TEST(CudaPlan, SpreadsAFewTokensOverManyProcessors) {
  const auto decode = [](std::int64_t batch) {
    return plan(by_tokens(batch).on(fake({batch, 32, 128}), fake({batch, 8, 128})));
  };
  EXPECT_EQ(decode(1).blocks, 5);  // 40 rows of 8 threads, 64 to a block.
  EXPECT_EQ(decode(32).work.threads, rope::cuda::kFewThreads);
  EXPECT_EQ(decode(4096).work.threads, rope::cuda::kThreads);
}

TEST(CudaPlan, ReadsTablesInWordsWhereEveryRowIsAligned) {
  const at::Tensor x = fake({8, 3, 64});
  const auto has_words = [&](const at::Tensor& cos, const at::Tensor& sin,
                             std::optional<at::Tensor> rows = std::nullopt) {
    return plan(host::apply_cos_sin(cos, sin, {.positions = rows}).on(x)).work.tables_have_words;
  };
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    SCOPED_TRACE(c10::str("dtype = ", dtype));
    const auto table = [&](std::int64_t offset, at::IntArrayRef strides) {
      return fake({8, 1, 32}, dtype, kPositions + offset, strides);
    };
    const at::Tensor good = table(0, {32, 32, 1});
    EXPECT_TRUE(has_words(good, good));
    EXPECT_TRUE(has_words(table(16, {48, 48, 1}), table(0, {0, 0, 1})));
    for (const at::Tensor& bad : {table(8, {32, 32, 1}), table(0, {33, 33, 1}),
                                  table(0, {64, 64, 2}), table(0, {1, 1, 8})}) {
      EXPECT_FALSE(has_words(good, bad));
      EXPECT_FALSE(has_words(bad, good));
    }
    const at::Tensor rows = fake({8, 1}, at::kLong, kPositions);
    const auto by_row = [&](std::int64_t stride) {
      return fake({9, 32}, dtype, kPositions, {{stride, 1}});
    };
    EXPECT_TRUE(has_words(by_row(32), by_row(64), rows));
    EXPECT_FALSE(has_words(by_row(32), by_row(33), rows));
  }
}

// The bytes that the threads of a plan load, and store again, by its own count.
std::int64_t bytes_of(const RotatePlan& plan, std::int64_t tokens, at::ScalarType dtype) {
  const std::int64_t pairs = plan.uses_words ? rope::cuda::word_elements(dtype) : 1;
  const std::int64_t chunks = plan.work.rotate_chunks + plan.work.copy_chunks;
  return tokens * plan.work.shared_rows * chunks * 2 * pairs *
         static_cast<std::int64_t>(c10::elementSize(dtype));
}

TEST(CudaPlan, MovesEachElementOnceWithinTheLimitsOfACard) {
  struct Shape {
    std::int64_t tokens, q_heads, k_heads, size, rotary_dim;
  };
  for (const auto& [tokens, q_heads, k_heads, size, rotary_dim] :
       {Shape{1, 1, 0, 2, 2}, Shape{1, 32, 8, 128, 128}, Shape{64, 32, 8, 128, 128},
        Shape{4096, 32, 8, 128, 128}, Shape{16384, 32, 8, 128, 128}, Shape{4096, 32, 8, 128, 64},
        Shape{4096, 128, 1, 64, 64}, Shape{8192, 1, 0, 64, 64}, Shape{4096, 32, 8, 96, 96},
        Shape{4096, 32, 8, 90, 90}, Shape{4096, 16, 8, 256, 256}, Shape{kGiga, 1, 0, 8, 8},
        Shape{1, kGiga, 0, 8, 8}, Shape{4 * kGiga, 1, 0, 2, 2}, Shape{kGiga / 16, 1, 0, 128, 128},
        Shape{kGiga / 512, 32, 0, 128, 64}}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat, at::kDouble}) {
      SCOPED_TRACE(c10::str("(", tokens, ", ", q_heads, " + ", k_heads, ", ", size, "), ",
                            rotary_dim, " rotated, ", dtype));
      const Call call = by_tokens(tokens, {.rotary_dim = rotary_dim});
      const at::Tensor q = fake({tokens, q_heads, size}, dtype);
      const at::Tensor k = fake({tokens, k_heads, size}, dtype, kKey);
      for (const bool in_place : {false, true}) {
        Call both = k_heads > 0 ? call.on(q, k) : call.on(q);
        both.in_place = in_place;
        const RotatePlan some = plan(both);
        const std::int64_t elements = tokens * (q_heads + k_heads) * (in_place ? rotary_dim : size);
        EXPECT_EQ(bytes_of(some, tokens, dtype),
                  elements * static_cast<std::int64_t>(c10::elementSize(dtype)));
        EXPECT_GE(some.blocks, 1);
        EXPECT_LE(some.blocks, kMostBlocks);
        EXPECT_LE(some.work.threads, rope::cuda::kThreads);
        EXPECT_EQ(some.work.threads % 32, 0);
        EXPECT_EQ(some.blocks, rope::cuda::ceil_div(some.work.items, some.work.threads));
        EXPECT_GE(some.work.row_groups * some.work.rows_per_thread, some.work.shared_rows);
      }
    }
  }
}

// The plan of the sums of x and a gradient, by tokens (tokens..., N).
Plan sum_plan(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef sizes,
              const rope::CosSinOptions& options = {}) {
  const at::Tensor like_sums =
      at::empty(sizes, at::dtype(at::toOpMathType(x.scalar_type())).device(at::kMeta));
  std::vector<Plan> plans;
  rope::for_each_launch(
      host::apply_cos_sin(like_sums, like_sums, options).on(grad), {x, {}},
      [&](const rope::Launch& launch) { plans.push_back(rope::cuda::make_sum_plan(launch)); });
  EXPECT_EQ(plans.size(), 1);
  return plans.at(0);
}

TEST(CudaSumPlan, CutsRowsIntoGroupsOnlyWhereTokensAreFew) {
  constexpr std::int64_t kEnough = std::int64_t{1} << 16;
  for (std::int64_t tokens = 1; tokens <= std::int64_t{1} << 20; tokens *= 4) {
    for (const std::int64_t heads : {1, 8, 32}) {
      for (const std::int64_t batch : {1, 3, 64}) {
        SCOPED_TRACE(c10::str("(", batch, ", ", tokens, ", ", heads, ", 128)"));
        const at::Tensor x = fake({batch, tokens, heads, 128});
        const Plan some = sum_plan(fake(x.sizes(), at::kBFloat16, kOutput), x, {tokens, 1, 64});
        const rope::cuda::Work& work = some.work;
        EXPECT_EQ(work.shared_rows, batch * heads);
        EXPECT_EQ(work.items, tokens * 8 * work.row_groups);
        EXPECT_GE(work.row_groups * work.rows_per_thread, work.shared_rows);
        EXPECT_LT((work.row_groups - 1) * work.rows_per_thread, work.shared_rows);
        if (tokens * 8 >= kEnough || batch * heads <= 8) {
          EXPECT_EQ(work.row_groups, 1);
        } else {
          EXPECT_GT(work.row_groups, 1);
          EXPECT_GE(work.rows_per_thread, 8);
          EXPECT_TRUE(work.items > kEnough / 2 || work.rows_per_thread == 8);
        }
        EXPECT_EQ(some.blocks, rope::cuda::ceil_div(work.items, work.threads));
        EXPECT_LE(some.blocks, kMostBlocks);
      }
    }
  }
}

TEST(CudaSumPlan, UsesWordsWhereXAndItsGradientAreAligned) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    const std::int64_t word = rope::cuda::word_elements(dtype);
    const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype));
    const std::vector<std::int64_t> sizes = {5, 3, 8 * word};
    const at::Tensor x = fake(sizes, dtype);
    const at::Tensor grad = fake(sizes, dtype, kOutput);
    EXPECT_TRUE(sum_plan(grad, x, {5, 1, 4 * word}).uses_words);
    EXPECT_TRUE(sum_plan(fake(sizes, dtype, kOutput, {{0, 0, 1}}), x, {5, 1, 4 * word}).uses_words);
    EXPECT_TRUE(sum_plan(grad, x, {5, 1, word}, {.rotary_offset = word}).uses_words);
    EXPECT_FALSE(sum_plan(grad, x, {5, 1, word}, {.rotary_offset = 1}).uses_words);
    EXPECT_FALSE(sum_plan(grad, x, {5, 1, word + 1}).uses_words);
    EXPECT_FALSE(sum_plan(fake(sizes, dtype, kOutput, {{0, 0, 0}}), x, {5, 1, word}).uses_words);
    EXPECT_FALSE(sum_plan(fake(sizes, dtype, kOutput + bytes), x, {5, 1, word}).uses_words);
    EXPECT_FALSE(sum_plan(grad, fake(sizes, dtype, kInput + bytes), {5, 1, word}).uses_words);
  }
}

TEST(CudaSumPlan, CountsIn64BitsExactlyWhereSomeOffsetNeedsThem) {
  const at::Tensor near = fake({2, 3, 64});
  const auto index_is_64bit = [&](std::int64_t stride) {
    const at::Tensor far = fake({2, 3, 64}, at::kBFloat16, kInput, {{stride, 64, 1}});
    const bool of_x = sum_plan(near, far, {2, 1, 32}).index_is_64bit;
    EXPECT_EQ(sum_plan(far, near, {2, 1, 32}).index_is_64bit, of_x);
    EXPECT_EQ(sum_plan(far, near, {32}).index_is_64bit, of_x);
    return of_x;
  };
  EXPECT_FALSE(index_is_64bit(2 * kGiga - 1 - 128));
  EXPECT_TRUE(index_is_64bit(2 * kGiga - 128));
  // More rows, and more sums, than 32 bits count.
  const std::vector<std::int64_t> sizes = {2 * kGiga, 2};
  const at::Tensor still = fake(sizes, at::kBFloat16, kInput, {{0, 1}});
  EXPECT_TRUE(sum_plan(still, still, {1}).index_is_64bit);
  EXPECT_TRUE(sum_plan(still, still, {2 * kGiga, 1}).index_is_64bit);
}

}  // namespace
