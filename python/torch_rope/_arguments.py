"""Checks of what C++ cannot see: arguments of a type that no operator takes.

Messages have the form of those of the operators, such as
``rope::apply(): expected rotary_dim to be even, but got 7``.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def message(function: str, argument: str, rule: str, got: object) -> str:
    """Returns the text of an error.

    Args:
        function: The public name: ``rope::frequencies``, or ``torch_rope.RotaryEmbedding``.
        argument: The argument's name.
        rule: What is expected of the argument, such as ``be a tensor``.
        got: What was found instead.
    """
    return f"{function}(): expected {argument} to {rule}, but got {got}"


def kind_of(value: object) -> str:
    """Names the type of a value. Values are not shown: a tensor may be large, or on a device."""
    return "None" if value is None else type(value).__name__


def check_tensor(function: str, argument: str, value: Any, hint: str = "") -> None:
    """Raises TypeError unless the value is a tensor or a Proxy of ``torch.fx``."""
    if not (isinstance(value, Tensor) or _is_proxy(value)):
        raise TypeError(message(function, argument, f"be a tensor{hint}", kind_of(value)))


def check_integer(function: str, argument: str, value: Any) -> None:
    """Raises TypeError unless the value is an integer. NumPy integers are, bools are not."""
    if not _is_integer(value):
        raise TypeError(message(function, argument, "be an integer", kind_of(value)))


def check_integers(function: str, argument: str, values: Any) -> None:
    """Raises TypeError unless the value is a sequence of integers."""
    if _is_proxy(values):
        return
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(message(function, argument, "be a sequence of integers", kind_of(values)))
    for value in values:
        is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
        if is_large or not _is_integer(value):
            kind = "one beyond 64 bits" if is_large else kind_of(value)
            got = f"a {kind_of(values)} with {kind}"
            raise TypeError(message(function, argument, "be a sequence of integers", got))


def check_number(function: str, argument: str, value: Any) -> None:
    """Raises TypeError unless the value is a real number that float64 has room for."""
    if isinstance(value, bool) or not hasattr(type(value), "__float__"):
        raise TypeError(message(function, argument, "be a number", kind_of(value)))
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise TypeError(message(function, argument, "be a number", "one beyond float64"))


def check_bool(function: str, argument: str, value: Any) -> None:
    """Raises TypeError unless the value is a bool."""
    if not (isinstance(value, bool) or _is_proxy(value)):
        raise TypeError(message(function, argument, "be a bool", kind_of(value)))


def check_dtype(function: str, dtype: Any) -> None:
    """Raises TypeError unless the value is a dtype. C++ checks which dtypes frequencies have."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(message(function, "dtype", "be float32 or float64", kind_of(dtype)))


def _is_proxy(value: Any) -> bool:
    """Whether the value is a Proxy of ``torch.fx``, not yet known."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool | Tensor):
        return False
    if isinstance(value, torch.SymInt) or hasattr(type(value), "__index__"):
        return True
    return _is_proxy(value)
