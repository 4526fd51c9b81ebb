"""The order of what runs on a CUDA device.

From compute capability 9.0 on a kernel may start before the one in front of it has ended, and the
frequencies of max_wavelength are written to device memory while other kernels run. Neither may be
seen: every test compares with calls that had the device to themselves.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import reference
import torch
import torch_rope
from angles import ANGLES
from graphs import capture
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from torch import Tensor

Shape = tuple[int, ...]

# (tokens, heads, head_dim): a few blocks, many tokens of few rows, and many blocks.
SHAPES: list[Shape] = [(1, 40, 128), (1000, 2, 64), (4096, 40, 128)]
PLACES = ("eager", "graph", "side stream")

CALLS_IN_A_ROW = 24
CYCLES = 5_000_000  # Some milliseconds: longer than the host needs to enqueue what comes after.


def inputs(device: str, shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Makes a tensor and its positions."""
    x = random_values(shape, torch.bfloat16, device, seed=seed)
    return x, random_positions((shape[0], 1), device=device, seed=seed)


def run(place: str, call: Callable[[], Any]) -> Any:
    """Runs a call where it is told to, and waits for its end."""
    torch.cuda.synchronize()
    if place == "graph":
        graph, result = capture(call)
        for _ in range(3):
            graph.replay()
    elif place == "side stream":
        with torch.cuda.stream(torch.cuda.Stream()):
            result = call()
    else:
        result = call()
    torch.cuda.synchronize()
    return result


def rotate_in_a_row(x: Tensor, positions: Tensor, in_place: bool, alone: bool = False) -> Tensor:
    """Rotates a copy again and again.

    Out of place a call writes where the one in front may still be reading: the allocator has that
    memory back.
    """
    x = x.clone()
    for _ in range(CALLS_IN_A_ROW):
        if in_place:
            torch_rope.apply_(x, positions)
        else:
            x = torch_rope.apply(x, positions)
        if alone:
            torch.cuda.synchronize()
    return x


# ---- Kernels that start early ----


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_calls_in_a_row_read_what_the_one_in_front_wrote(
    cuda: str, shape: Shape, place: str, in_place: bool
) -> None:
    x, positions = inputs(cuda, shape)
    expected = rotate_in_a_row(x, positions, in_place, alone=True)
    actual = run(place, lambda: rotate_in_a_row(x, positions, in_place))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_at_the_same_time_do_not_disturb_each_other(
    cuda: str, shape: Shape, in_place: bool
) -> None:
    both = [inputs(cuda, shape, seed) for seed in (0, 1)]
    expected = [rotate_in_a_row(*one, in_place, alone=True) for one in both]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(3):
        actual = []
        torch.cuda.synchronize()
        for stream, one in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)  # Until both streams have all of their work.
                actual.append(rotate_in_a_row(*one, in_place))
        torch.cuda.synchronize()
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams_that_wait_for_each_other_rotate_in_turn(cuda: str, shape: Shape) -> None:
    x, positions = inputs(cuda, shape)
    expected = rotate_in_a_row(x, positions, in_place=True, alone=True)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for i in range(CALLS_IN_A_ROW):
        streams[i % 2].wait_stream(streams[1 - i % 2])
        with torch.cuda.stream(streams[i % 2]):
            torch_rope.apply_(x, positions)
    torch.cuda.synchronize()
    assert_same_bits(x, expected)


@pytest.mark.parametrize("between", [0, 1, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("heads", [1, 40])
@pytest.mark.parametrize(
    "angles", ["positions", "positions and inv_freq", "tables", "rows of tables"]
)
def test_a_call_waits_for_what_is_written_late(
    cuda: str, angles: str, heads: int, place: str, between: int
) -> None:
    """Other rotations between the writer and the call must not let it start before the writer ends.

    Each of them may start while the one in front still waits.
    """
    x = random_values((33, heads, 64), torch.bfloat16, cuda)
    arguments = {"x": x, **ANGLES[angles](cuda)}
    rotate = torch_rope.apply_cos_sin if "cos" in arguments else torch_rope.apply
    expected = rotate(**arguments)
    other, other_positions = inputs(cuda, (1, 40, 128), seed=5)
    for name, written in arguments.items():
        late = torch.zeros_like(written)

        def call(name: str = name, written: Tensor = written, late: Tensor = late) -> Tensor:
            late.zero_()
            torch.cuda._sleep(CYCLES)
            late.copy_(written)
            for _ in range(between):
                torch_rope.apply(other, other_positions)
            return rotate(**{**arguments, name: late})

        assert_same_bits(run(place, call), expected)


@pytest.mark.parametrize("place", PLACES)
def test_what_comes_after_a_call_sees_all_that_it_wrote(cuda: str, place: str) -> None:
    x, positions = inputs(cuda, SHAPES[-1])
    rotated = torch_rope.apply(x, positions)
    torch.cuda.synchronize()
    expected = rotated, rotated, torch_rope.apply(rotated[-1:], positions[-1:])

    def call() -> tuple[Tensor, ...]:
        first = torch_rope.apply(x, positions)
        last = torch_rope.apply(first[-1:], positions[-1:])  # Of one token: it could start early.
        second = torch_rope.apply(x, positions)
        return first, second.clone(), last

    for one, other in zip(run(place, call), expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("place", PLACES)
def test_what_comes_after_a_call_does_not_change_what_it_reads(cuda: str, place: str) -> None:
    x, positions = inputs(cuda, SHAPES[-1])
    expected = torch_rope.apply(x, positions)

    def call() -> tuple[Tensor, ...]:
        one, other = x.clone(), x.clone()
        first = torch_rope.apply(one, positions)
        torch_rope.apply_(one[-1:], positions[:1])
        second = torch_rope.apply(other, positions)
        other.zero_()
        return first, second

    for one in run(place, call):
        assert_same_bits(one, expected)


@pytest.mark.parametrize("place", PLACES)
def test_a_call_can_take_its_angles_from_what_the_one_in_front_wrote(cuda: str, place: str) -> None:
    x = random_values((33, 40, 64), torch.bfloat16, cuda)
    source = random_values((33, 1, 128), torch.float32, cuda, seed=1)
    positions = random_positions((33, 1), device=cuda)

    def calls(alone: bool) -> list[Tensor]:
        results = []
        for rotate in (
            lambda made: torch_rope.apply_cos_sin(x, made[..., :32], made[..., 32:64]),
            lambda made: torch_rope.apply(x, positions, made[0, 0, :32]),
            lambda made: torch_rope.apply(x, made[..., 0]),
        ):
            made = torch_rope.apply(source, positions)
            if alone:
                torch.cuda.synchronize()
            results.append(rotate(made))
        return results

    for one, other in zip(run(place, lambda: calls(False)), calls(True), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("place", PLACES)
def test_gradients_read_what_the_calls_in_front_wrote(cuda: str, place: str) -> None:
    x = random_values((33, 8, 64), torch.bfloat16, cuda).requires_grad_()
    inv_freq = random_inv_freq((32,), torch.float32, cuda).requires_grad_()
    positions = random_positions((33, 1), torch.float32, cuda, low=0, high=99)
    gradient = random_values((33, 8, 64), torch.bfloat16, cuda, seed=1)

    def gradients(alone: bool) -> tuple[Tensor, ...]:
        rotated: Tensor = x
        for _ in range(4):
            rotated = torch_rope.apply(rotated, positions, inv_freq)
            if alone:
                rotated.register_hook(lambda _: torch.cuda.synchronize())
                torch.cuda.synchronize()
        return torch.autograd.grad(rotated, (x, inv_freq), gradient)

    expected = gradients(True)
    for one, other in zip(run(place, lambda: gradients(False)), expected, strict=True):
        assert_same_bits(one, other)


# Rotates in a row, in a graph too. The first call of the process is captured, if it is told so.
PROGRAM = """
import sys
import torch
import torch_rope
from angles import ANGLES
from graphs import capture

x, positions = (tensor.cuda() for tensor in torch.load(sys.argv[1]))

def call():
    result = x
    for _ in range(24):
        result = torch_rope.apply(result, positions, max_wavelength=777.0)
    return result

graph, captured = capture(call, warm_up=sys.argv[3] == "warm")
graph.replay()
torch.save((captured.cpu(), call().cpu()), sys.argv[2])
"""


def run_program(program: str, *arguments: str, **environment: str) -> None:
    """Runs a program of Python in a process of its own."""
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    completed = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr[-2000:]


@pytest.mark.parametrize("dependent_launch", ["0", "1"])
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_the_bits_are_the_same_with_and_without_dependent_launch(
    cuda: str, tmp_path: Path, start: str, dependent_launch: str
) -> None:
    x, positions = inputs("cpu", (257, 40, 128))
    given, made = str(tmp_path / "given.pt"), str(tmp_path / "made.pt")
    torch.save((x, positions), given)
    run_program(PROGRAM, given, made, start, ROPE_PDL=dependent_launch)
    expected = x.to(cuda)
    for _ in range(CALLS_IN_A_ROW):
        expected = torch_rope.apply(expected, positions.to(cuda), max_wavelength=777.0)
        torch.cuda.synchronize()
    for actual in torch.load(made):
        assert_same_bits(actual, expected)


# ---- Tables of frequencies in device memory ----

_new_wavelengths = itertools.count(20_000)


def new_wavelength() -> float:
    """Returns a max_wavelength that no call of this process has had: it has no table yet."""
    return float(next(_new_wavelengths))


@pytest.mark.parametrize("positions_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_call_has_the_bits_of_later_ones(
    cuda: str, shape: Shape, dtype: torch.dtype, positions_dtype: torch.dtype
) -> None:
    x = random_values(shape, dtype, cuda)
    positions = random_positions((shape[0], 1), positions_dtype, cuda)
    options: dict[str, Any] = {"max_wavelength": new_wavelength(), "scale_factor": 1.5}
    torch.cuda.synchronize()
    first = [torch_rope.apply(x, positions, **options) for _ in range(4)]  # Nothing waits.
    torch.cuda.synchronize()
    later = [torch_rope.apply(x, positions, **options) for _ in range(2)]
    for one in (*first, *later):
        assert_same_bits(one, later[-1])
    some = slice(0, None, 97)
    assert_rotated(later[-1][some], reference.apply(x[some], positions[some], **options))


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("called_before", [False, True])
def test_the_first_call_can_be_captured(cuda: str, called_before: bool, mode: str) -> None:
    x, positions = inputs(cuda, (33, 40, 128))
    options = {"max_wavelength": new_wavelength()}

    def call() -> tuple[Tensor, Tensor]:
        return tuple(torch_rope.apply(x, positions, **options) for _ in range(2))

    if called_before:  # The table is made, and may not be complete.
        torch_rope.apply(x, positions, **options)
    graph, captured = capture(call, warm_up=False, mode=mode)
    for seed in (0, 1, 2):
        x.copy_(random_values(tuple(x.shape), x.dtype, seed=seed))
        graph.replay()
        for one, other in zip(captured, call(), strict=True):
            assert_same_bits(one, other)
    assert_rotated(captured[0], reference.apply(x, positions, **options))


def test_threads_and_streams_have_the_same_bits_from_the_first_call_on(cuda: str) -> None:
    x, positions = inputs(cuda, (33, 40, 128))
    shared, own = new_wavelength(), [new_wavelength() for _ in range(8)]
    barrier = Barrier(len(own))
    torch.cuda.synchronize()

    def rotate(wavelength: float) -> Tensor:
        return torch_rope.apply(x, positions, max_wavelength=wavelength)

    def work(thread: int) -> list[tuple[Tensor, Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait()
            return [(rotate(shared), rotate(own[thread])) for _ in range(10)]

    with ThreadPoolExecutor(len(own)) as executor:
        results = list(executor.map(work, range(len(own))))
    torch.cuda.synchronize()
    for wavelength, pairs in zip(own, results, strict=True):
        expected = rotate(shared), rotate(wavelength)
        for pair in pairs:
            for one, other in zip(pair, expected, strict=True):
                assert_same_bits(one, other)


# In a process of its own: as many tables as a device has are never freed.
MANY = """
import sys
import torch
import torch_rope
from angles import ANGLES
from graphs import capture

x, positions = (tensor.cuda() for tensor in torch.load(sys.argv[1]))

def rotate(wavelength):
    return torch_rope.apply(x, positions, max_wavelength=wavelength)

wavelengths = [1000.0 + n for n in range(150)]
rotate(wavelengths[0])
torch.cuda.synchronize()
graphs = [capture(lambda w=w: rotate(w)) for w in (wavelengths[0], wavelengths[-1])]
first = [rotate(wavelength) for wavelength in wavelengths]
torch.cuda.synchronize()
again = [rotate(wavelength) for wavelength in wavelengths]
for graph, _ in graphs:
    graph.replay()
assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
assert torch.equal(graphs[0][1], first[0])
assert torch.equal(graphs[1][1], first[-1])
torch.save([one.cpu() for one in first], sys.argv[2])
"""


def test_more_wavelengths_than_there_are_tables_are_served(cuda: str, tmp_path: Path) -> None:
    x, positions = inputs("cpu", (33, 4, 128))
    given, made = str(tmp_path / "given.pt"), str(tmp_path / "made.pt")
    torch.save((x, positions), given)
    run_program(MANY, given, made)
    rotated = torch.load(made)
    for n in (0, 1, 63, 64, 65, 149):
        assert_rotated(rotated[n], reference.apply(x, positions, max_wavelength=1000.0 + n))
