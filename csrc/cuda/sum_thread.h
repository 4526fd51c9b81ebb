// What one thread of the CUDA kernel does that sums the gradients of cosines, sines and angles.
#pragma once

#include <cstdint>

#include "cuda/thread.h"
#include "rotate.h"
#include "rotation.h"

namespace rope::cuda {

// NOTE [ Sums ]
//
// The launch is that of apply_cos_sin, with the roles turned round. `in` of its operand is the
// gradient and `out` is x (or, for angles, what came out): both are read, neither is written. The
// tables, which have a row for each token, are what comes out. A thread keeps the sums of its pairs
// in registers over all its rows. Where the rows of a token are cut into groups, each group has
// tables of its own, which are added up afterwards: the order is fixed, so that the same call has
// the same bits every time.

template <typename scalar_t, int kPairs, bool kInterleaved, typename Index>
class SumThread : private Thread<scalar_t, kPairs, kInterleaved, Index> {
  using Base = Thread<scalar_t, kPairs, kInterleaved, Index>;

 public:
  using typename Base::Real;

  C10_HOST_DEVICE SumThread(const Launch& launch, const Work& work, const Sums& sums)
      : Base(launch, work), sums_(sums) {}

  // Does the work of one thread of one block.
  C10_HOST_DEVICE void run(std::int64_t block, int thread) const {
    Share share;
    if (this->find_share(block, thread, share)) {
      const Chunk chunk = this->find_pairs(share.chunk);
      Total total{};
      add_rows(chunk, share, total);
      store(chunk, share, total);
    }
  }

 private:
  using typename Base::Chunk;
  using typename Base::HalfBits;
  using typename Base::Share;
  using Total = Rotation<Real>[kPairs];

  C10_HOST_DEVICE void add_rows(const Chunk& chunk, const Share& share, Total& total) const {
    const Operand& x = launch_.operands[0];
#pragma unroll 1
    for (Index row = share.first_row; row < share.last_row; row += kRowsInFlight) {
      HalfBits gradients[kRowsInFlight][2];
      HalfBits words[kRowsInFlight][2];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < share.last_row) {
          const Row<scalar_t> found =
              Base::find_row(x, row + i, share.token_offsets[kIn], share.token_offsets[kOut]);
#pragma unroll
          for (int word = 0; word < 2; ++word) {
            const Index begin = chunk.begin[word];
            gradients[i][word] = Base::load_word(found.in, begin, x.in_axis_stride);
            words[i][word] = Base::load_word(found.out, begin, x.out_axis_stride);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (row + i < share.last_row) {
#pragma unroll
          for (int n = 0; n < kPairs; ++n) {
            total[n] = add_gradient<Real>(Base::get_pair(gradients[i], n),
                                          Base::get_pair(words[i], n), total[n]);
          }
        }
      }
    }
  }

  C10_HOST_DEVICE void store(const Chunk& chunk, const Share& share, const Total& total) const {
    const std::int64_t begin = share.group * sums_.group_stride + chunk.first_pair;
    if (sums_.cos != nullptr) {
      store_words(static_cast<Real*>(sums_.cos) + begin + share.token_offsets[kAngle],
                  [&](int n) { return total[n].cos; });
    }
    store_words(static_cast<Real*>(sums_.sin) + begin + share.token_offsets[kSin],
                [&](int n) { return launch_.conjugate ? -total[n].sin : total[n].sin; });
  }

  // Rows of sums are contiguous, and whole words where pairs come in words.
  template <typename Value>
  C10_HOST_DEVICE static void store_words(Real* begin, const Value& value) {
    constexpr int kOneWord = static_cast<int>(16 / sizeof(Real));
    constexpr int kSize = kPairs < kOneWord ? kPairs : kOneWord;
#pragma unroll
    for (int i = 0; i < kPairs; i += kSize) {
      Word<Real, kSize> word;
#pragma unroll
      for (int n = 0; n < kSize; ++n) {
        word.elements[n] = value(i + n);
      }
      *reinterpret_cast<Word<Real, kSize>*>(begin + i) = word;
    }
  }

  using Base::launch_;
  const Sums& sums_;
};

}  // namespace rope::cuda
