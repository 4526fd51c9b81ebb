"""torch.library.opcheck of all operators: schemas, fake tensors, autograd, tracing."""

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


NORM_APPLY = tuple(f"norm_{name}" for name in APPLY)
NORM_APPLY_COS_SIN = tuple(f"norm_{name}" for name in APPLY_COS_SIN)

NORM_OPTION_SETS: list[dict[str, Any]] = [
    *OPTION_SETS,
    {"norm_axes": [-1, 1], "eps": 0.1, "norm_last": True},
    {"embedding_axis": 1, "norm_axes": [1, 0], "weight_offset": 1.0},
]


def weights(operator: str, dtype: torch.dtype, device: str) -> tuple[Tensor | None, ...]:
    """Returns the weights of an operator, of a pair also None."""
    if "_qk" in operator:
        return (random_values((6, 6), dtype, device, seed=5), None)
    return (random_values((6,), dtype, device, seed=5),)


def leaves(operator: str, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Asks for the gradients of all that have one, unless the operator works in place."""
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and not operator.endswith("_"):
            tensor.requires_grad_()
    return tensors


@pytest.mark.parametrize("axes", [None, 2])
@pytest.mark.parametrize("options", NORM_OPTION_SETS, ids=str)
@pytest.mark.parametrize("operator", NORM_APPLY)
def test_norms(device: str, operator: str, options: dict[str, Any], axes: int | None) -> None:
    leading = () if axes is None else (axes,)
    x = rotated_tensors(operator, torch.float64, device)
    positions = random_positions((*leading, 6, 6), torch.float64, device, low=0, high=9)
    inv_freq = random_inv_freq((*leading, 2), device=device)
    others = (*weights(operator, torch.float64, device), positions, inv_freq)
    check(operator, (*x, *leaves(operator, others)), options)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(
    "options", [*NORM_OPTION_SETS, {"full_width": True, "norm_last": True}], ids=str
)
@pytest.mark.parametrize("operator", NORM_APPLY_COS_SIN)
def test_norms_with_tables(
    device: str, operator: str, options: dict[str, Any], by_position: bool
) -> None:
    x = rotated_tensors(operator, torch.float64, device)
    shape = (9, 2) if by_position else (6, 6, 2)
    cos, sin = (random_values(shape, torch.float64, device, seed=seed) for seed in (2, 3))
    rows = random_positions((6, 6), device=device, low=0, high=9) if by_position else None
    others = (*weights(operator, torch.float64, device), cos, sin, rows)
    check(operator, (*x, *leaves(operator, others)), options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", ["norm_apply", "norm_apply_"])
def test_norms_of_half_precision(device: str, operator: str, dtype: torch.dtype) -> None:
    x = rotated_tensors(operator, dtype, device)
    weight = random_values((6,), torch.float32, device)
    check(operator, (*x, *leaves(operator, (weight,)), torch.tensor(3, device=device)), {})


@pytest.mark.parametrize("mask", [(True,) * 4, (True, False, True, True), (False, True) * 2])
@pytest.mark.parametrize("options", NORM_OPTION_SETS, ids=str)
@pytest.mark.parametrize(
    "operator", ["norm_apply", "norm_apply_qk", "norm_apply_cos_sin", "norm_apply_cos_sin_qk"]
)
def test_gradients_of_norms(
    device: str, operator: str, options: dict[str, Any], mask: tuple[bool, ...]
) -> None:
    x = rotated_tensors(operator, torch.float64, device)
    gradients = tuple(random_values(tuple(one.shape), torch.float64, device, seed=7) for one in x)
    angles: tuple[Tensor, ...] = (random_positions((6, 6), device=device, low=0, high=9),)
    if "cos_sin" in operator:
        angles = tuple(
            random_values((6, 1, 2), torch.float64, device, seed=seed) for seed in (2, 3)
        )
    others = leaves(operator, (*weights(operator, torch.float64, device), *angles))
    options = {**options, "output_mask": mask}
    check(f"_{operator}_backward", (*gradients, *x, *others), options)
