# Compiles csrc/cpu/rotate_kernel.cpp and norm_kernel.cpp once for each CPU capability, with the macros and flags that
# PyTorch gives its own native/cpu files, and adds the objects to librope_kernels.so.

set(flags_DEFAULT "")
set(flags_AVX2 -mavx2 -mfma -mf16c)
set(flags_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma)
set(flags_AVX512_BF16 ${flags_AVX512} -mavx512bf16)
set(macros_AVX512_BF16 CPU_CAPABILITY_AVX512)  # What at::vec has for AVX512 serves it too.
set(capabilities DEFAULT)
if(ROPE_X86_KERNELS)
  list(APPEND capabilities AVX2 AVX512 AVX512_BF16)
  # For CPUs older than AVX2: at most a sixth slower than with -O2, in three quarters of the time.
  set(optimization_DEFAULT -O1 -ftree-vectorize)
  # GCC splits unaligned loads and stores by default, which is slower on every CPU that has AVX2.
  include(CheckCXXCompilerFlag)
  set(unsplit -mno-avx256-split-unaligned-load -mno-avx256-split-unaligned-store)
  check_cxx_compiler_flag("${unsplit}" ROPE_HAS_UNSPLIT_FLAGS)
  if(ROPE_HAS_UNSPLIT_FLAGS)
    list(APPEND flags_AVX2 ${unsplit})
  endif()
endif()

set(ROPE_KERNEL_OPTIONS "" CACHE STRING "More options of the compiler for the kernels (tests/sanitize.sh has some)")
foreach(capability IN LISTS capabilities)
  set(kernel rope_cpu_${capability})
  add_library(${kernel} OBJECT csrc/cpu/norm_kernel.cpp csrc/cpu/rotate_kernel.cpp)
  set_target_properties(${kernel} PROPERTIES UNITY_BUILD ${ROPE_UNITY_BUILD})
  target_link_libraries(${kernel} PRIVATE rope_kernel_options)
  target_compile_definitions(${kernel} PRIVATE CPU_CAPABILITY=${capability}
    CPU_CAPABILITY_${capability} ${macros_${capability}})
  target_compile_options(${kernel} PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O3> ${optimization_${capability}}
    ${flags_${capability}}
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized -Wno-uninitialized>  # GCC bug 105593, in its AVX-512 header.
    ${ROPE_KERNEL_OPTIONS})
  target_sources(rope_kernels PRIVATE $<TARGET_OBJECTS:${kernel}>)

  # An unoptimised build leaves inline functions in the object, so only optimised ones are asked.
  if(NOT capability STREQUAL "DEFAULT" AND CMAKE_NM AND CMAKE_BUILD_TYPE MATCHES "^Rel")
    set(stamp ${PROJECT_BINARY_DIR}/${kernel}.checked)
    add_custom_command(OUTPUT ${stamp}
      COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:${kernel}>" -DSTAMP=${stamp}
              -P ${PROJECT_SOURCE_DIR}/cmake/CheckKernelSymbols.cmake
      DEPENDS ${kernel} $<TARGET_OBJECTS:${kernel}> ${PROJECT_SOURCE_DIR}/cmake/CheckKernelSymbols.cmake
      COMMENT "Checking the symbols of ${kernel}" VERBATIM)
    target_sources(rope_kernels PRIVATE ${stamp})
  endif()
endforeach()
