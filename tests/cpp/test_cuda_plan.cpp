// How launches are divided into blocks. No memory is accessed: the addresses are made up.
#include <cmath>
#include <numbers>

#include "cuda/dispatch.h"
#include "host_launch.h"
#include "reference.h"

namespace {

using host::Call;
using rope::Outputs;
using rope::cuda::Plan;

constexpr std::int64_t kMostBlocks = (std::int64_t{1} << 31) - 1;  // of a grid's first dimension
constexpr std::int64_t kGiga = std::int64_t{1} << 30;

// Addresses of fake tensors, far apart, multiples of 2 MiB.
constexpr std::int64_t kInput = std::int64_t{1} << 40;
constexpr std::int64_t kKey = std::int64_t{1} << 39;
constexpr std::int64_t kOutput = std::int64_t{1} << 41;
constexpr std::int64_t kPositions = std::int64_t{1} << 42;

// Those that are accessed by vectors.
constexpr at::ScalarType kVectorDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16};

// A tensor without memory.
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
std::vector<Plan> plans(const Call& call) {
  if (call.in_place) {
    return host::plans(call, {call.q, call.k});
  }
  const auto output = [](const at::Tensor& x) {
    return x.defined() ? fake(x.sizes(), x.scalar_type(), kOutput) : at::Tensor();
  };
  return host::plans(call, {output(call.q), output(call.k)});
}

Plan plan(const Call& call) {
  const std::vector<Plan> all = plans(call);
  EXPECT_EQ(all.size(), 1);
  return all.at(0);
}

Call by_tokens(std::int64_t tokens, const rope::ApplyOptions& options = {}) {
  return host::apply(fake({tokens, 1}, at::kLong, kPositions), options);
}

TEST(CudaPlan, ParametersAreSmall) {
  EXPECT_LE(sizeof(rope::cuda::RotateParams<std::int32_t>), 512);
  EXPECT_LE(sizeof(rope::cuda::SumParams<std::int32_t>), 512);
  // The limit of every device.
  EXPECT_LE(sizeof(rope::cuda::RotateParams<std::int64_t>), 4096);
  EXPECT_LE(sizeof(rope::cuda::SumParams<std::int64_t>), 4096);
}

TEST(CudaPlan, IsOneLaunchForAPairOfDifferentHeads) {
  const Plan one = plan(by_tokens(1).on(fake({1, 1, 32, 128}), fake({1, 1, 8, 128})));
  EXPECT_TRUE(one.uses_vectors);
  EXPECT_FALSE(one.index_is_64bit);
  EXPECT_EQ(one.blocks.rows, 40);
  EXPECT_EQ(one.blocks.q_rows, 32);
  EXPECT_EQ(one.blocks.columns, 8);  // 8 pairs of bfloat16 are two 16-byte vectors.
}

// The shapes measured on an H200 (benchmarks/results/2026-11-27-nvidia-h200.md).
TEST(CudaPlan, HasTheBlocksThatWereMeasured) {
  struct Case {
    std::int64_t tokens;
    int threads;
    std::int64_t blocks;
  };
  for (const auto& [tokens, threads, blocks] :
       {Case{1, 64, 5}, Case{8, 64, 40}, Case{64, 80, 256}, Case{256, 160, 256},
        Case{1024, 160, 1024}, Case{4096, 160, 4096}, Case{16384, 160, 16384}}) {
    SCOPED_TRACE(c10::str(tokens, " tokens"));
    const Plan some = plan(by_tokens(tokens).on(fake({tokens, 32, 128}), fake({tokens, 8, 128})));
    EXPECT_EQ(some.block_x * some.block_y * some.block_z, threads);
    EXPECT_EQ(some.grid_x * some.grid_y, blocks);
  }
}

TEST(CudaPlan, UsesVectorsWhereEveryRowIsAligned) {
  for (const at::ScalarType dtype : kVectorDtypes) {
    const std::int64_t vector = rope::cuda::vector_elements(dtype);
    for (const bool interleaved : {false, true}) {
      SCOPED_TRACE(c10::str("dtype = ", dtype, ", interleaved = ", interleaved));
      const Call call = by_tokens(5, {.interleaved = interleaved});
      EXPECT_TRUE(plan(call.on(fake({2, 5, 3, 8 * vector}, dtype))).uses_vectors);
      const Call part = by_tokens(
          5, {.rotary_dim = 4 * vector, .rotary_offset = vector, .interleaved = interleaved});
      EXPECT_TRUE(plan(part.on(fake({2, 5, 3, 8 * vector}, dtype))).uses_vectors);
      EXPECT_TRUE(plan(call.on(fake({5, 3, 8 * vector}, dtype, kInput + 16))).uses_vectors);
      const std::vector<std::int64_t> gaps = {30 * vector, 9 * vector, 1};
      EXPECT_TRUE(plan(call.on(fake({5, 3, 8 * vector}, dtype, kInput, gaps))).uses_vectors);
    }
  }
}

TEST(CudaPlan, UsesSingleElementsForFloat64) {
  const at::Tensor table = fake({5, 1, 32}, at::kDouble);
  const at::Tensor x = fake({5, 3, 64}, at::kDouble);
  EXPECT_FALSE(plan(by_tokens(5).on(x)).uses_vectors);
  EXPECT_FALSE(plan(host::apply_cos_sin(table, table).on(x)).uses_vectors);
}

TEST(CudaPlan, UsesSingleElementsWhereSomeRowIsNotAligned) {
  for (const at::ScalarType dtype : kVectorDtypes) {
    const std::int64_t vector = rope::cuda::vector_elements(dtype);
    const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype));
    for (const bool interleaved : {false, true}) {
      SCOPED_TRACE(c10::str("dtype = ", dtype, ", interleaved = ", interleaved));
      const auto uses_vectors = [&](const rope::ApplyOptions& options, const at::Tensor& x) {
        rope::ApplyOptions all = options;
        all.interleaved = interleaved;
        return plan(by_tokens(5, all).on(x)).uses_vectors;
      };
      const std::vector<std::int64_t> sizes = {5, 3, 8 * vector};
      EXPECT_FALSE(uses_vectors({}, fake(sizes, dtype, kInput + bytes)));
      EXPECT_FALSE(
          uses_vectors({}, fake(sizes, dtype, kInput, {{24 * vector, 8 * vector + 1, 1}})));
      EXPECT_FALSE(
          uses_vectors({}, fake(sizes, dtype, kInput, {{24 * vector + 1, 8 * vector, 1}})));
      EXPECT_FALSE(uses_vectors({}, fake(sizes, dtype, kInput, {{48 * vector, 16 * vector, 2}})));
      EXPECT_FALSE(uses_vectors({}, fake({5, 3, 7 * vector}, dtype)));
      EXPECT_FALSE(
          uses_vectors({.rotary_dim = 2 * vector, .rotary_offset = 1}, fake(sizes, dtype)));
      EXPECT_FALSE(uses_vectors({.rotary_dim = 2 * vector + 2}, fake(sizes, dtype)));
      EXPECT_FALSE(uses_vectors({.rotary_dim = 2 * vector}, fake({5, 3, 2 * vector + 1}, dtype)));
      // Elements outside the slice that do not fill whole vectors are copied, except in place.
      const at::Tensor ragged =
          fake({5, 3, 2 * vector + 1}, dtype, kInput, {{12 * vector, 4 * vector, 1}});
      EXPECT_FALSE(uses_vectors({.rotary_dim = 2 * vector}, ragged));
      EXPECT_TRUE(
          plan(host::in_place(
                   by_tokens(5, {.rotary_dim = 2 * vector, .interleaved = interleaved}).on(ragged)))
              .uses_vectors);
    }
  }
}

TEST(CudaPlan, UsesSingleElementsForAPairWhereOneIsNotAligned) {
  const at::Tensor aligned = fake({5, 3, 64});
  const at::Tensor unaligned = fake({5, 3, 64}, at::kBFloat16, kInput + 2);
  EXPECT_TRUE(plan(by_tokens(5).on(aligned, aligned)).uses_vectors);
  EXPECT_FALSE(plan(by_tokens(5).on(aligned, unaligned)).uses_vectors);
  EXPECT_FALSE(plan(by_tokens(5).on(unaligned, aligned)).uses_vectors);
}

TEST(CudaPlan, UsesSingleElementsWhereTheOutputIsNotAligned) {
  const Call call = by_tokens(5).on(fake({5, 3, 64}));
  EXPECT_FALSE(
      host::plans(call, {fake({5, 3, 64}, at::kBFloat16, kOutput + 2), {}}).at(0).uses_vectors);
}

std::int64_t columns_of_others(const Plan& plan) {
  return plan.blocks.columns - plan.blocks.rotated_columns;
}

TEST(CudaPlan, CopiesWhatIsOutsideTheSliceOnlyOutOfPlace) {
  const Call call = by_tokens(5, {.rotary_dim = 64});
  const at::Tensor x = fake({5, 3, 128});
  EXPECT_EQ(columns_of_others(plan(call.on(x))), 4);
  EXPECT_EQ(columns_of_others(plan(host::in_place(call.on(x)))), 0);
}

using rope::cuda::AngleSource;

// Visits the launches of a call whose outputs are aligned.
void for_each_launch(const Call& call, const std::function<void(const rope::Launch&)>& visit) {
  rope::check(call);
  rope::for_each_launch(call, {fake(call.q.sizes(), call.q.scalar_type(), kOutput), {}}, visit);
}

AngleSource source_of(const Call& call) {
  std::optional<AngleSource> source;
  for_each_launch(call,
                  [&](const rope::Launch& launch) { source = rope::cuda::angle_source(launch); });
  return source.value();
}

TEST(CudaPlan, FormsAnglesInTheirDtype) {
  const auto source = [](const rope::ApplyOptions& options, at::ScalarType positions = at::kLong) {
    return source_of(
        host::apply(fake({5, 1}, positions, kPositions), options).on(fake({5, 3, 64})));
  };
  EXPECT_EQ(source({.inv_freq = fake({32}, at::kFloat)}), AngleSource::kFloat32);
  EXPECT_EQ(source({.inv_freq = fake({32}, at::kFloat)}, at::kDouble), AngleSource::kFloat32);
  EXPECT_EQ(source({.inv_freq = fake({32}, at::kDouble)}), AngleSource::kFloat64);
  EXPECT_EQ(source({}, at::kFloat), AngleSource::kFloat64);
  const at::Tensor table = fake({5, 1, 32}, at::kFloat);
  EXPECT_EQ(source_of(host::apply_cos_sin(table, table).on(fake({5, 3, 64}))),
            AngleSource::kTables);
}

TEST(CudaPlan, FormsAnglesInTurnsOfIntegerPositionsAlone) {
  const auto in_turns = [](at::ScalarType positions, const rope::ApplyOptions& options,
                           at::ScalarType dtype = at::kBFloat16) {
    const at::Tensor p = fake({5, 1}, positions, kPositions);
    return source_of(host::apply(p, options).on(fake({5, 3, 64}, dtype))) == AngleSource::kTurns;
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
    for (const double scale_factor : {1.0, 8.0}) {
      const Call call =
          by_tokens(5, {.max_wavelength = wavelength, .scale_factor = scale_factor}).on(x);
      for_each_launch(call, [&](const rope::Launch& launch) {
        for (const int n : {0, 1, 31}) {
          const double frequency = std::pow(wavelength, -n / 32.0);
          const double turns = std::ldexp(frequency / scale_factor / (2 * std::numbers::pi), 64);
          EXPECT_NEAR(static_cast<double>(rope::cuda::frequencies_in_turns(launch)[n]), turns,
                      1e-14 * turns + 1);
          EXPECT_NEAR(launch.position_angles.wavelength_frequencies[n], frequency,
                      1e-15 * frequency);
        }
      });
    }
  }
}

TEST(CudaPlan, IsOneLaunchForAnyNumberOfPairs) {
  const at::Tensor x = fake({5, 3, 1 << 20});
  EXPECT_EQ(plan(by_tokens(5).on(x)).blocks.rotated_columns, 1 << 16);
  EXPECT_EQ(plan(by_tokens(5, {.inv_freq = fake({2048}, at::kFloat)}).on(x)).blocks.rotated_columns,
            2048 / 8);
  const at::Tensor table = fake({5, 1, 2048}, at::kFloat);
  EXPECT_EQ(plan(host::apply_cos_sin(table, table).on(x)).blocks.rotated_columns, 2048 / 8);
}

// Whether the blocks cover every token, column and row, within the limits of the hardware.
void expect_complete(const Plan& some, std::int64_t tokens, std::int64_t rows) {
  const auto& blocks = some.blocks;
  const std::int64_t groups = blocks.column_groups.divisor;
  EXPECT_GE(some.grid_x, 1);
  EXPECT_LE(some.grid_x, kMostBlocks);
  EXPECT_GE(some.grid_y, 1);
  EXPECT_LE(some.grid_y, 65535);
  EXPECT_GE(some.block_x * some.block_y * some.block_z, 1);
  EXPECT_LE(some.block_x * some.block_y * some.block_z, rope::cuda::kMaxThreads);
  EXPECT_LE(some.block_z, 64);
  EXPECT_EQ(blocks.tokens, tokens);
  EXPECT_EQ(blocks.rows, rows);
  EXPECT_EQ(some.grid_x % groups, 0);
  EXPECT_GE(some.grid_x / groups * blocks.block_tokens, tokens);
  EXPECT_LT((some.grid_x / groups - 1) * blocks.block_tokens, tokens);
  EXPECT_GE(groups * blocks.block_columns, blocks.columns);
  EXPECT_LT((groups - 1) * blocks.block_columns, blocks.columns);
  EXPECT_GE(some.grid_y * blocks.rows_per_block, rows);
  EXPECT_LT((some.grid_y - 1) * blocks.rows_per_block, rows);
}

TEST(CudaPlan, StaysWithinTheGridUpTo2To33Elements) {
  for (const at::ScalarType dtype : {at::kDouble, at::kHalf}) {
    for (std::int64_t elements = 1024; elements <= 8 * kGiga; elements *= 2) {
      for (const std::int64_t size : {2, 6, 128, 1024}) {
        for (const std::int64_t heads : {1, 2, 32}) {
          const std::int64_t tokens = elements / size / heads;
          for (const std::int64_t offset : {0, 8}) {
            SCOPED_TRACE(c10::str("(", tokens, ", ", heads, ", ", size, ") + ", offset));
            if (tokens == 0) {
              continue;
            }
            const at::Tensor x = fake({tokens, heads, size}, dtype, kInput + offset);
            expect_complete(plan(by_tokens(tokens).on(x)), tokens, heads);
            // One token with all rows.
            const Call one_token = host::apply(fake({}, at::kLong, kPositions));
            expect_complete(plan(one_token.on(x)), 1, tokens * heads);
            // Threads along tokens, and along heads.
            const at::Tensor by_tokens_last = fake({size, heads, tokens}, dtype, kInput + offset);
            const at::Tensor by_heads_last = fake({tokens, size, heads}, dtype, kInput + offset);
            const auto expect_axis = [&](std::int64_t axis, at::IntArrayRef sizes,
                                         const at::Tensor& strided) {
              const Call call =
                  host::apply(fake(sizes, at::kLong, kPositions), {.embedding_axis = axis});
              expect_complete(plan(call.on(strided)), tokens, heads);
            };
            expect_axis(0, {tokens}, by_tokens_last);
            expect_axis(1, {tokens, 1}, by_heads_last);
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
  // Of single elements, the last row is at the stride and two heads.
  EXPECT_FALSE(index_is_64bit(2 * kGiga - 1 - 128, at::kDouble));
  EXPECT_TRUE(index_is_64bit(2 * kGiga - 128, at::kDouble));
  EXPECT_FALSE(index_is_64bit(2 * kGiga - 1 - 128, at::kFloat));
  EXPECT_FALSE(plan(by_tokens(1 << 16).on(fake({1 << 16, 255, 128}))).index_is_64bit);
  EXPECT_FALSE(plan(by_tokens(1 << 16).on(fake({1 << 16, 257, 128}))).index_is_64bit);
  // Of vectors: 4 of float32, 8 of bfloat16.
  EXPECT_FALSE(index_is_64bit(8 * kGiga - 4 - 128, at::kFloat));
  EXPECT_TRUE(index_is_64bit(8 * kGiga - 128, at::kFloat));
  EXPECT_FALSE(index_is_64bit(16 * kGiga - 8 - 128, at::kBFloat16));
  EXPECT_TRUE(index_is_64bit(16 * kGiga - 128, at::kBFloat16));
}

TEST(CudaPlan, CountsIn64BitsWherePositionsOrTablesNeedThem) {
  const at::Tensor x = fake({2, 1, 64});
  const at::Tensor near = fake({2, 1}, at::kLong, kPositions, {{2 * kGiga - 64, 1}});
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
  const at::Tensor k = fake({2, 3, 64}, at::kBFloat16, kInput, {{16 * kGiga, 64, 1}});
  EXPECT_TRUE(plan(by_tokens(2).on(q, k)).index_is_64bit);
}

TEST(CudaPlan, CountsIn64BitsWhereDimensionsAreMany) {
  const auto index_is_64bit = [](at::IntArrayRef positions, at::IntArrayRef strides) {
    const at::Tensor p = fake(positions, at::kLong, kPositions);
    return plan(host::apply(p).on(fake({2, 3, 4, 5, 64}, at::kBFloat16, kInput, strides)))
        .index_is_64bit;
  };
  // With 32-bit indices, tokens and heads may have two dimensions each.
  EXPECT_FALSE(index_is_64bit({2, 3, 4, 5}, {{3840, 1280, 320, 64, 1}}));
  EXPECT_FALSE(index_is_64bit({2, 1, 4, 1}, {{3840, 1280, 320, 64, 1}}));
  EXPECT_TRUE(index_is_64bit({2, 3, 4, 5}, {{38400, 8000, 640, 64, 1}}));
  EXPECT_TRUE(index_is_64bit({1, 1, 1, 1}, {{38400, 8000, 640, 64, 1}}));
}

TEST(CudaPlan, FindsRotationsInRegistersWhereRowsAreFew) {
  const auto has_few_rows = [](const Call& call, std::int64_t heads,
                               at::ScalarType dtype = at::kBFloat16, std::int64_t size = 64) {
    return plan(call.on(fake({4096, heads, size}, dtype))).has_few_rows;
  };
  const Call call = by_tokens(4096);
  for (std::int64_t heads = 1; heads <= 8; ++heads) {
    EXPECT_EQ(has_few_rows(call, heads), heads <= 4) << heads;
  }
  EXPECT_TRUE(has_few_rows(by_tokens(4096, {.inv_freq = fake({32}, at::kFloat)}), 1));
  EXPECT_FALSE(has_few_rows(by_tokens(4096, {.inv_freq = fake({32}, at::kDouble)}), 1));
  EXPECT_FALSE(has_few_rows(call, 1, at::kDouble));
  EXPECT_FALSE(has_few_rows(call, 1, at::kBFloat16, 62));
  const at::Tensor table = fake({4096, 1, 32}, at::kFloat);
  EXPECT_FALSE(has_few_rows(host::apply_cos_sin(table, table), 1));
}

TEST(CudaPlan, LaysThreadsAlongContiguousMemory) {
  using rope::cuda::Lanes;
  const Call call = host::apply(fake({4096}, at::kLong, kPositions), {.embedding_axis = 1});
  const Plan tokens = plan(call.on(fake({8, 128, 4096})));
  EXPECT_EQ(tokens.blocks.lanes, Lanes::kTokens);
  EXPECT_EQ(tokens.block_x, 32);
  const Call by_batch = host::apply(fake({8, 1}, at::kLong, kPositions), {.embedding_axis = 1});
  const Plan rows = plan(by_batch.on(fake({8, 128, 4096})));
  EXPECT_EQ(rows.blocks.lanes, Lanes::kRows);
  EXPECT_EQ(rows.block_x, 32);
  const Plan columns = plan(by_tokens(4096).on(fake({4096, 32, 64}, at::kBFloat16, kInput + 2)));
  EXPECT_EQ(columns.blocks.lanes, Lanes::kColumns);
  EXPECT_EQ(columns.block_x, 32);
}

// The bytes that the threads of a plan load, which are also those they store.
std::int64_t bytes_of(const Plan& plan, at::ScalarType dtype) {
  const std::int64_t pairs = plan.uses_vectors ? rope::cuda::vector_elements(dtype) : 1;
  return plan.blocks.tokens * plan.blocks.rows * plan.blocks.columns * 2 * pairs *
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
        const Plan some = plan(both);
        const std::int64_t elements = tokens * (q_heads + k_heads) * (in_place ? rotary_dim : size);
        EXPECT_EQ(bytes_of(some, dtype),
                  elements * static_cast<std::int64_t>(c10::elementSize(dtype)));
        expect_complete(some, tokens, q_heads + k_heads);
      }
    }
  }
}

TEST(CudaPlan, HasSharedMemoryWithoutAsking) {
  // A block may use 48 KiB without setting an attribute of the kernel.
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const std::int64_t size : {2, 16, 64, 80, 128, 512, 4096, 65536}) {
      for (const std::int64_t heads : {1, 5, 8, 40, 1000}) {
        for (const std::int64_t offset : {0, 8}) {
          for (const bool full_width : {false, true}) {
            SCOPED_TRACE(c10::str(heads, " of ", size, ", ", dtype));
            const at::Tensor x = fake({4096, heads, size}, dtype, kInput + offset);
            const at::Tensor table = fake({4096, 1, full_width ? size : size / 2}, dtype);
            const Call call = host::apply_cos_sin(table, table, {.full_width = full_width}).on(x);
            for_each_launch(call, [&](const rope::Launch& launch) {
              const auto expect_fits = [&](const Plan& some) {
                return [&](auto type) {
                  EXPECT_LE(rope::cuda::shared_bytes<typename decltype(type)::type>(some),
                            48 << 10);
                };
              };
              const Plan rotation = rope::cuda::make_rotate_plan(launch);
              rope::cuda::dispatch_thread<rope::cuda::RotateThread>(launch, rotation,
                                                                    expect_fits(rotation));
              const Plan sums = rope::cuda::make_sum_plan(launch);
              rope::cuda::dispatch_thread<rope::cuda::SumThread>(launch, sums, expect_fits(sums));
            });
          }
        }
      }
    }
  }
}

// The plan for sums of x and a gradient; sizes is (tokens..., N).
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
  for (std::int64_t tokens = 1; tokens <= std::int64_t{1} << 20; tokens *= 4) {
    for (const std::int64_t heads : {1, 8, 32}) {
      for (const std::int64_t batch : {1, 3, 64}) {
        SCOPED_TRACE(c10::str("(", batch, ", ", tokens, ", ", heads, ", 128)"));
        const at::Tensor x = fake({batch, tokens, heads, 128});
        const Plan some = sum_plan(fake(x.sizes(), at::kBFloat16, kOutput), x, {tokens, 1, 64});
        const std::int64_t rows = batch * heads;
        expect_complete(some, tokens, rows);
        if (tokens >= rope::cuda::kEnoughBlocks || rows <= 16) {
          EXPECT_EQ(some.grid_y, 1);
        } else {
          EXPECT_GT(some.grid_y, 1);
        }
      }
    }
  }
}

TEST(CudaSumPlan, UsesVectorsWhereXAndItsGradientAreAligned) {
  for (const at::ScalarType dtype : kVectorDtypes) {
    const std::int64_t vector = rope::cuda::vector_elements(dtype);
    const auto bytes = static_cast<std::int64_t>(c10::elementSize(dtype));
    const std::vector<std::int64_t> sizes = {5, 3, 8 * vector};
    const at::Tensor x = fake(sizes, dtype);
    const at::Tensor grad = fake(sizes, dtype, kOutput);
    EXPECT_TRUE(sum_plan(grad, x, {5, 1, 4 * vector}).uses_vectors);
    EXPECT_TRUE(
        sum_plan(fake(sizes, dtype, kOutput, {{0, 0, 1}}), x, {5, 1, 4 * vector}).uses_vectors);
    EXPECT_TRUE(sum_plan(grad, x, {5, 1, vector}, {.rotary_offset = vector}).uses_vectors);
    EXPECT_FALSE(sum_plan(grad, x, {5, 1, vector}, {.rotary_offset = 1}).uses_vectors);
    EXPECT_FALSE(sum_plan(grad, x, {5, 1, vector + 1}).uses_vectors);
    EXPECT_FALSE(
        sum_plan(fake(sizes, dtype, kOutput, {{0, 0, 0}}), x, {5, 1, vector}).uses_vectors);
    EXPECT_FALSE(sum_plan(fake(sizes, dtype, kOutput + bytes), x, {5, 1, vector}).uses_vectors);
    EXPECT_FALSE(sum_plan(grad, fake(sizes, dtype, kInput + bytes), {5, 1, vector}).uses_vectors);
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
  // In vectors of 8: the last row is at the stride and two heads.
  EXPECT_FALSE(index_is_64bit(16 * kGiga - 8 - 128));
  EXPECT_TRUE(index_is_64bit(16 * kGiga - 128));
  // Too many rows, or sums, for 32 bits.
  const std::vector<std::int64_t> sizes = {2 * kGiga, 2};
  const at::Tensor still = fake(sizes, at::kBFloat16, kInput, {{0, 1}});
  EXPECT_TRUE(sum_plan(still, still, {1}).index_is_64bit);
  EXPECT_TRUE(sum_plan(still, still, {2 * kGiga, 1}).index_is_64bit);
}

}  // namespace
