#!/usr/bin/env bash
# Runs the tests under sanitizers: builds of the library that detect errors of memory, undefined behaviour and data races.
#   tests/sanitize.sh address [pytest arguments]  AddressSanitizer and UndefinedBehaviorSanitizer: Python tests, by default
#                                                 those of the operators; `tests/sanitize.sh address tests` runs all
#   tests/sanitize.sh cpp                         the same: the GoogleTests
#   tests/sanitize.sh fuzz [seconds [options]]    the same: the corpus of tests/fuzz, then libFuzzer for a minute or so long
#   tests/sanitize.sh merge                       adds what it found to the corpus, and minimizes that
#   tests/sanitize.sh thread                      ThreadSanitizer: tests/cpp/test_threads.cpp
#   tests/sanitize.sh malloc [pytest arguments]   glibc's checking malloc, with the installed torch-rope
# Needs the python, CMake and PyTorch of the tests; all but malloc need clang with its runtime libraries (14 or newer;
# CLANG=clang++-18 picks one). The builds go to build/ and are incremental; JOBS limits the compilers at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

clang=${CLANG:-clang++}
python=${PYTHON:-python}
jobs=${JOBS:-$(nproc)}
# Every operator in every layout and form, and derivatives.
of_operators=(tests/test_{in_place,layouts,pair,norm,gradient_sums,threads}.py)
# A report is written to the descriptor right before the end of the process: pytest must not capture that.
pytest_options=(-q --capture=sys -p no:cacheprovider)
generator=()
if command -v ninja > /dev/null; then
  generator=(-G Ninja)
fi

# Sanitizers in the build, the programs that are built and the options that their reports need.
use() {
  build=build/$1
  package=$PWD/$build/package
  mkdir -p build
  local runtimes link kernels
  runtimes=$("$clang" -print-runtime-dir)
  [ -d "$runtimes" ] || runtimes=$("$clang" -print-resource-dir)/lib/linux
  flags="-fsanitize=$2 -fno-sanitize-recover=all -fsanitize-ignorelist=$PWD/tests/sanitizer-ignore.txt"
  flags+=" -fno-omit-frame-pointer"
  if [ "$1" = address ]; then
    flags+=" -shared-libsan"
    link="-Wl,-rpath,$runtimes"
    # The runtime must be loaded first, and libstdc++ before an interpreter that does not need it, for exceptions.
    preload=$runtimes/libclang_rt.asan.so
    [ -e "$preload" ] || preload=$runtimes/libclang_rt.asan-$(uname -m).so
    preload+=:$("$clang" -print-file-name=libstdc++.so.6)
    # AddressSanitizer alone, by calls: the kernels are large functions, and take five times as long with all checks.
    kernels="-fno-sanitize=undefined,fuzzer-no-link;SHELL:-mllvm -asan-instrumentation-with-call-threshold=0"
  else
    link="-Wl,--warn-unresolved-symbols" # The runtime is in the program.
    kernels=
  fi
  # OpenMP's runtime is not instrumented; without it at::parallel_for runs the same blocks, one after the other.
  options=("${generator[@]}" -DCMAKE_CXX_COMPILER="$clang" -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1"
    "-DCMAKE_CXX_FLAGS=$flags" "-DCMAKE_SHARED_LINKER_FLAGS=$link" "-DCMAKE_MODULE_LINKER_FLAGS=$link"
    "-DCMAKE_EXE_LINKER_FLAGS=$link" "-DROPE_KERNEL_OPTIONS=$kernels" -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON)
}

# Configures and builds targets of a project.
build() {
  local source=$1 folder=$2 prefix=$3 targets=$4
  shift 4
  # shellcheck disable=SC2086 # The targets are words.
  if ! { cmake -S "$source" -B "$folder" "${options[@]}" -DCMAKE_PREFIX_PATH="$prefix" "$@" &&
    cmake --build "$folder" --parallel "$jobs" --target $targets; } > "$build.log" 2>&1; then
    tail -n 40 "$build.log"
    exit 1
  fi
}

# Builds these targets of the library's project, with further options of CMake.
build_targets() {
  local targets=$1 libtorch
  shift
  libtorch=$("$python" -c 'import importlib.util as util; print(*util.find_spec("torch").submodule_search_locations)')
  build . "$build" "$libtorch" "$targets" -DROPE_CUDA=OFF -DROPE_X86_KERNELS="${X86_KERNELS:-OFF}" \
    -DCMAKE_INSTALL_PREFIX="$package/torch_rope" "$@"
}

# The same, with the library, and installs that as a package.
build_package() {
  build_targets "rope $1" "${@:2}"
  mkdir -p "$package"
  cp -R python/torch_rope "$package"
  cmake --install "$build" > /dev/null
}

# Builds a program of tests/cpp that uses the package.
build_consumer() {
  build tests/cpp "$build/cpp" "$package/torch_rope" "$*"
}

# Those of the address build are for Python, for the GoogleTests and for the fuzzer alike.
use_address() { use address address,undefined,fuzzer-no-link; }

# Without the package and the Python module, which takes as long to compile as half of the library.
build_fuzzer() {
  use_address
  build_targets fuzz_operators -DROPE_FUZZ=ON
}

# The smallest set of inputs that reaches everything. What failed once may not be in it.
corpus=tests/fuzz/corpus.tar.gz
regressions=tests/fuzz/regressions

# Unpacks it to build/corpus. New inputs go to build/fuzz.
unpack_corpus() {
  rm -rf build/corpus
  mkdir -p build/fuzz build/corpus
  tar -xzf "$corpus" -C build/corpus
}

# Python and LibTorch never free some of their objects; tests/test_memory.py looks for leaks.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
case ${1:-} in
  address)
    shift
    use_address
    build_package _C -DROPE_PYTHON=ON -DPython_EXECUTABLE="$(command -v "$python")"
    LD_PRELOAD=$preload PYTHONPATH=$package \
      "$python" -m pytest "${pytest_options[@]}" "${@:-${of_operators[@]}}"
    ;;
  cpp)
    use_address
    build_package test_cuda -DROPE_PYTHON=OFF -DROPE_TESTS=ON
    build_consumer test_api test_modules test_registration test_threads
    for program in "$build"/cpp/test_{api,modules,registration,threads} "$build"/tests/cpp/internal/test_cuda; do
      LD_PRELOAD=$preload "$program" --gtest_brief=1
    done
    ;;
  fuzz)
    build_fuzzer
    unpack_corpus
    limits=(-rss_limit_mb=2048 -malloc_limit_mb=256 -timeout=20 -artifact_prefix=build/)
    LD_PRELOAD=$preload "$build/tests/fuzz/fuzz_operators" "${limits[@]}" -runs=0 build/corpus "$regressions"
    LD_PRELOAD=$preload "$build/tests/fuzz/fuzz_operators" "${limits[@]}" -max_total_time="${2:-60}" -max_len=160 \
      "${@:3}" build/fuzz build/corpus "$regressions"
    ;;
  merge)
    build_fuzzer
    unpack_corpus
    rm -rf build/merged && mkdir build/merged
    LD_PRELOAD=$preload "$build/tests/fuzz/fuzz_operators" -merge=1 build/merged build/corpus build/fuzz
    tar -C build/merged --sort=name --owner=0 --group=0 --mtime=2000-01-01 -czf "$corpus" .
    ;;
  thread)
    use thread thread
    build_package ""
    build_consumer test_threads
    "$build/cpp/test_threads"
    ;;
  malloc)
    shift
    GLIBC_TUNABLES=glibc.malloc.check=3 LD_PRELOAD=libc_malloc_debug.so.0 \
      "$python" -m pytest "${pytest_options[@]}" "${@:-${of_operators[@]}}"
    ;;
  *)
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
