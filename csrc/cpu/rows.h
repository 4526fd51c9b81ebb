// The loops that rotate rows of the embedding axis. Part of cpu/rotate_kernel.cpp: compiled once
// for each CPU capability.
#pragma once

#include "cpu/angles.h"
#include "cpu/kernel.h"
#include "cpu/step.h"

namespace rope::cpu {

namespace {

// NOTE [ Steps of a row ]
//
// A step rotates two vectors of stored elements: one of first and one of second elements of pairs,
// or, interleaved, two neighbors. A row of up to kMaxSteps steps is a loop of its own: its angles
// stay in registers for all heads of a token, and several steps are loaded before the first of them
// is stored, since a load waits for an earlier store whose address is the same modulo 4096. Longer
// rows are rotated in groups of steps. If the number of pairs is not a multiple of the step, the
// last step is shifted back to end with the row and overlaps its predecessor, which is why both are
// loaded before either is stored. Rows shorter than a step are loaded and stored in part. Every
// element is the result of the same operations in all of these cases.
#ifdef CPU_CAPABILITY_DEFAULT
template <typename scalar_t, bool full_width>
constexpr int kMaxSteps = 2;  // the fewest
template <bool full_width>
constexpr bool kHasWholeRows = false;
#else
// As many as have 8 vectors of cosines.
template <typename scalar_t, bool full_width>
constexpr int kMaxSteps =
    std::is_same_v<scalar_t, double> ? 2 : (full_width ? 4 : 8) / Step<scalar_t>::kVectors;
template <bool full_width>
constexpr bool kHasWholeRows = !full_width;
#endif
// Steps that are loaded at once, as many as registers have room for.
constexpr int kMaxLoaded = 4;

constexpr std::int64_t kCacheLine = 64;  // bytes

// Rows of one operand whose elements are contiguous: those of some tokens times some heads.
template <typename scalar_t>
struct Rows {
  const scalar_t* in;  // the first element of the rotated slice
  scalar_t* out;
  const std::int64_t* token_offsets;  // (num_tokens, kTokenArrays), beginning with in and out
  std::int64_t num_tokens;
  const std::int64_t* head_offsets;  // (num_heads, 2): in and out
  std::int64_t num_heads;
  AngleRows<scalar_t> angles;
  std::int64_t num_pairs;
  std::int64_t before;  // elements outside the slice
  std::int64_t behind;
  bool copies;                     // whether those are copied
  bool may_stream;                 // see Workspace
  std::int64_t prefetch_distance;  // bytes
  std::int64_t prefetch_tokens;    // that begin within that distance
};

// Whether `size` elements are whole cache lines: a line that is streamed in part is written twice.
template <typename scalar_t>
ROPE_INLINE bool can_stream(const scalar_t* out, std::int64_t size) {
#ifdef CPU_CAPABILITY_DEFAULT
  return false;  // at::vec has no such store
#endif
  return size * sizeof(scalar_t) % kCacheLine == 0 &&
         reinterpret_cast<std::uintptr_t>(out) % kCacheLine == 0;
}

// std::memcpy, without a call for so few elements.
template <typename scalar_t>
ROPE_INLINE void copy(scalar_t* out, const scalar_t* in, std::int64_t count, bool may_stream) {
  using Vector = Vectorized<scalar_t>;
  constexpr std::int64_t kSize = Vector::size();
  if (count < kSize) {
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = in[i];
    }
    return;
  }
  const bool streams = may_stream && can_stream(out, count);
  for (std::int64_t i = 0; i < count - kSize; i += kSize) {
    store_vector(load_vector<Vector>(in + i), out + i, streams);
  }
  store_vector(load_vector<Vector>(in + count - kSize), out + count - kSize, streams);
}

template <typename scalar_t>
ROPE_LOOP void copy_outside(const Rows<scalar_t>& rows, std::int64_t token) {
  const scalar_t* in = rows.in + rows.token_offsets[token * kTokenArrays];
  scalar_t* out = rows.out + rows.token_offsets[token * kTokenArrays + 1];
  for (std::int64_t head = 0; head < rows.num_heads; ++head) {
    const scalar_t* from = in + rows.head_offsets[2 * head];
    scalar_t* to = out + rows.head_offsets[2 * head + 1];
    copy(to - rows.before, from - rows.before, rows.before, rows.may_stream);
    copy(to + 2 * rows.num_pairs, from + 2 * rows.num_pairs, rows.behind, rows.may_stream);
  }
}

// Some steps of one row. The second vector of a step is `second` elements behind the first, and the
// last step begins at `last`.
// Scalar math: out[n], out[n + N] = rotate({in[n], in[n + N]}, {cos[n], sin[n]})
// interleaved: out[2n], out[2n + 1] = rotate({in[2n], in[2n + 1]}, {cos[n], sin[n]})
template <bool interleaved, bool streams, typename scalar_t, bool full_width, std::size_t kSteps>
ROPE_INLINE void rotate_group(const scalar_t* in, scalar_t* out, std::int64_t second,
                              std::int64_t last,
                              const StepAngles<scalar_t, full_width> (&angles)[kSteps]) {
  using S = Step<scalar_t>;
  constexpr int steps = static_cast<int>(kSteps);
  constexpr int kParts = (steps + kMaxLoaded - 1) / kMaxLoaded;
  constexpr int kPart = (steps + kParts - 1) / kParts;
  const auto begin = [&](int i) __attribute__((always_inline)) {
    return i == steps - 1 ? last : i * (interleaved ? 2 : 1) * S::kSize;
  };
  for (int part = 0; part < steps; part += kPart) {
    const int part_end = part + kPart < steps ? part + kPart : steps;
    typename S::Loaded a[kPart];
    typename S::Loaded b[kPart];
    for (int i = part; i < part_end; ++i) {
      a[i - part] = S::loaded(load_vector<typename S::Stored>(in + begin(i)));
      b[i - part] = S::loaded(load_vector<typename S::Stored>(in + second + begin(i)));
    }
    RotatedStep<scalar_t> rotated[kPart];
    for (int i = part; i < part_end; ++i) {
      rotated[i - part] = rotate_step<interleaved>(a[i - part], b[i - part], angles[i]);
    }
    for (int i = part; i < part_end; ++i) {
      store_vector(rotated[i - part].first, out + begin(i), streams);
      store_vector(rotated[i - part].second, out + second + begin(i), streams);
    }
  }
}

// Steps [first, first + steps) of the rows of tokens [begin, end); with `whole` the rows are these
// steps and no more, at offsets known to the compiler.
template <bool interleaved, bool full_width, bool whole, int steps, typename scalar_t>
ROPE_LOOP void rotate_steps(const Rows<scalar_t>& all_rows, std::int64_t begin, std::int64_t end,
                            std::int64_t first) {
  const Rows<scalar_t> rows = all_rows;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  constexpr std::int64_t kElements = interleaved ? 2 : 1;  // from a pair to the next
  const std::int64_t num_pairs = whole ? steps * kSize : rows.num_pairs;
  if (whole) {
    first = 0;
  }
  const std::int64_t second = interleaved ? kSize : num_pairs;
  const std::int64_t group_end = (first + steps) * kSize;
  const std::int64_t last =
      kElements * ((group_end < num_pairs ? group_end : num_pairs) - kSize - first * kSize);
  const bool may_stream = rows.may_stream && num_pairs % kSize == 0;
  const std::int64_t row_bytes =
      (rows.before + 2 * num_pairs + rows.behind) * std::int64_t{sizeof(scalar_t)};
  const std::int64_t prefetched_bytes = first == 0 ? row_bytes : 0;

  for (std::int64_t token = begin; token < end; ++token) {
    if (rows.copies && first == 0) [[unlikely]] {
      copy_outside(rows, token);
    }
    StepAngles<scalar_t, full_width> angles[steps];
    const std::int64_t slot = token * rows.angles.stride + first * kSize;
    for (int i = 0; i < steps; ++i) {
      angles[i] = StepAngles<scalar_t, full_width>::load(
          rows.angles.cos + slot + i * kSize, rows.angles.sin + slot + i * kSize, rows.angles.half);
    }
    const std::int64_t distance =
        token + rows.prefetch_tokens < rows.num_tokens ? rows.prefetch_distance : 0;
    const std::int64_t* offsets = rows.token_offsets + token * kTokenArrays;
    const scalar_t* token_in = rows.in + offsets[0] + kElements * first * kSize;
    scalar_t* token_out = rows.out + offsets[1] + kElements * first * kSize;
    for (std::int64_t head = 0; head < rows.num_heads; ++head) {
      const scalar_t* in = token_in + rows.head_offsets[2 * head];
      scalar_t* out = token_out + rows.head_offsets[2 * head + 1];
      const char* ahead = reinterpret_cast<const char*>(in - rows.before) + distance;
      for (std::int64_t byte = 0; byte < prefetched_bytes; byte += kCacheLine) {
        __builtin_prefetch(ahead + byte);
      }
      if (may_stream && can_stream(out, 2 * num_pairs)) [[unlikely]] {
        rotate_group<interleaved, /*streams=*/true>(in, out, second, last, angles);
      } else {
        rotate_group<interleaved, /*streams=*/false>(in, out, second, last, angles);
      }
    }
  }
}

// The number of steps becomes a constant.
template <bool interleaved, bool full_width, int steps = 1, typename scalar_t>
ROPE_INLINE void rotate_counted_steps(int count, const Rows<scalar_t>& rows, std::int64_t begin,
                                      std::int64_t end, std::int64_t first) {
  if (count == steps) {
    if (kHasWholeRows<full_width> && rows.num_pairs == steps * Step<scalar_t>::kSize) {
      rotate_steps<interleaved, full_width, kHasWholeRows<full_width>, steps>(rows, begin, end,
                                                                              first);
    } else {
      rotate_steps<interleaved, full_width, false, steps>(rows, begin, end, first);
    }
  } else if constexpr (steps < kMaxSteps<scalar_t, full_width>) {
    rotate_counted_steps<interleaved, full_width, steps + 1>(count, rows, begin, end, first);
  }
}

// Rows shorter than a step.
template <bool interleaved, bool full_width, typename scalar_t>
ROPE_LOOP void rotate_short_rows(const Rows<scalar_t>& rows) {
  using S = Step<scalar_t>;
  using Stored = typename S::Stored;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  constexpr std::int64_t kBytes = sizeof(scalar_t);
  const std::int64_t size = 2 * rows.num_pairs;
  const std::int64_t num_first = !interleaved ? rows.num_pairs : size < kSize ? size : kSize;
  const std::int64_t num_second = size - num_first;
  for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
    if (rows.copies) {
      copy_outside(rows, token);
    }
    const std::int64_t slot = token * rows.angles.stride;
    const auto angles = StepAngles<scalar_t, full_width>::load(
        rows.angles.cos + slot, rows.angles.sin + slot, rows.angles.half);
    for (std::int64_t head = 0; head < rows.num_heads; ++head) {
      const scalar_t* in =
          rows.in + rows.token_offsets[token * kTokenArrays] + rows.head_offsets[2 * head];
      scalar_t* out =
          rows.out + rows.token_offsets[token * kTokenArrays + 1] + rows.head_offsets[2 * head + 1];
      const auto first = S::loaded(load_part<Stored>(in, num_first * kBytes));
      const auto second = S::loaded(load_part<Stored>(in + num_first, num_second * kBytes));
      const auto [first_out, second_out] = rotate_step<interleaved>(first, second, angles);
      store_part(first_out, out, num_first * kBytes);
      store_part(second_out, out + num_first, num_second * kBytes);
    }
  }
}

template <bool interleaved, bool full_width, typename scalar_t>
ROPE_INLINE void rotate_rows(const Rows<scalar_t>& rows) {
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  constexpr std::int64_t kMost = kMaxSteps<scalar_t, full_width>;
  if (rows.num_pairs < kSize) {
    rotate_short_rows<interleaved, full_width>(rows);
    return;
  }
  const std::int64_t steps = (rows.num_pairs + kSize - 1) / kSize;
  const std::int64_t tokens_at_once = steps <= kMost ? rows.num_tokens : 1;
  for (std::int64_t token = 0; token < rows.num_tokens; token += tokens_at_once) {
    std::int64_t count;
    for (std::int64_t first = 0; first < steps; first += count) {
      const std::int64_t left = steps - first;
      count = left <= kMost ? left : left == kMost + 1 ? kMost - 1 : kMost;
      rotate_counted_steps<interleaved, full_width>(static_cast<int>(count), rows, token,
                                                    token + tokens_at_once, first);
    }
  }
}

// Elements at equal distances.
template <typename scalar_t>
struct Strided {
  scalar_t* data;
  std::int64_t stride;

  ROPE_INLINE scalar_t& operator[](std::int64_t i) const { return data[i * stride]; }
};

template <typename To, typename From>
ROPE_INLINE void copy_strided(const Strided<To>& to, const Strided<From>& from,
                              std::int64_t count) {
  if (to.stride == 1 && from.stride == 1) {
    std::memcpy(to.data, from.data, count * sizeof(To));
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

// One row whose elements are not contiguous, in a contiguous copy. The angles are those of `rows`,
// which has one token and one head.
template <bool interleaved, bool full_width, typename scalar_t>
ROPE_LOOP void rotate_copied_row(const Rows<scalar_t>& rows, const Strided<const scalar_t>& in,
                                 const Strided<scalar_t>& out) {
  const Strided<scalar_t> slice{rows.out, 1};
  const std::int64_t size = 2 * rows.num_pairs;
  copy_strided(slice, Strided<const scalar_t>{&in[rows.before], in.stride}, size);
  rotate_rows<interleaved, full_width>(rows);
  copy_strided(Strided<scalar_t>{&out[rows.before], out.stride},
               Strided<const scalar_t>{rows.out, 1}, size);
}

// Pairs of elements of `count` tokens or heads, with angles for each or one for all.
// Scalar math: a_out[i], b_out[i] = rotate({a_in[i], b_in[i]}, {cos[i], sin[i]})
template <bool full_width, typename scalar_t>
ROPE_INLINE void rotate_run(const scalar_t* a_in, const scalar_t* b_in, scalar_t* a_out,
                            scalar_t* b_out, std::int64_t count, const AngleRows<scalar_t>& angles,
                            bool one_angle, bool may_stream, std::int64_t prefetch_distance) {
  using Angles = StepAngles<scalar_t, full_width>;
  using S = Step<scalar_t>;
  using Stored = typename S::Stored;
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  const bool streams = may_stream && can_stream(a_out, count) && can_stream(b_out, count);
  Angles angle;
  if (one_angle) {
    angle = Angles::broadcast(angles.cos, angles.sin, angles.half);
  }
  for (std::int64_t i = 0; i < count; i += kSize) {
    if (!one_angle) {
      angle = Angles::load(angles.cos + i, angles.sin + i, angles.half);
    }
    const std::int64_t bytes = (count - i < kSize ? count - i : kSize) * sizeof(scalar_t);
    const auto a = S::loaded(load_part<Stored>(a_in + i, bytes));
    const auto b = S::loaded(load_part<Stored>(b_in + i, bytes));
    __builtin_prefetch(a_in + i + prefetch_distance);
    __builtin_prefetch(b_in + i + prefetch_distance);
    if (!streams) {
      __builtin_prefetch(a_out + i + prefetch_distance, /*write=*/1);
      __builtin_prefetch(b_out + i + prefetch_distance, /*write=*/1);
    }
    const auto [a_result, b_result] = rotate_step</*interleaved=*/false>(a, b, angle);
    if (bytes == sizeof(Stored)) {
      store_vector(a_result, a_out + i, streams);
      store_vector(b_result, b_out + i, streams);
    } else {
      store_part(a_result, a_out + i, bytes);
      store_part(b_result, b_out + i, bytes);
    }
  }
}

}  // namespace

}  // namespace rope::cpu
