"""Checks of one call against all that the contract says of it, for calls of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import reference
import torch
import torch_rope
from reference import (
    assert_rotated,
    assert_same_bits,
    half_ulp,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import Argument, Call, Layout, Subject
from torch import Tensor

Run = Callable[[Callable[[], Any]], Any]


def check(device: str, call: Call) -> None:
    """Checks a call; an error ends with the line of Python that repeats it."""
    try:
        check_call(device, call)
    except Exception as error:
        raise AssertionError(
            f"{error}\nTo repeat it, in tests/:\n{line_of(device, call)}"
        ) from error


def line_of(device: str, call: Call) -> str:
    """Returns one line of Python that repeats a check."""
    return (
        "import torch; from contract import check; from strategies import *; "
        f"check({device!r}, {call!r})"
    )


class Tensors:
    """The tensors of a call, and the flat buffers that they are views of.

    Elements of buffers that belong to no tensor are NaN, or a row and a position far out of range.
    """

    def __init__(
        self, call: Call, device: str, *, exact: bool = False, low: int = -65536, high: int = 65536
    ) -> None:
        """Makes the tensors. ``exact``: buffers end with their last element, on either side."""
        self.device, self.exact = device, exact
        self.positions_between = low, high
        self.buffers: list[Tensor] = []
        self.owned: list[Tensor] = []  # For each buffer, which elements are some tensor's.
        self.xs: list[Tensor] = []
        self.weights: list[Tensor | None] = []
        for seed, subject in enumerate(call.subjects):
            x = self._subject(call, subject, seed)
            self.xs.append(torch._neg_view(x) if subject.negated else x)
            weight = subject.weight
            self.weights.append(
                None if weight is None else self._place(weight, subject.weight_dtype, 5 + seed)
            )
        self.angles = [
            None if argument is None else self._angle(argument, call) for argument in call.angles
        ]

    def _subject(self, call: Call, subject: Subject, seed: int) -> Tensor:
        if not call.is_shared:
            return self._place(subject.layout, subject.dtype, seed)
        if seed == 0:
            length = max(one.layout.span for one in call.subjects)
            self._add(random_values((length,), subject.dtype, self.device))
            for one in call.subjects:
                self.owned[-1][one.layout.places()] = True
            self._poison(self.buffers[-1], self.owned[-1])
        return subject.layout.of(self.buffers[0])

    def _place(self, layout: Layout, dtype: torch.dtype, seed: int) -> Tensor:
        length = layout.extent if self.exact else layout.span
        return self._view(layout, random_values((length,), dtype, self.device, seed=seed))

    def _angle(self, argument: Argument, call: Call) -> Tensor:
        layout, dtype = argument.layout, argument.dtype
        length = layout.extent if self.exact else layout.span
        if argument.kind == "inv_freq":
            return self._view(layout, random_inv_freq((length,), dtype, self.device))
        if argument.kind in ("cos", "sin"):
            return self._place(layout, dtype, 3 if argument.kind == "cos" else 4)
        low, high = self.positions_between
        if argument.kind == "rows":
            assert call.angles[0] is not None
            low, high = 0, call.angles[0].layout.size[0]
        values = random_positions((length,), dtype, self.device, low=low, high=high)
        return self._view(layout, values)

    def _view(self, layout: Layout, values: Tensor) -> Tensor:
        buffer = self._add(values)
        if layout.extent:
            self.owned[-1][layout.places()] = True
        self._poison(buffer, self.owned[-1])
        return layout.of(buffer)

    def _add(self, values: Tensor) -> Tensor:
        self.buffers.append(values)
        self.owned.append(torch.zeros(values.numel(), dtype=torch.bool))
        return values

    @staticmethod
    def _poison(buffer: Tensor, owned: Tensor) -> None:
        is_floating = buffer.dtype.is_floating_point
        poison = float("nan") if is_floating else torch.iinfo(buffer.dtype).max
        buffer[~owned.to(buffer.device)] = poison

    @property
    def arguments(self) -> list[Tensor]:
        """The tensors that no form of a call modifies."""
        return [tensor for tensor in (*self.weights, *self.angles) if tensor is not None]


def perform(call: Call, tensors: Tensors) -> Any:
    """Makes the call."""
    xs, weights, angles = tensors.xs, tensors.weights, tensors.angles
    is_pair = len(xs) == 2
    suffix = "_" if call.in_place else ""
    if call.through_dispatcher:
        name = f"{call.operator}{'_qk' if is_pair else ''}{suffix}"
        given = (*xs, *weights) if call.normalizes else xs
        return getattr(torch.ops.rope, name)(*given, *angles, **call.options)
    function = getattr(torch_rope, f"{call.operator}{suffix}")
    x = tuple(xs) if is_pair else xs[0]
    weight = (tuple(weights) if is_pair else weights[0],) if call.normalizes else ()
    return function(x, *weight, *angles, **call.options)


def alone(call: Call, x: Tensor, weight: Tensor | None, *angles: Tensor | None) -> Tensor:
    """Rotates one contiguous tensor, out of place."""
    function = getattr(torch_rope, call.operator)
    given = (x, weight) if call.normalizes else (x,)
    result: Tensor = function(*given, *angles, **call.options)
    return result


def dense(tensor: Tensor | None) -> Tensor | None:
    """Copies a tensor to contiguous memory."""
    if tensor is None:
        return None
    return tensor.resolve_neg().clone(memory_format=torch.contiguous_format)


def check_call(
    device: str,
    call: Call,
    *,
    exact: bool = False,
    place: Run = lambda make: make(),
    run: Run = lambda act: act(),
) -> None:
    """Checks a call.

    Args:
        device: Where the tensors are.
        call: The call.
        exact: Whether no buffer has room at either side.
        place: Runs what makes the tensors.
        run: Runs the call.
    """
    tensors = place(lambda: Tensors(call, device, exact=exact))
    xs = [dense(x) for x in tensors.xs]
    weights = [dense(weight) for weight in tensors.weights]
    angles = [dense(tensor) for tensor in tensors.angles]
    before = [buffer.clone() for buffer in tensors.buffers]
    versions = [tensor._version for tensor in (*tensors.xs, *tensors.arguments)]

    returned = run(lambda: perform(call, tensors))
    results = results_of(call, tensors, returned)
    if not call.in_place:
        check_outputs(tensors, results)
        assert versions == [tensor._version for tensor in (*tensors.xs, *tensors.arguments)]
    check_buffers(call, tensors, before)

    for x, weight, result in zip(xs, weights, results, strict=True):
        assert x is not None
        given = (x, weight) if call.normalizes else (x,)
        expected = getattr(reference, call.operator)(*given, *angles, **call.options)
        assert_rotated(result, expected)
        # In any layout and form, alone and as one of a pair: the same bits.
        single = alone(call, x, weight, *angles)
        assert_same_bits(result.resolve_neg(), single)
        if device != "cpu":
            others = [None if one is None else one.cpu() for one in (x, weight, *angles)]
            assert others[0] is not None
            assert_close_to_cpu(result, alone(call, others[0], *others[1:]), expected)


def results_of(call: Call, tensors: Tensors, returned: Any) -> list[Tensor]:
    """Returns the results of a call, which returned what its form does."""
    if call.in_place and call.through_dispatcher:
        assert returned is None
    elif call.in_place:
        given = returned if len(tensors.xs) == 2 else (returned,)
        assert len(given) == len(tensors.xs)
        assert all(one is x for one, x in zip(given, tensors.xs, strict=True))
    if call.in_place:
        return tensors.xs
    if len(tensors.xs) == 2:
        assert isinstance(returned, tuple)
        return list(returned)
    assert isinstance(returned, Tensor)
    return [returned]


def check_outputs(tensors: Tensors, results: list[Tensor]) -> None:
    """Checks the layout of outputs, and that they share memory with nothing."""
    taken = {buffer.untyped_storage().data_ptr() for buffer in tensors.buffers if buffer.numel()}
    for x, result in zip(tensors.xs, results, strict=True):
        like = torch.empty_like(x)
        assert result.dtype == x.dtype
        assert result.device == x.device
        assert result.shape == x.shape
        assert result.stride() == like.stride()
        assert result.storage_offset() == 0
        assert not result.is_neg()
        assert not result.requires_grad
        memory = result.untyped_storage()
        if result.numel() > 0:
            assert memory.data_ptr() not in taken
            taken.add(memory.data_ptr())


def check_buffers(call: Call, tensors: Tensors, before: list[Tensor]) -> None:
    """Checks that nothing was written but what is rotated in place."""
    written = {x.untyped_storage().data_ptr() for x in tensors.xs if call.in_place and x.numel()}
    for buffer, owned, copy in zip(tensors.buffers, tensors.owned, before, strict=True):
        if buffer.dtype.is_floating_point:
            differs = reference.bits(buffer) != reference.bits(copy)
        else:
            differs = (buffer != copy).cpu()
        if buffer.untyped_storage().data_ptr() in written:
            differs &= ~owned
        places = differs.nonzero().flatten().tolist()
        assert not places, f"elements {places} of a buffer of {buffer.numel()} were written"


def assert_close_to_cpu(result: Tensor, by_cpu: Tensor, expected: reference.Expected) -> None:
    """Asserts that two devices differ by no more than they may, before each rounds once."""
    values, tolerance, norms = expected
    allowed = torch.maximum(tolerance, norms * 2.0**-21)
    allowed = allowed + 2 * half_ulp(values.abs() + tolerance, result.dtype)
    difference = (result.cpu().double() - by_cpu.double()).abs()
    assert (difference <= torch.where(tolerance > 0, allowed, 0.0)).all()
