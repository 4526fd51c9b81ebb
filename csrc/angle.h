// From the description of a launch to the angle of one pair of one token.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

#include <cstdint>

#include "launch.h"
#include "rotation.h"
#include "unsupported_dtype.h"

namespace rope {

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
      fail_for_dtype(dtype);
      return {};
  }
}

// Products of positions and frequencies over the axes, and their sum from left to right, each
// rounded to Frequency. position(axis) and inv_freq(axis) give the factors.
template <typename Frequency, typename Position, typename InvFreq>
C10_HOST_DEVICE inline Frequency sum_products(int num_axes, const Position& position,
                                              const InvFreq& inv_freq) {
  Frequency sum = position(0) * inv_freq(0);
  for (int axis = 1; axis < num_axes; ++axis) {
    sum = sum + position(axis) * inv_freq(axis);
  }
  return sum;
}

// The angle of one pair, in radians.
template <typename Frequency, typename Position, typename InvFreq>
C10_HOST_DEVICE inline double form_angle(int num_axes, const Position& position,
                                         const InvFreq& inv_freq, double scale_factor) {
  const auto sum = static_cast<double>(sum_products<Frequency>(num_axes, position, inv_freq));
  return scale_factor == 1.0 ? sum : sum / scale_factor;
}

// Where a token's cosines and sines are in tables of elements of type Table.
template <typename Table>
struct TableRow {
  const Table* cos;
  const Table* sin;
};

// Whether the tables have the row that a token names.
C10_HOST_DEVICE inline bool has_table_row(const TableAngles& table, std::int64_t angle_offset) {
  if (table.rows == nullptr) {
    return true;
  }
  const auto row = load_position<std::int64_t>(table.rows, table.rows_dtype, angle_offset);
  return 0 <= row && row < table.num_rows;
}

// Only of a row that the tables have. (The CPU looks before it starts: check_rows_exist.)
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

// That of pair n in full-width tables.
template <typename Real, typename Table>
C10_HOST_DEVICE inline FullRotation<Real> load_full_rotation(const TableAngles& table,
                                                             const TableRow<Table>& row,
                                                             std::int64_t n, std::int64_t num_pairs,
                                                             bool interleaved) {
  return {load_rotation<Real>(table, row, interleaved ? 2 * n : n),
          load_rotation<Real>(table, row, interleaved ? 2 * n + 1 : n + num_pairs)};
}

}  // namespace rope
