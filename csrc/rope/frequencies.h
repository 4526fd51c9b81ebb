// Frequencies: every scheme of Hugging Face configurations, and builders for several axes.
//
//   #include <rope/frequencies.h>
//
//   auto [inv_freq, attention_factor] = rope::frequencies(
//       {.rotary_dim = 128, .rope_type = "linear", .rope_theta = 5e5, .factor = 4.0});
//   at::Tensor y = rope::apply(x, positions, {.inv_freq = inv_freq});
//
// All are computed on the CPU and then moved, so every device has the same bits.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "rope/rope.h"

namespace rope {

// A scheme and its numbers, with the names of Hugging Face's rope_parameters. With
// f[n] = rope_theta^(-2n / rotary_dim), the schemes and their options besides rope_theta:
//
//     default       f
//     linear        f / factor
//     dynamic       f of a rope_theta that grows with seq_len beyond max_position_embeddings (NTK):
//                   factor, max_position_embeddings
//     yarn          f for short wavelengths, f / factor for long ones, a ramp in between
//                   (arXiv 2309.00071): factor, original_max_position_embeddings; optionally
//                   attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate
//     longrope      f / long_factor if seq_len is beyond original_max_position_embeddings, else
//                   f / short_factor (arXiv 2402.13753): these three, and factor or
//                   max_position_embeddings or attention_factor
//     llama3        f / factor for long wavelengths, f for short ones, a ramp in between:
//                   factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
//     proportional  f / factor for the first partial_rotary_factor of the pairs, 0 for the rest:
//                   factor, partial_rotary_factor, both 1 by default
struct FrequencyOptions {
  // The number of rotated elements, even: the result has rotary_dim / 2 frequencies.
  std::int64_t rotary_dim = 0;
  std::string rope_type = "default";
  std::optional<double> rope_theta = std::nullopt;
  std::optional<double> factor = std::nullopt;
  std::optional<double> low_freq_factor = std::nullopt;
  std::optional<double> high_freq_factor = std::nullopt;
  std::optional<std::int64_t> original_max_position_embeddings = std::nullopt;
  // rotary_dim / 2 divisors each.
  std::optional<std::vector<double>> short_factor = std::nullopt;
  std::optional<std::vector<double>> long_factor = std::nullopt;
  // Multiplies the rotated elements (yarn, longrope); derived from factor by default.
  std::optional<double> attention_factor = std::nullopt;
  // The ends of yarn's ramp, in turns over original_max_position_embeddings: 32 and 1 by default.
  std::optional<double> beta_fast = std::nullopt;
  std::optional<double> beta_slow = std::nullopt;
  // If both are given and nonzero, yarn's attention_factor is the ratio of their scales.
  std::optional<double> mscale = std::nullopt;
  std::optional<double> mscale_all_dim = std::nullopt;
  // Whether yarn's ramp starts and ends at whole pairs; true by default.
  std::optional<bool> truncate = std::nullopt;
  // For proportional only; for the other schemes rotary_dim already includes it.
  std::optional<double> partial_rotary_factor = std::nullopt;
  std::optional<std::int64_t> max_position_embeddings = std::nullopt;
  // The sequence length to compute the frequencies for (dynamic, longrope); by default within the
  // trained length.
  std::optional<std::int64_t> seq_len = std::nullopt;
  // float32 follows transformers' operations, bit for bit; float64 follows the formula.
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
};

// What frequencies returns.
struct Frequencies {
  at::Tensor inv_freq;      // (N), radians per unit of position
  double attention_factor;  // 1 except for yarn and longrope
};

// The frequencies and the attention factor of a scheme. Throws c10::ValueError for an unknown
// rope_type or a missing or invalid number, c10::TypeError if
// dtype is not float32 or float64.
ROPE_API Frequencies frequencies(const FrequencyOptions& options);

// The options of axial_frequencies.
struct AxialOptions {
  double max_wavelength = 10000.0;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
};

// (A, N) for positions on a grid (images, video): axis a rotates its own rotary_dims[a] elements,
// one axis after the other, with frequencies max_wavelength^(-2n / rotary_dims[a]).
ROPE_API at::Tensor axial_frequencies(at::IntArrayRef rotary_dims,
                                      const AxialOptions& options = {});

// (A, N) from (N): each pair keeps its frequency and follows one axis (M-RoPE). Axis a gets
// sections[a] pairs: contiguous ones, in order (Qwen2-VL), or, if interleaved, a, a + A, a + 2A,
// ..., with the remaining pairs going to axis 0 (Qwen3-VL).
ROPE_API at::Tensor mrope_frequencies(const at::Tensor& inv_freq, at::IntArrayRef sections,
                                      bool interleaved = false);

// The options of mixed_frequencies.
struct MixedOptions {
  std::int64_t num_heads = 1;
  double max_wavelength = 10.0;
  std::optional<at::Generator> generator = std::nullopt;
  at::ScalarType dtype = at::kFloat;
  at::Device device = at::kCPU;
};

// (2, num_heads * rotary_dim / 2): initial values for learned mixed frequencies (RoPE-ViT, arXiv
// 2403.13298). Each head has its own random pair of orthogonal directions in the plane. For several
// heads, rotate x with the heads folded into the axis, x.flatten(-2), interleaved.
ROPE_API at::Tensor mixed_frequencies(std::int64_t rotary_dim, const MixedOptions& options = {});

// The frequencies of dynamic for a length in a 0-d tensor on any device, never read on the host.
ROPE_API at::Tensor dynamic_frequencies(const at::Tensor& seq_len, std::int64_t rotary_dim,
                                        double rope_theta, double factor,
                                        std::int64_t max_position_embeddings,
                                        at::ScalarType dtype = at::kFloat);

}  // namespace rope
