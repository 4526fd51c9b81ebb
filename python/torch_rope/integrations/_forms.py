"""Recognizes what transformers' rotation functions compute, and replaces them.

The functions differ in which elements pair up, which columns of the tables hold an angle, how the
tables broadcast and which dtype they return, and their source does not show it at a glance. So each
is called with random numbers, and replaced if one of the forms below gives the same results.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_rope._norm_operators import norm_apply_cos_sin
from torch_rope._operators import apply_cos_sin
from torch_rope.integrations._deferred import Normed
from torch_rope.integrations._norms import Function, NormForm, UnknownFormError
from torch_rope.integrations._proof import Columns, angles_are_doubled, first, second


@dataclass(frozen=True)
class Form:
    """What a rotation function computes.

    Attributes:
        columns: The table columns of pair n: two in "halves" (n and n + N) and in "neighbours" (2n
            and 2n + 1), one in "single".
        interleaved: Whether pairs are neighbouring elements.
        to_halves: Whether the result has interleaved pairs reordered into halves.
        conjugate: Whether pairs are rotated by the negative angle.
        last: Whether a partial rotation rotates the last elements instead of the first.
        dtype: The dtype of each result: its input's own, that of q, or its input's promoted with
            that of the tables.
        reads_both: Whether the function reads both values of a pair. They may differ.
        without_k: The result if k is None: q alone, or a pair.
    """

    columns: Columns | Literal["single"]
    interleaved: bool
    to_halves: bool
    conjugate: bool
    last: bool = False
    dtype: Literal["own", "of q", "promoted"] = "own"
    reads_both: bool = False
    without_k: Literal["q", "pair"] = "pair"

    def table(self, firsts: Tensor, seconds: Tensor) -> Tensor:
        """Returns the table with these values of the pairs."""
        return firsts if self.columns == "single" else _table(self.columns, firsts, seconds)

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Returns the tables for the operator, and whether they are full-width."""
        if self.columns == "single":
            return cos, sin, False
        if not self.reads_both or angles_are_doubled(self.columns, cos, sin):
            return first(self.columns, cos), first(self.columns, sin), False
        if self.conjugate:  # The operator's conjugate swaps the two sines of a pair.
            sin = -sin
        order: Columns = "neighbours" if self._is_interleaved() else "halves"
        if order != self.columns:
            cos, sin = (
                _table(order, first(self.columns, table), second(self.columns, table))
                for table in (cos, sin)
            )
        return cos, sin, True

    def rotate(self, x: Tensor | Normed, cos: Tensor, sin: Tensor, full_width: bool) -> Tensor:
        """Rotates a tensor by tables that broadcast with it."""
        options = self._options(x, cos, full_width)
        if isinstance(x, Normed):
            normed = self._prepare(x.x, cos)
            return norm_apply_cos_sin(normed, x.weight, cos, sin, **options, **x.options)
        return apply_cos_sin(self._prepare(x, cos), cos, sin, **options)

    def rotate_pair(
        self, q: Tensor | Normed, k: Tensor | Normed, cos: Tensor, sin: Tensor, full_width: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotates a query and a key by tables that broadcast with both."""
        options = self._options(q, cos, full_width)
        if isinstance(q, Normed) and isinstance(k, Normed) and q.options == k.options:
            pair = self._prepare(q.x, cos), self._prepare(k.x, cos)
            weights = q.weight, k.weight
            rotated = norm_apply_cos_sin(pair, weights, cos, sin, **options, **q.options)
        elif isinstance(q, Normed) or isinstance(k, Normed):
            rotated = self.rotate(q, cos, sin, full_width), self.rotate(k, cos, sin, full_width)
        else:
            pair = self._prepare(q, cos), self._prepare(k, cos)
            rotated = apply_cos_sin(pair, cos, sin, **options)
        return rotated[0], self._convert(rotated[1], q)

    def rotate_value(
        self, v: Tensor, q: Tensor, cos: Tensor, sin: Tensor, full_width: bool
    ) -> Tensor:
        """Rotates a value like a key."""
        return self._convert(self.rotate(v, cos, sin, full_width), q)

    def _convert(self, rotated: Tensor, q: Tensor | Normed) -> Tensor:
        return rotated.to(q.dtype) if self.dtype == "of q" else rotated

    def _prepare(self, x: Tensor, cos: Tensor) -> Tensor:
        if self.dtype == "promoted" and x.dtype != cos.dtype:
            x = x.to(torch.promote_types(x.dtype, cos.dtype))
        if self.to_halves:
            return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        return x

    def _is_interleaved(self) -> bool:
        return self.interleaved and not self.to_halves

    def _options(self, x: Tensor | Normed, cos: Tensor, full_width: bool) -> dict[str, Any]:
        width = cos.shape[-1] if full_width else 2 * cos.shape[-1]
        return {
            "rotary_offset": x.shape[-1] - width if self.last else 0,
            "interleaved": self._is_interleaved(),
            "conjugate": self.conjugate and not full_width,
            "full_width": full_width,
        }


def _table(columns: Columns, firsts: Tensor, seconds: Tensor) -> Tensor:
    if columns == "halves":
        return torch.cat((firsts, seconds), dim=-1)
    return torch.stack((firsts, seconds), dim=-1).flatten(-2)


def replacement(function: Function) -> Function:
    """Returns a function with the same signature and results that calls the operators.

    Args:
        function: The function to replace.

    Raises:
        UnknownFormError: If the operators cannot express it.
    """
    # The package kernels turns a decorated function into a module, and may have replaced its
    # forward.
    if isinstance(function, nn.Module):
        function = functools.partial(type(function).forward, function)
    names, defaults = _parameters(function)
    calls = _CALLS.get(names)
    if calls is None:
        raise UnknownFormError(_why_not_these(names))
    refusals: list[str] = []
    for call in calls:
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                form = _find_form(function, names, call)
        except UnknownFormError as reason:
            refusals.append(str(reason))
            continue
        ours: Any = call.make(form, function)
        ours.__defaults__ = defaults
        functools.update_wrapper(ours, function)
        ours.fuses_norms = not form.to_halves and _fuses_norms(ours, function, names, call, form)
        return ours  # type: ignore[no-any-return]
    # A reason about the arithmetic is more useful than a rejected shape.
    raise UnknownFormError(next((r for r in refusals if not r.startswith(_FAILS)), refusals[-1]))


def _parameters(function: Function) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Returns the names of a function's parameters, and the trailing defaults."""
    parameters = inspect.signature(function).parameters.values()
    defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
    # With stars, without annotations.
    names = [str(p.replace(annotation=p.empty, default=p.empty)) for p in parameters]
    return tuple(names), tuple(defaults)


def _why_not_these(names: tuple[str, ...]) -> str:
    found = f"its parameters are ({', '.join(names)})"
    tables = [name for name in ("freqs_cis", "freqs", "rope_cache") if name in names]
    return f"{found}: it takes {tables[0]}, not cos and sin" if tables else found


# ---- The replacements, one for each signature ----


def _of_pair(form: Form, original: Function) -> Function:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int) -> Any:
        cos, sin, full_width = form.tables(cos, sin)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if k is not None:
            return form.rotate_pair(q, k, cos, sin, full_width)
        rotated = form.rotate(q, cos, sin, full_width)
        return rotated if form.without_k == "q" else (rotated, None)

    return rotate


def _of_pair_with_position_ids(form: Form, original: Function) -> Function:
    rotate_pair = _of_pair(form, original)

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: object, unsqueeze_dim: int
    ) -> Any:  # position_ids are unused: the tables are already indexed by them.
        return rotate_pair(q, k, cos, sin, unsqueeze_dim)

    return rotate


def _of_pair_by_rows(form: Form, original: Function) -> Function:
    rotate_pair = _of_pair(form, original)

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, unsqueeze_dim: int
    ) -> Any:
        return rotate_pair(q, k, cos[position_ids], sin[position_ids], unsqueeze_dim)

    return rotate


def _of_three_by_rows(form: Form, original: Function) -> Function:
    def rotate(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Tensor,
        unsqueeze_dim: int,
    ) -> Any:
        cos, sin, full_width = form.tables(cos[position_ids], sin[position_ids])
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        pair = form.rotate_pair(q, k, cos, sin, full_width)
        return *pair, form.rotate_value(v, q, cos, sin, full_width)

    return rotate


def _of_pair_unsqueezed(dim: int) -> Callable[[Form, Function], Function]:
    def make(form: Form, original: Function) -> Function:
        rotate_pair = _of_pair(form, original)

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
            if options:  # Unknown: leave them to the original.
                return original(q, k, cos, sin, **options)
            return rotate_pair(q, k, cos, sin, dim)

        return rotate

    return make


def _of_pair_as_is(form: Form, original: Function) -> Function:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        if options:
            return original(q, k, cos, sin, **options)
        cos, sin, full_width = form.tables(cos, sin)
        return form.rotate_pair(q, k, cos, sin, full_width)

    return rotate


def _of_last_tokens(form: Form, original: Function) -> Function:
    rotate_all = _of_pair_as_is(form, original)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Any:
        before = q.shape[-2] - sin.shape[-2]
        if options or before == 0:
            return rotate_all(q, k, cos, sin, **options)
        if isinstance(q, Normed) or isinstance(k, Normed):  # The others are rotated by zero.
            zero = (cos.new_ones(()), sin.new_zeros(()))
            tables = (
                torch.cat((one.expand(*t.shape[:-2], before, t.shape[-1]), t), dim=-2)
                for one, t in zip(zero, (cos, sin), strict=True)
            )
            return rotate_all(q, k, *tables)
        cos, sin, full_width = form.tables(cos, sin)
        rotated = form.rotate_pair(q[..., before:, :], k[..., before:, :], cos, sin, full_width)
        return tuple(
            torch.cat((x[..., :before, :], last), dim=-2)
            for x, last in zip((q, k), rotated, strict=True)
        )

    return rotate


def _of_pair_by_complex_numbers(dim: int) -> Callable[[Form, Function], Function]:
    def make(form: Form, original: Function) -> Function:
        def rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> Any:
            table = freqs_cis.unsqueeze(dim).to(xq.device)
            return form.rotate_pair(xq, xk, table.real, table.imag, full_width=False)

        return rotate

    return make


def _of_tensor(form: Form, original: Function) -> Function:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Any:
        cos, sin, full_width = form.tables(cos, sin)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return form.rotate(x, cos, sin, full_width)

    return rotate


def _of_tensor_sin_first(form: Form, original: Function) -> Function:
    rotate_tensor = _of_tensor(form, original)

    def rotate(tensor: Tensor, sin: Tensor, cos: Tensor) -> Any:
        return rotate_tensor(tensor, cos, sin, 2)

    return rotate


# The parameters that are rotated.
_TENSORS = ("q", "k", "v", "xq", "xk", "x", "tensor")


@dataclass(frozen=True)
class _Trial:
    """The arguments of one trial call.

    Attributes:
        q, k, tables: The shapes, without the last axis.
        options: Further arguments.
        width: The size of the last axis of q and k; the tables rotate 8 elements of it.
        dtypes: The dtypes of q, k and the tables.
        with_k: Whether there is a k.
        seed: The seed of the second value of each pair; 2, that of the first, makes them equal.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    tables: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    width: int = 8
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32, torch.float32)
    with_k: bool = True
    seed: int = 2

    def arguments(self, names: tuple[str, ...], form: Form) -> dict[str, Any]:
        """Draws a function's arguments."""
        firsts, seconds = (_random((2, *self.tables, 4), seed) for seed in (2, self.seed))
        cos, sin = form.table(firsts, seconds).to(self.dtypes[2])
        q = _random((*self.q, self.width), 0).to(self.dtypes[0])
        k = _random((*self.k, self.width), 1).to(self.dtypes[1]) if self.with_k else None
        tensors = {"q": q, "x": q, "tensor": q, "k": k, "v": k, "cos": cos, "sin": sin}
        if "freqs_cis" in names:
            tensors |= {"xq": q, "xk": k, "freqs_cis": torch.complex(cos, sin)}
        return {name: tensors[name] for name in names if name in tensors} | self.options


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class _Call:
    """A calling convention.

    Attributes:
        make: Makes the replacement.
        trials: What verifies it.
    """

    make: Callable[[Form, Function], Function]
    trials: tuple[_Trial, ...]


_TOKENS = 5
_IDS = torch.tensor([[4, 0, 3, 1, 7], [2, 5, 5, 6, 0]], device="cpu")
_BY_HEADS = _Trial((2, 3, _TOKENS), (2, 2, _TOKENS), (2, _TOKENS))
_BY_TOKENS = _Trial((2, _TOKENS, 3), (2, _TOKENS, 2), (2, _TOKENS))
_PACKED = _Trial((_TOKENS, 3), (_TOKENS, 2), (_TOKENS,))
_AS_IS = (
    replace(_BY_HEADS, tables=(_TOKENS,)),
    replace(_BY_HEADS, tables=(2, 1, _TOKENS)),
)


def _with(options: dict[str, Any], *trials: _Trial) -> tuple[_Trial, ...]:
    return tuple(replace(trial, options=trial.options | options) for trial in trials)


_EITHER = _with({"unsqueeze_dim": 1}, _BY_HEADS) + _with({"unsqueeze_dim": 2}, _BY_TOKENS)
_BY_ROWS = _with({"position_ids": _IDS}, *(replace(trial, tables=(9,)) for trial in _EITHER))
_AFTER_OTHERS = replace(_AS_IS[0], q=(2, 3, _TOKENS + 2), k=(2, 2, _TOKENS + 2))

_WITHOUT_OPTION = (
    _Call(_of_pair_unsqueezed(-2), (_PACKED, _BY_TOKENS)),
    _Call(_of_pair_unsqueezed(1), (_PACKED, _BY_HEADS)),
    _Call(_of_pair_unsqueezed(2), (_BY_TOKENS,)),
    _Call(_of_last_tokens, (*_AS_IS, _AFTER_OTHERS)),
    _Call(_of_pair_as_is, (*_AS_IS, replace(_PACKED, tables=(_TOKENS, 1)))),
)

# The calling conventions for each list of parameters.
_CALLS: dict[tuple[str, ...], tuple[_Call, ...]] = {
    ("q", "k", "cos", "sin", "unsqueeze_dim"): (_Call(_of_pair, _EITHER),),
    ("q", "k", "cos", "sin", "position_ids", "unsqueeze_dim"): (
        _Call(_of_pair_with_position_ids, _EITHER + _with({"position_ids": _IDS}, *_EITHER)),
        _Call(_of_pair_by_rows, _BY_ROWS),
    ),
    ("q", "k", "v", "cos", "sin", "position_ids", "unsqueeze_dim"): (
        _Call(_of_three_by_rows, _BY_ROWS),
    ),
    ("q", "k", "cos", "sin"): _WITHOUT_OPTION,
    ("q", "k", "cos", "sin", "**kwargs"): _WITHOUT_OPTION,
    ("x", "cos", "sin", "unsqueeze_dim"): (_Call(_of_tensor, _EITHER),),
    ("xq", "xk", "freqs_cis"): (
        _Call(_of_pair_by_complex_numbers(2), (_BY_TOKENS,)),
        _Call(_of_pair_by_complex_numbers(1), (_BY_HEADS,)),
    ),
    ("tensor", "sin", "cos"): (_Call(_of_tensor_sin_first, (_BY_TOKENS,)),),
}

_FORMS = [
    Form(columns, interleaved, to_halves, conjugate)
    for columns in ("halves", "neighbours", "single")
    for interleaved, to_halves in ((False, False), (True, False), (True, True))
    for conjugate in (False, True)
]

_FAILS = "it rejects the trial tensors"


def _find_form(function: Function, names: tuple[str, ...], call: _Call) -> Form:
    """Finds the form that gives a function's results for all trials."""
    failures: list[str] = []

    def attempt(form: Form, trial: _Trial) -> Any:
        """Returns the function's result, or None if it rejects the arguments."""
        arguments = trial.arguments(names, form)
        try:
            result = function(**arguments)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            return None
        for name, before in trial.arguments(names, form).items():
            if isinstance(before, Tensor) and not torch.equal(arguments[name], before):
                raise UnknownFormError(f"it changes {name} in place")
        return result

    def fits(form: Form, **changes: Any) -> bool:
        ours = call.make(form, function)
        defaults = {"k": None, "unsqueeze_dim": 1, "position_ids": None}
        for trial in (replace(trial, **changes) for trial in call.trials):
            expected = attempt(form, trial)
            if expected is None:
                return False
            arguments = trial.arguments(names, form)
            missing = {name: defaults[name] for name in names if name in defaults} | arguments
            if not _close(ours(**missing), expected):
                return False
        return True

    form = next(filter(fits, _FORMS), None)
    if form is None:
        if len(failures) == len(_FORMS):
            raise UnknownFormError(f"{_FAILS} ({failures[0]})")
        raise UnknownFormError("it does not compute a rotation of pairs")

    trial = call.trials[0]
    fewer = tuple(2 if size == _TOKENS else size for size in trial.q)
    if trial.tables != (9,) and attempt(form, replace(trial, q=fewer)) is not None:
        raise UnknownFormError("it accepts tables with more tokens than q")

    if attempt(form, replace(trial, width=12)) is not None and not fits(form, width=12):
        form = replace(form, last=True)
        if not fits(form, width=12):
            raise UnknownFormError("it computes something else for a partial rotation")

    if not _close(attempt(form, trial), attempt(form, replace(trial, seed=3))):
        form = replace(form, reads_both=True)
        if not fits(form, seed=3):
            raise UnknownFormError("it mixes the two values that its tables have for a pair")

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    without_k = attempt(form, replace(trial, with_k=False))
    return replace(
        form,
        dtype=_dtype(attempt(form, replace(trial, dtypes=dtypes)), dtypes),
        without_k="q" if isinstance(without_k, Tensor) else "pair",
    )


def _fuses_norms(
    ours: Function, function: Function, names: tuple[str, ...], call: _Call, form: Form
) -> bool:
    """Returns whether a replacement has the results and gradients of a norm and the function."""
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        norm = nn.RMSNorm(8, eps=0.5, dtype=torch.float32)
        norm.weight.data = _random((8,), 4)
        norm_form = NormForm("eps", 0.0, keeps_dtype=True, forward=nn.RMSNorm.forward)

        def run(function: Function, trial: _Trial, is_last: bool) -> tuple[Tensor, ...]:
            arguments = trial.arguments(names, form)
            inputs = [arguments[name].requires_grad_() for name in names if name in _TENSORS]
            for name in names:
                if name not in _TENSORS:
                    continue
                if function is ours:
                    arguments[name] = Normed.of(norm, norm_form, arguments[name], is_last)
                elif not is_last:
                    arguments[name] = norm(arguments[name])
            results = function(**arguments)
            results = results if isinstance(results, tuple) else (results,)
            if function is not ours and is_last:
                results = tuple(map(norm, results))
            upstream = [_random(tuple(x.shape), 5) for x in results]
            return *results, *torch.autograd.grad(results, [*inputs, norm.weight], upstream)

        return all(
            _close(run(ours, trial, is_last), run(function, trial, is_last))
            for trial in call.trials
            for is_last in (False, True)
        )


def _dtype(results: Any, dtypes: tuple[torch.dtype, ...]) -> Literal["own", "of q", "promoted"]:
    """Returns how the results' dtypes follow from those of q, k and the tables."""
    if results is None:
        raise UnknownFormError("it rejects q, k and tables of different dtypes")
    q_dtype, k_dtype, tables_dtype = dtypes
    found = [x.dtype for x in (results if isinstance(results, tuple) else (results,))]
    kinds: dict[Literal["own", "of q", "promoted"], list[torch.dtype]] = {
        "own": [q_dtype, k_dtype, k_dtype],
        "of q": [q_dtype, q_dtype, q_dtype],
        "promoted": [tables_dtype, tables_dtype, tables_dtype],
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
