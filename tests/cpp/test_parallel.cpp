// Calls with any number of threads, and inside PyTorch's own parallel loops.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <rope/rope.h>

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <iterator>

namespace {

// Enough elements for several threads.
at::Tensor values() {
  at::manual_seed(0);
  return at::randn({512, 8, 64});
}

at::Tensor positions() { return at::arange(512).unsqueeze(1); }

at::Tensor rotated(const at::Tensor& x) {
  return rope::norm_apply(rope::apply(x, positions()), std::nullopt, positions());
}

// Sets the number of threads for a test.
class Threads {
 public:
  explicit Threads(int number) : before_(at::get_num_threads()) { at::set_num_threads(number); }
  ~Threads() { at::set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

std::int64_t threads_of_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return std::distance(begin(tasks), end(tasks));
}

TEST(Parallel, TheNumberOfThreadsMayChangeBetweenCalls) {
  const at::Tensor x = values();
  const at::Tensor expected = rotated(x);
  for (const int number : {1, 4, 2, 7, 1, 3}) {
    const Threads threads(number);
    EXPECT_TRUE(at::equal(rotated(x), expected)) << number << " threads";
  }
}

TEST(Parallel, CallsInAParallelRegionStartNoOthers) {
  const Threads threads(4);
  const at::Tensor x = values();
  const at::Tensor expected = rotated(x);
  std::atomic<int> wrong = 0;
  const auto call = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      wrong += at::equal(rotated(x), expected) ? 0 : 1;
    }
  };
  at::parallel_for(0, 16, 1, call);  // starts the threads of the loop
  const std::int64_t before = threads_of_process();
  std::atomic<std::int64_t> most = 0;
  at::parallel_for(0, 64, 1, [&](std::int64_t begin, std::int64_t end) {
    call(begin, end);
    const std::int64_t now = threads_of_process();
    for (std::int64_t seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
    }
  });
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(most, before);
}

}  // namespace
