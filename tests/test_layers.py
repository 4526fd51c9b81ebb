"""RotaryEmbedding: what it holds and rotates by, configurations, lengths, compiling, saving."""

import copy
import pickle
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_rope
from reference import apply, assert_rotated, assert_same_bits, random_inv_freq, random_values
from torch import Tensor, nn
from torch.fx import GraphModule
from torch_rope import RotaryEmbedding

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]

LENGTH = 64  # What the schemes below are trained for.
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + n / 16 for n in range(16)],
    "long_factor": [2.0 + n for n in range(16)],
    "original_max_position_embeddings": LENGTH,
    "factor": 4.0,
}
FOLLOWING_LENGTH = [pytest.param(DYNAMIC, id="dynamic"), pytest.param(LONGROPE, id="longrope")]


def inputs(device: str, *, first: int = 0, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q (B, S, H, D), k and positions (S, 1)."""
    q = random_values((2, tokens, 4, 32), device=device)
    k = random_values((2, tokens, 2, 32), device=device, seed=1)
    return q, k, torch.arange(first, first + tokens, device=device).unsqueeze(-1)


def assert_same_pair(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts that two pairs agree in every bit."""
    assert isinstance(actual, tuple)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def frequencies_at(scheme: dict[str, Any], seq_len: int | None, device: str) -> Tensor:
    """Returns the frequencies of a scheme for a length."""
    return torch_rope.frequencies(
        scheme, 32, max_position_embeddings=LENGTH, seq_len=seq_len, device=device
    ).inv_freq


# ---- What it rotates by ----


def test_it_rotates_a_pair_and_one_tensor_by_its_frequencies(device: str) -> None:
    q, k, positions = inputs(device, first=100)
    rotary = RotaryEmbedding(32, LINEAR, device=device)
    inv_freq = frequencies_at(LINEAR, None, device)
    assert_rotated(rotary(q, positions), apply(q, positions, inv_freq))
    assert_same_pair(rotary(q, k, positions), torch_rope.apply((q, k), positions, inv_freq))
    assert_same_bits(rotary(q, positions), torch_rope.apply(q, positions, inv_freq))


def test_positions_may_be_given_by_name(device: str) -> None:
    q, k, positions = inputs(device)
    rotary = RotaryEmbedding(32, device=device)
    assert_same_pair(rotary(q, k, positions=positions), rotary(q, k, positions))
    assert_same_bits(rotary(q, positions=positions), rotary(q, positions))


def test_positions_are_needed(device: str) -> None:
    q, _, _ = inputs(device)
    with pytest.raises(TypeError, match="expected positions to be a tensor, but got None"):
        RotaryEmbedding(32, device=device)(q)


def test_max_wavelength_is_the_base_of_the_frequencies(device: str) -> None:
    rotary = RotaryEmbedding(32, max_wavelength=5e5, device=device)
    assert_same_bits(rotary.inv_freq, frequencies_at({"rope_theta": 5e5}, None, device))


def test_options_reach_the_operator(device: str) -> None:
    q, k = (random_values((2, 40, 9), device=device, seed=seed) for seed in range(2))
    positions = torch.arange(9, device=device)
    options: dict[str, Any] = {
        "attention_factor": 1.5,
        "embedding_axis": 1,
        "rotary_offset": 5,
        "interleaved": True,
    }
    rotary = RotaryEmbedding(32, LINEAR, **options, device=device)
    expected = torch_rope.apply((q, k), positions, rotary.inv_freq, rotary_dim=32, **options)
    assert_same_pair(rotary(q, k, positions), expected)
    assert_same_bits(rotary(q, positions), expected[0])


def test_the_attention_factor_is_that_of_the_scheme(device: str) -> None:
    q, k, positions = inputs(device)
    scheme = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
    }
    rotary = RotaryEmbedding(32, scheme, device=device)
    inv_freq, attention_factor = torch_rope.frequencies(scheme, 32, device=device)
    assert attention_factor > 1.3
    expected = torch_rope.apply((q, k), positions, inv_freq, attention_factor=attention_factor)
    assert_same_pair(rotary(q, k, positions), expected)
    plain = RotaryEmbedding(32, scheme, attention_factor=1.0, device=device)
    assert_same_bits(plain(q, positions), torch_rope.apply(q, positions, inv_freq))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_may_be_given_for_several_axes(device: str, dtype: torch.dtype) -> None:
    q, k, _ = inputs(device)
    inv_freq = random_inv_freq((3, 16), dtype, device)
    positions = torch.arange(27, device=device).view(3, 9, 1)
    rotary = RotaryEmbedding(32, inv_freq=inv_freq)
    assert_same_pair(rotary(q, k, positions), torch_rope.apply((q, k), positions, inv_freq))


def test_frequencies_of_another_number_than_rotary_dim_are_refused(device: str) -> None:
    q, _, positions = inputs(device)
    with pytest.raises(ValueError, match="expected inv_freq to have rotary_dim / 2 = 16 columns"):
        RotaryEmbedding(32, inv_freq=random_inv_freq((8,), device=device))(q, positions)


def test_given_frequencies_are_copied(device: str) -> None:
    inv_freq = random_inv_freq((16,), torch.float32, device)
    rotary = RotaryEmbedding(32, inv_freq=inv_freq)
    kept = inv_freq.clone()
    inv_freq.zero_()
    assert_same_bits(rotary.inv_freq, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_parameters": LINEAR, "inv_freq": torch.ones(16)}, "but got both"),
        (
            {"rope_parameters": LINEAR, "max_wavelength": 5e5},
            "expected max_wavelength to be left at its default together with rope_theta",
        ),
        (
            {"inv_freq": torch.ones(16), "max_wavelength": 5e5},
            "expected max_wavelength to be left at its default together with inv_freq",
        ),
        (
            {"rope_parameters": LONGROPE, "learned": True},
            "expected learned to be False .* but got True for longrope",
        ),
        ({"rope_parameters": DYNAMIC}, "expected max_position_embeddings to be given"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(32, **options)


# ---- What it holds ----


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.bfloat16),
    ],
)
def test_frequencies_keep_their_dtype_and_bits(convert: Any, learned: bool) -> None:
    rotary = RotaryEmbedding(32, LINEAR, learned=learned)
    model = convert(nn.Sequential(nn.Linear(2, 2), rotary))
    assert model[0].weight.dtype != torch.float32
    assert_same_bits(model[1].inv_freq, frequencies_at(LINEAR, None, "cpu"))


def test_frequencies_for_long_sequences_keep_their_dtype_too() -> None:
    rotary = RotaryEmbedding(32, LONGROPE).to(torch.bfloat16)
    assert_same_bits(rotary.long_inv_freq, frequencies_at(LONGROPE, LENGTH + 1, "cpu"))


def test_a_gradient_keeps_its_dtype_with_the_frequencies() -> None:
    rotary = RotaryEmbedding(32, learned=True)
    q, _, positions = inputs("cpu")
    rotary(q, positions).sum().backward()
    gradient = rotary.inv_freq.grad.clone()
    rotary.half()
    assert_same_bits(rotary.inv_freq.grad, gradient)


def test_frequencies_move_with_the_module(device: str) -> None:
    q, k, positions = inputs(device)
    rotary = RotaryEmbedding(32, LONGROPE, device="cpu").to(device, torch.bfloat16)
    assert rotary.inv_freq.device.type == rotary.long_inv_freq.device.type == device
    expected = RotaryEmbedding(32, LONGROPE, device=device)(q, k, positions)
    assert_same_pair(rotary(q, k, positions), expected)


@pytest.mark.parametrize("scheme", [LINEAR, LONGROPE])
def test_the_state_has_only_learned_frequencies(scheme: dict[str, Any]) -> None:
    assert not RotaryEmbedding(32, scheme).state_dict()
    assert not list(RotaryEmbedding(32, scheme).parameters())
    assert list(RotaryEmbedding(32, learned=True).state_dict()) == ["inv_freq"]


def test_learned_frequencies_get_the_gradient_of_the_operator(device: str) -> None:
    q, k, positions = inputs(device)
    rotary = RotaryEmbedding(32, learned=True, device=device)
    inv_freq = rotary.inv_freq.detach().clone().requires_grad_()
    pairs = rotary(q, k, positions), torch_rope.apply((q, k), positions, inv_freq)
    for rotated in pairs:
        (rotated[0].square().sum() + (rotated[1] * k).sum()).backward()
    assert inv_freq.grad.abs().min() > 0
    assert_same_bits(rotary.inv_freq.grad, inv_freq.grad)


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
def test_a_module_built_on_the_meta_device_gets_its_frequencies(
    device: str, scheme: dict[str, Any]
) -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH)
    assert rotary.inv_freq.is_meta
    rotary.to_empty(device=device)
    rotary.inv_freq.fill_(torch.nan)
    rotary.reset_parameters()
    q, k, positions = inputs(device, first=LENGTH)
    whole = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    assert_same_bits(rotary.inv_freq, whole.inv_freq)
    assert_same_pair(rotary(q, k, positions), whole(q, k, positions))


def test_given_frequencies_cannot_be_formed_anew() -> None:
    with pytest.raises(RuntimeError, match="expected the frequencies to be of a scheme"):
        RotaryEmbedding(32, inv_freq=torch.ones(16)).reset_parameters()


def test_the_representation_shows_what_it_is() -> None:
    rotary = RotaryEmbedding(32, LINEAR, attention_factor=1.5, interleaved=True)
    shown = "RotaryEmbedding(32, rope_type='linear', attention_factor=1.5, interleaved=True)"
    assert repr(rotary) == shown


# ---- Lengths ----


@pytest.mark.parametrize("scheme", FOLLOWING_LENGTH)
@pytest.mark.parametrize("seq_len", [1, LENGTH, LENGTH + 1, 3 * LENGTH])
def test_frequencies_follow_the_length_that_is_given(
    device: str, scheme: dict[str, Any], seq_len: int
) -> None:
    q, k, positions = inputs(device)
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    inv_freq = frequencies_at(scheme, seq_len, device)
    options = {"attention_factor": rotary.attention_factor}
    expected = torch_rope.apply((q, k), positions, inv_freq, **options)
    assert_same_pair(rotary(q, k, positions, seq_len), expected)
    assert_same_bits(rotary(q, positions, seq_len=seq_len), expected[0])


@pytest.mark.parametrize("scheme", FOLLOWING_LENGTH)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("first", [0, LENGTH - 9, LENGTH - 8, 2 * LENGTH])
def test_frequencies_follow_the_greatest_position_otherwise(
    device: str, scheme: dict[str, Any], dtype: torch.dtype, first: int
) -> None:
    q, k, positions = inputs(device, first=first)
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    expected = rotary(q, k, positions.to(dtype), seq_len=first + 9)
    assert_same_pair(rotary(q, k, positions.to(dtype)), expected)


@pytest.mark.parametrize("scheme", FOLLOWING_LENGTH)
def test_a_long_sequence_leaves_nothing_behind(device: str, scheme: dict[str, Any]) -> None:
    q, k, positions = inputs(device)
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    before = rotary(q, k, positions)
    rotary(q, k, positions + 5 * LENGTH)
    rotary(q, k, positions, seq_len=7 * LENGTH)
    assert_same_pair(rotary(q, k, positions), before)


@pytest.mark.parametrize("scheme", FOLLOWING_LENGTH)
def test_an_empty_sequence_has_no_length(device: str, scheme: dict[str, Any]) -> None:
    q, k, positions = inputs(device, tokens=0)
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    assert rotary(q, k, positions)[0].shape == q.shape


# ---- Compiling, copying, saving ----


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize("given", [True, False])
def test_it_compiles_without_a_graph_break_or_a_graph_for_each_length(
    device: str, scheme: dict[str, Any], given: bool
) -> None:
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, device=device)
    graphs = []

    def keep(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(rotary, fullgraph=True, backend=keep, dynamic=True)
    for tokens in (5, 9, LENGTH, LENGTH + 1, LENGTH + 9, 3 * LENGTH):
        q, k, positions = inputs(device, tokens=tokens)
        arguments = (q, k, positions, tokens) if given else (q, k, positions)
        assert_same_pair(compiled(*arguments), rotary(*arguments))
    follows = scheme is not LINEAR  # Then lengths within the trained one have a graph.
    assert len(graphs) == (2 if given and follows else 1)


def scripted_copies(module: nn.Module, folder: Path) -> list[Any]:
    """Returns the scripted module, and the same saved and loaded."""
    scripted = torch.jit.script(module)
    torch.jit.save(scripted, str(folder / "module.pt"))
    return [scripted, torch.jit.load(str(folder / "module.pt"))]


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize("seq_len", [None, 9, 3 * LENGTH])
def test_it_can_be_scripted_and_saved(
    device: str, tmp_path: Path, scheme: dict[str, Any], seq_len: int | None
) -> None:
    rotary = RotaryEmbedding(
        32,
        scheme,
        max_position_embeddings=LENGTH,
        attention_factor=2,
        interleaved=True,
        device=device,
    )
    for module in scripted_copies(rotary, tmp_path):
        for first in (0, LENGTH):
            q, k, positions = inputs(device, first=first)
            expected = rotary(q, k, positions, seq_len)
            assert_same_pair(module(q, k, positions, seq_len), expected)
            assert_same_bits(module.rotate(k, positions, seq_len), expected[1])


class Attention(nn.Module):
    """Scores of queries against keys, with rotated positions."""

    def __init__(self, rotary: RotaryEmbedding) -> None:
        """Keeps the layer."""
        super().__init__()
        self.rotary = rotary

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        """Returns the scores."""
        q, k = self.rotary(q, k, positions)
        k = self.rotary.rotate(k, positions)
        return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("learned", [False, True])
def test_a_scripted_model_may_hold_it(device: str, tmp_path: Path, learned: bool) -> None:
    model = Attention(RotaryEmbedding(32, LINEAR, learned=learned, device=device))
    arguments = inputs(device)
    for module in scripted_copies(model, tmp_path):
        assert_same_bits(module(*arguments), model(*arguments))


def test_scripted_frequencies_of_another_dtype_are_refused(device: str) -> None:
    q, k, positions = inputs(device)
    scripted = torch.jit.script(RotaryEmbedding(32, device=device)).half()
    with pytest.raises(Exception, match="expected inv_freq to be float32 or float64"):
        scripted(q, k, positions)


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize(
    "copy_of",
    [
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
    ],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_rotates_alike(device: str, scheme: dict[str, Any], copy_of: Any) -> None:
    rotary = RotaryEmbedding(
        32, scheme, max_position_embeddings=LENGTH, attention_factor=1.5, device=device
    )
    other = copy_of(rotary)
    assert other.inv_freq.data_ptr() != rotary.inv_freq.data_ptr()
    for first in (0, LENGTH):
        arguments = inputs(device, first=first)
        assert_same_pair(other(*arguments), rotary(*arguments))


def test_it_survives_export(device: str) -> None:
    model = Attention(RotaryEmbedding(32, LINEAR, device=device))
    arguments = inputs(device)
    exported = torch.export.export(model, arguments).module()
    assert_same_bits(exported(*arguments), model(*arguments))


def test_autocast_leaves_its_frequencies_alone(device: str) -> None:
    q, k, positions = inputs(device, first=1000)
    rotary = RotaryEmbedding(32, DYNAMIC, max_position_embeddings=LENGTH, device=device)
    with torch.autocast(device, torch.bfloat16):
        actual = rotary(q, k, positions)
    assert_same_pair(actual, rotary(q, k, positions))


# ---- Configurations ----

FROM_CONFIG: list[tuple[str, str, str, dict[str, Any], str | None]] = [
    ("llama", "LlamaConfig", "LlamaRotaryEmbedding", {}, None),
    (
        "llama",
        "LlamaConfig",
        "LlamaRotaryEmbedding",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
        },
        None,
    ),
    (
        "llama",
        "LlamaConfig",
        "LlamaRotaryEmbedding",
        {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16384,
        },
        None,
    ),
    (
        "llama",
        "LlamaConfig",
        "LlamaRotaryEmbedding",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": None,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 16384,
        },
        None,
    ),
    ("qwen3", "Qwen3Config", "Qwen3RotaryEmbedding", {}, None),
    ("gemma3", "Gemma3TextConfig", "Gemma3RotaryEmbedding", {}, "sliding_attention"),
    ("gemma3", "Gemma3TextConfig", "Gemma3RotaryEmbedding", {}, "full_attention"),
    ("gemma4", "Gemma4TextConfig", "Gemma4TextRotaryEmbedding", {}, "sliding_attention"),
    ("gemma4", "Gemma4TextConfig", "Gemma4TextRotaryEmbedding", {}, "full_attention"),
    ("modernbert", "ModernBertConfig", "ModernBertRotaryEmbedding", {}, "full_attention"),
    ("gpt_neox", "GPTNeoXConfig", "GPTNeoXRotaryEmbedding", {}, None),
    ("stablelm", "StableLmConfig", "StableLmRotaryEmbedding", {}, None),
    ("gpt_oss", "GptOssConfig", "GptOssRotaryEmbedding", {}, None),
    ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2RotaryEmbedding", {}, None),
    (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3RotaryEmbedding",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 163840,
        },
        None,
    ),
    (
        "phi3",
        "Phi3Config",
        "Phi3RotaryEmbedding",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.1] * 48,
                "long_factor": [8.0] * 48,
            },
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
        None,
    ),
]


@pytest.mark.parametrize(("name", "config", "model", "options", "layer_type"), FROM_CONFIG)
@pytest.mark.parametrize("form", ["object", "dictionary"])
def test_a_configuration_gives_the_frequencies_of_its_model(
    name: str, config: str, model: str, options: dict[str, Any], layer_type: str | None, form: str
) -> None:
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    of_model = getattr(module, config)(**copy.deepcopy(options))
    expected = getattr(module, model)(of_model)
    prefix = "" if layer_type is None else f"{layer_type}_"
    rotary = RotaryEmbedding.from_config(
        of_model if form == "object" else of_model.to_dict(), layer_type=layer_type
    )
    assert_same_bits(rotary.inv_freq, getattr(expected, f"{prefix}inv_freq"))
    assert rotary.attention_factor == getattr(expected, f"{prefix}attention_scaling")
    assert rotary.rotary_dim == 2 * rotary.inv_freq.numel()


def test_a_configuration_of_older_form_is_read(device: str) -> None:
    older = {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "partial_rotary_factor": 0.5,
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    rotary = RotaryEmbedding.from_config(older, interleaved=True, device=device)
    assert rotary.interleaved
    assert_same_bits(rotary.inv_freq, frequencies_at(LINEAR, None, device))


def test_the_sizes_of_gpt_j_are_read() -> None:
    config = {"n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}
    assert RotaryEmbedding.from_config(config).rotary_dim == 64


def test_the_text_part_of_a_configuration_is_read() -> None:
    text = {"head_dim": 64, "rope_theta": 1e6}
    rotary = RotaryEmbedding.from_config({"text_config": text, "head_dim": 80})
    assert_same_bits(rotary.inv_freq, torch_rope.frequencies({"rope_theta": 1e6}, 64).inv_freq)


def test_longrope_of_a_configuration_switches_at_its_trained_length() -> None:
    config = {
        "head_dim": 32,
        "rope_scaling": {
            "type": "su",
            "short_factor": LONGROPE["short_factor"],
            "long_factor": LONGROPE["long_factor"],
        },
        "original_max_position_embeddings": LENGTH,
        "max_position_embeddings": 4 * LENGTH,
    }
    rotary = RotaryEmbedding.from_config(config)
    q, k, positions = inputs("cpu")
    expected = RotaryEmbedding(32, LONGROPE)
    for seq_len in (LENGTH, LENGTH + 1):
        actual = rotary(q, k, positions, seq_len)
        assert_same_pair(actual, expected(q, k, positions, seq_len))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_configuration_with_sections_gives_frequencies_of_three_axes(interleaved: bool) -> None:
    scheme = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}
    expected = torch_rope.mrope_frequencies(
        torch_rope.frequencies(scheme, 32).inv_freq, (8, 4, 4), interleaved=interleaved
    )
    config: dict[str, Any] = {"head_dim": 32, "rope_parameters": scheme}
    rotary = RotaryEmbedding.from_config(config, mrope_interleaved=interleaved)
    assert_same_bits(rotary.inv_freq, expected)
    scheme["mrope_interleaved"] = interleaved
    assert_same_bits(RotaryEmbedding.from_config(config).inv_freq, expected)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"rope_theta": 1e4}, {}, "expected config to have head_dim, or hidden_size and"),
        (
            {"head_dim": 32, "rope_parameters": {"full": {"rope_theta": 1e4}, "window": None}},
            {},
            r"expected layer_type to be one of those with rope_parameters \(full\), but got None",
        ),
        (
            {"head_dim": 32, "rope_parameters": {"full": {"rope_theta": 1e4}, "window": None}},
            {"layer_type": "window"},
            r"expected layer_type to be one of .* \(full\), but got 'window'",
        ),
        (
            {"head_dim": 32, "rope_theta": 1e4},
            {"layer_type": "full"},
            "all layers are alike.*, but got 'full'",
        ),
        (
            {"head_dim": 32, "rope_scaling": {"type": "mrope", "mrope_section": [8, 4, 4]}},
            {},
            "expected mrope_interleaved to be given",
        ),
        (
            {"head_dim": 32, "rope_scaling": {**DYNAMIC, "mrope_section": [8, 4, 4]}},
            {"mrope_interleaved": True},
            "expected rope_type not to be one of .* together with mrope_section, but got 'dynamic'",
        ),
    ],
)
def test_a_configuration_that_does_not_tell_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding.from_config(config, **options)


def test_it_turns_as_the_model_does() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    q, k, _ = inputs("cpu", tokens=50)
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, S, D), as the models have it.
    positions = torch.arange(50)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    actual = RotaryEmbedding.from_config(config)(q, k, positions)
    for one, other in zip(actual, expected, strict=True):
        # Both form the same float32 angles; what differs is cosines, sines and products.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_messages_name_the_layer() -> None:
    with pytest.raises(ValueError, match=re.escape("torch_rope.RotaryEmbedding(): expected")):
        RotaryEmbedding(32, LINEAR, max_wavelength=2.0)
