"""Saves a small scripted transformer that uses a layer of torch-rope, and generates tokens with it.

    python export.py model.pt 3 1 4 1 5

Prints the same as ``serve model.pt 3 1 4 1 5``, the C++ program next to it: the prompt and the
generated tokens, then the scores of the last step.
"""

import sys

import torch
import torch_rope
from torch import Tensor, nn
from torch.nn import functional

NEW_TOKENS = 12


class Attention(nn.Module):
    """Causal attention with normalized and rotated queries and keys, and a key-value cache."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        """Creates the layers; each key head serves ``heads / key_heads`` query heads."""
        super().__init__()
        self.heads = heads
        self.key_heads = key_heads
        self.head_size = width // heads
        self.input = nn.Linear(width, (heads + 2 * key_heads) * self.head_size, bias=False)
        self.rotary = torch_rope.QKNormRotaryEmbedding(self.head_size)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Applies attention.

        Args:
            x: The new tokens, of shape ``(B, S, width)``.
            positions: Their positions, of shape ``(S,)``.
            cache: Keys and values of the T previous tokens, of shape
                ``(2, B, key_heads, T, head_size)``.

        Returns:
            The update of ``x``, and the cache with the new tokens.
        """
        batch, tokens, _ = x.shape
        packed = self.input(x).view(batch, tokens, -1, self.head_size).transpose(1, 2)
        q, k, v = packed.split([self.heads, self.key_heads, self.key_heads], dim=1)
        # Positions (S,) broadcast with (B, heads, S). Strided views such as q and k cost nothing.
        q, k = self.rotary(q, k, positions)
        cache = torch.cat([cache, torch.stack([k, v])], dim=3)
        seen = torch.arange(cache.shape[3], device=x.device) <= positions[:, None]
        keys, values = cache.repeat_interleave(self.heads // self.key_heads, dim=2).unbind(0)
        attended = functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
        return self.output(attended.transpose(1, 2).reshape(batch, tokens, -1)), cache


class Layer(nn.Module):
    """Attention and a feed-forward network with residual connections."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        """Creates the layers."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, key_heads)
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the new ``x`` and the new cache; arguments as for ``Attention``."""
        attended, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + attended
        return x + self.network(x), cache


class Decoder(nn.Module):
    """Predicts the next token; the weights are random."""

    def __init__(
        self,
        vocabulary: int = 64,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        key_heads: int = 2,
    ) -> None:
        """Creates the layers."""
        super().__init__()
        self.cache_shape = (layers, 2, key_heads, width // heads)
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, heads, key_heads) for _ in range(layers)])
        self.scores = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Processes new tokens.

        Args:
            tokens: int64, of shape ``(B, S)``.
            cache: Keys and values of the T previous tokens, of shape
                ``(layers, 2, B, key_heads, T, head_size)``.

        Returns:
            The scores of the next token, of shape ``(B, vocabulary)``, and the cache of T + S
            tokens.
        """
        start = cache.shape[4]
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        caches: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, layer_cache = layer(x, positions, cache[index])
            caches.append(layer_cache)
        return self.scores(x[:, -1]), torch.stack(caches)

    @torch.jit.export
    def empty_cache(self, batch: int) -> Tensor:
        """Returns the cache before the first token."""
        layers, two, key_heads, head_size = self.cache_shape
        return self.embedding.weight.new_empty((layers, two, batch, key_heads, 0, head_size))


def generate(model: torch.jit.ScriptModule, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Generates ``NEW_TOKENS`` tokens greedily; returns all tokens and the last scores."""
    tokens = list(prompt)
    new = torch.tensor([prompt])
    cache = model.empty_cache(1)
    scores = torch.empty(0)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            scores, cache = model(new, cache)
            new = scores.argmax(-1, keepdim=True)
            tokens.append(int(new))
    return tokens, scores[0]


def main() -> None:
    """Saves the model, then runs it."""
    if len(sys.argv) < 3:
        sys.exit("usage: export.py MODEL TOKEN...")
    torch.manual_seed(0)
    model = torch.jit.script(Decoder().eval())
    model.save(sys.argv[1])
    tokens, scores = generate(model, [int(token) for token in sys.argv[2:]])
    print("tokens:", *tokens)
    print("scores:", *(f"{score:.6f}" for score in scores.tolist()))


if __name__ == "__main__":
    main()
