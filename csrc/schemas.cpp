// The operators that exist, and what their arguments mean.
//
// apply, apply_cos_sin, norm_apply, norm_apply_cos_sin and their siblings, whose schemas follow
// from rotate_operators.h and options.h:
//
// - x: the tensor to rotate; q and k: two tensors, rotated by the same angles. Any shape with a
//   dimension, any strides; float64, float32, float16 or bfloat16. Operators whose name ends in _
//   work in place and return nothing: torch.compile does not support schemas that return a mutated
//   argument.
// - positions: int32, int64, float32 or float64. They broadcast with the shape of x without
//   embedding_axis, after a leading dimension of size A where inv_freq is (A, N). For tables: int32
//   or int64, rows of the (P, N) tables.
// - inv_freq: (N) or (A, N), float32 or float64, radians per unit of position.
// - cos, sin: tables of shape (..., N), where (...) broadcasts with the shape of x without
//   embedding_axis; (P, N) with positions; 2 N columns with full_width.
// - weight; q_weight and k_weight: what the normalized elements are multiplied by, of shape (...,
// D),
//   where D is the size of the embedding axis and (...) broadcasts with the shape of x without it.
// - the options: see ApplyOptions, CosSinOptions, NormOptions and NormCosSinOptions in rope/rope.h.
//
// _norm_apply_backward and its siblings, the gradients of what is normalized (norm_operators.h):
//
// - grad; grad_q and grad_k: the gradients of what norm_apply returned. Its arguments follow.
// - output_mask: which gradients are wanted: of x or q, of k, of their weights. The others are
//   undefined.
//
// _angle_gradient and _cos_sin_gradient, the sums that gradients need (gradient_sums.h):
//
// - grads, xs, ys: gradients of the outputs of one or two rotations, and their inputs xs or their
//   outputs ys. The sums of two are added.
// - sizes: of the sums, (tokens..., N), or (tokens..., 2 N) with full_width.
// - factors, dim: the result is (sums * factors).sum(dim); dim counts from the end.
// - rows, num_rows: each token's sum is added to the row of a (num_rows, N) result that it names,
//   int32 or int64.
// - dtype: of the result; default: the opmath type of xs.
// - output_mask: which of the two results are computed; the other is undefined.
//
// The others, which scripted and compiled programs reach through rope/frequencies.h, positions.h
// and weights.h:
//
// - seq_len: the length to form frequencies for, a 0-d tensor; or the number of tokens of all
//   ranks together.
// - rope_theta, factor, max_position_embeddings: as in Hugging Face's configurations.
// - dtype: of the frequencies, float32 or float64.
// - cu_seqlens: (B + 1), int32 or int64, where packed sequences begin and the last one ends.
// - total_length: the number of tokens, padding included.
// - attention_mask: (..., S), bool or integer, nonzero for tokens.
// - packed: attention_mask numbers the samples of a row, each with its own positions.
// - rank, world_size: this process, and how many there are.
// - zigzag: each rank has one chunk from the front and one from the back.
// - sizes: of the grid along each axis.
// - device: of the result.
// - weight: weight or bias of a projection, (num_heads * head_dim, ...).
// - head_dim: elements of a head.
#include <torch/library.h>

#include <string>

#include "gradient_sums.h"
#include "norm_operators.h"
#include "rotate_operators.h"

namespace {

void define(torch::Library& library, const std::string& schema) {
  library.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
}

}  // namespace

TORCH_LIBRARY(rope, library) {
  rope::AllOperators::define(library);
  rope::DecomposedOperators::define(library);
  rope::NormGradientOperators::define(library);
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
