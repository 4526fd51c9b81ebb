"""Scripted and traced functions and modules: compiled, saved, loaded, run, differentiated."""

from pathlib import Path

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor, nn

# TorchScript is deprecated in newer versions of PyTorch, and used all the same.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Calls the operator with options."""
    return torch.ops.rope.apply(x, positions, rotary_dim=16, interleaved=True)


def rotate_pair(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the operator of a pair."""
    return torch.ops.rope.apply_qk(q, k, positions, max_wavelength=5e5)


def rotate_in_place(x: Tensor, positions: Tensor) -> Tensor:
    """Calls the operator in place on a copy."""
    copy = x.clone()
    torch.ops.rope.apply_(copy, positions)
    return copy


def rotate_by_tables(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """Calls the operator that takes tables."""
    halves = torch.ops.rope.apply_cos_sin(x, cos, sin, positions, rotary_dim=2 * cos.size(-1))
    wide_cos, wide_sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
    wide = torch.ops.rope.apply_cos_sin(x, wide_cos, wide_sin, positions, full_width=True)
    return halves + wide


def normalize(x: Tensor, weight: Tensor | None, positions: Tensor) -> Tensor:
    """Calls the operator that normalizes too, with options."""
    return torch.ops.rope.norm_apply(
        x, weight, positions, eps=1e-5, weight_offset=1.0, norm_axes=[-3, -1], norm_last=True
    )


def normalize_pair(
    q: Tensor, k: Tensor, k_weight: Tensor | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Calls the operator of a pair, then those in place on copies."""
    q, k = torch.ops.rope.norm_apply_qk(q, k, None, k_weight, positions, interleaved=True)
    q, k = q.clone(), k.clone()
    torch.ops.rope.norm_apply_qk_(q, k, k_weight, None, positions)
    torch.ops.rope.norm_apply_(q, k_weight, positions)
    return q, k


def normalize_by_tables(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Calls the operators that take tables."""
    x = torch.ops.rope.norm_apply_cos_sin(x, weight, cos, sin, norm_axes=None).clone()
    torch.ops.rope.norm_apply_cos_sin_(x, None, cos, sin, conjugate=True)
    q, k = torch.ops.rope.norm_apply_cos_sin_qk(x, x, weight, None, cos, sin)
    torch.ops.rope.norm_apply_cos_sin_qk_(q, k, None, weight, cos, sin)
    return q + k


def normalize_through_package(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Calls the functions of the Python package."""
    x = torch_rope.norm_apply(x, weight, positions, eps=1e-5, norm_axes=[-1, -2])
    torch_rope.norm_apply_(x, weight, positions)
    return x


class NormAttention(nn.Module):
    """Scores of a query against keys, both normalized."""

    def __init__(self, weight: Tensor) -> None:
        """Keeps the weight of the keys."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        """Returns the scores."""
        q, k = torch.ops.rope.norm_apply_qk(q, k, None, self.weight, positions, norm_axes=[1, 3])
        return q @ k.transpose(-1, -2)


def rotate_through_package(x: Tensor, positions: Tensor) -> Tensor:
    """Calls the function of the Python package."""
    return torch_rope.apply(x, positions, interleaved=True)


class Attention(nn.Module):
    """Scores of a query against keys, with rotated positions."""

    def __init__(self, inv_freq: Tensor) -> None:
        """Keeps the frequencies in a buffer."""
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        """Returns the scores."""
        q, k = torch.ops.rope.apply_qk(q, k, positions, self.inv_freq, embedding_axis=-1)
        return q @ k.transpose(-1, -2)


def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and positions."""
    q, k = (random_values((2, 4, 9, 32), device=device, seed=seed) for seed in range(2))
    return q, k, random_positions((9,), device=device)


def test_a_scripted_function_gives_the_same_bits(device: str) -> None:
    q, _, positions = inputs(device)
    assert_same_bits(torch.jit.script(rotate)(q, positions), rotate(q, positions))


def test_a_scripted_pair_gives_the_same_bits(device: str) -> None:
    arguments = inputs(device)
    rotated = torch.jit.script(rotate_pair)(*arguments)
    for actual, expected in zip(rotated, rotate_pair(*arguments), strict=True):
        assert_same_bits(actual, expected)


def test_a_scripted_call_in_place_gives_the_same_bits(device: str) -> None:
    q, _, positions = inputs(device)
    assert_same_bits(torch.jit.script(rotate_in_place)(q, positions), rotate_in_place(q, positions))


@pytest.mark.parametrize("by_position", [False, True])
def test_scripted_tables_give_the_same_bits(device: str, by_position: bool) -> None:
    q, k, _ = inputs(device)
    cos, sin = k[0, 0, :, :16], k[0, 0, :, 16:]
    rows = torch.arange(8, -1, -1, device=device) if by_position else None
    scripted = torch.jit.script(rotate_by_tables)
    assert_same_bits(scripted(q, cos, sin, rows), rotate_by_tables(q, cos, sin, rows))


def test_a_scripted_function_differentiates(device: str) -> None:
    q, k, positions = inputs(device)
    scripted = torch.jit.script(rotate)
    expected = torch.ops.rope.apply(k, positions, rotary_dim=16, interleaved=True, conjugate=True)
    # The first runs of a scripted function are profiled, the later ones optimised.
    for _ in range(4):
        x = q.clone().requires_grad_()
        scripted(x, positions).backward(k)
        assert x.grad is not None
        assert_same_bits(x.grad, expected)


def test_a_scripted_function_raises_the_message_of_the_operator(device: str) -> None:
    q, _, positions = inputs(device)
    with pytest.raises(Exception, match=r"rope::apply\(\): expected rotary_dim to"):
        torch.jit.script(rotate)(q[..., :8], positions)


def test_a_saved_module_gives_the_same_bits_and_gradients(device: str, tmp_path: Path) -> None:
    q, k, positions = inputs(device)
    module = Attention(random_inv_freq((16,), torch.float32, device))
    torch.jit.script(module).save(str(tmp_path / "attention.pt"))
    loaded = torch.jit.load(str(tmp_path / "attention.pt"))
    results = []
    for attention in (module, loaded):
        x = q.clone().requires_grad_()
        scores = attention(x, k, positions)
        scores.sum().backward()
        assert x.grad is not None
        results.append((scores, x.grad))
    assert_same_bits(results[1][0], results[0][0])
    assert_same_bits(results[1][1], results[0][1])


def test_the_package_function_compiles_to_the_operator(device: str) -> None:
    q, _, positions = inputs(device)
    scripted = torch.jit.script(rotate_through_package)
    assert_same_bits(scripted(q, positions), rotate_through_package(q, positions))
    assert "rope::apply" in str(scripted.inlined_graph)


def test_a_traced_function_keeps_the_operator_and_serves_other_sizes(device: str) -> None:
    q, _, positions = inputs(device)
    traced = torch.jit.trace(rotate_through_package, (q, positions))
    assert "rope::apply" in str(traced.inlined_graph)
    shorter = q[:, :, :5], positions[:5]
    assert_same_bits(traced(*shorter), rotate_through_package(*shorter))


@pytest.mark.parametrize("given", [False, True])
def test_scripted_norms_give_the_same_bits(device: str, given: bool) -> None:
    q, k, positions = inputs(device)
    weight = random_values((32,), device=device, seed=2)
    optional = weight if given else None
    actual = torch.jit.script(normalize)(q, optional, positions)
    assert_same_bits(actual, normalize(q, optional, positions))
    pair = torch.jit.script(normalize_pair)(q, k, optional, positions)
    for one, other in zip(pair, normalize_pair(q, k, optional, positions), strict=True):
        assert_same_bits(one, other)
    tables = random_values((2, 9, 16), device=device, seed=3)
    actual = torch.jit.script(normalize_by_tables)(q, weight, *tables)
    assert_same_bits(actual, normalize_by_tables(q, weight, *tables))


def test_a_scripted_norm_differentiates(device: str) -> None:
    q, k, positions = inputs(device)
    scripted = torch.jit.script(normalize)
    weight = random_values((32,), device=device, seed=2).requires_grad_()
    q.requires_grad_()
    expected = torch.autograd.grad(normalize(q, weight, positions), (q, weight), k)
    for _ in range(4):
        actual = torch.autograd.grad(scripted(q, weight, positions), (q, weight), k)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)


def test_a_saved_module_that_normalizes_gives_the_same_bits_and_gradients(
    device: str, tmp_path: Path
) -> None:
    q, k, positions = inputs(device)
    module = NormAttention(random_values((4, 1, 32), device=device, seed=2))
    torch.jit.script(module).save(str(tmp_path / "attention.pt"))
    loaded = torch.jit.load(str(tmp_path / "attention.pt"))
    results = []
    for attention in (module, loaded):
        x = q.clone().requires_grad_()
        scores = attention(x, k, positions)
        gradients = torch.autograd.grad(scores.sum(), (x, *attention.parameters()))
        results.append((scores, *gradients))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_the_package_functions_of_norms_compile_to_the_operators(device: str) -> None:
    q, _, positions = inputs(device)
    weight = random_values((32,), device=device, seed=2)
    scripted = torch.jit.script(normalize_through_package)
    expected = normalize_through_package(q, weight, positions)
    assert_same_bits(scripted(q, weight, positions), expected)
    assert "rope::norm_apply_" in str(scripted.inlined_graph)


def test_a_scripted_norm_raises_the_message_of_the_operator(device: str) -> None:
    q, _, positions = inputs(device)
    with pytest.raises(Exception, match=r"rope::norm_apply\(\): expected weight to"):
        torch.jit.script(normalize)(q, q[..., :8], positions)
