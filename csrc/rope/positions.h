// Positions of tokens, formed on the device without a wait for it.
//
//   #include <rope/positions.h>
//
//   at::Tensor positions = rope::positions_from_cu_seqlens(cu_seqlens, x.size(0));
//   at::Tensor y = rope::apply(x, positions.unsqueeze(-1));  // x is (tokens, heads, head_dim)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "rope/rope.h"

namespace rope {

// (total_length), of the dtype of cu_seqlens: numbers the tokens of packed sequences, each sequence
// from 0. cu_seqlens is int32 or int64 (B + 1), ascending from 0: where each sequence begins and
// the last one ends. Tokens beyond that (padding) are numbered as one more sequence. Throws
// c10::TypeError for another dtype, c10::ValueError for another shape, a negative total_length and,
// on CPU, numbers that do not begin with 0, descend or exceed total_length. Elsewhere numbers are
// not checked, which would take a wait for the device: the result is then meaningless.
ROPE_API at::Tensor positions_from_cu_seqlens(const at::Tensor& cu_seqlens,
                                              std::int64_t total_length);

struct AttentionMaskOptions {
  // The mask numbers samples that are packed into a row: a run of equal numbers is a sample, whose
  // tokens are numbered from 0. Padding (0) has position 0.
  bool packed = false;
};

// int64, of the shape of attention_mask: bool or integer (..., S), not 0 where there is a token.
// Numbers the tokens of each row from 0. Padding has the position of the last token before it, or
// 0. Throws c10::TypeError for another dtype, c10::ValueError for no dimension.
ROPE_API at::Tensor positions_from_attention_mask(const at::Tensor& attention_mask,
                                                  const AttentionMaskOptions& options = {});

struct ContextParallelOptions {
  // A rank holds two of 2 * world_size chunks, the rank-th from the front and from the back, which
  // balances causal attention; otherwise one of world_size chunks.
  bool zigzag = false;
  at::Device device = at::kCPU;
};

// int64 (seq_len / world_size): the positions of the tokens that one rank holds. Throws
// c10::ValueError where world_size is not positive, rank is not in [0, world_size), or ranks cannot
// share seq_len tokens equally.
ROPE_API at::Tensor context_parallel_positions(std::int64_t seq_len, std::int64_t rank,
                                               std::int64_t world_size,
                                               const ContextParallelOptions& options = {});

// int64 (A, *sizes): the coordinates of the places of a grid of A axes (images, video), for an
// inv_freq of (A, N). Throws c10::ValueError for no axis, or a negative size.
ROPE_API at::Tensor grid_positions(at::IntArrayRef sizes, at::Device device = at::kCPU);

}  // namespace rope
