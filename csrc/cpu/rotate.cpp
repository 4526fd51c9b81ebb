#include "cpu/rotate.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ceil_div.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <string>

#include "cpu/kernel.h"

#ifdef __unix__
#include <unistd.h>
#endif

namespace rope::cpu {

namespace {

using Kernel = void (*)(const Launch&, const Workspace&, const Block&);

// All kernels give the same bits. Rows that are shorter than a step of AVX-512 are quicker in
// narrower ones.
struct Kernels {
  Kernel any_row;
  Kernel short_row;
  Kernel bfloat16_row;  // null: as others
};

Kernels choose_kernels() {
#ifdef ROPE_X86_KERNELS
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return {rotate_AVX512, rotate_AVX2,
            __builtin_cpu_supports("avx512bf16") ? rotate_AVX512_BF16 : nullptr};
  }
  if (capability == "AVX2") {
    return {rotate_AVX2, rotate_AVX2, nullptr};
  }
#endif
  return {rotate_DEFAULT, rotate_DEFAULT, nullptr};
}

Kernel choose_kernel(const Launch& launch) {
  static const Kernels kernels = choose_kernels();
  // A step, of half as many bytes where float16 is rotated (see Step in cpu/rotate_kernel.cpp).
  const std::int64_t step_bytes = launch.dtype == c10::ScalarType::Half ? 32 : 64;
  if (launch.num_pairs * static_cast<std::int64_t>(c10::elementSize(launch.dtype)) < step_bytes) {
    return kernels.short_row;
  }
  return launch.dtype == c10::ScalarType::BFloat16 && kernels.bfloat16_row != nullptr
             ? kernels.bfloat16_row
             : kernels.any_row;
}

// Cosines and sines of the tokens of one block: a quarter of the smallest L2 of a CPU with AVX2.
constexpr std::int64_t kBlockBytes = 64 * 1024;

// Elements that are worth a thread of their own: ATen's own number (at::internal::GRAIN_SIZE).
constexpr std::int64_t kGrainElements = 32768;

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

// How a launch is cut into blocks.
struct Plan {
  std::int64_t num_tokens;
  std::int64_t block_tokens;
  std::int64_t num_parts;
  std::int64_t num_blocks;
  std::int64_t grain;  // blocks
  bool may_stream;

  std::int64_t token_begin(std::int64_t block) const { return block / num_parts * block_tokens; }
  std::int64_t token_end(std::int64_t block) const {
    return std::min(token_begin(block) + block_tokens, num_tokens);
  }
};

Plan plan(const Launch& launch, std::int64_t row_bytes) {
  std::int64_t most_shared = 1;
  std::int64_t elements_per_token = 0;
  std::int64_t fresh_per_token = 0;
  for (int i = 0; i < launch.num_operands; ++i) {
    const std::int64_t shared = launch.operands[i].heads.count();
    most_shared = std::max(most_shared, shared);
    const std::int64_t elements = shared * launch.operands[i].axis_size;
    elements_per_token += elements;
    fresh_per_token += launch.operands[i].in == launch.operands[i].out ? 0 : elements;
  }
  Plan plan{};
  plan.num_tokens = launch.tokens.count();
  const std::int64_t threads = at::get_num_threads();
  const std::int64_t fitting = kBlockBytes / std::max<std::int64_t>(2 * row_bytes, 1);
  plan.block_tokens = std::clamp<std::int64_t>(
      std::min(fitting, at::ceil_div(plan.num_tokens, threads)), 1, kMaxBlockTokens);
  const std::int64_t token_blocks = at::ceil_div(plan.num_tokens, plan.block_tokens);
  plan.num_parts = std::clamp<std::int64_t>(threads / token_blocks, 1, most_shared);
  plan.num_blocks = token_blocks * plan.num_parts;
  const std::int64_t elements_per_block =
      at::ceil_div(plan.block_tokens * elements_per_token, plan.num_parts);
  plan.grain =
      std::max<std::int64_t>(kGrainElements / std::max<std::int64_t>(elements_per_block, 1), 1);
  const std::int64_t column =
      plan.num_tokens * static_cast<std::int64_t>(c10::elementSize(launch.dtype));
  plan.may_stream = fresh_per_token * column > streaming_bound();
  return plan;
}

constexpr std::int64_t kAlignment = 64;  // a cache line

// At least as many bytes, which the thread keeps from call to call.
std::byte* thread_memory(std::int64_t bytes) {
  struct Free {
    void operator()(std::byte* memory) const {
      ::operator delete(memory, std::align_val_t(kAlignment));
    }
  };
  thread_local std::unique_ptr<std::byte, Free> memory;
  thread_local std::int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;  // Allocation may throw.
    memory.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kAlignment))));
    size = bytes;
  }
  return memory.get();
}

// Whether vectors run along tokens, whose row of angles has a place for each token of a block.
bool may_run_along_tokens(const Launch& launch) {
  for (int i = 0; i < launch.num_operands; ++i) {
    if (launch.operands[i].in_axis_stride != 1 || launch.operands[i].out_axis_stride != 1) {
      return true;
    }
  }
  return false;
}

// The workspace of the thread that asks, each piece of it at a cache line of its own.
Workspace thread_workspace(const Launch& launch, const Plan& plan, std::int64_t row_bytes) {
  const bool along_tokens = may_run_along_tokens(launch);
  const std::int64_t num_factors = launch.uses_tables ? 4 : launch.position_angles.num_axes;
  const std::int64_t length =
      std::max(padded(launch.num_pairs), along_tokens ? kMaxBlockTokens : 0);
  const std::int64_t rows = along_tokens ? padded(plan.block_tokens) : plan.block_tokens;
  constexpr auto kWide = static_cast<std::int64_t>(sizeof(double));
  const std::int64_t sizes[] = {
      rows * row_bytes,      rows * row_bytes,
      length * kWide,        num_factors * length * kWide,
      2 * length * kWide,    plan.block_tokens * kTokenArrays * kWide,
      kMaxHeads * 2 * kWide,
  };
  std::int64_t total = 0;
  std::int64_t begins[std::size(sizes)];
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    begins[i] = total;
    total += at::ceil_div(sizes[i], kAlignment) * kAlignment;
  }
  std::byte* base = thread_memory(total);
  return {base + begins[0],
          base + begins[1],
          base + begins[2],
          base + begins[3],
          base + begins[4],
          reinterpret_cast<std::int64_t*>(base + begins[5]),
          reinterpret_cast<std::int64_t*>(base + begins[6]),
          plan.may_stream};
}

}  // namespace

void rotate(const Launch& launch) {
  const Kernel kernel = choose_kernel(launch);
  const auto real_size = static_cast<std::int64_t>(
      launch.dtype == c10::ScalarType::Double ? sizeof(double) : sizeof(float));
  const std::int64_t row_bytes = angles_per_pair(launch) * padded(launch.num_pairs) * real_size;
  const Plan blocks = plan(launch, row_bytes);
  at::parallel_for(0, blocks.num_blocks, blocks.grain, [&](std::int64_t begin, std::int64_t end) {
    const Workspace workspace = thread_workspace(launch, blocks, row_bytes);
    for (std::int64_t i = begin; i < end; ++i) {
      kernel(launch, workspace,
             {blocks.token_begin(i), blocks.token_end(i), i % blocks.num_parts, blocks.num_parts});
    }
  });
}

void normalize(const Launch&) {}
void normalize_gradient(const Launch&, MakeWeightSums make) { make(1); }

}  // namespace rope::cpu
