"""Where the libraries of the package under test are."""

from pathlib import Path

import torch_rope

# Include files, the CMake package and librope_kernels.so. An editable installation leaves them
# outside the folder of the Python sources.
PREFIX = Path(torch_rope.cmake_prefix_path)
while PREFIX.parent != PREFIX and not (PREFIX / "lib" / "librope_kernels.so").is_file():
    PREFIX = PREFIX.parent

EXTENSION = Path(torch_rope._C.__file__)

# librope.so and _C. A wheel for several versions of torch has a folder for each.
THIN = EXTENSION.parent if (EXTENSION.parent / "lib" / "librope.so").is_file() else PREFIX

LIBRARY = THIN / "lib" / "librope.so"
KERNELS = PREFIX / "lib" / "librope_kernels.so"
LIBRARIES = {"librope": LIBRARY, "librope_kernels": KERNELS, "_C": EXTENSION}
