"""torch.library.opcheck of all eight operators: schemas, fake tensors, autograd, tracing."""

from typing import Any

import pytest
import torch
import torch_rope  # noqa: F401 - registers the operators
from reference import random_inv_freq, random_positions, random_values
from torch import Tensor
from torch.library import opcheck

APPLY = ("apply", "apply_", "apply_qk", "apply_qk_")
APPLY_COS_SIN = ("apply_cos_sin", "apply_cos_sin_", "apply_cos_sin_qk", "apply_cos_sin_qk_")

OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"embedding_axis": 1, "rotary_offset": 2, "interleaved": True, "conjugate": True},
]


def rotated_tensors(operator: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Returns what an operator rotates, asking for gradients unless it is written in place."""
    x = random_values((2, 6, 6, 6), dtype, device)
    k = random_values((2, 6, 6, 6), dtype, device, seed=1).transpose(1, 3)
    tensors = (x, k) if "_qk" in operator else (x,)
    if not operator.endswith("_"):
        for tensor in tensors:
            tensor.requires_grad_()
    return tensors


def check(operator: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Runs opcheck on an operator."""
    opcheck(getattr(torch.ops.rope, operator).default, arguments, options)


@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
@pytest.mark.parametrize("operator", APPLY)
def test_formed_frequencies(device: str, operator: str, options: dict[str, Any]) -> None:
    x = rotated_tensors(operator, torch.float32, device)
    check(operator, (*x, random_positions((6, 6), device=device, low=0, high=9)), options)


@pytest.mark.parametrize("axes", [None, 2])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
@pytest.mark.parametrize("operator", APPLY)
def test_given_frequencies(
    device: str, operator: str, options: dict[str, Any], axes: int | None
) -> None:
    leading = () if axes is None else (axes,)
    x = rotated_tensors(operator, torch.float64, device)
    positions = random_positions((*leading, 6, 6), torch.float64, device, low=0, high=9)
    inv_freq = random_inv_freq((*leading, 2), device=device)
    if not operator.endswith("_"):
        positions.requires_grad_()
        inv_freq.requires_grad_()
    check(operator, (*x, positions, inv_freq), options)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(
    "options", [*OPTION_SETS, {"rotary_dim": 2, "full_width": True, "conjugate": True}], ids=str
)
@pytest.mark.parametrize("operator", APPLY_COS_SIN)
def test_tables(device: str, operator: str, options: dict[str, Any], by_position: bool) -> None:
    x = rotated_tensors(operator, torch.float64, device)
    shape = (9, 2) if by_position else (6, 6, 2)
    cos, sin = (random_values(shape, torch.float64, device, seed=seed) for seed in (2, 3))
    if not operator.endswith("_"):
        cos.requires_grad_()
        sin.requires_grad_()
    rows = random_positions((6, 6), device=device, low=0, high=9) if by_position else None
    check(operator, (*x, cos, sin, rows), options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", ["apply", "apply_"])
def test_half_precision(device: str, operator: str, dtype: torch.dtype) -> None:
    x = rotated_tensors(operator, dtype, device)
    check(operator, (*x, torch.tensor(3, device=device)), {})
