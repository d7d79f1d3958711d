import time

import pytest
import torch

from sgld.worker.clock import HostClock, Span, device_clock
from worker.devices import FakeDevice


def worked(device: FakeDevice, seconds: float, launch_s: float = 0.001) -> Span:
    span = device.clock().begin()
    device.work(seconds, launch_s)
    span.end()
    return span


def test_work_of_the_host_is_over_when_it_returns() -> None:
    before_ns = time.monotonic_ns()
    span = HostClock().begin()
    span.end()
    assert span.is_over()
    assert before_ns <= span.started_ns <= time.monotonic_ns()
    assert span.launch_s == span.elapsed_s >= 0


def test_work_of_a_device_goes_on_when_it_is_launched() -> None:
    device = FakeDevice()
    span = worked(device, 0.5, launch_s=0.25)
    assert (span.has_begun(), span.is_over()) == (True, False)
    span.wait()
    assert span.is_over()
    # An idle device begins with the first kernel that it is given.
    assert span.elapsed_s == pytest.approx(0.75)
    assert span.launch_s == pytest.approx(0.25)


def test_work_behind_other_work_takes_its_own_time_only() -> None:
    device = FakeDevice()
    clock = device.clock()
    spans = []
    for seconds in (0.5, 0.25, 0.125):
        spans.append(clock.begin())
        device.work(seconds)
        spans[-1].end()
    assert not spans[2].has_begun()
    spans[2].wait()
    assert [span.elapsed_s for span in spans] == [pytest.approx(0.501), pytest.approx(0.25), pytest.approx(0.125)]
    starts = [span.started_ns / 1e9 - 100.0 for span in spans]
    assert starts == [pytest.approx(0.0), pytest.approx(0.501), pytest.approx(0.751)]


def test_device_that_was_idle_begins_now() -> None:
    device = FakeDevice()
    clock = device.clock()
    for _ in range(2):
        device.now_s += 1.0
        span = clock.begin()
        device.work(0.5)
        span.end()
        began_s = device.now_s
        span.wait()
        assert span.started_ns / 1e9 == pytest.approx(began_s - 0.001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_clock_of_a_gpu_times_its_work_not_the_launch() -> None:
    clock = device_clock("cuda")
    x = torch.randn(8192, 8192, device="cuda")
    clock.settle()
    spans = []
    for _ in range(2):
        spans.append(clock.begin())
        for _ in range(10):
            x @ x
        spans[-1].end()
    assert not spans[1].is_over()
    spans[1].wait()
    first, second = spans
    assert first.is_over()
    assert second.launch_s < second.elapsed_s
    assert 0.5 * first.elapsed_s < second.elapsed_s < 2 * first.elapsed_s
    assert first.started_ns + 1e9 * first.elapsed_s <= second.started_ns + 1e5
