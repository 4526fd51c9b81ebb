"""Weights of projections, between the two conventions of which elements form a pair."""

import re
import warnings
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor
from torch.library import opcheck

PERMUTATIONS = [torch_rope.permute_half_to_interleaved, torch_rope.permute_interleaved_to_half]

SLICES = [{}, {"rotary_dim": 4}, {"rotary_dim": 4, "rotary_offset": 2}, {"rotary_offset": 6}]


@pytest.mark.parametrize("options", SLICES)
@pytest.mark.parametrize("shape", [(24, 10), (24,), (24, 3, 2)])
def test_a_permutation_and_its_inverse_cancel(
    device: str, options: dict[str, int], shape: tuple[int, ...]
) -> None:
    weight = random_values(shape, device=device)
    there = torch_rope.permute_half_to_interleaved(weight, 8, **options)
    assert_same_bits(torch_rope.permute_interleaved_to_half(there, 8, **options), weight)
    back = torch_rope.permute_interleaved_to_half(weight, 8, **options)
    assert_same_bits(torch_rope.permute_half_to_interleaved(back, 8, **options), weight)


@pytest.mark.parametrize("options", SLICES)
def test_permuted_projections_give_the_same_scores(device: str, options: dict[str, int]) -> None:
    heads, head_dim, tokens = 3, 8, 5
    x = random_values((tokens, 10), torch.float64, device)
    positions = torch.arange(tokens, device=device).unsqueeze(-1)
    weights = [random_values((heads * head_dim, 10), x.dtype, device, seed=s) for s in (1, 2)]
    biases = [random_values((heads * head_dim,), x.dtype, device, seed=s) for s in (3, 4)]

    def scores(interleaved: bool) -> Tensor:
        permute = torch_rope.permute_half_to_interleaved
        rotated = []
        for weight, bias in zip(weights, biases, strict=True):
            if interleaved:
                weight = permute(weight, head_dim, **options)
                bias = permute(bias, head_dim, **options)
            projected = torch.nn.functional.linear(x, weight, bias).unflatten(-1, (heads, head_dim))
            rotated.append(
                torch_rope.apply(projected, positions, interleaved=interleaved, **options)
            )
        return torch.einsum("qhd,khd->hqk", *rotated)

    torch.testing.assert_close(scores(True), scores(False), rtol=0, atol=1e-10)


def test_a_permutation_is_a_copy_and_differentiable() -> None:
    weight = random_values((16, 3)).requires_grad_()
    permuted = torch_rope.permute_half_to_interleaved(weight, 8)
    factors = random_values((16, 3), seed=1)
    (permuted * factors).sum().backward()
    assert_same_bits(weight.grad, torch_rope.permute_interleaved_to_half(factors, 8))


def test_the_operators_behind_the_permutations_pass_opcheck(device: str) -> None:
    ops = torch.ops.rope
    weight = random_values((16, 3), device=device).requires_grad_()
    opcheck(ops._permute_half_to_interleaved.default, (weight, 8, 4, 2))
    opcheck(ops._permute_interleaved_to_half.default, (weight, 8, None, 0))


@pytest.mark.parametrize("permute", PERMUTATIONS)
def test_a_batch_of_weights_is_permuted_under_vmap_without_a_loop(
    device: str, permute: Any
) -> None:
    weights = random_values((3, 16, 5), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a loop.
        permuted = torch.vmap(lambda weight: permute(weight, 8))(weights)
    assert_same_bits(permuted, torch.stack([permute(weight, 8) for weight in weights]))


@pytest.mark.parametrize(
    ("shape", "head_dim", "options", "message"),
    [
        ((24, 10), 7, {}, "weight to have a multiple of head_dim = 7 rows, but got shape [24, 10]"),
        ((), 8, {}, "weight to have at least 1 dimension, but got 0"),
        ((24, 10), 0, {}, "head_dim to be at least 1, but got 0"),
        ((24, 10), -8, {}, "head_dim to be at least 1, but got -8"),
        ((21,), 7, {}, "rotary_dim to be even, but got 7"),
        ((24, 10), 8, {"rotary_dim": 3}, "rotary_dim to be even, but got 3"),
        ((24, 10), 8, {"rotary_dim": -2}, "rotary_dim to be at least 0, but got -2"),
        (
            (24, 10),
            8,
            {"rotary_dim": 10},
            "rotary_dim to be at most 8, head_dim without rotary_offset, but got 10",
        ),
        (
            (24, 10),
            8,
            {"rotary_dim": 8, "rotary_offset": 2},
            "rotary_dim to be at most 6, head_dim without rotary_offset, but got 8",
        ),
        ((24, 10), 8, {"rotary_offset": -2}, "rotary_offset to be in [0, 8], but got -2"),
        ((24, 10), 8, {"rotary_offset": 10}, "rotary_offset to be in [0, 8], but got 10"),
        ((24, 10), 8, {"rotary_offset": 3}, "rotary_dim to be even, but got 5"),
    ],
)
@pytest.mark.parametrize("permute", PERMUTATIONS)
def test_sizes_that_do_not_fit_are_refused(
    permute: Any, shape: tuple[int, ...], head_dim: int, options: dict[str, int], message: str
) -> None:
    match = f"^{re.escape(f'rope::{permute.__name__}(): expected {message}')}$"
    with pytest.raises(ValueError, match=match):
        permute(torch.zeros(shape), head_dim, **options)


@pytest.mark.parametrize(
    ("weight", "head_dim", "options", "message"),
    [
        (
            torch.nn.Linear(16, 32),
            8,
            {},
            "weight to be a tensor (for a layer, pass its .weight), but got Linear",
        ),
        ([[1.0]], 8, {}, "weight to be a tensor, but got list"),
        (torch.zeros(8), 8.0, {}, "head_dim to be an integer, but got float"),
        (torch.zeros(8), None, {}, "head_dim to be an integer, but got None"),
        (torch.zeros(8), 8, {"rotary_dim": 4.0}, "rotary_dim to be an integer, but got float"),
        (torch.zeros(8), 8, {"rotary_offset": "2"}, "rotary_offset to be an integer, but got str"),
        (
            torch.zeros(8),
            8,
            {"rotary_offset": None},
            "rotary_offset to be an integer, but got None",
        ),
    ],
)
@pytest.mark.parametrize("permute", PERMUTATIONS)
def test_arguments_of_another_type_are_refused(
    permute: Any, weight: Any, head_dim: Any, options: dict[str, Any], message: str
) -> None:
    match = f"^{re.escape(f'rope::{permute.__name__}(): expected {message}')}$"
    with pytest.raises(TypeError, match=match):
        permute(weight, head_dim, **options)
