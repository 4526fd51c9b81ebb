"""The example of examples/libtorch: a model saved by Python gives the same numbers in C++."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch_rope

EXAMPLE = Path(__file__).parent.parent / "examples" / "libtorch"
PROMPTS = (["7"], ["3", "1", "4", "1", "5"], [str(token) for token in range(60)])


def run(*command: str | Path) -> str:
    """Runs a command; where it fails, so does the test, with its output."""
    completed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if completed.returncode != 0:
        lines = (" ".join(map(str, command)), completed.stdout, completed.stderr)
        pytest.fail("\n".join(lines), pytrace=False)
    return completed.stdout


@pytest.fixture(scope="module")
def server(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the C++ program."""
    build = tmp_path_factory.mktemp("example")
    prefix = f"-DCMAKE_PREFIX_PATH={torch_rope.cmake_prefix_path}"
    run("cmake", "-S", EXAMPLE, "-B", build, prefix)
    run("cmake", "--build", build)
    return build / "serve"


def numbers(output: str) -> tuple[list[int], list[float]]:
    """Reads the tokens and the scores that either program printed."""
    tokens, scores = output.splitlines()
    assert tokens.startswith("tokens: ")
    assert scores.startswith("scores: ")
    return [int(word) for word in tokens.split()[1:]], [float(word) for word in scores.split()[1:]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: f"{len(prompt)} tokens")
def test_the_cpp_program_generates_what_python_generates(
    server: Path, tmp_path: Path, prompt: list[str]
) -> None:
    model = tmp_path / "model.pt"
    expected_tokens, expected_scores = numbers(
        run(sys.executable, EXAMPLE / "export.py", model, *prompt)
    )
    tokens, scores = numbers(run(server, model, *prompt))
    assert tokens == expected_tokens
    assert tokens[: len(prompt)] == [int(token) for token in prompt]
    assert len(tokens) > len(prompt)
    assert len(scores) == len(expected_scores) > 0
    # Both print six decimals of float32 numbers that the same operators computed.
    assert scores == pytest.approx(expected_scores, rel=1e-5, abs=1e-5)


def test_the_cpp_program_says_what_is_wrong(server: Path, tmp_path: Path) -> None:
    completed = subprocess.run(
        [server, tmp_path / "missing.pt", "1"], capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 1
    assert "missing.pt" in completed.stderr
