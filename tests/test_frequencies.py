"""Frequencies: the bits of transformers, the formula in float64, several axes, what is refused."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch_rope
from mpmath import mp, mpf
from reference import assert_same_bits
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("transformers")

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2_vl.configuration_qwen2_vl import (
    Qwen2VLTextConfig,
    Qwen2VLVisionConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VLRotaryEmbedding,
    Qwen2VLVisionRotaryEmbedding,
)
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

MAX_POSITION_EMBEDDINGS = 32768
ROTARY_DIMS = (4, 6, 32, 64, 80, 128, 192)
THETAS = (10000, 10000.0, 500000.0, 1e6, 1000000007)

# The keys of each type, with the values to go through.
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "default": {},
    "linear": {"factor": (2.0, 8, 3.3)},
    "dynamic": {"factor": (2.0, 8, 3.3)},
    "yarn": {
        "factor": (4.0, 40, 0.5),
        "original_max_position_embeddings": (4096, 8192),
        "attention_factor": (None, 1.25),
        "beta_fast": (None, 16),
        "mscale": (None, 1.0, 0.707),
        "mscale_all_dim": (None, 0.707),
        "truncate": (True, False),
    },
    "longrope": {
        "factor": (None, 32.0, 1.0),
        "original_max_position_embeddings": (4096,),
        "attention_factor": (None, 1.19),
    },
    "llama3": {
        "factor": (8.0, 32),
        "low_freq_factor": (1.0, 2),
        "high_freq_factor": (4.0, 8),
        "original_max_position_embeddings": (8192,),
    },
    "proportional": {"partial_rotary_factor": (None, 0.25, 0.3, 1.0), "factor": (None, 8.0)},
}


def schemes(rope_type: str, rotary_dim: int) -> list[dict[str, Any]]:
    """Lists the dictionaries of a type: every combination of its keys' values."""
    keys = {"rope_theta": THETAS, **GRID[rope_type]}
    if rope_type == "yarn":
        keys["rope_theta"] = (10000.0, 1e6)
    combinations = [
        {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        for values in itertools.product(*keys.values())
    ]
    if rope_type == "longrope":
        steps = torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64)
        divisors = {
            "short_factor": (1 + 0.3 * steps).tolist(),
            "long_factor": (1 + 63 * steps).tolist(),
        }
        combinations = [{**scheme, **divisors} for scheme in combinations]
    return [{"rope_type": rope_type, **scheme} for scheme in combinations]


def seq_lens(rope_type: str) -> tuple[int | None, ...]:
    """Lists the lengths that a type tells apart."""
    if rope_type in ("dynamic", "longrope"):
        return (None, 100, 4096, 4097, MAX_POSITION_EMBEDDINGS, 40000, 131072)
    return (None,)


def of_transformers(
    scheme: dict[str, Any], rotary_dim: int, seq_len: int | None
) -> tuple[Tensor, float]:
    """Returns what transformers forms."""
    config = LlamaConfig(
        head_dim=rotary_dim,
        max_position_embeddings=MAX_POSITION_EMBEDDINGS,
        rope_parameters=dict(scheme),
    )
    if scheme["rope_type"] == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[scheme["rope_type"]](config, seq_len=seq_len)


@pytest.mark.parametrize("rope_type", GRID)
def test_float32_has_the_bits_of_transformers(rope_type: str) -> None:
    for rotary_dim in ROTARY_DIMS:
        for scheme in schemes(rope_type, rotary_dim):
            for seq_len in seq_lens(rope_type):
                expected, attention_factor = of_transformers(scheme, rotary_dim, seq_len)
                actual = torch_rope.frequencies(
                    scheme,
                    rotary_dim,
                    max_position_embeddings=MAX_POSITION_EMBEDDINGS,
                    seq_len=seq_len,
                    device="cpu",
                )
                assert_same_bits(actual.inv_freq, expected)
                assert actual.attention_factor == attention_factor, scheme


def exact(scheme: dict[str, Any], rotary_dim: int, seq_len: int | None) -> list[mpf]:
    """Forms frequencies with many digits, from the formulas of the papers."""
    pairs = range(rotary_dim // 2)
    theta, factor = mpf(scheme["rope_theta"]), mpf(scheme.get("factor", 1))
    rope_type = scheme["rope_type"]
    if rope_type == "dynamic":
        length = max(seq_len or 0, MAX_POSITION_EMBEDDINGS)
        growth = factor * length / MAX_POSITION_EMBEDDINGS - (factor - 1)
        theta *= growth ** (mpf(rotary_dim) / (rotary_dim - 2))
    plain = [theta ** (-mpf(2 * n) / rotary_dim) for n in pairs]
    if rope_type in ("default", "dynamic"):
        return plain
    if rope_type == "linear":
        return [frequency / factor for frequency in plain]
    if rope_type == "proportional":
        turning = math.floor(scheme.get("partial_rotary_factor", 1.0) * rotary_dim / 2)
        return [plain[n] / factor if n < turning else mpf(0) for n in pairs]

    trained = scheme["original_max_position_embeddings"]
    if rope_type == "longrope":
        is_long = seq_len is not None and seq_len > trained
        divisors = scheme["long_factor" if is_long else "short_factor"]
        return [
            frequency / mpf(divisor) for frequency, divisor in zip(plain, divisors, strict=True)
        ]

    if rope_type == "llama3":
        low, high = mpf(scheme["low_freq_factor"]), mpf(scheme["high_freq_factor"])
        turns = [trained * frequency / (2 * mp.pi) for frequency in plain]
        kept = [(min(max(turn, low), high) - low) / (high - low) for turn in turns]
    else:
        first, last = (
            rotary_dim * mp.log(trained / (turns * 2 * mp.pi)) / (2 * mp.log(theta))
            for turns in (scheme.get("beta_fast", 32), scheme.get("beta_slow", 1))
        )
        if scheme.get("truncate", True):
            first, last = mp.floor(first), mp.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        last = last if first != last else last + mpf("0.001")
        kept = [1 - min(max((n - first) / (last - first), 0), 1) for n in pairs]
    return [f / factor * (1 - share) + f * share for f, share in zip(plain, kept, strict=True)]


@pytest.mark.parametrize("rope_type", GRID)
def test_float64_is_the_formula(rope_type: str) -> None:
    with mp.workdps(40):
        for scheme in schemes(rope_type, 64)[::3]:
            for seq_len in seq_lens(rope_type):
                actual = torch_rope.frequencies(
                    scheme,
                    64,
                    max_position_embeddings=MAX_POSITION_EMBEDDINGS,
                    seq_len=seq_len,
                    dtype=torch.float64,
                    device="cpu",
                ).inv_freq
                assert actual.dtype == torch.float64
                for value, expected in zip(
                    actual.tolist(), exact(scheme, 64, seq_len), strict=True
                ):
                    # A float64 exponent times the logarithm of the base, and a few operations.
                    assert abs(value - expected) <= abs(expected) * 2.0**-47, scheme


def test_a_type_is_default_where_it_is_missing_and_may_have_its_older_name() -> None:
    plain = torch_rope.frequencies({"rope_type": "default", "rope_theta": 1e4}, 64).inv_freq
    scaled = torch_rope.frequencies({"type": "linear", "rope_theta": 1e4, "factor": 2.0}, 64)
    assert_same_bits(torch_rope.frequencies({"rope_theta": 1e4}, 64).inv_freq, plain)
    assert_same_bits(scaled.inv_freq, plain / 2)


def test_keys_of_other_things_are_ignored() -> None:
    plain = torch_rope.frequencies({"rope_theta": 1e4}, 64)
    marked = {"rope_theta": 1e4, "mrope_section": [16, 8, 8], "partial_rotary_factor": 0.5}
    assert_same_bits(torch_rope.frequencies(marked, 64).inv_freq, plain.inv_freq)


def test_a_key_without_a_value_is_a_missing_one() -> None:
    plain = torch_rope.frequencies({"rope_theta": 1e4}, 64).inv_freq
    scheme = {"rope_theta": 1e4, "rope_type": None, "xdrope_section": None, "hidden_size": None}
    assert_same_bits(torch_rope.frequencies(scheme, 64).inv_freq, plain)


def test_the_trained_length_may_be_a_key() -> None:
    scheme = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    expected = torch_rope.frequencies(scheme, 64, max_position_embeddings=512, seq_len=999)
    with_key = {**scheme, "max_position_embeddings": 512}
    assert_same_bits(torch_rope.frequencies(with_key, 64, seq_len=999).inv_freq, expected.inv_freq)
    other = {**scheme, "max_position_embeddings": 7}
    given = torch_rope.frequencies(other, 64, max_position_embeddings=512, seq_len=999)
    assert_same_bits(given.inv_freq, expected.inv_freq)


@pytest.mark.parametrize(
    ("rope_parameters", "message"),
    [
        (
            {"head_dim": 64, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"of one scheme \(for a whole configuration, use RotaryEmbedding.from_config\), "
            "but got the key 'head_dim'",
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "from_config.*, but got the key 'rope_scaling'",
        ),
        (LlamaConfig().to_dict(), "from_config"),
        (
            {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}},
            r"those of one layer type \(such as rope_parameters\['full_attention'\]\)",
        ),
        (
            {"rope_theta": 1e4, "factr": 2.0},
            "have no keys but rope_type, .*factor.*, but got the key 'factr'",
        ),
    ],
)
def test_keys_that_are_not_of_a_scheme_are_refused(
    rope_parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch_rope.frequencies(rope_parameters, 64)
    with pytest.raises(ValueError, match=message):
        torch_rope.RotaryEmbedding(64, rope_parameters)


def test_the_dictionary_is_left_as_it_was() -> None:
    scheme = {"type": "linear", "rope_theta": 1e4, "factor": 2.0}
    torch_rope.frequencies(scheme, 64)
    assert scheme == {"type": "linear", "rope_theta": 1e4, "factor": 2.0}


def test_every_device_has_the_same_bits(device: str) -> None:
    scheme = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    options: dict[str, Any] = {"max_position_embeddings": 512, "seq_len": 777}
    on_device = torch_rope.frequencies(scheme, 96, **options, device=device).inv_freq
    assert on_device.device.type == device
    assert_same_bits(on_device, torch_rope.frequencies(scheme, 96, **options).inv_freq)


def test_the_default_device_is_that_of_pytorch() -> None:
    with torch.device("meta"):
        assert torch_rope.frequencies({"rope_theta": 1e4}, 64).inv_freq.device.type == "meta"
        assert torch_rope.axial_frequencies((8, 8)).device.type == "meta"
        assert torch_rope.mixed_frequencies(8).device.type == "meta"
    assert torch_rope.frequencies({"rope_theta": 1e4}, 64).inv_freq.device.type == "cpu"


def test_an_unknown_type_is_named_with_those_that_are_known() -> None:
    message = r"expected rope_type to be one of .*, but got ntk"
    with pytest.raises(ValueError, match=message) as raised:
        torch_rope.frequencies({"rope_type": "ntk", "rope_theta": 1e4}, 64)
    for rope_type in GRID:
        assert rope_type in str(raised.value)


REQUIRED = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    "longrope": (
        "rope_theta",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    ),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "proportional": ("rope_theta",),
}


@pytest.mark.parametrize(
    ("rope_type", "key"), [(name, key) for name, keys in REQUIRED.items() for key in keys]
)
@pytest.mark.parametrize("absence", ["missing", "None"])
def test_a_missing_key_is_named_with_those_that_the_type_takes(
    rope_type: str, key: str, absence: str
) -> None:
    scheme = dict(schemes(rope_type, 64)[-1])
    taken = set(scheme) - {"rope_type"}
    scheme[key] = None
    if absence == "missing":
        del scheme[key]
    message = rf"rope::frequencies\(\): expected {key} to be given for rope_type {rope_type}, "
    with pytest.raises(ValueError, match=message) as raised:
        torch_rope.frequencies(scheme, 64, max_position_embeddings=MAX_POSITION_EMBEDDINGS)
    for other in taken:
        assert other in str(raised.value)


def test_dynamic_needs_the_trained_length() -> None:
    scheme = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="expected max_position_embeddings to be given"):
        torch_rope.frequencies(scheme, 64)


def test_longrope_needs_something_to_find_its_attention_factor_from() -> None:
    scheme = schemes("longrope", 64)[0]
    assert "factor" not in scheme
    assert "attention_factor" not in scheme
    with pytest.raises(ValueError, match="expected factor to be given for rope_type longrope, or"):
        torch_rope.frequencies(scheme, 64)


@pytest.mark.parametrize(
    ("changes", "rotary_dim", "error", "message"),
    [
        ({}, 63, ValueError, "expected rotary_dim to be positive and a multiple of 2, but got 63"),
        ({}, 0, ValueError, "expected rotary_dim to be positive and a multiple of 2, but got 0"),
        ({"rope_theta": 0.0}, 64, ValueError, "expected rope_theta to be positive and finite"),
        ({"factor": -2.0}, 64, ValueError, "expected factor to be positive and finite, but got -2"),
        ({"factor": math.inf}, 64, ValueError, "expected factor to be positive and finite"),
        ({"factor": "8"}, 64, TypeError, "expected factor to be a number, but got '8'"),
        ({"rope_type": 3}, 64, TypeError, "expected rope_type to be a string, but got 3"),
        (
            {"rope_type": "yarn", "original_max_position_embeddings": 0.5},
            64,
            TypeError,
            "expected original_max_position_embeddings to be an integer, but got 0.5",
        ),
        (
            {"rope_type": "proportional", "partial_rotary_factor": 1.5},
            64,
            ValueError,
            r"expected partial_rotary_factor to be in \[0, 1\], but got 1.5",
        ),
        ({"rope_type": "dynamic"}, 2, ValueError, "expected rotary_dim to be at least 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], rotary_dim: int, error: type[Exception], message: str
) -> None:
    scheme = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, **changes}
    with pytest.raises(error, match=message):
        torch_rope.frequencies(scheme, rotary_dim, max_position_embeddings=512)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"rope_type": "yarn", "attention_factor": math.nan}, "attention_factor to be finite"),
        ({"rope_type": "yarn", "beta_fast": -1.0}, "beta_fast to be positive and finite"),
        ({"rope_type": "yarn", "beta_slow": math.nan}, "beta_slow to be positive and finite"),
        ({"rope_type": "yarn", "mscale": math.inf}, "mscale to be finite, but got inf"),
        ({"rope_type": "yarn", "rope_theta": 1.0}, "rope_theta to be greater than 1"),
        (
            {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor to be greater than low_freq_factor = 4, but got 4",
        ),
        (
            {"rope_type": "longrope", "short_factor": [0.0] * 32, "long_factor": [1.0] * 32},
            "short_factor to have positive and finite elements, but got 0",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [math.nan] * 32},
            "long_factor to have positive and finite elements, but got nan",
        ),
        (
            {"rope_type": "proportional", "partial_rotary_factor": math.nan},
            r"partial_rotary_factor to be in \[0, 1\]",
        ),
    ],
)
def test_numbers_that_would_give_no_frequencies_are_refused(
    scheme: dict[str, Any], message: str
) -> None:
    common = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=rf"rope::frequencies\(\): expected {message}"):
        torch_rope.frequencies({**common, **scheme}, 64)


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected seq_len to be at least 0, but got -1"):
        torch_rope.frequencies({"rope_theta": 1e4}, 64, seq_len=-1)


def test_a_message_never_shows_the_values_of_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"rope_theta to be a number, but got Tensor$"):
        torch_rope.frequencies({"rope_theta": torch.ones(3)}, 64)


PLAIN = {"rope_theta": 1e4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: torch_rope.frequencies(LlamaConfig(), 128),
            "frequencies(): expected rope_parameters to be a dictionary, but got LlamaConfig "
            "(for a configuration, use RotaryEmbedding.from_config)",
        ),
        (
            lambda: torch_rope.frequencies(128, PLAIN),
            "frequencies(): expected rope_parameters to be a dictionary, but got int",
        ),
        (
            lambda: torch_rope.frequencies(None, 128),
            "frequencies(): expected rope_parameters to be a dictionary, but got None",
        ),
        (
            lambda: torch_rope.frequencies(PLAIN, 512 / 8),
            "frequencies(): expected rotary_dim to be an integer, but got float",
        ),
        (
            lambda: torch_rope.frequencies(PLAIN, 64, seq_len=torch.tensor(3)),
            "frequencies(): expected seq_len to be an integer, but got Tensor",
        ),
        (
            lambda: torch_rope.frequencies(PLAIN, 64, max_position_embeddings=2e3),
            "frequencies(): expected max_position_embeddings to be an integer, but got float",
        ),
        (
            lambda: torch_rope.frequencies(PLAIN, 64, dtype="float32"),
            "frequencies(): expected dtype to be float32 or float64, but got str",
        ),
        (
            lambda: torch_rope.frequencies(PLAIN, 64, device=1.5),
            "frequencies(): expected device to be a device, but got float",
        ),
        (
            lambda: torch_rope.axial_frequencies(32),
            "axial_frequencies(): expected rotary_dims to be a sequence of integers, but got int",
        ),
        (
            lambda: torch_rope.axial_frequencies((32, 16.0)),
            "axial_frequencies(): expected rotary_dims to be a sequence of integers, but got a "
            "tuple with float",
        ),
        (
            lambda: torch_rope.axial_frequencies((32, 32), max_wavelength="1e4"),
            "axial_frequencies(): expected max_wavelength to be a number, but got str",
        ),
        (
            lambda: torch_rope.axial_frequencies((32, 32), dtype=None),
            "axial_frequencies(): expected dtype to be float32 or float64, but got None",
        ),
        (
            lambda: torch_rope.mrope_frequencies(torch.ones(4), 4),
            "mrope_frequencies(): expected sections to be a sequence of integers, but got int",
        ),
        (
            lambda: torch_rope.mrope_frequencies([1.0, 0.1], (1, 1)),
            "mrope_frequencies(): expected inv_freq to be a tensor, but got list",
        ),
        (
            lambda: torch_rope.mrope_frequencies(torch.ones(4).half(), (2, 2)),
            "mrope_frequencies(): expected inv_freq to be float32 or float64, but got float16",
        ),
        (
            lambda: torch_rope.mrope_frequencies(torch.ones(4), (2, 2), interleaved=1),
            "mrope_frequencies(): expected interleaved to be a bool, but got int",
        ),
        (
            lambda: torch_rope.mixed_frequencies("64"),
            "mixed_frequencies(): expected rotary_dim to be an integer, but got str",
        ),
        (
            lambda: torch_rope.mixed_frequencies(64, num_heads=6.0),
            "mixed_frequencies(): expected num_heads to be an integer, but got float",
        ),
        (
            lambda: torch_rope.mixed_frequencies(64, generator=0),
            "mixed_frequencies(): expected generator to be a torch.Generator on the CPU, but got "
            "int",
        ),
        (
            lambda: torch_rope.mixed_frequencies(64, max_wavelength=None),
            "mixed_frequencies(): expected max_wavelength to be a number, but got None",
        ),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^rope::{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    "form",
    [
        lambda **options: torch_rope.frequencies(PLAIN, 64, **options),
        lambda **options: torch_rope.axial_frequencies((8, 8), **options),
        lambda **options: torch_rope.mixed_frequencies(64, **options),
        lambda **options: torch_rope.RotaryEmbedding(64, **options),
    ],
)
def test_a_device_that_is_none_is_named(form: Any) -> None:
    with pytest.raises(ValueError, match=r"expected device to be a valid device, but got 'cpuu'"):
        form(device="cpuu")


def test_a_generator_of_another_device_is_refused(cuda: str) -> None:
    generator = torch.Generator(cuda)
    with pytest.raises(TypeError, match="expected generator to be on the CPU, but got one on cuda"):
        torch_rope.mixed_frequencies(64, generator=generator)


@pytest.mark.parametrize("key", ["short_factor", "long_factor"])
def test_divisors_of_another_number_are_refused(key: str) -> None:
    scheme = schemes("longrope", 64)[-1]
    with pytest.raises(ValueError, match=f"{key} to have rotary_dim / 2 = 32 elements, but got 31"):
        torch_rope.frequencies({**scheme, key: scheme[key][:31]}, 64)


def test_divisors_that_are_no_list_of_numbers_are_refused() -> None:
    scheme = schemes("longrope", 64)[-1]
    with pytest.raises(TypeError, match="expected short_factor to be a list of numbers, but got"):
        torch_rope.frequencies({**scheme, "short_factor": 2.0}, 64)


def test_other_dtypes_are_refused() -> None:
    message = re.escape("expected dtype to be float32 or float64, but got bfloat16")
    with pytest.raises(TypeError, match=message):
        torch_rope.frequencies({"rope_theta": 1e4}, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=message):
        torch_rope.axial_frequencies((8, 8), dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=message):
        torch_rope.mixed_frequencies(8, dtype=torch.bfloat16)


# ---- Several axes ----


def tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of angles (..., N), each twice, as Hugging Face has them."""
    doubled = torch.cat((angles, angles), dim=-1)
    return doubled.cos(), doubled.sin()


def angles(inv_freq: Tensor, positions: Tensor) -> Tensor:
    """Returns the angles (..., N) of positions (A, ...)."""
    return torch.stack(
        [p[..., None].float() * row for p, row in zip(positions, inv_freq, strict=True)]
    ).sum(0)


def test_axial_frequencies_are_those_of_the_paper_one_block_for_each_axis() -> None:
    # arXiv 2403.13298, section 3.2: 100 ** (-t / (head_dim / 4)), the same for both axes.
    head_dim = 64
    published = [100 ** (-t / (head_dim / 4)) for t in range(head_dim // 4)]
    actual = torch_rope.axial_frequencies((32, 32), max_wavelength=100.0, dtype=torch.float64)
    expected = torch.block_diag(*torch.tensor([[published], [published]], dtype=torch.float64))
    torch.testing.assert_close(actual, expected, rtol=2.0**-48, atol=0)


def test_axes_may_turn_different_numbers_of_elements() -> None:
    dims = (16, 56, 56)
    actual = torch_rope.axial_frequencies(dims)
    blocks = [torch_rope.frequencies({"rope_theta": 1e4}, dim).inv_freq[None] for dim in dims]
    assert_same_bits(actual, torch.block_diag(*blocks))


def test_axial_frequencies_turn_as_the_vision_tower_of_qwen2_vl() -> None:
    config = Qwen2VLVisionConfig(embed_dim=320, num_heads=4)
    model = Qwen2VLVisionRotaryEmbedding(config)
    positions = torch_rope.grid_positions((5, 7)).flatten(1)
    inv_freq = torch_rope.axial_frequencies((40, 40))
    cos, sin = tables(angles(inv_freq, positions))
    expected_cos, expected_sin = model(torch.empty(0), positions.T)
    torch.testing.assert_close(cos, expected_cos, rtol=0, atol=0)
    torch.testing.assert_close(sin, expected_sin, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "model", "sections", "interleaved"),
    [
        (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, (16, 24, 24), False),
        (Qwen2VLTextConfig, Qwen2VLRotaryEmbedding, (8, 12, 12), False),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, (24, 20, 20), True),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, (11, 11, 10), True),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, (32, 0, 0), True),
    ],
)
def test_mrope_frequencies_turn_as_qwen_does(
    config: Any, model: Any, sections: tuple[int, ...], interleaved: bool
) -> None:
    scheme = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    num_pairs = sum(sections)
    rotary = model(
        config(
            hidden_size=8 * num_pairs,
            num_attention_heads=4,
            head_dim=2 * num_pairs,
            rope_parameters=scheme,
        )
    )
    positions = torch.randint(0, 1000, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    inv_freq, _ = torch_rope.frequencies(scheme, 2 * num_pairs)
    rows = torch_rope.mrope_frequencies(inv_freq, sections, interleaved=interleaved)
    cos, sin = tables(angles(rows, positions))
    expected_cos, expected_sin = rotary(torch.empty(0), positions)
    torch.testing.assert_close(cos, expected_cos, rtol=0, atol=0)
    torch.testing.assert_close(sin, expected_sin, rtol=0, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_shares_every_frequency_out_once(interleaved: bool) -> None:
    inv_freq = torch.rand(21) + 1
    rows = torch_rope.mrope_frequencies(inv_freq, (9, 7, 5), interleaved=interleaved)
    assert (rows != 0).sum(dim=1).tolist() == [9, 7, 5]
    assert ((rows != 0).sum(dim=0) == 1).all()
    assert_same_bits(rows.sum(dim=0), inv_freq)


@pytest.mark.parametrize(
    ("sections", "interleaved", "message"),
    [
        ((16, 8, 7), False, r"expected sections to have the sum 32, .*, but got \[16, 8, 7\]"),
        ((40, -4, -4), False, "expected sections to hold numbers of pairs, at least 0"),
        ((2, 2, 28), True, "expected sections to keep axis 2 within 32 pairs"),
    ],
)
def test_sections_that_do_not_fit_are_refused(
    sections: tuple[int, ...], interleaved: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        torch_rope.mrope_frequencies(torch.rand(32), sections, interleaved=interleaved)


def test_mixed_frequencies_are_those_of_rope_vit() -> None:
    # Two orthogonal directions a head, drawn at random; magnitudes 10 ** (-4 n / head_dim).
    num_heads, head_dim = 6, 64
    rows = torch_rope.mixed_frequencies(
        head_dim,
        num_heads=num_heads,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    assert rows.shape == (2, num_heads * head_dim // 2)
    first, second = rows.view(2, num_heads, 2, head_dim // 4).permute(2, 1, 3, 0)
    magnitudes = torch.tensor([10 ** (-4 * n / head_dim) for n in range(head_dim // 4)]).double()
    for direction in (first, second):
        torch.testing.assert_close(direction.norm(dim=-1), magnitudes.expand(num_heads, -1))
    torch.testing.assert_close((first * second).sum(-1), torch.zeros(num_heads, 16).double())
    headings = torch.atan2(first[..., 1], first[..., 0])
    torch.testing.assert_close(headings, headings[:, :1].expand_as(headings))
    assert len(set(headings[:, 0].tolist())) == num_heads


def test_mixed_frequencies_follow_their_generator() -> None:
    def draw(seed: int) -> Tensor:
        return torch_rope.mixed_frequencies(64, generator=torch.Generator().manual_seed(seed))

    assert_same_bits(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_heads_of_mixed_frequencies_turn_by_their_own_angles(device: str) -> None:
    num_heads, head_dim = 3, 16
    rows = torch_rope.mixed_frequencies(head_dim, num_heads=num_heads, device=device)
    positions = torch_rope.grid_positions((4, 5), device=device).flatten(1)
    x = torch.randn(2, 20, num_heads, head_dim, device=device)
    rotated = torch_rope.apply(x.flatten(-2), positions, rows, interleaved=True).view_as(x)
    for head in range(num_heads):
        own = rows.view(2, num_heads, head_dim // 2)[:, head]
        expected = torch_rope.apply(x[..., head, :], positions, own, interleaved=True)
        assert_same_bits(rotated[..., head, :], expected)


def test_sizes_of_mixed_frequencies_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="rotary_dim to be positive and a multiple of 4, but got 6"
    ):
        torch_rope.mixed_frequencies(6)
    with pytest.raises(ValueError, match="expected num_heads to be positive, but got 0"):
        torch_rope.mixed_frequencies(8, num_heads=0)


def test_axes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected rotary_dims to have an element for each axis"):
        torch_rope.axial_frequencies(())
    with pytest.raises(ValueError, match="expected rotary_dims to be positive and a multiple of 2"):
        torch_rope.axial_frequencies((8, 7))
    with pytest.raises(ValueError, match="expected max_wavelength to be positive and finite"):
        torch_rope.axial_frequencies((8, 8), max_wavelength=0.0)


def test_the_operator_behind_dynamic_passes_opcheck(device: str) -> None:
    for seq_len in (torch.tensor(700, device=device), torch.tensor(12.0, device=device)):
        arguments = (seq_len, 32, 1e4, 2.0, 512, torch.float32)
        opcheck(torch.ops.rope._dynamic_frequencies.default, arguments)
