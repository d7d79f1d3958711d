import time

import pytest

from sgld.messages import Ran, Stepped
from sgld.worker import ahead
from sgld.worker.ahead import MARGIN_S, MARGIN_SHARE, Ahead
from sgld.worker.clock import DeviceClock, HostClock
from worker.devices import FakeDevice, StreamingDevice


def ran(*call_ids: int, is_timed: bool = True) -> Ran:
    return Ran(call_ids=call_ids, cost_key="unet", rows=len(call_ids), elapsed_s=0.0, is_timed=is_timed)


def step(request_id: str, number: int = 1) -> Stepped:
    return Stepped(request_id=request_id, step=number, num_steps=9)


class Launching:
    """A rank that gives its device one tick after the other."""

    def __init__(self, device: FakeDevice | None = None) -> None:
        self.device = device or FakeDevice()
        self.clock: DeviceClock = self.device.clock()
        self.ahead = Ahead(self.device.now_ns)

    def in_time(self, num: int, seconds: float, launch_s: float) -> tuple[float, float]:
        """So many ticks, each launched as late as it may; what one took in the mean, and the last one's lead."""
        leads, start_s = [], self.device.now_s
        for _ in range(num):
            spare_s = 1.0
            while spare_s:
                spare_s = self.ahead.spare_s()
                leads += [tick.ran.lead_s for tick in self.ahead.over()]
                self.device.now_s += min(spare_s, 0.002)
            self.ahead.wait()
            self.tick(1, seconds, launch_s)
        self.device.settle()
        leads += [tick.ran.lead_s for tick in self.ahead.over()]
        return (self.device.now_s - start_s) / num, leads[-1]

    def tick(self, call_id: int, seconds: float, launch_s: float = 0.001) -> None:
        span = self.clock.begin()
        self.device.work(seconds, launch_s)
        span.end()
        self.ahead.add(ran(call_id), span)


@pytest.fixture
def rank() -> Launching:
    return Launching()


def test_what_a_cpu_did_is_told_at_once() -> None:
    ahead = Ahead(time.monotonic_ns)
    span = HostClock().begin()
    span.end()
    ahead.add(ran(1), span)
    (tick,) = ahead.over()
    assert (tick.ran.call_ids, tick.ran.elapsed_s, tick.ran.started_ns) == ((1,), span.elapsed_s, span.started_ns)
    assert len(ahead) == 0
    assert not ahead.stepped(step("a")), "nobody would tell it"


def test_tick_and_its_steps_are_told_when_the_device_is_done(rank: Launching) -> None:
    rank.tick(1, 0.5)
    assert rank.ahead.stepped(step("a"))
    rank.tick(2, 0.25)
    assert rank.ahead.stepped(step("b"))
    assert list(rank.ahead.over()) == []
    rank.device.now_s += 0.51
    (tick,) = rank.ahead.over()
    assert tick.ran.call_ids == (1,)
    assert tick.ran.elapsed_s == pytest.approx(0.501)
    assert tick.steps == [step("a")]
    rank.device.settle()
    assert [tick.steps for tick in rank.ahead.over()] == [[step("b")]]


def test_host_is_no_more_than_one_tick_ahead(rank: Launching) -> None:
    start_s = rank.device.now_s
    for call_id in range(4):
        rank.ahead.wait()
        list(rank.ahead.over())
        rank.tick(call_id, 0.5)
        assert len(rank.ahead) <= 2
    # The third waits for the first, the fourth for the second.
    assert rank.device.now_s - start_s == pytest.approx(1.0, abs=0.01)


def test_end_of_a_task_is_told_after_its_last_tick(rank: Launching) -> None:
    ended: list[str] = []
    assert not rank.ahead.ended(lambda: ended.append("a")), "nobody would tell it"
    rank.tick(1, 0.5)
    assert rank.ahead.ended(lambda: ended.append("b"))
    rank.device.settle()
    (tick,) = rank.ahead.over()
    for tell in tick.ends:
        tell()
    assert ended == ["b"]


def test_next_tick_may_wait_until_the_device_needs_it(rank: Launching) -> None:
    assert rank.ahead.spare_s() == 0.0, "an idle device needs it now"
    rank.tick(1, 0.5, launch_s=0.0)
    assert rank.ahead.spare_s() == 0.0, "who knows how long it takes?"
    rank.device.settle()
    list(rank.ahead.over())

    rank.tick(2, 0.5, launch_s=0.1)
    # It began with the first kernel, 0.1 s ago; launching took nothing the last time.
    assert rank.ahead.spare_s() == pytest.approx(0.4 - MARGIN_S - MARGIN_SHARE * 0.5)
    rank.device.now_s += 0.3
    assert rank.ahead.spare_s() == pytest.approx(0.1 - MARGIN_S - MARGIN_SHARE * 0.5)
    rank.device.now_s += 0.3
    assert rank.ahead.spare_s() == 0.0


def test_time_to_launch_is_left(rank: Launching) -> None:
    rank.tick(1, 0.5, launch_s=0.2)
    rank.device.settle()
    list(rank.ahead.over())
    rank.tick(2, 0.5, launch_s=0.2)
    assert rank.ahead.spare_s() == pytest.approx(0.7 - 0.2 - 0.2 - MARGIN_S - MARGIN_SHARE * 0.7)


def test_tick_that_waited_for_its_launch_delays_no_other(rank: Launching) -> None:
    for call_id, launch_s in ((1, 0.0), (2, 0.2)):
        rank.tick(call_id, 0.5, launch_s)
        rank.device.settle()
        list(rank.ahead.over())
    rank.tick(3, 0.5, launch_s=0.0)
    assert rank.ahead.spare_s() == pytest.approx(0.5 - 0.2 - MARGIN_S - MARGIN_SHARE * 0.5)


def test_two_ticks_on_their_way_keep_the_device_busy_for_both(rank: Launching) -> None:
    rank.tick(1, 0.5, launch_s=0.0)
    rank.device.settle()
    list(rank.ahead.over())
    rank.tick(2, 0.5, launch_s=0.0)
    rank.tick(3, 0.5, launch_s=0.0)
    assert rank.ahead.spare_s() == pytest.approx(1.0 - MARGIN_S - MARGIN_SHARE * 1.0)


def test_what_a_proof_took_says_nothing_of_the_next_tick(rank: Launching) -> None:
    span = rank.clock.begin()
    rank.device.work(5.0)
    span.end()
    rank.ahead.add(ran(1, is_timed=False), span)
    rank.device.settle()
    list(rank.ahead.over())
    rank.tick(2, 0.5)
    assert rank.ahead.spare_s() == 0.0


def test_large_forwards_are_launched_in_part_before_the_device_needs_them() -> None:
    """Most of the time of their launches the host waits for room in the device's queue."""
    rank = Launching(StreamingDevice())
    _, lead_s = rank.in_time(ahead.NUM_TRIED, 0.2, launch_s=0.05)
    assert lead_s > 0.07, "how long launches take isn't known"
    mean_s, lead_s = rank.in_time(40, 0.2, launch_s=0.05)
    assert mean_s == pytest.approx(0.2, rel=0.01), "the device never waits"
    assert lead_s == pytest.approx(MARGIN_S + MARGIN_SHARE * 0.2, abs=0.003)


def test_where_the_first_kernel_comes_late_all_are_launched_before() -> None:
    rank = Launching(StreamingDevice(first_s=0.03))
    rank.in_time(3 * ahead.NUM_TRIED, 0.1, launch_s=0.02)
    mean_s, lead_s = rank.in_time(20, 0.1, launch_s=0.02)
    assert mean_s == pytest.approx(0.1, rel=0.02)
    assert lead_s > 0.03


def test_host_that_is_slower_than_its_device_never_waits() -> None:
    rank = Launching(StreamingDevice(num_waiting=1000))
    rank.in_time(3 * ahead.NUM_TRIED, 0.01, launch_s=0.05)
    assert rank.in_time(20, 0.01, launch_s=0.05)[0] == pytest.approx(0.05, rel=0.02)
