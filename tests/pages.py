"""The pages of the documentation and their blocks of code; ``python pages.py`` runs such programs.

The latter imports PyTorch once, and runs every program that it reads the name of in a fork.
"""

import os
import re
import runpy
import signal
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^ *(?P<marks>`{3,}|~{3,}|:{3,}) *(?P<info>.*?)$")


class Block(NamedTuple):
    """A fenced block: its language or directive, the line that it begins in, and its text."""

    language: str
    line: int
    text: str


def pages() -> list[str]:
    """Returns the paths of all pages, from the root."""
    found = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [str(path.relative_to(ROOT)) for path in found]


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    found: list[Block] = []
    marks, language, start, lines = "", "", 0, [""]
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if fence and not marks:
            marks, language = fence["marks"], fence["info"]
            start, lines = number + 1, []
        elif fence and fence["marks"].startswith(marks) and not fence["info"]:
            found.append(Block(language, start, textwrap.dedent("\n".join(lines)) + "\n"))
            marks = ""
        else:
            lines.append(line)
    assert not marks, f"{page}:{start - 1}: a block without an end"
    return found


def program_of(page: str) -> str:
    """Returns a page's Python blocks as a program, each at its own line."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.text.splitlines()
    return "\n".join(lines) + "\n" if lines else ""


def run(program: Path) -> int:
    """Runs a program in a fork, in its folder; what it prints goes to a file beside it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        signal.alarm(600)
        os.chdir(program.parent)
        output = os.open("output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [str(program)]
        runpy.run_path(str(program), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import torch_rope  # noqa: F401  # also torch

    for name in sys.stdin:
        print(run(Path(name.strip())), flush=True)
