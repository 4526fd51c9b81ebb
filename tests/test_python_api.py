"""The Python package: what it returns, how it can be watched, what it says about itself."""

import doctest
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch_rope
from observe import FunctionsSeen
from reference import assert_same_bits, random_values
from torch import Tensor
from torch_rope.__main__ import Row, describe

FUNCTIONS = (
    torch_rope.apply,
    torch_rope.apply_,
    torch_rope.apply_cos_sin,
    torch_rope.apply_cos_sin_,
    torch_rope.norm_apply,
    torch_rope.norm_apply_,
    torch_rope.norm_apply_cos_sin,
    torch_rope.norm_apply_cos_sin_,
)
Function = Callable[..., Any]


def angle_arguments(function: Function, device: str) -> tuple[Any, ...]:
    """Returns what comes after x: no weight, then positions, or tables."""
    weight = (None,) if "norm" in function.__name__ else ()
    if "cos_sin" in function.__name__:
        tables = (random_values((9, 16), device=device, seed=seed) for seed in range(2))
        return *weight, *tables
    return *weight, torch.arange(9, device=device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_tensor_gives_a_tensor_and_a_pair_a_tuple(device: str, function: Function) -> None:
    q, k = (random_values((9, 32), device=device, seed=seed) for seed in range(2))
    arguments = angle_arguments(function, device)
    assert type(function(q.clone(), *arguments)) is Tensor
    pair = function((q, k), *arguments)
    assert type(pair) is tuple
    assert [type(x) for x in pair] == [Tensor, Tensor]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_package_gives_the_bits_of_the_operator(device: str, function: Function) -> None:
    x = random_values((9, 32), device=device)
    arguments = angle_arguments(function, device)
    operator = getattr(torch.ops.rope, function.__name__)
    copy = x.clone()
    expected = operator(copy, *arguments, interleaved=True)
    actual = function(x, *arguments, interleaved=True)
    assert_same_bits(actual, copy if expected is None else expected)


def test_options_of_apply_reach_the_operator(device: str) -> None:
    q, k = (random_values((9, 32, 3), device=device, seed=seed) for seed in range(2))
    options: dict[str, Any] = {
        "embedding_axis": 1,
        "rotary_dim": 16,
        "rotary_offset": 4,
        "max_wavelength": 500.0,
        "scale_factor": 2.0,
        "attention_factor": 1.5,
        "interleaved": True,
        "conjugate": True,
    }
    positions = torch.arange(27, device=device).view(9, 3)
    assert_same_bits(
        torch_rope.apply(q, positions, **options), torch.ops.rope.apply(q, positions, **options)
    )
    for actual, expected in zip(
        torch_rope.apply((q, k), positions, **options),
        torch.ops.rope.apply_qk(q, k, positions, **options),
        strict=True,
    ):
        assert_same_bits(actual, expected)


def test_options_of_apply_cos_sin_reach_the_operator(device: str) -> None:
    q, k = (random_values((9, 32, 3), device=device, seed=seed) for seed in range(2))
    cos, sin = (random_values((5, 8), device=device, seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {
        "embedding_axis": 1,
        "rotary_dim": 8,
        "rotary_offset": 4,
        "interleaved": True,
        "conjugate": True,
        "full_width": True,
    }
    arguments = cos, sin, torch.arange(27, device=device).view(9, 3) % 5
    assert_same_bits(
        torch_rope.apply_cos_sin(q, *arguments, **options),
        torch.ops.rope.apply_cos_sin(q, *arguments, **options),
    )
    for actual, expected in zip(
        torch_rope.apply_cos_sin((q, k), *arguments, **options),
        torch.ops.rope.apply_cos_sin_qk(q, k, *arguments, **options),
        strict=True,
    ):
        assert_same_bits(actual, expected)


NORM_OPTIONS: dict[str, Any] = {
    "eps": 0.1,
    "weight_offset": 1.0,
    "norm_axes": (0, 1),
    "norm_last": True,
}


def test_options_of_norm_apply_reach_the_operator(device: str) -> None:
    q, k = (random_values((9, 32, 3), device=device, seed=seed) for seed in range(2))
    q_weight, k_weight = (random_values((32,), device=device, seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {
        "embedding_axis": 1,
        "rotary_dim": 16,
        "rotary_offset": 4,
        "max_wavelength": 500.0,
        "scale_factor": 2.0,
        "attention_factor": 1.5,
        "interleaved": True,
        "conjugate": True,
        **NORM_OPTIONS,
    }
    positions = torch.arange(27, device=device).view(9, 3)
    assert_same_bits(
        torch_rope.norm_apply(q, q_weight, positions, **options),
        torch.ops.rope.norm_apply(q, q_weight, positions, **options),
    )
    for actual, expected in zip(
        torch_rope.norm_apply((q, k), (q_weight, k_weight), positions, **options),
        torch.ops.rope.norm_apply_qk(q, k, q_weight, k_weight, positions, **options),
        strict=True,
    ):
        assert_same_bits(actual, expected)
    # Each option matters.
    result = torch_rope.norm_apply(q, q_weight, positions, **options)
    for name in options:
        if name != "embedding_axis":
            others = {key: value for key, value in options.items() if key != name}
            other = torch_rope.norm_apply(q, q_weight, positions, **others)
            assert not torch.allclose(other, result), name


def test_options_of_norm_apply_cos_sin_reach_the_operator(device: str) -> None:
    q, k = (random_values((9, 32, 3), device=device, seed=seed) for seed in range(2))
    weight = random_values((32,), device=device, seed=4)
    cos, sin = (random_values((5, 8), device=device, seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {
        "embedding_axis": 1,
        "rotary_dim": 8,
        "rotary_offset": 4,
        "interleaved": True,
        "conjugate": True,
        "full_width": True,
        **NORM_OPTIONS,
    }
    angles = cos, sin, torch.arange(27, device=device).view(9, 3) % 5
    assert_same_bits(
        torch_rope.norm_apply_cos_sin(q, weight, *angles, **options),
        torch.ops.rope.norm_apply_cos_sin(q, weight, *angles, **options),
    )
    for actual, expected in zip(
        torch_rope.norm_apply_cos_sin((q, k), (None, weight), *angles, **options),
        torch.ops.rope.norm_apply_cos_sin_qk(q, k, None, weight, *angles, **options),
        strict=True,
    ):
        assert_same_bits(actual, expected)


def test_arguments_have_the_names_of_the_contract(device: str) -> None:
    x = random_values((9, 32), device=device)
    positions, cos, sin = torch.arange(9, device=device), x[:, :16], x[:, 16:]
    assert_same_bits(
        torch_rope.apply(x, positions=positions, inv_freq=None), torch_rope.apply(x, positions)
    )
    assert_same_bits(
        torch_rope.apply_cos_sin(x, cos=cos, sin=sin, positions=None),
        torch_rope.apply_cos_sin(x, cos, sin),
    )
    assert_same_bits(
        torch_rope.norm_apply(x=x, weight=x[0], positions=positions, inv_freq=None),
        torch_rope.norm_apply(x, x[0], positions),
    )
    assert_same_bits(
        torch_rope.norm_apply_cos_sin(x=x, weight=None, cos=cos, sin=sin, positions=None),
        torch_rope.norm_apply_cos_sin(x, None, cos, sin),
    )


def test_the_defaults_are_those_of_the_contract(device: str) -> None:
    x = random_values((9, 32), device=device)
    positions = torch.arange(9, device=device)
    spelled_out = torch_rope.apply(
        x,
        positions,
        None,
        embedding_axis=-1,
        rotary_dim=None,
        rotary_offset=0,
        max_wavelength=10000.0,
        scale_factor=1.0,
        attention_factor=1.0,
        interleaved=False,
        conjugate=False,
    )
    assert_same_bits(torch_rope.apply(x, positions), spelled_out)
    assert_same_bits(
        torch_rope.norm_apply(x, x[0], positions),
        torch_rope.norm_apply(
            x, x[0], positions, eps=1e-6, weight_offset=0.0, norm_axes=None, norm_last=False
        ),
    )


OF_NORMS = (
    "float eps=9.9999999999999995e-07, float weight_offset=0., int[]? norm_axes=None, "
    "bool norm_last=False"
)


@pytest.mark.parametrize(
    ("operator", "schema"),
    [
        (
            "apply",
            "(Tensor x, Tensor positions, Tensor? inv_freq=None, *, int embedding_axis=-1, "
            "int? rotary_dim=None, int rotary_offset=0, float max_wavelength=10000., "
            "float scale_factor=1., float attention_factor=1., bool interleaved=False, "
            "bool conjugate=False) -> Tensor",
        ),
        (
            "apply_cos_sin",
            "(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, *, int embedding_axis=-1, "
            "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
            "bool conjugate=False, bool full_width=False) -> Tensor",
        ),
        (
            "norm_apply",
            "(Tensor x, Tensor positions, Tensor? inv_freq=None, *, int embedding_axis=-1, "
            "int? rotary_dim=None, int rotary_offset=0, float max_wavelength=10000., "
            "float scale_factor=1., float attention_factor=1., bool interleaved=False, "
            f"bool conjugate=False, {OF_NORMS}) -> Tensor",
        ),
        (
            "norm_apply_cos_sin",
            "(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, *, int embedding_axis=-1, "
            "int? rotary_dim=None, int rotary_offset=0, bool interleaved=False, "
            f"bool conjugate=False, bool full_width=False, {OF_NORMS}) -> Tensor",
        ),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "tensors", "returned"),
    [
        ("", "Tensor x", "Tensor"),
        ("_", "Tensor(a!) x", "()"),
        ("_qk", "Tensor q, Tensor k", "(Tensor, Tensor)"),
        ("_qk_", "Tensor(a!) q, Tensor(b!) k", "()"),
    ],
)
def test_schemas_are_those_of_the_contract(
    operator: str, schema: str, suffix: str, tensors: str, returned: str
) -> None:
    if operator.startswith("norm_"):
        is_pair = suffix.startswith("_qk")
        tensors += ", Tensor? q_weight, Tensor? k_weight" if is_pair else ", Tensor? weight"
    expected = schema.replace("Tensor x", tensors).replace("-> Tensor", f"-> {returned}")
    actual = str(getattr(torch.ops.rope, operator + suffix).default._schema)
    assert actual == f"rope::{operator}{suffix}{expected}"


class Watched(Tensor):
    """A tensor that notes the functions it is given to."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Notes the function and calls it."""
        cls.seen.append(function)
        return super().__torch_function__(function, types, arguments, options or {})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("form", ["single", "pair", "second of a pair"])
def test_a_subclass_sees_the_operator(device: str, function: Function, form: str) -> None:
    plain, other = (random_values((9, 32), device=device, seed=seed) for seed in range(2))
    x = other.as_subclass(Watched)
    argument = {"single": x, "pair": (x, plain), "second of a pair": (plain, x)}[form]
    Watched.seen.clear()
    function(argument, *angle_arguments(function, device))
    name = function.__name__
    if form != "single":
        name = f"{name.rstrip('_')}_qk{'_' if name.endswith('_') else ''}"
    operator = getattr(torch.ops.rope, name)
    assert any(seen in (operator, operator.default) for seen in Watched.seen)


def test_positions_of_a_subclass_see_the_operator(device: str) -> None:
    positions = torch.arange(9, device=device).as_subclass(Watched)
    Watched.seen.clear()
    torch_rope.apply(random_values((9, 32), device=device), positions)
    assert any(
        seen in (torch.ops.rope.apply, torch.ops.rope.apply.default) for seen in Watched.seen
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_mode_sees_the_operator(device: str, function: Function) -> None:
    x = random_values((9, 32), device=device)
    arguments = angle_arguments(function, device)
    with FunctionsSeen() as mode:
        function(x, *arguments)
    operator = getattr(torch.ops.rope, function.__name__)
    assert any(seen in (operator, operator.default) for seen in mode.seen)


def test_a_parameter_is_taken(device: str) -> None:
    x = torch.nn.Parameter(random_values((9, 32), device=device))
    rotated = torch_rope.apply(x, torch.arange(9, device=device))
    assert type(rotated) is Tensor
    assert rotated.requires_grad


def test_dir_lists_what_is_public() -> None:
    listed = [name for name in dir(torch_rope) if not name.startswith("__")]
    assert listed == sorted([*torch_rope.__all__, "integrations"])
    assert "__version__" in dir(torch_rope)
    modules = [name for name in dir(torch_rope.integrations) if not name.startswith("__")]
    assert modules == ["flash_attn", "onnx", "torchtitan", "torchtune", "transformers"]
    for name in modules:
        module = getattr(torch_rope.integrations, name)
        assert dir(module) == sorted(module.__all__)


def run_python(program: str) -> str:
    """Returns what a program prints that runs in a process of its own."""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_integrations_are_imported_when_they_are_asked_for() -> None:
    heavy = ["transformers", "onnx", "onnxscript", "torch.distributed.tensor", "torchtune"]
    program = f"""
import sys, torch, torch_rope
print([name for name in sys.modules if name.startswith("torch_rope.integrations")])
print([name for name in {heavy} if name in sys.modules])
dir(torch_rope), dir(torch_rope.integrations)
print([name for name in sys.modules if name.startswith("torch_rope.integrations.")])
print(torch_rope.integrations.transformers.patch.__name__)
"""
    assert run_python(program).splitlines() == ["[]", "[]", "[]", "patch"]


def test_a_saved_program_is_loaded_once_the_package_is_imported(tmp_path: Path) -> None:
    class Rotate(torch.nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return torch_rope.apply(x, positions)

    program = torch.export.export(Rotate(), (torch.ones(3, 8), torch.arange(3)))
    path = str(tmp_path / "rotate.pt2")
    torch.export.save(program, path)
    load = f"import torch{{}}; print(type(torch.export.load({path!r})).__name__)"
    assert run_python(load.format(", torch_rope")).strip() == "ExportedProgram"
    without = subprocess.run(
        [sys.executable, "-c", load.format("")], capture_output=True, text=True
    )
    assert without.returncode != 0
    assert "rope" in without.stderr


@pytest.mark.parametrize("package", [torch_rope, torch_rope.integrations])
def test_a_name_that_is_not_there_is_an_attribute_error(package: Any) -> None:
    with pytest.raises(AttributeError, match=f"^module '{package.__name__}' has no attribute 'x'$"):
        _ = package.x


def test_the_version_is_that_of_the_distribution() -> None:
    assert torch_rope.__version__ == importlib.metadata.version("torch-rope")


def test_the_cmake_prefix_path_leads_to_the_package() -> None:
    prefix = Path(torch_rope.cmake_prefix_path)
    assert prefix.is_dir()
    assert list(prefix.rglob("rope-config.cmake")) + list(prefix.rglob("ropeConfig.cmake"))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_examples_of_a_docstring_run(function: Function) -> None:
    finder = doctest.DocTestFinder()
    examples = finder.find(function, globs={"torch": torch, "torch_rope": torch_rope})
    assert sum(len(example.examples) for example in examples) > 0
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.failures == 0


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``python -m torch_rope --json`` prints."""
    completed = subprocess.run(
        [sys.executable, "-m", "torch_rope", "--json"],
        cwd=tmp_path_factory.mktemp("first_run"),
        check=True,
        capture_output=True,
        text=True,
    )
    report: dict[str, Any] = json.loads(completed.stdout)
    return report


def test_the_first_run_names_the_versions_and_the_machine(first_run: dict[str, Any]) -> None:
    assert first_run["torch_rope"] == torch_rope.__version__
    assert first_run["torch"] == torch.__version__
    assert first_run["python"] == platform.python_version()
    assert first_run["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (first_run["cuda_device"] is not None) == torch.cuda.is_available()


def test_the_first_run_measures_torch_rope_and_what_it_is_compared_with(
    first_run: dict[str, Any],
) -> None:
    rows = first_run["rows"]
    assert len(rows) >= 3
    assert any("torch-rope" in row["name"] for row in rows)
    for row in rows:
        assert set(row) == {
            "name",
            "milliseconds",
            "gigabytes_per_second",
            "max_error",
            "max_error_ulp",
        }
        assert row["milliseconds"] > 0
        assert row["gigabytes_per_second"] > 0


def test_the_first_run_gives_errors_in_units_of_the_last_place(first_run: dict[str, Any]) -> None:
    errors = {row["name"]: row["max_error_ulp"] for row in first_run["rows"]}
    # One rounding to the nearest costs half a unit, and the computation in float32 next to nothing.
    assert 0.49 < errors["torch-rope"] < 0.501
    assert errors["eager PyTorch"] > 1
    assert errors["clone"] is errors["copy"] is None


def test_the_first_run_for_people_prints_a_table(tmp_path: Path) -> None:
    numpy = tmp_path / "numpy.py"
    numpy.write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    completed = subprocess.run(
        [sys.executable, "-m", "torch_rope"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert completed.stderr == ""  # PyTorch warns where there is no NumPy.
    assert torch_rope.__version__ in completed.stdout
    assert "GB/s" in completed.stdout
    lines = completed.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if line.endswith(" ulp")] == ["torch-rope", "eager"]
    assert re.match(r"torch-rope is \d+\.\d times as fast as eager PyTorch", lines[-2])
    assert "help(torch_rope.apply)" in lines[-1]


@pytest.mark.parametrize("time", [{"clone": 3.0, "copy": 1.0}, {"clone": 1.0, "copy": 1.0}])
@pytest.mark.parametrize("rope", [0.8, 2.0, 4.0])
def test_the_first_run_says_why_where_it_is_faster_than_a_copy(
    rope: float, time: dict[str, float]
) -> None:
    milliseconds = {"torch-rope": rope, "eager PyTorch": 8.0, **time}
    rows = [Row(name, ms, 1.0, None, None) for name, ms in milliseconds.items()]
    versions = dict.fromkeys(
        ("torch_rope", "torch", "python", "cpu_capability", "cuda_kernels", "cuda_device")
    )
    text = describe(versions, "cpu", rows)
    assert ("non-temporal stores" in text) == (rope < time["copy"])
    assert ("huge pages" in text) == (time["clone"] > time["copy"] and rope < time["clone"])
    assert f"in the time of {rope:.1f} copies" in text
    text = describe(versions, "cuda", rows)
    assert "stores" not in text
    assert "pages" not in text
