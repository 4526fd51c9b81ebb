#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/blocks.h"
#include "cpu/kernel.h"
#include "cpu/rotate.h"

namespace rope::cpu {

namespace {

// The bytes of all gains of an operand, or of one row of gradients for each.
std::int64_t gain_bytes(const Launch& launch, const Operand& operand) {
  return num_weights(operand) * gain_length(operand.axis_size) * real_size(launch);
}

// Runs a kernel on the blocks of a launch. sums.of_operand[i] is null where no gradient of a weight
// is wanted.
class NormRun {
 public:
  using Kernel = void(const Launch&, const NormWorkspace&, const Block&);

  NormRun(const Launch& launch, const Plan& plan, Kernel* kernel, const WeightSums& sums)
      : launch_(launch), plan_(plan), kernel_(kernel), sums_(sums) {
    arrange();
  }

  void run() const {
    at::parallel_for(0, plan_.num_blocks, plan_.grain, [&](std::int64_t begin, std::int64_t end) {
      NormWorkspace workspace = make_workspace();
      for (std::int64_t i = begin; i < end; ++i) {
        for (int operand = 0; operand < launch_.num_operands; ++operand) {
          workspace.weight_sums[operand] = part_of_sums(operand, i);
        }
        kernel_(launch_, workspace, plan_.block(i));
      }
    });
  }

 private:
  // Lays out the weights, for all threads.
  void arrange() {
    const auto arrange_gains = choose(ROPE_COMPILED(arrange_gains), choose_capability(launch_));
    Pieces pieces;
    std::int64_t begins[2] = {};
    for (int i = 0; i < launch_.num_operands; ++i) {
      const Operand& operand = launch_.operands[i];
      begins[i] = pieces.add(gain_bytes(launch_, operand) + operand.axis_size * real_size(launch_));
    }
    std::byte* base = thread_memory(pieces.total(), Purpose::kGains);
    for (int i = 0; i < launch_.num_operands; ++i) {
      gains_[i] = base + begins[i];
      arrange_gains(launch_, i, base + begins[i]);
    }
  }

  NormWorkspace make_workspace() const {
    std::int64_t axis_size = 0;
    std::int64_t tile_heads = kMaxHeads;
    Pieces pieces;
    std::int64_t weight_grads[2] = {};
    for (int i = 0; i < launch_.num_operands; ++i) {
      const Operand& operand = launch_.operands[i];
      axis_size = std::max(axis_size, operand.axis_size);
      tile_heads = std::max(tile_heads, operand.norm.num_members);
      weight_grads[i] =
          pieces.add(sums_.of_operand[i] == nullptr ? 0 : 2 * gain_bytes(launch_, operand));
    }
    constexpr auto kWide = static_cast<std::int64_t>(sizeof(double));
    const std::int64_t counted = pieces.add(2 * kPadding * kWide);
    const std::int64_t rows = pieces.add(3 * axis_size * kWide);
    const std::int64_t grad_offsets = pieces.add(plan_.block_tokens * 2 * kWide);
    const std::int64_t gain_offsets = pieces.add(plan_.block_tokens * 2 * kWide);
    const std::int64_t head_offsets = pieces.add(tile_heads * kHeadArrays * kWide);
    const std::int64_t scales = pieces.add(padded(tile_heads) * kWide);
    const auto [angles, base] = thread_workspace(launch_, plan_, pieces.total());
    NormWorkspace workspace{};
    workspace.angles = angles;
    workspace.counted = base + counted;
    workspace.rows = base + rows;
    workspace.grad_offsets = reinterpret_cast<std::int64_t*>(base + grad_offsets);
    workspace.gain_offsets = reinterpret_cast<std::int64_t*>(base + gain_offsets);
    workspace.head_offsets = reinterpret_cast<std::int64_t*>(base + head_offsets);
    workspace.scales = base + scales;
    for (int i = 0; i < launch_.num_operands; ++i) {
      workspace.gains[i] = gains_[i];
      workspace.weight_grads[i] = sums_.of_operand[i] == nullptr ? nullptr : base + weight_grads[i];
    }
    return workspace;
  }

  void* part_of_sums(int operand, std::int64_t block) const {
    auto* sums = static_cast<std::byte*>(sums_.of_operand[operand]);
    return sums == nullptr
               ? nullptr
               : sums + block * launch_.operands[operand].norm.weight_numel * real_size(launch_);
  }

  const Launch& launch_;
  Plan plan_;
  Kernel* kernel_;
  WeightSums sums_;
  const void* gains_[2] = {};
};

}  // namespace

void normalize(const Launch& launch) {
  const Plan plan = plan_for_threads(launch);
  const auto kernel = choose(ROPE_COMPILED(normalize), choose_capability(launch));
  NormRun(launch, plan, kernel, {}).run();
}

void normalize_gradient(const Launch& launch, MakeWeightSums make_weight_sums) {
  const Plan plan = plan_for_sums(launch);
  const auto kernel = choose(ROPE_COMPILED(normalize_gradient), choose_capability(launch));
  const WeightSums sums = make_weight_sums(plan.num_blocks);
  NormRun(launch, plan, kernel, sums).run();
}

}  // namespace rope::cpu
