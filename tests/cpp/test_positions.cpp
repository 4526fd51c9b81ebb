// Positions and weights from C++. tests/test_positions.py and test_weights.py test the values:
// Python calls the same functions.
#include <gtest/gtest.h>

#include "reference.h"
#include "rope/positions.h"
#include "rope/weights.h"

namespace {

using reference::random_values;
using reference::same_bits;

TEST(Positions, OfPackedSequencesBeginAtZeroInEach) {
  const at::Tensor cu_seqlens = at::tensor({0, 3, 5}, at::kInt);
  EXPECT_TRUE(same_bits(rope::positions_from_cu_seqlens(cu_seqlens, 6),
                        at::tensor({0, 1, 2, 0, 1, 0}, at::kInt)));
}

TEST(Positions, OfPaddedSequencesBeginAtTheirFirstToken) {
  EXPECT_TRUE(same_bits(rope::positions_from_attention_mask(at::tensor({0, 0, 1, 1})),
                        at::tensor({0, 0, 0, 1}, at::kLong)));
}

TEST(Positions, OfPackedSamplesBeginAtZeroInEach) {
  const at::Tensor mask = at::tensor({1, 1, 2, 2, 2, 0});
  EXPECT_TRUE(same_bits(rope::positions_from_attention_mask(mask),
                        at::tensor({0, 1, 2, 3, 4, 4}, at::kLong)));
  EXPECT_TRUE(same_bits(rope::positions_from_attention_mask(mask, {.packed = true}),
                        at::tensor({0, 1, 0, 1, 2, 0}, at::kLong)));
}

TEST(Positions, OfUnusableTensorsAreRefused) {
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::Tensor(), 5), c10::TypeError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::tensor({0.0, 3.0}), 3), c10::TypeError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::zeros({}, at::kLong), 3), c10::ValueError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::empty({0}, at::kLong), 0), c10::ValueError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::tensor({3, 5}), 5), c10::ValueError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::tensor({0, 5, 3}), 5), c10::ValueError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::tensor({0, 3, 5}), 4), c10::ValueError);
  EXPECT_THROW(rope::positions_from_cu_seqlens(at::tensor({0, 3, 5}), -2), c10::ValueError);
  EXPECT_THROW(rope::positions_from_attention_mask(at::Tensor()), c10::TypeError);
  EXPECT_THROW(rope::positions_from_attention_mask(at::tensor({0.0, 1.0})), c10::TypeError);
  EXPECT_THROW(rope::positions_from_attention_mask(at::ones({}, at::kLong)), c10::ValueError);
}

TEST(Positions, OfARankAreAChunkOrTwo) {
  EXPECT_TRUE(same_bits(rope::context_parallel_positions(8, 1, 2), at::arange(4, 8)));
  EXPECT_TRUE(same_bits(rope::context_parallel_positions(8, 0, 2, {.zigzag = true}),
                        at::tensor({0, 1, 6, 7}, at::kLong)));
  EXPECT_THROW(rope::context_parallel_positions(8, 2, 2), c10::ValueError);
  EXPECT_THROW(rope::context_parallel_positions(8, 0, 0), c10::ValueError);
  EXPECT_THROW(rope::context_parallel_positions(7, 0, 2), c10::ValueError);
}

TEST(Positions, OfAGridAreItsCoordinates) {
  EXPECT_TRUE(same_bits(rope::grid_positions({2, 3}).flatten(1),
                        at::tensor({0, 0, 0, 1, 1, 1, 0, 1, 2, 0, 1, 2}, at::kLong).view({2, 6})));
  EXPECT_THROW(rope::grid_positions({}), c10::ValueError);
  EXPECT_THROW(rope::grid_positions({-1, 2}), c10::ValueError);
}

TEST(Weights, ArePermutedToInterleavedPairsAndBack) {
  EXPECT_TRUE(same_bits(rope::permute_half_to_interleaved(at::arange(8), 8),
                        at::tensor({0, 4, 1, 5, 2, 6, 3, 7}, at::kLong)));
  const at::Tensor weight = random_values({16, 5});
  const rope::PermuteOptions options = {.rotary_dim = 4, .rotary_offset = 2};
  const at::Tensor permuted = rope::permute_half_to_interleaved(weight, 8, options);
  EXPECT_FALSE(at::equal(permuted, weight));
  EXPECT_TRUE(same_bits(rope::permute_interleaved_to_half(permuted, 8, options), weight));
}

TEST(Weights, ThatDoNotFitAreRefused) {
  const at::Tensor weight = random_values({16, 5});
  EXPECT_THROW(rope::permute_half_to_interleaved(at::Tensor(), 8), c10::TypeError);
  EXPECT_THROW(rope::permute_half_to_interleaved(weight, 7), c10::ValueError);
  EXPECT_THROW(rope::permute_half_to_interleaved(weight, 0), c10::ValueError);
  EXPECT_THROW(rope::permute_half_to_interleaved(weight, 8, {.rotary_dim = 3}), c10::ValueError);
  EXPECT_THROW(rope::permute_interleaved_to_half(weight, 8, {.rotary_offset = -2}),
               c10::ValueError);
}

}  // namespace
