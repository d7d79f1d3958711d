from typing import Any

import pytest
from added import Row, Way, joined, text
from overhead import lost_of, rounded, way_of

REPORT = {
    "command": "python bench/overhead.py",
    "machine": "H200, Python 3.12",
    "versions": {"torch": "2"},
    "load": "1 before, 1 after",
    "tick_cpu_ms": 0.5,
}


def way(step_ms: list[float], outside_ms: float) -> Way:
    return Way(
        step_ms=step_ms,
        forward_ms=[step - outside_ms for step in step_ms],
        outside_ms=[outside_ms] * len(step_ms),
        lost=[outside_ms / step for step in step_ms],
        picture_ms=[20 * step for step in step_ms],
    )


def row(**changed: Any) -> Row:
    """The engine takes 1 ms more than the pipeline, between forwards."""
    times = {"device_ms": 45.0, "launch_ms": 9.0, "added_cpu_ms": [0.3, 0.4]}
    ways = {"bare": way([50.0, 50.0], 0.5), "engine": way([51.0, 51.0], 1.5)}
    return Row(name="7 layers", **(times | ways | changed))  # type: ignore[arg-type]


def test_steps_and_what_is_outside_of_their_forwards_are_those_of_each_run() -> None:
    spans = [(0.0, 8.0), (10.0, 8.0), (20.0, 9.0), (33.0, 7.0)]

    way = way_of([spans], [50.0])

    assert (way.step_ms, way.forward_ms, way.outside_ms) == ([10.0], [8.0], [2.0])
    assert way.lost == [pytest.approx(1 - 32 / 40)] == [lost_of(spans)]


def test_what_is_added_is_told_of_runs_that_came_after_one_another() -> None:
    ours = row(engine=way([51.0, 52.0], 1.5))

    lines = text([[ours]], REPORT).splitlines()

    whole = next(line for line in lines if line.startswith("| 7 layers"))
    assert "| device | 45.00 | 9.00 | 50.00 (50.00 to 50.00) |" in whole
    assert "| 3.0 % (2.0 to 4.0) | 3.0 % (2.0 to 4.0) |" in whole
    assert (
        "| 1.00 (1.00 to 1.00) | 2.0 % (2.0 to 2.0) |" in [line for line in lines if line.startswith("| 7 layers")][1]
    )


def test_a_model_whose_launches_take_longer_than_its_kernels_is_bound_by_the_host() -> None:
    assert row(launch_ms=60.0).bound_by == "host"
    assert row(device_ms=None, launch_ms=None).bound_by == "CPU"
    assert "a third more or less" in text([[row(launch_ms=60.0)]], REPORT)
    assert "a third" not in text([[row()]], REPORT)


def test_runs_of_all_processes_count() -> None:
    (both,) = joined([[row(graphs=way([9.0], 0.1))], [row(added_cpu_ms=[0.5], graphs=way([10.0], 0.1))]])

    assert both.bare.step_ms == [50.0] * 4
    assert both.added_cpu_ms == [0.3, 0.4, 0.5]
    assert both.graphs is not None
    assert both.graphs.step_ms == [9.0, 10.0]
    assert "## With CUDA graphs" in text([[both]], REPORT)


def test_a_report_without_models_tells_of_ticks() -> None:
    assert "adds 0.50 ms" in text([], REPORT)


def test_numbers_are_kept_with_four_digits() -> None:
    assert rounded({"a": [0.123456, "b"]}) == {"a": [0.1235, "b"]}
