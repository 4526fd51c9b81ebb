"""Which elements the models of transformers pair up, found by trying their functions."""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SIZE = 8
TOKENS = 3

# What a family rotates text by, the first that it has.
FUNCTIONS = ("apply_rotary_pos_emb_interleave", "apply_rotary_pos_emb", "apply_rotary_emb")


def _calls(function: Callable[..., Any]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Lists ways to call a function with x (1, 2, TOKENS, SIZE) and tables of angles."""
    parameters = inspect.signature(function).parameters
    angles = torch.linspace(0.3, 1.2, TOKENS * SIZE // 2).view(1, TOKENS, SIZE // 2)
    for doubled in (torch.cat((angles, angles), -1), angles.repeat_interleave(2, -1), angles):
        for by_tokens in (False, True):
            given: dict[str, Any] = {"cos": doubled.cos(), "sin": doubled.sin()}
            given["freqs_cis"] = torch.polar(torch.ones_like(angles), angles)
            given["unsqueeze_dim"] = 2 if by_tokens else 1

            def call(x: Tensor, given: dict[str, Any] = given, by_tokens: bool = by_tokens) -> Any:
                x = x.transpose(1, 2) if by_tokens else x
                names = ("q", "x", "tensor", "xq", "k", "xk")
                arguments = dict.fromkeys(names, x) | given
                result = function(**{k: v for k, v in arguments.items() if k in parameters})
                result = result[0] if isinstance(result, tuple) else result
                return result.transpose(1, 2) if by_tokens else result

            yield call


def are_neighbours(call: Callable[[Tensor], Tensor]) -> bool | None:
    """Returns whether elements 0 and 1 form a pair, or None where the call is no rotation."""
    reached = []
    for element in range(SIZE):
        x = torch.zeros(1, 2, TOKENS, SIZE)
        x[..., element] = 1.0
        try:
            rotated = call(x)
        except Exception:
            return None
        if rotated.shape != x.shape:
            return None
        reached.append(tuple((rotated.abs() > 1e-6).flatten(0, -2).any(0).nonzero().flatten()))
    sets = [frozenset(map(int, elements)) for elements in reached]
    if len(set(sets)) != SIZE // 2 or any(len(elements) != 2 for elements in sets):
        return None
    return sets[0] == sets[1]


def families() -> dict[str, bool]:
    """Returns whether each family of models pairs neighbours in text, as far as functions tell."""
    transformers = pytest.importorskip("transformers")
    found = {}
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        name = path.parent.name
        if path.stem != f"modeling_{name}" or not any(
            text in path.read_text() for text in FUNCTIONS
        ):
            continue
        module = import_module(f"transformers.models.{name}.modeling_{name}")
        function = next((getattr(module, f) for f in FUNCTIONS if hasattr(module, f)), None)
        if function is None:
            continue
        tries = (are_neighbours(call) for call in _calls(function))
        result = next((each for each in tries if each is not None), None)
        if result is not None:
            found[name] = result
    return found


def model_types(family: str) -> Iterator[tuple[str, Any]]:
    """Lists the types of a family's configurations that have rotary parameters, and the configs."""
    module = import_module(f"transformers.models.{family}.configuration_{family}")
    for config in vars(module).values():
        if isinstance(config, type) and config.__module__ == module.__name__:
            try:
                made = config()
            except Exception:  # The decorators' own classes, and what needs arguments.
                continue
            text = getattr(made, "text_config", None)
            for part in (made, text if type(text).__module__ == module.__name__ else None):
                if getattr(part, "rope_parameters", None) or getattr(part, "rotary_dim", None):
                    yield made.model_type, made
                    break
