"""What happens inside a call: the operators that are reached, the tensors that autograd keeps."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorsSeen(TorchDispatchMode):
    """Notes the operators that reach a device, in their order.

    Attributes:
        names: Those of the library.
        others: Those of PyTorch, such as ``aten::mul``.
    """

    def __init__(self) -> None:
        """Starts with none."""
        super().__init__()
        self.names: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Notes the operator and calls it."""
        name: str = function._schema.name
        if name.startswith("rope::"):
            self.names.append(name.removeprefix("rope::"))
        else:
            self.others.append(name)
        return function(*arguments, **(options or {}))


class FunctionsSeen(TorchFunctionMode):
    """Notes the functions of PyTorch and of the library that Python calls, in their order.

    Attributes:
        seen: All of them.
    """

    def __init__(self) -> None:
        """Starts with none."""
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Notes the function and calls it."""
        self.seen.append(function)
        return function(*arguments, **(options or {}))


def saved_by(function: Callable[[], Any]) -> list[Tensor]:
    """Returns what autograd keeps for the backward of what a function does."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return saved
