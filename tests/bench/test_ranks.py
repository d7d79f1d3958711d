from dataclasses import dataclass, replace

import pytest
import ranks
from measured import Measured
from policies import Class, Job

STEPS = {1: 1.0, 2: 0.6, 4: 0.4}


def known(side: int = 512, num_steps: int = 4, lead_s: float = 0.0) -> Measured:
    """Encoding takes 0.1, decoding 0.5; only one rank does that."""
    shared = {2: (STEPS[2], None), 4: (STEPS[4], None)}
    return Measured(side, num_steps, 1.0, (1.0, 2.0), 0.1, 0.5, leads_s=(0.0, lead_s, 0.0), shared_s=shared)


def latencies(of: Class, *arrivals_s: float, gap_s: float = 0.0) -> list[float]:
    jobs = [Job(number, of, at) for number, at in enumerate(arrivals_s)]
    ranks.play(ranks.copies_of(1, 4, gap_s=gap_s, known=[of]), jobs)
    return [job.latency_s for job in jobs]


def test_lone_request_has_all_ranks_and_a_gap_where_only_some_ran_what_it_waited_for() -> None:
    # Between encoding and the first step, no more: steps of all ranks are launched ahead, and so is what follows them.
    assert latencies(known(), 0.0, gap_s=0.01) == pytest.approx([0.1 + 0.01 + 4 * 0.4 + 0.5])
    assert ranks.lone_s(known(), 4, 0.01) == pytest.approx(2.21)


def test_as_many_requests_as_ranks_run_side_by_side_each_with_a_gap_before_its_steps() -> None:
    found = latencies(replace(known(num_steps=1), shared_s={}), 0.0, 0.0, 0.0, 0.0, gap_s=0.01)

    # Text is encoded by the first rank only, one after the other.
    assert found[0] == pytest.approx(0.1 + 0.01 + 1.0 + 0.01 + 0.5)
    assert found[3] - found[0] == pytest.approx(3 * (0.1 + 0.01))


def test_who_comes_when_the_next_forward_of_all_ranks_is_launched_waits_for_it() -> None:
    early, late = (latencies(known(lead_s=lead_s), 0.0, 0.45)[1] for lead_s in (0.0, 0.1))

    # It is decided at 0.4 that the other one's second step follows the first one at 0.5, with all ranks.
    assert late > early + 0.1


def test_copies_share_what_comes_evenly() -> None:
    of = known()
    jobs = [Job(number, of, 0.0) for number in range(4)]
    ranks.play(ranks.copies_of(4, 1, 1, known=[of]), jobs)

    assert [job.latency_s for job in jobs] == pytest.approx([4.6] * 4)


@dataclass(frozen=True)
class Even(Class):
    """A step takes a second, however many share it."""

    def step_s(self, rows: int) -> float:
        return float(rows)


def test_class_that_nothing_is_known_of_runs_on_one_rank() -> None:
    [latency_s] = latencies(Even(512, 3, 1.0), 0.0)

    assert latency_s == pytest.approx(3 + 0.03 + 0.04)
