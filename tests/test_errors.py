"""Every refusal: its type, and a message that names the operator, argument, rule and value."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor

APPLY = ("apply", "apply_", "apply_qk", "apply_qk_")
APPLY_COS_SIN = ("apply_cos_sin", "apply_cos_sin_", "apply_cos_sin_qk", "apply_cos_sin_qk_")
NORM_APPLY = tuple(f"norm_{name}" for name in APPLY)
NORM_APPLY_COS_SIN = tuple(f"norm_{name}" for name in APPLY_COS_SIN)

Call = Callable[..., Any]


def through_python(
    operator: str, tensors: tuple[Tensor, ...], *arguments: Any, **options: Any
) -> None:
    """Calls an operator through ``torch_rope``."""
    function: Call = getattr(torch_rope, operator.replace("_qk", ""))
    if "_qk" not in operator:
        function(tensors[0], *arguments, **options)
    elif "norm" in operator:
        function(tensors, arguments[:2], *arguments[2:], **options)
    else:
        function(tensors, *arguments, **options)


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
        argument: A pattern of the argument that is named; ``{x}`` stands for x, q or k, and
            ``{weight}`` for weight, q_weight or k_weight.
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
        x = "qk"[place] if "_qk" in operator else "x"
        weight = f"{x}_weight" if "_qk" in operator else "weight"
        argument = self.argument.format(x=x, weight=weight)
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
    *(
        Refusal(
            f"attention_factor is {value}",
            ValueError,
            "attention_factor",
            {"attention_factor": value},
            rule="be finite",
        )
        for value in (float("inf"), -float("inf"), float("nan"))
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
    Refusal(
        "full-width tables are too wide",
        ValueError,
        "cos",
        {"cos": floats(9, 10), "sin": floats(9, 10), "full_width": True},
        rule="have at most 8 columns.*",
        value="10",
    ),
    Refusal(
        "full-width tables have an odd number of columns",
        ValueError,
        "cos",
        {"cos": floats(9, 7), "sin": floats(9, 7), "full_width": True},
        rule="have an even number of columns.*",
        value="7",
    ),
    *(
        Refusal(
            f"rotary_dim is {dim} for {columns} columns, {full_width=}",
            ValueError,
            "rotary_dim",
            {
                "cos": floats(9, columns),
                "sin": floats(9, columns),
                "full_width": full_width,
                "rotary_dim": dim,
            },
            rule=f"be {columns if full_width else 2 * columns}, .*",
            value=f"{dim}",
        )
        for columns, dim, full_width in (
            (4, 6, False),
            (4, 7, False),
            (4, 0, False),
            (4, -8, False),
            (0, 2, False),
            (4, 2**63 - 1, False),
            (8, 16, True),
            (4, 8, True),
            (8, 0, True),
        )
    ),
    *(
        Refusal(
            f"tables are doubled, with a rotary_dim, {positions} positions",
            ValueError,
            "rotary_dim",
            {"cos": floats(*shape), "sin": floats(*shape), "rotary_dim": 8, **changes},
            value=r"8 \(.*full_width=True\)",
        )
        for positions, shape, changes in (
            ("with", (9, 8), {}),
            ("without", (3, 1, 8), {"positions": None}),
        )
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


OF_NORMS = [
    *(
        Refusal(f"eps is {value}", ValueError, "eps", {"eps": value}, rule=".*finite.*")
        for value in (-1e-6, float("inf"), float("nan"), -float("inf"))
    ),
    *(
        Refusal(
            f"weight_offset is {value}",
            ValueError,
            "weight_offset",
            {"weight_offset": value},
            rule="be finite",
        )
        for value in (float("inf"), -float("inf"), float("nan"))
    ),
    *(
        Refusal(f"weight is {dtype}", TypeError, "{weight}", {"weight": zeros(8, dtype=dtype)})
        for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn)
    ),
    *(
        Refusal(f"weight has the shape {shape}", ValueError, "{weight}", {"weight": floats(*shape)})
        for shape in (
            (),
            (1,),
            (4,),
            (9,),
            (0,),
            (4, 1),
            (3, 8),
            (8, 4),
            (2, 1, 8),
            (5, 1, 1, 8),
            (1, 2, 3, 4, 8),
            (5, 2, 3, 4, 8),
        )
    ),
    *(
        Refusal(f"norm_axes are {axes}", IndexError, "norm_axes", {"norm_axes": axes})
        for axes in ((4, -1), (-5, -1), (-1, 2**63 - 1), (-(2**63), -1))
    ),
    *(
        Refusal(f"norm_axes are {axes}", ValueError, "norm_axes", {"norm_axes": axes})
        for axes in ((), (0,), (-2, 1), (-1, -1), (3, -1), (2, -2, -1))
    ),
    Refusal(
        "norm_axes lack the embedding axis",
        ValueError,
        "norm_axes",
        {"embedding_axis": 1, "norm_axes": (2, 3), "rotary_dim": 2, "positions": torch.tensor(1)},
        rule="contain embedding_axis, 1",
    ),
]


def calls(operators: tuple[str, ...], refusals: list[Refusal]) -> list[Any]:
    """Lists each refusal by each operator, and for a pair by each of its two tensors."""
    return [
        pytest.param(operator, place, refusal, id=f"{operator}-{'qk'[place]}-{refusal.name}")
        for operator in operators
        for refusal in refusals
        for place in range(2 if "_qk" in operator and {"x", "weight"} & set(refusal.changes) else 1)
    ]


CALLS = [
    *calls(APPLY, OF_APPLY),
    *calls(APPLY_COS_SIN, OF_APPLY_COS_SIN),
    *calls(NORM_APPLY, OF_APPLY),
    *calls(NORM_APPLY_COS_SIN, OF_APPLY_COS_SIN),
    *calls(NORM_APPLY, OF_NORMS),
    # By tables, rotary_dim is that of the tables.
    *calls(NORM_APPLY_COS_SIN, [one for one in OF_NORMS if "rotary_dim" not in one.changes]),
]


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
    if "norm" in operator:
        weight = changes.pop("weight", None)
        if "_qk" not in operator:
            weights = {"weight": weight}
        else:
            good = floats(4, 8, device=device)
            weights = {
                name: weight if index == place or weight is None else good
                for index, name in enumerate(("q_weight", "k_weight"))
            }
        named = {**weights, **named}
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
    for hint in (r"cos\[\.\.\., :N\]", "full_width=True"):
        with pytest.raises(ValueError, match=hint):
            through_python(operator, tensors, table, table)


ONE_TUPLE = re.escape("(q and k go in one tuple: apply((q, k), positions))")
ONE_TUPLE_OF_TABLES = re.escape("(q and k go in one tuple: apply_cos_sin((q, k), cos, sin))")


@pytest.mark.parametrize("k_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_and_k_one_after_the_other_are_told_how_to_be_given(
    device: str, dtype: torch.dtype, k_heads: int
) -> None:
    q = floats(2, 3, 4, 8, dtype=dtype, device=device)
    k = floats(2, 3, k_heads, 8, dtype=dtype, device=device)
    positions = torch.arange(3, device=device)[:, None]
    for arguments in ((q, k, positions), (q, k), (q, k, positions.float())):
        with pytest.raises((TypeError, ValueError), match=ONE_TUPLE):
            torch_rope.apply(*arguments)
    cos, sin = floats(3, 1, 4, dtype=dtype, device=device), floats(3, 1, 4, device=device)
    for tables in ((cos, sin), (cos, cos), (cos[:, 0], cos[:, 0])):
        with pytest.raises((TypeError, ValueError), match=ONE_TUPLE_OF_TABLES):
            torch_rope.apply_cos_sin(q, k, *tables)
    with pytest.raises(TypeError, match=re.escape("apply_((q, k), positions)")):
        torch_rope.apply_(q, k, positions)


def test_calls_of_another_fault_get_no_advice_on_q_and_k(device: str) -> None:
    x = floats(2, 3, 4, 8, device=device)
    for function, arguments in (
        (torch_rope.apply, (x, torch.zeros(2, 3, 4, 8, dtype=torch.int64, device=device))),
        (torch_rope.apply, (x, floats(5, 1, device=device))),
        (torch_rope.apply_cos_sin, (x, x, floats(1, 3, 4, 8, device=device))),
    ):
        with pytest.raises(ValueError, match=r"^((?!one tuple).)*$"):
            function(*arguments)


@pytest.mark.parametrize(
    ("shape", "positions", "advice"),
    [
        ((2, 5, 4, 8), (5,), "-1"),
        ((2, 5, 4, 8), (2, 5), "-1"),
        ((2, 4, 5, 8), (2, 5), "-2"),
        ((3, 2, 4, 8), (3, 4), "-2"),
        ((2, 5, 4, 8), (3,), None),
        ((5, 8), (5, 1), None),
    ],
    ids=str,
)
def test_a_missing_dimension_is_named(
    device: str, shape: tuple[int, ...], positions: tuple[int, ...], advice: str | None
) -> None:
    x = floats(*shape, device=device)
    misfit = zeros(*positions, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="expected positions to be broadcastable") as caught:
        torch_rope.apply(x, misfit)
    assert ("unsqueeze" in str(caught.value)) == (advice is not None)
    table = floats(*positions, 4, device=device)
    with pytest.raises(ValueError, match="expected cos to be broadcastable") as caught_of_tables:
        torch_rope.apply_cos_sin(x, table, table)
    if advice is not None:
        assert f"(positions.unsqueeze({advice}) would be)" in str(caught.value)
        torch_rope.apply(x, misfit.unsqueeze(int(advice)))
        place = int(advice) - 1
        expected = f"(cos.unsqueeze({place}) and sin.unsqueeze({place}) would be)"
        assert expected in str(caught_of_tables.value)
        torch_rope.apply_cos_sin(x, table.unsqueeze(place), table.unsqueeze(place))


def test_a_missing_dimension_is_named_behind_the_axes(device: str) -> None:
    x = floats(2, 5, 4, 8, device=device)
    with pytest.raises(ValueError, match=re.escape("(positions.unsqueeze(-1) would be)")):
        torch_rope.apply(
            x, zeros(3, 2, 5, dtype=torch.int64, device=device), floats(3, 4, device=device)
        )


def test_complex_tables_are_told_how_to_be_given(device: str) -> None:
    x, table = floats(2, 3, 4, 8, device=device), zeros(3, 1, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"complex64 .*\.real.*\.imag.*interleaved=True"):
        torch_rope.apply_cos_sin(x, table.to(device), table.to(device))


GOOD = {"x": floats(3, 8), "positions": torch.arange(3), "inv_freq": None}
TABLES = {"x": floats(3, 8), "cos": floats(3, 4), "sin": floats(3, 4), "positions": None}


class Anything:
    """No type that an operator takes."""


NO_TENSORS: list[Any] = [3, 2.5, [1, 2], range(3), np.arange(3), "3", Anything()]


@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize(
    ("function", "argument"),
    [("apply", name) for name in GOOD] + [("apply_cos_sin", name) for name in TABLES],
)
def test_what_is_no_tensor_is_refused_by_name_and_type(
    function: str, argument: str, in_place: str, value: Any
) -> None:
    arguments = dict(GOOD if function == "apply" else TABLES)
    arguments[argument] = value
    optional = argument == "inv_freq" or (function == "apply_cos_sin" and argument == "positions")
    rule = "be a tensor or a (q, k) tuple" if argument == "x" else "be a tensor"
    rule += " or None" if optional else ""
    got = type(value).__name__ if not isinstance(value, np.ndarray) else "numpy.ndarray"
    message = f"rope::{function}{in_place}(): expected {argument} to {rule}, but got {got}"
    if argument == "x" and isinstance(value, list):  # a pair, of integers
        message = f"rope::{function}_qk{in_place}(): expected q to be a tensor, but got int"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        getattr(torch_rope, function + in_place)(*arguments.values())


@pytest.mark.parametrize("function", ["apply", "apply_", "apply_cos_sin", "apply_cos_sin_"])
def test_none_is_refused_where_a_tensor_is_needed(function: str) -> None:
    arguments = dict(TABLES if "cos_sin" in function else GOOD)
    for name in ("x", "cos" if "cos_sin" in function else "positions"):
        with pytest.raises(TypeError, match=rf"expected {name} to be a tensor.*, but got None"):
            getattr(torch_rope, function)(*{**arguments, name: None}.values())


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("embedding_axis", (-1,), "be an integer"),
        ("embedding_axis", None, "be an integer"),
        ("embedding_axis", -1.0, "be an integer"),
        ("rotary_dim", 4.0, "be an integer or None"),
        ("rotary_dim", "4", "be an integer or None"),
        ("rotary_dim", 2**63, "be an integer or None"),
        ("embedding_axis", -(2**64), "be an integer"),
        ("rotary_offset", 0.5, "be an integer"),
        ("max_wavelength", "1e5", "be a number"),
        ("max_wavelength", None, "be a number"),
        ("scale_factor", [1.0], "be a number"),
        ("attention_factor", "big", "be a number"),
        ("interleaved", "neox", "be a bool"),
        ("interleaved", None, "be a bool"),
        ("conjugate", torch.tensor(True), "be a bool"),
        ("full_width", "yes", "be a bool"),
    ],
    ids=str,
)
def test_an_option_of_another_type_is_refused_by_name_and_type(
    option: str, value: Any, rule: str
) -> None:
    got = "None" if value is None else type(value).__name__
    got = "one beyond 64 bits" if isinstance(value, int) else got
    of_angles = ("max_wavelength", "scale_factor", "attention_factor")
    for function, arguments in (("apply", GOOD), ("apply_cos_sin", TABLES)):
        if option in (("full_width",) if function == "apply" else of_angles):
            continue
        message = f"rope::{function}(): expected {option} to {rule}, but got {got}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            getattr(torch_rope, function)(*arguments.values(), **{option: value})


def test_options_of_numpy_and_of_one_element_are_taken() -> None:
    x, positions = floats(3, 8), torch.arange(3)
    expected = torch_rope.apply(x, positions, rotary_dim=4, max_wavelength=500.0, interleaved=True)
    options = {"rotary_dim": np.int64(4), "max_wavelength": np.float32(500), "interleaved": 1}
    assert_same_bits(torch_rope.apply(x, positions, **options), expected)


def test_a_wrong_argument_is_told_without_the_values_of_tensors() -> None:
    x = floats(2, 1024, 8, 64)
    with pytest.raises(TypeError) as caught:
        torch_rope.apply((x, x), [1])
    assert len(str(caught.value)) < 150


def test_the_base_given_as_inv_freq_is_told_where_it_goes() -> None:
    with pytest.raises(TypeError, match="max_wavelength="):
        torch_rope.apply(floats(3, 8), torch.arange(3), 500000.0)


@pytest.mark.parametrize("function", ["apply", "apply_", "apply_cos_sin", "apply_cos_sin_"])
@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_pair_has_two_tensors(function: str, kind: type, length: int) -> None:
    arguments = list((TABLES if "cos_sin" in function else GOOD).values())[1:]
    message = (
        f"rope::{function}(): expected x to be a tensor or a (q, k) tuple of two tensors, but got "
        f"a {kind.__name__} of {length}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        getattr(torch_rope, function)(kind([floats(3, 8)] * length), *arguments)


@pytest.mark.parametrize("x", [{"q": 1}, "qk", None, 3, {1, 2}], ids=str)
def test_what_is_neither_a_tensor_nor_a_pair_is_refused(x: Any) -> None:
    got = "None" if x is None else type(x).__name__
    message = f"rope::apply(): expected x to be a tensor or a (q, k) tuple, but got {got}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        torch_rope.apply(x, torch.arange(3))


def test_what_goes_with_a_subclass_is_refused_alike() -> None:
    class Subclass(Tensor):
        pass

    x = floats(3, 8).as_subclass(Subclass)
    with pytest.raises(
        TypeError, match=r"^rope::apply\(\): expected positions to be a tensor, but got"
    ):
        torch_rope.apply(x, 3)
    with pytest.raises(
        TypeError, match=r"^rope::apply_qk_\(\): expected k to be a tensor, but got int"
    ):
        torch_rope.apply_((x, 3), torch.arange(3))
    with pytest.raises(TypeError, match=r"expected sin to be a tensor, but got list"):
        torch_rope.apply_cos_sin(x, floats(3, 4), [1.0])


def test_a_wrong_member_of_a_pair_is_named() -> None:
    with pytest.raises(TypeError, match=r"^rope::apply_qk\(\): expected k to be a tensor, but got"):
        torch_rope.apply((floats(3, 8), 3), torch.arange(3))


@pytest.mark.parametrize("operator", [*APPLY, *APPLY_COS_SIN, *NORM_APPLY, *NORM_APPLY_COS_SIN])
def test_a_storage_that_is_too_small_is_refused(operator: str) -> None:
    """A storage may be resized under a tensor; FSDP frees parameters so."""

    def emptied(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy.untyped_storage().resize_(copy.untyped_storage().nbytes() - 1)
        return copy

    tensors = [floats(3, 8), floats(3, 8)][: 1 + ("_qk" in operator)]
    arguments = [floats(9, 4), floats(9, 4), torch.arange(3)]
    names = ["cos", "sin", "positions"]
    if "cos_sin" not in operator:
        arguments, names = [torch.arange(3), floats(4)], ["positions", "inv_freq"]
    if "norm" in operator:
        weights = ["q_weight", "k_weight"] if "_qk" in operator else ["weight"]
        arguments, names = [*(floats(8) for _ in weights), *arguments], weights + names
    names = ["qk"[i] if "_qk" in operator else "x" for i in range(len(tensors))] + names
    everything = [*tensors, *arguments]
    for place, name in enumerate(names):
        call = [emptied(one) if i == place else one for i, one in enumerate(everything)]
        message = rf"^rope::{operator}\(\): expected {name} to lie within its storage, but got"
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.rope, operator)(*call)


@pytest.mark.parametrize("suffix", ["", "_", "_qk", "_qk_", "_composed"])
@pytest.mark.parametrize("family", ["apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_strided_nested_tensors_are_refused_alike(
    family: str, suffix: str, requires_grad: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The layout is a prototype.
        nested = torch.nested.nested_tensor(
            [floats(2, 8), floats(3, 8)], requires_grad=requires_grad
        )
    angles = (floats(1, 4), floats(1, 4)) if "cos_sin" in family else (torch.arange(1),)
    tensors = (nested, nested) if "_qk" in suffix else (nested,)
    arguments = (*((None,) * len(tensors) if "norm" in family else ()), *angles)
    message = "expected nested tensors to have the layout torch.jagged, but got torch.strided"
    with pytest.raises(NotImplementedError, match=message):
        getattr(torch.ops.rope, family + suffix)(*tensors, *arguments)


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


# --------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize("call", [through_python, through_dispatcher])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("operator", [*NORM_APPLY, *NORM_APPLY_COS_SIN])
def test_a_weight_on_another_device_is_refused(
    device: str, operator: str, place: int, call: Call
) -> None:
    is_pair = "_qk" in operator
    tensors = (floats(3, 8, device=device), floats(3, 8, device=device))
    weights = [floats(8, device=device), floats(8, device=device)]
    weights[place if is_pair else 0] = floats(8, device=other_than(device))
    name = ("q_weight", "k_weight")[place] if is_pair else "weight"
    angles = [torch.arange(3, device=device)]
    if "cos_sin" in operator:
        angles = [floats(3, 4, device=device), floats(3, 4, device=device)]
    pattern = rf"(?s)^rope::{operator}\(\): expected {name} to be on .+, but got .+"
    count = 1 + is_pair
    with pytest.raises(TypeError, match=pattern):
        call(operator, tensors[:count], *weights[:count], *angles)


@pytest.mark.parametrize("operator", ["norm_apply_qk", "norm_apply_cos_sin_qk_"])
def test_norm_axes_that_k_alone_lacks_are_refused(device: str, operator: str) -> None:
    q, k = floats(2, 3, 4, 8, device=device), floats(4, 8, device=device)
    angles = [torch.tensor(1, device=device)]
    if "cos_sin" in operator:
        angles = [floats(4, device=device), floats(4, device=device)]
    before = q.clone()
    for axes in ((-3, -1), (-1, 2)):
        pattern = rf"^rope::{operator}\(\): expected norm_axes to be in \[-2, 1\] .* k, but got .*"
        with pytest.raises(IndexError, match=pattern):
            through_python(operator, (q, k), None, None, *angles, norm_axes=axes)
    # Of q these are two dimensions, of k one.
    with pytest.raises(ValueError, match="expected norm_axes to be distinct dimensions of k"):
        through_python(operator, (q, k), None, None, *angles, norm_axes=(1, -1))
    assert_same_bits(q, before)


def test_a_weight_without_an_offset_needs_no_weight(device: str) -> None:
    # Without a weight nothing multiplies, and the offset is not looked at; only its finiteness is.
    x, positions = floats(3, 8, device=device), torch.arange(3, device=device)
    expected = torch_rope.norm_apply(x, None, positions)
    assert_same_bits(torch_rope.norm_apply(x, None, positions, weight_offset=3.0), expected)


GOOD_NORM = {"x": floats(3, 8), "weight": floats(8), "positions": torch.arange(3), "inv_freq": None}
GOOD_NORM_TABLES = {"x": floats(3, 8), "weight": None, **{k: TABLES[k] for k in TABLES if k != "x"}}


@pytest.mark.parametrize("value", NO_TENSORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize(
    ("function", "argument"),
    [("norm_apply", name) for name in GOOD_NORM]
    + [("norm_apply_cos_sin", name) for name in GOOD_NORM_TABLES],
)
def test_what_is_no_tensor_is_refused_by_norms(
    function: str, argument: str, in_place: str, value: Any
) -> None:
    arguments = dict(GOOD_NORM if function == "norm_apply" else GOOD_NORM_TABLES)
    arguments[argument] = value
    if argument == "x" and isinstance(value, list):
        arguments["weight"] = None
    name, got = f"rope::{function}{in_place}", kind(value)
    expected = f"{name}(): expected {argument} to be a tensor"
    if argument == "x" and isinstance(value, list):  # a pair, of integers
        expected = f"rope::{function}_qk{in_place}(): expected q to be a tensor"
        got = "int"
    with pytest.raises(TypeError, match=rf"^{re.escape(expected)}.*, but got {re.escape(got)}"):
        getattr(torch_rope, function + in_place)(*arguments.values())


def kind(value: Any) -> str:
    """Names a type as messages do."""
    return "numpy.ndarray" if isinstance(value, np.ndarray) else type(value).__name__


@pytest.mark.parametrize(
    "weight", [floats(8), (floats(8),), [floats(8)] * 3, (), 3, {}], ids=lambda w: kind(w)
)
@pytest.mark.parametrize(
    "function", ["norm_apply", "norm_apply_", "norm_apply_cos_sin", "norm_apply_cos_sin_"]
)
def test_a_pair_has_two_weights_or_none(function: str, weight: Any) -> None:
    angles = (floats(3, 4), floats(3, 4)) if "cos_sin" in function else (torch.arange(3),)
    operator = f"{function.removesuffix('_')}_qk{'_' if function[-1] == '_' else ''}"
    message = (
        rf"^rope::{operator}\(\): expected weight to be a \(q_weight, k_weight\) tuple or None"
    )
    with pytest.raises(TypeError, match=message):
        getattr(torch_rope, function)((floats(3, 8), floats(3, 8)), weight, *angles)


@pytest.mark.parametrize("weights", [(None, 3), ("w", None)], ids=str)
def test_a_wrong_weight_of_a_pair_is_named(weights: Any) -> None:
    name = "k_weight" if weights[0] is None else "q_weight"
    with pytest.raises(
        TypeError, match=rf"^rope::norm_apply_qk\(\): expected {name} to be a tensor"
    ):
        torch_rope.norm_apply((floats(3, 8), floats(3, 8)), weights, torch.arange(3))


@pytest.mark.parametrize("weight", [(floats(8), floats(8)), [None, None]], ids=["tuple", "list"])
def test_one_tensor_has_one_weight(weight: Any) -> None:
    with pytest.raises(TypeError, match=r"^rope::norm_apply\(\): expected weight to be a tensor"):
        torch_rope.norm_apply(floats(3, 8), weight, torch.arange(3))


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("eps", "small", "be a number"),
        ("eps", None, "be a number"),
        ("weight_offset", [1.0], "be a number"),
        ("norm_last", "yes", "be a bool"),
        ("norm_last", None, "be a bool"),
        ("norm_axes", -1, "be a sequence of integers"),
        ("norm_axes", "-1", "be a sequence of integers"),
        ("norm_axes", (-1.0,), "be a sequence of integers"),
        ("norm_axes", (-1, None), "be a sequence of integers"),
        ("norm_axes", {-1}, "be a sequence of integers"),
    ],
    ids=str,
)
def test_an_option_of_norms_of_another_type_is_refused(option: str, value: Any, rule: str) -> None:
    for function, arguments in (
        ("norm_apply", GOOD_NORM),
        ("norm_apply_cos_sin", GOOD_NORM_TABLES),
    ):
        message = rf"^rope::{function}\(\): expected {option} to {rule}.*, but got "
        with pytest.raises(TypeError, match=message):
            getattr(torch_rope, function)(*arguments.values(), **{option: value})


@pytest.mark.parametrize("axes", [[0, 1], (np.int64(0), -1), torch.Size([0, 1])], ids=kind)
def test_norm_axes_are_any_sequence_of_integers(axes: Any) -> None:
    x, positions = floats(3, 8), torch.arange(3)
    expected = torch_rope.norm_apply(x, None, positions, norm_axes=(0, 1))
    assert_same_bits(torch_rope.norm_apply(x, None, positions, norm_axes=axes), expected)


def test_a_pair_of_norms_is_not_given_one_after_the_other() -> None:
    q, weight = floats(2, 3, 4, 8), floats(8)
    with pytest.raises((TypeError, ValueError), match=r"expected \w+ to"):
        torch_rope.norm_apply(q, q, torch.arange(3)[:, None], weight)
