"""Fixtures, options and settings of every test."""

import os
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch_rope
from hypothesis import settings

# Repeatable by default; `pytest --hypothesis-profile=explore` draws others, and more of them.
settings.register_profile(
    "repeatable", max_examples=200, deadline=None, derandomize=True, database=None
)
settings.register_profile("explore", deadline=None, max_examples=5000, database=None)
settings.load_profile("repeatable")


def why_without_cuda() -> str | None:
    """Returns why no case for CUDA can run here, or None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch_rope._C.has_cuda:
        return "torch-rope was built without CUDA kernels"
    return None


WHY_WITHOUT_CUDA = why_without_cuda()
DEVICES = ["cpu", "cuda"] if WHY_WITHOUT_CUDA is None else ["cpu"]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The device that a test runs on: every test for the CPU runs on CUDA too."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def cuda() -> str:
    """The CUDA device, for tests of what the CPU does not have."""
    return "cuda"


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips what needs CMake and a C++ compiler where one of them is missing."""
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if shutil.which("cmake") is None or found is None:
        pytest.skip("CMake and a C++ compiler are needed, and one of them is not here")


def pytest_report_header() -> str:
    """Says whether the cases for CUDA are collected."""
    if WHY_WITHOUT_CUDA is None:
        return f"CUDA cases: collected, for {torch.cuda.get_device_name()}"
    return f"CUDA cases: not collected ({WHY_WITHOUT_CUDA})"


# pytest-xdist hands out files in order (.ci/run): a long one must not be left for the end.
LONGEST = ["test_transformers.py", "test_cpp.py", "test_compile.py", "test_opcheck.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts long files first. Deselects what only CUDA can run: skips would hide the others."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if WHY_WITHOUT_CUDA is None:
        return
    only_cuda = [item for item in items if "cuda" in getattr(item, "fixturenames", ())]
    items[:] = [item for item in items if item not in only_cuda]
    config.hook.pytest_deselected(items=only_cuda)


# ---- Large tests ----

GIB = 2**30


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a large test without --large, unless twice its memory is free on a CUDA device."""
    marker = item.get_closest_marker("large")
    if marker is None or item.config.getoption("--large"):
        return
    callspec = getattr(item, "callspec", None)
    if callspec is None or callspec.params.get("device") != "cuda":
        pytest.skip("only with --large: minutes on a CPU")
    if torch.cuda.mem_get_info()[0] < 2 * marker.kwargs["gib"] * GIB:
        pytest.skip("too little free memory on the device, and no --large")


@pytest.fixture
def unused_memory_is_freed() -> Iterator[None]:
    """Gives the device memory of a large test back, so that tests in other processes have room."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ---- Failures at once: for runs that may be cut off ----


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    parser.addoption(
        "--failures-at-once", action="store_true", help="print the message of each failure at once"
    )
    parser.addoption(
        "--fuzz-seconds",
        type=float,
        default=0,
        metavar="N",
        help="how long tests/test_properties.py draws calls, instead of a few hundred",
    )
    parser.addoption(
        "--large",
        action="store_true",
        help="run large tests on the CPU too, however little memory is free",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Names the marker, and starts to print failures, unless this is a worker of pytest-xdist.

    The output of workers is lost.
    """
    config.addinivalue_line("markers", "large(gib): takes so many GiB of memory")
    if config.getoption("--failures-at-once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Prints failures and errors in short when they are reported."""

    LINES = 12

    def __init__(self, config: pytest.Config) -> None:
        """Remembers where to print."""
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Prints that of a test."""
        self.show(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Prints that of a module."""
        self.show(report)

    def show(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Prints the end of a failure's traceback, where the message is."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            lines = report.longreprtext.splitlines()[-self.LINES :]
            reporter.write_line("\n".join([f"\nFAILED {report.nodeid}", *lines]), flush=True)
