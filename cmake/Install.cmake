# The installed tree, the same from `cmake --install` and in the wheel's torch_rope/: lib, include, share/cmake/rope.

include(CMakePackageConfigHelpers)
set(package_dir share/cmake/rope)

file(REAL_PATH "${PROJECT_SOURCE_DIR}/python/torch_rope" editable_prefix)
if(ROPE_PYTHON AND NOT CMAKE_INSTALL_PREFIX STREQUAL editable_prefix)
  # A wheel: torch_rope/ is next to torch/ (and nvidia/) in site-packages, wherever that is.
  set(libtorch_hint "\${PACKAGE_PREFIX_DIR}/../torch")
  set(neighbours ../torch/lib)
  if(ROPE_CUDA_ENABLED)
    list(APPEND neighbours ../nvidia/cu${cuda_major}/lib)
  endif()
  list(TRANSFORM neighbours PREPEND "$ORIGIN/../" OUTPUT_VARIABLE rope_rpath)
  list(TRANSFORM neighbours PREPEND "$ORIGIN/" OUTPUT_VARIABLE python_rpath)
  set(rpath_use_link_path OFF)
else()
  # A system prefix, or an editable install: torch stays where it was found.
  set(libtorch_hint "${LibTorch_PREFIX}")
  set(rpath_use_link_path ON)
endif()

set_target_properties(rope PROPERTIES
  INSTALL_RPATH "${rope_rpath}" INSTALL_RPATH_USE_LINK_PATH ${rpath_use_link_path})
install(TARGETS rope EXPORT ropeTargets LIBRARY DESTINATION lib)
install(DIRECTORY csrc/rope DESTINATION include FILES_MATCHING PATTERN "*.h")
if(ROPE_PYTHON)
  set_target_properties(_C PROPERTIES
    INSTALL_RPATH "$ORIGIN/lib;${python_rpath}" INSTALL_RPATH_USE_LINK_PATH ${rpath_use_link_path})
  install(TARGETS _C LIBRARY DESTINATION .)
  # Read before _C is loaded (python/torch_rope/_built_for.py).
  set(built_for "torch ${LibTorch_VERSION}\n")
  if(ROPE_CUDA_ENABLED)
    string(APPEND built_for "cuda ${cuda_major}\n")
  endif()
  file(CONFIGURE OUTPUT built_for CONTENT "${built_for}")
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
