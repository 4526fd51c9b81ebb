"""TorchInductor's cache and ATEN_CPU_CAPABILITY.

Code compiled for AVX-512 is found in the cache by a process whose capability is AVX2. It is built
with vectors of half the size and keeps its steps of 16 elements, so it reads and writes past the
ends of arrays. Needs a CPU with AVX-512.
"""

import os
import subprocess
import sys
import tempfile

import torch

CHILD = """
import torch

torch.manual_seed(0)
x = torch.randn(37, 61)
rotate = lambda x: x.sin() + x.sum(-1, keepdim=True)
error = (torch.compile(rotate)(x) - rotate(x)).abs().max().item()
hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
print(f"cache hits: {hits}, largest error: {error:.3g}")
raise SystemExit(3 if hits or not error < 1e-4 else 0)
"""


def run(capability: str, cache: str) -> int:
    """Compiles in a process with a CPU capability, and returns its exit status."""
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }
    process = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False
    )
    print(f"  {capability}: exit status {process.returncode}. {process.stdout.strip()}")
    return process.returncode


def is_present() -> bool:
    """Compiles for AVX-512, then for AVX2 with the same cache and with one of its own."""
    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as own:
        if run("avx512", shared) != 0 or run("avx2", own) != 0:
            raise SystemExit("The code is wrong or absent without a shared cache, too.")
        return run("avx2", shared) != 0


if __name__ == "__main__":
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise SystemExit("This needs a CPU with AVX-512, and ATEN_CPU_CAPABILITY not set.")
    print(f"torch {torch.__version__}: {'PRESENT' if is_present() else 'absent'}")
