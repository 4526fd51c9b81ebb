// The cosines and sines of a block. Part of cpu/rotate_kernel.cpp: compiled once for each CPU
// capability.
#pragma once

#include <limits>
#include <type_traits>

#include "angle.h"
#include "cpu/dispatch.h"
#include "cpu/kernel.h"
#include "cpu/step.h"

namespace rope::cpu {

namespace {

// NOTE [ Rows of angles ]
//
// Cosines and sines are laid out as the vectors that they multiply. Along the embedding axis a row
// has the angles of one token, with a slot for each pair. Along tokens it has the angles of one
// pair, with a slot for each token. Along heads, which share the angle, a row is that of one token,
// and a slot is broadcast. Forming an angle is the same for all: the factor (position or frequency)
// of the row times the other factor of the slot.
template <typename scalar_t>
struct AngleRows {
  using Real = at::opmath_type<scalar_t>;
  Real* cos;
  Real* sin;
  std::int64_t stride;  // from row to row
  std::int64_t half;    // with full width, to the angles of the second elements of pairs
};

template <typename scalar_t>
ROPE_INLINE bool is_deinterleaved(Along along, bool interleaved) {
  return Step<scalar_t>::kDeinterleaved &&
         (along == Along::kTokens || (along == Along::kAxis && !interleaved));
}

// Calls visit(slot, i) with the pair or token i of each slot, in the order of the vectors of a
// step. There are `count` pairs or tokens. The last step of a row of pairs is shifted back: see
// NOTE [ Steps of a row ] in cpu/rows.h.
template <typename scalar_t, typename Visit>
ROPE_INLINE void for_each_slot(Along along, bool interleaved, std::int64_t count,
                               const Visit& visit) {
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  const bool deinterleaved = is_deinterleaved<scalar_t>(along, interleaved);
  for (std::int64_t step = 0; step < count; step += kSize) {
    const bool is_shifted = along == Along::kAxis && step + kSize > count && count > kSize;
    const std::int64_t begin = is_shifted ? count - kSize : step;
    const std::int64_t size = count - begin < kSize ? count - begin : kSize;
    if (deinterleaved) {
      for (std::int64_t i = 0; i < size; ++i) {
        visit(step + i / 2 + i % 2 * (kSize / 2), begin + i);
      }
    } else {
      for (std::int64_t i = 0; i < size; ++i) {
        visit(step + i, begin + i);
      }
    }
  }
}

// The same for a row of pairs that is there already.
template <typename scalar_t, typename Real>
ROPE_INLINE void arrange_in_steps(const Real* from, Real* to, std::int64_t count,
                                  bool deinterleaved) {
  using Vector = Vectorized<Real>;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  for (std::int64_t step = 0; step < count; step += kSize) {
    const Real* begin = from + (step + kSize > count && count > kSize ? count - kSize : step);
    if (Step<scalar_t>::kDeinterleaved && deinterleaved) {
      const auto [even, odd] =
          at::vec::deinterleave2(Vector::loadu(begin), Vector::loadu(begin + Vector::size()));
      even.store(to + step);
      odd.store(to + step + Vector::size());
    } else {
      for (std::int64_t i = 0; i < kSize; ++i) {
        to[step + i] = begin[i];
      }
    }
  }
}

// Replaces any NaN by one whose low bits are zero: see NOTE [ bfloat16 in 32-bit lanes ].
template <typename Real>
ROPE_INLINE Rotation<Real> quiet(const Rotation<Real>& angle) {
  constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();
  return {angle.cos == angle.cos ? angle.cos : kNaN, angle.sin == angle.sin ? angle.sin : kNaN};
}

// Cosines and sines of `length` angles.
template <typename Frequency, typename Real>
ROPE_INLINE void rotations_of_angles(const Launch& launch, const Frequency* __restrict angles,
                                     std::int64_t length, Real* __restrict cos,
                                     Real* __restrict sin) {
  const auto factor = static_cast<Real>(launch.position_angles.attention_factor);
  const bool conjugate = launch.conjugate;
  if constexpr (std::is_same_v<Real, float>) {
    std::uint64_t irreducible = 0;
    for (std::int64_t i = 0; i < length; ++i) {
      const auto t = static_cast<double>(angles[i]);
      irreducible |= irreducible_bit(t);
      const auto angle = scale(reduced_rotation(t), factor, conjugate);
      cos[i] = angle.cos;
      sin[i] = angle.sin;
    }
    if (irreducible >> 63 == 0) {
      return;
    }
  }
  for (std::int64_t i = 0; i < length; ++i) {
    const auto t = static_cast<double>(angles[i]);
    const auto angle = quiet(scale(rotation<Real>(t), factor, conjugate));
    cos[i] = angle.cos;
    sin[i] = angle.sin;
  }
}

// Positions times frequencies. `tokens` is Workspace::token_offsets from the first token on.
template <typename Frequency, typename scalar_t>
ROPE_INLINE void angles_of_positions(const Launch& launch, const Workspace& workspace, Along along,
                                     const std::int64_t* tokens, std::int64_t num_tokens,
                                     const AngleRows<scalar_t>& rows) {
  const PositionAngles& source = launch.position_angles;
  const auto position = [&](int axis, std::int64_t token) __attribute__((always_inline)) {
    return load_position<Frequency>(
        source.positions, source.positions_dtype,
        tokens[token * kTokenArrays + kAngle] + axis * source.positions_axis_stride);
  };
  const auto frequency = [&](int axis, std::int64_t n) __attribute__((always_inline)) {
    return source.inv_freq == nullptr
               ? static_cast<Frequency>(source.wavelength_frequencies[n])
               : static_cast<const Frequency*>(source.inv_freq)[axis * source.inv_freq_axis_stride +
                                                                n * source.inv_freq_stride];
  };
  const bool along_tokens = along == Along::kTokens;
  const std::int64_t num_rows = along_tokens ? launch.num_pairs : num_tokens;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  const std::int64_t length =
      ((along_tokens ? num_tokens : launch.num_pairs) + kSize - 1) / kSize * kSize;
  auto* factors = static_cast<Frequency*>(workspace.factors);
  for (int axis = 0; axis < source.num_axes; ++axis) {
    Frequency* row = factors + axis * length;
    for (std::int64_t slot = 0; slot < length; ++slot) {
      row[slot] = 0;  // where nothing else will be
    }
    for_each_slot<scalar_t>(along, launch.interleaved, along_tokens ? num_tokens : launch.num_pairs,
                            [&](std::int64_t slot, std::int64_t i) __attribute__((always_inline)) {
                              row[slot] = along_tokens ? position(axis, i) : frequency(axis, i);
                            });
  }
  // Scalar math: sums[slot] = form_angle(position of the token, inv_freq of the pair)
  auto* __restrict sums = static_cast<Frequency*>(workspace.sums);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (int axis = 0; axis < source.num_axes; ++axis) {
      const Frequency factor = along_tokens ? frequency(axis, row) : position(axis, row);
      const Frequency* __restrict others = factors + axis * length;
      for (std::int64_t i = 0; i < length; ++i) {
        sums[i] = add_product<Frequency>(axis, sums[i], factor, others[i]);
      }
    }
    for (std::int64_t i = 0; i < length && source.scale_factor != 1.0; ++i) {
      sums[i] = static_cast<Frequency>(divide_by_scale<double>(sums[i], source.scale_factor));
    }
    rotations_of_angles(launch, sums, length, rows.cos + row * rows.stride,
                        rows.sin + row * rows.stride);
  }
}

// The angles of one token from tables, in the order of the pairs; of full-width tables those of the
// second elements `half` behind.
template <typename Table, typename Real>
ROPE_LOOP void load_table_row(const Launch& launch, const std::int64_t* offsets, Real* cos,
                              Real* sin, std::int64_t half) {
  const TableAngles table = launch.table_angles;
  const std::int64_t num_pairs = launch.num_pairs;
  const bool conjugate = launch.conjugate;
  const auto row = find_table_row<Table>(table, offsets[kAngle], offsets[kSin]);
  const auto load_full = [&](Real* __restrict cos_a, Real* __restrict sin_a, Real* __restrict cos_b,
                             Real* __restrict sin_b,
                             bool interleaved) __attribute__((always_inline)) {
    for (std::int64_t n = 0; n < num_pairs; ++n) {
      const auto loaded = load_full_rotation<Real>(table, row, n, num_pairs, interleaved);
      const auto angle = conjugate ? transpose(loaded) : loaded;
      const Rotation<Real> a = quiet(angle.a);
      const Rotation<Real> b = quiet(angle.b);
      cos_a[n] = a.cos;
      sin_a[n] = a.sin;
      cos_b[n] = b.cos;
      sin_b[n] = b.sin;
    }
  };
  const auto load = [&](Real* __restrict cos_n,
                        Real* __restrict sin_n) __attribute__((always_inline)) {
    for (std::int64_t n = 0; n < num_pairs; ++n) {
      const auto angle = quiet(scale(load_rotation<Real>(table, row, n), Real(1), conjugate));
      cos_n[n] = angle.cos;
      sin_n[n] = angle.sin;
    }
  };
  if (!table.full_width) {
    load(cos, sin);
  } else if (launch.interleaved) {
    load_full(cos, sin, cos + half, sin + half, true);
  } else {
    load_full(cos, sin, cos + half, sin + half, false);
  }
}

template <typename Table, typename scalar_t>
ROPE_INLINE void angles_of_tables(const Launch& launch, const Workspace& workspace, Along along,
                                  const std::int64_t* tokens, std::int64_t num_tokens,
                                  const AngleRows<scalar_t>& rows) {
  using Real = at::opmath_type<scalar_t>;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  const std::int64_t width = padded(launch.num_pairs);
  auto* cos = static_cast<Real*>(workspace.factors);
  auto* sin = cos + 2 * width;
  for (int array = 0; array < 4; ++array) {
    for (std::int64_t n = launch.num_pairs; n < width; ++n) {
      cos[array * width + n] = 0;  // The padding of short rows takes part in sums.
    }
  }
  const int parts = launch.table_angles.full_width ? 2 : 1;
  const bool deinterleaved = is_deinterleaved<scalar_t>(along, launch.interleaved);
  const bool is_in_order = along == Along::kHeads || (along == Along::kAxis && !deinterleaved &&
                                                      launch.num_pairs % kSize == 0);
  for_each_slot<scalar_t>(
      along, launch.interleaved, along == Along::kTokens ? num_tokens : 0,
      [&](std::int64_t slot, std::int64_t token) __attribute__((always_inline)) {
        load_table_row<Table>(launch, tokens + token * kTokenArrays, cos, sin, width);
        for (int part = 0; part < parts; ++part) {
          Real* to_cos = rows.cos + part * rows.half + slot;
          Real* to_sin = rows.sin + part * rows.half + slot;
          for (std::int64_t n = 0; n < launch.num_pairs; ++n) {
            to_cos[n * rows.stride] = cos[part * width + n];
            to_sin[n * rows.stride] = sin[part * width + n];
          }
        }
      });
  for (std::int64_t token = 0; along != Along::kTokens && token < num_tokens; ++token) {
    const std::int64_t* offsets = tokens + token * kTokenArrays;
    Real* to_cos = rows.cos + token * rows.stride;
    Real* to_sin = rows.sin + token * rows.stride;
    if (is_in_order) {
      load_table_row<Table>(launch, offsets, to_cos, to_sin, rows.half);
      continue;
    }
    load_table_row<Table>(launch, offsets, cos, sin, width);
    for (int part = 0; part < parts; ++part) {
      arrange_in_steps<scalar_t>(cos + part * width, to_cos + part * rows.half, launch.num_pairs,
                                 deinterleaved);
      arrange_in_steps<scalar_t>(sin + part * width, to_sin + part * rows.half, launch.num_pairs,
                                 deinterleaved);
    }
  }
}

// The angles of tokens [first, first + num_tokens) of the block.
template <typename scalar_t>
ROPE_LOOP AngleRows<scalar_t> find_angles(const Launch& launch, const Workspace& workspace,
                                          Along along, std::int64_t first,
                                          std::int64_t num_tokens) {
  using Real = at::opmath_type<scalar_t>;
  const std::int64_t count = along == Along::kTokens ? num_tokens : launch.num_pairs;
  const AngleRows<scalar_t> rows{static_cast<Real*>(workspace.cos),
                                 static_cast<Real*>(workspace.sin),
                                 padded(count) * angles_per_pair(launch), padded(count)};
  const std::int64_t* tokens = workspace.token_offsets + first * kTokenArrays;
  if (!launch.uses_tables) {
    if (launch.position_angles.inv_freq_dtype == c10::ScalarType::Float) {
      angles_of_positions<float>(launch, workspace, along, tokens, num_tokens, rows);
    } else {
      angles_of_positions<double>(launch, workspace, along, tokens, num_tokens, rows);
    }
    return rows;
  }
  dispatch_dtype(launch.table_angles.dtype, [&](auto type) __attribute__((always_inline)) {
    angles_of_tables<decltype(type)>(launch, workspace, along, tokens, num_tokens, rows);
  });
  return rows;
}

}  // namespace

}  // namespace rope::cpu
