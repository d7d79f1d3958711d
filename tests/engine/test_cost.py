import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgld.engine.cost import MAX_KEYS, CostModel, at_degree, degree_of, num_positions
from sgld.engine.curve import GROWTH, MAX_SAMPLES, PATIENCE
from sgld.worker.graph_policy import CAPTURES_AFTER

SECONDS = st.floats(1e-6, 1e3)


def model(*runs: tuple[int, float], key: str = "key", times: int = 2) -> CostModel:
    """A cost model that saw these runs: rows and seconds, each so many times."""
    cost = CostModel()
    for rows, elapsed_s in runs:
        for _ in range(times):
            cost.observe(key, rows, elapsed_s)
    return cost


def test_nothing_is_known_before_the_first_run() -> None:
    cost = model((1, 1.0), key="other")
    assert cost.predict("key", 1) is None
    assert cost.estimate("key", 1) is None


def test_first_run_is_enough() -> None:
    assert model((1, 0.25), times=1).predict("key", 1) == 0.25
    assert model((2, 0.25), times=1).predict("key", 2) == 0.25


def test_slow_first_run_of_another_number_of_rows_is_not_believed() -> None:
    cost = model((1, 0.25), (2, 9.0), times=1)
    assert cost.predict("key", 2) == 0.25
    cost.observe("key", 2, 0.3)
    assert cost.predict("key", 2) == 0.3


def test_outliers_change_nothing() -> None:
    cost = model((1, 1.0), times=9)
    for elapsed_s in (50.0, 0.01, 80.0):
        cost.observe("key", 1, elapsed_s)
        assert cost.predict("key", 1) == 1.0


def test_machine_that_got_slower_is_believed_in_the_end() -> None:
    cost = model((1, 1.0), times=MAX_SAMPLES)
    for _ in range(MAX_SAMPLES):
        cost.observe("key", 1, 3.0)
    assert cost.predict("key", 1) == 3.0


def test_number_of_rows_between_two_that_ran_is_on_the_line() -> None:
    cost = model((1, 1.0), (4, 2.5))
    assert [cost.predict("key", rows) for rows in (1, 2, 3, 4)] == pytest.approx([1.0, 1.5, 2.0, 2.5])


def test_more_rows_than_ever_ran_go_on_the_line_up_to_twice_as_many() -> None:
    cost = model((1, 1.0), (4, 2.5))
    assert [cost.predict("key", rows) for rows in (6, 8)] == pytest.approx([3.5, 4.5])
    assert cost.predict("key", 9) is None


def test_fewer_rows_than_ever_ran_go_on_the_line_but_cost_their_share_at_least() -> None:
    assert model((2, 3.0), (4, 4.0)).predict("key", 1) == pytest.approx(2.5)
    assert model((2, 1.0), (3, 3.0)).predict("key", 1) == pytest.approx(0.5)


def test_untried_numbers_of_rows_are_worth_a_try() -> None:
    cost = model((1, 1.0))
    assert [cost.predict("key", rows) for rows in (1, 2, 3)] == [1.0, 1.0, None]


def test_large_batch_is_priced_by_what_a_small_one_takes() -> None:
    assert model((1, 1.0)).estimate("key", 6) == 6.0


@pytest.mark.parametrize(
    ("key", "positions"),
    [
        ("transformer.forward(4096x64,512x3584,)", 4096 + 512),
        ("unet.forward(4x64x64,,77x768)", 64 * 64 + 77),
        ("transformer.forward(16x21x60x104,512x4096)", 21 * 60 * 104 + 512),
        ("text_encoder.forward(77,77)", 154),
        ("guider.forward()", 1),
        ("c", 1),
    ],
)
def test_positions_are_those_of_sequences_and_pictures(key: str, positions: int) -> None:
    assert num_positions(key) == positions


def test_unknown_key_costs_as_much_per_position_as_the_nearest_of_its_component() -> None:
    cost = CostModel()
    cost.observe("vae.decode(9x64)", 1, 100.0)
    cost.observe("transformer.forward(1000x64)", 1, 1.0)
    cost.observe("transformer.forward(8000x64)", 1, 10.0)
    assert cost.predict("transformer.forward(6000x64)", 1) is None
    assert cost.estimate("transformer.forward(6000x64)", 1) == pytest.approx(7.5)
    assert cost.estimate("transformer.forward(500x64)", 1) == pytest.approx(0.5)
    assert cost.estimate("transformer.forward(500x64)", 2) == pytest.approx(1.0)
    assert cost.estimate("text_encoder.forward(500x64)", 1) is None


def test_version_tells_of_news_only() -> None:
    cost = model((1, 1.0))
    before = cost.version
    cost.observe("key", 1, 1.001)
    assert cost.version == before
    for _ in range(MAX_SAMPLES):
        cost.observe("key", 1, 1.5)
    assert cost.version > before


def test_keys_that_did_not_run_for_long_are_forgotten() -> None:
    cost = CostModel()
    for index in range(MAX_KEYS + 1):
        cost.observe("first", 1, 1.0)
        cost.observe(str(index), 1, 1.0)
    assert cost.predict("first", 1) is not None
    assert cost.predict("0", 1) is None
    assert len(cost.learned()) == MAX_KEYS


def test_what_was_learned_is_recalled_and_outvoted() -> None:
    old, new = model((1, 1.0), (2, 1.5)), CostModel()
    new.recall(old.learned())
    assert [new.predict("key", rows) for rows in (1, 2, 3)] == [old.predict("key", rows) for rows in (1, 2, 3)]
    for _ in range(3):
        new.observe("key", 1, 4.0)
    assert new.predict("key", 1) == 4.0


@given(st.lists(st.tuples(st.integers(1, 8), SECONDS), min_size=1), st.integers(1, 32))
def test_predictions_are_positive_and_known_as_far_as_batches_may_grow(
    runs: list[tuple[int, float]], rows: int
) -> None:
    cost = model(*runs)
    predicted_s = cost.predict("key", rows)
    assert (predicted_s is None) == (rows > GROWTH * max(n for n, _ in runs))
    assert predicted_s is None or predicted_s > 0
    estimated_s = cost.estimate("key", rows)
    assert estimated_s is not None
    assert estimated_s > 0


@given(st.lists(st.tuples(st.integers(1, 8), SECONDS), min_size=1))
def test_prediction_of_what_ran_lies_among_its_runs(runs: list[tuple[int, float]]) -> None:
    cost = model(*runs)
    for rows in {n for n, _ in runs}:
        seconds = [s for n, s in runs if n == rows]
        predicted_s = cost.predict("key", rows)
        assert predicted_s is not None
        # What moves by less than 2 % isn't news.
        assert 0.98 * min(seconds) <= predicted_s <= 1.03 * max(seconds)


def test_more_ranks_are_tried_one_doubling_at_a_time() -> None:
    cost = CostModel()
    assert cost.predict("c", 1, 2) is None
    cost.observe("c", 1, 8.0)
    assert cost.predict("c", 1, 2) == 4.0, "worth a try"
    assert cost.predict("c", 1, 4) is None
    for _ in range(PATIENCE):
        cost.observe(at_degree("c", 2), 1, 5.0)
    assert (cost.predict("c", 1, 2), cost.predict("c", 1, 4)) == (5.0, 2.5)


def test_first_runs_of_several_ranks_are_not_believed_as_graphs_may_follow() -> None:
    cost = CostModel()
    cost.observe("c", 1, 8.0)
    for _ in range(2 * (CAPTURES_AFTER - 1)):
        # Two blocks of two ranks, before each has a graph.
        cost.observe(at_degree("c", 2), 1, 100.0)
        assert cost.predict("c", 1, 2) == 4.0
    cost.observe(at_degree("c", 2), 1, 5.0, "graph")
    assert cost.predict("c", 1, 2) == 5.0


def test_block_of_ranks_that_has_no_graph_yet_says_nothing_of_those_that_have() -> None:
    cost = CostModel()
    cost.observe("c", 1, 8.0)
    for variant, elapsed_s in (("eager", 9.0), ("eager", 9.0), ("graph", 5.0), ("graph", 5.0), ("eager", 100.0)):
        cost.observe(at_degree("c", 2), 1, elapsed_s, variant)  # type: ignore[arg-type]
    assert cost.predict("c", 1, 2) == 5.0


def test_what_several_ranks_take_is_recalled() -> None:
    cost, again = CostModel(), CostModel()
    cost.observe("c", 1, 8.0)
    for _ in range(PATIENCE):
        cost.observe(at_degree("c", 2), 1, 5.0)
    again.recall(cost.learned())
    assert again.predict("c", 1, 2) == 5.0


def test_what_ranks_gain_holds_for_other_numbers_of_rows() -> None:
    cost = CostModel()
    for rows in (1, 2, 2, 4, 4):
        cost.observe("c", rows, 8.0 * rows)
    for _ in range(PATIENCE):
        cost.observe(at_degree("c", 2), 1, 6.0)
    assert cost.predict("c", 4, 2) == pytest.approx(24.0)


def test_what_was_not_believed_of_several_ranks_is_not_recalled_as_if_it_were() -> None:
    cost, again = CostModel(), CostModel()
    for _ in range(PATIENCE - 1):
        cost.observe(at_degree("c", 2), 1, 100.0)
    assert cost.predict("c", 1, 2) is None
    again.recall(cost.learned())
    assert again.predict("c", 1, 2) is None


def test_estimate_is_that_of_the_fastest_degree_and_share_that_of_the_most_sparing_one() -> None:
    cost = CostModel()
    for degree, elapsed_s in ((1, 8.0), (2, 5.0), (4, 4.0)):
        for _ in range(PATIENCE):
            cost.observe(at_degree("c", degree), 1, elapsed_s)
    assert cost.estimate("c", 1) == 4.0
    assert cost.share("c", 4) == pytest.approx(8.0 / 4 / 4.0)
    assert cost.share("unknown", 4) == 1.0


@pytest.mark.parametrize("degree", [1, 2, 16])
def test_degrees_are_part_of_keys(degree: int) -> None:
    key = at_degree("transformer.forward(16x4,3) exact", degree)
    assert degree_of(key) == ("transformer.forward(16x4,3) exact", degree)
    assert num_positions(key) == 16
