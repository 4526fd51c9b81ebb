"""transformers' models with their rotation replaced: every family, and how the patch behaves.

``test_a_family_computes_the_same`` runs a tiny model of each family of transformers that defines a
function that rotates. What it could not run, docs/guides/transformers.md lists, and each test holds
the page to that. ``python -m pytest tests/test_transformers.py -k report -s`` prints the list.

Models also run under selective checkpointing, under vmap and compiled from the first call: a few by
default, and all with ``ROPE_ALL_FAMILIES=1``, which takes half an hour.
"""

import copy
import doctest
import inspect
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from concurrency import THREADS, at_once
from reference import assert_same_bits, random_values
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

pytest.importorskip("transformers")

import tiny_transformers
import transformers
from tiny_transformers import Subject, functions_wrapped
from torch_rope.integrations import _forms
from torch_rope.integrations.transformers import FUNCTIONS, Patch, kernel_mapping, patch, unpatch
from transformers.models.clvp import modeling_clvp
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.hunyuan_vl import modeling_hunyuan_vl
from transformers.models.llama import modeling_llama
from transformers.models.muse_glimmer_assistant import modeling_muse_glimmer_assistant
from transformers.models.olmo import modeling_olmo

transformers.logging.set_verbosity_error()

FAMILIES = tiny_transformers.families()
PAGE = Path(__file__).parent.parent / "docs" / "guides" / "transformers.md"

EPSILON = torch.finfo(torch.float32).eps

# Families whose bfloat16 results are not compared, and why.
WITHOUT_BFLOAT16 = {
    "lightglue": "drops points by a threshold that rounding crosses",
    "recurrent_gemma": "keeps state that cannot be copied",
}


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Iterator[None]:
    """Puts everything back after each test."""
    yield
    unpatch()


def results(
    model: nn.Module, inputs: dict[str, Tensor], call: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Returns a model's first output, and the gradients of all its parameters in one vector."""
    torch.manual_seed(0)
    output = next(differentiable_tensors((call or model)(**inputs)))
    weights = random_values(tuple(output.shape), seed=3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        (output.float() * weights).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    return output.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def differentiable_tensors(value: Any) -> Iterator[Tensor]:
    """Goes through what a model returned."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from differentiable_tensors(part)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Returns the root mean square of the difference over that of what was expected."""
    return float((actual - expected).norm() / expected.norm())


def turning_the_other_way(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a wrong rotation of a right one."""

    def rotate(*arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(original).bind(*arguments, **options)
        if "freqs_cis" in bound.arguments:
            bound.arguments["freqs_cis"] = bound.arguments["freqs_cis"].conj()
        else:
            bound.arguments["sin"] = -bound.arguments["sin"]
        return original(*bound.args, **bound.kwargs)

    return rotate


def rounded_otherwise(name: str, original: Callable[..., Any], seed: int = 4) -> Callable[..., Any]:
    """Changes what a rotation returns by up to one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def change(x: Tensor) -> Tensor:
        noise = 2 * torch.rand(x.shape, generator=generator) - 1
        changed = x.double() * (1 + torch.finfo(x.dtype).eps * noise)
        return changed.to(x.dtype)

    def rotate(*arguments: Any, **options: Any) -> Any:
        rotated = original(*arguments, **options)
        return tuple(map(change, rotated)) if isinstance(rotated, tuple) else change(rotated)

    return rotate


def check_float32(module: ModuleType, subject: Subject) -> None:
    """Compares outputs and gradients with the unpatched model's.

    They may differ by a few times what they do where the unpatched model rounds otherwise.
    """
    expected = results(subject.model, subject.inputs)
    with patch(module):
        actual = results(subject.model, subject.inputs)
    with functions_wrapped(module, rounded_otherwise):
        noisy = results(subject.model, subject.inputs)
    with functions_wrapped(module, turning_the_other_way):
        wrong = results(subject.model, subject.inputs)
    allowed = [4 * distance(*pair) + 4 * EPSILON for pair in zip(noisy, expected, strict=True)]
    assert max(distance(wrong[i], expected[i]) / allowed[i] for i in range(2)) > 100
    for i in range(2):
        assert distance(actual[i], expected[i]) <= allowed[i]


def check_axes(module: ModuleType, subject: Subject) -> None:
    """Compares outputs for positions that differ on every axis, after those of a text.

    A model without several axes does not take them, or sees batches in their place.
    """
    generator = torch.Generator().manual_seed(5)
    for axes in (4, 3, 2):
        ids = torch.randint(40, (axes, *TOKENS.shape), generator=generator)
        given = subject.inputs | {"position_ids": ids}
        try:
            expected = first_output(subject.model, given)
        except Exception:
            continue
        with patch(subject.model):
            first_output(subject.model, subject.inputs)
            actual = first_output(subject.model, given)
        with functions_wrapped(module, rounded_otherwise):
            noisy = first_output(subject.model, given)
        assert distance(actual, expected) <= 4 * distance(noisy, expected) + 4 * EPSILON


@torch.no_grad()
def first_output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Returns a model's first output."""
    torch.manual_seed(0)
    output = model(**inputs)[0]
    assert isinstance(output, Tensor)
    return output.double()


def check_bfloat16(module: ModuleType, subject: Subject) -> None:
    """Compares errors: the distance from float32 with the same weights, patched or not."""
    model = copy.deepcopy(subject.model).bfloat16()
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in subject.inputs.items()
    }
    exact_inputs = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact = results(copy.deepcopy(model).float(), exact_inputs)
    unpatched = [results(model, inputs)]
    for seed in range(2):
        with functions_wrapped(module, partial(rounded_otherwise, seed=seed)):
            unpatched.append(results(model, inputs))
    with patch(module):
        patched = results(model, inputs)
    for i in range(2):
        noise = max(distance(result[i], exact[i]) for result in unpatched)
        assert distance(patched[i], exact[i]) <= 2 * noise


@contextmanager
def fusing_classes_watched(model: nn.Module) -> Iterator[set[str]]:
    """Gives the classes of the layers that normalize and rotate in one call meanwhile."""
    running: list[str] = []
    found: set[str] = set()
    operator = _forms.norm_apply_cos_sin

    def watched(*tensors: Any, **options: Any) -> Any:
        found.update(running)
        return operator(*tensors, **options)

    def enter(layer: nn.Module, given: object) -> None:
        running.append(type(layer).__name__)

    def leave(layer: nn.Module, given: object, result: object) -> None:
        running.pop()

    layers = [layer for layer in model.modules() if next(layer.children(), None) is not None]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    with pytest.MonkeyPatch.context() as change:
        change.setattr(_forms, "norm_apply_cos_sin", watched)
        yield found
    for hook in hooks:
        hook.remove()


@cache
def outcomes(family: str) -> dict[str, str]:
    """Runs a family.

    Returns:
        "covered", or why not, for each of its functions, and for each of its classes that have
        norms next to a rotation.
    """
    module = tiny_transformers.load(family)
    functions = {name for name in FUNCTIONS if hasattr(module, name)}
    with patch(module) as done:
        left_alone = done.left_alone | done.norms_left_alone
        fused = {name.rpartition(".")[2] for name in done.fused}
    found = {name.rpartition(".")[2]: f"left alone: {why}" for name, why in left_alone.items()}
    text = inspect.getsource(module)
    for name in functions:
        if text.count(f"{name}(") == 1:  # Its definition.
            found.setdefault(name, "not run: its module does not call it")
    wanted = functions - found.keys()
    for subject in tiny_transformers.subjects(module, wanted, fused) if wanted else ():
        with patch(module), fusing_classes_watched(subject.model) as ran:
            first_output(subject.model, subject.inputs)
        check_float32(module, subject)
        check_axes(module, subject)
        if family not in WITHOUT_BFLOAT16:
            check_bfloat16(module, subject)
        for name in subject.functions | (ran & fused):
            found.setdefault(name, "covered")
    for name in functions | fused:
        found.setdefault(name, "not run: no tiny model of it was made")
    return found


def documented() -> dict[str, str]:
    """Returns what the page says of functions that are not covered."""
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_the_same(family: str) -> None:
    actual = {
        f"{family}.{name}": outcome
        for name, outcome in outcomes(family).items()
        if outcome != "covered"
    }
    assert actual == {
        name: why for name, why in documented().items() if name.startswith(f"{family}.")
    }


def test_the_page_has_the_count_of_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        f"{family}.{name}": outcome
        for family in FAMILIES
        for name, outcome in outcomes(family).items()
    }
    counts = []
    for kind in ("functions", "classes"):
        some = {
            name: outcome == "covered"
            for name, outcome in found.items()
            if (name.partition(".")[2] in FUNCTIONS) == (kind == "functions")
        }
        families = {name.partition(".")[0] for name, is_covered in some.items() if is_covered}
        counts.append(f"{sum(some.values())} of {len(some)} {kind}, in {len(families)} families")
    others = {name: outcome for name, outcome in found.items() if outcome != "covered"}
    with capsys.disabled():
        print("", *counts, *(f"| `{name}` | {why} |" for name, why in others.items()), sep="\n")
        for family in FAMILIES:
            print(f"{family}: {state_of(family)}")
    text = " ".join(PAGE.read_text().split())
    for count in counts:
        assert f"**{count}**" in text
    assert others == documented()


def state_of(family: str) -> str:
    """Returns whether a family's norms are fused, only its functions replaced, or nothing."""
    classes, functions = {}, {}
    for name, outcome in outcomes(family).items():
        (functions if name in FUNCTIONS else classes)[name] = outcome
    fused = [name for name, outcome in classes.items() if not outcome.startswith("left alone")]
    others = "; ".join(f"{name} {why}" for name, why in classes.items() if name not in fused)
    if fused:
        return f"fused: {', '.join(fused)}" + (f"; {others}" if others else "")
    if all(outcome.startswith("left alone") for outcome in functions.values()):
        return f"untouched: {'; '.join(functions.values())}"
    return f"rotation only: {others or 'no norm is next to a rotation'}"


# One function of each form: module, name, where an angle stands in its tables, and the width of q.
FORMS = {
    "halves": ("llama.modeling_llama", "apply_rotary_pos_emb", "halves", 16),
    "own dtypes": ("olmo.modeling_olmo", "apply_rotary_pos_emb", "halves", 16),
    "dtype of q": ("cohere.modeling_cohere", "apply_rotary_pos_emb", "neighbours", 16),
    "interleaved": ("helium.modeling_helium", "apply_rotary_pos_emb", "halves", 16),
    "first part": ("gpt_neox.modeling_gpt_neox", "apply_rotary_pos_emb", "halves", 24),
    "interleaved part": ("glm.modeling_glm", "apply_rotary_pos_emb", "halves", 24),
    "to halves": (
        "deepseek_v3.modeling_deepseek_v3",
        "apply_rotary_pos_emb_interleave",
        "halves",
        16,
    ),
    "conjugate": ("nanochat.modeling_nanochat", "apply_rotary_pos_emb", "halves", 16),
    "single": ("gpt_oss.modeling_gpt_oss", "apply_rotary_pos_emb", "single", 16),
    "position_ids": ("glmasr.modeling_glmasr", "apply_rotary_pos_emb", "halves", 24),
}


def table(columns: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draws a table of eight pairs."""
    once = random_values((*shape, 8), seed=seed)
    if columns == "halves":
        return torch.cat((once, once), dim=-1)
    return once.repeat_interleave(2, dim=-1) if columns == "neighbours" else once


def form_of(name: str) -> tuple[ModuleType, str, str, int]:
    path, function, columns, width = FORMS[name]
    return import_module(f"transformers.models.{path}"), function, columns, width


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_function_gives_what_the_original_gives(
    form: str, unsqueeze_dim: int, dtype: torch.dtype, table_dtype: torch.dtype
) -> None:
    module, name, columns, width = form_of(form)
    q_shape, k_shape = ((2, 4, 5), (2, 2, 5)) if unsqueeze_dim == 1 else ((2, 5, 4), (2, 5, 2))
    q = random_values((*q_shape, width), dtype)
    k = random_values((*k_shape, width), dtype, seed=1)
    cos, sin = (table(columns, (2, 5), seed).to(table_dtype) for seed in (2, 3))
    original = getattr(module, name)
    patch(module)
    actual = getattr(module, name)(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    expected = original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    exact = original(
        q.double(), k.double(), cos.double(), sin.double(), unsqueeze_dim=unsqueeze_dim
    )
    for a, b, c in zip(actual, expected, exact, strict=True):
        assert a.dtype == b.dtype
        # One rounding: what float32 leaves of its own, and half a unit in the last place.
        torch.testing.assert_close(
            a.double(), c.double(), rtol=torch.finfo(a.dtype).eps / 2, atol=2e-6
        )


@pytest.mark.parametrize(
    ("module", "columns"),
    [(modeling_llama, "halves"), (modeling_olmo, "halves"), (modeling_cohere, "neighbours")],
)
def test_keys_of_another_dtype_come_back_as_before(module: ModuleType, columns: str) -> None:
    q, k = random_values((2, 4, 5, 16)), random_values((2, 2, 5, 16), torch.bfloat16)
    cos, sin = (table(columns, (2, 5), seed) for seed in (2, 3))
    expected = module.apply_rotary_pos_emb(q, k, cos, sin)
    with patch(module):
        actual = module.apply_rotary_pos_emb(q, k, cos, sin)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]


def tiny_llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tiny_transformers.enliven(model)
    return model


TOKENS = torch.arange(22).view(2, 11)


def test_a_patch_ends_with_its_context() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    with patch(modeling_llama) as done:
        assert modeling_llama.apply_rotary_pos_emb is not original
        assert done.replaced == [f"{modeling_llama.__name__}.apply_rotary_pos_emb"]
    assert modeling_llama.apply_rotary_pos_emb is original


def test_a_patch_ends_where_its_context_raises() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(KeyError), patch(modeling_llama):
        raise KeyError
    assert modeling_llama.apply_rotary_pos_emb is original


def test_an_inner_patch_leaves_what_the_outer_replaced() -> None:
    with patch(modeling_llama):
        ours = modeling_llama.apply_rotary_pos_emb
        with patch(modeling_llama) as inner:
            assert inner.replaced == []
            assert inner.already == [f"{modeling_llama.__name__}.apply_rotary_pos_emb"]
        assert modeling_llama.apply_rotary_pos_emb is ours


def test_patches_of_many_threads_are_all_undone() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    for _ in range(10):
        done = at_once(lambda _: patch(modeling_llama))
        assert sum(bool(one.replaced) for one in done) == 1
        assert sum(bool(one.already) for one in done) == THREADS - 1
        unpatch()
        assert modeling_llama.apply_rotary_pos_emb is original


def test_a_model_patches_its_own_modules_alone() -> None:
    others = modeling_olmo.apply_rotary_pos_emb
    original = modeling_llama.apply_rotary_pos_emb
    model = tiny_llama()
    patch(model)
    assert modeling_llama.apply_rotary_pos_emb is not original
    assert modeling_olmo.apply_rotary_pos_emb is others
    unpatch(model)
    assert modeling_llama.apply_rotary_pos_emb is original


def test_without_an_argument_every_imported_module_is_patched() -> None:
    before = {m: m.apply_rotary_pos_emb for m in (modeling_llama, modeling_olmo, modeling_cohere)}
    patch()
    assert all(module.apply_rotary_pos_emb is not before[module] for module in before)
    unpatch()
    assert all(module.apply_rotary_pos_emb is before[module] for module in before)


def test_unpatch_leaves_what_another_has_put_in_its_place() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    patch(modeling_llama)
    try:
        modeling_llama.apply_rotary_pos_emb = other = object()
        unpatch()
        assert modeling_llama.apply_rotary_pos_emb is other
    finally:
        modeling_llama.apply_rotary_pos_emb = original


def test_a_replacement_has_the_signature_of_the_original() -> None:
    for module in (modeling_llama, modeling_deepseek_v3):
        original = module.apply_rotary_pos_emb
        patch(module)
        ours = module.apply_rotary_pos_emb
        assert inspect.signature(ours) == inspect.signature(original)
        assert ours.__name__ == original.__name__
        assert ours.__doc__ == original.__doc__


def test_a_function_of_another_meaning_is_left_alone_by_name() -> None:
    module = modeling_muse_glimmer_assistant
    original = module.apply_rotary_pos_emb
    done = patch(module)
    assert done.replaced == []
    assert list(done.left_alone) == [f"{module.__name__}.apply_rotary_pos_emb"]
    assert module.apply_rotary_pos_emb is original


def module_with(function: Callable[..., Any]) -> ModuleType:
    """Makes a module that has the function under the name that patch looks for."""
    module = ModuleType("of_a_user")
    module.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
    return module


def test_a_function_that_does_more_than_rotate_is_left_alone() -> None:
    def rotate_and_scale(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return 2 * q, k

    done = patch(module_with(rotate_and_scale))
    assert "of_a_user.apply_rotary_pos_emb" in done.left_alone


def reason(function: Callable[..., Any]) -> str:
    """Returns why a function is left alone."""
    return patch(module_with(function)).left_alone["of_a_user.apply_rotary_pos_emb"]


def test_the_reason_names_what_a_function_takes() -> None:
    def complex_table(q: Any, k: Any, freqs_cis: Any) -> Any:
        raise NotImplementedError

    def other_shapes(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        raise ValueError("expected six dimensions")

    def mixed(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        cos = (cos + torch.cat(cos.chunk(2, dim=-1)[::-1], dim=-1)) / 2
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    assert reason(complex_table) == (
        "its parameters are (q, k, freqs_cis): it takes freqs_cis, not cos and sin"
    )
    assert reason(other_shapes) == (
        "it rejects the trial tensors (ValueError: expected six dimensions)"
    )
    assert reason(mixed) == "it mixes the two values that its tables have for a pair"


def serve(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what takes the place of a function."""
    module = module_with(function)
    assert not patch(module).left_alone
    assert module.apply_rotary_pos_emb is not function
    ours: Callable[..., Any] = module.apply_rotary_pos_emb
    return ours


def half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@pytest.mark.parametrize("shape", [(5, 16), (2, 1, 5, 16), (1, 16)])
def test_tables_that_broadcast_as_they_are_are_served(shape: tuple[int, ...]) -> None:
    def rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return q * cos + half(q) * sin, k * cos + half(k) * sin

    q, k = q_and_k()
    cos, sin = random_values(shape, seed=2), random_values(shape, seed=3)
    torch.testing.assert_close(serve(rotate)(q, k, cos, sin), rotate(q, k, cos, sin))


@pytest.mark.parametrize(("dim", "layout"), [(1, "BHSD"), (-2, "BSHD"), (2, "BSHD")])
def test_a_dimension_that_is_no_argument_is_served(dim: int, layout: str) -> None:
    def rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=dim)

    q, k = q_and_k()
    cos, sin = different_tables()
    if layout == "BSHD":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    torch.testing.assert_close(serve(rotate)(q, k, cos, sin), rotate(q, k, cos, sin))


def test_rows_that_are_picked_are_served() -> None:
    def rotate(
        q: Any, k: Any, cos: Any, sin: Any, position_ids: Any, unsqueeze_dim: int = 2
    ) -> Any:
        cos, sin = cos[position_ids], sin[position_ids]
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    q, k = (x.transpose(1, 2) for x in q_and_k())
    cos, sin = random_values((9, 16), seed=2), random_values((9, 16), seed=3)
    ids = torch.tensor([[3, 1, 4, 1, 5], [8, 2, 6, 5, 3]])
    expected = rotate(q, k, cos, sin, ids)
    torch.testing.assert_close(serve(rotate)(q, k, cos, sin, ids), expected)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@torch.no_grad()
def test_values_are_rotated_with_queries_and_keys(unsqueeze_dim: int) -> None:
    original = modeling_clvp.apply_rotary_pos_emb
    qkv = [random_values((2, 4, 5, 16), seed=seed) for seed in range(3)]
    if unsqueeze_dim == 2:
        qkv = [x.transpose(1, 2) for x in qkv]
    cos, sin = random_values((9, 16), seed=3), random_values((9, 16), seed=4)
    ids = torch.tensor([[3, 1, 4, 1, 5], [8, 2, 6, 5, 3]])
    expected = original(*qkv, cos, sin, ids, unsqueeze_dim)
    patch(modeling_clvp)
    assert modeling_clvp.apply_rotary_pos_emb is not original
    actual = modeling_clvp.apply_rotary_pos_emb(*qkv, cos, sin, ids, unsqueeze_dim)
    torch.testing.assert_close(actual, expected)


def test_tokens_before_those_of_the_tables_come_out_unchanged() -> None:
    original = modeling_dinov3_vit.apply_rotary_pos_emb
    q, k = random_values((2, 4, 7, 16)), random_values((2, 4, 7, 16), seed=1)
    cos, sin = random_values((5, 16), seed=2), random_values((5, 16), seed=3)
    patch(modeling_dinov3_vit)
    actual = modeling_dinov3_vit.apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(actual, original(q, k, cos, sin))
    assert_same_bits(actual[0][..., :2, :], q[..., :2, :])
    with_others = modeling_dinov3_vit.apply_rotary_pos_emb(q, k, cos, sin, other=1)
    assert_same_bits(with_others[0], original(q, k, cos, sin)[0])


def test_the_default_of_an_option_is_kept() -> None:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 2) -> Any:
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)

    q, k = (x.transpose(1, 2) for x in q_and_k())
    cos, sin = different_tables()
    torch.testing.assert_close(serve(rotate)(q, k, cos, sin), rotate(q, k, cos, sin))


def test_modules_without_such_a_function_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected model_or_module to have .* got Linear"):
        patch(nn.Linear(2, 2))


@pytest.mark.parametrize("function", [patch, unpatch])
@pytest.mark.parametrize(("given", "kind"), [("llama", "str"), (nn.Linear, "type"), ([], "list")])
def test_what_is_neither_a_model_nor_a_module_is_refused(
    function: Callable[..., Any], given: object, kind: str
) -> None:
    name = f"torch_rope.integrations.transformers.{function.__name__}"
    rule = "expected model_or_module to be a model, a Python module or None"
    with pytest.raises(TypeError, match=re.escape(f"{name}(): {rule}, but got {kind}")):
        function(given)


# Tables whose two values for a pair differ, and the proof that they do not.


def exact_rotation(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates halves by tables with a value for each element, in float64."""
    first, second = q.double().chunk(2, dim=-1)
    return q.double() * cos.double() + torch.cat((-second, first), dim=-1) * sin.double()


def different_tables() -> tuple[Tensor, Tensor]:
    """Draws tables for Llama's function whose halves differ."""
    return random_values((2, 5, 16), seed=2), random_values((2, 5, 16), seed=3)


def q_and_k() -> tuple[Tensor, Tensor]:
    return random_values((2, 4, 5, 16)), random_values((2, 2, 5, 16), seed=1)


def test_tables_whose_halves_differ_come_after_those_of_position_0() -> None:
    q, k = q_and_k()
    patch(modeling_llama)
    rotate = modeling_llama.apply_rotary_pos_emb
    at_0 = torch.ones(2, 5, 16), torch.zeros(2, 5, 16)
    torch.testing.assert_close(rotate(q, k, *at_0), (q, k))
    cos, sin = different_tables()
    for actual, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        expected = exact_rotation(x, cos.unsqueeze(1), sin.unsqueeze(1))
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_takes_tables_with_two_values_for_a_pair(form: str) -> None:
    module, name, columns, width = form_of(form)
    q, k = random_values((2, 4, 5, width)), random_values((2, 2, 5, width), seed=1)
    cos, sin = (random_values((2, 5, 8 if columns == "single" else 16), seed=i) for i in (2, 3))
    expected = getattr(module, name)(q, k, cos, sin)
    patch(module)
    actual = getattr(module, name)(q, k, cos, sin)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def tiny_hunyuan() -> Any:
    torch.manual_seed(0)
    config = transformers.HunYuanVLConfig().text_config
    options = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2, 2]}
    config = type(config)(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=options,
    )
    model = modeling_hunyuan_vl.HunYuanVLTextModel(config).eval()
    tiny_transformers.enliven(model)
    return model


AXES = torch.randint(50, (4, 2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["model", "module"])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_an_image_comes_after_a_text(target: str, compiled: bool) -> None:
    model = tiny_hunyuan()
    text, image = {"input_ids": TOKENS}, {"input_ids": TOKENS, "position_ids": AXES}
    expected = [model(**given).last_hidden_state for given in (text, image)]
    patch(model if target == "model" else modeling_hunyuan_vl)
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = [model(**given).last_hidden_state for given in (text, image)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def everything(*arguments: object, **options: object) -> CheckpointPolicy:
    """A policy of selective checkpointing: all results are saved."""
    return CheckpointPolicy.MUST_SAVE


def slices(context: object, operator: object, *arguments: object, **options: object) -> Any:
    """A policy of selective checkpointing: slices are saved."""
    if operator == torch.ops.aten.slice.Tensor:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {"everything": everything, "slices": slices}


def checkpointed(
    call: Callable[..., Any], policy: Callable[..., CheckpointPolicy]
) -> Callable[..., Any]:
    """Returns the call under selective checkpointing."""
    context = partial(create_selective_checkpoint_contexts, policy)

    def run(**inputs: Tensor) -> Any:
        return checkpoint(call, use_reentrant=False, context_fn=context, **inputs)

    return run


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("target", ["model", "module"])
def test_the_first_forward_may_be_under_selective_checkpointing(target: str, policy: str) -> None:
    model = tiny_llama().model

    def gradients() -> tuple[Tensor, ...]:
        output = checkpointed(model, POLICIES[policy])(input_ids=TOKENS, use_cache=False)
        return torch.autograd.grad(output[0].square().sum(), list(model.parameters()))

    expected = gradients()
    patch(model if target == "model" else modeling_llama)
    torch.testing.assert_close(gradients(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_layers_may_be_under_selective_checkpointing(policy: str) -> None:
    model = tiny_llama().model.train()
    context = partial(create_selective_checkpoint_contexts, POLICIES[policy])
    expected = torch.autograd.grad(model(TOKENS)[0].square().sum(), list(model.parameters()))
    patch(model)  # The tables come from outside of what is computed again.
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": context})
    actual = torch.autograd.grad(model(TOKENS)[0].square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("halves", ["alike", "different"])
def test_vmap_over_tables_comes_before_any_other_call(halves: str) -> None:
    q, k = q_and_k()
    angles = random_values((3, 2, 5, 16), seed=4)
    if halves == "alike":
        angles = torch.cat((angles[..., :8],) * 2, dim=-1)

    def rotate(t: Tensor) -> tuple[Tensor, Tensor]:
        return modeling_llama.apply_rotary_pos_emb(q, k, t.cos(), t.sin())

    expected = torch.vmap(rotate)(angles)
    patch(modeling_llama)
    torch.testing.assert_close(torch.vmap(rotate)(angles), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_vmap_over_a_model_comes_before_any_other_call() -> None:
    model = tiny_llama().model
    ids = torch.stack((TOKENS, TOKENS.flip(-1), TOKENS))

    def run(given: Tensor) -> Tensor:
        output: Tensor = model(given, position_ids=TOKENS, use_cache=False)[0]
        return output

    expected = torch.stack([run(given) for given in ids])
    patch(model)
    torch.testing.assert_close(torch.vmap(run)(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records whether the operator is given half of a table or all of it."""
    seen: list[str] = []

    def watched(operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            seen.append("full" if options["full_width"] else "half")
            return operator(*tensors, **options)

        return call

    for name in ("apply_cos_sin", "norm_apply_cos_sin"):
        monkeypatch.setattr(_forms, name, watched(getattr(_forms, name)))
    return seen


def used(widths: list[str], model: Any, **options: Any) -> str:
    """Runs a model, and returns which tables it used."""
    widths.clear()
    with torch.no_grad():
        model(TOKENS, **options)
    assert len(set(widths)) == 1
    return widths[0]


def test_half_a_table_is_used_after_a_proof_alone(widths: list[str]) -> None:
    model, other = tiny_llama(), tiny_llama()
    with patch(modeling_llama):
        assert used(widths, model) == "full"
    with patch(model) as done:
        assert used(widths, model) == "half"
        assert used(widths, other) == "full"
        assert used(widths, copy.deepcopy(model)) == "half"
        done.unpatch()
        patch(modeling_llama)
        assert used(widths, model) == "full"


def test_a_rotary_module_that_comes_later_has_no_proof(widths: list[str]) -> None:
    model = tiny_llama()
    patch(model)
    model.model.rotary_emb = tiny_llama().model.rotary_emb
    assert used(widths, model) == "full"
    patch(model)
    assert used(widths, model) == "half"


def test_a_rotary_module_that_changes_loses_its_proof(widths: list[str]) -> None:
    def second_values_negated(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = tables
        return cos, torch.cat((sin[..., :8], -sin[..., 8:]), dim=-1)

    class Changed(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            return second_values_negated(super().forward(x, position_ids))

    def forward(module: nn.Module) -> None:
        own = module.forward
        module.forward = lambda *given, **named: second_values_negated(own(*given, **named))

    changes: list[Callable[[nn.Module], Any]] = [
        forward,
        lambda module: setattr(module, "__class__", Changed),
        lambda module: module.register_forward_hook(
            lambda _, given, tables: second_values_negated(tables), prepend=True
        ),
        lambda module: module.register_forward_pre_hook(lambda _, given: given),
        lambda module: setattr(module, "rope_type", "another"),
    ]
    for change in changes:
        model = tiny_llama()
        patch(model)
        assert used(widths, model.train()) == used(widths, model.eval()) == "half"
        change(model.model.rotary_emb)
        assert used(widths, model) == "full"
        actual = model(TOKENS).logits
        unpatch()
        torch.testing.assert_close(actual, model(TOKENS).logits)
        patch(model)
        assert (used(widths, model) == "half") == (change is changes[-1])
        unpatch()


def rotary_module(table: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> type[nn.Module]:
    """Makes a class of rotary modules from what it does to the table of sines."""

    class Rotary(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            cos, sin = super().forward(x, position_ids)
            return cos, table(self, sin, position_ids)

    return Rotary


def scaled(sin: Tensor, by: Tensor | float) -> Tensor:
    """Scales the second half of a table."""
    half = sin.shape[-1] // 2
    return torch.cat((sin[..., :half], sin[..., half:] * by), dim=-1)


@pytest.mark.parametrize(
    "table",
    [
        lambda module, sin, ids: scaled(sin, 0.5) if module.training else sin,
        lambda module, sin, ids: scaled(sin, 0.5) if sin.dtype == torch.bfloat16 else sin,
        lambda module, sin, ids: scaled(sin, 0.5) if torch.is_grad_enabled() else sin,
        lambda module, sin, ids: scaled(sin, 0.5) if ids.shape[-1] > 20 else sin,
        lambda module, sin, ids: scaled(sin, torch.where(ids[..., None] < 0, 0.5, 1.0)),
        lambda module, sin, ids: scaled(sin, torch.where(ids[..., None] >= 1 << 20, 0.5, 1.0)),
    ],
    ids=["training", "dtype", "grad", "length", "negative", "far"],
)
def test_a_difference_that_shows_later_is_no_proof(widths: list[str], table: Any) -> None:
    model = tiny_llama()
    model.model.rotary_emb = rotary_module(table)(model.config)
    patch(model.eval())
    with torch.no_grad():
        assert used(widths, model) == "full"


@pytest.mark.parametrize("kind", ["integer buffer", "complex buffer", "attribute", "own forward"])
def test_what_a_probe_cannot_vary_is_no_proof(widths: list[str], kind: str) -> None:
    model = tiny_llama()
    module = model.model.rotary_emb
    if kind == "attribute":
        module.table = torch.ones(2)
    elif kind == "own forward":
        module.forward = module.forward
    else:
        dtype = torch.int64 if kind.startswith("integer") else torch.complex64
        module.register_buffer("table", torch.ones(2, dtype=dtype))
    patch(model)
    assert used(widths, model) == "full"


def test_a_table_that_a_module_keeps_and_changes_is_used_in_full(widths: list[str]) -> None:
    class Keeping(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            if not hasattr(self, "_kept"):
                self._kept = super().forward(x, position_ids)
            return self._kept

    model = tiny_llama()
    model.model.rotary_emb = Keeping(model.config)
    patch(model)
    assert used(widths, model) == "half"
    with torch.no_grad():
        model.model.rotary_emb._kept[1][..., 8:] *= 0.5
    assert used(widths, model) == "full"
    assert used(widths, model) == "full"


def test_a_module_without_a_signature_is_passed_over() -> None:
    model = tiny_llama()
    model.extra = torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))
    model.other = nn.Module()
    model.other.forward = torch._C._nn.gelu
    assert patch(model).replaced


def test_copies_register_nothing_after_the_patch_ended(widths: list[str]) -> None:
    model = tiny_llama()
    patch(model)
    other = copy.deepcopy(model)
    unpatch()
    with patch(modeling_llama):
        assert used(widths, other) == "full"


def test_an_ended_patch_leaves_a_later_one() -> None:
    first = patch(modeling_llama)
    unpatch()
    patch(modeling_llama)
    ours = modeling_llama.apply_rotary_pos_emb
    first.unpatch()
    assert modeling_llama.apply_rotary_pos_emb is ours


def test_a_function_that_changes_its_arguments_is_left_alone() -> None:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        rotated = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return q.copy_(rotated[0]), k.copy_(rotated[1])

    done = patch(module_with(rotate))
    assert list(done.left_alone.values()) == ["it changes q in place"]


def test_a_patch_under_autocast_is_the_same() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = patch(modeling_llama)
    assert done.left_alone == {}


def test_both_widths_give_the_same_bits() -> None:
    model = tiny_llama().bfloat16()
    with patch(modeling_llama), torch.no_grad():
        full = model(TOKENS).logits
    with patch(model), torch.no_grad():
        half = model(TOKENS).logits
    assert_same_bits(half, full)


def test_a_table_that_was_changed_is_used_in_full(widths: list[str]) -> None:
    model = tiny_llama()
    patch(model)
    q, k = q_and_k()
    cos, sin = model.model.rotary_emb(q, torch.arange(10).view(2, 5))
    widths.clear()
    modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    modeling_llama.apply_rotary_pos_emb(q, k, cos.clone(), sin)
    cos[..., 8:] = 0.5
    expected = exact_rotation(q, cos.unsqueeze(1), sin.unsqueeze(1))
    actual, _ = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    assert widths == ["half", "full", "full"]


class LearnedRotary(nn.Module):
    """Has a frequency for each element, and pairs agree until they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * self.frequencies
        return angles.cos(), angles.sin()


def test_frequencies_that_agree_by_chance_are_no_proof(widths: list[str]) -> None:
    model = tiny_llama()
    model.model.rotary_emb = LearnedRotary()
    patch(model)
    assert used(widths, model) == "full"


def test_axes_that_differ_are_no_proof(widths: list[str]) -> None:
    model = tiny_hunyuan()
    patch(model)
    assert used(widths, model) == "full"


def test_a_proof_covers_every_type_of_layer(widths: list[str]) -> None:
    module = tiny_transformers.load("gemma3")
    model = next(tiny_transformers.subjects(module, {"apply_rotary_pos_emb"})).model
    patch(model)
    assert used(widths, model) == "half"


def test_a_proof_leaves_the_rotary_module_as_it_was() -> None:
    model = tiny_llama(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    )
    rotary = model.model.rotary_emb
    before = {name: value.clone() for name, value in rotary.named_buffers()}
    random_state = torch.get_rng_state()
    patch(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert rotary.max_seq_len_cached == model.config.max_position_embeddings
    for name, value in rotary.named_buffers():
        assert torch.equal(value, before[name])


def test_a_model_on_meta_is_patched(widths: list[str]) -> None:
    with torch.device("meta"):
        model = tiny_llama()
    patch(model)
    model.to_empty(device="cpu")
    assert used(widths, model) == "full"


def test_a_patched_model_is_pickled() -> None:
    model = tiny_llama()
    patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert_same_bits(loaded(TOKENS).logits, model(TOKENS).logits)


# Every family, or a few.

A_FEW = ("llama", "cohere", "nanochat", "deepseek_v3", "gemma3", "hunyuan_vl", "dinov3_vit")
A_FEW += ("qwen3", "olmo2", "llama4")
CHOSEN = FAMILIES if os.environ.get("ROPE_ALL_FAMILIES") else A_FEW


@cache
def subjects_of(family: str) -> list[Subject]:
    """Returns models of a family that together call its functions."""
    module = tiny_transformers.load(family)
    names = {name for name in FUNCTIONS if hasattr(module, name)}
    return list(tiny_transformers.subjects(module, names))


Run = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def compare_runs(family: str, run: Run, plain: Run, targets: tuple[str, ...]) -> None:
    """Compares what models give patched and not, where that is right unpatched.

    Args:
        family: The models'.
        run: What is compared.
        plain: What it should give.
        targets: Of the patches.
    """
    module = tiny_transformers.load(family)
    reasons = []
    for model, inputs in ((subject.model, subject.inputs) for subject in subjects_of(family)):
        expected = plain(model, inputs)
        with functions_wrapped(module, rounded_otherwise):
            allowed = 4 * distance(plain(model, inputs), expected) + 4 * EPSILON
        try:
            assert distance(run(model, inputs), expected) <= allowed
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            continue
        for target in targets:
            with patch(module if target == "module" else model):
                assert distance(run(model, inputs), expected) <= allowed
    if reasons:
        pytest.skip(f"unpatched: {reasons}")


@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_compiles_from_the_first_call(family: str) -> None:
    def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        torch._dynamo.reset()
        return first_output(torch.compile(model, backend="eager", fullgraph=True), inputs)

    compare_runs(family, run, first_output, ("model",))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", CHOSEN)
def test_a_family_runs_under_selective_checkpointing(family: str, policy: str) -> None:
    def plain(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return torch.cat([result.flatten() for result in results(model, inputs)])

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        caches = "use_cache" in inspect.signature(type(model).forward).parameters
        call = checkpointed(partial(model, use_cache=False) if caches else model, POLICIES[policy])
        return torch.cat([result.flatten() for result in results(model, inputs, call)])

    compare_runs(family, run, plain, ("module", "model"))


def calls_of(module: ModuleType, subject: Subject) -> dict[str, dict[str, Any]]:
    """Returns the arguments of a call of each function in a run of the model."""
    seen: dict[str, dict[str, Any]] = {}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            bound = inspect.signature(original).bind(*arguments, **options)
            seen.setdefault(name, dict(bound.arguments))
            return original(*arguments, **options)

        return watched

    with functions_wrapped(module, wrap), torch.no_grad():
        subject.model(**subject.inputs)
    return seen


@pytest.mark.parametrize("family", CHOSEN)
def test_the_functions_of_a_family_run_under_vmap(family: str) -> None:
    module = tiny_transformers.load(family)
    for subject in subjects_of(family):
        for name, given in calls_of(module, subject).items():
            keys = given.keys() & {"cos", "sin", "freqs_cis"}
            tables = {key: given.pop(key) for key in keys}
            batch = {key: torch.stack((t, -t, t.flip(-1))) for key, t in tables.items()}

            def rotate(some: dict[str, Tensor], name: str = name, given: Any = given) -> Any:
                return getattr(module, name)(**given, **some)

            expected = torch.vmap(rotate)(batch)
            with patch(module):
                torch.testing.assert_close(torch.vmap(rotate)(batch), expected)


def test_a_patched_model_calls_the_operator() -> None:
    model = tiny_llama()
    patch(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(TOKENS)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["rope::apply_cos_sin_qk"] == 2  # One for each layer.


def test_a_patched_model_compiles_to_one_graph_with_the_operator() -> None:
    model = tiny_llama()
    patch(model)
    expected = model(TOKENS).logits
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    actual = torch.compile(model, backend=backend, fullgraph=True)(TOKENS).logits
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.rope.apply_cos_sin_qk.default) == 2
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_generation_with_a_cache_gives_the_same_tokens(family: str) -> None:
    module = tiny_transformers.load(family)
    subject = next(
        tiny_transformers.subjects(module, {name for name in FUNCTIONS if hasattr(module, name)})
    )
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = subject.model.generate(TOKENS, **options)
    patch(subject.model)
    assert torch.equal(subject.model.generate(TOKENS, **options), expected)


def test_keys_in_the_cache_have_the_layout_of_the_original() -> None:
    module = modeling_deepseek_v3
    q, k = random_values((2, 4, 5, 16)), random_values((2, 1, 5, 16), seed=1)
    cos, sin = (table("halves", (2, 5), seed) for seed in (2, 3))
    expected = module.apply_rotary_pos_emb_interleave(q, k, cos, sin)
    patch(module)
    actual = module.apply_rotary_pos_emb_interleave(q, k, cos, sin)
    torch.testing.assert_close(actual, expected)


def kernelized(model: nn.Module, mode: str) -> nn.Module:
    """Replaces a model's marked functions by the registry's."""
    kernels = pytest.importorskip("kernels")
    with kernels.use_kernel_mapping(kernel_mapping(), inherit_mapping=False):
        modes = kernels.Mode
        return kernels.kernelize(
            model,
            mode={
                "training": modes.TRAINING,
                "inference": modes.INFERENCE,
                "compiled": modes.TRAINING | modes.TORCH_COMPILE,
            }[mode],
            device="cpu",
            use_fallback=False,
        )


@pytest.fixture(params=["llama.modeling_llama", "olmo.modeling_olmo", "gpt_oss.modeling_gpt_oss"])
def marked(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[..., Any], Any]:
    """A layer with a function of transformers, marked; the function; what it is given."""
    kernels = pytest.importorskip("kernels")
    module = import_module(f"transformers.models.{request.param}")
    original = module.apply_rotary_pos_emb
    assert inspect.isfunction(original), "transformers has marked it already"
    function = kernels.use_kernel_forward_from_hub("rotary_pos_emb")(original)

    @kernels.use_kernelized_func(function)
    class Attention(nn.Module):
        def forward(self, *arguments: Tensor) -> Any:
            return function(*arguments)

    columns = "single" if "gpt_oss" in request.param else "halves"
    q = random_values((2, 4, 5, 16)).requires_grad_()
    k = random_values((2, 2, 5, 16), seed=1).requires_grad_()
    return Attention(), original, (q, k, table(columns, (2, 5), 2), table(columns, (2, 5), 3))


@pytest.mark.parametrize("mode", ["training", "inference", "compiled"])
def test_the_registry_takes_the_operator(mode: str, marked: Any) -> None:
    layer, original, arguments = marked
    expected = original(*arguments)
    layer = kernelized(layer, mode)
    if mode == "compiled":
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = layer(*arguments)
    assert "rope::apply_cos_sin_qk" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(actual, expected)
    gradients = [
        torch.autograd.grad(sum(x.float().square().sum() for x in result), arguments[:2])
        for result in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)
    narrow = (*(x.detach().bfloat16() for x in arguments[:2]), *arguments[2:])
    assert [x.dtype for x in layer(*narrow)] == [x.dtype for x in original(*narrow)]


@pytest.mark.parametrize("function", [patch, unpatch, Patch, kernel_mapping])
def test_the_examples_of_a_docstring_run(function: Callable[..., Any]) -> None:
    if function is kernel_mapping:
        pytest.importorskip("kernels")
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(function, globs={})
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0
