"""What clients may ask of the scheduler, through the engine and a rank of this process."""

from pathlib import Path
from typing import Any

import pytest
from pipelines import build

from engine.streams import completed, difference, ends_of, events_of, params_of, plain
from sgld.config import EngineConfig
from sgld.engine.engine import Engine
from sgld.errors import DeadlineImpossible
from sgld.events import Completed, Queued
from sgld.models.resolve import model_index, resolve
from sgld.models.verdicts import VerdictFile
from sgld.testing import InlineReplica

CONFIG = EngineConfig(device="cpu")
Pipeline = tuple[Any, dict[str, Any]]


@pytest.fixture(scope="module")
def pixart() -> Pipeline:
    return build("pixart")


def replica(pipeline: Any, *, is_kept: bool) -> InlineReplica:
    """A rank in this process; what is learned of the pipeline may be kept under the name of another model."""
    made = InlineReplica(pipeline)
    if is_kept:
        source = resolve("sgld/tiny-image")
        made.verdict_file = VerdictFile(source, model_index(source))
    return made


async def test_exact_requests_are_right_to_the_last_bit_in_company(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    rows: list[int] = []
    handle = pipeline.transformer.register_forward_hook(lambda _module, _args, output: rows.append(len(output[0])))
    requests = [params_of(kwargs, seed=seed, num_inference_steps=6, exact=seed == 2) for seed in range(4)]
    expected = plain(pipeline, requests[2])
    single = max(rows)
    rows.clear()
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        ends = await ends_of(engine, *requests)
    handle.remove()
    assert isinstance(ends[2], Completed)
    assert difference(ends[2].frames, expected) == 0
    # The others share theirs.
    assert max(rows) > single


async def test_deadline_that_no_such_request_meets_is_refused(pixart: Pipeline) -> None:
    pipeline, kwargs = pixart
    async with Engine(CONFIG, rank_factory=InlineReplica(pipeline)) as engine:
        await completed(engine, params_of(kwargs, deadline_s=1e-6))
        with pytest.raises(DeadlineImpossible, match="deadline_s is 1e-06, but such a request takes"):
            await events_of(engine, params_of(kwargs, deadline_s=1e-6, seed=5))
        await completed(engine, params_of(kwargs, deadline_s=60.0))
        # Who was accepted by an earlier engine isn't refused.
        late = [event async for event in engine.generate(params_of(kwargs, deadline_s=1e-6), waited_s=3600.0)]
        assert isinstance(late[-1], Completed)


async def test_next_start_knows_how_long_requests_take(pixart: Pipeline, tmp_path: Path) -> None:
    pipeline, kwargs = pixart
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_DIFFUSION_CACHE_ROOT", str(tmp_path))
        etas = []
        for is_kept in (True, True, False):
            async with Engine(CONFIG, rank_factory=replica(pipeline, is_kept=is_kept)) as engine:
                await engine.ready()
                events = await events_of(engine, params_of(kwargs))
            assert isinstance(events[0], Queued)
            etas.append(events[0].eta_s)
    assert etas[0] is None
    assert etas[1] is not None
    assert etas[2] is None
