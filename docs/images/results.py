"""Reads the tables of benchmarks/results/*.md, so that charts have the figures of the reports."""

from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

Row = dict[str, str]


def rows(report: str, section: str, column: str) -> list[Row]:
    """Returns the rows of the first table after a heading that has a column of this name."""
    lines = iter((RESULTS / report).read_text().splitlines())
    if section:
        next(line for line in lines if line.startswith("#") and line.strip("# ") == section)
    for line in lines:
        header = cells(line)
        if column in header:
            break
    next(lines)  # The rule below the header.
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append(dict(zip(header, cells(line), strict=True)))
    return table


def cells(line: str) -> list[str]:
    """Returns the cells of a line of a table."""
    return [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
