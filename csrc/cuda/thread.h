// What one thread of the CUDA kernel does: for the device, and for tests that run every thread of a
// launch on the host.
#pragma once

#include <ATen/OpMathType.h>

#include "angle.h"
#include "rotate.h"
#include "rotation.h"

namespace rope::cuda {

inline constexpr int kThreads = 256;  // of a block

// Frequencies of max_wavelength travel with the launch, so that they need no device memory; where
// there are more, there are more launches.
inline constexpr int kMaxFrequencies = 256;
struct Frequencies {
  double values[kMaxFrequencies];
};

// NOTE [ Work of a thread ]
//
// A row (the elements of q or k along the embedding axis) is cut into chunks. A chunk of the
// rotated slice has as many pairs as one 16-byte word has elements (a single pair where words
// cannot be used); a chunk of the elements around it has twice as many elements. A thread has one
// token, one chunk, and some of the rows that share the token's angles: it finds the cosines and
// sines of its pairs once and keeps them in registers. Neighbouring threads have neighbouring
// chunks, so that a warp reads and writes whole cache lines. The shared rows of q come first, then
// those of k.
struct Work {
  std::int64_t first_pair;     // of this launch
  std::int64_t last_pair;      // one past
  std::int64_t rotate_chunks;  // of a row
  std::int64_t copy_chunks;
  std::int64_t shared_rows;  // of all operands, of one token
  std::int64_t rows_per_thread;
  std::int64_t row_groups;
  std::int64_t items;  // threads that have work
};

// Elements that are loaded and stored as one.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Word {
  scalar_t elements[kSize];
};

// Where a row begins.
template <typename scalar_t>
struct Row {
  const scalar_t* in;
  scalar_t* out;
  std::int64_t in_stride;
  std::int64_t out_stride;
  std::int64_t size;
};

// Rows a thread loads before it stores the first, so that their latencies overlap.
inline constexpr int kRowsInFlight = 4;

// kPairs is that of a chunk. For single pairs kInterleaved is without meaning: one code serves
// both.
template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
class Thread {
 public:
  using Real = at::opmath_type<scalar_t>;

  C10_HOST_DEVICE Thread(const Launch& launch, const Work& work, const Frequencies& frequencies)
      : launch_(launch), work_(work), frequencies_(frequencies) {}

  // Does the work of one thread of one block.
  C10_HOST_DEVICE void run(std::int64_t block, int thread) const {
    std::int64_t item = block * kThreads + thread;
    if (item >= work_.items) {
      return;
    }
    // Items are counted in Index where they fit, since division is slow.
    const auto chunks = static_cast<Index>(work_.rotate_chunks + work_.copy_chunks);
    const auto groups = static_cast<Index>(work_.row_groups);
    const auto index = static_cast<Index>(item);
    const Index chunk = index % chunks;
    const Index group = index / chunks % groups;
    Index token_offsets[kTokenArrays];
    launch_.tokens.offsets(index / chunks / groups, token_offsets);

    const auto first_row = static_cast<Index>(group * work_.rows_per_thread);
    const Index end = first_row + static_cast<Index>(work_.rows_per_thread);
    const auto shared_rows = static_cast<Index>(work_.shared_rows);
    const Index last_row = end < shared_rows ? end : shared_rows;
    if (chunk < static_cast<Index>(work_.rotate_chunks)) {
      const std::int64_t first = work_.first_pair + static_cast<std::int64_t>(chunk) * kPairs;
      rotate_rows(first, token_offsets, first_row, last_row);
    } else {
      copy_rows(chunk - static_cast<Index>(work_.rotate_chunks), token_offsets, first_row,
                last_row);
    }
  }

 private:
  using HalfWord = Word<scalar_t, kPairs>;
  using Angles = Rotation<Real>[kPairs];

  C10_HOST_DEVICE Row<scalar_t> find_row(Index row,
                                         const Index (&token_offsets)[kTokenArrays]) const {
    const auto q_rows = static_cast<Index>(launch_.operands[0].shared.count());
    const int operand = row < q_rows ? 0 : 1;
    const Operand& x = launch_.operands[operand];
    Index offsets[2];
    x.shared.offsets(operand == 0 ? row : row - q_rows, offsets);
    return {static_cast<const scalar_t*>(x.in) + (token_offsets[kIn + 2 * operand] + offsets[0]),
            static_cast<scalar_t*>(x.out) + (token_offsets[kOut + 2 * operand] + offsets[1]),
            x.in_axis_stride, x.out_axis_stride, x.axis_size};
  }

  // Where the two words of a chunk begin in a row: its first elements and its second, or, where
  // pairs are interleaved, its first half and its second.
  C10_HOST_DEVICE std::int64_t word_begin(std::int64_t first_pair, int word) const {
    const bool interleaved = kPairs == 1 ? launch_.interleaved : kInterleaved;
    return interleaved ? launch_.rotary_offset + 2 * first_pair + word * kPairs
                       : launch_.rotary_offset + first_pair + word * launch_.num_pairs;
  }

  // Words of more than one element lie at steps of 1: the launch sees to it.
  C10_HOST_DEVICE static HalfWord load(const scalar_t* row, std::int64_t begin,
                                       std::int64_t stride) {
    return *reinterpret_cast<const HalfWord*>(row + (kPairs == 1 ? begin * stride : begin));
  }
  C10_HOST_DEVICE static void store(scalar_t* row, std::int64_t begin, std::int64_t stride,
                                    const HalfWord& word) {
    *reinterpret_cast<HalfWord*>(row + (kPairs == 1 ? begin * stride : begin)) = word;
  }

  C10_HOST_DEVICE void rotate_rows(std::int64_t first_pair,
                                   const Index (&token_offsets)[kTokenArrays], Index first_row,
                                   Index last_row) const {
    Angles angles;
    find_angles(first_pair, token_offsets, angles);
    for (Index row = first_row; row < last_row; row += kRowsInFlight) {
      HalfWord words[kRowsInFlight][2];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < last_row) {
          const Row<scalar_t> x = find_row(row + i, token_offsets);
          words[i][0] = load(x.in, word_begin(first_pair, 0), x.in_stride);
          words[i][1] = load(x.in, word_begin(first_pair, 1), x.in_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < last_row) {
          const Row<scalar_t> x = find_row(row + i, token_offsets);
          rotate_words(words[i], angles);
          store(x.out, word_begin(first_pair, 0), x.out_stride, words[i][0]);
          store(x.out, word_begin(first_pair, 1), x.out_stride, words[i][1]);
        }
      }
    }
  }

  C10_HOST_DEVICE static void rotate_words(HalfWord (&words)[2], const Angles& angles) {
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      // Interleaved, elements 2n and 2n + 1 of the two words together; else element n of each.
      const int a = kInterleaved ? 2 * n : n;
      const int b = kInterleaved ? 2 * n + 1 : kPairs + n;
      scalar_t& first = words[a / kPairs].elements[a % kPairs];
      scalar_t& second = words[b / kPairs].elements[b % kPairs];
      const Pair<Real> turned =
          rotate<Real>({static_cast<Real>(first), static_cast<Real>(second)}, angles[n]);
      first = static_cast<scalar_t>(turned.a);
      second = static_cast<scalar_t>(turned.b);
    }
  }

  // Elements outside the rotated slice, counted as if the slice were not there.
  C10_HOST_DEVICE void copy_rows(Index chunk, const Index (&token_offsets)[kTokenArrays],
                                 Index first_row, Index last_row) const {
    for (Index r = first_row; r < last_row; ++r) {
      const Row<scalar_t> row = find_row(r, token_offsets);
      const std::int64_t outside = row.size - 2 * launch_.num_pairs;
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const std::int64_t first = (2 * static_cast<std::int64_t>(chunk) + word) * kPairs;
        const std::int64_t begin =
            first < launch_.rotary_offset ? first : first + 2 * launch_.num_pairs;
        if (first + kPairs <= outside) {
          store(row.out, begin, row.out_stride, load(row.in, begin, row.in_stride));
        } else {
          for (std::int64_t d = begin; d < row.size; ++d) {
            row.out[d * row.out_stride] = row.in[d * row.in_stride];
          }
        }
      }
    }
  }

  // The angles of the pairs from first_pair on.
  C10_HOST_DEVICE void find_angles(std::int64_t first_pair,
                                   const Index (&token_offsets)[kTokenArrays],
                                   Angles& angles) const {
    if (!launch_.uses_tables) {
      if (launch_.by_position.inv_freq_dtype == c10::ScalarType::Float) {
        find_angles_by_position<float>(first_pair, token_offsets[kAngle], angles);
      } else {
        find_angles_by_position<double>(first_pair, token_offsets[kAngle], angles);
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

  template <typename Frequency>
  C10_HOST_DEVICE void find_angles_by_position(std::int64_t first_pair, Index position_offset,
                                               Angles& angles) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles[i] = angle_by_position<Frequency>(launch_, work_, frequencies_, first_pair + i,
                                               position_offset);
    }
  }

  // Out of line, since inlined once for each pair it would double the time it takes to compile
  // this.
  template <typename Frequency>
  ROPE_OUT_OF_LINE C10_HOST_DEVICE static Rotation<Real> angle_by_position(
      const Launch& launch, const Work& work, const Frequencies& frequencies, std::int64_t n,
      Index position_offset) {
    const PositionAngles& source = launch.by_position;
    const auto position = [&](int axis) {
      return load_position<Frequency>(source.positions, source.positions_dtype,
                                      position_offset + axis * source.positions_axis_stride);
    };
    const auto inv_freq = [&](int axis) {
      return source.inv_freq == nullptr
                 ? static_cast<Frequency>(frequencies.values[n - work.first_pair])
                 : static_cast<const Frequency*>(
                       source.inv_freq)[axis * source.inv_freq_axis_stride +
                                        n * source.inv_freq_stride];
    };
    const double t =
        form_angle<Frequency>(source.num_axes, position, inv_freq, source.scale_factor);
    return scale(rotation<Real>(t), static_cast<Real>(source.attention_factor), launch.conjugate);
  }

  template <typename Table>
  C10_HOST_DEVICE void find_angles_by_table(std::int64_t first_pair,
                                            const Index (&token_offsets)[kTokenArrays],
                                            Angles& angles) const {
    const auto row =
        find_table_row<Table>(launch_.by_table, token_offsets[kAngle], token_offsets[kSin]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      angles[i] = scale(load_rotation<Real>(launch_.by_table, row, first_pair + i), Real(1),
                        launch_.conjugate);
    }
  }

  const Launch& launch_;
  const Work& work_;
  const Frequencies& frequencies_;
};

}  // namespace rope::cuda
