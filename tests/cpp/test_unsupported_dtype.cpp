#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "angle.h"
#include "cuda/dispatch.h"
#include "cuda/scatter_kernel.h"

namespace {

TEST(UnsupportedDtype, PositionsOfOneAreNotReadAsAnother) {
  const double position = 3;
  EXPECT_EQ(rope::load_position<float>(&position, c10::ScalarType::Double, 0), 3);
  for (const auto dtype : {c10::ScalarType::Half, c10::ScalarType::BFloat16, c10::ScalarType::Short,
                           c10::ScalarType::Bool}) {
    EXPECT_THROW(rope::load_position<float>(&position, dtype, 0), c10::Error);
  }
}

// Before the launch: the device code has no check.
TEST(UnsupportedDtype, PositionsOfOneAreNotPassedToAKernel) {
  const auto rotate = [](c10::ScalarType positions, c10::ScalarType rows, bool uses_tables) {
    rope::Launch launch{};
    launch.dtype = c10::ScalarType::Float;
    launch.uses_tables = uses_tables;
    launch.position_angles.positions_dtype = positions;
    launch.table_angles.rows_dtype = rows;
    launch.table_angles.rows = &launch;
    rope::cuda::rotate_params<std::int32_t>(launch, rope::cuda::Plan{}, nullptr);
  };
  const auto scatter = [](c10::ScalarType rows) {
    rope::cuda::TableSums sums{};
    sums.rows_dtype = rows;
    rope::cuda::make_scatter_plan(sums);
  };
  const auto known = c10::ScalarType::Long;
  const auto unknown = c10::ScalarType::Short;
  rotate(known, unknown, /*uses_tables=*/false);
  rotate(unknown, known, /*uses_tables=*/true);
  scatter(known);
  EXPECT_THROW(rotate(unknown, known, /*uses_tables=*/false), c10::Error);
  EXPECT_THROW(rotate(known, unknown, /*uses_tables=*/true), c10::Error);
  EXPECT_THROW(scatter(unknown), c10::Error);
}

}  // namespace
