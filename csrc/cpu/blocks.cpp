#include "cpu/blocks.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ceil_div.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <new>
#include <string>

#ifdef __unix__
#include <unistd.h>
#endif

namespace rope::cpu {

namespace {

Capability widest_capability() {
#ifdef ROPE_X86_KERNELS
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return __builtin_cpu_supports("avx512bf16") ? Capability::kAvx512Bf16 : Capability::kAvx512;
  }
  if (capability == "AVX2") {
    return Capability::kAvx2;
  }
#endif
  return Capability::kDefault;
}

// Cosines and sines of the tokens of one block: a quarter of the smallest L2 of a CPU with AVX2.
constexpr std::int64_t kBlockBytes = 64 * 1024;

// Outputs of more bytes than this take non-temporal stores: 3/8 of the last-level cache, which also
// has the input. What is reported counts up to 96 MiB, the most that cores of one die share.
// Virtual machines report the caches of all guests: where 260 MiB were reported, results of 8 MiB
// and more were streamed faster, with a reader that follows.
std::int64_t streaming_bound() {
  static const std::int64_t bound = [] {
    constexpr std::int64_t kMost = 96 << 20;
    constexpr std::int64_t kAssumed = 32 << 20;
    std::int64_t bytes = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return (0 < bytes && bytes <= kMost ? bytes : kAssumed) / 8 * 3;
  }();
  return bound;
}

// A row of cosines.
std::int64_t row_bytes(const Launch& launch) {
  return angles_per_pair(launch) * padded(launch.num_pairs) * real_size(launch);
}

// The heads of an operand, those that share a mean counted as one.
std::int64_t num_groups(const Operand& operand) {
  return operand.heads.count() / std::max<std::int64_t>(operand.norm.num_members, 1);
}

// What the plans of a launch depend on.
struct Extent {
  std::int64_t most_groups = 1;  // of heads of one token
  std::int64_t elements_per_token = 0;
  std::int64_t fresh_per_token = 0;  // of these, in outputs that are not inputs
};

Extent extent_of(const Launch& launch) {
  Extent extent;
  for (int i = 0; i < launch.num_operands; ++i) {
    const Operand& operand = launch.operands[i];
    extent.most_groups = std::max(extent.most_groups, num_groups(operand));
    const std::int64_t elements = operand.heads.count() * operand.axis_size;
    extent.elements_per_token += elements;
    extent.fresh_per_token += operand.in == operand.out ? 0 : elements;
  }
  return extent;
}

// A plan of blocks of so many tokens, each of num_parts parts.
Plan plan_of(const Launch& launch, const Extent& extent, std::int64_t block_tokens,
             std::int64_t num_parts) {
  Plan plan{};
  plan.num_tokens = launch.tokens.count();
  plan.block_tokens = block_tokens;
  plan.num_parts = std::clamp<std::int64_t>(num_parts, 1, extent.most_groups);
  plan.num_blocks = at::ceil_div(plan.num_tokens, block_tokens) * plan.num_parts;
  const std::int64_t elements_per_block =
      at::ceil_div(block_tokens * extent.elements_per_token, plan.num_parts);
  plan.grain =
      std::max<std::int64_t>(kGrainElements / std::max<std::int64_t>(elements_per_block, 1), 1);
  const std::int64_t column =
      plan.num_tokens * static_cast<std::int64_t>(c10::elementSize(launch.dtype));
  plan.may_stream = extent.fresh_per_token * column > streaming_bound();
  return plan;
}

constexpr std::int64_t kAlignment = 64;  // a cache line

// Whether vectors run along tokens, whose row of angles has a place for each token of a block.
bool may_run_along_tokens(const Launch& launch) {
  for (int i = 0; i < launch.num_operands && !launch.normalizes; ++i) {
    if (launch.operands[i].in_axis_stride != 1 || launch.operands[i].out_axis_stride != 1) {
      return true;
    }
  }
  return false;
}

}  // namespace

std::int64_t real_size(const Launch& launch) {
  return launch.dtype == c10::ScalarType::Double ? sizeof(double) : sizeof(float);
}

Capability choose_capability(const Launch& launch) {
  static const Capability widest = widest_capability();
  const bool is_avx512 = widest == Capability::kAvx512 || widest == Capability::kAvx512Bf16;
  // A step, of half as many bytes where float16 is rotated (see Step in cpu/step.h).
  const std::int64_t step_bytes = launch.dtype == c10::ScalarType::Half ? 32 : 64;
  const std::int64_t bytes =
      launch.num_pairs * static_cast<std::int64_t>(c10::elementSize(launch.dtype));
  if (is_avx512 && 0 < bytes && bytes < step_bytes) {
    return Capability::kAvx2;
  }
  return widest == Capability::kAvx512Bf16 && launch.dtype != c10::ScalarType::BFloat16
             ? Capability::kAvx512
             : widest;
}

Block Plan::block(std::int64_t index) const {
  const std::int64_t begin = index / num_parts * block_tokens;
  return {begin, std::min(begin + block_tokens, num_tokens), index % num_parts, num_parts};
}

Plan plan_for_threads(const Launch& launch) {
  const std::int64_t num_tokens = launch.tokens.count();
  const std::int64_t threads = at::get_num_threads();
  const std::int64_t fitting = kBlockBytes / std::max<std::int64_t>(2 * row_bytes(launch), 1);
  const std::int64_t block_tokens = std::clamp<std::int64_t>(
      std::min(fitting, at::ceil_div(num_tokens, threads)), 1, kMaxBlockTokens);
  return plan_of(launch, extent_of(launch), block_tokens,
                 threads / at::ceil_div(num_tokens, block_tokens));
}

Plan plan_for_sums(const Launch& launch) {
  constexpr std::int64_t kElements = 128 * 1024;  // of a block
  const Extent extent = extent_of(launch);
  const std::int64_t per_token = std::max<std::int64_t>(extent.elements_per_token, 1);
  const std::int64_t block_tokens =
      std::clamp<std::int64_t>(kElements / per_token, 1, kMaxBlockTokens);
  return plan_of(launch, extent, block_tokens, per_token / kElements);
}

std::byte* thread_memory(std::int64_t bytes, Purpose purpose) {
  struct Free {
    void operator()(std::byte* memory) const {
      ::operator delete(memory, std::align_val_t(kAlignment));
    }
  };
  struct Buffer {
    std::unique_ptr<std::byte, Free> memory;
    std::int64_t size = 0;
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[static_cast<int>(purpose)];
  if (buffer.size < bytes) {
    buffer.memory.reset();
    buffer.size = 0;  // Allocation may throw.
    buffer.memory.reset(
        static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kAlignment))));
    buffer.size = bytes;
  }
  return buffer.memory.get();
}

std::int64_t Pieces::add(std::int64_t bytes) {
  const std::int64_t begin = total_;
  total_ += at::ceil_div(bytes, kAlignment) * kAlignment;
  return begin;
}

ThreadMemory thread_workspace(const Launch& launch, const Plan& plan, std::int64_t more) {
  const bool along_tokens = may_run_along_tokens(launch);
  const std::int64_t num_factors = launch.uses_tables ? 4 : launch.position_angles.num_axes;
  const std::int64_t length =
      std::max(padded(launch.num_pairs), along_tokens ? kMaxBlockTokens : 0);
  const std::int64_t rows = along_tokens ? padded(plan.block_tokens) : plan.block_tokens;
  constexpr auto kWide = static_cast<std::int64_t>(sizeof(double));
  Pieces pieces;
  const std::int64_t cos = pieces.add(rows * row_bytes(launch));
  const std::int64_t sin = pieces.add(rows * row_bytes(launch));
  const std::int64_t sums = pieces.add(length * kWide);
  const std::int64_t factors = pieces.add(num_factors * length * kWide);
  const std::int64_t row = pieces.add(2 * length * kWide);
  const std::int64_t token_offsets = pieces.add(plan.block_tokens * kTokenArrays * kWide);
  const std::int64_t head_offsets = pieces.add(kMaxHeads * 2 * kWide);
  std::byte* base = thread_memory(pieces.total() + more, Purpose::kWorkspace);
  return {{base + cos, base + sin, base + sums, base + factors, base + row,
           reinterpret_cast<std::int64_t*>(base + token_offsets),
           reinterpret_cast<std::int64_t*>(base + head_offsets), plan.may_stream},
          base + pieces.total()};
}

}  // namespace rope::cpu
