"""torch.compile: one graph, the operator kept, the same bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor
from torch.fx import GraphModule


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what was compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def functional(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates one tensor."""
    return torch_rope.apply(q * 2, positions, interleaved=True) + k


def functional_pair(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates a pair."""
    q, k = torch_rope.apply((q, k), positions, max_wavelength=5e5)
    return q * k


def in_place(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates one tensor where it is."""
    q = q * 2
    torch_rope.apply_(q, positions)
    return q + k


def in_place_pair(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates a pair where it is."""
    packed = torch.stack((q, k))
    q, k = torch_rope.apply_((packed[0], packed[1]), positions)
    return packed, q * k


def tables(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates one tensor by tables."""
    cos, sin = k[0, 0].chunk(2, dim=-1)
    return torch_rope.apply_cos_sin(q, cos, sin, positions)


def tables_pair_in_place(q: Tensor, k: Tensor, positions: Tensor) -> Any:
    """Rotates a pair by tables where it is."""
    cos, sin = k[0, 0].chunk(2, dim=-1)
    q, k = q.clone(), k.clone()
    return torch_rope.apply_cos_sin_((q, k), cos, sin, positions)


FUNCTIONS = (functional, functional_pair, in_place, in_place_pair, tables, tables_pair_in_place)


def arguments(tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and positions that are also rows of a table."""
    q, k = (random_values((2, 4, tokens, 32), device=device, seed=seed) for seed in range(2))
    return q, k, random_positions((tokens,), device=device, low=0, high=tokens)


def assert_same(actual: Any, expected: Any) -> None:
    """Compares tensors or tuples of them."""
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_compiled_function_is_one_graph_with_the_same_bits(
    device: str, function: Callable[..., Any], dynamic: bool
) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 17):
        inputs = arguments(tokens, device)
        assert_same(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_gradients_have_the_same_bits(device: str, function: Callable[..., Any]) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for rotate in (function, compiled):
        q, k, positions = arguments(9, device)
        q.requires_grad_()
        result = rotate(q, k, positions)
        total = result.sum() if isinstance(result, Tensor) else result[0].sum() + result[1].sum()
        gradients.append(torch.autograd.grad(total, q)[0])
    assert_same_bits(gradients[1], gradients[0])


def test_compiled_gradients_of_frequencies_are_right(device: str) -> None:
    def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        return torch_rope.apply(x, positions, inv_freq)

    x = random_values((9, 32), torch.float64, device)
    positions = random_positions((9,), device=device)
    gradients = []
    for function in (rotate, torch.compile(rotate, fullgraph=True, backend="aot_eager")):
        inv_freq = random_inv_freq((16,), device=device).requires_grad_()
        gradients.append(torch.autograd.grad(function(x, positions, inv_freq).sum(), inv_freq)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


class Recorder:
    """A compiler back end that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        """Starts with no graph."""
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Keeps a graph."""
        self.graphs.append(graph)
        return graph.forward


def test_another_sequence_length_compiles_nothing_anew(device: str) -> None:
    recorder = Recorder()
    compiled = torch.compile(functional_pair, fullgraph=True, backend=recorder, dynamic=True)
    for tokens in (9, 10, 17, 64, 301):
        compiled(*arguments(tokens, device))
    assert len(recorder.graphs) == 1


def test_the_graph_keeps_the_operator(device: str) -> None:
    recorder = Recorder()
    torch.compile(functional_pair, fullgraph=True, backend=recorder)(*arguments(9, device))
    targets = [str(node.target) for node in recorder.graphs[0].graph.nodes]
    assert any("rope.apply_qk" in target for target in targets)
