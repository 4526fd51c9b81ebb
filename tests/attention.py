"""A small attention layer, for tests of what is done with whole layers."""

from collections.abc import Sequence

import torch
from reference import random_values
from torch import Tensor, nn
from torch_rope import RotaryEmbedding

EMBEDDING, HEADS, HEAD_DIM = 12, 4, 8


class Attention(nn.Module):
    """Causal attention over tokens (B, S, E); the rotation has float32 frequencies of its own."""

    def __init__(
        self, *, learned: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Makes parameters that are the same whenever it is called."""
        super().__init__()
        inner = HEADS * HEAD_DIM
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.q = nn.Linear(EMBEDDING, inner, **factory)
        self.k = nn.Linear(EMBEDDING, inner, **factory)
        self.v = nn.Linear(EMBEDDING, inner, **factory)
        self.out = nn.Linear(inner, EMBEDDING, **factory)
        for seed, linear in enumerate((self.q, self.k, self.v, self.out)):
            weight = random_values(linear.weight.shape, torch.float64, device, seed=seed)
            linear.weight = nn.Parameter((weight / 4).to(dtype))
        self.rotary = RotaryEmbedding(HEAD_DIM, learned=learned, device=device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Attends; positions are of shape (S, 1)."""
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)) for linear in (self.q, self.k, self.v))
        q, k = self.rotary(q, k, positions)
        y: Tensor = self.out(self.attend(q, k, v).flatten(-2))
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends over heads (B, S, H, D)."""
        heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def train(layer: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Takes a step of gradient descent for each batch of inputs and targets; returns the losses."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for x, target in batches:
        optimizer.zero_grad()
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
        loss = (layer(x, positions) - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Returns some batches to train on."""
    shape = (3, 6, EMBEDDING)
    seeds = ((0, 1), (2, 3), (4, 5))
    return [
        (
            random_values(shape, dtype, device, seed=first),
            random_values(shape, dtype, device, seed=second),
        )
        for first, second in seeds
    ]
