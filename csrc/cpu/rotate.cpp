#include "cpu/rotate.h"

#include <ATen/Parallel.h>

#include "cpu/blocks.h"
#include "cpu/kernel.h"

namespace rope::cpu {

void rotate(const Launch& launch) {
  const auto kernel = choose(ROPE_COMPILED(rotate), choose_capability(launch));
  const Plan plan = plan_for_threads(launch);
  at::parallel_for(0, plan.num_blocks, plan.grain, [&](std::int64_t begin, std::int64_t end) {
    const Workspace workspace = thread_workspace(launch, plan).workspace;
    for (std::int64_t i = begin; i < end; ++i) {
      kernel(launch, workspace, plan.block(i));
    }
  });
}

}  // namespace rope::cpu
