"""Proves, for a rotary module, that the two values per pair in its tables are always equal.

NOTE [ The proof ]
transformers' tables have two values per pair. Usually they are equal and half a table is enough; in
some models they differ for some positions. Full-width tables are correct either way, so they are
the default, and using half a table needs justification. The values in a call cannot give it: they
do not predict the next call, reading them synchronizes with the device, and recomputation,
transforms and compilers would not read them.

Instead, when a model is patched, ``prove`` calls a copy of its rotary module: with positions that
differ on every axis, in every shape that the module accepts, in training and evaluation mode, and
with random buffers and parameters, so that values loaded or learned later do not matter. If the two
values always agree, a forward hook registers each table that the module returns, as long as the
module's class, forward, hooks and attributes stay the same. The replaced function uses half a table
if that tensor object is registered and unmodified since. A cast, a slice, an in-place change, a
tensor subclass, another or a changed rotary module, or a compiler, which cannot track tensor
identity, all lead to full-width tables. The calls cannot detect code that fills the halves
differently for other inputs, or that bypasses version counting to write to a table (``.data``,
NumPy).
"""

import copy
import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle

Columns = Literal["halves", "neighbours"]

_COLUMNS: tuple[Columns, ...] = ("halves", "neighbours")

# The extra axes of positions, in front and at the end: none, or one axis of size 1 to 6.
_AXES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
_AXES += [axes for n in range(1, 7) for axes in (((n,), ()), ((), (n,)))]

# (low, high) of the positions, number of tokens, dtype of x, training mode. Frequencies may depend
# on the length.
_RANGES = [
    (0, 64, 7, torch.float32, False),
    (0, 1 << 20, 40, torch.bfloat16, True),
    (-(1 << 20), 1 << 20, 9, torch.float32, True),
    (1 << 20, 1 << 31, 3, torch.float16, False),
]

# Registered tables by id: the tensor, its version, and the columns that agree.
_registered: dict[int, tuple["weakref.ref[Tensor]", int, frozenset[Columns]]] = {}

# The hooks of proven modules.
_proven: "weakref.WeakKeyDictionary[nn.Module, tuple[_Proof, RemovableHandle]]"
_proven = weakref.WeakKeyDictionary()


def first(columns: Columns, table: Tensor) -> Tensor:
    """Returns a view of the first value of each pair."""
    return table[..., ::2] if columns == "neighbours" else table[..., : table.shape[-1] // 2]


def second(columns: Columns, table: Tensor) -> Tensor:
    """Returns a view of the second value of each pair."""
    return table[..., 1::2] if columns == "neighbours" else table[..., table.shape[-1] // 2 :]


def angles_are_doubled(columns: Columns, cos: Tensor, sin: Tensor) -> bool:
    """Returns whether both tables are proven to have equal values in each pair."""
    return not is_compiling() and _is_registered(columns, cos) and _is_registered(columns, sin)


class _Proof:
    """The forward hook of a proven module.

    Attributes:
        columns: The columns in which the two values of a pair agree.
        state: The module's state at the time of the proof.
        has_ended: Whether ``forget`` ended the proof, also for copies of the module.
    """

    def __init__(self, columns: frozenset[Columns], module: nn.Module) -> None:
        self.columns = columns
        self.state = _state(module)
        self.has_ended = False

    def __deepcopy__(self, memo: object) -> "_Proof":
        return self

    def __call__(self, module: nn.Module, arguments: object, tables: object) -> None:
        """Registers the tables that the module returned."""
        if self.has_ended or is_compiling() or not isinstance(tables, tuple):
            return
        if _has_other_hooks(module) or _state(module) != self.state:
            return
        for table in tables:
            # Inference tensors have no version, so in-place changes would go unnoticed.
            if type(table) is Tensor and not table.is_inference():
                _register(table, self.columns)


def prove(model: nn.Module) -> list[nn.Module]:
    """Tries to prove a model's rotary modules; returns the newly proven ones."""
    added = []
    for module in model.modules():
        if module in _proven or not _is_rotary(module):
            continue
        columns = _doubled_columns(module)
        if columns:
            proof = _Proof(columns, module)
            _proven[module] = proof, module.register_forward_hook(proof)
            added.append(module)
    return added


def forget(modules: list[nn.Module] | None = None) -> None:
    """Ends the proofs of these modules, by default of all."""
    for module in list(_proven) if modules is None else modules:
        if module in _proven:
            proof, handle = _proven.pop(module)
            proof.has_ended = True
            handle.remove()


def _is_registered(columns: Columns, table: Tensor) -> bool:
    entry = _registered.get(id(table))
    if entry is None:
        return False
    reference, version, doubled = entry
    return reference() is table and table._version == version and columns in doubled


def _register(table: Tensor, columns: frozenset[Columns]) -> None:
    entry = _registered.get(id(table))
    if entry is not None and entry[0]() is table:
        # The module returned the same tensor again; it may have been modified.
        columns = entry[2] if entry[1] == table._version else frozenset()
    reference = weakref.ref(table, functools.partial(_unregister, id(table)))
    _registered[id(table)] = reference, table._version, columns


def _unregister(key: int, reference: "weakref.ref[Tensor]") -> None:
    entry = _registered.get(key)
    if entry is not None and entry[0] is reference:
        del _registered[key]


def _state(module: nn.Module) -> object:
    """Returns what a module's tables may depend on besides its tensors and training mode."""
    attributes = {
        name: _frozen(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training"
    }
    return type(module), type(module).forward, attributes


def _has_other_hooks(module: nn.Module) -> bool:
    """Returns whether a foreign hook may change a module's inputs or outputs."""
    hooks = (*module._forward_hooks.values(), *_global_forward_hooks.values())
    others = any(not isinstance(hook, _Proof) for hook in hooks)
    return others or bool(module._forward_pre_hooks or _global_forward_pre_hooks)


def _frozen(value: object) -> object:
    """Returns a snapshot that compares unequal after the value changes."""
    if isinstance(value, dict):
        return [(key, _frozen(one)) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [_frozen(one) for one in value]
    # The type of other objects: a copy of the module has its own instances.
    return value if isinstance(value, int | float | str | None) or callable(value) else type(value)


def _is_rotary(module: nn.Module) -> bool:
    """Returns whether a module is a rotary module that can be copied and probed."""
    own = vars(module)
    if "forward" in own or any(isinstance(value, Tensor) for value in own.values()):
        return False
    if _has_other_hooks(module) or not all(t.is_floating_point() for t in module.buffers()):
        return False
    try:
        parameters = tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # Not a Python function.
        return False
    return parameters in (("x", "position_ids"), ("x", "position_ids", "layer_type"))


def _doubled_columns(module: nn.Module) -> frozenset[Columns]:
    """Returns the columns in which the values of each pair agree for all positions."""
    agreeing = set(_COLUMNS)
    count = 0
    try:
        for cos, sin in _tables(module):
            count += 1
            for columns in list(agreeing):
                pairs = [(first(columns, table), second(columns, table)) for table in (cos, sin)]
                if not all(torch.equal(*pair) for pair in pairs):
                    agreeing.remove(columns)
    except Exception:  # Any failure means no proof.
        return frozenset()
    return frozenset(agreeing) if count else frozenset()


def _tables(module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Calls a copy of a rotary module with all inputs that it accepts."""
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    options: list[dict[str, Any]] = [{}]
    if "layer_type" in inspect.signature(module.forward).parameters:
        options += [{"layer_type": kind} for kind in getattr(module, "layer_types", ())]
    probe = copy.deepcopy(module)
    for low, high, tokens, dtype, training in _RANGES:
        _randomize(probe.train(training), generator)
        x = torch.zeros((2, tokens, 8), dtype=dtype, device=device)
        for front, back in _AXES:
            ids = torch.randint(
                low, high, (*front, 2, tokens, *back), generator=generator, device="cpu"
            )
            for chosen in options:
                try:
                    with torch.set_grad_enabled(training):
                        tables = probe(x, ids.to(device), **chosen)
                except Exception:  # It rejects positions of this shape.
                    continue
                if not isinstance(tables, tuple):
                    raise TypeError
                yield tables


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = values.to(tensor)
