"""The cases of the benchmarks, their tensors, and the exact results."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_rope
from torch import Tensor

Pair = tuple[Tensor, Tensor]

MAX_WAVELENGTH = 10000.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A query and a key of one attention layer, and how they are rotated.

    Attributes:
        dtype: A key of ``DTYPES``.
        layout: ``"BSHD"`` or ``"BHSD"``: the order of batch, sequence, heads and head_dim; or
            ``"BDS"``, with a strided embedding axis and no heads.
        tokens: The sequence length.
        batch: The number of sequences; more than one means decoding, each at its own position
            (in ``"BDS"`` they share positions).
        q_heads: The number of query heads.
        k_heads: The number of key heads; with 0 there is no key.
        head_dim: The size of a head.
        rotary_dim: The number of rotated elements of a head; by default all.
        interleaved: Whether pairs are neighbouring elements.
        angles: The source of torch-rope's angles: ``"formula"``, ``"inv_freq"``, ``"axes"``
            (three, as in M-RoPE), ``"tables"``, ``"full tables"`` (full width) or ``"rows"`` (table
            rows selected by position).
        positions: The dtype of the positions.
        storage_offset: The storage offset of q and k; an odd one misaligns every row.
        variant: The difference from the half-split rotation of 128 elements by the formula.
    """

    dtype: str
    layout: str = "BSHD"
    tokens: int = 1024
    batch: int = 1
    q_heads: int = 32
    k_heads: int = 8
    head_dim: int = 128
    rotary_dim: int | None = None
    interleaved: bool = False
    angles: str = "formula"
    positions: str = "int64"
    storage_offset: int = 0
    variant: str = ""

    def __str__(self) -> str:
        """Returns the name that ``--cases`` searches."""
        sequences = f"{self.batch} x " if self.batch > 1 else ""
        name = f"{self.dtype} {self.layout} {sequences}{self.tokens}"
        return f"{name} {self.variant}" if self.variant else name

    @property
    def in_cache(self) -> bool:
        """Whether the targets assume that the data is in cache: up to 1,024 tokens."""
        return self.batch * self.tokens <= 1024

    @property
    def is_variant(self) -> bool:
        """Whether the target is a multiple of the half-split rotation of 128 elements."""
        return self.variant not in ("", "decode")

    @property
    def rotated(self) -> int:
        """The number of rotated elements of a head."""
        return self.rotary_dim or self.head_dim


QUICK = (
    "float32 BSHD 512",
    "bfloat16 BSHD 512",
    "bfloat16 BHSD 512",
    "bfloat16 BSHD 4096",
    "bfloat16 BSHD 64 x 1 decode",
    "bfloat16 BSHD 1024 interleaved",
)

# The number of tokens varies with heads and head_dim, so that every variant moves (up to a token)
# the bytes of 1,024 tokens with 40 heads of 128 elements, and times compare directly.
VARIANTS = (
    Case("", interleaved=True, variant="interleaved"),
    Case("", rotary_dim=64, variant="partial 64 of 128"),
    Case("", tokens=1638, head_dim=80, rotary_dim=32, variant="partial 32 of 80"),
    Case("", tokens=1456, head_dim=90, variant="odd pair count, D 90"),
    Case("", tokens=2048, head_dim=64, variant="D 64"),
    Case("", tokens=1638, head_dim=80, variant="D 80"),
    Case("", tokens=1365, head_dim=96, variant="D 96"),
    Case("", tokens=512, head_dim=256, variant="D 256"),
    Case("", tokens=20480, q_heads=1, k_heads=1, variant="one head"),
    Case("", layout="BDS", batch=5, tokens=4096, variant="strided axis"),
    Case("", angles="inv_freq", variant="inv_freq (N)"),
    Case("", angles="axes", variant="inv_freq (3, N)"),
    Case("", angles="tables", variant="tables"),
    Case("", angles="rows", variant="tables by position"),
)


def list_cases(quick: bool) -> list[Case]:
    """Returns all CPU cases, or the few of a quick run, in the order of the tables."""
    sizes = [
        Case(dtype, layout, tokens)
        for dtype in DTYPES
        for layout in ("BSHD", "BHSD")
        for tokens in (64, 512, 1024, 4096)
    ]
    longest = [Case("bfloat16", tokens=16384)]
    decode = [Case("bfloat16", tokens=1, batch=64, variant="decode")]
    variants = [
        replace(case, dtype=dtype) for dtype in ("float32", "bfloat16") for case in VARIANTS
    ]
    cases = sizes + longest + decode + variants
    return [case for case in cases if not quick or str(case) in QUICK]


class Problem:
    """The tensors of a case.

    Attributes:
        case: The case.
        q: The query.
        k: The key.
        positions: Broadcastable with the shape of q and k without head_dim.
        inv_freq: float64 of shape ``(N,)``.
        angles: float64 of shape ``(..., N)``, with ``(...)`` broadcastable like ``positions``.
    """

    def __init__(self, case: Case, device: str, requires_grad: bool = False) -> None:
        """Makes random tensors."""
        torch.manual_seed(0)
        self.case = case

        def random(heads: int) -> Tensor:
            sizes = {"B": case.batch, "S": case.tokens, "H": heads, "D": case.head_dim}
            shape = [sizes[dimension] for dimension in case.layout]
            numel = math.prod(shape) + case.storage_offset
            buffer = torch.randn(numel, dtype=DTYPES[case.dtype], device=device)
            return buffer[case.storage_offset :].view(shape).requires_grad_(requires_grad)

        self.q, self.k = random(case.q_heads), random(case.k_heads)
        if case.batch > 1 and case.layout != "BDS":
            sequence = torch.randint(4096, (case.batch, case.tokens), device=device)
        else:
            sequence = torch.arange(case.tokens, device=device)[None]
        self.sequence = sequence  # (B, S)
        by_layout = {"BSHD": sequence[..., None], "BHSD": sequence[:, None], "BDS": sequence}
        self.positions = by_layout[case.layout].to(getattr(torch, case.positions))

        exponents = torch.arange(0, case.rotated, 2, dtype=torch.float64, device=device)
        self.inv_freq = MAX_WAVELENGTH ** -(exponents / case.rotated)
        if case.angles == "axes":
            # Time, height and width of a video of 8 x 8 patches, in sections of the frequencies.
            p = self.positions
            self.axes = torch.stack((p // 64, p // 8 % 8, p % 8))
            pairs = torch.arange(len(self.inv_freq), device=device)
            section = (pairs * 3 // len(pairs)) == torch.arange(3, device=device)[:, None]
            self.axis_inv_freq = (self.inv_freq * section).float()
            self.angles = self.axes[..., None] * (self.inv_freq * section)[:, None, None, None]
            self.angles = self.angles.sum(dim=0)
        else:
            self.angles = self.positions[..., None] * self.inv_freq

    @property
    def tables(self) -> Pair:
        """Cosines and sines (..., N) in the dtype of q."""
        return self.angles.cos().to(self.q.dtype), self.angles.sin().to(self.q.dtype)

    @property
    def full_tables(self) -> Pair:
        """Full-width tables: one column per element."""
        cos, sin = self.tables
        if self.case.interleaved:
            return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """q, and k if there is one."""
        return (self.q, self.k) if self.case.k_heads else (self.q,)

    @property
    def nbytes(self) -> int:
        """Bytes of q and k together."""
        return self.q.nbytes + self.k.nbytes

    def rotate_exactly(
        self, tensors: tuple[Tensor, ...], interleaved: bool, conjugate: bool = False
    ) -> tuple[Tensor, ...]:
        """Rotates in float64."""
        axis = self.case.layout.index("D")
        cos, sin = self.angles.cos(), self.angles.sin() * (-1 if conjugate else 1)

        def rotate(x: Tensor) -> Tensor:
            x = x.detach().double().movedim(axis, -1)
            rotated, rest = x[..., : self.case.rotated], x[..., self.case.rotated :]
            if interleaved:
                a, b = rotated.unflatten(-1, (-1, 2)).unbind(-1)
            else:
                a, b = rotated.chunk(2, dim=-1)
            pair = (a * cos - b * sin, b * cos + a * sin)
            rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
            return torch.cat((rotated, rest), dim=-1).movedim(-1, axis)

        return tuple(rotate(x) for x in tensors)

    def check(self, result: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
        """Raises AssertionError if a result is further from exact than its dtype explains.

        The tolerance covers rounding tables, products and their sum to the dtype, and angles in
        float32, which most peers use.
        """
        tolerance = 4 * torch.finfo(self.q.dtype).eps + self.angles.abs().max().item() * 2.0**-23
        for actual, expected in zip(result, exact, strict=True):
            error = (actual.detach() - expected).abs().max().item()
            bound = tolerance * expected.abs().max().item()
            if not error <= bound:
                raise AssertionError(f"{error:.1e} from the exact result, more than {bound:.1e}")


def torch_rope_call(problem: Problem, in_place: bool = False) -> Callable[[], Any]:
    """Returns torch-rope's call for a problem; for q alone if there is no key."""
    case = problem.case
    x: Any = (problem.q, problem.k) if case.k_heads else problem.q
    interleaved = case.interleaved
    if case.angles in ("tables", "full tables", "rows"):
        rotate = torch_rope.apply_cos_sin_ if in_place else torch_rope.apply_cos_sin
        if case.angles == "full tables":
            full = problem.full_tables
            return lambda: rotate(x, *full, interleaved=interleaved, full_width=True)
        cos, sin = problem.tables
        if case.angles == "tables":
            return lambda: rotate(x, cos, sin, interleaved=interleaved)
        rows = (cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1]))
        return lambda: rotate(x, *rows, problem.positions, interleaved=interleaved)

    rotate_by_angles = torch_rope.apply_ if in_place else torch_rope.apply
    positions, inv_freq = problem.positions, None
    if case.layout == "BDS":
        return lambda: rotate_by_angles(x, positions, embedding_axis=1)
    if case.angles == "axes":
        positions, inv_freq = problem.axes, problem.axis_inv_freq
    elif case.angles == "inv_freq":
        inv_freq = problem.inv_freq.float()
    return lambda: rotate_by_angles(
        x, positions, inv_freq, rotary_dim=case.rotated, interleaved=interleaved
    )
