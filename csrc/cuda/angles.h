// Cosines and sines of a token in the CUDA kernels: where its angles come from, and how a thread
// finds the rotations of a few neighboring pairs.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "angle.h"
#include "cuda/sincos.h"
#include "launch.h"
#include "rotation.h"
#include "unsupported_dtype.h"

namespace rope::cuda {

enum class AngleSource : int {
  kTurns,    // integer positions, frequencies in turns: see NOTE [ Angles in turns ]
  kFloat32,  // float32 inv_freq
  kFloat64,  // float64 inv_freq, or frequencies of max_wavelength
  kTables,
};

struct AngleParams {
  AngleSource source;
  bool conjugate;
  union {
    PositionAngles position_angles;  // inv_freq is device memory, whatever the source
    TableAngles table_angles;
  };
};

inline void set_options(const Launch& launch, AngleParams& params) {
  params.conjugate = launch.conjugate;
}

// ---- From positions ----

// The position of a token if the source is kTurns, else 0.
template <typename Index>
C10_HOST_DEVICE inline std::uint64_t load_integer_position(const AngleParams& params,
                                                           Index offset) {
  const PositionAngles& source = params.position_angles;
  return params.source == AngleSource::kTurns
             ? static_cast<std::uint64_t>(
                   load_position<std::int64_t>(source.positions, source.positions_dtype, offset))
             : 0;
}

// Angles of kCount neighboring pairs in radians, not yet divided by scale_factor.
template <typename Frequency, typename Real, int kCount, typename Index>
C10_HOST_DEVICE inline void form_angles(const PositionAngles& source, Index position_offset,
                                        Index first_pair, Real (&angles)[kCount]) {
  const auto load = [&](int axis) {
    return load_position<Frequency>(source.positions, source.positions_dtype,
                                    position_offset + axis * source.positions_axis_stride);
  };
  const auto* inv_freq = static_cast<const Frequency*>(source.inv_freq);
  const Frequency first = load(0);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    angles[i] = static_cast<Real>(form_angle<Frequency>(
        source.num_axes, [&](int axis) { return axis == 0 ? first : load(axis); },
        [&](int axis) {
          return inv_freq[axis * source.inv_freq_axis_stride +
                          (first_pair + i) * source.inv_freq_stride];
        },
        1.0));
  }
}

// The angle in turns of an integer position and a frequency in turns.
C10_HOST_DEVICE inline std::uint64_t form_turns(std::uint64_t position, std::uint64_t frequency) {
  return sum_products<std::uint64_t>(
      1, [=](int) { return position; }, [=](int) { return frequency; });
}

// Rotations of kCount neighboring pairs of the token whose positions begin at the offset; if the
// source is kTurns, of the given angles in turns.
// Uses float64 only for x of float64 or, with kHasFloat64, if the source is kFloat64.
template <bool kHasFloat64, typename Real, int kCount, typename Index>
C10_HOST_DEVICE inline void find_rotations_from_positions(const AngleParams& params,
                                                          Index position_offset, Index first_pair,
                                                          const std::uint64_t (&turns)[kCount],
                                                          Rotation<Real> (&rotations)[kCount]) {
  const PositionAngles& source = params.position_angles;
  if (std::is_same_v<Real, float> && params.source == AngleSource::kTurns) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Rotation<float> rotation = rotation_of_turns(turns[i]);
      rotations[i] = {rotation.cos, rotation.sin};
    }
  } else if (std::is_same_v<Real, float> &&
             (!kHasFloat64 || params.source == AngleSource::kFloat32)) {
    float angles[kCount];
    form_angles<float>(source, position_offset, first_pair, angles);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Rotation<float> rotation = rotation_of_float32(angles[i]);
      rotations[i] = {rotation.cos, rotation.sin};
    }
  } else if constexpr (kHasFloat64) {
    double angles[kCount];
    if (params.source == AngleSource::kFloat32) {
      form_angles<float>(source, position_offset, first_pair, angles);
    } else {
      form_angles<double>(source, position_offset, first_pair, angles);
    }
    find_rotations(angles, source.scale_factor, rotations);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    rotations[i] =
        scale(rotations[i], static_cast<Real>(source.attention_factor), params.conjugate);
  }
}

// ---- From cos/sin tables ----

// The rotation of pair n of the token that the offsets belong to. Requires has_table_row().
template <typename Real, bool kFullWidth, typename Index, int kArrays>
C10_HOST_DEVICE inline PairRotation<Real, kFullWidth> load_from_tables(
    const AngleParams& params, const Index (&offsets)[kArrays], Index n, Index num_pairs,
    bool interleaved) {
  const TableAngles& table = params.table_angles;
  PairRotation<Real, kFullWidth> rotation;
  const auto load = [&](auto element) {
    const auto row = find_table_row<decltype(element)>(table, offsets[kAngle], offsets[kSin]);
    if constexpr (kFullWidth) {
      rotation = load_full_rotation<Real>(table, row, n, num_pairs, interleaved);
      if (params.conjugate) {
        rotation = transpose(rotation);
      }
    } else {
      rotation = scale(load_rotation<Real>(table, row, n), Real(1), params.conjugate);
    }
  };
  switch (table.dtype) {
    case c10::ScalarType::Double:
      load(double{});
      break;
    case c10::ScalarType::Float:
      load(float{});
      break;
    case c10::ScalarType::Half:
      load(c10::Half{});
      break;
    case c10::ScalarType::BFloat16:
      load(c10::BFloat16{});
      break;
    default:
      fail_for_dtype(table.dtype);
  }
  return rotation;
}

}  // namespace rope::cuda
