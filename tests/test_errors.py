"""Every refusal: its type, and a message that names the operator, argument, rule and value."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor

APPLY = ("apply", "apply_", "apply_qk", "apply_qk_")
APPLY_COS_SIN = ("apply_cos_sin", "apply_cos_sin_", "apply_cos_sin_qk", "apply_cos_sin_qk_")

Call = Callable[..., Any]


def through_python(
    operator: str, tensors: tuple[Tensor, ...], *arguments: Any, **options: Any
) -> None:
    """Calls an operator through ``torch_rope``."""
    function: Call = getattr(torch_rope, operator.replace("_qk", ""))
    function(tensors if "_qk" in operator else tensors[0], *arguments, **options)


def through_dispatcher(
    operator: str, tensors: tuple[Tensor, ...], *arguments: Any, **options: Any
) -> None:
    """Calls an operator through ``torch.ops``."""
    function: Call = getattr(torch.ops.rope, operator)
    function(*tensors, *arguments, **options)


@dataclass(frozen=True)
class Refusal:
    """A call that must be refused: what differs from a good call, and what is said about it.

    Attributes:
        name: What is wrong.
        exception: The type of the exception.
        argument: A pattern of the argument that is named; ``{x}`` stands for x, q or k.
        changes: Arguments by name, in place of those of a good call.
        rule: A pattern of the rule.
        value: A pattern of the value that was found.
    """

    name: str
    exception: type[Exception] | tuple[type[Exception], ...]
    argument: str
    changes: dict[str, Any]
    rule: str = ".+"
    value: str = ".+"

    def pattern(self, operator: str, place: int) -> str:
        """Returns the pattern of the message, given the place of the wrong tensor."""
        argument = self.argument.format(x="qk"[place] if "_qk" in operator else "x")
        return (
            rf"(?s)^rope::{operator}\(\): expected {argument} to {self.rule}, but got {self.value}"
        )


def floats(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Returns random numbers; a good x has shape (2, 3, 4, 8)."""
    return random_values(shape, dtype, device)


def zeros(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Returns zeros of any dtype."""
    return torch.zeros(shape, dtype=dtype, device=device)


OF_BOTH_FAMILIES = [
    *(
        Refusal(f"x is {dtype}", TypeError, "{x}", {"x": zeros(2, 3, 4, 8, dtype=dtype)})
        for dtype in (torch.complex64, torch.int64, torch.uint8, torch.bool)
    ),
    Refusal(
        "x has no dimension", (ValueError, IndexError), "({x}|embedding_axis)", {"x": floats()}
    ),
    Refusal(
        "embedding_axis is too large",
        IndexError,
        "embedding_axis",
        {"embedding_axis": 4},
        value=".*4",
    ),
    Refusal(
        "embedding_axis is too small",
        IndexError,
        "embedding_axis",
        {"embedding_axis": -5},
        value=".*-5",
    ),
    Refusal(
        "rotary_offset is negative",
        ValueError,
        "rotary_offset",
        {"rotary_offset": -2},
        value=".*-2",
    ),
    Refusal(
        "rotary_offset is past the end",
        ValueError,
        "(rotary_offset|rotary_dim|cos)",
        {"rotary_offset": 10},
    ),
    Refusal(
        "rotary_offset overflows",
        ValueError,
        "(rotary_offset|rotary_dim|cos)",
        {"rotary_offset": 2**63 - 1},
    ),
    Refusal(
        "positions do not broadcast",
        ValueError,
        "positions",
        {"positions": zeros(5, 1, dtype=torch.int64)},
    ),
    Refusal(
        "positions have a dimension too many",
        ValueError,
        "positions",
        {"positions": zeros(1, 2, 3, 4, dtype=torch.int64)},
    ),
    Refusal(
        "positions would expand x",
        ValueError,
        "positions",
        {"positions": zeros(5, 1, 1, 1, dtype=torch.int64)},
    ),
    Refusal(
        "positions have the shape with the embedding axis",
        ValueError,
        "positions",
        {"positions": zeros(2, 3, 4, 8, dtype=torch.int64)},
    ),
    *(
        Refusal(
            f"positions are {dtype}",
            TypeError,
            "positions",
            {"positions": zeros(3, 1, dtype=dtype)},
        )
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.bool, torch.complex64)
    ),
]

OF_APPLY = [
    *OF_BOTH_FAMILIES,
    Refusal(
        "rotary_dim is odd",
        ValueError,
        "rotary_dim",
        {"rotary_dim": 7},
        rule="be even",
        value="7$",
    ),
    Refusal("rotary_dim is negative", ValueError, "rotary_dim", {"rotary_dim": -2}, value=".*-2"),
    Refusal(
        "rotary_dim is past the end", ValueError, "rotary_dim", {"rotary_dim": 10}, value=".*10"
    ),
    Refusal(
        "rotary_dim is past the end with the offset",
        ValueError,
        "(rotary_dim|rotary_offset)",
        {"rotary_dim": 6, "rotary_offset": 4},
    ),
    Refusal(
        "rotary_dim and rotary_offset overflow",
        ValueError,
        "(rotary_dim|rotary_offset)",
        {"rotary_dim": 2**63 - 2, "rotary_offset": 4},
    ),
    Refusal("the axis is odd", ValueError, "(rotary_dim|{x})", {"x": floats(2, 3, 4, 7)}),
    Refusal(
        "what is left of the axis is odd", ValueError, "(rotary_dim|x|q|k)", {"rotary_offset": 3}
    ),
    Refusal(
        "positions are float16",
        TypeError,
        "positions",
        {"positions": zeros(3, 1, dtype=torch.float16)},
        rule=".*2048.*",
    ),
    Refusal(
        "positions are bfloat16",
        TypeError,
        "positions",
        {"positions": zeros(3, 1, dtype=torch.bfloat16)},
        rule=".*256.*",
    ),
    *(
        Refusal(f"inv_freq is {dtype}", TypeError, "inv_freq", {"inv_freq": zeros(4, dtype=dtype)})
        for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64)
    ),
    Refusal("inv_freq has no dimension", ValueError, "inv_freq", {"inv_freq": floats()}),
    Refusal("inv_freq has three dimensions", ValueError, "inv_freq", {"inv_freq": floats(1, 1, 4)}),
    Refusal("inv_freq is too wide for the axis", ValueError, "inv_freq", {"inv_freq": floats(5)}),
    Refusal(
        "inv_freq is too wide after the offset",
        ValueError,
        "(inv_freq|rotary_offset)",
        {"inv_freq": floats(4), "rotary_offset": 2},
    ),
    Refusal(
        "inv_freq is at odds with rotary_dim",
        ValueError,
        "(inv_freq|rotary_dim)",
        {"inv_freq": floats(3), "rotary_dim": 8},
    ),
    Refusal(
        "axes of inv_freq are at odds with positions",
        ValueError,
        "(positions|inv_freq)",
        {"inv_freq": floats(2, 4), "positions": zeros(3, 3, 1, dtype=torch.int64)},
    ),
    Refusal(
        "positions lack the dimension of the axes",
        ValueError,
        "(positions|inv_freq)",
        {"inv_freq": floats(1, 4), "positions": torch.tensor(3)},
    ),
    Refusal(
        "positions of the axes do not broadcast",
        ValueError,
        "positions",
        {"inv_freq": floats(2, 4), "positions": zeros(2, 5, 1, dtype=torch.int64)},
    ),
    Refusal(
        "both inv_freq and max_wavelength",
        ValueError,
        "(max_wavelength|inv_freq)",
        {"inv_freq": floats(4), "max_wavelength": 5e5},
    ),
    Refusal(
        "both inv_freq and scale_factor",
        ValueError,
        "(scale_factor|inv_freq)",
        {"inv_freq": floats(4), "scale_factor": 2.0},
    ),
    *(
        Refusal(f"{name} is {value}", ValueError, name, {name: value})
        for name in ("max_wavelength", "scale_factor")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ),
]

OF_APPLY_COS_SIN = [
    *OF_BOTH_FAMILIES,
    *(
        Refusal(
            f"positions are {dtype}",
            TypeError,
            "positions",
            {"positions": zeros(3, 1, dtype=dtype)},
        )
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ),
    *(
        Refusal(
            f"tables are {dtype}",
            TypeError,
            "(cos|sin)",
            {"cos": zeros(9, 4, dtype=dtype), "sin": zeros(9, 4, dtype=dtype)},
        )
        for dtype in (torch.int64, torch.complex64, torch.bool)
    ),
    Refusal("tables differ in shape", ValueError, "(cos|sin)", {"sin": floats(1, 4)}),
    Refusal("tables differ in width", ValueError, "(cos|sin)", {"sin": floats(9, 3)}),
    Refusal(
        "tables differ in dtype", TypeError, "(cos|sin)", {"sin": floats(9, 4, dtype=torch.float64)}
    ),
    Refusal(
        "tables have no dimension",
        ValueError,
        "(cos|sin)",
        {"cos": floats(), "sin": floats(), "positions": None},
    ),
    Refusal(
        "tables to pick from have one dimension",
        ValueError,
        "(cos|sin)",
        {"cos": floats(4), "sin": floats(4)},
    ),
    Refusal(
        "tables to pick from have three dimensions",
        ValueError,
        "(cos|sin)",
        {"cos": floats(3, 9, 4), "sin": floats(3, 9, 4)},
    ),
    Refusal(
        "tables do not broadcast",
        ValueError,
        "(cos|sin)",
        {"cos": floats(5, 1, 4), "sin": floats(5, 1, 4), "positions": None},
    ),
    Refusal(
        "tables would expand x",
        ValueError,
        "(cos|sin)",
        {"cos": floats(5, 1, 1, 1, 4), "sin": floats(5, 1, 1, 1, 4), "positions": None},
    ),
    Refusal(
        "tables are too wide after the offset",
        ValueError,
        "(cos|sin|rotary_offset)",
        {"rotary_offset": 1},
    ),
    *(
        Refusal(
            f"tables are doubled as in Hugging Face models, {positions} positions",
            ValueError,
            "cos",
            {"cos": floats(*shape), "sin": floats(*shape), **changes},
        )
        for positions, shape, changes in (
            ("with", (9, 8), {}),
            ("without", (3, 1, 8), {"positions": None}),
        )
    ),
]


def calls(operators: tuple[str, ...], refusals: list[Refusal]) -> list[Any]:
    """Lists each refusal by each operator, and for a pair by each of its two tensors."""
    return [
        pytest.param(operator, place, refusal, id=f"{operator}-{'qk'[place]}-{refusal.name}")
        for operator in operators
        for refusal in refusals
        for place in range(2 if "_qk" in operator and "x" in refusal.changes else 1)
    ]


CALLS = calls(APPLY, OF_APPLY) + calls(APPLY_COS_SIN, OF_APPLY_COS_SIN)


def arguments_of(
    operator: str, place: int, refusal: Refusal, device: str
) -> tuple[tuple[Tensor, ...], list[Any], dict[str, Any]]:
    """Builds a call: the tensors to be rotated, the arguments by place, and the options."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    changes = {name: move(value) for name, value in refusal.changes.items()}
    tensors = [floats(2, 3, 4, 8, device=device) for _ in range(2 if "_qk" in operator else 1)]
    if "x" in changes:
        tensors[place] = changes.pop("x").clone()
    named: dict[str, Any] = {"positions": torch.arange(3, device=device)[:, None]}
    if "cos_sin" in operator:
        table = floats(9, 4, device=device)
        named = {"cos": table, "sin": table, **named}
    else:
        named["inv_freq"] = None
    named.update({name: changes.pop(name) for name in list(changes) if name in named})
    return tuple(tensors), list(named.values()), changes


@pytest.mark.parametrize("call", [through_python, through_dispatcher])
@pytest.mark.parametrize(("operator", "place", "refusal"), CALLS)
def test_a_wrong_argument_is_refused_by_name(
    device: str, operator: str, place: int, refusal: Refusal, call: Call
) -> None:
    tensors, arguments, options = arguments_of(operator, place, refusal, device)
    with pytest.raises(refusal.exception, match=refusal.pattern(operator, place)):
        call(operator, tensors, *arguments, **options)


@pytest.mark.parametrize(
    ("operator", "place", "refusal"), [case for case in CALLS if str(case.values[0]).endswith("_")]
)
def test_a_refused_call_in_place_leaves_everything_as_it_was(
    device: str, operator: str, place: int, refusal: Refusal
) -> None:
    tensors, arguments, options = arguments_of(operator, place, refusal, device)
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(refusal.exception):
        through_python(operator, tensors, *arguments, **options)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == 0


@pytest.mark.parametrize(("operator", "place", "refusal"), CALLS)
def test_meta_tensors_are_refused_alike(operator: str, place: int, refusal: Refusal) -> None:
    tensors, arguments, options = arguments_of(operator, place, refusal, "meta")
    with pytest.raises(refusal.exception, match=refusal.pattern(operator, place)):
        through_python(operator, tensors, *arguments, **options)


def test_an_odd_rotary_dim_is_refused_in_these_words(device: str) -> None:
    message = "rope::apply(): expected rotary_dim to be even, but got 7"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        torch_rope.apply(floats(3, 8, device=device), torch.tensor(1, device=device), rotary_dim=7)


@pytest.mark.parametrize("operator", APPLY_COS_SIN)
def test_doubled_tables_are_told_how_to_be_halved(device: str, operator: str) -> None:
    table = floats(3, 1, 8, device=device)
    tensors = (floats(2, 3, 4, 8, device=device), floats(2, 3, 4, 8, device=device))
    with pytest.raises(ValueError, match=r"cos\[\.\.\., :(N|4)\]"):
        through_python(operator, tensors, table, table)


def other_than(device: str) -> str:
    """Names a device that a tensor on ``device`` cannot be used with."""
    return "meta" if device == "cpu" else "cpu"


@pytest.mark.parametrize("call", [through_python, through_dispatcher])
@pytest.mark.parametrize("argument", ["positions", "inv_freq"])
@pytest.mark.parametrize("operator", APPLY)
def test_tensors_of_apply_on_another_device_are_refused(
    device: str, operator: str, argument: str, call: Call
) -> None:
    tensors = (floats(3, 8, device=device), floats(3, 8, device=device))
    named = {
        "positions": torch.arange(3, device=device),
        "inv_freq": floats(4, device=device),
    }
    named[argument] = named[argument].to(other_than(device))
    pattern = rf"(?s)^rope::{operator}\(\): expected {argument} to .+, but got .+"
    with pytest.raises(TypeError, match=pattern):
        call(operator, tensors[: 1 + ("_qk" in operator)], *named.values())


@pytest.mark.parametrize("call", [through_python, through_dispatcher])
@pytest.mark.parametrize("argument", ["cos", "sin", "positions"])
@pytest.mark.parametrize("operator", APPLY_COS_SIN)
def test_tensors_of_apply_cos_sin_on_another_device_are_refused(
    device: str, operator: str, argument: str, call: Call
) -> None:
    tensors = (floats(3, 8, device=device), floats(3, 8, device=device))
    named = {
        "cos": floats(9, 4, device=device),
        "sin": floats(9, 4, device=device),
        "positions": torch.arange(3, device=device),
    }
    named[argument] = named[argument].to(other_than(device))
    pattern = rf"(?s)^rope::{operator}\(\): expected (cos|sin|positions) to .+, but got .+"
    with pytest.raises(TypeError, match=pattern):
        call(operator, tensors[: 1 + ("_qk" in operator)], *named.values())


@pytest.mark.parametrize("operator", ["apply_qk", "apply_qk_"])
def test_k_on_another_device_than_q_is_refused(device: str, operator: str) -> None:
    q, k = floats(3, 8, device=device), floats(3, 8, device=other_than(device))
    with pytest.raises(TypeError, match=rf"^rope::{operator}\(\): expected .+ to .+, but got .+"):
        through_python(operator, (q, k), torch.arange(3, device=device))


@pytest.mark.parametrize("operator", ["apply_qk", "apply_cos_sin_qk"])
def test_positions_that_broadcast_to_q_alone_are_refused(device: str, operator: str) -> None:
    q, k = floats(2, 3, 4, 8, device=device), floats(2, 5, 4, 8, device=device)
    tables = [] if operator == "apply_qk" else [floats(9, 4, device=device)] * 2
    with pytest.raises(
        ValueError, match=rf"^rope::{operator}\(\): expected positions to .+, but got .+"
    ):
        through_python(operator, (q, k), *tables, torch.arange(3, device=device)[:, None])


def test_an_axis_that_k_alone_lacks_is_refused(device: str) -> None:
    q, k = floats(2, 3, 4, 8, device=device), floats(4, 8, device=device)
    pattern = r"^rope::apply_qk\(\): expected embedding_axis to .+, but got .*3"
    with pytest.raises(IndexError, match=pattern):
        torch_rope.apply((q, k), torch.tensor(1, device=device), embedding_axis=3)


def test_q_is_left_alone_when_k_is_refused(device: str) -> None:
    q, k = floats(3, 8, device=device), floats(3, 6, device=device)
    before = q.clone()
    with pytest.raises(ValueError, match=r"^rope::apply_qk_\(\): expected rotary_dim to"):
        torch_rope.apply_((q, k), torch.tensor(1, device=device), rotary_dim=8)
    assert_same_bits(q, before)
