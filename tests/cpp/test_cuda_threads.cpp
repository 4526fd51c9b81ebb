// Runs every thread of every block of the rotation kernels on the host.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>

#include "cuda/dispatch.h"
#include "cuda/plan.h"
#include "host_launch.h"
#include "host_norm.h"
#include "host_threads.h"
#include "random_calls.h"
#include "reference.h"

namespace {

using host::Call;
using host::copy_with_layout;
using host::expected_rotation;
using host::for_each_dtype;
using host::for_each_form;
using host::frequencies;
using host::overlaps_itself;
using host::poisoned_outputs;
using host::Running;
using host::storage_of;
using host::strided_values;
using host::surroundings_are;
using host::tensors;
using host::with_storage;
using reference::kFloatDtypes;
using reference::kPositionDtypes;
using reference::random_inv_freq;
using reference::random_positions;
using reference::random_values;
using reference::same_bits;
using rope::Launch;
using rope::Outputs;
using rope::cuda::Plan;

void run_threads(const Launch& launch, const Plan& plan, std::int64_t first_block,
                 std::int64_t last_block, const Running& running) {
  const auto run = [&](auto type, const auto&... begin_and_phases) {
    using Thread = typename decltype(type)::type;
    const auto params =
        rope::cuda::rotate_params<typename Thread::IndexType>(launch, plan, frequencies(launch));
    host::run_blocks<Thread>(params, plan, first_block, last_block, running, begin_and_phases...);
  };
  if (plan.has_few_rows) {
    rope::cuda::dispatch_few_rows_thread(launch, [&](auto type) {
      run(
          type, [] {}, [](auto& thread) { thread.read_frequencies(); },
          [](auto& thread) { thread.rotate_rows(); });
    });
    return;
  }
  rope::cuda::dispatch_thread<rope::cuda::RotateThread>(launch, plan, [&](auto type) {
    host::SharedMemory<typename decltype(type)::type> shared(plan);
    run(
        type, [&] { shared.clear(); }, [](auto& thread) { thread.read_frequencies(); },
        [&](auto& thread) { thread.find_rotations(shared.get()); },
        [&](auto& thread) { thread.rotate_rows(shared.get()); });
  });
}

void run(const Call& call, const Outputs& outputs, const Running& running = {}) {
  const auto run_plan = [&](const Launch& launch, Plan plan) {
    if (running.index_is_64bit && !plan.has_few_rows) {
      plan.index_is_64bit = true;
    }
    run_threads(launch, plan, 0, plan.grid_x * plan.grid_y, running);
  };
  host::for_each_plan(call, outputs, run_plan, running.few_rows);
}

// Running::few_rows for rotations in registers wherever that is possible.
constexpr std::int64_t kAllRows = std::numeric_limits<std::int64_t>::max();

Outputs rotated(const Call& call, const Running& running = {}) {
  const Outputs outputs = poisoned_outputs(call);
  run(call, outputs, running);
  return outputs;
}

void expect_same_bits(const Outputs& actual, const Outputs& wanted, const std::string& what) {
  EXPECT_TRUE(same_bits(actual.q, wanted.q)) << what;
  if (wanted.k.defined()) {
    EXPECT_TRUE(same_bits(actual.k, wanted.k)) << what << ", k";
  }
}

// The rotation is right and complete, and writes nothing else.
void expect_rotates(const Call& call, const Outputs& outputs) {
  std::vector<at::Tensor> inputs_before;
  for (const at::Tensor& input : tensors(call)) {
    inputs_before.push_back(storage_of(input).clone());
  }
  const at::Tensor q_before = storage_of(outputs.q).clone();
  const at::Tensor k_before = call.is_pair ? storage_of(outputs.k).clone() : at::Tensor();
  run(call, outputs);
  EXPECT_TRUE(reference::is_rotated(outputs.q, expected_rotation(call, call.q)));
  EXPECT_TRUE(surroundings_are(q_before, outputs.q)) << "around the output";
  if (call.is_pair) {
    EXPECT_TRUE(reference::is_rotated(outputs.k, expected_rotation(call, call.k))) << "k";
    EXPECT_TRUE(surroundings_are(k_before, outputs.k)) << "around the output of k";
  }
  const std::vector<at::Tensor> inputs = tensors(call);
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor now = storage_of(inputs[i]);
    EXPECT_TRUE(at::equal(now, inputs_before[i]) || same_bits(now, inputs_before[i]))
        << "an input was written: " << i;
  }
}

void expect_the_same_in_place(const Call& call, const Outputs& wanted) {
  for (const bool last_thread_first : {false, true}) {
    const at::Tensor q = copy_with_layout(call.q);
    const at::Tensor k = call.is_pair ? copy_with_layout(call.k) : at::Tensor();
    const Call on_copies = call.is_pair ? call.on(q, k) : call.on(q);
    run(host::in_place(on_copies), {q, k}, {.last_thread_first = last_thread_first});
    expect_same_bits({q, k}, wanted, "in place");
    EXPECT_TRUE(surroundings_are(storage_of(call.q), q)) << "around x in place";
    if (call.is_pair) {
      EXPECT_TRUE(surroundings_are(storage_of(call.k), k)) << "around k in place";
    }
  }
}

// What must hold for every call: the result is right, and has the same bits however it is run.
void expect_right(const Call& call) {
  const Outputs outputs = poisoned_outputs(call);
  expect_rotates(call, outputs);
  if (testing::Test::HasFailure()) {
    return;
  }
  expect_same_bits(rotated(call, {.last_thread_first = true}), outputs, "the last thread first");
  expect_same_bits(rotated(call, {.index_is_64bit = true, .few_rows = 0}), outputs,
                   "with 64-bit indices");
  expect_same_bits(rotated(call, {.few_rows = 0}), outputs, "with rotations in shared memory");
  expect_same_bits(rotated(call, {.few_rows = kAllRows}), outputs, "with rotations in registers");
  const at::Tensor q = call.q.contiguous();
  if (!call.is_pair) {
    expect_same_bits(rotated(call.on(q)), outputs, "contiguous");
  } else {
    expect_same_bits(rotated(call.on(q, call.k.contiguous())), outputs, "contiguous");
    const at::Tensor q_alone = rotated(call.on(call.q)).q;
    expect_same_bits({q_alone, rotated(call.on(call.k)).q}, outputs, "alone");
  }
  if (!overlaps_itself(call.q) && !(call.is_pair && overlaps_itself(call.k))) {
    expect_the_same_in_place(call, outputs);
  }
}

TEST(CudaThreads, RotateEveryDtypeInEveryForm) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const Call call = host::apply(random_positions({5, 1}),
                                    {.interleaved = interleaved, .conjugate = conjugate});
      expect_right(call.on(random_values({2, 5, 3, 64}, dtype)));
    });
  });
}

TEST(CudaThreads, RotateHeadsBeforeTokens) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = host::apply(random_positions({7}), {.max_wavelength = 5e5});
    expect_right(call.on(random_values({2, 3, 7, 32}, dtype)));
    expect_right(
        call.on(random_values({2, 3, 7, 32}, dtype).transpose(1, 2).contiguous().transpose(1, 2)));
  });
}

TEST(CudaThreads, RotateOneTokenOfManyHeads) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const Call call = host::apply(random_positions({1, 1, 1}),
                                    {.interleaved = interleaved, .conjugate = conjugate});
      expect_right(
          call.on(random_values({1, 1, 32, 128}, dtype), random_values({1, 1, 8, 128}, dtype, 1)));
    });
  });
}

TEST(CudaThreads, RotateByPositionsOfEveryDtypeAndShape) {
  const at::Tensor x = random_values({2, 5, 3, 16});
  for (const at::ScalarType dtype : kPositionDtypes) {
    SCOPED_TRACE(c10::str("dtype = ", dtype));
    for (const std::vector<std::int64_t>& sizes : std::vector<std::vector<std::int64_t>>{
             {}, {1}, {3}, {5, 1}, {5, 3}, {2, 1, 1}, {2, 5, 3}}) {
      SCOPED_TRACE(c10::str("sizes = ", sizes));
      expect_right(host::apply(random_positions(sizes, dtype)).on(x));
    }
  }
}

TEST(CudaThreads, RotateByPositionsOfAnyStrides) {
  const at::Tensor x = random_values({2, 5, 3, 16});
  expect_right(host::apply(random_positions({3, 5, 4}).slice(2, 0, 4, 2).permute({2, 1, 0})).on(x));
  expect_right(host::apply(random_positions({1, 5, 1}).expand({2, 5, 3})).on(x));
  expect_right(host::apply(random_positions({}).expand({2, 5, 3})).on(x));
}

TEST(CudaThreads, RotateByFarPositions) {
  constexpr std::int64_t kFar = (std::int64_t{1} << 31) - 1;
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor x = random_values({64, 64}, dtype);
    expect_right(host::apply(random_positions({64}, at::kLong, -kFar, kFar)).on(x));
    expect_right(host::apply(random_positions({64}, at::kLong, -kFar, kFar),
                             {.inv_freq = 1000 * random_inv_freq({32})})
                     .on(x));
  });
}

TEST(CudaThreads, FindTheCosineAndSineOfAnyAngle) {
  const auto differ = [](double t) {
    double angles[3] = {0.5, t, -t};
    rope::Rotation<float> singles[3];
    rope::cuda::find_rotations(angles, 1.0, singles);
    double again[3] = {0.5, t, -t};
    rope::Rotation<double> doubles[3];
    rope::cuda::find_rotations(again, 1.0, doubles);
    double most = 0;
    for (int i = 0; i < 3; ++i) {
      const double angle = i == 0 ? 0.5 : i == 1 ? t : -t;
      most = std::max({most, std::abs(doubles[i].cos - std::cos(angle)) * 1e8,
                       std::abs(doubles[i].sin - std::sin(angle)) * 1e8,
                       std::abs(singles[i].cos - std::cos(angle)),
                       std::abs(singles[i].sin - std::sin(angle))});
    }
    return most;
  };
  for (int exponent = -1074; exponent < 1024; ++exponent) {
    for (const double mantissa : {1.0, 1.25, 1.5707963267948966, 1.9999999999999998}) {
      const double t = std::ldexp(mantissa, exponent);
      EXPECT_LE(differ(t), 1.3e-7) << t;
    }
  }
  for (const double t :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    double angles[1] = {t};
    rope::Rotation<float> rotations[1];
    rope::cuda::find_rotations(angles, 1.0, rotations);
    EXPECT_TRUE(std::isnan(rotations[0].cos) && std::isnan(rotations[0].sin));
  }
}

TEST(CudaThreads, FindTheCosineAndSineOfAnyFloat32WithoutFloat64) {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    const auto bits = static_cast<std::uint32_t>(random());
    float t;
    std::memcpy(&t, &bits, sizeof(t));
    const rope::Rotation<float> rotation = rope::rotation_of_float32(t);
    if (std::isfinite(t)) {
      ASSERT_NEAR(rotation.cos, std::cos(static_cast<double>(t)), 2.5e-7) << t;
      ASSERT_NEAR(rotation.sin, std::sin(static_cast<double>(t)), 2.5e-7) << t;
    } else {
      ASSERT_TRUE(std::isnan(rotation.cos) && std::isnan(rotation.sin)) << t;
    }
  }
  for (const float t : {0.0f, -0.0f, 1.5f, -1.5f, 1.4999999f, 0x1p24f, 0x1p87f, -0x1p88f, 0x1p127f,
                        std::numeric_limits<float>::max(), 1e-45f}) {
    EXPECT_NEAR(rope::rotation_of_float32(t).cos, std::cos(static_cast<double>(t)), 2.5e-7) << t;
    EXPECT_NEAR(rope::rotation_of_float32(t).sin, std::sin(static_cast<double>(t)), 2.5e-7) << t;
  }
}

// Against the exact angle, which a long double product approximates to 2e-10.
TEST(CudaThreads, FormExactAnglesOfIntegerPositions) {
  if (std::numeric_limits<long double>::digits < 64) {
    GTEST_SKIP() << "long double has too few bits";
  }
  constexpr std::int64_t kFar = (std::int64_t{1} << 31) - 1;
  std::mt19937_64 random(1);
  for (const auto& [max_wavelength, scale_factor] :
       {std::pair{1e4, 1.0}, {5e5, 8.0}, {1e6, 1.0}, {2.0, 3.0}, {1.0, 1.0}}) {
    Launch launch{};
    launch.dtype = at::kFloat;
    launch.num_pairs = 64;
    const double unused = 0;
    launch.position_angles.positions_dtype = at::kLong;
    launch.position_angles.wavelength_frequencies = &unused;
    launch.position_angles.max_wavelength = max_wavelength;
    launch.position_angles.scale_factor = scale_factor;
    const std::uint64_t* frequencies = rope::cuda::frequencies_in_turns(launch);
    ASSERT_NE(frequencies, nullptr);
    for (std::int64_t n = 0; n < 64; ++n) {
      const long double frequency =
          std::pow(static_cast<long double>(max_wavelength), -static_cast<long double>(n) / 64) /
          scale_factor;
      for (int i = 0; i < 4000; ++i) {
        const std::int64_t position =
            i < 100   ? i - 50
            : i < 200 ? (i % 2 == 0 ? kFar - i : i - kFar)
                      : static_cast<std::int64_t>(random() % (2 * kFar + 1)) - kFar;
        const long double angle = frequency * static_cast<long double>(position);
        const rope::Rotation<float> rotation =
            rope::rotation_of_turns(static_cast<std::uint64_t>(position) * frequencies[n]);
        ASSERT_NEAR(rotation.cos, static_cast<double>(std::cos(angle)), 2.5e-7) << position;
        ASSERT_NEAR(rotation.sin, static_cast<double>(std::sin(angle)), 2.5e-7) << position;
      }
    }
  }
}

TEST(CudaThreads, ScaleTheAngleAndTheResult) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = host::apply(
        random_positions({9}),
        {.max_wavelength = 1e6, .scale_factor = 8, .attention_factor = 1.25, .conjugate = true});
    expect_right(call.on(random_values({9, 32}, dtype)));
  });
}

TEST(CudaThreads, LeaveWhatIsOutsideTheSliceAsItIs) {
  struct Case {
    std::int64_t size, offset, dim;
  };
  for_each_dtype([](at::ScalarType dtype) {
    for (const auto& [size, offset, dim] :
         {Case{64, 0, 32}, Case{96, 32, 32}, Case{96, 16, 64}, Case{64, 32, 32}, Case{40, 16, 16},
          Case{72, 8, 48}, Case{67, 16, 48}, Case{64, 3, 32}, Case{64, 1, 62}, Case{33, 0, 32},
          Case{20, 17, 2}, Case{20, 5, 6}}) {
      SCOPED_TRACE(c10::str("size = ", size, ", offset = ", offset, ", dim = ", dim));
      for_each_form([&, size = size, offset = offset, dim = dim](bool interleaved, bool conjugate) {
        const Call call = host::apply(random_positions({3, 1}), {.rotary_dim = dim,
                                                                 .rotary_offset = offset,
                                                                 .interleaved = interleaved,
                                                                 .conjugate = conjugate});
        expect_right(call.on(random_values({2, 3, 2, size}, dtype)));
        // With a single row, no other row can be unaligned.
        expect_right(
            host::apply(random_positions({}), call.options).on(random_values({size}, dtype)));
      });
    }
  });
}

TEST(CudaThreads, CopyWhereNothingIsRotated) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t size : {1, 7, 16, 64}) {
      SCOPED_TRACE(c10::str("size = ", size));
      const Call call = host::apply(random_positions({3}), {.rotary_dim = 0});
      expect_right(call.on(random_values({2, 3, size}, dtype)));
    }
  });
}

TEST(CudaThreads, RotateAnyNumberOfPairs) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t pairs : {1, 2, 3, 4, 5, 7, 8, 12, 33, 127, 128}) {
      SCOPED_TRACE(c10::str("pairs = ", pairs));
      for_each_form([&](bool interleaved, bool conjugate) {
        const Call call = host::apply(random_positions({2, 1}),
                                      {.interleaved = interleaved, .conjugate = conjugate});
        expect_right(call.on(random_values({2, 3, 2 * pairs}, dtype)));
      });
    }
  });
}

TEST(CudaThreads, RotateUnalignedMemory) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t offset : {0, 1, 2, 3, 4, 8}) {
      SCOPED_TRACE(c10::str("offset = ", offset));
      for_each_form([&](bool interleaved, bool conjugate) {
        const Call call = host::apply(random_positions({3, 1}),
                                      {.interleaved = interleaved, .conjugate = conjugate});
        expect_right(call.on(strided_values({3, 2, 32}, {64, 32, 1}, offset, dtype)));
      });
    }
  });
}

TEST(CudaThreads, RotateRowsAtUnalignedSteps) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = host::apply(random_positions({3, 1}));
    expect_right(call.on(strided_values({3, 2, 32}, {66, 33, 1}, 0, dtype)));
    expect_right(call.on(strided_values({3, 2, 32}, {65, 32, 1}, 0, dtype)));
    expect_right(call.on(strided_values({3, 2, 32}, {32, 97, 1}, 0, dtype)));
  });
}

TEST(CudaThreads, RotateViewsWithGaps) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      const Call call = host::apply(random_positions({3, 1}),
                                    {.interleaved = interleaved, .conjugate = conjugate});
      expect_right(call.on(strided_values({2, 3, 4, 32}, {960, 320, 64, 1}, 0, dtype)));
      expect_right(call.on(strided_values({2, 3, 4, 32}, {768, 256, 64, 2}, 0, dtype)));
      expect_right(call.on(strided_values({2, 3, 4, 32}, {1, 2, 6, 24}, 0, dtype)));
    });
  });
}

TEST(CudaThreads, RotateExpandedViews) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = host::apply(random_positions({3, 1}));
    expect_right(call.on(random_values({2, 3, 1, 32}, dtype).expand({2, 3, 4, 32})));
    expect_right(call.on(random_values({1, 1, 4, 32}, dtype).expand({2, 3, 4, 32})));
    expect_right(call.on(random_values({2, 3, 4, 1}, dtype).expand({2, 3, 4, 32})));
  });
}

TEST(CudaThreads, RotateAlongAnyAxis) {
  for_each_dtype([](at::ScalarType dtype) {
    for (std::int64_t axis = -4; axis < 4; ++axis) {
      SCOPED_TRACE(c10::str("axis = ", axis));
      std::vector<std::int64_t> sizes = {2, 3, 4};
      sizes.insert(sizes.begin() + (axis + 4) % 4, 20);
      const Call call = host::apply(random_positions({3, 1}),
                                    {.embedding_axis = axis, .rotary_dim = 16, .rotary_offset = 1});
      expect_right(call.on(random_values(sizes, dtype)));
      expect_right(call.on(random_values(sizes, dtype).contiguous(at::MemoryFormat::ChannelsLast)));
    }
  });
}

TEST(CudaThreads, RotateOneDimension) {
  for_each_dtype([](at::ScalarType dtype) {
    expect_right(host::apply(random_positions({})).on(random_values({64}, dtype)));
  });
}

TEST(CudaThreads, FormTheAngleInTheDtypeOfTheFrequencies) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const at::ScalarType frequency : {at::kFloat, at::kDouble}) {
      SCOPED_TRACE(c10::str("inv_freq's dtype = ", frequency));
      for (const at::ScalarType position : kPositionDtypes) {
        SCOPED_TRACE(c10::str("positions' dtype = ", position));
        const at::Tensor inv_freq = random_inv_freq({16}, frequency);
        const at::Tensor x = random_values({5, 2, 32}, dtype);
        expect_right(host::apply(random_positions({5, 1}, position), {.inv_freq = inv_freq}).on(x));
      }
    }
  });
}

TEST(CudaThreads, ReadFrequenciesOfAnyStrides) {
  const at::Tensor x = random_values({5, 32});
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const at::Tensor strided = random_inv_freq({16, 3}, dtype).select(1, 1);
    expect_right(host::apply(random_positions({5}), {.inv_freq = strided}).on(x));
    const at::Tensor expanded = random_inv_freq({1}, dtype).expand({16});
    expect_right(host::apply(random_positions({5}), {.inv_freq = expanded}).on(x));
  }
}

TEST(CudaThreads, SumTheAnglesOfTheAxes) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const at::ScalarType frequency : {at::kFloat, at::kDouble}) {
      for (const std::int64_t axes : {1, 2, 3, 4}) {
        SCOPED_TRACE(c10::str("inv_freq = ", frequency, ", axes = ", axes));
        const at::Tensor inv_freq = random_inv_freq({axes, 16}, frequency);
        const at::Tensor x = random_values({2, 5, 3, 32}, dtype);
        const at::Tensor positions = random_positions({axes, 2, 5, 1});
        expect_right(host::apply(positions, {.inv_freq = inv_freq}).on(x));
        const at::Tensor by_columns = random_inv_freq({16, axes}, frequency).t();
        const at::Tensor axes_last = random_positions({2, 5, 1, axes}).permute({3, 0, 1, 2});
        expect_right(host::apply(axes_last, {.inv_freq = by_columns}).on(x));
      }
    }
  });
}

TEST(CudaThreads, UseMoreFrequenciesThanOneLaunchCarries) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const std::int64_t pairs : {256, 257, 512, 600}) {
      SCOPED_TRACE(c10::str("pairs = ", pairs));
      for_each_form([&](bool interleaved, bool conjugate) {
        const Call call = host::apply(random_positions({3, 1}), {.rotary_dim = 2 * pairs,
                                                                 .rotary_offset = 8,
                                                                 .interleaved = interleaved,
                                                                 .conjugate = conjugate});
        expect_right(call.on(random_values({3, 2, 2 * pairs + 24}, dtype)));
      });
    }
  });
}

TEST(CudaThreads, UseTablesOfEveryDtype) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const at::ScalarType table : kFloatDtypes) {
      SCOPED_TRACE(c10::str("tables' dtype = ", table));
      const at::Tensor cos = random_values({5, 1, 16}, table, 1);
      const at::Tensor sin = random_values({5, 1, 16}, table, 2);
      for_each_form([&](bool interleaved, bool conjugate) {
        const Call call = host::apply_cos_sin(
            cos, sin, {.rotary_offset = 8, .interleaved = interleaved, .conjugate = conjugate});
        expect_right(call.on(random_values({2, 5, 3, 48}, dtype)));
      });
    }
  });
}

TEST(CudaThreads, UseTablesOfFullWidth) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const at::ScalarType table : kFloatDtypes) {
      SCOPED_TRACE(c10::str("tables' dtype = ", table));
      const at::Tensor cos = random_values({5, 1, 32}, table, 1);
      const at::Tensor sin = random_values({5, 1, 32}, table, 2);
      const at::Tensor rows = random_positions({2, 5, 1}, at::kLong, 0, 5);
      for_each_form([&](bool interleaved, bool conjugate) {
        rope::CosSinOptions options{.rotary_offset = 8,
                                    .interleaved = interleaved,
                                    .conjugate = conjugate,
                                    .full_width = true};
        const at::Tensor x = random_values({2, 5, 3, 48}, dtype);
        expect_right(host::apply_cos_sin(cos, sin, options).on(x));
        expect_right(host::apply_cos_sin(cos, sin, options).on(x, x.slice(2, 0, 1)));
        options.positions = rows;
        expect_right(host::apply_cos_sin(cos.select(1, 0), sin.select(1, 0), options).on(x));
        options = {.embedding_axis = 1,
                   .interleaved = interleaved,
                   .conjugate = conjugate,
                   .full_width = true};
        const at::Tensor along_tokens = random_values({2, 35, 37}, dtype);
        const at::Tensor table_of_tokens = random_values({37, 34}, table, 3);
        expect_right(host::apply_cos_sin(table_of_tokens, table_of_tokens.flip(0), options)
                         .on(along_tokens));
      });
    }
  });
}

TEST(CudaThreads, UseTheRowsOfTablesThatPositionsName) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const at::ScalarType row : {at::kInt, at::kLong}) {
      SCOPED_TRACE(c10::str("positions' dtype = ", row));
      const at::Tensor cos = random_values({11, 16}, at::kFloat, 1);
      const at::Tensor sin = random_values({11, 16}, at::kFloat, 2);
      const Call call =
          host::apply_cos_sin(cos, sin, {.positions = random_positions({2, 5, 1}, row, 0, 11)});
      expect_right(call.on(random_values({2, 5, 3, 32}, dtype)));
    }
  });
}

TEST(CudaThreads, ReadTablesOfAnyStrides) {
  const at::Tensor x = random_values({2, 5, 3, 32});
  const at::Tensor cos = random_values({16, 2, 5}, at::kFloat, 1).permute({1, 2, 0}).unsqueeze(2);
  const at::Tensor sin = random_values({5, 1, 32}, at::kFloat, 2).slice(2, 0, 32, 2);
  expect_right(host::apply_cos_sin(cos, sin.expand({2, 5, 1, 16})).on(x));
  expect_right(host::apply_cos_sin(sin.expand({2, 5, 3, 16}), cos.expand({2, 5, 3, 16})).on(x));
  const at::Tensor one = random_values({}, at::kFloat, 3);
  expect_right(host::apply_cos_sin(one.expand({5, 1, 16}), one.expand({5, 1, 16})).on(x));
  const at::Tensor rows = random_positions({5, 1}, at::kLong, 0, 7);
  const at::Tensor wide = random_values({16, 14}, at::kFloat, 4);
  expect_right(host::apply_cos_sin(wide.t().slice(0, 0, 14, 2), wide.t().slice(0, 1, 14, 2),
                                   {.positions = rows})
                   .on(x));
}

TEST(CudaThreadsDeathTest, StopAtARowThatTheTablesDoNotHave) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const at::Tensor table = random_values({4, 8});
  const at::Tensor x = random_values({1, 16});
  for (const std::int64_t row : {-1, 4}) {
    const at::Tensor rows = at::full({1}, row, at::kLong);
    EXPECT_DEATH(rotated(host::apply_cos_sin(table, table, {.positions = rows}).on(x)),
                 "positions name rows");
  }
}

TEST(CudaThreads, RotatePairsThatDiffer) {
  const Call call = host::apply(random_positions({5, 1}));
  // Different heads, ranks, strides, axis sizes and dtypes.
  expect_right(call.on(random_values({2, 5, 6, 32}), random_values({2, 5, 2, 32}, at::kFloat, 1)));
  expect_right(call.on(random_values({2, 5, 6, 32}), random_values({5, 2, 32}, at::kFloat, 1)));
  expect_right(call.on(random_values({5, 1, 32}), random_values({3, 2, 5, 2, 32}, at::kFloat, 1)));
  expect_right(call.on(random_values({2, 5, 6, 32}),
                       random_values({2, 2, 5, 32}, at::kFloat, 1).transpose(1, 2)));
  expect_right(
      call.on(random_values({2, 5, 6, 32}), strided_values({2, 5, 2, 32}, {960, 192, 96, 3})));
  expect_right(call.on(random_values({2, 5, 6, 32}), random_values({2, 5, 2, 32}, at::kHalf, 1)));
  for (const std::int64_t k_size : {32, 33, 48, 100}) {
    const Call sliced =
        host::apply(random_positions({5, 1}), {.rotary_dim = 16, .rotary_offset = 8});
    expect_right(
        sliced.on(random_values({2, 5, 6, 40}), random_values({2, 5, 2, k_size}, at::kFloat, 1)));
  }
}

TEST(CudaThreads, RotateEachOfAPairWhereTheOtherIsEmpty) {
  const Call call = host::apply(random_positions({5, 1}));
  const at::Tensor some = random_values({5, 2, 32});
  const at::Tensor none = at::empty({5, 0, 32});
  expect_rotates(call.on(some, none), poisoned_outputs(call.on(some, none)));
  expect_rotates(call.on(none, some), poisoned_outputs(call.on(none, some)));
}

TEST(CudaThreads, RotateQAndKOfOnePackedBufferInPlace) {
  for_each_dtype([](at::ScalarType dtype) {
    const at::Tensor packed = random_values({2, 5, 3, 4, 32}, dtype);
    const Call call = host::apply(random_positions({5, 1}));
    for (const bool last_thread_first : {false, true}) {
      const at::Tensor copy = packed.clone();
      const auto part = [&](int i) { return copy.select(2, i); };
      run(host::in_place(call.on(part(0), part(1))), {part(0), part(1)},
          {.last_thread_first = last_thread_first});
      EXPECT_TRUE(reference::is_rotated(part(0), expected_rotation(call, packed.select(2, 0))));
      EXPECT_TRUE(reference::is_rotated(part(1), expected_rotation(call, packed.select(2, 1))));
      EXPECT_TRUE(same_bits(part(2), packed.select(2, 2)));
    }
  });
}

TEST(CudaThreads, RotateMoreDimensionsThanALaunchDescribes) {
  // Positions in reverse order: no two dimensions coalesce.
  const std::vector<std::int64_t> sizes(14, 2);
  std::vector<std::int64_t> reversed;
  for (std::int64_t d = 13; d >= 0; --d) {
    reversed.push_back(d);
  }
  std::vector<std::int64_t> sizes_of_x = sizes;
  sizes_of_x.push_back(4);
  const at::Tensor x = random_values(sizes_of_x);
  const Call by_token = host::apply(random_positions(sizes).permute(reversed));
  EXPECT_EQ(host::plans(by_token.on(x), poisoned_outputs(by_token.on(x))).size(), 1);
  expect_right(by_token.on(x));

  // One angle for all, with gaps between the dimensions: none of the 14 coalesce.
  std::vector<std::int64_t> strides;
  for (std::int64_t d = 0; d < 14; ++d) {
    strides.insert(strides.begin(),
                   8 * ((std::int64_t{1} << d) + (d % 2) * (std::int64_t{1} << 15)));
  }
  strides.push_back(1);
  const Call by_all = host::apply(random_positions({}));
  const at::Tensor gappy = strided_values(sizes_of_x, strides);
  EXPECT_EQ(host::plans(by_all.on(gappy), poisoned_outputs(by_all.on(gappy))).size(), 1);
  expect_rotates(by_all.on(gappy), poisoned_outputs(by_all.on(gappy)));
}

TEST(CudaThreads, RotateManyRowsOfAFewTokens) {
  // Rows are divided into groups, the last of which is smaller.
  for (const std::int64_t tokens : {1, 3, 300}) {
    SCOPED_TRACE(c10::str("tokens = ", tokens));
    for (const std::int64_t size : {32, 6}) {
      const Call call = host::apply(random_positions({tokens, 1}))
                            .on(random_values({tokens, 138, size}, at::kHalf),
                                random_values({tokens, 17, size}, at::kHalf, 1));
      const std::vector<Plan> plans = host::plans(call, poisoned_outputs(call));
      ASSERT_EQ(plans.size(), 1);
      EXPECT_GT(plans[0].grid_y, 1);
      EXPECT_NE(plans[0].blocks.rows % plans[0].blocks.rows_per_block, 0);
      expect_right(call);
    }
  }
}

TEST(CudaThreads, RotateAFewRowsOfManyTokens) {
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      for (const std::int64_t tokens : {1, 2, 7, 1500}) {
        SCOPED_TRACE(c10::str("tokens = ", tokens));
        const rope::ApplyOptions options{.interleaved = interleaved, .conjugate = conjugate};
        const Call call = host::apply(random_positions({tokens, 1}), options);
        const at::Tensor q = random_values({tokens, 3, 48}, dtype);
        const at::Tensor k = random_values({tokens, 1, 64}, dtype, 1);
        const Call sliced =
            host::apply(random_positions({tokens, 1}),
                        {.rotary_dim = 16, .rotary_offset = 8, .interleaved = interleaved});
        const Call by_inv_freq =
            host::apply(random_positions({tokens, 1}), {.inv_freq = random_inv_freq({24})});
        const auto plans = host::plans(call.on(q), poisoned_outputs(call.on(q)));
        EXPECT_EQ(plans.at(0).has_few_rows, dtype != at::kDouble);
        expect_right(call.on(q));
        expect_right(by_inv_freq.on(q));
        expect_right(sliced.on(q, k));
      }
    });
  });
}

TEST(CudaThreads, RotateBlocksOfSeveralTokensAndOfSomeColumns) {
  for_each_dtype([](at::ScalarType dtype) {
    const Call call = host::apply(random_positions({1037, 1}));
    const Call by_far = host::apply(random_positions({3, 1}));
    const at::Tensor many = random_values({1037, 5, 32}, dtype);
    const at::Tensor long_rows = random_values({3, 5, 4128}, dtype);
    EXPECT_GT(host::plans(call.on(many), poisoned_outputs(call.on(many)))[0].block_z, 1);
    EXPECT_GT(host::plans(by_far.on(long_rows), poisoned_outputs(by_far.on(long_rows)))[0]
                  .blocks.column_groups.divisor,
              1);
    expect_right(call.on(many));
    expect_right(by_far.on(long_rows));
    expect_right(by_far.on(random_values({3, 5, 1034}, dtype)));
    const Call sliced =
        host::apply(random_positions({3, 1}), {.rotary_dim = 2064, .rotary_offset = 16});
    expect_right(sliced.on(long_rows));
    // Threads along the rows.
    const Call by_axis = host::apply(random_positions({601, 1}), {.embedding_axis = 1});
    const at::Tensor heads_last = random_values({601, 6, 3}, dtype);
    const auto plans =
        host::plans(by_axis.on(heads_last), poisoned_outputs(by_axis.on(heads_last)));
    EXPECT_EQ(plans[0].blocks.lanes, rope::cuda::Lanes::kRows);
    EXPECT_GT(plans[0].block_z, 1);
    expect_right(by_axis.on(heads_last));
  });
}

// The embedding axis is strided: threads run along the tokens or the heads.
TEST(CudaThreads, RotateAlongAnAxisThatIsNotContiguous) {
  using rope::cuda::Lanes;
  for_each_dtype([](at::ScalarType dtype) {
    for_each_form([&](bool interleaved, bool conjugate) {
      for (const std::int64_t size : {3, 32, 45}) {
        SCOPED_TRACE(c10::str("size of the last dimension = ", size));
        rope::ApplyOptions options{.embedding_axis = 1,
                                   .rotary_dim = 20,
                                   .rotary_offset = 1,
                                   .interleaved = interleaved,
                                   .conjugate = conjugate};
        const auto expect_lanes = [&](const Call& call, Lanes lanes) {
          EXPECT_EQ(host::plans(call, poisoned_outputs(call)).at(0).blocks.lanes, lanes);
          expect_right(call);
        };
        // (batch, embedding, sequence), positions of the sequence, and of both.
        const at::Tensor x = random_values({2, 24, size}, dtype);
        expect_lanes(host::apply(random_positions({size}), options).on(x), Lanes::kTokens);
        expect_lanes(host::apply(random_positions({2, size}), options).on(x), Lanes::kTokens);
        // (sequence, embedding, heads)
        expect_lanes(host::apply(random_positions({2, 1}), options).on(x), Lanes::kRows);
        const at::Tensor cos = random_values({2, size, 10}, at::kFloat, 1);
        options.rotary_dim = std::nullopt;
        expect_lanes(
            host::apply_cos_sin(cos, cos.flip(0), {.embedding_axis = 1, .interleaved = interleaved})
                .on(x),
            Lanes::kTokens);
      }
    });
  });
}

TEST(CudaThreads, DoNothingForEmptyTensors) {
  const Call call = host::apply(random_positions({5, 1}));
  for (const at::Tensor& x :
       {at::empty({0, 5, 2, 32}), at::empty({5, 0, 32}), at::empty({5, 2, 0})}) {
    EXPECT_TRUE(host::plans(call.on(x), {at::empty_like(x), {}}).empty());
    EXPECT_TRUE(host::plans(call.on(x, x), {at::empty_like(x), at::empty_like(x)}).empty());
  }
}

TEST(CudaThreads, KeepNaNAndInfinityInTheirPair) {
  for_each_dtype([](at::ScalarType dtype) {
    for (const bool interleaved : {false, true}) {
      const Call call = host::apply(random_positions({3}), {.interleaved = interleaved});
      const at::Tensor finite = random_values({3, 32}, dtype);
      const at::Tensor x = finite.clone();
      x[1][5] = std::numeric_limits<double>::quiet_NaN();
      x[2][4] = std::numeric_limits<double>::infinity();
      const at::Tensor y = rotated(call.on(x)).q;
      const at::Tensor unharmed = rotated(call.on(finite)).q;
      // Elements 4 and 5 are one pair where pairs are neighbours; else their partners are 16
      // further.
      at::Tensor harmed = at::zeros({3, 32}, at::kBool);
      harmed[1][5] = harmed[1][interleaved ? 4 : 21] = true;
      harmed[2][4] = harmed[2][interleaved ? 5 : 20] = true;
      EXPECT_TRUE(at::equal(y.isfinite(), harmed.logical_not()));
      EXPECT_TRUE(same_bits(y.masked_fill(harmed, 0), unharmed.masked_fill(harmed, 0)));
    }
  });
}

TEST(CudaThreads, RotateRandomCalls) {
  constexpr std::uint64_t kCalls = 40;
  for (std::uint64_t seed = 0; seed < kCalls; ++seed) {
    host::Draw draw(seed);
    const Call call = host::random_call(draw);
    SCOPED_TRACE(c10::str("seed = ", seed, ": ", host::describe(call)));
    expect_right(call);
    if (HasFailure()) {
      return;
    }
  }
}

// A contiguous copy that ends at an inaccessible page.
at::Tensor before_a_forbidden_page(const at::Tensor& x) {
  const std::int64_t bytes = x.numel() * static_cast<std::int64_t>(x.element_size());
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  const std::int64_t size = at::ceil_div(bytes, page) * page;
  auto* const memory = static_cast<char*>(
      mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  TORCH_CHECK(memory != MAP_FAILED && mprotect(memory + size, page, PROT_NONE) == 0);
  at::Tensor copy = at::from_blob(
      memory + size - bytes, x.sizes(), [=](void*) { munmap(memory, size + page); }, x.options());
  return copy.copy_(x);
}

TEST(CudaThreads, ReadAndWriteNothingBeyondTheLastElement) {
  const auto guarded = [](at::IntArrayRef sizes, at::ScalarType dtype, int seed) {
    return before_a_forbidden_page(random_values(sizes, dtype, seed));
  };
  for_each_dtype([&](at::ScalarType dtype) {
    // Vectors and single elements, rotations in shared memory and in registers, along the rows, the
    // tokens and the heads; the last block has fewer tokens and rows than the others.
    for (const std::int64_t tokens : {1, 37}) {
      const at::Tensor positions =
          before_a_forbidden_page(random_positions({tokens, 1}, at::kLong));
      for (const std::int64_t heads : {1, 13}) {
        for (const std::int64_t size : {6, 64}) {
          SCOPED_TRACE(c10::str("(", tokens, ", ", heads, ", ", size, ")"));
          const at::Tensor q = guarded({tokens, heads, size}, dtype, 1);
          const at::Tensor k = guarded({tokens, 1, size}, dtype, 2);
          const Call call = host::apply(positions);
          expect_rotates(call.on(q, k),
                         {guarded(q.sizes(), dtype, 3), guarded(k.sizes(), dtype, 4)});
          const at::Tensor inv_freq = before_a_forbidden_page(random_inv_freq({size / 2}));
          expect_rotates(host::apply(positions, {.inv_freq = inv_freq}).on(q),
                         {guarded(q.sizes(), dtype, 3), {}});
          const at::Tensor cos = guarded({tokens, 1, size}, at::kFloat, 5);
          const at::Tensor sin = guarded({tokens, 1, size}, at::kFloat, 6);
          expect_rotates(host::apply_cos_sin(cos, sin, {.full_width = true}).on(q),
                         {guarded(q.sizes(), dtype, 3), {}});
          const at::Tensor last = guarded({heads, size, tokens}, dtype, 7);
          const Call by_last = host::apply(before_a_forbidden_page(random_positions({tokens})),
                                           {.embedding_axis = 1});
          expect_rotates(by_last.on(last), {guarded(last.sizes(), dtype, 8), {}});
        }
      }
    }
  });
}

TEST(CudaThreads, ReachTheEndsOfTensorsOf2To33Elements) {
  constexpr std::int64_t kBatch = std::int64_t{1} << 13;
  constexpr std::int64_t kTokens = std::int64_t{1} << 13;
  constexpr std::int64_t kSize = 128;
  const at::Tensor positions = at::arange(kTokens);
  for (const bool in_place : {false, true}) {
    for (const std::int64_t rotary_dim : {kSize, kSize - 2}) {  // vectors, and single elements
      SCOPED_TRACE(c10::str("in_place = ", in_place, ", rotary_dim = ", rotary_dim));
      const at::Tensor x = host::sparse_memory({kBatch, kTokens, kSize}, at::kBFloat16);
      const at::Tensor y = in_place ? x : host::sparse_memory(x.sizes(), at::kBFloat16);
      if (!x.defined() || !y.defined()) {
        GTEST_SKIP() << "no 16 GiB of addresses here";
      }
      const at::Tensor first = random_values({kSize}, at::kBFloat16, 1);
      const at::Tensor last = random_values({kSize}, at::kBFloat16, 2);
      x[0][0].copy_(first);
      x[kBatch - 1][kTokens - 1].copy_(last);
      Call call = host::apply(positions, {.rotary_dim = rotary_dim}).on(x);
      call.in_place = in_place;
      host::for_each_plan(call, {y, {}}, [&](const Launch& launch, const Plan& plan) {
        EXPECT_EQ(plan.uses_vectors, rotary_dim == kSize);
        EXPECT_EQ(plan.index_is_64bit, !plan.uses_vectors);
        run_threads(launch, plan, 0, 1, {});
        const std::int64_t blocks = plan.grid_x * plan.grid_y;
        run_threads(launch, plan, blocks - 1, blocks, {});
      });
      const Call row = host::apply(positions, {.rotary_dim = rotary_dim});
      EXPECT_TRUE(same_bits(y[0][0], first));  // Position 0.
      EXPECT_TRUE(reference::is_rotated(
          y[kBatch - 1][kTokens - 1], reference::apply(last, positions[kTokens - 1], row.options)));
    }
  }
}

}  // namespace
