"""What the engine learned, kept while it is open and between starts; and what it measures at start for that."""

from collections.abc import Callable

import anyio
from anyio import to_thread

from sgld.config import EngineConfig
from sgld.engine.calibration import Calibrator, Code, Generate, sizes_of
from sgld.engine.cost import CostModel
from sgld.engine.demand import Profiles
from sgld.engine.learned import LearnedFile
from sgld.messages import ModelInfo

# How often what was learned is kept while the engine is open.
KEEP_S = 60.0


class Memory:
    """Reads and writes the file of a model, once it is known which that is."""

    def __init__(self, config: EngineConfig, cost: CostModel, profiles: Profiles) -> None:
        self._config = config
        self._cost = cost
        self._profiles = profiles
        self._file: LearnedFile | None = None
        self._kept_versions = self._versions
        self._calibrated: tuple[str, ...] = ()

    async def recall(self, model: ModelInfo) -> None:
        """Begin with what earlier starts learned of the model; a rank that is started again changes nothing."""
        if self._file is not None or model.identity is None:
            return
        self._file = LearnedFile(model, self._config)
        learned = await to_thread.run_sync(self._file.read)
        self._cost.recall(learned.times)
        self._profiles.recall(learned.profiles)
        self._calibrated = learned.calibrated
        self._kept_versions = self._versions

    async def keep_forever(self) -> None:
        """Write down what is learned, now and then."""
        while True:
            await anyio.sleep(KEEP_S)
            await self.keep()

    async def keep(self) -> None:
        """Write down what was learned, if it is news."""
        if self._file is None or self._kept_versions == self._versions:
            return
        self._kept_versions = self._versions
        await to_thread.run_sync(self._file.write, self._cost.learned(), self._profiles.learned(), self._calibrated)

    @property
    def _versions(self) -> tuple[int, int]:
        """They go up with what is news: other times, and requests of another kind."""
        return self._cost.version, self._profiles.version

    async def calibrate(
        self, model: ModelInfo, generate: Generate, num_replicas: int, code: Callable[[], Code]
    ) -> None:
        """Measure what wasn't measured at an earlier start.

        :param generate: runs a request.
        :param code: what is known of code that forwards will run instead of what they run now.
        """
        given = self._config.calibration
        calibrator = Calibrator(
            generate=generate,
            profiles=self._profiles,
            cost=self._cost,
            max_rows=min(self._config.max_batch_size, self._config.max_running_requests),
            limit_s=given.calibrate_limit_s,
            num_replicas=num_replicas,
            code=code,
            takes_pictures="image" in model.inputs,
        )
        wanted = sizes_of(given.calibrate_sizes, model)
        done = await calibrator.measure([size for size in wanted if size not in self._calibrated])
        self._calibrated = (*self._calibrated, *done)
        await self.keep()
