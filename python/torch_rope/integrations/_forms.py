"""What transformers' functions that rotate compute, how that is found out, and what replaces them.

The functions differ in more than their text tells at a glance: which elements pair up, in which
columns of the tables an angle stands, which dtype comes back. So each is tried on random numbers,
and is replaced where one of the forms below gives what it gives.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from torch_rope._operators import apply_cos_sin

Function = Callable[..., Any]

#: Why a function may keep its own arithmetic.
DIFFERENT_ANGLES = "its tables give the two members of a pair different angles"


class UnknownFormError(Exception):
    """Says why no form is that of a function."""


@dataclass(frozen=True)
class Form:
    """What one of these functions computes.

    Attributes:
        columns: Where the tables hold the angle of pair n. Each value stands twice in "halves" (at
            n and n + N) and in "neighbours" (at 2n and 2n + 1), once in "single".
        interleaved: Whether pairs are neighbours.
        to_halves: Whether pairs of neighbours come out as halves.
        conjugate: Whether pairs turn the other way.
        last: Whether the last elements of a longer axis are rotated, and not the first.
        dtype: Of the results: that of each input; that of q; or each input's promoted with that of
            the tables, as by arithmetic.
        reads_both: Whether the function reads both copies of an angle.
        without_k: What comes back where k is None: q alone, or a pair.
    """

    columns: Literal["halves", "neighbours", "single"]
    interleaved: bool
    to_halves: bool
    conjugate: bool
    last: bool = False
    dtype: Literal["own", "of q", "promoted"] = "own"
    reads_both: bool = False
    without_k: Literal["q", "pair"] = "pair"

    def first_copy(self, table: Tensor) -> Tensor:
        """Returns a view that holds each angle once."""
        if self.columns == "halves":
            return table[..., : table.shape[-1] // 2]
        return table[..., ::2] if self.columns == "neighbours" else table

    def second_copy(self, table: Tensor) -> Tensor:
        """Returns a view that holds each angle once, of the other copies."""
        if self.columns == "halves":
            return table[..., table.shape[-1] // 2 :]
        return table[..., 1::2] if self.columns == "neighbours" else table

    def table(self, first_copy: Tensor, second_copy: Tensor) -> Tensor:
        """Returns the table that holds these copies."""
        if self.columns == "halves":
            return torch.cat((first_copy, second_copy), dim=-1)
        if self.columns == "neighbours":
            return torch.stack((first_copy, second_copy), dim=-1).flatten(-2)
        return first_copy

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates a tensor by tables that broadcast with it."""
        cos, sin = self.first_copy(cos), self.first_copy(sin)
        return apply_cos_sin(self._prepare(x, cos), cos, sin, **self._options(x, cos))

    def rotate_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates a query and a key by tables that broadcast with both."""
        cos, sin = self.first_copy(cos), self.first_copy(sin)
        pair = self._prepare(q, cos), self._prepare(k, cos)
        q_rotated, k_rotated = apply_cos_sin(pair, cos, sin, **self._options(q, cos))
        if self.dtype == "of q":
            k_rotated = k_rotated.to(q.dtype)
        return q_rotated, k_rotated

    def _prepare(self, x: Tensor, cos: Tensor) -> Tensor:
        if self.dtype == "promoted" and x.dtype != cos.dtype:
            x = x.to(torch.promote_types(x.dtype, cos.dtype))
        if self.to_halves:
            return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        return x

    def _options(self, x: Tensor, cos: Tensor) -> dict[str, Any]:
        return {
            "rotary_offset": x.shape[-1] - 2 * cos.shape[-1] if self.last else 0,
            "interleaved": self.interleaved and not self.to_halves,
            "conjugate": self.conjugate,
        }


@dataclass
class Rotation:
    """What the replacement of one function goes by.

    Attributes:
        form: What the function computes.
        original: The function.
        name: Its name, with that of its module.
        widths: Of the tables that were seen so far.
        differs: Whether some of them gave the members of a pair different angles.
    """

    form: Form
    original: Function
    name: str
    widths: set[int] = field(default_factory=set)
    differs: bool = False

    def suits(self, cos: Tensor, sin: Tensor) -> bool:
        """Returns whether the tables give both members of a pair the same angle.

        The first tables of each width are compared, which on a GPU waits for them. A compiler
        cannot compare them, and goes by what was seen before.
        """
        if (
            not is_compiling()
            and self.form.reads_both
            and cos.shape[-1] not in self.widths
            and type(cos) is Tensor
            and not cos.is_meta
        ):
            self.widths.add(cos.shape[-1])
            first, second = self.form.first_copy, self.form.second_copy
            if not all(torch.equal(first(table), second(table)) for table in (cos, sin)):
                self.differs = True
                warnings.warn(
                    f"{self.name} keeps its own arithmetic: {DIFFERENT_ANGLES}", stacklevel=4
                )
        return not self.differs


def replacement(function: Function, name: str) -> Function:
    """Returns a function of the same signature and meaning that calls the operators.

    Args:
        function: What is to be replaced.
        name: Its name, for a warning.

    Raises:
        UnknownFormError: If the operators do not express it.
    """
    # The package kernels makes a module of a decorated function, and may have changed its forward.
    if isinstance(function, nn.Module):
        function = functools.partial(type(function).forward, function)
    parameters = tuple(inspect.signature(function).parameters)
    if parameters not in _SIGNATURES:
        raise UnknownFormError(f"its parameters are ({', '.join(parameters)})")
    with torch.no_grad():
        form = _find_form(function, parameters)
    make, _ = _SIGNATURES[parameters]
    return functools.wraps(function)(make(Rotation(form, function, name)))


# What replaces a function, for each of the signatures.


def _of_pair(rotation: Rotation) -> Function:
    form = rotation.form

    def rotate(
        q: Any, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        if not rotation.suits(cos, sin):
            return rotation.original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if k is not None:
            return form.rotate_pair(q, k, cos, sin)
        rotated = form.rotate(q, cos, sin)
        return rotated if form.without_k == "q" else (rotated, None)

    return rotate


def _of_pair_with_position_ids(rotation: Rotation) -> Function:
    rotate_pair = _of_pair(rotation)

    def rotate(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: object = None,  # Not read: the tables are of these positions already.
        unsqueeze_dim: int = 1,
    ) -> Any:
        return rotate_pair(q, k, cos, sin, unsqueeze_dim)

    return rotate


def _of_packed_pair(rotation: Rotation) -> Function:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        if not rotation.suits(cos, sin):
            return rotation.original(q, k, cos, sin)
        return rotation.form.rotate_pair(q, k, cos.unsqueeze(-2), sin.unsqueeze(-2))

    return rotate


def _of_tensor(rotation: Rotation) -> Function:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        if not rotation.suits(cos, sin):
            return rotation.original(x, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotation.form.rotate(x, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))

    return rotate


def _of_tensor_sin_first(rotation: Rotation) -> Function:
    def rotate(tensor: Tensor, sin: Tensor, cos: Tensor) -> Any:
        if not rotation.suits(cos, sin):
            return rotation.original(tensor, sin, cos)
        return rotation.form.rotate(tensor, cos.unsqueeze(2), sin.unsqueeze(2))

    return rotate


@dataclass(frozen=True)
class _Trial:
    """Arguments to try a function on.

    Attributes:
        q, k, tables: The shapes, without the last axis.
        options: Further arguments.
        width: The last axis of q and k, of which the tables rotate 8.
        dtypes: Of q, k and the tables.
        with_k: Whether there is a k.
        second_copy: The seed of the second copy of each angle, if it is not that of the first.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    tables: tuple[int, ...]
    options: dict[str, int] = field(default_factory=dict)
    width: int = 8
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32, torch.float32)
    with_k: bool = True
    second_copy: int = 2

    def arguments(self, parameters: tuple[str, ...], form: Form) -> dict[str, Any]:
        """Draws the tensors that a function takes."""
        first, second = (_random((2, *self.tables, 4), seed) for seed in (2, self.second_copy))
        cos, sin = form.table(first, second).to(self.dtypes[2])
        q = _random((*self.q, self.width), 0).to(self.dtypes[0])
        k = _random((*self.k, self.width), 1).to(self.dtypes[1]) if self.with_k else None
        tensors = {"q": q, "x": q, "tensor": q, "k": k, "cos": cos, "sin": sin}
        return {name: tensors[name] for name in parameters if name in tensors} | self.options


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


_TOKENS = 5
_BY_HEADS = _Trial((2, 3, _TOKENS), (2, 2, _TOKENS), (2, _TOKENS), {"unsqueeze_dim": 1})
_BY_TOKENS = _Trial((2, _TOKENS, 3), (2, _TOKENS, 2), (2, _TOKENS), {"unsqueeze_dim": 2})
_PACKED = _Trial((_TOKENS, 3), (_TOKENS, 2), (_TOKENS,))

# For each list of parameters what makes the replacement, and what a function is tried on.
_SIGNATURES: dict[tuple[str, ...], tuple[Callable[[Rotation], Function], tuple[_Trial, ...]]] = {
    ("q", "k", "cos", "sin", "unsqueeze_dim"): (_of_pair, (_BY_HEADS, _BY_TOKENS)),
    ("q", "k", "cos", "sin", "position_ids", "unsqueeze_dim"): (
        _of_pair_with_position_ids,
        (_BY_HEADS, _BY_TOKENS),
    ),
    ("q", "k", "cos", "sin"): (_of_packed_pair, (_PACKED,)),
    ("x", "cos", "sin", "unsqueeze_dim"): (_of_tensor, (_BY_HEADS, _BY_TOKENS)),
    ("tensor", "sin", "cos"): (_of_tensor_sin_first, (replace(_BY_TOKENS, options={}),)),
}

_FORMS = [
    Form(columns, interleaved, to_halves, conjugate)
    for columns in ("halves", "neighbours", "single")
    for interleaved, to_halves in ((False, False), (True, False), (True, True))
    for conjugate in (False, True)
]


def _find_form(function: Function, parameters: tuple[str, ...]) -> Form:
    """Finds the form that gives what a function gives, whatever arguments that takes."""
    make, trials = _SIGNATURES[parameters]

    def attempt(form: Form, trial: _Trial) -> Any:
        """Returns what the function gives, or None if it does not take the arguments."""
        try:
            return function(**trial.arguments(parameters, form))
        except Exception:
            return None

    def fits(form: Form, width: int = 8) -> bool:
        other = make(Rotation(form, function, ""))
        wide = (replace(trial, width=width) for trial in trials)
        return all(
            _close(other(**trial.arguments(parameters, form)), attempt(form, trial))
            for trial in wide
        )

    form = next(filter(fits, _FORMS), None)
    if form is None:
        raise UnknownFormError("it computes something else than a rotation of pairs")

    trial = trials[0]
    fewer = tuple(2 if size == _TOKENS else size for size in trial.q)
    if attempt(form, replace(trial, q=fewer)) is not None:
        raise UnknownFormError("it takes tables of more tokens than q has")

    wider = replace(trial, width=12)
    if attempt(form, wider) is not None and not fits(form, wider.width):
        form = replace(form, last=True)
        if not fits(form, wider.width):
            raise UnknownFormError("it computes something else where it rotates a part")

    first_alone = _close(
        attempt(form, trial), attempt(form, replace(trial, second_copy=trial.second_copy + 1))
    )
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    without_k = attempt(form, replace(trial, with_k=False))
    return replace(
        form,
        reads_both=not first_alone,
        dtype=_dtype(attempt(form, replace(trial, dtypes=dtypes)), dtypes),
        without_k="q" if isinstance(without_k, Tensor) else "pair",
    )


def _dtype(results: Any, dtypes: tuple[torch.dtype, ...]) -> Literal["own", "of q", "promoted"]:
    """Returns which dtypes the results of q, k and tables of these dtypes have."""
    if results is None:
        raise UnknownFormError("it does not take q, k and tables of different dtypes")
    q_dtype, k_dtype, tables_dtype = dtypes
    found = [x.dtype for x in (results if isinstance(results, tuple) else (results,))]
    kinds: dict[Literal["own", "of q", "promoted"], list[torch.dtype]] = {
        "own": [q_dtype, k_dtype],
        "of q": [q_dtype, q_dtype],
        "promoted": [tables_dtype, tables_dtype],
    }
    for kind, expected in kinds.items():
        if found == expected[: len(found)]:
            return kind
    raise UnknownFormError(f"it returns {found} for q of {q_dtype}, k of {k_dtype}")


def _close(actual: Any, expected: Any) -> bool:
    if isinstance(actual, tuple) and isinstance(expected, tuple):
        return len(actual) == len(expected) and all(map(_close, actual, expected))
    return (
        isinstance(actual, Tensor)
        and isinstance(expected, Tensor)
        and actual.shape == expected.shape
        and torch.allclose(actual, expected, atol=1e-5)
    )
