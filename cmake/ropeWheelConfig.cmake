# find_package(rope) in a wheel for several versions of PyTorch (installed as ropeConfig.cmake): finds LibTorch and continues
# with the package for its version.
include(CMakeFindDependencyMacro)
list(APPEND LibTorch_HINTS "${CMAKE_CURRENT_LIST_DIR}/../../../../torch")
list(APPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")
find_dependency(LibTorch)
list(REMOVE_ITEM CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")

string(REGEX REPLACE "^([0-9]+)\\.([0-9]+).*" "torch_\\1_\\2" _rope_folder "${LibTorch_VERSION}")
set(_rope_config "${CMAKE_CURRENT_LIST_DIR}/../../../${_rope_folder}/share/cmake/rope/ropeConfig.cmake")
if(NOT EXISTS "${_rope_config}")
  file(GLOB _rope_folders RELATIVE "${CMAKE_CURRENT_LIST_DIR}/../../.." "${CMAKE_CURRENT_LIST_DIR}/../../../torch_*_*")
  string(REGEX REPLACE "torch_([0-9]+)_([0-9]+)" "\\1.\\2" _rope_versions "${_rope_folders}")
  string(REPLACE ";" ", " _rope_versions "${_rope_versions}")
  set(rope_FOUND FALSE)
  set(rope_NOT_FOUND_MESSAGE
    "it has libraries for LibTorch ${_rope_versions}, but ${LibTorch_PREFIX} is ${LibTorch_VERSION}.")
  return()
endif()
include("${_rope_config}")
