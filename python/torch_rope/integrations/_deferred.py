"""Defers a norm or a rotation, so that one call of the operators computes both.

A rewritten forward (``_forwards.py``) calls :func:`norm`, :func:`rotate`,
:func:`rotate_before_norms` and :func:`settle`. The first of a norm and its rotation only records
its arguments; the second one calls the operator. A norm that was not recognized, or that is
observed by hooks or replaced, runs where the original forward runs it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from torch_rope.integrations._norms import Function, NormForm, forms


class Normed:
    """The result of a norm that was not computed yet.

    It has the methods of a tensor that only change the shape. They return a tensor if the operators
    could not normalize the elements in their new places.

    Attributes:
        x: The norm's input with the views applied, in the dtype of the result.
        options: Those of the operator.
    """

    def __init__(
        self,
        module: nn.Module,
        given: Tensor,
        x: Tensor,
        weight: Tensor | None,
        options: dict[str, Any],
        views: tuple[tuple[str, tuple[Any, ...]], ...] = (),
    ) -> None:
        """Records a call of ``module`` with ``given``, and views of its result."""
        self.x = x
        self.options = options
        self._module = module
        self._given = given
        self._weight = weight
        self._views = views

    @staticmethod
    def of(module: nn.Module, form: NormForm, given: Tensor, is_last: bool = False) -> "Normed":
        """Records a call of a norm, which may come after the rotation of ``given``."""
        x = given
        weight: Tensor | None = getattr(module, "weight", None)
        if weight is not None and not form.keeps_dtype:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        options = {
            "eps": getattr(module, form.eps),
            "weight_offset": form.weight_offset,
            "norm_axes": None,  # Or the heads and the last axis.
            "norm_last": is_last,
        }
        return Normed(module, given, x, weight, options)

    @property
    def shape(self) -> torch.Size:
        """The shape of the result."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """The device of the result."""
        return self.x.device

    @property
    def weight(self) -> Tensor | None:
        """The norm's weight, to be broadcast with ``x``."""
        axes = self.options["norm_axes"]
        if self._weight is None or axes is None:
            return self._weight
        heads = axes[0]
        ones = [1] * (-heads - 2)
        return self._weight.view(self.shape[heads], *ones, self.shape[-1])

    def compute(self) -> Tensor:
        """Calls the norm itself, if it comes first."""
        result: Tensor = self._module(self._given)
        for name, arguments in self._views:
            result = getattr(result, name)(*arguments)
        return result

    def view(self, *shape: Any) -> "Normed | Tensor":
        """Like ``Tensor.view``."""
        return self._reshaped("view", shape, self.x.view(*shape))

    def reshape(self, *shape: Any) -> "Normed | Tensor":
        """Like ``Tensor.reshape``."""
        return self._reshaped("reshape", shape, self.x.reshape(*shape))

    def transpose(self, dim0: int, dim1: int) -> "Normed | Tensor":
        """Like ``Tensor.transpose``."""
        dims = [dim % self.x.dim() - self.x.dim() for dim in (dim0, dim1)]
        axes = self.options["norm_axes"]
        if axes is not None and axes[0] in dims:
            axes = (dims[1 - dims.index(axes[0])], -1)
        x = self.x.transpose(dim0, dim1)
        return self._viewed("transpose", (dim0, dim1), x, axes, fits=-1 not in dims)

    def unsqueeze(self, dim: int) -> "Normed | Tensor":
        """Like ``Tensor.unsqueeze``."""
        fits = self.options["norm_axes"] is None and dim not in (-1, self.x.dim())
        return self._viewed("unsqueeze", (dim,), self.x.unsqueeze(dim), None, fits)

    def _reshaped(self, name: str, shape: tuple[Any, ...], x: Tensor) -> "Normed | Tensor":
        # The order of the elements stays the same, so those that share a mean stay neighbours.
        size = self.x.shape[-1]
        if self.options["norm_axes"] is not None:
            return self._viewed(name, shape, x, None, fits=False)
        if x.shape[-1] == size:
            return self._viewed(name, shape, x, None, fits=True)
        fits = x.dim() > 1 and x.shape[-2] * x.shape[-1] == size
        return self._viewed(name, shape, x, (-2, -1), fits)

    def _viewed(
        self,
        name: str,
        arguments: tuple[Any, ...],
        x: Tensor,
        axes: tuple[int, int] | None,
        fits: bool,
    ) -> "Normed | Tensor":
        """Applies a view, after which the norm is over these axes if it fits."""
        if not fits:
            return getattr(self.compute(), name)(*arguments)  # type: ignore[no-any-return]
        options = {**self.options, "norm_axes": axes}
        views = (*self._views, (name, arguments))
        return Normed(self._module, self._given, x, self._weight, options, views)


class _Rotation:
    """A rotation of a query and a key that was not computed yet."""

    def __init__(
        self, function: Function, pair: list[Any], others: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._function = function
        self._pair = pair
        self._others = others
        self._options = options
        self._results: tuple[Tensor, Tensor] | None = None

    def add(self, index: int, module: nn.Module) -> bool:
        """Adds the norm of a result, unless the norm must run by itself."""
        x = self._pair[index]
        form = None if self._results or isinstance(x, Normed) else _form(module, x)
        if form is None:
            return False
        self._pair[index] = Normed.of(module, form, x, is_last=True)
        return True

    def result(self, index: int) -> Tensor:
        """Returns a result, with its norm."""
        if self._results is None:
            self._results = self._function(*self._pair, *self._others, **self._options)
        return self._results[index]


class Rotated:
    """One result of a rotation that was not computed yet."""

    def __init__(self, rotation: _Rotation, index: int) -> None:
        """Refers to the query or to the key."""
        self.rotation = rotation
        self.index = index


def norm(module: nn.Module, x: Any) -> Any:
    """Calls a norm now, or with the rotation before or after it."""
    if isinstance(x, Rotated):
        return x if x.rotation.add(x.index, module) else module(settle(x))
    x = settle(x)
    form = _form(module, x)
    return module(x) if form is None else Normed.of(module, form, x)


def rotate(function: Function, *arguments: Any, **options: Any) -> Any:
    """Calls a rotation function, with the norms of the tensors."""
    if not fuses_norms(function):
        arguments = tuple(settle(argument) for argument in arguments)
    return function(*arguments, **options)


def rotate_before_norms(
    function: Function, q: Any, k: Any, *others: Any, **options: Any
) -> tuple[Any, Any]:
    """Calls a rotation function now, or with the norms of its results."""
    if not fuses_norms(function) or q is None or k is None:
        rotated: tuple[Any, Any] = function(q, k, *others, **options)
        return rotated
    rotation = _Rotation(function, [q, k], others, options)
    return Rotated(rotation, 0), Rotated(rotation, 1)


def settle(x: Any) -> Any:
    """Returns a tensor, computed if it was deferred."""
    if isinstance(x, Normed):
        return x.compute()
    return x.rotation.result(x.index) if isinstance(x, Rotated) else x


def fuses_norms(function: Function) -> bool:
    """Returns whether a function takes :class:`Normed` tensors."""
    return getattr(function, "fuses_norms", False)


def _form(module: nn.Module, x: Tensor) -> NormForm | None:
    """Returns the form of a norm, or None if the module itself must run."""
    weight = getattr(module, "weight", None)
    form = forms.get((type(module), weight is not None))
    if form is None or (weight is not None and weight.shape != x.shape[-1:]):
        return None
    is_watched = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
    )
    is_replaced = "forward" in module.__dict__ or type(module).forward is not form.forward
    # CUDA's autocast runs torch.rms_norm in float32.
    if isinstance(module, nn.RMSNorm) and torch.is_autocast_enabled(x.device.type):
        return None
    is_usual = isinstance(getattr(module, form.eps), float) and all(
        getattr(module, name) == value for name, value in form.defaults
    )
    return form if is_usual and not is_watched and not is_replaced else None
