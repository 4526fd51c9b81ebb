"""Differentiable calls of every kind, small enough for numerical derivatives."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch_rope
from reference import random_inv_freq, random_positions, random_values
from torch import Tensor

# Where each argument of a mapped function has the batch.
Dims = tuple[int | None, ...]


def doubles(*shape: int, device: str, seed: int = 0) -> Tensor:
    """Returns random float64 numbers."""
    return random_values(shape, torch.float64, device, seed=seed)


def small_positions(*shape: int, device: str) -> Tensor:
    """Returns float64 positions, small for numerical derivatives."""
    return random_positions(shape, torch.float64, device, low=-8, high=8)


def frequencies(*shape: int, device: str) -> Tensor:
    """Returns float64 frequencies."""
    return random_inv_freq(shape, torch.float64, device)


def any_mapped(dims: Dims) -> bool:
    """Whether any argument is mapped."""
    return any(dim is not None for dim in dims)


def in_place(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a differentiable function of an operator that works in place."""

    def function(x: Any, *arguments: Any, **options: Any) -> Any:
        copies = x.clone() if isinstance(x, Tensor) else tuple(one.clone() for one in x)
        return operator(copies, *arguments, **options)

    return function


# apply and apply_cos_sin, as functions of tensors that stay what they were.
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "functional": (torch_rope.apply, torch_rope.apply_cos_sin),
    "in place": (in_place(torch_rope.apply_), in_place(torch_rope.apply_cos_sin_)),
}


# norm_apply and norm_apply_cos_sin, likewise.
NORM_FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "functional": (torch_rope.norm_apply, torch_rope.norm_apply_cos_sin),
    "in place": (in_place(torch_rope.norm_apply_), in_place(torch_rope.norm_apply_cos_sin_)),
}


@dataclass(frozen=True)
class Case:
    """A differentiable call: how the operators of a form are called, and on what.

    Attributes:
        call: Takes ``apply``, ``apply_cos_sin`` and the inputs; or ``norm_apply``,
            ``norm_apply_cos_sin`` and the inputs.
        inputs: Makes the inputs, those that are rotated first.
        num_rotated: How many those are.
        num_weights: How many weights follow them.
        normalizes: Whether the operators are those that normalize.
    """

    call: Callable[..., Any]
    inputs: Callable[[str], tuple[Tensor, ...]]
    num_rotated: int = 1
    num_weights: int = 0
    normalizes: bool = False

    def results(self, form: str, *inputs: Tensor) -> Any:
        """Returns what the operator returns."""
        forms = NORM_FORMS if self.normalizes else FORMS
        return self.call(*forms[form], *inputs)

    def function(self, form: str) -> Callable[..., Tensor]:
        """Returns the call as one flat tensor of the inputs."""

        def function(*inputs: Tensor) -> Tensor:
            result = self.results(form, *inputs)
            parts = (result,) if isinstance(result, Tensor) else result
            return torch.cat([part.flatten() for part in parts])

        return function

    def loss(self, form: str) -> Callable[..., Tensor]:
        """Returns a number with second derivatives of every input."""
        function = self.function(form)
        return lambda *inputs: function(*inputs).sin().sum()

    def maps(self, form: str) -> list[Dims]:
        """Returns every choice of what to map; in place, what is rotated must be mapped."""
        every = product((None, 0), repeat=len(self.inputs("cpu")))
        return [
            dims
            for dims in every
            if any_mapped(dims) and (form == "functional" or None not in dims[: self.num_rotated])
        ]


def _rows(*rows: int, device: torch.device) -> Tensor:
    """Returns rows of a table, of which one is used twice and one never."""
    return torch.tensor(rows, device=device)


ROTATIONS: dict[str, Case] = {
    "half-split": Case(
        lambda apply, _, x, p: apply(x, p, max_wavelength=50.0, scale_factor=0.7),
        lambda device: (doubles(2, 4, device=device), small_positions(2, device=device)),
    ),
    "interleaved": Case(
        lambda apply, _, x, p, f: apply(x, p, f, interleaved=True, conjugate=True),
        lambda device: (
            doubles(2, 4, device=device),
            small_positions(1, device=device),
            frequencies(2, device=device),
        ),
    ),
    "partial": Case(
        lambda apply, _, x, p, f: apply(x, p, f, rotary_offset=1, attention_factor=-1.3),
        lambda device: (
            doubles(2, 6, device=device),
            small_positions(2, device=device),
            frequencies(2, device=device),
        ),
    ),
    "axes": Case(
        lambda apply, _, x, p, f: apply(x, p, f, embedding_axis=0, attention_factor=1.3),
        lambda device: (
            doubles(4, 2, device=device),
            small_positions(2, 2, device=device),
            frequencies(2, 2, device=device),
        ),
    ),
    "axes of one position": Case(
        lambda apply, _, x, p, f: apply(x, p, f, interleaved=True),
        lambda device: (
            doubles(2, 2, device=device),
            small_positions(2, device=device),
            frequencies(2, 1, device=device),
        ),
    ),
    "pair": Case(
        lambda apply, _, q, k, p: apply((q, k), p, rotary_dim=2, interleaved=True),
        lambda device: (
            doubles(2, 1, 4, device=device),
            doubles(2, 2, 2, device=device, seed=1),
            small_positions(2, 1, device=device),
        ),
        num_rotated=2,
    ),
    "pair of ranks": Case(
        lambda apply, _, q, k, p, f: apply((q, k), p, f, embedding_axis=1, conjugate=True),
        lambda device: (
            doubles(2, 2, 1, device=device),
            doubles(1, 3, device=device, seed=1),
            small_positions(1, device=device),
            frequencies(1, device=device),
        ),
        num_rotated=2,
    ),
    "tables": Case(
        lambda _, apply_cos_sin, x, c, s: apply_cos_sin(x, c, s, rotary_offset=1),
        lambda device: (
            doubles(2, 5, device=device),
            doubles(2, 2, device=device, seed=1),
            doubles(2, 2, device=device, seed=2),
        ),
    ),
    "tables for all": Case(
        lambda _, apply_cos_sin, x, c, s: apply_cos_sin(x, c, s, interleaved=True, conjugate=True),
        lambda device: (
            doubles(2, 4, device=device),
            doubles(2, device=device, seed=1),
            doubles(2, device=device, seed=2),
        ),
    ),
    "full-width tables": Case(
        lambda _, apply_cos_sin, x, c, s: apply_cos_sin(
            x, c, s, rotary_offset=1, conjugate=True, full_width=True
        ),
        lambda device: (
            doubles(2, 5, device=device),
            doubles(2, 4, device=device, seed=1),
            doubles(2, 4, device=device, seed=2),
        ),
    ),
    "full-width rows": Case(
        lambda _, apply_cos_sin, q, k, c, s: apply_cos_sin(
            (q, k), c, s, _rows(2, 0, device=q.device), interleaved=True, full_width=True
        ),
        lambda device: (
            doubles(2, 2, device=device),
            doubles(2, 3, device=device, seed=1),
            doubles(3, 2, device=device, seed=2),
            doubles(3, 2, device=device, seed=3),
        ),
        num_rotated=2,
    ),
    "rows": Case(
        lambda _, apply_cos_sin, x, c, s: apply_cos_sin(
            x, c, s, _rows(1, 0, 1, device=x.device), interleaved=True
        ),
        lambda device: (
            doubles(3, 2, device=device),
            doubles(3, 1, device=device, seed=1),
            doubles(3, 1, device=device, seed=2),
        ),
    ),
    "pair of rows": Case(
        lambda _, apply_cos_sin, q, k, c, s: apply_cos_sin(
            (q, k), c, s, _rows(2, 0, device=q.device)
        ),
        lambda device: (
            doubles(2, 2, device=device),
            doubles(2, 3, device=device, seed=1),
            doubles(3, 1, device=device, seed=2),
            doubles(3, 1, device=device, seed=3),
        ),
        num_rotated=2,
    ),
}

NORMS: dict[str, Case] = {
    "norm": Case(
        lambda apply, _, x, w, p: apply(
            x, w, p, max_wavelength=50.0, scale_factor=0.7, attention_factor=-1.3, eps=0.1
        ),
        lambda device: (
            doubles(2, 4, device=device),
            doubles(4, device=device, seed=1),
            small_positions(2, device=device),
        ),
        num_weights=1,
        normalizes=True,
    ),
    "norm of a part": Case(
        lambda apply, _, x, w, p, f: apply(
            x, w, p, f, rotary_offset=1, conjugate=True, weight_offset=1.0
        ),
        lambda device: (
            doubles(2, 6, device=device),
            doubles(2, 6, device=device, seed=1),
            small_positions(2, device=device),
            frequencies(2, device=device),
        ),
        num_weights=1,
        normalizes=True,
    ),
    "norm after the rotation": Case(
        lambda apply, _, x, w, p, f: apply(
            x, w, p, f, interleaved=True, attention_factor=1.3, norm_last=True, eps=0.1
        ),
        lambda device: (
            doubles(2, 5, device=device),
            doubles(1, 5, device=device, seed=1),
            small_positions(2, 2, device=device),
            frequencies(2, 2, device=device),
        ),
        num_weights=1,
        normalizes=True,
    ),
    "norm without a weight": Case(
        lambda apply, _, x, p: apply(x, None, p, embedding_axis=0, norm_axes=(1, 0)),
        lambda device: (doubles(4, 2, device=device), small_positions(2, device=device)),
        normalizes=True,
    ),
    "norm over heads": Case(
        lambda apply, _, q, k, w, v, p: apply(
            (q, k), (w, v), p, rotary_dim=2, norm_axes=(-2, -1), eps=0.1
        ),
        lambda device: (
            doubles(2, 2, 4, device=device),
            doubles(2, 1, 2, device=device, seed=1),
            doubles(2, 4, device=device, seed=2),
            doubles(2, device=device, seed=3),
            small_positions(2, 1, device=device),
        ),
        num_rotated=2,
        num_weights=2,
        normalizes=True,
    ),
    "norm of ranks": Case(
        lambda apply, _, q, k, w, p: apply(
            (q, k), (None, w), p, embedding_axis=1, norm_axes=[0, 1], norm_last=True
        ),
        lambda device: (
            doubles(2, 2, 1, device=device),
            doubles(1, 2, device=device, seed=1),
            doubles(2, device=device, seed=2),
            small_positions(1, device=device),
        ),
        num_rotated=2,
        num_weights=1,
        normalizes=True,
    ),
    "norm with tables": Case(
        lambda _, apply_cos_sin, x, w, c, s: apply_cos_sin(
            x, w, c, s, rotary_offset=1, weight_offset=1.0, eps=0.1
        ),
        lambda device: (
            doubles(2, 5, device=device),
            doubles(5, device=device, seed=1),
            doubles(2, 2, device=device, seed=2),
            doubles(2, 2, device=device, seed=3),
        ),
        num_weights=1,
        normalizes=True,
    ),
    "norm after full-width rows": Case(
        lambda _, apply_cos_sin, q, k, w, c, s: apply_cos_sin(
            (q, k),
            (w, None),
            c,
            s,
            _rows(2, 0, device=q.device),
            interleaved=True,
            conjugate=True,
            full_width=True,
            norm_last=True,
            eps=0.1,
        ),
        lambda device: (
            doubles(2, 2, device=device),
            doubles(2, 3, device=device, seed=1),
            doubles(2, 2, device=device, seed=2),
            doubles(3, 2, device=device, seed=3),
            doubles(3, 2, device=device, seed=4),
        ),
        num_rotated=2,
        num_weights=1,
        normalizes=True,
    ),
}

CASES = ROTATIONS | NORMS
