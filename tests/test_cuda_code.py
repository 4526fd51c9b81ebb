"""The machine code of the CUDA kernels, read from the built library: no GPU is needed."""

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch_rope

# Elements of 16 bytes, and pairs that a thread of each kernel has at a time.
PAIRS_OF_A_WORD = {"c10::BFloat16": 8, "c10::Half": 8, "float": 4, "double": 2}

# csrc/cuda/thread.h plans for four blocks of 128 threads; processors have 65,536 registers.
MOST_REGISTERS = 65536 // (4 * 128)
ROWS_IN_FLIGHT = 2

# Words of a row that are on their way: of x, and for sums of its gradient too.
WORDS_OF_A_ROW = {"rotate": 2, "sum": 4}


class Kernel(NamedTuple):
    """What tells a kernel from the others."""

    work: str  # "rotate" or "sum"
    dtype: str
    pairs: int
    interleaved: bool
    index_bits: int

    @property
    def has_words(self) -> bool:
        """Whether it loads and stores 16 bytes at a time."""
        return self.pairs == PAIRS_OF_A_WORD[self.dtype]

    @property
    def words_in_flight(self) -> int:
        """How many words of rows a thread asks for before it uses the first."""
        return WORDS_OF_A_ROW[self.work] * ROWS_IN_FLIGHT


@cache
def cuobjdump(*options: str) -> str:
    """Runs cuobjdump, of a toolkit or of Triton, on the library; skips where there is none."""
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
    library = Path(torch_rope.cmake_prefix_path) / "lib" / "librope.so"
    command = [tool, *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def architectures() -> tuple[str, ...]:
    """Lists those that the library has machine code for."""
    listing = cuobjdump("--list-elf")
    return tuple(dict.fromkeys(re.findall(r"\.(sm_\d+[af]?)\.", listing)))


def kernel_of(name: str) -> Kernel:
    """Returns which kernel a mangled name is."""
    found = re.search(r"(rotate|sum)_kernelI.*?ThreadI(.*?)Li(\d+)ELb([01])E([il])E", name)
    assert found is not None, name
    dtypes = {"N3c108BFloat16E": "c10::BFloat16", "N3c104HalfE": "c10::Half", "f": "float"}
    dtype = dtypes.get(found[2], "double")
    return Kernel(found[1], dtype, int(found[3]), found[4] == "1", 32 if found[5] == "i" else 64)


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
    """Runs a test for each architecture that the library should have, or does."""
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
    expected = {
        Kernel(work, dtype, pairs, interleaved, bits)
        for work in WORDS_OF_A_ROW
        for dtype, word in PAIRS_OF_A_WORD.items()
        for pairs, interleaved in ((1, False), (word, False), (word, True))
        for bits in (32, 64)
    }
    assert set(resources(architecture)) == expected


def test_no_kernel_uses_local_memory(architecture: str) -> None:
    assert resources(architecture)
    for kernel, used in resources(architecture).items():
        assert used["STACK"] == used["LOCAL"] == 0, kernel
    for kernel, code in instructions(architecture).items():
        assert count(code, "LDL") == count(code, "STL") == 0, kernel


def test_every_kernel_leaves_registers_for_the_threads_planned(architecture: str) -> None:
    assert resources(architecture)
    for kernel, used in resources(architecture).items():
        assert used["REG"] <= MOST_REGISTERS, kernel


def test_words_are_loaded_by_16_bytes(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if not kernel.has_words:
            continue
        if kernel.work == "rotate":
            # Beside the rows, cosines and sines in tables of each dtype.
            tables = sum(2 * (kernel.pairs // word) for word in PAIRS_OF_A_WORD.values())
            assert count(code, "LDG", "128") == kernel.words_in_flight + tables, kernel
        else:
            # Some compilers write the loop twice: for rows of one dimension, and of more.
            assert count(code, "LDG") in (kernel.words_in_flight, 2 * kernel.words_in_flight)
            assert count(code, "LDG", "128") == count(code, "LDG"), kernel


def test_words_are_stored_by_16_bytes(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if not kernel.has_words:
            continue
        if kernel.work == "rotate":
            assert count(code, "STG", "128") == 2 * ROWS_IN_FLIGHT, kernel
        elif kernel.index_bits == 32:
            # (With 64-bit indices some are stored piece by piece, once for all rows of a thread.)
            assert count(code, "STG", "128") == count(code, "STG") > 0, kernel


def test_the_first_rows_are_asked_for_before_any_of_them_is_used(architecture: str) -> None:
    for kernel, lines in listings(architecture).items():
        if not kernel.has_words:
            continue
        loads = [i for i, line in enumerate(lines) if line.startswith("LDG.E.128")]
        loops = len(loads) // kernel.words_in_flight if kernel.work == "sum" else 1
        for loop in range(loops):
            first = loop * kernel.words_in_flight
            on_their_way: set[int] = set()
            for line in lines[loads[first] : loads[first + kernel.words_in_flight - 1] + 1]:
                registers = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
                assert on_their_way.isdisjoint(registers), (kernel, line)
                if line.startswith("LDG.E.128"):
                    on_their_way.update(range(registers[0], registers[0] + 4))


def test_single_elements_of_words_are_stored_only_at_the_end_of_a_row(architecture: str) -> None:
    for kernel, code in instructions(architecture).items():
        if kernel.work == "rotate" and kernel.has_words:
            narrow = count(code, "STG") - count(code, "STG", "128")
            assert narrow <= 2 * ROWS_IN_FLIGHT, kernel
