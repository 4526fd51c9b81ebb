// How the CPU cuts a launch into blocks for its threads, what memory a thread works with, and which
// of the kernels compiled for several CPU capabilities runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernel.h"
#include "launch.h"

namespace rope::cpu {

// A function of a kernel file, compiled for each capability; on other CPUs than x86 all are the
// first.
template <typename Function>
struct Compiled {
  Function* base;
  Function* avx2;
  Function* avx512;
  Function* avx512_bf16;  // for bfloat16 alone
};

#ifdef ROPE_X86_KERNELS
#define ROPE_COMPILED(name)                                        \
  Compiled<decltype(name##_DEFAULT)> {                             \
    name##_DEFAULT, name##_AVX2, name##_AVX512, name##_AVX512_BF16 \
  }
#else
#define ROPE_COMPILED(name)                                        \
  Compiled<decltype(name##_DEFAULT)> {                             \
    name##_DEFAULT, name##_DEFAULT, name##_DEFAULT, name##_DEFAULT \
  }
#endif

enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The capability to rotate a launch with: that of ATen's kernels, a narrower one where rows are
// shorter than a step of AVX-512.
Capability choose_capability(const Launch& launch);

template <typename Function>
Function* choose(const Compiled<Function>& compiled, Capability capability) {
  switch (capability) {
    case Capability::kAvx512Bf16:
      return compiled.avx512_bf16;
    case Capability::kAvx512:
      return compiled.avx512;
    case Capability::kAvx2:
      return compiled.avx2;
    case Capability::kDefault:
      break;
  }
  return compiled.base;
}

// The bytes of a number of the opmath type.
std::int64_t real_size(const Launch& launch);

// Elements that are worth a thread of their own: ATen's own number (at::internal::GRAIN_SIZE).
inline constexpr std::int64_t kGrainElements = 32768;

// How a launch is cut into blocks.
struct Plan {
  std::int64_t num_tokens;
  std::int64_t block_tokens;
  std::int64_t num_parts;
  std::int64_t num_blocks;
  std::int64_t grain;  // blocks
  bool may_stream;

  Block block(std::int64_t index) const;
};

// Blocks for the threads that there are, in which the rows of angles of all tokens fit into L2.
Plan plan_for_threads(const Launch& launch);

// Blocks that depend on the sizes of the launch alone: their number shows in sums over blocks.
Plan plan_for_sums(const Launch& launch);

// At least as many bytes, aligned to a cache line, which the thread keeps from call to call, in one
// buffer for each purpose.
enum class Purpose { kWorkspace, kGains };
std::byte* thread_memory(std::int64_t bytes, Purpose purpose);

// Pieces of one buffer, each at a cache line of its own.
class Pieces {
 public:
  // Adds a piece and returns its place in the buffer.
  std::int64_t add(std::int64_t bytes);
  std::int64_t total() const { return total_; }

 private:
  std::int64_t total_ = 0;
};

// The workspace of the calling thread, and after it `more` bytes for the kernel's own use.
struct ThreadMemory {
  Workspace workspace;
  std::byte* more;
};
ThreadMemory thread_workspace(const Launch& launch, const Plan& plan, std::int64_t more = 0);

}  // namespace rope::cpu
