# librope_kernels.so: the kernels for CPU and CUDA, over plain descriptions of launches (csrc/kernels_api.h). Of torch it takes
# headers alone, so that one library serves all versions.

include(CudaCompiler)  # Sets ROPE_CUDA_ENABLED, and enables the language.

add_library(rope_kernel_options INTERFACE)
target_link_libraries(rope_kernel_options INTERFACE rope_options)
target_include_directories(rope_kernel_options SYSTEM INTERFACE
  $<TARGET_PROPERTY:LibTorch::LibTorch,INTERFACE_INCLUDE_DIRECTORIES>)

if(ROPE_CUDA_ENABLED)
  set(norm_gradients csrc/cuda/norm_gradient.cu csrc/cuda/wide_norm_gradient.cu)
  set(norms csrc/cuda/norm.cu csrc/cuda/wide_norm.cu)
  set(rotations csrc/cuda/rotate.cu csrc/cuda/sum.cu csrc/cuda/scatter.cu csrc/cuda/upload.cu csrc/cuda/start.cu)
  set(cuda_source "")
  foreach(group norm_gradients norms rotations)
    if(ROPE_UNITY_BUILD)  # CMake's own unity builds include CUDA since 3.31.
      list(TRANSFORM ${group} REPLACE "(.+)" "#include \"${PROJECT_SOURCE_DIR}/\\1\"")
      list(JOIN ${group} "\n" lines)
      file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/unity/${group}.cu CONTENT "${lines}\n" @ONLY)
      list(APPEND cuda_source ${PROJECT_BINARY_DIR}/unity/${group}.cu)
    else()
      list(APPEND cuda_source ${${group}})
    endif()
  endforeach()
else()
  set(cuda_source csrc/cuda/absent.cpp)
endif()
add_library(rope_kernels SHARED
  ${cuda_source}  # First: ninja starts with what takes longest.
  csrc/unsupported_dtype_in_kernels.cpp
  ${glibc_source})
target_link_libraries(rope_kernels PRIVATE rope_kernel_options)
target_link_options(rope_kernels PRIVATE -Wl,--no-undefined)

include(CpuKernels)  # csrc/cpu/*_kernel.cpp, once per CPU capability.

if(ROPE_CUDA_ENABLED)
  # --threads 0: the architectures are compiled side by side.
  set(cuda_options --fmad=false --expt-relaxed-constexpr --threads=0 -Xcompiler=-ffp-contract=off)
  set_source_files_properties(${cuda_source} PROPERTIES COMPILE_OPTIONS "${cuda_options}")
  # A CUDA runtime of the library's own, whatever version torch has: both share a device's context. nvcc's own link step
  # would add the toolkit's library folders.
  set_target_properties(rope_kernels PROPERTIES LINKER_LANGUAGE CXX)
  find_package(Threads REQUIRED)
  target_link_libraries(rope_kernels PRIVATE "${ROPE_CUDART_STATIC}" ${CMAKE_DL_LIBS} rt Threads::Threads)
  if(ROPE_GLIBC_2_28)  # There these are no part of libc.
    target_link_options(rope_kernels PRIVATE
      -Wl,--push-state,--no-as-needed,-l:libpthread.so.0,-l:libdl.so.2,-l:librt.so.1,--pop-state)
  endif()
  target_link_options(rope_kernels PRIVATE -Wl,--exclude-libs,ALL)
endif()
