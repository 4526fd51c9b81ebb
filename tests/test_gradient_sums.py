"""The private operators that form the heavy part of gradients: sums over what shares an angle."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch_rope
from observe import OperatorsSeen
from reference import random_values
from strategies import FLOAT_DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

angle_gradient = torch.ops.rope._angle_gradient
cos_sin_gradient = torch.ops.rope._cos_sin_gradient
OPERATORS = (angle_gradient, cos_sin_gradient)

# embedding_axis, rotary_offset, interleaved, conjugate
Slice = tuple[int, int, bool, bool]
SLICES: list[Slice] = [
    (-1, 0, False, False),
    (-1, 0, True, True),
    (3, 3, False, True),
    (-1, 5, True, False),
]


def inputs(
    device: str, dtype: torch.dtype = torch.float64, requires_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns a gradient and a tensor."""
    grad, x = (random_values((2, 5, 3, 16), dtype, device, seed=seed) for seed in (0, 1))
    return grad.requires_grad_(requires_grad), x.requires_grad_(requires_grad)


def by_formula(
    grad: Tensor, x: Tensor, sizes: tuple[int, ...], options: Slice
) -> tuple[Tensor, Tensor]:
    """Returns the sums in float64, plainly."""
    axis, offset, interleaved, conjugate = options
    pairs = sizes[-1]
    n = torch.arange(pairs)
    first = offset + (2 * n if interleaved else n)
    second = first + (1 if interleaved else pairs)
    g, x = (tensor.cpu().double().movedim(axis, -1) for tensor in (grad, x))
    cos = g[..., first] * x[..., first] + g[..., second] * x[..., second]
    sin = g[..., second] * x[..., first] - g[..., first] * x[..., second]
    return cos.sum_to_size(sizes), (-sin if conjugate else sin).sum_to_size(sizes)


@pytest.mark.parametrize("tokens", [(), (5, 1), (5, 3), (2, 1, 1), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("options", SLICES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sums_follow_their_formula(
    device: str, dtype: torch.dtype, options: Slice, tokens: tuple[int, ...]
) -> None:
    grad, x = inputs(device, dtype)
    sizes = (*tokens, 5)
    cos, sin = cos_sin_gradient([grad], [x], sizes, *options)
    angle = angle_gradient([grad], [x], sizes, *options)
    expected_cos, expected_sin = by_formula(grad, x, sizes, options)
    # Of at most 30 rows: each product and each sum rounds once.
    real = torch.float64 if dtype == torch.float64 else torch.float32
    limits = {"rtol": 0.0, "atol": 64 * torch.finfo(real).eps * 4 * 4}
    for actual, expected in ((cos, expected_cos), (sin, expected_sin), (angle, expected_sin)):
        assert actual.dtype == real
        torch.testing.assert_close(actual.cpu().double(), expected, **limits)


@pytest.mark.parametrize("tokens", [(), (5, 1), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("options", SLICES, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_full_width_sums_follow_their_formula(
    device: str, dtype: torch.dtype, options: Slice, tokens: tuple[int, ...]
) -> None:
    axis, offset, interleaved, conjugate = options
    grad, x = inputs(device, dtype)
    cos, sin = cos_sin_gradient([grad], [x], (*tokens, 10), *options, full_width=True)
    n = torch.arange(5)
    first = 2 * n if interleaved else n
    second = first + (1 if interleaved else 5)
    g, y = (
        tensor.cpu().double().movedim(axis, -1)[..., offset : offset + 10] for tensor in (grad, x)
    )
    expected_cos, expected_sin = g * y, torch.empty_like(g)
    if conjugate:
        expected_sin[..., first] = -g[..., second] * y[..., first]
        expected_sin[..., second] = g[..., first] * y[..., second]
    else:
        expected_sin[..., first] = -g[..., first] * y[..., second]
        expected_sin[..., second] = g[..., second] * y[..., first]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    limits = {"rtol": 0.0, "atol": 64 * torch.finfo(real).eps * 4 * 4}
    for actual, expected in ((cos, expected_cos), (sin, expected_sin)):
        assert actual.dtype == real
        summed = expected.sum_to_size((*tokens, 10))
        torch.testing.assert_close(actual.cpu().double(), summed, **limits)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operators_pass_opcheck(device: str, operator: Any) -> None:
    grad, x = inputs(device, requires_grad=True)
    opcheck(operator.default, ([grad], [x], (5, 1, 5), -1, 3, True, True))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_sums_are_differentiable(device: str, operator: Any) -> None:
    grad, x = (tensor[:, :2, :1].detach() for tensor in inputs(device))

    def sums(grad: Tensor, x: Tensor) -> Any:
        return operator([grad], [x], (2, 1, 5), -1, 3, True, False)

    arguments = (grad.requires_grad_(), x.requires_grad_())
    assert gradcheck(sums, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(sums, arguments, check_batched_grad=True)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 1), (2, 0)], ids=str)
def test_sums_are_mapped(device: str, in_dims: tuple[int | None, int | None]) -> None:
    tensors = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, -tensor], dim)
        for tensor, dim in zip(inputs(device), in_dims, strict=True)
    ]

    def sums(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        arguments = ([grad], [x], (5, 1, 5), -1, 3, False, True)
        return angle_gradient(*arguments), *cos_sin_gradient(*arguments)

    mapped = torch.func.vmap(sums, in_dims)(*tensors)
    for i in range(3):
        one = [
            tensor if dim is None else tensor.select(dim, i)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        for actual, expected in zip(mapped, sums(*one), strict=True):
            torch.testing.assert_close(actual[i], expected)


@pytest.mark.parametrize("mapped_by", ["torch.func", "autograd"])
def test_a_batch_of_gradients_takes_as_many_operators_as_one(mapped_by: str) -> None:
    _, x = inputs("cpu")
    positions = torch.arange(5.0).view(5, 1).requires_grad_()
    output = torch_rope.apply(x, positions)
    gradients = random_values((3, *x.shape), torch.float64, seed=2)

    def gradient(of_output: Tensor, batched: bool = False) -> Tensor:
        (result,) = torch.autograd.grad(
            output, positions, of_output, retain_graph=True, is_grads_batched=batched
        )
        return result

    with OperatorsSeen() as seen_by_one:
        gradient(gradients[0])
    with OperatorsSeen() as seen_by_many:
        if mapped_by == "autograd":
            many = gradient(gradients, batched=True)
        else:
            many = torch.func.vmap(gradient)(gradients)
    assert seen_by_many.others.count("aten::mul") == seen_by_one.others.count("aten::mul")
    torch.testing.assert_close(many, torch.stack([gradient(one) for one in gradients]))


def test_compilers_see_aten_operators_of_a_cuda_tensor_too() -> None:
    def sums(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        angle = angle_gradient([grad], [x], (5, 1, 5), -1, 3, False, True)
        return angle, *cos_sin_gradient([grad], [x], (5, 1, 5), -1, 3, False, True)

    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            tensors = [torch.empty(2, 5, 3, 16, device=device) for _ in range(2)]
        graph = make_fx(sums, tracing_mode="fake")(*tensors)
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert targets
        assert all(target.startswith("aten.") for target in targets), targets


def test_a_mode_of_a_cpu_tensor_sees_aten_operators() -> None:
    with OperatorsSeen() as seen:
        angle_gradient(*([tensor] for tensor in inputs("cpu")), (5, 1, 5), -1, 3, False, True)
    assert seen.names == []
    assert "aten::mul" in seen.others


def test_two_tensors_have_their_sums_added(device: str) -> None:
    grad, x = inputs(device)
    grads, xs = [grad, 3 * grad[:, :, :1]], [x, x[:, :, :1]]
    together = cos_sin_gradient(grads, xs, (5, 1, 5), -1, 3, True, True)
    alone = [
        cos_sin_gradient([grad], [x], (5, 1, 5), -1, 3, True, True)
        for grad, x in zip(grads, xs, strict=True)
    ]
    for both, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(both, first + second)
    angle = angle_gradient(grads, xs, (5, 1, 5), -1, 3, True, True)
    torch.testing.assert_close(angle, together[1])


def test_what_does_not_fit_is_refused(device: str) -> None:
    grad, x = inputs(device)

    def refuse(error: type[Exception], message: str, *changes: Any, operator: Any) -> None:
        arguments = [[grad], [x], (5, 1, 5), -1, 3, False, False]
        arguments[: len(changes)] = changes
        with pytest.raises(error, match=re.escape(message)):
            operator(*arguments)

    refuse_angle = partial(refuse, operator=angle_gradient)
    refuse_angle(ValueError, "expected ys to be one tensor or two, but got 0", [], [])
    refuse_angle(ValueError, "expected ys to be one tensor or two, but got 3", [grad] * 3, [x] * 3)
    refuse_angle(ValueError, "expected grads to be as many as ys, 2, but got 1", [grad], [x, x])
    refuse_angle(TypeError, "expected grads[0] to be float64 on", [grad.float()])
    refuse_angle(
        TypeError,
        f"expected ys[1] to be float64 on {x.device}, as ys[0] is, but got float32",
        [grad, grad.float()],
        [x, x.float()],
    )
    refuse_angle(
        ValueError, "expected grads[1] to have the shape of ys[1]", [grad, grad[0]], [x, x]
    )
    refuse(
        ValueError,
        "expected grads[0] to have the shape of xs[0]",
        [grad[:1]],
        operator=cos_sin_gradient,
    )
    tensors = ([grad], [x])
    axis_error = "expected embedding_axis to be a dimension of ys[0]"
    refuse_angle(IndexError, axis_error, *tensors, (5, 1, 5), 4)
    refuse_angle(ValueError, "expected sizes to end in the number of pairs", *tensors, (5, 1, 7))
    refuse_angle(ValueError, "expected sizes to be broadcastable", *tensors, (4, 1, 5))
