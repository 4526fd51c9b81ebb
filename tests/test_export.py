"""torch.export and AOTInductor: the operators are in the program, whatever its lengths."""

from pathlib import Path

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_inv_freq, random_positions, random_values
from torch import Tensor
from torch.export import Dim, ExportedProgram, export, load, save
from torch.fx import GraphModule

EXAMPLE_TOKENS = 5
LENGTHS = (7, 64, 4097)


class Rotations(torch.nn.Module):
    """Calls all operators, on tensors and on views of packed ones."""

    def __init__(self, device: str) -> None:
        """Makes frequencies and tables."""
        super().__init__()
        self.register_buffer("inv_freq", random_inv_freq((4,), torch.float32, device))
        self.register_buffer("cos", random_values((50, 4), device=device, seed=1))
        self.register_buffer("sin", random_values((50, 4), device=device, seed=2))
        self.register_buffer("weight", random_values((4, 8), device=device, seed=3))

    def full_tables(self) -> tuple[Tensor, Tensor]:
        """Returns tables with a column for each element."""
        return torch.cat((self.cos, self.sin), -1), torch.cat((self.sin, self.cos), -1)

    def normalized(self, packed: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Normalizes q and k in every way."""
        q, k, _ = packed.unbind(2)
        one, two, three, four = (packed * factor for factor in (2, 3, 4, 5))
        rows = self.cos, self.sin, positions
        weights = self.weight, None
        torch_rope.norm_apply_(one[:, :, 1], self.weight, positions, self.inv_freq)
        torch_rope.norm_apply_((two[:, :, 0], two[:, :, 1]), None, positions, norm_last=True)
        torch_rope.norm_apply_cos_sin_(three[:, :, 2], None, *rows)
        torch_rope.norm_apply_cos_sin_((four[:, :, 1], four[:, :, 2]), weights, *rows)
        return (
            one,
            two,
            three,
            four,
            torch_rope.norm_apply(q, self.weight[0], positions, norm_axes=(-2, -1), eps=0.1),
            *torch_rope.norm_apply((q, k[:, :, :2]), weights, positions, weight_offset=1.0),
            torch_rope.norm_apply_cos_sin(q, self.weight, *rows, norm_last=True),
            *torch_rope.norm_apply_cos_sin((q, k), weights, *rows, norm_axes=[3, 2]),
        )

    def forward(self, packed: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Rotates q and k of ``packed``, (2, tokens, 3, 4, 8)."""
        q, k, _ = packed.unbind(2)
        one, two, three, four = (packed * factor for factor in (2, 3, 4, 5))
        torch_rope.apply_(one[:, :, 1], positions, self.inv_freq)
        torch_rope.apply_((two[:, :, 0], two[:, :, 1]), positions, interleaved=True)
        torch_rope.apply_cos_sin_(three[:, :, 2], self.cos, self.sin, positions)
        torch_rope.apply_cos_sin_((four[:, :, 1], four[:, :, 2]), self.cos, self.sin, positions)
        return (
            *self.normalized(packed, positions),
            one,
            two,
            three,
            four,
            torch_rope.apply(q, positions, rotary_dim=6, conjugate=True),
            *torch_rope.apply((q, k[:, :, :2]), positions, max_wavelength=5e5),
            torch_rope.apply_cos_sin(q, self.cos, self.sin, positions, rotary_dim=8),
            torch_rope.apply_cos_sin(q, *self.full_tables(), positions, full_width=True),
            *torch_rope.apply_cos_sin((q, k), self.cos, self.sin, positions),
        )


ROTATIONS = ["apply", "apply_cos_sin", "apply_cos_sin_qk", "apply_qk"]
OPERATORS = [*ROTATIONS, *(f"norm_{name}" for name in ROTATIONS)]
FUNCTIONAL = [*OPERATORS, "apply_cos_sin"]  # by tables of either width
IN_PLACE = [f"{name}_" for name in OPERATORS]


def inputs(tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Draws a packed tensor, and positions that are also rows of tables."""
    packed = random_values((2, tokens, 3, 4, 8), device=device)
    return packed, random_positions((tokens, 1), device=device, low=0, high=50)


def exported(model: torch.nn.Module, device: str, *, strict: bool) -> ExportedProgram:
    """Exports a model for any number of tokens."""
    tokens = Dim("tokens", min=2, max=8192)
    example = inputs(EXAMPLE_TOKENS, device)
    return export(model, example, dynamic_shapes=({1: tokens}, {0: tokens}), strict=strict)


def operators_of(graph: GraphModule) -> list[str]:
    """Names the operators of the library in a graph, sorted."""
    targets = [str(node.target) for node in graph.graph.nodes]
    names = [target.split(".")[1] for target in targets if target.startswith("rope.")]
    return sorted(names)


def assert_runs_at_every_length(
    actual: torch.nn.Module, expected: torch.nn.Module, device: str
) -> None:
    """Compares the results of two modules, bit by bit."""
    for tokens in LENGTHS:
        given = inputs(tokens, device)
        results = zip(actual(*given), expected(*given), strict=True)
        for result, other in results:
            assert_same_bits(result, other)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_calls_the_operators(device: str, strict: bool) -> None:
    model = Rotations(device)
    program = exported(model, device, strict=strict)
    assert operators_of(program.graph_module) == sorted(FUNCTIONAL + IN_PLACE)
    assert_runs_at_every_length(program.module(), model, device)


def test_a_decomposed_program_calls_the_functional_operators(device: str) -> None:
    model = Rotations(device)
    program = exported(model, device, strict=False).run_decompositions()
    assert operators_of(program.graph_module) == sorted(FUNCTIONAL + OPERATORS)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node
    assert_runs_at_every_length(program.module(), model, device)


def test_a_saved_program_has_the_same_results(device: str, tmp_path: Path) -> None:
    model = Rotations(device)
    save(exported(model, device, strict=False), tmp_path / "model.pt2")
    assert_runs_at_every_length(load(tmp_path / "model.pt2").module(), model, device)


def test_the_composed_form_needs_no_operator_of_the_library(device: str) -> None:
    model = Rotations(device)
    with torch_rope.composed():
        program = exported(model, device, strict=False)
    program = program.run_decompositions()
    assert not operators_of(program.graph_module)
    given = inputs(64, device)
    torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-4, atol=1e-4)


def test_an_argument_that_is_changed_is_one_after_export(device: str) -> None:
    class Rotate(torch.nn.Module):
        def forward(self, packed: Tensor, positions: Tensor) -> Tensor:
            torch_rope.apply_((packed[:, :, 0], packed[:, :, 1]), positions)
            return packed.sum()

    program = exported(Rotate(), device, strict=False)
    for module in (program.module(), program.run_decompositions().module()):
        packed, positions = inputs(9, device)
        expected = packed.clone()
        module(packed, positions)
        Rotate()(expected, positions)
        assert_same_bits(packed, expected)


def test_a_package_of_aotinductor_has_the_same_results(device: str, tmp_path: Path) -> None:
    model = Rotations(device)
    path = torch._inductor.aoti_compile_and_package(
        exported(model, device, strict=False), package_path=str(tmp_path / "model.pt2")
    )
    assert_runs_at_every_length(torch._inductor.aoti_load_package(path), model, device)
