from hypothesis import given
from hypothesis import strategies as st

from sgld.engine.cost import MAX_SAMPLES, CostModel

SECONDS = st.floats(1e-6, 1e3)


def test_nothing_is_known_before_the_first_run() -> None:
    cost = CostModel()
    cost.observe("other", 1, 1.0)
    assert cost.predict("key", 1) is None


def test_one_run_of_one_row_is_enough() -> None:
    cost = CostModel()
    cost.observe("key", 1, 0.25)
    assert cost.predict("key", 1) == 0.25


def test_slow_first_run_of_several_rows_is_not_believed() -> None:
    cost = CostModel()
    cost.observe("key", 1, 0.25)
    cost.observe("key", 2, 9.0)
    assert cost.predict("key", 2) == 0.25
    cost.observe("key", 2, 0.3)
    assert cost.predict("key", 2) == 0.3


def test_fastest_of_the_last_runs_counts() -> None:
    cost = CostModel()
    for elapsed_s in (9.0, 1.0, 2.0):
        cost.observe("key", 1, elapsed_s)
    assert cost.predict("key", 1) == 1.0
    for _ in range(MAX_SAMPLES):
        cost.observe("key", 1, 3.0)
    assert cost.predict("key", 1) == 3.0


def test_untried_number_of_rows_costs_as_much_as_the_next_smaller() -> None:
    cost = CostModel()
    for rows, elapsed_s in ((1, 1.0), (4, 2.0), (4, 2.0)):
        cost.observe("key", rows, elapsed_s)
    assert [cost.predict("key", rows) for rows in (1, 2, 3, 4, 5, 100)] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_larger_number_of_rows_bounds_a_smaller_one() -> None:
    cost = CostModel()
    cost.observe("key", 4, 2.0)
    cost.observe("key", 4, 2.0)
    assert cost.predict("key", 1) == 2.0


@given(st.lists(st.tuples(st.integers(1, 8), SECONDS), min_size=1), st.integers(1, 16))
def test_prediction_is_one_of_the_observations(runs: list[tuple[int, float]], rows: int) -> None:
    cost = CostModel()
    for observed_rows, elapsed_s in runs:
        cost.observe("key", observed_rows, elapsed_s)
    predicted = cost.predict("key", rows)
    assert predicted is None or predicted in {elapsed_s for _, elapsed_s in runs}
    if any(observed_rows == 1 for observed_rows, _ in runs):
        assert predicted is not None
