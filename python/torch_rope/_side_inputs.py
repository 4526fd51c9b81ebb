"""Side inputs: values that reach layers by tag, without passing through the layers in between."""

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from torch_rope._arguments import kind_of, message

_FUNCTION = "torch_rope.WithSideInputsFromInputTuple"


class _Here(threading.local):
    """The side inputs of this thread's enclosing handlers."""

    def __init__(self) -> None:
        self.side_inputs: dict[Hashable, Tensor] = {}


_here = _Here()


def side_input(tag: Hashable) -> Tensor:
    """Returns the side input with a tag."""
    if tag not in _here.side_inputs:
        raise ValueError(
            f"torch_rope.ApplyRoPE(): expected the tag {tag!r} to be provided by a "
            "WithSideInputsFromInputTuple around this layer, but got none"
        )
    return _here.side_inputs[tag]


@contextmanager
def _set_to(side_inputs: dict[Hashable, Tensor]) -> Iterator[None]:
    outer = _here.side_inputs
    _here.side_inputs = side_inputs
    try:
        yield
    finally:
        _here.side_inputs = outer


class WithSideInputsFromInputTuple(nn.Module):
    """Runs a model with side inputs: values that reach every layer with their tag.

    The layers in between are not involved, so an ``nn.Sequential`` of ordinary layers and
    :class:`ApplyRoPE` layers works unchanged. Layers see the side inputs of all enclosing handlers
    on the same thread; nested handlers must have different tags.

    ``torch.utils.checkpoint`` reruns layers after the handler has returned: inside a handler, pass
    it ``context_fn=torch_rope.keep_side_inputs``.

    Args:
        model: The module to run.
        tags: The tag of each side input.

    Raises:
        ValueError: If a tag is repeated.
        TypeError: If ``model`` is not a module, or ``tags`` is not a sequence of hashable tags.

    Example:
        >>> import torch, torch_rope
        >>> from torch import nn
        >>> layers = nn.Sequential(
        ...     nn.Linear(64, 64), torch_rope.ApplyRoPE.from_config("tokens", embedding_axis=-1)
        ... )
        >>> model = torch_rope.WithSideInputsFromInputTuple.handling(layers, tags=["tokens"])
        >>> x, positions = torch.randn(2, 5, 64), torch.arange(5)
        >>> torch.equal(model(x, positions), torch_rope.apply(layers[0](x), positions))
        True
    """

    def __init__(self, model: nn.Module, tags: Sequence[Hashable]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(message(_FUNCTION, "model", "be a module", kind_of(model)))
        if isinstance(tags, str):
            rule = "be a sequence of tags"
            raise TypeError(message(_FUNCTION, "tags", rule, f"the string {tags!r}"))
        if not isinstance(tags, Sequence):
            raise TypeError(message(_FUNCTION, "tags", "be a sequence of tags", kind_of(tags)))
        for tag in tags:
            if tag is None or not isinstance(tag, Hashable):
                rule = "be hashable and not None"
                raise TypeError(message(_FUNCTION, "tags", rule, f"one that is {kind_of(tag)}"))
        self.model = model
        self.tags = tuple(tags)
        for tag in self.tags:
            if self.tags.count(tag) > 1:
                raise _provided_twice(tag)

    @classmethod
    def handling(cls, model: nn.Module, tags: Sequence[Hashable]) -> "WithSideInputsFromInputTuple":
        """Wraps a model in a handler that provides these tags."""
        return cls(model, tags)

    def forward(self, x: Any, *side_inputs: Any, **options: Any) -> Any:
        """Runs the model on ``x``.

        Args:
            x: The model's input; or a tuple of the input and the side inputs, as the only argument.
            side_inputs: A side input for each tag. Further arguments go to the model.
            options: Keyword arguments for the model.

        Returns:
            The model's result.

        Raises:
            ValueError: If a tag has no side input, or an enclosing handler provides it too.
        """
        if not side_inputs and isinstance(x, tuple):
            x, *rest = x
            side_inputs = tuple(rest)
        if len(side_inputs) < len(self.tags):
            raise ValueError(
                "torch_rope.WithSideInputsFromInputTuple(): expected side_inputs to have one for "
                f"the tag {self.tags[len(side_inputs)]!r}, but got {len(side_inputs)} for the tags "
                f"{self.tags}"
            )
        inner = dict(_here.side_inputs)
        for tag, value in zip(self.tags, side_inputs, strict=False):
            if tag in inner:
                raise _provided_twice(tag)
            inner[tag] = value
        with _set_to(inner):
            return self.model(x, *side_inputs[len(self.tags) :], **options)

    def extra_repr(self) -> str:
        """Shows the tags."""
        return f"tags={self.tags}"


def _provided_twice(tag: Hashable) -> ValueError:
    return ValueError(
        "torch_rope.WithSideInputsFromInputTuple(): expected each tag to be provided once, but got "
        f"{tag!r} twice"
    )


def keep_side_inputs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Keeps side inputs for the layers that ``torch.utils.checkpoint`` reruns.

    For ``use_reentrant=False``. Under ``torch.compile``, checkpoints keep side inputs by themselves
    and do not accept this function.

    Returns:
        The contexts of the forward pass and of the recomputation, as ``context_fn`` must return
        them.

    Example:
        >>> import torch, torch_rope
        >>> from torch.utils.checkpoint import checkpoint
        >>> class Checkpointed(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         run = super().forward
        ...         kept = torch_rope.keep_side_inputs
        ...         return checkpoint(run, x, use_reentrant=False, context_fn=kept)
        >>> layers = Checkpointed(torch_rope.ApplyRoPE.from_config("tokens", embedding_axis=-1))
        >>> model = torch_rope.WithSideInputsFromInputTuple.handling(layers, tags=["tokens"])
        >>> x = torch.randn(5, 64, requires_grad=True)
        >>> model(x, torch.arange(5)).sum().backward()
    """
    return nullcontext(), _set_to(_here.side_inputs)
