// torch-rope: rotary position embedding (arXiv 2104.09864) as PyTorch operators.
//
//   #include <rope/rope.h>
//
//   at::Tensor y = rope::apply(x, positions);
//   at::Tensor z = rope::apply(x, positions, {.max_wavelength = 5e5, .interleaved = true});
//   auto [q2, k2] = rope::apply_qk(q, k, positions, {.inv_freq = inv_freq});
//   auto [q3, k3] = rope::norm_apply_qk(q, k, q_weight, k_weight, positions, {.eps = 1e-5});
//
// The functions below call the operators rope::apply, rope::norm_apply, ... through the PyTorch
// dispatcher: autograd, tracing and devices work as for PyTorch's own operators.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#if defined(_WIN32)
#define ROPE_API
#else
#define ROPE_API __attribute__((visibility("default")))
#endif

namespace rope {

// How positions become angles, and where the pairs are in x.
struct ApplyOptions {
  // (N) or (A, N), float32 or float64: radians per unit of position. With A rows, positions have a
  // leading dimension of size A and the angle is the sum over the rows. Without inv_freq, the angle
  // of pair n is position * max_wavelength^(-2n / rotary_dim) / scale_factor radians.
  std::optional<at::Tensor> inv_freq = std::nullopt;
  // The dimension of x to rotate; negative counts from the end.
  std::int64_t embedding_axis = -1;
  // The number of rotated elements, even; by default 2 N with inv_freq, else all from rotary_offset
  // on. 0 rotates nothing.
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  // The first rotated element; elements outside the slice are unchanged.
  std::int64_t rotary_offset = 0;
  // The base of the frequencies (Hugging Face's rope_theta), positive. Not together with inv_freq.
  double max_wavelength = 10000.0;
  // Divides the angle (linear position interpolation), positive. Not together with inv_freq.
  double scale_factor = 1.0;
  // Multiplies the rotated elements (YaRN's attention scaling); finite.
  double attention_factor = 1.0;
  // Pairs are (2n, 2n + 1) instead of (n, n + N).
  bool interleaved = false;
  // Rotate by the negative angle: the transpose, which is the inverse if attention_factor is 1.
  bool conjugate = false;
};

// The options for tables of cosines and sines. Those without a comment are those of ApplyOptions.
struct CosSinOptions {
  // int32 or int64: the rows of the (P, N) tables to use. Without positions the tables themselves
  // broadcast with x.
  std::optional<at::Tensor> positions = std::nullopt;
  std::int64_t embedding_axis = -1;
  // Follows from the tables' width and, if given, must match it.
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
  bool conjugate = false;
  // The tables have 2 N columns, one per element of the rotated slice, in the slice's order, as in
  // Hugging Face and diffusers: element a of a pair becomes a cos_a - b sin_a and b becomes
  // b cos_b + a sin_b; with conjugate the transpose, a cos_a + b sin_b and b cos_b - a sin_a.
  bool full_width = false;
};

// The options of norm_apply: those of ApplyOptions, with the same meanings, and of the RMSNorm.
struct NormOptions {
  std::optional<at::Tensor> inv_freq = std::nullopt;
  std::int64_t embedding_axis = -1;
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  std::int64_t rotary_offset = 0;
  double max_wavelength = 10000.0;
  double scale_factor = 1.0;
  double attention_factor = 1.0;
  bool interleaved = false;
  bool conjugate = false;
  // Added to the mean of the squares, at least 0.
  double eps = 1e-6;
  // Added to the weight, finite: 1 for Gemma's norms.
  double weight_offset = 0.0;
  // The dimensions of x whose elements have one mean, among them the embedding axis; by default it
  // alone. Negative ones count from the end: {-2, -1} is the norm over all heads of (B, S, H, D).
  std::optional<std::vector<std::int64_t>> norm_axes = std::nullopt;
  // Normalize after the rotation instead of before it.
  bool norm_last = false;
};

// The options of norm_apply_cos_sin: those of CosSinOptions, and those of the RMSNorm in
// NormOptions, with the same meanings.
struct NormCosSinOptions {
  std::optional<at::Tensor> positions = std::nullopt;
  std::int64_t embedding_axis = -1;
  std::optional<std::int64_t> rotary_dim = std::nullopt;
  std::int64_t rotary_offset = 0;
  bool interleaved = false;
  bool conjugate = false;
  bool full_width = false;
  double eps = 1e-6;
  double weight_offset = 0.0;
  std::optional<std::vector<std::int64_t>> norm_axes = std::nullopt;
  bool norm_last = false;
};

// Rotates pairs of elements of x, which may have any shape and strides, and dtype float64, float32,
// float16 or bfloat16. positions (int32, int64, float32 or float64) broadcast with the shape of x
// without the embedding axis: (S, 1) for x of shape (B, S, H, D), (S) for (B, H, S, D). Throws
// c10::ValueError, c10::TypeError or c10::IndexError for invalid arguments.
ROPE_API at::Tensor apply(const at::Tensor& x, const at::Tensor& positions,
                          const ApplyOptions& options = {});

// Rotates both tensors by the same angles, in one launch. They may differ in rank, sizes, strides
// and dtype.
ROPE_API std::tuple<at::Tensor, at::Tensor> apply_qk(const at::Tensor& q, const at::Tensor& k,
                                                     const at::Tensor& positions,
                                                     const ApplyOptions& options = {});

// Rotates x in place and returns it. No two of its elements may overlap in memory.
ROPE_API at::Tensor apply_(const at::Tensor& x, const at::Tensor& positions,
                           const ApplyOptions& options = {});

// Rotates both tensors in place and returns them. Views of one buffer are fine if they share no
// element.
ROPE_API std::tuple<at::Tensor, at::Tensor> apply_qk_(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& positions,
                                                      const ApplyOptions& options = {});

// Rotates by the caller's tables, of any floating-point dtype: cos and sin of shape (..., N), where
// (...) broadcasts with the shape of x without the embedding axis; with positions, of shape (P, N).
// With full_width they have 2 N columns. Throws as apply does; c10::IndexError, too, for a row that
// the tables do not have (on CUDA a device-side assertion).
ROPE_API at::Tensor apply_cos_sin(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                                  const CosSinOptions& options = {});

// Rotates both tensors by the same tables, in one launch.
ROPE_API std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk(const at::Tensor& q,
                                                             const at::Tensor& k,
                                                             const at::Tensor& cos,
                                                             const at::Tensor& sin,
                                                             const CosSinOptions& options = {});

// Rotates x in place by the tables and returns it.
ROPE_API at::Tensor apply_cos_sin_(const at::Tensor& x, const at::Tensor& cos,
                                   const at::Tensor& sin, const CosSinOptions& options = {});

// Rotates both tensors in place by the tables and returns them.
ROPE_API std::tuple<at::Tensor, at::Tensor> apply_cos_sin_qk_(const at::Tensor& q,
                                                              const at::Tensor& k,
                                                              const at::Tensor& cos,
                                                              const at::Tensor& sin,
                                                              const CosSinOptions& options = {});

// RMSNorm and rotation in one pass over memory. With n = x / sqrt(mean(x^2 over norm_axes) + eps),
// which includes the elements outside the rotated slice, the result is
//
//     rotate(n * (weight_offset + weight))
//
// or with norm_last that of normalizing and weighting what the rotation returns. All in the opmath
// type; each element is rounded once. weight, of any floating-point dtype, has shape (..., D),
// where D is the size of the embedding axis and (...) broadcasts with the shape of x without it:
// (D), or (H, D) for x of shape (B, S, H, D). Without weight, which may be nullopt, nothing
// multiplies. Throws as apply does.
ROPE_API at::Tensor norm_apply(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const at::Tensor& positions, const NormOptions& options = {});

// Normalizes each tensor with its own weight, and rotates both by the same angles, in one launch.
ROPE_API std::tuple<at::Tensor, at::Tensor> norm_apply_qk(const at::Tensor& q, const at::Tensor& k,
                                                          const std::optional<at::Tensor>& q_weight,
                                                          const std::optional<at::Tensor>& k_weight,
                                                          const at::Tensor& positions,
                                                          const NormOptions& options = {});

// Normalizes and rotates x in place and returns it.
ROPE_API at::Tensor norm_apply_(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                const at::Tensor& positions, const NormOptions& options = {});

// Normalizes and rotates both tensors in place and returns them.
ROPE_API std::tuple<at::Tensor, at::Tensor> norm_apply_qk_(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& q_weight,
    const std::optional<at::Tensor>& k_weight, const at::Tensor& positions,
    const NormOptions& options = {});

// Normalizes as norm_apply does, and rotates by the caller's tables as apply_cos_sin does.
ROPE_API at::Tensor norm_apply_cos_sin(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                       const at::Tensor& cos, const at::Tensor& sin,
                                       const NormCosSinOptions& options = {});

// Normalizes each tensor with its own weight, and rotates both by the same tables, in one launch.
ROPE_API std::tuple<at::Tensor, at::Tensor> norm_apply_cos_sin_qk(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& q_weight,
    const std::optional<at::Tensor>& k_weight, const at::Tensor& cos, const at::Tensor& sin,
    const NormCosSinOptions& options = {});

// Normalizes and rotates x in place by the tables and returns it.
ROPE_API at::Tensor norm_apply_cos_sin_(const at::Tensor& x,
                                        const std::optional<at::Tensor>& weight,
                                        const at::Tensor& cos, const at::Tensor& sin,
                                        const NormCosSinOptions& options = {});

// Normalizes and rotates both tensors in place by the tables and returns them.
ROPE_API std::tuple<at::Tensor, at::Tensor> norm_apply_cos_sin_qk_(
    const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& q_weight,
    const std::optional<at::Tensor>& k_weight, const at::Tensor& cos, const at::Tensor& sin,
    const NormCosSinOptions& options = {});

}  // namespace rope
