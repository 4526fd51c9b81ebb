"""ApplyRoPE: what it computes, and dimensions with names."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch_rope
from reference import apply, assert_rotated, assert_same_bits, random_values
from torch import Tensor
from torch_rope import ApplyRoPE

NAMES = ("batch", "sequence", "heads", "head_dim")


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Returns x (B, S, H, D) and positions (B, S)."""
    return random_values((2, 5, 3, 32), device=device), torch.arange(10, device=device).view(2, 5)


def of_penzai(x: Tensor, positions: Tensor, max_wavelength: float) -> Tensor:
    """Rotates the last dimension as penzai's layer documents it: halves, and a plain timescale."""
    head_dim = x.shape[-1]
    fraction = 2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim
    angles = positions[..., None].double() / max_wavelength**fraction
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("max_wavelength", [10000, 500.0])
def test_it_computes_what_the_layer_of_penzai_does(max_wavelength: float) -> None:
    x, positions = inputs()
    actual = ApplyRoPE(-1, max_wavelength)(x, positions.unsqueeze(-1))
    expected = of_penzai(x, positions.unsqueeze(-1), max_wavelength)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_factor": 4.0},
        {"rotary_dim": 16},
        {"interleaved": True},
        {"scale_factor": 0.5, "rotary_dim": 8, "interleaved": True},
    ],
)
@pytest.mark.parametrize("embedding_axis", [1, -2])
def test_options_reach_the_operator(
    device: str, options: dict[str, Any], embedding_axis: int
) -> None:
    x, positions = random_values((4, 32, 9), device=device), torch.arange(9, device=device)
    actual = ApplyRoPE(embedding_axis, 500.0, **options)(x, positions)
    options = {"embedding_axis": embedding_axis, "max_wavelength": 500.0, **options}
    assert_same_bits(actual, torch_rope.apply(x, positions, **options))
    assert_rotated(actual, apply(x, positions, **options))


def test_positions_are_needed() -> None:
    x, _ = inputs()
    with pytest.raises(ValueError, match="expected positions to be given to a layer without"):
        ApplyRoPE(-1)(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embedding_axis": 1.0}, TypeError, "embedding_axis to be an integer, but got float"),
        ({"embedding_axis": None}, TypeError, "embedding_axis to be an integer, but got None"),
        ({"embedding_axis": (-1,)}, TypeError, "embedding_axis to be an integer, but got tuple"),
        ({"max_wavelength": "1e5"}, TypeError, "max_wavelength to be a number, but got str"),
        ({"scale_factor": None}, TypeError, "scale_factor to be a number, but got None"),
        ({"rotary_dim": 4.0}, TypeError, "rotary_dim to be an integer, but got float"),
        ({"interleaved": "neox"}, TypeError, "interleaved to be a bool, but got str"),
        ({"positions_tag": ["tokens"]}, TypeError, "positions_tag to be hashable, but got list"),
        ({"names": NAMES}, ValueError, "names to be omitted for an integer embedding_axis"),
        (
            {"positions_names": ("batch",)},
            ValueError,
            "positions_names to be omitted for an integer embedding_axis",
        ),
        (
            {"embedding_axis": "d", "names": "abcd"},
            TypeError,
            "names to be a sequence of strings, but got str",
        ),
        (
            {"embedding_axis": "d", "positions_names": (1, 2)},
            TypeError,
            "positions_names to be a sequence of strings, but got one with int",
        ),
        (
            {"embedding_axis": "d", "names": ("a", "d", "a")},
            ValueError,
            "names to be distinct, but got 'a' twice",
        ),
    ],
)
def test_options_of_no_use_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"torch_rope\.ApplyRoPE\(\): expected {message}"):
        ApplyRoPE(**{"embedding_axis": -1, **options})


def test_a_layer_of_a_tag_needs_the_tag() -> None:
    with pytest.raises(TypeError, match=r"from_config\(\): expected positions_tag to be a tag"):
        ApplyRoPE.from_config(None, -1)


@pytest.mark.parametrize("positions", [3, [0, 1, 2, 3, 4], range(5)])
@pytest.mark.parametrize("embedding_axis", [-1, "head_dim"])
def test_positions_that_are_no_tensor_are_refused(positions: Any, embedding_axis: Any) -> None:
    x, _ = inputs()
    names = {} if embedding_axis == -1 else {"names": NAMES, "positions_names": ("sequence",)}
    layer = ApplyRoPE(embedding_axis, **names)
    kind = type(positions).__name__
    with pytest.raises(TypeError, match=f"expected positions to be a tensor, but got {kind}"):
        layer(x, positions)


def test_it_can_be_traced_symbolically() -> None:
    x, positions = inputs()
    for layer, given in (
        (ApplyRoPE(-1, 500.0, rotary_dim=8), positions.unsqueeze(-1)),
        (ApplyRoPE("head_dim", names=NAMES, positions_names=("batch", "sequence")), positions),
    ):
        traced = torch.fx.symbolic_trace(layer)
        assert_same_bits(traced(x, given), layer(x, given))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_rotates_alike(copy_of: Any) -> None:
    x, positions = inputs()
    layer = ApplyRoPE(
        "head_dim", 500, rotary_dim=8, names=NAMES, positions_names=("batch", "sequence")
    )
    assert_same_bits(copy_of(layer)(x, positions), layer(x, positions))


def test_the_representation_shows_the_options() -> None:
    layer = ApplyRoPE.from_config("tokens", -1, 500, rotary_dim=8, interleaved=True)
    assert repr(layer) == (
        "ApplyRoPE(embedding_axis=-1, max_wavelength=500.0, rotary_dim=8, positions_tag='tokens', "
        "interleaved=True)"
    )
    assert repr(ApplyRoPE(-1)) != repr(ApplyRoPE(-1, scale_factor=2.0))


# ---- Names ----

ORDERS = [
    (("batch", "sequence"), (0, 1, 2, 3)),
    (("sequence", "batch"), (3, 1, 0, 2)),
    (("sequence",), (1, 2, 3, 0)),
    (("heads", "batch"), (2, 3, 0, 1)),
    ((), (0, 1, 2, 3)),
]


def case(
    positions_names: tuple[str, ...], order: tuple[int, ...], device: str
) -> tuple[Tensor, tuple[str, ...], Tensor, Tensor]:
    """Returns x and its names in an order, positions, and what x in that order becomes."""
    x, _ = inputs(device)
    sizes = [x.shape[NAMES.index(name)] for name in positions_names]
    positions = torch.arange(torch.Size(sizes).numel(), device=device).view(sizes)
    # The same positions as (B, S, H), for the reference.
    letters = "".join(name[0] for name in positions_names)
    aligned = torch.einsum(f"{letters},bsh->bsh", positions, torch.ones_like(x[..., 0]).long())
    expected = torch_rope.apply(x, aligned)
    names = tuple(NAMES[dim] for dim in order)
    return x.permute(order), names, positions, expected.permute(order)


@pytest.mark.parametrize(("positions_names", "order"), ORDERS)
def test_dimensions_are_aligned_by_the_names_given_to_the_layer(
    device: str, positions_names: tuple[str, ...], order: tuple[int, ...]
) -> None:
    x, names, positions, expected = case(positions_names, order, device)
    layer = ApplyRoPE("head_dim", names=names, positions_names=positions_names)
    assert_same_bits(layer(x, positions), expected)


def test_a_layer_with_names_compiles(device: str) -> None:
    x, names, positions, expected = case(("sequence", "batch"), (3, 1, 0, 2), device)
    layer = ApplyRoPE("head_dim", names=names, positions_names=("sequence", "batch"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, positions), expected)


BAD_NAMES = [
    (
        "feature",
        NAMES,
        ("batch", "sequence"),
        "expected embedding_axis to be among the names of x, .* but got 'feature'",
    ),
    (
        "sequence",
        NAMES,
        ("batch", "sequence"),
        "expected embedding_axis not to be among the names of positions, .* but got 'sequence'",
    ),
    (
        "head_dim",
        NAMES,
        ("batch", "time"),
        "expected every name of positions to be among those of x, .* but got 'time'",
    ),
]


@pytest.mark.parametrize(("embedding_axis", "names", "positions_names", "message"), BAD_NAMES)
def test_names_that_do_not_fit_are_refused(
    embedding_axis: str, names: tuple[str, ...], positions_names: tuple[str, ...], message: str
) -> None:
    layer = ApplyRoPE(embedding_axis, names=names, positions_names=positions_names)
    with pytest.raises(ValueError, match=message):
        layer(*inputs())


def test_names_of_another_number_than_dimensions_are_refused() -> None:
    x, positions = inputs()
    layer = ApplyRoPE("head_dim", names=NAMES[1:], positions_names=("batch", "sequence"))
    with pytest.raises(ValueError, match="expected x to have a dimension for each of"):
        layer(x, positions)


def test_names_are_required_for_a_named_axis() -> None:
    with pytest.raises(
        ValueError, match="expected names to be given for a named embedding_axis, but got None"
    ):
        ApplyRoPE("head_dim")(*inputs())
