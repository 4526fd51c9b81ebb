#include "rope/weights.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <vector>

#include "messages.h"

namespace rope {

namespace {

void check_weight(const char* function, const at::Tensor& weight, std::int64_t head_dim) {
  TORCH_CHECK_TYPE(weight.defined(), expected(function, "weight"), "be a tensor, but got none");
  TORCH_CHECK_VALUE(head_dim >= 1, expected(function, "head_dim"), "be at least 1, but got ",
                    head_dim);
  TORCH_CHECK_VALUE(weight.dim() >= 1, expected(function, "weight"),
                    "have at least 1 dimension, but got ", weight.dim());
  TORCH_CHECK_VALUE(weight.sym_size(0) % head_dim == 0, expected(function, "weight"),
                    "have a multiple of head_dim = ", head_dim, " rows, but got shape ",
                    weight.sym_sizes());
}

void check_slice(const char* function, std::int64_t head_dim, std::int64_t rotary_dim,
                 std::int64_t rotary_offset) {
  TORCH_CHECK_VALUE(rotary_dim >= 0, expected(function, "rotary_dim"), "be at least 0, but got ",
                    rotary_dim);
  TORCH_CHECK_VALUE(rotary_dim % 2 == 0, expected(function, "rotary_dim"), "be even, but got ",
                    rotary_dim);
  TORCH_CHECK_VALUE(rotary_dim <= head_dim - rotary_offset, expected(function, "rotary_dim"),
                    "be at most ", head_dim - rotary_offset,
                    ", head_dim without rotary_offset, but got ", rotary_dim);
}

void check_offset(const char* function, std::int64_t head_dim, std::int64_t rotary_offset) {
  TORCH_CHECK_VALUE(0 <= rotary_offset && rotary_offset <= head_dim,
                    expected(function, "rotary_offset"), "be in [0, ", head_dim, "], but got ",
                    rotary_offset);
}

// Transposes the rotated rows of each head: (2, N) to (N, 2) to interleave, (N, 2) to (2, N) back.
at::Tensor permute(const char* function, const at::Tensor& weight, std::int64_t head_dim,
                   const PermuteOptions& options, bool interleave) {
  const std::int64_t offset = options.rotary_offset;
  check_weight(function, weight, head_dim);
  check_offset(function, head_dim, offset);
  const std::int64_t rotary_dim = options.rotary_dim.value_or(head_dim - offset);
  check_slice(function, head_dim, rotary_dim, offset);

  const std::int64_t num_pairs = rotary_dim / 2;
  const std::int64_t end = offset + rotary_dim;
  const at::Tensor heads =
      weight.unflatten_symint(0, std::vector<c10::SymInt>{weight.sym_size(0) / head_dim, head_dim});
  const std::array<std::int64_t, 2> matrix = {interleave ? 2 : num_pairs,
                                              interleave ? num_pairs : 2};
  const at::Tensor matrices = heads.slice(1, offset, end).unflatten(1, matrix);
  const at::Tensor permuted = matrices.transpose(1, 2).flatten(1, 2);
  return at::cat({heads.slice(1, 0, offset), permuted, heads.slice(1, end)}, 1).flatten(0, 1);
}

// The operators, which take the options as separate arguments.
at::Tensor to_interleaved(const at::Tensor& weight, std::int64_t head_dim,
                          std::optional<std::int64_t> rotary_dim, std::int64_t rotary_offset) {
  return permute_half_to_interleaved(weight, head_dim, {rotary_dim, rotary_offset});
}

at::Tensor to_half(const at::Tensor& weight, std::int64_t head_dim,
                   std::optional<std::int64_t> rotary_dim, std::int64_t rotary_offset) {
  return permute_interleaved_to_half(weight, head_dim, {rotary_dim, rotary_offset});
}

}  // namespace

at::Tensor permute_half_to_interleaved(const at::Tensor& weight, std::int64_t head_dim,
                                       const PermuteOptions& options) {
  return permute("permute_half_to_interleaved", weight, head_dim, options, true);
}

at::Tensor permute_interleaved_to_half(const at::Tensor& weight, std::int64_t head_dim,
                                       const PermuteOptions& options) {
  return permute("permute_interleaved_to_half", weight, head_dim, options, false);
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  library.impl("_permute_half_to_interleaved", TORCH_FN(rope::to_interleaved));
  library.impl("_permute_interleaved_to_half", TORCH_FN(rope::to_half));
}

// Without these vmap would loop over the batch.
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  library.impl("_permute_half_to_interleaved", TORCH_FN(rope::to_interleaved));
  library.impl("_permute_interleaved_to_half", TORCH_FN(rope::to_half));
}
