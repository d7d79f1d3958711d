"""What tests of the engine do with requests: params of tiny pipelines, their right results, and streams of events."""

from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any

import anyio
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from sgld.engine.engine import Engine
from sgld.events import AnyEvent, Completed, Progress, Restarted, Terminal
from sgld.sampling_params import SamplingParams

TIMEOUT_S = 120
PROMPT = "a red cat on the hill"


def params_of(kwargs: Mapping[str, Any], **choices: Any) -> SamplingParams:
    """Sampling params that give a pipeline these keyword arguments."""
    fields = SamplingParams.__struct_fields__
    chosen: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3}
    chosen |= {n: v for n, v in kwargs.items() if n in fields} | choices
    return SamplingParams(diffusers_kwargs={n: v for n, v in kwargs.items() if n not in fields}, **chosen)


def plain(pipeline: Any, params: SamplingParams) -> NDArray[np.uint8]:
    """What the pipeline itself makes of these params, (F, H, W, 3)."""
    ours = {"seed", "diffusers_kwargs", "num_outputs_per_prompt", "num_previews", "generator_device", "fps"}
    ours |= {"priority", "deadline_s", "exact", "cache", "bit_depth"}
    fields, default = msgspec.structs.asdict(params), SamplingParams()
    kwargs = {name: value for name, value in fields.items() if name not in ours and value != getattr(default, name)}
    generator = torch.Generator("cpu").manual_seed(params.seed)
    result = pipeline(**kwargs, **params.diffusers_kwargs, generator=generator, output_type="np")
    pictures = result.images if hasattr(result, "images") else result.frames[0]
    return (np.asarray(pictures) * 255).round().clip(0, 255).astype(np.uint8)


async def events_of(engine: Engine, params: SamplingParams) -> list[AnyEvent]:
    """All events of a request."""
    with anyio.fail_after(TIMEOUT_S):
        return [event async for event in engine.generate(params)]


async def events_with_fault(engine: Engine, params: SamplingParams, fault: Callable[[], None]) -> list[AnyEvent]:
    """The events of a request, after whose first step something happens to its rank.

    From then on a rank that is silent for a second hangs; the one that takes its place has the time that it needs.
    """
    events: list[AnyEvent] = []
    replica = engine._replicas[0]
    patience_s = replica._run_timeout_s
    with anyio.fail_after(TIMEOUT_S):
        async for event in engine.generate(params):
            if isinstance(event, Progress) and not any(isinstance(e, Progress) for e in events):
                assert replica.rank is not None
                fault()
                replica._run_timeout_s = 1.0
                replica.rank.expect_reply(1.0)
            elif isinstance(event, Restarted):
                replica._run_timeout_s = patience_s
            events.append(event)
    return events


async def completed(engine: Engine, params: SamplingParams) -> Completed:
    """The end of a request that ends well."""
    event = (await events_of(engine, params))[-1]
    assert isinstance(event, Completed), event
    return event


async def ends_of(engine: Engine, *requests: SamplingParams) -> list[Terminal]:
    """How requests that run at the same time end, in their order."""
    ends: dict[int, Terminal] = {}

    async def run(index: int, params: SamplingParams) -> None:
        event = (await events_of(engine, params))[-1]
        assert isinstance(event, Terminal)
        ends[index] = event

    async with anyio.create_task_group() as tasks:
        for index, params in enumerate(requests):
            tasks.start_soon(run, index, params)
    return [ends[index] for index in range(len(requests))]


async def leave_at(engine: Engine, params: SamplingParams, num_events: int) -> list[AnyEvent]:
    """The first events of a request, which is left after them."""
    events: list[AnyEvent] = []
    with anyio.fail_after(TIMEOUT_S):
        async with aclosing(engine.generate(params)) as stream:
            async for event in stream:
                events.append(event)
                if len(events) == num_events:
                    break
    return events


def names(events: list[AnyEvent]) -> list[str]:
    return [type(event).__name__ for event in events]


def difference(pixels: NDArray[np.uint8], expected: NDArray[np.uint8]) -> int:
    """The largest difference of two pictures of one shape."""
    assert pixels.shape == expected.shape
    return int(np.abs(pixels.astype(int) - expected.astype(int)).max())


def is_idle(engine: Engine) -> bool:
    """Whether no request is on its way."""
    now = engine.statistics()
    return not now.num_queued + now.num_running


async def until(condition: Callable[[], object]) -> None:
    """Wait for a fact of the operating system that has no event."""
    with anyio.fail_after(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - there is none to wait for
            await anyio.sleep(0.01)
