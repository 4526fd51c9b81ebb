"""Finds the libraries for the torch that is installed.

PyTorch's C++ interface changes with its minor version. A build from source has one set of
libraries, for the torch that CMake wrote down; a wheel for several versions has a folder for each,
such as ``torch_2_15``. With any other torch the loader would only name an undefined symbol.
"""

from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
FILE = PACKAGE / "share" / "rope" / "built_for"


def find_libraries() -> Path | None:
    """Returns the folder of _C in a wheel for several versions; None if that is the package.

    Raises:
      ImportError: If there are no libraries for the torch that is installed.
    """
    major, minor = torch.__version__.split(".")[:2]
    folders = {tuple(path.name.split("_")[1:]): path for path in PACKAGE.glob("torch_*_*/")}
    if folders:
        if (major, minor) in folders:
            return folders[major, minor]
        versions = [".".join(version) for version in sorted(folders, key=lambda v: [*map(int, v)])]
        raise ImportError(
            f"this torch_rope has libraries for torch {', '.join(versions)}, but torch "
            f"{torch.__version__} is installed: install one of these, or build torch_rope for it "
            "with pip install --force-reinstall --no-deps --no-binary torch-rope torch-rope"
        )
    try:
        built_for = FILE.read_text().split()[1]  # "torch 2.15.0"
    except OSError:
        return None
    if built_for.split(".")[:2] != [major, minor]:
        raise ImportError(
            f"torch_rope was built for torch {built_for}, but torch {torch.__version__} is "
            "installed. Build it again, in the folder of its sources: pip install . "
            f"(or install torch {'.'.join(built_for.split('.')[:2])})"
        )
    return None
