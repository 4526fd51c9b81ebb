"""The private operators that form the heavy part of gradients: sums over what shares an angle."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch_rope
from observe import OperatorsSeen
from reference import assert_same_bits, random_values
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


def as_tuple(tensors: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns one tensor as a tuple of it."""
    return (tensors,) if isinstance(tensors, Tensor) else tensors


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


# What can be made of the sums of an angle: factors of these sizes, and the dimensions to sum over.
PRODUCTS: list[tuple[tuple[int, ...], list[int]]] = [
    ((5,), [-1]),  # of positions
    ((2, 1, 1, 5), [-1]),  # of positions along two axes
    ((5, 1, 1), [-2, -3]),  # of inv_freq
    ((2, 5, 1, 1), [-2, -3]),  # of two rows of inv_freq
    ((2, 5, 1, 1), []),
]


@pytest.mark.parametrize("of_factors", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize(("sizes", "dim"), PRODUCTS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sums_of_an_angle_are_multiplied_and_summed(
    device: str, dtype: torch.dtype, sizes: tuple[int, ...], dim: list[int], of_factors: torch.dtype
) -> None:
    tensors = [[tensor] for tensor in inputs(device, dtype)]
    options = ((5, 1, 5), -1, 3, True, True)
    sums = angle_gradient(*tensors, *options).double()
    factors = random_values(sizes, torch.float64, device, seed=2).mul(9).to(of_factors)
    products = sums * factors
    for wanted in (torch.float32, torch.float64):
        actual = angle_gradient(*tensors, *options, factors=factors, dim=dim, dtype=wanted)
        assert actual.dtype == wanted
        expected = products.sum(dim) if dim else products
        # Float32 sums and factors are multiplied in float32, and added up in the result's dtype.
        exact = wanted == dtype == torch.float64
        epsilon = torch.finfo(torch.float64 if exact else torch.float32).eps
        limit = 32 * epsilon * products.abs().sum(dim).max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=0.0, atol=limit)


@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("of_rows", [torch.int32, torch.int64])
@pytest.mark.parametrize("wanted", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sums_of_tables_are_added_to_rows(
    device: str, dtype: torch.dtype, wanted: torch.dtype, of_rows: torch.dtype, full_width: bool
) -> None:
    tensors = [[tensor] for tensor in inputs(device, dtype)]
    options = ((5, 1, 10 if full_width else 5), -1, 3, True, True, full_width)
    rows = torch.tensor([[4], [0], [4], [4], [1]], dtype=of_rows, device=device)
    actual = cos_sin_gradient(*tensors, *options, rows=rows, num_rows=7, dtype=wanted)
    for one, sums in zip(actual, cos_sin_gradient(*tensors, *options), strict=True):
        expected = sums.new_zeros(7, sums.shape[-1])
        for token, row in enumerate(rows.flatten().tolist()):
            expected[row] += sums[token, 0]
        torch.testing.assert_close(
            one, expected.to(wanted), rtol=2 * torch.finfo(wanted).eps, atol=1e-5
        )
    for mask in ([True, False], [False, True], [False, False]):
        some = cos_sin_gradient(
            *tensors, *options, rows=rows, num_rows=7, dtype=wanted, output_mask=mask
        )
        for one, other, is_wanted in zip(some, actual, mask, strict=True):
            assert (one is None) == (not is_wanted)
            if one is not None:
                assert_same_bits(one, other)


def test_the_dtype_of_sums_can_be_chosen(device: str) -> None:
    tensors = [[tensor] for tensor in inputs(device, torch.float32)]
    options = ((5, 1, 5), -1, 3, True, True)
    for dtype in FLOAT_DTYPES:
        sums = (angle_gradient, *tensors, *options), (cos_sin_gradient, *tensors, *options)
        for operator, *arguments in sums:
            actual, expected = operator(*arguments, dtype=dtype), operator(*arguments)
            for one, other in zip(as_tuple(actual), as_tuple(expected), strict=True):
                assert_same_bits(one, other.to(dtype))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_operators_pass_opcheck(device: str, operator: Any) -> None:
    grad, x = inputs(device, requires_grad=True)
    opcheck(operator.default, ([grad], [x], (5, 1, 5), -1, 3, True, True))
    opcheck(operator.default, ([grad, grad], [x, x[:]], (5, 1, 5), -1, 3, True, True))


def test_operators_pass_opcheck_with_what_is_made_of_sums(device: str) -> None:
    grad, x = inputs(device, requires_grad=True)
    arguments = ([grad], [x], (5, 1, 5), -1, 3, True, True)
    factors = random_values((5, 1, 1), torch.float64, device, seed=2).requires_grad_()
    made = {"factors": factors, "dim": [-2, -3], "dtype": torch.float64}
    opcheck(angle_gradient.default, arguments, made)
    rows = torch.tensor([[4], [0], [4], [4], [1]], device=device)
    opcheck(cos_sin_gradient.default, arguments, {"rows": rows, "num_rows": 7})


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_sums_are_differentiable(device: str, operator: Any) -> None:
    grad, x = (tensor[:, :2, :1].detach() for tensor in inputs(device))

    def sums(grad: Tensor, x: Tensor) -> Any:
        return operator([grad], [x], (2, 1, 5), -1, 3, True, False)

    arguments = (grad.requires_grad_(), x.requires_grad_())
    assert gradcheck(sums, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(sums, arguments, check_batched_grad=True)


def test_products_of_sums_are_differentiable(device: str) -> None:
    grad, x = (tensor[:, :2, :1].detach() for tensor in inputs(device))
    factors = random_values((5,), torch.float64, device, seed=2)

    def products(grad: Tensor, x: Tensor, factors: Tensor) -> Any:
        options = ((2, 1, 5), -1, 3, True, False)
        return angle_gradient([grad], [x], *options, factors=factors, dim=[-1])

    arguments = tuple(tensor.requires_grad_() for tensor in (grad, x, factors))
    assert gradcheck(products, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(products, arguments, check_batched_grad=True)


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
    # Twice the columns, and the sum with the offset, would overflow.
    refuse_angle(ValueError, "expected sizes to end in the number", *tensors, (5, 1, 2**63 - 1))
    refuse_angle(ValueError, "expected sizes to end", *tensors, (5, 1, 1), -1, 2**63 - 1)


def test_what_cannot_be_made_of_sums_is_refused(device: str) -> None:
    tensors = [[tensor] for tensor in inputs(device)]
    options = ((5, 1, 5), -1, 3, False, False)

    def refuse(operator: Any, error: type[Exception], message: str, **made: Any) -> None:
        with pytest.raises(error, match=re.escape(message)):
            operator(*tensors, *options, **made)

    factors = torch.ones(5, 1, 5, device=device)
    message = "expected dim to count from the end, but got [-1, 0]"
    refuse(angle_gradient, IndexError, message, factors=factors, dim=[-1, 0])
    message = f"expected factors to be on {device}"
    refuse(angle_gradient, TypeError, message, factors=factors.to("meta"), dim=[-1])
    message = "expected dtype to be float64, float32, float16 or bfloat16, but got int64"
    refuse(angle_gradient, TypeError, message, dtype=torch.int64)
    rows = torch.zeros(5, 1, dtype=torch.int64, device=device)
    message = "expected num_rows to be given with rows, and only then, but it is missing"
    refuse(cos_sin_gradient, ValueError, message, rows=rows)
    message = "expected num_rows to be given with rows, and only then, but it is given without"
    refuse(cos_sin_gradient, ValueError, message, num_rows=5)
    message = "expected num_rows to be at least 0, but got -1"
    refuse(cos_sin_gradient, ValueError, message, rows=rows, num_rows=-1)
    message = "expected rows to have the shape [5, 1], sizes without the last, but got [5]"
    refuse(cos_sin_gradient, ValueError, message, rows=rows.flatten(), num_rows=5)
    message = f"expected rows to be int32 or int64 on {rows.device}, but got float64 on"
    refuse(cos_sin_gradient, TypeError, message, rows=rows.double(), num_rows=5)


def of_inv_freq(device: str) -> tuple[dict[str, Tensor], str]:
    positions = torch.arange(33, device=device).view(33, 1)
    return {
        "positions": positions,
        "inv_freq": random_values((32,), torch.float32, device),
    }, "inv_freq"


def of_inv_freq_of_three_axes(device: str) -> tuple[dict[str, Tensor], str]:
    positions = torch.arange(99, device=device).view(3, 33, 1)
    inv_freq = random_values((3, 32), torch.float32, device)
    return {"positions": positions, "inv_freq": inv_freq}, "inv_freq"


def of_positions(device: str) -> tuple[dict[str, Tensor], str]:
    return {"positions": random_values((33, 1), torch.float32, device)}, "positions"


def of_positions_with_inv_freq(device: str) -> tuple[dict[str, Tensor], str]:
    return {**of_inv_freq(device)[0], **of_positions(device)[0]}, "positions"


def of_positions_of_three_axes(device: str) -> tuple[dict[str, Tensor], str]:
    angles, _ = of_inv_freq_of_three_axes(device)
    return {**angles, "positions": angles["positions"].float()}, "positions"


def of_tables(device: str) -> tuple[dict[str, Tensor], str]:
    cos, sin = (random_values((33, 1, 32), torch.bfloat16, device, seed=seed) for seed in (0, 1))
    return {"cos": cos, "sin": sin}, "cos sin"


def of_full_width_tables(device: str) -> tuple[dict[str, Tensor], str]:
    tables, leaves = of_tables(device)
    return {name: table.repeat(1, 1, 2) for name, table in tables.items()}, leaves


def of_rows_of_tables(device: str) -> tuple[dict[str, Tensor], str]:
    tables = {name: table.squeeze(1) for name, table in of_tables(device)[0].items()}
    # Not contiguous.
    positions = (torch.arange(66, device=device) // 2 % 7).view(33, 2)[:, :1]
    return {**tables, "positions": positions}, "cos sin"


@pytest.mark.parametrize("batch", [2, 300])  # 300: rows are cut into groups
@pytest.mark.parametrize("tensors", [1, 2])
@pytest.mark.parametrize(
    "gradient",
    [
        of_inv_freq,
        of_inv_freq_of_three_axes,
        of_positions,
        of_positions_with_inv_freq,
        of_positions_of_three_axes,
        of_tables,
        of_full_width_tables,
        of_rows_of_tables,
    ],
)
def test_gradients_take_three_kernels_at_most(
    cuda: str, gradient: Callable[[str], tuple[dict[str, Tensor], str]], tensors: int, batch: int
) -> None:
    angles, names = gradient(cuda)
    leaves = [angles[name].requires_grad_() for name in names.split()]
    x = tuple(random_values((batch, 33, heads, 64), torch.bfloat16, cuda) for heads in (8, 2))
    options = {"full_width": True} if gradient is of_full_width_tables else {}
    rotate = torch_rope.apply_cos_sin if "cos" in angles else torch_rope.apply
    outputs = as_tuple(rotate(x if tensors == 2 else x[0], **angles, **options))
    grads = [torch.ones_like(output) for output in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        torch.cuda.synchronize()

    backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        backward()
    names_of_kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memset", "Memcpy"))
    ]
    assert 1 <= len(names_of_kernels) <= 3, names_of_kernels
