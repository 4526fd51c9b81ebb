"""Compares the torch that the libraries were built for, as recorded by CMake, with the one here."""

from pathlib import Path

import torch

FILE = Path(__file__).parent / "share" / "rope" / "built_for"


def mismatch() -> str | None:
    """Returns why _C cannot be loaded, or None if the versions match.

    The loader itself would only name an undefined symbol or a missing file. PyTorch's C++ interface
    changes with its minor version, the CUDA libraries that the kernels need with CUDA's major one.
    """
    try:
        words = FILE.read_text().split()  # "torch 2.15.0", and "cuda 13" if there are kernels.
    except OSError:
        return None
    built_for = dict(zip(words[::2], words[1::2], strict=True))
    minor = built_for["torch"].split(".")[:2]
    cuda = built_for.get("cuda")
    cuda_here = torch.version.cuda
    if minor == torch.__version__.split(".")[:2] and (
        cuda is None or (cuda_here is not None and cuda_here.split(".")[0] == cuda)
    ):
        return None
    return (
        f"torch_rope was built for torch {built_for['torch']}{_with(cuda)}, but torch "
        f"{torch.__version__}{_with(cuda_here) if cuda else ''} is installed. Build it again, in "
        "the folder of its sources: pip install --no-build-isolation . (or install torch "
        f"{'.'.join(minor)}{_with(cuda)})"
    )


def _with(cuda: str | None) -> str:
    return f" with CUDA {cuda}" if cuda else ""
