"""Nested tensors of the jagged layout."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_rope
from observe import OperatorsSeen, saved_by
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

LENGTHS = (3, 0, 5, 1)
TOKENS = sum(LENGTHS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what was compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def offsets_of(lengths: tuple[int, ...], device: str) -> Tensor:
    """Returns where each sequence begins, and where the last ends."""
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return torch.cat((ends.new_zeros(1), ends))


def heads(device: str, num_heads: int = 2, size: int = 8, *, seed: int = 0) -> Tensor:
    """Returns values of shape (tokens, H, D)."""
    return random_values((TOKENS, num_heads, size), device=device, seed=seed)


def token_positions(device: str) -> Tensor:
    """Returns values of shape (tokens, 1)."""
    return random_positions((TOKENS, 1), device=device)


def each(tensor: Tensor) -> list[Tensor]:
    """Returns the sequences of a nested tensor."""
    return list(tensor.unbind())


def assert_each(actual: Tensor, expected: list[Tensor]) -> None:
    """Compares a nested tensor with sequences."""
    assert actual.layout == torch.jagged
    for one, other in zip(each(actual), expected, strict=True):
        assert_same_bits(one, other)


def test_positions_of_each_token(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    with OperatorsSeen() as seen:
        rotated = torch_rope.apply(x, positions, interleaved=True)
    assert seen.names == ["apply"]
    assert rotated.shape == x.shape
    assert rotated.offsets() is offsets
    assert_each(
        rotated,
        [
            torch_rope.apply(one, position, interleaved=True)
            for one, position in zip(each(x), each(positions), strict=True)
        ],
    )


def test_tensors_without_heads(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(random_values((TOKENS, 8), device=device), offsets)
    positions = nested_tensor_from_jagged(token_positions(device)[:, 0], offsets)
    expected = [torch_rope.apply(*pair) for pair in zip(each(x), each(positions), strict=True)]
    assert_each(torch_rope.apply(x, positions), expected)


def test_a_transposed_nested_tensor(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    expected = torch_rope.apply(x, positions)
    rotated = torch_rope.apply(x.transpose(1, 2), positions.transpose(1, 2))
    assert rotated.shape == x.transpose(1, 2).shape
    assert_each(rotated.transpose(1, 2), each(expected))


@pytest.mark.parametrize("axis", [1, -3, 3, -1])
def test_the_axis_can_come_before_the_ragged_dimension(device: str, axis: int) -> None:
    offsets = offsets_of(LENGTHS, device)
    values = random_values((8, TOKENS, 8), device=device)
    x = nested_tensor_from_jagged(values, offsets, jagged_dim=2)
    ahead = axis in (1, -3)
    shape = (TOKENS, 1) if ahead else (1, TOKENS)
    positions = nested_tensor_from_jagged(
        random_positions(shape, device=device), offsets, jagged_dim=1 if ahead else 2
    )
    alone = axis - 1 if axis > 0 else axis
    expected = [
        torch_rope.apply(one, position, embedding_axis=alone)
        for one, position in zip(each(x), each(positions), strict=True)
    ]
    assert_each(torch_rope.apply(x, positions, embedding_axis=axis), expected)


# Dense positions for (B, j, H, D), and those of sequence b.
DENSE: dict[str, tuple[tuple[int, ...], Callable[[Tensor, int], Tensor]]] = {
    "one": ((), lambda positions, b: positions),
    "of heads": ((2,), lambda positions, b: positions),
    "of heads, with ones": ((1, 1, 2), lambda positions, b: positions[0]),
    "of sequences": ((len(LENGTHS), 1, 1), lambda positions, b: positions[b]),
    "of sequences and heads": ((len(LENGTHS), 1, 2), lambda positions, b: positions[b]),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_dense_positions_broadcast(device: str, kind: str, transposed: bool) -> None:
    shape, of_sequence = DENSE[kind]
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    positions = random_positions(shape, device=device)
    expected = [torch_rope.apply(one, of_sequence(positions, b)) for b, one in enumerate(each(x))]
    if transposed:
        if positions.dim() > 0:
            positions = positions.reshape(*[1] * (2 - positions.dim()), *positions.shape)
            positions = positions.transpose(-1, -2)
        assert_each(torch_rope.apply(x.transpose(1, 2), positions).transpose(1, 2), expected)
    else:
        assert_each(torch_rope.apply(x, positions), expected)


def test_dense_positions_of_several_axes_broadcast(device: str) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    inv_freq = random_inv_freq((3, 4), torch.float32, device)
    for shape in ((3,), (3, 2), (3, len(LENGTHS), 1, 1)):
        positions = random_positions(shape, device=device)
        expected = [
            torch_rope.apply(one, positions[:, b] if len(shape) == 4 else positions, inv_freq)
            for b, one in enumerate(each(x))
        ]
        assert_each(torch_rope.apply(x, positions, inv_freq), expected)


def test_nested_tables(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    cos, sin = (
        nested_tensor_from_jagged(heads(device, 1, 4, seed=seed), offsets) for seed in (1, 2)
    )
    expected = [
        torch_rope.apply_cos_sin(*one) for one in zip(each(x), each(cos), each(sin), strict=True)
    ]
    assert_each(torch_rope.apply_cos_sin(x, cos, sin), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (len(LENGTHS), 1, 1, 4)], ids=str)
def test_dense_tables(device: str, shape: tuple[int, ...]) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    cos, sin = (random_values(shape, device=device, seed=seed) for seed in (1, 2))
    expected = [
        torch_rope.apply_cos_sin(one, *((cos[b], sin[b]) if len(shape) == 4 else (cos, sin)))
        for b, one in enumerate(each(x))
    ]
    assert_each(torch_rope.apply_cos_sin(x, cos, sin), expected)


def test_full_width_tables(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    cos, sin = (
        nested_tensor_from_jagged(heads(device, 1, 8, seed=seed), offsets) for seed in (1, 2)
    )
    options = {"full_width": True, "rotary_dim": 8}
    expected = [
        torch_rope.apply_cos_sin(*one, **options)
        for one in zip(each(x), each(cos), each(sin), strict=True)
    ]
    assert_each(torch_rope.apply_cos_sin(x, cos, sin, **options), expected)


def test_rows_of_tables(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    cos, sin = (random_values((9, 4), device=device, seed=seed) for seed in (1, 2))
    rows = random_positions((TOKENS, 1), low=0, high=9, device=device)
    positions = nested_tensor_from_jagged(rows, offsets)
    expected = torch_rope.apply_cos_sin(x.values(), cos, sin, rows)
    rotated = torch_rope.apply_cos_sin(x, cos, sin, positions)
    assert_same_bits(rotated.values(), expected)


def test_a_pair_is_rotated_in_one_call(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    q, k = (nested_tensor_from_jagged(heads(device, n, seed=n), offsets) for n in (4, 2))
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    with OperatorsSeen() as seen:
        rotated = torch_rope.apply((q, k), positions)
    assert seen.names == ["apply_qk"]
    for actual, x in zip(rotated, (q, k), strict=True):
        assert_same_bits(actual.values(), torch_rope.apply(x, positions).values())


def test_a_pair_of_different_sequences_shares_dense_positions(device: str) -> None:
    q = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    k = nested_tensor_from_jagged(heads(device, seed=1), offsets_of((4, 4, 1, 0), device))
    dense = random_values((4, 7, 2, 8), device=device, seed=2)
    positions = random_positions((4, 1, 1), device=device)
    for pair in ((q, k), (k, dense), (dense, q)):
        for actual, x in zip(torch_rope.apply(pair, positions), pair, strict=True):
            expected = torch_rope.apply(x, positions)
            for one, other in zip(each(actual), each(expected), strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_place_gives_the_bits_of_the_functional_form(
    device: str, mode: Callable[[], Any]
) -> None:
    with mode():
        offsets = offsets_of(LENGTHS, device)
        q, k = (nested_tensor_from_jagged(heads(device, n, seed=n), offsets) for n in (4, 2))
        positions = nested_tensor_from_jagged(token_positions(device), offsets)
        cos = nested_tensor_from_jagged(heads(device, 1, 4, seed=1), offsets)
        expected = torch_rope.apply_cos_sin(torch_rope.apply((q, k), positions), cos, cos)
        single = torch_rope.apply(expected[0], positions)
        assert torch_rope.apply_((q, k), positions)[0] is q
        torch_rope.apply_cos_sin_((q, k), cos, cos)
        assert_same_bits(q.values(), expected[0].values())
        assert_same_bits(k.values(), expected[1].values())
        assert torch_rope.apply_(q, positions) is q
        assert_same_bits(q.values(), single.values())


def assert_refused_and_left_alone(q: Tensor, k: Tensor, positions: Tensor, error: Any) -> None:
    """Asserts that neither of a pair is written where the pair is refused."""
    memory = [x.values() if x.is_nested else x for x in (q, k)]
    before = [x.clone() for x in memory]
    with error:
        torch_rope.apply_((q, k), positions)
    for x, copy in zip(memory, before, strict=True):
        assert_same_bits(x, copy)


MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 1, 0)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_pair_of_one_memory_is_refused_in_place(
    device: str, mode: Callable[[], Any], lengths: tuple[int, ...]
) -> None:
    with mode():
        values = heads(device).requires_grad_() * 1
        q = nested_tensor_from_jagged(values, offsets_of(LENGTHS, device))
        k = nested_tensor_from_jagged(values, offsets_of(lengths, device))
        error = pytest.raises(ValueError, match="expected q and k to share no element")
        assert_refused_and_left_alone(q, k, torch.tensor(3, device=device), error)


@pytest.mark.parametrize("mode", MODES)
def test_a_pair_is_left_alone_in_place_where_the_second_does_not_fit(
    device: str, mode: Callable[[], Any]
) -> None:
    positions = random_positions((len(LENGTHS), 1, 1), device=device)
    with mode():
        q = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
        for k in (
            random_values((3, 7, 2, 8), device=device),  # another batch
            random_values((4, 7, 2, 5), device=device),  # an odd axis
            nested_tensor_from_jagged(heads(device, seed=1), offsets_of((4, 5), device)),
        ):
            error = pytest.raises(ValueError, match="expected")
            assert_refused_and_left_alone(q, k, positions, error)


@pytest.mark.parametrize("grad", [False, True])
def test_a_pair_of_different_sequences_is_rotated_in_place(device: str, grad: bool) -> None:
    leaf = heads(device).requires_grad_(grad)
    q = nested_tensor_from_jagged(leaf * 1, offsets_of(LENGTHS, device))
    k = nested_tensor_from_jagged(heads(device, seed=1), offsets_of((4, 4, 1, 0), device))
    positions = random_positions((4, 1, 1), device=device)
    expected = torch_rope.apply((q, k), positions)
    torch_rope.apply_((q, k), positions)
    for actual, other in zip((q, k), expected, strict=True):
        assert_same_bits(actual.values(), other.values())
    if grad:
        losses = [y.values().sin().sum() for y in (q, expected[0])]
        assert_same_bits(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in losses))


def functional(x: Any, positions: Tensor, inv_freq: Tensor) -> Any:
    """Rotates."""
    return torch_rope.apply(x, positions, inv_freq, attention_factor=1.5)


def in_place(x: Any, positions: Tensor, inv_freq: Tensor) -> Any:
    """Rotates a copy in place."""
    x = x * 1
    torch_rope.apply_(x, positions, inv_freq, attention_factor=1.5)
    return x


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rotate", [functional, in_place])
def test_gradients_are_those_of_the_values(
    device: str, rotate: Callable[..., Any], learned: bool
) -> None:
    offsets = offsets_of(LENGTHS, device)
    leaves = [
        heads(device).double().requires_grad_(),
        random_positions((TOKENS, 1), torch.float64, device, low=-8, high=8),
        random_inv_freq((4,), device=device),
    ]
    for leaf in leaves[1:] if learned else []:
        leaf.requires_grad_()
    x, positions, inv_freq = leaves
    asking = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(functional(x, positions, inv_freq).sin().sum(), asking)
    nested = rotate(
        nested_tensor_from_jagged(x, offsets),
        nested_tensor_from_jagged(positions, offsets),
        inv_freq,
    )
    actual = torch.autograd.grad(nested.values().sin().sum(), asking)
    torch.testing.assert_close(actual, expected)


def test_gradients_reach_nested_leaves_and_dense_positions(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    values = heads(device).double()
    x = nested_tensor_from_jagged(values, offsets).detach().requires_grad_()
    positions = random_positions((4, 1, 1), torch.float64, device, low=-8, high=8).requires_grad_()
    leaf, of_tokens = values.clone().requires_grad_(), positions.detach().clone().requires_grad_()
    torch_rope.apply(x, positions).sin().sum().backward()
    repeated = of_tokens[:, 0].repeat_interleave(offsets.diff(), 0)
    torch_rope.apply(leaf, repeated).sin().sum().backward()
    assert x.grad is not None
    assert positions.grad is not None
    torch.testing.assert_close(x.grad.values(), leaf.grad)
    torch.testing.assert_close(positions.grad, of_tokens.grad)


def test_a_nested_view_rotated_in_place_changes_what_it_views(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    leaf = heads(device).requires_grad_()
    tokens = token_positions(device)
    values = leaf * 1
    before = values._version
    torch_rope.apply_(
        nested_tensor_from_jagged(values, offsets), nested_tensor_from_jagged(tokens, offsets)
    )
    expected = torch_rope.apply(leaf, tokens)
    assert_same_bits(values, expected)
    assert values._version > before
    gradients = [torch.autograd.grad(y.sin().sum(), leaf)[0] for y in (values, expected)]
    assert_same_bits(*gradients)


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
def test_no_activation_is_saved(device: str, operator: Callable[..., Any]) -> None:
    offsets = offsets_of(LENGTHS, device)
    values = heads(device, 64).requires_grad_()
    x = nested_tensor_from_jagged(values, offsets) * 1
    tokens = token_positions(device)
    positions = nested_tensor_from_jagged(tokens, offsets)
    saved = saved_by(lambda: operator(x, positions))
    assert [tensor.shape for tensor in saved] == [positions.shape]


@pytest.mark.parametrize("rotate", [functional, in_place])
@pytest.mark.parametrize("dense", [False, True])
def test_compiled_results_and_gradients_are_the_same(
    device: str, dense: bool, rotate: Callable[..., Any]
) -> None:
    inv_freq = random_inv_freq((4,), torch.float32, device)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 7, 1, 4)):
        offsets = offsets_of(lengths, device)
        values = random_values((sum(lengths), 2, 8), device=device)
        x = nested_tensor_from_jagged(values, offsets).detach().requires_grad_()
        positions = (
            random_positions((4, 1, 1), device=device)
            if dense
            else nested_tensor_from_jagged(
                random_positions((sum(lengths), 1), device=device), offsets
            )
        )
        results = []
        for function in (rotate, compiled):
            rotated = function(x, positions, inv_freq)
            (gradient,) = torch.autograd.grad(rotated.values().sin().sum(), x)
            results.append((rotated.values(), gradient.values()))
        for actual, expected in zip(*reversed(results), strict=True):
            assert_same_bits(actual, expected)


def test_a_compiled_pair_of_different_sequences_is_rotated_in_place(device: str) -> None:
    def rotate(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope.apply_((q * 1, k * 1), positions)

    q = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    k = nested_tensor_from_jagged(heads(device, seed=1), offsets_of((4, 4, 1, 0), device))
    positions = random_positions((4, 1, 1), device=device)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    results = zip(compiled(q, k, positions), rotate(q, k, positions), strict=True)
    for actual, expected in results:
        assert_same_bits(actual.values(), expected.values())


def test_other_offsets_are_refused(device: str) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    positions = nested_tensor_from_jagged(token_positions(device), offsets_of(LENGTHS, device))
    for rotate in (torch_rope.apply, torch_rope.apply_):
        with pytest.raises(ValueError, match=r"rope::apply_?\(\): expected positions to"):
            rotate(x, positions)


@pytest.mark.parametrize(
    "shape", [(TOKENS, 1), (1, TOKENS, 1), (4, 3, 1), (3, 1, 1), (1, 4, 1, 1)], ids=str
)
def test_dense_positions_that_do_not_broadcast_are_refused(
    device: str, shape: tuple[int, ...]
) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    with pytest.raises(
        ValueError, match=r"rope::apply\(\): expected positions to be broadcastable"
    ):
        torch_rope.apply(x, random_positions(shape, device=device))


def test_nested_positions_of_another_rank_are_refused(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    positions = nested_tensor_from_jagged(token_positions(device)[:, 0], offsets)
    with pytest.raises(
        ValueError, match=r"rope::apply\(\): expected positions to be broadcastable"
    ):
        torch_rope.apply(x, positions)


def test_nested_positions_of_several_axes_are_refused(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    with pytest.raises(NotImplementedError, match="expected positions to be dense"):
        torch_rope.apply(x, positions, random_inv_freq((4, 4), device=device))


@pytest.mark.parametrize("axis", [0, 1, -4, -3])
def test_the_batch_and_the_ragged_dimension_are_no_embedding_axis(device: str, axis: int) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    with pytest.raises(NotImplementedError, match="expected embedding_axis to be neither"):
        torch_rope.apply(x, torch.tensor(3, device=device), embedding_axis=axis)


@pytest.mark.parametrize("axis", [4, -5])
def test_an_axis_out_of_range_is_refused(device: str, axis: int) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    with pytest.raises(IndexError, match=r"expected embedding_axis to be in \[-4, 3\]"):
        torch_rope.apply(x, torch.tensor(3, device=device), embedding_axis=axis)


def test_dense_tensors_cannot_have_nested_positions(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    with pytest.raises(NotImplementedError, match="expected what is rotated to be nested"):
        torch_rope.apply(heads(device), positions)


def test_the_strided_layout_is_refused(device: str) -> None:
    x = torch.nested.nested_tensor([heads(device), heads(device)[:3]], layout=torch.strided)
    with pytest.raises(NotImplementedError, match=r"torch\.jagged"):
        torch_rope.apply(x, torch.tensor(3, device=device))


def test_holes_are_rotated_out_of_place_alone(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    lengths = torch.tensor([2, 0, 3, 1], device=device)
    x = nested_tensor_from_jagged(heads(device), offsets, lengths)
    positions = random_positions((4, 1, 1), device=device)
    expected = [torch_rope.apply(one, positions[b]) for b, one in enumerate(each(x))]
    assert_each(torch_rope.apply(x, positions), expected)
    with pytest.raises(NotImplementedError, match="without holes"):
        torch_rope.apply_(x, positions)


# --------------------------------------------------------------------------------------------------
# Norms


# Weights of x of shape (B, j, H, D), the axes of the norm, and the weight of sequence b.
NORMS: dict[str, tuple[tuple[int, ...] | None, Any, Callable[[Tensor, int], Tensor]]] = {
    "no weight": (None, None, lambda weight, b: weight),
    "one": ((8,), None, lambda weight, b: weight),
    "of heads": ((2, 8), (-1,), lambda weight, b: weight),
    "over heads": ((2, 8), (-2, -1), lambda weight, b: weight),
    "over heads, counted from the front": ((1, 1, 2, 8), (3, 2), lambda weight, b: weight[0]),
    "of sequences": ((len(LENGTHS), 1, 1, 8), (3,), lambda weight, b: weight[b]),
}


@pytest.mark.parametrize("norm_last", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_is_that_of_each_sequence(device: str, kind: str, norm_last: bool) -> None:
    shape, axes, of_sequence = NORMS[kind]
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    weight = None if shape is None else random_values(shape, device=device, seed=1)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    options = {"norm_last": norm_last, "weight_offset": 1.0}
    with OperatorsSeen() as seen:
        actual = torch_rope.norm_apply(x, weight, positions, norm_axes=axes, **options)
    assert seen.names == ["norm_apply"]
    alone = None if axes is None else [axis if axis < 0 else axis - 1 for axis in axes]
    expected = [
        torch_rope.norm_apply(
            one,
            None if weight is None else of_sequence(weight, b),
            position,
            norm_axes=alone,
            **options,
        )
        for b, (one, position) in enumerate(zip(each(x), each(positions), strict=True))
    ]
    assert_each(actual, expected)


def test_a_norm_with_a_nested_weight_and_nested_tables(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    weight, cos, sin = (
        nested_tensor_from_jagged(heads(device, 1, size, seed=seed), offsets)
        for seed, size in enumerate((8, 4, 4), 1)
    )
    expected = torch_rope.norm_apply_cos_sin(
        x.values(), weight.values(), cos.values(), sin.values(), norm_axes=(-2, -1)
    )
    actual = torch_rope.norm_apply_cos_sin(x, weight, cos, sin, norm_axes=(2, 3))
    assert_same_bits(actual.values(), expected)


def test_a_transposed_nested_tensor_is_normalized(device: str) -> None:
    offsets = offsets_of(LENGTHS, device)
    x = nested_tensor_from_jagged(heads(device), offsets)
    weight = random_values((2, 8), device=device, seed=1)
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    expected = torch_rope.norm_apply(x, weight, positions, norm_axes=(2, 3))
    rotated = torch_rope.norm_apply(
        x.transpose(1, 2), weight.unsqueeze(1), positions.transpose(1, 2), norm_axes=(1, 3)
    )
    assert_each(rotated.transpose(1, 2), each(expected))


@pytest.mark.parametrize("weights", [(True, True), (False, True), (True, False), None], ids=str)
def test_a_pair_is_normalized_in_one_call(device: str, weights: Any) -> None:
    offsets = offsets_of(LENGTHS, device)
    q, k = (nested_tensor_from_jagged(heads(device, n, seed=n), offsets) for n in (4, 2))
    positions = nested_tensor_from_jagged(token_positions(device), offsets)
    if weights is not None:
        weights = tuple(
            random_values((heads, 8), device=device, seed=heads) if given else None
            for heads, given in zip((4, 2), weights, strict=True)
        )
    with OperatorsSeen() as seen:
        rotated = torch_rope.norm_apply((q, k), weights, positions)
    assert seen.names == ["norm_apply_qk"]
    copies = q * 1, k * 1
    torch_rope.norm_apply_(copies, weights, positions)
    for actual, copy, x, weight in zip(
        rotated, copies, (q, k), weights or (None, None), strict=True
    ):
        expected = torch_rope.norm_apply(x, weight, positions).values()
        assert_same_bits(actual.values(), expected)
        assert_same_bits(copy.values(), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_norms_of_different_sequences_share_dense_positions(
    device: str, mode: Callable[[], Any]
) -> None:
    with mode():
        q = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
        k = nested_tensor_from_jagged(heads(device, seed=1), offsets_of((4, 4, 1, 0), device))
        dense = random_values((4, 7, 2, 8), device=device, seed=2)
        positions = random_positions((4, 1, 1), device=device)
        weights = random_values((8,), device=device, seed=3), None
        for pair in ((q, k), (k, dense), (dense, q)):
            copies = tuple(x * 1 for x in pair)
            torch_rope.norm_apply_(copies, weights, positions, norm_axes=(2, 3))
            for actual, copy, x, weight in zip(
                torch_rope.norm_apply(pair, weights, positions, norm_axes=(2, 3)),
                copies,
                pair,
                weights,
                strict=True,
            ):
                expected = torch_rope.norm_apply(x, weight, positions, norm_axes=(2, 3))
                for result in (actual, copy):
                    for one, other in zip(each(result), each(expected), strict=True):
                        assert_same_bits(one, other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4, 1, 0)], ids=str)
def test_a_pair_of_one_memory_is_not_normalized_in_place(
    device: str, lengths: tuple[int, ...], mode: Callable[[], Any]
) -> None:
    positions = torch.tensor(3, device=device)
    with mode():
        values = heads(device)
        before = values.clone()
        q = nested_tensor_from_jagged(values, offsets_of(LENGTHS, device))
        k = nested_tensor_from_jagged(values, offsets_of(lengths, device))
        message = r"^rope::norm_apply_qk_\(\): expected q and k to share no element"
        with pytest.raises(ValueError, match=message):
            torch_rope.norm_apply_((q, k), None, positions)
    assert_same_bits(values, before)


def normalized(x: Any, weight: Any, positions: Tensor, inv_freq: Tensor) -> Any:
    """Normalizes and rotates."""
    return torch_rope.norm_apply(x, weight, positions, inv_freq, norm_axes=(-2, -1))


def normalized_in_place(x: Any, weight: Any, positions: Tensor, inv_freq: Tensor) -> Any:
    """Normalizes and rotates a copy in place."""
    x = x * 1
    torch_rope.norm_apply_(x, weight, positions, inv_freq, norm_axes=(-2, -1))
    return x


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(8,), (2, 8), (1, 1, 1, 8), (len(LENGTHS), 1, 2, 8)], ids=str)
@pytest.mark.parametrize("rotate", [normalized, normalized_in_place])
def test_gradients_of_norms_are_those_of_the_values(
    device: str, rotate: Callable[..., Any], shape: tuple[int, ...], learned: bool
) -> None:
    offsets = offsets_of(LENGTHS, device)
    leaves = [
        heads(device).double().requires_grad_(),
        random_values(shape, torch.float64, device, seed=1).requires_grad_(),
        random_positions((TOKENS, 1), torch.float64, device, low=-8, high=8),
        random_inv_freq((4,), device=device),
    ]
    for leaf in leaves[2:] if learned else []:
        leaf.requires_grad_()
    x, weight, positions, inv_freq = leaves
    asking = [leaf for leaf in leaves if leaf.requires_grad]
    of_values = weight
    if len(shape) == 4:
        of_values = weight[:, 0].expand(len(LENGTHS), -1, -1).repeat_interleave(offsets.diff(), 0)
    alone = normalized(x, of_values, positions, inv_freq)
    expected = torch.autograd.grad(alone.sin().sum(), asking)
    nested = rotate(
        nested_tensor_from_jagged(x, offsets),
        weight,
        nested_tensor_from_jagged(positions, offsets),
        inv_freq,
    )
    actual = torch.autograd.grad(nested.values().sin().sum(), asking)
    torch.testing.assert_close(actual, expected)


def test_the_norm_of_a_nested_leaf_has_a_gradient(device: str) -> None:
    values, weight = heads(device).double(), random_values((8,), torch.float64, device)
    x = nested_tensor_from_jagged(values, offsets_of(LENGTHS, device)).detach().requires_grad_()
    leaf = values.clone().requires_grad_()
    position = torch.tensor(3, device=device)
    torch_rope.norm_apply(x, weight, position).sin().sum().backward()
    torch_rope.norm_apply(leaf, weight, position).sin().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.values(), leaf.grad)


def test_a_norm_saves_the_values_once(device: str) -> None:
    values = heads(device, 64).requires_grad_() * 1
    weight = random_values((8,), device=device).requires_grad_()
    x = nested_tensor_from_jagged(values, offsets_of(LENGTHS, device))
    saved = saved_by(lambda: torch_rope.norm_apply(x, weight, torch.tensor(3, device=device)))
    places = {tensor.data_ptr() for tensor in saved if not tensor.is_nested and tensor.dim() > 1}
    assert places == {values.data_ptr()}


@pytest.mark.parametrize("rotate", [normalized, normalized_in_place])
def test_compiled_norms_and_their_gradients_are_the_same(
    device: str, rotate: Callable[..., Any]
) -> None:
    inv_freq = random_inv_freq((4,), torch.float32, device)
    weight = random_values((2, 8), device=device).requires_grad_()
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 7, 1, 4)):
        offsets = offsets_of(lengths, device)
        values = random_values((sum(lengths), 2, 8), device=device)
        x = nested_tensor_from_jagged(values, offsets).detach().requires_grad_()
        positions = random_positions((4, 1, 1), device=device)
        results = []
        for function in (rotate, compiled):
            rotated = function(x, weight, positions, inv_freq)
            gradients = torch.autograd.grad(rotated.values().sin().sum(), (x, weight))
            results.append((rotated.values(), gradients[0].values(), gradients[1]))
        for actual, expected in zip(*reversed(results), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("axes", [(0, 3), (1, -1), (-4, -1), (-3, 3)], ids=str)
def test_the_batch_and_the_ragged_dimension_share_no_mean(
    device: str, axes: tuple[int, ...]
) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    for operator in (torch_rope.norm_apply, torch_rope.norm_apply_):
        message = r"^rope::norm_apply_?\(\): expected norm_axes to contain neither"
        with pytest.raises(NotImplementedError, match=message):
            operator(x, None, torch.tensor(3, device=device), norm_axes=axes)


@pytest.mark.parametrize("axes", [(4, 3), (-5, -1)], ids=str)
def test_a_norm_over_an_axis_out_of_range_is_refused(device: str, axes: tuple[int, ...]) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    with pytest.raises(IndexError, match=r"expected norm_axes to be in \[-4, 3\]"):
        torch_rope.norm_apply(x, None, torch.tensor(3, device=device), norm_axes=axes)


@pytest.mark.parametrize("shape", [(TOKENS, 2, 8), (4, 3, 1, 8), (3, 1, 1, 8)], ids=str)
def test_weights_that_do_not_broadcast_are_refused(device: str, shape: tuple[int, ...]) -> None:
    x = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    weight = random_values(shape, device=device)
    for name, arguments in (
        ("weight", (x, weight)),
        ("k_weight", ((x, x), (None, weight))),
    ):
        with pytest.raises(ValueError, match=rf"expected {name} to be broadcastable"):
            torch_rope.norm_apply(*arguments, torch.tensor(3, device=device))


def test_dense_tensors_cannot_have_nested_weights(device: str) -> None:
    weight = nested_tensor_from_jagged(heads(device), offsets_of(LENGTHS, device))
    with pytest.raises(NotImplementedError, match="expected what is rotated to be nested"):
        torch_rope.norm_apply(heads(device), weight, torch.tensor(3, device=device))
