"""Checks of the adapters' own arguments, which the operators never see."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_rope._arguments import check_tensor, message


def check_dims(function: str, argument: str, value: Tensor, layout: Sequence[str]) -> None:
    """Raises TypeError unless ``value`` is a tensor, ValueError unless it has these dimensions.

    Args:
        function: The caller's public name, for errors.
        argument: The argument's name.
        value: The argument.
        layout: The name of each dimension.
    """
    check_tensor(function, argument, value)
    if value.dim() != len(layout):
        rule = f"have dimensions ({', '.join(layout)})"
        raise ValueError(message(function, argument, rule, f"shape {tuple(value.shape)}"))


def check_shape(function: str, argument: str, value: Tensor, *expected: Sequence[int]) -> None:
    """Raises ValueError unless ``value`` has one of the expected shapes."""
    if all(tuple(value.shape) != tuple(shape) for shape in expected):
        rule = f"have shape {' or '.join(str(tuple(shape)) for shape in expected)}"
        raise ValueError(message(function, argument, rule, f"shape {tuple(value.shape)}"))


def check_whole_numbers(function: str, argument: str, value: Tensor) -> None:
    """Raises TypeError unless ``value`` is int32 or int64."""
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(message(function, argument, "be int32 or int64", dtype_of(value)))


def dtype_of(value: Tensor) -> str:
    """Returns the name of a dtype as in the operators' messages."""
    return str(value.dtype).removeprefix("torch.")
