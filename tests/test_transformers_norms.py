"""Norms that transformers' attention applies next to a rotation, and what fuses them with it."""

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference import random_values
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny_transformers
from test_transformers import EPSILON, distance, first_output, results, rounded_otherwise
from tiny_transformers import Subject, functions_wrapped
from torch_rope.integrations import _forms, _norms
from torch_rope.integrations.transformers import FUNCTIONS, patch, unpatch
from transformers.models.qwen3 import modeling_qwen3

TOKENS = 5


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    yield
    unpatch()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records the options of the calls that normalize and rotate."""
    seen: list[dict[str, Any]] = []
    operator = _forms.norm_apply_cos_sin

    def watched(x: Any, *tensors: Any, **options: Any) -> Any:
        seen.append(options | {"is_pair": isinstance(x, tuple)})
        return operator(x, *tensors, **options)

    monkeypatch.setattr(_forms, "norm_apply_cos_sin", watched)
    return seen


# Attention classes of a user.

CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import (
    Gemma3nRMSNorm,
    apply_rotary_pos_emb as apply_rotary_pos_emb_vision,
)
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, apply_rotary_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb


class Norms(nn.Module):
    def __init__(self):
        super().__init__()


class Scale(Qwen3RMSNorm):
    pass


class InPlace(nn.Module):
    def forward(self, x):
        return x.add_(1.5)


def mutate(x):
    return x.add_(1.5)


def rms_norm(x):
    return F.rms_norm(x, x.shape[-1:])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 32)
        self.k_proj = nn.Linear(16, 16)
        self.write = InPlace()
        {init}

    def mutate(self, x=None):
        (self.raw if x is None else x).add_(1.5)

    def forward(self, x, cos, sin, flag=False, *, other: bool = False):
        shape = (*x.shape[:-1], -1, 8)
        {body}
        return q, k
"""

NORMS = """\
self.q_norm = Qwen3RMSNorm(8, eps=1e-3)
self.k_norm = Qwen3RMSNorm(8, eps=1e-3)"""
HEADS = (
    "q, k = self.q_proj(x).view(shape).transpose(1, 2), self.k_proj(x).view(shape).transpose(1, 2)"
)
NORMALIZE = "q = self.q_norm(q)\nk = self.k_norm(k)"
ROTATE = "q, k = apply_rotary_pos_emb(q, k, cos, sin)"


def load(tmp_path: Path, body: str, init: str = NORMS) -> ModuleType:
    """Makes a module that has an attention class with this code."""
    indent = "\n        "
    text = CODE.format(body=indent.join(body.splitlines()), init=indent.join(init.splitlines()))
    path = tmp_path / "modeling_of_a_user.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("modeling_of_a_user", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer_of(module: ModuleType) -> Any:
    """Makes an instance with random weights."""
    torch.manual_seed(0)
    layer = module.Attention()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = random_values((2, TOKENS, 16))
    angles = random_values((2, TOKENS, 4), seed=1)
    angles = torch.cat((angles, angles), dim=-1)
    return x, angles.cos(), angles.sin()


def outcome(layer: Any, *flags: Any) -> tuple[Tensor, ...]:
    """Returns q and k, and the gradients of the input and all parameters."""
    x, cos, sin = inputs()
    x.requires_grad_()
    q, k = layer(x, cos, sin, *flags)
    upstream = [random_values(tuple(t.shape), seed=seed) for seed, t in ((2, q), (3, k))]
    gradients = torch.autograd.grad(
        (q, k), (x, *layer.parameters()), upstream, allow_unused=True, materialize_grads=True
    )
    return q, k, *gradients


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


# What is fused: the code, the norms, and the calls of the operator as (is pair, axes, is last).
FIRST, LAST = (True, None, False), (True, None, True)
OVER_HEADS = """\
self.q_norm = Qwen3RMSNorm(32, eps=1e-3)
self.k_norm = Qwen3RMSNorm(16, eps=1e-3)"""
FUSED: dict[str, tuple[str, str, list[Any]]] = {
    "before the transpose": (
        "q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)\n"
        "k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)\n" + ROTATE,
        NORMS,
        [FIRST],
    ),
    "after the transpose": (f"{HEADS}\n{NORMALIZE}\n{ROTATE}", NORMS, [FIRST]),
    "in the call": (
        f"{HEADS}\nq, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), cos, sin)",
        NORMS,
        [FIRST],
    ),
    "after the rotation": (f"{HEADS}\n{ROTATE}\n{NORMALIZE}", NORMS, [LAST]),
    "over all heads": (
        "q = self.q_norm(self.q_proj(x)).view(shape).transpose(1, 2)\n"
        "k = self.k_norm(self.k_proj(x)).view(*shape).transpose(-2, 1)\n" + ROTATE,
        OVER_HEADS,
        [(True, (-3, -1), False)],
    ),
    "over all heads, tokens first": (
        "q = self.q_norm(self.q_proj(x)).view(shape)\n"
        "k = self.k_norm(self.k_proj(x)).reshape(shape)\n"
        "q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)",
        OVER_HEADS,
        [(True, (-2, -1), False)],
    ),
    "rows": (
        "q = self.q_norm(self.q_proj(x).reshape(-1, 4, 8))\n"
        "q = q.reshape(*x.shape[:-1], 4, 8).transpose(1, 2)\n"
        "k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)\n" + ROTATE,
        NORMS,
        [FIRST],
    ),
    "weight and one": (
        f"{HEADS}\n{NORMALIZE}\n{ROTATE}",
        NORMS.replace("Qwen3RMSNorm", "Gemma3RMSNorm"),
        [FIRST],
    ),
    "no weight": (
        f"{HEADS}\n{NORMALIZE}\n{ROTATE}",
        "self.q_norm = Gemma3nRMSNorm(8, eps=1e-3, with_scale=False)\n"
        "self.k_norm = Llama4TextL2Norm(eps=1e-3)",
        [FIRST],
    ),
    "PyTorch's": (
        f"{HEADS}\n{NORMALIZE}\n{ROTATE}",
        NORMS.replace("Qwen3RMSNorm", "nn.RMSNorm"),
        [FIRST],
    ),
    "one norm for both": (
        f"{HEADS}\n{ROTATE}\nq = self.norm(q)\nk = self.norm(k)",
        "self.norm = Llama4TextL2Norm(1e-3)",
        [LAST],
    ),
    "epsilons that differ": (
        f"{HEADS}\n{NORMALIZE}\n{ROTATE}",
        NORMS.replace("1e-3", "0.5", 1),
        [(False, None, False)] * 2,
    ),
    "one of two": (
        f"{HEADS}\nq = self.q_norm(q) * 2\nk = self.k_norm(k)\n{ROTATE}",
        NORMS,
        [(False, None, False)],
    ),
    "one by one": (
        f"{HEADS}\n{NORMALIZE}\n"
        "q = apply_rotary_pos_emb_vision(q, cos, sin)\n"
        "k = apply_rotary_pos_emb_vision(k, cos, sin)",
        NORMS,
        [(False, None, False)] * 2,
    ),
    "properties": (
        f"{HEADS}\n{NORMALIZE}\ncos = cos.to(q.dtype).to(q.device)\nassert q.shape[-1] == 8\n"
        + ROTATE,
        NORMS,
        [FIRST],
    ),
    "complex numbers": (
        "q, k = self.q_proj(x).view(shape), self.k_proj(x).view(shape)\n"
        "q, k = apply_rotary_emb(q, k, torch.complex(cos, sin)[..., :4])\n" + NORMALIZE,
        NORMS,
        [LAST],
    ),
    "one of two conditions": (
        "q, k = self.q_proj(x), self.k_proj(x)\n"
        "if flag:\n    q = self.q_norm(q)\n    k = self.k_norm(k)\n"
        "q = q.view(shape)\nk = k.view(shape)\n"
        "if not flag:\n    q = self.q_norm(q)\n    k = self.k_norm(k)\n"
        f"q = q.transpose(1, 2)\nk = k.transpose(1, 2)\n{ROTATE}",
        NORMS,
        [FIRST],
    ),
    "the shape in a view": (
        "q = self.q_norm(self.q_proj(x).view(shape))\n"
        "k = self.k_norm(self.k_proj(x).view(shape))\n"
        "q = q.transpose(1, 2).reshape(q.shape[0], -1, q.shape[1], 8)\n"
        "k = k.reshape(*k.shape).transpose(1, 2)\n" + ROTATE,
        NORMS,
        [FIRST],
    ),
    "a norm by another name": (
        f"{HEADS}\n{NORMALIZE}\n{ROTATE}",
        NORMS.replace("Qwen3RMSNorm", "Scale"),
        [FIRST],
    ),
    "annotated variables": (
        f"{HEADS}\nq: torch.Tensor = self.q_norm(q)\nv: int\nk: torch.Tensor = self.k_norm(k)\n"
        + ROTATE,
        "self.q_norm: nn.Module = Qwen3RMSNorm(8)\nself.k_norm: nn.Module = Qwen3RMSNorm(8)",
        [FIRST],
    ),
    "calls that do not write": (
        f"{HEADS}\n{NORMALIZE}\nv = F.relu(self.write(self.q_proj(x)).view(shape), True)\n"
        f"assert len(v.split([4, 4], dim=-1)) == 2 and self.write is not None\n{ROTATE}",
        NORMS,
        [FIRST],
    ),
    "a call before the norm": (
        f"{HEADS}\nq = self.q_norm(mutate(q * 1))\nk = self.k_norm(mutate(k * 1))\n{ROTATE}",
        NORMS,
        [(False, None, False)],
    ),
    "a condition": (
        f"{HEADS}\nif not flag:\n    q = self.q_norm(q)\n    k = self.k_norm(k)\n{ROTATE}",
        NORMS,
        [FIRST],
    ),
}


@pytest.mark.parametrize("case", FUSED)
def test_a_norm_next_to_a_rotation_is_fused(
    case: str, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    body, init, expected_calls = FUSED[case]
    module = load(tmp_path, body, init)
    layer = layer_of(module)
    expected = outcome(layer)
    done = patch(module)
    assert done.fused == ["modeling_of_a_user.Attention"], done
    calls.clear()
    actual = outcome(layer)
    assert [(c["is_pair"], c["norm_axes"], c["norm_last"]) for c in calls] == expected_calls
    assert_same(actual, expected)


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_forward_compiles_to_one_graph(
    case: str, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    body, init, _ = FUSED[case]
    layer = layer_of(module := load(tmp_path, body, init))
    expected = layer(*inputs())
    patch(module)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    actual = torch.compile(layer, backend=backend, fullgraph=True)(*inputs())
    assert any("norm_apply" in str(node.target) for node in graphs[0].graph.nodes)
    assert_same(actual, expected)


# What else a forward may do with the tensors. Each is run with a flag and without.
SHARED = {
    "the rotation is conditional": f"{NORMALIZE}\nif flag:\n    {ROTATE}",
    "the norm is conditional": f"if flag:\n    q = self.q_norm(q)\nk = self.k_norm(k)\n{ROTATE}",
    "the late norm is conditional": f"{ROTATE}\nif flag:\n    q = self.q_norm(q)",
    "both late norms are conditional": (
        f"if flag:\n    {ROTATE}\nif flag:\n    q = self.q_norm(q)\n    k = self.k_norm(k)"
    ),
    "a result is used before its norm": (
        f"{ROTATE}\nq = self.q_norm(q)\nq = q + k.sum()\nk = self.k_norm(k)"
    ),
    "one result has two norms": f"{ROTATE}\nq = self.q_norm(self.q_norm(q))\nk = self.k_norm(k)",
    "a view after a late norm": (
        f"{ROTATE}\nq = self.q_norm(q).transpose(1, 2)\nk = self.k_norm(k.transpose(1, 2))"
    ),
    "norms on both sides": f"{NORMALIZE}\n{ROTATE}\n{NORMALIZE}",
    "two norms before": f"{NORMALIZE}\n{NORMALIZE}\n{ROTATE}",
    "two rotations": f"{NORMALIZE}\n{ROTATE}\n{ROTATE}",
    "another use": f"{NORMALIZE}\nv = q.sum()\n{ROTATE}\nq = q + v",
    "a use in a condition": f"{NORMALIZE}\nif q.sum() > 0:\n    k = k + 1\n{ROTATE}",
    "a use in a loop": f"{NORMALIZE}\nfor _ in range(2):\n    k = k + q.mean()\n{ROTATE}",
    "a norm in a loop": f"for _ in range(2):\n    k = self.k_norm(k)\nq = self.q_norm(q)\n{ROTATE}",
    "a with": f"{NORMALIZE}\nwith torch.enable_grad():\n    {ROTATE}",
    "a change in place": f"{NORMALIZE}\nif flag:\n    q.clamp_(max=0.5)\n{ROTATE}",
    "a change of the norm's input": (
        "raw = q\nq = self.q_norm(raw * 1)\nk = self.k_norm(k)\nraw = raw * 1\nraw.mul_(2)\n"
        + ROTATE
    ),
    "a change in a condition": (
        f"raw = q * 1\nq = self.q_norm(raw * 1)\nif raw.mul_(2).sum() > 0:\n    k = k + 1\n"
        f"k = self.k_norm(k)\n{ROTATE}"
    ),
    "an assignment to elements": (
        "mask = torch.ones_like(q)\n"
        f"{NORMALIZE}\nmask[..., 0] = 2\nq = q.transpose(1, 2).transpose(1, 2)\n"
        f"{ROTATE}\nq = q * mask"
    ),
    "the shape of a rotated one": (
        f"{ROTATE}\nq = self.q_norm(q)\nq = q + k.shape[-1]\nk = self.k_norm(k).to(k.dtype)"
    ),
    "a shape in a condition": (
        f"{ROTATE}\nif q.shape[1] > 1 and q.device == k.device:\n    q = self.q_norm(q)"
    ),
    "the shape of a view": (
        f"{NORMALIZE}\nsize = q.view(*k.sum(-1).shape[:1], -1, {TOKENS}, 8).shape[1]\n"
        f"{ROTATE}\nq = q * size"
    ),
    "an augmented assignment": f"{NORMALIZE}\nq *= 2\n{ROTATE}",
    "a second variable": f"{NORMALIZE}\nother = q\n{ROTATE}\nq = q + other",
    "a view in a second variable": (
        f"{NORMALIZE}\nother = q.transpose(1, 2)\n{ROTATE}\nq = q + other.transpose(1, 2)"
    ),
    "a second variable for a rotated one": (
        f"{ROTATE}\nother = self.q_norm(q)\nk = self.k_norm(k)\nq = q + other"
    ),
    "exchanged variables": f"{NORMALIZE}\nq, k = k, q\nq, k = k, q\n{ROTATE}",
    "a nested function": f"{NORMALIZE}\nread = lambda: q\n{ROTATE}\nq = q + read()",
    "a nested function from before": (
        f"read = lambda: q.sum()\n{NORMALIZE}\nv = read()\n{ROTATE}\nq = q + v"
    ),
    "a generator": f"{NORMALIZE}\nboth = (t.sum() for t in (q, k))\n{ROTATE}\nq = q + sum(both)",
    "the last axis moves": (
        f"q = self.q_norm(q).transpose(2, 3).transpose(2, 3)\nk = self.k_norm(k)\n{ROTATE}"
    ),
    "rows that do not fit": (
        "q = self.q_norm(q).reshape(2, 4, -1, 4).reshape(2, 4, -1, 8)\n"
        f"k = self.k_norm(k).unsqueeze(-1).view(k.shape).unsqueeze(0).view(k.shape)\n{ROTATE}"
    ),
    "keywords of a view": (
        "q = self.q_norm(q).transpose(dim0=1, dim1=2).transpose(1, 2)\nk = self.k_norm(k)\n"
        + ROTATE
    ),
    "an early return": f"{NORMALIZE}\nif flag:\n    return q, k\n{ROTATE}",
    "a deletion": f"{NORMALIZE}\n{ROTATE}\nold = q\ndel q\nq = old",
    "keywords": f"{NORMALIZE}\nq, k = apply_rotary_pos_emb(q=q, k=k, cos=cos, sin=sin)",
    "an expression": (
        f"{NORMALIZE}\nboth = [t + 1 for t in apply_rotary_pos_emb(q, k, cos, sin)]\nq, k = both"
    ),
}


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("case", SHARED)
def test_any_other_use_of_a_tensor_is_as_before(case: str, flag: bool, tmp_path: Path) -> None:
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{SHARED[case]}"))
    expected = outcome(layer, flag)
    patch(module)
    assert_same(outcome(layer, flag), expected)


# What writes to the input of a norm or of a rotation, between the two.
CHANGES = {
    "a method": "raw = k\n---\nraw.mul_(2).add_(1)",
    "a function": "raw = k\n---\nmutate(raw)",
    "a function that gets a view": "raw = k.transpose(1, 2)\n---\nv = mutate(raw)",
    "a function that gets a list": "raw = [k]\n---\nv = mutate(*raw)",
    "a function in a condition": "raw = k\n---\nif mutate(raw) is None:\n    pass",
    "a function in a loop": "raw = k\n---\nfor _ in range(2):\n    mutate(raw)",
    "a function of the whole": (
        "both = torch.cat((q, k, k), 1)\nq, k, v = both.split((4, 2, 2), dim=1)\n---\nmutate(both)"
    ),
    "a local function": "raw = k\nread = lambda: raw.add_(1.5)\n---\nv = read()",
    "a local function by a builtin's name": "raw = k\nlen = mutate\n---\nv = len(raw)",
    "a method of the class": "raw = k\n---\nself.mutate(raw)",
    "a method that gets it elsewhere": "self.raw = k\n---\nv = self.mutate()",
    "a layer": "raw = k\n---\nv = self.write(raw)",
    "a layer that gets an attribute": "self.raw = k\n---\nv = self.write(self.raw)",
    "a layer that gets an element": "raw = {}\nraw[0] = k\n---\nv = self.write(raw[0])",
    "a layer that gets one of two": (
        "raw = q\nif not flag:\n    raw = k\n---\nv = self.write(raw[:, :1])"
    ),
    "a layer that gets a loop's": (
        "for _ in range(2):\n    raw = k\n---\nv = self.write(raw.view(raw.shape))"
    ),
    "a layer that gets a condition's": "if (raw := k) is k:\n    pass\n---\nv = self.write(raw)",
    "PyTorch's function": "raw = k\n---\nv = F.relu(raw, True)",
    "a dunder method": "raw = k\n---\nv = raw.__iadd__(1.5)",
    "an attribute": "raw = k\n---\nraw.data = raw * 2",
    "a function of the tables": "---\nmutate(cos)",
}


@pytest.mark.parametrize("order", ["norms first", "rotation first"])
@pytest.mark.parametrize("case", CHANGES)
@torch.no_grad()
def test_a_change_of_the_input_comes_after_the_call(case: str, order: str, tmp_path: Path) -> None:
    before, _, change = CHANGES[case].partition("---")
    calls = [NORMALIZE, ROTATE] if order == "norms first" else [ROTATE, NORMALIZE]
    body = "\n".join((HEADS, before, calls[0], change, calls[1]))
    layer = layer_of(module := load(tmp_path, body))
    expected = layer(*inputs())
    patch(module)
    assert_same(layer(*inputs()), expected)


WITHIN = {
    "another argument": "self.q_norm(q), self.k_norm(k), cos, sin + 0 * mutate(k).sum()",
    "a shape": "self.q_norm(q), self.k_norm(k).view(mutate(k).shape), cos, sin",
}


@pytest.mark.parametrize("case", WITHIN)
@torch.no_grad()
def test_a_change_in_the_call_itself_comes_after_the_norm(case: str, tmp_path: Path) -> None:
    layer = layer_of(
        module := load(tmp_path, f"{HEADS}\nq, k = apply_rotary_pos_emb({WITHIN[case]})")
    )
    expected = layer(*inputs())
    patch(module)
    assert_same(layer(*inputs()), expected)


@torch.no_grad()
def test_a_change_of_the_gradient_mode_comes_after_the_norm(tmp_path: Path) -> None:
    body = f"{HEADS}\n{NORMALIZE}\ntorch.set_grad_enabled(True)\n{ROTATE}"
    layer = layer_of(module := load(tmp_path, body))
    patch(module)
    q, _ = layer(*inputs())
    assert not q.requires_grad


@pytest.mark.parametrize("flag", [False, True])
def test_a_condition_chooses_what_is_fused(
    flag: bool, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    body = f"{HEADS}\n{NORMALIZE}\nif flag:\n    q.clamp_(max=0.5)\n    k.clamp_(max=0.5)\n{ROTATE}"
    layer = layer_of(module := load(tmp_path, body))
    patch(module)
    calls.clear()
    outcome(layer, flag)
    assert len(calls) == (not flag)


REFUSED = {
    "scaled": (
        f"q = self.q_norm(q) * 2\nk = self.k_norm(k) * 2\n{ROTATE}",
        NORMS,
        "`self.q_norm(q) * 2` is between self.q_norm and apply_rotary_pos_emb",
    ),
    "other columns": (
        f"{NORMALIZE}\nq, k = q[..., :8], k[..., :8]\n{ROTATE}",
        NORMS,
        "`q[..., :8]` is between self.q_norm and apply_rotary_pos_emb",
    ),
    "after a use": (
        f"{ROTATE}\nq, k = q + k, k - q\n{NORMALIZE}",
        NORMS,
        None,
    ),
    "after a use of both": (
        f"{ROTATE}\nv = q + k\n{NORMALIZE}",
        NORMS,
        "`v = q + k` is between apply_rotary_pos_emb and self.q_norm",
    ),
    "another keyword": (
        f"{NORMALIZE}\nq, k = apply_rotary_pos_emb(q, k, cos, sin, other=1)",
        NORMS,
        "unknown keywords in `apply_rotary_pos_emb(q, k, cos, sin, other=1)`",
    ),
    "another norm": (
        f"{NORMALIZE}\n{ROTATE}",
        NORMS.replace("Qwen3RMSNorm", "nn.LayerNorm"),
        "LayerNorm is not a known RMSNorm",
    ),
    "a function": (
        f"q = F.rms_norm(q, (8,))\nk = F.rms_norm(k, (8,))\n{ROTATE}",
        "",
        "F.rms_norm is a function, not a layer",
    ),
    "a function of the module": (
        f"q = rms_norm(q)\nk = rms_norm(k).transpose(1, 2).transpose(1, 2)\n{ROTATE}",
        "",
        "rms_norm is a function, not a layer",
    ),
    "a class that is not named": (
        f"{NORMALIZE}\n{ROTATE}",
        "norm = Qwen3RMSNorm\nself.q_norm = norm(8)\nself.k_norm = norm(8)",
        "the class of self.q_norm is not known",
    ),
    "two targets": (
        f"q = v = self.q_norm(q)\nk = v = self.k_norm(k)\n{ROTATE}",
        NORMS,
        "`q = v = self.q_norm(q)` is between self.q_norm and apply_rotary_pos_emb",
    ),
    "changed": (
        f"{NORMALIZE}\nq *= 2\nk *= 2\n{ROTATE}",
        NORMS,
        "`q *= 2` is between self.q_norm and apply_rotary_pos_emb",
    ),
    "an identity": (
        f"{NORMALIZE}\n{ROTATE}",
        "self.q_norm = nn.Identity()\nself.k_norm = nn.Identity()",
        None,
    ),
    "several arguments": (
        f"q = self.q_norm(q, k)\n{ROTATE}",
        "self.q_norm = Norms()",
        "Norms is not a known RMSNorm",
    ),
    "a projection": (
        "q = self.q_proj(self.x_norm(x)).view(shape).transpose(1, 2)\n" + ROTATE,
        "self.x_norm = Qwen3RMSNorm(16)",
        None,
    ),
    "no rotation": (NORMALIZE, NORMS, None),
    "no norm": (ROTATE, "", None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_fused_has_a_reason(case: str, tmp_path: Path) -> None:
    body, init, reason = REFUSED[case]
    module = load(tmp_path, f"{HEADS}\n{body}", init)
    forward = module.Attention.forward
    done = patch(module)
    assert done.fused == []
    assert done.norms_left_alone == ({"modeling_of_a_user.Attention": reason} if reason else {})
    assert module.Attention.forward is forward


def test_the_receiver_may_have_any_name(tmp_path: Path) -> None:
    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    path = Path(str(module.__file__))
    path.write_text(path.read_text().replace("self", "layer"))
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    module.__spec__.loader.exec_module(module)
    assert patch(module).fused


class AlmostNorm(nn.Module):
    """An RMSNorm, changed where random numbers of one size do not show it."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x) * self.weight


class ClampedScale(AlmostNorm):
    def scale(self, x: Tensor) -> Tensor:
        return super().scale(x).clamp(max=3)


class ClampedResult(AlmostNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-10, 10)


class ClampedInput(AlmostNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-100, 100))


class ClampedMean(AlmostNorm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-8) + self.eps)


class ZerosLeftOut(AlmostNorm):
    def scale(self, x: Tensor) -> Tensor:
        return torch.where((x == 0).all(-1, keepdim=True), 1, super().scale(x))


def test_a_norm_that_is_not_quite_one_is_not_recognized() -> None:
    _norms.recognize(AlmostNorm)
    for norm in (ClampedScale, ClampedResult, ClampedInput, ClampedMean, ZerosLeftOut):
        with pytest.raises(_norms.UnknownFormError):
            _norms.recognize(norm)


def test_a_class_that_draws_random_numbers_leaves_no_trace() -> None:
    class Random(AlmostNorm):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__(size, eps)
            nn.init.normal_(self.weight)

    random_state = torch.get_rng_state()
    _norms.recognize(Random)
    assert torch.equal(torch.get_rng_state(), random_state)


# The norms of an instance.


def replace_with_layer_norm(layer: Any) -> None:
    layer.q_norm = nn.LayerNorm(8)


def remove_the_norm(layer: Any) -> None:
    layer.q_norm = nn.Identity()


def give_it_a_forward(layer: Any) -> None:
    layer.q_norm.forward = lambda x: x * layer.q_norm.weight


def change_its_class(layer: Any) -> None:
    class Doubled(modeling_qwen3.Qwen3RMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    layer.q_norm.__class__ = Doubled


def parametrize_the_weight(layer: Any) -> None:
    nn.utils.parametrize.register_parametrization(layer.q_norm, "weight", nn.Tanh())


def add_a_hook(layer: Any) -> None:
    layer.q_norm.register_forward_hook(lambda module, given, result: 2 * result)


def add_a_hook_before(layer: Any) -> None:
    layer.q_norm.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def add_a_backward_hook(layer: Any) -> None:
    layer.q_norm.register_full_backward_hook(lambda module, grad, _: (2 * grad[0],))


def add_a_backward_hook_before(layer: Any) -> None:
    layer.q_norm.register_full_backward_pre_hook(lambda module, grad: (2 * grad[0],))


@pytest.mark.parametrize("order", [NORMALIZE + "\n" + ROTATE, ROTATE + "\n" + NORMALIZE])
@pytest.mark.parametrize(
    "change",
    [
        replace_with_layer_norm,
        remove_the_norm,
        give_it_a_forward,
        change_its_class,
        parametrize_the_weight,
        add_a_hook,
        add_a_hook_before,
        add_a_backward_hook,
        add_a_backward_hook_before,
    ],
)
def test_a_changed_norm_runs_by_itself(
    change: Callable[[Any], None], order: str, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{order}"))
    patch(module)
    calls.clear()
    before = outcome(layer)
    assert [call["is_pair"] for call in calls] == [True]
    change(layer)
    calls.clear()
    actual = outcome(layer)
    # The key's, unless both were rotated for the query's norm.
    assert [call["is_pair"] for call in calls] == [False] * order.startswith(NORMALIZE)
    unpatch()
    expected = outcome(layer)
    assert_same(actual, expected)
    assert not all(torch.equal(a, b) for a, b in zip(actual[:3], before[:3], strict=True))


@pytest.mark.parametrize("is_before", [False, True])
def test_a_class_with_another_forward_is_another_norm(
    is_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}"))
    original = modeling_qwen3.Qwen3RMSNorm.forward

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        result: Tensor = 2 * original(self, hidden_states)
        return result

    with patch(module):
        outcome(layer)
    if not is_before:
        patch(module)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", forward)
    if is_before:
        assert patch(module).fused == []
    actual = outcome(layer)
    unpatch()
    assert_same(actual, outcome(layer))


def test_a_global_hook_observes_the_norms(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}"))
    patch(module)
    calls.clear()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda one, *_: seen.append(one))
    try:
        layer(*inputs())
    finally:
        hook.remove()
    assert layer.q_norm in seen
    assert calls == []


def test_weights_and_epsilon_are_those_of_the_call(tmp_path: Path) -> None:
    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    patch(module)
    layer = layer_of(module)  # Made after the patch.
    outcome(layer)
    layer.q_norm.weight = nn.Parameter(random_values((8,), seed=7))
    layer.q_norm.variance_epsilon = 0.5
    layer.k_norm.weight.data.mul_(3)
    actual = outcome(layer)
    unpatch()
    assert_same(actual, outcome(layer))


def test_an_option_of_the_norm_that_changes_it_is_noticed(tmp_path: Path) -> None:
    init = """\
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNorm as Norm
self.q_norm = Norm(8, group_size=4)
self.k_norm = Norm(8)"""
    code = f"{HEADS}\n{NORMALIZE}\n{ROTATE}"
    module = load(tmp_path, code, init.replace("from", "global Norm\nfrom"))
    layer = layer_of(module)
    expected = outcome(layer)
    assert patch(module).fused
    assert_same(outcome(layer), expected)


@pytest.mark.parametrize("order", [NORMALIZE + "\n" + ROTATE, ROTATE + "\n" + NORMALIZE])
@pytest.mark.parametrize("norm", ["Qwen3RMSNorm", "Gemma3RMSNorm", "nn.RMSNorm"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_dtypes_are_as_before(
    dtype: torch.dtype, weight_dtype: torch.dtype, norm: str, order: str, tmp_path: Path
) -> None:
    init = NORMS.replace("Qwen3RMSNorm", norm)
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{order}", init)).to(dtype)
    layer.q_norm.to(weight_dtype)
    layer.k_norm.to(weight_dtype)
    x, cos, sin = (t.to(dtype) for t in inputs())
    expected = layer(x, cos, sin)
    exact = copy.deepcopy(layer).double()(x.double(), cos.double(), sin.double())
    patch(module)
    for actual, before, right in zip(layer(x, cos, sin), expected, exact, strict=True):
        assert actual.dtype == before.dtype
        scale = float(right.abs().max())
        assert (actual - right).abs().max() <= (before - right).abs().max() + 1e-6 * scale


@pytest.mark.parametrize("norm", ["Qwen3RMSNorm", "Gemma3RMSNorm", "nn.RMSNorm"])
def test_autocast_is_as_before(norm: str, tmp_path: Path) -> None:
    init = NORMS.replace("Qwen3RMSNorm", norm)
    layer = layer_of(module := load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}", init))

    def run() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return outcome(layer)

    expected = run()
    patch(module)
    for actual, before in zip(run(), expected, strict=True):
        assert actual.dtype == before.dtype
        scale = float(before.abs().max())
        torch.testing.assert_close(actual, before, rtol=0.02, atol=0.02 * scale)


# Patches.


def qwen3() -> Subject:
    module = tiny_transformers.load("qwen3")
    return next(tiny_transformers.subjects(module, {"apply_rotary_pos_emb"}))


@pytest.mark.parametrize("norms", [True, False])
def test_a_patch_restores_the_forward(norms: bool) -> None:
    original = modeling_qwen3.Qwen3Attention.forward
    with patch(modeling_qwen3) as done:
        name = f"{modeling_qwen3.__name__}.Qwen3Attention"
        assert done.fused == [name]
        ours = modeling_qwen3.Qwen3Attention.forward
        assert ours is not original
        with patch(modeling_qwen3, norms=norms) as inner:
            assert inner.fused == []
            assert inner.already == [f"{modeling_qwen3.__name__}.apply_rotary_pos_emb", name]
        assert modeling_qwen3.Qwen3Attention.forward is ours
    assert modeling_qwen3.Qwen3Attention.forward is original
    patch(qwen3().model)
    unpatch(modeling_qwen3)
    assert modeling_qwen3.Qwen3Attention.forward is original


def test_norms_can_be_left_out(calls: list[dict[str, Any]]) -> None:
    subject = qwen3()
    original = modeling_qwen3.Qwen3Attention.forward
    done = patch(subject.model, norms=False)
    assert done.replaced
    assert done.fused == []
    assert modeling_qwen3.Qwen3Attention.forward is original
    assert patch(subject.model).fused
    calls.clear()
    first_output(subject.model, subject.inputs)
    assert len(calls) == 2


def test_unpatch_leaves_a_forward_that_another_has_put_in_its_place() -> None:
    original = modeling_qwen3.Qwen3Attention.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return original(self, *arguments, **options)

    patch(modeling_qwen3)
    try:
        modeling_qwen3.Qwen3Attention.forward = forward
        unpatch()
        assert modeling_qwen3.Qwen3Attention.forward is forward
    finally:
        modeling_qwen3.Qwen3Attention.forward = original


def test_a_function_that_another_replaces_later_is_called(calls: list[dict[str, Any]]) -> None:
    subject = qwen3()
    expected = first_output(subject.model, subject.inputs)
    original = modeling_qwen3.apply_rotary_pos_emb
    patch(modeling_qwen3)
    ours = modeling_qwen3.apply_rotary_pos_emb
    calls.clear()
    try:
        modeling_qwen3.apply_rotary_pos_emb = original
        assert torch.equal(first_output(subject.model, subject.inputs), expected)
    finally:
        modeling_qwen3.apply_rotary_pos_emb = ours
    assert calls == []


def test_a_forward_keeps_its_signature_decorators_and_lines() -> None:
    original = modeling_qwen3.Qwen3Attention.forward
    patch(modeling_qwen3)
    ours = modeling_qwen3.Qwen3Attention.forward
    assert inspect.signature(ours) == inspect.signature(original)
    assert ours.__qualname__ == original.__qualname__
    assert ours.__code__ is original.__code__  # That of the decorator.
    inner, before = inspect.unwrap(ours).__code__, inspect.unwrap(original).__code__
    assert inner is not before
    assert inner.co_filename == before.co_filename
    lines = [{line for *_, line in code.co_lines() if line} for code in (inner, before)]
    assert max(lines[0]) == max(lines[1])
    assert lines[0] - {inner.co_firstlineno} <= lines[1]


def test_a_module_keeps_its_names(tmp_path: Path) -> None:
    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    before = set(vars(module))
    patch(module)
    assert set(vars(module)) == before


def test_source_that_changed_since_the_import_is_not_used(tmp_path: Path) -> None:
    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    path = Path(str(module.__file__))
    path.write_text(
        path.read_text().replace("eps=1e-3", "eps=1e-2").replace("k = self", "v = self")
    )
    reason = "its source is not what runs"
    assert patch(module).norms_left_alone == {"modeling_of_a_user.Attention": reason}


def test_a_class_without_source_is_left_alone(tmp_path: Path) -> None:
    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    Path(str(module.__file__)).unlink()
    assert patch(module).fused == []


def test_an_unknown_decorator_is_a_reason(tmp_path: Path) -> None:
    class Decorated:
        def __init__(self, function: Any) -> None:
            self.__wrapped__ = function

    module = load(tmp_path, f"{HEADS}\n{NORMALIZE}\n{ROTATE}")
    module.Attention.forward = Decorated(module.Attention.forward)
    reason = "one of its decorators is unknown"
    assert patch(module).norms_left_alone == {"modeling_of_a_user.Attention": reason}


def test_recognition_leaves_no_trace() -> None:
    random_state = torch.get_rng_state()
    patch(modeling_qwen3)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_patch_without_gradients_fuses_the_same(context: Callable[[], Any]) -> None:
    _norms.forms.clear()
    with context():
        assert patch(modeling_qwen3).fused


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_patch_with_another_default_dtype_fuses_the_same(dtype: torch.dtype) -> None:
    _norms.forms.clear()
    with default_dtype(dtype), torch.device("meta"):
        assert patch(modeling_qwen3).fused


def assert_differ_by_rounding(subject: Subject, actual: Any, expected: Any) -> None:
    """Checks that results differ by no more than where the unpatched model rounds otherwise."""
    unpatch()
    with functions_wrapped(modeling_qwen3, rounded_otherwise):
        noisy = results(subject.model, subject.inputs)
    for a, b, c in zip(actual, expected, noisy, strict=True):
        assert distance(a, b) <= 4 * distance(c, b) + 4 * EPSILON


def test_a_training_step_is_the_same() -> None:
    subject = qwen3()
    subject.model.train()
    expected = results(subject.model, subject.inputs)
    patch(subject.model)
    assert_differ_by_rounding(subject, results(subject.model, subject.inputs), expected)


def test_a_layer_under_checkpointing_is_the_same() -> None:
    subject = qwen3()
    subject.model.train()
    expected = results(subject.model, subject.inputs)
    patch(subject.model)
    subject.model.gradient_checkpointing_enable()
    assert_differ_by_rounding(subject, results(subject.model, subject.inputs), expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2", "hunyuan_v1_dense"])
def test_generation_gives_the_same_tokens(family: str) -> None:
    module = tiny_transformers.load(family)
    names = {name for name in FUNCTIONS if hasattr(module, name)}
    model: Any = next(tiny_transformers.subjects(module, names)).model
    tokens = torch.arange(3, 25).view(2, 11)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **options)
    assert patch(model).fused
    assert torch.equal(model.generate(tokens, **options), expected)
