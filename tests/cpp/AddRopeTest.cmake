# Finds GoogleTest, and defines add_rope_test(name source...): a program whose cases ctest discovers.

# An installed GoogleTest serves; without one it is downloaded.
set(INSTALL_GTEST OFF)
set(BUILD_GMOCK OFF)
include(FetchContent)
FetchContent_Declare(googletest
  URL https://github.com/google/googletest/releases/download/v1.17.0/googletest-1.17.0.tar.gz
  URL_HASH SHA256=65fab701d9829d38cb77c14acdc431d2108bfdbf8979e40eb8ae567edf10b27c
  FIND_PACKAGE_ARGS NAMES GTest)
FetchContent_MakeAvailable(googletest)

include(GoogleTest)

# Most of the time goes into PyTorch's headers: they are compiled once.
add_library(headers OBJECT)
target_compile_features(headers PUBLIC cxx_std_20)
target_compile_options(headers PUBLIC -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off) # "unroll" is for nvcc.
target_link_libraries(headers PUBLIC LibTorch::LibTorch GTest::gtest_main)
target_precompile_headers(headers PRIVATE <ATen/ATen.h> <gtest/gtest.h> <torch/library.h>)
file(CONFIGURE OUTPUT headers.cpp CONTENT "")
target_sources(headers PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/headers.cpp)
# CMake compiles libraries with -fPIC and programs with -fPIE, which clang does not accept of one precompiled header.
set_target_properties(headers PROPERTIES POSITION_INDEPENDENT_CODE OFF)

# Programs are linked as distributions do it: what they name no symbol of is dropped where the package allows it.
function(add_rope_test name)
  add_executable(${name} ${ARGN})
  target_link_options(${name} PRIVATE -Wl,--as-needed)
  target_link_libraries(${name} PRIVATE headers)
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_precompile_headers(${name} REUSE_FROM headers)
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST)
endfunction()
