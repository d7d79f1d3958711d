import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sgld.engine.curve import GROWTH, NEWS, PATIENCE, Curve
from sgld.messages import Variant

VARIANTS: tuple[Variant, ...] = ("eager", "compiled", "graph", "compiled graph")


def curve(*runs: tuple[int, Variant, float], times: int = 2) -> Curve:
    """A curve that saw these runs, each so many times."""
    seen = Curve()
    observe(seen, *runs, times=times)
    return seen


def observe(seen: Curve, *runs: tuple[int, Variant, float], times: int = 2) -> None:
    for rows, variant, elapsed_s in runs:
        for _ in range(times):
            seen.observe(rows, elapsed_s, variant)


def test_times_of_a_variant_do_not_dilute_those_of_another() -> None:
    seen = curve((1, "eager", 0.06), times=15)
    observe(seen, (1, "graph", 0.02))
    assert seen.at(1) == 0.02
    assert set(seen.times()) == {(1, "eager", 0.06), (1, "graph", 0.02)}


def test_slow_first_run_of_a_faster_variant_is_not_believed() -> None:
    seen = curve((1, "eager", 0.06))
    observe(seen, (1, "compiled", 9.0), times=1)
    assert seen.at(1) == 0.06
    observe(seen, (1, "compiled", 0.05), times=1)
    assert seen.at(1) == 0.05


def test_other_numbers_of_rows_are_expected_to_gain_as_much() -> None:
    """Two rows at their eager time would look dearer than two forwards of one row, and never be captured."""
    seen = curve((1, "eager", 0.06), (2, "eager", 0.066), (1, "graph", 0.02))
    assert seen.at(2) == pytest.approx(0.022)
    assert seen.variant_of(2) == "eager"


def test_few_rows_that_may_become_faster_cost_no_more_than_many() -> None:
    """First runs are slow for reasons of their own: SDXL took 80 ms eagerly for two rows, and 17 as a graph."""
    seen = curve((2, "eager", 0.08), (8, "eager", 0.101), (4, "graph", 0.024), (8, "graph", 0.037))
    assert seen.at(2) == 0.024
    observe(seen, (2, "graph", 0.017))
    assert seen.at(2) == 0.017


def test_rows_that_do_not_become_faster_cost_what_they_cost() -> None:
    seen = curve((1, "eager", 0.06), (2, "eager", 0.06), (1, "graph", 0.02))
    observe(seen, (2, "eager", 0.06), times=PATIENCE - 1)
    assert seen.at(2) == 0.02
    observe(seen, (2, "eager", 0.06), times=1)
    assert seen.at(2) == 0.06


def test_rows_that_become_faster_late_are_believed() -> None:
    seen = curve((1, "graph", 0.02))
    observe(seen, (2, "eager", 0.06), times=PATIENCE + 1)
    observe(seen, (2, "graph", 0.03))
    assert seen.at(2) == 0.03


def test_graph_that_is_evicted_is_expected_back_for_a_while() -> None:
    seen = curve((1, "compiled", 0.05), (1, "graph", 0.02))
    observe(seen, (1, "compiled", 0.05), times=PATIENCE - 1)
    assert seen.at(1) == 0.02
    observe(seen, (1, "compiled", 0.05), times=1)
    assert seen.at(1) == 0.05
    observe(seen, (1, "graph", 0.02), times=1)
    assert seen.at(1) == 0.02


def test_code_that_is_swapped_in_makes_graphs_of_the_old_code_stale() -> None:
    seen = curve((1, "graph", 0.030), (4, "graph", 0.105))
    observe(seen, (1, "compiled", 0.06))
    assert (seen.at(1), seen.at(4)) == (0.030, 0.105)
    observe(seen, (1, "compiled graph", 0.024))
    assert seen.at(1) == 0.024
    assert seen.at(4) == pytest.approx(0.105 * 0.8)


def test_rows_may_grow_from_all_that_ran_in_whatever_way() -> None:
    seen = curve((1, "eager", 0.06), (8, "eager", 0.07), (1, "graph", 0.02))
    assert seen.at(GROWTH * 8) is not None
    assert seen.at(GROWTH * 8 + 1) is None


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from(VARIANTS), st.floats(1e-6, 1e3)), min_size=1))
@example([(2, "eager", 3.0), (1, "compiled", 1.0), (1, "compiled", 1.0), (7, "compiled", 1.0), (7, "eager", 1.0)])
def test_prediction_is_positive_and_the_last_variant_wins_if_it_stays(runs: list[tuple[int, Variant, float]]) -> None:
    seen = curve(*runs, times=1)
    for rows in range(1, 9):
        at = seen.at(rows)
        assert at is None or at > 0
    rows, variant, _ = runs[-1]
    observe(seen, (rows, variant, 1e-7), times=16)
    assert seen.variant_of(rows) == variant
    assert seen.at(rows) == pytest.approx(1e-7, rel=NEWS)
