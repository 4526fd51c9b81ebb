// What one thread of the CUDA kernel does: for the device, and for tests that run every thread of a
// launch on the host.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "angle.h"
#include "cuda/sincos.h"
#include "rotate.h"
#include "rotation.h"

namespace rope::cuda {

// Threads of a block where there is much to do, and where there is little: a few tokens are spread
// over as many processors as have a block each.
inline constexpr int kThreads = 128;
inline constexpr int kFewThreads = 64;

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
// token, one chunk, and some of the rows that share the token's angles. It asks for the first rows,
// finds the cosines and sines of its pairs while they are on their way, and keeps those in
// registers for all its rows. Neighbouring threads have neighbouring chunks, so that a warp reads
// and writes whole cache lines; chunks that are rotated and chunks that are copied take the same
// loads and stores. The shared rows of q come first, then those of k.
struct Work {
  std::int64_t first_pair;     // of this launch
  std::int64_t last_pair;      // one past
  std::int64_t rotate_chunks;  // of a row
  std::int64_t copy_chunks;
  std::int64_t q_rows;       // of one token
  std::int64_t shared_rows;  // of one token, of all operands
  std::int64_t rows_per_thread;
  std::int64_t row_groups;
  std::int64_t items;      // threads that have work
  int threads;             // of a block
  bool tables_have_words;  // Cosines and sines can be read 16 bytes at a time.
};

// Elements that are loaded and stored as one.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Word {
  scalar_t elements[kSize];
};

// The same as bits, for what is on its way: a compiler that sees 16-bit elements takes them out of
// a word's registers where it is loaded, and so waits for each word before it asks for the next.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Bits {
  using Element =
      std::conditional_t<sizeof(scalar_t) == 2, std::uint16_t,
                         std::conditional_t<sizeof(scalar_t) == 4, std::uint32_t, std::uint64_t>>;
  // A register has 32 bits: two of 16, the first one low.
  static constexpr int kInUnit = sizeof(scalar_t) == 2 && kSize % 2 == 0 ? 2 : 1;
  using Unit = std::conditional_t<kInUnit == 2, std::uint32_t, Element>;

  Unit units[kSize / kInUnit];

  C10_HOST_DEVICE scalar_t get(int i) const {
    const auto bits = static_cast<Element>(units[i / kInUnit] >> (i % kInUnit * 16));
    scalar_t element;
    std::memcpy(&element, &bits, sizeof(element));
    return element;
  }

  // The elements of a unit are set from the first on.
  C10_HOST_DEVICE void set(int i, scalar_t element) {
    Element bits;
    std::memcpy(&bits, &element, sizeof(element));
    Unit& unit = units[i / kInUnit];
    unit = i % kInUnit == 0 ? Unit{bits} : unit | Unit{bits} << 16;
  }
};

// Where a row begins.
template <typename scalar_t>
struct Row {
  const scalar_t* in;
  scalar_t* out;
  const Operand* operand;
};

// Rows a thread loads before it stores the first, so that their latencies overlap.
inline constexpr int kRowsInFlight = 2;

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
    const std::int64_t item = block * work_.threads + thread;
    if (item >= work_.items) {
      return;
    }
    // Items are counted in Index where they fit, since division is slow.
    const auto chunks = static_cast<Index>(work_.rotate_chunks + work_.copy_chunks);
    const auto groups = static_cast<Index>(work_.row_groups);
    const auto index = static_cast<Index>(item);
    const Index group = index / chunks % groups;
    const auto first_row = static_cast<Index>(group * work_.rows_per_thread);
    const Index end = first_row + static_cast<Index>(work_.rows_per_thread);
    const auto shared_rows = static_cast<Index>(work_.shared_rows);
    Index token_offsets[kTokenArrays];
    launch_.tokens.offsets(index / chunks / groups, token_offsets);
    turn_rows(find_chunk(index % chunks), token_offsets, first_row,
              end < shared_rows ? end : shared_rows);
  }

 private:
  using HalfBits = Bits<scalar_t, kPairs>;
  using Angles = Rotation<Real>[kPairs];

  // What a thread has of each of its rows: two words.
  struct Chunk {
    Index begin[2];    // of each word in the row
    Index first_pair;  // -1: elements around the slice, to be copied
  };

  C10_HOST_DEVICE Chunk find_chunk(Index chunk) const {
    const auto rotate_chunks = static_cast<Index>(work_.rotate_chunks);
    if (chunk < rotate_chunks) {
      const Index first = static_cast<Index>(work_.first_pair) + chunk * kPairs;
      const bool interleaved = kPairs == 1 ? launch_.interleaved : kInterleaved;
      // The first elements of the pairs and the second ones, or, where pairs are interleaved, the
      // first half of them and the second.
      const Index begin =
          static_cast<Index>(launch_.rotary_offset) + (interleaved ? 2 * first : first);
      const Index step = interleaved ? kPairs : static_cast<Index>(launch_.num_pairs);
      return {{begin, begin + step}, first};
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

  C10_HOST_DEVICE Row<scalar_t> find_row(Index row,
                                         const Index (&token_offsets)[kTokenArrays]) const {
    // No index into an array of registers.
    const bool is_k = row >= static_cast<Index>(work_.q_rows);
    const Operand& x = launch_.operands[is_k];
    Index rest = is_k ? row - static_cast<Index>(work_.q_rows) : row;
    Index offsets[2] = {0, 0};
    // Seldom more than one dimension; in any case short code, since it stands here for each row.
#pragma unroll 1
    for (int d = x.shared.num_dims - 1; d > 0; --d) {
      const auto size = static_cast<Index>(x.shared.sizes[d]);
      const Index coordinate = rest % size;
      rest /= size;
      offsets[0] += coordinate * static_cast<Index>(x.shared.strides[0][d]);
      offsets[1] += coordinate * static_cast<Index>(x.shared.strides[1][d]);
    }
    offsets[0] += rest * static_cast<Index>(x.shared.strides[0][0]);
    offsets[1] += rest * static_cast<Index>(x.shared.strides[1][0]);
    const Index in = is_k ? token_offsets[kIn + 2] : token_offsets[kIn];
    const Index out = is_k ? token_offsets[kOut + 2] : token_offsets[kOut];
    return {static_cast<const scalar_t*>(x.in) + (in + offsets[0]),
            static_cast<scalar_t*>(x.out) + (out + offsets[1]), &x};
  }

  // Whether the word lies within the row as a whole. Rotated ones always do.
  C10_HOST_DEVICE static bool has_word(const Operand& x, Index begin) {
    return begin + kPairs <= static_cast<Index>(x.axis_size);
  }

  // How far an element is from its row's beginning. Words of more than one element lie at steps of
  // 1: the launch sees to it.
  C10_HOST_DEVICE static std::int64_t distance(Index element, std::int64_t stride) {
    return kPairs == 1 ? element * stride : static_cast<std::int64_t>(element);
  }

  C10_HOST_DEVICE void turn_rows(const Chunk& chunk, const Index (&token_offsets)[kTokenArrays],
                                 Index first_row, Index last_row) const {
    Angles angles{};
#pragma unroll 1
    for (Index row = first_row; row < last_row; row += kRowsInFlight) {
      Row<scalar_t> rows[kRowsInFlight];
      HalfBits words[kRowsInFlight][2];
      load(chunk, token_offsets, row, last_row, rows, words);
      if (row == first_row && chunk.first_pair >= 0) {
        find_angles(chunk.first_pair, token_offsets, angles);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < last_row) {
          if (chunk.first_pair >= 0) {
            rotate_words(words[i], angles);
          }
          store(chunk, rows[i], words[i]);
        }
      }
    }
  }

  C10_HOST_DEVICE void load(const Chunk& chunk, const Index (&token_offsets)[kTokenArrays],
                            Index row, Index last_row, Row<scalar_t> (&rows)[kRowsInFlight],
                            HalfBits (&words)[kRowsInFlight][2]) const {
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (row + i < last_row) {
        rows[i] = find_row(row + i, token_offsets);
        const Operand& x = *rows[i].operand;
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const Index begin = chunk.begin[word];
          if (has_word(x, begin)) {
            words[i][word] =
                *reinterpret_cast<const HalfBits*>(rows[i].in + distance(begin, x.in_axis_stride));
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
        *reinterpret_cast<HalfBits*>(row.out + distance(begin, x.out_axis_stride)) = words[word];
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
      // Interleaved, elements 2n and 2n + 1 of the two words together; else element n of each.
      const int a = kInterleaved ? 2 * n : n;
      const int b = kInterleaved ? 2 * n + 1 : kPairs + n;
      const Pair<Real> pair{static_cast<Real>(words[a / kPairs].get(a % kPairs)),
                            static_cast<Real>(words[b / kPairs].get(b % kPairs))};
      const Pair<Real> turned = rotate<Real>(pair, angles[n]);
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
      double radians[kPairs];
      if (launch_.by_position.inv_freq_dtype == c10::ScalarType::Float) {
        form_angles<float>(first_pair, token_offsets[kAngle], radians);
      } else {
        form_angles<double>(first_pair, token_offsets[kAngle], radians);
      }
      find_rotations(radians, launch_.by_position.scale_factor, angles);
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

  // What form_angle is for one pair, for the pairs of a chunk: each position is read once.
  template <typename Frequency>
  C10_HOST_DEVICE void form_angles(Index first_pair, Index position_offset,
                                   double (&radians)[kPairs]) const {
    const PositionAngles& source = launch_.by_position;
    Frequency sums[kPairs];
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
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      radians[i] = static_cast<double>(sums[i]);
    }
  }

  template <typename Frequency>
  C10_HOST_DEVICE Frequency frequency(int axis, Index pair) const {
    const PositionAngles& source = launch_.by_position;
    if constexpr (std::is_same_v<Frequency, double>) {
      if (source.inv_freq == nullptr) {
        return frequencies_.values[pair - static_cast<Index>(work_.first_pair)];
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

  const Launch& launch_;
  const Work& work_;
  const Frequencies& frequencies_;
};

}  // namespace rope::cuda
