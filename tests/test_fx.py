"""torch.fx.symbolic_trace records the operators, and what it traced computes the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor, nn

POSITIONS = torch.arange(5)[:, None]
WEIGHT = random_values((4, 16), seed=1)
TABLES = (random_values((5, 1, 8), seed=2), random_values((5, 1, 8), seed=3))


def rotated(x: Any) -> tuple[Tensor, ...]:
    """Returns one result or several as a tuple."""
    return x if isinstance(x, tuple) else (x,)


def normalized_pair(pair: Any) -> tuple[Tensor, Tensor]:
    """Takes the result apart, as models do."""
    q, k = torch_rope.norm_apply(pair, (WEIGHT, None), POSITIONS, norm_axes=(-2, -1))
    return q, k


def of_a_pair(pair: Any) -> tuple[Tensor, Tensor]:
    """Takes the result apart, as models do."""
    q, k = torch_rope.apply(pair, POSITIONS)
    return q, k


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "apply": lambda x: torch_rope.apply(x, POSITIONS, interleaved=True),
    "apply_": lambda x: torch_rope.apply_(x.clone(), POSITIONS),
    "apply_cos_sin": lambda x: torch_rope.apply_cos_sin(x, *TABLES, conjugate=True),
    "apply_cos_sin_": lambda x: torch_rope.apply_cos_sin_(x.clone(), *TABLES),
    "full width": lambda x: torch_rope.apply_cos_sin(
        x, *(torch.cat((t, t), -1) for t in TABLES), full_width=True
    ),
    "norm_apply": lambda x: torch_rope.norm_apply(x, WEIGHT, POSITIONS, norm_axes=[-1, 2]),
    "norm_apply_": lambda x: torch_rope.norm_apply_(x.clone(), None, POSITIONS, eps=1e-5),
    "norm_apply_cos_sin": lambda x: torch_rope.norm_apply_cos_sin(
        x, WEIGHT, *TABLES, norm_last=True
    ),
    "norm_apply_cos_sin_": lambda x: torch_rope.norm_apply_cos_sin_(
        x.clone(), WEIGHT, *TABLES, weight_offset=1.0
    ),
    "pair": lambda x: of_a_pair((x, x[:, :, :2])),
    "pair of norms": lambda x: normalized_pair((x, x[:, :, :2])),
    "list of norms": lambda x: normalized_pair([x, x[:, :, :2]]),
    "list": lambda x: of_a_pair([x, x[:, :, :2]]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_traced_call_is_the_operator(name: str) -> None:
    function = FUNCTIONS[name]
    traced = torch.fx.symbolic_trace(function)
    targets = [str(node.target) for node in traced.graph.nodes]
    operator = "rope.norm_apply" if "norm" in name else "rope.apply"
    assert any(target.startswith(operator) for target in targets), targets
    x = random_values((2, 5, 4, 16))
    for actual, expected in zip(rotated(traced(x)), rotated(function(x)), strict=True):
        assert_same_bits(actual, expected)


def test_positions_and_frequencies_can_be_traced() -> None:
    traced = torch.fx.symbolic_trace(lambda x, p, f: torch_rope.apply(x, p, f))
    x, frequencies = random_values((2, 5, 4, 16)), random_values((8,), torch.float64)
    expected = torch_rope.apply(x, POSITIONS, frequencies)
    assert_same_bits(traced(x, POSITIONS, frequencies), expected)


def test_weights_and_options_of_norms_can_be_traced() -> None:
    def normalize(x: Tensor, weight: Tensor, eps: float) -> Any:
        return torch_rope.norm_apply(x, weight, POSITIONS, eps=eps, norm_axes=(-1, 2))

    traced = torch.fx.symbolic_trace(normalize)
    x = random_values((2, 5, 4, 16))
    assert_same_bits(traced(x, WEIGHT, 0.1), normalize(x, WEIGHT, 0.1))


@pytest.mark.parametrize(
    "layer",
    [torch_rope.RotaryEmbedding(16), torch_rope.ApplyRoPE(-1)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_model_with_a_layer_can_be_traced(layer: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(16, 16)
            self.layer = layer

        def forward(self, x: Tensor, positions: Tensor) -> Any:
            return self.layer(self.projection(x), positions)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    x = random_values((2, 5, 4, 16))
    assert_same_bits(traced(x, POSITIONS), model(x, POSITIONS))
