// Many threads that call at once, without Python and its lock: each gets what one thread gets.
// tests/sanitize.sh runs this under ThreadSanitizer.
#include <ATen/Parallel.h>
#include <rope/frequencies.h>
#include <rope/rope.h>

#include <latch>
#include <thread>
#include <vector>

#include "reference.h"

namespace {

using reference::random_inv_freq;
using reference::random_positions;
using reference::random_values;
using reference::same_bits;

constexpr int kThreads = 8;
constexpr int kRounds = 25;

// Tensors that all threads read.
struct Shared {
  at::Tensor x = random_values({5, 33, 4, 32});
  at::Tensor k = random_values({5, 33, 1, 32}, at::kBFloat16, 1);
  at::Tensor packed = random_values({33, 3, 64}, at::kHalf, 2);
  at::Tensor positions = random_positions({33, 1});
  at::Tensor inv_freq = random_inv_freq({16});
  at::Tensor table = random_values({50, 16}, at::kFloat, 3);
  at::Tensor rows = random_positions({33, 1}, at::kInt, 0, 50);
  at::Tensor weight = random_values({32}, at::kFloat, 4);
};

// Every family and form, forth and back. Frequencies and sizes of scratch memory differ with the
// seed, so that what a thread keeps from call to call changes.
std::vector<at::Tensor> results_of(const Shared& shared, int seed) {
  const double max_wavelength = 1000.0 * (1 + seed % 7);
  const auto [q, k] =
      rope::apply_qk(shared.x, shared.k, shared.positions, {.max_wavelength = max_wavelength});
  at::Tensor in_place = rope::apply(shared.x, shared.positions, {.inv_freq = shared.inv_freq});
  rope::apply_cos_sin_(in_place, shared.table, shared.table, {.positions = shared.rows});
  const at::Tensor sliced = rope::apply(shared.packed, shared.positions,
                                        {.rotary_dim = 8 * (1 + seed % 5), .rotary_offset = 3});
  const at::Tensor normalized =
      rope::norm_apply(q, shared.weight, shared.positions, {.norm_axes = {{-2, -1}}});
  at::Tensor again = normalized.clone();
  rope::norm_apply_cos_sin_(again, std::nullopt, shared.table, shared.table,
                            {.positions = shared.rows, .norm_last = true});

  const at::Tensor leaf = shared.x.detach().requires_grad_();
  const at::Tensor weight = shared.weight.detach().requires_grad_();
  const at::Tensor inv_freq = shared.inv_freq.detach().requires_grad_();
  rope::norm_apply(rope::apply(leaf, shared.positions, {.inv_freq = inv_freq}), weight,
                   shared.positions)
      .square()
      .sum()
      .backward();
  const auto yarn = rope::frequencies({.rotary_dim = 32,
                                       .rope_type = "yarn",
                                       .rope_theta = max_wavelength,
                                       .factor = 4.0,
                                       .original_max_position_embeddings = 64});
  return {q,     k,           in_place,      sliced,          normalized,
          again, leaf.grad(), weight.grad(), inv_freq.grad(), yarn.inv_freq};
}

TEST(Threads, EachGetsWhatOneThreadGets) {
  const int threads_before = at::get_num_threads();
  at::set_num_threads(1);
  const Shared shared;
  std::vector<std::vector<at::Tensor>> actual(kThreads * kRounds);
  std::latch start(kThreads);
  std::vector<std::thread> threads;
  // Before any other call of the library: its first calls are concurrent too.
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      start.arrive_and_wait();
      for (int round = 0; round < kRounds; ++round) {
        actual[t * kRounds + round] = results_of(shared, t + round);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (int t = 0; t < kThreads; ++t) {
    for (int round = 0; round < kRounds; ++round) {
      const std::vector<at::Tensor> expected = results_of(shared, t + round);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        SCOPED_TRACE(c10::str("thread ", t, ", round ", round, ", result ", i));
        ASSERT_TRUE(same_bits(actual[t * kRounds + round][i], expected[i]));
      }
    }
  }
  at::set_num_threads(threads_before);
}

}  // namespace
