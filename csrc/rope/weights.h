// Weights of q and k projections, between the two conventions of which elements form a pair.
//
//   #include <rope/weights.h>
//
//   q_weight = rope::permute_half_to_interleaved(q_weight, head_dim);
//   ... rope::apply(q, positions, {.interleaved = true}) ...
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "rope/rope.h"

namespace rope {

struct PermuteOptions {
  // How many elements of a head are rotated, even; by default all from rotary_offset on. The others
  // stay where they are.
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  std::int64_t rotary_offset = 0;
};

// Orders the outputs of a projection whose pairs are halves (GPT-NeoX, Llama of Hugging Face) for
// interleaved pairs. The weight is (num_heads * head_dim, ...), a bias (num_heads * head_dim); the
// result is a copy. Throws c10::ValueError where head_dim is not positive or does not divide the
// rows, rotary_dim is odd, or the slice does not lie within a head.
ROPE_API at::Tensor permute_half_to_interleaved(const at::Tensor& weight, std::int64_t head_dim,
                                                const PermuteOptions& options = {});

// The inverse, for models whose pairs are adjacent (GPT-J, Llama of Meta).
ROPE_API at::Tensor permute_interleaved_to_half(const at::Tensor& weight, std::int64_t head_dim,
                                                const PermuteOptions& options = {});

}  // namespace rope
