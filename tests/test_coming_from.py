"""docs/coming_from.md: each recipe gives what its formula gives, and the original if installed."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch_rope
from torch import Tensor

PAGE = Path(__file__).parent.parent / "docs" / "coming_from.md"
Names = dict[str, Any]


def sections() -> dict[str, str]:
    """Returns the code of each section of the page by its heading; that before the first is ''."""
    heading, code = "", dict[str, list[str]]()
    for part in re.split(r"^(## .*)$", PAGE.read_text(), flags=re.MULTILINE):
        if part.startswith("## "):
            heading = part.removeprefix("## ").replace("`", "")
        else:
            blocks = re.findall(r"^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
            code[heading] = blocks
    return {heading: "\n".join(blocks) for heading, blocks in code.items()}


SECTIONS = sections()


def run(heading: str) -> Names:
    """Runs a section after the definitions at the top of the page; returns its variables."""
    torch.manual_seed(0)
    names: Names = {}
    for part in ("", heading):
        exec(compile(SECTIONS[part], f"{PAGE} ({part})", "exec"), names)
    return names


def rotated(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first elements of ``x`` by angles of shape ``(..., pairs)``, in float64."""
    pairs = angles.shape[-1]
    x, angles = x.detach().double(), angles.detach().double()
    slice_, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = slice_.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else slice_.chunk(2, dim=-1)
    first = a * angles.cos() - b * angles.sin()
    second = b * angles.cos() + a * angles.sin()
    if interleaved:
        both = torch.stack((first, second), dim=-1).flatten(-2)
    else:
        both = torch.cat((first, second), dim=-1)
    return torch.cat((both, rest), dim=-1)


def angles(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Returns the angles of the ``dim / 2`` pairs at each position, in float64."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return positions.double().unsqueeze(-1) * base**-exponents


def of_axes(positions: Tensor, axes_dim: tuple[int, ...], base: float = 10000.0) -> Tensor:
    """Returns the angles of pairs of which each axis has its own, one axis after the other."""
    parts = [angles(*axis, base) for axis in zip(positions, axes_dim, strict=True)]
    return torch.cat(parts, dim=-1)


def assert_close(actual: Tensor, expected: Tensor, angle: float = 24.0) -> None:
    """Allows an error of a few roundings of an angle to float32; positions are below 24."""
    assert actual.shape == expected.shape
    atol = 8 * angle * 2.0**-24
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=0, atol=atol
    )


# Of most results angles are below 24 radians; of these below 112 pi.
LARGE_ANGLES = {"q_in_pixels": 352.0}


# --------------------------------------------------------------------------------------------------
# Each recipe against the formula of what it replaces, written here: a function takes the variables
# of a section and returns what those that it names should be.

FORMULAS: dict[str, Callable[[Names], Names]] = {}
# The same by calling the original, which is skipped where it is not installed.
ORIGINALS: list[tuple[str, Callable[[Names], Names]]] = []


def formula(heading: str) -> Callable[[Callable[[Names], Names]], None]:
    """Registers the formula of the section whose heading starts like this."""
    return lambda function: FORMULAS.update({full_heading(heading): function})


def original(heading: str) -> Callable[[Callable[[Names], Names]], None]:
    """Registers a call of the original of a section."""
    return lambda function: ORIGINALS.append((full_heading(heading), function))


def full_heading(start: str) -> str:
    """Returns the one heading that starts like this."""
    (heading,) = (heading for heading in SECTIONS if heading and heading.startswith(start))
    return heading


def module(name: str) -> Any:
    """Imports the module of an original, or skips the test."""
    return pytest.importorskip(name, exc_type=ImportError)


def test_every_recipe_has_a_formula() -> None:
    assert {heading for heading, code in SECTIONS.items() if heading and code} == set(FORMULAS)


@pytest.mark.parametrize(
    "heading", [heading for heading in SECTIONS if SECTIONS[heading] and heading]
)
def test_a_recipe_gives_what_its_formula_gives(heading: str) -> None:
    names = run(heading)
    for name, expected in FORMULAS[heading](names).items():
        assert_close(names[name], expected, LARGE_ANGLES.get(name, 24.0))


def pair(names: Names, rotate: Callable[[Tensor], Tensor], layout: str = "") -> Names:
    """Returns what q and k of a layout should become."""
    return {f"{name}_rotated": rotate(names[name + layout]) for name in "qk"}


@formula("Hugging Face transformers")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)
    doubled = torch.cat((table, table), dim=-1).expand(2, 24, 64).float()
    for result, expected in zip(
        names["apply_rotary_pos_emb"](
            names["q_bhsd"], names["k_bhsd"], doubled.cos(), doubled.sin()
        ),
        pair(names, lambda x: rotated(x, table), "_bhsd").values(),
        strict=True,
    ):
        assert_close(result, expected)
    return pair(names, lambda x: rotated(x, table), "_bhsd")


@original("Hugging Face transformers")
def llama_of_transformers(names: Names) -> Names:
    llama = module("transformers.models.llama.modeling_llama")
    config = module("transformers").LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_theta=10000.0
    )
    tables = llama.LlamaRotaryEmbedding(config)(names["q"], names["position_ids"])
    q, k = llama.apply_rotary_pos_emb(names["q_bhsd"], names["k_bhsd"], *tables)
    ours = names["apply_rotary_pos_emb"](names["q_bhsd"], names["k_bhsd"], *tables)
    assert_close(ours[0], q)
    by_unsqueeze_dim = names["apply_rotary_pos_emb"](names["q"], names["k"], *tables, 2)
    assert_close(by_unsqueeze_dim[1].transpose(1, 2), k)
    return {"q_rotated": q, "k_rotated": k}


@formula("Partial rotation")
def _(names: Names) -> Names:
    expected = pair(names, lambda x: rotated(x, angles(names["positions"], 32)), "_bhsd")
    assert torch.equal(names["q_rotated"][..., 32:], names["q_bhsd"][..., 32:])
    return {**expected, "q_by_tables": expected["q_rotated"]}


@original("Partial rotation")
def gpt_neox_of_transformers(names: Names) -> Names:
    neox = module("transformers.models.gpt_neox.modeling_gpt_neox")
    tables = (names["cos"][None], names["sin"][None])
    q, k = neox.apply_rotary_pos_emb(names["q_bhsd"], names["k_bhsd"], *tables)
    return {"q_rotated": q, "k_rotated": k, "q_by_tables": q}


@formula("M-RoPE")
def _(names: Names) -> Names:
    ids, frequencies = names["ids"].double(), angles(torch.tensor(1), 64, 1e6)
    axis_of_pair = torch.tensor([0] * 8 + [1] * 12 + [2] * 12)
    of_qwen2 = ids[axis_of_pair].T * frequencies
    # Pairs 1, 4, 7, ... follow the height, 2, 5, 8, ... the width, as far as their sections go.
    alternating = [n % 3 if n < 30 else 0 for n in range(32)]
    of_qwen3 = ids[torch.tensor(alternating)].T * frequencies
    expected = pair(names, lambda x: rotated(x, of_qwen2), "_bhsd")
    return {**expected, "q_of_qwen3": rotated(names["q_bhsd"], of_qwen3)}


@original("M-RoPE")
def qwen2_vl_and_qwen3_vl_of_transformers(names: Names) -> Names:
    transformers = module("transformers")
    qwen2 = module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    qwen3 = module("transformers.models.qwen3_vl.modeling_qwen3_vl")
    size: Names = {"hidden_size": 256, "num_attention_heads": 4}

    def parameters(*sections: int) -> Names:
        return {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}

    of_qwen2 = transformers.Qwen2VLTextConfig(**size, rope_parameters=parameters(8, 12, 12))
    of_qwen3 = transformers.Qwen3VLTextConfig(
        **size,
        head_dim=64,
        rope_parameters=parameters(12, 10, 10) | {"mrope_interleaved": True},
    )
    ids = names["position_ids"]
    both = names["q_bhsd"], names["k_bhsd"]
    tables = qwen2.Qwen2VLRotaryEmbedding(of_qwen2)(names["q"], ids)
    q, k = qwen2.apply_rotary_pos_emb(*both, *tables)
    tables = qwen3.Qwen3VLTextRotaryEmbedding(of_qwen3)(names["q"], ids)
    q_of_qwen3, _ = qwen3.apply_rotary_pos_emb(*both, *tables)
    for config, expected, options in (
        (of_qwen2, q, {"mrope_interleaved": False}),
        (of_qwen3, q_of_qwen3, {}),
    ):
        rotary = torch_rope.RotaryEmbedding.from_config(config, **options)
        assert_close(rotary(names["q_bhsd"], ids[:, :, None]), expected)
        assert_close(rotary(names["q"], ids[..., None]).transpose(1, 2), expected)
    return {"q_rotated": q, "k_rotated": k, "q_of_qwen3": q_of_qwen3}


@formula("GPT-J")
def _(names: Names) -> Names:
    table = angles(names["positions"], 32)[:, None]
    return pair(names, lambda x: rotated(x, table, interleaved=True))


@original("GPT-J")
def gpt_j_of_transformers(names: Names) -> Names:
    gptj = module("transformers.models.gptj.modeling_gptj")
    sin, cos = gptj.create_sinusoidal_positions(24, 32)[None].chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        return torch.cat((gptj.apply_rotary_pos_emb(x[..., :32], sin, cos), x[..., 32:]), dim=-1)

    by_tables = torch_rope.apply_cos_sin(
        names["q"], cos[0][:, None], sin[0][:, None], interleaved=True
    )
    assert_close(by_tables, rotate(names["q"]))
    return pair(names, rotate)


@formula("Meta's Llama")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)
    factors = torch.polar(torch.ones_like(table), table)[:, None]

    def rotate(x: Tensor) -> Tensor:
        product = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * factors
        return torch.view_as_real(product).flatten(-2)

    q, k = rotate(names["q"]), rotate(names["k"])
    return {"q_rotated": q, "k_rotated": k, "q_by_tables": q, "k_by_tables": k}


@original("Meta's Llama")
def llama_4_of_transformers(names: Names) -> Names:
    llama = module("transformers.models.llama4.modeling_llama4")
    q, k = llama.apply_rotary_emb(names["q"], names["k"], names["freqs_cis"][None])
    return {"q_rotated": q, "k_rotated": k, "q_by_tables": q, "k_by_tables": k}


@formula("flash-attn")
def _(names: Names) -> Names:
    at = names["offsets"][:, None] + names["positions"]
    q, k = (rotated(names[x], angles(at, 64).unsqueeze(2)) for x in "qk")
    table = angles(names["positions"], 64)[:, None]
    in_order = [rotated(x, table) for x in names["qkv"][:, :, :2].unbind(2)]
    packed = torch.stack((*in_order, names["qkv"][:, :, 2].double()), dim=2)
    new = angles(names["cache_seqlens"][:, None] + torch.arange(3), 64).unsqueeze(2)
    return {
        "q_rotated": q,
        "q_by_positions": q,
        "k_by_positions": k,
        "qkv_rotated": packed,
        "q_new_rotated": rotated(names["q"][:, :3], new, interleaved=True),
        "k_new_rotated": rotated(names["k"][:, :3], new, interleaved=True),
    }


@original("flash-attn")
def flash_attn(names: Names) -> Names:
    rotary = module("flash_attn.layers.rotary")
    if not torch.cuda.is_available():
        pytest.skip("flash-attn needs a GPU")
    q, cos, sin = (names[name].cuda() for name in ("q", "cos", "sin"))
    rotate = rotary.apply_rotary_emb
    return {"q_rotated": rotate(q, cos, sin, seqlen_offsets=names["offsets"].cuda()).cpu()}


@formula("lucidrains")
def _(names: Names) -> Names:
    table = angles(names["positions"], 32)
    q, k = names["q_bhsd"], names["k_bhsd"]
    frequencies = torch.linspace(1, 5, 16, dtype=torch.float64) * math.pi
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (4, 6))
    picture = torch.cat(
        (
            (rows[:, None] * frequencies)[:, None].expand(4, 6, 16),
            (columns[:, None] * frequencies)[None].expand(4, 6, 16),
        ),
        dim=-1,
    )
    return {
        **pair(names, lambda x: rotated(x, table, True), "_bhsd"),
        "q_last": rotated(q[:, :, -3:], table[-3:], True),
        "k_cached": rotated(k, table, True),
        "picture_rotated": rotated(q.unflatten(2, (4, 6)), picture, True),
    }


@original("lucidrains")
def rotary_embedding_torch(names: Names) -> Names:
    package = module("rotary_embedding_torch")
    rotary = package.RotaryEmbedding(dim=32)
    rotate = rotary.rotate_queries_or_keys
    q, k = names["q_bhsd"], names["k_bhsd"]
    in_pixels = package.RotaryEmbedding(dim=32, freqs_for="pixel", max_freq=10)
    picture = package.apply_rotary_emb(in_pixels.get_axial_freqs(4, 6), names["picture"])
    q_last, k_cached = package.RotaryEmbedding(dim=32).rotate_queries_with_cached_keys(
        q[:, :, -3:], k
    )
    options: Names = {"rotary_dim": 32, "interleaved": True}
    apply, positions = torch_rope.apply, names["positions"]
    before_heads = package.RotaryEmbedding(dim=32, seq_before_head_dim=True)
    assert_close(
        apply(names["q"], positions[:, None], **options),
        before_heads.rotate_queries_or_keys(names["q"]),
    )
    assert_close(apply(q, positions + 7, **options), rotate(q, offset=7))
    for given, ours in (
        ({"interpolate_factor": 2.0}, {"scale_factor": 2.0}),
        (
            {"theta": 5e4, "theta_rescale_factor": 8.0},
            {"max_wavelength": 5e4 * 8.0 ** (32 / 30)},
        ),
    ):
        theirs = package.RotaryEmbedding(dim=32, **given).rotate_queries_or_keys(q)
        assert_close(apply(q, positions, **options, **ours), theirs)
    custom = torch.rand(16)
    theirs = package.RotaryEmbedding(dim=32, custom_freqs=custom).rotate_queries_or_keys(q)
    assert_close(apply(q, positions, custom, interleaved=True), theirs)
    of_language = package.RotaryEmbedding(dim=32).get_axial_freqs(4, 6)
    assert_close(
        apply(
            names["picture"],
            torch_rope.grid_positions((4, 6)),
            torch_rope.axial_frequencies((32, 32)),
            interleaved=True,
        ),
        package.apply_rotary_emb(of_language, names["picture"]),
    )
    return {
        "q_rotated": rotate(q),
        "k_rotated": rotate(k),
        "q_last": q_last,
        "k_cached": k_cached,
        "picture_rotated": picture,
    }


@formula("x-transformers")
def _(names: Names) -> Names:
    expected = pair(names, lambda x: rotated(x, angles(names["positions"], 32), True), "_bhsd")
    return {**expected, "q_by_angles": expected["q_rotated"]}


@original("x-transformers")
def x_transformers(names: Names) -> Names:
    package = module("x_transformers.x_transformers")
    freqs, scale = package.RotaryEmbedding(32).forward_from_seq_len(24)
    assert_close(names["freqs"], freqs)
    q, k = (package.apply_rotary_pos_emb(names[x], freqs, scale) for x in ("q_bhsd", "k_bhsd"))
    last = package.apply_rotary_pos_emb(names["q_bhsd"][:, :, -3:], freqs, scale)
    assert_close(names["q_rotated"][:, :, -3:], last)
    return {"q_rotated": q, "k_rotated": k, "q_by_angles": q}


@formula("torchtune")
def _(names: Names) -> Names:
    q = rotated(names["q"], angles(names["positions"], 64)[:, None], interleaved=True)
    return {"q_rotated": q, "q_by_positions": q}


@original("torchtune")
def torchtune(names: Names) -> Names:
    # Its package imports all that trains a model; the file stands alone.
    file = file_of("torchtune", "modules/position_embeddings.py")
    q = file.RotaryPositionalEmbeddings(64)(names["q"], input_pos=names["input_pos"])
    return {"q_rotated": q, "q_by_positions": q}


def file_of(package: str, path: str) -> ModuleType:
    """Imports one file of a package without the package, or skips the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    file = Path(spec.submodule_search_locations[0], path)
    file_spec = importlib.util.spec_from_file_location(file.stem, file)
    assert file_spec is not None
    assert file_spec.loader is not None
    imported = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(imported)
    return imported


@formula("torchtitan")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)[:, None]
    return {
        f"{x}_{kind}": rotated(names[x], table, kind == "complex")
        for x in "qk"
        for kind in ("complex", "cos_sin")
    }


@original("torchtitan")
def torchtitan(names: Names) -> Names:
    rope = module("torchtitan.models.common.rope")
    results = {}
    for kind, layer in (("complex", rope.ComplexRoPE), ("cos_sin", rope.CosSinRoPE)):
        made = layer(layer.Config(dim=64, max_seq_len=128))
        q, k = made(names["q"], names["k"], names["ids"])
        results |= {f"q_{kind}": q, f"k_{kind}": k}
    return results


@formula("diffusers")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)
    q, k = names["q_bhsd"], names["k_bhsd"]
    of_flux = of_axes(names["ids"].T, (16, 24, 24))
    return {
        "q_unbind_1": rotated(q, table, True),
        "q_unbind_2": rotated(q, table),
        "q_complex": rotated(names["q"], table[:, None], True),
        "q_flux": rotated(q, of_flux, True),
        "k_flux": rotated(k, of_flux, True),
        "q_flux_bshd": rotated(names["q"], of_flux[:, None], True),
    }


@original("diffusers")
def diffusers(names: Names) -> Names:
    embeddings = module("diffusers.models.embeddings")
    flux = module("diffusers.models.transformers.transformer_flux")
    q, k = names["q_bhsd"], names["k_bhsd"]

    def tables(**options: Any) -> Any:
        return embeddings.get_1d_rotary_pos_embed(64, names["positions"], **options)

    neighbours, rotate = tables(use_real=True), embeddings.apply_rotary_emb
    halves = tables(use_real=True, repeat_interleave_real=False)
    whole: Names = {"full_width": True}
    assert_close(
        torch_rope.apply_cos_sin(q, *neighbours, **whole, interleaved=True), rotate(q, neighbours)
    )
    assert_close(
        torch_rope.apply_cos_sin(q, *halves, **whole), rotate(q, halves, use_real_unbind_dim=-2)
    )
    of_flux = flux.FluxPosEmbed(10000, [16, 24, 24])(names["ids"])
    return {
        "q_unbind_1": rotate(q, neighbours),
        "q_unbind_2": rotate(q, halves, use_real_unbind_dim=-2),
        "q_complex": rotate(names["q"], tables()[None], use_real=False),
        "q_flux": rotate(q, of_flux),
        "k_flux": rotate(k, of_flux),
        "q_flux_bshd": rotate(names["q"], of_flux, sequence_dim=1),
    }


@formula("timm")
def _(names: Names) -> Names:
    table = of_axes(names["grid"], (32, 32))
    bands = math.pi * 2 ** torch.linspace(0, math.log2(112), 16, dtype=torch.float64)
    in_pixels = (names["coordinates"].double().unsqueeze(-1) * bands).transpose(0, 1).flatten(1)
    return {
        **pair(names, lambda x: rotated(x, table, True), "_bhsd"),
        "q_in_pixels": rotated(names["q_bhsd"], in_pixels, True),
    }


@original("timm")
def timm_of_pictures(names: Names) -> Names:
    layers = module("timm.layers.pos_embed_sincos")
    q, k = names["q_bhsd"], names["k_bhsd"]
    rotate = layers.apply_rot_embed_cat
    embed = layers.RotaryEmbeddingCat(64, in_pixels=False, temperature=10000.0).get_embed([4, 6])
    halves = layers.RotaryEmbeddingCat(64, in_pixels=False, rotate_half=True).get_embed([4, 6])
    ours = torch_rope.apply(q, names["grid"], names["inv_freq"])
    assert_close(ours, rotate(q, halves, half=True))
    with_prefix = torch.cat((names["grid"].new_zeros(2, 1), names["grid"]), dim=1)
    x = torch.randn(2, 4, 25, 64)
    ours = torch_rope.apply(x, with_prefix, names["inv_freq"], interleaved=True)
    assert torch.equal(ours[:, :, 0], x[:, :, 0])
    assert_close(ours[:, :, 1:], rotate(x[:, :, 1:], embed))
    resized = layers.RotaryEmbeddingCat(64, in_pixels=False, ref_feat_shape=[7, 7])
    ref, shape = (7, 7), (4, 6)
    scaled = names["grid"] * torch.tensor(ref).div(torch.tensor(shape))[:, None]
    assert_close(
        torch_rope.apply(q, scaled, names["inv_freq"], interleaved=True),
        rotate(q, resized.get_embed([4, 6])),
    )
    in_pixels = layers.RotaryEmbeddingCat(64, max_res=224).get_embed([4, 6])
    return {
        "q_rotated": rotate(q, embed),
        "k_rotated": rotate(k, embed),
        "q_in_pixels": rotate(q, in_pixels),
    }


@formula("DINOv3")
def _(names: Names) -> Names:
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (4, 6)]
    grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)
    periods = 100 ** (torch.arange(16, dtype=torch.float64) / 16)
    table = (2 * math.pi * grid.unsqueeze(-1) / periods).flatten(1)
    x = names["x"]
    assert torch.equal(names["x_rotated"][:, :, :5], x[:, :, :5])
    patches = rotated(x[:, :, 5:], table)
    return {"x_rotated": torch.cat((x[:, :, :5].double(), patches), dim=2)}


@original("DINOv3")
def dinov3_of_transformers(names: Names) -> Names:
    dinov3 = module("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = dinov3.DINOv3ViTConfig(hidden_size=256, num_attention_heads=4, patch_size=16)
    embed = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()
    tables = embed(torch.zeros(1, 3, 4 * 16, 6 * 16))
    return {"x_rotated": dinov3.apply_rotary_pos_emb(names["x"], names["x"], *tables)[0]}


@original("DINOv3")
def dinov3_of_timm(names: Names) -> Names:
    layers = module("timm.layers.pos_embed_sincos")
    embed = layers.RotaryEmbeddingDinoV3(64).get_embed([4, 6])
    x = names["x"]
    patches = layers.apply_rot_embed_cat(x[:, :, 5:], embed, half=True)
    return {"x_rotated": torch.cat((x[:, :, :5], patches), dim=2)}


@formula("CroCo")
def _(names: Names) -> Names:
    by_row, by_column = names["pos"].unbind(-1)
    of_row, of_column = names["q_bhsd"].chunk(2, dim=-1)
    parts = (
        rotated(of_row, angles(by_row, 32, 100.0).unsqueeze(1)),
        rotated(of_column, angles(by_column, 32, 100.0).unsqueeze(1)),
    )
    expected = torch.cat(parts, dim=-1)
    before_heads = torch_rope.apply(
        names["q"].unflatten(-1, (2, -1)), names["pos"][:, :, None], max_wavelength=100.0
    )
    assert_close(before_heads.flatten(-2).transpose(1, 2), expected)
    return {"q_rotated": expected}


@formula("nanochat")
def _(names: Names) -> Names:
    table = -angles(names["positions"], 64)[:, None]

    def normed(x: Tensor) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + torch.finfo(torch.float32).eps).sqrt()

    expected = pair(names, lambda x: rotated(x, table))
    slow = torch.cat(
        (1024 ** -torch.linspace(0, 1, 16, dtype=torch.float64), torch.zeros(16).double())
    )
    of_nanogpt = -names["positions"].double()[:, None, None] * slow
    return {
        **expected,
        "q_normed": normed(expected["q_rotated"]),
        "k_normed": normed(expected["k_rotated"]),
        "q_truncated": rotated(names["q"], of_nanogpt),
    }


@original("nanochat")
def nanochat_of_transformers(names: Names) -> Names:
    nanochat = module("transformers.models.nanochat.modeling_nanochat")
    table = angles(names["positions"], 64).float()
    doubled = torch.cat((table, table), dim=-1)[None]
    q, k = nanochat.apply_rotary_pos_emb(
        names["q"], names["k"], doubled.cos(), doubled.sin(), unsqueeze_dim=2
    )
    norm = torch.nn.functional.rms_norm
    return {
        "q_rotated": q,
        "k_rotated": k,
        "q_normed": norm(q, (64,)),
        "k_normed": norm(k, (64,)),
    }


@formula("vLLM")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)[:, None]
    return {
        "query": rotated(names["q"], table).reshape(48, 256),
        "key": rotated(names["k"], table).reshape(48, 128),
    }


@formula("One new token")
def _(names: Names) -> Names:
    table = angles(names["lengths"][:, None, None], 64)
    other_layout = torch_rope.apply(names["q_new"].transpose(1, 2), names["lengths"][:, None, None])
    assert_close(other_layout.transpose(1, 2), names["q_rotated"])
    return {f"{x}_rotated": rotated(names[f"{x}_new"], table) for x in "qk"}


@formula("xPos")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64)
    base = (torch.arange(32, dtype=torch.float64) * 2 + 25.6) / 89.6
    scale = base ** ((names["positions"].double()[:, None] - 12) / 512)
    scale = scale.repeat_interleave(2, dim=-1)
    return {
        "q_rotated": rotated(names["q_bhsd"], table, True) * scale,
        "k_rotated": rotated(names["k_bhsd"], table, True) / scale,
    }


@original("xPos")
def xpos_of_rotary_embedding_torch(names: Names) -> Names:
    rotary = module("rotary_embedding_torch").RotaryEmbedding(dim=64, use_xpos=True)
    q, k = rotary.rotate_queries_and_keys(names["q_bhsd"], names["k_bhsd"])
    return {"q_rotated": q, "k_rotated": k}


@original("xPos")
def xpos_of_x_transformers(names: Names) -> Names:
    package = module("x_transformers.x_transformers")
    freqs, scale = package.RotaryEmbedding(64, use_xpos=True).forward_from_seq_len(24)
    rotate = package.apply_rotary_pos_emb
    return {
        "q_rotated": rotate(names["q_bhsd"], freqs, scale),
        "k_rotated": rotate(names["k_bhsd"], freqs, scale**-1),
    }


@formula("NTK")
def _(names: Names) -> Names:
    table = angles(names["positions"], 64, 10000.0 * 8.0 ** (64 / 62))
    return {"q_rotated": rotated(names["q_bhsd"], table)}


@formula("Learned rotations")
def _(names: Names) -> Names:
    for name in ("rotations", "frequencies", "times"):
        gradient = names[name].grad
        assert gradient.any()
        assert gradient.isfinite().all()
    return {
        "q_by_angles": rotated(names["q_bhsd"], names["rotations"], True),
        "q_rotated": rotated(names["q_bhsd"], angles(names["positions"], 64)),
    }


@original("Learned rotations")
def learned_rotations_of_rotary_embedding_torch(names: Names) -> Names:
    package = module("rotary_embedding_torch")
    return {
        "q_by_angles": package.apply_learned_rotations(names["rotations"], names["q_bhsd"]),
    }


@pytest.mark.parametrize(
    ("heading", "call"),
    [pytest.param(heading, call, id=call.__name__) for heading, call in ORIGINALS],
)
def test_a_recipe_gives_what_the_original_gives(
    heading: str, call: Callable[[Names], Names]
) -> None:
    names = run(heading)
    for name, expected in call(names).items():
        assert_close(names[name], expected, LARGE_ANGLES.get(name, 24.0))
