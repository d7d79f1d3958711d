from collections import Counter

import measured
import pytest
import serving
from measured import Measured
from policies import Class
from serving import MIXES, Asked

from sgld.engine.cost import LearnedTime
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


def test_times_of_the_simulation_are_those_that_the_server_learned() -> None:
    (of,) = measured.classes(learned(), [CLASS], max_rows=2)

    assert (of.encode_s, of.step_s(1), of.step_s(2), of.decode_s) == pytest.approx((0.02, 0.1, 0.15, 0.05))
    assert of.alone_s == pytest.approx(2.07)
    assert of.step_s(4) == pytest.approx(0.3)


def test_a_class_that_was_never_served_has_no_times() -> None:
    with pytest.raises(LookupError, match="1024²"):
        measured.classes(learned(), [Class(1024, 25, 1.0)], max_rows=1)


def test_a_server_that_is_as_fast_as_the_simulation_differs_by_nothing() -> None:
    mix = [Measured(512, 20, 1.0, (0.1,), 0.02, 0.05)]
    asked = [Asked("512²", at, 0.0, 200) for at in (0.0, 1.0, 9.0)]
    alone = {"512²": 2.07 + 0.5}
    for one, latency_s in zip(asked, serving.simulated(asked, mix, alone), strict=True):
        one.latency_s = latency_s

    found = serving.against_simulation(asked, mix, alone)

    assert asked[2].latency_s == pytest.approx(2.57, rel=0.02)
    assert found["mean_differs"] == pytest.approx(0)
    assert found["p90_difference"] == pytest.approx(0)
