"""Measures training and decoding steps of a small Llama and Qwen3, with and without torch-rope.

python benchmarks/bench_transformers.py
python benchmarks/bench_transformers.py --models Qwen3 --threads 1 --json F.json --markdown F.md
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import transformers
from report import add_outputs, describe_environment, publish, table
from timing import time_in_turns
from torch_rope.integrations.transformers import patch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

# The models' modules and the classes of their attention. Qwen3 normalizes queries and keys.
MODELS = {
    "Llama": (modeling_llama, modeling_llama.LlamaAttention),
    "Qwen3": (modeling_qwen3, modeling_qwen3.Qwen3Attention),
}
BATCH, TOKENS = 1, 512

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def training_step(model: Any, device: str) -> Callable[[], object]:
    """Returns a training step: forward, backward, update."""
    tokens = torch.randint(SIZES["vocab_size"], (BATCH, TOKENS), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding_step(model: Any, device: str) -> Callable[[], object]:
    """Returns a decoding step: one token after those in the key-value cache."""
    tokens = torch.randint(SIZES["vocab_size"], (1, TOKENS), device=device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, cache=cache)

    @torch.no_grad()
    def step() -> None:
        model(tokens[:, :1], cache=cache)
        cache.crop(-1)

    return step


STEPS = {"training": training_step, "decoding": decoding_step}

# Functions, and where they are installed.
Code = list[tuple[Any, str, Any]]


def variants(name: str) -> dict[str, Code]:
    """Returns the code of a model as it is, with the rotation patched, and with the norms too."""
    module, attention = MODELS[name]

    def installed() -> Code:
        places = ((module, "apply_rotary_pos_emb"), (attention, "forward"))
        return [(owner, name, getattr(owner, name)) for owner, name in places]

    found = {"transformers": installed()}
    with patch(module, norms=False):
        found["rotation"] = installed()
    with patch(module) as done:
        if done.fused:
            found["norms and rotation"] = installed()
    return found


def with_code(step: Callable[[], object], code: Code) -> Callable[[], object]:
    """Returns the step with this code installed."""

    def call() -> None:
        for owner, name, value in code:
            setattr(owner, name, value)
        step()

    return call


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of all calls in turn")
    add_outputs(parser)
    arguments = parser.parse_args()
    device: str = arguments.device

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    columns = ["transformers", "rotation", "norms and rotation"]
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for name in arguments.models:
        module, _ = MODELS[name]
        config = getattr(transformers, f"{name}Config")(**SIZES)
        for dtype in arguments.dtypes:
            for kind in arguments.steps:
                model = getattr(module, f"{name}ForCausalLM")(config).to(device, DTYPES[dtype])
                step = STEPS[kind](model.train(kind == "training"), device)
                calls[f"{name}, {kind}, {dtype}"] = {
                    variant: with_code(step, code) for variant, code in variants(name).items()
                }
    flat = {f"{step}, {name}": some[name] for step, some in calls.items() for name in some}
    timings = time_in_turns(flat, arguments.rounds, 0.1, device)

    lines = []
    for name, some in calls.items():
        found = {variant: timings[f"{name}, {variant}"] for variant in some}
        times = [f"{t.median * 1e3:.2f} ({t.spread:.0%})" for t in found.values()]
        ratios = [f"{t.median / found['transformers'].median:.3f}" for t in found.values()][1:]
        missing = ["-"] * (len(columns) - len(found))
        lines.append([name, *times, *missing, *ratios, *missing])
    environment = describe_environment(device) | {"transformers": transformers.__version__}
    text = "\n\n".join(
        (
            f"# Small models, patched: {environment['device']}, {environment['date']}",
            "\n".join(f"- {name}: {value}" for name, value in environment.items()),
            f"{SIZES['num_hidden_layers']} layers, {SIZES['num_attention_heads']} query and "
            f"{SIZES['num_key_value_heads']} key heads of {SIZES['head_dim']}; training on "
            f"{BATCH} x {TOKENS} tokens, decoding after {TOKENS}; threads: {arguments.threads}. "
            "Milliseconds: median over the rounds (distance between the quartiles over it), and "
            "the ratio to transformers.",
            table(["step", *columns, "ratio: rotation", "ratio: both"], lines),
        )
    )
    figures = {name: asdict(timing) for name, timing in timings.items()}
    publish(text, {"environment": environment, "calls": figures}, arguments)


if __name__ == "__main__":
    main()
