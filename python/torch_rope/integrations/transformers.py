"""The rotation of Hugging Face transformers' models, by this package's operators.

:func:`patch` replaces the functions that rotate queries and keys in transformers' modeling modules,
and :func:`unpatch` puts them back. :func:`kernel_mapping` offers the same to the kernel registry of
the package ``kernels``. docs/transformers.md lists the models, and what either way cannot do.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torch_rope._arguments import kind_of, message
from torch_rope.integrations._forms import Function, UnknownFormError, replacement
from torch_rope.integrations._proof import forget, prove

__all__ = ["FUNCTIONS", "Patch", "kernel_mapping", "patch", "unpatch"]

#: The functions that :func:`patch` looks for in a module.
FUNCTIONS = (
    "apply_rotary_pos_emb",
    "apply_rotary_pos_emb_interleave",
    "apply_rotary_pos_emb_vision",
)

# Where patch() looks if it is not told: transformers, and code it loads from model repositories.
_PACKAGES = ("transformers.models.", "transformers_modules.")

_PATCH = "torch_rope.integrations.transformers.patch"
_UNPATCH = "torch_rope.integrations.transformers.unpatch"

# What was replaced, by its module and name, and what took its place.
_replaced: dict[tuple[ModuleType, str], tuple[Function, Function]] = {}


@dataclass
class Patch:
    """What one call of :func:`patch` did. As a context manager it undoes that at the end.

    Attributes:
        replaced: The functions that the call replaced, as ``module.function``.
        already: The functions that an earlier call had replaced, which stay replaced at the end.
        left_alone: The functions that the operators do not express, each with the reason.
    """

    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    _installed: list[Function] = field(default_factory=list, repr=False)
    _proven: list[nn.Module] = field(default_factory=list, repr=False)

    def unpatch(self) -> None:
        """Puts back what this call replaced."""
        for key, (_, ours) in list(_replaced.items()):
            if any(ours is one for one in self._installed):
                _put_back(*key)
        self.replaced.clear()
        self._installed.clear()
        forget(self._proven)

    def __enter__(self) -> "Patch":
        """Returns itself: the functions are replaced already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts back what the call replaced."""
        self.unpatch()


def patch(model_or_module: nn.Module | ModuleType | None = None) -> Patch:
    """Makes models of transformers rotate queries and keys by ``torch_rope.apply_cos_sin``.

    Replaces the functions named in :data:`FUNCTIONS` in modeling modules by functions of the same
    signature, output layout and dtypes. Each is tried on random numbers first, and replaced only if
    the operators give what it gives; others are left alone. A module is patched for all models that
    it defines, existing and future. Models train, compile and generate as before.

    A model's tables have two values for each pair, and the functions get both: they are passed on
    with ``full_width=True``. Of a model that is given here, the rotary modules are also called with
    random positions; tables of one whose two values always agree are passed on by halves, which is
    the same to the bit. Tables are never inspected in a call.

    Results are those of the original up to rounding: in float32 within a few units in the last
    place; in bfloat16 and float16 the original rounds after each step, this once.

    Args:
        model_or_module: A model: the modules that define its parts are patched. A module: itself.
            None: all modules of ``transformers.models`` imported so far, and code that transformers
            loaded from model repositories. Modules imported later are not patched: create the model
            first, or pass it.

    Returns:
        What was replaced, what was replaced already and what was left alone, to be used as a
        context manager if the change is to end. What is replaced already is left to the earlier
        call.

    Raises:
        ValueError: If none of the modules has such a function.
        TypeError: If the argument is neither a model nor a module.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from torch_rope.integrations.transformers import patch
        >>> config = LlamaConfig(
        ...     vocab_size=99,
        ...     hidden_size=64,
        ...     intermediate_size=64,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> with patch(model) as done:
        ...     loss = model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss
        ...     loss.backward()
        >>> done.left_alone
        {}
    """
    done = Patch()
    found = False
    for module in _modules(model_or_module):
        for name in FUNCTIONS:
            original = vars(module).get(name)
            if original is None:
                continue
            found = True
            if (module, name) in _replaced and original is _replaced[module, name][1]:
                done.already.append(_name(module, name))
                continue
            try:
                ours = replacement(original)
            except UnknownFormError as reason:
                done.left_alone[_name(module, name)] = str(reason)
                continue
            _replaced[module, name] = original, ours
            setattr(module, name, ours)
            done.replaced.append(_name(module, name))
            done._installed.append(ours)
    if not found:
        rule = f"have one of the functions {', '.join(FUNCTIONS)} in its modules"
        raise ValueError(message(_PATCH, "model_or_module", rule, _describe(model_or_module)))
    if isinstance(model_or_module, nn.Module):
        done._proven = prove(model_or_module)
    return done


def unpatch(model_or_module: nn.Module | ModuleType | None = None) -> None:
    """Puts back what :func:`patch` replaced.

    Args:
        model_or_module: As for :func:`patch`; None puts everything back.

    Raises:
        TypeError: If the argument is neither a model nor a module.
    """
    modules = None if model_or_module is None else _modules(model_or_module, _UNPATCH)
    if isinstance(model_or_module, nn.Module):
        forget(list(model_or_module.modules()))
    elif model_or_module is None:
        forget()
    for module, name in list(_replaced):
        if modules is None or module in modules:
            _put_back(module, name)


def _put_back(module: ModuleType, name: str) -> None:
    original, ours = _replaced.pop((module, name))
    if vars(module).get(name) is ours:  # Else somebody replaced it after us.
        setattr(module, name, original)


def _name(module: ModuleType, function: str) -> str:
    return f"{module.__name__}.{function}"


def _modules(
    model_or_module: nn.Module | ModuleType | None, function: str = _PATCH
) -> list[ModuleType]:
    """Returns the modules that may have such functions."""
    if isinstance(model_or_module, ModuleType):
        return [model_or_module]
    if not (model_or_module is None or isinstance(model_or_module, nn.Module)):
        rule = "be a model, a module of Python or None"
        raise TypeError(message(function, "model_or_module", rule, kind_of(model_or_module)))
    names: Iterable[str]
    if model_or_module is None:
        names = [name for name in sys.modules if name.startswith(_PACKAGES)]
    else:
        layers = {type(layer) for layer in model_or_module.modules()}
        names = dict.fromkeys(base.__module__ for layer in layers for base in layer.__mro__)
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _describe(model_or_module: nn.Module | ModuleType | None) -> str:
    if model_or_module is None:
        return "None, with nothing imported of transformers.models that has one"
    if isinstance(model_or_module, ModuleType):
        return f"the module {model_or_module.__name__}"
    return type(model_or_module).__name__


# The registry of kernels.


class _RotaryPosEmb(nn.Module):
    """Takes the forward of a layer that transformers made of its function.

    ``self`` is that layer, so its class tells what the function computes.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotates as the function does."""
        rotated: tuple[Tensor, Tensor] = _kernels[_number(type(self))](
            q, k, cos, sin, unsqueeze_dim
        )
        return rotated


# What rotates as a layer's own forward does, and where it stands, by the layer's class.
_kernels: list[Function] = []
_numbers: dict[type[nn.Module], int] = {}


# A compiler cannot follow how a function is recognised.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number(layer: type[nn.Module]) -> int:
    """Returns the number of what rotates as the layer's own forward does."""
    if layer not in _numbers:
        original = layer()
        try:
            kernel = replacement(original)
        except UnknownFormError:
            kernel = original
        _kernels.append(kernel)
        _numbers[layer] = len(_kernels) - 1
    return _numbers[layer]


class _Repository:
    """Where the registry gets the layer: from here, and not from a hub."""

    def load(self) -> type[nn.Module]:
        """Returns the layer."""
        return _RotaryPosEmb


def kernel_mapping() -> dict[str, dict[str, dict[Any, Any]]]:
    """Returns the operators as an entry of the kernel registry that transformers uses.

    The registry, the package ``kernels``, replaces the functions that transformers marks with
    ``use_kernel_forward_from_hub("rotary_pos_emb")``. This entry serves them for inference and
    training, compiled or not, on CPU and CUDA; nothing is downloaded.

    Returns:
        A mapping for ``kernels.register_kernel_mapping`` or ``kernels.use_kernel_mapping``.

    Raises:
        ImportError: If the package ``kernels`` is not installed.

    Example:
        >>> from kernels import register_kernel_mapping
        >>> from torch_rope.integrations.transformers import kernel_mapping
        >>> register_kernel_mapping(kernel_mapping())
    """
    mode = import_module("kernels").Mode
    repository = _Repository()
    modes = {
        mode.INFERENCE | mode.TORCH_COMPILE: repository,
        mode.TRAINING | mode.TORCH_COMPILE: repository,
    }
    return {"rotary_pos_emb": {device: dict(modes) for device in ("cpu", "cuda")}}


def __dir__() -> list[str]:
    return sorted(__all__)
