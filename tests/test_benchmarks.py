"""What the benchmarks of a GPU do without one: their cases, buffers and figures."""

import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not here")

L2_OF_AN_H200 = 60 * 2**20


@pytest.fixture
def bench_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, imported from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench_cuda

    return bench_cuda


def number_of_targets() -> int:
    """Returns how many cases the script has."""
    return (FOLDER / "bench_cuda.py").read_text().count("    Target(")


@pytest.mark.parametrize("place", range(number_of_targets()))
def test_every_case_has_the_exact_result(bench_cuda: Any, place: int) -> None:
    target = bench_cuda.TARGETS[place]
    case = replace(target.case, tokens=min(target.case.tokens, 17))
    problem = replace(target, case=case).problem("cpu")
    call = bench_cuda.ours(problem, target.form)  # Checked in it.
    assert all(x.data_ptr() % 16 for x in problem.tensors) == (case.storage_offset % 2 == 1)
    call()


def test_every_case_has_a_target_and_a_name_of_its_own(bench_cuda: Any) -> None:
    names = [str(target) for target in bench_cuda.TARGETS]
    assert len(set(names)) == len(names) == number_of_targets()
    assert all(0 < target.fraction < 1 for target in bench_cuda.TARGETS)


@pytest.mark.usefixtures("bench_cuda")
@pytest.mark.parametrize(
    ("nbytes", "count"),
    [(1, 16), (2 * 10**4, 16), (2**25, 15), (84 * 10**6, 6), (336 * 10**6, 4), (10**10, 4)],
)
def test_buffers_exceed_the_cache(nbytes: int, count: int) -> None:
    timing = sys.modules["timing"]
    assert timing.count_buffers(nbytes, L2_OF_AN_H200) == count


@pytest.mark.usefixtures("bench_cuda")
def test_a_result_lives_until_its_call_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = sys.modules["timing"]
    for name in ("CUDAGraph", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    results: list[list[weakref.ref[Any]]] = [[], [], []]

    def call(place: int) -> Any:
        if len(results[place]) > 2:  # After the two that warm up.
            assert results[place][-1]() is not None
        result = torch.empty(1)
        results[place].append(weakref.ref(result))
        return result

    graph = timing.capture([partial(call, place) for place in range(3)])
    assert graph.calls == 3 * timing.ROUNDS_OF_A_GRAPH
    assert [len(one) for one in results] == 3 * [2 + timing.ROUNDS_OF_A_GRAPH]


def test_a_replay_counts_for_its_calls_and_the_first_round_for_nothing(
    bench_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = sys.modules["timing"]
    order: list[str] = []
    seconds = {"one": iter([9.0, 1.0, 3.0, 2.0]), "other": iter([9.0, 5.0, 5.0, 5.0])}

    def replay(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    monkeypatch.setattr(timing, "_time_replay", replay)
    timings = bench_cuda.time_graphs({"one": "one", "other": "other"}, 3)
    assert order == ["one", "other"] * 4
    assert (timings["one"].median, timings["other"].median) == (2.0, 5.0)
    assert (timings["one"].spread, timings["other"].spread) == (0.5, 0.0)


def test_figures_are_fractions_of_the_better_copy(bench_cuda: Any) -> None:
    microseconds = {"copy_": 10.0, "bitwise_not": 9.6, "torch-rope": 10.0, "a": 20.0, "b": 12.0}
    timing = sys.modules["timing"]
    timings = {name: timing.Timing(us * 1e-6, 0.01, 0.0) for name, us in microseconds.items()}
    row = bench_cuda.Row("a case", 0.95, timings)
    assert row.fractions == pytest.approx({"torch-rope": 0.96, "a": 0.48, "b": 0.8})
    line = ["a case", "9.60", "10.00", "1%", "0.960", "0.95", "pass", "b 0.800"]
    assert row.cells() == line
    assert replace(row, target=0.97).cells()[6] == "miss"
    text = bench_cuda.report([row], {"device": "a card", "date": "today"})
    assert "Targets met: 1 of 1." in text


def test_what_must_be_moved_is_half_in_place_and_one_and_a_half_for_gradients_of_norms(
    bench_cuda: Any,
) -> None:
    shares = {str(target): target.copied_share for target in bench_cuda.TARGETS}
    assert {name: share for name, share in shares.items() if share != 1} == {
        "bfloat16 BSHD 4096 partial 64 of 128, in place": 0.5,
        "bfloat16 BSHD 4096, norm, backward": 1.5,
    }


@pytest.fixture
def bench_norm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, imported from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    pytest.importorskip("tqdm")
    import bench_norm

    return bench_norm


@pytest.mark.usefixtures("bench_norm")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("over_heads", [False, True])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_have_the_exact_result(
    dtype: str, layout: str, over_heads: bool, training: bool
) -> None:
    bench_norm, norms, cases = (sys.modules[name] for name in ("bench_norm", "norms", "cases"))
    case = cases.Case(dtype, layout, 17, q_heads=3, k_heads=2, head_dim=16)
    problem = norms.NormProblem(case, "cpu", training, over_heads)
    for make in (norms.norm_apply, norms.unfused, norms.plain):
        bench_norm.checked(problem, make(problem), training)()

    def wrong() -> Any:
        q, k = norms.norm_apply(problem)()
        return q, 1.1 * k

    with pytest.raises(AssertionError, match="from the exact result"):
        bench_norm.checked(problem, wrong, training)


def test_every_case_of_a_norm_is_compared_with_a_call_that_is_timed(
    bench_norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_norm, "PEERS", {bench_norm.UNFUSED: sys.modules["norms"].unfused})
    cases = bench_norm.list_cases(quick=False)
    assert len({str(case) for case in cases}) == len(cases)
    assert set(map(str, bench_norm.list_cases(quick=True))) <= set(map(str, cases))
    kinds = {case.target: case for case in cases}
    assert set(kinds) == {
        (bench_norm.ROTATION, 1.4),
        (bench_norm.ROTATION, 1.15),
        (bench_norm.ROTATION, 1.3),
        (bench_norm.UNFUSED, 1 / 3),
        (bench_norm.PER_HEAD, 1.6),
    }
    for (bound, _), case in kinds.items():
        small = replace(case, case=replace(case.case, tokens=2))
        excluded: dict[str, str] = {}
        calls = bench_norm.list_calls(small, excluded)
        assert {bench_norm.OURS, bound, "copy_"} <= set(calls)
        assert not excluded


def test_figures_of_a_norm_are_multiples_of_its_bound(bench_norm: Any) -> None:
    timing = sys.modules["timing"]
    seconds = {"torch-rope": 3.0, "apply": 2.0, "copy_": 1.5, "memcpy": 1.0}
    seconds |= dict(zip(bench_norm.COMPILED, (9.0, 6.0), strict=True))
    timings = {name: timing.Timing(each, 0.01, 0.0) for name, each in seconds.items()}
    row = bench_norm.Row(1, "a case", timings, "apply", 1.4)
    cells = ["a case", "3000.0000", "1%", "apply", "1.50", "1.40", "miss", "2.0", "pass"]
    assert row.cells() == cells
    assert replace(row, target=1.5).cells()[6] == "pass"
    text = bench_norm.report([row], {"device": "a machine", "date": "today"})
    assert "| a case | 1000.0000 | 3.00       | 2.00  | 9.00" in text
