#include "rope/positions.h"

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "messages.h"

namespace rope {

namespace {

// The functions take symbolic sizes, so compiled programs work for every length.

void check_defined(const char* function, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), expected(function, argument), "be a tensor, but got none");
}

// Whether the values are in host memory: not for compilers' or vmap's tensors.
bool can_be_read(const at::Tensor& tensor) {
  return tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
         !at::isTensorSubclassLike(tensor) && !tensor.is_neg() && !tensor._is_zerotensor() &&
         tensor.has_storage() &&
         tensor.storage().nbytes() >=
             at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(),
                                              tensor.storage_offset());
}

// Reads memory directly: tracers would record operators.
template <typename Integer>
void check_ends(const at::Tensor& cu_seqlens, const c10::SymInt& total_length) {
  const std::string prefix = expected("positions_from_cu_seqlens", "cu_seqlens");
  const auto* ends = cu_seqlens.const_data_ptr<Integer>();
  const std::int64_t stride = cu_seqlens.stride(0);
  TORCH_CHECK_VALUE(ends[0] == 0, prefix, "begin with 0, but got ", ends[0]);
  for (std::int64_t i = 1; i < cu_seqlens.size(0); ++i) {
    TORCH_CHECK_VALUE(ends[(i - 1) * stride] <= ends[i * stride], prefix, "ascend, but got ",
                      ends[i * stride], " after ", ends[(i - 1) * stride]);
  }
  const Integer last = ends[(cu_seqlens.size(0) - 1) * stride];
  const std::optional<std::int64_t> total = total_length.maybe_as_int();
  TORCH_CHECK_VALUE(!total.has_value() || last <= *total, prefix,
                    "end at or before total_length = ", total_length, ", but got ", last);
}

void check_packed(const at::Tensor& cu_seqlens, const c10::SymInt& total_length) {
  constexpr const char* kFunction = "positions_from_cu_seqlens";
  check_defined(kFunction, "cu_seqlens", cu_seqlens);
  const at::ScalarType dtype = cu_seqlens.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, expected(kFunction, "cu_seqlens"),
                   "be int32 or int64, but got ", name_of(dtype));
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && holds(cu_seqlens.sym_size(0).sym_ge(1)),
                    expected(kFunction, "cu_seqlens"),
                    "have the shape (B + 1), one number more than sequences, but got ",
                    cu_seqlens.sym_sizes());
  TORCH_CHECK_VALUE(holds(total_length.sym_ge(0)), expected(kFunction, "total_length"),
                    "be at least 0, but got ", total_length);
  if (can_be_read(cu_seqlens)) {
    dtype == at::kInt ? check_ends<std::int32_t>(cu_seqlens, total_length)
                      : check_ends<std::int64_t>(cu_seqlens, total_length);
  }
}

at::Tensor number_packed(const at::Tensor& cu_seqlens, c10::SymInt total_length) {
  check_packed(cu_seqlens, total_length);
  const at::Tensor tokens = at::arange(total_length, cu_seqlens.options());
  const at::Tensor sequence =
      at::searchsorted(cu_seqlens, tokens, /*out_int32=*/false, /*right=*/true).sub(1);
  return tokens.sub(cu_seqlens.index_select(0, sequence));
}

void check_mask(const at::Tensor& attention_mask) {
  constexpr const char* kFunction = "positions_from_attention_mask";
  check_defined(kFunction, "attention_mask", attention_mask);
  const at::ScalarType dtype = attention_mask.scalar_type();
  TORCH_CHECK_TYPE(c10::isIntegralType(dtype, /*includeBool=*/true),
                   expected(kFunction, "attention_mask"), "be bool or an integer dtype, but got ",
                   name_of(dtype));
  TORCH_CHECK_VALUE(attention_mask.dim() >= 1, expected(kFunction, "attention_mask"),
                    "have at least 1 dimension, but got ", attention_mask.dim());
}

// The index of each token within its run of equal numbers.
at::Tensor number_runs(const at::Tensor& samples) {
  const at::Tensor index = at::arange(samples.sym_size(-1), samples.options());
  // roll() compares the first element with the last; either result makes it start a run at 0.
  const at::Tensor begins = samples.ne(samples.roll(1, -1));
  const at::Tensor first = std::get<0>(begins.mul(index).cummax(-1));
  return index.sub(first).mul(samples.ne(0));
}

at::Tensor number_masked(const at::Tensor& attention_mask, bool packed) {
  check_mask(attention_mask);
  if (packed) {
    return number_runs(attention_mask.to(at::kLong));
  }
  return attention_mask.to(at::kBool).cumsum(-1, at::kLong).sub(1).clamp_min(0);
}

at::Tensor number_rank(c10::SymInt seq_len, std::int64_t rank, std::int64_t world_size, bool zigzag,
                       at::Device device) {
  constexpr const char* kFunction = "context_parallel_positions";
  TORCH_CHECK_VALUE(world_size >= 1, expected(kFunction, "world_size"), "be at least 1, but got ",
                    world_size);
  TORCH_CHECK_VALUE(0 <= rank && rank < world_size, expected(kFunction, "rank"), "be in [0, ",
                    world_size, "), but got ", rank);
  const std::int64_t num_chunks = zigzag ? 2 * world_size : world_size;
  TORCH_CHECK_VALUE(holds(seq_len.sym_ge(0)) && holds((seq_len % num_chunks).sym_eq(0)),
                    expected(kFunction, "seq_len"), "be at least 0 and a multiple of ", num_chunks,
                    ", but got ", seq_len);
  const c10::SymInt size = seq_len / num_chunks;
  const auto chunk = [&](std::int64_t index) {
    return at::arange(size * index, size * (index + 1), at::device(device).dtype(at::kLong));
  };
  return zigzag ? at::cat({chunk(rank), chunk(num_chunks - 1 - rank)}) : chunk(rank);
}

at::Tensor number_grid(c10::SymIntArrayRef sizes, at::Device device) {
  TORCH_CHECK_VALUE(!sizes.empty(), expected("grid_positions", "sizes"),
                    "have an element for each axis, but got none");
  std::vector<at::Tensor> axes;
  for (const c10::SymInt& size : sizes) {
    TORCH_CHECK_VALUE(holds(size.sym_ge(0)), expected("grid_positions", "sizes"),
                      "be at least 0, but got ", size);
    axes.push_back(at::arange(size, at::device(device).dtype(at::kLong)));
  }
  return at::stack(at::meshgrid(axes, "ij"));
}

}  // namespace

at::Tensor positions_from_cu_seqlens(const at::Tensor& cu_seqlens, std::int64_t total_length) {
  return number_packed(cu_seqlens, total_length);
}

at::Tensor positions_from_attention_mask(const at::Tensor& attention_mask,
                                         const AttentionMaskOptions& options) {
  return number_masked(attention_mask, options.packed);
}

at::Tensor context_parallel_positions(std::int64_t seq_len, std::int64_t rank,
                                      std::int64_t world_size,
                                      const ContextParallelOptions& options) {
  return number_rank(seq_len, rank, world_size, options.zigzag, options.device);
}

at::Tensor grid_positions(at::IntArrayRef sizes, at::Device device) {
  return number_grid(c10::fromIntArrayRefSlow(sizes), device);
}

}  // namespace rope

TORCH_LIBRARY_IMPL(rope, CompositeImplicitAutograd, library) {
  library.impl("_positions_from_cu_seqlens", TORCH_FN(rope::number_packed));
  library.impl("_positions_from_attention_mask", TORCH_FN(rope::number_masked));
  library.impl("_context_parallel_positions", TORCH_FN(rope::number_rank));
  library.impl("_grid_positions", TORCH_FN(rope::number_grid));
}

// Without these vmap would loop over the batch. The other two take no tensor.
TORCH_LIBRARY_IMPL(rope, FuncTorchBatchedDecomposition, library) {
  library.impl("_positions_from_cu_seqlens", TORCH_FN(rope::number_packed));
  library.impl("_positions_from_attention_mask", TORCH_FN(rope::number_masked));
}
