"""Builds torch-rope with CMake; pyproject.toml has everything that is not known before."""

import re
from pathlib import Path

from build_backend import cmake_arguments, torch_requirement  # In tools/: run pip, not this file.
from setuptools import setup

# Package indexes show the README without the files that it links to: such links become plain text.
readme = re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"\1", Path("README.md").read_text())

setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    cmake_source_dir=".",
    cmake_install_dir="torch_rope",
    cmake_args=["-DROPE_PYTHON=ON", *cmake_arguments()],
    install_requires=[torch_requirement()],
)
