"""torch.compile: one graph, the operator kept, the same bits."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.decorators import mark_dynamic, mark_static, mark_unbacked
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

LENGTHS = (7, 64, 301, 4097)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forgets what was compiled before, here and by other versions of the library."""
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield
    torch.compiler.reset()


class Inputs(NamedTuple):
    """What the forms rotate, and by what."""

    packed: Tensor  # q, k and v: (2, tokens, 3, 4, 8)
    positions: Tensor  # (tokens, 1)
    inv_freq: Tensor  # (4,)
    axes: Tensor  # (3, tokens, 1)
    axis_inv_freq: Tensor  # (3, 4)
    weight: Tensor  # (4, 8)
    cos: Tensor  # (tokens, 1, 4)
    sin: Tensor
    cos_rows: Tensor  # (50, 4)
    sin_rows: Tensor

    @classmethod
    def random(cls, tokens: int, device: str, *, seed: int = 0) -> "Inputs":
        """Draws the tensors."""

        def values(*shape: int) -> Tensor:
            return random_values(shape, device=device, seed=seed)

        def positions(*shape: int) -> Tensor:
            return random_positions(shape, device=device, low=0, high=50, seed=seed)

        return cls(
            values(2, tokens, 3, 4, 8),
            positions(tokens, 1),
            random_inv_freq((4,), torch.float32, device, seed=seed),
            positions(3, tokens, 1),
            random_inv_freq((3, 4), torch.float32, device, seed=seed),
            values(4, 8),
            values(tokens, 1, 4),
            values(tokens, 1, 4),
            values(50, 4),
            values(50, 4),
        )

    def with_grad(self) -> "Inputs":
        """Returns copies that ask for gradients."""
        return Inputs(*(x.clone().requires_grad_(x.is_floating_point()) for x in self))

    def gradients(self, results: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Returns the gradients of each that asks for one."""
        asking = [x for x in self if x.requires_grad]
        seeds = [random_values(tuple(y.shape), device=str(y.device), seed=7) for y in results]
        return list(torch.autograd.grad(results, asking, seeds, allow_unused=True))


Form = Callable[[Inputs], tuple[Tensor, ...]]


def one(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one tensor, a view with gaps."""
    return (torch_rope.apply(given.packed[:, :, 0], given.positions, interleaved=True),)


def pair(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates a pair, the second with fewer heads."""
    q, k, _ = given.packed.unbind(2)
    q, k = torch_rope.apply((q, k[:, :, :2]), given.positions, rotary_dim=6, max_wavelength=5e5)
    return q.sin(), k


def one_by_inv_freq(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one tensor by given frequencies, along another axis."""
    x = given.packed[:, :, 0].transpose(1, 3)
    return (torch_rope.apply(x, given.positions[:, 0], given.inv_freq, embedding_axis=1),)


def pair_by_axes(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates a pair by positions on three axes."""
    q, k, _ = given.packed.unbind(2)
    return torch_rope.apply((q, k), given.axes, given.axis_inv_freq, conjugate=True)


def one_by_tables(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one tensor by tables."""
    return (torch_rope.apply_cos_sin(given.packed[:, :, 2], given.cos, given.sin),)


def pair_by_rows(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates a pair by rows of tables."""
    q, k, _ = given.packed.unbind(2)
    return torch_rope.apply_cos_sin((q, k), given.cos_rows, given.sin_rows, given.positions)


def one_by_full_width_tables(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one tensor by tables with a column for each element."""
    cos, sin = (torch.cat((t, 2 * t), dim=-1) for t in (given.cos, given.sin))
    return (torch_rope.apply_cos_sin(given.packed[:, :, 2], cos, sin, full_width=True),)


def one_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one view of a packed tensor where it is."""
    packed = given.packed * 2
    torch_rope.apply_(packed[:, :, 1], given.positions)
    return (packed,)


def pair_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates two views of a packed tensor where they are."""
    packed = given.packed * 2
    q, k = torch_rope.apply_((packed[:, :, 1], packed[:, :, 2]), given.positions, given.inv_freq)
    return packed, q * k


def one_by_rows_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates one tensor by rows of tables where it is."""
    x = given.packed[:, :, 0].clone(memory_format=torch.contiguous_format)
    torch_rope.apply_cos_sin_(x, given.cos_rows, given.sin_rows, given.positions)
    return (x,)


def pair_by_tables_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Rotates two slices of a packed tensor by tables where they are."""
    packed = given.packed * 2
    pair = (packed.narrow(2, 0, 2), packed.narrow(2, 2, 1))
    torch_rope.apply_cos_sin_(pair, given.cos.unsqueeze(1), given.sin.unsqueeze(1))
    return (packed,)


def norm(given: Inputs) -> tuple[Tensor, ...]:
    """Normalizes over heads and rotates one tensor, a view with gaps."""
    x = given.packed[:, :, 0]
    return (torch_rope.norm_apply(x, given.weight, given.positions, norm_axes=(-2, 3)),)


def pair_of_norms(given: Inputs) -> tuple[Tensor, ...]:
    """Normalizes a pair after its rotation, the second with fewer heads and without a weight."""
    q, k, _ = given.packed.unbind(2)
    return torch_rope.norm_apply(
        (q, k[:, :, :2]), (given.weight[0], None), given.positions, given.inv_freq, norm_last=True
    )


def pair_of_norms_by_rows(given: Inputs) -> tuple[Tensor, ...]:
    """Normalizes a pair and rotates it by rows of tables."""
    q, k, _ = given.packed.unbind(2)
    weights = given.weight, given.weight
    tables = given.cos_rows, given.sin_rows, given.positions
    return torch_rope.norm_apply_cos_sin((q, k), weights, *tables, weight_offset=1.0, eps=0.1)


def norm_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Normalizes one view of a packed tensor where it is."""
    packed = given.packed * 2
    torch_rope.norm_apply_(packed[:, :, 1], given.weight, given.positions)
    return (packed,)


def pair_of_norms_by_tables_in_place(given: Inputs) -> tuple[Tensor, ...]:
    """Normalizes two views of a packed tensor where they are."""
    packed = given.packed * 2
    pair = packed[:, :, 1], packed[:, :, 2]
    torch_rope.norm_apply_cos_sin_(pair, (None, given.weight), given.cos, given.sin, eps=0.1)
    return (packed,)


FUNCTIONAL_FORMS = (
    one,
    pair,
    one_by_inv_freq,
    pair_by_axes,
    one_by_tables,
    one_by_full_width_tables,
    pair_by_rows,
    norm,
    pair_of_norms,
    pair_of_norms_by_rows,
)
FORMS = (
    *FUNCTIONAL_FORMS,
    one_in_place,
    pair_in_place,
    one_by_rows_in_place,
    pair_by_tables_in_place,
    norm_in_place,
    pair_of_norms_by_tables_in_place,
)
forms = pytest.mark.parametrize("form", FORMS)


def every_form(given: Inputs) -> tuple[Tensor, ...]:
    """Does all of it in one program."""
    return tuple(result for form in FORMS for result in form(given))


def compile_whole(function: Callable[..., Any], **options: Any) -> Any:
    """Compiles a function as one graph, without generating code unless told so."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def assert_all_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Compares the bits and the strides of tensors."""
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)
        assert one.stride() == other.stride()


def assert_all_close(actual: Any, expected: Any) -> None:
    """Compares tensors up to the order of sums of float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


recompiling_is_an_error = torch._dynamo.config.patch(error_on_recompile=True)

# -----------------------------------------------------------------------------
# One graph, compiled once


@forms
def test_a_compiled_form_is_one_graph_with_the_same_bits(device: str, form: Form) -> None:
    given = Inputs.random(9, device)
    assert_all_same(compile_whole(form)(given), form(given))


@forms
def test_every_length_has_the_results_and_gradients_of_eager(device: str, form: Form) -> None:
    compiled = compile_whole(form, dynamic=True)
    compiled(Inputs.random(5, device).with_grad())
    for tokens in LENGTHS:
        given = Inputs.random(tokens, device).with_grad()
        with recompiling_is_an_error:
            actual = compiled(given)
        expected = form(given)
        assert_all_same(actual, expected)
        gradients, expected_gradients = given.gradients(actual), given.gradients(expected)
        assert gradients[0] is not None
        assert expected_gradients[0] is not None
        assert_same_bits(gradients[0], expected_gradients[0])
        assert_all_close(gradients, expected_gradients)


def test_the_second_length_is_the_last_that_compiles(device: str) -> None:
    compiled = compile_whole(pair)
    for tokens in (5, 6):
        compiled(Inputs.random(tokens, device))
    for tokens in LENGTHS:
        given = Inputs.random(tokens, device)
        with recompiling_is_an_error:
            assert_all_same(compiled(given), pair(given))
    assert counters["stats"]["unique_graphs"] == 2


def test_other_positions_compile_nothing_anew(device: str) -> None:
    compiled = compile_whole(every_form, dynamic=False)
    compiled(Inputs.random(9, device))
    given = Inputs.random(9, device, seed=1)
    with recompiling_is_an_error:
        assert_all_same(compiled(given), every_form(given))


def test_generated_code_has_the_results_and_gradients_of_eager(device: str) -> None:
    compiled = compile_whole(every_form, dynamic=True, backend="inductor")
    compiled(Inputs.random(5, device).with_grad())
    given = Inputs.random(9, device).with_grad()
    with recompiling_is_an_error:
        actual = compiled(given)
    expected = every_form(given)
    assert_all_close(actual, expected)
    assert_all_close(given.gradients(actual), given.gradients(expected))


def test_generated_code_serves_every_length(device: str) -> None:
    compiled = compile_whole(pair, dynamic=True, backend="inductor")
    for tokens in (5, *LENGTHS):
        given = Inputs.random(tokens, device)
        given = given._replace(packed=given.packed.requires_grad_())
        # Sums over tokens, as gradients of frequencies are, TorchInductor compiles anew by itself.
        with torch._dynamo.config.patch(error_on_recompile=tokens != 5):
            actual = compiled(given)
        expected = pair(given)
        assert_all_close(actual, expected)
        assert_all_close(given.gradients(actual), given.gradients(expected))


class Recorder:
    """A compiler back end that keeps the graphs that autograd left and runs them as they are.

    Attributes:
        forward: The graphs of forward passes.
        backward: The graphs of backward passes.
    """

    def __init__(self) -> None:
        """Starts with no graph."""
        self.forward: list[GraphModule] = []
        self.backward: list[GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    @staticmethod
    def _keep(graphs: list[GraphModule]) -> Callable[..., Any]:
        def keep(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        return keep


def operators_of(graph: GraphModule) -> list[str]:
    """Names the operators of the library in a graph."""
    targets = [str(node.target) for node in graph.graph.nodes]
    return [target.removeprefix("rope.") for target in targets if target.startswith("rope.")]


def test_the_graph_of_a_form_is_the_operator(device: str) -> None:
    operators = []
    for form in FUNCTIONAL_FORMS:
        recorder = Recorder()
        compile_whole(form, backend=recorder.backend)(Inputs.random(9, device))
        operators += operators_of(recorder.forward[0])
    assert operators == [
        "apply.default",
        "apply_qk.default",
        "apply.default",
        "apply_qk.default",
        "apply_cos_sin.default",
        "apply_cos_sin.default",
        "apply_cos_sin_qk.default",
        "norm_apply.default",
        "norm_apply_qk.default",
        "norm_apply_cos_sin_qk.default",
    ]


@pytest.mark.parametrize("form", FUNCTIONAL_FORMS)
def test_a_functional_form_changes_no_input(device: str, form: Form) -> None:
    """As CUDA graphs (``mode="reduce-overhead"``) ask."""
    recorder = Recorder()
    given = Inputs.random(9, device).with_grad()
    given.gradients(compile_whole(form, backend=recorder.backend)(given))
    for graph in (recorder.forward[0], recorder.backward[0]):
        for node in graph.graph.nodes:
            assert "functionalized" not in str(node.target)
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable, node


def test_reduce_overhead_is_not_refused(device: str) -> None:
    def program(given: Inputs) -> tuple[Tensor, ...]:
        return tuple(result for form in FUNCTIONAL_FORMS for result in form(given))

    given = Inputs.random(9, device)
    compiled = compile_whole(program, backend="inductor", mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_all_close(compiled(given), program(given))
    # Without CUDA there is nothing to record, which is no refusal of these programs.
    assert counters["inductor"]["cudagraph_skips"] <= (0 if device == "cuda" else 1)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_or_none(device: str, tokens: int) -> None:
    given = Inputs.random(tokens, device).with_grad()
    actual, expected = compile_whole(every_form)(given), every_form(given)
    assert_all_same(actual, expected)
    assert_all_close(given.gradients(actual), given.gradients(expected))


def test_one_position_for_all(device: str) -> None:
    compiled = compile_whole(torch_rope.apply)
    x = random_values((9, 8), device=device)
    compiled(x, torch.tensor(3, device=device))
    position = torch.tensor(4, device=device)
    with recompiling_is_an_error:
        assert_same_bits(compiled(x, position), torch_rope.apply(x, position))


# -----------------------------------------------------------------------------
# Memory


def saved_for_backward(recorder: Recorder) -> list[Tensor]:
    """Returns the tensors that go from the forward to the backward pass."""
    placeholders = [node for node in recorder.backward[0].graph.nodes if node.op == "placeholder"]
    return [
        node.meta["val"]
        for node in placeholders
        if "tangents" not in node.name and isinstance(node.meta["val"], Tensor)
    ]


@pytest.mark.parametrize("form", [one, pair, one_by_inv_freq, pair_by_axes, pair_by_rows])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_gradient_of_x_keeps_no_activation(device: str, form: Form, dynamic: bool) -> None:
    recorder = Recorder()
    given = Inputs.random(9, device)
    given = given._replace(packed=given.packed.requires_grad_())
    # pair takes a sine, which keeps its argument.
    kept = 1 if form is pair else 0
    given.gradients(compile_whole(form, backend=recorder.backend, dynamic=dynamic)(given))
    saved = saved_for_backward(recorder)
    assert sum(x.dim() == 4 for x in saved) == kept
    side_inputs = {tuple(x.shape) for x in given[1:]} | {(9,)}
    if not dynamic:
        assert {tuple(x.shape) for x in saved if x.dim() != 4} <= side_inputs


@pytest.mark.parametrize("form", [norm, pair_of_norms, pair_of_norms_by_rows])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_gradients_of_norms_keep_their_inputs(device: str, form: Form, dynamic: bool) -> None:
    recorder = Recorder()
    given = Inputs.random(9, device)
    given = given._replace(
        packed=given.packed.requires_grad_(), weight=given.weight.requires_grad_()
    )
    given.gradients(compile_whole(form, backend=recorder.backend, dynamic=dynamic)(given))
    backward = operators_of(recorder.backward[0])
    assert backward == [f"_{operators_of(recorder.forward[0])[0].split('.')[0]}_backward.default"]
    # q and k, as views, or the packed tensor that they are views of.
    activations = [x for x in saved_for_backward(recorder) if x.dim() >= 4]
    assert len(activations) <= (1 if form is norm else 2)


def test_gradients_of_angles_keep_one_activation(device: str) -> None:
    recorder = Recorder()
    given = Inputs.random(9, device).with_grad()
    given.gradients(compile_whole(one_by_inv_freq, backend=recorder.backend)(given))
    assert sum(x.dim() >= 4 for x in saved_for_backward(recorder)) == 1


def test_a_checkpoint_in_a_compiled_function_rotates_again(device: str) -> None:
    def rotate(packed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = packed.sin().unbind(2)
        q, k = torch_rope.apply((q, k), positions)
        return q.sin(), k.sin()

    def checkpointed(packed: Tensor, positions: Tensor) -> Any:
        return checkpoint(rotate, packed, positions, use_reentrant=False)

    recorder = Recorder()
    gradients = []
    for function in (rotate, compile_whole(checkpointed, backend=recorder.backend)):
        given = Inputs.random(9, device).with_grad()
        gradients.append(given.gradients(function(given.packed, given.positions))[:1])
    assert_all_close(gradients[1], gradients[0])
    assert operators_of(recorder.forward[0]) == ["apply_qk.default"]
    assert operators_of(recorder.backward[0]) == ["apply_qk.default"] * 2


# -----------------------------------------------------------------------------
# In place


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_generated_code_finds_views_whose_place_depends_on_sizes(
    device: str, inference: Callable[[], Any]
) -> None:
    def rotate(packed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        one, two = packed * 2, packed * 3
        torch_rope.apply_(one[1], positions)
        torch_rope.apply_((two[1], two[2]), positions)
        return one, two

    compiled = compile_whole(rotate, dynamic=True, backend="inductor")
    with inference():
        for tokens in (5, 9):
            packed = random_values((3, 2, tokens, 4, 8), device=device)
            arguments = packed, random_positions((tokens, 1), device=device)
            assert_all_same(compiled(*arguments), rotate(*arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_finds_slices_and_clones_of_an_argument_with_an_offset(
    device: str, dynamic: bool
) -> None:
    def rotate(x: Tensor, other: Tensor, positions: Tensor) -> Tensor:
        clone = x.clone()
        torch_rope.apply_(clone, positions)
        torch_rope.apply_((other[:, :, :1], other[:, :, 1:]), positions)
        return clone + x

    compiled = compile_whole(rotate, dynamic=dynamic, backend="inductor")
    packed = random_values((3, 2, 9, 4, 8), device=device)
    expected = packed.clone()
    positions = random_positions((9, 1), device=device)
    actual = compiled(packed[1], packed[2], positions)
    assert_all_close(actual, rotate(expected[1], expected[2], positions))
    assert_same_bits(packed, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_arguments_can_be_changed(device: str, backend: str, dynamic: bool) -> None:
    def rotate(q: Tensor, k: Tensor, positions: Tensor) -> None:
        torch_rope.apply_((q, k), positions)

    compiled = compile_whole(rotate, dynamic=dynamic, backend=backend)
    packed = random_values((3, 2, 9, 4, 8), device=device)
    expected = packed.clone()
    positions = random_positions((9, 1), device=device)
    compiled(packed[1], packed[2], positions)
    rotate(expected[1], expected[2], positions)
    assert_same_bits(packed, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("by_inv_freq", [False, True])
def test_gradients_flow_through_an_argument_that_was_changed(
    device: str, by_inv_freq: bool, dynamic: bool
) -> None:
    def rotate(q: Tensor, k: Tensor, given: Inputs) -> Tensor:
        torch_rope.apply_((q, k), given.positions, given.inv_freq if by_inv_freq else None)
        return q * 3

    gradients = []
    for function in (rotate, compile_whole(rotate, dynamic=dynamic)):
        given = Inputs.random(9, device).with_grad()
        q, k = given.packed[:, :, 0].clone(), given.packed[:, :, 1].clone()
        result = function(q, k, given)
        gradients.append(given.gradients((result, q, k))[: 2 if by_inv_freq else 1])
    assert_all_close(gradients[1], gradients[0])
    assert gradients[0][0] is not None


def test_tables_of_any_length_rotate_a_tensor_of_one_shape_in_place(device: str) -> None:
    compiled = compile_whole(one_by_rows_in_place, backend="eager")
    for rows in (50, 60):
        given = Inputs.random(9, device)
        tables = (random_values((rows, 4), device=device, seed=seed) for seed in (1, 2))
        given = Inputs(*given[:-2], *tables)
        mark_dynamic(given.cos_rows, 0)
        mark_dynamic(given.sin_rows, 0)
        mark_static(given.packed)
        mark_static(given.positions)
        assert_all_same(compiled(given), one_by_rows_in_place(given))


def test_a_leaf_that_asks_for_a_gradient_is_refused_in_place(device: str) -> None:
    x, positions = random_values((9, 8), device=device).requires_grad_(), torch.arange(9)
    before = x.detach().clone()
    with pytest.raises(Exception, match="leaf Variable"):
        compile_whole(torch_rope.apply_)(x, positions.to(device))
    assert_same_bits(x, before)


def test_rotating_in_place_what_another_backward_needs_is_an_error(device: str) -> None:
    x, positions = random_values((9, 8), device=device).requires_grad_(), torch.arange(9)
    exponential = x.exp()
    compile_whole(torch_rope.apply_)(exponential, positions.to(device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(exponential.sum(), x)


EXPANDED = "expanded", lambda x: x[:1].expand(2, -1, -1, -1, -1)[:, :, :, 0]
TWICE = "one tensor twice", lambda x: (x[:, :, 0], x[:, :, 0])
PARTLY = "partly the same", lambda x: (x[:, :, 0], x[:, :, 0, 1:])


@pytest.mark.parametrize(
    ("views", "dynamic"),
    # Where sizes are symbols, not every overlap can be seen.
    [(EXPANDED, False), (EXPANDED, True), (TWICE, False), (TWICE, True), (PARTLY, False)],
    ids=lambda views: views[0] if isinstance(views, tuple) else f"dynamic={views}",
)
def test_elements_that_overlap_are_refused(device: str, views: Any, dynamic: bool) -> None:
    def rotate(packed: Tensor, positions: Tensor) -> Tensor:
        torch_rope.apply_(views[1](packed * 2), positions)
        return packed

    given = Inputs.random(9, device)
    with pytest.raises(Exception, match=r"rope::apply\w*_\(\): expected .* to (have|share)"):
        compile_whole(rotate, dynamic=dynamic)(given.packed, given.positions)


# -----------------------------------------------------------------------------
# Sizes that depend on data


def chosen_tokens(given: Inputs, chosen: Tensor) -> tuple[Tensor, ...]:
    """Rotates the tokens that a mask chooses, by their own positions."""
    q, k, v = given.packed[chosen].unbind(1)
    positions = given.positions.expand(2, -1, -1)[chosen]
    return (
        torch_rope.apply(q, positions),
        *torch_rope.apply((q, k[:, :2]), chosen.nonzero()[:, 1:], given.inv_freq),
        torch_rope.apply(v.transpose(0, 1), positions[:, 0]),
    )


def chosen_tokens_in_place(given: Inputs, chosen: Tensor) -> tuple[Tensor, ...]:
    """Rotates the tokens that a mask chooses where they were gathered."""
    packed = given.packed[chosen]
    positions = given.positions.expand(2, -1, -1)[chosen]
    torch_rope.apply_(packed[:, 2], positions)
    torch_rope.apply_cos_sin_(
        (packed[:, 0], packed[:, 1]), given.cos_rows, given.sin_rows, positions
    )
    return (packed,)


def chosen_rows(given: Inputs, chosen: Tensor) -> tuple[Tensor, ...]:
    """Rotates by tables of as many rows as a mask chooses."""
    rows = torch.arange(50, device=chosen.device) < chosen.sum() + 40
    cos, sin = given.cos_rows[rows], given.sin_rows[rows]
    return torch_rope.apply_cos_sin(
        (given.packed[:, :, 0], given.packed[:, :, 1]), cos, sin, given.positions % 40
    )


@pytest.mark.parametrize("function", [chosen_tokens, chosen_tokens_in_place, chosen_rows])
def test_sizes_can_depend_on_data(device: str, function: Callable[..., Any]) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, error_on_recompile=True):
        compiled = compile_whole(function)
        for seed in range(2):
            given = Inputs.random(9, device, seed=seed).with_grad()
            chosen = random_values((2, 9), device=device, seed=seed) > 0
            actual, expected = compiled(given, chosen), function(given, chosen)
            assert_all_same(actual, expected)
            assert_all_close(given.gradients(actual), given.gradients(expected))


def test_a_length_can_be_unbacked(device: str) -> None:
    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        return torch_rope.apply(x, positions)

    compiled = compile_whole(rotate)
    for tokens in (9, 1):
        x = random_values((2, tokens, 4, 8), device=device)
        positions = random_positions((tokens, 1), device=device)
        if tokens > 1:
            mark_unbacked(x, 1)
            mark_unbacked(positions, 0)
            assert_same_bits(compiled(x, positions), rotate(x, positions))
        else:
            with recompiling_is_an_error:
                assert_same_bits(compiled(x, positions), rotate(x, positions))


# -----------------------------------------------------------------------------
# Other transforms, compiled


def test_compiled_autograd_has_the_gradients_of_eager(device: str) -> None:
    given = Inputs.random(9, device).with_grad()
    expected = given.gradients(every_form(given))

    backends: list[str] = []

    def compiler(graph: GraphModule) -> Any:
        backends.append("aot_eager")
        return torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)

    def backward(tokens: int) -> list[Tensor | None]:
        given = Inputs.random(tokens, device).with_grad()
        results = every_form(given)
        with torch._dynamo.compiled_autograd._enable(compiler):
            return given.gradients(results)

    assert_all_close(backward(9), expected)
    backward(10)
    captures = counters["compiled_autograd"]["captures"]
    assert captures >= 1
    for tokens in (11, 64):
        backward(tokens)
    assert counters["compiled_autograd"]["captures"] == captures


def test_compiled_autograd_compiles_a_training_step(device: str) -> None:
    def step(given: Inputs) -> Tensor:
        loss = sum((result.sin().sum() for result in every_form(given)), torch.zeros(()))
        loss.backward()
        return loss.detach()

    gradients = []
    with torch._dynamo.config.patch(compiled_autograd=True):
        for function in (step, torch.compile(step, backend="aot_eager")):
            given = Inputs.random(9, device).with_grad()
            function(given)
            gradients.append([x.grad for x in given])
    assert_all_close(gradients[1], gradients[0])
    assert counters["compiled_autograd"]["captures"] == 1


def mapped(given: Inputs) -> Any:
    """Maps over the batch."""
    return vmap(lambda packed: pair(given._replace(packed=packed.unsqueeze(0))))(given.packed)


def mapped_positions(given: Inputs) -> Any:
    """Maps x and positions, over dimensions that are not the first."""
    x = given.packed[:, :, 0]
    return vmap(torch_rope.apply, in_dims=(1, 0), out_dims=2)(x, given.positions)


def mapped_in_place(given: Inputs) -> Any:
    """Maps calls in place over the batch."""
    return vmap(lambda packed: one_in_place(given._replace(packed=packed.unsqueeze(0))))(
        given.packed
    )


def gradient_of_tables(given: Inputs) -> Any:
    """Differentiates with respect to a table."""
    return grad(lambda cos: one_by_tables(given._replace(cos=cos))[0].sin().sum())(given.cos)


def tangent(given: Inputs) -> Any:
    """Differentiates forward, with respect to x and to frequencies."""

    def rotate(packed: Tensor, inv_freq: Tensor) -> Any:
        return one_by_inv_freq(given._replace(packed=packed, inv_freq=inv_freq))

    point = (given.packed, given.inv_freq)
    return jvp(rotate, point, point)


def mapped_gradient(given: Inputs) -> Any:
    """Maps a gradient over the batch."""
    loss = lambda packed: pair(given._replace(packed=packed.unsqueeze(0)))[0].sin().sum()  # noqa: E731
    return vmap(grad(loss))(given.packed)


def mapped_norms(given: Inputs) -> Any:
    """Maps norms over the batch, and over weights."""

    def normalize(packed: Tensor, weight: Tensor) -> Any:
        return pair_of_norms(given._replace(packed=packed.unsqueeze(0), weight=weight))

    weights = torch.stack((given.weight, given.weight * 2), 1)
    return vmap(normalize, in_dims=(0, 1))(given.packed, weights)


def mapped_gradient_of_norms(given: Inputs) -> Any:
    """Maps gradients of a weight over the batch."""

    def loss(packed: Tensor, weight: Tensor) -> Tensor:
        return norm(given._replace(packed=packed.unsqueeze(0), weight=weight))[0].sin().sum()

    return vmap(grad(loss, (0, 1)), in_dims=(0, None))(given.packed, given.weight)


def tangent_of_norms(given: Inputs) -> Any:
    """Differentiates norms forward."""

    def normalize(packed: Tensor, weight: Tensor) -> Any:
        return pair_of_norms_by_rows(given._replace(packed=packed, weight=weight))

    point = (given.packed, given.weight)
    return jvp(normalize, point, point)


def second_derivative_of_a_norm(given: Inputs) -> Any:
    """Takes second derivatives with respect to a weight."""
    return hessian(lambda weight: norm(given._replace(weight=weight))[0].sin().sum())(given.weight)


def jacobian(given: Inputs) -> Any:
    """Takes the derivative of each element with respect to each frequency."""
    return jacrev(lambda inv_freq: one_by_inv_freq(given._replace(inv_freq=inv_freq)))(
        given.inv_freq
    )


def second_derivative(given: Inputs) -> Any:
    """Takes second derivatives with respect to frequencies."""

    def loss(inv_freq: Tensor) -> Tensor:
        return one_by_inv_freq(given._replace(inv_freq=inv_freq))[0].sin().sum()

    return hessian(loss)(given.inv_freq)


def gradient_in_place(given: Inputs) -> Any:
    """Differentiates a pair that is rotated where it is."""
    return grad(lambda packed: pair_in_place(given._replace(packed=packed))[1].sum())(given.packed)


def tangent_in_place(given: Inputs) -> Any:
    """Differentiates the same forward."""
    function = lambda packed: pair_in_place(given._replace(packed=packed))  # noqa: E731
    return jvp(function, (given.packed,), (given.packed,))


@pytest.mark.parametrize(
    "transformed",
    [
        mapped,
        mapped_positions,
        mapped_in_place,
        gradient_of_tables,
        tangent,
        mapped_gradient,
        jacobian,
        second_derivative,
        gradient_in_place,
        tangent_in_place,
        mapped_norms,
        mapped_gradient_of_norms,
        tangent_of_norms,
        second_derivative_of_a_norm,
    ],
)
def test_transforms_inside_a_compiled_function(device: str, transformed: Any) -> None:
    given = Inputs.random(5, device)
    assert_all_close(compile_whole(transformed)(given), transformed(given))


@pytest.mark.parametrize("is_composed", [False, True])
def test_autocast_casts_nothing(device: str, is_composed: bool) -> None:
    given = Inputs.random(9, device)
    compiled = compile_whole(every_form)
    with torch.autocast(device, dtype=torch.bfloat16), torch_rope.composed(is_composed):
        actual = compiled(given)
    expected = every_form(given)
    assert [y.dtype for y in actual] == [torch.float32] * len(actual)
    assert_all_close(actual, expected)


# -----------------------------------------------------------------------------
# The composed form


@forms
def test_the_composed_form_gives_the_same_numbers(device: str, form: Form) -> None:
    compiled = compile_whole(form, dynamic=True)
    for tokens in (5, 9):
        given = Inputs.random(tokens, device).with_grad()
        with torch_rope.composed():
            actual = compiled(given)
        expected = form(given)
        assert_all_close(actual, expected)
        assert_all_close(given.gradients(actual), given.gradients(expected))


def test_the_form_is_part_of_the_graph(device: str) -> None:
    recorder = Recorder()
    compiled = compile_whole(every_form, backend=recorder.backend)
    given = Inputs.random(9, device)
    compiled(given)
    with torch_rope.composed():
        compiled(given)
    kernel, composed = recorder.forward
    assert len(operators_of(kernel)) == len(FORMS)
    assert not operators_of(composed)
    with recompiling_is_an_error:
        compiled(given)
        with torch_rope.composed():
            compiled(given)
            with torch_rope.composed(False):
                assert_all_same(compiled(given), every_form(given))


def test_the_form_can_be_chosen_inside_a_compiled_function(device: str) -> None:
    def rotate(given: Inputs) -> tuple[Tensor, ...]:
        with torch_rope.composed():
            composed = one(given)
        return (*composed, *one_by_tables(given))

    recorder = Recorder()
    given = Inputs.random(9, device)
    assert_all_close(compile_whole(rotate, backend=recorder.backend)(given), rotate(given))
    assert operators_of(recorder.forward[0]) == ["apply_cos_sin.default"]


def test_the_form_is_chosen_for_one_thread(device: str) -> None:
    recorder = Recorder()
    given = Inputs.random(9, device)
    compiled = compile_whole(one, backend=recorder.backend)
    with torch_rope.composed():
        thread = threading.Thread(target=compiled, args=(given,))
        thread.start()
        thread.join()
    assert operators_of(recorder.forward[0]) == ["apply.default"]


def test_the_form_is_the_kernel_after_an_error(device: str) -> None:
    with pytest.raises(ValueError, match="wrong"), torch_rope.composed():
        raise ValueError("wrong")
    recorder = Recorder()
    compile_whole(one, backend=recorder.backend)(Inputs.random(9, device))
    assert operators_of(recorder.forward[0]) == ["apply.default"]


def test_a_call_that_nothing_compiles_stays_the_kernel(device: str) -> None:
    given = Inputs.random(9, device)
    expected = every_form(given)
    with torch_rope.composed():
        assert_all_same(every_form(given), expected)


def test_generated_code_in_a_cache_is_that_of_the_form(device: str) -> None:
    given = Inputs.random(9, device)
    with fresh_cache(), torch.compiler.config.patch(force_disable_caches=False):
        for _ in range(2):
            for enabled in (False, True):
                torch.compiler.reset()
                compiled = compile_whole(pair, backend="inductor")
                with torch_rope.composed(enabled):
                    _, (code,) = run_and_get_code(compiled, given)
                assert ("torch.ops.rope.apply_qk" in code) is not enabled
        # The second time each found its own there, of whichever cache.
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        assert max(hits, counters["inductor"]["fxgraph_cache_hit"]) == 2
