"""transformers' models with their rotation replaced: every family, and how the patch behaves.

``test_a_family_computes_the_same`` runs a tiny model of each family of transformers that defines a
function that rotates. What it could not run, docs/transformers.md lists, and each test holds the
page to that. ``python -m pytest tests/test_transformers.py -k report -s`` prints the list.
"""

import copy
import doctest
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference import assert_same_bits, random_values
from torch import Tensor, nn

pytest.importorskip("transformers")

import tiny_transformers
import transformers
from tiny_transformers import Subject, functions_wrapped
from torch_rope.integrations.transformers import FUNCTIONS, kernel_mapping, patch, unpatch
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama
from transformers.models.muse_glimmer_assistant import modeling_muse_glimmer_assistant
from transformers.models.olmo import modeling_olmo

transformers.logging.set_verbosity_error()

FAMILIES = tiny_transformers.families()
PAGE = Path(__file__).parent.parent / "docs" / "transformers.md"

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


def results(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns a model's first output, and the gradients of all its parameters in one vector."""
    torch.manual_seed(0)
    output = next(differentiable_tensors(model(**inputs)))
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


@cache
def outcomes(family: str) -> dict[str, str]:
    """Runs a family; returns "covered", or why it is not, for each of its functions."""
    module = tiny_transformers.load(family)
    functions = [name for name in FUNCTIONS if hasattr(module, name)]
    with patch(module) as done:
        left_alone = {name.rpartition(".")[2]: why for name, why in done.left_alone.items()}
    found = {name: f"left alone: {why}" for name, why in left_alone.items()}
    text = inspect.getsource(module)
    for name in functions:
        if text.count(f"{name}(") == 1:  # Its definition.
            found.setdefault(name, "not run: its module does not call it")
    if found.keys() == set(functions):
        return found
    for subject in tiny_transformers.subjects(module, set(functions) - found.keys()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_float32(module, subject)
        if family not in WITHOUT_BFLOAT16:
            check_bfloat16(module, subject)
        kept = "".join(str(warning.message) for warning in caught)
        for name in subject.functions:
            keeps = f"{module.__name__}.{name} keeps its own arithmetic" in kept
            found.setdefault(name, "left alone: " + DIFFERENT_ANGLES if keeps else "covered")
    for name in functions:
        found.setdefault(name, "not run: no tiny model of it was made")
    return found


DIFFERENT_ANGLES = "its tables give the two members of a pair different angles"


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
    others = {name: outcome for name, outcome in found.items() if outcome != "covered"}
    covered = len(found) - len(others)
    families = len({name.partition(".")[0] for name in found.keys() - others.keys()})
    with capsys.disabled():
        print(f"\n{covered} of {len(found)} functions covered, in {families} families")
        for name, outcome in others.items():
            print(f"| `{name}` | {outcome} |")
    assert f"**{covered} of {len(found)} functions, in {families} families**" in PAGE.read_text()
    assert others == documented()


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
    with patch(module), warnings.catch_warnings():
        warnings.simplefilter("error")  # The function would say that it keeps its own arithmetic.
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
        assert modeling_llama.apply_rotary_pos_emb is ours


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


def test_modules_without_such_a_function_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected modules with one of .* none in Linear"):
        patch(nn.Linear(2, 2))


def test_tables_with_two_angles_in_a_pair_are_left_to_the_original() -> None:
    q, k = random_values((2, 4, 5, 16)), random_values((2, 2, 5, 16), seed=1)
    cos, sin = random_values((2, 5, 16), seed=2), random_values((2, 5, 16), seed=3)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    patch(modeling_llama)
    with pytest.warns(UserWarning, match=r"llama.*keeps its own arithmetic"):
        actual = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    assert_same_bits(again[0], expected[0])


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


@pytest.mark.parametrize("function", [patch, kernel_mapping])
def test_the_examples_of_a_docstring_run(function: Callable[..., Any]) -> None:
    if function is kernel_mapping:
        pytest.importorskip("kernels")
    finder = doctest.DocTestFinder()
    (example,) = finder.find(function, globs={})
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0
