from collections import Counter
from dataclasses import replace

import agreement
import measured
import pytest
import serving
from agreement import Asked
from measured import Measured
from policies import Class
from serving import MIXES

from sgld.engine.cost import LearnedTime, at_degree
from sgld.engine.curve import PATIENCE
from sgld.engine.demand import CallClass, Profile
from sgld.engine.learned import Learned

STEP, ENCODE, DECODE = "transformer.forward(1024x64)", "text_encoder.forward(77)", "vae.decode(16x64x64)"
CLASS = Class(512, 20, 1.0)


def learned() -> Learned:
    """Two rows take 1.5 times as long as one."""
    calls: tuple[tuple[CallClass, int], ...] = (
        (("encode", ENCODE, 1), 2),
        (("denoise", STEP, 1), 20),
        (("decode", DECODE, 1), 1),
    )
    like = repr((512, 512, 1, 20, None, None, None, True, 0, []))
    times: tuple[LearnedTime, ...] = (
        (STEP, 1, "graph", 0.1),
        (STEP, 2, "graph", 0.15),
        (ENCODE, 1, "eager", 0.01),
        (DECODE, 1, "eager", 0.05),
    )
    return Learned(times=times, profiles=(Profile(like, None, calls),))


def test_a_trace_is_poisson_with_the_shares_of_its_mix_and_the_same_each_time() -> None:
    trace = serving.arrivals(MIXES["C"], rate=10.0, duration_s=1000.0, seed=1)

    assert trace == serving.arrivals(MIXES["C"], rate=10.0, duration_s=1000.0, seed=1)
    assert len(trace) == pytest.approx(10_000, rel=0.03)
    shares = Counter(kind.name for _, kind in trace)
    assert shares["1024²"] / len(trace) == pytest.approx(0.45, abs=0.02)


def test_in_time_counts_all_that_were_asked_and_refusals_are_told() -> None:
    asked = [Asked("512²", 0.0, 1.0, 200), Asked("512²", 0.0, 4.0, 200), Asked("512²", 6.0, 0.0, 429)]

    found = serving.summary(asked, {"512²": 1.0})["all"]

    assert (found["num"], found["num_done"], found["num_429"]) == (3, 2, 1)
    assert found["in_time"] == pytest.approx(1 / 3)
    assert found["goodput_per_s"] == pytest.approx(1 / 6)
    assert found["mean_s"] == pytest.approx(2.5)


def test_what_has_no_answer_counts_once_it_is_late() -> None:
    asked = [Asked("512²", 0.0, 1.0, 200), Asked("512²", 1.0), Asked("512²", 9.0)]

    assert serving.decided(asked, {"512²": 2.0}, until=10.0) == asked[:2]


def test_times_of_the_simulation_are_those_that_the_server_learned() -> None:
    (of,) = measured.classes(learned(), [CLASS], max_rows=2)

    assert (of.encode_s, of.step_s(1), of.step_s(2), of.decode_s) == pytest.approx((0.02, 0.1, 0.15, 0.05))
    assert of.alone_s == pytest.approx(2.07)
    assert of.step_s(4) == pytest.approx(0.3)


def test_ranks_that_shared_forwards_have_times_of_their_own() -> None:
    times: list[LearnedTime] = [
        (at_degree(STEP, 2), 1, "eager", 0.06),
        (at_degree(STEP, 4), 1, "eager", 0.04),
        (at_degree(DECODE, 2), 1, "eager", 0.03),
    ]

    (of,) = measured.classes(measured.with_forwards(learned(), times), [CLASS], 2, {"512²": 2.0}, num_ranks=4)

    assert [of.tick_s(1, 1, degree) for degree in (1, 2, 4)] == pytest.approx([0.1, 0.06, 0.04])
    assert of.tick_s(1, 2, 2) == pytest.approx(0.09), "several gain as much of more rows"
    assert [of.tick_s(21, 1, degree) for degree in (1, 2)] == pytest.approx([0.05, 0.03])
    assert [of.max_degree(stage) for stage in (0, 1, 21)] == [1, 4, 2]
    assert of.rest_s == pytest.approx(2.0 - 0.02 - 20 * 0.04 - 0.03)


def test_warm_up_lets_each_number_of_ranks_become_a_graph() -> None:
    rounds = serving._rounds(4)

    assert {together for together, _ in rounds} == {1, 2, 4, 8}
    assert max(num_steps for together, num_steps in rounds if together == 1) > 2 * (PATIENCE + 2)
    assert serving._rounds(1) == serving._FEW_STEPS


def test_a_class_that_was_never_served_has_no_times() -> None:
    with pytest.raises(LookupError, match="1024²"):
        measured.classes(learned(), [Class(1024, 25, 1.0)], max_rows=1)


def test_times_of_a_trace_take_the_place_of_those_that_the_server_learned() -> None:
    times: list[LearnedTime] = [(STEP, 2, "eager", 0.19), (STEP, 4, "eager", 0.4)]

    (of,) = measured.classes(measured.with_forwards(learned(), times), [CLASS], 4, {"512²": 2.57})

    assert [of.step_s(rows) for rows in (1, 2, 3, 4)] == pytest.approx([0.1, 0.19, 0.295, 0.4])
    assert of.rest_s == pytest.approx(0.5)
    assert of.alone_s == pytest.approx(2.57)


def test_a_server_that_is_as_fast_as_the_simulation_differs_by_nothing() -> None:
    mix = [Measured(512, 20, 1.0, (0.1,), 0.02, 0.05, 0.5)]
    asked = [Asked("512²", at, 0.0, 200) for at in (0.0, 1.0, 9.0)]
    for one, latency_s in zip(asked, agreement.simulated(asked, mix), strict=True):
        one.latency_s = latency_s

    found = agreement.against_simulation(asked, mix)

    assert asked[2].latency_s == pytest.approx(2.57)
    assert found["by_class"]["512²"]["mean_differs"] == pytest.approx(0)
    assert found["p90_difference"] == pytest.approx(0)


def test_only_what_was_answered_is_compared() -> None:
    mix = [Measured(512, 20, 1.0, (0.1,), 0.02, 0.05)]
    asked = [Asked("512²", 0.0, 2.07 * 1.1, 200), Asked("512²", 1.0, 0.0, 0)]

    found = agreement.against_simulation(asked, mix)

    assert found["by_class"]["all"]["num"] == 1
    assert found["median_difference"] == pytest.approx(0.1)


def test_simulated_scheduler_knows_what_it_served_before() -> None:
    """Two that are alike would share a forward to try it, if the second one's time weren't known."""
    dear = Measured(512, 20, 1.0, (0.1, 0.3), 0.02, 0.05)
    asked = [Asked("512²", at) for at in (0.0, 0.01)]

    first, second = agreement.simulated(asked, [dear])

    assert first == pytest.approx(2.07)
    assert second == pytest.approx(2 * 2.07 - 0.01)


def test_who_comes_when_the_next_forward_is_decided_has_no_say_in_it() -> None:
    long = Measured(1024, 4, 0.5, (1.0,), 0.0, 0.0)
    short = Measured(512, 1, 0.5, (0.1,), 0.0, 0.0)
    asked = [Asked("1024²", 0.0), Asked("512²", 0.95)]

    at_once = agreement.simulated(asked, [long, short])
    ahead = agreement.simulated(asked, [replace(long, leads_s=(0.0, 0.1, 0.0)), short])

    assert at_once == pytest.approx([4.1, 0.15])
    assert ahead == pytest.approx([4.1, 1.15])


def test_errors_of_predictions_are_read_from_metrics() -> None:
    said = """
sgld:eta_error_ratio_bucket{le="0.01",told="queued"} 3.0
sgld:eta_error_ratio_count{told="queued"} 4.0
sgld:eta_error_ratio_sum{told="queued"} 0.5
"""
    assert serving.eta_errors(said) == {"queued": 0.125}
