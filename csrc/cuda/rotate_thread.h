// What one thread of the CUDA kernel that rotates does.
#pragma once

#include <cstdint>
#include <type_traits>

#include "angle.h"
#include "cuda/sincos.h"
#include "cuda/thread.h"

namespace rope::cuda {

// Frequencies of max_wavelength travel with the launch, so that they need no device memory; where
// there are more, there are more launches.
inline constexpr int kMaxFrequencies = 256;
union Frequencies {
  double radians[kMaxFrequencies];
  std::uint64_t turns[kMaxFrequencies];  // See NOTE [ Angles in turns ]
};

// Asks for its first rows, finds the cosines and sines of its pairs while they are on their way,
// and keeps those in registers for all its rows. Chunks that are rotated and chunks that are copied
// take the same loads and stores.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
class RotateThread : private Thread<scalar_t, kPairs, kInterleaved, Index> {
  using Base = Thread<scalar_t, kPairs, kInterleaved, Index>;

 public:
  using typename Base::Real;

  C10_HOST_DEVICE RotateThread(const Launch& launch, const Work& work,
                               const Frequencies& frequencies)
      : Base(launch, work), frequencies_(frequencies) {}

  // Does the work of one thread of one block.
  C10_HOST_DEVICE void run(std::int64_t block, int thread) const {
    Share share;
    if (this->find_share(block, thread, share)) {
      turn_rows(find_chunk(share.chunk), share);
    }
  }

 private:
  using typename Base::Chunk;
  using typename Base::HalfBits;
  using typename Base::Share;
  using Angles = Rotation<Real>[kPairs];

  C10_HOST_DEVICE Chunk find_chunk(Index chunk) const {
    const auto rotate_chunks = static_cast<Index>(work_.rotate_chunks);
    if (chunk < rotate_chunks) {
      return this->find_pairs(chunk);
    }
    // Elements outside the rotated slice, counted as if the slice were not there.
    const Index first = 2 * (chunk - rotate_chunks) * kPairs;
    return {{skip_slice(first), skip_slice(first + kPairs)}, -1};
  }

  C10_HOST_DEVICE Index skip_slice(Index outside) const {
    return outside < static_cast<Index>(launch_.rotary_offset)
               ? outside
               : outside + static_cast<Index>(2 * launch_.num_pairs);
  }

  // No index into an array of registers.
  C10_HOST_DEVICE Row<scalar_t> find_row_of_pair(Index row,
                                                 const Index (&token_offsets)[kTokenArrays]) const {
    const bool is_k = row >= static_cast<Index>(work_.q_rows);
    return Base::find_row(launch_.operands[is_k],
                          is_k ? row - static_cast<Index>(work_.q_rows) : row,
                          is_k ? token_offsets[kIn + 2] : token_offsets[kIn],
                          is_k ? token_offsets[kOut + 2] : token_offsets[kOut]);
  }

  // Whether the word lies within the row as a whole. Rotated ones always do.
  C10_HOST_DEVICE static bool has_word(const Operand& x, Index begin) {
    return begin + kPairs <= static_cast<Index>(x.axis_size);
  }

  C10_HOST_DEVICE void turn_rows(const Chunk& chunk, const Share& share) const {
    Angles angles{};
#pragma unroll 1
    for (Index row = share.first_row; row < share.last_row; row += kRowsInFlight) {
      Row<scalar_t> rows[kRowsInFlight];
      HalfBits words[kRowsInFlight][2];
      load(chunk, share, row, rows, words);
      if (row == share.first_row && chunk.first_pair >= 0) {
        find_angles(chunk.first_pair, share.token_offsets, angles);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < share.last_row) {
          if (chunk.first_pair >= 0) {
            rotate_words(words[i], angles);
          }
          store(chunk, rows[i], words[i]);
        }
      }
    }
  }

  C10_HOST_DEVICE void load(const Chunk& chunk, const Share& share, Index row,
                            Row<scalar_t> (&rows)[kRowsInFlight],
                            HalfBits (&words)[kRowsInFlight][2]) const {
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i < share.last_row) {
        rows[i] = find_row_of_pair(row + i, share.token_offsets);
        const Operand& x = *rows[i].operand;
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const Index begin = chunk.begin[word];
          if (has_word(x, begin)) {
            words[i][word] = Base::load_word(rows[i].in, begin, x.in_axis_stride);
          }
        }
      }
    }
  }

  C10_HOST_DEVICE void store(const Chunk& chunk, const Row<scalar_t>& row,
                             const HalfBits (&words)[2]) const {
    const Operand& x = *row.operand;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      const Index begin = chunk.begin[word];
      if (has_word(x, begin)) {
        *reinterpret_cast<HalfBits*>(Base::find_word(row.out, begin, x.out_axis_stride)) =
            words[word];
      } else {
        // The last elements of a row that is no whole number of words. (There are none in place.)
#pragma unroll 1
        for (Index d = begin; d < static_cast<Index>(x.axis_size); ++d) {
          row.out[d] = row.in[d];
        }
      }
    }
  }

  C10_HOST_DEVICE static void rotate_words(HalfBits (&words)[2], const Angles& angles) {
    HalfBits turned_words[2];
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      const Pair<Real> turned = rotate<Real>(Base::get_pair(words, n), angles[n]);
      const int a = Base::first_of_pair(n);
      const int b = Base::second_of_pair(n);
      turned_words[a / kPairs].set(a % kPairs, static_cast<scalar_t>(turned.a));
      turned_words[b / kPairs].set(b % kPairs, static_cast<scalar_t>(turned.b));
    }
    words[0] = turned_words[0];
    words[1] = turned_words[1];
  }

  // The angles of the pairs from first_pair on.
  C10_HOST_DEVICE void find_angles(Index first_pair, const Index (&token_offsets)[kTokenArrays],
                                   Angles& angles) const {
    if (!launch_.uses_tables) {
      find_angles_by_position(first_pair, token_offsets[kAngle], angles);
      const auto factor = static_cast<Real>(launch_.by_position.attention_factor);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        angles[i] = scale(angles[i], factor, launch_.conjugate);
      }
      return;
    }
    switch (launch_.by_table.dtype) {
      case c10::ScalarType::Double:
        return find_angles_by_table<double>(first_pair, token_offsets, angles);
      case c10::ScalarType::Float:
        return find_angles_by_table<float>(first_pair, token_offsets, angles);
      case c10::ScalarType::Half:
        return find_angles_by_table<c10::Half>(first_pair, token_offsets, angles);
      default:
        return find_angles_by_table<c10::BFloat16>(first_pair, token_offsets, angles);
    }
  }

  // Without float64, for x of other dtypes, where angles come in turns or are float32.
  C10_HOST_DEVICE void find_angles_by_position(Index first_pair, Index position_offset,
                                               Angles& angles) const {
    const PositionAngles& source = launch_.by_position;
    if constexpr (std::is_same_v<Real, float>) {
      if (work_.in_turns) {
        const auto position = static_cast<std::uint64_t>(
            load_position<std::int64_t>(source.positions, source.positions_dtype, position_offset));
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const Index n = first_pair + i - static_cast<Index>(work_.first_pair);
          angles[i] = rotation_of_turns(position * frequencies_.turns[n]);
        }
        return;
      }
      if (source.inv_freq_dtype == c10::ScalarType::Float) {
        float radians[kPairs];
        form_angles(first_pair, position_offset, radians);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          angles[i] = rotation_of_float32(radians[i]);
        }
        return;
      }
    }
    double radians[kPairs];
    if (source.inv_freq_dtype == c10::ScalarType::Float) {
      float rounded[kPairs];
      form_angles(first_pair, position_offset, rounded);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        radians[i] = static_cast<double>(rounded[i]);
      }
    } else {
      form_angles(first_pair, position_offset, radians);
    }
    find_rotations(radians, source.scale_factor, angles);
  }

  // What form_angle is for one pair, for the pairs of a chunk: each position is read once.
  template <typename Frequency>
  C10_HOST_DEVICE void form_angles(Index first_pair, Index position_offset,
                                   Frequency (&sums)[kPairs]) const {
    const PositionAngles& source = launch_.by_position;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      sums[i] = 0;
    }
    for (int axis = 0; axis < source.num_axes; ++axis) {
      const auto position =
          load_position<Frequency>(source.positions, source.positions_dtype,
                                   position_offset + axis * source.positions_axis_stride);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const Frequency product = position * frequency<Frequency>(axis, first_pair + i);
        sums[i] = axis == 0 ? product : sums[i] + product;
      }
    }
  }

  template <typename Frequency>
  C10_HOST_DEVICE Frequency frequency(int axis, Index pair) const {
    const PositionAngles& source = launch_.by_position;
    if constexpr (std::is_same_v<Frequency, double>) {
      if (source.inv_freq == nullptr) {
        return frequencies_.radians[pair - static_cast<Index>(work_.first_pair)];
      }
    }
    return static_cast<const Frequency*>(
        source.inv_freq)[axis * source.inv_freq_axis_stride + pair * source.inv_freq_stride];
  }

  template <typename Table>
  C10_HOST_DEVICE void find_angles_by_table(Index first_pair,
                                            const Index (&token_offsets)[kTokenArrays],
                                            Angles& angles) const {
    const auto row =
        find_table_row<Table>(launch_.by_table, token_offsets[kAngle], token_offsets[kSin]);
    if (work_.tables_have_words) {
      constexpr int kOnePiece = static_cast<int>(16 / sizeof(Table));
      constexpr int kPiece = kPairs < kOnePiece ? kPairs : kOnePiece;
      using Piece = Word<Table, kPiece>;
#pragma unroll
      for (int i = 0; i < kPairs; i += kPiece) {
        const Piece cos = *reinterpret_cast<const Piece*>(row.cos + first_pair + i);
        const Piece sin = *reinterpret_cast<const Piece*>(row.sin + first_pair + i);
#pragma unroll
        for (int n = 0; n < kPiece; ++n) {
          angles[i + n] = {static_cast<Real>(cos.elements[n]), static_cast<Real>(sin.elements[n])};
        }
      }
    } else {
      // Seldom. One pair at a time, since addresses of them all would take many registers.
#pragma unroll 1
      for (int pair = 0; pair < kPairs; ++pair) {
        const auto angle = load_rotation<Real>(launch_.by_table, row, first_pair + pair);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          angles[i] = i == pair ? angle : angles[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles[i] = scale(angles[i], Real(1), launch_.conjugate);
    }
  }

  using Base::launch_;
  using Base::work_;
  const Frequencies& frequencies_;
};

}  // namespace rope::cuda
