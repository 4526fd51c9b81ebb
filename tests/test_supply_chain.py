"""Importing the package does nothing but import; what it is built from is listed, with bounds."""

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
BACKEND = (ROOT / "tools" / "build_backend.py").read_text()

# Prints every event of Python's audit hooks that may leave the process or change the disk while
# torch_rope and all its modules are imported. torch and what the integrations import come before.
PROGRAM = """
import importlib, os, pkgutil, sys
import torch, torch._dynamo, torch.distributed.tensor, torch.nn.attention
try:
    import transformers.integrations.hub_kernels, transformers.modeling_utils
except ImportError:
    pass

MODULES = ("socket", "subprocess", "urllib", "http", "ftplib", "smtplib", "shutil", "tempfile")
FUNCTIONS = (
    "exec", "fork", "forkpty", "kill", "link", "mkdir", "posix_spawn", "putenv", "remove",
    "rename", "rmdir", "spawn", "startfile", "symlink", "system", "truncate", "unsetenv",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def watch(event, arguments):
    module, _, function = event.partition(".")
    writes = event == "open" and (arguments[2] or 0) & WRITES
    if module in MODULES or (module == "os" and function in FUNCTIONS) or writes:
        print(event, arguments[:2], flush=True)

sys.addaudithook(watch)
import torch_rope
for module in pkgutil.walk_packages(torch_rope.__path__, "torch_rope."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert not error.name.startswith("torch_rope"), error
"""


def events(program: str, folder: Path) -> list[str]:
    """Returns the events that a program prints; -B keeps Python from writing its own cache."""
    completed = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.splitlines()


def test_importing_starts_writes_and_downloads_nothing(tmp_path: Path) -> None:
    assert events(PROGRAM, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_what_importing_must_not_do_is_seen(tmp_path: Path) -> None:
    faults = """
import socket, urllib.request
open("new", "w").close()
os.close(os.open("new", os.O_RDWR))
os.system("true")
subprocess = importlib.import_module("subprocess")
subprocess.run(["true"])
socket.socket().close()
try:
    urllib.request.urlopen("http://127.0.0.1:9/")
except OSError:
    pass
"""
    watch = PROGRAM[PROGRAM.index("MODULES = ") : PROGRAM.index("import torch_rope")]
    seen = {
        line.split()[0] for line in events(f"import importlib, os, sys\n{watch}{faults}", tmp_path)
    }
    assert seen >= {
        "open",
        "os.system",
        "subprocess.Popen",
        "socket.__new__",
        "socket.connect",
        "urllib.Request",
    }


@pytest.mark.parametrize("arguments", [["-c", "import torch_rope"], ["-m", "torch_rope", "-h"]])
def test_importing_without_numpy_warns_of_nothing(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('no NumPy here')\n")
    completed = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""


# ---- What the binaries are made of ----


def test_every_header_of_others_is_listed_with_its_licence() -> None:
    page = (ROOT / "THIRD_PARTY_LICENSES.md").read_text()
    headers = {
        header
        for path in (ROOT / "csrc").rglob("*.*")
        for header in re.findall(r"^#include <([^>]+)>", path.read_text(), re.MULTILINE)
    }
    of_others = {
        header.split("/")[0] + "/" if "/" in header else header
        for header in headers
        if not header.startswith(("rope/", "sys/")) and ("/" in header or header.endswith(".h"))
    }
    listed = {
        name.strip("`")
        for row in re.findall(r"^\| .*? \|", page, re.MULTILINE)
        for name in re.findall(r"`[^`]+`", row)
    }
    unlisted = {
        header
        for header in of_others - {"unistd.h"}
        if not any(re.fullmatch(name.replace("*", r"\w*"), header) for name in listed)
    }
    assert of_others >= {"ATen/", "c10/", "torch/", "cuda_runtime.h"}
    assert not unlisted
    assert 'license-files = ["LICENSE", "NOTICE", "THIRD_PARTY_LICENSES.md"]' in PROJECT


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    found = re.search(r'^version = "(.+)"', PROJECT, re.MULTILINE)
    assert found is not None
    citation = (ROOT / "CITATION.cff").read_text()
    released = re.search(rf"^version: {re.escape(found[1])}\ndate-released: (.+)", citation, re.M)
    assert released is not None
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{found[1]}] - {released[1]}\n" in changelog


# ---- The lower bounds of what builds it ----


def lowest(requirement: str) -> str:
    """Returns the lower bound of a requirement of the build."""
    found = re.search(rf"{re.escape(requirement)}[^\n]*?>=([\d.]+)", PROJECT + BACKEND)
    assert found is not None, requirement
    return found[1]


@pytest.mark.parametrize(
    ("package", "requirement"),
    [
        ("scikit-build-core[setuptools]", '"scikit-build-core[setuptools]'),
        ("setuptools", '"setuptools'),
        ("cmake", "cmake.version"),
        ("ninja", "ninja.version"),
    ],
)
def test_ci_builds_with_the_lower_bound_of(package: str, requirement: str) -> None:
    pins = (ROOT / ".ci" / "lowest-requirements.txt").read_text()
    found = re.search(rf"^{re.escape(package)}==([\d.]+)", pins, re.MULTILINE)
    assert found is not None
    parts, bound = found[1].split("."), lowest(requirement).split(".")
    assert parts[: len(bound)] == bound
    assert all(part in ("0", "1") for part in parts[len(bound) :])


def test_ci_tests_with_the_oldest_torch_that_may_build_it() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert f"oldest_torch={lowest(chr(34) + 'torch')}.0\n" in script
    assert "-r .ci/lowest-requirements.txt" in script


# ---- What the build requires where torch is installed, and where it is not ----


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install_torch(self, version: str, cuda: str | None, headers: bool = True) -> None:
        """Puts there what the build looks at."""
        (self.folder / f"torch-{version}.dist-info").mkdir()
        (self.folder / f"torch-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: torch\nVersion: {version}\n"
        )
        (self.folder / "torch" / "include" / "torch").mkdir(parents=True)
        if headers:
            (self.folder / "torch" / "include" / "torch" / "script.h").touch()
        (self.folder / "torch" / "version.py").write_text(
            f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
        )

    def install_nvcc(self, path: str, version: str) -> Path:
        """Puts a compiler there that prints its version."""
        nvcc = self.folder / path
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n"
        )
        nvcc.chmod(0o755)
        return nvcc


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, site: Site) -> Iterator[ModuleType]:
    """The build backend as in an isolated build: without torch, and without a CUDA toolkit."""
    pytest.importorskip("scikit_build_core", reason="no scikit-build-core here")
    for name in ("ROPE_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "tools")
    import build_backend

    def distributions(**of: Any) -> Iterator[importlib.metadata.Distribution]:
        return iter(importlib.metadata.distributions(**of) if "path" in of else ())

    monkeypatch.setattr(build_backend, "distributions", distributions)
    monkeypatch.setattr(build_backend, "site_packages", lambda: [str(site.folder)])
    which = build_backend.shutil.which
    monkeypatch.setattr(
        build_backend.shutil,
        "which",
        lambda name, path: which(name, path=path.split(":")[0]),  # not /usr/local/cuda
    )
    monkeypatch.setenv("PATH", "/nowhere")
    yield build_backend
    sys.modules.pop("build_backend", None)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


NVCC = "cuda-toolkit[cccl,crt,nvcc,nvvm]"
PINNED_NVCC = "cuda-toolkit[cccl,crt,nvcc,nvvm,cudart]=={}.*"


@pytest.mark.parametrize(
    ("version", "cuda", "nvcc"),
    [
        ("2.11.0+cpu", None, []),
        ("2.15.1+cu132", "13.2", [PINNED_NVCC.format("13.2")]),
        ("2.13.0", "13.0", [PINNED_NVCC.format("13.0")]),
        ("2.13.0+cu126", "12.6", []),  # There is no nvcc of CUDA 12 to require.
    ],
)
def test_an_installed_torch_is_not_required(
    backend: ModuleType, site: Site, version: str, cuda: str | None, nvcc: list[str]
) -> None:
    site.install_torch(version, cuda)
    assert backend.requirements() == nvcc
    assert backend.torch_requirement() == f"torch=={version[:4]}.*"
    assert backend.cmake_arguments() == [f"-DLibTorch_INCLUDE_DIR={site.folder}/torch/include"]


@pytest.mark.parametrize("off", ["0", "OFF", "false"])
def test_without_cuda_kernels_no_compiler_is_required(
    backend: ModuleType, site: Site, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    monkeypatch.setenv("ROPE_CUDA", off)
    assert backend.requirements() == [backend.TORCH]
    site.install_torch("2.15.0", "13.2")
    assert backend.requirements() == []


@pytest.mark.parametrize("version", [None, "2.10.2", "2.16.0", "2.16.0.dev20270101", "1.13.1"])
def test_without_a_supported_torch_one_is_required(
    backend: ModuleType, site: Site, version: str | None
) -> None:
    if version:
        site.install_torch(version, "13.2")
    assert backend.requirements() == [backend.TORCH, NVCC]
    assert backend.torch_requirement() == backend.TORCH
    assert backend.cmake_arguments() == []


def test_a_torch_without_headers_is_not_built_against(backend: ModuleType, site: Site) -> None:
    site.install_torch("2.15.0", None, headers=False)
    assert backend.requirements() == [backend.TORCH, NVCC]


@pytest.mark.parametrize("where", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "packages"])
@pytest.mark.parametrize(("version", "suits"), [("13.0", True), ("12.9", False)])
def test_a_compiler_of_the_cuda_version_of_torch_is_not_required_again(
    backend: ModuleType,
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    version: str,
    suits: bool,
) -> None:
    site.install_torch("2.15.0", "13.2")
    path = "nvidia/cu13/bin/nvcc" if where == "packages" else "toolkit/bin/nvcc"
    nvcc = site.install_nvcc(path, version)
    folder = {"CUDACXX": nvcc, "PATH": nvcc.parent}.get(where, nvcc.parents[1])
    if where != "packages":
        monkeypatch.setenv(where, str(folder))
    assert backend.requirements() == ([] if suits else [PINNED_NVCC.format("13.2")])


def test_cmake_is_told_of_a_compiler_in_the_build_environment(
    backend: ModuleType, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install_torch("2.15.0", "13.2")
    nvcc = site.install_nvcc("overlay/nvidia/cu13/bin/nvcc", "13.2")
    monkeypatch.syspath_prepend(site.folder / "overlay")
    assert backend.cmake_arguments()[1:] == [f"-DROPE_PIP_NVCC={nvcc}"]
    # The names of the variables that the backend sets.
    assert "find_program(ROPE_PIP_NVCC nvcc" in (ROOT / "cmake" / "CudaCompiler.cmake").read_text()
    assert "find_path(LibTorch_INCLUDE_DIR " in (ROOT / "cmake" / "FindLibTorch.cmake").read_text()
