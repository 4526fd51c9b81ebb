"""The C++ tests of tests/cpp, built with the installed package: each of their cases is a test."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_positions, random_values
from torch import Tensor
from torch.export import Dim, export

SOURCES = Path(__file__).parent / "cpp"
PROGRAMS = {
    "test_api": ("test_api.cpp",),
    "test_modules": ("test_modules.cpp", "test_positions.cpp"),
    "test_registration": ("test_registration.cpp",),
    "test_cuda": (
        "test_cuda_plan.cpp",
        "test_cuda_threads.cpp",
        "test_cuda_sums.cpp",
        "test_cuda_scatter.cpp",
        "test_frequency_tables.cpp",
        "test_last_results.cpp",
        "test_unsupported_dtype.cpp",
    ),
}


def cases_in_sources(program: str) -> list[str]:
    """Lists the cases of a program, as Suite.Name, in the order of its sources."""
    text = "".join((SOURCES / source).read_text() for source in PROGRAMS[program])
    return [".".join(names) for names in re.findall(r"^TEST\((\w+),\s*(\w+)\)", text, re.MULTILINE)]


def run(*command: str | Path, timeout: float = 1200) -> str:
    """Runs a command; where it fails, so does the test, with its output."""
    completed = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if completed.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{completed.stdout}", pytrace=False)
    return completed.stdout


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the programs, once; returns the folder that they are in."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("the C++ tests need CMake and a C++ compiler, and one of them is not here")
    build = tmp_path_factory.mktemp("cpp")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # -O1 takes the least time in sum to build and to run.
    options = ["-DCMAKE_BUILD_TYPE=Quick", "-DCMAKE_CXX_FLAGS_QUICK=-O1"]
    prefix = f"-DCMAKE_PREFIX_PATH={torch_rope.cmake_prefix_path}"
    run("cmake", "-S", SOURCES, "-B", build, prefix, *generator, *options)
    run("cmake", "--build", build, "--parallel", str(len(os.sched_getaffinity(0))))
    return build


@pytest.fixture(scope="session")
def output_of(folder: Path) -> Callable[[str], str]:
    """Returns a function that runs all cases of a program, once, and returns what it printed."""

    @cache
    def output(program: str) -> str:
        completed = subprocess.run(
            [folder / program, "--gtest_color=no"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=600,
        )
        return f"{completed.stdout}\n{program} ended with exit status {completed.returncode}"

    return output


@pytest.mark.parametrize(
    ("program", "case"),
    [(program, case) for program in PROGRAMS for case in cases_in_sources(program)],
)
def test_case_passes(output_of: Callable[[str], str], program: str, case: str) -> None:
    output = output_of(program)
    # From the line where the case begins to the one that has its result, or to the end of a crash.
    name = re.escape(case)
    ran = re.search(
        rf"^\[ RUN      \] {name}$.*?(^\[ +(OK|SKIPPED|FAILED) +\] {name} \(|\Z)",
        output,
        re.MULTILINE | re.DOTALL,
    )
    if ran is None:
        pytest.fail(f"{case} did not run:\n{output}", pytrace=False)
    elif ran[2] == "SKIPPED":
        pytest.skip(ran[0].splitlines()[-2])
    elif ran[2] != "OK":
        pytest.fail(ran[0], pytrace=False)


def test_every_source_belongs_to_a_program() -> None:
    sources = {source for sources in PROGRAMS.values() for source in sources}
    assert sources == {path.name for path in SOURCES.glob("test_*.cpp")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_has_the_cases_that_its_sources_show(folder: Path, program: str) -> None:
    cases = []
    suite = ""
    for line in run(folder / program, "--gtest_list_tests").splitlines():
        if re.fullmatch(r"\w+\.", line):
            suite = line
        elif re.fullmatch(r"  \w+", line):
            cases.append(suite + line.strip())
    assert sorted(cases) == sorted(cases_in_sources(program))


def test_no_switch_over_dtypes_takes_one_for_another() -> None:
    """A dtype that is new to the checks must not be read as what a ``default`` stands for."""
    statements = {
        (path.name, statement)
        for path in (SOURCES.parents[1] / "csrc").rglob("*")
        if path.is_file()
        for statement in re.findall(r"^\s*default:\s*(\w+)", path.read_text(), re.MULTILINE)
    }
    assert {name for name, _ in statements} >= {
        "angle.h",
        "angles.h",
        "dispatch.h",
        "scatter_kernel.h",
    }
    assert {what for _, what in statements} == {
        "fail_for_dtype",
        "fail_for_dtype_on_host",
        "throw_unsupported_dtype",
    }


def libraries_of(file: Path) -> list[str]:
    """Lists the libraries that a program or library is linked with."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here")
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", file))


def test_a_program_that_names_no_symbol_of_the_library_is_linked_with_it(folder: Path) -> None:
    program = folder / "test_registration"
    undefined = run("nm", "--dynamic", "--undefined-only", "--demangle", program)
    assert "rope::" not in undefined
    assert "librope.so" in libraries_of(program)


def test_a_program_has_what_the_library_needs_of_cuda(folder: Path) -> None:
    library = Path(torch_rope.cmake_prefix_path) / "lib" / "librope.so"
    # The loader looks for them where the program says, since torch may have moved since the build.
    of_cuda = {name for name in libraries_of(library) if "cuda" in name}
    assert bool(of_cuda) == torch_rope._C.has_cuda
    assert of_cuda <= set(libraries_of(folder / "test_registration"))


@pytest.mark.parametrize(
    "program", ["test_api", "test_modules", "test_registration", "run_package"]
)
def test_the_program_does_not_need_python(folder: Path, program: str) -> None:
    file = folder / program
    linked = re.findall(r"=> (/\S+)", run("ldd", file))
    assert any(path.endswith("/librope.so") for path in linked)
    assert not [path for path in linked if "python" in Path(path).name]
    assert not [name for name in libraries_of(file) if "python" in name]


class Rotations(torch.nn.Module):
    """Rotates in place, as a pair, and by rows of tables."""

    def forward(
        self, packed: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        """Rotates q and k of ``packed``, (2, tokens, 3, 4, 8)."""
        q, k, v = packed.unbind(2)
        copy = packed * 2
        torch_rope.apply_((copy[:, :, 0], copy[:, :, 1]), positions)
        tables = torch_rope.apply_cos_sin(v, cos, sin, positions, interleaved=True)
        return (copy, *torch_rope.apply((q, k), positions, max_wavelength=5e5), tables)


def test_a_program_without_python_runs_a_package_of_aotinductor(
    folder: Path, tmp_path: Path
) -> None:
    def inputs(tokens: int) -> tuple[Tensor, ...]:
        tables = (random_values((50, 4), seed=seed) for seed in (1, 2))
        positions = random_positions((tokens, 1), low=0, high=50)
        return (random_values((2, tokens, 3, 4, 8)), positions, *tables)

    tokens = Dim("tokens", min=2, max=8192)
    program = export(Rotations(), inputs(5), dynamic_shapes=({1: tokens}, {0: tokens}, None, None))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    for length in (7, 301):
        given = inputs(length)
        torch.save(list(given), tmp_path / "inputs")
        run(folder / "run_package", package, tmp_path / "inputs", tmp_path / "outputs")
        results = torch.load(tmp_path / "outputs", weights_only=False)
        for result, expected in zip(results, Rotations()(*given), strict=True):
            assert_same_bits(result, expected)
