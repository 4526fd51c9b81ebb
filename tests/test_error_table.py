"""docs/errors.md lists every message of the sources, and what the operators raise is in it."""

import re
from collections import Counter

import pytest
from messages import CHECKS, ROOT, VARYING, Message, messages, without_function
from refusals import CALLS, arguments_of, through_dispatcher

PAGE = (ROOT / "docs" / "errors.md").read_text()
ROW = re.compile(r"^\| `(?P<text>.+?)` \| (?P<exception>\w+) \| (?P<advice>.*) \|$", re.MULTILINE)

# Exceptions whose text is made elsewhere.
WITHOUT_TEXT = {
    "python/torch_rope/_nested.py",  # another error, by another name
}

# Messages of the operators that tests/refusals.py cannot have, and where they are tried.
ELSEWHERE = {
    "Inplace update to inference tensor outside InferenceMode": "tests/test_in_place.py",
    "expected nested tensors to have the layout torch.jagged": "tests/test_errors.py",
    "expected tensors on the CPU, since": "by hand: on a GPU, with a build without CUDA",
    "expected … to be a tensor, but got none": "tests/test_cpp.py",
    # Types that only Python's functions are given.
    "expected … to be a bool, but": "tests/test_errors.py",
    "expected … to be a number, but": "tests/test_errors.py",
    "expected … to be a sequence of integers or None, but": "tests/test_errors.py",
    "expected … to be a tensor or None, but": "tests/test_errors.py",
    "expected … to be a tensor or a (q, k) tuple, but": "tests/test_errors.py",
    "expected … to be a tensor, but got …": "tests/test_errors.py",
    "expected … to be an integer or None, but": "tests/test_errors.py",
    "expected … to be an integer, but": "tests/test_errors.py",
    "expected x to be a tensor or a (q, k) tuple of two tensors": "tests/test_errors.py",
    "expected weight to be a (q_weight, k_weight) tuple": "tests/test_errors.py",
}


def rows(page: str) -> list[Message]:
    """Returns the messages of the tables."""
    return [Message(row["text"], row["exception"]) for row in ROW.finditer(page)]


def test_the_table_lists_the_messages_of_the_sources() -> None:
    of_sources = {
        message: files for message, files in messages().items() if message.text != VARYING
    }
    listed = rows(PAGE)
    lacking = [
        f"| `{message.text}` | {message.exception} | ({', '.join(sorted(files))}) |"
        for message, files in of_sources.items()
        if message not in listed
    ]
    assert not lacking, "docs/errors.md lacks these rows:\n" + "\n".join(lacking)
    stale = [message for message in listed if message not in of_sources]
    assert not stale, "docs/errors.md has rows that no source has"
    assert [message for message, count in Counter(listed).items() if count > 1] == []


def test_every_exception_has_a_text() -> None:
    found = [files for message, files in messages().items() if not message.text.strip(VARYING)]
    assert set().union(*found) == WITHOUT_TEXT


def test_every_row_says_what_to_do() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    assert len(rows(PAGE)) == len(lines) - 2 * lines.count("| --- | --- | --- |")
    assert [row["text"] for row in ROW.finditer(PAGE) if len(row["advice"]) < 10] == []


# Errors of CUDA itself, and failures of librope_kernels.so that no argument causes.
THROWING = ("run.cpp", "dispatch.h", "unsupported_dtype_in_kernels.cpp")


def test_no_source_raises_in_another_way() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.name in THROWING:
            continue
        source = re.sub(r"//.*", "", path.read_text())
        assert set(re.findall(r"\b(TORCH_CHECK\w*)\(", source)) <= set(CHECKS), path
        assert not re.search(r"\b(throw (?!;)|AT_ERROR|C10_THROW_ERROR)", source), path


def pattern(text: str) -> str:
    """Returns a pattern of a message; advice in brackets may follow."""
    return re.escape(text).replace(VARYING, ".*") + r"( \(.*\))?"


@pytest.fixture(scope="module")
def tried() -> set[Message]:
    """The rows that the refused calls of tests/refusals.py raise."""
    operators = rows(PAGE.partition("\n## Private")[0])
    found = set()
    for case in CALLS:
        tensors, arguments, options = arguments_of(*case.values, "cpu")
        with pytest.raises(case.values[2].exception) as caught:
            through_dispatcher(case.values[0], tensors, *arguments, **options)
        text = without_function(str(caught.value))
        matches = [
            message
            for message in operators
            if message.exception == caught.type.__name__
            and re.fullmatch(pattern(message.text), text, re.DOTALL)
        ]
        assert matches, f"docs/errors.md has no row for {text}"
        found.update(matches)
    return found


def test_every_row_of_the_operators_is_tried(tried: set[Message]) -> None:
    of_operators = set(rows(PAGE.partition("\n## Private")[0]))
    untried = {message.text for message in of_operators - tried}
    elsewhere = {text for text in untried for known in ELSEWHERE if text.startswith(known)}
    assert untried == elsewhere
    # What is listed as tried elsewhere is a row that is not tried here.
    assert [
        known for known in ELSEWHERE if not any(text.startswith(known) for text in untried)
    ] == []
