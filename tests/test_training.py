"""What surrounds a layer in training: checkpointing, DDP, FSDP2, autocast, modes, the profiler."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_rope
from attention import Attention, batches, train
from differentiable import CASES
from observe import OperatorsSeen
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

B, S, H, D = 2, 5, 4, 8


@pytest.fixture
def process_group(device: str) -> Iterator[None]:
    """A group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
    )
    yield
    torch.distributed.destroy_process_group()


def assert_same_tensors(actual: Any, expected: Any) -> None:
    """Asserts that two sequences of tensors agree in every bit."""
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


# --------------------------------------------------------------------------------------------------
# The operators, called with every form on float32 q and k


def rotations(device: str) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """Returns a call of each operator."""
    positions = random_positions((S, 1), device=device)
    inv_freq = random_inv_freq((D // 2,), torch.float32, device)
    cos, sin = (random_values((S, 1, D // 2), device=device, seed=seed) for seed in (7, 8))

    def apply(x: Any) -> Any:
        return torch_rope.apply(x, positions, inv_freq)

    def apply_(x: Any) -> Any:
        return torch_rope.apply_(x, positions, inv_freq)

    def apply_cos_sin(x: Any) -> Any:
        return torch_rope.apply_cos_sin(x, cos, sin)

    def apply_cos_sin_(x: Any) -> Any:
        return torch_rope.apply_cos_sin_(x, cos, sin)

    return {
        "apply": lambda q, k: (apply(q),),
        "apply_qk": lambda q, k: apply((q, k)),
        "apply_": lambda q, k: (apply_(q),),
        "apply_qk_": lambda q, k: apply_((q, k)),
        "apply_cos_sin": lambda q, k: (apply_cos_sin(q),),
        "apply_cos_sin_qk": lambda q, k: apply_cos_sin((q, k)),
        "apply_cos_sin_": lambda q, k: (apply_cos_sin_(q),),
        "apply_cos_sin_qk_": lambda q, k: apply_cos_sin_((q, k)),
    }


OPERATORS = list(rotations("cpu"))


def pair(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns q and k."""
    q = random_values((B, S, H, D), dtype, device)
    return q, random_values((B, S, 1, D), dtype, device, seed=1)


# --------------------------------------------------------------------------------------------------
# Activation checkpointing


def gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the gradients of a number made of the results, with respect to every input."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    total = sum(result.square().sum() for result in function(*leaves))
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, leaves)


def gradients_by_backward(
    function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Returns the same as they gather in leaves, all that a reentrant checkpoint allows."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    total = sum(result.square().sum() for result in function(*leaves))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    return tuple(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["apply_", "apply_qk", "apply_cos_sin", "apply_cos_sin_qk_"])
def test_a_checkpoint_rotates_again_to_the_same_gradients(
    device: str, name: str, use_reentrant: bool
) -> None:
    rotate = rotations(device)[name]

    def function(q: Tensor, k: Tensor) -> Any:
        return rotate(q.sin(), k.sin())

    def checkpointed(q: Tensor, k: Tensor) -> Any:
        return checkpoint(function, q, k, use_reentrant=use_reentrant)

    both = slice(None if "qk" in name else 1)
    with OperatorsSeen() as plain:
        expected = gradients_by_backward(function, pair(device))[both]
    with OperatorsSeen() as again:
        actual = gradients_by_backward(checkpointed, pair(device))[both]
    assert_same_tensors(actual, expected)
    # Once more than without: in its forward.
    assert len(again.names) > len(plain.names)


def test_a_selective_checkpoint_can_keep_what_is_rotated(device: str) -> None:
    positions = random_positions((S, 1), device=device)

    def function(q: Tensor, k: Tensor) -> Any:
        return [rotated.sin() for rotated in torch_rope.apply((q.sin(), k.sin()), positions)]

    def calls(policy: CheckpointPolicy) -> list[str]:
        def choose(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
            is_rotation = operator is torch.ops.rope.apply_qk.default
            return policy if is_rotation else CheckpointPolicy.PREFER_RECOMPUTE

        def checkpointed(q: Tensor, k: Tensor) -> Any:
            return checkpoint(
                function,
                q,
                k,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(choose),
            )

        with OperatorsSeen() as seen:
            actual = gradients(checkpointed, pair(device))
        assert_same_tensors(actual, gradients(function, pair(device)))
        return seen.names

    # Forward and backward; the recomputation is between them.
    assert calls(CheckpointPolicy.MUST_SAVE) == ["apply_qk"] * 2
    assert calls(CheckpointPolicy.MUST_RECOMPUTE) == ["apply_qk"] * 3


# --------------------------------------------------------------------------------------------------
# Data-parallel training of a layer


def parameters_of(layer: nn.Module) -> list[Tensor]:
    """Returns the parameters, whole."""
    return [
        parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
        for parameter in layer.parameters()
    ]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.usefixtures("process_group")
def test_ddp_trains_as_the_layer_alone(device: str, learned: bool) -> None:
    expected = Attention(learned=learned, device=device)
    actual = copy.deepcopy(expected)
    initial = parameters_of(copy.deepcopy(expected))
    reduced: set[int] = set()

    def reduce(_: None, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.update(id(parameter) for parameter in bucket.parameters())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped = nn.parallel.DistributedDataParallel(actual)
    wrapped.register_comm_hook(None, reduce)
    assert train(wrapped, batches(device)) == train(expected, batches(device))
    assert_same_tensors(parameters_of(actual), parameters_of(expected))
    assert reduced == {id(parameter) for parameter in actual.parameters()}
    assert not any(map(torch.equal, initial, parameters_of(actual)))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.usefixtures("process_group")
def test_fsdp_trains_as_the_layer_alone(device: str, learned: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = Attention(learned=learned, device=device)
    actual = copy.deepcopy(expected)
    fully_shard(actual, mesh=torch.distributed.init_device_mesh(device, (1,)))
    assert train(actual, batches(device)) == train(expected, batches(device))
    assert_same_tensors(parameters_of(actual), parameters_of(expected))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.usefixtures("process_group")
def test_mixed_precision_of_fsdp_leaves_frequencies_alone(device: str, learned: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer = Attention(learned=learned, device=device)
    x = random_values((B, S, 12), device=device)
    positions = torch.arange(1000, 1000 + S, device=device).unsqueeze(-1)
    expected = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16(), positions)
    mesh = torch.distributed.init_device_mesh(device, (1,))
    if learned:
        fully_shard(layer.rotary, mesh=mesh)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(layer, mesh=mesh, mp_policy=policy)
    assert_same_bits(layer(x, positions), expected)
    assert layer.rotary.inv_freq.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_casts_nothing(
    device: str, name: str, lower: torch.dtype, dtype: torch.dtype
) -> None:
    rotate = rotations(device)[name]
    expected = rotate(*(x.clone() for x in pair(device, dtype)))
    xs = pair(device, dtype)
    with torch.autocast(device, dtype=lower), OperatorsSeen() as seen:
        actual = rotate(*xs)
    assert_same_tensors(actual, expected)
    assert seen.names == [name]
    assert seen.others == []


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_a_layer_under_autocast_rotates_in_the_lower_type_by_float32_frequencies(
    device: str, lower: torch.dtype
) -> None:
    layer = Attention(learned=True, device=device)
    x = random_values((B, S, 12), device=device)
    positions = torch.arange(1000, 1000 + S, device=device).unsqueeze(-1)
    rotated: list[Any] = []

    def check(rotary: nn.Module, arguments: Any, results: Any) -> None:
        q, k, _ = arguments
        rotated.extend(results)
        expected = torch_rope.apply((q, k), positions, layer.rotary.inv_freq.float())
        assert_same_tensors(results, expected)

    layer.rotary.register_forward_hook(check)
    with torch.autocast(device, dtype=lower):
        loss = layer(x, positions).float().square().mean()
    loss.backward()
    assert [tensor.dtype for tensor in rotated] == [lower, lower]
    assert layer.rotary.inv_freq.grad is not None
    assert layer.rotary.inv_freq.grad.dtype == torch.float32
    assert layer.rotary.inv_freq.grad.abs().min() > 0


# --------------------------------------------------------------------------------------------------
# Modes


@pytest.mark.parametrize("name", OPERATORS)
def test_inference_mode_gives_the_same_bits(device: str, name: str) -> None:
    rotate = rotations(device)[name]
    expected = rotate(*(x.clone() for x in pair(device)))
    leaves = [x.requires_grad_() for x in pair(device)]
    with torch.inference_mode():
        actual = rotate(*(x.clone() for x in leaves))
    assert all(one.is_inference() and not one.requires_grad for one in actual)
    assert_same_tensors(actual, expected)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith("_")])
def test_inference_mode_changes_tensors_from_outside(device: str, name: str) -> None:
    rotate = rotations(device)[name]
    expected = rotate(*(x.clone() for x in pair(device)))
    q, k = pair(device)
    version = q._version
    with torch.inference_mode():
        rotate(q, k)
    assert_same_tensors((q, k)[: len(expected)], expected)
    assert q._version == version + 1


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Refuses operators whose results may differ from call to call."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_deterministic_mode_takes_all_and_gives_the_same_bits_again(
    device: str, case: str, request: pytest.FixtureRequest
) -> None:
    function = CASES[case].loss("functional")
    inputs = [tensor.requires_grad_() for tensor in CASES[case].inputs(device)]
    expected = torch.autograd.grad(function(*inputs), inputs)
    request.getfixturevalue("deterministic")
    first, second = (torch.autograd.grad(function(*inputs), inputs) for _ in range(2))
    assert_same_tensors(first, second)
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_changes_no_gradient(device: str) -> None:
    rotate = rotations(device)["apply_qk"]
    expected = gradients(rotate, pair(device))
    with torch.autograd.detect_anomaly():
        assert_same_tensors(gradients(rotate, pair(device)), expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_rotation_whose_gradient_is_nan(device: str) -> None:
    x, positions = pair(device)[0].requires_grad_(), random_positions((S, 1), device=device)
    with (
        torch.autograd.detect_anomaly(),
        pytest.warns(UserWarning, match=r"Rotate[^$]*test_training\.py"),
        pytest.raises(RuntimeError, match=r"Rotate.* returned nan values"),
    ):
        # The difference of two infinities.
        torch_rope.apply(x, positions).backward(torch.full_like(x, torch.inf))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_profiler_shows_an_operator_with_its_shapes(device: str, name: str) -> None:
    leaves = [x.requires_grad_() for x in pair(device)]
    inputs = [x * 1 for x in leaves]
    rotate = rotations(device)[name]
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=activities, record_shapes=True) as of_forward:
        results = rotate(*inputs)
    with profile(activities=activities, record_shapes=True) as of_backward:
        torch.autograd.grad(sum(one.sum() for one in results), leaves[: len(results)])

    angles = [[S, 1, D // 2]] * 2 if "cos_sin" in name else [[S, 1], [D // 2]]
    shapes = [list(x.shape) for x in inputs[: len(results)]] + angles

    def calls(profiled: Any) -> dict[str, list[Any]]:
        return {
            event.name: event.input_shapes[: len(shapes)]
            for event in profiled.events()
            if event.name.startswith("rope::")
        }

    assert calls(of_forward)[f"rope::{name}"] == shapes
    functional = name.removesuffix("_")
    assert set(calls(of_backward)) <= {f"rope::{functional}", f"rope::{functional[:-3]}"}
    assert calls(of_backward)
