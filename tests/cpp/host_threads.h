// Runs the threads of the CUDA kernels on the host, and makes tensors to run them on.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "cuda/cooperation.h"
#include "cuda/plan.h"
#include "reference.h"

namespace host {

// Elements on each side of a tensor that nothing may write.
constexpr std::int64_t kGuard = 64;

// How the threads of a launch are run. The bits must not depend on it.
struct Running {
  bool last_thread_first = false;  // in each phase, and the last block first
  bool index_is_64bit = false;     // also where 32 bits are enough
  std::int64_t few_rows = rope::cuda::kFewRows;
};

// Visits the threads, and blockIdx.y, of each of the blocks [first_block, last_block), counted over
// both dimensions of the grid.
template <typename Thread, typename Visit>
void for_each_block(const typename Thread::Params& params, const rope::cuda::Plan& plan,
                    std::int64_t first_block, std::int64_t last_block, const Running& running,
                    const Visit& visit) {
  for (std::int64_t i = first_block; i < last_block; ++i) {
    const std::int64_t block = running.last_thread_first ? last_block - 1 - (i - first_block) : i;
    std::vector<Thread> threads;
    threads.reserve(plan.block_x * plan.block_y * plan.block_z);
    for (int z = 0; z < plan.block_z; ++z) {
      for (int y = 0; y < plan.block_y; ++y) {
        for (int x = 0; x < plan.block_x; ++x) {
          threads.emplace_back(params, rope::cuda::ThreadIndex{
                                           x, y, z, static_cast<std::uint32_t>(block % plan.grid_x),
                                           static_cast<std::uint32_t>(block / plan.grid_x)});
        }
      }
    }
    visit(threads, block / plan.grid_x);
  }
}

// Stands in for a DeviceBlock: runs each phase for all threads before the next.
template <typename Thread>
class HostBlock {
 public:
  HostBlock(std::vector<Thread>& threads, const Running& running)
      : threads_(threads), running_(running) {}

  template <typename Phase>
  void run(const Phase& phase) {
    for (std::size_t t = 0; t < threads_.size(); ++t) {
      phase(threads_[running_.last_thread_first ? threads_.size() - 1 - t : t]);
    }
  }

  void synchronize() {}

  // In the order of the shuffles of a DeviceBlock.
  template <typename Get>
  void add_across_lanes(int lanes, const Get& get) {
    ASSERT_EQ(threads_.size() % lanes, 0) << "lanes without a thread";
    for (int distance = rope::cuda::kWarpSize / 2; distance > 0; distance /= 2) {
      if (distance < lanes) {
        add_pairs(static_cast<std::size_t>(distance), get);
      }
    }
  }

 private:
  template <typename Get>
  void add_pairs(std::size_t distance, const Get& get) {
    for (std::size_t t = 0; t < threads_.size(); ++t) {
      if ((t & distance) == 0) {
        auto& left = get(threads_[t]);
        auto& right = get(threads_[t ^ distance]);
        for (std::size_t i = 0; i < std::size(left); ++i) {
          left[i] = right[i] = left[i] + right[i];
        }
      }
    }
  }

  std::vector<Thread>& threads_;
  const Running& running_;
};

// Runs every thread of the blocks. All threads of a block run one phase before the next, as between
// barriers.
template <typename Thread, typename BeginBlock, typename... Phases>
void run_blocks(const typename Thread::Params& params, const rope::cuda::Plan& plan,
                std::int64_t first_block, std::int64_t last_block, const Running& running,
                const BeginBlock& begin_block, const Phases&... phases) {
  for_each_block<Thread>(params, plan, first_block, last_block, running,
                         [&](std::vector<Thread>& threads, std::int64_t) {
                           begin_block();
                           HostBlock<Thread> block(threads, running);
                           (block.run(phases), ...);
                         });
}

// Shared memory of a block, filled with NaN to expose uninitialized reads, and guarded.
template <typename Thread>
class SharedMemory {
 public:
  using Real = typename Thread::Real;

  explicit SharedMemory(const rope::cuda::Plan& plan)
      : size_(Thread::shared_elements(plan.blocks)),
        memory_(new (std::align_val_t(16)) Real[size_ + kGuard]) {
    clear();
  }
  ~SharedMemory() {
    for (std::int64_t i = size_; i < size_ + kGuard; ++i) {
      EXPECT_TRUE(std::isnan(memory_[i])) << "beyond the end of shared memory";
    }
    ::operator delete[](memory_, std::align_val_t(16));
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void clear() const {
    std::fill_n(memory_, size_ + kGuard, std::numeric_limits<Real>::quiet_NaN());
  }
  Real* get() const { return memory_; }

 private:
  std::int64_t size_;
  Real* memory_;
};

// The whole storage of x.
inline at::Tensor storage_of(const at::Tensor& x) {
  return at::empty({0}, x.options()).set_(x.storage());
}

inline at::Tensor with_storage(const at::Tensor& flat, const at::Tensor& like) {
  return flat.as_strided(like.sizes(), like.strides(), like.storage_offset());
}

// A view with the given strides of a larger buffer of random numbers.
inline at::Tensor strided_values(at::IntArrayRef sizes, at::IntArrayRef strides,
                                 std::int64_t offset = 0, at::ScalarType dtype = at::kFloat) {
  std::int64_t reach = offset + 1;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    reach += (sizes[d] - 1) * strides[d];
  }
  return reference::random_values({reach + 2 * kGuard}, dtype)
      .as_strided(sizes, strides, kGuard + offset);
}

// Memory that takes up no space until it is written.
inline at::Tensor sparse_memory(at::IntArrayRef sizes, at::ScalarType dtype) {
  const std::size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    return {};
  }
  return at::from_blob(memory, sizes, [=](void* begin) { munmap(begin, bytes); }, at::dtype(dtype));
}

// A copy whose outermost stride 32 bits cannot count in elements, only in vectors.
inline at::Tensor far_apart(const at::Tensor& x) {
  constexpr std::int64_t kStride = std::int64_t{3} << 31;
  const at::Tensor memory =
      sparse_memory({(x.size(0) - 1) * kStride + x[0].numel()}, x.scalar_type());
  if (!memory.defined()) {
    return memory;
  }
  std::vector<std::int64_t> strides = x.contiguous().strides().vec();
  strides[0] = kStride;
  return memory.as_strided(x.sizes(), strides).copy_(x);
}

template <typename Run>
void for_each_dtype(const Run& run) {
  for (const at::ScalarType dtype : reference::kFloatDtypes) {
    SCOPED_TRACE(c10::str("dtype = ", dtype));
    run(dtype);
  }
}

// Both orders of pairs and both directions.
template <typename Run>
void for_each_form(const Run& run) {
  for (const bool interleaved : {false, true}) {
    for (const bool conjugate : {false, true}) {
      SCOPED_TRACE(c10::str("interleaved = ", interleaved, ", conjugate = ", conjugate));
      run(interleaved, conjugate);
    }
  }
}

}  // namespace host
