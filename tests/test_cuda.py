"""What only a CUDA device has: graphs, streams, more than one device, sizes beyond 32 bits."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_rope
from angles import ANGLES
from graphs import capture
from reference import (
    apply,
    apply_cos_sin,
    assert_rotated,
    assert_same_bits,
    norm_apply,
    random_positions,
    random_values,
)
from torch import Tensor

GIB = 2**30


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


def by_full_width_tables(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates a pair by tables with a column for each element."""
    angles = positions[..., None] * torch.arange(q.shape[-1], device=q.device) / 100
    return torch_rope.apply_cos_sin((q, k), angles.cos(), angles.sin(), full_width=True)


def in_place(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates copies of a pair where they are."""
    return torch_rope.apply_((q.clone(), k.clone()), positions)


CALLS = (by_formula, by_inv_freq, by_rows, by_full_width_tables, in_place)
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def problem(device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Makes a pair and its positions."""
    q = random_values((2, 33, 8, 64), torch.bfloat16, device, seed=seed)
    k = random_values((2, 33, 2, 64), torch.bfloat16, device, seed=seed + 1)
    return q, k, random_positions((33, 1), device=device, low=0, high=4096, seed=seed)


@pytest.mark.parametrize("call", CALLS)
def test_a_captured_call_is_replayed_on_what_its_inputs_hold_then(cuda: str, call: Call) -> None:
    inputs = problem(cuda)
    graph, outputs = capture(lambda: call(*inputs))
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

    graph, captured = capture(gradient_of_q)
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


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """Returns the names of the kernels that a call starts."""
    call()
    torch.cuda.synchronize()
    call()  # Frequencies have their table now.
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("heads", [(8, 2), (1, 1), (32, 0)])
@pytest.mark.parametrize("call", CALLS)
def test_a_pair_of_any_heads_is_one_kernel(cuda: str, call: Call, heads: tuple[int, int]) -> None:
    q, k = (random_values((2, 33, number, 64), torch.bfloat16, cuda) for number in heads)
    positions = random_positions((33, 1), device=cuda, low=0, high=4096)
    names = kernels_of(lambda: call(q, k, positions))
    assert sum("rope::cuda::" in name for name in names) == 1, names


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


@pytest.mark.usefixtures("unused_memory_is_freed")
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


@pytest.mark.parametrize("norm_axes", [None, (-2, -1)])
@pytest.mark.parametrize("size", [64, 30])
def test_sanitizer_sees_norms_and_their_gradients(
    cuda: str, size: int, norm_axes: tuple[int, ...] | None
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random_values((3, 5, 7, size + 3), dtype, cuda)
        positions = random_positions((5, 1), device=cuda)
        options: dict[str, Any] = {"rotary_dim": 24, "norm_axes": norm_axes}
        for view in (x[..., :size], x[..., 1:], x.clone()):
            weight = random_values((view.shape[-1],), torch.float32, cuda, seed=1)
            leaf, learned_weight = view.detach().requires_grad_(), weight.requires_grad_()
            actual = torch_rope.norm_apply(leaf, learned_weight, positions, **options)
            actual.float().square().sum().backward()
            expected = norm_apply(view.cpu(), weight.detach().cpu(), positions.cpu(), **options)
            assert_rotated(actual.detach().cpu(), expected)
            for tensor in (leaf, learned_weight):
                assert tensor.grad is not None
                assert tensor.grad.isfinite().all()


# Integer positions alone have no gradient.
DIFFERENTIABLE = [name for name in ANGLES if name != "positions"]


def rotation_by(angles: dict[str, Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    """Returns the call that takes such angles."""
    if "cos" not in angles:
        return lambda q: torch_rope.apply(q, **angles, **options)
    full_width = angles["cos"].shape[-1] == 64
    return lambda q: torch_rope.apply_cos_sin(q, **angles, full_width=full_width, **options)


def learned(angles: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Returns copies that ask for gradients, and those of them that can have one."""
    copies = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in angles.items()
    }
    return copies, tuple(tensor for tensor in copies.values() if tensor.requires_grad)


def gradients_of_angles(q: Tensor, angles: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of what makes the angles, for a gradient that is the same each time."""
    copies, leaves = learned(angles)
    gradient = random_values(tuple(q.shape), torch.float64, "cpu", seed=9).to(q)
    return torch.autograd.grad(rotation_by(copies, **options)(q), leaves, gradient)


@pytest.mark.parametrize("batch", [2, 300])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("angles", DIFFERENTIABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_angles_are_those_of_float64(
    cuda: str, dtype: torch.dtype, angles: str, interleaved: bool, batch: int
) -> None:
    q = random_values((batch, 33, 8, 64), dtype, cuda)
    made = ANGLES[angles](cuda)
    exact = {
        name: tensor.cpu()
        if name == "inv_freq" or (name == "positions" and "cos" in made)
        else tensor.cpu().double()
        for name, tensor in made.items()
    }
    actual = gradients_of_angles(q, made, interleaved=interleaved)
    expected = gradients_of_angles(q.cpu().double(), exact, interleaved=interleaved)
    for one, other in zip(actual, expected, strict=True):
        # The output, which gradients of angles are formed from, and the gradient were rounded.
        scale = other.abs().max().item()
        limit = 4 * max(torch.finfo(dtype).eps, torch.finfo(one.dtype).eps)
        assert (one.cpu().double() - other.double()).abs().max().item() <= limit * scale


@pytest.mark.parametrize("angles", DIFFERENTIABLE)
def test_gradients_of_angles_have_the_same_bits_every_time(cuda: str, angles: str) -> None:
    for batch in (2, 300):
        q = random_values((batch, 33, 8, 64), torch.bfloat16, cuda)
        made = ANGLES[angles](cuda)
        first = gradients_of_angles(q, made)
        for _ in range(3):
            for one, other in zip(gradients_of_angles(q, made), first, strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("angles", DIFFERENTIABLE)
def test_the_gradients_of_angles_are_one_kernel_and_what_is_small(cuda: str, angles: str) -> None:
    q = random_values((2, 33, 8, 64), torch.bfloat16, cuda)
    made = ANGLES[angles](cuda)
    names = kernels_of(lambda: gradients_of_angles(q, made))
    assert sum("sum_kernel<" in name for name in names) == 1, names


def test_a_gradient_that_is_to_be_differentiated_is_in_aten_operators(cuda: str) -> None:
    q = random_values((2, 3, 2, 8), torch.float64, cuda, seed=1)
    positions = random_positions((3, 1), torch.float64, cuda, low=0, high=9).requires_grad_()
    inv_freq = random_values((4,), torch.float64, cuda, seed=2).requires_grad_()
    rotate = torch_rope.apply
    assert torch.autograd.gradgradcheck(rotate, (q.requires_grad_(), positions, inv_freq))
    cos, sin = (
        random_values((3, 1, 4), torch.float64, cuda, seed=seed).requires_grad_() for seed in (3, 4)
    )
    assert torch.autograd.gradgradcheck(torch_rope.apply_cos_sin, (q, cos, sin))


def test_many_gradients_at_once_are_those_one_by_one(cuda: str) -> None:
    q = random_values((2, 33, 8, 64), torch.float32, cuda)
    made = ANGLES["positions and inv_freq"](cuda)
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items()}
    output = torch_rope.apply(q, **leaves)
    many = random_values((3, *q.shape), torch.float32, cuda, seed=5)

    def gradients(gradient: Tensor, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output, tuple(leaves.values()), gradient, retain_graph=True, is_grads_batched=batched
        )

    for i, together in enumerate(zip(*gradients(many, batched=True), strict=True)):
        for one, other in zip(together, gradients(many[i], batched=False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("angles", DIFFERENTIABLE)
def test_gradients_of_angles_are_captured_and_replayed(cuda: str, angles: str) -> None:
    q = random_values((300, 33, 8, 64), torch.bfloat16, cuda)
    copies, leaves = learned(ANGLES[angles](cuda))
    rotate = rotation_by(copies)
    gradient = random_values(tuple(q.shape), q.dtype, cuda, seed=5)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(rotate(q), leaves, gradient)

    graph, captured = capture(gradients)
    gradient.copy_(random_values(tuple(q.shape), q.dtype, cuda, seed=6))
    graph.replay()
    for one, other in zip(captured, gradients(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("size", [64, 30])
def test_sanitizer_sees_gradients_of_words_and_of_single_elements(cuda: str, size: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = random_values((3, 5, 7, size + 3), dtype, cuda)
        table = random_values((5, 1, 12), torch.float32, cuda, seed=1)
        for view in (x[..., :size], x[..., 1:], x.clone()):
            for interleaved in (False, True):
                cos, sin = gradients_of_angles(
                    view, {"cos": table, "sin": table}, interleaved=interleaved
                )
                assert cos.isfinite().all()
                assert sin.isfinite().all()


@pytest.mark.parametrize("heads", [1, 3, 20])
def test_sanitizer_sees_every_source_of_angles(cuda: str, heads: int) -> None:
    q = random_values((2, 33, heads, 64), torch.bfloat16, cuda)
    for name in DIFFERENTIABLE:
        if name == "tables for each of 8 heads":
            continue
        angles = ANGLES[name](cuda)
        for x in (q, q.transpose(2, 3).contiguous().transpose(2, 3), q.expand(3, 2, 33, heads, 64)):
            rotated = rotation_by(angles)(x)
            exact = {key: tensor.cpu() for key, tensor in angles.items()}
            full_width = {"full_width": True} if name == "full-width tables" else {}
            rotate = apply_cos_sin if "cos" in angles else apply
            assert_rotated(rotated.cpu(), rotate(x.cpu(), **exact, **full_width))


OUT_OF_RANGE = """
import torch
import torch_rope

x, table = torch.ones(3, 16, device="cuda"), torch.ones(10, 8, device="cuda")
torch_rope.apply_cos_sin(x, table, table, torch.tensor([0, {row}, 9], device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("row", [10, -1, 2**32])
def test_a_row_out_of_range_trips_a_device_side_assertion(cuda: str, row: int) -> None:
    program = OUT_OF_RANGE.format(row=row)
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.returncode != 0
    assert "device-side assert" in completed.stderr
