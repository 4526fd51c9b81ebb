# The installed tree, the same from `cmake --install` and in the wheel's torch_rope/: lib, include, share/cmake/rope.
# In a wheel for several versions of torch, ROPE_PACKAGE_ROOT is where torch_rope/ is from the folder of this version.

include(CMakePackageConfigHelpers)
set(package_dir share/cmake/rope)

file(REAL_PATH "${PROJECT_SOURCE_DIR}/python/torch_rope" editable_prefix)
if(ROPE_PYTHON AND NOT CMAKE_INSTALL_PREFIX STREQUAL editable_prefix)
  # A wheel: torch_rope/ is next to torch/ in site-packages, wherever that is.
  set(libtorch_hint "\${PACKAGE_PREFIX_DIR}/${ROPE_PACKAGE_ROOT}/../torch")
  set(python_rpath "$ORIGIN/${ROPE_PACKAGE_ROOT}/../torch/lib")
  set(rope_rpath "$ORIGIN/../${ROPE_PACKAGE_ROOT}/../torch/lib")
  set(rpath_use_link_path OFF)
else()
  # A system prefix, or an editable install: torch stays where it was found.
  set(libtorch_hint "${LibTorch_PREFIX}")
  set(rpath_use_link_path ON)
endif()
if(ROPE_PACKAGE_ROOT STREQUAL ".")
  list(PREPEND rope_rpath "$ORIGIN")
else()
  list(PREPEND rope_rpath "$ORIGIN/../${ROPE_PACKAGE_ROOT}/lib")
endif()

set_target_properties(rope PROPERTIES
  INSTALL_RPATH "${rope_rpath}" INSTALL_RPATH_USE_LINK_PATH ${rpath_use_link_path})
install(TARGETS rope EXPORT ropeTargets LIBRARY DESTINATION lib)
if(NOT ROPE_KERNELS)
  install(TARGETS rope_kernels EXPORT ropeTargets LIBRARY DESTINATION lib COMPONENT kernels)
  install(DIRECTORY csrc/rope DESTINATION include COMPONENT kernels FILES_MATCHING PATTERN "*.h")
endif()
if(ROPE_PYTHON)
  set_target_properties(_C PROPERTIES
    INSTALL_RPATH "$ORIGIN/lib;${python_rpath}" INSTALL_RPATH_USE_LINK_PATH ${rpath_use_link_path})
  install(TARGETS _C LIBRARY DESTINATION .)
  # Read before _C is loaded (python/torch_rope/_built_for.py).
  file(CONFIGURE OUTPUT built_for CONTENT "torch ${LibTorch_VERSION}\n")
  install(FILES ${PROJECT_BINARY_DIR}/built_for DESTINATION share/rope)
endif()

install(EXPORT ropeTargets NAMESPACE rope:: DESTINATION ${package_dir})
string(REGEX MATCH "^[0-9]+\\.[0-9]+" LibTorch_VERSION_MINOR "${LibTorch_VERSION}")
configure_package_config_file(cmake/ropeConfig.cmake.in ropeConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(ropeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/ropeConfig.cmake
  ${PROJECT_BINARY_DIR}/ropeConfigVersion.cmake
  cmake/FindLibTorch.cmake
  DESTINATION ${package_dir})
