"""Any call of any operator in any form, drawn at random, does what the contract says.

    python -m pytest tests/test_properties.py                        a few hundred calls
    python -m pytest tests/test_properties.py --fuzz-seconds 3600    as many others as fit

A call that fails is printed as one line of Python that repeats it; the line of a call that ends the
process is left in .pytest_cache/d/fuzz/call.
"""

import time
from pathlib import Path

import pytest
from contract import check, line_of
from hypothesis import given, seed, settings
from strategies import Call, calls

CALLS = 400
CALLS_AT_ONCE = 100  # of a long run, between two looks at the clock


@pytest.fixture
def last_call(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Returns the file that the line of each call is written to before it is made."""
    cache = getattr(request.config, "cache", None)
    return (tmp_path if cache is None else Path(cache.mkdir("fuzz"))) / "call"


def test_any_call_does_what_the_contract_says(
    device: str, last_call: Path, request: pytest.FixtureRequest
) -> None:
    @given(call=calls())
    def run(call: Call) -> None:
        last_call.write_text(f"{line_of(device, call)}\n")
        check(device, call)

    seconds = request.config.getoption("--fuzz-seconds")
    if not seconds:
        settings(max_examples=CALLS)(run)()
        return
    end = time.monotonic() + seconds
    start = time.time_ns()
    rounds = 0
    while time.monotonic() < end:
        profile = settings(max_examples=CALLS_AT_ONCE, derandomize=False, database=None)
        seed(start + rounds)(profile(run))()
        rounds += 1
    print(f"\n{rounds * CALLS_AT_ONCE} calls, from seed {start} on")
