#include "rope/positions.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

namespace rope {

namespace {

// The functions take symbolic sizes: compiled programs serve every length.

at::Tensor number_packed(const at::Tensor& cu_seqlens, c10::SymInt total_length) {
  const at::Tensor tokens = at::arange(total_length, cu_seqlens.options());
  const at::Tensor sequence =
      at::searchsorted(cu_seqlens, tokens, /*out_int32=*/false, /*right=*/true).sub(1);
  return tokens.sub(cu_seqlens.index_select(0, sequence));
}

at::Tensor number_shared(c10::SymInt seq_len, std::int64_t rank, std::int64_t world_size,
                         bool zigzag, at::Device device) {
  constexpr const char* kExpected = "rope::context_parallel_positions(): expected ";
  TORCH_CHECK_VALUE(0 <= rank && rank < world_size, kExpected, "rank to be in [0, ", world_size,
                    "), but got ", rank);
  const std::int64_t num_chunks = zigzag ? 2 * world_size : world_size;
  TORCH_CHECK_VALUE(seq_len >= 0 && seq_len % num_chunks == 0, kExpected,
                    "seq_len to be at least 0 and a multiple of ", num_chunks, ", but got ",
                    seq_len);
  const c10::SymInt size = seq_len / num_chunks;
  const auto chunk = [&](std::int64_t index) {
    return at::arange(size * index, size * (index + 1), at::device(device).dtype(at::kLong));
  };
  return zigzag ? at::cat({chunk(rank), chunk(num_chunks - 1 - rank)}) : chunk(rank);
}

at::Tensor number_grid(c10::SymIntArrayRef sizes, at::Device device) {
  TORCH_CHECK_VALUE(
      !sizes.empty(),
      "rope::grid_positions(): expected sizes to have an element for each axis, but got none");
  std::vector<at::Tensor> axes;
  for (const c10::SymInt& size : sizes) {
    axes.push_back(at::arange(size, at::device(device).dtype(at::kLong)));
  }
  return at::stack(at::meshgrid(axes, "ij"));
}

}  // namespace

at::Tensor positions_from_cu_seqlens(const at::Tensor& cu_seqlens, std::int64_t total_length) {
  return number_packed(cu_seqlens, total_length);
}

at::Tensor positions_from_attention_mask(const at::Tensor& attention_mask) {
  return attention_mask.cumsum(-1, at::kLong).sub(1).clamp_min(0);
}

at::Tensor context_parallel_positions(std::int64_t seq_len, std::int64_t rank,
                                      std::int64_t world_size,
                                      const ContextParallelOptions& options) {
  return number_shared(seq_len, rank, world_size, options.zigzag, options.device);
}

at::Tensor grid_positions(at::IntArrayRef sizes, at::Device device) {
  return number_grid(c10::fromIntArrayRefSlow(sizes), device);
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  library.impl("_positions_from_cu_seqlens", TORCH_FN(rope::number_packed));
  library.impl("_positions_from_attention_mask", TORCH_FN(rope::positions_from_attention_mask));
  library.impl("_context_parallel_positions", TORCH_FN(rope::number_shared));
  library.impl("_grid_positions", TORCH_FN(rope::number_grid));
}
