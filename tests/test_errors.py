"""Every refusal: its type, and a message that names the operator, argument, rule and value."""

import logging
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch_rope
from reference import assert_same_bits
from refusals import (
    APPLY_COS_SIN,
    CALLS,
    Call,
    Refusal,
    arguments_of,
    floats,
    through_dispatcher,
    through_python,
    zeros,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


WITHOUT_VALUES = [case for case in CALLS if not case.values[2].needs_values]


def refused(call: Call, operator: str, made: tuple[Any, ...]) -> tuple[type[Exception], str]:
    """Returns the type and the text of what a call raises; ``made`` is from ``arguments_of``."""
    tensors, arguments, options = made
    try:
        call(operator, tensors, *arguments, **options)
    except Exception as error:
        return type(error), str(error)
    pytest.fail("the call was accepted")


@pytest.mark.parametrize(("operator", "place", "refusal"), CALLS)
def test_a_wrong_argument_is_refused_by_name_and_alike_in_every_form(
    device: str, operator: str, place: int, refusal: Refusal
) -> None:
    if device == "cuda" and refusal.exception is IndexError and refusal.needs_values:
        pytest.skip("a row that does not exist trips an assertion on the device")
    made = arguments_of(operator, place, refusal, device)
    tensors, arguments, options = made
    with pytest.raises(refusal.exception, match=refusal.pattern(operator, place)) as caught:
        through_python(operator, tensors, *arguments, **options)
    text = str(caught.value)
    assert refused(through_dispatcher, operator, made) == (caught.type, text)
    # The interpreter turns every exception into its own, which ends in the text.
    kind, of_script = refused(through_script, operator, made)
    assert issubclass(kind, RuntimeError)
    assert of_script.rstrip().endswith(f"Error: {text}")
    if not refusal.needs_values:
        of_meta = refused(
            through_dispatcher, operator, arguments_of(operator, place, refusal, "meta")
        )
        if refusal.differs_in_device:
            assert of_meta[0] is caught.type
            assert re.match(refusal.pattern(operator, place), of_meta[1])
        else:
            assert of_meta == (caught.type, text)


@pytest.mark.parametrize(
    ("operator", "place", "refusal"),
    [case for case in WITHOUT_VALUES if str(case.values[0]).endswith("_")],
)
def test_a_refused_call_in_place_leaves_everything_as_it_was(
    device: str, operator: str, place: int, refusal: Refusal
) -> None:
    tensors, arguments, options = arguments_of(operator, place, refusal, device)
    before = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    with pytest.raises(refusal.exception):
        through_python(operator, tensors, *arguments, **options)
    for tensor, copy in zip(tensors, before, strict=True):
        assert tensor.is_meta or torch.equal(tensor, copy)
    assert [tensor._version for tensor in tensors] == versions


@pytest.fixture(scope="module")
def fake_mode() -> Iterator[FakeTensorMode]:
    """A mode that does not log what its operators raise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield FakeTensorMode()
    logger.setLevel(level)


# Each refusal once in each family, whose forms share the Meta kernel. All tensors are on meta when
# that is called: it cannot see that devices differ.
FAKE = {
    (case.values[0].removesuffix("_").removesuffix("_qk"), case.values[2].name): case
    for case in WITHOUT_VALUES
    if not case.values[2].differs_in_device
}


@pytest.mark.parametrize(("operator", "place", "refusal"), FAKE.values())
def test_fake_tensors_are_refused_alike(
    operator: str, place: int, refusal: Refusal, fake_mode: FakeTensorMode
) -> None:
    def fake(value: Any) -> Any:
        return fake_mode.from_tensor(value) if isinstance(value, Tensor) else value

    tensors, arguments, options = made = arguments_of(operator, place, refusal, "cpu")
    fakes = tuple(map(fake, tensors)), list(map(fake, arguments)), options
    with fake_mode:
        raised = refused(through_dispatcher, operator, fakes)
    assert raised == refused(through_dispatcher, operator, made)


@cache
def scripted(operator: str) -> tuple[Call, list[str], dict[str, Any]]:
    """Compiles a call of an operator; returns it, the names of its tensors, and its defaults."""
    arguments = getattr(torch.ops.rope, operator).default._schema.arguments
    parameters = ", ".join(f"{each.name}: {each.type.annotation_str}" for each in arguments)
    given = ", ".join(f"{each.name}={each.name}" for each in arguments)
    source = f"def call({parameters}):\n    return torch.ops.rope.{operator}({given})\n"
    tensors = [each.name for each in arguments if not each.kwarg_only]
    defaults = {each.name: each.default_value for each in arguments if each.kwarg_only}
    return torch.jit.CompilationUnit(source).call, tensors, defaults


def through_script(
    operator: str, tensors: tuple[Tensor, ...], *arguments: Any, **options: Any
) -> None:
    """Calls an operator through TorchScript."""
    function, names, defaults = scripted(operator)
    named = dict(zip(names, (*tensors, *arguments), strict=False))
    function(**{**dict.fromkeys(names), **named, **defaults, **options})


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
        ("norm_axes", [-1.0], "be a sequence of integers or None, but got a list with float"),
        ("norm_axes", (-1, None), "be a sequence of integers or None, but got a tuple with None"),
        ("norm_axes", [2**63], ".*, but got a list with one beyond 64 bits"),
        ("norm_axes", {-1}, "be a sequence of integers"),
        ("eps", 10**400, "be a number, but got one beyond float64"),
    ],
    ids=str,
)
def test_an_option_of_norms_of_another_type_is_refused(option: str, value: Any, rule: str) -> None:
    for function, arguments in (
        ("norm_apply", GOOD_NORM),
        ("norm_apply_cos_sin", GOOD_NORM_TABLES),
    ):
        but_got = "" if "but got" in rule else ".*, but got "
        message = rf"^rope::{function}\(\): expected {option} to {rule}{but_got}"
        with pytest.raises(TypeError, match=message):
            getattr(torch_rope, function)(*arguments.values(), **{option: value})


@pytest.mark.parametrize("axes", [[0, 1], (np.int64(0), -1), torch.Size([0, 1])], ids=kind)
def test_norm_axes_are_any_sequence_of_integers(axes: Any) -> None:
    x, positions = floats(3, 8), torch.arange(3)
    expected = torch_rope.norm_apply(x, None, positions, norm_axes=(0, 1))
    assert_same_bits(torch_rope.norm_apply(x, None, positions, norm_axes=axes), expected)


@pytest.mark.parametrize("in_place", ["", "_"])
def test_a_pair_of_norms_is_not_given_one_after_the_other(device: str, in_place: str) -> None:
    q, k = floats(2, 3, 4, 8, device=device), floats(2, 3, 2, 8, device=device)
    weight, positions = floats(8, device=device), torch.arange(3, device=device)[:, None]
    cos = floats(3, 1, 4, device=device)
    for function, arguments, rest in (
        ("norm_apply", (q, k, positions), (positions,)),
        ("norm_apply", (q, weight, k), (positions,)),
        ("norm_apply_cos_sin", (q, k, cos, cos), (cos, cos)),
        ("norm_apply_cos_sin", (q, weight, k, cos, cos), (cos, cos)),
    ):
        function += in_place
        names = "cos, sin" if "cos" in function else "positions"
        advice = f"{function}((q, k), (q_weight, k_weight), {names})"
        with pytest.raises((TypeError, ValueError), match=re.escape(f"one tuple: {advice})")):
            getattr(torch_rope, function)(*arguments)
        getattr(torch_rope, function)((q.clone(), k.clone()), (weight, weight), *rest)


def test_a_weight_of_another_shape_is_told_which_fits(device: str) -> None:
    x, positions = floats(2, 4, 3, 8, device=device), torch.arange(3, device=device)  # (B, H, S, D)
    for weight, axes, hint in (
        (floats(4, 8), None, r"\(weight.unsqueeze\(-2\) would be\)$"),
        (floats(4, 8), (-2, -1), r"\(weight.unsqueeze\(-2\) would be; .* norm_axes=\(-3, -1\)\)$"),
        (floats(32), (-3, -1), r"weight.view\(-1, 1, 8\) for \(B, H, S, D\)\)$"),
        (floats(5, 8), None, r"but got \[5, 8\]$"),
        (floats(32), None, r"but got \[32\]$"),
        (floats(4, 1, 1, 8), None, r"but got \[4, 1, 1, 8\]$"),  # No k: another batch.
    ):
        with pytest.raises(ValueError, match=hint):
            torch_rope.norm_apply(x, weight.to(device), positions, norm_axes=axes)
    for weight, axes in (
        (floats(4, 8).unsqueeze(-2), (-3, -1)),
        (floats(32).view(-1, 1, 8), (-3, -1)),
    ):
        torch_rope.norm_apply(x, weight.to(device), positions, norm_axes=axes)
