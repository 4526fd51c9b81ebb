"""The build backend: scikit-build-core's, and build requirements that depend on what is installed.

pip builds a package without the packages of the environment that it installs into, so a build
requirement on torch would download a second copy of it, and perhaps another version. But pip's
build environment shares the interpreter, which names the folders of the environment's packages:
a supported torch in one of them is what CMake builds against. Elsewhere (uv and `python -m build`
build in virtual environments of their own, and the environment may have no torch), the build
requires torch from the index.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from scikit_build_core.setuptools import build_meta
from scikit_build_core.setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = "torch>=2.11,<2.16"

# pip's CUDA compiler. All its parts are named so that they get one version: nvcc alone would pull
# in the newest nvvm, whose output an older ptxas cannot read.
NVCC_PARTS = "cccl,crt,nvcc,nvvm"


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns what to install before a wheel is built."""
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Returns what to install before an editable installation is built."""
    return build_meta.get_requires_for_build_editable(config_settings) + requirements()


def requirements() -> list[str]:
    """Returns torch, unless it is installed, and nvcc, if torch needs one and there is none."""
    torch = find_torch()
    if torch is None:
        return [TORCH, *([f"cuda-toolkit[{NVCC_PARTS}]"] if wants_cuda() else [])]
    version = cuda_version(torch)
    # pip's packages of CUDA 12 have no nvcc.
    if not wants_cuda() or version is None or version < (13,) or has_nvcc(torch, version[0]):
        return []
    major, minor = version
    # cudart: nvcc's headers are looked for next to it, not next to torch.
    return [f"cuda-toolkit[{NVCC_PARTS},cudart]=={major}.{minor}.*"]


# ---- For setup.py ----


def torch_requirement() -> str:
    """Returns the versions of torch that the distribution being built works with.

    PyTorch's C++ interface changes with its minor version: what 2.15.0 built, 2.15.* runs. A source
    distribution works with all.
    """
    torch = None if "sdist" in sys.argv else find_torch()
    if torch is None:
        return TORCH
    return f"torch=={'.'.join(torch.version.split('.')[:2])}.*"


def cmake_arguments() -> list[str]:
    """Returns where CMake finds what this interpreter cannot import, or does not look for."""
    torch = find_torch()
    if torch is None or importable_torch() is not None:
        return []
    arguments = [f"-DLibTorch_INCLUDE_DIR={torch_folder(torch) / 'include'}"]
    version = cuda_version(torch)
    if version is not None:
        compilers = [Path(entry) / f"nvidia/cu{version[0]}/bin/nvcc" for entry in sys.path]
        arguments += [f"-DROPE_PIP_NVCC={nvcc}" for nvcc in compilers if nvcc.is_file()][:1]
    return arguments


# ---- The torch to build against ----


def find_torch() -> Distribution | None:
    """Returns the torch that can be imported, else a supported one where this will be installed."""
    importable = importable_torch()
    if importable is not None:
        return importable
    supported = Requirement(TORCH).specifier
    for folder in site_packages():
        for torch in distributions(name="torch", path=[folder]):
            has_headers = (torch_folder(torch) / "include" / "torch" / "script.h").is_file()
            if has_headers and supported.contains(torch.version, prereleases=True):
                return torch
    return None


def importable_torch() -> Distribution | None:
    """Returns the torch that the interpreter would import, if any."""
    return next(iter(distributions(name="torch")), None)


def site_packages() -> list[str]:
    """Returns the folders that the interpreter imports packages from when nothing isolates it."""
    folders = site.getsitepackages()
    # A virtual environment hides the user's packages, unless it was made to show the system's.
    if sys.base_prefix in site.PREFIXES:
        folders.insert(int(sys.prefix != sys.base_prefix), site.getusersitepackages())
    return folders


def torch_folder(torch: Distribution) -> Path:
    """Returns the folder of the package."""
    return Path(str(torch.locate_file("torch")))


# ---- The CUDA compiler ----


def wants_cuda() -> bool:
    """Returns whether CUDA kernels are to be built if torch and a compiler allow it."""
    off = ("0", "off", "no", "n", "false", "ignore", "notfound")
    return sys.platform == "linux" and os.environ.get("ROPE_CUDA", "").lower() not in off


def cuda_version(torch: Distribution) -> tuple[int, int] | None:
    """Returns the CUDA version of torch, or None if it is a build for CPU only."""
    file = torch_folder(torch) / "version.py"
    text = file.read_text() if file.is_file() else ""
    found = re.search(r"^cuda\b.*?['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def has_nvcc(torch: Distribution, major: int) -> bool:
    """Returns whether cmake/CudaCompiler.cmake will find a compiler of CUDA version `major`."""
    folders = [
        *(os.environ[name] + "/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ),
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
    ]
    toolkit = shutil.which("nvcc", path=os.pathsep.join(folders))
    packaged = torch_folder(torch).parent / f"nvidia/cu{major}/bin/nvcc"
    candidates = [os.environ.get("CUDACXX"), toolkit, packaged]
    return any(nvcc_major(str(candidate)) == major for candidate in candidates if candidate)


def nvcc_major(nvcc: str) -> int | None:
    """Returns the major CUDA version of a compiler, or None if it does not run."""
    try:
        completed = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.", completed.stdout)
    return int(found[1]) if found else None
