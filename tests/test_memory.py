"""What calls leave behind: memory stays flat in long runs, and in place nothing is allocated."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_rope
from reference import random_values
from torch import Tensor

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Returns what the process has in memory (Linux)."""
    return int(STATM.read_text().split()[1]) * 4096


def call_in_every_form(tokens: int, trains: bool) -> Callable[[], None]:
    """Returns a function that makes one call of each form on tensors of this many tokens."""
    q, k = (random_values((tokens, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 1))
    weight = random_values((64,), seed=2).requires_grad_(trains)
    table = random_values((tokens, 1, 32), seed=3)
    positions = torch.arange(tokens)[:, None]
    x = q.clone().requires_grad_(trains)

    def call() -> None:
        torch_rope.apply_((q, k), positions)
        torch_rope.apply_cos_sin_(q, table, table)
        torch_rope.norm_apply_((q, k), None, positions)
        rotated, _ = torch_rope.apply((x, k), positions)
        normalized, _ = torch_rope.norm_apply((rotated, k), (weight, None), positions)
        result = torch_rope.norm_apply_cos_sin(normalized, weight, table, table)
        if trains:
            torch.autograd.grad(result, (x, weight), result)

    return call


def growth(tokens: int, trains: bool, calls: int) -> int:
    """Returns by how much these calls make the process larger, after a tenth as many."""
    torch.set_num_threads(1)  # Threads that wait for each other beside other tests take minutes.
    call = call_in_every_form(tokens, trains)
    for _ in range(calls // 10):
        call()
    before = resident_bytes()
    for _ in range(calls):
        call()
    return resident_bytes() - before


# Six calls each: a million of the small ones, ten thousand of the large ones.
@pytest.mark.skipif(not STATM.exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("tokens", "trains", "calls"),
    [(1, False, 170_000), (3, True, 5_000), (2_048, False, 1_700), (2_048, True, 50)],
)
def test_long_runs_keep_memory_flat(tokens: int, trains: bool, calls: int) -> None:
    # In a process of its own: what earlier tests left in this one comes and goes.
    program = f"import test_memory as t; print(t.growth({tokens}, {trains}, {calls}))"
    run = [sys.executable, "-c", program]
    folder = Path(__file__).parent
    grown = subprocess.run(run, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
    assert int(grown) < 8 << 20


def allocations_in(call: Callable[[], object]) -> list[int]:
    """Returns the bytes of each block that PyTorch allocates in a call, whether freed or not."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    return [
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    ]


def strided(x: Tensor) -> Tensor:
    """Returns a copy whose embedding axis has a stride of 2."""
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


@pytest.mark.parametrize("layout", [torch.clone, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_nothing_is_allocated(
    device: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    if device != "cpu":
        pytest.skip("counted on the CPU; tests of CUDA count launches")
    q, k = (layout(random_values((512, heads, 128), dtype)) for heads in (8, 2))
    positions = torch.arange(512)[:, None]
    table = random_values((512, 1, 64))
    weight = random_values((128,), dtype)
    calls: list[Callable[[], object]] = [
        lambda: torch_rope.apply_((q, k), positions),
        lambda: torch_rope.apply_cos_sin_((q, k), table, table),
        lambda: torch_rope.norm_apply_((q, k), (weight, weight), positions),
        lambda: torch_rope.norm_apply_((q, k), None, positions, norm_axes=(-2, -1)),
        lambda: torch_rope.norm_apply_cos_sin_(q, weight, table, table, norm_last=True),
    ]
    assert sum(allocations_in(lambda: q.clone())) >= q.numel() * q.element_size()  # It counts.
    for call in calls:
        call()
        assert sum(allocations_in(call)) == 0


def test_a_weight_for_each_token_needs_no_more_memory_than_x() -> None:
    x = random_values((4000, 8, 64)).requires_grad_()
    weight = random_values((4000, 8, 64), seed=1).requires_grad_()
    output = torch_rope.norm_apply(x, weight, torch.arange(4000)[:, None])
    grad = output.detach()
    sizes = allocations_in(lambda: torch.autograd.grad(output, (x, weight), grad))
    assert max(sizes) <= 2 * x.nbytes


ADVISED = """
import sys, torch, torch_rope
from pathlib import Path

def huge_pages_wanted(x):
    # Of the mappings that hold the tensor, the flags: "hg" is what madvise sets.
    begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
    flags, inside = set(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(address, 16) for address in head.split("-"))
            inside = low < end and begin < high
        elif inside and line.startswith("VmFlags:"):
            flags.update(line.split()[1:])
    return "hg" in flags

x = torch.zeros(16, 1024, 1024)
positions = torch.arange(1024)
others = torch.zeros(16, 1024, 1024)
y = torch_rope.apply(x, positions)
torch_rope.apply_(others, positions)
print(huge_pages_wanted(x), huge_pages_wanted(others), huge_pages_wanted(y))
"""


@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_only_fresh_outputs_get_huge_pages_unless_turned_off(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no /proc here")
    monkeypatch.delenv("ROPE_HUGE_PAGES", raising=False)
    if variable is not None:
        monkeypatch.setenv("ROPE_HUGE_PAGES", variable)
    completed = subprocess.run(
        [sys.executable, "-c", ADVISED], check=True, capture_output=True, text=True
    )
    given, in_place, fresh = completed.stdout.split()
    assert (given, in_place) == ("False", "False")
    assert fresh == str(variable != "0")
