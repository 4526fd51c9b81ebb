"""The same operators written in ATen."""

from typing import Any

import pytest
import reference
import torch
import torch_rope  # noqa: F401 - registers the operators
from hypothesis import given
from reference import assert_rotated, random_inv_freq, random_positions, random_values
from strategies import Application, TableApplication, applications, table_applications
from torch.autograd import gradcheck

apply_composed = torch.ops.rope.apply_composed
apply_cos_sin_composed = torch.ops.rope.apply_cos_sin_composed


def schema(name: str) -> str:
    """Returns what an operator takes and returns, without its name."""
    operator = getattr(torch.ops.rope, name).default
    return str(operator._schema).partition("(")[2]


@pytest.mark.parametrize("name", ["apply", "apply_cos_sin"])
def test_the_schema_is_that_of_the_operator(name: str) -> None:
    assert schema(f"{name}_composed") == schema(name)


@given(application=applications())
def test_any_call_matches_the_reference(device: str, application: Application) -> None:
    x, positions, inv_freq = application.tensors(device)
    actual = apply_composed(x, positions, inv_freq, **application.options)
    assert actual.dtype == x.dtype
    assert_rotated(actual, reference.apply(x, positions, inv_freq, **application.options))


@given(application=table_applications())
def test_any_call_with_tables_matches_the_reference(
    device: str, application: TableApplication
) -> None:
    x, cos, sin, positions = application.tensors(device)
    actual = apply_cos_sin_composed(x, cos, sin, positions, **application.options)
    assert actual.dtype == x.dtype
    assert_rotated(actual, reference.apply_cos_sin(x, cos, sin, positions, **application.options))


OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"interleaved": True, "conjugate": True, "rotary_offset": 1},
    {"embedding_axis": 1, "rotary_offset": 2},
]


@pytest.mark.parametrize("axes", [None, 1, 3])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients(device: str, options: dict[str, Any], axes: int | None) -> None:
    leading = () if axes is None else (axes,)
    x = random_values((2, 8, 8), torch.float64, device).requires_grad_()
    positions = random_positions((*leading, 8), torch.float64, device, low=-8, high=8)
    inv_freq = random_inv_freq((*leading, 3), torch.float64, device)
    inputs = (x, positions.requires_grad_(), inv_freq.requires_grad_())
    assert gradcheck(lambda *inputs: apply_composed(*inputs, **options), inputs)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients_of_tables(device: str, options: dict[str, Any], by_position: bool) -> None:
    rows = torch.tensor([1, 0, 1, 2, 4, 4, 1, 0], device=device) if by_position else None
    shape = (5, 3) if by_position else (8, 3)
    x, cos, sin = (
        random_values(size, torch.float64, device, seed=seed).requires_grad_()
        for seed, size in enumerate(((2, 8, 8), shape, shape))
    )
    assert gradcheck(
        lambda *inputs: apply_cos_sin_composed(*inputs, rows, **options), (x, cos, sin)
    )
