"""The examples in the docstrings of everything public run."""

import doctest

import pytest
import torch
import torch_rope

PUBLIC = [name for name in torch_rope.__all__ if callable(getattr(torch_rope, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_docstring_run(name: str) -> None:
    torch.manual_seed(0)
    found = doctest.DocTestFinder().find(getattr(torch_rope, name), name, globs={})
    runner = doctest.DocTestRunner()
    for examples in found:
        runner.run(examples)
    assert runner.failures == 0
    assert runner.tries > 0
