"""What an installed package holds, and what its library needs and exports."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch_rope
from installed import EXTENSION, KERNELS, LIBRARIES, LIBRARY, PREFIX, THIN

FOLDER = Path(torch_rope.__file__).parent


def output_of(tool: str, *arguments: str) -> str:
    """Runs a tool of binutils; skips the test where there is none."""
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} here")
    completed = subprocess.run([tool, *arguments], check=True, capture_output=True, text=True)
    return completed.stdout


def test_the_package_holds_what_a_cpp_program_needs() -> None:
    assert LIBRARY.is_file()
    assert (PREFIX / "include" / "rope" / "rope.h").is_file()


def test_the_package_holds_its_cmake_files() -> None:
    assert list((PREFIX / "share" / "cmake" / "rope").glob("*.cmake"))


@pytest.mark.parametrize("path", ["py.typed", "_C.pyi"])
def test_the_package_is_typed(path: str) -> None:
    assert (FOLDER / path).is_file()


def test_the_extension_is_built() -> None:
    assert EXTENSION.suffix == ".so"


def needed(library: Path) -> list[str]:
    """Lists the libraries that a library is linked with."""
    lines = output_of("readelf", "--dynamic", "--wide", str(library)).splitlines()
    return [line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line]


def test_the_library_does_not_need_python() -> None:
    libraries = needed(LIBRARY)
    assert any(name.startswith("libtorch") for name in libraries)
    assert not [name for name in libraries if "python" in name]


def test_the_kernels_need_neither_torch_nor_cuda() -> None:
    assert "librope_kernels.so" in needed(LIBRARY)
    of_the_system = r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux-.*)\.so\.\d+"
    assert not [name for name in needed(KERNELS) if not re.fullmatch(of_the_system, name)]
    assert not [name for name in needed(LIBRARY) if "cuda" in name]


def test_the_extension_is_linked_with_the_library() -> None:
    assert "librope.so" in needed(EXTENSION)


def test_the_library_is_found_wherever_the_package_is_moved() -> None:
    if PREFIX.parent != Path(torch.__file__).parents[1]:
        pytest.skip("an editable install stays where it is, and names the folder of torch")
    for library in (LIBRARY, EXTENSION):
        lines = output_of("readelf", "--dynamic", "--wide", str(library)).splitlines()
        paths = [line.partition("[")[2].rstrip("]") for line in lines if "PATH)" in line]
        entries = [entry for path in paths for entry in path.split(":")]
        assert entries
        assert not [entry for entry in entries if not entry.startswith("$ORIGIN")]


@pytest.mark.parametrize("library", [LIBRARY, KERNELS])
def test_the_library_exports_nothing_of_an_instruction_set(library: Path) -> None:
    symbols = output_of(
        "nm", "--dynamic", "--defined-only", "--demangle", str(library)
    ).splitlines()
    exported = [symbol for symbol in symbols if " rope::" in symbol]
    assert exported
    assert not [symbol for symbol in symbols if "at::vec::" in symbol]


def exports(library: Path, kinds: str) -> set[str]:
    """Returns what a library exports, demangled; nm has a letter for each kind of symbol."""
    lines = output_of("nm", "--dynamic", "--defined-only", "--demangle", str(library)).splitlines()
    symbols = [line.split(maxsplit=2)[1:] for line in lines]
    return {name for kind, name in symbols if kind in kinds}


def public(pattern: str) -> set[str]:
    """Returns the names that a pattern finds in the public headers."""
    headers = [path.read_text() for path in (PREFIX / "include" / "rope").glob("*.h")]
    found = {name for header in headers for name in re.findall(pattern, header, re.MULTILINE)}
    assert found
    return found


def test_the_library_exports_its_public_functions_and_classes_only() -> None:
    names = {re.sub(r"\(.*", "", name, flags=re.DOTALL) for name in exports(LIBRARY, "TDBRi")}
    names.discard("rope::cuda::has_kernels")  # for _C
    assert all(name.startswith("rope::") for name in names)
    functions = public(r"^ROPE_API [^;(]*?(\w+)\(")
    classes = public(r"(?<!>\n)^(?:class|struct) ROPE_API (\w+)")  # templates are weak
    assert {name.split("::")[1] for name in names} == functions | classes


def test_what_the_library_has_in_common_with_others_names_no_private_type() -> None:
    """Weak symbols are the types of classes, and templates that every user has its own copy of."""
    weak = exports(LIBRARY, "WVu")
    names = {name for symbol in weak for name in re.findall(r"\brope::(\w+)", symbol)}
    assert names <= public(r"^(?:class|struct) (?:ROPE_API )?(\w+)")


def test_the_kernels_export_the_functions_of_their_interface_only() -> None:
    names = {re.sub(r"\(.*", "", name, flags=re.DOTALL) for name in exports(KERNELS, "TDBRiWVu")}
    of_cuda = {"are_compiled", "describe", "rotate", "normalize", "normalize_gradient", "sum"}
    of_cuda.add("scatter_rows")
    assert {name for name in names if "::cuda::" in name} == {f"rope::cuda::{n}" for n in of_cuda}
    of_cpu = r"rope::cpu::(rotate|arrange_gains|normalize|normalize_gradient)_[A-Z0-9_]+"
    assert not [n for n in names if "::cuda::" not in n and not re.fullmatch(of_cpu, n)]


def test_the_extension_exports_its_entry_only() -> None:
    assert exports(EXTENSION, "TDBRi") == {"PyInit__C"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_hardened(library: str) -> None:
    path = LIBRARIES[library]
    segments = output_of("readelf", "--program-headers", "--wide", str(path))
    flags = dict(re.findall(r"^ +(\w+) +(?:0x\w+ +){5}([RWE ]{3})", segments, re.MULTILINE))
    loaded = re.findall(r"^ +LOAD +(?:0x\w+ +){5}([RWE ]{3})", segments, re.MULTILINE)
    assert "E" not in flags["GNU_STACK"]
    assert "GNU_RELRO" in flags
    assert loaded
    assert not [each for each in loaded if "W" in each and "E" in each]
    dynamic = output_of("readelf", "--dynamic", "--wide", str(path))
    assert re.search(r"\(FLAGS\).*\bBIND_NOW\b", dynamic)
    assert "TEXTREL" not in dynamic


@pytest.mark.parametrize("library", ["librope", "_C"])
def test_a_library_calls_nothing_that_leaves_the_process(library: str) -> None:
    imported = output_of(
        "nm", "--dynamic", "--undefined-only", str(LIBRARIES[library])
    ).splitlines()
    names = {line.split()[-1].partition("@")[0] for line in imported}
    assert {"memcpy", "strlen"} & names
    denied = r"(f?open(at)?(64)?|socket|connect|send|recv|exec\w+|v?fork|posix_spawn\w*|p?open|"
    denied += r"system|dlopen|mprotect|unlink|rename|mkdir|getaddrinfo)"
    assert not {name for name in names if re.fullmatch(denied, name)}


def test_the_package_bundles_no_library_of_others() -> None:
    libraries = {path.name.partition(".")[0] for path in FOLDER.rglob("*.so*")}
    assert libraries <= set(LIBRARIES)


def import_with(prepare: str) -> subprocess.CompletedProcess[str]:
    """Imports torch_rope in a process of its own, after lines that prepare it."""
    program = f"import pathlib, torch\n{prepare}\nimport torch_rope"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_torch_that_the_library_was_built_for_is_written_down() -> None:
    words = (THIN / "share" / "rope" / "built_for").read_text().split()
    assert words[0] == "torch"
    assert words[1].split(".")[:2] == torch.__version__.split(".")[:2]


@pytest.mark.parametrize("version", ["2.1.0+cpu", "2.99.0.dev20301231", "3.0.1"])
def test_another_torch_than_the_library_was_built_for_is_named(version: str) -> None:
    completed = import_with(f"torch.__version__ = {version!r}")
    error = completed.stderr.splitlines()[-1]
    assert f"but torch {version} is installed" in error
    if THIN == PREFIX:
        built_for = (THIN / "share" / "rope" / "built_for").read_text().split()[1]
        assert error.startswith(f"ImportError: torch_rope was built for torch {built_for}")
        assert "in the folder of its sources: pip install . (or install torch " in error
    else:
        versions = sorted(path.name.split("_")[1:] for path in PREFIX.glob("torch_*_*"))
        names = ", ".join(".".join(parts) for parts in versions)
        assert error.startswith(f"ImportError: this torch_rope has libraries for torch {names}")
        command = "pip install --force-reinstall --no-deps --no-binary torch-rope torch-rope"
        assert error.endswith(command)


BUILT_FOR = """
def read_text(path, *arguments, read_text=pathlib.Path.read_text, **options):
    if path.name != "built_for":
        return read_text(path, *arguments, **options)
    {statement}

pathlib.Path.read_text = read_text
"""


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


@pytest.mark.usefixtures("compiler")
def test_a_cpp_program_is_refused_another_libtorch(tmp_path: Path) -> None:
    shutil.copytree(PREFIX / "share", tmp_path / "share")
    minor = ".".join(torch.__version__.split(".")[:2])
    if THIN == PREFIX:
        config = tmp_path / "share" / "cmake" / "rope" / "ropeConfig.cmake"
        text = config.read_text()
        for text_of_version in (f'MATCHES "^{minor}', f"built for LibTorch {minor}"):
            assert text_of_version in text
            text = text.replace(text_of_version, text_of_version.replace(minor, "2.1"))
        config.write_text(text)
    else:
        (tmp_path / "torch_2_1").mkdir()
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\n"
        "project(consumer LANGUAGES CXX)\n"
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
    assert ("it was built for" if THIN == PREFIX else "it has libraries for") in message
    assert "LibTorch 2.1, but" in message
    assert f"is {minor}." in message
