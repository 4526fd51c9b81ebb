// What the CPU kernel, compiled once for each CPU capability, shares with the code that starts it.
#pragma once

#include <cstdint>

#include "launch.h"

namespace rope::cpu {

// Rows of cosines and sines are padded to a multiple of this many elements, more than any vector
// has.
inline constexpr std::int64_t kPadding = 32;

inline std::int64_t padded(std::int64_t num_pairs) {
  return (num_pairs + kPadding - 1) / kPadding * kPadding;
}

// Elements of a token's row of cosines: with full width those of the first elements of all pairs,
// then those of the second.
inline std::int64_t angles_length(const Launch& launch) {
  return padded(launch.num_pairs) * (has_full_width(launch) ? 2 : 1);
}

// A part of a launch: tokens [token_begin, token_end), at most Workspace's number of them, and of
// what shares their angles the part-th of num_parts parts. The thread's next blocks follow it up to
// thread_end; beyond it another thread may be writing.
struct Block {
  std::int64_t token_begin;
  std::int64_t token_end;
  std::int64_t thread_end;
  std::int64_t part;
  std::int64_t num_parts;
};

// Tokens of a block: enough to leave long stretches of each head where the tokens of a head lie
// side by side.
inline constexpr std::int64_t kMaxBlockTokens = 128;

// How many elements of a shared loops are found ahead of rotating them.
inline constexpr std::int64_t kSharedChunk = 64;

// Memory for one thread, for blocks of some number of tokens.
struct Workspace {
  void* cos;               // (tokens, angles_length) of the computation type
  void* sin;               // likewise
  double* angles;          // padded(num_pairs)
  void* frequencies;       // (num_axes, padded(num_pairs)) of inv_freq's dtype
  double* frequency_sums;  // (num_axes): of the magnitudes of a row of frequencies
  void* row;  // 2 * num_pairs elements, where x is not contiguous along the embedding axis
  std::int64_t* token_offsets;   // (tokens, kTokenArrays)
  std::int64_t* shared_offsets;  // (kSharedChunk, 2)
  bool may_stream;               // Results are written past the caches, which could not keep them.
};

// The kernel: rotates one block. One function for each CPU capability; all are
// csrc/cpu/rotate_kernel.cpp.
void rotate_DEFAULT(const Launch& launch, const Workspace& workspace, const Block& block);
void rotate_AVX2(const Launch& launch, const Workspace& workspace, const Block& block);
void rotate_AVX512(const Launch& launch, const Workspace& workspace, const Block& block);
// The same bits as rotate_AVX512, for bfloat16 alone, on CPUs with instructions for it.
void rotate_AVX512_BF16(const Launch& launch, const Workspace& workspace, const Block& block);

}  // namespace rope::cpu
