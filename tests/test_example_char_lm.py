"""The example examples/train_char_lm.py: it trains, draws, writes, and tells whether it learned."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SCRIPT = Path(__file__).parent.parent / "examples" / "train_char_lm.py"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Imports the program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return importlib.import_module(SCRIPT.stem)


def test_a_short_run_trains_draws_and_writes(tmp_path: Path, example: ModuleType) -> None:
    picture = tmp_path / "loss.png"
    completed = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "3", "--target-loss", "10", "--plot", picture],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stderr
    assert "3/3" in completed.stderr  # The progress bar.
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = completed.stdout[1:].rpartition("\n\n3 steps in ")[0]
    assert written.startswith(example.PROMPT)
    assert len(written) == len(example.PROMPT) + example.WRITTEN
    found = re.search(r"held-out loss: (\d\.\d{3}) .* \(untrained: (\d\.\d\d)\)", completed.stdout)
    assert found is not None, completed.stdout
    assert float(found[1]) < float(found[2])
    assert completed.stdout.endswith("10.0 was reached\n")


def test_a_loss_that_is_not_reached_is_a_failure(
    tmp_path: Path,
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(example, "WRITTEN", 5)
    monkeypatch.setattr(sys, "argv", ["", "--steps", "2", "--plot", str(tmp_path / "loss.png")])
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert ended.value.code == 1
    assert capsys.readouterr().out.endswith("was NOT reached\n")


def test_characters_read_one_by_one_get_the_scores_of_those_read_at_once(
    example: ModuleType,
) -> None:
    torch.manual_seed(0)
    model = example.CharacterModel(vocabulary=50)
    characters = torch.randint(50, (2, 40))
    caches = [example.Cache() for _ in model.layers]
    with torch.no_grad():
        parts = [model(characters[:, :10], 0, caches)]
        parts += [model(characters[:, i : i + 1], i, caches) for i in range(10, 40)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(characters))


def test_written_characters_have_the_positions_that_follow_the_prompt(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example.CharacterModel(vocabulary=3)
    read: list[int] = []

    def note_positions(characters: Tensor, first: int, caches: Any) -> Tensor:
        read.extend(range(first, first + characters.shape[1]))
        return torch.zeros(*characters.shape, 3)

    monkeypatch.setattr(model, "forward", note_positions)
    assert example.write(model, "abc", "abba", 5, "cpu").startswith("abba")
    assert read == list(range(8))  # The last character that is written is not read.


def test_the_cache_keeps_the_last_characters_of_the_context(example: ModuleType) -> None:
    keys = torch.arange(example.CONTEXT + 3.0)[:, None].expand(1, 1, -1, 4)
    cache = example.Cache()
    cache.extend(keys[:, :, :-1], -keys[:, :, :-1])
    k, v = cache.extend(keys[:, :, -1:], -keys[:, :, -1:])
    assert torch.equal(k, keys[:, :, 3:])
    assert torch.equal(v, -keys[:, :, 3:])
