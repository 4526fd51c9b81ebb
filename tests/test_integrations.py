"""The adapters to other projects' signatures, against the formulas of those projects."""

import doctest
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from reference import random_values
from torch import Tensor, nn
from torch_rope.integrations import flash_attn, torchtitan, torchtune

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def tables(rows: int, pairs: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of a few angles."""
    angles = torch.arange(rows).unsqueeze(-1) * 10000.0 ** (-torch.arange(pairs) / pairs)
    return angles.cos().to(device), angles.sin().to(device)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first elements of x by tables of one angle a pair, which broadcast with it."""
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, "tensor"])
def test_flash_attn_rotates_by_offsets(
    device: str, offsets: Any, interleaved: bool, inplace: bool
) -> None:
    x = random_values((2, 5, 3, 20), device=device)
    cos, sin = tables(16, 8, device)
    starts = [2, 11] if offsets == "tensor" else [offsets, offsets]
    expected = torch.stack(
        [
            rotated(
                x[i],
                cos[start : start + 5].unsqueeze(1),
                sin[start : start + 5].unsqueeze(1),
                interleaved,
            )
            for i, start in enumerate(starts)
        ]
    )
    given = (
        torch.tensor(starts, dtype=torch.int32, device=device) if offsets == "tensor" else offsets
    )
    before = x.clone()
    actual = flash_attn.apply_rotary_emb(
        x, cos, sin, interleaved=interleaved, inplace=inplace, seqlen_offsets=given
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert (actual is x) == inplace
    assert inplace or torch.equal(x, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, "tensor"])
def test_flash_attn_rotates_packed_sequences(
    device: str, offsets: Any, interleaved: bool, inplace: bool
) -> None:
    lengths = [4, 0, 1, 6]
    starts = [1, 2, 3, 4] if offsets == "tensor" else [offsets] * 4
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32, device=device)
    x = random_values((11, 3, 16), device=device)
    cos, sin = tables(16, 8, device)
    rows = torch.cat(
        [torch.arange(length) + start for length, start in zip(lengths, starts, strict=True)]
    ).to(device)
    expected = rotated(x, cos[rows].unsqueeze(1), sin[rows].unsqueeze(1), interleaved)
    before = x.clone()
    actual = flash_attn.apply_rotary_emb(
        x,
        cos,
        sin,
        interleaved=interleaved,
        inplace=inplace,
        seqlen_offsets=torch.tensor(starts, device=device) if offsets == "tensor" else offsets,
        cu_seqlens=cu_seqlens,
        max_seqlen=6,
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert (actual is x) == inplace
    assert inplace or torch.equal(x, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [3, "tensor", "packed"])
def test_flash_attn_has_gradients(device: str, offsets: Any, inplace: bool) -> None:
    shape = (10, 3, 16) if offsets == "packed" else (2, 5, 3, 16)
    x = random_values(shape, device=device).requires_grad_()
    weights = random_values(shape, device=device, seed=1)
    cos, sin = tables(16, 8, device)
    starts = (3, 3) if offsets == 3 else (2, 11)
    rows = torch.stack([torch.arange(start, start + 5) for start in starts]).to(device)
    options: dict[str, Any] = {"seqlen_offsets": torch.tensor(starts, device=device)}
    if offsets == 3:
        options = {"seqlen_offsets": 3}
    if offsets == "packed":
        options |= {"cu_seqlens": torch.tensor([0, 5, 10], device=device), "max_seqlen": 5}
        rows = rows.flatten()
    actual = flash_attn.apply_rotary_emb(x.clone(), cos, sin, inplace=inplace, **options)
    expected = rotated(x, cos[rows].unsqueeze(-2), sin[rows].unsqueeze(-2), interleaved=False)
    torch.testing.assert_close(
        torch.autograd.grad(actual, x, weights), torch.autograd.grad(expected, x, weights)
    )


@pytest.mark.parametrize(("rows", "offset"), [(4, 0), (4, 3), (1, 0), (8, -1)])
def test_flash_attn_refuses_tables_without_a_row_for_each_token(
    device: str, rows: int, offset: int
) -> None:
    cos, sin = tables(rows, 8, device)
    x = random_values((2, 5, 3, 16), device=device)
    with pytest.raises(ValueError, match=f"expected cos to have the rows from {offset} to"):
        flash_attn.apply_rotary_emb(x, cos, sin, seqlen_offsets=offset)


def test_flash_attn_refuses_positions_beyond_the_tables() -> None:
    cos, sin = tables(8, 8, "cpu")
    x = random_values((2, 5, 3, 16))
    with pytest.raises(IndexError, match=r"expected positions .* but got 8"):
        flash_attn.apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 4]))


@pytest.mark.parametrize("positions_shape", [None, (1, 5), (2, 5)])
def test_torchtitan_rotates_by_complex_tables(
    device: str, positions_shape: tuple[int, int] | None
) -> None:
    q = random_values((2, 5, 4, 16), device=device)
    k = random_values((2, 5, 2, 16), device=device, seed=1)
    freqs_cis = torch.complex(*tables(16, 8, device))
    positions = None
    chosen = freqs_cis[:5]
    if positions_shape is not None:
        positions = torch.arange(10, device=device).view(2, 5)[: positions_shape[0]] + 3
        chosen = freqs_cis[positions]

    def expected(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * chosen.unsqueeze(-2)
        return torch.view_as_real(turned).flatten(3)

    actual = torchtitan.apply_rotary_emb_complex(q, k, freqs_cis, positions)
    torch.testing.assert_close(actual, (expected(q), expected(k)), **TOLERANCE)
    single = torchtitan.apply_rotary_emb_single_complex(q, freqs_cis, positions)
    torch.testing.assert_close(single, expected(q), **TOLERANCE)


@pytest.mark.parametrize("positions_shape", [None, (1, 5), (2, 5)])
def test_torchtitan_rotates_by_a_cache_of_cosines_and_sines(
    device: str, positions_shape: tuple[int, int] | None
) -> None:
    q = random_values((2, 5, 4, 16), device=device)
    k = random_values((2, 5, 2, 16), device=device, seed=1)
    cos, sin = tables(16, 16, device)  # The two values of a pair need not be the same.
    cache = torch.cat((cos, sin), dim=-1)
    positions = None
    rows = torch.arange(5, device=device)
    if positions_shape is not None:
        rows = positions = torch.arange(10, device=device).view(2, 5)[: positions_shape[0]] + 3
    actual = torchtitan.apply_rotary_emb_cos_sin(q, k, cache, positions)
    expected = tuple(
        x * cos[rows].unsqueeze(-2)
        + torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * sin[rows].unsqueeze(-2)
        for x in (q, k)
    )
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("rows", [1, 4])
def test_torchtitan_refuses_tables_without_a_row_for_each_token(rows: int) -> None:
    q = random_values((2, 5, 4, 16))
    cos, sin = tables(rows, 8, "cpu")
    with pytest.raises(ValueError, match="expected freqs_cis to have at least 5 rows"):
        torchtitan.apply_rotary_emb_single_complex(q, torch.complex(cos, sin))
    with pytest.raises(ValueError, match="expected rope_cache to have at least 5 rows"):
        torchtitan.apply_rotary_emb_cos_sin(q, q, torch.cat((cos, cos, sin, sin), dim=-1))


@pytest.fixture(scope="module")
def torchtune_module() -> ModuleType:
    """torchtune's own module, loaded alone: the package imports all that trains a model."""
    spec = importlib.util.find_spec("torchtune")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchtune is not installed")
    path = Path(spec.submodule_search_locations[0], "modules", "position_embeddings.py")
    file_spec = importlib.util.spec_from_file_location("position_embeddings", path)
    assert file_spec is not None
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_torchtune_rotates_as_the_original(
    packed: bool, dtype: torch.dtype, torchtune_module: ModuleType
) -> None:
    x = random_values((2, 5, 3, 16), dtype)
    input_pos = torch.tensor([[0, 1, 2, 0, 1], [4090, 4091, 4092, 4093, 4094]]) if packed else None
    original = torchtune_module.RotaryPositionalEmbeddings(16, 4096, 500_000)
    ours = torchtune.RotaryPositionalEmbeddings(16, 4096, 500_000)
    torch.testing.assert_close(ours.theta, original.theta, rtol=0, atol=0)
    # torchtune's own cosines and sines are those of float32.
    torch.testing.assert_close(
        ours(x, input_pos=input_pos),
        original(x, input_pos=input_pos),
        rtol=torch.finfo(dtype).eps,
        atol=2e-6,
    )


def test_torchtune_rotates_pairs_of_neighbours_by_position(device: str) -> None:
    x = random_values((2, 5, 3, 16), device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 10, 11]], device=device)
    cos, sin = tables(16, 8, device)
    expected = rotated(x, cos[positions].unsqueeze(2), sin[positions].unsqueeze(2), True)
    actual = torchtune.RotaryPositionalEmbeddings(16).to(device)(x, input_pos=positions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-6)
    without = torchtune.RotaryPositionalEmbeddings(16).to(device)(x)
    counted = torchtune.RotaryPositionalEmbeddings(16).to(device)(
        x, input_pos=torch.arange(5, device=device)
    )
    assert torch.equal(without, counted)


def test_torchtune_keeps_its_frequencies_in_float32(device: str) -> None:
    module = torchtune.RotaryPositionalEmbeddings(16)
    theta = module.theta.clone()
    module.to(device).to(torch.bfloat16)
    assert module.theta.device.type == device
    assert torch.equal(module.theta.cpu(), theta)
    assert not module.state_dict()


def test_torchtune_forms_its_frequencies_again_after_meta() -> None:
    with torch.device("meta"):
        module = torchtune.RotaryPositionalEmbeddings(16, base=500_000)
    assert module.theta.is_meta
    model = nn.Sequential(module).to_empty(device="cpu")
    model.load_state_dict({})
    expected = torchtune.RotaryPositionalEmbeddings(16, base=500_000)
    assert torch.equal(module.theta, expected.theta)
    there_and_back = expected.to("meta").to_empty(device="cpu").bfloat16()
    assert torch.equal(there_and_back.theta, module.theta)


X = random_values((2, 5, 3, 16))
PACKED = random_values((10, 3, 16))
COS, SIN = tables(16, 8, "cpu")
FREQS_CIS = torch.complex(COS, SIN)
CACHE = torch.cat((COS, COS, SIN, SIN), dim=-1)
IDS = torch.arange(5).expand(2, 5)
ENDS = torch.tensor([0, 5, 10])

# What is given, the error, and its text after the name of what was called.
REFUSED: dict[str, list[tuple[dict[str, Any], type[Exception], str]]] = {
    "flash_attn.apply_rotary_emb": [
        ({"x": 1}, TypeError, "x to be a tensor, but got int"),
        (
            {"x": PACKED},
            ValueError,
            "x to have dimensions (batch, seqlen, nheads, headdim), but got shape (10, 3, 16)",
        ),
        (
            {"cu_seqlens": ENDS},
            ValueError,
            "x to have dimensions (total_seqlen, nheads, headdim), but got shape (2, 5, 3, 16)",
        ),
        ({"cos": [1.0]}, TypeError, "cos to be a tensor, but got list"),
        ({"sin": None}, TypeError, "sin to be a tensor, but got None"),
        (
            {"cos": COS[0], "sin": SIN[0]},
            ValueError,
            "cos to have dimensions (seqlen_rotary, rotary_dim / 2), but got shape (8,)",
        ),
        ({"sin": SIN[:9]}, ValueError, "sin to have shape (16, 8), but got shape (9, 8)"),
        (
            {"seqlen_offsets": 1.0},
            TypeError,
            "seqlen_offsets to be an integer or a tensor of integers, but got float",
        ),
        (
            {"seqlen_offsets": None},
            TypeError,
            "seqlen_offsets to be an integer or a tensor of integers, but got None",
        ),
        (
            {"seqlen_offsets": torch.tensor([1.0, 2.0])},
            TypeError,
            "seqlen_offsets to be int32 or int64, but got float32",
        ),
        (
            {"seqlen_offsets": torch.tensor(1)},
            ValueError,
            "seqlen_offsets to have shape (2,), but got shape ()",
        ),
        (
            {"seqlen_offsets": torch.tensor([1, 2, 3])},
            ValueError,
            "seqlen_offsets to have shape (2,), but got shape (3,)",
        ),
        (
            {"x": PACKED, "cu_seqlens": ENDS.float()},
            TypeError,
            "cu_seqlens to be int32 or int64, but got float32",
        ),
        (
            {"x": PACKED, "cu_seqlens": [0, 5, 10]},
            TypeError,
            "cu_seqlens to be a tensor, but got list",
        ),
        (
            {"x": PACKED, "cu_seqlens": ENDS[None]},
            ValueError,
            "cu_seqlens to have dimensions (batch + 1), but got shape (1, 3)",
        ),
        (
            {"x": PACKED, "cu_seqlens": ENDS[:0]},
            ValueError,
            "cu_seqlens to have an element, but got none",
        ),
        (
            {"x": PACKED, "cu_seqlens": ENDS, "seqlen_offsets": torch.tensor([1])},
            ValueError,
            "seqlen_offsets to have shape (2,), but got shape (1,)",
        ),
    ],
    "torchtitan.apply_rotary_emb_complex": [
        ({"xq": 1}, TypeError, "xq to be a tensor, but got int"),
        (
            {"xk": PACKED},
            ValueError,
            "xk to have dimensions (batch, seqlen, heads, head_dim), but got shape (10, 3, 16)",
        ),
        ({"freqs_cis": COS}, TypeError, "freqs_cis to be complex, but got float32"),
        (
            {"freqs_cis": FREQS_CIS[:, :4]},
            ValueError,
            "freqs_cis to have shape (16, 8), but got shape (16, 4)",
        ),
        (
            {"freqs_cis": FREQS_CIS[None]},
            ValueError,
            "freqs_cis to have dimensions (max_seqlen, columns), but got shape (1, 16, 8)",
        ),
        ({"positions": 3}, TypeError, "positions to be a tensor, but got int"),
        ({"positions": IDS.float()}, TypeError, "positions to be int32 or int64, but got float32"),
        (
            {"positions": IDS[0]},
            ValueError,
            "positions to have dimensions (batch, seqlen), but got shape (5,)",
        ),
        (
            {"positions": IDS[:, :1]},
            ValueError,
            "positions to have shape (2, 5) or (1, 5), but got shape (2, 1)",
        ),
    ],
    "torchtitan.apply_rotary_emb_single_complex": [
        ({"x": None}, TypeError, "x to be a tensor, but got None"),
        ({"freqs_cis": COS}, TypeError, "freqs_cis to be complex, but got float32"),
    ],
    "torchtitan.apply_rotary_emb_cos_sin": [
        (
            {"rope_cache": CACHE[:, :31]},
            ValueError,
            "rope_cache to have shape (16, 32), but got shape (16, 31)",
        ),
        (
            {"rope_cache": CACHE[:, :16]},
            ValueError,
            "rope_cache to have shape (16, 32), but got shape (16, 16)",
        ),
        ({"rope_cache": (COS, SIN)}, TypeError, "rope_cache to be a tensor, but got tuple"),
    ],
    "torchtune.RotaryPositionalEmbeddings": [
        ({"x": 1}, TypeError, "x to be a tensor, but got int"),
        (
            {"x": PACKED},
            ValueError,
            "x to have dimensions (b, s, n_h, h_d), but got shape (10, 3, 16)",
        ),
        (
            {"x": X[..., :8]},
            ValueError,
            "x to have shape (2, 5, 3, 16), but got shape (2, 5, 3, 8)",
        ),
        ({"input_pos": 3}, TypeError, "input_pos to be a tensor, but got int"),
        (
            {"input_pos": IDS[:, :4]},
            ValueError,
            "input_pos to have shape (2, 5) or (1, 5) or (5,), but got shape (2, 4)",
        ),
    ],
}

GIVEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "flash_attn.apply_rotary_emb": (
        flash_attn.apply_rotary_emb,
        {"x": X, "cos": COS, "sin": SIN},
    ),
    "torchtitan.apply_rotary_emb_complex": (
        torchtitan.apply_rotary_emb_complex,
        {"xq": X, "xk": X, "freqs_cis": FREQS_CIS},
    ),
    "torchtitan.apply_rotary_emb_single_complex": (
        torchtitan.apply_rotary_emb_single_complex,
        {"x": X, "freqs_cis": FREQS_CIS},
    ),
    "torchtitan.apply_rotary_emb_cos_sin": (
        torchtitan.apply_rotary_emb_cos_sin,
        {"xq": X, "xk": X, "rope_cache": CACHE},
    ),
    "torchtune.RotaryPositionalEmbeddings": (
        torchtune.RotaryPositionalEmbeddings(16),
        {"x": X},
    ),
}


@pytest.mark.parametrize(
    ("name", "changed", "error", "text"),
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_what_cannot_be_used_is_refused_by_name(
    name: str, changed: dict[str, Any], error: type[Exception], text: str
) -> None:
    call, given = GIVEN[name]
    call(**given)
    with pytest.raises(error) as raised:
        call(**given | changed)
    assert str(raised.value) == f"torch_rope.integrations.{name}(): expected {text}"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dim": 7}, ValueError, "dim to be even and positive, but got 7"),
        ({"dim": 0}, ValueError, "dim to be even and positive, but got 0"),
        ({"dim": 8.0}, TypeError, "dim to be an integer, but got float"),
        ({"dim": 8, "max_seq_len": "9"}, TypeError, "max_seq_len to be an integer, but got str"),
        ({"dim": 8, "base": "1e4"}, TypeError, "base to be a number, but got str"),
        ({"dim": 8, "base": -1.0}, ValueError, "base to be positive and finite, but got -1.0"),
    ],
)
def test_torchtune_refuses_options(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(f"RotaryPositionalEmbeddings(): expected {text}")):
        torchtune.RotaryPositionalEmbeddings(**arguments)


@pytest.mark.parametrize("ends", [[1, 5, 10], [0, 7, 5, 10], [0, 5, 11]])
def test_flash_attn_refuses_ends_that_do_not_ascend_to_the_tokens(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected cu_seqlens to "):
        flash_attn.apply_rotary_emb(PACKED, COS, SIN, cu_seqlens=torch.tensor(ends))


def test_flash_attn_leaves_complex_tables_to_the_operator() -> None:
    with pytest.raises(TypeError, match=r"rope::apply_cos_sin\(\): expected cos .*complex64"):
        flash_attn.apply_rotary_emb(X, FREQS_CIS, FREQS_CIS)


@pytest.mark.parametrize(
    "subject",
    [
        flash_attn.apply_rotary_emb,
        torchtitan.apply_rotary_emb_complex,
        torchtitan.apply_rotary_emb_single_complex,
        torchtitan.apply_rotary_emb_cos_sin,
        torchtune.RotaryPositionalEmbeddings,
    ],
)
def test_the_examples_of_a_docstring_run(subject: Any) -> None:
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(subject, globs={}):
        runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0
