"""The tasks of a rank: what the scheduler's decisions do to them."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pipelines import BUILDERS, build
from torch import nn

from sgld.messages import Idle, Launched, Pending, Ran, Stepped
from sgld.outcome import Outcome, Value
from sgld.parallel import FIRST, Ranks
from sgld.testing import run_together
from sgld.worker.ahead import News
from sgld.worker.calls import Call
from sgld.worker.executor import Executor, Tick
from sgld.worker.invocation import Invocation
from sgld.worker.job import Job
from sgld.worker.lanes import Lane
from sgld.worker.runtime import Runtime
from sgld.worker.session import Session
from sgld.worker.task import Task
from worker.devices import FakeDevice
from worker.requests import Doubling, Doublings, Sum, requests


class Log:
    """What a session says, and how its tasks ended."""

    def __init__(self) -> None:
        self.messages: list[Sequence[News]] = []
        self.ends: dict[str, Outcome] = {}
        self.said_at_end: list[News] = []
        self.session = Session(Executor(), self.messages.append, self._ended)

    @property
    def replies(self) -> list[News]:
        return [reply for message in self.messages for reply in message]

    def _ended(self, task: Task, outcome: Outcome) -> None:
        self.said_at_end = self.replies
        self.ends[task.request_id] = outcome

    def start(self, *request_ids: str, num_steps: int = 3) -> None:
        pipeline, kwargs = build("pixart")
        for index, request_id in enumerate(request_ids):
            arguments = kwargs | {
                "prompt": "a red cat",
                "num_inference_steps": num_steps,
                "generator": torch.Generator().manual_seed(index),
                "output_type": "pt",
            }
            self.session.start(Job(request_id, pipeline, arguments))

    def waiting(self) -> dict[str, Pending]:
        """The last call of each request."""
        return {reply.call.request_id: reply for reply in self.replies if isinstance(reply, Pending)}


@pytest.fixture
def log() -> Iterator[Log]:
    made = Log()
    yield made
    # Tasks that still wait are threads that still wait.
    made.session.close()


def test_one_message_tells_of_a_tick(log: Log) -> None:
    log.start("a")
    while (call := log.waiting()["a"].call).kind != "denoise":
        log.session.run([call.id])
    log.messages.clear()
    log.session.run([call.id], num_ticks=2)
    assert [[type(reply) for reply in message] for message in log.messages] == [[Ran, Stepped, Pending]] * 2


def test_all_that_is_said_of_a_task_comes_before_its_end(log: Log) -> None:
    log.start("a", num_steps=1)
    while "a" not in log.ends:
        log.session.run([log.waiting()["a"].call.id])
    assert isinstance(log.said_at_end[-1], Ran)
    assert log.said_at_end == log.replies


def test_lone_request_has_no_merge_key_and_learns_nothing(log: Log) -> None:
    log.start("a")
    assert log.waiting()["a"].call.merge_key is None
    assert not log.session.executor.verdicts.axes


def test_second_request_gives_both_the_same_key(log: Log) -> None:
    log.start("a", "b")
    keys = {reply.call.merge_key for reply in log.waiting().values()}
    assert len(keys) == 1
    assert None not in keys


def test_standing_order_goes_on_as_long_as_the_calls_are_alike(log: Log) -> None:
    log.start("a", num_steps=3)
    kinds = []
    while "a" not in log.ends:
        kinds.append(log.waiting()["a"].call.kind)
        log.session.run([log.waiting()["a"].call.id], num_ticks=100)
    assert kinds == ["encode", "denoise", "decode"]
    assert isinstance(log.ends["a"], Value)


def test_standing_order_ends_when_it_is_interrupted(log: Log) -> None:
    log.start("a")
    log.session.run([log.waiting()["a"].call.id], num_ticks=100, is_interrupted=lambda _: True)
    assert sum(isinstance(reply, Ran) for reply in log.replies) == 1
    assert "a" not in log.ends


def test_call_that_is_gone_is_no_error(log: Log) -> None:
    log.start("a")
    call_id = log.waiting()["a"].call.id
    log.session.cancel("a")
    log.session.cancel("a")
    log.session.run([call_id], num_ticks=3)
    assert not any(isinstance(reply, Ran) for reply in log.replies)


def test_steps_are_told_with_their_total(log: Log) -> None:
    log.start("a", num_steps=4)
    while "a" not in log.ends:
        log.session.run([log.waiting()["a"].call.id], num_ticks=100)
    steps = [(reply.step, reply.num_steps) for reply in log.replies if isinstance(reply, Stepped)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def pag_calls() -> list[dict[str, Any]]:
    return requests("sd_pag", BUILDERS["sd_pag"].kwargs)[:3]


def test_exclusive_task_can_be_cancelled_and_leaves_no_trace(log: Log) -> None:
    pipeline, _ = build("sd_pag")
    calls = pag_calls()
    plain = pipeline(**pag_calls()[1]).images
    log.session.start(Job("a", pipeline, calls[0]))
    assert not log.waiting()["a"].call.is_exclusive
    processors = dict(pipeline.unet.attn_processors)
    while pipeline.unet.attn_processors == processors:
        log.session.run([log.waiting()["a"].call.id])
    log.session.start(Job("b", pipeline, calls[1]))
    assert "b" not in log.waiting()
    log.session.cancel("a")
    assert pipeline.unet.attn_processors == processors
    while "b" not in log.ends:
        log.session.run([log.waiting()["b"].call.id], num_ticks=100)
    end = log.ends["b"]
    assert isinstance(end, Value)
    assert torch.equal(end.value.images, plain)


def test_request_that_waits_for_an_exclusive_one_can_be_cancelled(log: Log) -> None:
    pipeline, _ = build("sd_pag")
    calls = pag_calls()
    log.session.start(Job("a", pipeline, calls[0]))
    while log.session.executor.verdicts.modes.get("unet") != "exclusive":
        log.session.run([log.waiting()["a"].call.id])
    assert log.waiting()["a"].call.is_exclusive
    log.session.start(Job("b", pipeline, calls[1]))
    log.session.cancel("b")
    assert "b" in log.ends
    while "a" not in log.ends:
        log.session.run([log.waiting()["a"].call.id], num_ticks=100)
    assert isinstance(log.ends["a"], Value)


class FakeLanes:
    """Begins forwards, and that is all."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, Ranks]] = []

    def begin(self, calls: Sequence[Call], ranks: Ranks) -> None:
        self.begun += [(call.request_id, ranks) for call in calls]

    def degree(self, _call: Call) -> tuple[int, bool]:
        return 1, True


class Watched(Runtime):
    """Says when a component runs, as its lanes do when they are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def run_here(self, invocation: Invocation) -> object:
        self.events.append("forward")
        return super().run_here(invocation)

    def join(self) -> None:
        self.events.append("join")

    def degree(self, _call: Call) -> tuple[int, bool]:
        return 1, True


def test_probe_comes_after_forwards_that_go_on_beside_it() -> None:
    log, runtime = Log(), Watched()
    log.session = Session(Executor(runtime=runtime), log.messages.append, log._ended, lanes=runtime)  # type: ignore[arg-type]
    log.start("a", "b")
    log.session.close()
    assert runtime.events[:2] == ["join", "forward"]


class FailingLanes(FakeLanes):
    """What one began on other ranks fails there."""

    def __init__(self, *failed: Call) -> None:
        super().__init__()
        self._failed = failed
        self.may_run: list[bool] = []

    def over(self, may_run: Callable[[Call], bool]) -> Iterator[tuple[Lane, None]]:
        self.may_run = list(map(may_run, self._failed))
        yield Lane(Ranks(1, 1), self._failed), None


def test_order_that_crosses_the_news_of_an_exclusive_task_begins_nothing(log: Log) -> None:
    pipeline, _ = build("sd_pag")
    for request_id, arguments in zip("ab", pag_calls(), strict=False):
        log.session.start(Job(request_id, pipeline, arguments))
    while not (call := log.waiting()["a"].call).is_exclusive:
        log.session.run([call.id])
    lanes = FakeLanes()
    log.session.lanes = lanes  # type: ignore[assignment]
    assert not log.session.begin([log.waiting()["b"].call.id], Ranks(1, 1))
    assert log.session.begin([call.id], FIRST)
    assert lanes.begun == [("a", FIRST)]


def test_what_failed_elsewhere_runs_here_for_nobody_who_has_left(log: Log) -> None:
    log.start("a")
    [call] = log.session._waiting([log.waiting()["a"].call.id])
    log.session.cancel("a")
    log.session.lanes = lanes = FailingLanes(call)  # type: ignore[assignment]
    assert log.session.ended_lanes()
    assert lanes.may_run == [False]
    log.session.lanes = None


def test_what_failed_elsewhere_runs_here_only_when_components_are_what_it_expects(log: Log) -> None:
    pipeline, _ = build("sd_pag")
    for request_id, arguments in zip("ab", pag_calls(), strict=False):
        log.session.start(Job(request_id, pipeline, arguments))
    [other] = log.session._waiting([log.waiting()["b"].call.id])
    log.session.lanes = lanes = FailingLanes(other)  # type: ignore[assignment]
    assert log.session.ended_lanes()
    assert lanes.may_run == [True]
    log.session.lanes = None
    while not (call := log.waiting()["a"].call).is_exclusive:
        log.session.run([call.id])
    log.session.lanes = lanes = FailingLanes(other, *log.session._waiting([call.id]))  # type: ignore[assignment]
    log.messages.clear()
    assert log.session.ended_lanes()
    assert (lanes.may_run, log.replies) == ([False, True], [Idle(first_rank=1)])


class EndedLanes(FakeLanes):
    """One of another rank is over."""

    def __init__(self, call: Call, tick: Tick) -> None:
        super().__init__()
        self._ended = Lane(Ranks(1, 1), [call]), tick

    def over(self, may_run: Callable[[Call], bool]) -> Iterator[tuple[Lane, Tick]]:
        yield self._ended


def test_calls_that_follow_have_the_choice_of_the_ranks_that_are_free_by_that(log: Log) -> None:
    """Else they go to others, which may be fewer, while their own are still thought to be busy."""
    log.start("a")
    [call] = log.session._waiting([log.waiting()["a"].call.id])
    log.session.lanes = EndedLanes(call, log.session.executor.run([call]))  # type: ignore[assignment]
    log.messages.clear()
    assert log.session.ended_lanes()
    [message] = log.messages
    assert {type(news) for news in message} >= {Idle, Ran, Pending}


def test_exclusive_is_what_the_last_request_was(log: Log) -> None:
    pipeline, _ = build("sd_pag")
    modes = log.session.executor.verdicts.modes
    ways = {"a": 3.0, "b": 0.0, "c": 3.0}
    learned = []
    for (request_id, scale), arguments in zip(ways.items(), pag_calls(), strict=True):
        log.session.start(Job(request_id, pipeline, arguments | {"pag_scale": scale}))
        while request_id not in log.ends:
            log.session.run([log.waiting()[request_id].call.id], num_ticks=100)
        learned.append(modes.get("unet"))
    assert learned == ["exclusive", None, "exclusive"]


def test_pipeline_that_swaps_processors_runs_exclusively_and_right(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, _ = build("sd_pag")
    calls = pag_calls
    plain = [pipeline(**call).images for call in calls()]
    report = run_together(pipeline, calls())
    assert report.mode == "exclusive"
    said = [record.getMessage() for record in caplog.records if record.name == "sgld.worker.session"]
    assert said == ["requests run one at a time, as the pipeline uses unet.attn_processors"]
    for output, expected in zip(report.outputs, plain, strict=True):
        # Their prompts were encoded together, before the first of them began to change anything.
        torch.testing.assert_close(output.images, expected, atol=1e-5, rtol=0)


def test_exact_request_shares_with_nobody() -> None:
    log = Log()
    pipeline, kwargs = build("pixart")
    for request_id in "abc":
        arguments = kwargs | {"prompt": "a red cat", "output_type": "pt"}
        log.session.start(Job(request_id, pipeline, arguments, is_exact=request_id == "b"))
    keys = {request_id: reply.call.merge_key for request_id, reply in log.waiting().items()}
    log.session.close()
    assert keys["b"] is None
    assert keys["a"] == keys["c"] is not None


class Hooking(Doublings):
    """Hooks a part of its model around each call, adds its own number, and forgets the last hook."""

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, num_inference_steps: int = 3, output_type: str = "pt") -> Sum:
        own = x.clone()
        for step in range(num_inference_steps):
            handle = self.transformer.inner.register_forward_hook(lambda _module, _args, result: result + own)
            x = self.transformer(x)
            if step < num_inference_steps - 1:
                handle.remove()
        return Sum(images=x)


class Nested(Doubling):
    """A denoiser with a part that can be hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(super().forward(x))
        return result


def test_hooks_on_parts_of_models_make_a_task_exclusive_and_are_removed() -> None:
    pipeline = Hooking(Nested())
    numbers = [torch.full((1, 4), value) for value in (1.0, 10.0, 100.0)]
    report = run_together(pipeline, [{"x": number} for number in numbers])
    assert report.mode == "exclusive"
    # Each doubles and adds its own number, three times.
    assert [output.images[0, 0].item() for output in report.outputs] == [15.0, 150.0, 1500.0]
    assert not pipeline.transformer.inner._forward_hooks


@pytest.mark.parametrize(("name", "merge"), [("pixart", True), ("wan", False)])
def test_nothing_of_a_request_waits_for_the_garbage_collector(name: str, merge: bool) -> None:
    pipeline, kwargs = build(name)
    drawn = torch.Generator().manual_seed(0)
    gone = weakref.ref(drawn)
    arguments = kwargs | {"prompt": "a red cat", "num_inference_steps": 2, "generator": drawn, "output_type": "pt"}
    gc.collect()
    gc.disable()
    try:
        run_together(pipeline, [arguments], merge=merge)
        before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        run_together(pipeline, [arguments | {"generator": torch.Generator()}], merge=merge)
        after = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        del arguments, drawn
        assert gone() is None
    finally:
        gc.enable()
    assert after <= before


class OnDevice(Doubling):
    """A denoiser that goes on while its caller does; notes how much the device has to do when it is called."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self._fake = device
        self.backlogs: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.backlogs.append(max(0.0, self._fake.free_at_s - self._fake.now_s))
        self._fake.work(0.5)
        return super().forward(x)


@dataclass
class Ahead:
    """A session whose device is never done at once."""

    device: FakeDevice = field(default_factory=FakeDevice)
    told: list[News | str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = OnDevice(self.device)
        executor = Executor(clock=self.device.clock())
        self.session = Session(
            executor, self.told.extend, lambda task, _: self.told.append(f"end of {task.request_id}")
        )

    def start(self, request_id: str, num_steps: int) -> None:
        kwargs = {"x": torch.ones(1, 1), "num_inference_steps": num_steps}
        self.session.start(Job(request_id, Doublings(self.model), kwargs, num_steps=num_steps))

    def is_interrupted(self, wait_s: float) -> bool:
        self.device.now_s += wait_s
        return False

    def run(self, num_ticks: int = 1) -> None:
        (call_id,) = [news.call.id for news in self.told if isinstance(news, Pending)][-1:]
        self.session.run([call_id], num_ticks, self.is_interrupted)


@pytest.fixture
def ahead() -> Iterator[Ahead]:
    made = Ahead()
    yield made
    made.session.close()


def test_next_tick_is_launched_before_the_device_is_done_with_the_last(ahead: Ahead) -> None:
    ahead.start("a", num_steps=6)
    ahead.run(num_ticks=6)
    # How long it takes is known after the first two; from then on the host takes its time, but the device never waits.
    assert ahead.model.backlogs[0] == 0.0
    assert all(0.4 < backlog <= 0.5 for backlog in ahead.model.backlogs[1:3])
    assert all(0.0 < backlog < 0.05 for backlog in ahead.model.backlogs[3:])


def test_what_is_on_its_way_is_told_and_what_came_of_it_when_it_is_over(ahead: Ahead) -> None:
    ahead.start("a", num_steps=3)
    ahead.run()
    kinds = [type(news) for news in ahead.told]
    assert kinds == [Pending, Launched, Pending], "the next call waits, and nobody knows how long the tick takes"
    assert ahead.session.is_ahead
    ahead.device.settle()
    ahead.session.look()
    assert [type(news) for news in ahead.told[3:]] == [Ran, Stepped]
    ran = ahead.told[3]
    assert isinstance(ran, Ran)
    assert ran.elapsed_s == pytest.approx(0.501)
    assert not ahead.session.is_ahead


def test_steps_of_a_task_are_told_before_its_end(ahead: Ahead) -> None:
    ahead.start("a", num_steps=3)
    ahead.run(num_ticks=3)
    ahead.device.settle()
    ahead.session.look()
    end = ahead.told.index("end of a")
    assert [news.step for news in ahead.told[:end] if isinstance(news, Stepped)] == [1, 2, 3]
    assert not any(isinstance(news, Stepped) for news in ahead.told[end:])
    assert sum(isinstance(news, Ran) for news in ahead.told) == 3


def test_fault_of_the_device_is_no_fault_of_a_task() -> None:
    class Faulty(FakeDevice):
        def settle(self) -> None:
            raise RuntimeError("illegal memory access")

    ahead = Ahead(Faulty())
    ahead.start("a", num_steps=3)
    ahead.model.forward = None  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ahead.run()
    assert "end of a" not in ahead.told
    ahead.device.__class__ = FakeDevice
    ahead.session.close()
