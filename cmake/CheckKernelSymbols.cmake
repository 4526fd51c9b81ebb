# Fails if objects compiled for AVX2 or AVX512 export anything but functions of rope::cpu.
#   cmake -DNM=nm "-DOBJECTS=rotate.o;norm.o" -DSTAMP=file -P CheckKernelSymbols.cmake
#
# The linker may keep a weak symbol (an inline function, a standard library template) from these objects for the whole
# program, and a CPU without AVX then fails with an illegal instruction in unrelated code.

execute_process(COMMAND ${NM} --defined-only --extern-only --demangle ${OBJECTS}
  OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE ";" "," output "${output}")
string(REPLACE "\n" ";" lines "${output}")

set(stray "")
set(entries 0)
foreach(line IN LISTS lines)
  if(line MATCHES "^[0-9a-f]+ [TDBR] rope::cpu::")
    math(EXPR entries "${entries} + 1")
  elseif(line MATCHES "^[0-9a-f]* +([A-Za-z]) (.*)$")
    string(APPEND stray "  ${CMAKE_MATCH_1} ${CMAKE_MATCH_2}\n")
  endif()
endforeach()

if(stray)
  message(FATAL_ERROR
    "${OBJECTS} may export strong symbols of rope::cpu only, but they also define (nm's letter, name):\n${stray}"
    "Put what the kernel needs in an anonymous namespace, or force it inline; see cmake/CheckKernelSymbols.cmake.")
elseif(entries EQUAL 0)
  message(FATAL_ERROR "${OBJECTS} define no function of rope::cpu.")
endif()
file(TOUCH ${STAMP})
