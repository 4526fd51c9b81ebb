"""Builds torch-rope with CMake; pyproject.toml has everything that is not known before."""

from importlib.metadata import version

from setuptools import setup

# PyTorch's C++ interface changes with its minor version: what 2.15.0 built, 2.15.* runs.
torch_minor = ".".join(version("torch").split(".")[:2])

setup(
    cmake_source_dir=".",
    cmake_install_dir="torch_rope",
    cmake_args=["-DROPE_PYTHON=ON"],
    install_requires=[f"torch=={torch_minor}.*"],
)
