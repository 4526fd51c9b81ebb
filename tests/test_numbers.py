"""How exact the angles are, and what never changes a bit of the result."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mpmath
import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from reference import (
    ERROR_OF_FORMED_ANGLE,
    FLOAT32_ERROR,
    Expected,
    assert_rotated,
    assert_same_bits,
    half_ulp,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import FLOAT_DTYPES, Application, applications
from torch import Tensor

# The error that a cosine and a sine may have, as they come out of the rotation of (1, 0).
FLOAT32_COSINE_ERROR = 2.5e-7
FLOAT64_COSINE_ERROR = 1e-12

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")


def edge_positions(bits_of_position: int) -> Tensor:
    """Returns positions up to 2**bits: small ones, neighbours of powers of two, drawn ones."""
    powers = 2 ** torch.arange(1, bits_of_position + 1)
    limit = 2**bits_of_position
    drawn = random_positions((150,), low=-limit, high=limit)
    magnitudes = torch.cat((torch.arange(10), powers - 1))
    return torch.cat((magnitudes, -magnitudes, powers[:-1] + 1, drawn))


def rotation_of_unit(
    positions: Tensor,
    inv_freq: Tensor | None = None,
    *,
    pairs: int,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """Rotates (1, 0) in every pair: returns the cosines, then the sines, of the library."""
    x = torch.zeros(len(positions), 2 * pairs, dtype=dtype, device=positions.device)
    x[:, :pairs] = 1
    return torch_rope.apply(x, positions, inv_freq, **options).cpu().double()


def exact_cos_sin(angles: Tensor) -> Tensor:
    """Returns the cosines, then the sines, of float64 angles, to the last bit."""
    with mpmath.workprec(100):
        exact = [
            [
                float(function(mpmath.mpf(angle)))
                for function in (mpmath.cos, mpmath.sin)
                for angle in row
            ]
            for row in angles.tolist()
        ]
    return torch.tensor(exact, dtype=torch.float64)


def near_quarter_turns(dtype: torch.dtype, largest_exponent: int) -> Tensor:
    """Returns the numbers of a dtype nearest to multiples of pi / 2 below a power of two."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(largest_exponent).repeat_interleave(12)
    drawn = torch.rand(len(exponents), dtype=torch.float64, generator=generator)
    multiples = (drawn * 2.0**exponents).tolist()
    with mpmath.workprec(400):
        nearest = [float(int(multiple) * mpmath.pi / 2) for multiple in multiples]
    return torch.tensor(nearest, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("max_wavelength", [1e4, 5e5])
@pytest.mark.parametrize("scale_factor", [1.0, 8.0])
def test_cos_and_sin_are_exact_up_to_position_2_to_the_31(
    device: str, max_wavelength: float, scale_factor: float
) -> None:
    positions = edge_positions(31)
    angles = reference.angles(positions, 128, None, max_wavelength, scale_factor)
    actual = rotation_of_unit(
        positions.to(device), pairs=64, max_wavelength=max_wavelength, scale_factor=scale_factor
    )
    allowed = FLOAT32_COSINE_ERROR + angles.abs() * ERROR_OF_FORMED_ANGLE
    assert ((actual - exact_cos_sin(angles)).abs() <= allowed.repeat(1, 2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [1.0, 1e3, 1e6, 1e9])
def test_cos_and_sin_of_given_frequencies_are_exact(
    device: str, dtype: torch.dtype, largest: float
) -> None:
    # Angles up to 2**31 * 1e9, far beyond 1e15.
    positions = edge_positions(31)
    inv_freq = (largest * random_inv_freq((24,))).to(dtype)
    actual = rotation_of_unit(positions.to(device), inv_freq.to(device), pairs=24)
    exact = exact_cos_sin(reference.angles(positions, 48, inv_freq))
    assert (actual - exact).abs().max() <= FLOAT32_COSINE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cos_and_sin_near_quarter_turns_are_exact(device: str, dtype: torch.dtype) -> None:
    angles = near_quarter_turns(dtype, 60)
    actual = rotation_of_unit(torch.ones(1, device=device), angles.to(device), pairs=len(angles))
    exact = exact_cos_sin(angles[None].double())
    assert (actual - exact).abs().max() <= FLOAT32_COSINE_ERROR


@pytest.mark.parametrize(
    ("dtype", "angle"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e30),
        (torch.float32, 3.4e38),
        (torch.float64, 1e15),
        (torch.float64, 1e22),
        (torch.float64, 6381956970095103.0 * 2.0**797),
        (torch.float64, 1.7e308),
    ],
)
def test_cos_and_sin_of_any_finite_angle_are_exact(
    device: str, dtype: torch.dtype, angle: float
) -> None:
    angles = torch.tensor([angle, -angle], dtype=dtype)
    actual = rotation_of_unit(torch.ones(1, device=device), angles.to(device), pairs=2)
    exact = exact_cos_sin(angles[None].double())
    assert (actual - exact).abs().max() <= FLOAT32_COSINE_ERROR


def test_cos_and_sin_of_a_sum_over_axes_are_exact(device: str) -> None:
    positions = random_positions((3, 100), low=-(2**31), high=2**31)
    inv_freq = random_inv_freq((3, 24), torch.float32)
    x = torch.cat((torch.ones(100, 24), torch.zeros(100, 24)), dim=1).to(device)
    actual = torch_rope.apply(x, positions.to(device), inv_freq.to(device)).cpu().double()
    exact = exact_cos_sin(reference.angles(positions, 48, inv_freq))
    assert (actual - exact).abs().max() <= FLOAT32_COSINE_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_cos_and_sin_are_exact_up_to_2_to_the_20(device: str, dtype: torch.dtype) -> None:
    positions = edge_positions(20)
    inv_freq = random_inv_freq((24,), dtype)
    actual = rotation_of_unit(
        positions.to(device), inv_freq.to(device), pairs=24, dtype=torch.float64
    )
    exact = exact_cos_sin(reference.angles(positions, 48, inv_freq))
    assert (actual - exact).abs().max() <= FLOAT64_COSINE_ERROR


def test_float64_cos_and_sin_near_quarter_turns_are_exact(device: str) -> None:
    angles = near_quarter_turns(torch.float64, 20)
    actual = rotation_of_unit(
        torch.ones(1, device=device), angles.to(device), pairs=len(angles), dtype=torch.float64
    )
    assert (actual - exact_cos_sin(angles[None])).abs().max() <= FLOAT64_COSINE_ERROR


def test_the_float64_error_grows_no_faster_than_the_rounding_of_the_angle(device: str) -> None:
    positions = edge_positions(31)
    inv_freq = 1e3 * random_inv_freq((24,))
    actual = rotation_of_unit(
        positions.to(device), inv_freq.to(device), pairs=24, dtype=torch.float64
    )
    angles = reference.angles(positions, 48, inv_freq)
    allowed = FLOAT64_COSINE_ERROR + half_ulp(angles.abs(), torch.float64)
    assert ((actual - exact_cos_sin(angles)).abs() <= allowed.repeat(1, 2)).all()


@given(application=applications())
def test_no_layout_changes_a_bit(device: str, application: Application) -> None:
    x, positions, inv_freq = application.tensors(device)
    actual = torch_rope.apply(x, positions, inv_freq, **application.options)
    expected = torch_rope.apply(
        x.contiguous(),
        positions.contiguous(),
        None if inv_freq is None else inv_freq.contiguous(),
        **application.options,
    )
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_no_order_of_dimensions_in_memory_changes_a_bit(
    device: str, dtype: torch.dtype, interleaved: bool
) -> None:
    x = random_values((2, 37, 5, 134), dtype, device)
    positions = random_positions((2, 37, 1), device=device)
    expected = torch_rope.apply(x, positions, interleaved=interleaved)
    for order in ((0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        inverse = [order.index(dim) for dim in range(4)]
        permuted = x.permute(order).contiguous().permute(inverse)
        assert_same_bits(torch_rope.apply(permuted, positions, interleaved=interleaved), expected)
    gaps = torch.zeros(2, 37, 5, 3, 140, dtype=dtype, device=device)[:, :, :, 1, 5:139]
    gaps.copy_(x)
    assert_same_bits(torch_rope.apply(gaps, positions, interleaved=interleaved), expected)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after the test."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_of_threads_changes_a_bit(device: str, dtype: torch.dtype) -> None:
    x = random_values((3, 301, 7, 128), dtype, device)
    positions = random_positions((3, 301, 1), device=device)
    torch.set_num_threads(1)
    expected = torch_rope.apply(x, positions)
    for number in (2, 3, 8):
        torch.set_num_threads(number)
        assert_same_bits(torch_rope.apply(x, positions), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("frequencies", ["formed", "float32", "axes"])
def test_a_token_has_the_same_bits_alone_and_in_any_batch(
    device: str, frequencies: str, dtype: torch.dtype, interleaved: bool
) -> None:
    pairs = 35
    x = random_values((3, 19, 5, 2 * pairs), dtype, device)
    positions = random_positions((3, 19, 1), device=device)
    inv_freq = None
    if frequencies == "float32":
        inv_freq = random_inv_freq((pairs,), torch.float32, device)
    elif frequencies == "axes":
        positions = random_positions((2, 3, 19, 1), device=device)
        inv_freq = random_inv_freq((2, pairs), device=device)
    expected = torch_rope.apply(x, positions, inv_freq, interleaved=interleaved)
    for batch in range(3):
        for token in (0, 1, 7, 18):
            for head in (0, 4):
                alone = torch_rope.apply(
                    x[batch, token, head],
                    positions[..., batch, token, 0],
                    inv_freq,
                    interleaved=interleaved,
                )
                assert_same_bits(alone, expected[batch, token, head])
    for tokens in (1, 2, 5, 16):
        part = torch_rope.apply(
            x[:, :tokens], positions[..., :tokens, :], inv_freq, interleaved=interleaved
        )
        assert_same_bits(part, expected[:, :tokens])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_token_rotated_by_tables_has_the_same_bits_alone_and_in_a_batch(
    device: str, dtype: torch.dtype
) -> None:
    x = random_values((3, 19, 5, 70), dtype, device)
    cos, sin = (random_values((50, 35), device=device, seed=seed) for seed in (1, 2))
    positions = random_positions((3, 19, 1), device=device, low=0, high=50)
    expected = torch_rope.apply_cos_sin(x, cos, sin, positions)
    for batch in range(3):
        for token in (0, 1, 7, 18):
            alone = torch_rope.apply_cos_sin(x[batch, token], cos, sin, positions[batch, token])
            assert_same_bits(alone, expected[batch, token])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_what_is_not_finite_stays_in_its_pair(
    device: str, dtype: torch.dtype, value: float, interleaved: bool
) -> None:
    pairs = 37
    x = random_values((2 * pairs, 2 * pairs), dtype, device)
    positions = random_positions((2 * pairs,), device=device)
    expected = torch_rope.apply(x, positions, interleaved=interleaved)
    x.diagonal().fill_(value)
    actual = torch_rope.apply(x, positions, interleaved=interleaved)
    elements = torch.arange(2 * pairs, device=device)
    pair = elements // 2 if interleaved else elements % pairs
    own = pair[:, None] == pair
    assert not actual[own].isfinite().any()
    assert_same_bits(actual[~own], expected[~own])


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("nudge", [-(2.0**-20), 0.0, 2.0**-20])
def test_a_result_is_rounded_once_and_ties_go_to_even(
    device: str, dtype: torch.dtype, bits: int, interleaved: bool, nudge: float
) -> None:
    """a is of every odd and even last place, and a - b sin lies half way between two numbers."""
    pairs = 2 ** (bits - 1)
    a = 1 + torch.arange(pairs, device=device) * 2.0 ** (1 - bits)
    b = torch.ones_like(a)
    x = torch.stack((a, b), dim=-1) if interleaved else torch.stack((a, b))
    cos = torch.ones_like(a)
    sin = torch.full_like(a, 2.0**-bits * (1 + nudge))
    rotated = torch_rope.apply_cos_sin(x.flatten().to(dtype), cos, sin, interleaved=interleaved)
    parts = rotated.view(-1, 2).T if interleaved else rotated.view(2, -1)
    exact = torch.stack((a.double() - b.double() * sin, b.double() + a.double() * sin))
    assert_same_bits(parts, exact.to(dtype))


def assert_differ_by_less_than_is_allowed(one: Tensor, other: Tensor, norms: Tensor) -> None:
    """Compares the results of two devices or CPU capabilities, each rounded on its own."""
    apart = (one.cpu().double() - other.cpu().double()).abs()
    rounding = half_ulp(one.cpu().double().abs() + norms * FLOAT32_ERROR, one.dtype)
    assert (apart <= norms * FLOAT32_ERROR + 2 * rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_pairs", [16, 32, 45, 64, 128])
def test_subnormal_results_are_rounded_to_the_nearest(
    device: str, dtype: torch.dtype, interleaved: bool, num_pairs: int
) -> None:
    # Three quarters of each number below twice the least normal one, and of zeros between them.
    least_normal = torch.finfo(dtype).tiny
    x = random_values((64, 2 * num_pairs), torch.float64) * least_normal
    x[random_values(x.shape, seed=1) > 1] = 0.0
    x = x.to(dtype)
    expected = (x.double() * 0.75).to(dtype)
    assert expected[(expected != 0) & (expected.abs() < least_normal)].numel() > 1000
    cos, sin = torch.full((num_pairs,), 0.75), torch.zeros(num_pairs)
    actual = torch_rope.apply_cos_sin(
        x.to(device), cos.to(device), sin.to(device), interleaved=interleaved
    )
    assert torch.equal(actual.cpu(), expected)


ROTATE_AND_SAVE = """
import sys
import torch
import torch_rope

rotated = [torch_rope.apply(*tensors, **options) for tensors, options in torch.load(sys.argv[1])]
torch.save((torch.backends.cpu.get_cpu_capability(), rotated), sys.argv[2])
"""

Call = tuple[tuple[Tensor, ...], dict[str, Any]]


def calls_of_every_kind() -> list[Call]:
    """Lists calls of every dtype of x and every source of angles, in whole vectors and not."""
    positions = random_positions((2, 17, 1))
    far = random_positions((17, 1), low=-(2**31), high=2**31)
    calls: list[Call] = []
    for pairs, dtype in itertools.product((64, 75), FLOAT_DTYPES):
        angles = [
            (positions[0],),
            (positions[0], random_inv_freq((pairs,), torch.float32)),
            (positions, random_inv_freq((2, pairs), torch.float32)),
            (positions, random_inv_freq((2, pairs), torch.float64)),
            (far, 1e6 * random_inv_freq((pairs,), torch.float64)),
        ]
        calls += [
            ((random_values((17, 3, 2 * pairs), dtype), *angle), {"interleaved": interleaved})
            for angle in angles
            for interleaved in (False, True)
        ]
    return calls


def rotate_with_capability(capability: str, folder: Path) -> list[Tensor]:
    """Makes the calls in a process that torch tells to use a capability."""
    output = folder / f"{capability}.pt"
    subprocess.run(
        [sys.executable, "-c", ROTATE_AND_SAVE, str(folder / "calls.pt"), str(output)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        cwd=folder,
        check=True,
    )
    used, rotated = torch.load(output)
    assert used == capability
    return list(rotated)


@pytest.fixture(scope="module")
def rotated_by_capability(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What a process of each capability that this CPU has makes of the calls."""
    folder = tmp_path_factory.mktemp("capabilities")
    torch.save(calls_of_every_kind(), folder / "calls.pt")
    best = torch.backends.cpu.get_cpu_capability()
    available = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else ()
    return {capability: rotate_with_capability(capability, folder) for capability in available}


def test_devices_differ_by_less_than_is_allowed(
    cuda: str, expected_of_calls: list[Expected]
) -> None:
    for (tensors, options), expected in zip(calls_of_every_kind(), expected_of_calls, strict=True):
        on_cpu = torch_rope.apply(*tensors, **options)
        on_device = torch_rope.apply(*(tensor.to(cuda) for tensor in tensors), **options)
        assert_differ_by_less_than_is_allowed(on_device, on_cpu, expected.norms)


@pytest.fixture(scope="module")
def expected_of_calls() -> list[Expected]:
    """What the calls should return."""
    return [reference.apply(*tensors, **options) for tensors, options in calls_of_every_kind()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_cpu_capability_matches_the_reference(
    capability: str,
    rotated_by_capability: dict[str, list[Tensor]],
    expected_of_calls: list[Expected],
) -> None:
    if capability not in rotated_by_capability:
        pytest.skip(f"this CPU has no {capability}")
    for rotated, expected in zip(rotated_by_capability[capability], expected_of_calls, strict=True):
        assert_rotated(rotated, expected)


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_every_cpu_capability_agrees_with_the_plainest(
    capability: str,
    rotated_by_capability: dict[str, list[Tensor]],
    expected_of_calls: list[Expected],
) -> None:
    if capability not in rotated_by_capability:
        pytest.skip(f"this CPU has no {capability}")
    both = rotated_by_capability[capability], rotated_by_capability["DEFAULT"]
    for one, other, expected in zip(*both, expected_of_calls, strict=True):
        assert_differ_by_less_than_is_allowed(one, other, expected.norms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"),
    [(8, 128, 128), (8, 128, 64), (16, 64, 64), (5, 72, 64), (7, 74, 74)],
)
def test_a_large_tensor_gets_the_bits_of_its_parts(
    device: str, dtype: torch.dtype, interleaved: bool, heads: int, head_dim: int, rotary_dim: int
) -> None:
    """Data beyond the caches is moved in other ways: asked for ahead, and written past them."""
    repeats = 1 + 2**24 // (64 * heads * head_dim * dtype.itemsize)  # some 16 MiB
    tokens = 64 * repeats
    positions = random_positions((tokens, 1), device=device)
    options = {"rotary_dim": rotary_dim, "interleaved": interleaved}
    by_token = random_values((64, heads, head_dim), dtype=dtype, device=device)
    by_head = random_values((heads, 64, head_dim), dtype=dtype, device=device)
    for x in (by_token.repeat(repeats, 1, 1), by_head.repeat(1, repeats, 1).transpose(0, 1)):
        rotated = torch_rope.apply(x, positions, **options)
        few = 1000 // heads
        for begin in (0, tokens // 2 - 1, tokens - few):
            part = slice(begin, begin + few)
            expected = torch_rope.apply(x[part], positions[part], **options)
            assert_same_bits(rotated[part], expected)
        torch_rope.apply_(x, positions, **options)
        assert_same_bits(x, rotated)
