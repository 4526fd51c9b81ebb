"""What only a CUDA device has: graphs, streams, more than one device, sizes beyond 32 bits."""

from collections.abc import Callable

import pytest
import torch
import torch_rope
from reference import apply, assert_rotated, assert_same_bits, random_positions, random_values
from torch import Tensor

GIB = 2**30


@pytest.fixture
def cuda(device: str) -> str:
    """The CUDA device."""
    if device != "cuda":
        pytest.skip("only for CUDA")
    return device


def by_formula(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates a pair by positions."""
    return torch_rope.apply((q, k), positions)


def by_inv_freq(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates a pair by positions and frequencies of the device."""
    inv_freq = 10000.0 ** -torch.arange(0, 1, 2 / q.shape[-1], device=q.device)
    return torch_rope.apply((q, k), positions, inv_freq, interleaved=True)


def by_rows(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates a pair by the rows of tables that positions name."""
    angles = torch.arange(4096 * q.shape[-1] // 2, device=q.device).view(4096, -1) / 100
    return torch_rope.apply_cos_sin((q, k), angles.cos(), angles.sin(), positions)


def in_place(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates copies of a pair where they are."""
    return torch_rope.apply_((q.clone(), k.clone()), positions)


CALLS = (by_formula, by_inv_freq, by_rows, in_place)
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def problem(device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Makes a pair and its positions."""
    q = random_values((2, 33, 8, 64), torch.bfloat16, device, seed=seed)
    k = random_values((2, 33, 2, 64), torch.bfloat16, device, seed=seed + 1)
    return q, k, random_positions((33, 1), device=device, low=0, high=4096, seed=seed)


@pytest.mark.parametrize("call", CALLS)
def test_a_captured_call_is_replayed_on_what_its_inputs_hold_then(cuda: str, call: Call) -> None:
    inputs = problem(cuda)
    call(*inputs)  # The allocator and the libraries warm up.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*inputs)
    for seed in (10, 20):
        fresh = problem(cuda, seed)
        for old, new in zip(inputs, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        for actual, expected in zip(outputs, call(*fresh), strict=True):
            assert_same_bits(actual, expected)


def test_a_backward_pass_is_captured_and_replayed(cuda: str) -> None:
    q, k, positions = problem(cuda)
    q.requires_grad_()
    gradient = torch.ones_like(q)

    def gradient_of_q() -> Tensor:
        return torch.autograd.grad(torch_rope.apply((q, k), positions)[0], q, gradient)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient_of_q()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient_of_q()
    gradient.copy_(random_values(tuple(q.shape), q.dtype, seed=5))
    graph.replay()
    assert_same_bits(captured, gradient_of_q())


@pytest.mark.parametrize("call", CALLS)
def test_a_call_runs_on_the_current_stream(cuda: str, call: Call) -> None:
    q, k, positions = problem(cuda)
    expected = call(q, k, positions)
    late = torch.full_like(q, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # On another stream the call would not wait for the copy.
        late.copy_(q)
        actual = call(late, k, positions)
    side.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def test_a_call_does_not_synchronize(cuda: str) -> None:
    inputs = problem(cuda)
    for call in (by_formula, in_place):
        call(*inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_pair_of_any_heads_is_one_kernel(cuda: str) -> None:
    inputs = problem(cuda)
    by_formula(*inputs)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        by_formula(*inputs)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if "rotate_kernel" in event.name]
    assert len(kernels) == 1


def test_the_device_is_that_of_the_tensors(cuda: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device here")
    on_first = by_formula(*problem("cuda:0"))
    with torch.cuda.device(0):
        on_second = by_formula(*problem("cuda:1"))
        assert torch.cuda.current_device() == 0
    for one, other in zip(on_first, on_second, strict=True):
        assert other.device == torch.device("cuda:1")
        assert_same_bits(other.cpu(), one.cpu())


@pytest.mark.parametrize("rotary_dim", [128, 126])
def test_tensors_of_more_than_2_to_the_31_elements_are_rotated_in_place(
    cuda: str, rotary_dim: int
) -> None:
    tokens = 2**31 // 128 + 3
    if torch.cuda.mem_get_info()[0] < 6 * GIB:
        pytest.skip("less than 6 GiB of free device memory")
    x = torch.empty(tokens, 128, dtype=torch.bfloat16, device=cuda)
    rows = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device=cuda)
    some = random_values((len(rows), 128), torch.bfloat16, cuda)
    x[rows] = some
    torch_rope.apply_(x, torch.arange(tokens, device=cuda), rotary_dim=rotary_dim)
    expected = torch_rope.apply(some, rows, rotary_dim=rotary_dim)
    assert_same_bits(x[rows], expected)
    assert_rotated(expected.cpu(), apply(some.cpu(), rows.cpu(), rotary_dim=rotary_dim))


@pytest.mark.parametrize("size", [64, 30])
@pytest.mark.parametrize("interleaved", [False, True])
def test_sanitizer_sees_words_single_elements_and_a_slice(
    cuda: str, size: int, interleaved: bool
) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = random_values((3, 5, 7, size + 3), dtype, cuda)
        positions = random_positions((5, 1), device=cuda)
        for view in (x[..., :size], x[..., 1:], x.clone()):
            actual = torch_rope.apply(view, positions, rotary_dim=24, interleaved=interleaved)
            expected = apply(view.cpu(), positions.cpu(), rotary_dim=24, interleaved=interleaved)
            assert_rotated(actual.cpu(), expected)
