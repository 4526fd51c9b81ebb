"""Tensor subclasses and modes with ``__torch_dispatch__``, which see the operators themselves."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch_rope
from observe import FunctionsSeen, OperatorsSeen
from reference import assert_same_bits, random_positions, random_values
from torch import Tensor
from torch.utils import _pytree as pytree


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what was compiled before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Wrapped(Tensor):
    """A tensor around another that notes the operators of the library it is given to."""

    seen: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        """Wraps a tensor."""
        wrapped: Wrapped = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=inner.requires_grad,
        )
        return wrapped

    def __init__(self, inner: Tensor) -> None:
        """Keeps the tensor."""
        self.inner = inner.detach()

    def __repr__(self) -> str:  # type: ignore[override]
        """Shows what is inside."""
        return f"Wrapped({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Says to compilers what is inside."""
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> "Wrapped":
        """Wraps what a compiler made."""
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Notes the operator, and calls it on what is inside."""
        if function.namespace == "rope":
            cls.seen.append(function._schema.name.removeprefix("rope::"))

        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapped) else value

        results = function(*pytree.tree_map(unwrap, arguments), **(options or {}))
        if function._schema.is_mutable:
            return arguments[0] if function._schema.returns else None
        return pytree.tree_map_only(Tensor, Wrapped, results)


# The operators, on q, k and either positions or one table for both cosines and sines.
CALLS: dict[str, Callable[..., Any]] = {
    "apply": lambda q, k, angles: torch_rope.apply(q, angles),
    "apply_": lambda q, k, angles: torch_rope.apply_(q, angles),
    "apply_qk": lambda q, k, angles: torch_rope.apply((q, k), angles),
    "apply_qk_": lambda q, k, angles: torch_rope.apply_((q, k), angles),
    "apply_cos_sin": lambda q, k, angles: torch_rope.apply_cos_sin(q, angles, angles),
    "apply_cos_sin_": lambda q, k, angles: torch_rope.apply_cos_sin_(q, angles, angles),
    "apply_cos_sin_qk": lambda q, k, angles: torch_rope.apply_cos_sin((q, k), angles, angles),
    "apply_cos_sin_qk_": lambda q, k, angles: torch_rope.apply_cos_sin_((q, k), angles, angles),
}

WEIGHT = random_values((32,), seed=3)
NORM_CALLS: dict[str, Callable[..., Any]] = {
    "norm_apply": lambda q, k, angles: torch_rope.norm_apply(q, None, angles, norm_axes=[0, 1]),
    "norm_apply_": lambda q, k, angles: torch_rope.norm_apply_(q, WEIGHT.to(q.device), angles),
    "norm_apply_qk": lambda q, k, angles: torch_rope.norm_apply(
        (q, k), (None, WEIGHT.to(q.device)), angles
    ),
    "norm_apply_qk_": lambda q, k, angles: torch_rope.norm_apply_((q, k), None, angles),
    "norm_apply_cos_sin": lambda q, k, angles: torch_rope.norm_apply_cos_sin(
        q, WEIGHT.to(q.device), angles, angles, norm_last=True
    ),
    "norm_apply_cos_sin_": lambda q, k, angles: torch_rope.norm_apply_cos_sin_(
        q, None, angles, angles
    ),
    "norm_apply_cos_sin_qk": lambda q, k, angles: torch_rope.norm_apply_cos_sin(
        (q, k), (WEIGHT.to(q.device), WEIGHT.to(q.device)), angles, angles
    ),
    "norm_apply_cos_sin_qk_": lambda q, k, angles: torch_rope.norm_apply_cos_sin_(
        (q, k), (WEIGHT.to(q.device), None), angles, angles
    ),
}
CALLS |= NORM_CALLS


def angles_for(name: str, device: str) -> Tensor:
    """Returns positions, or a table."""
    if "cos_sin" in name:
        return random_values((9, 16), device=device, seed=7)
    return random_positions((9,), device=device)


def pair(device: str) -> tuple[Tensor, Tensor]:
    """Returns q and k."""
    return random_values((9, 32), device=device), random_values((9, 32), device=device, seed=1)


def parts(result: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a result."""
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrapper_sees_the_operator(device: str, name: str, grad: bool) -> None:
    q, k = pair(device)
    angles = angles_for(name, device)
    expected = parts(CALLS[name](q.clone(), k.clone(), angles))
    wrapped = Wrapped(q), Wrapped(k)
    if grad:
        wrapped = wrapped[0].requires_grad_() * 1, wrapped[1].requires_grad_() * 1
    Wrapped.seen.clear()
    actual = parts(CALLS[name](*wrapped, angles))
    # Under autograd a norm in place goes through a copy.
    through_copy = grad and "norm" in name
    assert Wrapped.seen == [name.removesuffix("_") if through_copy else name]
    for one, other in zip(actual, expected, strict=True):
        assert isinstance(one, Wrapped)
        assert_same_bits(one.inner, other)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrapper_sees_the_backward(device: str, name: str) -> None:
    leaves = tuple(x.requires_grad_() for x in pair(device))
    angles = angles_for(name, device)
    expected = torch.autograd.grad(
        sum(one.sin().sum() for one in parts(CALLS[name](*(x * 1 for x in leaves), angles))),
        leaves,
        allow_unused=True,
    )
    wrapped = tuple(Wrapped(x).requires_grad_() for x in leaves)
    loss = sum(one.sin().sum() for one in parts(CALLS[name](*(x * 1 for x in wrapped), angles)))
    Wrapped.seen.clear()
    actual = torch.autograd.grad(loss, wrapped, allow_unused=True)
    backward = {name.rstrip("_"), name.rstrip("_").replace("_qk", "")}
    if "norm" in name:
        backward = {f"_{one}_backward" for one in backward}
    assert set(Wrapped.seen) <= backward
    assert Wrapped.seen
    for one, other in zip(actual, expected, strict=True):
        if other is None:
            assert one is None
        else:
            assert isinstance(one, Wrapped)
            assert_same_bits(one.inner, other)


def test_positions_in_a_wrapper_suffice(device: str) -> None:
    x, _ = pair(device)
    Wrapped.seen.clear()
    positions = angles_for("apply", device)
    rotated = torch_rope.apply(x, Wrapped(positions))
    assert Wrapped.seen == ["apply"]
    assert isinstance(rotated, Wrapped)
    assert_same_bits(rotated.inner, torch_rope.apply(x, positions))


def test_a_weight_in_a_wrapper_suffices(device: str) -> None:
    x, _ = pair(device)
    Wrapped.seen.clear()
    weight, positions = WEIGHT.to(device, copy=True), angles_for("apply", device)
    leaf = Wrapped(weight).requires_grad_()
    rotated = torch_rope.norm_apply((x, x), (None, leaf), positions)
    assert Wrapped.seen == ["norm_apply_qk"]
    assert isinstance(rotated[1], Wrapped)
    assert_same_bits(rotated[1].inner, torch_rope.norm_apply(x, weight, positions))
    assert not rotated[0].requires_grad
    (gradient,) = torch.autograd.grad(rotated[1].sum(), leaf)
    weight.requires_grad_()
    alone = torch_rope.norm_apply(x, weight, positions)
    (expected,) = torch.autograd.grad(alone.sum(), weight)
    assert isinstance(gradient, Wrapped)
    assert_same_bits(gradient.inner, expected)


@pytest.mark.parametrize(
    "name",
    ["apply", "apply_qk", "apply_cos_sin", *(name for name in NORM_CALLS if name[-1] != "_")],
)
def test_a_compiled_function_takes_a_wrapper(device: str, name: str) -> None:
    q, k = pair(device)
    angles = angles_for(name, device)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    results = []
    for function in (CALLS[name], compiled):
        wrapped = Wrapped(q).requires_grad_(), Wrapped(k).requires_grad_()
        rotated = parts(function(*wrapped, angles))
        (gradient,) = torch.autograd.grad(sum(one.sin().sum() for one in rotated), wrapped[:1])
        assert isinstance(gradient, Wrapped)
        results.append([*rotated, gradient])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one.inner, other.inner)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_mode_sees_the_operator(device: str, name: str, grad: bool) -> None:
    q, k = (x.requires_grad_(grad) * 1 for x in pair(device))
    with OperatorsSeen() as seen:
        CALLS[name](q, k, angles_for(name, device))
    through_copy = grad and "norm" in name
    assert seen.names == [name.removesuffix("_") if through_copy else name]


@pytest.mark.parametrize("name", CALLS)
def test_a_function_mode_sees_the_operator(device: str, name: str) -> None:
    with FunctionsSeen() as mode:
        CALLS[name](*pair(device), angles_for(name, device))
    operators = [seen for seen in mode.seen if getattr(seen, "namespace", None) == "rope"]
    assert [seen._schema.name for seen in operators] == [f"rope::{name}"]


class Tagged(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_subclass_is_kept(device: str, name: str) -> None:
    q, k = (x.as_subclass(Tagged) for x in pair(device))
    for one in parts(CALLS[name](q, k, angles_for(name, device))):
        assert type(one) is Tagged
