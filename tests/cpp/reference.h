// The rotation and the norm in float64, straight from their formulas, and the error allowed in an
// output. Shares no code with the library but the option structs of rope/rope.h.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "rope/rope.h"

namespace reference {

// The error of an element before it is rounded to the output's dtype, over the norm of its pair.
inline constexpr double kFloat32Error = 0x1p-21;
// Two products and their sum, each rounded at 2^-53, in the library and here.
inline constexpr double kFloat64ErrorOfTables = 4 * 0x1p-53;
// cos and sin are within 1e-12, which moves a pair of norm 1 by at most sqrt(2) times that.
inline constexpr double kFloat64Error = 1.4143e-12 + kFloat64ErrorOfTables;
// An exponent, a power, a quotient and a product with a position, each rounded to float64, in any
// order.
inline constexpr double kErrorOfFormedAngle = 0x1p-51;

struct Expected {
  at::Tensor values;     // float64
  at::Tensor tolerance;  // before rounding to the dtype; 0 for elements that are copied
};

// Where the pairs of x are.
struct Slice {
  std::int64_t embedding_axis;
  std::int64_t rotary_offset;
  bool interleaved;
};

// The cosines and sines for the first element of each pair, and for the second.
struct Angles {
  at::Tensor cos_a, sin_a, cos_b, sin_b;
};

// How to rotate: angles and error have one column per pair, and broadcast with x without the
// embedding axis.
struct Rotation {
  Angles angle;
  at::Tensor error;
  Slice slice;
};

// The places of the first elements of the pairs and of the second.
inline std::pair<at::Tensor, at::Tensor> elements_of_pairs(const Rotation& rotation) {
  const std::int64_t num_pairs = rotation.angle.cos_a.size(-1);
  const at::Tensor n = at::arange(num_pairs);
  const at::Tensor first = rotation.slice.rotary_offset + (rotation.slice.interleaved ? 2 * n : n);
  return {first, first + (rotation.slice.interleaved ? 1 : num_pairs)};
}

inline Expected rotate(const at::Tensor& x, const Rotation& rotation) {
  const auto& [angle, error, slice] = rotation;
  const auto [first, second] = elements_of_pairs(rotation);
  const at::Tensor values = x.detach().to(at::kDouble).movedim(slice.embedding_axis, -1);
  const at::Tensor a = values.index_select(-1, first);
  const at::Tensor b = values.index_select(-1, second);
  at::Tensor rotated = values.clone();
  rotated.index_copy_(-1, first, a * angle.cos_a - b * angle.sin_a);
  rotated.index_copy_(-1, second, b * angle.cos_b + a * angle.sin_b);

  at::Tensor tolerance = at::zeros_like(values);
  tolerance.index_copy_(-1, first, at::hypot(a, b) * at::hypot(angle.cos_a, angle.sin_a) * error);
  tolerance.index_copy_(-1, second, at::hypot(a, b) * at::hypot(angle.cos_b, angle.sin_b) * error);
  return {rotated.movedim(-1, slice.embedding_axis), tolerance.movedim(-1, slice.embedding_axis)};
}

// The angle of each pair at each position, float64 of shape (..., N).
template <typename Options>
at::Tensor angles(const at::Tensor& positions, std::int64_t rotary_dim, const Options& options) {
  if (!options.inv_freq.has_value()) {
    std::vector<double> frequencies;
    for (std::int64_t n = 0; n < rotary_dim / 2; ++n) {
      const double exponent = -2.0 * static_cast<double>(n) / static_cast<double>(rotary_dim);
      frequencies.push_back(std::pow(options.max_wavelength, exponent));
    }
    return positions.to(at::kDouble).unsqueeze(-1) * at::tensor(frequencies, at::kDouble) /
           options.scale_factor;
  }
  const at::Tensor inv_freq = options.inv_freq->detach();
  const at::Tensor rounded = positions.to(inv_freq.scalar_type()).unsqueeze(-1);
  if (inv_freq.dim() == 1) {
    return (rounded * inv_freq).to(at::kDouble);
  }
  at::Tensor sum = rounded[0] * inv_freq[0];
  for (std::int64_t axis = 1; axis < inv_freq.size(0); ++axis) {
    sum = sum + rounded[axis] * inv_freq[axis];
  }
  return sum.to(at::kDouble);
}

template <typename Options>
Rotation rotation_by_positions(const at::Tensor& x, const at::Tensor& positions,
                               const Options& options) {
  const std::int64_t rotary_dim =
      options.inv_freq.has_value()
          ? 2 * options.inv_freq->size(-1)
          : options.rotary_dim.value_or(x.size(options.embedding_axis) - options.rotary_offset);
  const at::Tensor angle = angles(positions.detach(), rotary_dim, options);
  at::Tensor error =
      at::full_like(angle, x.scalar_type() == at::kDouble ? kFloat64Error : kFloat32Error);
  if (!options.inv_freq.has_value()) {
    error = error + angle.abs() * kErrorOfFormedAngle;
  }
  const at::Tensor cos = options.attention_factor * angle.cos();
  const at::Tensor sin = options.attention_factor * angle.sin();
  const at::Tensor turned = options.conjugate ? -sin : sin;
  return {{cos, turned, cos, turned},
          error,
          {options.embedding_axis, options.rotary_offset, options.interleaved}};
}

// What rope::apply should return.
inline Expected apply(const at::Tensor& x, const at::Tensor& positions,
                      const rope::ApplyOptions& options = {}) {
  return rotate(x, rotation_by_positions(x, positions, options));
}

template <typename Options>
Rotation rotation_by_tables(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                            const Options& options) {
  const auto rows_of = [&](const at::Tensor& table) {
    const at::Tensor exact = table.detach().to(at::kDouble);
    if (!options.positions.has_value()) {
      return exact;
    }
    const at::Tensor rows = options.positions->to(at::kLong);
    std::vector<std::int64_t> sizes = rows.sizes().vec();
    sizes.push_back(exact.size(1));
    return exact.index_select(0, rows.flatten()).view(sizes);
  };
  const at::Tensor used_cos = rows_of(cos);
  const at::Tensor used_sin = rows_of(sin);
  const double error_of_tables =
      x.scalar_type() == at::kDouble ? kFloat64ErrorOfTables : kFloat32Error;
  const Slice slice = {options.embedding_axis, options.rotary_offset, options.interleaved};
  if (!options.full_width) {
    const at::Tensor turned = options.conjugate ? -used_sin : used_sin;
    return {{used_cos, turned, used_cos, turned}, at::full_like(used_cos, error_of_tables), slice};
  }
  const auto halves = [&](const at::Tensor& table) -> std::pair<at::Tensor, at::Tensor> {
    const std::int64_t width = table.size(-1);
    if (options.interleaved) {
      return {table.slice(-1, 0, width, 2), table.slice(-1, 1, width, 2)};
    }
    return {table.slice(-1, 0, width / 2), table.slice(-1, width / 2)};
  };
  const auto [cos_a, cos_b] = halves(used_cos);
  const auto [sin_a, sin_b] = halves(used_sin);
  const Angles angle =
      options.conjugate ? Angles{cos_a, -sin_b, cos_b, -sin_a} : Angles{cos_a, sin_a, cos_b, sin_b};
  return {angle, at::full_like(cos_a, error_of_tables), slice};
}

// What rope::apply_cos_sin should return.
inline Expected apply_cos_sin(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin,
                              const rope::CosSinOptions& options = {}) {
  return rotate(x, rotation_by_tables(x, cos, sin, options));
}

// The error that the norm adds, over the length of the pair, or over the element outside the slice.
inline double error_of_norm(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? 1e-14 : 1e-6;
}

template <typename Options>
at::Tensor reciprocal_root(const at::Tensor& x, const Options& options) {
  const std::vector<std::int64_t> axes =
      options.norm_axes.value_or(std::vector<std::int64_t>{options.embedding_axis});
  return (x.square().mean(axes, /*keepdim=*/true) + options.eps).rsqrt();
}

// Of each element the magnitude of its own, or for a pair that of the larger.
inline at::Tensor largest_of_pairs(const at::Tensor& x, const Rotation& rotation) {
  const auto [first, second] = elements_of_pairs(rotation);
  at::Tensor largest = x.abs().movedim(rotation.slice.embedding_axis, -1).clone();
  const at::Tensor of_pair =
      at::maximum(largest.index_select(-1, first), largest.index_select(-1, second));
  largest.index_copy_(-1, first, of_pair).index_copy_(-1, second, of_pair);
  return largest.movedim(-1, rotation.slice.embedding_axis);
}

// The norm of x and its rotation, in the order that the options give.
template <typename Options>
Expected norm_and_rotate(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         Rotation rotation, const Options& options) {
  const at::Tensor values = x.detach().to(at::kDouble);
  at::Tensor gain = at::ones_like(values);
  if (weight.has_value()) {
    const at::Tensor given = weight->detach().to(at::kDouble) + options.weight_offset;
    gain = given.expand_as(values.movedim(options.embedding_axis, -1))
               .movedim(-1, options.embedding_axis);
  }
  rotation.error = rotation.error + error_of_norm(x);
  const Expected rotated = rotate(values, rotation);
  const at::Tensor root = reciprocal_root(options.norm_last ? rotated.values : values, options);
  const at::Tensor result = options.norm_last ? rotated.values * root * gain
                                              : rotate(values * root * gain, rotation).values;
  // Outside the slice the error is that of the norm alone.
  const at::Tensor tolerance =
      at::where(rotated.tolerance > 0, rotated.tolerance, error_of_norm(x) * values.abs());
  return {result, tolerance * root * largest_of_pairs(gain, rotation)};
}

// What rope::norm_apply should return.
inline Expected norm_apply(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                           const at::Tensor& positions, const rope::NormOptions& options = {}) {
  return norm_and_rotate(x, weight, rotation_by_positions(x, positions, options), options);
}

// What rope::norm_apply_cos_sin should return.
inline Expected norm_apply_cos_sin(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                   const at::Tensor& cos, const at::Tensor& sin,
                                   const rope::NormCosSinOptions& options = {}) {
  return norm_and_rotate(x, weight, rotation_by_tables(x, cos, sin, options), options);
}

// The error of a normalized element before it is rounded, over the length of its pair, besides that
// of the rotation.
inline double norm_error(at::ScalarType dtype) { return dtype == at::kDouble ? 1e-14 : 1e-6; }

// One tensor of norm_apply. The weight has the shape of x, or is undefined.
struct Norm {
  at::Tensor weight;
  double weight_offset;
  double eps;
  std::vector<std::int64_t> axes;
  bool is_last;
};

// For each element of a pair, the length of the pair, or with `largest` the larger magnitude; for
// elements outside the slice, the magnitude.
inline at::Tensor lengths(const at::Tensor& x, std::int64_t num_pairs, const Slice& slice,
                          bool largest = false) {
  const at::Tensor values = x.abs().movedim(slice.embedding_axis, -1).contiguous();
  const at::Tensor n = at::arange(num_pairs);
  const at::Tensor first = slice.rotary_offset + (slice.interleaved ? 2 * n : n);
  const at::Tensor second = first + (slice.interleaved ? 1 : num_pairs);
  const at::Tensor a = values.index_select(-1, first);
  const at::Tensor b = values.index_select(-1, second);
  const at::Tensor of_pair = largest ? at::max(a, b) : at::hypot(a, b);
  at::Tensor result = values.clone();
  result.index_copy_(-1, first, of_pair);
  result.index_copy_(-1, second, of_pair);
  return result.movedim(-1, slice.embedding_axis);
}

// What norm_apply should return. rotate is the reference of the rotation, of float64 tensors with
// the error of x's dtype, which changes the length of a pair by at most the factor `growth`.
template <typename Rotate>
Expected norm_apply(const at::Tensor& x, const Norm& norm, const Rotate& rotate,
                    std::int64_t num_pairs, const Slice& slice, double growth) {
  const at::Tensor exact = x.detach().to(at::kDouble);
  // Numbers are converted to the opmath type first.
  const auto real = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto converted = [&](double number) {
    return real == at::kDouble ? number : static_cast<double>(static_cast<float>(number));
  };
  const at::Tensor gain = norm.weight.defined()
                              ? norm.weight.to(real).to(at::kDouble) + converted(norm.weight_offset)
                              : at::ones_like(exact);
  const at::Tensor larger_gain = lengths(gain, num_pairs, slice, /*largest=*/true);
  const auto root = [&](const at::Tensor& of) {
    return ((of * of).mean(norm.axes, /*keepdim=*/true) + converted(norm.eps)).rsqrt();
  };
  if (norm.is_last) {
    const Expected rotated = rotate(exact);
    const at::Tensor scale = root(rotated.values);
    const at::Tensor n = rotated.values * scale;
    const at::Tensor error = lengths(n, num_pairs, slice) * norm_error(x.scalar_type());
    return {n * gain, (rotated.tolerance * scale + error) * larger_gain};
  }
  const at::Tensor n = exact * root(exact);
  const Expected rotated = rotate(n * gain);
  const at::Tensor error = lengths(n, num_pairs, slice) * norm_error(x.scalar_type()) * growth;
  return {rotated.values, rotate(n).tolerance * larger_gain + error * larger_gain};
}

// The largest error of rounding a number of this magnitude to the dtype.
inline at::Tensor half_ulp(const at::Tensor& magnitude, at::ScalarType dtype) {
  double epsilon = std::numeric_limits<double>::epsilon();
  double smallest = std::numeric_limits<double>::min();
  if (dtype == at::kFloat) {
    epsilon = std::numeric_limits<float>::epsilon();
    smallest = std::numeric_limits<float>::min();
  } else if (dtype == at::kHalf) {
    epsilon = std::numeric_limits<c10::Half>::epsilon();
    smallest = std::numeric_limits<c10::Half>::min();
  } else if (dtype == at::kBFloat16) {
    epsilon = std::numeric_limits<c10::BFloat16>::epsilon();
    smallest = std::numeric_limits<c10::BFloat16>::min();
  }
  const at::Tensor exponent = std::get<1>(at::frexp(magnitude.clamp_min(smallest)));
  return at::ldexp(at::full_like(magnitude, epsilon / 4), exponent);
}

// Whether actual is what was expected, each element rounded once.
inline testing::AssertionResult is_rotated(const at::Tensor& actual, const Expected& expected) {
  const auto& [values, tolerance] = expected;
  if (actual.sizes() != values.sizes()) {
    return testing::AssertionFailure()
           << "the shape is " << actual.sizes() << " instead of " << values.sizes();
  }
  const at::Tensor rounding = half_ulp(values.abs() + tolerance, actual.scalar_type());
  const at::Tensor allowed =
      at::where(tolerance > 0, tolerance + rounding, at::zeros_like(tolerance));
  const at::Tensor errors = (actual.detach().cpu().to(at::kDouble) - values).abs();
  const at::Tensor wrong = (errors <= allowed).logical_not().flatten().nonzero();
  if (wrong.size(0) == 0) {
    return testing::AssertionSuccess();
  }
  const auto first = wrong[0][0].item<std::int64_t>();
  const auto at_first = [&](const at::Tensor& tensor) {
    return tensor.flatten()[first].item<double>();
  };
  return testing::AssertionFailure()
         << wrong.size(0) << " of " << values.numel() << " elements are wrong; element " << first
         << " of " << values.sizes() << " is " << at_first(actual.detach().to(at::kDouble).cpu())
         << " instead of " << at_first(values) << ", off by " << at_first(errors) << " where "
         << at_first(allowed) << " is allowed";
}

// The elements as integers of the same size, in order.
inline at::Tensor bits(const at::Tensor& x) {
  const at::ScalarType integer = x.element_size() == 8   ? at::kLong
                                 : x.element_size() == 4 ? at::kInt
                                                         : at::kShort;
  return x.detach().clone(at::MemoryFormat::Contiguous).view(integer);
}

// Whether two tensors agree in dtype, shape and every bit of every element.
inline testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  if (actual.scalar_type() != expected.scalar_type() || actual.sizes() != expected.sizes()) {
    return testing::AssertionFailure()
           << "dtype or shape differ: " << actual.scalar_type() << " " << actual.sizes()
           << " instead of " << expected.scalar_type() << " " << expected.sizes();
  }
  const auto differing = (bits(actual) != bits(expected)).sum().item<std::int64_t>();
  if (differing == 0) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure()
         << differing << " of " << actual.numel() << " elements differ in their bits";
}

// Normally distributed, the same in every run.
inline at::Tensor random_values(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat,
                                std::uint64_t seed = 0) {
  return at::randn(sizes, at::detail::createCPUGenerator(seed), at::kDouble).to(dtype);
}

// In [low, high), in eighths where the dtype has fractions.
inline at::Tensor random_positions(at::IntArrayRef sizes, at::ScalarType dtype = at::kLong,
                                   std::int64_t low = -65536, std::int64_t high = 65536) {
  const at::Tensor eighths =
      at::randint(8 * low, 8 * high, sizes, at::detail::createCPUGenerator(1), at::kLong);
  return at::isFloatingType(dtype) ? (eighths.to(at::kDouble) / 8).to(dtype)
                                   : at::floor_divide(eighths, 8).to(dtype);
}

// Between 0 and 1 radians per unit of position.
inline at::Tensor random_inv_freq(at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  return at::rand(sizes, at::detail::createCPUGenerator(2), at::kDouble).to(dtype);
}

inline constexpr at::ScalarType kFloatDtypes[] = {at::kDouble, at::kFloat, at::kHalf,
                                                  at::kBFloat16};
inline constexpr at::ScalarType kPositionDtypes[] = {at::kInt, at::kLong, at::kFloat, at::kDouble};

}  // namespace reference
