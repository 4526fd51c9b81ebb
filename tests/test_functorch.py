"""The transforms of torch.func: vmap, grad, vjp, jvp, jacobians, and their nesting."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import reference
import torch
import torch_rope
from attention import EMBEDDING, Attention
from differentiable import CASES, FORMS, ROTATIONS, Dims, any_mapped, doubles, small_positions
from hypothesis import given
from hypothesis import strategies as st
from installed import LIBRARY
from observe import OperatorsSeen
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import (
    Application,
    Normalization,
    TableApplication,
    applications,
    normalizations,
    table_applications,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.autograd.functional import jvp as jvp_by_autograd
from torch_rope import _vmap

# Levels of vmap, the innermost first: how many calls there are, and where each argument has them.
Levels = list[tuple[int, Dims]]


@st.composite
def levels(draw: st.DrawFn, ranks: Sequence[int | None]) -> Levels:
    """Draws one or two levels for arguments of these ranks; those of rank None are not given."""
    drawn: Levels = []
    ranks = list(ranks)
    for _ in range(draw(st.integers(1, 2))):
        present = [index for index, rank in enumerate(ranks) if rank is not None]
        mapped = draw(st.sets(st.sampled_from(present), min_size=1))
        dims: list[int | None] = [None] * len(ranks)
        for index in mapped:
            rank = ranks[index] or 0
            dims[index] = draw(st.integers(-rank - 1, rank))
            ranks[index] = rank + 1
        # Sizes that dimensions have too, and others.
        drawn.append((draw(st.integers(1, 4)), tuple(dims)))
    return drawn


def stacked(
    tensor: Tensor | None, levels: Levels, argument: int, vary: Callable[[Tensor, int], Tensor]
) -> Tensor | None:
    """Returns variations of an argument as the levels ask for them."""
    for depth, (size, dims) in enumerate(levels):
        dim = dims[argument]
        if tensor is not None and dim is not None:
            steps = [vary(tensor, (depth + 1) * (i + 1)) for i in range(size)]
            tensor = torch.stack(steps, dim)
    return tensor


def each(arguments: Sequence[Tensor | None], levels: Levels) -> list[tuple[Tensor | None, ...]]:
    """Returns the arguments of each call, those of the innermost level next to one another."""
    calls = [tuple(arguments)]
    for size, dims in reversed(levels):
        calls = [
            tuple(
                tensor if tensor is None or dim is None else tensor.select(dim, i)
                for tensor, dim in zip(call, dims, strict=True)
            )
            for call in calls
            for i in range(size)
        ]
    return calls


def mapped(function: Callable[..., Any], levels: Levels) -> Callable[..., Any]:
    """Returns the function under the levels of vmap."""
    for _, dims in levels:
        function = torch.vmap(function, dims)
    return function


def rank(tensor: Tensor | None) -> int | None:
    """Returns the number of dimensions, if there are any."""
    return None if tensor is None else tensor.dim()


def scaled(tensor: Tensor, step: int) -> Tensor:
    """A variation of a tensor of numbers."""
    return tensor * (1 + step / 8)


def shifted(tensor: Tensor, step: int) -> Tensor:
    """A variation of positions."""
    return tensor + 5 * step


@given(application=applications(), data=st.data())
def test_any_map_of_a_call_rotates_each(
    device: str, application: Application, data: st.DataObject
) -> None:
    arguments = application.tensors(device)
    drawn = data.draw(levels([rank(tensor) for tensor in arguments]))
    varied = [
        stacked(tensor, drawn, index, vary)
        for index, (tensor, vary) in enumerate(
            zip(arguments, (scaled, shifted, scaled), strict=True)
        )
    ]

    def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor | None) -> Tensor:
        return torch_rope.apply(x, positions, inv_freq, **application.options)

    with OperatorsSeen() as seen:
        actual = mapped(rotate, drawn)(*varied)
    assert len(seen.names) == 1
    actual = actual.flatten(0, len(drawn) - 1)
    frequencies_are_mapped = any(dims[2] is not None for _, dims in drawn)
    for one, call in zip(actual, each(varied, drawn), strict=True):
        assert_rotated(one, reference.apply(*call, **application.options))
        if not frequencies_are_mapped:
            assert_same_bits(one, rotate(*call))


@given(application=table_applications(), data=st.data())
def test_any_map_of_a_call_with_tables_rotates_each(
    device: str, application: TableApplication, data: st.DataObject
) -> None:
    arguments = application.tensors(device)
    drawn = data.draw(levels([rank(tensor) for tensor in arguments]))
    rows = arguments[1].shape[0]

    def other_row(positions: Tensor, step: int) -> Tensor:
        return (positions + step) % rows

    varied = [
        stacked(tensor, drawn, index, vary)
        for index, (tensor, vary) in enumerate(
            zip(arguments, (scaled, scaled, scaled, other_row), strict=True)
        )
    ]

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
        return torch_rope.apply_cos_sin(x, cos, sin, positions, **application.options)

    with OperatorsSeen() as seen:
        actual = mapped(rotate, drawn)(*varied)
    assert seen.names == ["apply_cos_sin"]
    actual = actual.flatten(0, len(drawn) - 1)
    for one, call in zip(actual, each(varied, drawn), strict=True):
        assert_same_bits(one, rotate(*call))


@pytest.mark.parametrize("tables", [False, True], ids=["positions", "tables"])
@given(data=st.data())
def test_any_map_of_a_call_normalizes_each(device: str, tables: bool, data: st.DataObject) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    arguments = call.tensors(device)
    drawn = data.draw(levels([rank(tensor) for tensor in arguments]))
    rows = arguments[2].shape[0] if tables else 1

    def other_row(positions: Tensor, step: int) -> Tensor:
        return (positions + step) % rows

    variations = (
        (scaled, scaled, scaled, scaled, other_row) if tables else (scaled, scaled, shifted, scaled)
    )
    varied = [
        stacked(tensor, drawn, index, vary)
        for index, (tensor, vary) in enumerate(zip(arguments, variations, strict=True))
    ]
    function, expected = (
        (torch_rope.norm_apply_cos_sin, reference.norm_apply_cos_sin)
        if tables
        else (torch_rope.norm_apply, reference.norm_apply)
    )

    def rotate(*arguments: Tensor | None) -> Tensor:
        return function(*arguments, **call.options)

    with OperatorsSeen() as seen:
        actual = mapped(rotate, drawn)(*varied)
    assert len(seen.names) == 1
    actual = actual.flatten(0, len(drawn) - 1)
    frequencies_are_mapped = not tables and any(dims[3] is not None for _, dims in drawn)
    for one, single in zip(actual, each(varied, drawn), strict=True):
        assert_rotated(one, expected(*single, **call.options))
        if not frequencies_are_mapped:
            assert_same_bits(one, rotate(*single))


PAIR_OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"embedding_axis": 1},
    {"embedding_axis": -2, "interleaved": True, "conjugate": True, "rotary_offset": 2},
]


def pair_calls() -> list[Any]:
    """Returns every choice of what is mapped among q, k and positions, with where."""
    return [dims for dims in product((None, 0, 2), (None, 1), (None, 0, 1)) if any_mapped(dims)]


@pytest.mark.parametrize("options", PAIR_OPTION_SETS, ids=str)
@pytest.mark.parametrize("dims", pair_calls(), ids=str)
@pytest.mark.parametrize("ranks", ["equal", "different"])
def test_a_pair_is_mapped_in_one_call(
    device: str, ranks: str, dims: Dims, options: dict[str, Any]
) -> None:
    q = random_values((6, 6, 6), device=device)
    k = random_values((6, 6, 6) if ranks == "equal" else (6, 6), device=device, seed=1)
    positions = random_positions((6,), device=device)
    varied = [
        stacked(tensor, [(4, dims)], index, vary)
        for index, (tensor, vary) in enumerate(
            zip((q, k, positions), (scaled, scaled, shifted), strict=True)
        )
    ]

    def rotate(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope.apply((q, k), positions, **options)

    with OperatorsSeen() as seen:
        actual = torch.vmap(rotate, dims)(*varied)
    assert seen.names == ["apply_qk"]
    for index, call in enumerate(each(varied, [(4, dims)])):
        for one, expected in zip(actual, rotate(*call), strict=True):
            assert_same_bits(one[index], expected)


@pytest.mark.parametrize(
    "dims", [dims for dims in product((None, 1), repeat=4) if any_mapped(dims)]
)
def test_a_pair_is_mapped_with_tables_in_one_call(device: str, dims: Dims) -> None:
    arguments = (
        random_values((5, 4, 6), device=device),
        random_values((5, 1, 8), torch.float64, device, seed=1),
        random_values((5, 1, 2), device=device, seed=2),
        random_values((5, 1, 2), device=device, seed=3),
    )
    varied = [stacked(tensor, [(3, dims)], index, scaled) for index, tensor in enumerate(arguments)]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope.apply_cos_sin((q, k), cos, sin)

    with OperatorsSeen() as seen:
        actual = torch.vmap(rotate, dims)(*varied)
    assert seen.names == ["apply_cos_sin_qk"]
    for index, call in enumerate(each(varied, [(3, dims)])):
        for one, expected in zip(actual, rotate(*call), strict=True):
            assert_same_bits(one[index], expected)


NORM_PAIR_OPTION_SETS: list[dict[str, Any]] = [
    {"norm_axes": [-2, -1]},
    {"norm_axes": [0, -1], "norm_last": True},
    {"embedding_axis": 1, "norm_axes": (1, 0), "weight_offset": 1.0},
    {"embedding_axis": -2, "interleaved": True, "conjugate": True, "rotary_offset": 2},
]


@pytest.mark.parametrize("options", NORM_PAIR_OPTION_SETS, ids=str)
@pytest.mark.parametrize(
    "dims",
    [dims for dims in product((None, 2), (None, 1), (None, 0), (None, 1)) if any_mapped(dims)],
)
@pytest.mark.parametrize("ranks", ["equal", "different"])
def test_a_pair_is_normalized_in_one_call_where_axes_agree(
    device: str, ranks: str, dims: Dims, options: dict[str, Any]
) -> None:
    arguments = (
        random_values((6, 6, 6), device=device),
        random_values((6, 6, 6) if ranks == "equal" else (6, 6), device=device, seed=1),
        random_values((6, 6), device=device, seed=2),
        random_positions((6,), device=device),
    )
    variations = zip(arguments, (scaled, scaled, scaled, shifted), strict=True)
    varied = [
        stacked(tensor, [(4, dims)], index, vary) for index, (tensor, vary) in enumerate(variations)
    ]

    def rotate(q: Tensor, k: Tensor, weight: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope.norm_apply((q, k), (weight, weight[0]), positions, **options)

    with OperatorsSeen() as seen:
        actual = torch.vmap(rotate, dims)(*varied)
    axes = options.get("norm_axes", [-1])
    if ranks == "equal" or max(axes) < 0:
        assert seen.names == ["norm_apply_qk"]
    else:
        assert seen.names == ["norm_apply", "norm_apply"]
    for index, call in enumerate(each(varied, [(4, dims)])):
        for one, expected in zip(actual, rotate(*call), strict=True):
            assert_same_bits(one[index], expected)


@pytest.mark.parametrize("axes", [None, 3])
@pytest.mark.parametrize("dims", [(None, None, None, 1), (0, 1, 0, 0), (2, None, 1, 1)], ids=str)
def test_a_pair_is_mapped_over_frequencies_in_one_call(
    device: str, dims: Dims, axes: int | None
) -> None:
    leading = () if axes is None else (axes,)
    arguments = (
        random_values((2, 6, 8), torch.float64, device),
        random_values((6, 6), torch.float64, device, seed=1),
        random_positions((*leading, 6), device=device, low=-9, high=9),
        random_inv_freq((*leading, 3), device=device),
    )
    variations = zip(arguments, (scaled, scaled, shifted, scaled), strict=True)
    varied = [
        stacked(tensor, [(4, dims)], index, vary) for index, (tensor, vary) in enumerate(variations)
    ]

    def rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> Any:
        return torch_rope.apply((q, k), positions, inv_freq, attention_factor=1.5)

    with OperatorsSeen() as seen:
        actual = torch.vmap(rotate, dims)(*varied)
    assert seen.names == ["apply_cos_sin_qk"]
    for index, call in enumerate(each(varied, [(4, dims)])):
        for one, expected in zip(actual, rotate(*call), strict=True):
            torch.testing.assert_close(one[index], expected, rtol=1e-10, atol=1e-10)


def test_what_is_not_mapped_is_rotated_once(device: str) -> None:
    q, k = random_values((3, 5, 4, 6), device=device), random_values((5, 2, 6), device=device)
    positions = random_positions((5, 1), device=device)

    def rotate(q: Tensor) -> tuple[Tensor, Tensor]:
        return torch_rope.apply((q, k), positions)

    _, rotated = torch.vmap(rotate, out_dims=(0, None))(q)
    assert_same_bits(rotated, torch_rope.apply(k, positions))


# Arguments that fit a batch of tensors, but not each one.
MISFITS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "axis is the batch": (
        lambda x: torch_rope.apply(x, torch.arange(6), embedding_axis=-3),
        (4, 6, 6),
    ),
    "x has no dimension": (lambda x: torch_rope.apply(x, torch.tensor(3)), (4,)),
    "positions meet the batch": (lambda x: torch_rope.apply(x, torch.zeros(4, 6)), (4, 6, 6)),
    "positions of k meet the batch": (
        lambda x: torch_rope.apply((x[None], x), torch.zeros(1, 6, 6)),
        (4, 6, 6),
    ),
    "tables meet the batch": (
        lambda x: torch_rope.apply_cos_sin(x, torch.ones(4, 6, 3), torch.ones(4, 6, 3)),
        (4, 6, 6),
    ),
    "rows meet the batch": (
        lambda x: torch_rope.apply_cos_sin(
            x, torch.ones(9, 3), torch.ones(9, 3), torch.zeros(4, 6, dtype=torch.int64)
        ),
        (4, 6, 6),
    ),
    "axis of a transposed table": (
        lambda x: torch_rope.apply_cos_sin(x, torch.ones(3), torch.ones(3), embedding_axis=2),
        (4, 6, 6),
    ),
}


# The same for norms.
MISFITS |= {
    "weight is a number": (
        lambda x: torch_rope.norm_apply(x, x[0], torch.tensor(3), rotary_dim=0),
        (6, 1),
    ),
    "weight meets the batch": (
        lambda x: torch_rope.norm_apply(x, torch.ones(4, 6, 6), torch.arange(6)),
        (4, 6, 6),
    ),
    "weight of k meets the batch": (
        lambda x: torch_rope.norm_apply((x[None], x), (None, torch.ones(1, 6, 6)), torch.arange(6)),
        (4, 6, 6),
    ),
    "norm over the batch": (
        lambda x: torch_rope.norm_apply(x, None, torch.arange(6), norm_axes=(-3, -1)),
        (4, 6, 6),
    ),
    "norm over an axis too many": (
        lambda x: torch_rope.norm_apply(x, None, torch.arange(6), norm_axes=(2, -1)),
        (4, 6, 6),
    ),
    "norm over one axis twice": (
        lambda x: torch_rope.norm_apply(x, None, torch.arange(6), norm_axes=(1, -1)),
        (4, 6, 6),
    ),
    "norm without the embedding axis": (
        lambda x: torch_rope.norm_apply(x, None, torch.arange(6), embedding_axis=0, norm_axes=[1]),
        (4, 6, 6),
    ),
    "norm over nothing": (
        lambda x: torch_rope.norm_apply_cos_sin(
            x, None, torch.ones(3), torch.ones(3), norm_axes=[]
        ),
        (4, 6, 6),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_each_is_refused_as_without_a_map(misfit: str) -> None:
    function, shape = MISFITS[misfit]
    with pytest.raises((ValueError, IndexError)) as expected:
        function(torch.ones(shape[1:]))
    beginning = re.match(r"rope::\w+\(\): expected \w+ to ", str(expected.value))
    assert beginning is not None
    with pytest.raises(type(expected.value), match=re.escape(beginning[0])) as raised:
        torch.vmap(function)(torch.ones(shape))
    assert ", but got " in str(raised.value)


@pytest.mark.parametrize(
    "options", [{"rotary_dim": 4}, {"max_wavelength": 100.0}, {"scale_factor": 2.0}], ids=str
)
def test_what_does_not_fit_mapped_frequencies_is_refused(
    device: str, options: dict[str, Any]
) -> None:
    x, positions = random_values((9, 6), device=device), torch.arange(9, device=device)
    inv_freq = random_inv_freq((4, 3), device=device)
    with pytest.raises(ValueError, match="expected"):
        torch.vmap(lambda inv_freq: torch_rope.apply(x, positions, inv_freq, **options))(inv_freq)


@pytest.mark.parametrize("inv_freq_dim", [None, 0])
def test_a_rule_drops_no_option_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, inv_freq_dim: int | None
) -> None:
    """As if ``new_option`` were in the schema."""
    given: dict[str, Any] = {}

    def rotate(*tensors: Tensor, **options: Any) -> Tensor:
        given.update(options)
        return tensors[0]

    tensors = {"x": torch.ones(4, 6), "positions": torch.tensor(1), "inv_freq": torch.ones(4, 3)}
    dims: dict[str, int | None] = {"x": 0, "positions": None, "inv_freq": inv_freq_dim}
    if inv_freq_dim is None:
        tensors["inv_freq"] = torch.ones(3)
    monkeypatch.setattr(rotate, "_schema", torch.ops.rope.apply.default._schema, raising=False)
    call = _vmap._Call(rotate, 4, dict(tensors), dims, {"new_option": 2})
    if inv_freq_dim is None:
        _vmap._map_apply(call)
        assert given["new_option"] == 2
    else:
        with pytest.raises(Exception, match="new_option"):
            _vmap._map_apply(call)


@pytest.mark.parametrize("row", [-1, 5, 7])
def test_a_row_beyond_a_mapped_table_is_refused(row: int) -> None:
    # Of three tables: such a row of the second must not become one of its neighbours.
    x, tables, rows = torch.ones(2, 6), torch.ones(3, 5, 3), torch.zeros(3, 2, dtype=torch.int64)
    rows[1, 1] = row
    with pytest.raises(IndexError, match="expected positions to be in"):
        torch.vmap(lambda cos, rows: torch_rope.apply_cos_sin(x, cos, cos, rows))(tables, rows)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_mapping_in_place_changes_each(device: str, dim: int) -> None:
    def rotate(x: Tensor, positions: Tensor) -> None:
        torch_rope.apply_(x, positions)

    x = random_values((5, 5, 5, 6), device=device)
    positions = random_positions((5, 5, 5), device=device)
    expected = torch.vmap(torch_rope.apply, (dim, 1), dim)(x, positions)
    torch.vmap(rotate, (dim, 1), None)(x, positions)
    assert_same_bits(x, expected)


def test_mapping_a_pair_by_tables_in_place_changes_each(device: str) -> None:
    def rotate(q: Tensor, k: Tensor, cos: Tensor) -> None:
        torch_rope.apply_cos_sin_((q, k), cos, cos)

    q, k = (random_values((4, 5, 6), device=device, seed=seed) for seed in (0, 1))
    cos = random_values((4, 5, 3), device=device, seed=2)
    expected = torch_rope.apply_cos_sin((q, k), cos, cos)
    torch.vmap(rotate, out_dims=None)(q, k, cos)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


def test_one_tensor_cannot_be_rotated_in_place_by_many_positions(device: str) -> None:
    x = random_values((5, 6), device=device)
    before = x.clone()
    positions = random_positions((3, 5), device=device)
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        torch.vmap(lambda positions: torch_rope.apply_(x, positions))(positions)
    assert_same_bits(x, before)


every_case = pytest.mark.parametrize("case", CASES)
every_form = pytest.mark.parametrize("form", FORMS)


def assert_close(actual: Any, expected: Any) -> None:
    """Compares derivatives, or nested tuples of them."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@every_form
@every_case
def test_jacobians_are_those_of_autograd(device: str, case: str, form: str) -> None:
    function, inputs = CASES[case].function(form), CASES[case].inputs(device)
    every = tuple(range(len(inputs)))
    expected = jacobian(CASES[case].function("functional"), inputs)
    assert_close(torch.func.jacrev(function, every)(*inputs), expected)
    assert_close(torch.func.jacfwd(function, every)(*inputs), expected)


@every_form
@every_case
def test_nested_jacobians_are_the_hessian_of_autograd(device: str, case: str, form: str) -> None:
    loss, inputs = CASES[case].loss(form), CASES[case].inputs(device)
    every = tuple(range(len(inputs)))
    expected = hessian(CASES[case].loss("functional"), inputs)
    assert_close(torch.func.hessian(loss, every)(*inputs), expected)
    for outer, inner in product((torch.func.jacrev, torch.func.jacfwd), repeat=2):
        assert_close(outer(inner(loss, every), every)(*inputs), expected)


@every_form
@every_case
def test_functional_gradients_are_those_of_autograd(device: str, case: str, form: str) -> None:
    loss, inputs = CASES[case].loss(form), CASES[case].inputs(device)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in inputs)
    expected = torch.autograd.grad(CASES[case].loss("functional")(*leaves), leaves)
    every = tuple(range(len(inputs)))
    assert_close(torch.func.grad(loss, every)(*inputs), expected)
    value, pullback = torch.func.vjp(loss, *inputs)
    assert_close(pullback(torch.ones_like(value)), expected)


@every_form
@every_case
def test_directional_derivatives_are_those_of_autograd(device: str, case: str, form: str) -> None:
    function, inputs = CASES[case].function(form), CASES[case].inputs(device)
    directions = tuple(torch.full_like(tensor, 0.5) for tensor in inputs)
    value, expected = jvp_by_autograd(CASES[case].function("functional"), inputs, directions)
    actual = torch.func.jvp(function, inputs, directions)
    assert_close(actual, (value, expected))
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, directions)
        assert_close(tuple(forward_ad.unpack_dual(function(*duals))), (value, expected))


@every_form
@every_case
def test_the_derivative_along_one_input_alone(device: str, case: str, form: str) -> None:
    function, inputs = CASES[case].function(form), CASES[case].inputs(device)
    jacobians = jacobian(CASES[case].function("functional"), inputs)
    for index, tensor in enumerate(inputs):

        def along(one: Tensor, index: int = index) -> Tensor:
            return function(*inputs[:index], one, *inputs[index + 1 :])

        direction = torch.full_like(tensor, 0.5)
        _, actual = torch.func.jvp(along, (tensor,), (direction,))
        expected = jacobians[index].flatten(1) @ direction.flatten()
        assert_close(actual, expected)


@every_form
@every_case
def test_gradients_of_each_in_a_map(device: str, case: str, form: str) -> None:
    loss, inputs = CASES[case].loss(form), CASES[case].inputs(device)
    every = tuple(range(len(inputs)))
    for dims in CASES[case].maps(form):
        varied = [
            stacked(tensor, [(3, dims)], index, scaled) for index, tensor in enumerate(inputs)
        ]
        actual = torch.vmap(torch.func.grad(loss, every), dims)(*varied)
        for index, call in enumerate(each(varied, [(3, dims)])):
            expected = torch.func.grad(CASES[case].loss("functional"), every)(*call)
            assert_close(tuple(gradient[index] for gradient in actual), expected)


@every_form
@every_case
def test_the_gradient_of_a_map(device: str, case: str, form: str) -> None:
    loss, inputs = CASES[case].loss(form), CASES[case].inputs(device)
    every = tuple(range(len(inputs)))
    for dims in CASES[case].maps(form):
        levels: Levels = [(3, dims)]
        varied = tuple(stacked(tensor, levels, i, scaled) for i, tensor in enumerate(inputs))
        leaves = tuple(tensor.clone().requires_grad_() for tensor in varied)
        alone = CASES[case].loss("functional")
        expected = torch.autograd.grad(sum(alone(*call) for call in each(leaves, levels)), leaves)

        def total(*varied: Tensor, dims: Dims = dims) -> Tensor:
            return torch.vmap(loss, dims)(*varied).sum()

        assert_close(torch.func.grad(total, every)(*varied), expected)
        # Autograd that goes on below the map.
        assert_close(torch.autograd.grad(total(*leaves), leaves), expected)


@pytest.mark.parametrize("case", ROTATIONS)
def test_a_map_over_the_backward_is_one_call(device: str, case: str) -> None:
    inputs = CASES[case].inputs(device)
    leaf = inputs[0].requires_grad_()
    rotated = CASES[case].function("functional")(*inputs)
    gradients = doubles(3, *rotated.shape, device=device)
    with OperatorsSeen() as seen:
        (actual,) = torch.autograd.grad(
            rotated, leaf, gradients, retain_graph=True, is_grads_batched=True
        )
    assert len(seen.names) == 1
    for one, gradient in zip(actual, gradients, strict=True):
        assert_close(one, torch.autograd.grad(rotated, leaf, gradient, retain_graph=True)[0])


@pytest.mark.parametrize("axes", [(2, 1), (-1, 0), None], ids=str)
@pytest.mark.parametrize("of_weight", [False, True])
def test_a_map_over_a_backward_that_normalizes(
    device: str, of_weight: bool, axes: tuple[int, ...] | None
) -> None:
    """As a user's own autograd function may."""
    fixed = random_values((2, 4), torch.float64, device, seed=1)
    positions = torch.arange(3, device=device).unsqueeze(-1)

    def normalize(gradient: Tensor) -> Tensor:
        weight = gradient[0, 0] if of_weight else fixed
        q, k = torch_rope.norm_apply(
            (gradient, 2 * gradient), (weight, None), positions, embedding_axis=2, norm_axes=axes
        )
        alone = torch_rope.norm_apply(gradient, weight, positions, norm_axes=axes, norm_last=True)
        return q + k + alone

    class Normalize(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return normalize(gradient)

    x = doubles(5, 3, 2, 4, device=device)[0].requires_grad_()
    gradients = doubles(6, 3, 2, 4, device=device)
    with OperatorsSeen() as seen:
        (actual,) = torch.autograd.grad(
            Normalize.apply(x), x, gradients, retain_graph=True, is_grads_batched=True
        )
    assert seen.names == ([] if of_weight else ["norm_apply_qk", "norm_apply"])
    for one, gradient in zip(actual, gradients, strict=True):
        assert_close(one, normalize(gradient))


def test_a_map_of_a_function_that_goes_backward_through_a_norm(device: str) -> None:
    x, weight = doubles(3, 2, 6, device=device), doubles(2, 6, device=device, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    positions = torch.arange(3, device=device).unsqueeze(-1)
    rotated = torch_rope.norm_apply(x, weight, positions, norm_axes=(1, 2))
    gradients = doubles(5, 3, 2, 6, device=device, seed=1)

    def backward(gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(rotated, (x, weight), gradient, retain_graph=True)

    actual = torch.vmap(backward)(gradients)
    for index, gradient in enumerate(gradients):
        assert_close(tuple(one[index] for one in actual), backward(gradient))


def test_a_map_of_a_function_that_goes_backward_is_one_call(device: str) -> None:
    x = doubles(3, 6, device=device).requires_grad_()
    rotated = torch_rope.apply(x, torch.arange(3, device=device))
    gradients = doubles(5, 3, 6, device=device, seed=1)

    def backward(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(rotated, x, gradient, retain_graph=True)[0]

    with OperatorsSeen() as seen:
        actual = torch.vmap(backward)(gradients)
    assert seen.names == ["apply"]
    for one, gradient in zip(actual, gradients, strict=True):
        assert_same_bits(one, backward(gradient))


def test_autograd_around_a_map_keeps_the_kernel_both_ways(device: str) -> None:
    q, k = (doubles(4, 3, 6, device=device, seed=seed).requires_grad_() for seed in range(2))
    positions = random_positions((4, 3), device=device)
    with OperatorsSeen() as seen:
        rotated = torch.vmap(lambda *pair: torch_rope.apply(pair[:2], pair[2]))(q, k, positions)
        torch.autograd.grad(sum(one.sum() for one in rotated), (q, k))
    assert seen.names == ["apply_qk", "apply_qk"]


def test_a_map_in_chunks_rotates_all(device: str) -> None:
    x, positions = doubles(5, 3, 6, device=device), torch.arange(3, device=device)
    with OperatorsSeen() as seen:
        actual = torch.vmap(lambda x: torch_rope.apply(x, positions), chunk_size=2)(x)
    assert seen.names == ["apply"] * 3
    assert_same_bits(actual, torch_rope.apply(x, positions))


def test_a_map_of_nothing_gives_nothing(device: str) -> None:
    x, positions = doubles(0, 3, 6, device=device), torch.empty(0, 3, device=device)
    assert torch.vmap(torch_rope.apply)(x, positions).shape == (0, 3, 6)


def test_a_linearized_function_has_the_directional_derivative(device: str) -> None:
    x, direction = (doubles(3, 6, device=device, seed=seed) for seed in range(2))
    positions = torch.arange(3, device=device)

    def function(x: Tensor) -> Tensor:
        return torch_rope.apply(x.sin(), positions)

    value, linear = torch.func.linearize(function, x)
    expected = torch.func.jvp(function, (x,), (direction,))
    assert_close((value, linear(direction)), expected)


@every_form
@every_case
def test_a_map_over_the_backward_of_everything(device: str, case: str, form: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in CASES[case].inputs(device))
    rotated = CASES[case].function(form)(*inputs)
    gradients = doubles(3, *rotated.shape, device=device)
    actual = torch.autograd.grad(
        rotated, inputs, gradients, retain_graph=True, is_grads_batched=True
    )
    for index, gradient in enumerate(gradients):
        expected = torch.autograd.grad(rotated, inputs, gradient, retain_graph=True)
        assert_close(tuple(one[index] for one in actual), expected)


def test_the_kernel_is_kept_where_nothing_is_differentiated(device: str) -> None:
    x, positions = doubles(9, 6, device=device), torch.arange(9, device=device)

    def loss(weight: Tensor) -> Tensor:
        return (torch_rope.apply(x, positions) * weight).sum()

    with OperatorsSeen() as seen:
        torch.func.grad(loss)(doubles(6, device=device, seed=1))
    assert seen.names == ["apply"]


def layers(device: str) -> list[Attention]:
    """Returns layers of the same shape, with parameters of their own."""
    made = [Attention(learned=True, device=device, dtype=torch.float64) for _ in range(3)]
    for step, layer in enumerate(made):
        for parameter in layer.parameters():
            parameter.data.mul_(1 + step / 8)
    return made


def test_an_ensemble_of_layers_is_mapped_in_one_call(device: str) -> None:
    ensemble = layers(device)
    x = doubles(2, 5, EMBEDDING, device=device)
    positions = torch.arange(5, device=device).unsqueeze(-1)

    def call(*state: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(ensemble[0], state, (x, positions))

    with OperatorsSeen() as seen:
        actual = torch.vmap(call)(*torch.func.stack_module_state(ensemble))
    assert seen.names == ["apply_cos_sin_qk"]
    for one, layer in zip(actual, ensemble, strict=True):
        assert_close(one, layer(x, positions))


def test_gradients_of_each_sample_add_up_to_those_of_the_batch(device: str) -> None:
    layer = layers(device)[0]
    x = doubles(3, 5, EMBEDDING, device=device)
    positions = torch.arange(5, device=device).unsqueeze(-1)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(layer, parameters, (sample.unsqueeze(0), positions))
        return y.square().sum()

    parameters = dict(layer.named_parameters())
    of_each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    layer(x, positions).square().sum().backward()
    for name, parameter in parameters.items():
        # The sums of float32 frequencies have another order.
        torch.testing.assert_close(of_each[name].sum(0), parameter.grad)


Transform = Callable[[Callable[[Tensor], Tensor], Tensor], Any]
TRANSFORMS: dict[str, Transform] = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "hessian": lambda function, x: torch.func.hessian(function)(x),
}


@pytest.mark.parametrize("captured", ["x", "q", "k", "x of tables"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_captured_tensor_cannot_be_rotated_in_place(
    device: str, transform: str, captured: str
) -> None:
    outside = doubles(3, 6, device=device)
    before = outside.clone()

    def loss(positions: Tensor) -> Tensor:
        inside = outside * 1
        if captured == "x of tables":
            table = positions.expand(3, 3)
            torch_rope.apply_cos_sin_(outside, table, table)
        elif captured == "x":
            torch_rope.apply_(outside, positions)
        else:
            torch_rope.apply_(
                (outside, inside) if captured == "q" else (inside, outside), positions
            )
        return outside.sum()

    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        TRANSFORMS[transform](loss, small_positions(3, device=device))
    assert_same_bits(outside, before)


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_neither_of_a_pair_is_written_where_one_is_captured(
    device: str, transform: str, refused: int
) -> None:
    outside, unchanged = doubles(3, 6, device=device), []

    def loss(x: Tensor) -> Tensor:
        inside = x * 1
        pair = (inside, outside) if refused else (outside, inside)
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            torch_rope.apply_(pair, torch.arange(3, device=device))
        unchanged.append(bool((inside == x).all()))
        return inside.sum()

    before = outside.clone()
    TRANSFORMS[transform](loss, doubles(3, 6, device=device, seed=1))
    assert unchanged == [True]
    assert_same_bits(outside, before)


@pytest.mark.parametrize("refused", [0, 1])
def test_neither_of_a_pair_is_written_where_one_is_not_mapped(device: str, refused: int) -> None:
    mapped, alone = doubles(4, 3, 6, device=device), doubles(3, 6, device=device, seed=1)
    before = mapped.clone(), alone.clone()

    def rotate(x: Tensor, positions: Tensor) -> None:
        torch_rope.apply_((x, alone) if refused else (alone, x), positions)

    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        torch.vmap(rotate, out_dims=None)(mapped, random_positions((4, 3), device=device))
    assert_same_bits(mapped, before[0])
    assert_same_bits(alone, before[1])


def test_the_argument_of_a_differentiated_function_cannot_be_rotated_in_place(device: str) -> None:
    x, positions = doubles(3, 6, device=device), torch.arange(3, device=device)
    before = x.clone()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch.func.grad(lambda x: torch_rope.apply_(x, positions).sum())(x)
    assert_same_bits(x, before)


def test_q_that_is_k_is_refused_in_place_in_a_map(device: str) -> None:
    x = doubles(2, 3, 6, device=device)
    before = x.clone()
    with pytest.raises(ValueError, match=r"rope::apply_qk_\(\): expected q and k to"):
        torch.vmap(lambda x: torch_rope.apply_((x, x), torch.arange(3, device=device)))(x)
    assert_same_bits(x, before)


def test_functionalize_removes_the_change(device: str) -> None:
    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        x = x * 1
        torch_rope.apply_(x[1:], positions)
        return x

    x, positions = doubles(4, 6, device=device), torch.arange(3, device=device)
    with OperatorsSeen() as seen:
        actual = torch.func.functionalize(rotate)(x, positions)
    assert seen.names == ["apply"]
    assert_same_bits(actual, rotate(x, positions))


WITHOUT_PYTHON = """
import sys
import torch

torch.ops.load_library(sys.argv[1])
assert "torch_rope" not in sys.modules

generator = torch.Generator().manual_seed(0)
x = torch.randn(4, 5, 3, 8, generator=generator)
positions = torch.randint(-9, 9, (4, 3), generator=generator)
inv_freq = torch.rand(4, 4, generator=generator)
for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (1, 1, 1), (None, None, 0)):
    arguments = [
        tensor[0] if dim is None else tensor.movedim(0, dim)
        for tensor, dim in zip((x, positions, inv_freq), dims)
    ]
    actual = torch.vmap(torch.ops.rope.apply, dims)(*arguments)
    for i in range(4):
        one = [t if d is None else t.select(d, i) for t, d in zip(arguments, dims)]
        torch.testing.assert_close(actual[i], torch.ops.rope.apply(*one))
weight = torch.rand(4, 3, 8, generator=generator)
for dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
    arguments = [
        tensor[0] if dim is None else tensor
        for tensor, dim in zip((x, weight, positions), dims)
    ]
    normalize = lambda *one: torch.ops.rope.norm_apply(*one, norm_axes=(0, 2))
    actual = torch.vmap(normalize, dims)(*arguments)
    for i in range(4):
        one = [t if d is None else t.select(d, i) for t, d in zip(arguments, dims)]
        torch.testing.assert_close(actual[i], normalize(*one))
in_place = x.clone()
torch.vmap(torch.ops.rope.apply_, out_dims=None)(in_place, positions)
for i in range(4):
    torch.testing.assert_close(in_place[i], torch.ops.rope.apply(x[i], positions[i]))
"""


def test_the_library_alone_can_be_mapped() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_PYTHON, str(LIBRARY)], check=True)
