// The schemas, and nothing else.
//
// - x: the tensor to rotate; q and k: two tensors, rotated by the same angles. Any shape with at
//   least one dimension, any strides; float64, float32, float16 or bfloat16. The forms that end in
//   _ work in place.
// - positions: broadcast with the shape of x without embedding_axis. int32, int64, float32 or
//   float64; with a (A, N) inv_freq, a leading dimension of size A comes first. For tables: int32
//   or int64 rows of (P, N) tables.
// - inv_freq: (N) or (A, N), float32 or float64: radians per unit of position.
// - cos, sin: tables of shape (..., N) that broadcast with x without embedding_axis, or (P, N) with
//   positions; with full_width of 2 N columns.
// - embedding_axis: the dimension of x that is rotated; negative counts from the end.
// - rotary_dim: how many elements are rotated: even; by default 2 N, or all from rotary_offset on.
// For
//   tables it follows from their width, and is only compared with it.
// - rotary_offset: the first element that is rotated; those outside come out unchanged.
// - max_wavelength: the base of the frequencies where no inv_freq is given; positive.
// - scale_factor: divides the angle where no inv_freq is given; positive.
// - attention_factor: multiplies the rotated elements.
// - interleaved: pairs are (2n, 2n + 1) instead of (n, n + N).
// - conjugate: turns by the negative angle: the transpose of the same call without it.
// - full_width: tables have a column for each element of the rotated slice, in the slice's order,
//   instead of one for each pair.
//
// The forms in place return nothing: schemas that return a mutated argument are not supported by
// torch.compile.
//
// The others begin with _ and are not public. Scripted and compiled programs reach the functions of
// rope/frequencies.h, positions.h and weights.h through most of them.
//
// Two of them are the heavy part of gradients, and no more than that: csrc/gradients.h.
//
// - grads: the gradients of what came out of rotations of xs, or of ys, which came out: of one
//   tensor or of two, whose sums are added.
// - sizes: those of the sums, (tokens..., N), or (tokens..., 2 N) with full_width: as tables
// without
//   positions have them.
// - embedding_axis, rotary_offset, interleaved, conjugate, full_width: as above.
// - factors, dim: the result is (sums * factors).sum(dim), where dim counts from the end.
// - rows, num_rows: the sums of each token are added to the row that it names, int32 or int64, of a
//   result of shape (num_rows, N), or (num_rows, 2 N).
// - dtype: of the result; by default that in which x is computed with.
// - output_mask: which of the two are wanted; the other is undefined.
//
// - seq_len: the length that frequencies are for, a tensor of no dimension; or the number of tokens
//   that ranks share.
// - rope_theta, factor, max_position_embeddings: as Hugging Face's configurations have them.
// - dtype: of the frequencies, float32 or float64.
// - cu_seqlens: where packed sequences begin and the last one ends, int32 or int64 (B + 1).
// - total_length: the number of tokens, those of padding at the end too.
// - attention_mask: bool or integer (..., S), not 0 where there is a token.
// - packed: attention_mask numbers samples, each of which has positions of its own.
// - rank, world_size: which of how many processes.
// - zigzag: a rank holds a chunk from the front and one from the back.
// - sizes: of a grid along each axis.
// - device: that of the result.
// - weight: the weight or bias of a projection, (num_heads * head_dim, ...).
// - head_dim: the number of elements of a head.
#include <torch/library.h>

#include <string>

#include "gradients.h"
#include "rotate_operators.h"

namespace {

void define(torch::Library& library, const std::string& schema) {
  library.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
}

}  // namespace

TORCH_LIBRARY(rope, library) {
  rope::FunctionalOperators::define(library);
  rope::InPlaceOperators::define(library);
  rope::DecomposedOperators::define(library);
  rope::SumOperators::define(library);

  define(library,
         "_dynamic_frequencies(Tensor seq_len, int rotary_dim, float rope_theta, float factor, "
         "int max_position_embeddings, ScalarType dtype) -> Tensor");
  define(library, "_positions_from_cu_seqlens(Tensor cu_seqlens, SymInt total_length) -> Tensor");
  define(library,
         "_positions_from_attention_mask(Tensor attention_mask, bool packed=False) -> Tensor");
  define(library,
         "_context_parallel_positions(SymInt seq_len, int rank, int world_size, bool zigzag, "
         "Device device) -> Tensor");
  define(library, "_grid_positions(SymInt[] sizes, Device device) -> Tensor");
  const std::string rest = "(Tensor weight, int head_dim, int? rotary_dim, int rotary_offset)";
  define(library, "_permute_half_to_interleaved" + rest + " -> Tensor");
  define(library, "_permute_interleaved_to_half" + rest + " -> Tensor");
}
