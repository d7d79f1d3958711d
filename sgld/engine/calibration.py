"""`--calibrate`: synthetic requests at start, so that the first users are predicted, and merged, by what was measured.

They go the ordinary way, so that what is compiled or captured is what will run. Of each size ever more run in lock
step, until more rows gain nothing.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import anyio

from sgld.engine.cost import Cost
from sgld.engine.demand import Profiles, demand_of
from sgld.errors import SgldError
from sgld.events import AnyEvent, Completed, Failed
from sgld.messages import ModelInfo
from sgld.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class Code(NamedTuple):
    """Whether code is on its way that ranks will run, and how often that has changed."""

    is_pending: bool
    num_changes: int


NO_NEWS = Code(False, 0)
Generate = Callable[[SamplingParams], AsyncIterator[AnyEvent]]
# Those of the mixes with which servers are compared.
SQUARES = ("512x512", "768x768", "1024x1024", "1536x1536")
DEFAULT = "default"
_PROMPT = "a lighthouse on a cliff above the sea at dusk"
# White, 64x64; pipelines scale what they are given.
_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQAAAACCEkxzAAAAFElEQVR42mP8zwABTAyjjFEGyQwAzx8Bf7QK4E8A"
    "AAAASUVORK5CYII="
)
# With one row: two runs before a graph is captured, the capture, its comparison, and two replays. A merged forward is
# proved first.
NUM_STEPS = 8
# More rows are tried while twice as many take less than this share of twice the time.
PAYS = 0.97


def sizes_of(given: Sequence[str], model: ModelInfo) -> tuple[str, ...]:
    """What is measured where that isn't said: the size that the model's author recommends, and pictures' usual ones."""
    return tuple(given) or (DEFAULT, *(() if model.fps is not None else SQUARES))


def params_of(size: str, seed: int = 0, *, has_picture: bool = False) -> SamplingParams:
    """A synthetic request."""
    width, height = (None, None) if size == DEFAULT else map(int, size.split("x"))
    pictures = (_PICTURE,) if has_picture else ()
    return SamplingParams(
        prompt=_PROMPT, width=width, height=height, seed=seed, num_inference_steps=NUM_STEPS, image_path=pictures
    )


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Measures forwards.

    :param generate: runs a request; those that run at the same time share all forwards that they can.
    :param max_rows: as many requests run together at most.
    :param limit_s: no request begins after so many seconds.
    :param num_replicas: each gets as many, for requests are spread evenly: all are to be warm.
    :param code: what is known of code that forwards will run instead of what they run now.
    :param pause_s: between requests that wait for code.
    :param takes_pictures: where a request without a picture fails, those with one are tried.
    """

    generate: Generate
    profiles: Profiles
    cost: Cost
    max_rows: int
    limit_s: float
    num_replicas: int = 1
    code: Callable[[], Code] = lambda: NO_NEWS
    pause_s: float = 5.0
    takes_pictures: bool = False
    clock: Callable[[], float] = time.monotonic

    async def measure(self, sizes: Sequence[str]) -> list[str]:
        """Measure forwards of these sizes; returns those that were done."""
        done: list[str] = []
        until = self.clock() + self.limit_s
        for index, size in enumerate(sizes):
            try:
                done += [size] if await self._measure(size, until) else []
            except TimeoutError:
                logger.warning("calibration ends after %g s; not done: %s", self.limit_s, ", ".join(sizes[index:]))
                break
        return done

    async def _measure(self, size: str, until: float) -> bool:
        """Measure a size with ever more rows; whether that was possible.

        :raises TimeoutError: it isn't done in time.
        """
        num, before_s, has_picture = 1, None, False
        while True:
            if (problem := await self._run(size, num, until, has_picture=has_picture)) is not None:
                if num == 1 and self.takes_pictures and not has_picture:
                    has_picture = True
                    continue
                logger.warning("calibration of %s with %d at a time failed: %s", size, num, problem)
                # What no single request can be isn't done; for what memory has no room for that is the answer.
                return num > 1
            step = self.profiles.step_of(demand_of(params_of(size, has_picture=has_picture)))
            step_s = self.cost.estimate(step[0], num * step[1]) if step is not None else None
            logger.info("calibration: %s, %d at a time, %s a step", size, num, _ms(step_s))
            has_gained = step_s is not None and (before_s is None or step_s <= 2 * PAYS * before_s)
            if not has_gained or 2 * num > self.max_rows:
                return True
            num, before_s = 2 * num, step_s

    async def _run(self, size: str, num: int, until: float, *, has_picture: bool) -> str | None:
        """Run requests until other code neither is on its way nor came while they ran; why one of them failed.

        A rank takes code over between its calls, so waiting needs some; in pauses a compiler has the cores for itself.

        :raises TimeoutError: that isn't reached in time.
        """
        while self.clock() <= until:
            before = self.code()
            asked = [params_of(size, seed, has_picture=has_picture) for seed in range(num * self.num_replicas)]
            problem = await _run_together(asked, self.generate)
            now = self.code()
            if problem is not None or (now == before and not now.is_pending):
                return problem
            logger.info("calibration: %s, %d at a time, again, as code is being compiled", size, num)
            if now.is_pending:
                await anyio.sleep(self.pause_s)
        raise TimeoutError


async def _run_together(asked: Sequence[SamplingParams], generate: Generate) -> str | None:
    """Run requests at the same time; why one of them failed."""
    problems: list[str] = []

    async def one(params: SamplingParams) -> None:
        try:
            async for event in generate(params):
                if isinstance(event, Failed):
                    problems.append(event.message)
                elif isinstance(event, Completed):
                    return
        except SgldError as error:
            problems.append(str(error))

    async with anyio.create_task_group() as tasks:
        for params in asked:
            tasks.start_soon(one, params)
    return problems[0] if problems else None


def _ms(seconds: float | None) -> str:
    return "unknown time" if seconds is None else f"{1e3 * seconds:.1f} ms"
