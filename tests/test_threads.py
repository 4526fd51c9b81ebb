"""Many threads at once: each gets what one thread alone gets."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch_rope
from attention import EMBEDDING, Attention
from concurrency import THREADS, at_once
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor, nn

ROUNDS = 20


def assert_same(actual: Any, expected: Any) -> None:
    """Compares nested sequences of tensors."""
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


def step(seed: int, device: str) -> list[Tensor]:
    """Rotates in every way, forth and back; sizes and frequencies differ with the seed."""
    tokens, size = 5 + 7 * (seed % 5), 16 * (1 + seed % 3)
    q = random_values((2, tokens, 4, size), device=device, seed=seed).requires_grad_()
    k = random_values((2, tokens, 1, size), torch.bfloat16, device, seed=seed).requires_grad_()
    positions = random_positions((tokens, 1), device=device, seed=seed)
    inv_freq = random_inv_freq((size // 2,), torch.float32, device, seed=seed).requires_grad_()
    table = random_values((tokens, 1, size // 2), device=device, seed=seed)

    first = torch_rope.apply((q, k), positions, max_wavelength=100.0 * (1 + seed % 4))
    second = torch_rope.apply(first[0], positions, inv_freq, interleaved=True)
    third = torch_rope.apply_cos_sin(second, table, table) * 1
    torch_rope.apply_(third, positions)
    weight = random_values((4, size), device=device, seed=seed).requires_grad_()
    fourth = torch_rope.norm_apply((third, k), (weight, None), positions, norm_axes=(-2, -1))
    fifth = torch_rope.norm_apply_cos_sin(fourth[0], weight, table, table, norm_last=True)
    torch_rope.norm_apply_(fifth, weight, positions)
    loss = fifth.square().sum() + first[1].float().square().sum() + fourth[1].float().sum()
    gradients = torch.autograd.grad(loss, (q, k, inv_freq, weight))
    return [third, first[1], fifth, *gradients]


def test_forward_and_backward_in_many_threads(device: str) -> None:
    expected = [[step(seed, device) for seed in range(t, t + ROUNDS)] for t in range(THREADS)]
    actual = at_once(lambda t: [step(seed, device) for seed in range(t, t + ROUNDS)])
    assert_same(actual, expected)


def test_calls_that_use_several_threads_themselves(device: str) -> None:
    x = random_values((64, 64, 32), device=device)
    positions = random_positions((64, 1), device=device)
    weight = random_values((32,), device=device)

    def work() -> tuple[Tensor, Tensor]:
        rotated = torch_rope.apply(x, positions)
        return rotated, torch_rope.norm_apply(rotated, weight, positions, norm_axes=(-2, -1))

    expected = work()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        actual = at_once(lambda _: [work() for _ in range(ROUNDS)])
    finally:
        torch.set_num_threads(before)
    assert_same(actual, [[expected] * ROUNDS] * THREADS)


def test_many_backwards_through_one_graph(device: str) -> None:
    q = random_values((33, 4, 32), device=device).requires_grad_()
    k = random_values((33, 1, 32), device=device, seed=1).requires_grad_()
    positions = random_positions((33, 1), torch.float32, device).requires_grad_()
    inputs = q, k, positions
    rotated = torch_rope.apply((q, k), positions)
    gradients = [[random_values(y.shape, device=device, seed=t) for y in rotated] for t in range(8)]

    def backward(thread: int) -> list[Any]:
        return [
            torch.autograd.grad(rotated, inputs, gradients[thread], retain_graph=True)
            for _ in range(ROUNDS)
        ]

    assert_same(at_once(backward), [backward(thread) for thread in range(THREADS)])


def test_transforms_in_many_threads(device: str) -> None:
    def loss(x: Tensor, positions: Tensor) -> Tensor:
        return torch_rope.apply(x, positions).sin().sum()

    def work(thread: int) -> list[Any]:
        x = random_values((3, 5, 8), torch.float64, device, seed=thread)
        positions = random_positions((3, 5), torch.float64, device, low=-9, high=9, seed=thread)
        gradient = torch.func.grad(loss, (0, 1))
        return [
            (*gradient(x, positions), *torch.vmap(gradient)(x, positions)) for _ in range(ROUNDS)
        ]

    assert_same(at_once(work), [work(thread) for thread in range(THREADS)])


def test_a_mode_of_one_thread_is_not_that_of_others(device: str) -> None:
    x = random_values((9, 32), device=device).requires_grad_()
    positions = random_positions((9,), device=device)

    def work(thread: int) -> list[bool]:
        with torch.set_grad_enabled(thread % 2 == 0):
            return [torch_rope.apply(x, positions).requires_grad for _ in range(ROUNDS)]

    assert at_once(work) == [[thread % 2 == 0] * ROUNDS for thread in range(THREADS)]


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    """Calls a layer with the positions of all tokens."""
    y: Tensor = layer(x, torch.arange(x.shape[-2], device=x.device).unsqueeze(-1))
    return y


@pytest.mark.parametrize("copy", [deepcopy, lambda module: module], ids=["copied", "shared"])
def test_replicas_in_threads_do_what_the_module_does(
    device: str, copy: Callable[[Attention], Attention]
) -> None:
    layer = Attention(learned=True, device=device)
    batch = random_values((THREADS, 3, 7, EMBEDDING), device=device)
    replicas = [copy(layer) for _ in range(THREADS)]

    def work(thread: int) -> tuple[Tensor, ...]:
        output = attend(replicas[thread], batch[thread])
        return output, *torch.autograd.grad(output.sum(), list(replicas[thread].parameters()))

    expected = []
    for one in batch:
        output = attend(layer, one)
        expected.append((output, *torch.autograd.grad(output.sum(), list(layer.parameters()))))
    assert_same(at_once(work), expected)


def replica(module: nn.Module) -> nn.Module:
    """Makes what DataParallel does: a module whose parameters are computed from those of another.

    DataParallel itself broadcasts them, to other devices.
    """
    copy = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter * 1)
    for name, child in module.named_children():
        setattr(copy, name, replica(child))
    return copy


def test_replicas_of_one_set_of_parameters_add_up_their_gradients(device: str) -> None:
    layer = Attention(learned=True, device=device, dtype=torch.float64)
    batch = random_values((THREADS, 3, 7, EMBEDDING), torch.float64, device)
    replicas = [replica(layer) for _ in range(THREADS)]

    # Each replica runs in its thread, and the one backward sums what all give.
    outputs = at_once(lambda thread: attend(replicas[thread], batch[thread]))
    torch.stack([output.sum() for output in outputs]).sum().backward()
    actual = {name: parameter.grad for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    attend(layer, batch.flatten(0, 1)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(actual[name], parameter.grad)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has its global lock"
)
def test_a_free_threaded_python_stays_free() -> None:
    program = "import sys, torch_rope; sys.exit(sys._is_gil_enabled())"
    subprocess.run([sys.executable, "-c", program], check=True)
