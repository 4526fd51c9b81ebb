#!/usr/bin/env bash
# Builds, tests and measures torch-rope on the GPU of this machine, in less than eight minutes and without the network:
#   benchmarks/gpu.sh              results go to benchmarks/results/
#   benchmarks/gpu.sh some/folder
# PYTHON chooses the interpreter; its environment has torch with CUDA, the build's and the tests' requirements, and an nvcc of
# torch's CUDA. ROPE_SKIP_BUILD=1 takes the torch-rope that is installed. Peers and compute-sanitizer are used where they are
# installed. Each step has a limit of time; a step that fails is reported at the end, and those after it still run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
results=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$results"
failed=()

heading() { printf '\n===== %s (%d s) =====\n' "$*" "$SECONDS"; }

# Runs a step within so many seconds, and remembers whether it failed.
step() {
  local limit=$1 name=$2
  shift 2
  heading "$name"
  timeout --kill-after=10 "$limit" "$@" || failed+=("$name (exit status $?)")
}

if [ -z "${ROPE_SKIP_BUILD:-}" ]; then
  heading "Build"
  # Machine code for this card alone.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')}
  export TORCH_CUDA_ARCH_LIST
  ROPE_CUDA=1 timeout 120 "$python" -m pip install --quiet --no-build-isolation --no-deps .
fi

# From elsewhere, so that the installed package is imported and not the sources.
tests=$PWD/tests
benchmarks=$PWD/benchmarks
elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
cd "$elsewhere"

heading "Machine"
name=$("$python" - <<'PYTHON'
import datetime
import re
import sys

import torch
import torch_rope

if not torch.cuda.is_available():
    sys.exit("no CUDA device here")
if not torch_rope._C.has_cuda:
    sys.exit("torch-rope was built without its CUDA kernels")
card = torch.cuda.get_device_name()
print(f"{card}, torch {torch.__version__}, torch-rope {torch_rope.__version__}", file=sys.stderr)
date = datetime.datetime.now(datetime.timezone.utc).date()
print(date.isoformat() + "-" + re.sub("[^a-z0-9]+", "-", card.lower()).strip("-"))
PYTHON
)

pytest=("$python" -m pytest -q -W ignore -p no:cacheprovider)
step 40 "CUDA: graphs, streams, devices" "${pytest[@]}" "$tests/test_cuda.py" "$tests/test_cuda_code.py"
step 80 "The Python tests on CUDA" "${pytest[@]}" -k "cuda" \
  "$tests"/test_{apply,autograd,cos_sin,gradient_sums,in_place,layouts,numbers,pair}.py
if command -v compute-sanitizer > /dev/null; then
  step 40 "compute-sanitizer" compute-sanitizer --error-exitcode 1 "${pytest[@]}" \
    "$tests/test_cuda.py" -k "sanitizer"
else
  heading "compute-sanitizer is not here: left out"
fi

# The few cases of --quick: each has to be compiled by torch.compile, which takes most of the time.
step 150 "Benchmark" "$python" "$benchmarks/bench_apply.py" --device cuda --quick \
  --json "$results/$name.json" --markdown "$results/$name.md"
step 30 "Decoding" "$python" "$benchmarks/bench_decode.py" --json "$results/$name-decode.json" \
  --markdown "$results/$name-decode.md"
step 30 "Gradients of angles" "$python" "$benchmarks/bench_gradients.py" \
  --json "$results/$name-gradients.json" --markdown "$results/$name-gradients.md"

heading "Done"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "$results/$name.md"
