"""The RMSNorm of a query and a key and their rotation: tensors, exact results, implementations.

Like the functions of ``peers.py``, those of ``PEERS`` take a problem and return the call to time.
Before those that compile, call ``prepare_to_compile`` once per case.
"""

import functools
from collections.abc import Callable

import torch
import torch_rope
from cases import Case, Pair, Problem
from peers import Call, eager_function, require
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


class NormProblem(Problem):
    """The tensors of a case, and the weights of its norms.

    Attributes:
        over_heads: Whether all heads of a token share a norm (OLMo 2) instead of each having one.
        q_weight: ``(D,)``, or ``(H * D,)`` over heads, as in models.
        k_weight: Likewise.
    """

    def __init__(
        self, case: Case, device: str, requires_grad: bool = False, over_heads: bool = False
    ) -> None:
        """Makes random tensors."""
        super().__init__(case, device, requires_grad)
        self.over_heads = over_heads

        def weight(heads: int) -> Tensor:
            size = case.head_dim * (heads if over_heads else 1)
            values = 1 + 0.1 * torch.randn(size, device=device)
            return values.to(self.q.dtype).requires_grad_(requires_grad)

        self.q_weight, self.k_weight = weight(case.q_heads), weight(case.k_heads)

    @property
    def weights(self) -> Pair:
        """Both weights."""
        return self.q_weight, self.k_weight

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has gradients: q, k and their weights."""
        return (self.q, self.k, *self.weights)

    @property
    def heads_axis(self) -> int:
        """The dimension of the heads, counted from the end."""
        return self.case.layout.index("H") - len(self.case.layout)

    @property
    def norm_axes(self) -> list[int] | None:
        """The option of the operator."""
        return [self.heads_axis, -1] if self.over_heads else None

    @property
    def broadcast_weights(self) -> Pair:
        """The weights in a shape that broadcasts with q and k: ``(D,)``, (H, D) or (H, 1, D)."""
        if not self.over_heads:
            return self.weights
        ones = [1] * (-2 - self.heads_axis)
        q_weight, k_weight = (w.view(-1, *ones, self.case.head_dim) for w in self.weights)
        return q_weight, k_weight

    def normalize(self, tensors: Pair, weights: Pair) -> Pair:
        """Normalizes in the dtype of the tensors, by plain operators."""
        axes = self.norm_axes or [-1]

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + EPS) * weight

        return norm(tensors[0], weights[0]), norm(tensors[1], weights[1])

    def results(self) -> tuple[Tensor, ...]:
        """Returns the exact results, float64."""
        q, k = (x.detach().double() for x in self.tensors)
        weights = [weight.detach().double() for weight in self.broadcast_weights]
        return self.rotate_exactly(self.normalize((q, k), (weights[0], weights[1])), False)

    def gradients(self, gradients: Pair) -> tuple[Tensor, ...]:
        """Returns the exact gradients of q, k and the weights, float64."""
        before_rotation = self.rotate_exactly(gradients, False, conjugate=True)
        exact = [x.detach().double().requires_grad_() for x in (self.q, self.k)]
        weights = [w.detach().double().requires_grad_() for w in self.broadcast_weights]
        results = self.normalize((exact[0], exact[1]), (weights[0], weights[1]))
        found = torch.autograd.grad(results, (*exact, *weights), before_rotation)
        return tuple(
            gradient.view(leaf.shape) for gradient, leaf in zip(found, self.leaves, strict=True)
        )


def norm_apply(problem: NormProblem) -> Call:
    """The operator."""
    weights, axes = problem.broadcast_weights, problem.norm_axes
    return lambda: torch_rope.norm_apply(
        (problem.q, problem.k), weights, problem.positions, eps=EPS, norm_axes=axes
    )


def rotation_alone(problem: NormProblem) -> Call:
    """The rotation without the norm."""
    return lambda: torch_rope.apply((problem.q, problem.k), problem.positions)


def rms_norm(x: Tensor, weight: Tensor, heads_axis: int | None) -> Tensor:
    """Normalizes by PyTorch's operator; along the heads too if their axis is given."""
    if heads_axis is None:
        return functional.rms_norm(x, weight.shape, weight, EPS)
    moved = x.movedim(heads_axis, -2)
    normalized = functional.rms_norm(moved.flatten(-2), weight.shape, weight, EPS)
    return normalized.view(moved.shape).movedim(-2, heads_axis)


def rms_norm_and_apply(
    q: Tensor, k: Tensor, weights: Pair, positions: Tensor, axis: int | None
) -> Pair:
    """Normalizes by PyTorch's operator and rotates by ours."""
    pair = rms_norm(q, weights[0], axis), rms_norm(k, weights[1], axis)
    return torch_rope.apply(pair, positions)


def unfused(
    problem: NormProblem, transform: Callable[..., Callable[..., Pair]] | None = None
) -> Call:
    """``rms_norm`` and ``torch_rope.apply``: two operators."""
    function = rms_norm_and_apply if transform is None else transform(rms_norm_and_apply)
    axis = problem.heads_axis if problem.over_heads else None
    return lambda: function(problem.q, problem.k, problem.weights, problem.positions, axis)


def plain(
    problem: NormProblem, transform: Callable[..., Callable[..., Pair]] | None = None
) -> Call:
    """Tensor code as in models: the norm in float32, rounded before the weight; rotate_half."""
    rotate, (cos, sin) = eager_function(problem)
    axes = problem.norm_axes or [-1]

    def normalize_and_rotate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Pair:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + EPS)
            return weight * wide.to(x.dtype)

        return rotate(norm(q, q_weight), norm(k, k_weight), cos, sin, False)

    function = normalize_and_rotate if transform is None else transform(normalize_and_rotate)
    weights = problem.broadcast_weights
    return lambda: function(problem.q, problem.k, *weights)


def compiled_unfused(problem: NormProblem) -> Call:
    """``rms_norm`` and ``torch_rope.apply``, compiled for the shapes of the case."""
    return unfused(problem, functools.partial(torch.compile, dynamic=False))


def compiled_plain(problem: NormProblem) -> Call:
    """The tensor code, compiled for the shapes of the case."""
    return plain(problem, functools.partial(torch.compile, dynamic=False))


def liger(problem: NormProblem) -> Call:
    """Liger's two Triton kernels; the second copies (B, H, S, D) to (B, S, H, D) first."""
    from liger_kernel.transformers.functional import liger_rms_norm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    case = problem.case
    require(problem.q.is_cuda and case.batch == 1 and not problem.over_heads)
    cos, sin = (table.reshape(1, case.tokens, -1) for table in problem.full_tables)
    heads_first = case.layout == "BHSD"

    def call() -> Pair:
        q, k = (
            liger_rms_norm(x, weight, EPS, in_place=False)
            for x, weight in zip((problem.q, problem.k), problem.weights, strict=True)
        )
        if heads_first:
            rotated: Pair = liger_rotary_pos_emb(q, k, cos, sin)
            return rotated
        q, k = liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def axolotl(problem: NormProblem) -> Call:
    """Axolotl's fused Triton kernel, for one tensor of (B, S, H, D) at a time."""
    from axolotl.kernels.gemma4_fused_rope import fused_rms_norm_rope

    case = problem.case
    require(problem.q.is_cuda and case.layout == "BSHD" and case.batch == 1)
    require(not problem.over_heads)
    cos, sin = (table.reshape(1, case.tokens, -1) for table in problem.full_tables)
    return lambda: (
        fused_rms_norm_rope(problem.q, problem.q_weight, cos, sin, EPS),
        fused_rms_norm_rope(problem.k, problem.k_weight, cos, sin, EPS),
    )


UNFUSED = "rms_norm + apply"
COMPILED = ("torch.compile, rms_norm + apply", "torch.compile, tensor code")

PEERS: dict[str, Callable[[NormProblem], Call]] = {
    UNFUSED: unfused,
    "tensor code": plain,
    COMPILED[0]: compiled_unfused,
    COMPILED[1]: compiled_plain,
    "Liger": liger,
    "axolotl": axolotl,
}
