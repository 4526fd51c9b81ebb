"""The operators in ONNX: what onnxruntime computes is what eager calls give."""

import doctest
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
import torch
import torch_rope
from reference import random_positions, random_values
from torch import Tensor, nn
from torch.export import Dim
from torch_rope.integrations.onnx import decompositions

# The first with float64 cosines of opset 22.
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.29")
pytest.importorskip("onnxscript")


@dataclass(frozen=True)
class Call:
    """A call of one of the package's functions.

    Attributes:
        tensors: x, or q and k, and what comes after.
        options: Further arguments.
        function: The function's name.
        pair: Whether the first two tensors are q and k.
    """

    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)
    function: str = "apply"
    pair: bool = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Makes the call with other tensors, and returns all results."""
        function = getattr(torch_rope, self.function)
        if self.pair:
            return function(tensors[:2], *tensors[2:], **self.options)
        return (function(*tensors, **self.options),)


class Calls(nn.Module):
    """Several calls in one model, since an export takes seconds."""

    def __init__(self, calls: Sequence[Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Makes them, each with the tensors that are its."""
        results = []
        given = iter(tensors)
        for call in self.calls:
            results.extend(call(*islice(given, len(call.tensors))))
        return tuple(results)


def to_onnx(calls: Sequence[Call], dynamic_shapes: Any = None) -> tuple[Any, list[str]]:
    """Returns a session of onnxruntime, and the operators of the model."""
    tensors = tuple(tensor for call in calls for tensor in call.tensors)
    program = torch.export.export(Calls(calls), tensors, dynamic_shapes=dynamic_shapes)
    exported = torch.onnx.export(
        program.run_decompositions(decompositions()), dynamo=True, opset_version=23, verbose=False
    )
    model = exported.model_proto
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session, [node.op_type for node in model.graph.node]


def run(session: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Runs a session."""
    names = [argument.name for argument in session.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, given)]


def check(calls: Sequence[Call], standard: bool) -> None:
    """Compares onnxruntime with eager; ``standard``: whether RotaryEmbedding serves the calls."""
    session, operators = to_onnx(calls)
    expected = [result for call in calls for result in call(*call.tensors)]
    assert operators.count("RotaryEmbedding") == (len(expected) if standard else 0)
    actual = run(session, [tensor for call in calls for tensor in call.tensors])
    for result, wanted in zip(actual, expected, strict=True):
        assert result.dtype == wanted.dtype
        tolerance = 1e-12 if wanted.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(
            result, wanted, rtol=torch.finfo(wanted.dtype).eps, atol=tolerance
        )


SCHEMES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 8,
    },
]

# Shapes of x and of positions that all heads share.
BY_HEADS = ((2, 4, 5, 16), (5,))
BY_TOKENS = ((2, 5, 4, 16), (5, 1))
SHARED = (BY_HEADS, BY_TOKENS, ((2, 4, 5, 16), (2, 1, 5)), ((2, 5, 4, 16), (2, 5, 1)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_that_heads_share_give_the_standard_operator(interleaved: bool) -> None:
    check(
        [
            Call((random_values(shape), random_positions(tokens)), {"interleaved": interleaved})
            for shape, tokens in SHARED
        ],
        standard=True,
    )


@pytest.mark.parametrize(("shape", "tokens"), [BY_HEADS, BY_TOKENS])
def test_options_keep_the_standard_operator(
    shape: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    tensors = random_values(shape), random_positions(tokens)
    options: list[dict[str, Any]] = [
        {"rotary_dim": 8},
        {"max_wavelength": 5e5, "scale_factor": 8.0},
        {"attention_factor": 1.25},
        {"conjugate": True},
    ]
    check([Call(tensors, chosen) for chosen in options], standard=True)


def test_frequencies_of_the_caller_keep_the_standard_operator() -> None:
    inv_freq = 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    x, positions = random_values((2, 4, 5, 16)), random_positions((5,))
    several = random_positions((3, 2, 1, 5), low=0, high=50)
    check(
        [
            Call((x, positions, inv_freq)),
            Call((x, positions, inv_freq.float())),
            Call((x, several, random_values((3, 8)).abs())),
        ],
        standard=True,
    )


def test_what_the_standard_operator_cannot_express_becomes_plain_ones() -> None:
    cases: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
        ((2, 4, 5, 16), (5,), {"rotary_offset": 4}),
        ((2, 4, 16, 5), (5,), {"embedding_axis": 2}),
        ((5, 4, 16), (5, 1), {}),
        ((5, 4, 16), (5, 1), {"interleaved": True, "rotary_offset": 4, "rotary_dim": 8}),
        ((2, 4, 5, 16), (4, 5), {}),
        ((16,), (), {}),
    ]
    check(
        [
            Call((random_values(shape), random_positions(tokens)), options)
            for shape, tokens, options in cases
        ],
        standard=False,
    )


@pytest.mark.parametrize(
    ("dtype", "standard"), [(torch.float32, True), (torch.float16, True), (torch.float64, False)]
)
def test_every_dtype_of_onnxruntime_is_served(dtype: torch.dtype, standard: bool) -> None:
    check([Call((random_values((2, 4, 5, 16), dtype), random_positions((5,))))], standard)


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_give_the_standard_operator(interleaved: bool) -> None:
    calls = []
    for shape, tokens in SHARED:
        cos, sin = (random_values((*tokens, 6), torch.float64, seed=seed) for seed in (1, 2))
        options = {"interleaved": interleaved, "conjugate": len(tokens) == 3}
        calls.append(Call((random_values(shape), cos, sin), options, "apply_cos_sin"))
    check(calls, standard=True)


@pytest.mark.parametrize(("offset", "standard"), [(0, True), (4, False)])
def test_rows_of_tables_are_picked(offset: int, standard: bool) -> None:
    cos, sin = (random_values((9, 6), seed=seed) for seed in (1, 2))
    tensors = random_values((2, 4, 5, 16)), cos, sin, random_positions((5,), low=0, high=9)
    check([Call(tensors, {"rotary_offset": offset}, "apply_cos_sin")], standard)


def test_tables_may_come_with_rotary_dim() -> None:
    cos, sin = random_values((5, 6), seed=1), random_values((5, 6), seed=2)
    x = random_values((2, 4, 5, 16))
    check([Call((x, cos, sin), {"rotary_dim": 12}, "apply_cos_sin")], standard=True)


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_full_width_tables_become_plain_operators(interleaved: bool, conjugate: bool) -> None:
    options = {"full_width": True, "interleaved": interleaved, "conjugate": conjugate}
    calls = []
    for shape, tokens in SHARED[:2]:
        cos, sin = (random_values((*tokens, 12), seed=seed) for seed in (1, 2))
        x = random_values(shape)
        calls.append(Call((x, cos, sin), options, "apply_cos_sin"))
        calls.append(Call((x, x, cos, sin), options | {"rotary_dim": 12}, "apply_cos_sin", True))
    cos, sin = (random_values((9, 12), seed=seed) for seed in (1, 2))
    rows = random_positions((5,), low=0, high=9)
    calls.append(Call((random_values((2, 4, 5, 16)), cos, sin, rows), options, "apply_cos_sin"))
    check(calls, standard=False)


def test_a_pair_gives_two_operators() -> None:
    q, k = random_values((2, 4, 5, 16)), random_values((2, 2, 5, 16), seed=1)
    cos, sin = random_values((5, 8), seed=2), random_values((5, 8), seed=3)
    check(
        [
            Call((q, k, random_positions((5,))), pair=True),
            Call((q, k, cos, sin), function="apply_cos_sin", pair=True),
        ],
        standard=True,
    )


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_batch_and_sequence_may_stay_open(layout: str) -> None:
    def tensors(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        positions = random_positions((batch, tokens))
        if layout == "BHSD":
            return random_values((batch, 4, tokens, 16)), positions.unsqueeze(1)
        return random_values((batch, tokens, 4, 16)), positions.unsqueeze(2)

    token_dim = 2 if layout == "BHSD" else 1
    open_shapes = ({0: Dim("batch"), token_dim: Dim("tokens")},) * 2
    session, operators = to_onnx([Call(tensors(2, 5))], (open_shapes,))
    assert operators.count("RotaryEmbedding") == 1
    for given in (tensors(3, 7), tensors(1, 1)):
        (actual,) = run(session, given)
        torch.testing.assert_close(actual, torch_rope.apply(*given), rtol=1e-6, atol=1e-6)


class Rotary(nn.Module):
    """A layer of the package, with positions from a helper of the package."""

    def __init__(self, scheme: dict[str, Any]) -> None:
        super().__init__()
        self.rotary = torch_rope.RotaryEmbedding(16, scheme, max_position_embeddings=8)

    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rotates q and k, (B, H, S, D)."""
        return self.rotary(q, k, torch_rope.positions_from_attention_mask(mask).unsqueeze(1))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme["rope_type"])
def test_a_layer_is_exported_with_its_frequencies_and_positions(scheme: dict[str, Any]) -> None:
    model = Rotary(scheme)
    batch, tokens = Dim("batch", min=1, max=64), Dim("tokens", min=2, max=64)
    sizes = {0: batch, 2: tokens}
    dynamic_shapes = (sizes, sizes, {0: batch, 1: tokens})
    program = torch.export.export(model, inputs_of(12), dynamic_shapes=dynamic_shapes)
    exported = torch.onnx.export(
        program.run_decompositions(decompositions()), dynamo=True, opset_version=23, verbose=False
    )
    proto = exported.model_proto
    assert [node.op_type for node in proto.graph.node].count("RotaryEmbedding") == 2
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for length in (7, 12, 20):  # Within the trained length, and beyond it.
        given = inputs_of(length)
        for actual, expected in zip(run(session, given), model(*given), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def inputs_of(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws q, k, and a mask that begins with padding."""
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[0, :3] = 0
    return random_values((2, 4, tokens, 16)), random_values((2, 2, tokens, 16), seed=1), mask


def test_the_example_of_the_docstring_runs() -> None:
    (example,) = doctest.DocTestFinder().find(decompositions, globs={})
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0
