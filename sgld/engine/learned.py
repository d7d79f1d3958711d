"""What the engine learned of times and requests, kept between starts.

A small file for each device, model, and choice of options that forwards depend on. The times in it say how they ran,
too: compiled or not, as a graph or not.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterable

import msgspec

from sgld.config import EngineConfig, cache_root
from sgld.engine.cost import LearnedTime
from sgld.engine.demand import Profile
from sgld.messages import ModelInfo

logger = logging.getLogger(__name__)
# Files of another format are left alone.
_FORMAT = 2


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file. Device and model are for who reads it, its name says the same."""

    format: int = _FORMAT
    device: str = ""
    model: str = ""
    times: tuple[LearnedTime, ...] = ()
    profiles: tuple[Profile, ...] = ()
    calibrated: tuple[str, ...] = ()
    """Sizes that were measured at a start with `--calibrate`."""


class LearnedFile:
    """The file of a model on a device, which is named after its configurations, its precisions, device and options."""

    def __init__(self, model: ModelInfo, config: EngineConfig) -> None:
        self._model = model
        named = msgspec.json.encode(
            (model.identity, model.device_name, sorted(model.precisions.items()), *_options(config))
        )
        self._path = cache_root() / "learned" / f"times-{hashlib.sha256(named).hexdigest()[:24]}.json"

    def read(self) -> Learned:
        """What is kept; nothing if there is no file, or one that another version wrote."""
        try:
            learned = msgspec.json.decode(self._path.read_bytes(), type=Learned)
        except (OSError, msgspec.DecodeError):
            return Learned()
        return learned if learned.format == _FORMAT and _is_sound(learned) else Learned()

    def write(self, times: list[LearnedTime], profiles: list[Profile], calibrated: Iterable[str] = ()) -> None:
        """Keep it, atomically. A folder that can't be written to is no error: the next start learns again."""
        learned = Learned(
            device=self._model.device_name,
            model=self._model.model_path,
            times=tuple(times),
            profiles=tuple(profiles),
            calibrated=tuple(calibrated),
        )
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.encode(learned))
            temporary.replace(self._path)
        except OSError as error:
            logger.warning("what was learned of times can't be kept: %s", error)


def _options(config: EngineConfig) -> tuple[object, ...]:
    """Those that decide how long forwards take."""
    return (
        config.enable_torch_compile,
        config.graphs,
        config.vae_tiling,
        config.vae_slicing,
        config.num_cpu_threads,
        config.backend,
        msgspec.structs.replace(config.parallel, num_gpus=None, dp_size=1),
        config.memory,
        config.attention,
        config.quantized,
    )


def _is_sound(learned: Learned) -> bool:
    """Whether the numbers are such as are written: a file may have been edited, or half of it be from elsewhere."""
    has_times = all(rows > 0 and 0 < elapsed_s < math.inf for _, rows, _, elapsed_s in learned.times)
    has_calls = all(number > 0 for profile in learned.profiles for _, number in profile.calls)
    return has_times and has_calls and all(p.work is None or 0 < p.work < math.inf for p in learned.profiles)
