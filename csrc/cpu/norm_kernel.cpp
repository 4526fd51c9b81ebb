// NOTE [ The CPU norm kernel ]
//
// From the outside in:
//   entry    chooses the dtype
//   block    some tokens and some of their heads. Finds the angles of the tokens once, for q and k
//   tile     the heads of an operand whose offsets are computed ahead, for all tokens of the block
//   group    the heads of one token that share a mean: one, or all. Its rows are read for the sums,
//            then again, while they are in L1, to be written
//   row      the embedding axis of one head of one token (cpu/norm_rows.h)
//
// Rows with a strided embedding axis are copied to contiguous memory and back.
//
// This file is compiled once for each CPU capability, under the rules of NOTE [ The CPU kernel ] in
// cpu/rotate_kernel.cpp.
#include <algorithm>
#include <cstring>

#include "cpu/angles.h"
#include "cpu/dispatch.h"
#include "cpu/kernel.h"
#include "cpu/norm_rows.h"
#include "cpu/rows.h"
#include "cpu/step.h"

namespace rope::cpu {

namespace {

// Rows whose products are added up in one row of weight gradients before that is added to the sums
// of the block: long sums lose bits.
constexpr std::int64_t kRowsPerSum = 64;

template <typename scalar_t>
ROPE_INLINE RowShape<scalar_t> shape_of(const Launch& launch, const Operand& operand) {
  return {operand.axis_size, launch.rotary_offset,
          operand.axis_size - launch.rotary_offset - 2 * launch.num_pairs, launch.num_pairs,
          launch.interleaved};
}

// ---- Gains ----

// A contiguous weight of x's dtype, by vectors.
template <typename scalar_t>
ROPE_LOOP void arrange_vectors(const RowShape<scalar_t>& shape, const scalar_t* weight,
                               double offset, at::opmath_type<scalar_t>* gains) {
  const typename Step<scalar_t>::Vector added(static_cast<at::opmath_type<scalar_t>>(offset));
  const auto arrange = [&](const auto& place) __attribute__((always_inline)) {
    auto gain = load_step(weight, place);
    for (auto& vector : gain.x) {
      vector = vector + added;
    }
    gain.store(gains + place.slot);
  };
  for_each_step_outside(shape, arrange);
  for (std::int64_t step = 0; step < shape.steps(); ++step) {
    arrange(place_of(shape, step));
  }
}

// Any weight, through a row of the opmath type.
template <typename Weight, typename Real>
ROPE_LOOP void load_weight(const void* weight, std::int64_t begin, std::int64_t stride,
                           std::int64_t size, Real offset, Real* row) {
  const Weight* from = static_cast<const Weight*>(weight) + begin;
  for (std::int64_t d = 0; d < size; ++d) {
    const Real gain = static_cast<Real>(from[d * stride]) + offset;
    // NaN without low bits: see NOTE [ bfloat16 in 32-bit lanes ].
    row[d] = gain == gain ? gain : std::numeric_limits<Real>::quiet_NaN();
  }
}

template <typename scalar_t>
ROPE_LOOP void arrange_row(const RowShape<scalar_t>& shape, const at::opmath_type<scalar_t>* row,
                           at::opmath_type<scalar_t>* gains) {
  shape.for_each_slot([&](std::int64_t d, std::int64_t slot, bool)
                          __attribute__((always_inline)) { gains[slot] = row[d]; });
}

// The weight that begins at element `begin`.
template <typename scalar_t>
ROPE_LOOP void arrange_weight(const Launch& launch, const Operand& operand, std::int64_t begin,
                              at::opmath_type<scalar_t>* row, at::opmath_type<scalar_t>* gains) {
  using Real = at::opmath_type<scalar_t>;
  const NormOperand& norm = operand.norm;
  const auto shape = shape_of<scalar_t>(launch, operand);
  if (norm.weight_dtype == launch.dtype && norm.weight_axis_stride == 1) {
    arrange_vectors(shape, static_cast<const scalar_t*>(norm.weight) + begin, launch.weight_offset,
                    gains);
    return;
  }
  dispatch_dtype(norm.weight_dtype, [&](auto type) __attribute__((always_inline)) {
    load_weight<decltype(type)>(norm.weight, begin, norm.weight_axis_stride, operand.axis_size,
                                static_cast<Real>(launch.weight_offset), row);
  });
  arrange_row(shape, row, gains);
}

// The loops over which an array varies.
template <int kArrays>
ROPE_INLINE Loops<kArrays> loops_of_array(const Loops<kArrays>& loops, int array) {
  Loops<kArrays> varying = loops;
  for (int d = 0; d < loops.num_dims; ++d) {
    varying.sizes[d] = loops.strides[array][d] == 0 ? 1 : loops.sizes[d];
  }
  return varying;
}

// Lays out the weights of an operand: see NOTE [ Gains ].
template <typename scalar_t>
ROPE_LOOP void arrange_gains(const Launch& launch, int index, void* to) {
  using Real = at::opmath_type<scalar_t>;
  const Operand& operand = launch.operands[index];
  const std::int64_t length = gain_length(operand.axis_size);
  auto* gains = static_cast<Real*>(to);
  if (operand.norm.weight == nullptr) {
    std::fill_n(gains, length, Real(1));
    return;
  }
  const std::int64_t size = num_weights(operand) * length;
  std::memset(gains, 0, size * sizeof(Real));
  Real* row = gains + size;
  if (num_weights(operand) == 1) {
    arrange_weight<scalar_t>(launch, operand, 0, row, gains);
    return;
  }
  const auto heads = loops_of_array(operand.heads, kHeadGain);
  const auto tokens = loops_of_array(launch.tokens, kGain + index);
  const std::int64_t num_heads = heads.count();
  const std::int64_t count = num_heads * tokens.count();
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t of_head[kHeadArrays];
    std::int64_t of_token[kAllTokenArrays];
    heads.offsets(i % num_heads, of_head);
    tokens.offsets(i / num_heads, of_token);
    const std::int64_t gain = of_head[kHeadGain] + of_token[kGain + index];
    arrange_weight<scalar_t>(launch, operand, of_head[kHeadWeight] + of_token[kWeight + index], row,
                             gains + gain / operand.axis_size * length);
  }
}

// Which repeated elements of a shifted step count: see NOTE [ Gains ].
template <typename scalar_t>
ROPE_INLINE void arrange_counted(const RowShape<scalar_t>& shape, void* to) {
  using Real = at::opmath_type<scalar_t>;
  auto* counted = static_cast<Real*>(to);
  const std::int64_t last = shape.slice_slot() + 2 * (shape.steps() - 1) * shape.kSize;
  shape.for_each_slot([&](std::int64_t, std::int64_t slot, bool is_counted)
                          __attribute__((always_inline)) {
                            if (last <= slot && slot < shape.behind_slot()) {
                              counted[slot - last] = is_counted ? 1 : 0;
                            }
                          });
}

// ---- Blocks ----

// One operand in one block.
template <typename scalar_t>
struct NormPart {
  using Real = at::opmath_type<scalar_t>;
  const Launch& launch;
  const NormWorkspace& workspace;
  const Operand& operand;
  int index;
  RowShape<scalar_t> shape;
  std::int64_t num_tokens;
  std::int64_t head_begin;
  std::int64_t head_end;
  Real inverse_count;  // of the elements that share a mean
  bool copies;         // Axes are strided.

  ROPE_INLINE std::int64_t members() const { return operand.norm.num_members; }
  ROPE_INLINE Real* weight_grads() const {
    return static_cast<Real*>(workspace.weight_grads[index]);
  }
};

template <typename scalar_t>
ROPE_INLINE NormPart<scalar_t> norm_part_of(const Launch& launch, const NormWorkspace& workspace,
                                            const Block& block, int index) {
  using Real = at::opmath_type<scalar_t>;
  const Operand& operand = launch.operands[index];
  const std::int64_t members = operand.norm.num_members;
  const std::int64_t groups = operand.heads.count() / members;
  const bool has_grad = operand.norm.grad != nullptr;
  return {launch,
          workspace,
          operand,
          index,
          shape_of<scalar_t>(launch, operand),
          block.token_end - block.token_begin,
          groups * block.part / block.num_parts * members,
          groups * (block.part + 1) / block.num_parts * members,
          Real(1) / static_cast<Real>(members * operand.axis_size),
          operand.in_axis_stride != 1 || operand.out_axis_stride != 1 ||
              (has_grad && operand.norm.grad_axis_stride != 1)};
}

// The arrays of the row of a head of the tile and a token, in the operand's memory.
template <typename scalar_t>
ROPE_INLINE NormRow<scalar_t> row_in_place(const NormPart<scalar_t>& part, std::int64_t token,
                                           std::int64_t head) {
  using Real = at::opmath_type<scalar_t>;
  const Operand& operand = part.operand;
  const std::int64_t* of_token =
      part.workspace.angles.token_offsets + token * kTokenArrays + kIn + 2 * part.index;
  const std::int64_t* of_head = part.workspace.head_offsets + head * kHeadArrays;
  const std::int64_t gain =
      of_head[kHeadGain] + part.workspace.gain_offsets[2 * token + part.index];
  NormRow<scalar_t> row{};
  row.in = static_cast<const scalar_t*>(operand.in) + of_token[0] + of_head[kHeadIn];
  row.gains = static_cast<const Real*>(part.workspace.gains[part.index]) + gain;
  if (operand.out != nullptr) {
    row.out = static_cast<scalar_t*>(operand.out) + of_token[1] + of_head[kHeadOut];
  }
  if (operand.norm.grad != nullptr) {
    row.grad = static_cast<const scalar_t*>(operand.norm.grad) +
               part.workspace.grad_offsets[2 * token + part.index] + of_head[kHeadGrad];
    row.weight_grads = part.weight_grads() == nullptr ? nullptr : part.weight_grads() + gain;
  }
  return row;
}

// Copies a strided row to contiguous memory. Its output is written to memory behind.
template <typename scalar_t>
ROPE_LOOP NormRow<scalar_t> copy_of(const NormPart<scalar_t>& part, const NormRow<scalar_t>& row) {
  const Operand& operand = part.operand;
  const std::int64_t size = operand.axis_size;
  auto* copies = static_cast<scalar_t*>(part.workspace.rows);
  NormRow<scalar_t> copy = row;
  copy.in = copies;
  copy_strided(Strided<scalar_t>{copies, 1},
               Strided<const scalar_t>{row.in, operand.in_axis_stride}, size);
  if (row.grad != nullptr) {
    copy.grad = copies + size;
    copy_strided(Strided<scalar_t>{copies + size, 1},
                 Strided<const scalar_t>{row.grad, operand.norm.grad_axis_stride}, size);
  }
  copy.out = row.out == nullptr ? nullptr : copies + 2 * size;
  return copy;
}

template <typename scalar_t>
ROPE_LOOP void copy_back(const NormPart<scalar_t>& part, const NormRow<scalar_t>& copy,
                         scalar_t* out) {
  if (out != nullptr) {
    copy_strided(Strided<scalar_t>{out, part.operand.out_axis_stride},
                 Strided<const scalar_t>{copy.out, 1}, part.operand.axis_size);
  }
}

// The row of a head of the tile and a token, contiguous.
template <typename scalar_t>
ROPE_INLINE NormRow<scalar_t> row_of(const NormPart<scalar_t>& part, std::int64_t token,
                                     std::int64_t head) {
  const NormRow<scalar_t> row = row_in_place(part, token, head);
  return part.copies ? copy_of(part, row) : row;
}

// Writes the output of such a row, if that is a copy.
template <typename scalar_t>
ROPE_INLINE void finish_row(const NormPart<scalar_t>& part, const NormRow<scalar_t>& row,
                            std::int64_t token, std::int64_t head) {
  if (part.copies) [[unlikely]] {
    copy_back(part, row, row_in_place(part, token, head).out);
  }
}

// Writes the offsets of heads from `head` on, at most `most`, that of kHeadGain in arranged gains;
// returns how many.
template <typename scalar_t>
ROPE_INLINE std::int64_t load_tile(const NormPart<scalar_t>& part, std::int64_t head,
                                   std::int64_t most) {
  const std::int64_t left = part.head_end - head;
  const std::int64_t count = left < most ? left : most;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t offsets[kHeadArrays];
    part.operand.heads.offsets(head + i, offsets);
    for (int array = 0; array < kHeadArrays; ++array) {
      part.workspace.head_offsets[i * kHeadArrays + array] = offsets[array];
    }
    part.workspace.head_offsets[i * kHeadArrays + kHeadGain] =
        offsets[kHeadGain] / part.operand.axis_size * gain_length(part.operand.axis_size);
  }
  return count;
}

// The heads of a tile: whole groups. Where the tokens of a head are contiguous each head is a
// sequence of its own in memory, of which a CPU prefetches few at a time.
template <typename scalar_t>
ROPE_INLINE std::int64_t tile_heads(const NormPart<scalar_t>& part) {
  constexpr std::int64_t kHeadsTogether = 4;
  const auto& tokens = part.launch.tokens;
  const auto& heads = part.operand.heads;
  const std::int64_t token_stride =
      tokens.num_dims == 0 ? 0 : tokens.strides[kIn + 2 * part.index][tokens.num_dims - 1];
  const std::int64_t head_stride =
      heads.num_dims == 0 ? 0 : heads.strides[kHeadIn][heads.num_dims - 1];
  const std::int64_t most = token_stride < head_stride ? kHeadsTogether : kMaxHeads;
  const std::int64_t members = part.members();
  return members < most ? most / members * members : members;
}

template <typename scalar_t>
ROPE_INLINE bool may_stream_rows(const NormPart<scalar_t>& part) {
  const RowShape<scalar_t>& shape = part.shape;
  constexpr std::int64_t kSize = RowShape<scalar_t>::kSize;
  return part.workspace.angles.may_stream && !part.copies && shape.num_pairs % kSize == 0 &&
         shape.before % kSize == 0 && shape.behind % kSize == 0;
}

template <typename Real>
ROPE_INLINE Real reciprocal_root(double sum, Real inverse_count, Real eps) {
  return Real(1) / std::sqrt(static_cast<Real>(sum) * inverse_count + eps);
}

template <bool interleaved, typename Shape, typename scalar_t, typename NormLast>
ROPE_INLINE double squares_of(const Shape& shape, const NormRow<scalar_t>& row,
                              const TokenAngles<scalar_t>& angles, NormLast norm_last) {
  return norm_last ? sum_of_rotated_squares<interleaved>(shape, row, angles)
                   : sum_of_squares(row.in, shape.size);
}

template <bool interleaved, typename scalar_t>
ROPE_LOOP void normalize_group(const NormPart<scalar_t>& part, std::int64_t token,
                               std::int64_t first_head, const TokenAngles<scalar_t>& angles,
                               bool may_stream) {
  using Real = at::opmath_type<scalar_t>;
  const bool norm_last = part.launch.norm_last;
  const std::int64_t end = first_head + part.members();
  double squares = 0;
  for (std::int64_t head = first_head; head < end; ++head) {
    squares += squares_of<interleaved>(part.shape, row_of(part, token, head), angles, norm_last);
  }
  const Real scale =
      reciprocal_root(squares, part.inverse_count, static_cast<Real>(part.launch.eps));
  for (std::int64_t head = first_head; head < end; ++head) {
    const auto row = row_of(part, token, head);
    const bool streams = may_stream && can_stream(row.out, part.shape.size);
    normalize_row<interleaved>(part.shape, row, angles, norm_last, scale, streams);
    finish_row(part, row, token, head);
  }
}

// The steps of rows that are whole steps and no more; else 0.
template <typename scalar_t>
ROPE_INLINE std::int64_t whole_steps(const NormPart<scalar_t>& part) {
  const RowShape<scalar_t>& shape = part.shape;
  const std::int64_t steps = shape.steps();
  const bool is_whole = shape.size == 2 * shape.num_pairs && shape.num_pairs % shape.kSize == 0;
  return is_whole && !part.copies ? steps : 0;
}

template <std::int64_t size, typename scalar_t>
ROPE_INLINE void prefetch(const scalar_t* row) {
  constexpr std::int64_t kLine = 64 / sizeof(scalar_t);
  for (std::int64_t i = 0; i < size; i += kLine) {
    __builtin_prefetch(row + i);
  }
}

// Whole rows: first the sums of heads [0, count) of the tile, then all roots together, since a
// square root and a division take long, then the results.

// Writes sum(head), a vector whose elements add up, to scales[head] for each head.
template <typename Real, typename Sum>
ROPE_INLINE void sum_rows(Real* scales, std::int64_t count, const Sum& sum) {
  using Vector = Vectorized<Real>;
  for (std::int64_t first = 0; first < count; first += Vector::size()) {
    Vector sums[Vector::size()] = {};
    for (std::int64_t i = 0; i < Vector::size() && first + i < count; ++i) {
      sums[i] = sum(first + i);
    }
    sums_of_each<Real>(sums).store(scales + first);
  }
}

template <int steps, typename scalar_t>
ROPE_LOOP void square_whole_rows(const NormPart<scalar_t>& part, std::int64_t token,
                                 std::int64_t count, at::opmath_type<scalar_t>* scales) {
  sum_rows(scales, count, [&](std::int64_t head) __attribute__((always_inline)) {
    // The order of the elements in memory is that of the sum in either convention.
    return WholeRow</*interleaved=*/false, steps, scalar_t>(row_in_place(part, token, head).in)
        .squares();
  });
}

template <bool interleaved, int steps, typename scalar_t>
ROPE_LOOP void square_rotated_rows(const NormPart<scalar_t>& part, std::int64_t token,
                                   std::int64_t count, const TokenAngles<scalar_t>& of_token,
                                   at::opmath_type<scalar_t>* scales) {
  const auto angles = RowAngles<scalar_t, steps>::load(of_token);
  sum_rows(scales, count, [&](std::int64_t head) __attribute__((always_inline)) {
    return WholeRow<interleaved, steps, scalar_t>(row_in_place(part, token, head).in)
        .rotated_squares(angles);
  });
}

// From the sums of heads to their scales.
template <typename scalar_t>
ROPE_LOOP void find_scales(const NormPart<scalar_t>& part, std::int64_t count,
                           at::opmath_type<scalar_t>* scales) {
  using Real = at::opmath_type<scalar_t>;
  using Vector = Vectorized<Real>;
  const std::int64_t members = part.members();
  for (std::int64_t first = 0; first < count && members > 1; first += members) {
    double sum = 0;
    for (std::int64_t head = first; head < first + members; ++head) {
      sum += static_cast<double>(scales[head]);
    }
    std::fill_n(scales + first, members, static_cast<Real>(sum));
  }
  for (std::int64_t i = 0; i < count; i += Vector::size()) {
    const auto eps = static_cast<Real>(part.launch.eps);
    const Vector mean = Vector::loadu(scales + i) * Vector(part.inverse_count) + Vector(eps);
    (Vector(1) / mean.sqrt()).store(scales + i);
  }
}

// Whether all heads of a token have the same weight, or none.
template <typename scalar_t>
ROPE_INLINE bool has_one_weight(const NormPart<scalar_t>& part) {
  const auto& heads = part.operand.heads;
  bool is_one = true;
  for (int d = 0; d < heads.num_dims; ++d) {
    is_one = is_one && heads.strides[kHeadGain][d] == 0;
  }
  return is_one;
}

// The rotation with one weight stays in registers, or is loaded from memory if it does not fit.
template <bool interleaved, bool one_weight, int steps, typename scalar_t>
ROPE_LOOP void store_whole_rows(const NormPart<scalar_t>& part, std::int64_t token,
                                std::int64_t count, const TokenAngles<scalar_t>& of_token,
                                const at::opmath_type<scalar_t>* scales, bool may_stream) {
  using Whole = WholeRow<interleaved, steps, scalar_t>;
  const auto weighted_by = [&](const auto* gains) __attribute__((always_inline)) {
    return Whole::Angles::template load_weighted<interleaved>(of_token, gains,
                                                              part.launch.norm_last);
  };
  const auto of_first = weighted_by(row_in_place(part, token, 0).gains);
  // The sums would wait for memory: the rows of the next token come while results are computed.
  const std::int64_t next = token + 1 < part.num_tokens ? token + 1 : token;
  for (std::int64_t head = 0; head < count; ++head) {
    const auto row = row_in_place(part, token, head);
    const bool streams = may_stream && can_stream(row.out, Whole::Shape::size);
    prefetch<Whole::Shape::size>(row_in_place(part, next, head).in);
    if constexpr (one_weight) {
      Whole(row.in).store(of_first, scales[head], row.out, streams);
    } else {
      Whole(row.in).store(weighted_by(row.gains), scales[head], row.out, streams);
    }
  }
}

template <bool interleaved, int steps, typename scalar_t>
ROPE_INLINE void normalize_whole_rows(const NormPart<scalar_t>& part, std::int64_t token,
                                      std::int64_t count, const TokenAngles<scalar_t>& angles,
                                      bool may_stream) {
  auto* scales = static_cast<at::opmath_type<scalar_t>*>(part.workspace.scales);
  if (part.launch.norm_last) {
    square_rotated_rows<interleaved, steps>(part, token, count, angles, scales);
  } else {
    square_whole_rows<steps>(part, token, count, scales);
  }
  find_scales(part, count, scales);
  has_one_weight(part) ? store_whole_rows<interleaved, /*one_weight=*/true, steps>(
                             part, token, count, angles, scales, may_stream)
                       : store_whole_rows<interleaved, /*one_weight=*/false, steps>(
                             part, token, count, angles, scales, may_stream);
}

// Heads [0, count) of the tile. Where each has a mean of its own, the scales of several are
// computed together.
template <bool interleaved, typename Shape, typename scalar_t, typename NormLast>
ROPE_LOOP void differentiate_rows(const Shape& shape, const NormPart<scalar_t>& part,
                                  NormLast norm_last, std::int64_t token, std::int64_t count,
                                  const TokenAngles<scalar_t>& angles, bool may_stream) {
  using Real = at::opmath_type<scalar_t>;
  constexpr std::int64_t kTogether = 16;
  const std::int64_t members = part.members();
  const std::int64_t together = members == 1 ? kTogether : members;
  for (std::int64_t first = 0; first < count; first += together) {
    const std::int64_t number = count - first < together ? count - first : together;
    const auto mean_of = [&](std::int64_t i)
                             __attribute__((always_inline)) { return members == 1 ? i : 0; };
    double squares[kTogether] = {};
    double products[kTogether] = {};
    for (std::int64_t i = 0; i < number; ++i) {
      const auto row = row_of(part, token, first + i);
      squares[mean_of(i)] += squares_of<interleaved>(shape, row, angles, norm_last);
      products[mean_of(i)] += sum_of_products<interleaved>(shape, row, angles, norm_last);
    }
    Real scales[kTogether];
    Real corrections[kTogether];
    for (std::int64_t i = 0; i < kTogether; ++i) {
      const auto eps = static_cast<Real>(part.launch.eps);
      scales[i] = reciprocal_root(squares[i], part.inverse_count, eps);
      corrections[i] =
          scales[i] * (scales[i] * (static_cast<Real>(products[i]) * part.inverse_count));
    }
    for (std::int64_t i = 0; i < number; ++i) {
      const auto row = row_of(part, token, first + i);
      const bool streams = may_stream && can_stream(row.out, shape.size);
      differentiate_row<interleaved>(shape, row, angles, norm_last, scales[mean_of(i)],
                                     corrections[mean_of(i)], streams);
      finish_row(part, row, token, first + i);
    }
  }
}

// float64 takes no constants, nor does x86's DEFAULT, which has no vectors, nor the gradient where
// the norm comes last: these are rare, and would be as many functions again.
#if defined(CPU_CAPABILITY_DEFAULT) && defined(__x86_64__)
template <typename scalar_t>
constexpr bool kHasConstantSteps = false;
#else
template <typename scalar_t>
constexpr bool kHasConstantSteps = !std::is_same_v<scalar_t, double>;
#endif

// Calls run with the number of steps of whole rows as a constant if these have 64, 128 or 256
// elements, as models have, and stay in registers; with 0 for all others.
template <typename scalar_t, typename Run>
ROPE_INLINE void dispatch_steps(const NormPart<scalar_t>& part, bool is_rare, const Run& run) {
  if constexpr (kHasConstantSteps<scalar_t>) {
    constexpr int kStepsOf64 = 64 / (2 * Step<scalar_t>::kSize);
    switch (is_rare ? 0 : whole_steps(part)) {
      case kStepsOf64:
        return run(std::integral_constant<int, kStepsOf64>());
      case 2 * kStepsOf64:
        return run(std::integral_constant<int, 2 * kStepsOf64>());
      case 4 * kStepsOf64:
        if constexpr (kStepsOf64 <= 2) {
          return run(std::integral_constant<int, 4 * kStepsOf64>());
        }
    }
  }
  run(std::integral_constant<int, 0>());
}

// The heads of a tile, for one token.
template <bool interleaved, bool is_gradient, typename scalar_t>
ROPE_INLINE void process_heads(const NormPart<scalar_t>& part, std::int64_t token,
                               std::int64_t count, const TokenAngles<scalar_t>& angles,
                               bool may_stream) {
  const bool norm_last = part.launch.norm_last;
  dispatch_steps(part, is_gradient && norm_last, [&](auto steps) __attribute__((always_inline)) {
    if constexpr (is_gradient && steps > 0) {
      differentiate_rows<interleaved>(WholeShape<scalar_t, interleaved, steps>(), part,
                                      std::false_type(), token, count, angles, may_stream);
    } else if constexpr (is_gradient) {
      differentiate_rows<interleaved>(part.shape, part, norm_last, token, count, angles,
                                      may_stream);
    } else if constexpr (steps > 0) {
      normalize_whole_rows<interleaved, steps>(part, token, count, angles, may_stream);
    } else {
      for (std::int64_t head = 0; head < count; head += part.members()) {
        normalize_group<interleaved>(part, token, head, angles, may_stream);
      }
    }
  });
}

// The weight gradients of a block are summed in two steps: `sums` of some rows, then `totals`.
template <typename scalar_t>
struct WeightGrads {
  using Real = at::opmath_type<scalar_t>;
  Real* sums;  // null: not wanted
  Real* totals;
  std::int64_t size;

  static ROPE_INLINE WeightGrads of(const NormPart<scalar_t>& part) {
    const std::int64_t size = num_weights(part.operand) * gain_length(part.operand.axis_size);
    Real* sums = part.weight_grads();
    return {sums, sums == nullptr ? nullptr : sums + size, size};
  }

  ROPE_INLINE void clear() const {
    for (std::int64_t i = 0; i < 2 * size && sums != nullptr; ++i) {
      sums[i] = 0;
    }
  }

  ROPE_INLINE void add_to_totals() const {
    for (std::int64_t i = 0; i < size && sums != nullptr; ++i) {
      totals[i] += sums[i];
      sums[i] = 0;
    }
  }

  // In the order of the weight.
  ROPE_INLINE void store(const NormPart<scalar_t>& part) const {
    if (sums == nullptr) {
      return;
    }
    auto* to = static_cast<Real*>(part.workspace.weight_sums[part.index]);
    const std::int64_t axis_size = part.operand.axis_size;
    for (std::int64_t weight = 0; weight < num_weights(part.operand); ++weight) {
      const Real* from = totals + weight * gain_length(axis_size);
      part.shape.for_each_slot([&](std::int64_t d, std::int64_t slot, bool) __attribute__((
                                   always_inline)) { to[weight * axis_size + d] = from[slot]; });
    }
  }
};

template <bool interleaved, bool is_gradient, typename scalar_t>
ROPE_LOOP void process_part(const NormPart<scalar_t>& part, const AngleRows<scalar_t>& angles) {
  using Real = at::opmath_type<scalar_t>;
  auto weight_grads = is_gradient ? WeightGrads<scalar_t>::of(part) : WeightGrads<scalar_t>{};
  weight_grads.clear();
  const bool may_stream = may_stream_rows(part);
  const auto* counted = static_cast<const Real*>(part.workspace.counted);
  const std::int64_t most = tile_heads(part);
  std::int64_t rows_in_sums = 0;
  std::int64_t count;
  for (std::int64_t head = part.head_begin; head < part.head_end; head += count) {
    count = load_tile(part, head, most);
    for (std::int64_t token = 0; token < part.num_tokens; ++token) {
      const TokenAngles<scalar_t> of_token{angles.cos + token * angles.stride,
                                           angles.sin + token * angles.stride,
                                           has_full_width(part.launch) ? angles.half : 0, counted};
      process_heads<interleaved, is_gradient>(part, token, count, of_token, may_stream);
      rows_in_sums += count;
      if (rows_in_sums >= kRowsPerSum) {
        weight_grads.add_to_totals();
        rows_in_sums = 0;
      }
    }
  }
  weight_grads.add_to_totals();
  weight_grads.store(part);
}

template <bool is_gradient, typename scalar_t>
ROPE_LOOP void process_block(const Launch& launch, const NormWorkspace& workspace,
                             const Block& block) {
  const std::int64_t num_tokens = block.token_end - block.token_begin;
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    std::int64_t offsets[kAllTokenArrays];
    launch.tokens.offsets(block.token_begin + token, offsets);
    for (int array = 0; array < kTokenArrays; ++array) {
      workspace.angles.token_offsets[token * kTokenArrays + array] = offsets[array];
    }
    workspace.grad_offsets[2 * token] = offsets[kGrad];
    workspace.grad_offsets[2 * token + 1] = offsets[kGrad + 1];
    for (int index = 0; index < launch.num_operands; ++index) {
      const std::int64_t axis_size = launch.operands[index].axis_size;
      workspace.gain_offsets[2 * token + index] =
          offsets[kGain + index] / axis_size * gain_length(axis_size);
    }
  }
  const auto angles = find_angles<scalar_t>(launch, workspace.angles, Along::kAxis, 0, num_tokens);
  for (int index = 0; index < launch.num_operands; ++index) {
    const auto part = norm_part_of<scalar_t>(launch, workspace, block, index);
    if (part.shape.is_shifted()) {
      arrange_counted(part.shape, workspace.counted);
    }
    launch.interleaved ? process_part</*interleaved=*/true, is_gradient>(part, angles)
                       : process_part</*interleaved=*/false, is_gradient>(part, angles);
  }
}

template <bool is_gradient>
ROPE_INLINE void process_block(const Launch& launch, const NormWorkspace& workspace,
                               const Block& block) {
  dispatch_launch_dtype(launch, [&](auto type) __attribute__((always_inline)) {
    process_block<is_gradient, decltype(type)>(launch, workspace, block);
  });
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if (workspace.angles.may_stream) {
    _mm_sfence();  // Others see what was streamed before they see that the block is done.
  }
#endif
}

}  // namespace

__attribute__((flatten)) void ROPE_CONCATENATE(arrange_gains_, CPU_CAPABILITY)(const Launch& launch,
                                                                               int operand,
                                                                               void* gains) {
  dispatch_launch_dtype(launch, [&](auto type) __attribute__((always_inline)) {
    arrange_gains<decltype(type)>(launch, operand, gains);
  });
}

__attribute__((flatten)) void ROPE_CONCATENATE(normalize_,
                                               CPU_CAPABILITY)(const Launch& launch,
                                                               const NormWorkspace& workspace,
                                                               const Block& block) {
  process_block</*is_gradient=*/false>(launch, workspace, block);
}

__attribute__((flatten)) void ROPE_CONCATENATE(normalize_gradient_,
                                               CPU_CAPABILITY)(const Launch& launch,
                                                               const NormWorkspace& workspace,
                                                               const Block& block) {
  process_block</*is_gradient=*/true>(launch, workspace, block);
}

}  // namespace rope::cpu
