#include <gtest/gtest.h>

#include "last_results.h"

namespace {

TEST(LastResults, KeepsAsManyAsFourAndDropsTheOldest) {
  rope::LastResults<int, int> last;
  int made = 0;
  const auto square = [&](int key) {
    return last.find(key, [&] {
      ++made;
      return key * key;
    });
  };
  for (int round = 0; round < 3; ++round) {
    for (const int key : {0, 1, 2, 3}) {
      EXPECT_EQ(square(key), key * key);
    }
  }
  EXPECT_EQ(made, 4);
  EXPECT_EQ(square(4), 16);  // In place of 0.
  EXPECT_EQ(square(1), 1);
  EXPECT_EQ(made, 5);
  EXPECT_EQ(square(0), 0);
  EXPECT_EQ(made, 6);
}

TEST(LastResults, ForgetsNothingWhenAFunctionThrows) {
  rope::LastResults<int, int> last;
  for (const int key : {0, 1, 2, 3}) {
    last.find(key, [&] { return key; });
  }
  EXPECT_THROW(last.find(4, []() -> int { throw 4; }), int);
  for (const int key : {0, 1, 2, 3}) {
    EXPECT_EQ(last.find(key, [] { return -1; }), key);
  }
}

}  // namespace
