"""Derivatives by autograd, of the functional forms and in place."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import differentiable
import pytest
import reference
import torch
import torch_rope
from differentiable import CASES, NORMS, ROTATIONS, in_place
from hypothesis import given, settings
from hypothesis import strategies as st
from observe import OperatorsSeen, saved_by
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import FLOAT_DTYPES, Normalization, layouts, normalizations
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

OPTION_SETS: list[dict[str, Any]] = [
    {},
    {"interleaved": True},
    {"conjugate": True},
    {"rotary_offset": 2},
    {"embedding_axis": 1},
    {"interleaved": True, "conjugate": True, "rotary_offset": 2},
]
APPLY_OPTION_SETS = [
    *OPTION_SETS,
    {"rotary_dim": 4, "rotary_offset": 3},
    {"attention_factor": 1.5},
    {"attention_factor": 1.5, "interleaved": True, "conjugate": True},
]


def leaf(tensor: Tensor) -> Tensor:
    """Returns a copy that asks for a gradient."""
    return tensor.detach().clone().requires_grad_()


def doubles(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Returns random float64 numbers that ask for a gradient."""
    return differentiable.doubles(*shape, device=device, seed=seed).requires_grad_()


def small_positions(*shape: int, device: str) -> Tensor:
    """Returns float64 positions that ask for a gradient."""
    return differentiable.small_positions(*shape, device=device).requires_grad_()


def frequencies(*shape: int, device: str) -> Tensor:
    """Returns float64 frequencies that ask for a gradient."""
    return differentiable.frequencies(*shape, device=device).requires_grad_()


FORMS: dict[str, Callable[..., Any]] = {
    "functional": torch_rope.apply,
    "in place": in_place(torch_rope.apply_),
}
TABLE_FORMS: dict[str, Callable[..., Any]] = {
    "functional": torch_rope.apply_cos_sin,
    "in place": in_place(torch_rope.apply_cos_sin_),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", APPLY_OPTION_SETS, ids=str)
def test_gradients_of_x_and_positions(device: str, options: dict[str, Any], form: str) -> None:
    x = doubles(2, 8, 8, device=device)
    positions = small_positions(2, 8, device=device)
    assert gradcheck(lambda *inputs: FORMS[form](*inputs, **options), (x, positions))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients_of_x_positions_and_inv_freq(
    device: str, options: dict[str, Any], form: str
) -> None:
    x = doubles(2, 8, 8, device=device)
    positions = small_positions(2, 8, device=device)
    inv_freq = frequencies(3, device=device)
    assert gradcheck(lambda *inputs: FORMS[form](*inputs, **options), (x, positions, inv_freq))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients_of_several_axes(device: str, options: dict[str, Any], form: str) -> None:
    x = doubles(2, 8, 8, device=device)
    positions = small_positions(3, 2, 8, device=device)
    inv_freq = frequencies(3, 3, device=device)
    assert gradcheck(lambda *inputs: FORMS[form](*inputs, **options), (x, positions, inv_freq))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_with_every_factor(device: str, form: str) -> None:
    def rotate(x: Tensor, positions: Tensor) -> Any:
        return FORMS[form](
            x, positions, max_wavelength=50.0, scale_factor=0.7, attention_factor=-1.3
        )

    assert gradcheck(rotate, (doubles(3, 6, device=device), small_positions(3, device=device)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(3, 1), (2, 3, 1), (2, 1, 1), (1, 3, 2), (2,), (1,), ()], ids=str
)
def test_gradients_of_broadcast_positions_are_summed(
    device: str, shape: tuple[int, ...], form: str
) -> None:
    x = doubles(2, 3, 2, 4, device=device)
    positions = small_positions(*shape, device=device)
    assert gradcheck(FORMS[form], (x, positions, frequencies(2, device=device)))


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 1, 1, 2), (2,)], ids=str)
def test_gradients_of_broadcast_positions_of_several_axes_are_summed(
    device: str, shape: tuple[int, ...]
) -> None:
    x = doubles(2, 3, 2, 4, device=device)
    positions = small_positions(*shape, device=device)
    assert gradcheck(torch_rope.apply, (x, positions, frequencies(2, 2, device=device)))


def test_gradients_of_an_expanded_x_are_summed(device: str) -> None:
    x = doubles(3, 1, 4, device=device)
    positions = small_positions(2, device=device)
    assert gradcheck(lambda x, p: torch_rope.apply(x.expand(3, 2, 4), p), (x, positions))


def test_gradients_of_one_frequency_for_all_pairs_are_summed(device: str) -> None:
    x = doubles(3, 8, device=device)
    positions = small_positions(3, device=device)
    inv_freq = frequencies(1, device=device)
    assert gradcheck(lambda x, p, f: torch_rope.apply(x, p, f.expand(4)), (x, positions, inv_freq))


@pytest.mark.parametrize("form", TABLE_FORMS)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients_of_tables(device: str, options: dict[str, Any], form: str) -> None:
    x = doubles(2, 8, 8, device=device)
    cos, sin = doubles(8, 3, device=device, seed=1), doubles(8, 3, device=device, seed=2)
    assert gradcheck(lambda *inputs: TABLE_FORMS[form](*inputs, **options), (x, cos, sin))


@pytest.mark.parametrize("form", TABLE_FORMS)
@pytest.mark.parametrize("shape", [(2,), (3, 1, 2), (2, 1, 1, 2), (1, 3, 2, 2)], ids=str)
def test_gradients_of_broadcast_tables_are_summed(
    device: str, shape: tuple[int, ...], form: str
) -> None:
    x = doubles(2, 3, 2, 4, device=device)
    cos, sin = doubles(*shape, device=device, seed=1), doubles(*shape, device=device, seed=2)
    assert gradcheck(TABLE_FORMS[form], (x, cos, sin))


@pytest.mark.parametrize("form", TABLE_FORMS)
@pytest.mark.parametrize("options", OPTION_SETS, ids=str)
def test_gradients_of_picked_rows_are_added_up(
    device: str, options: dict[str, Any], form: str
) -> None:
    x = doubles(2, 8, 8, device=device)
    cos, sin = doubles(5, 3, device=device, seed=1), doubles(5, 3, device=device, seed=2)
    rows = random_positions((8,), low=0, high=4, device=device)
    assert gradcheck(lambda *inputs: TABLE_FORMS[form](*inputs, rows, **options), (x, cos, sin))


def test_gradients_of_tables_that_are_one_tensor(device: str) -> None:
    x, table = doubles(3, 4, device=device), doubles(3, 2, device=device, seed=1)
    assert gradcheck(lambda x, table: torch_rope.apply_cos_sin(x, table, table), (x, table))


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
@pytest.mark.parametrize("axes", [None, 2])
def test_gradients_of_a_pair(device: str, axes: int | None, operator: Callable[..., Any]) -> None:
    leading = () if axes is None else (axes,)

    def rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> Any:
        return operator((q * 1, k * 1), positions, inv_freq, interleaved=True, attention_factor=1.2)

    q, k = doubles(3, 4, 6, device=device), doubles(2, 3, 1, 8, device=device, seed=1)
    positions = small_positions(*leading, 3, 1, device=device)
    assert gradcheck(rotate, (q, k, positions, frequencies(*leading, 2, device=device)))


@pytest.mark.parametrize("operator", [torch_rope.apply_cos_sin, torch_rope.apply_cos_sin_])
@pytest.mark.parametrize("by_position", [False, True])
def test_gradients_of_a_pair_and_tables(
    device: str, by_position: bool, operator: Callable[..., Any]
) -> None:
    rows = torch.tensor([[1], [3], [1]], device=device) if by_position else None

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return operator((q * 1, k * 1), cos, sin, rows, conjugate=True)

    q, k = doubles(3, 4, 6, device=device), doubles(2, 3, 1, 8, device=device, seed=1)
    shape = (5, 2) if by_position else (3, 1, 2)
    cos, sin = doubles(*shape, device=device, seed=2), doubles(*shape, device=device, seed=3)
    assert gradcheck(rotate, (q, k, cos, sin))


def every_choice() -> list[Any]:
    """Returns every differentiable call with every choice of what asks for a gradient."""
    return [
        pytest.param(case, asking, id=f"{case}-{''.join('01'[ask] for ask in asking)}")
        for case in CASES
        for asking in product((False, True), repeat=len(CASES[case].inputs("cpu")))
        if any(asking)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("case", "asking"), every_choice())
def test_every_choice_of_gradients(
    device: str, case: str, asking: tuple[bool, ...], form: str
) -> None:
    inputs = tuple(
        tensor.requires_grad_(ask)
        for tensor, ask in zip(CASES[case].inputs(device), asking, strict=True)
    )
    function = CASES[case].function(form)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_every_kind(device: str, case: str, form: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in CASES[case].inputs(device))
    function = CASES[case].function(form)
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )
    assert gradgradcheck(
        function, inputs, check_batched_grad=True, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("conjugate", [False, True])
def test_the_gradient_of_x_is_turned_back(device: str, dtype: torch.dtype, conjugate: bool) -> None:
    options: dict[str, Any] = {"rotary_dim": 20, "rotary_offset": 5, "attention_factor": 1.3}
    x = random_values((2, 9, 3, 32), dtype, device).requires_grad_()
    gradient = random_values((2, 9, 3, 32), dtype, device, seed=1)
    positions = random_positions((9, 1), device=device)
    torch_rope.apply(x, positions, conjugate=conjugate, **options).backward(gradient)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert_same_bits(
        x.grad, torch_rope.apply(gradient, positions, conjugate=not conjugate, **options)
    )
    assert_rotated(x.grad, reference.apply(gradient, positions, conjugate=not conjugate, **options))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_gradient_of_x_is_turned_back_by_tables(device: str, dtype: torch.dtype) -> None:
    x = random_values((9, 32), dtype, device).requires_grad_()
    gradient = random_values((9, 32), dtype, device, seed=1)
    cos, sin = (random_values((9, 16), device=device, seed=seed) for seed in (2, 3))
    torch_rope.apply_cos_sin(x, cos, sin).backward(gradient)
    assert x.grad is not None
    assert_same_bits(x.grad, torch_rope.apply_cos_sin(gradient, cos, sin, conjugate=True))


def test_gradients_can_be_expanded(device: str) -> None:
    x = random_values((9, 32), device=device).requires_grad_()
    positions = random_positions((9,), device=device)
    torch_rope.apply(x, positions).sum().backward()
    assert x.grad is not None
    assert_rotated(x.grad, reference.apply(torch.ones(9, 32), positions, conjugate=True))


def test_gradients_can_be_transposed(device: str) -> None:
    x = random_values((9, 32), device=device).requires_grad_()
    gradient = random_values((32, 9), device=device, seed=1)
    positions = random_positions((9,), device=device)
    torch_rope.apply(x, positions).t().backward(gradient)
    assert x.grad is not None
    assert_rotated(x.grad, reference.apply(gradient.t(), positions, conjugate=True))


def test_gradients_of_slices_reach_the_packed_tensor(device: str) -> None:
    packed = doubles(2, 3, 3, 2, 4, device=device)
    positions = small_positions(3, 1, device=device)

    def rotate(packed: Tensor, positions: Tensor) -> Any:
        q, k, v = packed.unbind(2)
        return *torch_rope.apply((q, k), positions), v

    assert gradcheck(rotate, (packed, positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_gradient_has_the_dtype_of_its_argument(device: str, dtype: torch.dtype) -> None:
    x = leaf(random_values((5, 8), dtype, device))
    positions = leaf(random_positions((5,), torch.float64, device))
    inv_freq = leaf(random_inv_freq((4,), torch.float32, device))
    torch_rope.apply(x, positions, inv_freq).sum().backward()
    cos = leaf(random_values((5, 4), torch.float16, device))
    sin = leaf(random_values((5, 4), torch.float16, device))
    torch_rope.apply_cos_sin(x, cos, sin).sum().backward()
    for tensor in (x, positions, inv_freq, cos, sin):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.shape == tensor.shape


def test_the_gradient_of_float32_frequencies_is_right(device: str) -> None:
    x, gradient = (
        random_values((64, 8), device=device),
        random_values((64, 8), device=device, seed=1),
    )
    positions = random_positions((64,), device=device, low=-100, high=100)
    inv_freq = leaf(random_inv_freq((4,), torch.float32, device))
    torch_rope.apply(x, positions, inv_freq).backward(gradient)
    expected = leaf(inv_freq.cpu())
    reference.apply(x, positions, expected).values.backward(gradient.cpu().double())
    assert inv_freq.grad is not None
    assert expected.grad is not None
    # 64 terms, each with the error of a rotation, and 64 roundings of their sum.
    norms = torch.hypot(x[:, :4], x[:, 4:]) * torch.hypot(gradient[:, :4], gradient[:, 4:])
    magnitude = (norms * positions.abs()[:, None]).sum(0)
    allowed = (magnitude * (reference.FLOAT32_ERROR + 64 * torch.finfo(torch.float32).eps)).cpu()
    assert ((inv_freq.grad.cpu() - expected.grad).abs() <= allowed).all()


def backward_of(case: str, asking: Sequence[int], device: str) -> OperatorsSeen:
    """Notes what the backward does where only some of the inputs ask for a gradient."""
    inputs = CASES[case].inputs(device)
    leaves = [inputs[index].requires_grad_() for index in asking]
    result = CASES[case].results("functional", *inputs)
    results = [
        one for one in ((result,) if isinstance(result, Tensor) else result) if one.requires_grad
    ]
    gradients = [torch.ones_like(one) for one in results]
    with OperatorsSeen() as seen:
        torch.autograd.grad(results, leaves, gradients)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_the_backward_of_what_is_rotated_is_one_call(device: str, case: str) -> None:
    # What is normalized and its weights have their gradients in one.
    seen = backward_of(case, range(CASES[case].num_rotated + CASES[case].num_weights), device)
    assert len(seen.names) == 1
    assert not [name for name in seen.others if name != "aten::detach"]


@pytest.mark.parametrize("asking", [0, 1])
def test_the_backward_of_one_of_a_pair_rotates_one(device: str, asking: int) -> None:
    assert backward_of("pair", [asking], device).names == ["apply"]


@pytest.mark.parametrize("case", ROTATIONS)
def test_the_backward_of_angles_rotates_nothing(device: str, case: str) -> None:
    inputs = CASES[case].inputs(device)
    first = CASES[case].num_rotated
    seen = backward_of(case, range(first, len(inputs)), device).names
    # On CUDA kernels of ours form the sums.
    assert [name for name in seen if name.startswith("apply")] == []


def test_the_backward_of_one_input_spares_the_others(device: str) -> None:
    def operators(case: str, *asking: int) -> list[str]:
        seen = backward_of(case, asking, device)
        return seen.names + seen.others

    both = operators("axes", 1, 2)
    for asking in (1, 2):
        assert len(operators("axes", asking)) < len(both)
    if device == "cpu":  # On CUDA one kernel of ours adds up the rows of both tables.
        assert operators("rows", 1, 2).count("aten::index_put") == 2
        for table in (1, 2):
            assert operators("rows", table).count("aten::index_put") == 1


@pytest.mark.parametrize("case", NORMS)
def test_the_backward_of_one_input_of_a_norm_spares_the_others(device: str, case: str) -> None:
    first = CASES[case].num_rotated + CASES[case].num_weights
    for index in range(len(CASES[case].inputs("cpu"))):
        names = backward_of(case, [index], device).names
        gradients = [name for name in names if name.endswith("_backward")]
        if index < first:
            # Of one of a pair alone, and nothing for its angles.
            assert names == gradients
            assert len(names) == 1
            assert "_qk" not in names[0]
        else:
            # The norm is computed again, and differentiated only if the rotation comes first.
            assert bool(gradients) == ("after" in case or case == "norm of ranks")


# What the backward of x alone keeps: for each operator, the tensors that make the angles.
KEPT: dict[str, Callable[[str], tuple[Tensor, ...]]] = {
    "positions": lambda device: (torch.arange(64, device=device)[:, None],),
    "frequencies": lambda device: (
        torch.arange(64, device=device)[:, None],
        random_inv_freq((64,), torch.float32, device),
    ),
    "axes": lambda device: (
        random_positions((3, 64, 1), device=device),
        random_inv_freq((3, 64), torch.float32, device),
    ),
    "tables": lambda device: (
        random_values((64, 1, 64), device=device),
        random_values((64, 1, 64), device=device, seed=1),
    ),
    "rows": lambda device: (
        random_values((99, 64), device=device),
        random_values((99, 64), device=device, seed=1),
        torch.arange(64, device=device)[:, None],
    ),
}


def operator_for(kind: str, *, in_place: bool) -> Callable[..., Any]:
    """Returns the function that takes such angles."""
    name = "apply_cos_sin" if kind in ("tables", "rows") else "apply"
    return getattr(torch_rope, f"{name}_" if in_place else name)  # type: ignore[no-any-return]


def assert_same_memory(actual: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    """Asserts that the tensors are these, in some order, and not copies of them."""

    def places(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
        return sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)

    assert places(actual) == places(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KEPT)
def test_no_activation_is_saved_for_the_gradient_of_x(device: str, kind: str, form: str) -> None:
    angles = KEPT[kind](device)
    x = random_values((2, 64, 8, 128), device=device).requires_grad_() + 0
    rotate = operator_for(kind, in_place=form == "in place")
    assert_same_memory(saved_by(lambda: rotate(x, *angles)), angles)


@pytest.mark.parametrize("kind", KEPT)
def test_no_activation_is_saved_for_the_gradients_of_a_pair(device: str, kind: str) -> None:
    angles = KEPT[kind](device)
    q = random_values((2, 64, 8, 128), device=device).requires_grad_()
    k = random_values((2, 64, 2, 128), device=device).requires_grad_()
    rotate = operator_for(kind, in_place=False)
    assert_same_memory(saved_by(lambda: rotate((q, k), *angles)), angles)


@pytest.mark.parametrize("kind", KEPT)
def test_no_activation_is_saved_for_the_gradients_of_a_pair_in_place(
    device: str, kind: str
) -> None:
    angles = KEPT[kind](device)
    q, k = (random_values((2, 64, 8, 128), device=device).requires_grad_() + 0 for _ in range(2))
    rotate = operator_for(kind, in_place=True)
    assert_same_memory(saved_by(lambda: rotate((q, k), *angles)), 2 * angles)


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_rotated_can_be_freed_before_its_gradient_is_taken(device: str, kind: str) -> None:
    leaf = random_values((2, 64, 8, 128), device=device).requires_grad_()
    x = leaf * 1
    memory = StorageWeakRef(x.untyped_storage())
    rotated = operator_for(kind, in_place=False)(x, *KEPT[kind](device))
    del x
    assert memory.expired()
    torch.autograd.grad(rotated.sum(), leaf)


def test_learned_positions_keep_the_output_and_no_more(device: str) -> None:
    x = random_values((2, 64, 8, 128), device=device).requires_grad_()
    positions = random_positions((64, 1), torch.float32, device).requires_grad_()
    results = []
    saved = saved_by(lambda: results.append(torch_rope.apply(x, positions)))
    assert_same_memory(saved, (positions, results[0]))


def test_learned_tables_keep_the_input_and_no_more(device: str) -> None:
    x = random_values((2, 64, 8, 128), device=device)
    tables = random_values((64, 1, 64), device=device).requires_grad_()
    saved = saved_by(lambda: torch_rope.apply_cos_sin(x, tables, tables))
    assert_same_memory(saved, (x, tables, tables))


@pytest.mark.parametrize("asking", ["x", "weight", "both", "everything"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KEPT)
def test_a_norm_keeps_x_the_weight_and_what_makes_angles(
    device: str, kind: str, form: str, asking: str
) -> None:
    angles = KEPT[kind](device)
    x = random_values((2, 64, 8, 128), device=device)
    weight = random_values((128,), device=device, seed=1)
    if asking != "weight":
        x = x.requires_grad_() + 0
    if asking != "x":
        weight.requires_grad_()
    if asking == "everything":
        for tensor in angles:
            tensor.requires_grad_(tensor.is_floating_point())
    name = operator_for(kind, in_place=form == "in place").__name__
    saved = saved_by(lambda: getattr(torch_rope, f"norm_{name}")(x, weight, *angles))
    if form == "functional":
        assert_same_memory(saved, (x, weight, *angles))
    else:
        # x is overwritten: a copy of it is kept.
        copies = [one for one in saved if one.shape == x.shape]
        assert len(copies) == 1
        rest = [one for one in saved if one.shape != x.shape]
        assert_same_memory(rest, (weight, *angles))


@pytest.mark.parametrize("weights", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("kind", KEPT)
def test_norms_of_a_pair_keep_both_and_their_weights(
    device: str, kind: str, weights: tuple[bool, bool]
) -> None:
    angles = KEPT[kind](device)
    q = random_values((2, 64, 8, 128), device=device).requires_grad_()
    k = random_values((2, 64, 2, 128), device=device).requires_grad_()
    of_pair = tuple(
        random_values((128,), device=device, seed=seed).requires_grad_() if given else None
        for seed, given in enumerate(weights)
    )
    name = operator_for(kind, in_place=False).__name__
    saved = saved_by(lambda: getattr(torch_rope, f"norm_{name}")((q, k), of_pair, *angles))
    given = tuple(weight for weight in of_pair if weight is not None)
    assert_same_memory(saved, (q, k, *given, *angles))


# Of more rows than weights have gradients in the kernel.
@pytest.mark.parametrize("shape", [(400, 1, 64), (400, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm_last", [False, True])
def test_a_weight_for_each_token_has_its_gradient(
    device: str, norm_last: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = random_values((400, 3, 64), dtype, device).requires_grad_()
    k = random_values((400, 2, 64), dtype, device, seed=1).requires_grad_()
    weight = random_values(shape, dtype, device, seed=2).requires_grad_()
    k_weight = random_values((64,), dtype, device, seed=3).requires_grad_()
    positions = torch.arange(400, device=device)[:, None]
    inputs, weights = (x, k), (weight, k_weight)
    outputs = torch_rope.norm_apply(inputs, weights, positions, norm_last=norm_last)
    actual = torch.autograd.grad(outputs, (*inputs, *weights), outputs)
    for index, (one, gain) in enumerate(zip(inputs, weights, strict=True)):
        with torch_rope.composed():
            output = torch_rope.norm_apply(one, gain, positions, norm_last=norm_last)
        expected = torch.autograd.grad(output, (one, gain), outputs[index].detach())
        torch.testing.assert_close(actual[index], expected[0])
        torch.testing.assert_close(actual[2 + index], expected[1], rtol=1e-4, atol=1e-5)
    # With the bits that it has alone.
    alone = torch_rope.norm_apply(x, weight.detach(), positions, norm_last=norm_last)
    (of_x,) = torch.autograd.grad(alone, x, outputs[0].detach())
    assert_same_bits(of_x, actual[0])


def test_nothing_is_saved_where_no_gradient_is_asked_for(device: str) -> None:
    x = random_values((9, 32), device=device)
    assert not saved_by(lambda: torch_rope.norm_apply(x, x[0], torch.arange(9, device=device)))
    assert not saved_by(lambda: torch_rope.apply(x, torch.arange(9, device=device)))
    assert not saved_by(lambda: torch_rope.apply_(x, torch.arange(9, device=device)))


def test_integer_positions_ask_for_no_gradient(device: str) -> None:
    x = random_values((9, 32), device=device)
    assert not torch_rope.apply(x, torch.arange(9, device=device)).requires_grad
    x.requires_grad_()
    assert torch_rope.apply(x, torch.arange(9, device=device)).requires_grad


def test_frequencies_alone_can_ask_for_a_gradient(device: str) -> None:
    x = random_values((3, 8), torch.float64, device)
    positions = random_positions((3,), device=device, low=-8, high=8)
    inv_freq = frequencies(4, device=device)
    assert gradcheck(lambda inv_freq: torch_rope.apply(x, positions, inv_freq), (inv_freq,))
    assert gradcheck(
        lambda inv_freq: torch_rope.apply_(x.clone(), positions, inv_freq), (inv_freq,)
    )


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
@pytest.mark.parametrize("asking", [0, 1])
def test_only_the_one_of_a_pair_that_asks_has_a_gradient(
    device: str, asking: int, operator: Callable[..., Any]
) -> None:
    pair = [random_values((9, 32), device=device, seed=seed) for seed in range(2)]
    pair[asking] = leaf(pair[asking]) * 1
    rotated = operator(tuple(pair), torch.arange(9, device=device))
    assert rotated[asking].requires_grad
    assert not rotated[1 - asking].requires_grad


@pytest.mark.parametrize("by_tables", [False, True], ids=["by position", "by tables"])
@pytest.mark.parametrize("asking", [0, 1])
def test_a_pair_of_which_one_asks_for_a_gradient_is_rotated_in_one_call(
    device: str, asking: int, by_tables: bool
) -> None:
    inputs = [doubles(9, 32, device=device, seed=seed).detach() for seed in range(2)]
    inputs[asking].requires_grad_()
    pair = (inputs[0], inputs[1])
    positions = torch.arange(9, device=device)
    angles = positions.unsqueeze(-1) * torch.linspace(0.1, 1, 16, device=device).double()
    tables = angles.cos(), angles.sin()

    def rotate(conjugate: bool = False) -> tuple[Tensor, Tensor]:
        if by_tables:
            return torch_rope.apply_cos_sin(pair, *tables, conjugate=conjugate)
        return torch_rope.apply(pair, positions, conjugate=conjugate)

    with OperatorsSeen() as seen:
        rotated = rotate()
    assert seen.names == ["apply_cos_sin_qk" if by_tables else "apply_qk"]
    with torch.no_grad():
        expected = rotate()
        backward = rotate(conjugate=True)
    for actual, other in zip(rotated, expected, strict=True):
        assert_same_bits(actual.detach(), other)
    # The gradient of an output that is equal to the input is the input turned back.
    sum(rotated).backward(inputs[asking].detach())
    assert inputs[1 - asking].grad is None
    gradient = inputs[asking].grad
    assert gradient is not None
    assert_same_bits(gradient, backward[asking])
    assert gradgradcheck(lambda _: rotate()[asking], (inputs[asking],))


@pytest.mark.parametrize("asking", [0, 1])
def test_compiled_autograd_takes_a_pair_of_which_one_asks_for_a_gradient(
    device: str, asking: int
) -> None:
    pair = [doubles(9, 32, device=device, seed=seed).detach() for seed in range(2)]
    x = pair[asking].requires_grad_()
    positions = torch.arange(9, device=device)
    rotated = torch_rope.apply((pair[0], pair[1]), positions)
    (expected,) = torch.autograd.grad(rotated[asking].sum(), x, retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        rotated[asking].sum().backward()
    assert x.grad is not None
    assert_same_bits(x.grad, expected)


@pytest.mark.parametrize("asking", [(0,), (1,), (0, 1)], ids=str)
def test_a_pair_is_rotated_in_place_in_one_call_that_both_versions_count(
    device: str, asking: tuple[int, ...]
) -> None:
    q, k = (random_values((9, 32), device=device, seed=seed) for seed in range(2))
    pair = tuple(leaf(x) * 1 if i in asking else x for i, x in enumerate((q, k)))
    before = [x._version for x in pair]
    positions = torch.arange(9, device=device)
    expected = torch_rope.apply((q, k), positions)
    with OperatorsSeen() as seen:
        torch_rope.apply_((pair[0], pair[1]), positions)
    assert seen.names == ["apply_qk_"]
    assert [x._version - version for x, version in zip(pair, before, strict=True)] == [1, 1]
    for x, other in zip(pair, expected, strict=True):
        assert_same_bits(x.detach(), other)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_of_a_pair_can_be_left_out_of_the_loss(device: str, unused: int) -> None:
    pair = doubles(3, 6, device=device), doubles(3, 6, device=device, seed=1)
    positions = random_positions((3,), device=device)
    rotated = torch_rope.apply(pair, positions)[1 - unused]
    gradient = random_values((3, 6), torch.float64, device, seed=2)
    gradients = torch.autograd.grad(rotated, pair, gradient, allow_unused=True)
    used = gradients[1 - unused]
    assert used is not None
    assert_rotated(used, reference.apply(gradient, positions, conjugate=True))
    assert gradients[unused] is None or not gradients[unused].any()


@pytest.mark.parametrize("operator", [torch_rope.apply_, torch.ops.rope.apply_])
def test_a_leaf_that_asks_for_a_gradient_is_refused_in_place(
    device: str, operator: Callable[..., Any]
) -> None:
    x = doubles(3, 6, device=device)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        operator(x, torch.arange(3, device=device))
    assert_same_bits(x, before)
    assert x._version == 0


@pytest.mark.parametrize("place", [0, 1])
def test_a_leaf_in_a_pair_is_refused_in_place_and_neither_is_written(
    device: str, place: int
) -> None:
    pair = [random_values((3, 6), device=device, seed=seed) for seed in range(2)]
    pair[place].requires_grad_()
    before = [x.detach().clone() for x in pair]
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch_rope.apply_((pair[0], pair[1]), torch.arange(3, device=device))
    for x, copy in zip(pair, before, strict=True):
        assert_same_bits(x, copy)


@pytest.mark.parametrize("asking", ["q", "frequencies", "nothing"])
@pytest.mark.parametrize("refused", [0, 1])
def test_an_inference_tensor_in_a_pair_is_refused_in_place_and_neither_is_written(
    device: str, refused: int, asking: str
) -> None:
    with torch.inference_mode():
        inference = random_values((3, 6), torch.float64, device)
    other = doubles(3, 6, device=device, seed=1) * 1 if asking == "q" else inference.clone()
    inv_freq = frequencies(3, device=device) if asking == "frequencies" else None
    before = inference.clone(), other.detach().clone()
    pair = (other, inference) if refused else (inference, other)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        torch_rope.apply_(pair, torch.arange(3, device=device), inv_freq)
    assert_same_bits(inference, before[0])
    assert_same_bits(other, before[1])


def test_a_leaf_is_refused_by_tables_in_place(device: str) -> None:
    x, table = doubles(3, 6, device=device), random_values((3, 3), device=device)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch_rope.apply_cos_sin_(x, table, table)
    assert_same_bits(x, before)


def test_a_leaf_can_be_rotated_in_place_without_grad(device: str) -> None:
    x = doubles(3, 6, device=device)
    expected = torch_rope.apply(x.detach(), torch.arange(3, device=device))
    with torch.no_grad():
        torch_rope.apply_(x, torch.arange(3, device=device))
    assert_same_bits(x, expected)


def test_a_tensor_rotated_in_place_is_rebased(device: str) -> None:
    x = doubles(3, 6, device=device) * 2
    before = x.grad_fn
    torch_rope.apply_(x, torch.arange(3, device=device))
    assert x.grad_fn is not None
    assert x.grad_fn is not before


def test_a_constant_rotated_in_place_by_learned_frequencies_asks_for_a_gradient(
    device: str,
) -> None:
    x = random_values((3, 6), torch.float64, device)
    torch_rope.apply_(x, torch.arange(3, device=device), frequencies(3, device=device))
    assert x.requires_grad


def test_rotating_in_place_what_another_backward_needs_is_an_error(device: str) -> None:
    x = doubles(3, 6, device=device)
    exponential = x.exp()
    torch_rope.apply_(exponential, torch.arange(3, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()


def test_overwriting_the_frequencies_before_the_backward_is_an_error(device: str) -> None:
    x, inv_freq = doubles(3, 6, device=device), random_inv_freq((3,), device=device)
    rotated = torch_rope.apply(x, torch.arange(3, device=device), inv_freq)
    inv_freq.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_what_another_backward_needs_can_be_rotated_in_place_where_pytorch_keeps_copies(
    device: str,
) -> None:
    x, positions = doubles(3, 6, device=device), torch.arange(3, device=device)
    expected = torch.autograd.grad(torch_rope.apply(x.exp(), positions).sin().sum(), x)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        exponential = x.exp()
        torch_rope.apply_(exponential, positions)
        actual = torch.autograd.grad(exponential.sin().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_views_of_a_packed_tensor_rotated_in_place_have_the_right_gradient(device: str) -> None:
    def rotate(packed: Tensor, positions: Tensor) -> Tensor:
        packed = packed * 1
        torch_rope.apply_(packed[:, 0], positions)
        torch_rope.apply_(packed[:, 1], positions)
        return packed

    packed = doubles(3, 3, 2, 4, device=device)
    assert gradcheck(rotate, (packed, small_positions(3, 1, device=device)))


def test_a_pair_of_views_rotated_in_place_has_the_right_gradient(device: str) -> None:
    def rotate(packed: Tensor, positions: Tensor) -> Tensor:
        packed = packed * 1
        torch_rope.apply_((packed[:, 0], packed[:, 1]), positions)
        return packed

    packed = doubles(3, 3, 2, 4, device=device)
    assert gradcheck(rotate, (packed, small_positions(3, 1, device=device)))


def test_a_view_of_many_is_refused_in_place(device: str) -> None:
    q, k, _ = (doubles(3, 3, 2, 4, device=device) * 1).unbind(1)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        torch_rope.apply_((q, k), torch.arange(3, device=device)[:, None])


def test_gradients_of_empty_tensors_are_empty(device: str) -> None:
    x = doubles(0, 8, device=device)
    positions = small_positions(0, device=device)
    inv_freq = frequencies(4, device=device)
    rotated = torch_rope.apply(x, positions, inv_freq)
    gradients = torch.autograd.grad(rotated.sum(), (x, positions, inv_freq))
    assert [gradient.shape for gradient in gradients] == [(0, 8), (0,), (4,)]
    assert not gradients[2].any()


def test_slices_of_a_projection_rotated_in_place_have_the_right_gradient(device: str) -> None:
    # (sequence, query heads, then key heads, then value heads, of 4 elements each)
    def rotate(projected: Tensor, positions: Tensor) -> Tensor:
        packed = projected * 1
        q, k = packed[:, :12].unflatten(1, (3, 4)), packed.narrow(1, 12, 8).view(2, 2, 4)
        torch_rope.apply_((q, k), positions, interleaved=True)
        return packed

    projected = doubles(2, 28, device=device)
    assert gradcheck(rotate, (projected, small_positions(2, 1, device=device)))
    assert gradgradcheck(rotate, (projected, small_positions(2, 1, device=device)))


def rotate_whole(x: Tensor, positions: Tensor) -> Tensor:
    """Changes a tensor."""
    torch_rope.apply_(x, positions)
    return x


def rotate_view(x: Tensor, positions: Tensor) -> Tensor:
    """Changes a part of a tensor."""
    torch_rope.apply_(x[:, 1], positions[:, 0])
    return x


def rotate_pair_of_views(x: Tensor, positions: Tensor) -> Tensor:
    """Changes two parts of a tensor."""
    torch_rope.apply_((x[:, 0], x[:, 2]), positions[:, 0])
    return x


def rotate_by_tables(x: Tensor, positions: Tensor) -> Tensor:
    """Changes a tensor by tables that are made of positions."""
    table = positions.unsqueeze(-1).expand(3, 1, 2)
    torch_rope.apply_cos_sin_(x, table.cos(), table.sin())
    return x


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "rotate", [rotate_whole, rotate_view, rotate_pair_of_views, rotate_by_tables]
)
def test_compiled_autograd_differentiates_a_change_in_place(
    device: str, rotate: Callable[..., Tensor], learned: bool
) -> None:
    x = doubles(3, 3, 4, device=device)
    positions = small_positions(3, 1, device=device).requires_grad_(learned)
    leaves = (x, positions) if learned else (x,)
    expected = torch.autograd.grad(rotate(x * 1, positions).sin().sum(), leaves)
    torch.compiler.reset()
    loss = rotate(x * 1, positions).sin().sum()
    for leaf in leaves:
        leaf.retain_grad()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)


def test_a_change_in_place_of_what_the_backward_needs_is_an_error(device: str) -> None:
    # The gradient of the frequencies needs the result of the first rotation.
    x, inv_freq = doubles(3, 6, device=device) * 1, frequencies(3, device=device)
    positions = torch.arange(3, device=device)
    rotated = torch_rope.apply(x, positions, inv_freq)
    torch_rope.apply_(rotated, positions)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rotated.sum().backward()


def test_two_changes_in_place_have_the_right_gradient(device: str) -> None:
    def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        x = x * 1
        torch_rope.apply_(x, positions, inv_freq)
        torch_rope.apply_(x, positions * 2, inv_freq, interleaved=True)
        return x

    inputs = doubles(3, 6, device=device), small_positions(3, device=device)
    assert gradcheck(rotate, (*inputs, frequencies(3, device=device)))


# --------------------------------------------------------------------------------------------------
# Norms


def gradients_of_norm(
    function: Callable[..., Any], tensors: Sequence[Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    """Returns the gradients of x and a weight."""
    leaves = [leaf(tensor) for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, upstream.to(leaves[0].dtype))


@pytest.mark.parametrize("tables", [False, True], ids=["positions", "tables"])
@settings(max_examples=100)  # The reference takes half a second for each.
@given(data=st.data())
def test_every_gradient_of_any_norm_is_right(
    device: str, tables: bool, data: st.DataObject
) -> None:
    call: Normalization = data.draw(normalizations(tables=tables))
    tensors = call.tensors(device)
    upstream = data.draw(layouts(call.x.layout.size, expanded=True)).values(
        call.x.dtype, device, seed=9
    )
    function, exact = (
        (torch_rope.norm_apply_cos_sin, reference.norm_apply_cos_sin)
        if tables
        else (torch_rope.norm_apply, reference.norm_apply)
    )
    leaves = [
        tensor if tensor is None else tensor.detach().requires_grad_(tensor.is_floating_point())
        for tensor in tensors
    ]
    # Frequencies keep their dtype, which is that of the angles.
    copies = [
        leaf
        if leaf is None or not leaf.is_floating_point()
        else leaf.detach().cpu().to(leaf.dtype if index == 3 and not tables else torch.float64)
        for index, leaf in enumerate(leaves)
    ]
    for copy, original in zip(copies, leaves, strict=True):
        if copy is not None and copy is not original:
            copy.requires_grad_()
    asking = data.draw(
        st.lists(
            st.sampled_from([i for i, one in enumerate(copies) if one is not leaves[i]]),
            min_size=1,
            unique=True,
        )
    )
    result = function(*leaves, **call.options)
    gradients = torch.autograd.grad(result, [leaves[i] for i in asking], upstream)
    expected = exact(*copies, **call.options).values
    others = torch.autograd.grad(
        expected, [copies[i] for i in asking], upstream.cpu().double(), allow_unused=True
    )
    for index, gradient, other in zip(asking, gradients, others, strict=True):
        error = 2e-5 if call.x.dtype != torch.float64 else 1e-10
        leaf = leaves[index]
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
        if upstream.numel() == 0 or gradient.numel() == 0:
            assert (gradient == 0).all()
            continue
        other = torch.zeros(leaf.shape, dtype=torch.float64) if other is None else other.double()
        allowed = error * other.abs().max() + cancelled(call, copies, upstream, index) * error
        allowed = allowed + reference.half_ulp(other.abs() + allowed, gradient.dtype)
        assert ((gradient.cpu().double() - other).abs() <= allowed).all()


def cancelled(
    call: Normalization, tensors: Sequence[Tensor | None], upstream: Tensor, index: int
) -> float:
    """Returns a twentieth of the size of the terms of a gradient, which may cancel entirely."""
    x, weight = tensors[0], tensors[1]
    assert x is not None
    axes = call.options["norm_axes"] or [call.options["embedding_axis"]]
    mean = x.detach().square().mean(axes).min().item()
    gain = 1.0
    if weight is not None:
        gain = weight.detach().abs().max().item() + abs(call.options["weight_offset"])
    terms = upstream.abs().max().item() * gain
    if index == 0:
        return terms / 20 / max(mean + call.options["eps"], 1e-30) ** 0.5
    return terms * x.numel() ** 0.5 / 20


# The shape of x, that of the weight, and options. Of the weight, each of many elements is summed.
WEIGHT_CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 300, 4, 64), (64,), {}),
    ((2, 300, 4, 64), (4, 64), {"norm_axes": (-2, -1)}),
    ((2, 4, 300, 64), (4, 1, 64), {"embedding_axis": -1, "interleaved": True}),
    ((2, 300, 4, 80), (80,), {"rotary_dim": 48, "rotary_offset": 8, "norm_last": True}),
    ((2, 64, 300), (64,), {"embedding_axis": 1, "weight_offset": 1.0}),
    ((3, 5000), (5000,), {}),
    ((2, 300, 3, 12), (2, 1, 1, 12), {"norm_last": True}),
    ((7, 5, 4, 62), (7, 5, 4, 62), {}),
]


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize(("shape", "weight_shape", "options"), WEIGHT_CASES, ids=str)
def test_float32_gradients_of_norms_are_right(
    device: str,
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    options: dict[str, Any],
    conjugate: bool,
) -> None:
    x, weight, upstream = (
        random_values(size, torch.float32, device, seed=seed)
        for seed, size in enumerate((shape, weight_shape, shape))
    )
    position = torch.tensor(7, device=device)

    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        return torch_rope.norm_apply(x, weight, position, conjugate=conjugate, **options)

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        return reference.norm_apply(x, weight, position, conjugate=conjugate, **options).values

    actual = gradients_of_norm(normalize, (x, weight), upstream)
    exact = gradients_of_norm(expected, (x.cpu().double(), weight.cpu().double()), upstream.cpu())
    for one, other in zip(actual, exact, strict=True):
        assert (one.cpu() - other).abs().max() <= 2e-5 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", FLOAT_DTYPES)
def test_gradients_of_norms_of_half_precision_are_rounded_once(
    device: str, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x = random_values((2, 200, 4, 64), dtype, device)
    upstream = random_values((2, 200, 4, 64), dtype, device, seed=2)
    weight = random_values((64,), weight_dtype, device, seed=1)
    position = torch.tensor(7, device=device)
    actual = gradients_of_norm(
        lambda x, weight: torch_rope.norm_apply(x, weight, position), (x, weight), upstream
    )
    exact = gradients_of_norm(
        lambda x, weight: reference.norm_apply(x, weight, position).values,
        (x.cpu().double(), weight.cpu().double()),
        upstream.cpu(),
    )
    for one, other, tensor in zip(actual, exact, (x, weight), strict=True):
        assert one.dtype == tensor.dtype
        before_rounding = 2e-5 * other.abs().max()
        allowed = before_rounding + reference.half_ulp(other.abs() + before_rounding, one.dtype)
        assert ((one.cpu().double() - other).abs() <= allowed).all()


@pytest.mark.parametrize(("shape", "weight_shape", "options"), WEIGHT_CASES, ids=str)
def test_gradients_of_weights_are_the_same_in_every_run(
    device: str, shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    x, weight, upstream = (
        random_values(size, torch.float32, device, seed=seed)
        for seed, size in enumerate((shape, weight_shape, shape))
    )
    position = torch.tensor(7, device=device)
    threads = torch.get_num_threads()
    results = []
    for number in (threads, threads, 1, 3):
        torch.set_num_threads(number)
        try:
            results.append(
                gradients_of_norm(
                    lambda x, w: torch_rope.norm_apply(x, w, position, **options),
                    (x, weight),
                    upstream,
                )
            )
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        for one, first in zip(other, results[0], strict=True):
            assert_same_bits(one, first)


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
def test_gradients_of_norms_take_upstream_gradients_of_any_strides(
    device: str, strides: str
) -> None:
    x, weight = random_values((2, 9, 4, 32), device=device), random_values((32,), device=device)
    upstream = random_values((2, 4, 9, 32), device=device, seed=1).transpose(1, 2)
    if strides == "expanded":
        upstream = random_values((4, 1), device=device, seed=1).expand(2, 9, 4, 32)

    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        return torch_rope.norm_apply(x, weight, torch.arange(9, device=device)[:, None])

    actual = gradients_of_norm(normalize, (x, weight), upstream)
    expected = gradients_of_norm(normalize, (x, weight), upstream.contiguous())
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def test_a_norm_that_rotates_nothing_has_the_derivatives_of_rms_norm(device: str) -> None:
    # With rotary_dim=0 this is PyTorch's own RMSNorm, and so are its gradients.
    x, weight = doubles(3, 5, 8, device=device), doubles(8, device=device, seed=1)
    position = torch.tensor(5, device=device)
    actual = torch_rope.norm_apply(x, weight, position, rotary_dim=0, eps=1e-5)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, eps=1e-5)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sin().sum(), (x, weight)),
        torch.autograd.grad(expected.sin().sum(), (x, weight)),
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_leaf_that_asks_for_a_gradient_is_not_normalized_in_place(
    device: str, index: int
) -> None:
    pair = [random_values((3, 6), torch.float64, device, seed=seed) for seed in range(2)]
    pair[index].requires_grad_()
    before = [x.detach().clone() for x in pair]
    positions = torch.arange(3, device=device)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch_rope.norm_apply_((pair[0], pair[1]), None, positions)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        torch_rope.norm_apply_(pair[index], None, positions)
    for x, copy in zip(pair, before, strict=True):
        assert_same_bits(x, copy)
        assert x._version == 0


def test_a_constant_normalized_in_place_by_a_learned_weight_asks_for_a_gradient(
    device: str,
) -> None:
    x, weight = random_values((3, 6), torch.float64, device), doubles(6, device=device, seed=1)
    positions = torch.arange(3, device=device)

    def normalize(weight: Tensor) -> Tensor:
        return torch_rope.norm_apply_(x.clone(), weight, positions)

    assert normalize(weight).requires_grad
    assert gradcheck(normalize, (weight,))


def test_normalizing_in_place_what_another_backward_needs_is_an_error(device: str) -> None:
    x = doubles(3, 6, device=device)
    exponential = x.exp()
    torch_rope.norm_apply_(exponential, None, torch.arange(3, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()


@pytest.mark.parametrize("overwritten", ["x", "weight", "positions"])
def test_overwriting_what_a_norm_saved_is_an_error(device: str, overwritten: str) -> None:
    x, weight = doubles(3, 6, device=device), doubles(6, device=device, seed=1)
    positions = torch.arange(3.0, device=device)
    copy = x * 1
    normalized = torch_rope.norm_apply(copy, weight, positions)
    with torch.no_grad():
        {"x": copy, "weight": weight, "positions": positions}[overwritten].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normalized.sum().backward()


def test_norms_of_views_of_a_packed_tensor_have_the_right_gradient(device: str) -> None:
    def normalize(packed: Tensor, q_weight: Tensor, positions: Tensor) -> Tensor:
        packed = packed * 1
        q, k = packed[:, 0], packed[:, 1]
        torch_rope.norm_apply_((q, k), (q_weight, None), positions, norm_axes=(-2, -1))
        torch_rope.norm_apply_(packed[:, 2], q_weight, positions, norm_last=True)
        return packed

    packed, weight = doubles(3, 3, 2, 4, device=device), doubles(2, 4, device=device, seed=1)
    inputs = packed, weight, small_positions(3, 1, device=device)
    assert gradcheck(normalize, inputs)
    assert gradgradcheck(normalize, inputs)


def test_norms_in_inference_mode_and_of_inference_tensors(device: str) -> None:
    x, weight = random_values((9, 64), device=device), random_values((64,), device=device)
    positions = torch.arange(9, device=device)
    expected = torch_rope.norm_apply(x, weight, positions)
    with torch.inference_mode():
        assert_same_bits(torch_rope.norm_apply(x, weight, positions), expected)
        inside = x.clone()
        torch_rope.norm_apply_(inside, weight, positions)
        assert_same_bits(inside, expected)
        frozen = x.clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        torch_rope.norm_apply_(frozen, weight, positions)
    assert_same_bits(frozen, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_normalizes_again(device: str, use_reentrant: bool) -> None:
    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        return torch_rope.norm_apply(x.sin(), weight, torch.arange(3, device=device)).cos()

    leaves = doubles(3, 6, device=device), doubles(6, device=device, seed=1)
    expected = torch.autograd.grad(normalize(*leaves).sum(), leaves)
    copies = [leaf(tensor) for tensor in leaves]
    with OperatorsSeen() as seen:
        result = checkpoint(normalize, *copies, use_reentrant=use_reentrant)
        result.sum().backward()
    assert seen.names == ["norm_apply", "norm_apply", "_norm_apply_backward"]
    for copy, gradient in zip(copies, expected, strict=True):
        assert copy.grad is not None
        assert_same_bits(copy.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_leaves_norms_alone(device: str, dtype: torch.dtype) -> None:
    x, weight = random_values((9, 64), dtype, device), random_values((64,), device=device)
    x.requires_grad_()
    positions = torch.arange(9, device=device)
    expected = torch_rope.norm_apply(x, weight, positions)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = torch_rope.norm_apply(x, weight, positions)
    assert_same_bits(actual.detach(), expected.detach())
    assert_same_bits(
        *(
            torch.autograd.grad(result.sum(), x, retain_graph=True)[0]
            for result in (actual, expected)
        )
    )


def test_gradients_of_norms_of_nothing(device: str) -> None:
    weight = doubles(8, device=device)
    for shape in ((0, 8), (2, 0, 3, 8)):
        x = doubles(*shape, device=device)
        normalized = torch_rope.norm_apply(x, weight, torch.tensor(3.0, device=device))
        gradients = torch.autograd.grad(normalized.sum(), (x, weight))
        assert gradients[0].shape == shape
        assert gradients[1].shape == (8,)
        assert not gradients[1].any()


def test_compiled_autograd_differentiates_norms(device: str) -> None:
    def normalize(x: Tensor, weight: Tensor) -> Tensor:
        q, k = torch_rope.norm_apply((x, x * 2), (weight, None), torch.arange(3, device=device))
        return torch_rope.norm_apply_(q * k, weight, torch.arange(3, device=device))

    leaves = doubles(3, 6, device=device), doubles(6, device=device, seed=1)
    expected = torch.autograd.grad(normalize(*leaves).sin().sum(), leaves)
    torch.compiler.reset()
    loss = normalize(*leaves).sin().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)
