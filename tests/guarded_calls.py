"""Makes calls on memory next to inaccessible pages; a program that tests/test_guard_pages.py runs.

    LD_PRELOAD=guard.so python tests/guarded_calls.py LAST_CALL

It writes a line of Python that repeats each check to the file LAST_CALL before it makes the call,
and prints how many it made.
"""

import ctypes
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import reference
import torch
import torch_rope
from contract import Tensors, check_call, line_of, perform
from strategies import FLOAT_DTYPES, Argument, Call, Layout, Subject
from torch import Tensor


class Placement(IntEnum):
    """Where memory lies: as in guard.cpp."""

    ANYWHERE = 0
    AT_END = 1  # The byte after it is inaccessible.
    AT_BEGIN = 2  # The byte before it is.


class Guard:
    """The library that is preloaded."""

    def __init__(self) -> None:
        """Replaces the allocator of CPU tensors."""
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.guard_num_aligned.restype = ctypes.c_size_t
        self._library.guard_install()
        self.placement = Placement.AT_END

    def __call__(self, act: Callable[[], Any]) -> Any:
        """Runs something with guarded memory, in a thread of its own: it has a new workspace."""
        result: list[Any] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                result.append(act())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        self._library.guard_place(self.placement)
        thread.start()
        thread.join()
        self._library.guard_place(Placement.ANYWHERE)
        if errors:
            raise errors[0]
        return result[0]

    @property
    def num_workspaces(self) -> int:
        """How many workspaces of kernels there were."""
        return int(self._library.guard_num_aligned())


def contiguous(size: tuple[int, ...], order: tuple[int, ...] | None = None, gap: int = 0) -> Layout:
    """Returns a layout whose dimensions are in this order in memory; rows end in a gap."""
    stride = [0] * len(size)
    extent = 1
    for dim in reversed(order or tuple(range(len(size)))):
        stride[dim] = extent
        extent = extent * size[dim] + (gap if extent == 1 else 0)
    return Layout(size, tuple(stride))


# --------------------------------------------------------------------------------------------------
# The calls

# How x of shape (tokens, heads, D) lies: the order in memory, a gap after each row, a step between
# elements, and the numbers of tokens and heads. Vectors run along the last, if it is long enough.
KINDS: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {
    "rows": ((0, 1, 2), 0, 1, 3, 2),
    "rows with gaps": ((0, 1, 2), 5, 1, 2, 3),
    "heads outside": ((1, 0, 2), 0, 1, 5, 3),
    "strided rows": ((0, 1, 2), 0, 2, 2, 2),
    "along tokens": ((1, 2, 0), 0, 1, 0, 2),
    "along heads": ((0, 2, 1), 0, 1, 2, 0),
}


def vector_of(dtype: torch.dtype) -> int:
    """Returns the elements of the widest vector that this process uses."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return (64 if wide else 32) // dtype.itemsize


class Draw:
    """Picks what a case leaves open, the same in every run."""

    def __init__(self) -> None:
        """Begins anew."""
        self._random = random.Random(0)

    def call(self, operator: str, kind: str, dtype: torch.dtype, size: int) -> Call:
        """Returns a call on rows of a size."""
        pick = self._random.choice
        order, gap, step, tokens, heads = KINDS[kind]
        vector = vector_of(dtype)
        tokens = tokens or pick((1, vector - 1, vector, vector + 1, 2 * vector + 3))
        heads = heads or pick((1, vector - 1, vector, vector + 1, 2 * vector + 3))
        shape = (tokens, heads, size)
        layout = contiguous(shape, order, gap)
        layout = Layout(shape, tuple(step * one for one in layout.stride))

        offset = pick((0, 0, min(size, 1), min(size, 5)))
        rotary_dim = 2 * ((size - offset) // 2)
        if pick((False, False, True)):
            rotary_dim = 2 * (rotary_dim // 4)
        options: dict[str, Any] = {
            "rotary_offset": offset,
            "interleaved": pick((False, True)),
            "conjugate": pick((False, True)),
        }
        tables = operator.endswith("cos_sin")
        angles = (
            self._tables(tokens, rotary_dim, options)
            if tables
            else self._positions(tokens, rotary_dim, options)
        )
        weight = None
        if operator.startswith("norm"):
            options["norm_last"] = pick((False, True))
            options["weight_offset"] = pick((0.0, 1.0))
            options["norm_axes"] = pick((None, None, [-2, -1]))
            weight = contiguous(pick(((size,), (heads, size), (tokens, 1, size))))
            weight = pick((None, weight, weight))
        subject = Subject(layout, dtype, weight, pick(FLOAT_DTYPES))
        subjects = (subject,)
        if pick((False, True)):
            other = pick(("rows", kind))
            k = contiguous((tokens, pick((1, heads)), size), *KINDS[other][:2])
            wants = pick((None, contiguous((size,)))) if operator.startswith("norm") else None
            subjects = (subject, Subject(k, dtype, wants, pick(FLOAT_DTYPES)))
        return Call(operator, subjects, angles, options, in_place=pick((False, True)))

    def _positions(
        self, tokens: int, rotary_dim: int, options: dict[str, Any]
    ) -> tuple[Argument | None, ...]:
        pick = self._random.choice
        options["rotary_dim"] = rotary_dim
        dtype = pick((torch.int32, torch.int64, torch.float32, torch.float64))
        shape = pick(((tokens, 1), (1, 1)))
        inv_freq = pick((None, "one axis", "axes"))
        if inv_freq is None:
            return Argument("positions", contiguous(shape), dtype), None
        frequencies: tuple[int, ...] = (rotary_dim // 2,)
        if inv_freq == "axes":
            shape, frequencies = (2, *shape), (2, *frequencies)
        return (
            Argument("positions", contiguous(shape), dtype),
            Argument("inv_freq", contiguous(frequencies), pick((torch.float32, torch.float64))),
        )

    def _tables(
        self, tokens: int, rotary_dim: int, options: dict[str, Any]
    ) -> tuple[Argument | None, ...]:
        pick = self._random.choice
        options["full_width"] = pick((False, True))
        columns = rotary_dim if options["full_width"] else rotary_dim // 2
        rows = None
        size: tuple[int, ...] = pick(((tokens, 1, columns), (columns,)))
        if pick((False, True)):
            rows = Argument("rows", contiguous((tokens, 1)), pick((torch.int32, torch.int64)))
            size = (pick((1, 7)), columns)
        table = contiguous(size, None, pick((0, 3)))
        dtype = pick(FLOAT_DTYPES)
        return Argument("cos", table, dtype), Argument("sin", contiguous(size), dtype), rows


OPERATORS = ("apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin")


def sizes_of(dtype: torch.dtype) -> list[int]:
    """Lists sizes of rows: every tail of one and of two vectors, and of two vectors of pairs."""
    vector = vector_of(dtype)
    few = range(1, 2 * vector + 4, 1 if vector <= 16 else 2)
    return [*few, *range(few[-1] + 1, 4 * vector + 7, 2 if vector <= 16 else 6)]


def small_calls() -> Iterator[Call]:
    """Lists calls of every operator, dtype, layout and tail."""
    draw = Draw()
    for operator, (index, kind), dtype in itertools.product(
        OPERATORS, enumerate(KINDS), FLOAT_DTYPES
    ):
        # Positions and tables share the loops over rows, and the layouts share most of theirs.
        step = 7 if kind.startswith("along") else 2 if kind == "rows" else 4
        first = index + OPERATORS.index(operator)
        for size in sizes_of(dtype)[first % step :: step]:
            yield draw.call(operator, kind, dtype, size)


def norm_calls() -> Iterator[Call]:
    """Lists norms of whole rows, of one to nine steps, of few and many heads that share a mean.

    Strided rows take another path, and have the bits of contiguous ones.
    """
    for dtype, steps, heads in itertools.product(FLOAT_DTYPES, (1, 2, 3, 4, 8, 9), (1, 19, 70)):
        size = 2 * steps * vector_of(dtype)
        x = contiguous((3, heads, size))
        weights = (None, (size,), (heads, size), (3, 1, size))
        shapes = itertools.product(weights, (None, [-2, -1]))
        for index, (shape, axes) in list(enumerate(shapes))[steps % 3 :: 3]:
            step = 1 if index < 4 else 2
            layout = Layout(x.size, tuple(step * one for one in x.stride))
            options = {
                "norm_axes": axes,
                "interleaved": index % 2 == 1,
                "norm_last": index % 3 == 1,
            }
            weight = None if shape is None else contiguous(shape)
            positions = Argument("positions", contiguous((3, 1)), torch.int64)
            yield Call(
                "norm_apply",
                (Subject(layout, dtype, weight, dtype),),
                (positions, None),
                options,
                in_place=index % 4 == 1,
            )


def large_calls() -> Iterator[Call]:
    """Lists calls whose outputs are larger than caches: they may be streamed."""
    tokens = 4099
    positions = Argument("positions", contiguous((tokens, 1)), torch.int64)
    shapes = ((128, 32, 96), (150, 7, 96), (128, 0, 128))
    for operator, (size, offset, rotary_dim) in itertools.product(OPERATORS, shapes):
        table = Argument("cos", contiguous((tokens, 1, rotary_dim // 2)), torch.float32)
        tables = table, replace(table, kind="sin"), None
        by_tables = operator.endswith("cos_sin")
        options = {"rotary_offset": offset, "rotary_dim": rotary_dim}
        weight = contiguous((size,)) if operator.startswith("norm") else None
        x = Subject(contiguous((tokens, 32, size)), torch.bfloat16, weight)
        yield Call(operator, (x,), tables if by_tables else (positions, None), options)


def check_large(call: Call, guard: Guard) -> None:
    """Checks the bits of a large output against those in place, where nothing is streamed."""
    tensors = guard(lambda: Tensors(call, "cpu", exact=True))
    actual = guard(lambda: perform(call, tensors))
    perform(replace(call, in_place=True), tensors)
    reference.assert_same_bits(actual, tensors.xs[0])


# --------------------------------------------------------------------------------------------------
# Gradients


def with_gradients(call: Call) -> Call:
    """Returns the call with positions that can have gradients, if it is one from positions."""
    angles = tuple(
        replace(one, dtype=torch.float64) if one is not None and one.kind == "positions" else one
        for one in call.angles
    )
    return replace(call, angles=angles, in_place=False)


def check_gradients(call: Call, guard: Guard) -> None:
    """Checks the gradients of everything that has one, whose memory is guarded too."""
    tensors = guard(lambda: Tensors(call, "cpu", exact=True, low=-8, high=8))
    is_pair = len(tensors.xs) == 2
    given = (*tensors.xs, *tensors.weights, *tensors.angles)
    # Sums over q and k are to be rounded once; frequencies are formed in their own dtype.
    num_angles = 0 if call.operator.endswith("cos_sin") else 2
    exact_from = len(given) - num_angles
    copies = [
        one
        if one is None
        else one.double()
        if index < exact_from and one.is_floating_point()
        else one.clone()
        for index, one in enumerate(given)
    ]
    name = f"{call.operator}{'_qk' if is_pair else ''}"
    operator = getattr(torch.ops.rope, name)

    def leaves_of(arguments: Any) -> list[Tensor]:
        return [
            one.requires_grad_() for one in arguments if one is not None and one.is_floating_point()
        ]

    def differentiate() -> tuple[Tensor, ...]:
        weights = tensors.weights if call.normalizes else []
        arguments = [
            one if one is None else one.detach() for one in (*tensors.xs, *weights, *tensors.angles)
        ]
        leaves = leaves_of(arguments)
        results = operator(*arguments, **call.options)
        results = results if is_pair else (results,)
        # Whose elements are strided, in calls on rows of odd sizes.
        step = 1 + results[0].shape[-1] % 2
        upstream = [
            torch.empty(*one.shape, step, dtype=one.dtype)[..., 0].copy_(one.detach().roll(1, -1))
            for one in results
        ]
        return (*torch.autograd.grad(results, leaves, upstream), *upstream)

    (*actual,) = guard(differentiate)
    upstream = [actual.pop() for _ in tensors.xs][::-1]
    xs = copies[: len(tensors.xs)]
    weights = copies[len(xs) : 2 * len(xs)]
    angles = copies[2 * len(xs) :]
    leaves = leaves_of((*xs, *weights, *angles))
    results = [
        getattr(reference, call.operator)(
            x, *((weight,) if call.normalizes else ()), *angles, **call.options
        ).values
        for x, weight in zip(xs, weights, strict=True)
    ]
    exact = torch.autograd.grad(results, leaves, [one.double() for one in upstream])
    narrow = any(one.dtype.itemsize == 2 for one in call.subjects)
    num_exact = len(leaves_of((*xs, *weights)))
    for index, (gradient, expected) in enumerate(zip(actual, exact, strict=True)):
        assert gradient.shape == expected.shape
        assert gradient.isfinite().all(), "some elements of a gradient are poison"
        if narrow and index >= num_exact:
            continue  # Gradients of angles are formed from outputs, which are rounded.
        expected = expected.double()
        allowed = 2e-5 * max(float(expected.abs().max()), 1.0) if expected.numel() else 0.0
        rounding = reference.half_ulp(expected.abs() + allowed, gradient.dtype)
        wrong = ~((gradient.double() - expected).abs() <= allowed + 2 * rounding)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} gradients are wrong"


# --------------------------------------------------------------------------------------------------


def main(last_call: Path) -> None:
    """Makes all calls."""
    torch.set_num_threads(1)
    torch_rope.apply(torch.ones(2), torch.tensor(0))  # Loads what is loaded once.
    guard = Guard()
    done = {"forward": 0, "backward": 0}
    for index, call in enumerate(itertools.chain(small_calls(), norm_calls())):
        guard.placement = (Placement.AT_END, Placement.AT_BEGIN)[index % 2]
        last_call.write_text(f"{guard.placement.name}: {line_of('cpu', call)}")
        check_call("cpu", call, exact=True, place=guard, run=guard)
        done["forward"] += 1
        is_small = max(one.layout.extent for one in call.subjects) < 20000
        if is_small and index % 5 == 0:
            last_call.write_text(f"{guard.placement.name}, gradients: {line_of('cpu', call)}")
            check_gradients(with_gradients(call), guard)
            done["backward"] += 1
    for index, call in enumerate(large_calls()):
        guard.placement = (Placement.AT_END, Placement.AT_BEGIN)[index % 2]
        last_call.write_text(f"{guard.placement.name}: {line_of('cpu', call)}")
        check_large(call, guard)
        done["forward"] += 1
    assert guard.num_workspaces >= done["forward"]
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{capability}: {done['forward']} calls, {done['backward']} backward")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
