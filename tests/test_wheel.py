"""What an installed package holds, and what its library needs and exports."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch_rope

FOLDER = Path(torch_rope.__file__).parent
# An editable installation leaves the built files outside the folder of the Python sources.
PREFIX = Path(torch_rope.cmake_prefix_path)
while PREFIX.parent != PREFIX and not (PREFIX / "lib" / "librope.so").is_file():
    PREFIX = PREFIX.parent
LIBRARY = PREFIX / "lib" / "librope.so"


def output_of(tool: str, *arguments: str) -> str:
    """Runs a tool of binutils; skips the test where there is none."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    completed = subprocess.run([tool, *arguments], check=True, capture_output=True, text=True)
    return completed.stdout


@pytest.mark.parametrize("path", ["include/rope/rope.h", "lib/librope.so"])
def test_the_package_holds_what_a_cpp_program_needs(path: str) -> None:
    assert (PREFIX / path).is_file()


def test_the_package_holds_its_cmake_files() -> None:
    assert list((PREFIX / "share" / "cmake" / "rope").glob("*.cmake"))


@pytest.mark.parametrize("path", ["py.typed", "_C.pyi"])
def test_the_package_is_typed(path: str) -> None:
    assert (FOLDER / path).is_file()


def test_the_extension_is_built() -> None:
    assert Path(torch_rope._C.__file__).suffix == ".so"


def needed(library: Path) -> list[str]:
    """Lists the libraries that a library is linked with."""
    lines = output_of("readelf", "--dynamic", "--wide", str(library)).splitlines()
    return [line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line]


def test_the_library_does_not_need_python() -> None:
    libraries = needed(LIBRARY)
    assert any(name.startswith("libtorch") for name in libraries)
    assert not [name for name in libraries if "python" in name]


def test_the_extension_is_linked_with_the_library() -> None:
    assert "librope.so" in needed(Path(torch_rope._C.__file__))


def test_the_library_is_found_wherever_the_package_is_moved() -> None:
    if LIBRARY.parents[2] != Path(torch.__file__).parents[1]:
        pytest.skip("an editable install stays where it is, and names the folder of torch")
    for library in (LIBRARY, Path(torch_rope._C.__file__)):
        lines = output_of("readelf", "--dynamic", "--wide", str(library)).splitlines()
        paths = [line.partition("[")[2].rstrip("]") for line in lines if "PATH)" in line]
        entries = [entry for path in paths for entry in path.split(":")]
        assert entries
        assert not [entry for entry in entries if not entry.startswith("$ORIGIN")]


def test_the_library_exports_nothing_of_an_instruction_set() -> None:
    symbols = output_of(
        "nm", "--dynamic", "--defined-only", "--demangle", str(LIBRARY)
    ).splitlines()
    exported = [symbol for symbol in symbols if " rope::" in symbol]
    assert exported
    assert not [symbol for symbol in symbols if "at::vec::" in symbol]


def test_the_library_exports_its_own_names_only() -> None:
    symbols = output_of(
        "nm", "--dynamic", "--defined-only", "--demangle", str(LIBRARY)
    ).splitlines()
    strong = [symbol for symbol in symbols if symbol.split(maxsplit=2)[1] in "TDB"]
    assert not [symbol for symbol in strong if "rope::" not in symbol]


def import_with(prepare: str) -> subprocess.CompletedProcess[str]:
    """Imports torch_rope in a process of its own, after lines that prepare it."""
    program = f"import pathlib, torch\n{prepare}\nimport torch_rope"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_torch_that_the_library_was_built_for_is_written_down() -> None:
    words = (FOLDER / "share" / "rope" / "built_for").read_text().split()
    assert words[0] == "torch"
    assert words[1].split(".")[:2] == torch.__version__.split(".")[:2]
    assert words[2:3] == (["cuda"] if torch_rope._C.has_cuda else [])


@pytest.mark.parametrize("version", ["2.1.0+cpu", "2.99.0.dev20301231", "3.0.1"])
def test_another_torch_than_the_library_was_built_for_is_named(version: str) -> None:
    built_for = (FOLDER / "share" / "rope" / "built_for").read_text().split()[1]
    completed = import_with(f"torch.__version__ = {version!r}")
    error = completed.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: torch_rope was built for torch {built_for}")
    assert f"but torch {version}" in error
    assert "pip install --no-build-isolation ." in error


BUILT_FOR = """
def read_text(path, *arguments, read_text=pathlib.Path.read_text, **options):
    if path.name != "built_for":
        return read_text(path, *arguments, **options)
    {statement}

pathlib.Path.read_text = read_text
"""


@pytest.mark.parametrize("toolkit", ["None", "'12.8'"])
def test_another_cuda_than_the_kernels_were_built_for_is_named(toolkit: str) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    statement = f"return 'torch {minor}.0\\ncuda 13\\n'"
    program = f"torch.version.cuda = {toolkit}\n{BUILT_FOR.format(statement=statement)}"
    completed = import_with(program)
    error = completed.stderr.splitlines()[-1]
    assert f"built for torch {minor}.0 with CUDA 13, but torch {torch.__version__}" in error
    assert (" with CUDA 12.8 is installed" in error) == (toolkit != "None")


@pytest.mark.parametrize(
    "statement",
    [
        "raise FileNotFoundError(path)",
        # Another patch of the same minor version.
        "return 'torch ' + '.'.join(torch.__version__.split('.')[:2]) + '.99'",
    ],
)
def test_the_package_is_imported_with_a_torch_that_suits_or_is_not_known(statement: str) -> None:
    completed = import_with(BUILT_FOR.format(statement=statement))
    assert completed.returncode == 0, completed.stderr


def test_a_cpp_program_is_refused_another_libtorch(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    shutil.copytree(PREFIX / "share", tmp_path / "share")
    config = tmp_path / "share" / "cmake" / "rope" / "ropeConfig.cmake"
    minor = ".".join(torch.__version__.split(".")[:2])
    text = config.read_text()
    for text_of_version in (f'MATCHES "^{minor}', f"built for LibTorch {minor}"):
        assert text_of_version in text
        text = text.replace(text_of_version, text_of_version.replace(minor, "2.1"))
    config.write_text(text)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        "project(consumer LANGUAGES NONE)\n"
        "find_package(rope REQUIRED)\n"
    )
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    completed = subprocess.run(
        [
            "cmake",
            "-S",
            tmp_path,
            "-B",
            tmp_path / "build",
            f"-DCMAKE_PREFIX_PATH={tmp_path};{Path(spec.origin).parent}",
        ],
        capture_output=True,
        text=True,
    )
    assert completed.returncode != 0
    message = " ".join(completed.stderr.split())
    assert "it was built for LibTorch 2.1, but" in message
    assert f"is {minor}." in message
