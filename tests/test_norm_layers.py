"""QKNormRotaryEmbedding: what it computes, weights, checkpoints, configurations, compiling."""

import ast
import copy
import inspect
import math
import pickle
import re
import textwrap
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_inv_freq, random_values
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch_rope import QKNormRotaryEmbedding, RotaryEmbedding
from torch_rope._norm_config import (
    AFTER_ROTATION,
    OFFSET_BY_ONE,
    OVER_HEADS,
    UNSUPPORTED,
    WITHOUT_NORMS,
    WITHOUT_WEIGHT,
)
from torch_rope._norm_layers import _OTHER_NAMES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]

Q_HEADS, K_HEADS, HEAD_DIM = 4, 2, 32
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

needs_transformers = pytest.mark.usefixtures("transformers")


@pytest.fixture
def transformers() -> Any:
    """The package, for tests that compare with its models; without it they are skipped."""
    return pytest.importorskip("transformers")


def inputs(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q (B, S, H, D), k and positions (S, 1)."""
    q = random_values((2, 9, Q_HEADS, HEAD_DIM), dtype, device=device)
    k = random_values((2, 9, K_HEADS, HEAD_DIM), dtype, device=device, seed=1)
    return q, k, torch.arange(100, 109, device=device).unsqueeze(-1)


def with_random_weights(layer: QKNormRotaryEmbedding) -> QKNormRotaryEmbedding:
    """Sets the weights."""
    with torch.no_grad():
        for seed, parameter in enumerate((layer.q_norm.weight, layer.k_norm.weight), 2):
            if parameter is not None:
                parameter.copy_(random_values(tuple(parameter.shape), seed=seed))
    return layer


def assert_same_pair(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Asserts that two pairs agree in every bit."""
    assert isinstance(actual, tuple)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def normalized(x: Tensor, dims: tuple[int, ...] = (-1,), eps: float = 1e-6) -> Tensor:
    """Divides by the root mean square, in float64."""
    x = x.detach().double()
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


# ---- What it computes ----


def test_it_normalizes_weights_and_rotates(device: str) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(
        QKNormRotaryEmbedding(HEAD_DIM, max_wavelength=500.0, device=device)
    )
    rotary = RotaryEmbedding(HEAD_DIM, max_wavelength=500.0, device=device)
    for actual, x, norm in zip(
        layer(q, k, positions), (q, k), (layer.q_norm, layer.k_norm), strict=True
    ):
        expected = rotary(normalized(x) * norm.weight.double(), positions)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_it_calls_the_operator_with_its_options(device: str) -> None:
    x = random_values((2, 40, 9), device=device)
    layer = QKNormRotaryEmbedding(
        16,
        DYNAMIC,
        max_position_embeddings=64,
        attention_factor=1.5,
        embedding_axis=-2,
        rotary_offset=3,
        interleaved=True,
        device=device,
        head_dim=40,
        eps=0.1,
        weight_offset=0.5,
        norm_axes=(-2, -1),
        norm_last=True,
    )
    with_random_weights(layer)
    positions = torch.arange(200, 209, device=device)
    options = {
        "attention_factor": 1.5,
        "embedding_axis": -2,
        "rotary_dim": 16,
        "rotary_offset": 3,
        "interleaved": True,
        "eps": 0.1,
        "weight_offset": 0.5,
        "norm_axes": (-2, -1),
        "norm_last": True,
    }
    inv_freq = torch_rope.frequencies(
        DYNAMIC, 16, max_position_embeddings=64, seq_len=209, device=device
    ).inv_freq
    weights = (layer.q_norm.weight, layer.k_norm.weight)
    expected = torch_rope.norm_apply((x, 2 * x), weights, positions, inv_freq, **options)
    assert_same_pair(layer(x, 2 * x, positions), expected)
    one = torch_rope.norm_apply(x, weights[0], positions, inv_freq, **options)
    assert_same_bits(layer(x, positions), one)


def test_one_tensor_is_a_query_unless_it_is_called_a_key(device: str) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, device=device))
    q_expected, k_expected = layer(q, k, positions)
    for actual in (layer(q, positions), layer(q, positions=positions), layer.rotate(q, positions)):
        assert_same_bits(actual, q_expected)
    assert_same_bits(layer.rotate_key(k, positions), k_expected)
    assert_same_pair(layer((q, k), positions), (q_expected, k_expected))


@pytest.mark.parametrize("heads_first", [False, True])
def test_norms_over_all_heads_have_a_weight_for_each_element(
    device: str, heads_first: bool
) -> None:
    q, k, positions = inputs(device)
    layer = QKNormRotaryEmbedding(
        HEAD_DIM,
        num_heads=(Q_HEADS, K_HEADS),
        norm_axes=(-3, -1) if heads_first else None,
        device=device,
    )
    with_random_weights(layer)
    assert layer.q_norm.weight.shape == (Q_HEADS * HEAD_DIM,)
    assert layer.k_norm.weight.shape == (K_HEADS * HEAD_DIM,)
    if heads_first:
        rotated = layer(q.transpose(1, 2), k.transpose(1, 2), positions[:, 0])
        rotated = tuple(x.transpose(1, 2) for x in rotated)
    else:
        rotated = layer(q, k, positions)
    for actual, x, norm in zip(rotated, (q, k), (layer.q_norm, layer.k_norm), strict=True):
        flat = normalized(x.flatten(-2)) * norm.weight.double()
        expected = torch_rope.apply(flat.view_as(x), positions, layer.inv_freq)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 3, 2, 1), (0, 3, 1, 2), (2, 0, 1, 3)])
def test_heads_may_lie_anywhere(device: str, order: tuple[int, ...]) -> None:
    x, _, positions = inputs(device)
    heads, embedding_axis = order.index(2) - 4, order.index(3) - 4
    options: dict[str, Any] = {"num_heads": (Q_HEADS, Q_HEADS), "device": device}
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, **options))
    other = QKNormRotaryEmbedding(
        HEAD_DIM, embedding_axis=embedding_axis, norm_axes=(embedding_axis, heads), **options
    )
    other.load_state_dict(layer.state_dict())
    # The positions of (B, S, H), in the order of x without the embedding axis.
    moved = positions.expand(2, 9, 1).permute([axis for axis in order if axis != 3])
    actual = other(x.permute(order), moved)
    expected = layer(x, positions).permute(order)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q_weight", [False, True])
@pytest.mark.parametrize("k_weight", [False, True])
def test_either_weight_may_be_absent(device: str, q_weight: bool, k_weight: bool) -> None:
    q, k, positions = inputs(device)
    layer = QKNormRotaryEmbedding(HEAD_DIM, q_weight=q_weight, k_weight=k_weight, device=device)
    with_random_weights(layer)
    expected_keys = ["q_norm.weight"] * q_weight + ["k_norm.weight"] * k_weight
    assert list(layer.state_dict()) == expected_keys
    weights = (layer.q_norm.weight, layer.k_norm.weight)
    assert [weight is not None for weight in weights] == [q_weight, k_weight]
    expected = torch_rope.norm_apply((q, k), weights, positions, layer.inv_freq)
    assert_same_pair(layer(q, k, positions), expected)
    scripted = torch.jit.script(layer)
    assert_same_pair(scripted(q, k, positions), expected)
    assert_same_bits(scripted.rotate_key(k, positions), expected[1])


def test_new_weights_change_nothing(device: str) -> None:
    q, k, positions = inputs(device)
    plain = QKNormRotaryEmbedding(HEAD_DIM, q_weight=False, k_weight=False, device=device)
    expected = plain(q, k, positions)
    for offset in (0.0, 1.0):
        layer = QKNormRotaryEmbedding(HEAD_DIM, weight_offset=offset, device=device)
        assert layer.q_norm.weight.unique().tolist() == [1.0 - offset]
        for one, other in zip(layer(q, k, positions), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# ---- Options that are refused ----


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"eps": -1.0}, ValueError, "eps to be at least 0 and finite, but got -1.0"),
        ({"eps": math.nan}, ValueError, "eps to be at least 0 and finite, but got nan"),
        ({"eps": "small"}, TypeError, "eps to be a number, but got str"),
        ({"eps": None}, TypeError, "eps to be a number, but got None"),
        ({"weight_offset": math.inf}, ValueError, "weight_offset to be finite, but got inf"),
        ({"weight_offset": None}, TypeError, "weight_offset to be a number, but got None"),
        ({"norm_axes": ()}, ValueError, "norm_axes to be distinct dimensions, but got ()"),
        ({"norm_axes": (-1, -1)}, ValueError, "norm_axes to be distinct dimensions, but got (-1,"),
        ({"norm_axes": -1}, TypeError, "norm_axes to be a sequence of integers, but got int"),
        (
            {"norm_axes": [2**63]},
            TypeError,
            "norm_axes to be a sequence of integers, but got a list with one beyond 64 bits",
        ),
        (
            {"norm_axes": [-2]},
            ValueError,
            "norm_axes to contain embedding_axis, -1, but got (-2,)",
        ),
        (
            {"norm_axes": [1, 2], "embedding_axis": 0},
            ValueError,
            "norm_axes to contain embedding_axis, 0, but got (1, 2)",
        ),
        ({"eps": 10**400}, TypeError, "eps to be a number, but got one beyond float64"),
        ({"max_wavelength": 10**400}, TypeError, "max_wavelength to be a number, but got one"),
        ({"norm_last": 1}, TypeError, "norm_last to be a bool, but got int"),
        ({"q_weight": None}, TypeError, "q_weight to be a bool, but got None"),
        ({"k_weight": 0}, TypeError, "k_weight to be a bool, but got int"),
        *(
            (
                {"weight_dtype": dtype},
                TypeError,
                f"weight_dtype to be float64, float32, float16 or bfloat16, but got {got}",
            )
            for dtype, got in (
                ("half", "str"),
                (torch.int32, "int32"),
                (torch.float8_e4m3fn, "float8_e4m3fn"),
            )
        ),
        (
            {"head_dim": 30},
            ValueError,
            "head_dim to be at least rotary_offset + rotary_dim = 32, but got 30",
        ),
        ({"head_dim": 64.0}, TypeError, "head_dim to be an integer, but got float"),
        ({"num_heads": 4}, TypeError, "num_heads to be a sequence of integers, but got int"),
        ({"num_heads": (4,)}, ValueError, "num_heads to be the numbers of query heads and of key"),
        ({"num_heads": (4, 0)}, ValueError, "num_heads to be the numbers of query heads and of"),
        (
            {"num_heads": (4, 2), "norm_axes": (-1,)},
            ValueError,
            "norm_axes to be two negative dimensions, that of heads and embedding_axis, together "
            "with num_heads, but got (-1,)",
        ),
        (
            {"num_heads": (4, 2), "norm_axes": (-3, -2, -1)},
            ValueError,
            "norm_axes to be two negative",
        ),
        (
            {"num_heads": (4, 2), "norm_axes": (2, 3), "embedding_axis": 3},
            ValueError,
            "norm_axes to be two negative",
        ),
        # Of RotaryEmbedding, under this layer's name.
        ({"rotary_offset": -1}, ValueError, "rotary_offset to be at least 0, but got -1"),
        ({"inv_freq": [1.0]}, TypeError, "inv_freq to be a tensor, but got list"),
    ],
)
def test_options_of_no_use_are_refused_when_the_layer_is_made(
    options: dict[str, Any], error: type[Exception], rule: str
) -> None:
    expected = f"torch_rope.QKNormRotaryEmbedding(): expected {rule}"
    with pytest.raises(error, match=re.escape(expected)):
        QKNormRotaryEmbedding(HEAD_DIM, **options)


def test_axes_that_count_from_the_other_end_are_accepted() -> None:
    x, _, positions = inputs("cpu")
    layer = QKNormRotaryEmbedding(HEAD_DIM, norm_axes=(2, 3))
    assert_same_bits(
        layer(x, positions), QKNormRotaryEmbedding(HEAD_DIM, norm_axes=(-2, -1))(x, positions)
    )


def test_a_pair_is_told_how_to_be_given() -> None:
    q, k, positions = inputs("cpu")
    layer = QKNormRotaryEmbedding(HEAD_DIM)
    with pytest.raises(TypeError, match=re.escape("a tensor (layer(q, k, positions)), but got No")):
        layer(q, k)
    for rotate in (layer.rotate, layer.rotate_key):
        with pytest.raises(TypeError, match=re.escape("(for a pair, layer(q, k, positions)), but")):
            rotate((q, k), positions)


def test_heads_in_another_place_than_norm_axes_are_told() -> None:
    q, k, positions = inputs("cpu")
    layer = QKNormRotaryEmbedding(HEAD_DIM, num_heads=(Q_HEADS, K_HEADS))
    with pytest.raises(ValueError, match=re.escape("for (B, H, S, D) with norm_axes=(-3, -1))")):
        layer(q.transpose(1, 2), k.transpose(1, 2), positions[:, 0])


def test_messages_name_the_layer() -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM, inv_freq=torch.ones(HEAD_DIM // 2))
    name = "torch_rope.QKNormRotaryEmbedding"
    with pytest.raises(TypeError, match=re.escape(f"{name}(): expected positions to be a tensor")):
        layer(torch.ones(3, HEAD_DIM))
    with pytest.raises(RuntimeError, match=re.escape(f"{name}.reset_parameters(): expected the")):
        layer.reset_parameters()


# ---- Weights: dtypes, devices, the meta device, checkpoints ----


def test_weights_are_converted_and_frequencies_are_not(device: str) -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM, device=device)
    inv_freq = layer.inv_freq.clone()
    layer.to(torch.bfloat16)
    assert layer.q_norm.weight.dtype == layer.k_norm.weight.dtype == torch.bfloat16
    assert_same_bits(layer.inv_freq, inv_freq)
    model = nn.Sequential(QKNormRotaryEmbedding(HEAD_DIM, learned=True, device=device)).half()
    assert model[0].q_norm.weight.dtype == torch.float16
    assert_same_bits(model[0].inv_freq.detach(), inv_freq)


def test_the_dtype_and_device_of_weights_may_be_given(device: str) -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM, weight_dtype=torch.float16, device=device)
    assert layer.q_norm.weight.dtype == torch.float16
    assert (
        layer.k_norm.weight.device == layer.inv_freq.device == torch.zeros((), device=device).device
    )
    own = QKNormRotaryEmbedding(HEAD_DIM, inv_freq=random_inv_freq((16,), device=device))
    assert own.q_norm.weight.device == own.inv_freq.device
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert QKNormRotaryEmbedding(HEAD_DIM).q_norm.weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(previous)


def test_weights_of_another_dtype_than_the_input_are_used_as_they_are(device: str) -> None:
    q, k, positions = inputs(device, torch.bfloat16)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, device=device))
    weights = (layer.q_norm.weight, layer.k_norm.weight)
    expected = torch_rope.norm_apply((q, k), weights, positions, layer.inv_freq)
    assert_same_pair(layer(q, k, positions), expected)


def test_a_layer_on_the_meta_device_is_reset() -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM, weight_offset=1.0, device="meta")
    assert layer.q_norm.weight.is_meta
    layer.to_empty(device="cpu")
    assert_same_bits(layer.inv_freq, RotaryEmbedding(HEAD_DIM).inv_freq)
    with torch.no_grad():
        layer.q_norm.weight.fill_(7.0)
        layer.inv_freq.zero_()
    layer.reset_parameters()
    assert layer.q_norm.weight.eq(0).all()
    assert_same_bits(layer.inv_freq, RotaryEmbedding(HEAD_DIM).inv_freq)


def test_leaving_the_meta_device_keeps_weights_that_are_loaded() -> None:
    loaded = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM))
    layer = QKNormRotaryEmbedding(HEAD_DIM, device="meta")
    layer.q_norm.weight = nn.Parameter(loaded.q_norm.weight.detach().clone())
    layer.k_norm.weight = nn.Parameter(loaded.k_norm.weight.detach().clone())
    # As loaders do: only what is still on the meta device is made real.
    layer._apply(lambda x: torch.empty_like(x, device="cpu") if x.is_meta else x)
    q, k, positions = inputs("cpu")
    assert_same_pair(layer(q, k, positions), loaded(q, k, positions))


def test_an_assigned_state_dict_makes_the_layer_real() -> None:
    loaded = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM))
    layer = QKNormRotaryEmbedding(HEAD_DIM, device="meta")
    layer.load_state_dict(loaded.state_dict(), assign=True)
    q, k, positions = inputs("cpu")
    assert_same_pair(layer(q, k, positions), loaded(q, k, positions))


def test_the_state_is_that_of_a_model() -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM)
    assert list(layer.state_dict()) == ["q_norm.weight", "k_norm.weight"]
    assert list(dict(layer.named_parameters())) == ["q_norm.weight", "k_norm.weight"]
    learned = QKNormRotaryEmbedding(HEAD_DIM, learned=True)
    assert list(learned.state_dict()) == ["inv_freq", "q_norm.weight", "k_norm.weight"]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "names", [("q_norm", "k_norm"), *zip(*_OTHER_NAMES.values(), strict=True)], ids="-".join
)
def test_checkpoints_load_by_any_name_of_the_norms(names: tuple[str, str], nested: bool) -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM)
    model = nn.Sequential(layer) if nested else layer
    prefix = "0." if nested else ""
    state = {
        f"{prefix}{name}.weight": random_values((HEAD_DIM,), seed=seed)
        for seed, name in enumerate(names)
    }
    # Checkpoints of old have frequencies too, which are recomputed.
    model.load_state_dict({**state, f"{prefix}inv_freq": torch.zeros(3)})
    for norm, weight in zip((layer.q_norm, layer.k_norm), state.values(), strict=True):
        assert_same_bits(norm.weight.detach(), weight)


def test_a_weight_that_is_missing_or_too_large_is_reported() -> None:
    with pytest.raises(RuntimeError, match=re.escape('Missing key(s) in state_dict: "k_norm.wei')):
        QKNormRotaryEmbedding(HEAD_DIM).load_state_dict({"q_norm.weight": torch.ones(HEAD_DIM)})
    over_heads = QKNormRotaryEmbedding(HEAD_DIM, num_heads=(4, 2)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for q_norm\.weight"):
        QKNormRotaryEmbedding(HEAD_DIM).load_state_dict(over_heads)


def test_weights_and_frequencies_get_gradients(device: str) -> None:
    q, k, positions = inputs(device)
    layer = QKNormRotaryEmbedding(HEAD_DIM, num_heads=(4, 2), learned=True, device=device)
    with_random_weights(layer)
    layer(q, k, positions)[0].square().sum().backward()
    assert layer.q_norm.weight.grad.shape == layer.q_norm.weight.shape
    assert layer.q_norm.weight.grad.ne(0).all()
    # The length of a rotated pair does not depend on its angle, so the gradient here is noise.
    assert layer.inv_freq.grad is not None


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_a_copy_computes_alike(device: str, copy_of: Any) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, num_heads=(4, 2), device=device))
    copied = copy_of(layer)
    assert_same_pair(copied(q, k, positions), layer(q, k, positions))
    assert copied.q_norm.weight is not layer.q_norm.weight


# ---- Compilers ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forgets what is compiled: all layers share the code objects whose graphs are limited."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_without_a_graph_break_or_a_graph_for_each_length(device: str) -> None:
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, num_heads=(4, 2), device=device))
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    q, k, positions = inputs(device)
    for tokens in (9, 8, 7, 5):
        given = q[:, :tokens], k[:, :tokens], positions[:tokens]
        assert_same_pair(compiled(*given), layer(*given))
    assert graphs <= 2


@pytest.mark.parametrize("options", [{}, {"num_heads": (4, 2)}, {"k_weight": False}])
def test_it_can_be_scripted_saved_and_differentiated(
    device: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, device=device, **options))
    torch.jit.script(layer).save(str(tmp_path / "layer.pt"))
    loaded = torch.jit.load(str(tmp_path / "layer.pt"))
    assert_same_pair(loaded(q, k, positions), layer(q, k, positions))
    assert_same_bits(loaded.rotate(q, positions), layer.rotate(q, positions))
    assert_same_bits(loaded.rotate_key(k, positions), layer.rotate_key(k, positions))
    assert dict(loaded.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    gradients = []
    for each in (layer, loaded):
        x = q.clone().requires_grad_()
        each(x, k, positions)[0].square().mul(random_values(tuple(q.shape))).sum().backward()
        gradients.append((x.grad, each.q_norm.weight.grad))
    assert_same_pair(*gradients)


def test_it_can_be_traced_symbolically(device: str) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, num_heads=(4, 2), device=device))
    traced = symbolic_trace(layer, concrete_args={"seq_len": None})
    assert_same_pair(traced(q, k, positions), layer(q, k, positions))


@pytest.mark.parametrize(
    "options", [{}, {"num_heads": (4, 2)}, {"num_heads": (4, 2), "k_weight": False}]
)
def test_it_can_be_traced_by_torchscript(device: str, options: dict[str, Any]) -> None:
    q, k, positions = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, device=device, **options))
    traced = torch.jit.trace(layer, (q, k, positions))
    assert_same_pair(traced(2 * q, k, positions), layer(2 * q, k, positions))


def test_a_scripted_layer_has_frequencies_in_its_state_dict() -> None:
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM))
    scripted = torch.jit.script(QKNormRotaryEmbedding(HEAD_DIM))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "inv_freq"'):
        scripted.load_state_dict(layer.state_dict())
    scripted.load_state_dict(layer.state_dict(), strict=False)
    assert_same_pair(scripted(*inputs("cpu")), layer(*inputs("cpu")))
    layer.load_state_dict(scripted.state_dict())


def test_it_survives_export(device: str) -> None:
    arguments = inputs(device)
    layer = with_random_weights(QKNormRotaryEmbedding(HEAD_DIM, device=device))
    program = torch.export.export(layer, arguments)
    assert "rope.norm_apply_qk" in str(program.graph)
    assert_same_pair(program.module()(*arguments), layer(*arguments))


# ---- What it shows ----


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "32, rope_type='default', rope_theta=10000.0"),
        (
            {"head_dim": 64, "eps": 1e-5, "weight_offset": 1, "norm_last": True},
            "32, rope_type='default', rope_theta=10000.0, head_dim=64, eps=1e-05, "
            "weight_offset=1.0, norm_last=True",
        ),
        ({"num_heads": (4, 2)}, "32, rope_type='default', rope_theta=10000.0, norm_axes=(-2, -1)"),
    ],
)
def test_the_representation_shows_its_options(options: dict[str, Any], shown: str) -> None:
    layer = QKNormRotaryEmbedding(HEAD_DIM, k_weight=False, **options)
    assert layer.extra_repr() == shown
    size = layer.q_norm.weight.numel()
    assert repr(layer).splitlines()[2:] == [
        f"  (q_norm): NormWeight({size})",
        "  (k_norm): NormWeight(no weight)",
        ")",
    ]


# ---- Configurations ----

SIZES = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen3"}, {}),
        ({"model_type": "made_up"}, {}),
        ({}, {}),
        ({"model_type": "glm4_moe", "use_qk_norm": True, "partial_rotary_factor": 0.5}, {}),
        ({"model_type": "gemma3_text"}, {"weight_offset": 1.0}),
        ({"model_type": "gemma3", "text_config": SIZES}, {"weight_offset": 1.0}),
        ({"model_type": "gemma4_text"}, {}),
        ({"model_type": "olmo2"}, {"norm_axes": [-2, -1]}),
        ({"model_type": "molmo2_text", "qk_norm_type": "olmo"}, {"norm_axes": [-2, -1]}),
        ({"model_type": "molmo2_text", "qk_norm_type": "qwen3"}, {}),
        ({"model_type": "hunyuan_v1_dense"}, {"norm_last": True}),
        ({"model_type": "llama4_text"}, {"norm_last": True, "interleaved": True}),
        ({"model_type": "lfm2", "rms_norm_eps": None, "norm_eps": 1e-3}, {"eps": 1e-3}),
    ],
)
def test_a_configuration_tells_what_the_norms_are(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = {**SIZES, **config}
    layer = QKNormRotaryEmbedding.from_config(config)
    known = {
        "eps": 1e-5,
        "weight_offset": 0.0,
        "norm_axes": None,
        "norm_last": False,
        "interleaved": False,
        "head_dim": 16,
        **expected,
    }
    assert {name: getattr(layer, name) for name in known} == known
    assert layer.rotary_dim == int(16 * config.get("partial_rotary_factor", 1.0))
    heads = (4, 2) if known["norm_axes"] else (1, 1)
    for norm, number in zip((layer.q_norm, layer.k_norm), heads, strict=True):
        if config.get("model_type") in WITHOUT_WEIGHT:
            assert norm.weight is None
        else:
            assert norm.weight.shape == (number * 16,)


def test_options_take_precedence_over_a_configuration() -> None:
    layer = QKNormRotaryEmbedding.from_config(
        {"model_type": "olmo2", **SIZES},
        norm_axes=(-3, -1),
        eps=1e-3,
        weight_dtype=torch.bfloat16,
        interleaved=True,
    )
    assert layer.norm_axes == [-3, -1]
    assert layer.eps == 1e-3
    assert layer.q_norm.weight.dtype == torch.bfloat16
    assert layer.interleaved


def test_options_make_up_for_what_a_configuration_lacks() -> None:
    config = {"model_type": "olmo2", "head_dim": 16}
    layer = QKNormRotaryEmbedding.from_config(config, eps=1e-3, num_heads=(4, 2))
    assert layer.eps == 1e-3
    assert layer.k_norm.weight.shape == (32,)


@pytest.mark.parametrize("config", [5, {"model_type": "qwen3", "rms_norm_eps": 1e-6}], ids=str)
def test_messages_about_a_configuration_name_the_layer(config: Any) -> None:
    name = re.escape("torch_rope.QKNormRotaryEmbedding.from_config(): expected config to")
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        QKNormRotaryEmbedding.from_config(config)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        *(
            (
                {"model_type": model_type},
                "config to have RMSNorms of queries and keys next to the rotation, but got "
                f"{model_type}, which has none",
            )
            for model_type in ("llama", "glm4", "glm_ocr", "glm_ocr_text", "mllama_text_model")
        ),
        (
            {"model_type": "llama4", "text_config": {**SIZES, "model_type": "llama4_vision_model"}},
            "config to have RMSNorms of queries and keys next to the rotation, but got llama4_vis",
        ),
        (
            {"model_type": "olmo2", "num_attention_heads": None},
            "config to have num_attention_heads (or pass num_heads=), but got a configuration",
        ),
        ({"rms_norm_eps": None, "norm_eps": "1e-5"}, "norm_eps to be a number, but got str"),
        (
            {"model_type": "cohere"},
            "config to have RMSNorms of queries and keys next to the rotation, but got cohere, "
            "which has a LayerNorm",
        ),
        (
            {"use_qk_norm": False},
            "use_qk_norm to be True for a model with norms of queries and keys, but got False",
        ),
        (
            {"rms_norm_eps": None},
            "config to have rms_norm_eps or norm_eps (or pass eps=), but got a configuration "
            "without",
        ),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps to be a number, but got str"),
    ],
)
def test_a_configuration_without_such_norms_is_refused(config: dict[str, Any], rule: str) -> None:
    expected = f"torch_rope.QKNormRotaryEmbedding.from_config(): expected {rule}"
    with pytest.raises((TypeError, ValueError), match=re.escape(expected)):
        QKNormRotaryEmbedding.from_config({**SIZES, **config})


# ---- The models of transformers ----

ROTATES = re.compile(r"(self\.)?(apply_\w*(rotary|rope)\w*|\w*rotary_fn\w*)")
NORM_NAMES = {
    name for names in (*_OTHER_NAMES.values(), ("q_norm", "k_norm", "qk_norm")) for name in names
}


def calls_of(forward: Any) -> list[str]:
    """Lists the norms and rotations of a method in the order in which they are called."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            end = (node.end_lineno, node.end_col_offset)
            if ROTATES.fullmatch(name):
                found.append((end, "rotation"))
            elif name.removeprefix("self.") in NORM_NAMES:
                found.append((end, name.removeprefix("self.")))
    return [name for _, name in sorted(found)]


def attention_classes() -> Iterator[tuple[type, list[str]]]:
    """Lists the classes that normalize and rotate, with the order of the two."""
    transformers = pytest.importorskip("transformers")
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        if path.stem != f"modeling_{path.parent.name}" or not any(
            f"self.{name}(" in path.read_text() for name in NORM_NAMES
        ):
            continue
        module = import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for one in vars(module).values():
            if not (isinstance(one, type) and issubclass(one, nn.Module)):
                continue
            if one.__module__ == module.__name__ and "Indexer" not in one.__name__:
                calls = calls_of(one.forward) if "forward" in vars(one) else []
                if len(set(calls)) > 1 and "rotation" in calls:
                    yield one, calls


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_qk_norm": True,
    "qk_layernorm": True,
}


def made(attention_class: type, config_class: Any, norm: str) -> tuple[nn.Module, Any] | None:
    """Returns an attention layer that normalizes and rotates, and its configuration."""
    for options in ({}, SMALL):
        try:
            config = config_class(**options)
        except Exception:
            continue
        config = getattr(config, "text_config", None) or config
        for place in range(4):
            with torch.device("meta"):
                try:
                    layer = attention_class(config, layer_idx=place)
                except Exception:
                    continue
            if isinstance(getattr(layer, norm, None), nn.Module) and getattr(
                layer, "use_rope", True
            ):
                return layer, config
    return None


def offset_of(norm: nn.Module) -> float:
    """Returns what a norm adds to its weight, or raises if it is no RMSNorm."""
    norm = copy.deepcopy(norm).to_empty(device="cpu").float()
    x = random_values((3, *norm.weight.shape))
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    nn.init.constant_(norm.weight, 0.5)
    (ratio,) = (norm(x) / normalized(x, eps=eps)).mean(dtype=torch.float64).reshape(1).tolist()
    torch.testing.assert_close(norm(x).double(), ratio * normalized(x, eps=eps), rtol=0, atol=1e-4)
    return round(ratio - 0.5, 3)


# Parts of models that are not about text.
OTHER_PARTS = ("Vision", "Audio", "Encoder", "Code2Wav", "Atom", "Sapiens2")

# Types whose layers the test below cannot make with small sizes, or read for all layers alike.
UNTRIED = {"deepseek_v4", "idefics", "neomme", "qwen4_exp", "qwen4_exp_text"}

# Multimodal models, whose text parts are tried, and parts with the layers of those.
WHOLES = {
    "gemma3",
    "hunyuan_vl",
    "llama4",
    "minimax_m3_vl",
    "muse_glimmer",
    "muse_spark",
    "qwen3_5",
    "qwen3_5_moe",
    "step3p7",
    "t5gemma2",
    "t5gemma2_decoder",
    "t5gemma2_encoder",
}


@needs_transformers
@pytest.mark.filterwarnings("ignore")
def test_norms_are_those_of_the_models() -> None:
    tried = set()
    for attention_class, calls in attention_classes():
        config_class = typing.get_type_hints(attention_class.__init__).get("config")
        if config_class is None or any(part in attention_class.__name__ for part in OTHER_PARTS):
            continue
        first = next(name for name in calls if name != "rotation")
        found = made(attention_class, config_class, first)
        if found is None or found[1].model_type in UNTRIED:
            continue
        attention, config = found
        model_type = config.model_type
        tried.add(model_type)
        if model_type in UNSUPPORTED:
            with pytest.raises(ValueError, match="next to the rotation, but got"):
                QKNormRotaryEmbedding.from_config(config)
            continue

        types = [key for key, value in config.rope_parameters.items() if isinstance(value, dict)]
        own = getattr(attention, "layer_type", None)
        layer_type = own if own in types else next(iter(types), None)
        layer = QKNormRotaryEmbedding.from_config(
            config, layer_type=layer_type, mrope_interleaved=False
        )
        assert layer.norm_last == (calls[0] == "rotation"), model_type
        q_norm, k_norm = [getattr(attention, name) for name in calls if name != "rotation"][:2]
        assert layer.eps == (getattr(q_norm, "variance_epsilon", None) or q_norm.eps), model_type
        if getattr(q_norm, "weight", None) is None:
            assert layer.q_norm.weight is layer.k_norm.weight is None, model_type
            continue
        assert layer.weight_offset == offset_of(q_norm), model_type
        assert q_norm.weight.shape == layer.q_norm.weight.shape, model_type
        assert k_norm.weight.shape == layer.k_norm.weight.shape, model_type
        state = attention.to_empty(device="cpu").state_dict()
        for value in state.values():
            value.fill_(3.0)
        layer.load_state_dict(state, strict=False)
        assert layer.q_norm.weight.eq(3.0).all(), model_type
        assert layer.k_norm.weight.eq(3.0).all(), model_type

    assert len(tried) > 50
    listed = OFFSET_BY_ONE | OVER_HEADS | AFTER_ROTATION | WITHOUT_WEIGHT | set(UNSUPPORTED)
    assert listed - tried == WHOLES | UNTRIED


CALLS_ROTATION = re.compile(r"(apply_\w*(rotary|rope)\w*|rotary_fn\w*)\(")


def class_sources(path: Path) -> dict[str, str]:
    """Returns the text of each class of a module."""
    whole_class = r"^class (\w+).*\n(?:(?:[ )#].*)?\n)*"
    return {found[1]: found[0] for found in re.finditer(whole_class, path.read_text(), re.M)}


def types_without_norms(family: Path) -> set[str]:
    """Lists the model types of a family whose layers rotate and have no norms next to that."""
    configs = class_sources(family / f"configuration_{family.name}.py")
    types = {
        name: found[1]
        for name, text in configs.items()
        if (found := re.search(r'^    model_type = "(.*)"', text, re.M))
    }
    rotating = {
        name: text
        for name, text in class_sources(family / f"modeling_{family.name}.py").items()
        if "Indexer" not in name and CALLS_ROTATION.search(text)
    }
    calls_norm = re.compile(rf"self\.({'|'.join(sorted(NORM_NAMES))})\(")
    if not any(calls_norm.search(text) for text in rotating.values()):
        return set(types.values()) if rotating else set()

    found: dict[bool, set[str]] = {True: set(), False: set()}
    for text in rotating.values():
        annotation = re.search(r"def __init__\(\s*self, config: ([^,)]*)", text)
        for name in re.findall(r"\w+", annotation[1]) if annotation else ():
            found[bool(calls_norm.search(text))] |= {types[name]} if name in types else set()
    without = found[False] - found[True]
    for name, text in configs.items():
        text_part = re.search(r'"text_config": (\w+)', text)
        if text_part and types.get(text_part[1]) in without:
            without.add(types[name])
    return without


def test_types_without_norms_are_those_of_the_models(transformers: Any) -> None:
    root = Path(transformers.__file__).parent / "models"
    found = set()
    for path in sorted(root.glob("*/modeling_*.py")):
        family = path.parent
        if path.stem == f"modeling_{family.name}" and CALLS_ROTATION.search(path.read_text()):
            found |= types_without_norms(family)
    assert found - set(UNSUPPORTED) == WITHOUT_NORMS
    assert not WITHOUT_NORMS & (OFFSET_BY_ONE | OVER_HEADS | AFTER_ROTATION | WITHOUT_WEIGHT)


@contextmanager
def captured_attention() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects the queries and keys (B, H, S, D) that reach the attention of models."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found = []

    def capture(_: Any, q: Tensor, k: Tensor, *__: Any, **___: Any) -> tuple[Tensor, None]:
        found.append((q, k))
        return q.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["captured"] = capture
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS["captured"]


FAMILIES = [
    ("qwen3", "Qwen3", {}),
    ("qwen3_moe", "Qwen3Moe", {}),
    ("gemma3", "Gemma3", {"of_config": "Gemma3TextConfig"}),
    ("olmo2", "Olmo2", {}),
    ("olmo3", "Olmo3", {}),
    ("olmoe", "Olmoe", {}),
    ("minimax_m2", "MiniMaxM2", {}),
    ("hunyuan_v1_dense", "HunYuanDenseV1", {}),
    ("hunyuan_v1_moe", "HunYuanMoEV1", {}),
    ("glm4_moe", "Glm4Moe", {"use_qk_norm": True}),
    ("llama4", "Llama4Text", {}),
    ("lfm2", "Lfm2", {}),
    ("apertus", "Apertus", {}),
    ("dots1", "Dots1", {}),
    ("exaone_moe", "ExaoneMoe", {}),
]


@needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "prefix", "options"), FAMILIES, ids=lambda value: str(value))
def test_a_model_and_the_layer_of_its_configuration_agree(
    family: str, prefix: str, options: dict[str, Any]
) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = {**sizes, "num_hidden_layers": 4, "head_dim": 16, **options}
    config = getattr(module, options.pop("of_config", f"{prefix}Config"))(**options)
    config._attn_implementation = "captured"
    torch.manual_seed(0)
    attention = getattr(module, f"{prefix}Attention")(config, layer_idx=0)
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)

    hidden, position_ids = torch.randn(2, 9, 64), torch.arange(9)[None]
    types = [key for key, value in config.rope_parameters.items() if isinstance(value, dict)]
    layer_type = config.layer_types[0] if types else None
    rotary = getattr(module, f"{prefix}RotaryEmbedding")(config)
    tables = rotary(hidden, position_ids, *((layer_type,) if types else ()))
    with captured_attention() as found:
        attention(hidden, position_embeddings=tables, attention_mask=None)

    # Models normalize over heads before they split them.
    layer = QKNormRotaryEmbedding.from_config(config, layer_type=layer_type)
    layer.load_state_dict(attention.state_dict(), strict=False)
    q, k = (
        project(hidden).unflatten(-1, (-1, 16)) for project in (attention.q_proj, attention.k_proj)
    )
    rotated = layer(q, k, position_ids[0].unsqueeze(-1))
    for actual, expected in zip(rotated, found[0], strict=True):
        torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
