// What the threads of the CUDA kernels have in common: which part of a launch a thread has, and
// where that lies. For the device, and for tests that run every thread of a launch on the host.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rotate.h"
#include "rotation.h"

namespace rope::cuda {

// Threads of a block where there is much to do, and where there is little: a few tokens are spread
// over as many processors as have a block each.
inline constexpr int kThreads = 128;
inline constexpr int kFewThreads = 64;

// Registers for so many blocks at a time on a processor (docs/cuda.md).
inline constexpr int kBlocksPerProcessor = 4;

// NOTE [ Work of a thread ]
//
// A row (the elements of q or k along the embedding axis) is cut into chunks. A chunk of the
// rotated slice has as many pairs as one 16-byte word has elements (a single pair where words
// cannot be used); a chunk of the elements around it has twice as many elements. A thread has one
// token, one chunk, and some of the rows that share the token's angles, a group of them. It asks
// for a few rows before it uses the first. Neighbouring threads have neighbouring chunks, so that a
// warp reads and writes whole cache lines. The shared rows of q come first, then those of k.
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
  bool in_turns;           // Frequencies are in turns; positions are integers.
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

 protected:
  using HalfBits = Bits<scalar_t, kPairs>;

  // What a thread has of each of its rows: two words.
  struct Chunk {
    Index begin[2];    // of each word in the row
    Index first_pair;  // -1: elements around the slice
  };

  // The part of a launch that a thread has.
  struct Share {
    Index chunk;
    Index group;
    Index first_row;
    Index last_row;  // one past
    Index token_offsets[kTokenArrays];
  };

  C10_HOST_DEVICE Thread(const Launch& launch, const Work& work) : launch_(launch), work_(work) {}

  // Returns whether there is anything to do.
  C10_HOST_DEVICE bool find_share(std::int64_t block, int thread, Share& share) const {
    const std::int64_t item = block * work_.threads + thread;
    if (item >= work_.items) {
      return false;
    }
    // Items are counted in Index where they fit, since division is slow.
    const auto chunks = static_cast<Index>(work_.rotate_chunks + work_.copy_chunks);
    const auto groups = static_cast<Index>(work_.row_groups);
    const auto index = static_cast<Index>(item);
    share.chunk = index % chunks;
    share.group = index / chunks % groups;
    share.first_row = static_cast<Index>(share.group * work_.rows_per_thread);
    const Index end = share.first_row + static_cast<Index>(work_.rows_per_thread);
    const auto shared_rows = static_cast<Index>(work_.shared_rows);
    share.last_row = end < shared_rows ? end : shared_rows;
    launch_.tokens.offsets(index / chunks / groups, share.token_offsets);
    return true;
  }

  // A chunk of the rotated slice.
  C10_HOST_DEVICE Chunk find_pairs(Index chunk) const {
    const Index first = static_cast<Index>(work_.first_pair) + chunk * kPairs;
    const bool interleaved = kPairs == 1 ? launch_.interleaved : kInterleaved;
    // The first elements of the pairs and the second ones, or, where pairs are interleaved, the
    // first half of them and the second.
    const Index begin =
        static_cast<Index>(launch_.rotary_offset) + (interleaved ? 2 * first : first);
    const Index step = interleaved ? kPairs : static_cast<Index>(launch_.num_pairs);
    return {{begin, begin + step}, first};
  }

  // A row of an operand, of which the token is at the offsets in and out.
  C10_HOST_DEVICE static Row<scalar_t> find_row(const Operand& x, Index row, Index in, Index out) {
    Index offsets[2] = {0, 0};
    // Seldom more than one dimension; in any case short code, since it stands here for each row.
#pragma unroll 1
    for (int d = x.shared.num_dims - 1; d > 0; --d) {
      const auto size = static_cast<Index>(x.shared.sizes[d]);
      const Index coordinate = row % size;
      row /= size;
      offsets[0] += coordinate * static_cast<Index>(x.shared.strides[0][d]);
      offsets[1] += coordinate * static_cast<Index>(x.shared.strides[1][d]);
    }
    offsets[0] += row * static_cast<Index>(x.shared.strides[0][0]);
    offsets[1] += row * static_cast<Index>(x.shared.strides[1][0]);
    return {static_cast<const scalar_t*>(x.in) + (in + offsets[0]),
            static_cast<scalar_t*>(x.out) + (out + offsets[1]), &x};
  }

  // Where an element is in a row. Words of more than one element lie at steps of 1: the launch sees
  // to it.
  template <typename Element>
  C10_HOST_DEVICE static Element* find_word(Element* row, Index element, std::int64_t stride) {
    return row + (kPairs == 1 ? element * stride : static_cast<std::int64_t>(element));
  }

  C10_HOST_DEVICE static HalfBits load_word(const scalar_t* row, Index element,
                                            std::int64_t stride) {
    return *reinterpret_cast<const HalfBits*>(find_word(row, element, stride));
  }

  // Where the elements of a chunk's n-th pair are. Interleaved, they are elements 2n and 2n + 1 of
  // the two words together; else element n of each.
  C10_HOST_DEVICE static constexpr int first_of_pair(int n) { return kInterleaved ? 2 * n : n; }
  C10_HOST_DEVICE static constexpr int second_of_pair(int n) {
    return kInterleaved ? 2 * n + 1 : kPairs + n;
  }

  C10_HOST_DEVICE static Pair<Real> get_pair(const HalfBits (&words)[2], int n) {
    const int a = first_of_pair(n);
    const int b = second_of_pair(n);
    return {static_cast<Real>(words[a / kPairs].get(a % kPairs)),
            static_cast<Real>(words[b / kPairs].get(b % kPairs))};
  }

  const Launch& launch_;
  const Work& work_;
};

}  // namespace rope::cuda
