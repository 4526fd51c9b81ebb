"""The machine code of the CUDA kernels, read from the built library. Needs no GPU."""

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch_rope
from installed import KERNELS

# Elements in 16 bytes, which is also the number of pairs in a thread's column. Those of float64 are
# loaded and stored one by one.
PAIRS_OF_A_VECTOR = {"c10::BFloat16": 8, "c10::Half": 8, "float": 4}

# An SM has 65,536 registers. Blocks have at most 256 threads, 2 blocks per SM, or 4 for usual calls
# (3 on 10.0 and later). For few rows and for gradients of norms they have 128 threads, 4 blocks per
# SM; for norms of any kind up to 512 threads, one block.
MOST_REGISTERS = 128
# Blocks of 128 threads, 3 per SM; and of 256 threads, one per SM.
MOST_REGISTERS_OF_FULL_WIDTH_GRADIENTS = 168
MOST_REGISTERS_OF_WIDE_64_BIT_KERNELS = 255
MOST_REGISTERS_OF_USUAL_CALLS = {"sm_80": 64, "sm_90": 64}
MOST_REGISTERS_OF_USUAL_CALLS_LATER = 80


class Kernel(NamedTuple):
    """What identifies a kernel."""

    # "rotate", "rotate_few_rows" or "sum"; "norm", "norm_gradient" and both with "wide_" in front;
    # "scatter" or "groups"
    work: str
    dtype: str
    pairs: int = 0
    interleaved: bool = False
    index_bits: int = 64
    full_width: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether it reads rows of q and k."""
        return self.pairs > 0

    @property
    def has_vectors(self) -> bool:
        """Whether it loads and stores 16 bytes at a time."""
        return self.pairs > 1

    @property
    def first_loads(self) -> int:
        """How many vectors of rows a thread loads before it uses the first."""
        rows = 1 if self.work.startswith("wide_") else 2
        has_gradients = self.work == "sum" or self.work.endswith("gradient")
        return rows * (4 if has_gradients else 2)

    @property
    def is_usual(self) -> bool:
        """Whether most calls use it: one cosine per pair, few dimensions, no float64."""
        return (
            self.work in ("rotate", "norm")
            and self.dtype != "double"
            and self.index_bits == 32
            and not self.full_width
        )

    @property
    def most_registers(self) -> int:
        """How many registers leave room for the blocks that are planned."""
        if self.work == "norm_gradient" and self.full_width:
            return MOST_REGISTERS_OF_FULL_WIDTH_GRADIENTS
        if self.work.startswith("wide_") and self.index_bits == 64:
            return MOST_REGISTERS_OF_WIDE_64_BIT_KERNELS
        return MOST_REGISTERS


@cache
def cuobjdump(*options: str) -> str:
    """Runs cuobjdump, from a toolkit or from Triton, on the library; skips if there is none."""
    if not torch_rope._C.has_cuda:
        pytest.skip("torch-rope was built without its CUDA kernels")
    tool = shutil.which("cuobjdump")
    if tool is None:
        try:
            import triton
        except ImportError:
            pytest.skip("no cuobjdump here")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        if not Path(tool).exists():
            pytest.skip("no cuobjdump here")
    command = [tool, *options, str(KERNELS)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def architectures() -> tuple[str, ...]:
    """Lists those that the library has machine code for."""
    listing = cuobjdump("--list-elf")
    return tuple(dict.fromkeys(re.findall(r"\.(sm_\d+[af]?)\.", listing)))


def kernel_of(name: str) -> Kernel:
    """Returns the kernel of a mangled name."""
    if found := re.search(r"\d(scatter|groups)_kernelI([fd])E", name):
        return Kernel(found[1], "float" if found[2] == "f" else "double")
    found = re.search(
        r"\d(rotate|rotate_few_rows|sum|(?:wide_)?norm(?:_gradient)?)_kernelI.*?ThreadI(.*?)Li(\d+)ELb([01])E([il])(?:Lb([01])E)?E",
        name,
    )
    assert found is not None, name
    dtypes = {"N3c108BFloat16E": "c10::BFloat16", "N3c104HalfE": "c10::Half", "f": "float"}
    dtype = dtypes.get(found[2], "double")
    bits = 32 if found[5] == "i" else 64
    return Kernel(found[1], dtype, int(found[3]), found[4] == "1", bits, found[6] == "1")


@cache
def resources(architecture: str) -> dict[Kernel, dict[str, int]]:
    """Returns registers, stack and local memory of each kernel."""
    text = cuobjdump("-arch", architecture, "-res-usage")
    pairs = re.findall(r"Function (\S*_kernel\S*):\s*\n(.*)", text)
    return {
        kernel_of(name): {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in pairs
    }


@cache
def listings(architecture: str) -> dict[Kernel, list[str]]:
    """Returns the instructions of each kernel, with their operands, in the order of memory."""
    text = cuobjdump("-arch", architecture, "-sass")
    _, *functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z].*?) ?;", re.MULTILINE)
    return {
        kernel_of(function.split(maxsplit=1)[0]): instruction.findall(function)
        for function in functions
        if "_kernel" in function.split(maxsplit=1)[0]
    }


def instructions(architecture: str) -> dict[Kernel, Counter[str]]:
    """Returns how often each kernel has each instruction."""
    return {
        kernel: Counter(line.split(maxsplit=1)[0] for line in lines)
        for kernel, lines in listings(architecture).items()
    }


def count(code: Counter[str], operation: str, modifier: str = "") -> int:
    """Counts instructions, with a modifier such as ``128`` where one is given."""
    return sum(
        times
        for name, times in code.items()
        if name.split(".")[0] == operation and (not modifier or modifier in name.split("."))
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test for each architecture that the library should have code for."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ("sm_80", "sm_90", "sm_100", "sm_120"))


@pytest.fixture(autouse=True)
def is_built(request: pytest.FixtureRequest) -> None:
    """Skips an architecture that the library was not built for."""
    if "architecture" in request.fixturenames:
        architecture = request.getfixturevalue("architecture")
        if architecture not in architectures():
            pytest.skip(f"the library has no code for {architecture}")


def test_the_library_has_every_kernel(architecture: str) -> None:
    dtypes = (*PAIRS_OF_A_VECTOR, "double")
    expected = {
        Kernel(work, dtype, 1, False, bits, full_width)
        for work in ("rotate", "sum")
        for dtype in dtypes
        for bits in (32, 64)
        for full_width in (False, True)
    } | {
        Kernel(f"wide_{work}", dtype, 1, False, 64)
        for work in ("norm", "norm_gradient")
        for dtype in dtypes
    }
    for (dtype, pairs), interleaved in product(PAIRS_OF_A_VECTOR.items(), (False, True)):
        expected |= {
            Kernel(work, dtype, pairs, interleaved, bits, full_width)
            for work, index_bits in (
                ("rotate", (32, 64)),
                ("sum", (32, 64)),
                ("norm", (32,)),
                ("norm_gradient", (32,)),
            )
            for bits in index_bits
            for full_width in (False, True)
        } | {
            Kernel(work, dtype, pairs, interleaved, 32)
            for work in ("rotate_few_rows", "wide_norm", "wide_norm_gradient")
        }
    expected |= {
        Kernel(work, real) for work in ("scatter", "groups") for real in ("float", "double")
    }
    assert set(resources(architecture)) == expected


def test_no_kernel_uses_local_memory(architecture: str) -> None:
    assert resources(architecture)
    for kernel, used in resources(architecture).items():
        assert used["STACK"] == used["LOCAL"] == 0, kernel
    for kernel, code in instructions(architecture).items():
        assert count(code, "LDL") == count(code, "STL") == 0, kernel


def test_every_kernel_leaves_registers_for_the_blocks_planned(architecture: str) -> None:
    assert resources(architecture)
    for kernel, used in resources(architecture).items():
        usual = MOST_REGISTERS_OF_USUAL_CALLS.get(architecture, MOST_REGISTERS_OF_USUAL_CALLS_LATER)
        most = usual if kernel.is_usual else kernel.most_registers
        assert used["REG"] <= most, kernel


def test_parameters_are_read_as_constants(architecture: str) -> None:
    """Parameters selected by a reference at run time would be read by LD, which is slow."""
    for kernel, code in instructions(architecture).items():
        assert count(code, "LD") == count(code, "ST") == 0, kernel


def test_rows_are_loaded_and_stored_16_bytes_at_a_time(architecture: str) -> None:
    for kernel, lines in listings(architecture).items():
        if not kernel.has_vectors:
            continue
        rows = [line.split(maxsplit=1)[0] for line in lines if re.match(r"(LDG|STG)\.E\.EF", line)]
        assert len(rows) >= kernel.first_loads, kernel
        assert all(name.endswith(".128") for name in rows), kernel


def test_rows_are_loaded_and_stored_by_streaming_accesses(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if not kernel.has_rows:
            continue
        assert count(code, "LDG", "EF") >= kernel.first_loads, kernel
        if kernel.work.endswith("gradient"):  # Sums for gradients of weights are read again.
            assert count(code, "STG", "EF") > 0, kernel
        elif kernel.work != "sum":
            assert count(code, "STG", "EF") == count(code, "STG") > 0, kernel


def test_the_first_rows_are_loaded_before_any_of_them_is_used(architecture: str) -> None:
    for kernel, lines in listings(architecture).items():
        if not kernel.has_vectors:
            continue
        is_row = re.compile(r"LDG\.E\.EF\S*\.128")
        loads = [i for i, line in enumerate(lines) if is_row.match(line)][: kernel.first_loads]
        in_flight: set[int] = set()
        for line in lines[loads[0] : loads[-1] + 1]:
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
            assert in_flight.isdisjoint(registers), (kernel, line)
            if is_row.match(line):
                in_flight.update(range(registers[0], registers[0] + 4))


def test_tensors_are_accessed_only_after_the_previous_kernels(architecture: str) -> None:
    """Before griddepcontrol.wait only frequencies may be read: no previous kernel writes them."""
    can_wait = int(re.sub(r"\D", "", architecture)) >= 90
    for kernel, lines in listings(architecture).items():
        if not kernel.has_rows:  # These do not start early.
            continue
        waits = [i for i, line in enumerate(lines) if line.startswith("ACQBULK")]
        starts = [i for i, line in enumerate(lines) if line.startswith("PREEXIT")]
        assert len(waits) == len(starts) == (1 if can_wait else 0), kernel
        for line in lines[: waits[0]] if can_wait else []:
            assert not re.match(r"(STG|RED|ATOM|LDG\.E\.EF)", line), (kernel, line)
            assert kernel.work != "sum" or not line.startswith("LDG"), (kernel, line)


def test_rows_of_norms_are_summed_by_shuffles(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if "norm" in kernel.work:
            assert count(code, "SHFL", "BFLY") > 0, kernel
            assert count(code, "ATOM") == count(code, "RED") == count(code, "ATOMS") == 0, kernel


def test_kernels_for_few_rows_have_no_float64(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if kernel.work == "rotate_few_rows":
            assert not any(name.startswith(("DADD", "DMUL", "DFMA", "DSETP")) for name in code)
