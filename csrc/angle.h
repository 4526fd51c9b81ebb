// From the description of a launch to the angle of one pair of one token.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/macros/Macros.h>

#include <cstdint>

#include "rotate.h"
#include "rotation.h"

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
    default:
      return static_cast<Number>(static_cast<const double*>(positions)[offset]);
  }
}

// The angle of one pair, in radians: products of positions and frequencies over the axes, and their
// sum from left to right, each rounded to Frequency. position(axis) and inv_freq(axis) give the
// factors. For the host; a thread of a device forms those of several pairs (cuda/rotate_thread.h).
template <typename Frequency, typename Position, typename InvFreq>
inline double form_angle(int num_axes, const Position& position, const InvFreq& inv_freq,
                         double scale_factor) {
  Frequency sum = position(0) * inv_freq(0);
  for (int axis = 1; axis < num_axes; ++axis) {
    sum = sum + position(axis) * inv_freq(axis);
  }
  return scale_factor == 1.0 ? static_cast<double>(sum) : static_cast<double>(sum) / scale_factor;
}

// Where a token's cosines and sines are in tables of elements of type Table.
template <typename Table>
struct TableRow {
  const Table* cos;
  const Table* sin;
};

template <typename Table>
C10_HOST_DEVICE inline TableRow<Table> find_table_row(const TableAngles& table,
                                                      std::int64_t angle_offset,
                                                      std::int64_t sin_offset) {
  std::int64_t cos_offset = angle_offset;
  if (table.rows != nullptr) {
    const auto row = load_position<std::int64_t>(table.rows, table.rows_dtype, angle_offset);
    // The CPU has looked before (check_rows_exist); a device cannot, and stops here.
    CUDA_KERNEL_ASSERT(0 <= row && row < table.num_rows);
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
C10_HOST_DEVICE inline FullRotation<Real> load_full_rotation(const Launch& launch,
                                                             const TableRow<Table>& row,
                                                             std::int64_t n) {
  const std::int64_t a = launch.interleaved ? 2 * n : n;
  const std::int64_t b = launch.interleaved ? 2 * n + 1 : n + launch.num_pairs;
  return {load_rotation<Real>(launch.by_table, row, a),
          load_rotation<Real>(launch.by_table, row, b)};
}

}  // namespace rope
