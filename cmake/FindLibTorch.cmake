# Finds PyTorch's C++ libraries. Unlike find_package(Torch), it needs no CUDA toolkit for a CUDA build of torch.
#
# Search order:
#   1. LibTorch_ROOT and CMAKE_PREFIX_PATH: a LibTorch folder, or what torch.utils.cmake_prefix_path prints;
#   2. LibTorch_HINTS: rope's package sets this to the torch next to it, or the one it was built with;
#   3. the torch of Python_EXECUTABLE, else of the python3 on the PATH.
# With COMPONENTS Python, only the torch of Python_EXECUTABLE is considered.
#
# Variables: LibTorch_VERSION, LibTorch_PREFIX, LibTorch_LIBRARY_DIR; for a CUDA build of torch also
# LibTorch_CUDA_VERSION (only the major version if the minor is unknown).
# Targets:
#   LibTorch::LibTorch  headers and libraries
#   LibTorch::Python    torch_python (with COMPONENTS Python)

include(FindPackageHandleStandardArgs)

# Looks in the torch package that `python` would import, without importing it, which takes seconds.
macro(_libtorch_find_in_python python)
  if(NOT LibTorch_INCLUDE_DIR AND NOT "${python}" STREQUAL "")
    execute_process(
      COMMAND "${python}" -c "from importlib import util; print(*util.find_spec('torch').submodule_search_locations)"
      OUTPUT_VARIABLE _libtorch_folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_libtorch_folder)
      find_path(LibTorch_INCLUDE_DIR torch/script.h PATHS "${_libtorch_folder}/include" NO_DEFAULT_PATH)
    endif()
  endif()
endmacro()

# Only in LibTorch_PREFIX: a library elsewhere may have another version.
macro(_libtorch_find_library name)
  find_library(LibTorch_${name}_LIBRARY ${name} PATHS "${LibTorch_PREFIX}"
    PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE} NO_DEFAULT_PATH)
  mark_as_advanced(LibTorch_${name}_LIBRARY)
  if(LibTorch_${name}_LIBRARY AND NOT TARGET LibTorch::${name})
    add_library(LibTorch::${name} SHARED IMPORTED)
    set_target_properties(LibTorch::${name} PROPERTIES IMPORTED_LOCATION "${LibTorch_${name}_LIBRARY}")
  endif()
endmacro()

if("Python" IN_LIST LibTorch_FIND_COMPONENTS)
  _libtorch_find_in_python("${Python_EXECUTABLE}")
else()
  # ../../include is relative to torch/share/cmake, which torch.utils.cmake_prefix_path prints.
  find_path(LibTorch_INCLUDE_DIR torch/script.h HINTS ${LibTorch_HINTS} PATH_SUFFIXES include ../../include)
  _libtorch_find_in_python("${Python_EXECUTABLE}")
  if(NOT LibTorch_INCLUDE_DIR)
    find_program(LibTorch_PYTHON NAMES python3 python)
    mark_as_advanced(LibTorch_PYTHON)
    _libtorch_find_in_python("${LibTorch_PYTHON}")
  endif()
endif()

if(LibTorch_INCLUDE_DIR)
  get_filename_component(_libtorch_include "${LibTorch_INCLUDE_DIR}" ABSOLUTE)
  get_filename_component(LibTorch_PREFIX "${_libtorch_include}" DIRECTORY)
  set(LibTorch_VERSION "")
  foreach(_libtorch_part MAJOR MINOR PATCH)
    file(STRINGS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h" _libtorch_line
      REGEX "define TORCH_VERSION_${_libtorch_part} ")
    string(REGEX MATCH "[0-9]+$" _libtorch_line "${_libtorch_line}")
    list(APPEND LibTorch_VERSION "${_libtorch_line}")
  endforeach()
  list(JOIN LibTorch_VERSION "." LibTorch_VERSION)

  foreach(_libtorch_name torch torch_cpu c10 torch_cuda torch_python)
    _libtorch_find_library(${_libtorch_name})
  endforeach()
  if(LibTorch_torch_python_LIBRARY)
    set(LibTorch_Python_FOUND TRUE)
  endif()
endif()

find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR LibTorch_torch_LIBRARY LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY
  VERSION_VAR LibTorch_VERSION
  HANDLE_COMPONENTS
  REASON_FAILURE_MESSAGE "Install PyTorch with pip, or give a LibTorch folder: -DCMAKE_PREFIX_PATH=<libtorch>.")
mark_as_advanced(LibTorch_INCLUDE_DIR)
if(NOT LibTorch_FOUND)
  return()
endif()
get_filename_component(LibTorch_LIBRARY_DIR "${LibTorch_torch_LIBRARY}" DIRECTORY)

if(NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  # libtorch.so loads torch_cuda, but programs use no symbol of it: --as-needed would drop it.
  set_target_properties(LibTorch::LibTorch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${_libtorch_include};${_libtorch_include}/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "LibTorch::torch;LibTorch::torch_cpu;LibTorch::c10"
    INTERFACE_LINK_OPTIONS "-Wl,--push-state,--no-as-needed,${LibTorch_torch_LIBRARY},--pop-state")
endif()
if(LibTorch_torch_python_LIBRARY AND NOT TARGET LibTorch::Python)
  add_library(LibTorch::Python INTERFACE IMPORTED)
  set_target_properties(LibTorch::Python PROPERTIES INTERFACE_LINK_LIBRARIES "LibTorch::LibTorch;LibTorch::torch_python")
endif()

# The CUDA runtime is in the LibTorch folder, with a hash in its name, or in a pip package next to torch.
set(LibTorch_CUDA_VERSION "")
if(LibTorch_torch_cuda_LIBRARY)
  file(GLOB _libtorch_cudart
    "${LibTorch_LIBRARY_DIR}/libcudart*.so.*"
    "${LibTorch_PREFIX}/../nvidia/cu*/lib/libcudart.so.*"
    "${LibTorch_PREFIX}/../nvidia/cuda_runtime/lib/libcudart.so.*")
  string(REGEX MATCH "[0-9]+$" LibTorch_CUDA_VERSION "${_libtorch_cudart}")
  if(EXISTS "${LibTorch_PREFIX}/version.py")
    file(STRINGS "${LibTorch_PREFIX}/version.py" _libtorch_line REGEX "^cuda")
    string(REGEX MATCH "[0-9]+\\.[0-9]+" LibTorch_CUDA_VERSION "${_libtorch_line}")
  endif()
endif()
