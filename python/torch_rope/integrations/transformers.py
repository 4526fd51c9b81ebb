"""Patches Hugging Face transformers' models to rotate with this package's operators.

:func:`patch` replaces the functions that rotate queries and keys in transformers' modeling modules,
and :func:`unpatch` restores them. :func:`kernel_mapping` does the same through the kernel registry
of the package ``kernels``. docs/guides/transformers.md lists the models, and the limits of both.
"""

import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torch_rope._arguments import kind_of, message
from torch_rope.integrations._forms import replacement
from torch_rope.integrations._forwards import fused_forward
from torch_rope.integrations._norms import Function, UnknownFormError
from torch_rope.integrations._proof import forget, prove

__all__ = ["FUNCTIONS", "Patch", "kernel_mapping", "patch", "unpatch"]

#: The functions that :func:`patch` looks for in a module.
FUNCTIONS = (
    "apply_rotary_pos_emb",
    "apply_rotary_pos_emb_interleave",
    "apply_rotary_pos_emb_vision",
    "apply_rotary_emb",
)

# Where patch() looks by default: transformers, and code it loads from model repositories.
_PACKAGES = ("transformers.models.", "transformers_modules.")

_PATCH = "torch_rope.integrations.transformers.patch"
_UNPATCH = "torch_rope.integrations.transformers.unpatch"

# What has functions that are replaced: modules, and classes of layers.
_Owner = ModuleType | type[nn.Module]

# The original and the replacement, by owner and name.
_replaced: dict[tuple[_Owner, str], tuple[Function, Function]] = {}

# Held while anything is replaced or restored: what another thread has replaced is no original.
_lock = threading.Lock()


@dataclass
class Patch:
    r"""The result of one call of :func:`patch`; a context manager that reverts it on exit.

    Attributes:
        replaced: The functions that the call replaced, as ``module.function``.
        already: The functions, and the classes with a forward, that an earlier call had replaced;
            they stay replaced on exit.
        left_alone: The functions that the operators cannot express, each with the reason.
        fused: The classes, as ``module.class``, whose forward runs norms and rotations together
            since the call.
        norms_left_alone: The classes that have norms next to a rotation and keep their forward,
            each with the reason.

    Example:
        >>> from transformers.models.qwen3 import modeling_qwen3
        >>> from torch_rope.integrations.transformers import patch
        >>> with patch(modeling_qwen3) as done:
        ...     print(done.replaced, done.fused, sep="\n")
        ['transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb']
        ['transformers.models.qwen3.modeling_qwen3.Qwen3Attention']
    """

    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    norms_left_alone: dict[str, str] = field(default_factory=dict)
    _installed: list[Function] = field(default_factory=list, repr=False)
    _proven: list[nn.Module] = field(default_factory=list, repr=False)

    def unpatch(self) -> None:
        """Restores what this call replaced."""
        with _lock:
            for key, (_, ours) in list(_replaced.items()):
                if any(ours is one for one in self._installed):
                    _restore(*key)
            self.replaced.clear()
            self.fused.clear()
            self._installed.clear()
            forget(self._proven)

    def __enter__(self) -> "Patch":
        """Returns itself; the functions are already replaced."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restores what the call replaced."""
        self.unpatch()


def patch(model_or_module: nn.Module | ModuleType | None = None, *, norms: bool = True) -> Patch:
    """Makes transformers' models rotate queries and keys with ``torch_rope.apply_cos_sin``.

    Replaces the functions named in :data:`FUNCTIONS` in modeling modules by functions with the same
    signature, output layout and dtypes. Each is first called with random numbers, and replaced only
    if the operators give the same results. Patching a module affects all models that it defines,
    existing and future. Models train, compile and generate as before.

    Where an attention class normalizes queries and keys with an RMSNorm before or after the
    function, with nothing in between but views, its forward is replaced as well, and
    ``torch_rope.norm_apply_cos_sin`` computes both. The weights and epsilon are those of the
    layer's norms at the time of the call. A norm with hooks, a replaced one and one of another
    class are called as before.

    A model's tables have two values per pair, which the functions pass on with ``full_width=True``.
    If a model is given, its rotary modules are also called with random positions: if the two values
    always agree, only half of each table is passed on, which gives the same bits. Tables are never
    inspected in a call.

    Results match the original up to rounding: a few units in the last place in float32; in bfloat16
    and float16 the original rounds after each step, the replacement once.

    Args:
        model_or_module: A model, to patch the modules that define its parts; a Python module, to
            patch it; or None, to patch all modules of ``transformers.models`` imported so far, and
            code that transformers loaded from model repositories. Modules imported later are not
            patched: create the model first, or pass it.
        norms: Whether to replace the forwards of attention classes, too.

    Returns:
        What was replaced, what was already replaced and what was left alone. Use it as a context
        manager to revert the call; functions that an earlier call replaced stay as they are.

    Raises:
        ValueError: If none of the modules has such a function.
        TypeError: If the argument is not a model, a module or None.

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
    modules = _modules(model_or_module)
    with _lock:
        found = [module for module in modules if _patch_functions(module, done)]
        for module in found:
            _patch_forwards(module, done, norms)
        if not found:
            rule = f"have one of the functions {', '.join(FUNCTIONS)} in its modules"
            raise ValueError(message(_PATCH, "model_or_module", rule, _describe(model_or_module)))
        if isinstance(model_or_module, nn.Module):
            done._proven = prove(model_or_module)
    return done


def unpatch(model_or_module: nn.Module | ModuleType | None = None) -> None:
    """Restores what :func:`patch` replaced.

    Args:
        model_or_module: As for :func:`patch`; None restores everything.

    Raises:
        TypeError: If the argument is not a model, a module or None.

    Example:
        >>> from transformers.models.llama import modeling_llama
        >>> from torch_rope.integrations.transformers import patch, unpatch
        >>> original = modeling_llama.apply_rotary_pos_emb
        >>> _ = patch(modeling_llama)
        >>> unpatch()
        >>> modeling_llama.apply_rotary_pos_emb is original
        True
    """
    modules = None if model_or_module is None else _modules(model_or_module, _UNPATCH)
    with _lock:
        if isinstance(model_or_module, nn.Module):
            forget(list(model_or_module.modules()))
        elif model_or_module is None:
            forget()
        for owner, name in list(_replaced):
            module = sys.modules.get(owner.__module__) if isinstance(owner, type) else owner
            if modules is None or module in modules:
                _restore(owner, name)


def _patch_functions(module: ModuleType, done: Patch) -> bool:
    """Replaces the functions of a module; returns whether it has any."""
    found = False
    for name in FUNCTIONS:
        original = vars(module).get(name)
        if original is None:
            continue
        found = True
        if _is_ours(module, name):
            done.already.append(_name(module, name))
            continue
        try:
            ours = replacement(original)
        except UnknownFormError as reason:
            done.left_alone[_name(module, name)] = str(reason)
            continue
        _install(module, name, ours, done)
        done.replaced.append(_name(module, name))
    return found


def _patch_forwards(module: ModuleType, done: Patch, norms: bool) -> None:
    """Replaces forwards of classes that have norms next to rotations, if ``norms``."""
    for layer in list(vars(module).values()):
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
            continue
        if layer.__module__ != module.__name__ or "forward" not in vars(layer):
            continue
        if _is_ours(layer, "forward"):
            done.already.append(_name(module, layer.__name__))
            continue
        if not norms:
            continue
        try:
            ours = fused_forward(layer, FUNCTIONS)
        except UnknownFormError as reason:
            done.norms_left_alone[_name(module, layer.__name__)] = str(reason)
            continue
        if ours is not None:
            _install(layer, "forward", ours, done)
            done.fused.append(_name(module, layer.__name__))


def _is_ours(owner: _Owner, name: str) -> bool:
    return (owner, name) in _replaced and vars(owner).get(name) is _replaced[owner, name][1]


def _install(owner: _Owner, name: str, ours: Function, done: Patch) -> None:
    _replaced[owner, name] = vars(owner)[name], ours
    setattr(owner, name, ours)
    done._installed.append(ours)


def _restore(owner: _Owner, name: str) -> None:
    original, ours = _replaced.pop((owner, name))
    if vars(owner).get(name) is ours:  # Otherwise somebody else replaced it later.
        setattr(owner, name, original)


def _name(module: ModuleType, function: str) -> str:
    return f"{module.__name__}.{function}"


def _modules(
    model_or_module: nn.Module | ModuleType | None, function: str = _PATCH
) -> list[ModuleType]:
    """Returns the modules that may have such functions."""
    if isinstance(model_or_module, ModuleType):
        return [model_or_module]
    if not (model_or_module is None or isinstance(model_or_module, nn.Module)):
        rule = "be a model, a Python module or None"
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
        return "None, and no imported module of transformers.models has one"
    if isinstance(model_or_module, ModuleType):
        return f"the module {model_or_module.__name__}"
    return type(model_or_module).__name__


# ---- The kernel registry ----


class _RotaryPosEmb(nn.Module):
    """Its forward replaces that of the layer that transformers makes from a function.

    ``self`` is then that layer, and its class identifies the function.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rotates like the function."""
        rotated: tuple[Tensor, Tensor] = _kernels[_index(type(self))](q, k, cos, sin, unsqueeze_dim)
        return rotated


# The replacements of layers' own forwards, and the index of each by the layer's class.
_kernels: list[Function] = []
_indices: dict[type[nn.Module], int] = {}


# torch.compile cannot trace how a function is recognized.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _index(layer: type[nn.Module]) -> int:
    """Returns the index of the replacement of the layer's own forward."""
    if layer not in _indices:
        original = layer()
        try:
            kernel = replacement(original)
        except UnknownFormError:
            kernel = original
        _kernels.append(kernel)
        _indices[layer] = len(_kernels) - 1
    return _indices[layer]


class _Repository:
    """Serves the layer to the registry from here instead of a hub."""

    def load(self) -> type[nn.Module]:
        """Returns the layer."""
        return _RotaryPosEmb


def kernel_mapping() -> dict[str, dict[str, dict[Any, Any]]]:
    """Returns an entry for the kernel registry that transformers uses.

    The registry, the package ``kernels``, replaces the functions that transformers marks with
    ``use_kernel_forward_from_hub("rotary_pos_emb")``. This entry works for inference and training,
    compiled or not, on CPU and CUDA; nothing is downloaded.

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
