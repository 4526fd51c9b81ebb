"""Figures in docs/numbers.md and docs/speed.md are those of the reports in benchmarks/results."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="the reports are not here")

ACCURACY, EPYC = "2026-11-28-accuracy.md", "2026-11-27-amd-epyc.md"
XEON, H200 = "2026-11-28-intel-xeon-norm.md", "2026-11-27-nvidia-h200.md"

Rows = list[list[str]]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that reads reports for the charts."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "images"))
    monkeypatch.delitem(sys.modules, "results", raising=False)
    import results

    return results


def table_of(results: Any, page: str, first_cell: str) -> tuple[list[str], Rows]:
    """Returns the header and the rows of the table of a page whose header starts with a text."""
    lines = iter((ROOT / "docs" / page).read_text().splitlines())
    header = next(results.cells(line) for line in lines if line.startswith(f"| {first_cell} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            return header, rows
        rows.append(results.cells(line))
    raise AssertionError("the table has no end")


def assert_is(cell: str, expected: str) -> None:
    """Asserts that a cell is a number of a report, rounded."""
    number, exact = cell.strip("*"), float(expected)
    if "e" in number:
        digits = len(number.split("e")[0].replace(".", ""))
        assert float(number) == float(f"{exact:.{digits - 1}e}")
    else:
        decimals = len(number.partition(".")[2])
        assert float(number) == pytest.approx(exact, abs=0.5001 * 10**-decimals)


RANGES = {"1": "2^0", "256": "2^8", "4,096": "2^12", "65,536": "2^16"}

# The dtype of the report, and the names there.
ROWS_OF_ACCURACY = {
    "float32, positions from": {
        "torch-rope, `max_wavelength`": ["torch-rope"],
        "torch-rope, float32 `inv_freq`": ["torch-rope, float32 inv_freq"],
        "transformers": ["transformers"],
        "torchtune (table of 131,072 positions)": ["torchtune"],
        "x-transformers, rotary-embedding-torch": ["x-transformers", "rotary-embedding-torch"],
    },
    "bfloat16, positions from": {
        "torch-rope, `max_wavelength`": ["torch-rope"],
        "torch-rope, float32 `inv_freq`": ["torch-rope, float32 inv_freq"],
        "transformers": ["transformers"],
        "torchtune, x-transformers": ["torchtune", "x-transformers"],
        "rotary-embedding-torch": ["rotary-embedding-torch"],
    },
    "torch-rope, positions from": {"float16": ["torch-rope"], "float64": ["torch-rope"]},
}


@pytest.mark.parametrize("title", ROWS_OF_ACCURACY)
def test_the_errors_by_position_are_those_of_the_report(results: Any, title: str) -> None:
    header, rows = table_of(results, "numbers.md", title)
    names = ROWS_OF_ACCURACY[title]
    assert [label for label, *_ in rows] == list(names)
    for label, *cells in rows:
        dtype = label if label in ("float16", "float64") else title.split(",")[0]
        report = results.rows(ACCURACY, dtype, "positions from")
        of_range = {row["positions from"]: row for row in report}
        for column, cell in zip(header[1:], cells, strict=True):
            for name in names[label]:
                expected = of_range[RANGES.get(column, column)][name]
                if expected:
                    assert_is(cell, expected)
                else:
                    assert not cell or len(names[label]) > 1


CPU_CASES = {
    "bfloat16, 64 tokens, warm": ("resident", "bfloat16 BSHD 64"),
    "bfloat16, 512": ("resident", "bfloat16 BSHD 512"),
    "bfloat16, 4,096": ("resident", "bfloat16 BSHD 4096"),
    "float16, 512": ("resident", "float16 BSHD 512"),
    "float32, 64": ("resident", "float32 BSHD 64"),
    "float32, 512": ("resident", "float32 BSHD 512"),
    "float32, 4,096": ("resident", "float32 BSHD 4096"),
    "float32, 1,456, heads of 90": ("resident", "float32 BSHD 1456 odd pair count, D 90"),
    "bfloat16, 64 sequences of one token": ("resident", "bfloat16 BSHD 64 x 1 decode"),
    "bfloat16, 20,480, one head each": ("resident", "bfloat16 BSHD 20480 one head"),
    "bfloat16, 4,096, fresh (`clone`: 7.80)": ("functional", "bfloat16 BSHD 4096"),
    "bfloat16, 4,096, forward and backward": ("training", "bfloat16 BSHD 4096"),
}

NORM_CASES = {
    "bfloat16, 512": "bfloat16 BSHD 512",
    "bfloat16, 4,096": "bfloat16 BSHD 4096",
    "float32, 4,096": "float32 BSHD 4096",
    "bfloat16, 512, a norm over all heads": "bfloat16 BSHD 512 32 + 32 heads, over heads",
    "bfloat16, 4,096, forward and backward": "bfloat16 BSHD 4096, training",
    "float32, 4,096, forward and backward": "float32 BSHD 4096, training",
}

NORM_COLUMNS = (
    "torch-rope",
    "apply",
    "rms_norm + apply",
    "torch.compile, rms_norm + apply",
    "torch.compile, tensor code",
    "tensor code",
)


def test_the_times_on_a_cpu_are_those_of_the_report(results: Any) -> None:
    header, rows = table_of(results, "speed.md", "in copies | torch-rope | ONNX Runtime")
    assert [label for label, *_ in rows] == list(CPU_CASES)
    for label, *cells in rows:
        section, case = CPU_CASES[label]
        report = results.rows(EPYC, f"{section}, 1 thread", "copy, ms")
        row = next(row for row in report if row["case"] == case)
        for name, cell in zip(header[1:], cells, strict=True):
            if row.get(name):
                assert_is(cell, row[name])
            else:
                assert not cell


def test_the_times_of_norms_are_those_of_the_report(results: Any) -> None:
    _, rows = table_of(results, "speed.md", "in copies | `norm_apply`")
    assert [label for label, *_ in rows] == list(NORM_CASES)
    report = results.rows(XEON, "1 thread", "copy, ms")
    for label, *cells in rows:
        row = next(row for row in report if row["case"] == NORM_CASES[label])
        for name, cell in zip(NORM_COLUMNS, cells, strict=True):
            if cell or "backward" not in label or name != "apply":
                assert_is(cell, row[name])


def test_the_speeds_on_a_gpu_are_those_of_the_report(results: Any) -> None:
    _, rows = table_of(results, "speed.md", "fraction of a copy's speed")
    report = results.rows(H200, "Operators, as a fraction of the copy's speed", "case")
    of_case = {row["case"]: list(row.values()) for row in report}
    cases = {
        "4,096 tokens": "BSHD, 4,096 tokens",
        "1,024": "BSHD, 1,024",
        "64 sequences of one token": "64 sequences, one token",
        "one token": "one token",
        "float32, 4,096": "float32, 4,096",
    }
    compared = [(label, cells) for label, *cells in rows if label in cases]
    assert len(compared) == len(cases)
    for label, cells in compared:
        _, ours, _, functional, other = of_case[cases[label]]
        assert cells == [ours, functional, other]


@pytest.mark.parametrize("script", ["accuracy.py", "rope.py", "speed.py"])
def test_a_script_draws_the_figures_that_the_pages_show(
    script: str, results: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    import runpy

    import style

    monkeypatch.setattr(style, "FOLDER", tmp_path)
    runpy.run_path(str(ROOT / "docs" / "images" / script), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn
    shown = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    for name in drawn:
        assert f"images/{name}" in shown
        assert (ROOT / "docs" / "images" / name).is_file()
