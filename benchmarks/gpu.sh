#!/usr/bin/env bash
# Builds, tests and measures torch-rope on this machine's GPU, in less than eight minutes and without network access:
#   benchmarks/gpu.sh              results go to benchmarks/results/
#   benchmarks/gpu.sh some/folder
# PYTHON selects the interpreter; its environment needs torch with CUDA, the requirements of build and tests, and an nvcc for
# torch's CUDA. ROPE_SKIP_BUILD=1 uses the installed torch-rope. Peers, compute-sanitizer and pytest-xdist (parallel tests) are
# used if installed. Each step has a time limit; failures and figures are printed as they occur, since the machine may go away
# at any moment. A failed step does not stop the others; the failed ones are listed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
results=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$results"
failed=()
deadline=465 # seconds, for all steps
export PYTHONUNBUFFERED=1

heading() { printf '\n===== %s (%d s) =====\n' "$*" "$SECONDS"; }

# Runs a step with a limit in seconds, cut to the time left, and records whether it failed.
step() {
  local limit=$1 name=$2 left=$((deadline - SECONDS))
  shift 2
  heading "$name"
  if [ "$left" -lt 5 ]; then
    failed+=("$name (no time was left)")
    return
  fi
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@" || failed+=("$name (exit status $?)")
}

if [ -z "${ROPE_SKIP_BUILD:-}" ]; then
  heading "Build"
  # Machine code for this GPU only.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c '
import torch
print("{}.{}".format(*torch.cuda.get_device_capability()))')}
  export TORCH_CUDA_ARCH_LIST
  ROPE_CUDA=1 timeout 180 "$python" -m pip install --quiet --no-build-isolation --no-deps .
fi

# Run from elsewhere, to import the installed package and not the sources.
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

pytest=("$python" -m pytest -q --tb=no -rfE --failures-at-once --maxfail=40 -W ignore -p no:cacheprovider)
# Processes that share a step's tests, each with half a GiB of the GPU before its first tensor: few where kernels of other
# processes should not get between those of a test.
few=() many=()
if [ "$(nproc)" -ge 8 ] && "$python" -c "import xdist" 2> /dev/null; then
  few=(-n 4 --dist worksteal) many=(-n 8 --dist worksteal)
fi

step 100 "CUDA: order, graphs, streams, devices, machine code" env OMP_NUM_THREADS=2 "${pytest[@]}" "${few[@]}" \
  "$tests"/test_{cuda_order,cuda,cuda_code}.py
step 80 "Benchmark" "$python" "$benchmarks/bench_cuda.py" --without-peers --json "$results/$name.json" \
  --markdown "$results/$name.md"
step 20 "Decoding, and the host's time" "$python" "$benchmarks/bench_decode.py" --json "$results/$name-decode.json" \
  --markdown "$results/$name-decode.md"
step 20 "Gradients of angles" "$python" "$benchmarks/bench_gradients.py" --json "$results/$name-gradients.json" \
  --markdown "$results/$name-gradients.md"
# Every test of a device: the values and derivatives of the operators first.
first=("$tests"/test_{apply,norm,cos_sin,pair,in_place,layouts,numbers,gradient_sums,autograd}.py)
step 150 "The Python tests on CUDA" env OMP_NUM_THREADS=2 "${pytest[@]}" "${many[@]}" -k "[cuda" \
  --ignore-glob="*/test_cuda*.py" "${first[@]}" "$tests"
if command -v compute-sanitizer > /dev/null; then
  # All tools at once: importing torch takes most of the time. Without PyTorch's cache of memory each tensor is an
  # allocation of its own, and the tools see its ends and whether it was written.
  step 60 "compute-sanitizer: memcheck, racecheck, initcheck, synccheck" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    xargs -P 4 -I TOOL compute-sanitizer --tool TOOL --error-exitcode 1 "${pytest[@]}" "$tests/test_cuda.py" \
    -k "sanitizer" <<< $'memcheck\nracecheck\ninitcheck\nsynccheck'
else
  heading "compute-sanitizer is not here: left out"
fi
# Few cases: each has to be compiled by torch.compile, which takes most of the time.
step 60 "Peers" "$python" "$benchmarks/bench_cuda.py" --cases "^bfloat16 BSHD ((1|1024|4096|16384)$|4096, norm)" \
  --json "$results/$name-peers.json" --markdown "$results/$name-peers.md"

heading "Done"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
echo "$results/$name.md"
