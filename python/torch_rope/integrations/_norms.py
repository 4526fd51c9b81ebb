"""Recognizes classes of RMSNorm by what they compute."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]


class UnknownFormError(Exception):
    """The operators cannot express a function, a norm or a forward; the message has the reason."""


@dataclass(frozen=True)
class NormForm:
    """What a class of norms computes.

    Attributes:
        eps: The name of the attribute with epsilon.
        weight_offset: What is added to the weight.
        keeps_dtype: Whether the result has the dtype of the input, instead of the promoted dtype of
            the input and the weight.
        forward: The forward that computes it.
        defaults: The attributes that may change the formula, with the values that give this one.
    """

    eps: str
    weight_offset: float
    keeps_dtype: bool
    forward: Function
    defaults: tuple[tuple[str, object], ...] = ()


# The forms of the recognized classes, by class and by whether an instance has a weight.
forms: dict[tuple[type[nn.Module], bool], NormForm] = {}

_EPSILONS = ("eps", "variance_epsilon", "epsilon")

# The option without which an instance has no weight.
_SCALE = "with_scale"

# The options of a class that do not change the formula.
_OPTIONS = (*_EPSILONS, _SCALE, "elementwise_affine", "device", "dtype")

_SIZE = 8

# Epsilon, and the scale of the weights, of each trial.
_TRIALS = ((0.5, 1.0), (1e-6, 1e3))

# The scales of the rows of a trial: epsilon is all that counts in some, and nothing in others.
_SCALES = (1.0, 1.0, 0.0, 1e-6, 1e-3, 1e3, 1e6)


def recognize(norm: type[nn.Module]) -> None:
    """Adds a class to the recognized ones.

    Args:
        norm: The class.

    Raises:
        UnknownFormError: If the operators cannot express it.
    """
    if any(kind is norm and form.forward is norm.forward for (kind, _), form in forms.items()):
        return
    parameters = list(inspect.signature(norm).parameters)
    with (
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        variants = [{_SCALE: True}, {_SCALE: False}] if _SCALE in parameters else [{}]
        found = dict(_find(norm, parameters, variant) for variant in variants)
    forms.update(found)


def _find(
    norm: type[nn.Module], parameters: list[str], variant: dict[str, Any]
) -> tuple[tuple[type[nn.Module], bool], NormForm]:
    """Finds the form of the instances of a class that are made with this option."""
    options = dict(variant)
    size = [] if parameters[:1] and parameters[0] in _EPSILONS else [_SIZE]
    if "eps" in parameters:
        options["eps"] = 1e-6
    try:
        with torch.device("cpu"):
            module = norm(*size, **options).float()
    except Exception as error:
        raise UnknownFormError(f"{norm.__name__} is not a known RMSNorm") from error
    others = [name for name in parameters[1:] if name not in _OPTIONS]
    names = set(module.state_dict())
    eps = [name for name in _EPSILONS if isinstance(vars(module).get(name), float)]
    if names <= {"weight"} and len(eps) == 1 and all(hasattr(module, name) for name in others):
        defaults = tuple((name, getattr(module, name)) for name in others)
        for weight_offset in (0.0, 1.0):
            if all(_fits(module, eps[0], weight_offset, *values) for values in _TRIALS):
                keeps_dtype = _keeps_dtype(module)
                form = NormForm(eps[0], weight_offset, keeps_dtype, norm.forward, defaults)
                return (norm, bool(names)), form
    raise UnknownFormError(f"{norm.__name__} is not a known RMSNorm")


def _fits(
    module: nn.Module, eps: str, weight_offset: float, value: float, weight_scale: float
) -> bool:
    """Returns whether a norm has the results and gradients of the form, with this epsilon."""
    setattr(module, eps, value)
    generator = torch.Generator("cpu").manual_seed(0)
    rows = len(_SCALES)
    x, upstream, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for shape in ((rows, _SIZE), (rows, _SIZE), (_SIZE,))
    )
    x *= torch.tensor(_SCALES, dtype=torch.float32, device="cpu")[:, None]
    inputs = [x.requires_grad_(), *module.parameters()]
    for parameter in inputs[1:]:
        parameter.data = weight_scale * weight
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + value)
    for parameter in inputs[1:]:
        expected = expected * (weight_offset + parameter)
    try:
        actual = module(x)
        results = [(y, *torch.autograd.grad(y, inputs, upstream)) for y in (actual, expected)]
    except Exception:
        return False
    return all(map(_close, *results))


def _close(actual: object, expected: Tensor) -> bool:
    """Returns whether each row differs by a few roundings of its largest element."""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    largest = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= 1e-5 * largest).all())


def _keeps_dtype(module: nn.Module) -> bool:
    """Returns whether a norm keeps its input's dtype; otherwise it promotes."""
    keeps, promotes = True, True
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.ones((1, _SIZE), dtype=x_dtype, device="cpu")
        for weight_dtype in (torch.bfloat16, torch.float32):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.rms_norm warns of mixed dtypes.
                dtype = module.to(weight_dtype)(x).dtype
            keeps &= dtype == x_dtype
            promotes &= dtype == torch.promote_types(x_dtype, weight_dtype)
    if not (keeps or promotes):
        raise UnknownFormError(f"{type(module).__name__} returns another dtype")
    return keeps
