"""RotaryEmbedding: what it holds and rotates by, configurations, lengths, compiling, saving."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_rope
from pairs_of_transformers import are_neighbours, families, model_types
from reference import apply, assert_rotated, assert_same_bits, random_inv_freq, random_values
from torch import Tensor, nn
from torch.fx import GraphModule
from torch_rope import RotaryEmbedding
from torch_rope._config import INTERLEAVED_MODEL_TYPES

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


needs_transformers = pytest.mark.usefixtures("transformers")


@pytest.fixture
def transformers() -> Any:
    """The package, for tests that compare with its models; without it they are skipped."""
    return pytest.importorskip("transformers")


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


def test_q_and_k_without_positions_are_told_what_is_missing(device: str) -> None:
    q, k, _ = inputs(device)
    rotary = RotaryEmbedding(32, device=device)
    with pytest.raises(TypeError, match=re.escape("a tensor (layer(q, k, positions)), but got No")):
        rotary(q, k)
    # Positions along two axes may have as many dimensions.
    x, positions = random_values((2, 9, 32, 32), device=device), torch.rand(2, 2, 9, 32).to(device)
    axial = RotaryEmbedding(32, inv_freq=torch.rand(2, 16), device=device)
    assert_same_bits(axial(x, positions), torch_rope.apply(x, positions, axial.inv_freq))


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


def test_a_pair_may_come_in_one_argument(device: str) -> None:
    q, k, positions = inputs(device)
    for scheme in (LINEAR, DYNAMIC):
        rotary = RotaryEmbedding(32, scheme, max_position_embeddings=4, device=device)
        expected = rotary(q, k, positions)
        assert_same_pair(rotary((q, k), positions), expected)
        assert_same_pair(rotary([q, k], positions=positions), expected)
        assert_same_pair(rotary((q, k), positions, seq_len=9), expected)
        assert_same_bits(rotary(q, None, positions), expected[0])


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize("positions", [3, [0, 1, 2], range(9), None])
def test_positions_that_are_no_tensor_are_refused(scheme: dict[str, Any], positions: Any) -> None:
    q, k, _ = inputs("cpu")
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH)
    message = f"expected positions to be a tensor, but got {'None' if positions is None else ''}"
    calls = [lambda: rotary((q, k), positions), lambda: rotary(q, positions)]
    if positions is not None:  # rotary(q, k, None) rotates q by the positions k.
        calls.append(lambda: rotary(q, k, positions))
    for call in calls:
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_tuple_of_another_length_is_refused(number: int) -> None:
    q, _, positions = inputs("cpu")
    message = rf"expected q to be a tensor or a \(q, k\) tuple, but got a tuple of {number}"
    with pytest.raises(TypeError, match=message):
        RotaryEmbedding(32)((q,) * number, positions)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (64, 500000.0),
            {},
            TypeError,
            "rope_parameters to be a dictionary, but got float (for the base, use max_wavelength=)",
        ),
        ((64, "linear"), {}, TypeError, "rope_parameters to be a dictionary, but got str"),
        ((512 / 8,), {}, TypeError, "rotary_dim to be an integer, but got float"),
        (("64",), {}, TypeError, "rotary_dim to be an integer, but got str"),
        ((True,), {}, TypeError, "rotary_dim to be an integer, but got bool"),
        ((31,), {}, ValueError, "rotary_dim to be positive and a multiple of 2, but got 31"),
        ((0,), {}, ValueError, "rotary_dim to be positive and a multiple of 2, but got 0"),
        (
            (31,),
            {"inv_freq": torch.ones(15)},
            ValueError,
            "rotary_dim to be positive and a multiple of 2, but got 31",
        ),
        ((32,), {"inv_freq": [1.0] * 16}, TypeError, "inv_freq to be a tensor, but got list"),
        (
            (32,),
            {"inv_freq": torch.ones(8)},
            ValueError,
            "inv_freq to have rotary_dim / 2 = 16 columns, but got 8",
        ),
        (
            (32,),
            {"inv_freq": torch.ones(1, 3, 16)},
            ValueError,
            "inv_freq to have shape (N) or (A, N), but got (1, 3, 16)",
        ),
        (
            (32,),
            {"inv_freq": torch.tensor(1.0)},
            ValueError,
            "inv_freq to have shape (N) or (A, N), but got ()",
        ),
        (
            (32,),
            {"inv_freq": torch.ones(16).bfloat16()},
            TypeError,
            "inv_freq to be float32 or float64, but got bfloat16",
        ),
        (
            (32,),
            {"inv_freq": torch.ones(16).int(), "learned": True},
            TypeError,
            "inv_freq to be float32 or float64, but got int32",
        ),
        (
            (32,),
            {"inv_freq": torch.ones(16), "dtype": torch.float64},
            ValueError,
            "dtype to be left at its default together with inv_freq, but got torch.float64",
        ),
        ((32,), {"attention_factor": math.nan}, ValueError, "attention_factor to be finite"),
        ((32,), {"attention_factor": "1"}, TypeError, "attention_factor to be a number"),
        ((32,), {"max_wavelength": -1.0}, ValueError, "max_wavelength to be positive and finite"),
        ((32,), {"max_wavelength": "1e5"}, TypeError, "max_wavelength to be a number, but got"),
        ((32,), {"rotary_offset": -2}, ValueError, "rotary_offset to be at least 0, but got -2"),
        ((32,), {"rotary_offset": 0.5}, TypeError, "rotary_offset to be an integer"),
        ((32,), {"embedding_axis": "heads"}, TypeError, "embedding_axis to be an integer"),
        ((32,), {"embedding_axis": None}, TypeError, "embedding_axis to be an integer"),
        ((32,), {"interleaved": "neox"}, TypeError, "interleaved to be a bool, but got str"),
        ((32,), {"learned": 1}, TypeError, "learned to be a bool, but got int"),
        ((32,), {"dtype": "float32"}, TypeError, "dtype to be float32 or float64, but got str"),
        ((32,), {"device": 0.5}, TypeError, "device to be a device, but got float"),
    ],
)
def test_options_of_no_use_are_refused_when_the_layer_is_made(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pattern = re.escape(f"torch_rope.RotaryEmbedding(): expected {message}")
    with pytest.raises(error, match=pattern):
        RotaryEmbedding(*arguments, **options)


def test_frequencies_of_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="expected dtype to be float32 or float64, but got float16"):
        RotaryEmbedding(32, dtype=torch.float16)


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


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
def test_frequencies_may_be_float64(device: str, tmp_path: Path, scheme: dict[str, Any]) -> None:
    rotary = RotaryEmbedding(
        32, scheme, max_position_embeddings=LENGTH, dtype=torch.float64, device=device
    )
    rotary.to(torch.bfloat16)
    q, k, _ = inputs(device)
    (module, loaded) = scripted_copies(rotary, tmp_path)
    for first in (0, 3 * LENGTH):
        positions = torch.arange(first, first + 9, device=device).unsqueeze(-1)
        exact = torch_rope.frequencies(
            scheme,
            32,
            max_position_embeddings=LENGTH,
            seq_len=first + 9,
            dtype=torch.float64,
            device=device,
        )
        expected = torch_rope.apply(
            (q, k), positions, exact.inv_freq, attention_factor=rotary.attention_factor
        )
        for each in (rotary, copy.deepcopy(rotary), module, loaded):
            assert_same_pair(each(q, k, positions), expected)
    rotary.inv_freq.zero_()
    rotary.reset_parameters()
    assert_same_bits(
        rotary.inv_freq,
        torch_rope.frequencies(
            scheme, 32, max_position_embeddings=LENGTH, dtype=torch.float64, device=device
        ).inv_freq,
    )


def test_float64_frequencies_are_as_good_as_none(device: str) -> None:
    x = torch.ones(1, 128, device=device)
    position = torch.tensor([4095], device=device)
    exact = torch_rope.apply(x, position, max_wavelength=5e5)
    errors = [
        (rotary(x, position) - exact).abs().max().item()
        for rotary in (
            RotaryEmbedding(128, max_wavelength=5e5, dtype=dtype, device=device)
            for dtype in (torch.float32, torch.float64)
        )
    ]
    assert 5e-5 < errors[0] < 4e-4
    assert errors[1] < 1e-6


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


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_module_that_leaves_the_meta_device_has_its_frequencies(
    scheme: dict[str, Any], learned: bool, nested: bool
) -> None:
    options = {"max_position_embeddings": LENGTH, "learned": learned}
    if learned and scheme is not LINEAR:
        pytest.skip("frequencies that depend on the length are not learned")
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, scheme, **options)
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(rotary)) if nested else rotary
    model.to_empty(device="cpu")
    whole = RotaryEmbedding(32, scheme, **options)
    assert isinstance(rotary.inv_freq, nn.Parameter) == learned
    for name in ("inv_freq", "long_inv_freq"):
        if getattr(whole, name) is not None:
            assert_same_bits(getattr(rotary, name).detach(), getattr(whole, name).detach())
    saved = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    model.load_state_dict(saved)
    assert_same_bits(
        rotary.inv_freq.detach(), torch.full((16,), 2.0) if learned else whole.inv_freq
    )


def test_frequencies_of_several_axes_of_a_configuration_leave_the_meta_device() -> None:
    scheme = {"rope_theta": 1e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    config = {"head_dim": 32, "rope_parameters": scheme}
    with torch.device("meta"):
        rotary = RotaryEmbedding.from_config(config, dtype=torch.float64)
    assert rotary.inv_freq.is_meta
    rotary.to_empty(device="cpu")
    expected = torch_rope.mrope_frequencies(
        torch_rope.frequencies(scheme, 32, dtype=torch.float64).inv_freq,
        (8, 4, 4),
        interleaved=True,
    )
    assert_same_bits(rotary.inv_freq, expected)


def test_a_module_made_without_initialisation_has_its_frequencies() -> None:
    rotary = nn.utils.skip_init(RotaryEmbedding, 32)
    assert_same_bits(rotary.inv_freq, frequencies_at({"rope_theta": 1e4}, None, "cpu"))


@pytest.mark.parametrize("options", [{}, {"inv_freq": torch.rand(3, 16)}])
def test_emptying_a_model_leaves_its_frequencies(options: dict[str, Any]) -> None:
    # On a device of their own in a model that is on meta: nothing else would bring them back.
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), RotaryEmbedding(32, device="cpu", **options))
    kept = model[1].inv_freq.clone()
    model.to_empty(device="cpu")
    assert_same_bits(model[1].inv_freq, kept)


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
def test_a_state_dict_that_is_assigned_makes_frequencies_real(scheme: dict[str, Any]) -> None:
    def build() -> nn.Module:
        rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH)
        return nn.Sequential(nn.Linear(2, 2), rotary)

    whole = build()
    with torch.device("meta"):
        model = build()
    model.load_state_dict(whole.state_dict(), assign=True)
    arguments = inputs("cpu", first=LENGTH)
    assert_same_pair(model[1](*arguments), whole[1](*arguments))


@pytest.mark.parametrize("learned", [False, True])
def test_sharded_frequencies_leave_the_meta_device(learned: bool) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), RotaryEmbedding(32, LINEAR, learned=learned))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        model.to_empty(device="cpu")
        held = model[1].inv_freq
        assert hasattr(held, "full_tensor") == learned
        full = held.full_tensor().detach() if learned else held
        assert_same_bits(full, frequencies_at(LINEAR, None, "cpu"))
    finally:
        torch.distributed.destroy_process_group()


def emptied(*, learned: bool = False) -> RotaryEmbedding:
    """Returns a layer with frequencies of its own that came from meta."""
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, inv_freq=torch.ones(16), learned=learned)
    return rotary.to_empty(device="cpu")


OWN = torch.linspace(1, 0.1, 16)
UNSET = "expected inv_freq to be set after it leaves the meta device"


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda module: module,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.to_empty(device="cpu"),
        lambda module: nn.Sequential(module).double()[0],
    ],
    ids=["as it is", "deepcopy", "pickle", "to", "to_empty", "double"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_own_frequencies_from_the_meta_device_must_be_set(
    learned: bool, change: Any, compiled: bool
) -> None:
    q, k, positions = inputs("cpu")
    rotary = change(emptied(learned=learned))
    if not compiled:
        for call in (
            lambda: rotary(q, k, positions),
            lambda: rotary(q, positions),
            lambda: rotary.rotate(q, positions),
        ):
            with pytest.raises(ValueError, match=UNSET):
                call()
    with torch.no_grad():
        rotary.inv_freq.copy_(OWN)
    torch.compiler.reset()
    run = torch.compile(rotary, fullgraph=True, backend="eager") if compiled else rotary
    with torch.no_grad():
        assert_same_pair(run(q, k, positions), torch_rope.apply((q, k), positions, OWN))
    with torch.no_grad():
        assert_same_bits(copy.deepcopy(rotary)(q, positions), torch_rope.apply(q, positions, OWN))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    "set_frequencies",
    [
        lambda module: module.load_state_dict({"inv_freq": OWN}),
        lambda module: module.load_state_dict({"inv_freq": OWN}, assign=True),
        lambda module: setattr(
            module, "inv_freq", nn.Parameter(OWN) if module.learned else OWN.clone()
        ),
        lambda module: nn.init._no_grad_uniform_(module.inv_freq, 0, 1).detach().copy_(OWN),
    ],
    ids=["load", "assign", "attribute", "init"],
)
def test_own_frequencies_are_set_in_any_way(learned: bool, set_frequencies: Any) -> None:
    q, _, positions = inputs("cpu")
    rotary = emptied(learned=learned)
    set_frequencies(rotary)
    scripted = torch.jit.script(rotary)
    with torch.no_grad():
        assert_same_bits(rotary(q, positions), torch_rope.apply(q, positions, OWN))
        assert_same_bits(scripted.rotate(q, positions), torch_rope.apply(q, positions, OWN))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_unset_frequencies_are_refused_by_compiled_layers_until_they_are_set(backend: str) -> None:
    q, k, positions = inputs("cpu")
    rotary = emptied()
    compiled = torch.compile(rotary, backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=UNSET):
            compiled(q, k, positions)
    with torch.no_grad():
        rotary.inv_freq.copy_(OWN)
    for _ in range(2):
        for actual, expected in zip(
            compiled(q, k, positions), torch_rope.apply((q, k), positions, OWN), strict=True
        ):
            assert_same_bits(actual, expected)


def test_unset_frequencies_are_refused_by_scripted_layers() -> None:
    q, k, positions = inputs("cpu")
    with pytest.raises(Exception, match="_refuse_unset"):
        torch.jit.script(emptied())(q, k, positions)


def test_unset_frequencies_are_no_garbage() -> None:
    assert emptied().inv_freq.isnan().all()


def test_own_frequencies_on_the_meta_device_load_by_assignment() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(32, inv_freq=torch.ones(16))
    rotary.load_state_dict({"inv_freq": OWN.double()}, assign=True)
    q, _, positions = inputs("cpu")
    assert_same_bits(rotary(q, positions), torch_rope.apply(q, positions, OWN))


def test_own_frequencies_of_another_shape_are_not_loaded() -> None:
    with pytest.raises(ValueError, match=r"inv_freq to have shape \(16,\) in the state dict"):
        emptied().load_state_dict({"inv_freq": OWN[:8]})


@pytest.mark.parametrize("options", [{}, {"inv_freq": OWN}, {"rope_parameters": LONGROPE}])
def test_a_checkpoint_with_frequencies_loads_strictly(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(RotaryEmbedding(32, **options)))
    kept = model[1][0].inv_freq.clone()
    saved = {**model.state_dict(), "1.0.inv_freq": torch.ones(16).bfloat16()}
    given = dict(saved)
    model.load_state_dict(saved)
    assert saved.keys() == given.keys()
    assert_same_bits(model[1][0].inv_freq, kept)
    with pytest.raises(RuntimeError, match=re.escape("1.0.other")):
        model.load_state_dict({**saved, "1.0.other": torch.ones(16)})


def test_a_checkpoint_brings_learned_frequencies() -> None:
    rotary = RotaryEmbedding(32, learned=True)
    rotary.load_state_dict({"inv_freq": OWN})
    assert_same_bits(rotary.inv_freq.detach(), OWN)
    with pytest.raises(RuntimeError, match="inv_freq"):
        rotary.load_state_dict({})


def test_given_frequencies_cannot_be_formed_anew() -> None:
    with pytest.raises(RuntimeError, match="expected the frequencies to come from a scheme"):
        RotaryEmbedding(32, inv_freq=torch.ones(16)).reset_parameters()


@pytest.mark.parametrize(
    ("rotary", "shown"),
    [
        (lambda: RotaryEmbedding(128), "128, rope_type='default', rope_theta=10000.0"),
        (
            lambda: RotaryEmbedding(128, max_wavelength=5e5),
            "128, rope_type='default', rope_theta=500000.0",
        ),
        (
            lambda: RotaryEmbedding(32, LINEAR, attention_factor=1.5, interleaved=True),
            "32, rope_type='linear', rope_theta=10000.0, factor=2.0, attention_factor=1.5, "
            "interleaved=True",
        ),
        (
            lambda: RotaryEmbedding(32, {"type": "linear", "factor": 3}, learned=True),
            "32, rope_type='linear', rope_theta=10000.0, factor=3, learned=True",
        ),
        (
            lambda: RotaryEmbedding(32, DYNAMIC, max_position_embeddings=LENGTH),
            "32, rope_type='dynamic', rope_theta=10000.0, factor=2.0, max_position_embeddings=64",
        ),
        (
            lambda: RotaryEmbedding(32, inv_freq=torch.ones(3, 16), embedding_axis=1),
            "32, inv_freq of shape (3, 16), embedding_axis=1",
        ),
        (
            lambda: RotaryEmbedding(32, rotary_offset=8, dtype=torch.float64),
            "32, rope_type='default', rope_theta=10000.0, rotary_offset=8, dtype=torch.float64",
        ),
        (
            lambda: RotaryEmbedding.from_config(
                {"head_dim": 8, "rope_parameters": {"mrope_section": [2, 1, 1]}},
                mrope_interleaved=True,
            ),
            "8, rope_type='default', rope_theta=10000.0, mrope_section=(2, 1, 1), "
            "mrope_interleaved=True",
        ),
    ],
)
def test_the_representation_shows_what_it_is(rotary: Any, shown: str) -> None:
    assert repr(rotary()) == f"RotaryEmbedding({shown})"


def test_long_lists_are_shown_in_part() -> None:
    shown = repr(RotaryEmbedding(32, LONGROPE))
    assert "short_factor=[1.0, 1.0625, 1.125, 1.1875, 1.25, 1.3125, ...]" in shown
    other = {**LONGROPE, "long_factor": [3.0] * 16}
    assert repr(RotaryEmbedding(32, other)) != shown


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


TYPED = """
import torch_rope
from torch import Tensor

def check(rotary: torch_rope.RotaryEmbedding, q: Tensor, k: Tensor, p: Tensor) -> None:
    one: Tensor = rotary(q, p)
    one = rotary(q, positions=p)
    one = rotary(q, p, seq_len=3)
    one = rotary(q=q, positions=p)
    one = rotary(q, None, p)
    one = rotary.rotate(q, p, 3)
    one = torch_rope.ApplyRoPE(-1)(q, p)
    pair: tuple[Tensor, Tensor] = rotary(q, k, p)
    pair = rotary(q, k, p, 3)
    pair = rotary(q, k, positions=p, seq_len=3)
    pair = rotary(q=q, k=k, positions=p)
    pair = rotary((q, k), p)
    pair = rotary([q, k], positions=p)
    pair = rotary((q, k), p, seq_len=3)
    print(one, pair)
"""


def test_every_way_to_call_it_is_typed(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "calls.py"
    program.write_text(TYPED)
    wrong = TYPED.replace("pair: tuple[Tensor, Tensor] = rotary(q, k, p)", "pair = rotary(q, 3)")
    (tmp_path / "wrong.py").write_text(wrong)
    options = ["--strict", "--cache-dir", str(tmp_path / "cache")]
    report, errors, status = api.run([*options, str(program)])
    assert status == 0, report + errors
    report, _, status = api.run([*options, str(tmp_path / "wrong.py")])
    assert status == 1
    assert "No overload variant" in report


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


@pytest.mark.parametrize("scheme", [LINEAR, DYNAMIC, LONGROPE])
@pytest.mark.parametrize("learned", [False, True])
def test_it_can_be_traced_symbolically(scheme: dict[str, Any], learned: bool) -> None:
    if learned and scheme is not LINEAR:
        pytest.skip("frequencies that depend on the length are not learned")
    rotary = RotaryEmbedding(32, scheme, max_position_embeddings=LENGTH, learned=learned)
    of_rotary, of_model = (torch.fx.symbolic_trace(each) for each in (rotary, Attention(rotary)))
    for first in (0, 3 * LENGTH):
        arguments = inputs("cpu", first=first)
        assert_same_pair(of_rotary(*arguments), rotary(*arguments))
        assert_same_bits(of_model(*arguments), Attention(rotary)(*arguments))
        assert_same_pair(of_rotary(*arguments, 9), rotary(*arguments, 9))
    assert_same_pair(of_rotary(*inputs("cpu", tokens=0)), rotary(*inputs("cpu", tokens=0)))


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


@needs_transformers
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
            "all layers use the same.*, but got 'full'",
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


# Parts of models that have a function of their own, and halves.
OF_IMAGES_AND_SOUND = (
    "dots3_note_audio_encoder",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe_vision",
    "glm4v_vision",
    "glm_ocr_vision",
    "llama4_vision_model",
)


@needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_pairs_are_neighbours_where_those_of_the_model_are() -> None:
    found = families()
    assert len(found) > 150
    tried = set()
    for family, neighbours in found.items():
        for model_type, config in model_types(family):
            if model_type in OF_IMAGES_AND_SOUND:
                continue
            tried.add(model_type)
            assert neighbours == (model_type in INTERLEAVED_MODEL_TYPES), model_type
            assert getattr(config, "rope_interleave", neighbours) == neighbours
    # RoFormer has a method of its own, see below; Sarvam has the code of DeepSeek-V3.
    assert tried >= INTERLEAVED_MODEL_TYPES - {"roformer", "sarvam_mla"}


@needs_transformers
def test_roformer_pairs_neighbours() -> None:
    from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention

    angles = torch.linspace(0.3, 1.2, 12).view(1, 1, 3, 4)
    tables = torch.cat((angles.sin(), angles.cos()), dim=-1)
    rotate = RoFormerSelfAttention.apply_rotary_position_embeddings
    assert are_neighbours(lambda x: rotate(tables, x, x)[0])
    assert "roformer" in INTERLEAVED_MODEL_TYPES


@pytest.mark.parametrize(
    ("config", "interleaved"),
    [
        ({}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "gptj"}, True),
        ({"model_type": "deepseek_v3"}, True),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, False),
        ({"model_type": "made_up", "rope_interleave": True}, True),
        ({"model_type": "glm4v_moe"}, False),
        ({"model_type": "cohere2_vision", "text_config": {"model_type": "cohere2"}}, True),
        ({"model_type": "aya_vision", "text_config": {"model_type": "llama"}}, False),
        ({"model_type": "llama4", "text_config": {"head_dim": 32}}, True),
    ],
)
def test_a_configuration_tells_how_elements_pair_up(
    config: dict[str, Any], interleaved: bool
) -> None:
    config = {**config, "head_dim": 32, "rope_theta": 1e4}
    config.update(
        {"text_config": {"head_dim": 32, **config["text_config"]}}
        if "text_config" in config
        else {}
    )
    assert RotaryEmbedding.from_config(config).interleaved == interleaved
    assert RotaryEmbedding.from_config(config, interleaved=True).interleaved
    assert not RotaryEmbedding.from_config(config, interleaved=False).interleaved


@needs_transformers
@pytest.mark.parametrize(
    ("name", "config", "model", "function"),
    [
        ("deepseek_v3", "DeepseekV3Config", "DeepseekV3RotaryEmbedding", "_interleave"),
        ("cohere", "CohereConfig", "CohereRotaryEmbedding", ""),
        ("glm4", "Glm4Config", "Glm4RotaryEmbedding", ""),
        ("ernie4_5", "Ernie4_5Config", "Ernie4_5RotaryEmbedding", ""),
    ],
)
def test_scores_are_those_of_models_that_pair_neighbours(
    name: str, config: str, model: str, function: str
) -> None:
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    of_model = getattr(module, config)()
    rotary = RotaryEmbedding.from_config(of_model)
    assert rotary.interleaved
    q, k = (random_values((1, 1, 9, rotary.rotary_dim), seed=seed) for seed in (0, 1))
    positions = torch.arange(9)
    tables = getattr(module, model)(of_model)(q, positions[None])
    of_original = getattr(module, f"apply_rotary_pos_emb{function}")(q, k, *tables)
    expected, actual = (
        torch.einsum("bhqd,bhkd->bhqk", *pair) for pair in (of_original, rotary(q, k, positions))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_every_configuration_of_text_in_transformers_is_read_or_refused_with_a_reason() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reasons = (
        "expected rope_type to be for positions along one axis",  # towers of images
        "expected config to have head_dim",  # sizes with names of their own, in other parts
        "expected mrope_interleaved to be given",
        "expected rotary_dim to be positive and a multiple of 2",  # defaults that no model has
        "is not homogeneous across layers",  # transformers' own, of NeoMME
        "expected config to rotate by positive angles",  # NanoChat
    )
    read, refused = 0, {}
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:
            continue
        parameters = getattr(config, "rope_parameters", None)
        if not isinstance(parameters, dict):
            continue
        types = [k for k, v in parameters.items() if isinstance(v, dict)] or [None]
        for layer_type in types:
            for form in (config, config.to_dict()):
                try:
                    RotaryEmbedding.from_config(form, layer_type=layer_type)
                    read += 1
                except ValueError as error:
                    refused[model_type] = str(error)
    assert read > 400
    assert not {
        model_type: error
        for model_type, error in refused.items()
        if not any(reason in error for reason in reasons)
    }


HUNYUAN = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1}


@needs_transformers
def test_a_base_that_hunyuan_stretches_is_read() -> None:
    from transformers.models.hunyuan_v1_dense import configuration_hunyuan_v1_dense as of_configs
    from transformers.models.hunyuan_v1_dense import modeling_hunyuan_v1_dense as of_models

    scheme = {**HUNYUAN, "rope_type": "dynamic", "rope_theta": 1e4, "mscale": 1.0}
    config = of_configs.HunYuanDenseV1Config(head_dim=32, rope_parameters=dict(scheme))
    expected = of_models.HunYuanDenseV1RotaryEmbedding(config).inv_freq
    older = {"head_dim": 32, "rope_theta": 1e4, "rope_scaling": HUNYUAN}
    for form in (config, config.to_dict(), older):
        assert_same_bits(RotaryEmbedding.from_config(form).inv_freq, expected)


def test_the_attention_factors_of_phi_moe_are_read() -> None:
    scheme = {key: value for key, value in LONGROPE.items() if key not in ("rope_theta", "factor")}
    config = {
        "head_dim": 32,
        "max_position_embeddings": 4 * LENGTH,
        "rope_scaling": {**scheme, "short_mscale": 1.25, "long_mscale": 1.25},
    }
    assert RotaryEmbedding.from_config(config).attention_factor == 1.25
    config["rope_scaling"]["long_mscale"] = 1.5  # type: ignore[index]
    with pytest.raises(ValueError, match="but got the key 'short_mscale'"):
        RotaryEmbedding.from_config(config)


@pytest.mark.parametrize(
    "scheme",
    [
        {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 8192},
        {"finetuned": True, "attn_factor": 1.0},
        {"xdrope_section": None, "alpha": None, "interleaved": None},
    ],
)
def test_keys_that_change_no_angle_are_passed_over(scheme: dict[str, Any]) -> None:
    config = {"head_dim": 32, "rope_parameters": {**LINEAR, **scheme}}
    assert_same_bits(
        RotaryEmbedding.from_config(config).inv_freq, frequencies_at(LINEAR, None, "cpu")
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {**LINEAR, "attn_factor": 2.0}}, "but got the key 'attn_factor'"),
        ({"rope_parameters": {**LINEAR, "alpha": 2.0}}, "but got the key 'alpha'"),
        ({"rope_scaling": {**HUNYUAN, "xdrope_section": [4, 4, 4, 4]}}, "'xdrope_section'"),
        (
            {
                "model_type": "hunyuan_vl_text",
                "rope_parameters": {**HUNYUAN, "mrope_section": [4, 4, 4, 4]},
            },
            "config to have sections that mrope_frequencies supports, but got those of hunyuan_vl",
        ),
        (
            {"model_type": "ernie4_5_vl_moe", "rope_scaling": {"mrope_section": [6, 6, 4]}},
            "config to have sections that mrope_frequencies supports, but got those of ernie4_5",
        ),
        ({"rope_ratio": 50}, "expected rope_ratio to be absent, .*, but got 50"),
        ({"rope_parameters": {"rope_type": "axial"}}, "for images, use axial_frequencies"),
        (
            {"model_type": "nanochat"},
            "config to rotate by positive angles .*, but got that of nano",
        ),
    ],
)
def test_keys_that_may_change_angles_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding.from_config({"head_dim": 32, "rope_theta": 1e4, **config})


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (None, "None"),
        ("config.json", "str (read the file with json.load)"),
        (Path("config.json"), "PosixPath (read the file with json.load)"),
        (nn.Linear(2, 2), "Linear (pass its model.config)"),
        (dict, "type dict (pass an instance)"),
        (128, "int"),
        ([1, 2], "list"),
    ],
)
def test_what_is_no_configuration_is_refused(config: Any, got: str) -> None:
    message = re.escape(
        "torch_rope.RotaryEmbedding.from_config(): expected config to be a "
        f"Hugging Face configuration or its dictionary, but got {got}"
    )
    with pytest.raises(TypeError, match=message):
        RotaryEmbedding.from_config(config)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"rope_scaling": [2.0]}, {}, "expected rope_parameters to be a dictionary, but got list"),
        ({}, {"layer_type": 3}, "expected layer_type to be a string, but got int"),
        ({}, {"mrope_interleaved": 1}, "expected mrope_interleaved to be a bool, but got int"),
    ],
)
def test_options_of_another_type_are_refused_with_a_configuration(
    config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        RotaryEmbedding.from_config({"head_dim": 32, **config}, **options)


def test_a_configuration_may_give_float64_frequencies() -> None:
    config = {"head_dim": 32, "rope_scaling": LINEAR}
    rotary = RotaryEmbedding.from_config(config, dtype=torch.float64)
    expected = torch_rope.frequencies(LINEAR, 32, dtype=torch.float64).inv_freq
    assert_same_bits(rotary.inv_freq, expected)
    sections = {**LINEAR, "mrope_section": [8, 4, 4], "mrope_interleaved": False}
    rows = RotaryEmbedding.from_config(
        {"head_dim": 32, "rope_scaling": sections}, dtype=torch.float64, learned=True
    ).inv_freq
    assert isinstance(rows, nn.Parameter)
    assert_same_bits(rows.detach(), torch_rope.mrope_frequencies(expected, (8, 4, 4)))


def test_sections_that_take_turns_may_be_called_interleaved() -> None:
    scheme = {"rope_theta": 1e4, "mrope_section": [8, 4, 4], "interleaved": True}
    rotary = RotaryEmbedding.from_config({"head_dim": 32, "rope_scaling": scheme})
    expected = RotaryEmbedding.from_config(
        {"head_dim": 32, "rope_scaling": {"rope_theta": 1e4, "mrope_section": [8, 4, 4]}},
        mrope_interleaved=True,
    )
    assert_same_bits(rotary.inv_freq, expected.inv_freq)


@needs_transformers
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


@pytest.mark.parametrize(
    ("older", "theta"),
    [
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, (1e6, 1e4)),
        ({"global_rope_theta": 160000.0, "local_rope_theta": 1e4}, (160000.0, 1e4)),
        ({"rope_theta": 1e6, "swa_rope_theta": 5e4}, (1e6, 5e4)),
    ],
    ids=["gemma3", "modernbert", "dots3_note"],
)
def test_older_files_with_a_base_for_each_type_of_layer_are_read(
    older: dict[str, float], theta: tuple[float, float]
) -> None:
    config = {"head_dim": 8, **older, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    with pytest.raises(ValueError, match="expected layer_type to be one of"):
        torch_rope.RotaryEmbedding.from_config(config)
    full = torch_rope.RotaryEmbedding.from_config(config, layer_type="full_attention")
    sliding = torch_rope.RotaryEmbedding.from_config(config, layer_type="sliding_attention")
    exponents = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(full.inv_freq, 1 / theta[0] ** exponents / 8.0)
    torch.testing.assert_close(sliding.inv_freq, 1 / theta[1] ** exponents)


def test_sections_that_are_not_applied_are_not_shown() -> None:
    parameters = {"rope_theta": 1e4, "mrope_section": [1, 2, 1], "mrope_interleaved": False}
    assert "mrope" not in repr(torch_rope.RotaryEmbedding(8, parameters))
    config = {"head_dim": 8, "rope_scaling": parameters}
    assert "mrope_section=(1, 2, 1)" in repr(torch_rope.RotaryEmbedding.from_config(config))


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"head_dim": [4]}, TypeError, "head_dim to be an integer, but got list"),
        ({"head_dim": 0}, ValueError, "head_dim to be at least 1, but got 0"),
        ({"hidden_size": 8, "num_attention_heads": 0}, ValueError, "num_attention_heads to be at"),
        ({"hidden_size": [8], "num_attention_heads": 2}, TypeError, "hidden_size to be an integer"),
        (
            {"partial_rotary_factor": float("inf")},
            ValueError,
            "partial_rotary_factor to be positive",
        ),
        (
            {"partial_rotary_factor": float("nan")},
            ValueError,
            "partial_rotary_factor to be positive",
        ),
        ({"partial_rotary_factor": [0.5]}, TypeError, "partial_rotary_factor to be a number"),
    ],
    ids=str,
)
def test_sizes_of_no_use_in_a_configuration_are_refused(
    config: dict[str, Any], error: type[Exception], text: str
) -> None:
    whole = {"rope_theta": 1e4, **({} if "hidden_size" in config else {"head_dim": 16}), **config}
    with pytest.raises(error, match=rf"from_config\(\): expected {text}"):
        RotaryEmbedding.from_config(whole)
