// Positions of tokens, computed on the device without synchronisation.
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

// (total_length), with the dtype of cu_seqlens: numbers the tokens of packed sequences, each
// sequence from 0. cu_seqlens is int32 or int64 (B + 1), ascending from 0: the start of each
// sequence and the end of the last. Tokens after that (padding) are numbered as one more sequence.
// Throws c10::TypeError for another dtype, c10::ValueError for another shape, a negative
// total_length and, on CPU, values that do not start at 0, descend or exceed total_length. On other
// devices, where checking would synchronise, such values give a meaningless result.
ROPE_API at::Tensor positions_from_cu_seqlens(const at::Tensor& cu_seqlens,
                                              std::int64_t total_length);

// The options of positions_from_attention_mask.
struct AttentionMaskOptions {
  // The mask numbers the samples packed into a row: each run of equal numbers is a sample, whose
  // tokens are numbered from 0. Padding (0) gets position 0.
  bool packed = false;
};

// int64, with the shape of attention_mask: numbers the tokens of each row from 0. attention_mask is
// bool or integer (..., S), nonzero for tokens. Padding gets the position of the last token before
// it, or 0. Throws c10::TypeError for another dtype, c10::ValueError for a 0-dimensional mask.
ROPE_API at::Tensor positions_from_attention_mask(const at::Tensor& attention_mask,
                                                  const AttentionMaskOptions& options = {});

// The options of context_parallel_positions.
struct ContextParallelOptions {
  // Each rank holds two of 2 * world_size chunks, the rank-th from the front and from the back,
  // which balances causal attention; otherwise one of world_size chunks.
  bool zigzag = false;
  at::Device device = at::kCPU;
};

// int64 (seq_len / world_size): the positions of one rank's tokens. Throws c10::ValueError if
// world_size is not positive, rank is not in [0, world_size), or seq_len cannot be split equally.
ROPE_API at::Tensor context_parallel_positions(std::int64_t seq_len, std::int64_t rank,
                                               std::int64_t world_size,
                                               const ContextParallelOptions& options = {});

// int64 (A, *sizes): the coordinates of the points of a grid with A axes (images, video), for an
// inv_freq of (A, N). Throws c10::ValueError if sizes is empty or has a negative number.
ROPE_API at::Tensor grid_positions(at::IntArrayRef sizes, at::Device device = at::kCPU);

}  // namespace rope
