"""torchtune's RotaryPositionalEmbeddings on top of this package's operator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_rope._arguments import check_integer, check_number, check_tensor, message
from torch_rope._operators import apply
from torch_rope.integrations._checks import check_dims, check_shape

__all__ = ["RotaryPositionalEmbeddings"]

_NAME = "torch_rope.integrations.torchtune.RotaryPositionalEmbeddings"


class RotaryPositionalEmbeddings(nn.Module):
    """A drop-in replacement for ``torchtune.modules.RotaryPositionalEmbeddings``.

    Rotates interleaved pairs by float32 angles, like torchtune. There is no table, so any position
    is allowed, even beyond ``max_seq_len``.

    Args:
        dim: The number of elements of a head, even.
        max_seq_len: Unused; stored for callers that read it.
        base: The base of the frequencies, positive.

    Attributes:
        theta: The frequencies, float32 whatever dtype the module is converted to. A module created
            on the meta device computes them when it is moved to another.

    Raises:
        ValueError: If a value is invalid, such as an odd ``dim``.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> from torch_rope.integrations.torchtune import RotaryPositionalEmbeddings
        >>> rope = RotaryPositionalEmbeddings(64)
        >>> rope(torch.randn(2, 5, 8, 64), input_pos=torch.arange(5).expand(2, 5)).shape
        torch.Size([2, 5, 8, 64])
    """

    theta: Tensor

    def __init__(self, dim: int, max_seq_len: int = 4096, base: float = 10_000) -> None:
        """Computes the frequencies."""
        super().__init__()
        for argument, value in (("dim", dim), ("max_seq_len", max_seq_len)):
            check_integer(_NAME, argument, value)
        check_number(_NAME, "base", base)
        if dim <= 0 or dim % 2:
            raise ValueError(message(_NAME, "dim", "be even and positive", dim))
        if not (math.isfinite(base) and base > 0):
            raise ValueError(message(_NAME, "base", "be positive and finite", base))
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.rope_init()

    def rope_init(self) -> None:
        """Computes the frequencies on the default device."""
        exponents = torch.arange(0, self.dim, 2).float() / self.dim
        self.register_buffer("theta", 1.0 / self.base**exponents, persistent=False)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotates queries or keys.

        Args:
            x: Tensor of shape ``(b, s, n_h, dim)``.
            input_pos: Positions of shape ``(b, s)`` or ``(s,)``; by default 0, 1, 2...

        Returns:
            The rotated tensor, with the dtype of ``x``.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a type, a dtype or a device is wrong.
        """
        check_dims(_NAME, "x", x, ("b", "s", "n_h", "h_d"))
        batch, tokens, heads, width = x.shape
        if width != self.dim:
            check_shape(_NAME, "x", x, (batch, tokens, heads, self.dim))
        if input_pos is None:
            input_pos = torch.arange(tokens, device=x.device)
        else:
            check_tensor(_NAME, "input_pos", input_pos)
            check_shape(_NAME, "input_pos", input_pos, (batch, tokens), (1, tokens), (tokens,))
        return apply(x, input_pos.unsqueeze(-1), self.theta, interleaved=True)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "RotaryPositionalEmbeddings":
        before = self.theta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before.is_meta and not self.theta.is_meta:  # to_empty() leaves uninitialised memory.
            with self.theta.device:
                self.rope_init()
        elif self.theta.dtype != before.dtype:
            self.theta = before.to(self.theta.device)
        return self


def __dir__() -> list[str]:
    return sorted(__all__)
