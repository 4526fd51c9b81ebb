// How the threads of a block find the rotations of a token's pairs, each of them once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/angles.h"
#include "cuda/block.h"
#include "rotation.h"

namespace rope::cuda {

// What a kernel's rotations are made of.
enum class RotationKind : int {
  kHalfWidth,  // a cosine and a sine for each pair, from any source
  kFullWidth,  // those of full-width tables
  kAny,        // either, as two cosines and two sines for each pair
};

// The part of one thread. Params has `operands` and `angles`.
template <typename Real, RotationKind kKind, typename Index, typename Params>
class TokenRotations {
 public:
  static constexpr bool kFullWidth = kKind != RotationKind::kHalfWidth;
  using PairRotation = rope::PairRotation<Real, kFullWidth>;

  C10_HOST_DEVICE TokenRotations(const Params& params, const ThreadPairs<Index>& pairs)
      : params_(params), pairs_(pairs) {}

  // Before the previous kernels on the stream have ended: none of them writes frequencies.
  C10_HOST_DEVICE void read_frequency() {
    if (params_.angles.source == AngleSource::kTurns && pairs_.first < pairs_.count) {
      frequency_ = load_frequency(pairs_.first);
    }
  }

  // Issues the load of the token's position.
  template <int kArrays>
  C10_HOST_DEVICE void load_position(const Index (&offsets)[kArrays]) {
    if (pairs_.count > 0) {
      position_ = load_integer_position(params_.angles, offsets[kAngle]);
    }
  }

  // Calls store(pair, rotation) for the first pair of the thread and every step-th after it.
  template <int kArrays, typename Store>
  C10_HOST_DEVICE void find(const Index (&offsets)[kArrays], int step, const Store& store) {
#pragma unroll 1
    for (int pair = pairs_.first; pair < pairs_.count; pair += step) {
      store(pair, find_one(offsets, pair));
    }
  }

  // The rotation of one pair, counted from the block's first.
  template <int kArrays>
  C10_HOST_DEVICE PairRotation find_one(const Index (&offsets)[kArrays], int pair) {
    const auto n = static_cast<Index>(pairs_.block_first + pair);
    const AngleParams& angles = params_.angles;
    if constexpr (kKind != RotationKind::kFullWidth) {
      if (angles.source != AngleSource::kTables) {
        const std::uint64_t turns[1] = {angles.source != AngleSource::kTurns ? 0
                                        : pair == pairs_.first
                                            ? form_turns(position_, frequency_)
                                            : form_turns(position_, load_frequency(pair))};
        Rotation<Real> rotations[1];
        find_rotations_from_positions<true>(angles, offsets[kAngle], n, turns, rotations);
        return widen(rotations[0]);
      }
    }
    if (!has_table_row(angles.table_angles, offsets[kAngle])) {
      lacks_row_ = true;
      return {};
    }
    if constexpr (kKind == RotationKind::kAny) {
      if (!angles.table_angles.full_width) {
        return widen(load<false>(offsets, n));
      }
    }
    return load<kFullWidth>(offsets, n);
  }

  // Whether a row of the tables was missing.
  C10_HOST_DEVICE bool lacks_row() const { return lacks_row_; }

 private:
  // In turns, of a pair of the block.
  C10_HOST_DEVICE std::uint64_t load_frequency(int pair) const {
    const auto* frequencies =
        static_cast<const std::uint64_t*>(params_.angles.position_angles.inv_freq);
    return frequencies[pairs_.block_first + pair];
  }

  template <bool kOfTable, int kArrays>
  C10_HOST_DEVICE rope::PairRotation<Real, kOfTable> load(const Index (&offsets)[kArrays],
                                                          Index n) const {
    return load_from_tables<Real, kOfTable>(params_.angles, offsets, n, params_.operands.num_pairs,
                                            params_.operands.interleaved);
  }

  C10_HOST_DEVICE static PairRotation widen(const Rotation<Real>& rotation) {
    if constexpr (kFullWidth) {
      return {rotation, rotation};
    } else {
      return rotation;
    }
  }

  const Params& params_;
  ThreadPairs<Index> pairs_;     // whose rotations the thread computes
  std::uint64_t frequency_ = 0;  // of the first of them, in turns
  std::uint64_t position_ = 0;   // of the token, if the source is kTurns
  bool lacks_row_ = false;
};

}  // namespace rope::cuda
