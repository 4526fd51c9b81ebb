"""The operators of ``torch.ops``, called with positional arguments like those of ``_C``.

Compilers, tensor subclasses and modes see these calls. The functions of ``_C`` are faster, but
Python code cannot intercept them.
"""

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from torch_rope._arguments import check_tensor
from torch_rope._compile import call_traced
from torch_rope._subclasses import register_with_dtensor


def _by_position(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.rope, name).default
    arguments = operator._schema.arguments
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    num_tensors = len(arguments) - len(keywords)
    num_rotated = 2 if "_qk" in name else 1

    def call(*values: Any) -> Any:
        options = dict(zip(keywords, values[num_tensors:], strict=True))
        if is_compiling():
            if any(type(value) not in (Tensor, NoneType) for value in values[:num_tensors]):
                register_with_dtensor()  # Only here: the compiler guards on what this reads.
            angles = values[num_rotated:num_tensors]
            return call_traced(name, values[:num_rotated], angles, options)
        for argument, value in zip(arguments, values[:num_tensors], strict=False):
            if value is not None or argument.type.kind() != "OptionalType":
                check_tensor(f"rope::{name}", argument.name, value)
        return operator(*values[:num_tensors], **options)

    return call


apply = _by_position("apply")
apply_qk = _by_position("apply_qk")
apply_ = _by_position("apply_")
apply_qk_ = _by_position("apply_qk_")
apply_cos_sin = _by_position("apply_cos_sin")
apply_cos_sin_qk = _by_position("apply_cos_sin_qk")
apply_cos_sin_ = _by_position("apply_cos_sin_")
apply_cos_sin_qk_ = _by_position("apply_cos_sin_qk_")
norm_apply = _by_position("norm_apply")
norm_apply_qk = _by_position("norm_apply_qk")
norm_apply_ = _by_position("norm_apply_")
norm_apply_qk_ = _by_position("norm_apply_qk_")
norm_apply_cos_sin = _by_position("norm_apply_cos_sin")
norm_apply_cos_sin_qk = _by_position("norm_apply_cos_sin_qk")
norm_apply_cos_sin_ = _by_position("norm_apply_cos_sin_")
norm_apply_cos_sin_qk_ = _by_position("norm_apply_cos_sin_qk_")
