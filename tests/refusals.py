"""The calls of the operators that must be refused, and how they are made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_rope
from reference import random_values
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
        edit: What is done to one argument at last: see ``edited``. Its name is that of an argument
            or ``{x}``.
        needs_values: Whether memory or its values are wrong, which tensors without memory lack.
    """

    name: str
    exception: type[Exception] | tuple[type[Exception], ...]
    argument: str
    changes: dict[str, Any]
    rule: str = ".+"
    value: str = ".+"
    edit: tuple[str, str] | None = None
    needs_values: bool = False

    @property
    def differs_in_device(self) -> bool:
        """Whether one tensor is on another device than the others."""
        return self.edit is not None and self.edit[0] == "move"

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


def other_than(device: str) -> str:
    """Names a device that a tensor on ``device`` cannot be used with."""
    return "meta" if device == "cpu" else "cpu"


def edited(edit: str, tensor: Tensor, first: Tensor) -> Tensor:
    """Returns a tensor that is wrong in a way that cannot be saved, as tests/cpp/refuse.cpp does.

    Args:
        edit: ``move`` to another device, ``expand`` the second dimension, ``shrink`` the storage by
            a byte, or take the memory of ``first``.
        tensor: The tensor as it should be.
        first: The first tensor of the call.
    """
    if edit == "move":
        return torch.zeros_like(tensor, device=other_than(tensor.device.type))
    if edit == "expand":
        return tensor[:, :1].expand_as(tensor)
    if edit == "shrink":
        tensor = tensor.clone()
        tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
        return tensor
    assert edit == "alias"
    return first.flatten()[: tensor.numel()].view(tensor.shape)


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


OF_MEMORY_IN_PLACE = [
    Refusal(
        "elements overlap",
        ValueError,
        "{x}",
        {},
        rule="have each element at its own place in memory",
        edit=("expand", "{x}"),
    ),
]

OF_MEMORY_OF_PAIRS_IN_PLACE = [
    Refusal(
        "q and k overlap", ValueError, "q and k", {}, rule="share no element", edit=("alias", "k")
    ),
]

OF_PAIRS = [
    Refusal(
        "k is on another device",
        TypeError,
        "k",
        {},
        rule="be on .+ with q",
        edit=("move", "k"),
    ),
]


def of_memory(*names: str, in_place: bool) -> list[Refusal]:
    """Lists what is wrong with the memory of these arguments, which are the angles."""
    with_first = [
        Refusal(
            f"{name} shares memory",
            ValueError,
            "[xq]",
            {},
            rule=f"share no memory with {name}",
            edit=("alias", name),
        )
        for name in names
        if name != "positions"
    ]
    return [
        *(
            Refusal(
                f"{name} is on another device",
                TypeError,
                name,
                {},
                rule="be on .+ with [xq]",
                edit=("move", name),
            )
            for name in names
        ),
        *(
            Refusal(
                f"the storage of {name} is too small",
                ValueError,
                name,
                {},
                rule="lie within its storage",
                edit=("shrink", name),
                needs_values=True,
            )
            for name in ("{x}", *names)
        ),
        *(with_first if in_place else []),
    ]


def of_one(operator: str) -> list[Refusal]:
    """Lists what depends on more than the family of an operator."""
    is_pair, in_place = "_qk" in operator, operator.endswith("_")
    names = ["cos", "sin", "positions"] if "cos_sin" in operator else ["positions", "inv_freq"]
    if "norm" in operator:
        names += ["q_weight", "k_weight"] if is_pair else ["weight"]
    refusals = of_memory(*names, in_place=in_place)
    refusals += OF_MEMORY_IN_PLACE if in_place else []
    refusals += OF_MEMORY_OF_PAIRS_IN_PLACE if in_place and is_pair else []
    refusals += OF_PAIRS if is_pair else []
    if "cos_sin" in operator:
        return [
            *refusals,
            *(
                Refusal(
                    f"a row is {row}",
                    IndexError,
                    "positions",
                    {"positions": torch.tensor([[0], [row], [8]])},
                    rule=r"be in \[0, 9\), the rows of cos and sin",
                    value=str(row),
                    needs_values=True,
                )
                for row in (-1, 9, 2**62)
            ),
        ]
    refusals.append(
        Refusal(
            "inv_freq has no row",
            ValueError,
            "inv_freq",
            {"inv_freq": floats(0, 4)},
            rule="have at least one row",
        )
    )
    if is_pair:
        differs = "slices of q and k differ"
        refusals.append(
            Refusal(differs, ValueError, "rotary_dim", {"x": floats(2, 3, 4, 6)}, value="None")
        )
    return refusals


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
    *(
        case
        for operator in (*APPLY, *APPLY_COS_SIN, *NORM_APPLY, *NORM_APPLY_COS_SIN)
        for case in calls((operator,), of_one(operator))
    ),
]


def arguments_of(
    operator: str, place: int, refusal: Refusal, device: str, *, edit: bool = True
) -> tuple[tuple[Tensor, ...], list[Any], dict[str, Any]]:
    """Builds a call: the tensors to be rotated, the arguments by place, and the options."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    def needed(name: str) -> bool:
        return refusal.edit is not None and refusal.edit[1] == name

    changes = {name: move(value) for name, value in refusal.changes.items()}
    tensors = [floats(2, 3, 4, 8, device=device) for _ in range(2 if "_qk" in operator else 1)]
    if "x" in changes:
        tensors[place] = changes.pop("x").clone()
    named: dict[str, Any] = {"positions": torch.arange(3, device=device)[:, None]}
    if "cos_sin" in operator:
        table = floats(9, 4, device=device)
        named = {"cos": table, "sin": table, **named}
    else:
        named["inv_freq"] = floats(4, device=device) if needed("inv_freq") else None
    if "norm" in operator:
        weight = changes.pop("weight", None)
        if any(map(needed, ("weight", "q_weight", "k_weight"))):
            weight = floats(8, device=device)
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
    if refusal.edit is not None and edit:
        kind, name = refusal.edit
        place_of_k = 1 if name == "k" else place
        if name in ("{x}", "k"):
            tensors[place_of_k] = edited(kind, tensors[place_of_k], tensors[0])
        else:
            named[name] = edited(kind, named[name], tensors[0])
    return tuple(tensors), list(named.values()), changes
