"""The C++ tests of tests/cpp: each of their cases is a subtest."""

import json
import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_positions, random_values
from refusals import CALLS, arguments_of, through_dispatcher
from torch import Tensor
from torch.export import Dim, export

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "tests" / "cpp"
CONSUMERS = (
    "test_api",
    "test_modules",
    "test_registration",
    "test_threads",
)  # of the installed package
INTERNAL = ("test_cuda",)  # with the objects of librope.so, for what that hides


def run(*command: str | Path, timeout: float = 1200) -> str:
    """Runs a command; where it fails, so does the test, with its output."""
    completed = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    if completed.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{completed.stdout}", pytrace=False)
    return completed.stdout


def build(source: Path, build: Path, prefix: str, *options: str, target: str = "all") -> None:
    """Configures and builds a project."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    # -O1 takes the least time in sum to build and to run.
    quick = ["-DCMAKE_BUILD_TYPE=Quick", "-DCMAKE_CXX_FLAGS_QUICK=-O1"]
    prefix = f"-DCMAKE_PREFIX_PATH={prefix}"
    run("cmake", "-S", source, "-B", build, prefix, *generator, *quick, *options)
    jobs = str(len(os.sched_getaffinity(0)))
    run("cmake", "--build", build, "--parallel", jobs, "--target", target)


@pytest.fixture(scope="session")
def folder(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the programs that use the installed package; returns the folder that they are in."""
    folder = tmp_path_factory.mktemp("cpp")
    build(SOURCES, folder, torch_rope.cmake_prefix_path)
    return folder


@pytest.fixture(scope="session")
def internal(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the tests of what the library hides; returns the folder of the build."""
    folder = tmp_path_factory.mktemp("internal")
    options = ("-DROPE_TESTS=ON", "-DROPE_CUDA=OFF")
    (target,) = INTERNAL
    build(ROOT, folder, torch.utils.cmake_prefix_path, *options, target=target)
    return folder


def cases_of(folder: Path) -> dict[Path, list[str]]:
    """Lists the cases that ctest discovers, as Suite.Name, by program."""
    shown = json.loads(run("ctest", "--test-dir", folder, "--show-only=json-v1"))
    cases: dict[Path, list[str]] = {}
    for test in shown["tests"]:
        cases.setdefault(Path(test["command"][0]), []).append(test["name"])
    return cases


def results_of(program: Path) -> tuple[dict[str, Any], str]:
    """Runs all cases of a program; returns what it reports of each, and what it printed."""
    report = program.with_suffix(".json")
    completed = subprocess.run(
        [program, "--gtest_color=no", f"--gtest_output=json:{report}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    output = f"{completed.stdout}\n{program.name} ended with exit status {completed.returncode}"
    suites = json.loads(report.read_text())["testsuites"] if report.exists() else []
    results = {
        f"{suite['name']}.{case['name']}": case for suite in suites for case in suite["testsuite"]
    }
    return results, output


@pytest.mark.parametrize("project", ["folder", "internal"])
def test_every_case_passes(
    project: str, request: pytest.FixtureRequest, subtests: pytest.Subtests
) -> None:
    programs = cases_of(request.getfixturevalue(project))
    names = CONSUMERS if project == "folder" else INTERNAL
    assert sorted(program.name for program in programs) == sorted(names)
    for program, cases in programs.items():
        results, output = results_of(program)
        for case in cases:
            with subtests.test(case):
                # After a crash there are no results: the end of the output shows in which case.
                assert case in results, "\n".join(output.splitlines()[-30:])
                if failures := results[case].get("failures"):
                    pytest.fail("\n".join(each["failure"] for each in failures), pytrace=False)
                if results[case]["result"] == "SKIPPED":
                    shown = output.partition(f"[ RUN      ] {case}\n")[2]
                    pytest.skip(shown.partition("[  SKIPPED ]")[0].strip())


def test_every_source_belongs_to_a_program() -> None:
    lists = [SOURCES / "CMakeLists.txt", SOURCES / "internal" / "CMakeLists.txt"]
    named = "".join(path.read_text() for path in lists)
    assert [path.name for path in SOURCES.glob("test_*.cpp") if path.name not in named] == []


def test_no_switch_over_dtypes_takes_one_for_another() -> None:
    """A dtype that is new to the checks must not be read as what a ``default`` stands for."""
    statements = {
        (path.name, statement)
        for path in (ROOT / "csrc").rglob("*")
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


@pytest.mark.parametrize("program", [*CONSUMERS, "refuse", "run_layer", "run_package"])
def test_the_program_does_not_need_python(folder: Path, program: str) -> None:
    file = folder / program
    linked = re.findall(r"=> (/\S+)", run("ldd", file))
    assert any(path.endswith("/librope.so") for path in linked)
    assert not [path for path in linked if "python" in Path(path).name]
    assert not [name for name in libraries_of(file) if "python" in name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_layer_of_cpp_has_the_weights_that_python_saved(folder: Path, tmp_path: Path) -> None:
    layer = torch_rope.QKNormRotaryEmbedding(
        32, max_wavelength=5e5, eps=1e-3, weight_offset=1.0, num_heads=(4, 2)
    )
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random_values(tuple(parameter.shape), seed=seed))
    q, k = random_values((2, 7, 4, 32)), random_values((2, 7, 2, 32), seed=1)
    positions = random_positions((7, 1))
    torch.save(dict(layer.state_dict()), tmp_path / "state")
    torch.jit.script(layer).save(str(tmp_path / "scripted"))
    torch.save([q, k, positions], tmp_path / "inputs")
    files = (tmp_path / name for name in ("state", "scripted", "inputs", "outputs"))
    run(folder / "run_layer", *files)
    results = torch.load(tmp_path / "outputs", weights_only=False)
    for result, expected in zip(results, 2 * layer(q, k, positions), strict=True):
        assert_same_bits(result, expected)


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


def call_of(operator: str, place: int, refusal: Any) -> tuple[Any, ...]:
    """Returns a call that is refused, as tests/cpp/refuse.cpp reads it."""
    tensors, arguments, options = arguments_of(operator, place, refusal, "cpu", edit=False)
    if "norm_axes" in options:
        options["norm_axes"] = list(options["norm_axes"])
    edit, name = refusal.edit or ("", "{x}")
    names = [each.name for each in getattr(torch.ops.rope, operator).default._schema.arguments]
    index = place if name == "{x}" else names.index(name)
    arguments = [*tensors, *arguments]
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
            arguments[i], edit, index = value.view(torch.uint8), "float8", i
    return operator, arguments, options, edit, index


def test_cpp_refuses_alike(folder: Path, tmp_path: Path) -> None:
    expected, calls = [], []
    for case in CALLS:
        operator, place, refusal = case.values
        tensors, arguments, options = arguments_of(operator, place, refusal, "cpu")
        with pytest.raises(refusal.exception) as caught:
            through_dispatcher(operator, tensors, *arguments, **options)
        expected.append((caught.type.__name__, str(caught.value)))
        calls.append(call_of(operator, place, refusal))
    torch.save(calls, tmp_path / "calls")
    run(folder / "refuse", tmp_path / "calls", tmp_path / "results")
    results = torch.load(tmp_path / "results", weights_only=False)
    assert len(results) == len(expected)
    wrong = {
        case.id: (result, wanted)
        for case, result, wanted in zip(CALLS, results, expected, strict=True)
        if result != wanted
    }
    assert not wrong


def test_undefined_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    x, table, rows = random_values((3, 8)), random_values((9, 4)), torch.arange(3)
    families: dict[str, list[Any]] = {"apply": [rows, None], "apply_cos_sin": [table, table, rows]}
    calls, expected = [], []
    for family, angles in families.items():
        for norm, is_pair, suffix in product(("", "norm_"), (False, True), ("", "_")):
            operator = f"{norm}{family}{'_qk' * is_pair}{suffix}"
            tensors = [x, x.clone()][: 1 + is_pair]
            arguments = [*tensors, *([None] * len(tensors) if norm else []), *angles]
            arguments_of_schema = getattr(torch.ops.rope, operator).default._schema.arguments
            for index, argument in enumerate(arguments_of_schema[: len(arguments)]):
                if argument.type.kind() == "TensorType":
                    calls.append((operator, arguments, {}, "undefine", index))
                    rule = f"expected {argument.name} to be a tensor, but got none"
                    expected.append(("TypeError", f"rope::{operator}(): {rule}"))
    torch.save(calls, tmp_path / "calls")
    run(folder / "refuse", tmp_path / "calls", tmp_path / "results")
    assert torch.load(tmp_path / "results", weights_only=False) == expected
