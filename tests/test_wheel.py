"""What an installed package holds, and what its library needs and exports."""

import shutil
import subprocess
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
