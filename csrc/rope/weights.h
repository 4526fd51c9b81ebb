// Converts weights of q and k projections between the two pair conventions.
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

// The options of both functions.
struct PermuteOptions {
  // The number of rotated elements of a head, even; by default all from rotary_offset on. The other
  // rows keep their places.
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  std::int64_t rotary_offset = 0;
};

// Permutes the output rows of a projection from half-split pairs (GPT-NeoX, Hugging Face's Llama)
// to interleaved ones. The weight is (num_heads * head_dim, ...), a bias (num_heads * head_dim);
// the result is a copy. Throws c10::ValueError if head_dim is not positive or does not divide the
// rows, rotary_dim is odd, or the slice is not within a head.
ROPE_API at::Tensor permute_half_to_interleaved(const at::Tensor& weight, std::int64_t head_dim,
                                                const PermuteOptions& options = {});

// The inverse of permute_half_to_interleaved, for models with adjacent pairs (GPT-J, Meta's Llama).
ROPE_API at::Tensor permute_interleaved_to_half(const at::Tensor& weight, std::int64_t head_dim,
                                                const PermuteOptions& options = {});

}  // namespace rope
