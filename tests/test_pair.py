"""q and k rotated together."""

from typing import Any

import pytest
import reference
import torch
import torch_rope
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    assert_rotated,
    assert_same_bits,
    random_inv_freq,
    random_positions,
    random_values,
)
from strategies import (
    FLOAT_DTYPES,
    Application,
    TableApplication,
    applications,
    layouts,
    table_applications,
)
from torch import Tensor


def check(
    q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor | None = None, **options: Any
) -> None:
    """Compares the pair with the reference, and with q and k rotated one by one."""
    pair = torch_rope.apply((q, k), positions, inv_freq, **options)
    for actual, x in zip(pair, (q, k), strict=True):
        assert_same_bits(actual, torch_rope.apply(x, positions, inv_freq, **options))
        assert_rotated(actual, reference.apply(x, positions, inv_freq, **options))


@given(application=applications(), data=st.data())
def test_a_pair_gives_the_bits_of_two_singles(
    device: str, application: Application, data: st.DataObject
) -> None:
    q, positions, inv_freq = application.tensors(device)
    k_layout = data.draw(layouts(q.shape, expanded=True))
    k = k_layout.values(data.draw(st.sampled_from(FLOAT_DTYPES)), device, seed=7)
    check(q, k, positions, inv_freq, **application.options)


@given(application=table_applications(), data=st.data())
def test_a_pair_rotated_by_tables_gives_the_bits_of_two_singles(
    device: str, application: TableApplication, data: st.DataObject
) -> None:
    q, cos, sin, positions = application.tensors(device)
    k_layout = data.draw(layouts(q.shape, expanded=True))
    k = k_layout.values(data.draw(st.sampled_from(FLOAT_DTYPES)), device, seed=7)
    pair = torch_rope.apply_cos_sin((q, k), cos, sin, positions, **application.options)
    for actual, x in zip(pair, (q, k), strict=True):
        assert_same_bits(
            actual, torch_rope.apply_cos_sin(x, cos, sin, positions, **application.options)
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_q_and_k_can_have_different_heads(device: str, dtype: torch.dtype) -> None:
    q = random_values((2, 17, 8, 64), dtype, device)
    k = random_values((2, 17, 2, 64), dtype, device, seed=1)
    check(q, k, random_positions((17, 1), device=device))
    check(
        q,
        k,
        random_positions((2, 17, 1), device=device),
        random_inv_freq((32,), torch.float32, device),
    )


def test_k_can_be_the_larger_one(device: str) -> None:
    q = random_values((2, 5, 2, 64), device=device)
    k = random_values((2, 5, 8, 64), device=device, seed=1)
    check(q, k, random_positions((5, 1), device=device))


@pytest.mark.parametrize("q_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("k_dtype", FLOAT_DTYPES)
def test_q_and_k_can_have_different_dtypes(
    device: str, q_dtype: torch.dtype, k_dtype: torch.dtype
) -> None:
    q = random_values((2, 5, 4, 64), q_dtype, device)
    k = random_values((2, 5, 4, 64), k_dtype, device, seed=1)
    check(q, k, random_positions((5, 1), device=device))


def test_q_and_k_can_have_different_ranks(device: str) -> None:
    q = random_values((2, 5, 4, 64), device=device)
    k = random_values((5, 1, 64), device=device, seed=1)
    check(q, k, random_positions((5, 1), device=device))
    check(q, k[0, 0], torch.tensor(4, device=device))


def test_q_and_k_can_have_different_batches_and_lengths(device: str) -> None:
    q = random_values((2, 1, 4, 64), device=device)
    k = random_values((3, 7, 2, 64), device=device, seed=1)
    check(q, k, torch.tensor(4, device=device))


def test_q_and_k_can_have_different_strides(device: str) -> None:
    q = random_values((2, 4, 5, 64), device=device).transpose(1, 2)
    k = random_values((2, 5, 2, 128), device=device, seed=1)[..., 32:96]
    check(q, k, random_positions((5, 1), device=device))


def test_the_axis_of_q_and_k_can_differ_in_size(device: str) -> None:
    q = random_values((5, 4, 64), device=device)
    k = random_values((5, 4, 96), device=device, seed=1)
    positions = random_positions((5, 1), device=device)
    check(q, k, positions, rotary_dim=32)
    check(q, k, positions, random_inv_freq((20,), device=device), rotary_offset=8)


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
@pytest.mark.parametrize("options", [{}, {"rotary_offset": 2}, {"interleaved": True}], ids=str)
def test_slices_of_different_sizes_need_a_rotary_dim(
    device: str, options: dict[str, Any], operator: Any
) -> None:
    q = random_values((5, 4, 8), device=device)
    k = random_values((5, 4, 16), device=device, seed=1)
    before = q.clone()
    with pytest.raises(ValueError, match=r"expected rotary_dim to be given where q and k have"):
        operator((q, k), random_positions((5, 1), device=device), **options)
    assert_same_bits(q, before)


def test_a_negative_axis_counts_from_the_end_of_each(device: str) -> None:
    q = random_values((2, 5, 64, 4), device=device)
    k = random_values((5, 64, 4), device=device, seed=1)
    check(q, k, random_positions((5, 4), device=device), embedding_axis=-2)


def test_one_of_the_pair_can_be_empty(device: str) -> None:
    q = random_values((2, 5, 4, 64), device=device)
    check(q, q[:, :, :0], random_positions((5, 1), device=device))
    check(q[:0], q, random_positions((5, 1), device=device))


def test_q_and_k_can_be_the_same_tensor(device: str) -> None:
    x = random_values((2, 5, 4, 64), device=device)
    check(x, x, random_positions((5, 1), device=device))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
def test_options_hold_for_both(device: str, interleaved: bool, conjugate: bool) -> None:
    q = random_values((2, 5, 8, 64), device=device)
    k = random_values((2, 5, 2, 64), device=device, seed=1)
    check(
        q,
        k,
        random_positions((5, 1), device=device),
        rotary_dim=40,
        rotary_offset=6,
        max_wavelength=5e5,
        scale_factor=4.0,
        attention_factor=1.2,
        interleaved=interleaved,
        conjugate=conjugate,
    )


@pytest.mark.parametrize("operator", [torch_rope.apply, torch_rope.apply_])
def test_in_place_or_not_a_pair_gives_the_same_bits(device: str, operator: Any) -> None:
    q = random_values((2, 5, 8, 64), torch.bfloat16, device)
    k = random_values((2, 5, 2, 64), torch.float32, device, seed=1)
    positions = random_positions((5, 1), device=device)
    expected = [torch_rope.apply(x, positions) for x in (q, k)]
    for actual, single in zip(operator((q, k), positions), expected, strict=True):
        assert_same_bits(actual, single)
