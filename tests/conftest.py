"""Fixtures and settings of every test."""

import pytest
import torch
import torch_rope
from hypothesis import settings

# Repeatable by default; `pytest --hypothesis-profile=explore` draws others, and more of them.
settings.register_profile(
    "repeatable", max_examples=200, deadline=None, derandomize=True, database=None
)
settings.register_profile("explore", deadline=None, max_examples=5000, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The device that a test runs on."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if name == "cuda" and not torch_rope._C.has_cuda:
        pytest.skip("torch-rope was built without its CUDA kernels")
    return name
