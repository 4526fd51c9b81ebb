// The angle of one pair of one token: formed here for the CPU kernel, the CUDA kernels and the
// decomposition, or loaded as a cosine and a sine from the caller's tables.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "rotation.h"
#include "unsupported_dtype.h"

namespace rope {

// NOTE [ How an angle is formed ]
//
//   angle = (position[0] * inv_freq[0, n] + position[1] * inv_freq[1, n] + ...) / scale_factor
//
// Products and their sum, from left to right, are rounded to the dtype of inv_freq; the rest is
// float64. Number is the arithmetic of the caller:
//
//   float, double   one pair of one token (loops over n that the CPU compiler vectorizes)
//   std::uint64_t   the same in fixed-point turns (NOTE [ Angles in turns ]), whose frequencies are
//                   divided by scale_factor beforehand
//   at::Tensor      all pairs of all tokens, in the decomposition

// The sum including the product of `axis`. The CPU kernel loops over axes outside, over pairs
// inside.
template <typename Number>
C10_HOST_DEVICE inline Number add_product(int axis, const Number& sum, const Number& position,
                                          const Number& inv_freq) {
  return axis == 0 ? position * inv_freq : sum + position * inv_freq;
}

// position(axis) and inv_freq(axis) give the factors.
template <typename Number, typename Position, typename InvFreq>
C10_HOST_DEVICE inline Number sum_products(int num_axes, const Position& position,
                                           const InvFreq& inv_freq) {
  Number sum = position(0) * inv_freq(0);
  for (int axis = 1; axis < num_axes; ++axis) {
    sum = add_product<Number>(axis, sum, position(axis), inv_freq(axis));
  }
  return sum;
}

template <typename Number>
C10_HOST_DEVICE inline Number divide_by_scale(const Number& sum, double scale_factor) {
  return scale_factor == 1.0 ? sum : Number(sum / scale_factor);
}

// In radians. Scalars become float64; a tensor keeps its dtype, which is float64 already if there
// is a scale_factor to divide by.
template <typename Number, typename Position, typename InvFreq>
C10_HOST_DEVICE inline auto form_angle(int num_axes, const Position& position,
                                       const InvFreq& inv_freq, double scale_factor) {
  static_assert(!std::is_integral_v<Number>, "the sum of products in turns is the angle");
  using Angle = std::conditional_t<std::is_floating_point_v<Number>, double, Number>;
  const auto sum = static_cast<Angle>(sum_products<Number>(num_axes, position, inv_freq));
  return divide_by_scale(sum, scale_factor);
}

// inv_freq of pair n where the caller gives max_wavelength, in radians per unit of position.
template <typename Real>
inline Real wavelength_frequency(double max_wavelength, std::int64_t n, std::int64_t num_pairs) {
  return std::pow(static_cast<Real>(max_wavelength),
                  -static_cast<Real>(n) / static_cast<Real>(num_pairs));
}

// On a device, requires check_position_dtype() before the launch.
template <typename Number>
C10_HOST_DEVICE inline Number load_position(const void* positions, c10::ScalarType dtype,
                                            std::int64_t offset) {
  switch (dtype) {
    case c10::ScalarType::Int:
      return static_cast<Number>(static_cast<const std::int32_t*>(positions)[offset]);
    case c10::ScalarType::Long:
      return static_cast<Number>(static_cast<const std::int64_t*>(positions)[offset]);
    case c10::ScalarType::Float:
      return static_cast<Number>(static_cast<const float*>(positions)[offset]);
    case c10::ScalarType::Double:
      return static_cast<Number>(static_cast<const double*>(positions)[offset]);
    default:
      fail_for_dtype_on_host(dtype);
      return {};
  }
}

// Throws for a dtype that load_position does not read.
inline void check_position_dtype(c10::ScalarType dtype) {
  const double any_position = 0;
  load_position<double>(&any_position, dtype, 0);
}

// ---- Tables of cosines and sines ----

// The first column of a token's cosines and sines.
template <typename Table>
struct TableRow {
  const Table* cos;
  const Table* sin;
};

// Whether the row index of a token, if it has one, is within the tables.
C10_HOST_DEVICE inline bool has_table_row(const TableAngles& table, std::int64_t angle_offset) {
  if (table.rows == nullptr) {
    return true;
  }
  const auto row = load_position<std::int64_t>(table.rows, table.rows_dtype, angle_offset);
  return 0 <= row && row < table.num_rows;
}

// Requires has_table_row(). (The CPU checks all rows before it starts: check_rows_exist.)
template <typename Table>
C10_HOST_DEVICE inline TableRow<Table> find_table_row(const TableAngles& table,
                                                      std::int64_t angle_offset,
                                                      std::int64_t sin_offset) {
  std::int64_t cos_offset = angle_offset;
  if (table.rows != nullptr) {
    const auto row = load_position<std::int64_t>(table.rows, table.rows_dtype, angle_offset);
    cos_offset = row * table.cos_row_stride;
    sin_offset = row * table.sin_row_stride;
  }
  return {static_cast<const Table*>(table.cos) + cos_offset,
          static_cast<const Table*>(table.sin) + sin_offset};
}

template <typename Real, typename Table>
C10_HOST_DEVICE inline Rotation<Real> load_rotation(const TableAngles& table,
                                                    const TableRow<Table>& row,
                                                    std::int64_t column) {
  return {static_cast<Real>(row.cos[column * table.cos_stride]),
          static_cast<Real>(row.sin[column * table.sin_stride])};
}

// The columns of both elements of pair n in full-width tables.
template <typename Index>
C10_HOST_DEVICE inline Pair<Index> full_width_columns(Index n, Index num_pairs, bool interleaved) {
  return {interleaved ? 2 * n : n, interleaved ? 2 * n + 1 : n + num_pairs};
}

template <typename Real, typename Table>
C10_HOST_DEVICE inline FullRotation<Real> load_full_rotation(const TableAngles& table,
                                                             const TableRow<Table>& row,
                                                             std::int64_t n, std::int64_t num_pairs,
                                                             bool interleaved) {
  const auto columns = full_width_columns(n, num_pairs, interleaved);
  return {load_rotation<Real>(table, row, columns.a), load_rotation<Real>(table, row, columns.b)};
}

}  // namespace rope
