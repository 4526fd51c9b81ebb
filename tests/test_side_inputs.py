"""Side inputs: how they reach layers, nested handlers, threads, compiling, checkpoints."""

import copy
import pickle
import re
import threading
from typing import Any

import pytest
import torch
import torch_rope
from reference import assert_same_bits, random_values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_rope import ApplyRoPE, WithSideInputsFromInputTuple

handling = WithSideInputsFromInputTuple.handling


def layers(*tags: str) -> nn.Sequential:
    """Returns ordinary layers, with an ApplyRoPE after them for each tag."""
    rotations = [ApplyRoPE.from_config(tag, embedding_axis=-1) for tag in tags]
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Sequential(*rotations), nn.Tanh())


def expected(model: nn.Sequential, x: Tensor, *positions: Tensor) -> Tensor:
    """Runs layers() with positions for each tag, without side inputs."""
    x = model[0](x)
    for given in positions:
        x = torch_rope.apply(x, given)
    return model[2](x)


def inputs(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Returns x (S, D) and two tensors of positions (S)."""
    positions = torch.arange(5, device=device)
    return random_values((5, 32), device=device), positions, 3 * positions


def test_a_side_input_reaches_the_layers_of_its_tag(device: str) -> None:
    x, first, second = inputs(device)
    model = layers("first", "second", "first").to(device)
    actual = handling(model, tags=["first", "second"])(x, first, second)
    assert_same_bits(actual, expected(model, x, first, second, first))


def test_the_input_may_be_one_tuple(device: str) -> None:
    x, first, second = inputs(device)
    model = handling(layers("first", "second").to(device), tags=["first", "second"])
    assert_same_bits(model((x, first, second)), model(x, first, second))


def test_a_layer_takes_positions_that_it_is_given() -> None:
    x, first, second = inputs()
    layer = ApplyRoPE.from_config("first", embedding_axis=-1)

    class Direct(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layer(x, second)

    assert_same_bits(handling(Direct(), tags=["first"])(x, first), torch_rope.apply(x, second))


def test_a_tag_may_be_any_hashable() -> None:
    x, first, _ = inputs()
    layer = ApplyRoPE.from_config(("tokens", 1), embedding_axis=-1)
    actual = handling(layer, tags=[("tokens", 1)])(x, first)
    assert_same_bits(actual, torch_rope.apply(x, first))


def test_what_comes_after_the_side_inputs_goes_to_the_model() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, *, shift: float) -> Tensor:
            return x * scale + shift

    x, first, _ = inputs()
    actual = handling(Scaled(), tags=["first"])(x, first, 2.0, shift=1.0)
    assert_same_bits(actual, x * 2.0 + 1.0)


# ---- Tags that are missing, or there twice ----


def test_a_tag_that_nobody_provides_is_named() -> None:
    x, first, _ = inputs()
    message = "expected the tag 'second' to be provided by a WithSideInputsFromInputTuple around"
    with pytest.raises(ValueError, match=message):
        layers("second")(x)
    with pytest.raises(ValueError, match=message):
        handling(layers("first", "second"), tags=["first"])(x, first)


def test_a_side_input_ends_with_its_handler() -> None:
    x, first, _ = inputs()
    model = layers("first")
    handling(model, tags=["first"])(x, first)
    with pytest.raises(ValueError, match="expected the tag 'first' to be provided"):
        model(x)


def test_a_side_input_ends_with_its_handler_that_fails() -> None:
    x, first, _ = inputs()
    model = layers("first")
    with pytest.raises(ValueError, match="expected positions to be broadcastable"):
        handling(model, tags=["first"])(x, first[:3])
    with pytest.raises(ValueError, match="expected the tag 'first' to be provided"):
        model(x)


def test_a_tag_given_twice_is_named() -> None:
    with pytest.raises(ValueError, match="each tag to be provided once, but got 'first' twice"):
        handling(layers("first"), tags=["first", "second", "first"])


def test_a_tag_provided_by_two_handlers_is_named() -> None:
    x, first, second = inputs()
    model = handling(handling(layers("first"), tags=["first"]), tags=["first"])
    with pytest.raises(ValueError, match="each tag to be provided once, but got 'first' twice"):
        model(x, first, second)


def test_a_side_input_that_is_not_there_is_named() -> None:
    x, first, _ = inputs()
    with pytest.raises(ValueError, match="expected side_inputs to have one for the tag 'second'"):
        handling(layers("first", "second"), tags=["first", "second"])(x, first)


def test_tags_that_are_one_string_are_refused() -> None:
    with pytest.raises(TypeError, match="expected tags to be a sequence of tags, but got the"):
        handling(layers("first"), tags="first")


@pytest.mark.parametrize(
    ("model", "tags", "message"),
    [
        (lambda x: x, ["first"], "expected model to be a module, but got function"),
        (nn.Tanh(), None, "expected tags to be a sequence of tags, but got None"),
        (nn.Tanh(), {"first"}, "expected tags to be a sequence of tags, but got set"),
        (nn.Tanh(), [["first"]], "expected tags to be hashable and not None, .* that is list"),
        (nn.Tanh(), ["first", None], "expected tags to be hashable and not None, .* that is None"),
    ],
)
def test_what_is_no_model_and_no_tags_is_refused(model: Any, tags: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"torch_rope\.WithSideInputs.*\(\): {message}"):
        handling(model, tags)


@pytest.mark.parametrize("side_input", [None, 3, [0, 1, 2, 3, 4]])
def test_a_side_input_that_is_no_tensor_is_refused(side_input: Any) -> None:
    x, _, _ = inputs()
    with pytest.raises(TypeError, match="expected positions to be a tensor, but got"):
        handling(layers("first"), tags=["first"])(x, side_input)


# ---- Nested handlers ----


@pytest.mark.parametrize("nested_tuples", [False, True])
def test_layers_find_the_side_inputs_of_all_handlers_around_them(
    device: str, nested_tuples: bool
) -> None:
    x, first, second = inputs(device)
    model = layers("first", "second").to(device)
    outer = handling(handling(model, tags=["second"]), tags=["first"])
    actual = outer((x, second), first) if nested_tuples else outer(x, first, second)
    assert_same_bits(actual, expected(model, x, first, second))


def test_an_inner_handler_leaves_the_outer_one_as_it_was() -> None:
    x, first, second = inputs()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = handling(ApplyRoPE.from_config("inner", -1), tags=["inner"])
            self.rotate = ApplyRoPE.from_config("outer", -1)

        def forward(self, x: Tensor) -> Tensor:
            return self.rotate(self.inner(self.rotate(x), second))

    actual = handling(nn.Sequential(Block(), Block()), tags=["outer"])(x, first)
    for positions in (first, second, first) * 2:
        x = torch_rope.apply(x, positions)
    assert_same_bits(actual, x)


# ---- Copies, threads, compiling, checkpoints ----


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_computes_the_same(copy_of: Any) -> None:
    x, first, second = inputs()
    model = handling(layers("first", "second"), tags=["first", "second"])
    assert_same_bits(copy_of(model)(x, first, second), model(x, first, second))


def test_the_state_is_that_of_the_model() -> None:
    model = layers("first")
    state = handling(model, tags=["first"]).state_dict()
    assert list(state) == [f"model.{name}" for name in model.state_dict()]


def test_threads_have_side_inputs_of_their_own() -> None:
    x, first, _ = inputs()
    meeting = threading.Barrier(4)

    class Meet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            meeting.wait(timeout=60)
            return x

    model = handling(nn.Sequential(Meet(), ApplyRoPE.from_config("p", -1), Meet()), tags=["p"])
    results: dict[int, Tensor] = {}

    def run(factor: int) -> None:
        results[factor] = model(x, factor * first)

    threads = [threading.Thread(target=run, args=(factor,)) for factor in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for factor in range(4):
        assert_same_bits(results[factor], torch_rope.apply(x, factor * first))


def test_a_handler_compiles_without_a_graph_break(device: str) -> None:
    x, first, second = inputs(device)
    model = layers("first", "second").to(device)
    outer = handling(handling(model, tags=["second"]), tags=["first"])
    compiled = torch.compile(outer, fullgraph=True, backend="aot_eager")
    for scale in (1, 7):
        arguments = x, scale * first, second
        assert_same_bits(compiled(*arguments), expected(model, *arguments))


def test_a_compiled_layer_follows_the_handler_around_it(device: str) -> None:
    x, first, second = inputs(device)
    model = layers("first").to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    handler = handling(compiled, tags=["first"])
    for positions in (first, second, first[:1]):
        assert_same_bits(handler(x, positions), expected(model, x, positions))


def test_gradients_reach_side_inputs() -> None:
    x, first, _ = inputs()
    gradients = []
    for run in (handling(layers("first"), tags=["first"]), lambda *a: expected(layers(), *a)):
        positions = first.float().requires_grad_()
        run(x, positions).square().sum().backward()
        gradients.append(positions.grad)
    assert gradients[0].abs().max() > 0
    assert_same_bits(*gradients)


class Checkpointed(nn.Module):
    """Runs layers anew in the backward pass."""

    def __init__(self, body: nn.Module, **options: Any) -> None:
        """Keeps the layers and the options of the checkpoint."""
        super().__init__()
        self.body = body
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """Runs them."""
        return checkpoint(self.body, x, use_reentrant=False, **self.options)


def test_a_checkpoint_keeps_side_inputs(device: str) -> None:
    x, first, second = inputs(device)
    body = layers("first").to(device)
    checkpointed = Checkpointed(body, context_fn=torch_rope.keep_side_inputs)
    gradients = []
    for model in (body, checkpointed):
        leaf = x.clone().requires_grad_()
        handler = handling(nn.Sequential(model, model), tags=["first"])
        # The second call is not to change what the first one runs again.
        losses = [handler(leaf, positions).square().sum() for positions in (first, second)]
        for loss in losses:
            loss.backward()
        gradients.append(leaf.grad)
    assert_same_bits(gradients[1], gradients[0])


def test_a_checkpoint_that_keeps_none_says_which_tag_is_missing() -> None:
    x, first, _ = inputs()
    model = handling(Checkpointed(layers("first")), tags=["first"])
    loss = model(x.requires_grad_(), first).sum()
    with pytest.raises(ValueError, match=re.escape("expected the tag 'first' to be provided")):
        loss.backward()
