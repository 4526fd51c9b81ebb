// What the CPU kernel, compiled once for each CPU capability, shares with the code that starts it.
#pragma once

#include <cstdint>

#include "kernels_api.h"
#include "launch.h"

namespace rope::cpu {

// Rows of cosines and sines are padded to a multiple of this many elements, at least a step of any
// dtype.
inline constexpr std::int64_t kPadding = 32;

inline std::int64_t padded(std::int64_t size) {
  return (size + kPadding - 1) / kPadding * kPadding;
}

// Cosines of one pair: with full width one for each of its elements.
inline std::int64_t angles_per_pair(const Launch& launch) { return has_full_width(launch) ? 2 : 1; }

// What the vectors of an operand run along: the embedding axis, or, where that is strided, tokens
// or heads that are contiguous. Elements are copied together where nothing is contiguous.
enum class Along { kAxis, kTokens, kHeads };

// A part of a launch: tokens [token_begin, token_end), at most Workspace's number of them, and of
// their heads the part-th of num_parts parts.
struct Block {
  std::int64_t token_begin;
  std::int64_t token_end;
  std::int64_t part;
  std::int64_t num_parts;
};

// Tokens of a block: enough to leave long runs of each head where the tokens of a head are
// contiguous.
inline constexpr std::int64_t kMaxBlockTokens = 128;

// Heads whose offsets are computed ahead of rotating them.
inline constexpr std::int64_t kMaxHeads = 64;

// Memory for one thread, for blocks of some number of tokens. `length` is the larger of
// padded(num_pairs) and, along tokens, kMaxBlockTokens. See NOTE [ Rows of angles ] in
// cpu/angles.h.
struct Workspace {
  void* cos;      // of the opmath type: (tokens, angles_per_pair * padded(num_pairs)),
  void* sin;      // or along tokens (num_pairs, angles_per_pair * padded(tokens))
  void* sums;     // (length) of inv_freq's dtype
  void* factors;  // (num_axes, length) likewise; or (4, length): a token's row of the tables
  void* row;      // (2, length) elements, where nothing is contiguous
  std::int64_t* token_offsets;  // (tokens, kTokenArrays)
  std::int64_t* head_offsets;   // (kMaxHeads, 2): in and out
  bool may_stream;              // Results are too large for the caches: non-temporal stores.
};

// The kernel, csrc/cpu/rotate_kernel.cpp: rotates one block. One function for each CPU capability.
ROPE_KERNELS_API void rotate_DEFAULT(const Launch& launch, const Workspace& workspace,
                                     const Block& block);
ROPE_KERNELS_API void rotate_AVX2(const Launch& launch, const Workspace& workspace,
                                  const Block& block);
ROPE_KERNELS_API void rotate_AVX512(const Launch& launch, const Workspace& workspace,
                                    const Block& block);
// The same bits as rotate_AVX512, for bfloat16 alone, on CPUs with instructions for it.
ROPE_KERNELS_API void rotate_AVX512_BF16(const Launch& launch, const Workspace& workspace,
                                         const Block& block);

// ---- Norms: csrc/cpu/norm_kernel.cpp ----

// Elements of a row as the kernel multiplies it by a weight: see NOTE [ Gains ] in cpu/norm_rows.h.
inline std::int64_t gain_length(std::int64_t axis_size) { return axis_size + 4 * kPadding; }

// What a block needs besides its Workspace.
struct NormWorkspace {
  Workspace angles;
  const void* gains[2];        // of each operand: (weights, gain_length) of the opmath type
  void* counted;               // (2 * kPadding) of the opmath type
  void* rows;                  // (3, axis size) elements, where axes are strided
  std::int64_t* grad_offsets;  // (tokens, 2): the gradient of each operand
  std::int64_t* gain_offsets;  // (tokens, 2): its gains
  std::int64_t* head_offsets;  // (kMaxHeads, or more that share a mean, kHeadArrays)
  void* scales;                // (padded(the same number)) of the opmath type: of their rows
  void* weight_grads[2];       // of each operand: (2, weights, gain_length) of the opmath type
  void* weight_sums[2];        // the block's part of WeightSums
};

// Weights that an operand has: rows of its embedding axis. One, of ones, without a weight.
inline std::int64_t num_weights(const Operand& operand) {
  return operand.norm.weight == nullptr ? 1 : operand.norm.weight_numel / operand.axis_size;
}

// Writes the gains of an operand. `gains` has room for one more row of the embedding axis after
// them.
#define ROPE_DECLARE_NORM_KERNELS(capability)                                         \
  ROPE_KERNELS_API void arrange_gains_##capability(const Launch& launch, int operand, \
                                                   void* gains);                      \
  ROPE_KERNELS_API void normalize_##capability(                                       \
      const Launch& launch, const NormWorkspace& workspace, const Block& block);      \
  ROPE_KERNELS_API void normalize_gradient_##capability(                              \
      const Launch& launch, const NormWorkspace& workspace, const Block& block);
ROPE_DECLARE_NORM_KERNELS(DEFAULT)
ROPE_DECLARE_NORM_KERNELS(AVX2)
ROPE_DECLARE_NORM_KERNELS(AVX512)
ROPE_DECLARE_NORM_KERNELS(AVX512_BF16)
#undef ROPE_DECLARE_NORM_KERNELS

}  // namespace rope::cpu
