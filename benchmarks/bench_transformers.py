"""Measures a training and a decoding step of a small Llama, with and without torch-rope.

python benchmarks/bench_transformers.py
python benchmarks/bench_transformers.py --threads 1 --json F.json --markdown F.md
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)
BATCH, TOKENS = 1, 512

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def training_step(model: LlamaForCausalLM, device: str) -> Callable[[], object]:
    """Returns a training step: forward, backward, update."""
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, TOKENS), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding_step(model: LlamaForCausalLM, device: str) -> Callable[[], object]:
    """Returns a decoding step: one token after those in the key-value cache."""
    tokens = torch.randint(CONFIG.vocab_size, (1, TOKENS), device=device)
    cache = DynamicCache(config=CONFIG)
    with torch.no_grad():
        model(tokens, cache=cache)

    @torch.no_grad()
    def step() -> None:
        model(tokens[:, :1], cache=cache)
        cache.crop(-1)

    return step


def with_rotation(step: Callable[[], object], function: Any) -> Callable[[], object]:
    """Returns the step with one of the two functions installed in the model's module."""

    def call() -> None:
        modeling_llama.apply_rotary_pos_emb = function
        step()

    return call


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9, help="of all calls in turn")
    add_outputs(parser)
    arguments = parser.parse_args()
    device: str = arguments.device

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    original = modeling_llama.apply_rotary_pos_emb
    with patch(modeling_llama):
        ours = modeling_llama.apply_rotary_pos_emb

    calls: dict[str, Callable[[], object]] = {}
    for dtype in arguments.dtypes:
        for name, make_step in (("training", training_step), ("decoding", decoding_step)):
            model = LlamaForCausalLM(CONFIG).to(device, DTYPES[dtype])
            step = make_step(model.train(name == "training"), device)
            calls[f"{name} step, {dtype}"] = with_rotation(step, original)
            calls[f"{name} step, {dtype}, patched"] = with_rotation(step, ours)
    timings = time_in_turns(calls, arguments.rounds, 0.1, device)

    lines = []
    for name, timing in timings.items():
        if name.endswith("patched"):
            continue
        patched = timings[f"{name}, patched"]
        times = (f"{t.median * 1e3:.2f} ({t.spread:.0%})" for t in (timing, patched))
        lines.append([name, *times, f"{patched.median / timing.median:.3f}"])
    environment = describe_environment(device) | {"transformers": transformers.__version__}
    text = "\n\n".join(
        (
            f"# A small Llama, patched: {environment['device']}, {environment['date']}",
            "\n".join(f"- {name}: {value}" for name, value in environment.items()),
            f"{CONFIG.num_hidden_layers} layers, {CONFIG.num_attention_heads} query and "
            f"{CONFIG.num_key_value_heads} key heads of {CONFIG.head_dim}; training on "
            f"{BATCH} x {TOKENS} tokens, decoding after {TOKENS}; threads: {arguments.threads}. "
            "Milliseconds: median over the rounds (distance between the quartiles over it).",
            table(["step", "transformers", "patched", "ratio"], lines),
        )
    )
    figures = {name: asdict(timing) for name, timing in timings.items()}
    publish(text, {"environment": environment, "calls": figures}, arguments)


if __name__ == "__main__":
    main()
