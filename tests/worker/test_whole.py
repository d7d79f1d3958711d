"""Pipelines that run their models themselves, one request at a time."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from pipelines import build

from sgld.errors import Cancelled
from sgld.messages import Pending, Ran, Stepped
from sgld.outcome import Outcome, Raised, Value
from sgld.worker.ahead import News
from sgld.worker.executor import Executor
from sgld.worker.job import Job
from sgld.worker.rank import translated
from sgld.worker.session import Session
from sgld.worker.task import Task
from worker.requests import Doubling, Doublings, picture, request


class Runner:
    """A session in which pipelines run whole, and what it says."""

    def __init__(self) -> None:
        self.replies: list[News] = []
        self.ends: dict[str, Outcome] = {}
        self.num_calls = 0
        self.session = Session(Executor(), self.replies.extend, self._ended)

    def _ended(self, task: Task, outcome: Outcome) -> None:
        self.ends[task.request_id] = outcome
        self.num_calls = task.num_calls

    def start(self, request_id: str, pipeline: Any, kwargs: dict[str, Any]) -> None:
        self.session.start(Job(request_id, pipeline, kwargs, is_whole=True))

    def waiting(self, request_id: str) -> Pending:
        return [r for r in self.replies if isinstance(r, Pending) and r.call.request_id == request_id][-1]

    def run(self, request_id: str) -> Any:
        """Run a request to its end."""
        while request_id not in self.ends:
            self.session.run([self.waiting(request_id).call.id])
        outcome = self.ends[request_id]
        assert isinstance(outcome, Value), outcome
        return outcome.value


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.session.close()


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan", "modular_qwen_image", "stable_cascade"])
def test_whole_pipeline_returns_what_diffusers_does(name: str, runner: Runner) -> None:
    pipeline, kwargs = build(name)
    expected = picture(pipeline(**request(name, 0, kwargs)))
    runner.start("a", pipeline, request(name, 0, kwargs))
    torch.testing.assert_close(picture(runner.run("a")), expected, rtol=0, atol=0)
    steps = [(reply.step, reply.num_steps) for reply in runner.replies if isinstance(reply, Stepped)]
    assert (3, 3) in steps


def test_each_step_is_a_call_of_its_own(runner: Runner) -> None:
    pipeline, kwargs = build("flux")
    runner.start("a", pipeline, request("flux", 0, kwargs))
    runner.run("a")
    calls = [reply.call for reply in runner.replies if isinstance(reply, Pending)]
    assert [(call.kind, call.step_index) for call in calls] == [
        ("encode", 0),
        ("denoise", 0),
        ("denoise", 1),
        ("denoise", 2),
        ("decode", 3),
    ]
    assert all(call.is_exclusive and call.merge_key is None for call in calls)
    assert len({call.cost_key for call in calls}) == 3
    ran = [reply for reply in runner.replies if isinstance(reply, Ran)]
    assert [reply.cost_key for reply in ran] == [call.cost_key for call in calls]
    assert all(reply.is_timed and reply.elapsed_s > 0 for reply in ran)


def test_standing_order_covers_the_steps(runner: Runner) -> None:
    pipeline, kwargs = build("flux")
    runner.start("a", pipeline, request("flux", 0, kwargs))
    kinds = []
    while "a" not in runner.ends:
        kinds.append(runner.waiting("a").call.kind)
        runner.session.run([runner.waiting("a").call.id], num_ticks=100)
    assert kinds == ["encode", "denoise", "decode"]


def test_others_begin_when_it_has_ended(runner: Runner) -> None:
    pipeline, kwargs = build("flux")
    expected = picture(pipeline(**request("flux", 1, kwargs)))
    runner.start("a", pipeline, request("flux", 0, kwargs))
    runner.start("b", pipeline, request("flux", 1, kwargs))
    assert not [r for r in runner.replies if isinstance(r, Pending) and r.call.request_id == "b"]
    runner.run("a")
    torch.testing.assert_close(picture(runner.run("b")), expected, rtol=0, atol=0)


def test_cancelled_at_its_next_step_it_leaves_no_trace(runner: Runner) -> None:
    pipeline, kwargs = build("sd_pag")
    before = dict(pipeline.unet.attn_processors)
    runner.start("a", pipeline, request("sd_pag", 0, kwargs))
    while runner.waiting("a").call.step_index < 1:
        runner.session.run([runner.waiting("a").call.id])
    assert pipeline.unet.attn_processors != before
    runner.session.cancel("a")
    end = runner.ends["a"]
    assert isinstance(end, Raised)
    assert isinstance(end.error, Cancelled)
    assert pipeline.unet.attn_processors == before


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of that pipeline
def test_pipeline_that_needs_gradients_is_served(runner: Runner) -> None:
    made, kwargs = build("sd")
    parts = {name: part for name, part in made.components.items() if name != "image_encoder"}
    pipeline = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)

    def arguments() -> dict[str, Any]:
        own = {"token_indices": [1, 2], "max_iter_to_alter": 2, "attn_res": (8, 8), "thresholds": {}}
        return request("sd", 0, kwargs, **own)

    before = dict(pipeline.unet.attn_processors)
    runner.start("a", pipeline, arguments())
    result = picture(runner.run("a"))
    assert pipeline.unet.attn_processors == before
    expected = picture(pipeline(**arguments()))
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_error_of_a_whole_pipeline_ends_its_task_only(runner: Runner) -> None:
    pipeline, kwargs = build("flux")
    runner.start("a", pipeline, request("flux", 0, kwargs, callback_on_step_end_tensor_inputs=["nothing"]))
    runner.session.run([runner.waiting("a").call.id])
    end = runner.ends["a"]
    assert isinstance(end, Raised)
    assert translated(end.error, has_made_calls=runner.num_calls > 0).code == "invalid_request"
    runner.start("b", pipeline, request("flux", 0, kwargs))
    assert picture(runner.run("b")) is not None


def test_each_forward_is_a_sign_of_life(runner: Runner) -> None:
    """Some pipelines tell no steps."""
    pulses: list[float] = []
    runner.session.executor.pulse = lambda: pulses.append(0.0)
    pipeline = Doublings(Doubling())
    runner.start("a", pipeline, {"x": torch.ones(1, 4)})
    runner.run("a")
    assert pulses
    assert not pipeline.transformer._forward_pre_hooks


def test_what_was_learned_of_the_models_stays(runner: Runner) -> None:
    pipeline, kwargs = build("flux")
    runner.session.executor.verdicts.modes["transformer"] = "exclusive"
    runner.start("a", pipeline, request("flux", 0, kwargs))
    runner.run("a")
    assert runner.session.executor.verdicts.modes == {"transformer": "exclusive"}
