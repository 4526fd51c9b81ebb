#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "angle.h"

namespace {

TEST(UnsupportedDtype, PositionsOfOneAreNotReadAsAnother) {
  const double position = 3;
  EXPECT_EQ(rope::load_position<float>(&position, c10::ScalarType::Double, 0), 3);
  for (const auto dtype : {c10::ScalarType::Half, c10::ScalarType::BFloat16, c10::ScalarType::Short,
                           c10::ScalarType::Bool}) {
    EXPECT_THROW(rope::load_position<float>(&position, dtype, 0), c10::Error);
  }
}

}  // namespace
