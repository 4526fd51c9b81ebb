"""apply_ and apply_cos_sin_: what they write, and which overlapping memory they refuse."""

import pytest
import torch
import torch_rope
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_same_bits, bits, random_positions, random_values
from strategies import (
    FLOAT_DTYPES,
    Application,
    Layout,
    TableApplication,
    applications,
    table_applications,
)


@given(application=applications(expanded=False))
def test_any_call_gives_the_bits_of_the_functional_form(
    device: str, application: Application
) -> None:
    x, positions, inv_freq = application.tensors(device)
    expected = torch_rope.apply(x, positions, inv_freq, **application.options)
    torch_rope.apply_(x, positions, inv_freq, **application.options)
    assert_same_bits(x, expected)


@given(application=table_applications(expanded=False))
def test_any_call_with_tables_gives_the_bits_of_the_functional_form(
    device: str, application: TableApplication
) -> None:
    x, cos, sin, positions = application.tensors(device)
    expected = torch_rope.apply_cos_sin(x, cos, sin, positions, **application.options)
    torch_rope.apply_cos_sin_(x, cos, sin, positions, **application.options)
    assert_same_bits(x, expected)


@given(application=applications(expanded=False))
def test_memory_around_x_is_untouched(device: str, application: Application) -> None:
    x, positions, inv_freq = application.tensors(device)
    layout = application.x.layout
    buffer = random_values((layout.span,), x.dtype, device)
    before = bits(buffer)
    torch_rope.apply_(layout.of(buffer), positions, inv_freq, **application.options)
    around = torch.ones(layout.span, dtype=torch.bool)
    around[layout.addresses()] = False
    assert torch.equal(bits(buffer)[around], before[around])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_transposed_view_is_rotated_where_it_is(device: str, dtype: torch.dtype) -> None:
    base = random_values((2, 4, 9, 64), dtype, device)
    positions = random_positions((9, 1), device=device)
    expected = torch_rope.apply(base.transpose(1, 2), positions)
    torch_rope.apply_(base.transpose(1, 2), positions)
    assert_same_bits(base.transpose(1, 2), expected)


def test_a_single_tensor_is_returned_as_it_was_given(device: str) -> None:
    x = random_values((9, 64), device=device)
    assert torch_rope.apply_(x, torch.tensor(3, device=device)) is x


def test_a_pair_is_returned_as_it_was_given(device: str) -> None:
    pair = random_values((9, 64), device=device), random_values((9, 64), device=device, seed=1)
    returned = torch_rope.apply_(pair, torch.tensor(3, device=device))
    assert isinstance(returned, tuple)
    assert returned[0] is pair[0]
    assert returned[1] is pair[1]


def test_tables_return_what_was_given(device: str) -> None:
    q, k, table = (random_values((9, 64), device=device, seed=seed) for seed in range(3))
    cos, sin = table.chunk(2, dim=1)
    assert torch_rope.apply_cos_sin_(q, cos, sin) is q
    returned = torch_rope.apply_cos_sin_((q, k), cos, sin)
    assert returned[0] is q
    assert returned[1] is k


def test_the_version_counter_of_what_is_written_goes_up(device: str) -> None:
    q, k = random_values((9, 64), device=device), random_values((9, 64), device=device, seed=1)
    positions = torch.tensor(3, device=device)
    cos = random_values((9, 32), device=device, seed=2)
    for step in range(1, 4):
        before = q._version, k._version
        if step == 1:
            torch_rope.apply_((q, k), positions)
        elif step == 2:
            torch_rope.apply_cos_sin_((q, k), cos, cos)
        else:
            torch_rope.apply_(q, positions)
            torch_rope.apply_cos_sin_(k, cos, cos)
        assert q._version > before[0]
        assert k._version > before[1]


def test_the_version_counter_of_what_is_read_stays(device: str) -> None:
    x = random_values((9, 64), device=device)
    positions = random_positions((9,), device=device)
    torch_rope.apply(x, positions)
    torch_rope.apply_(x.clone(), positions)
    assert (x._version, positions._version) == (0, 0)


def test_in_place_works_in_inference_mode(device: str) -> None:
    x = random_values((9, 64), device=device)
    expected = torch_rope.apply(x, torch.tensor(3, device=device))
    with torch.inference_mode():
        torch_rope.apply_(x, torch.tensor(3, device=device))
    assert_same_bits(x, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_q_and_k_of_one_packed_tensor_are_rotated_and_v_is_not(
    device: str, dtype: torch.dtype
) -> None:
    packed = random_values((2, 9, 3, 4, 64), dtype, device)
    q, k, v = packed.unbind(2)
    positions = random_positions((9, 1), device=device)
    expected = torch_rope.apply(q, positions), torch_rope.apply(k, positions), v.clone()
    torch_rope.apply_((q, k), positions)
    for actual, rotated in zip(packed.unbind(2), expected, strict=True):
        assert_same_bits(actual, rotated)


def test_q_and_k_that_alternate_in_memory_share_nothing(device: str) -> None:
    buffer = random_values((9, 128), device=device)
    q, k = buffer[:, 0::2], buffer[:, 1::2]
    positions = random_positions((9,), device=device)
    expected = torch_rope.apply((q, k), positions)
    torch_rope.apply_((q, k), positions)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])


def test_overlapping_strides_without_a_shared_element_are_taken(device: str) -> None:
    # Elements 0, 3, 2, 5, 4, 7: the strides interleave, the elements differ.
    layout = Layout((3, 2), (2, 3))
    x = layout.values(torch.float32, device)
    expected = torch_rope.apply(x, torch.tensor(3, device=device))
    torch_rope.apply_(x, torch.tensor(3, device=device))
    assert_same_bits(x, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_an_expanded_x_is_refused(device: str, dim: int) -> None:
    size = [4, 8]
    size[dim] = 1
    x = random_values(tuple(size), device=device).expand(4, 8)
    with pytest.raises(ValueError, match=r"^rope::apply_\(\): expected x to .*, but got"):
        torch_rope.apply_(x, torch.tensor(3, device=device))


def test_overlapping_windows_are_refused(device: str) -> None:
    x = Layout((5, 4), (2, 1)).values(torch.float32, device)
    with pytest.raises(ValueError, match=r"^rope::apply_\(\): expected x to .*, but got"):
        torch_rope.apply_(x, torch.tensor(3, device=device))


@pytest.mark.parametrize("size", [(4, 1), (1, 8), (0, 8)], ids=str)
def test_dimensions_of_one_element_overlap_nothing(device: str, size: tuple[int, int]) -> None:
    x = random_values((8,), device=device).as_strided(size, (0 if size[0] == 1 else 2, 1))
    torch_rope.apply_(x, torch.tensor(3, device=device), rotary_dim=0)


def test_q_that_is_k_is_refused(device: str) -> None:
    x = random_values((4, 8), device=device)
    with pytest.raises(ValueError, match=r"^rope::apply_qk_\(\): expected (q|k) .*to .*, but got"):
        torch_rope.apply_((x, x), torch.tensor(3, device=device))


@pytest.mark.parametrize("shared", [1, 8, 24])
def test_q_and_k_that_share_elements_are_refused_and_left_alone(device: str, shared: int) -> None:
    buffer = random_values((64,), device=device)
    before = buffer.clone()
    q, k = buffer[:32].view(4, 8), buffer[32 - shared : 64 - shared].view(4, 8)
    with pytest.raises(ValueError, match=r"^rope::apply_qk_\(\): expected (q|k) .*to .*, but got"):
        torch_rope.apply_((q, k), torch.tensor(3, device=device))
    assert_same_bits(buffer, before)


def test_q_and_k_that_share_elements_can_be_rotated_out_of_place(device: str) -> None:
    buffer = random_values((40,), device=device)
    q, k = buffer[:32].view(4, 8), buffer[8:].view(4, 8)
    positions = random_positions((4,), device=device)
    for actual, x in zip(torch_rope.apply((q, k), positions), (q, k), strict=True):
        assert_same_bits(actual, torch_rope.apply(x.clone(), positions))


@pytest.mark.parametrize("argument", ["positions", "inv_freq"])
def test_x_that_shares_memory_with_what_sets_its_angles_is_refused(
    device: str, argument: str
) -> None:
    x = random_values((4, 8), torch.float64, device)
    before = x.clone()
    positions = x[:, 0] if argument == "positions" else torch.arange(4, device=device)
    inv_freq = x[0, :4] if argument == "inv_freq" else None
    with pytest.raises(ValueError, match=rf"^rope::apply_\(\): expected x to .*{argument}"):
        torch_rope.apply_(x, positions, inv_freq)
    assert_same_bits(x, before)


@pytest.mark.parametrize("argument", ["cos", "sin"])
def test_x_that_shares_memory_with_its_tables_is_refused(device: str, argument: str) -> None:
    x = random_values((4, 8), device=device)
    before = x.clone()
    named = {name: random_values((4, 4), device=device) for name in ("cos", "sin")}
    named[argument] = x[:, 4:]
    with pytest.raises(ValueError, match=rf"^rope::apply_cos_sin_\(\): expected x to .*{argument}"):
        torch_rope.apply_cos_sin_(x, *named.values())
    assert_same_bits(x, before)


@st.composite
def any_layout(draw: st.DrawFn) -> Layout:
    """Draws a small layout whose elements may overlap."""
    dims = draw(st.integers(0, 3))
    size = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride = [draw(st.integers(0, 12)) for _ in range(dims)]
    return Layout((*size, 2), (*stride, draw(st.integers(1, 7))), draw(st.integers(0, 6)))


@given(layout=any_layout())
def test_exactly_the_layouts_whose_elements_overlap_are_refused(
    device: str, layout: Layout
) -> None:
    x = layout.values(torch.float32, device)
    addresses = layout.addresses()
    positions = torch.tensor(3, device=device)
    if len(set(addresses)) < len(addresses):
        with pytest.raises(ValueError, match="expected x to"):
            torch_rope.apply_(x, positions)
    else:
        expected = torch_rope.apply(x, positions)
        assert_same_bits(torch_rope.apply_(x, positions), expected)


@given(q_layout=any_layout(), k_layout=any_layout())
def test_exactly_the_pairs_that_share_an_element_are_refused(
    device: str, q_layout: Layout, k_layout: Layout
) -> None:
    buffer = random_values((max(q_layout.span, k_layout.span),), device=device)
    q, k = q_layout.of(buffer), k_layout.of(buffer)
    addresses = q_layout.addresses() + k_layout.addresses()
    positions = torch.tensor(3, device=device)
    if len(set(addresses)) < len(addresses):
        with pytest.raises(ValueError, match=r"expected (q|k)"):
            torch_rope.apply_((q, k), positions)
    else:
        expected = torch_rope.apply((q, k), positions)
        torch_rope.apply_((q, k), positions)
        assert_same_bits(q, expected[0])
        assert_same_bits(k, expected[1])


def test_an_inference_tensor_is_refused_before_it_is_written(device: str) -> None:
    with torch.inference_mode():
        x = random_values((9, 64), device=device)
    copy = x.clone()
    with pytest.raises(RuntimeError, match="inference tensor"):
        torch_rope.apply_(x, torch.tensor(3, device=device))
    assert torch.equal(x, copy)
    with torch.inference_mode():
        torch_rope.apply_(x, torch.tensor(3, device=device))
    assert not torch.equal(x, copy)


@pytest.mark.parametrize("norms", [False, True])
def test_a_view_that_autograd_refuses_may_be_changed_beside_one_that_records(
    device: str, norms: bool
) -> None:
    positions = torch.arange(3, device=device)
    weights = [(None, None)] if norms else []
    rotate_ = torch_rope.norm_apply_ if norms else torch_rope.apply_
    rotate = torch_rope.norm_apply if norms else torch_rope.apply
    leaf = random_values((3, 8), device=device).requires_grad_()
    q, k = leaf * 2, random_values((2, 3, 8), device=device).unbind(0)[0]
    expected = rotate((q, k), *weights, positions)
    rotate_((q, k), *weights, positions)
    assert_same_bits(q, expected[0])
    assert_same_bits(k, expected[1])
    assert q.requires_grad
    assert not k.requires_grad
    # Where it would be recorded it is refused, and nothing is written.
    q, k = leaf * 2, leaf.unbind(0)[0]
    copy = q.clone()
    with pytest.raises(RuntimeError, match="view"):
        rotate_((q, k), *weights, positions[0])
    assert_same_bits(q, copy)
