"""Other implementations of the rotation of a query and a key.

Each function takes a ``Problem``, does what a model does once (tables, tensor conversion, a
session, a compilation), and returns the call to time. It raises ``ImportError`` if its library is
missing, ``Unsupported`` if the library does not support the case.
"""

import getpass
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import MAX_WAVELENGTH, Pair, Problem
from torch import Tensor

Call = Callable[[], Any]


class Unsupported(Exception):  # noqa: N818  Not an error.
    """The library does not support a case."""


def require(condition: bool) -> None:
    """Raises ``Unsupported`` unless the condition holds."""
    if not condition:
        raise Unsupported


def rotate_half(x: Tensor, dim: int = -1) -> Tensor:
    """Rotates half-split pairs by 90 degrees."""
    a, b = x.chunk(2, dim=dim)
    return torch.cat((-b, a), dim=dim)


def rotate_every_two(x: Tensor) -> Tensor:
    """Rotates interleaved pairs by 90 degrees."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def rotate_eagerly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    """Rotates like Hugging Face models, with tables that hold each value twice."""
    rotate_90 = rotate_every_two if interleaved else rotate_half
    rotary_dim = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        if rotary_dim == x.shape[-1]:
            return x * cos + rotate_90(x) * sin
        rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        return torch.cat((rotated * cos + rotate_90(rotated) * sin, rest), dim=-1)

    return rotate(q), rotate(k)


def as_tensors(pair: Any) -> Pair:
    """Converts a pair of any library's arrays to tensors."""
    q, k = (x if isinstance(x, Tensor) else torch.from_dlpack(x) for x in pair)
    return q, k


def rotate_strided_axis(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, _: bool) -> Pair:
    """The same along dimension 1, with tables (..., D, S)."""
    return q * cos + rotate_half(q, 1) * sin, k * cos + rotate_half(k, 1) * sin


def eager(problem: Problem) -> Call:
    """PyTorch without a kernel."""
    rotate, (cos, sin) = eager_function(problem)
    return lambda: rotate(problem.q, problem.k, cos, sin, problem.case.interleaved)


def eager_function(problem: Problem) -> tuple[Callable[..., Pair], Pair]:
    """Returns the function for the layout of a case, and its tables."""
    cos, sin = problem.full_tables
    if problem.case.layout == "BDS":
        return rotate_strided_axis, (cos.mT.contiguous(), sin.mT.contiguous())
    return rotate_eagerly, (cos, sin)


def prepare_to_compile() -> None:
    """Forgets compiled code, and chooses a cache.

    One per ATEN_CPU_CAPABILITY: TorchInductor does not distinguish them, and code for another one
    writes past the end of its outputs (docs/upstream/inductor_cpu_capability.py).
    """
    torch.compiler.reset()
    capability = torch.backends.cpu.get_cpu_capability()
    folder = f"torch-rope-{getpass.getuser()}-{capability}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), folder))


def compiled(problem: Problem) -> Call:
    """The same, compiled for the shapes of the case."""
    function, (cos, sin) = eager_function(problem)
    prepare_to_compile()
    rotate = torch.compile(function, dynamic=False)
    return lambda: rotate(problem.q, problem.k, cos, sin, problem.case.interleaved)


def load_torchtune() -> Any:
    """Loads only the file of torchtune's layer: the package imports the whole training stack."""
    spec = importlib.util.find_spec("torchtune")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("torchtune")
    path = Path(spec.submodule_search_locations[0], "modules", "position_embeddings.py")
    file_spec = importlib.util.spec_from_file_location("torchtune_position_embeddings", path)
    assert file_spec is not None
    assert file_spec.loader is not None
    module = importlib.util.module_from_spec(file_spec)
    file_spec.loader.exec_module(module)
    return module


def torchtune(problem: Problem) -> Call:
    """Torchtune's module, interleaved pairs only."""
    case = problem.case
    module = load_torchtune()
    require(case.layout == "BSHD" and case.angles == "formula" and case.rotated == case.head_dim)

    longest = int(problem.sequence.max()) + 1
    rope = module.RotaryPositionalEmbeddings(case.head_dim, longest, MAX_WAVELENGTH)
    rope.to(problem.q.device)
    input_pos = problem.sequence if case.batch > 1 else None
    return lambda: (rope(problem.q, input_pos=input_pos), rope(problem.k, input_pos=input_pos))


def lucidrains(problem: Problem) -> Call:
    """The package rotary-embedding-torch, interleaved pairs only."""
    from rotary_embedding_torch import RotaryEmbedding

    case = problem.case
    require(case.batch == 1 and case.angles == "formula" and case.rotated == case.head_dim)
    rope = RotaryEmbedding(
        case.head_dim,
        seq_before_head_dim=case.layout == "BSHD",
        cache_max_seq_len=case.tokens,
    ).to(problem.q.device)
    # It numbers tokens in the dtype of its input, and bfloat16 ends at 256: fill its cache before.
    rope.rotate_queries_or_keys(problem.k.detach().float())
    return lambda: (rope.rotate_queries_or_keys(problem.q), rope.rotate_queries_or_keys(problem.k))


def jax(problem: Problem) -> Call:
    """JAX, compiled by XLA, in float32 like its models."""
    import jax
    import jax.numpy as jnp

    case = problem.case
    require(not problem.q.requires_grad)
    tensors = (problem.q, problem.k, problem.angles.cos().float(), problem.angles.sin().float())
    q, k, cos, sin = (jnp.from_dlpack(tensor) for tensor in tensors)

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        rotated, rest = jnp.split(x, [case.rotated], axis=-1)
        if case.interleaved:
            a, b = rotated[..., ::2], rotated[..., 1::2]
        else:
            a, b = jnp.split(rotated, 2, axis=-1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        if case.interleaved:
            rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
        else:
            rotated = jnp.concatenate(pair, axis=-1)
        return jnp.concatenate((rotated.astype(x.dtype), rest), axis=-1)

    both = jax.jit(lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin)))
    return lambda: jax.block_until_ready(both(q, k, cos, sin))


def onnx_runtime(problem: Problem) -> Call:
    """ONNX Runtime's operator, with buffers bound beforehand: no allocation in any form."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    case = problem.case
    require(case.dtype != "bfloat16" and problem.q.device.type == "cpu")
    require(not problem.q.requires_grad and case.angles != "axes" and case.layout != "BDS")
    element = TensorProto.FLOAT if case.dtype == "float32" else TensorProto.FLOAT16

    # One table row per token, selected by index: any angles will do.
    cos, sin = (table.reshape(-1, case.rotated // 2) for table in problem.tables)
    rows = torch.arange(case.batch * case.tokens).view(case.batch, case.tokens)
    inputs = {"rows": rows, "cos": cos, "sin": sin}
    outputs = {}
    nodes = []
    for name, x, heads in (("q", problem.q, case.q_heads), ("k", problem.k, case.k_heads)):
        inputs[name] = x.flatten(-2) if case.layout == "BSHD" else x
        outputs[f"{name}_rotated"] = torch.empty_like(inputs[name])
        nodes.append(
            helper.make_node(
                "RotaryEmbedding",
                [name, "rows", "cos", "sin"],
                [f"{name}_rotated"],
                domain="com.microsoft",
                interleaved=int(case.interleaved),
                num_heads=heads,
                rotary_embedding_dim=case.rotated if case.rotated < case.head_dim else 0,
            )
        )

    def describe(tensors: dict[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name == "rows" else element, list(tensor.shape)
            )
            for name, tensor in tensors.items()
        ]

    graph = helper.make_graph(nodes, "rope", describe(inputs), describe(outputs))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            numpy_type = str(tensor.dtype).removeprefix("torch.")
            bind(name, "cpu", 0, numpy_type, tuple(tensor.shape), tensor.data_ptr())

    def call() -> Pair:
        session.run_with_iobinding(binding)
        q_rotated, k_rotated = outputs.values()
        return q_rotated.view_as(problem.q), k_rotated.view_as(problem.k)

    # The binding holds only addresses; the call keeps the tensors alive.
    call.inputs = inputs  # type: ignore[attr-defined]
    return call


def mlx(problem: Problem) -> Call:
    """MLX, whose operator requires (B, H, S, D)."""
    import mlx.core as mx

    case = problem.case
    require(problem.q.device.type == "cpu" and not problem.q.requires_grad)
    require(case.angles == "formula")
    q, k = mx.array(problem.q), mx.array(problem.k)
    offset = mx.array(problem.sequence[:, 0]) if case.batch > 1 else 0

    def rotate(x: Any) -> Any:
        x = x.swapaxes(1, 2) if case.layout == "BSHD" else x
        x = mx.fast.rope(
            x,
            case.rotated,
            traditional=case.interleaved,
            base=MAX_WAVELENGTH,
            scale=1.0,
            offset=offset,
        )
        return x.swapaxes(1, 2) if case.layout == "BSHD" else x

    def call() -> Any:
        rotated = rotate(q), rotate(k)
        mx.eval(rotated)
        return rotated

    return call


def flash_attn(problem: Problem) -> Call:
    """flash-attn's Triton kernel."""
    from flash_attn.layers.rotary import apply_rotary_emb

    case = problem.case
    require(problem.q.is_cuda and case.layout == "BSHD" and case.batch == 1)
    cos, sin = (table.reshape(-1, case.rotated // 2) for table in problem.tables)
    return lambda: (
        apply_rotary_emb(problem.q, cos, sin, interleaved=case.interleaved),
        apply_rotary_emb(problem.k, cos, sin, interleaved=case.interleaved),
    )


def flashinfer(problem: Problem) -> Call:
    """FlashInfer's kernel, which computes the angles itself."""
    from flashinfer.rope import apply_rope_pos_ids

    case = problem.case
    require(problem.q.is_cuda and case.layout == "BSHD" and case.angles == "formula")
    require(case.dtype != "float32" and not problem.q.requires_grad)
    q, k = problem.q.flatten(0, 1), problem.k.flatten(0, 1)
    positions = problem.sequence.flatten().int()

    def call() -> Pair:
        rotated = apply_rope_pos_ids(
            q,
            k,
            positions,
            rotary_dim=case.rotated,
            interleave=case.interleaved,
            rope_theta=MAX_WAVELENGTH,
        )
        return rotated[0].view_as(problem.q), rotated[1].view_as(problem.k)

    return call


def liger(problem: Problem) -> Call:
    """Liger's Triton kernel, which copies (B, H, S, D) to (B, S, H, D) first."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    case = problem.case
    require(problem.q.is_cuda and case.layout == "BHSD" and case.batch == 1)
    require(not case.interleaved and case.rotated == case.head_dim)
    cos, sin = (table[:, 0] for table in problem.full_tables)  # (1, S, D)
    return lambda: liger_rotary_pos_emb(problem.q, problem.k, cos, sin)


def transformer_engine(problem: Problem) -> Call:
    """TransformerEngine's fused kernel, which takes angles in float32."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    case = problem.case
    require(problem.q.is_cuda and case.layout == "BSHD" and case.batch == 1)
    angles = problem.angles.float().view(case.tokens, 1, 1, -1)
    if case.interleaved:
        freqs = angles.repeat_interleave(2, dim=-1)
    else:
        freqs = torch.cat((angles, angles), dim=-1)

    def rotate(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(
            x, freqs, tensor_format="bshd", interleaved=case.interleaved, fused=True
        )

    return lambda: (rotate(problem.q), rotate(problem.k))


PEERS: dict[str, Callable[[Problem], Call]] = {
    "eager PyTorch": eager,
    "torch.compile": compiled,
    "torchtune": torchtune,
    "rotary-embedding-torch": lucidrains,
    "JAX": jax,
    "ONNX Runtime": onnx_runtime,
    "MLX": mlx,
    "flash-attn": flash_attn,
    "FlashInfer": flashinfer,
    "Liger": liger,
    "TransformerEngine": transformer_engine,
}

# These always use interleaved pairs: the same work, checked against their own convention.
ALWAYS_INTERLEAVED = ("torchtune", "rotary-embedding-torch")
