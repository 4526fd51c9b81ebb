// The CPU kernel, in at::vec. This file is compiled once for each CPU capability, with the
// instructions of that capability: it must let no symbol out but its entry, since the linker would
// share an inline function of the same name with code for older processors (the build asserts it).
// Hence raw pointers and no containers.
#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

#include "angle.h"
#include "cpu/kernel.h"
#include "rotation.h"

// Everything is inlined into the entry.
#define ROPE_INLINE inline __attribute__((always_inline))

namespace rope::cpu {

namespace {

using at::vec::Vectorized;

// A step of a row: as many elements as one vector of the storage type holds, as vectors of the
// computation type.
template <typename scalar_t>
struct Step {
  using Real = at::opmath_type<scalar_t>;
  using Vector = Vectorized<Real>;
  static constexpr int kVectors = sizeof(Real) / sizeof(scalar_t);
  static constexpr std::int64_t kSize = Vectorized<scalar_t>::size();

  Vector vectors[kVectors];

  static ROPE_INLINE Step load(const scalar_t* from, std::int64_t count) {
    const auto stored = count < kSize ? Vectorized<scalar_t>::loadu(from, count)
                                      : Vectorized<scalar_t>::loadu(from);
    if constexpr (kVectors == 1) {
      return {{stored}};
    } else {
      const auto [first, second] = at::vec::convert_to_float<scalar_t>(stored);
      return {{first, second}};
    }
  }

  ROPE_INLINE void store(scalar_t* to, std::int64_t count) const {
    Vectorized<scalar_t> stored;
    if constexpr (kVectors == 1) {
      stored = vectors[0];
    } else {
      stored = at::vec::convert_from_float<scalar_t>(vectors[0], vectors[1]);
    }
    if (count < kSize) {
      stored.store(to, static_cast<int>(count));
    } else {
      stored.store(to);
    }
  }
};

// A row of one token: the rotated slice, contiguous, and its cosines and sines, padded.
template <typename scalar_t>
struct Row {
  const scalar_t* in;
  scalar_t* out;
  const at::opmath_type<scalar_t>* cos;
  const at::opmath_type<scalar_t>* sin;
};

ROPE_INLINE std::int64_t at_least_zero(std::int64_t count) { return count < 0 ? 0 : count; }

// Scalar math: out[n], out[n + N] = rotate({in[n], in[n + N]}, {cos[n], sin[n]})
template <typename scalar_t>
ROPE_INLINE void rotate_halves(const Row<scalar_t>& row, std::int64_t num_pairs) {
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  for (std::int64_t n = 0; n < num_pairs; n += S::kSize) {
    const std::int64_t count = num_pairs - n;
    S a = S::load(row.in + n, count);
    S b = S::load(row.in + num_pairs + n, count);
    for (int v = 0; v < S::kVectors; ++v) {
      const std::int64_t first = n + v * Vector::size();
      const auto turned =
          rotate<Vector>({a.vectors[v], b.vectors[v]},
                         {Vector::loadu(row.cos + first), Vector::loadu(row.sin + first)});
      a.vectors[v] = turned.a;
      b.vectors[v] = turned.b;
    }
    a.store(row.out + n, count);
    b.store(row.out + num_pairs + n, count);
  }
}

// Scalar math: out[2n], out[2n + 1] = rotate({in[2n], in[2n + 1]}, {cos[n], sin[n]})
template <typename scalar_t>
ROPE_INLINE void rotate_interleaved(const Row<scalar_t>& row, std::int64_t num_pairs) {
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  for (std::int64_t n = 0; n < num_pairs; n += S::kSize) {
    // Two steps hold the pairs n to n + kSize; of a row's end, what there is.
    const std::int64_t count = 2 * (num_pairs - n);
    const std::int64_t rest = at_least_zero(count - S::kSize);
    S steps[2] = {S::load(row.in + 2 * n, count), S::load(row.in + 2 * n + S::kSize, rest)};
    Vector vectors[2 * S::kVectors];
    for (int v = 0; v < 2 * S::kVectors; ++v) {
      vectors[v] = steps[v / S::kVectors].vectors[v % S::kVectors];
    }
    for (int v = 0; v < S::kVectors; ++v) {
      const std::int64_t first = n + v * Vector::size();
      const auto [a, b] = at::vec::deinterleave2(vectors[2 * v], vectors[2 * v + 1]);
      const auto turned =
          rotate<Vector>({a, b}, {Vector::loadu(row.cos + first), Vector::loadu(row.sin + first)});
      const auto [even, odd] = at::vec::interleave2(turned.a, turned.b);
      vectors[2 * v] = even;
      vectors[2 * v + 1] = odd;
    }
    for (int v = 0; v < 2 * S::kVectors; ++v) {
      steps[v / S::kVectors].vectors[v % S::kVectors] = vectors[v];
    }
    steps[0].store(row.out + 2 * n, count);
    if (rest > 0) {
      steps[1].store(row.out + 2 * n + S::kSize, rest);
    }
  }
}

// -------------------------------------------------------------------------------------------------
// Cosines and sines of a token

// Frequencies of all axes, contiguous and padded: those of the launch, or a copy.
template <typename Frequency>
ROPE_INLINE void load_frequencies(const Launch& launch, const Workspace& workspace) {
  const PositionAngles& angles = launch.by_position;
  auto* frequencies = static_cast<Frequency*>(workspace.frequencies);
  const std::int64_t length = padded(launch.num_pairs);
  for (int axis = 0; axis < angles.num_axes; ++axis) {
    for (std::int64_t n = 0; n < launch.num_pairs; ++n) {
      frequencies[axis * length + n] =
          angles.inv_freq == nullptr
              ? static_cast<Frequency>(angles.wavelength_frequencies[n])
              : static_cast<const Frequency*>(angles.inv_freq)[axis * angles.inv_freq_axis_stride +
                                                               n * angles.inv_freq_stride];
    }
    for (std::int64_t n = launch.num_pairs; n < length; ++n) {
      frequencies[axis * length + n] = 0;
    }
  }
}

// The angles of one token.
template <typename Frequency>
ROPE_INLINE void form_angles(const Launch& launch, const Workspace& workspace,
                             std::int64_t position_offset) {
  const PositionAngles& source = launch.by_position;
  const auto* frequencies = static_cast<const Frequency*>(workspace.frequencies);
  const std::int64_t length = padded(launch.num_pairs);
  const auto load = [&](int axis) {
    return load_position<Frequency>(source.positions, source.positions_dtype,
                                    position_offset + axis * source.positions_axis_stride);
  };
  const auto form = [&](int num_axes, const auto& position) __attribute__((always_inline)) {
    for (std::int64_t n = 0; n < length; ++n) {
      const auto inv_freq = [&](int axis) { return frequencies[axis * length + n]; };
      workspace.angles[n] =
          form_angle<Frequency>(num_axes, position, inv_freq, source.scale_factor);
    }
  };
  if (source.num_axes == 1) {
    const Frequency position = load(0);
    form(1, [=](int) { return position; });
  } else {
    form(source.num_axes, load);
  }
}

// Cosines and sines of a token's angles. The first loop is the quick one, for angles of every size
// that occurs; the angles it cannot reduce are done again.
template <typename Real>
ROPE_INLINE void rotations_of_angles(const Launch& launch, const Workspace& workspace,
                                     Real* __restrict cos, Real* __restrict sin) {
  const std::int64_t length = padded(launch.num_pairs);
  const double* angles = workspace.angles;
  const auto factor = static_cast<Real>(launch.by_position.attention_factor);
  const bool conjugate = launch.conjugate;
  std::int64_t num_left = length;
  if constexpr (std::is_same_v<Real, float>) {
    for (std::int64_t n = 0; n < length; ++n) {
      const auto angle = scale(reduced_rotation(angles[n]), factor, conjugate);
      cos[n] = angle.cos;
      sin[n] = angle.sin;
    }
    num_left = 0;
    for (std::int64_t n = 0; n < length; ++n) {
      num_left += std::fabs(angles[n]) < kReducible ? 0 : 1;
    }
  }
  for (std::int64_t n = 0; num_left > 0 && n < launch.num_pairs; ++n) {
    const auto angle = scale(rotation<Real>(angles[n]), factor, conjugate);
    cos[n] = angle.cos;
    sin[n] = angle.sin;
  }
}

template <typename Real, typename Table>
ROPE_INLINE void rotations_of_table(const Launch& launch, const std::int64_t* offsets, Real* cos,
                                    Real* sin) {
  const TableAngles& table = launch.by_table;
  const auto row = find_table_row<Table>(table, offsets[kAngle], offsets[kSin]);
  for (std::int64_t n = 0; n < launch.num_pairs; ++n) {
    const auto angle = scale(load_rotation<Real>(table, row, n), Real(1), launch.conjugate);
    cos[n] = angle.cos;
    sin[n] = angle.sin;
  }
}

template <typename Real>
ROPE_INLINE void rotations_of_token(const Launch& launch, const Workspace& workspace,
                                    const std::int64_t* offsets, Real* cos, Real* sin) {
  if (!launch.uses_tables) {
    if (launch.by_position.inv_freq_dtype == c10::ScalarType::Float) {
      form_angles<float>(launch, workspace, offsets[kAngle]);
    } else {
      form_angles<double>(launch, workspace, offsets[kAngle]);
    }
    rotations_of_angles<Real>(launch, workspace, cos, sin);
    return;
  }
  switch (launch.by_table.dtype) {
    case c10::ScalarType::Double:
      return rotations_of_table<Real, double>(launch, offsets, cos, sin);
    case c10::ScalarType::Float:
      return rotations_of_table<Real, float>(launch, offsets, cos, sin);
    case c10::ScalarType::Half:
      return rotations_of_table<Real, c10::Half>(launch, offsets, cos, sin);
    default:
      return rotations_of_table<Real, c10::BFloat16>(launch, offsets, cos, sin);
  }
}

// -------------------------------------------------------------------------------------------------
// Rows

// One row of the embedding axis, wherever it lies: the rotated slice, and around it a copy.
template <typename scalar_t, bool interleaved>
ROPE_INLINE void rotate_row(const Launch& launch, const Operand& operand,
                            const Workspace& workspace, Row<scalar_t> row) {
  const std::int64_t slice = 2 * launch.num_pairs;
  const std::int64_t begin = launch.rotary_offset;
  if (row.in != row.out) {
    for (std::int64_t d = 0; d < begin; ++d) {
      row.out[d * operand.out_axis_stride] = row.in[d * operand.in_axis_stride];
    }
    for (std::int64_t d = begin + slice; d < operand.axis_size; ++d) {
      row.out[d * operand.out_axis_stride] = row.in[d * operand.in_axis_stride];
    }
  }
  const scalar_t* in = row.in + begin * operand.in_axis_stride;
  scalar_t* out = row.out + begin * operand.out_axis_stride;
  auto* copy = static_cast<scalar_t*>(workspace.row);
  row.in = in;
  row.out = out;
  if (operand.in_axis_stride != 1) {
    for (std::int64_t d = 0; d < slice; ++d) {
      copy[d] = in[d * operand.in_axis_stride];
    }
    row.in = copy;
  }
  if (operand.out_axis_stride != 1) {
    row.out = copy;
  }
  if constexpr (interleaved) {
    rotate_interleaved(row, launch.num_pairs);
  } else {
    rotate_halves(row, launch.num_pairs);
  }
  if (operand.out_axis_stride != 1) {
    for (std::int64_t d = 0; d < slice; ++d) {
      out[d * operand.out_axis_stride] = copy[d];
    }
  }
}

// The rows of one operand that belong to the block, walked in the order of memory.
template <typename scalar_t, bool interleaved>
ROPE_INLINE void rotate_operand(const Launch& launch, int index, const Workspace& workspace,
                                const Block& block) {
  using Real = at::opmath_type<scalar_t>;
  const Operand& operand = launch.operands[index];
  const std::int64_t length = padded(launch.num_pairs);
  const std::int64_t num_tokens = block.token_end - block.token_begin;
  const std::int64_t num_shared = operand.shared.count();
  const std::int64_t shared_begin = num_shared * block.part / block.num_parts;
  const std::int64_t shared_end = num_shared * (block.part + 1) / block.num_parts;
  const auto* in = static_cast<const scalar_t*>(operand.in);
  auto* out = static_cast<scalar_t*>(operand.out);

  const auto rotate_one = [&](std::int64_t token,
                              std::int64_t shared) __attribute__((always_inline)) {
    const std::int64_t* token_offset = workspace.token_offsets + token * kTokenArrays + 2 * index;
    const std::int64_t* shared_offset = workspace.shared_offsets + 2 * shared;
    rotate_row<scalar_t, interleaved>(
        launch, operand, workspace,
        {in + token_offset[kIn] + shared_offset[0], out + token_offset[kOut] + shared_offset[1],
         static_cast<const Real*>(workspace.cos) + token * length,
         static_cast<const Real*>(workspace.sin) + token * length});
  };

  const int last_token = launch.tokens.num_dims - 1;
  const int last_shared = operand.shared.num_dims - 1;
  const bool tokens_inside =
      last_token >= 0 && last_shared >= 0 &&
      launch.tokens.strides[kOut + 2 * index][last_token] < operand.shared.strides[1][last_shared];
  for (std::int64_t chunk = shared_begin; chunk < shared_end; chunk += kSharedChunk) {
    const std::int64_t num_chunk =
        shared_end - chunk < kSharedChunk ? shared_end - chunk : kSharedChunk;
    for (std::int64_t s = 0; s < num_chunk; ++s) {
      std::int64_t offsets[2];
      operand.shared.offsets(chunk + s, offsets);
      workspace.shared_offsets[2 * s] = offsets[0];
      workspace.shared_offsets[2 * s + 1] = offsets[1];
    }
    const std::int64_t outer = tokens_inside ? num_chunk : num_tokens;
    const std::int64_t inner = tokens_inside ? num_tokens : num_chunk;
    for (std::int64_t i = 0; i < outer; ++i) {
      for (std::int64_t j = 0; j < inner; ++j) {
        rotate_one(tokens_inside ? j : i, tokens_inside ? i : j);
      }
    }
  }
}

template <typename scalar_t>
ROPE_INLINE void rotate_block(const Launch& launch, const Workspace& workspace,
                              const Block& block) {
  using Real = at::opmath_type<scalar_t>;
  if (!launch.uses_tables) {
    if (launch.by_position.inv_freq_dtype == c10::ScalarType::Float) {
      load_frequencies<float>(launch, workspace);
    } else {
      load_frequencies<double>(launch, workspace);
    }
  }
  const std::int64_t length = padded(launch.num_pairs);
  for (std::int64_t token = block.token_begin; token < block.token_end; ++token) {
    const std::int64_t row = token - block.token_begin;
    std::int64_t offsets[kTokenArrays];
    launch.tokens.offsets(token, offsets);
    for (int array = 0; array < kTokenArrays; ++array) {
      workspace.token_offsets[row * kTokenArrays + array] = offsets[array];
    }
    rotations_of_token<Real>(launch, workspace, offsets,
                             static_cast<Real*>(workspace.cos) + row * length,
                             static_cast<Real*>(workspace.sin) + row * length);
  }
  for (int index = 0; index < launch.num_operands; ++index) {
    if (launch.interleaved) {
      rotate_operand<scalar_t, true>(launch, index, workspace, block);
    } else {
      rotate_operand<scalar_t, false>(launch, index, workspace, block);
    }
  }
}

}  // namespace

#define ROPE_CONCATENATE_(a, b) a##b
#define ROPE_CONCATENATE(a, b) ROPE_CONCATENATE_(a, b)

void ROPE_CONCATENATE(rotate_, CPU_CAPABILITY)(const Launch& launch, const Workspace& workspace,
                                               const Block& block) {
  switch (launch.dtype) {
    case c10::ScalarType::Double:
      return rotate_block<double>(launch, workspace, block);
    case c10::ScalarType::Float:
      return rotate_block<float>(launch, workspace, block);
    case c10::ScalarType::Half:
      return rotate_block<c10::Half>(launch, workspace, block);
    default:
      return rotate_block<c10::BFloat16>(launch, workspace, block);
  }
}

}  // namespace rope::cpu
