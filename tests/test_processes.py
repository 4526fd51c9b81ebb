"""Processes: forked, spawned, ending while calls run; and a library that is loaded twice."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed import KERNELS, LIBRARY

SECONDS = 120


@pytest.mark.parametrize("how", ["fork", "spawn", "process"])
def test_other_processes_rotate_as_this_one(how: str) -> None:
    program = Path(__file__).with_name("rotate_in_workers.py")
    subprocess.run([sys.executable, str(program), how], check=True, timeout=2 * SECONDS)


# Threads of C++ are in the middle of calls when the interpreter ends. (Daemon threads of Python end
# the process by a signal, in PyTorch's own operators too, up to Python 3.13: they ask for the GIL
# where an exception cannot pass.)
ENDING = """
import sys, threading, torch, torch_rope

@torch.jit.script
def work(x, positions):
    y = x
    for _ in range(300):
        y = torch.ops.rope.norm_apply(torch.ops.rope.apply(x, positions), None, positions)
    return y

x = torch.randn(512, 8, 64, requires_grad=True)
positions = torch.arange(512)[:, None]
futures = [torch.jit.fork(work, x, positions) for _ in range(3)]
thread = threading.Thread(target=lambda: torch_rope.apply(x, positions).sum().backward())
thread.start()
print("ends", flush=True)
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(3)", 3)])
def test_an_interpreter_ends_while_calls_run(end: str, code: int, tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # TorchScript reads its source.
    program.write_text(ENDING + end, encoding="utf-8")
    completed = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=SECONDS
    )
    assert (completed.stdout, completed.returncode) == ("ends\n", code), completed.stderr


TWICE = """
import sys, torch, torch_rope
library, copy = sys.argv[1:]
torch.ops.load_library(library)
x, positions = torch.randn(9, 64), torch.arange(9)
assert torch.equal(torch.ops.rope.apply(x, positions), torch_rope.apply(x, positions))
print("loaded", flush=True)
torch.ops.load_library(copy)
"""


def test_the_library_may_be_loaded_again_but_not_a_second_one(tmp_path: Path) -> None:
    copy = shutil.copy(LIBRARY, tmp_path / "librope_copy.so")
    shutil.copy(KERNELS, tmp_path)
    completed = subprocess.run(
        [sys.executable, "-c", TWICE, str(LIBRARY), str(copy)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert completed.stdout == "loaded\n", completed.stderr
    # PyTorch ends the process rather than have two implementations of an operator.
    assert completed.returncode != 0
    assert "Only a single TORCH_LIBRARY can be used to register the namespace rope" in (
        completed.stderr
    )
