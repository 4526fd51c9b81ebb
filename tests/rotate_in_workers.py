"""Rotates in processes that this one starts: python rotate_in_workers.py fork|spawn|process.

A program of its own: PyTorch refuses to differentiate in a fork of a process whose autograd has
started threads, as other tests do.
"""

import multiprocessing
import sys

import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SECONDS = 120


def rotated(seed: int) -> Tensor:
    """Rotates and normalizes enough for several threads; the gradient of x is added."""
    x = random_values((256, 8, 64), seed=seed).requires_grad_()
    positions = torch.arange(256)[:, None]
    weight = random_values((64,), seed=1)
    y = torch_rope.norm_apply(torch_rope.apply(x, positions), weight, positions)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return y.detach() + gradient


class Rotated(Dataset[Tensor]):
    """A data set whose samples are rotated when they are read."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        return 8

    def __getitem__(self, index: int) -> Tensor:
        """Returns a sample."""
        return rotated(index)


def load(context: str) -> None:
    """Compares what the workers of a data loader rotate with what this process does."""
    # Before the workers start: forked ones inherit what this process has computed with.
    expected = [rotated(seed) for seed in range(8)]
    loader = DataLoader(
        Rotated(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=SECONDS
    )
    for actual, wanted in zip(loader, expected, strict=True):
        assert_same_bits(actual, wanted)


def in_a_child(results: "multiprocessing.Queue[bytes]") -> None:
    """Rotates in a process of its own."""
    # The threads of libgomp do not survive a fork: PyTorch's workers of data loaders use one too.
    torch.set_num_threads(1)
    results.put(rotated(3).numpy().tobytes())


def fork() -> None:
    """Compares what a forked process rotates with what this one does."""
    expected = rotated(3).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[bytes] = context.Queue()
    child = context.Process(target=in_a_child, args=(results,))
    child.start()
    assert results.get(timeout=SECONDS) == expected
    child.join(SECONDS)
    assert child.exitcode == 0


if __name__ == "__main__":
    fork() if sys.argv[1] == "process" else load(sys.argv[1])
