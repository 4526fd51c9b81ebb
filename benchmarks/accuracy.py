"""Measures the error of a rotation by position, next to other implementations.

python benchmarks/accuracy.py
python benchmarks/accuracy.py --json F.json --markdown F.md

The truth is the rotation by the exact angle position * base**(-2n / rotary_dim), with 200 bits. The
error of an output element is its distance from the truth, over the length of its pair.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
import torch_rope
from numpy.typing import NDArray
from report import add_outputs, describe_environment, publish, table
from torch import Tensor

BASE = 500000.0
HEAD_DIM = 128
PAIRS = HEAD_DIM // 2
POSITIONS_PER_RANGE = 48
LAST_BIT = 30  # The last range ends at 2**31.
TORCHTUNE_LENGTH = 2**17  # It computes a table of this length.

Array = NDArray[np.longdouble]

# A rotation of x, (tokens, HEAD_DIM), by positions, (tokens).
Rotation = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Implementation:
    """A rotation, the convention of its pairs, and the end of its table, if it has one."""

    rotate: Rotation
    interleaved: bool = False
    end: int = 2**31


def ours(inv_freq: Tensor | None = None) -> Implementation:
    """``torch_rope.apply``."""
    options = {"max_wavelength": BASE} if inv_freq is None else {}
    return Implementation(lambda x, p: torch_rope.apply(x, p, inv_freq, **options))


def float32_inv_freq() -> Tensor:
    """The frequencies as models compute them."""
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM
    return 1.0 / BASE**exponents


def transformers_llama() -> Implementation:
    """The layer and the function of transformers' Llama, whose tables have the dtype of x."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
    )
    layer = LlamaRotaryEmbedding(config)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        x = x[None, None]
        cos, sin = layer(x, positions[None])
        rotated: Tensor = apply_rotary_pos_emb(x, x, cos, sin)[0][0, 0]
        return rotated

    return Implementation(rotate)


def torchtune_llama() -> Implementation:
    """Torchtune's layer, whose table and arithmetic are in float32."""
    from peers import load_torchtune

    layer = load_torchtune().RotaryPositionalEmbeddings(HEAD_DIM, TORCHTUNE_LENGTH, BASE)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        rotated: Tensor = layer(x[None, :, None], input_pos=positions[None])[0, :, 0]
        return rotated

    return Implementation(rotate, interleaved=True, end=TORCHTUNE_LENGTH)


def rotary_embedding_torch() -> Implementation:
    """The package rotary-embedding-torch, called token by token with an offset."""
    from rotary_embedding_torch import RotaryEmbedding

    layer = RotaryEmbedding(HEAD_DIM, theta=BASE)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        rows = [
            layer.rotate_queries_or_keys(row[None, None, None], offset=position)[0, 0]
            for row, position in zip(x, positions.tolist(), strict=True)
        ]
        return torch.cat(rows)

    return Implementation(rotate, interleaved=True)


def x_transformers() -> Implementation:
    """The layer and the function of x-transformers."""
    from x_transformers.x_transformers import RotaryEmbedding, apply_rotary_pos_emb

    layer = RotaryEmbedding(HEAD_DIM, base=BASE)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        rotated: Tensor = apply_rotary_pos_emb(x[None, None], *layer(positions))[0, 0]
        return rotated

    return Implementation(rotate, interleaved=True)


IMPLEMENTATIONS: dict[str, Callable[[], Implementation]] = {
    "torch-rope": ours,
    "torch-rope, float32 inv_freq": lambda: ours(float32_inv_freq()),
    "transformers": transformers_llama,
    "torchtune": torchtune_llama,
    "rotary-embedding-torch": rotary_embedding_torch,
    "x-transformers": x_transformers,
}

# Frequencies are float32 in all but the first, so float64 x gains nothing there.
OF_DTYPE = {
    torch.float64: ("torch-rope",),
    torch.float32: tuple(IMPLEMENTATIONS),
    torch.bfloat16: tuple(IMPLEMENTATIONS),
    torch.float16: tuple(IMPLEMENTATIONS),
}


def ranges() -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each range of positions, and positions drawn from it."""
    generator = torch.Generator().manual_seed(0)
    yield "0", torch.zeros(1, dtype=torch.int64)
    for bit in range(LAST_BIT + 1):
        shape = (POSITIONS_PER_RANGE,)
        yield f"2^{bit}", torch.randint(2**bit, 2 ** (bit + 1), shape, generator=generator)


def exact_cos_sin(positions: Tensor) -> tuple[Array, Array]:
    """Returns cosines and sines of the exact angles, each within 2**-63."""

    def extended(number: mpmath.mpf) -> np.longdouble:
        high = float(number)
        return np.longdouble(high) + np.longdouble(float(number - high))

    cos, sin = np.empty((2, len(positions), PAIRS), dtype=np.longdouble)
    with mpmath.workprec(200):
        base = mpmath.mpf(BASE)
        frequencies = [base ** (mpmath.mpf(-2 * n) / HEAD_DIM) for n in range(PAIRS)]
        for token, position in enumerate(positions.tolist()):
            for n, frequency in enumerate(frequencies):
                cos[token, n] = extended(mpmath.cos(position * frequency))
                sin[token, n] = extended(mpmath.sin(position * frequency))
    return cos, sin


def error(
    implementation: Implementation, x: Tensor, positions: Tensor, exact: tuple[Array, Array]
) -> float:
    """Returns the largest error of any element, over the length of its pair."""
    cos, sin = exact
    rotated = implementation.rotate(x, positions)

    def pairs(y: Tensor) -> tuple[Array, Array]:
        parts = (y[:, ::2], y[:, 1::2]) if implementation.interleaved else y.chunk(2, dim=-1)
        a, b = (part.double().numpy().astype(np.longdouble) for part in parts)
        return a, b

    a, b = pairs(x)
    actual_a, actual_b = pairs(rotated)
    distance = np.maximum(abs(actual_a - (a * cos - b * sin)), abs(actual_b - (b * cos + a * sin)))
    return float((distance / np.hypot(a, b)).max())


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_outputs(parser)
    arguments = parser.parse_args()

    made: dict[str, Implementation] = {}
    for name, make in IMPLEMENTATIONS.items():
        try:
            made[name] = make()
        except ImportError:
            print(f"{name} is not installed")

    figures: dict[str, dict[str, list[float | None]]] = {}
    generator = torch.Generator().manual_seed(1)
    drawn = list(ranges())
    exact = [exact_cos_sin(positions) for _, positions in drawn]
    for dtype, names in OF_DTYPE.items():
        of_dtype = figures.setdefault(str(dtype).removeprefix("torch."), {})
        for (_, positions), cos_sin in zip(drawn, exact, strict=True):
            shape = (len(positions), HEAD_DIM)
            x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            for name in names:
                if name not in made:
                    continue
                within = int(positions.max()) < made[name].end
                largest = error(made[name], x, positions, cos_sin) if within else None
                of_dtype.setdefault(name, []).append(largest)

    environment = describe_environment("cpu")
    parts = [
        f"# Accuracy by position: {environment['device']}, {environment['date']}",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
        f"The largest error of an output element over the length of its pair, against the rotation "
        f"by the exact angle:\nrandom pairs, base {BASE:g}, head_dim {HEAD_DIM}, "
        f"{POSITIONS_PER_RANGE} random positions in each range from the number given to twice it.\n"
        f"torchtune's table ends at {TORCHTUNE_LENGTH:,} positions.",
    ]
    for dtype_name, columns in figures.items():
        lines = [
            [name, *("" if f is None else f"{f:.1e}" for f in row)]
            for (name, _), *row in zip(drawn, *columns.values(), strict=True)
        ]
        parts += [f"## {dtype_name}", table(["positions from", *columns], lines)]
    publish("\n\n".join(parts), {"environment": environment, "errors": figures}, arguments)


if __name__ == "__main__":
    main()
