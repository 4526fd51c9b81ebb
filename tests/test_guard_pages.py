"""No kernel touches a byte that is not a tensor's: tensors lie next to inaccessible pages.

    python -m pytest tests/test_guard_pages.py

Inputs, outputs, temporaries and workspaces end at an inaccessible page, or begin after one; outputs
are NaN before they are written. See guarded_calls.py for the calls and guard.cpp for the memory.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
BEST = torch.backends.cpu.get_cpu_capability()


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the library that guards memory."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("inaccessible pages need Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    libraries = Path(torch.__file__).parent / "lib"
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *includes]
    link = [f"-L{libraries}", "-lc10", f"-Wl,-rpath,{libraries}"]
    subprocess.run(
        [compiler, *options, FOLDER / "guard.cpp", "-o", library, *link], check=True, timeout=300
    )
    return library


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_next_to_tensors_is_touched(guard: Path, capability: str, tmp_path: Path) -> None:
    if BEST not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(BEST):
        pytest.skip(f"this CPU has no {capability}")
    last_call = tmp_path / "call"
    completed = subprocess.run(
        [sys.executable, "-X", "faulthandler", FOLDER / "guarded_calls.py", last_call],
        env={
            **os.environ,
            "ATEN_CPU_CAPABILITY": capability.lower(),
            "LD_PRELOAD": str(guard),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    if completed.returncode != 0:
        call = last_call.read_text() if last_call.exists() else "none"
        pytest.fail(
            f"exit status {completed.returncode} in the call\n{call}\n{completed.stdout[-3000:]}",
            pytrace=False,
        )
    assert completed.stdout.startswith(f"{capability}: ")
