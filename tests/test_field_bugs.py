"""Bugs that users of other implementations reported, each tried in every form that could have it.

The docstring of a test names the report and says what went wrong there.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import reference
import torch
import torch_rope
from reference import assert_rotated, assert_same_bits, random_positions, random_values
from torch import Tensor, nn

FLOAT32 = torch.float32
BFLOAT16 = torch.bfloat16

# Options of a norm; None for no norm.
NO_NORM = None
NORM_FIRST: dict[str, Any] = {"norm_last": False}
NORM_LAST: dict[str, Any] = {"norm_last": True}
GEMMA_NORM: dict[str, Any] = {"weight_offset": 1.0}
NORMS = (NO_NORM, NORM_FIRST, NORM_LAST)

SOURCES = ("positions", "tables", "full-width tables", "rows of tables")


# -----------------------------------------------------------------------------
# Every form of a call


class Source(NamedTuple):
    """What the angles are made from: the arguments of ``apply`` or of ``apply_cos_sin``."""

    name: str
    function: str
    arguments: tuple[Tensor, ...]
    options: dict[str, Any]


def copy_of(x: Tensor) -> Tensor:
    """Copies a tensor with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def sources_of(
    positions: Tensor, inv_freq: Tensor | None, rotary_dim: int, dtype: torch.dtype, **options: Any
) -> Iterator[Source]:
    """Gives the same angles as positions, tables of half and full width, and rows of tables."""
    given = (positions,) if inv_freq is None else (positions, inv_freq)
    # What names the slice where nothing else does.
    named = {} if inv_freq is not None else {"rotary_dim": rotary_dim}
    yield Source("positions", "apply", given, {**named, **options})

    scheme = {key: options.pop(key, 1.0) for key in ("scale_factor", "attention_factor")}
    scheme["max_wavelength"] = options.pop("max_wavelength", 10000.0)

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = None if inv_freq is None else inv_freq.cpu()
        angle = reference.angles(
            positions.cpu(),
            rotary_dim,
            frequencies,
            scheme["max_wavelength"],
            scheme["scale_factor"],
        )
        factor = scheme["attention_factor"]
        wide = dtype if dtype == torch.float64 else FLOAT32
        cos, sin = ((factor * table).to(wide) for table in (angle.cos(), angle.sin()))
        return cos.to(positions.device), sin.to(positions.device)

    cos, sin = tables(positions)
    yield Source("tables", "apply_cos_sin", (cos, sin), options)

    if options.get("interleaved"):
        full = tuple(table.repeat_interleave(2, dim=-1) for table in (cos, sin))
    else:
        full = tuple(torch.cat((table, table), dim=-1) for table in (cos, sin))
    yield Source("full-width tables", "apply_cos_sin", full, {**options, "full_width": True})

    has_rows = not positions.is_floating_point() and (inv_freq is None or inv_freq.dim() == 1)
    if has_rows and 0 <= int(positions.min()) <= int(positions.max()) < 20_000:
        rows = tables(torch.arange(int(positions.max()) + 1, device=positions.device))
        yield Source("rows of tables", "apply_cos_sin", (*rows, positions), options)


def check_every_form(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor | None = None,
    *,
    rotary_dim: int | None = None,
    norms: Sequence[dict[str, Any] | None] = NORMS,
    sources: Sequence[str] = SOURCES,
    weights: tuple[Tensor | None, Tensor | None] | None = None,
    **options: Any,
) -> None:
    """Compares every form of a call with the formula in float64.

    The forms are a pair or a single tensor, in place or not, the kernel or the decomposition, from
    positions, tables, full-width tables or rows of tables, and with each of the norms.
    """
    axis = options.get("embedding_axis", -1)
    if inv_freq is not None:
        rotary_dim = 2 * inv_freq.shape[-1]
    elif rotary_dim is None:
        rotary_dim = q.shape[axis] - options.get("rotary_offset", 0)
    if weights is None:
        weights = (
            1 + random_values((q.shape[axis],), q.dtype, str(q.device), seed=11) / 4,
            1 + random_values((k.shape[axis],), k.dtype, str(k.device), seed=12) / 4,
        )
    for source in sources_of(positions, inv_freq, rotary_dim, q.dtype, **options):
        for norm in norms if source.name in sources else ():
            check_forms_of(source, norm, (q, k), weights)


def check_forms_of(
    source: Source,
    norm: dict[str, Any] | None,
    pair: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
) -> None:
    """Compares the forms of one operator."""
    name = source.function if norm is None else f"norm_{source.function}"
    call = getattr(torch_rope, name)
    in_place = getattr(torch_rope, f"{name}_")
    decomposition = getattr(torch.ops.rope, f"{name}_composed")
    options = {**source.options, **(norm or {})}
    both = source.arguments if norm is None else (weights, *source.arguments)
    before = [copy_of(x) for x in pair]

    results = call(pair, *both, **options)
    in_pair = tuple(copy_of(x) for x in pair)
    in_place(in_pair, *both, **options)
    for x, weight, result, changed, original in zip(
        pair, weights, results, in_pair, before, strict=True
    ):
        arguments = source.arguments if norm is None else (weight, *source.arguments)
        expected = getattr(reference, name)(x, *arguments, **options)
        alone = copy_of(x)
        in_place(alone, *arguments, **options)
        forms = {
            "of a pair": result,
            "alone": call(x, *arguments, **options),
            "in place, of a pair": changed,
            "in place, alone": alone,
            "decomposed": decomposition(x, *arguments, **options),
        }
        assert_same_bits(x, original)  # The functional forms leave their arguments alone.
        for form, actual in forms.items():
            try:
                if form in ("of a pair", "decomposed"):
                    assert_rotated(actual, expected)
                else:
                    assert_same_bits(actual, result)
            except AssertionError as error:
                raise AssertionError(f"{name} by {source.name}, {form}: {error}") from error


def random_pair(
    q: tuple[int, ...],
    k: tuple[int, ...] | None = None,
    dtype: torch.dtype = FLOAT32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draws q and k."""
    return random_values(q, dtype, device, seed=1), random_values(k or q, dtype, device, seed=2)


# -----------------------------------------------------------------------------
# Wrong elements


@pytest.mark.parametrize(
    ("norm", "source"),
    [(NO_NORM, "tables"), (NORM_FIRST, "positions"), (GEMMA_NORM, "rows of tables")],
)
def test_a_slice_of_many_heads_is_rotated_in_all_of_them(
    device: str, norm: dict[str, Any] | None, source: str
) -> None:
    """vllm-project/vllm#51049: norm and partial rotation were right only in each warp's first head.

    Of 128 elements 64 were rotated, as halves; the kernel for several heads per warp ran for more
    than 10,240 heads of tokens.
    """
    tokens, heads, kv_heads = 515, 16, 4
    assert tokens * (heads + kv_heads) > 10_240
    q, k = random_pair((tokens, heads, 128), (tokens, kv_heads, 128), BFLOAT16, device)
    positions = torch.arange(tokens, device=device)[:, None]
    check_every_form(q, k, positions, rotary_dim=64, norms=[norm], sources=[source])


def test_each_row_of_a_batch_with_one_token_is_rotated(device: str) -> None:
    """ml-explore/mlx#3494: of (B, H, 1, D) only the first row of the batch was right."""
    for batch in (2, 3, 5):
        for dtype in (FLOAT32, torch.float16):
            same = random_values((1, 4, 1, 128), dtype, device).repeat(batch, 1, 1, 1)
            one = torch_rope.apply(same, torch.tensor(5, device=device))
            for row in one:
                assert_same_bits(row, one[0])
            check_every_form(same, same[:, :1].clone(), torch.tensor([5], device=device))
            q, k = random_pair((batch, 4, 1, 128), (batch, 2, 1, 128), dtype, device)
            per_row = torch.arange(3, 3 + 7 * batch, 7, device=device)[:, None, None]
            for interleaved in (False, True):
                check_every_form(q, k, per_row, interleaved=interleaved)


def test_q_and_k_are_each_read_by_their_own_strides(device: str) -> None:
    """hpcaitech/ColossalAI#6428: k got q's elements, and was read by q's strides and heads."""
    positions = torch.arange(5, device=device)[:, None]
    q = random_values((5, 8, 16), device=device, seed=1)
    packed = random_values((5, 3 * 2 * 16), device=device, seed=2)
    k = packed[:, 32:64].view(5, 2, 16)  # Of a packed k and v.
    check_every_form(q, k, positions)
    check_every_form(q, k.transpose(0, 1).contiguous().transpose(0, 1), positions)
    check_every_form(q[:, ::2], packed.view(5, 2, 48)[..., 8:24], positions, interleaved=True)
    check_every_form(q, random_values((5, 1, 16), device=device, seed=3), positions)


def test_a_pair_of_64_and_8_heads_is_normalized_before_it_is_rotated(device: str) -> None:
    """vllm-project/vllm#48872: in place, halves were reloaded before the norm had been stored."""
    q, k = random_pair((8, 64, 128), (8, 8, 128), BFLOAT16, device)
    positions = torch.arange(8, device=device)[:, None]
    check_every_form(q, k, positions, norms=(NORM_FIRST, NORM_LAST))
    packed = torch.cat((q, k), dim=1)
    expected = torch_rope.norm_apply((q, k), (None, None), positions)
    for _ in range(20):
        qkv = packed.clone()
        torch_rope.norm_apply_((qkv[:, :64], qkv[:, 64:]), (None, None), positions)
        assert_same_bits(qkv, torch.cat(expected, dim=1))


def test_a_rotated_suffix_is_written_once(device: str) -> None:
    """triton-lang/triton#10743: the normalized row sometimes overwrote its rotated suffix."""
    q, k = random_pair((6, 4, 512), (6, 1, 512), BFLOAT16, device)
    positions = torch.arange(7, 13, device=device)[:, None]
    for interleaved in (False, True):
        check_every_form(q, k, positions, rotary_dim=64, rotary_offset=448, interleaved=interleaved)


@pytest.mark.parametrize("dtype", [torch.float64, FLOAT32, torch.float16, BFLOAT16])
def test_interleaved_pairs_of_any_number_are_rotated(device: str, dtype: torch.dtype) -> None:
    """microsoft/onnxruntime#26390: an interleaved vector kernel read tables at i, not at i / 2.

    Row lengths leave every kind of vector tail, and the memory next to tables is NaN.
    """
    for pairs in (1, 3, 5, 7, 8, 9, 15, 17, 31, 33, 40):
        q, k = random_pair((3, 2, 2 * pairs + 1), (3, 1, 2 * pairs), dtype, device)
        positions = torch.tensor([[1], [0], [9]], device=device)
        check_every_form(
            q, k, positions, rotary_dim=2 * pairs, interleaved=True, norms=(NO_NORM, NORM_FIRST)
        )
        tables = torch.full((2, 3, 1, pairs + 4), math.nan, device=device)
        cos, sin = tables[..., 2 : pairs + 2]
        for table, seed in ((cos, 3), (sin, 4)):
            table.copy_(random_values((3, 1, pairs), device=device, seed=seed))
        expected = reference.apply_cos_sin(k, cos, sin, interleaved=True)
        assert_rotated(torch_rope.apply_cos_sin(k, cos, sin, interleaved=True), expected)


# -----------------------------------------------------------------------------
# Pair conventions


def of_pair(
    q: Tensor, k: Tensor, first: Sequence[int], second: Sequence[int], turned: Tensor
) -> Tensor:
    """Returns the product of q and k after each pair of q was turned by an angle against k's."""
    a, b = q.double().cpu()[..., first], q.double().cpu()[..., second]
    c, d = k.double().cpu()[..., first], k.double().cpu()[..., second]
    # Re((a + ib) e^{it} (c - id)) of every pair.
    return ((a * c + b * d) * turned.cos() + (a * d - b * c) * turned.sin()).sum(-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_products_depend_on_the_distance_alone(device: str, interleaved: bool, source: str) -> None:
    """huggingface/transformers#47328: tables for halves were applied to neighbouring elements."""
    pairs, heads = 8, 3
    q, k = random_pair((heads, 2 * pairs), dtype=torch.float64, device=device)
    first = range(0, 2 * pairs, 2) if interleaved else range(pairs)
    second = range(1, 2 * pairs, 2) if interleaved else range(pairs, 2 * pairs)
    frequencies = torch.tensor([10000.0 ** (-n / pairs) for n in range(pairs)], dtype=torch.float64)

    def at(x: Tensor, position: int) -> Tensor:
        positions = torch.tensor([position], device=device)
        found = {
            s.name: s
            for s in sources_of(positions, None, 2 * pairs, x.dtype, interleaved=interleaved)
        }[source]
        function = getattr(torch_rope, found.function)
        return function(x, *found.arguments, **found.options)

    for distance in (0, 1, 17):
        expected = of_pair(q, k, list(first), list(second), distance * frequencies)
        for n in (0, 3, 1000):
            product = (at(q, n + distance) * at(k, n)).sum(-1).cpu()
            torch.testing.assert_close(product, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_halves_of_full_width_tables_may_differ(device: str, interleaved: bool) -> None:
    """baidu/ERNIE-Image#6: tables repeat each angle (t0, t0, t1, t1, ...), the pairs are halves.

    The trained models depend on it: element i must use column i, as in x cos + rotate_half(x) sin.
    Interleaved, the tables here repeat angles as halves: no pair has one angle.
    """
    q, k = random_pair((2, 5, 3, 16), (2, 5, 1, 16), device=device)
    frequencies = torch.tensor([1.0, 0.6, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01], dtype=torch.float64)
    angle = torch.outer(torch.arange(5.0, dtype=torch.float64), frequencies)
    angle = torch.cat((angle, angle), dim=-1) if interleaved else angle.repeat_interleave(2, dim=-1)
    cos, sin = (table[:, None].float().to(device) for table in (angle.cos(), angle.sin()))
    options = {"interleaved": interleaved, "full_width": True}

    def formula(x: Tensor) -> Tensor:
        x = x.double().cpu()
        if interleaved:
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            turned = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
        return x * cos.double().cpu() + turned * sin.double().cpu()

    rows = torch.arange(5, device=device)[:, None]
    for tables in ((cos, sin), (cos[:, 0], sin[:, 0], rows)):
        source = Source("tables that differ", "apply_cos_sin", tables, options)
        expected = reference.apply_cos_sin(q, *tables, **options)
        torch.testing.assert_close(expected.values, formula(q), rtol=0, atol=1e-12)
        for norm in NORMS:
            check_forms_of(source, norm, (q, k), (None, None))


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_alternating_axes_are_not_interleaved_elements(
    device: str, alternate: bool, interleaved: bool
) -> None:
    """vllm-project/vllm-omni#1784: interleaved axes of M-RoPE were taken for interleaved pairs."""
    sections, pairs = (4, 2, 2), 8
    axis_of = [0, 1, 2, 0, 1, 2, 0, 0] if alternate else [0, 0, 0, 0, 1, 1, 2, 2]
    frequencies = [100.0 ** (-n / pairs) for n in range(pairs)]
    inv_freq = torch.tensor(frequencies, dtype=torch.float64, device=device)
    rows = torch_rope.mrope_frequencies(inv_freq, sections, interleaved=alternate)
    positions = random_positions((3, 5, 1), low=0, high=50).to(device)
    q, k = random_pair((5, 2, 16), (5, 1, 16), device=device)
    check_every_form(q, k, positions, rows, interleaved=interleaved)

    parameters = {
        "rope_theta": 100.0,
        "mrope_section": list(sections),
        "mrope_interleaved": alternate,
    }
    config = {"head_dim": 16, "rope_parameters": parameters, "rope_interleave": interleaved}
    layer = torch_rope.RotaryEmbedding.from_config(config, dtype=torch.float64, device=device)
    for rotated in (
        torch_rope.apply(q, positions, rows, interleaved=interleaved),
        layer(q, positions),
        layer((q, k), positions)[0],
    ):
        for n, axis in enumerate(axis_of):
            a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + pairs)
            angle = positions[axis].double() * frequencies[n]
            x = q.double()
            expected = x[..., a] * angle.cos() - x[..., b] * angle.sin()
            torch.testing.assert_close(rotated[..., a].double(), expected, rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------
# Tables and their bounds


ROTATIONS_BY_TABLES = [
    (family, pair, in_place)
    for family in ("apply_cos_sin", "norm_apply_cos_sin")
    for pair in (False, True)
    for in_place in (False, True)
]


def refused_by_tables(
    error: type[Exception], message: str, x: Tensor, *tables: Tensor, **options: Any
) -> None:
    """Asserts that every form that takes tables raises, and writes nothing."""
    for family, pair, in_place in ROTATIONS_BY_TABLES:
        function = getattr(torch_rope, f"{family}_" if in_place else family)
        q, k = x.clone(), x.clone()
        weight = () if family == "apply_cos_sin" else ((None, None) if pair else None,)
        with pytest.raises(error, match=message):
            function((q, k) if pair else q, *weight, *tables, **options)
        assert_same_bits(q, x)
        assert_same_bits(k, x)


@pytest.mark.parametrize("columns", [1, 15, 17, 32])
def test_tables_of_another_width_than_rotary_dim_are_refused(device: str, columns: int) -> None:
    """vllm-project/vllm#43676: a kernel read past tables that were narrower than rotary_dim."""
    x = random_values((4, 64), device=device)
    positions = torch.arange(4, device=device)
    cos = sin = random_values((4, columns), device=device, seed=1)
    refused_by_tables(ValueError, "expected rotary_dim to be ", x, cos, sin, rotary_dim=32)
    refused_by_tables(
        ValueError, "expected rotary_dim to be ", x, cos, sin, positions, rotary_dim=32
    )


def test_a_narrow_table_rotates_no_more_than_it_holds(device: str) -> None:
    """NVIDIA/Megatron-LM#5317: a table of 8 columns was read as one of 64, and gave NaN.

    Here the columns after the table's, and the rows after its last, are NaN.
    """
    storage = torch.full((9, 40), math.nan, device=device)
    storage[:7, :8] = random_values((7, 8), device=device)
    table = storage[:7, :8]
    q, k = random_pair((7, 2, 64), (7, 1, 64), device=device)
    rows = torch.tensor([[6], [0], [5], [6], [1], [2], [3]], device=device)
    for tables in ((table[:, None], table[:, None]), (table, table, rows)):
        for norm in NORMS:
            source = Source("a narrow table", "apply_cos_sin", tables, {})
            check_forms_of(source, norm, (q, k), (None, None))
        rotated = torch_rope.apply_cos_sin(q, *tables)
        assert_same_bits(rotated[..., 16:], q[..., 16:])
    wide = random_values((7, 33), device=device)
    refused_by_tables(ValueError, "expected cos to have at most 32 columns", q[:, 0], wide, wide)


@pytest.mark.parametrize("position", [7, 4096, -1, 2**40])
def test_a_position_beyond_the_table_is_refused(position: int) -> None:
    """pegainfer-project/pegainfer#220: positions beyond 4,096 rows read whatever came after them.

    CUDA reports it by a device-side assertion, which ends a process.
    """
    table = random_values((7, 8))
    x = random_values((3, 16), seed=1)
    for dtype in (torch.int64,) if position > 2**31 else (torch.int32, torch.int64):
        rows = torch.tensor([0, position, 6], dtype=dtype)
        refused_by_tables(IndexError, str(position), x, table, table, rows)
    at_the_end = torch.tensor([0, 6, 6])
    assert_rotated(
        torch_rope.apply_cos_sin(x, table, table, at_the_end),
        reference.apply_cos_sin(x, table, table, at_the_end),
    )


# -----------------------------------------------------------------------------
# Positions


@pytest.mark.parametrize("dtype", [FLOAT32, torch.float64])
def test_distant_positions_have_exact_angles(device: str, dtype: torch.dtype) -> None:
    """kekzl/imp#1316: fast sines were off by 1e-2 at position 131,071, reduced in float32."""
    q, k = random_pair((3, 2, 128), (3, 1, 128), device=device)
    positions = torch.tensor([[131_071], [40], [131_070]], device=device)
    check_every_form(q, k, positions)
    check_every_form(q, k, positions.double(), max_wavelength=1e6, interleaved=True)
    frequencies = [1e6 ** (-n / 64) for n in range(64)]
    inv_freq = torch.tensor(frequencies, dtype=torch.float64).to(device, dtype)
    check_every_form(q, k, positions.int(), inv_freq)
    # Pair 0 turns by the position itself.
    one = torch.zeros(2, device=device)
    one[0] = 1
    cos, sin = torch_rope.apply(one, torch.tensor(131_071, device=device)).tolist()
    assert abs(cos - math.cos(131_071)) < 3e-7
    assert abs(sin - math.sin(131_071)) < 3e-7


def test_positions_are_not_rounded_to_bfloat16(device: str) -> None:
    """huggingface/candle#3520: position 15,962 became 15,936 or 15,968 in a bfloat16 model."""
    q, k = random_pair((3, 2, 64), (3, 1, 64), BFLOAT16, device)
    positions = torch.tensor([[15_962], [15_963], [257]], device=device)
    check_every_form(q, k, positions)
    inv_freq, _ = torch_rope.frequencies({"rope_theta": 1e6}, 64, device=device)
    check_every_form(q, k, positions, inv_freq)
    for call in (
        lambda: torch_rope.apply(q, positions.bfloat16()),
        lambda: torch_rope.norm_apply(q, None, positions.bfloat16()),
    ):
        with pytest.raises(TypeError, match="bfloat16"):
            call()


def test_packed_sequences_start_again_at_0(device: str) -> None:
    """NVIDIA-NeMo/Automodel#2377: positions 0 1 2 0 1 were taken for 0 1 2 3 4."""
    q, k = random_pair((5, 4, 32), (5, 2, 32), BFLOAT16, device)
    positions = torch_rope.positions_from_cu_seqlens(torch.tensor([0, 3, 5], device=device), 5)
    assert positions.tolist() == [0, 1, 2, 0, 1]
    for given in (positions[:, None], positions[:, None].int(), positions[:, None].float()):
        check_every_form(q, k, given)
    layer = torch_rope.RotaryEmbedding(32, device=device)
    packed = layer(q, k, positions[:, None])
    for x, rotated in zip((q, k), packed, strict=True):
        assert_same_bits(rotated[3:], layer(x[3:], torch.arange(2, device=device)[:, None]))
        assert_same_bits(rotated[:3], layer(x[:3], torch.arange(3, device=device)[:, None]))


def test_left_padding_is_not_counted(device: str) -> None:
    """Comfy-Org/ComfyUI#15698: a left-padded prompt got positions that began with its padding."""
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], device=device)
    positions = torch_rope.positions_from_attention_mask(mask)
    assert positions.tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    q, k = random_pair((3, 4, 5, 32), (3, 1, 5, 32), device=device)  # (B, H, S, D)
    check_every_form(q, k, positions[:, None])
    rotated = torch_rope.apply(q, positions[:, None])
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = torch_rope.apply(q[row, :, 5 - length :], torch.arange(length, device=device))
        assert_same_bits(rotated[row, :, 5 - length :], alone)


# -----------------------------------------------------------------------------
# Schemes of frequencies


def frequency(theta: float, n: int, dim: int) -> float:
    """Returns the frequency of pair n."""
    return theta ** (-2 * n / dim)


def dynamic_frequencies(theta: float, dim: int, factor: float, length: int, trained: int) -> Tensor:
    """Returns dynamic NTK's frequencies for a length."""
    growth = factor * max(length, trained) / trained - (factor - 1)
    theta *= growth ** (dim / (dim - 2))
    frequencies = [frequency(theta, n, dim) for n in range(dim // 2)]
    return torch.tensor(frequencies, dtype=torch.float64)


def assert_frequencies(actual: Tensor, expected: Sequence[float] | Tensor) -> None:
    """Compares frequencies to the precision of their dtype."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    tolerance = 1e-13 if actual.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=0)


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def dynamic_layers(dim: int, trained: int, device: str) -> dict[str, Any]:
    """Returns the layers whose frequencies follow the length, as functions of x and positions."""
    options: dict[str, Any] = {
        "max_position_embeddings": trained,
        "dtype": torch.float64,
        "device": device,
    }
    layer = torch_rope.RotaryEmbedding(dim, DYNAMIC, **options)
    scripted = torch.jit.script(torch_rope.RotaryEmbedding(dim, DYNAMIC, **options))
    norm = torch_rope.QKNormRotaryEmbedding(dim, DYNAMIC, q_weight=False, k_weight=False, **options)
    return {
        "layer": lambda x, positions: layer(x, positions),
        "pair": lambda x, positions: layer(x, x, positions)[1],
        "scripted": lambda x, positions: scripted(x, x, positions)[1],
        "norm": lambda x, positions: norm(x, positions),
    }


def expected_of_layer(name: str, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Any:
    """Returns what a layer should make of x."""
    if name == "norm":
        return reference.norm_apply(x, None, positions, inv_freq, eps=1e-6)
    return reference.apply(x, positions, inv_freq)


def test_a_short_sequence_after_a_long_one_has_the_default_frequencies(device: str) -> None:
    """huggingface/transformers#46624: dynamic NTK kept the frequencies of the longest sequence."""
    trained, dim = 16, 32
    frequencies = [frequency(10000.0, n, dim) for n in range(dim // 2)]
    default = torch.tensor(frequencies, dtype=torch.float64)
    x = random_values((1, 40, 2, dim), device=device)
    for name, layer in dynamic_layers(dim, trained, device).items():
        for length in (8, 40, 8, 24, 16):
            positions = torch.arange(length, device=device)[:, None]
            inv_freq = default
            if length > trained:
                inv_freq = dynamic_frequencies(10000.0, dim, 4.0, length, trained)
            expected = expected_of_layer(name, x[:, :length], positions, inv_freq)
            assert_rotated(layer(x[:, :length], positions), expected)


def test_a_length_below_the_trained_one_has_the_default_frequencies() -> None:
    """vllm-project/vllm#52665: served below its trained length, dynamic NTK shrank the base."""
    for length in (None, 1, 512, 2047, 2048):
        for dtype in (FLOAT32, torch.float64):
            inv_freq, factor = torch_rope.frequencies(
                DYNAMIC, 64, max_position_embeddings=2048, seq_len=length, dtype=dtype
            )
            assert_frequencies(inv_freq, [frequency(10000.0, n, 64) for n in range(32)])
            assert factor == 1
    inv_freq, _ = torch_rope.frequencies(
        DYNAMIC, 64, max_position_embeddings=2048, seq_len=8192, dtype=torch.float64
    )
    assert_frequencies(inv_freq, dynamic_frequencies(10000.0, 64, 4.0, 8192, 2048))


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_length_is_that_of_the_sequence_and_not_of_the_heads(
    device: str, heads_first: bool
) -> None:
    """ml-explore/mlx-lm#1545: the length of (B, H, S, D) was read from the axis of heads.

    Positions were doubled there as well, and the factor was not used.
    """
    trained, dim = 16, 32
    for heads, length in ((40, 8), (2, 40)):
        shape = (1, heads, length, dim) if heads_first else (1, length, heads, dim)
        x = random_values(shape, device=device)
        positions = torch.arange(length, device=device)
        positions = positions if heads_first else positions[:, None]
        inv_freq = dynamic_frequencies(10000.0, dim, 4.0, length, trained)
        for name, layer in dynamic_layers(dim, trained, device).items():
            expected = expected_of_layer(name, x, positions, inv_freq)
            assert_rotated(layer(x, positions), expected)


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16])
def test_a_converted_layer_keeps_its_frequencies(device: str, dtype: torch.dtype) -> None:
    """NVIDIA-NeMo/Automodel#2549: model.to(bfloat16) rounded inv_freq, here for position 4,097."""
    x = random_values((3, 2, 64), dtype, device)
    positions = torch.tensor([[4097], [4096], [1]], device=device)
    parameters = {"rope_theta": 500000.0}
    for convert in (
        lambda module: module.to(dtype),
        lambda module: module.half() if dtype == torch.float16 else module.bfloat16(),
        lambda module: nn.Sequential(nn.Linear(2, 2), module).to(device, dtype)[1],
    ):
        for learned in (False, True):
            layer = convert(
                torch_rope.RotaryEmbedding(64, parameters, learned=learned, device=device)
            )
            assert layer.inv_freq.dtype == FLOAT32
            assert_frequencies(layer.inv_freq.detach(), [frequency(5e5, n, 64) for n in range(32)])
            expected = reference.apply(x, positions, layer.inv_freq.detach())
            assert_rotated(layer(x, positions).detach(), expected)
            assert_rotated(layer((x, x), positions)[1].detach(), expected)
        norm = convert(torch_rope.QKNormRotaryEmbedding(64, parameters, device=device))
        assert norm.q_norm.weight.dtype == dtype
        assert_rotated(
            norm(x, positions).detach(),
            reference.norm_apply(x, norm.q_norm.weight.detach(), positions, norm.inv_freq),
        )


def test_proportional_frequencies_pair_elements_of_the_whole_head(device: str) -> None:
    """apple/coreai-models#66: pairs were (i, i + 64) within 128 elements, not (i, i + 256) of 512.

    Gemma 4: a partial_rotary_factor of 0.25 leaves 64 of 256 frequencies that are not 0.
    """
    parameters = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    inv_freq, factor = torch_rope.frequencies(parameters, 512, dtype=torch.float64, device=device)
    assert_frequencies(inv_freq, [frequency(1e6, n, 512) for n in range(64)] + [0.0] * 192)
    assert factor == 1
    q, k = random_pair((3, 2, 512), (3, 1, 512), BFLOAT16, device)
    positions = torch.tensor([[3], [700], [2355]], device=device)
    check_every_form(q, k, positions, inv_freq)

    config = {"head_dim": 256, "global_head_dim": 512, "rope_parameters": parameters}
    layer = torch_rope.RotaryEmbedding.from_config(config, dtype=torch.float64, device=device)
    for rotated in (torch_rope.apply(q, positions, inv_freq), layer(q, positions)):
        turned = (rotated != q).any(dim=0).any(dim=0).nonzero().flatten().tolist()
        assert turned == [*range(64), *range(256, 320)]

    partial = {**parameters, "rope_type": "default"}
    layer = torch_rope.RotaryEmbedding.from_config(
        {"head_dim": 512, "rope_parameters": partial}, dtype=torch.float64, device=device
    )
    assert_frequencies(layer.inv_freq, [frequency(1e6, n, 128) for n in range(64)])
    q = q.float()
    turned = (layer(q, positions) != q).any(dim=0).any(dim=0).nonzero().flatten().tolist()
    assert turned == [*range(128)]


GPT_OSS = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def yarn_frequencies(dim: int, scheme: dict[str, Any], low: float, high: float) -> list[float]:
    """Returns YaRN's frequencies, whole below the pair ``low``, divided above ``high``."""
    found = []
    for n in range(dim // 2):
        kept = 1 - min(max((n - low) / (high - low), 0), 1)
        whole = frequency(scheme["rope_theta"], n, dim)
        found.append(whole * kept + whole / scheme["factor"] * (1 - kept))
    return found


def yarn_bound(dim: int, scheme: dict[str, Any], turns: float) -> float:
    """Returns the pair that makes a number of turns within the trained length."""
    trained = scheme["original_max_position_embeddings"]
    return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(scheme["rope_theta"]))


def test_the_bounds_of_yarn_are_not_rounded_if_truncate_is_false() -> None:
    """vllm-project/vllm#27722: gpt-oss has truncate False; its bounds were rounded to 8 and 18."""
    low, high = 8.092779115512402, 17.39802450158856
    assert yarn_bound(64, GPT_OSS, 32) == pytest.approx(low, abs=1e-12)
    assert yarn_bound(64, GPT_OSS, 1) == pytest.approx(high, abs=1e-12)
    for dtype in (FLOAT32, torch.float64):
        inv_freq, _ = torch_rope.frequencies(GPT_OSS, 64, dtype=dtype)
        assert_frequencies(inv_freq, yarn_frequencies(64, GPT_OSS, low, high))
        for scheme in ({**GPT_OSS, "truncate": True}, {**GPT_OSS, "truncate": None}):
            inv_freq, _ = torch_rope.frequencies(scheme, 64, dtype=dtype)
            assert_frequencies(inv_freq, yarn_frequencies(64, GPT_OSS, 8, 18))
    config = {"head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": GPT_OSS}
    layer = torch_rope.RotaryEmbedding.from_config(config)
    assert_frequencies(layer.inv_freq, yarn_frequencies(64, GPT_OSS, low, high))


def test_beta_fast_bounds_the_frequencies_that_stay(device: str) -> None:
    """pytorch/torchtitan#3787: beta_slow set the lower bound and beta_fast the upper one."""
    for fast, slow in ((32.0, 1.0), (16.0, 2.0)):
        scheme = {**GPT_OSS, "beta_fast": fast, "beta_slow": slow}
        low, high = yarn_bound(64, scheme, fast), yarn_bound(64, scheme, slow)
        assert low < high
        inv_freq, _ = torch_rope.frequencies(scheme, 64, dtype=torch.float64, device=device)
        assert_frequencies(inv_freq, yarn_frequencies(64, scheme, low, high))
        assert_frequencies(inv_freq[:1], [1.0])
        assert_frequencies(inv_freq[-1:], [frequency(150000.0, 31, 64) / 32])
    # The defaults are 32 and 1.
    scheme = {key: GPT_OSS[key] for key in GPT_OSS if not key.startswith("beta")}
    inv_freq, _ = torch_rope.frequencies(scheme, 64, dtype=torch.float64)
    bounds = (yarn_bound(64, scheme, turns) for turns in (32, 1))
    assert_frequencies(inv_freq, yarn_frequencies(64, scheme, *bounds))


@pytest.mark.parametrize(
    ("factor", "keys", "expected"),
    [
        (16.0, {"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        (40.0, {"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        (64.0, {"attention_factor": 1.0}, 1.0),
        (64.0, {"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.25),
        (64.0, {}, 1 + 0.1 * math.log(64)),
        (
            40.0,
            {"mscale": 1.0, "mscale_all_dim": 0.5},
            (1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)),
        ),
    ],
)
def test_the_attention_factor_of_yarn_is_that_of_its_keys(
    device: str, factor: float, keys: dict[str, float], expected: float
) -> None:
    """vllm-project/vllm#46280 and #48621: attention_factor, mscale and mscale_all_dim were ignored.

    The factor was 0.1 ln(factor) + 1 throughout.
    """
    scheme = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 4096,
        **keys,
    }
    inv_freq, found = torch_rope.frequencies(scheme, 32, device=device)
    assert found == pytest.approx(expected, rel=1e-12)
    q, k = random_pair((3, 2, 32), (3, 1, 32), device=device)
    positions = torch.tensor([[0], [3], [9]], device=device)
    check_every_form(q, k, positions, inv_freq, attention_factor=found)
    config = {"head_dim": 32, "max_position_embeddings": 4096 * 64, "rope_parameters": scheme}
    layer = torch_rope.RotaryEmbedding.from_config(config, device=device)
    # At position 0 nothing but the factor is left.
    at_0 = layer(q, positions)[0].double()
    torch.testing.assert_close(at_0, q[0].double() * expected, rtol=1e-6, atol=0)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {**LINEAR, "rope_theta": 5e5}, "partial_rotary_factor": 0.5},
        {"rope_scaling": LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
        {"rope_scaling": {**LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_theta": 5e5,
            "partial_rotary_factor": 0.5,
        },
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 5e5, "partial_rotary_factor": 0.5}
            }
        },
    ],
)
def test_every_spelling_of_a_configuration_is_read(device: str, config: dict[str, Any]) -> None:
    """vllm-project/speculators#613: rope_parameters was not read, nor partial_rotary_factor."""
    layer_type = "full_attention" if "full_attention" in str(config) else None
    config = {"hidden_size": 256, "num_attention_heads": 4, **config}
    expected = [frequency(5e5, n, 32) / 2 for n in range(16)]
    q, k = random_pair((3, 2, 64), (3, 1, 64), device=device)
    positions = torch.tensor([[3], [700], [2355]], device=device)
    layer = torch_rope.RotaryEmbedding.from_config(config, layer_type=layer_type, device=device)
    assert layer.rotary_dim == 32
    assert_frequencies(layer.inv_freq, expected)
    for x, rotated in zip((q, k), layer(q, k, positions), strict=True):
        assert_rotated(rotated, reference.apply(x, positions, layer.inv_freq))
        assert_same_bits(rotated[..., 32:], x[..., 32:])


# -----------------------------------------------------------------------------
# Gradients


def rotations_with_grad(
    q: Tensor, k: Tensor, positions: Tensor, **options: Any
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Rotates q and k in every form without a norm."""
    angle = reference.angles(positions.cpu(), q.shape[-1])
    tables = [table.float().to(q.device) for table in (angle.cos(), angle.sin())]
    for name, given in (("apply", [positions]), ("apply_cos_sin", tables)):
        call = getattr(torch_rope, name)
        in_place = getattr(torch_rope, f"{name}_")
        composed = getattr(torch.ops.rope, f"{name}_composed")
        yield f"{name} of a pair", call((q, k), *given, **options)
        yield f"{name} alone", (call(q, *given, **options), call(k, *given, **options))
        yield f"{name}_ of a pair", in_place((q * 1, k * 1), *given, **options)
        changed = (in_place(q * 1, *given, **options), in_place(k * 1, *given, **options))
        yield f"{name}_ alone", changed
        yield f"{name}_composed", (composed(q, *given, **options), composed(k, *given, **options))


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_form_loses_gradients(device: str, interleaved: bool) -> None:
    """huggingface/candle#3568: the fused operators had no backward, and gradients were missing."""
    q, k = (x.requires_grad_() for x in random_pair((5, 2, 32), device=device))
    positions = torch.arange(5, device=device)[:, None]
    seeds = random_pair((5, 2, 32), device=device)
    for name, rotated in rotations_with_grad(q, k, positions, interleaved=interleaved):
        assert all(y.requires_grad for y in rotated), name
        gradients = torch.autograd.grad(rotated, (q, k), seeds)
        for gradient, seed in zip(gradients, seeds, strict=True):
            # The transpose of a rotation is the rotation back.
            expected = reference.apply(seed, positions, interleaved=interleaved, conjugate=True)
            torch.testing.assert_close(
                gradient.double().cpu(), expected.values, rtol=0, atol=4e-6, msg=name
            )
    weight = (1 + random_values((32,), device=device) / 4).requires_grad_()
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, weight)]
    normalized = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * wide[1]
    back = reference.apply(seeds[0], positions, interleaved=interleaved, conjugate=True).values
    expected_norm = torch.autograd.grad(normalized, wide, back)
    for in_place in (False, True):
        x = q * 1
        if in_place:
            torch_rope.norm_apply_(x, weight, positions, interleaved=interleaved)
        else:
            x = torch_rope.norm_apply(x, weight, positions, interleaved=interleaved)
        gradients = torch.autograd.grad(x, (q, weight), seeds[0])
        for gradient, wanted in zip(gradients, expected_norm, strict=True):
            scale = wanted.abs().max().item()
            torch.testing.assert_close(gradient.double().cpu(), wanted, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_are_the_same_a_hundred_times(device: str, interleaved: bool, norm: bool) -> None:
    """NVIDIA/Megatron-LM#5963: in place, warps overwrote elements that others had not read yet."""
    q = random_values((67, 16, 128), BFLOAT16, device, seed=1).requires_grad_()
    weight = torch.ones(128, dtype=BFLOAT16, device=device, requires_grad=norm)
    seed = random_values(tuple(q.shape), BFLOAT16, device, seed=2)
    positions = torch.arange(67, device=device)[:, None]

    def gradients() -> list[Tensor]:
        x = q * 1
        if norm:
            torch_rope.norm_apply_(x, weight, positions, interleaved=interleaved)
        else:
            torch_rope.apply_(x, positions, interleaved=interleaved)
        return [x.detach(), *torch.autograd.grad(x, (q, weight) if norm else (q,), seed)]

    first = gradients()
    if not norm:
        back = reference.apply(seed, positions, interleaved=interleaved, conjugate=True)
        assert_rotated(first[1], back)
    for _ in range(99):
        for actual, expected in zip(gradients(), first, strict=True):
            assert_same_bits(actual, expected)


def alone(function: Callable[..., Any], q: Tensor, k: Tensor, rest: Sequence[Any]) -> Any:
    """Rotates q and k by one call each."""
    return function(q, *rest), function(k, *rest)


def of_a_pair(function: Callable[..., Any], q: Tensor, k: Tensor, rest: Sequence[Any]) -> Any:
    """Rotates q and k by one call."""
    return function((q, k), *rest)


def test_a_tensor_that_backward_needs_is_not_changed_silently(device: str) -> None:
    """unslothai/unsloth#5001: kernels wrote into q and k, which other functions had saved."""
    positions = torch.arange(5, device=device)[:, None]
    tables = [random_values((5, 1, 16), device=device, seed=seed) for seed in (1, 2)]
    for name, given in (("apply", [positions]), ("apply_cos_sin", tables)):
        for norm in ("", "norm_"):
            call = getattr(torch_rope, norm + name)
            in_place = getattr(torch_rope, f"{norm}{name}_")
            one = [None, *given] if norm else given
            two = [(None, None), *given] if norm else given
            leaves = [x.requires_grad_() for x in random_pair((5, 2, 32), device=device)]
            for form, rest in ((of_a_pair, two), (alone, one)):
                # The backward of exp needs its result.
                saved = [x.exp() for x in leaves]
                before = [x.detach().clone() for x in saved]
                rotated = form(call, *saved, rest)
                for x, original in zip(saved, before, strict=True):
                    assert_same_bits(x.detach(), original)
                torch.autograd.grad(sum(y.sum() for y in rotated), leaves, retain_graph=True)
                form(in_place, *saved, rest)
                for x, leaf in zip(saved, leaves, strict=True):
                    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                        torch.autograd.grad(x.sum(), leaf, retain_graph=True)
                with pytest.raises(RuntimeError, match="leaf"):
                    form(in_place, *leaves, rest)


# -----------------------------------------------------------------------------
# Compilers and norms


def test_two_arguments_that_share_a_symbolic_size_are_mutated(device: str) -> None:
    """vllm-project/vllm#40587: TorchInductor's pattern matcher failed for two mutated arguments."""

    def rotate(
        q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, ...]:
        q, k = q * 2, k * 2
        torch_rope.apply_((q, k), positions)
        a, b = q + 1, k + 1
        torch_rope.apply_cos_sin_((a, b), cos, sin)
        c, d = q - 1, k - 1
        torch_rope.norm_apply_((c, d), (None, None), positions)
        return a, b, c, d

    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(rotate, fullgraph=True, dynamic=True)
        for tokens in (5, 9):
            q, k = random_pair((tokens, 8, 32), (tokens, 2, 32), device=device)
            positions = torch.arange(tokens, device=device)[:, None]
            cos, sin = random_pair((tokens, 1, 16), device=device)
            results = compiled(q, k, positions, cos, sin)
            for actual, expected in zip(results, rotate(q, k, positions, cos, sin), strict=True):
                assert_same_bits(actual, expected)
            for x, a, c in ((q, results[0], results[2]), (k, results[1], results[3])):
                once = torch_rope.apply(2 * x, positions)
                assert_rotated(a, reference.apply_cos_sin(once + 1, cos, sin))
                assert_rotated(c, reference.norm_apply(once - 1, None, positions))


@pytest.mark.parametrize("weight", [0.00390625, 15.8125, 0.99609375])
def test_one_is_added_to_the_weight_in_float32(device: str, weight: float) -> None:
    """vllm-project/vllm#53203: 1 + weight was formed in bfloat16, where 1.0039 is 1."""
    values = torch.full((32,), weight, dtype=BFLOAT16, device=device)
    assert values[0].item() == weight
    assert (1 + values)[0].item() != 1 + weight
    for dtype in (FLOAT32, BFLOAT16):
        q, k = random_pair((3, 2, 32), (3, 1, 32), dtype, device)
        positions = torch.arange(3, device=device)[:, None]
        norms = (GEMMA_NORM, {**GEMMA_NORM, "norm_last": True})
        check_every_form(q, k, positions, norms=norms, weights=(values, values))
    layer = torch_rope.QKNormRotaryEmbedding(
        32, weight_offset=1.0, weight_dtype=BFLOAT16, device=device
    )
    with torch.no_grad():
        layer.q_norm.weight.fill_(weight)
    ones = torch.ones(1, 32, device=device)
    at_0 = layer(ones, torch.zeros(1, dtype=torch.int64, device=device))
    expected = torch.full((1, 32), (1 + weight) / math.sqrt(1 + 1e-6))
    torch.testing.assert_close(at_0.detach().cpu(), expected, rtol=2e-6, atol=0)
