"""Trains a small character model on a book, plots its loss, and generates text.

    pip install -r requirements.txt
    python train_char_lm.py

Two transformer layers with ``torch_rope.RotaryEmbedding``, compiled by ``torch.compile``, learn
"Alice's Adventures in Wonderland" (alice.txt). The loss is the mean of -log p per character, in
nats, on the last tenth of the book, which is held out. The program fails if the final loss is above
``--target-loss``.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch_rope
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

BOOK = Path(__file__).with_name("alice.txt")
CONTEXT = 128  # The number of characters that the model sees, including the current one.
BATCH = 32
LEARNING_RATE = 4e-3
STEPS_BETWEEN_EVALUATIONS = 50
PROMPT = "'I wonder,' said Alice, "
WRITTEN = 400


# Maps characters (B, S) to the scores (B, S, vocabulary) of their successors.
Model = Callable[[Tensor], Tensor]


class Cache:
    """The keys and values of the last characters in one layer."""

    def __init__(self) -> None:
        """Creates an empty cache."""
        self.keys_and_values: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values of shape (B, H, S, D); returns the last ``CONTEXT``.

        Keys are stored rotated: scores depend on relative positions only, so dropping the first
        keys is harmless.
        """
        new = torch.stack((k, v))
        if self.keys_and_values is not None:
            new = torch.cat((self.keys_and_values, new), dim=-2)
        self.keys_and_values = new[..., -CONTEXT:, :]
        k, v = self.keys_and_values
        return k, v


class Attention(nn.Module):
    """Causal attention with rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        """Creates the layers; a head has ``width / heads`` elements."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = torch_rope.RotaryEmbedding(width // heads)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """Applies attention.

        Args:
            x: New characters, of shape (B, S, width).
            positions: Their positions, of shape (S,).
            cache: The previous characters, if any; S is then 1, or the cache is empty.

        Returns:
            The update of ``x``.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Positions (S,) broadcast with (B, H, S). Strided views such as q and k cost nothing.
        q, k = self.rotary(q, k, positions)
        if cache is not None:
            k, v = cache.extend(k, v)
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] > 1)
        y: Tensor = self.out(heads.transpose(1, 2).flatten(-2))
        return y


class Layer(nn.Module):
    """Attention and a feed-forward network with residual connections."""

    def __init__(self, width: int, heads: int) -> None:
        """Creates the layers."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.network = nn.Sequential(
            nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """Returns the new ``x``; arguments as for ``Attention``."""
        x = x + self.attention(self.attention_norm(x), positions, cache)
        y: Tensor = x + self.network(x)
        return y


class CharacterModel(nn.Module):
    """Predicts the next character."""

    def __init__(self, vocabulary: int, layers: int = 2, width: int = 128, heads: int = 4) -> None:
        """Creates the layers."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.scores = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, vocabulary))

    def forward(
        self, characters: Tensor, first: int = 0, caches: list[Cache] | None = None
    ) -> Tensor:
        """Processes characters.

        Args:
            characters: int64, of shape (B, S).
            first: The position of the first one.
            caches: The cache of each layer, to continue a text.

        Returns:
            The scores of each one's successor, of shape (B, S, vocabulary).
        """
        positions = torch.arange(first, first + characters.shape[1], device=characters.device)
        x = self.embedding(characters)
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, None if caches is None else caches[i])
        scores: Tensor = self.scores(x)
        return scores


def loss_of(model: Model, windows: Tensor) -> Tensor:
    """Returns the mean loss over windows (B, CONTEXT + 1), except their first characters."""
    scores = model(windows[:, :-1])
    return functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Model, text: Tensor) -> float:
    """Returns the mean loss of a text, dropping an incomplete last batch."""
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)
    batches = [windows[i : i + BATCH] for i in range(0, len(windows) - BATCH + 1, BATCH)]
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def train(
    model: nn.Module, text: Tensor, held_out: Tensor, steps: int
) -> tuple[list[float], dict[int, float]]:
    """Trains a model on random windows of a text.

    Returns:
        The loss of each step, and the loss on ``held_out`` by step.
    """
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    windows = text.unfold(0, CONTEXT + 1, 1)
    losses: list[float] = []
    held_out_losses: dict[int, float] = {}
    with tqdm(range(1, steps + 1), unit="step") as bar:
        for step in bar:
            chosen = torch.randint(len(windows), (BATCH,), device=text.device)
            loss = loss_of(compiled, windows[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % STEPS_BETWEEN_EVALUATIONS == 0 or step == steps:
                held_out_losses[step] = evaluate(compiled, held_out)
                bar.set_postfix(loss=losses[-1], held_out=held_out_losses[step])
    return losses, held_out_losses


def plot(path: Path, losses: list[float], held_out_losses: dict[int, float], target: float) -> None:
    """Plots the losses."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="batch")
    axes.plot(*zip(*held_out_losses.items(), strict=True), marker="o", label="held out")
    axes.axhline(target, color="gray", linestyle="--", label="target")
    axes.set(xlabel="step", ylabel="loss in nats a character")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.inference_mode()
def write(model: CharacterModel, alphabet: str, prompt: str, length: int, device: str) -> str:
    """Samples ``length`` characters after a prompt, one at a time."""
    caches = [Cache() for _ in model.layers]
    text = prompt
    new = torch.tensor([[alphabet.index(character) for character in prompt]], device=device)
    for _ in range(length):
        scores = model(new, len(text) - new.shape[1], caches)[:, -1]
        new = torch.multinomial((scores / 0.7).softmax(-1), 1)
        text += alphabet[int(new)]
    return text


def main() -> None:
    """Trains, plots, generates text, and checks the loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--target-loss", type=float, default=1.7, help="for the held-out text")
    parser.add_argument("--plot", type=Path, default=Path("loss.png"), help="file for the plot")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    book = BOOK.read_text(encoding="ascii")
    alphabet = "".join(sorted(set(book)))
    characters = torch.tensor([alphabet.index(character) for character in book], device=device)
    num_train = len(characters) * 9 // 10
    text, held_out = characters[:num_train], characters[num_train:]

    model = CharacterModel(len(alphabet)).to(device)
    start = time.perf_counter()
    losses, held_out_losses = train(model, text, held_out, arguments.steps)
    seconds = time.perf_counter() - start
    plot(arguments.plot, losses, held_out_losses, arguments.target_loss)

    loss = held_out_losses[arguments.steps]
    print(f"\n{write(model, alphabet, PROMPT, WRITTEN, device)}\n")
    print(f"{arguments.steps} steps in {seconds:.0f} s; the losses are plotted in {arguments.plot}")
    verdict = "reached" if loss <= arguments.target_loss else "NOT reached"
    print(
        f"held-out loss: {loss:.3f} nats a character (untrained: {math.log(len(alphabet)):.2f}); "
        f"{arguments.target_loss} was {verdict}"
    )
    sys.exit(0 if loss <= arguments.target_loss else 1)


if __name__ == "__main__":
    main()
