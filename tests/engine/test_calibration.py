from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import msgspec
import numpy as np
import pytest
from pipelines import build

from engine.calls import LinearCost, call, tracked
from engine.ranks import MODEL
from sgld.config import CalibrationConfig, EngineConfig
from sgld.engine.batching import all_together
from sgld.engine.calibration import DEFAULT, NO_NEWS, NUM_STEPS, SQUARES, Calibrator, Code, params_of, sizes_of
from sgld.engine.demand import Profiles, demand_of
from sgld.engine.engine import Engine
from sgld.events import AnyEvent, Completed, Failed
from sgld.fields import FieldError
from sgld.media.images import check_image
from sgld.sampling_params import SamplingParams
from sgld.testing import InlineReplica


class Server:
    """Completes requests; of one size they fail, or without a picture. Tells how many ran at once."""

    def __init__(self, cost: LinearCost, broken: str = "", *, needs_picture: bool = False) -> None:
        self.profiles = Profiles(cost)
        self.num: Counter[str] = Counter()
        self._broken = broken
        self._needs_picture = needs_picture

    async def generate(self, params: SamplingParams) -> AsyncIterator[AnyEvent]:
        size = f"{params.width}x{params.height}"
        self.num[size] += 1
        if size == self._broken or (self._needs_picture and not params.image_path):
            yield Failed(request_id="r", code="out_of_memory", message="memory is too small")
            return
        self.profiles.learn(demand_of(params), Counter({("denoise", "c", 1): NUM_STEPS}))
        frames = np.zeros((1, 1, 1, 3), np.uint8)
        yield Completed(request_id="r", frames=frames, is_video=False, seed=0, fps=None, elapsed_s=1.0)


async def done(server: Server, cost: LinearCost, *sizes: str, **options: Any) -> list[str]:
    about = {"profiles": server.profiles, "cost": cost, "max_rows": 8, "limit_s": 10.0, **options}
    return await Calibrator(generate=server.generate, **about).measure(sizes)


async def test_rows_are_doubled_as_long_as_that_pays() -> None:
    free, dear = LinearCost(fixed_s=1.0, row_s=0.1), LinearCost(fixed_s=0.0, row_s=1.0)
    for cost, num in ((free, 1 + 2 + 4 + 8), (dear, 1 + 2)):
        server = Server(cost)
        assert await done(server, cost, "64x64") == ["64x64"]
        assert server.num == {"64x64": num}


async def test_rows_pay_on_as_many_ranks_as_are_fastest() -> None:
    class OnRanks(LinearCost):
        """On several ranks all rows take as long as one."""

        def estimate(self, key: str, rows: int) -> float | None:
            return self.predict(key, 1)

    server = Server(cost := OnRanks(fixed_s=0.0, row_s=1.0))
    assert await done(server, cost, "64x64") == ["64x64"]
    assert server.num == {"64x64": 1 + 2 + 4 + 8}


async def test_each_replica_gets_as_many() -> None:
    cost = LinearCost(fixed_s=0.0, row_s=1.0)
    server = Server(cost)
    await done(server, cost, "64x64", num_replicas=3)
    assert server.num == {"64x64": 3 * (1 + 2)}


async def test_size_that_fails_is_left_out_and_not_tried_with_more_rows() -> None:
    cost = LinearCost()
    server = Server(cost, broken="64x64")
    assert await done(server, cost, "64x64", "32x32", max_rows=1) == ["32x32"]
    assert server.num == {"64x64": 1, "32x32": 1}


@pytest.mark.parametrize("takes_pictures", [True, False])
async def test_models_that_need_a_picture_get_one(takes_pictures: bool) -> None:
    cost = LinearCost(fixed_s=1.0, row_s=0.1)
    server = Server(cost, needs_picture=True)
    done_sizes = await done(server, cost, "64x64", max_rows=2, takes_pictures=takes_pictures)
    assert done_sizes == (["64x64"] if takes_pictures else [])
    # One without a picture, then one and two with it.
    assert server.num == {"64x64": 4 if takes_pictures else 1}
    [source] = params_of("64x64", has_picture=True).image_path
    assert check_image(BytesIO(b64decode(source.partition(",")[2]))) == (64, 64)


async def test_nothing_begins_after_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    cost, times = LinearCost(), iter([0.0, 1.0, 20.0])
    server = Server(cost)
    assert await done(server, cost, "64x64", "32x32", max_rows=1, clock=lambda: next(times)) == ["64x64"]
    assert "not done: 32x32" in caplog.text


@pytest.mark.parametrize(
    ("codes", "num"),
    [
        # Before and after each run.
        ([NO_NEWS, Code(True, 1), Code(True, 1), Code(False, 2), *[Code(False, 2)] * 2], 3),
        ([NO_NEWS, *[Code(False, 2)] * 3], 2),
        ([Code(False, 2)] * 2, 1),
    ],
    ids=["two runs", "within a run", "before"],
)
async def test_code_that_is_being_compiled_is_waited_for_and_measured(codes: list[Code], num: int) -> None:
    cost = LinearCost()
    server = Server(cost)
    assert await done(server, cost, "64x64", max_rows=1, pause_s=0.0, code=iter(codes).__next__) == ["64x64"]
    assert server.num == {"64x64": num}


async def test_size_is_not_done_where_code_comes_too_late(caplog: pytest.LogCaptureFixture) -> None:
    cost, times = LinearCost(), iter([0.0, 1.0, 2.0, 20.0, 21.0])
    server = Server(cost)
    options: dict[str, Any] = {
        "max_rows": 1,
        "clock": lambda: next(times),
        "code": lambda: Code(True, 1),
        "pause_s": 0.0,
    }
    assert await done(server, cost, "64x64", **options) == []
    assert server.num == {"64x64": 2}
    assert "not done: 64x64" in caplog.text


def test_pictures_have_more_sizes_than_videos() -> None:
    assert sizes_of((), MODEL) == (DEFAULT, *SQUARES)
    assert sizes_of((), msgspec.structs.replace(MODEL, fps=16.0)) == (DEFAULT,)
    assert sizes_of(("8x8",), MODEL) == ("8x8",)
    assert (params_of("64x32").width, params_of("64x32").height, params_of(DEFAULT).width) == (64, 32, None)


def test_requests_stay_together_and_encode_first() -> None:
    step = call("a", kind="denoise", merge_key="m")
    text = call("b", kind="encode", merge_key="t")
    requests = [tracked("a", 1.0, calls=(step,)), tracked("b", 1.0, calls=(text,))]
    assert [info for _, info in all_together(requests, 4)] == [text]
    requests[1] = tracked("b", 1.0, calls=(other := call("b", kind="denoise", merge_key="m"),))
    assert [info for _, info in all_together(requests, 4)] == [step, other]
    assert len(all_together(requests, 1)) == 1


@pytest.mark.parametrize("size", ["1024", "0x64", "64x", "axb"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(FieldError, match="WIDTHxHEIGHT"):
        CalibrationConfig(calibrate_sizes=(size,))


@pytest.mark.parametrize("is_known", [False, True])
async def test_model_is_served_once_it_is_measured_which_is_done_once(is_known: bool) -> None:
    flux, _ = build("flux")
    calibration = CalibrationConfig(calibrate=True, calibrate_sizes=("16x16",))
    config = EngineConfig(device="cpu", max_batch_size=2, calibration=calibration)
    async with Engine(config, rank_factory=InlineReplica(flux)) as engine:
        engine._memory._calibrated = ("16x16",) if is_known else ()
        assert engine.model is None
        await engine.ready()
        known = engine.statistics()
        assert engine.model is not None
        assert (known.num_completed, known.num_failed) == ((0, 0) if is_known else (3, 0))
        assert known.etas == ()
        # The second and third ran in lock step.
        (steps,) = [of for of in known.calls if of.kind == "denoise"] or [None]
        assert is_known == (steps is None)
        assert steps is None or (steps.num_ticks, steps.largest_batch) == (2 * NUM_STEPS, 2)
