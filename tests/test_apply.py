"""What apply returns, for every option and every kind of argument."""

from typing import Any

import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from reference import (
    Expected,
    assert_rotated,
    assert_same_bits,
    bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import (
    FLOAT_DTYPES,
    INV_FREQ_DTYPES,
    POSITION_DTYPES,
    Application,
    applications,
)
from torch import Tensor


def check(x: Tensor, positions: Tensor, inv_freq: Tensor | None = None, **options: Any) -> None:
    """Compares ``apply`` with the reference."""
    actual = torch_rope.apply(x, positions, inv_freq, **options)
    assert actual.dtype == x.dtype
    assert_rotated(actual, reference.apply(x, positions, inv_freq, **options))


@given(application=applications())
def test_any_call_matches_the_reference(device: str, application: Application) -> None:
    x, positions, inv_freq = application.tensors(device)
    check(x, positions, inv_freq, **application.options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_dtype_is_rotated(device: str, dtype: torch.dtype, interleaved: bool) -> None:
    x = random_values((2, 17, 3, 128), dtype, device)
    positions = random_positions((2, 17, 1), torch.int64, device)
    check(x, positions, interleaved=interleaved)


@pytest.mark.parametrize("dtype", POSITION_DTYPES)
def test_positions_of_every_dtype_are_taken(device: str, dtype: torch.dtype) -> None:
    check(random_values((4, 9, 64), device=device), random_positions((4, 9), dtype, device))


@pytest.mark.parametrize(
    "shape", [(7, 1), (2, 7, 1), (2, 7, 5), (1, 7, 5), (5,), (1,), ()], ids=str
)
def test_positions_broadcast_with_the_tokens_of_bshd(device: str, shape: tuple[int, ...]) -> None:
    x = random_values((2, 7, 5, 16), device=device)
    check(x, random_positions(shape, device=device))


@pytest.mark.parametrize("shape", [(7,), (2, 1, 7), (5, 1), (2, 5, 7), ()], ids=str)
def test_positions_broadcast_with_the_tokens_of_bhsd(device: str, shape: tuple[int, ...]) -> None:
    x = random_values((2, 5, 7, 16), device=device)
    check(x, random_positions(shape, device=device))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_any_axis_can_be_the_embedding_axis(device: str, axis: int) -> None:
    x = random_values((4, 6, 8, 10), device=device)
    tokens = [size for dim, size in enumerate(x.shape) if dim != axis % 4]
    check(x, random_positions(tuple(tokens), device=device), embedding_axis=axis)


def test_positions_without_an_axis_of_x_broadcast_from_the_right(device: str) -> None:
    x = random_values((4, 8, 3), device=device)
    check(x, random_positions((3,), device=device), embedding_axis=1)
    check(x, random_positions((4, 1), device=device), embedding_axis=1)


def test_a_vector_is_rotated(device: str) -> None:
    x = random_values((10,), device=device)
    check(x, torch.tensor(3, device=device))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("pairs", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 300])
def test_any_number_of_pairs_is_rotated(
    device: str, pairs: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x = random_values((5, 2 * pairs), dtype, device)
    check(x, random_positions((5,), device=device), interleaved=interleaved)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 8), (2, 0, 3, 8), (0, 0)], ids=str)
def test_an_empty_tensor_gives_an_empty_tensor(device: str, shape: tuple[int, ...]) -> None:
    check(random_values(shape, device=device), torch.tensor(5, device=device))


def test_positions_of_no_tokens_broadcast(device: str) -> None:
    check(random_values((2, 0, 3, 8), device=device), random_positions((0, 1), device=device))


def test_ten_permuted_dimensions_are_rotated(device: str) -> None:
    x = random_values((2,) * 10, device=device).permute(9, 1, 7, 3, 5, 4, 6, 2, 8, 0)
    positions = random_positions((2,) * 9, device=device).permute(2, 8, 4, 1, 0, 3, 6, 5, 7)
    check(x, positions, embedding_axis=4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("offset", "rotary_dim"),
    [(0, 6), (0, 32), (1, 6), (5, 30), (4, None), (34, 6), (38, 2), (40, 0)],
)
def test_only_the_rotated_slice_is_rotated(
    device: str, offset: int, rotary_dim: int | None, interleaved: bool
) -> None:
    x = random_values((3, 5, 40), device=device)
    check(
        x,
        random_positions((5,), device=device),
        rotary_dim=rotary_dim,
        rotary_offset=offset,
        interleaved=interleaved,
    )


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_elements_outside_the_slice_keep_their_bits_whatever_they_are(
    device: str, dtype: torch.dtype, interleaved: bool, operator: Any
) -> None:
    # Every pattern of the leading 16 bits: NaNs, quiet and signalling, infinities, subnormals.
    patterns = torch.randperm(2**16, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    patterns = patterns.repeat(16 // dtype.itemsize).view(dtype).view(-1, 128)
    patterns[:, 3:43] = random_values((len(patterns), 40), dtype)
    expected = bits(patterns)
    actual = bits(
        operator(
            patterns.to(device),
            torch.tensor(7, device=device),
            rotary_dim=40,
            rotary_offset=3,
            interleaved=interleaved,
        )
    )
    assert torch.equal(actual[:, :3], expected[:, :3])
    assert torch.equal(actual[:, 43:], expected[:, 43:])


def test_pairs_are_the_halves_of_the_slice(device: str) -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
    rotated = torch_rope.apply(x, torch.tensor(1.0, device=device))
    assert rotated[[1, 3]].tolist() == [0.0, 0.0]
    assert (rotated[0] ** 2 + rotated[2] ** 2).item() == pytest.approx(1.0)


def test_interleaved_pairs_are_neighbours(device: str) -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], device=device)
    rotated = torch_rope.apply(x, torch.tensor(1.0, device=device), interleaved=True)
    assert rotated[2:].tolist() == [0.0, 0.0]
    assert (rotated[0] ** 2 + rotated[1] ** 2).item() == pytest.approx(1.0)


def test_a_quarter_turn_takes_the_first_element_to_the_second(device: str) -> None:
    x = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    rotated = torch_rope.apply(x, torch.tensor(torch.pi / 2, dtype=torch.float64, device=device))
    assert rotated.tolist() == pytest.approx([0.0, 1.0], abs=2e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_conjugate_turns_the_other_way(device: str, interleaved: bool) -> None:
    x = random_values((4, 9, 64), device=device)
    positions = random_positions((9,), device=device)
    check(x, positions, interleaved=interleaved, conjugate=True)


def test_conjugate_is_the_same_as_negative_positions(device: str) -> None:
    x = random_values((4, 9, 64), device=device)
    positions = random_positions((9,), device=device)
    conjugated = torch_rope.apply(x, positions, conjugate=True)
    assert_rotated(conjugated, reference.apply(x, -positions))


@pytest.mark.parametrize("attention_factor", [0.0, 0.1 * 7 + 1, -2.0, 1e-3])
def test_attention_factor_multiplies_the_result(device: str, attention_factor: float) -> None:
    x = random_values((9, 32), device=device)
    check(x, random_positions((9,), device=device), attention_factor=attention_factor)


def test_attention_factor_leaves_the_elements_outside_the_slice_alone(device: str) -> None:
    x = random_values((9, 32), device=device)
    rotated = torch_rope.apply(
        x, torch.tensor(3, device=device), rotary_dim=8, rotary_offset=4, attention_factor=2.0
    )
    assert_same_bits(rotated[:, :4], x[:, :4])
    assert_same_bits(rotated[:, 12:], x[:, 12:])


@pytest.mark.parametrize("scale_factor", [0.25, 3.0, 8.0])
def test_scale_factor_divides_the_angle(device: str, scale_factor: float) -> None:
    x = random_values((9, 32), device=device)
    check(x, random_positions((9,), device=device), scale_factor=scale_factor)


@pytest.mark.parametrize("max_wavelength", [0.5, 1.0, 100.0, 5e5, 1e9])
def test_max_wavelength_sets_the_frequencies(device: str, max_wavelength: float) -> None:
    x = random_values((9, 32), device=device)
    check(x, random_positions((9,), device=device), max_wavelength=max_wavelength)


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("positions_dtype", POSITION_DTYPES)
@pytest.mark.parametrize("dtype", INV_FREQ_DTYPES)
def test_frequencies_can_be_given(
    device: str, dtype: torch.dtype, positions_dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    x = random_values((3, 11, 34), x_dtype, device)
    positions = random_positions((11,), positions_dtype, device)
    check(x, positions, random_inv_freq((17,), dtype, device))


@pytest.mark.parametrize("x_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("positions_dtype", POSITION_DTYPES)
@pytest.mark.parametrize("dtype", INV_FREQ_DTYPES)
@pytest.mark.parametrize("axes", [1, 2, 3, 5])
def test_angles_of_several_axes_are_summed(
    device: str,
    axes: int,
    dtype: torch.dtype,
    positions_dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> None:
    x = random_values((3, 11, 34), x_dtype, device)
    positions = random_positions((axes, 3, 11), positions_dtype, device)
    check(x, positions, random_inv_freq((axes, 17), dtype, device))


@pytest.mark.parametrize("shape", [(3, 2, 11, 1), (3, 11, 5), (3, 5), (3, 1, 1, 1), (3,)], ids=str)
def test_positions_of_each_axis_broadcast(device: str, shape: tuple[int, ...]) -> None:
    x = random_values((2, 11, 5, 16), device=device)
    positions = random_positions(shape, device=device)
    check(x, positions, random_inv_freq((3, 8), device=device))


def test_sections_of_the_pairs_can_follow_different_axes(device: str) -> None:
    x = random_values((2, 11, 5, 32), device=device)
    positions = random_positions((3, 2, 11, 1), low=0, high=1000, device=device)
    section = torch.arange(16, device=device) % 3
    inv_freq = random_inv_freq((16,), device=device) * (
        section == torch.arange(3, device=device)[:, None]
    )
    rotated = torch_rope.apply(x, positions, inv_freq)
    for axis in range(3):
        alone = reference.apply(x, positions[axis], inv_freq.sum(0))
        pairs = (section == axis).repeat(2).cpu()
        expected = Expected(*(tensor[..., pairs] for tensor in alone))
        assert_rotated(rotated.cpu()[..., pairs], expected)


def test_frequencies_say_how_many_pairs_there_are(device: str) -> None:
    x = random_values((9, 32), device=device)
    positions = random_positions((9,), device=device)
    inv_freq = random_inv_freq((5,), device=device)
    rotated = torch_rope.apply(x, positions, inv_freq, rotary_offset=3)
    named = torch_rope.apply(x, positions, inv_freq, rotary_dim=10, rotary_offset=3)
    assert_same_bits(rotated, named)
    assert_rotated(rotated, reference.apply(x, positions, inv_freq, rotary_offset=3))


@pytest.mark.parametrize("dtype", INV_FREQ_DTYPES)
def test_frequencies_can_have_any_strides(device: str, dtype: torch.dtype) -> None:
    x = random_values((9, 32), device=device)
    every_third = random_inv_freq((48,), dtype, device)[::3]
    check(x, random_positions((9,), device=device), every_third)
    one_for_all = random_inv_freq((1,), dtype, device).expand(16)
    check(x, random_positions((9,), device=device), one_for_all)
    transposed = random_inv_freq((16, 2), dtype, device).t()
    check(x, random_positions((2, 9), device=device), transposed)


def test_positions_can_have_any_strides(device: str) -> None:
    x = random_values((4, 9, 3, 32), device=device)
    check(x, random_positions((18, 1), device=device)[::2])
    check(x, random_positions((3, 9, 4), device=device).permute(2, 1, 0))
    check(x, random_positions((9, 1), device=device).expand(4, 9, 3))


def test_float32_frequencies_round_the_angle_to_float32(device: str) -> None:
    # Products near 1e6 are 1 / 16 apart in float32: an angle that is not rounded is far off.
    x = random_values((64, 32), torch.float64, device)
    positions = random_positions((64,), device=device, low=900_000, high=1_100_000)
    check(x, positions, random_inv_freq((16,), torch.float32, device))


def test_float32_frequencies_round_the_position_to_float32(device: str) -> None:
    x = random_values((32,), device=device)
    inv_freq = random_inv_freq((16,), torch.float32, device)
    rotated = torch_rope.apply(x, torch.tensor(2**24 + 1, device=device), inv_freq)
    assert_same_bits(rotated, torch_rope.apply(x, torch.tensor(2**24, device=device), inv_freq))


def test_float64_frequencies_keep_every_bit_of_the_position(device: str) -> None:
    x = random_values((2,), torch.float64, device)
    inv_freq = torch.tensor([1.0], dtype=torch.float64, device=device)
    check(x, torch.tensor(2**32 + 5, device=device), inv_freq)
    check(x, torch.tensor(-(2**40) - 1, device=device), inv_freq)
    check(x, torch.tensor(0.1, dtype=torch.float64, device=device), inv_freq)


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e8), (torch.float64, 1e16)])
def test_axes_are_summed_from_left_to_right(device: str, dtype: torch.dtype, large: float) -> None:
    # From the left the 1 is lost in the rounding, and the sum is 0; in another order it is 1.
    x = random_values((4, 16), torch.float64, device)
    positions = torch.tensor([large, 1.0, -large], dtype=torch.float64, device=device)
    inv_freq = torch.ones(3, 8, dtype=dtype, device=device)
    unturned = reference.apply(x, torch.tensor(0))
    assert_rotated(torch_rope.apply(x, positions, inv_freq), unturned)


@pytest.mark.parametrize("dtype", INV_FREQ_DTYPES)
def test_products_of_axes_are_rounded_before_they_are_summed(
    device: str, dtype: torch.dtype
) -> None:
    # The products cancel once rounded: a fused multiply-add would leave the rounding error.
    position = 100_003.0
    frequency = torch.tensor(0.7 if dtype == torch.float32 else 7e11 / 3, dtype=dtype)
    product = position * frequency
    positions = torch.tensor([position, -1.0], dtype=torch.float64, device=device)
    inv_freq = torch.stack([frequency, product])[:, None].expand(2, 8).to(device)
    x = random_values((4, 16), torch.float64, device)
    unturned = reference.apply(x, torch.tensor(0))
    assert_rotated(torch_rope.apply(x, positions, inv_freq), unturned)
    assert_rotated(torch_rope.apply(x, positions.flip(0), inv_freq.flip(0)), unturned)


def test_negative_positions_turn_backwards(device: str) -> None:
    x = random_values((9, 32), device=device)
    check(x, torch.arange(-9, 0, device=device))
    check(x, torch.arange(-9, 0, device=device), random_inv_freq((16,), torch.float32, device))


def test_position_zero_changes_nothing(device: str) -> None:
    x = random_values((9, 32), torch.float64, device)
    assert_same_bits(torch_rope.apply(x, torch.tensor(0, device=device)), x)


def test_values_near_the_ends_of_a_dtype_are_rotated(device: str) -> None:
    for dtype in FLOAT_DTYPES:
        info = torch.finfo(dtype)
        for scale in (info.max / 8, info.smallest_normal):
            x = random_values((9, 32), torch.float64, device).clamp(-4, 4).mul(scale).to(dtype)
            check(x, random_positions((9,), device=device))


def test_an_output_of_several_huge_pages_has_the_bits_of_small_ones(device: str) -> None:
    x = random_values((4100, 8, 66), torch.float32, device=device)
    positions = torch.arange(4100, device=device)[:, None]
    parts = zip(x.split(100), positions.split(100), strict=True)
    expected = torch.cat([torch_rope.apply(*part) for part in parts])
    assert torch.equal(torch_rope.apply(x, positions), expected)
