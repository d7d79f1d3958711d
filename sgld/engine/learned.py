"""What the engine learned of times and requests, kept between starts.

A small file for each device, model, and choice of options that forwards depend on. The times in it say how they ran,
too: compiled or not, as a graph or not.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import msgspec

from sgld.config import EngineConfig, cache_root
from sgld.engine.cost import MAX_KEYS, LearnedTime
from sgld.engine.demand import MAX_PROFILES, Profile
from sgld.messages import ModelInfo
from sgld.models.shared_file import change

logger = logging.getLogger(__name__)
T = TypeVar("T")
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
            (model.identity, model.device_name, sorted(model.precisions.items()), *_options(config, model.device))
        )
        self._known = Learned()
        """When it was read or written last."""
        self._path = cache_root() / "learned" / f"times-{hashlib.sha256(named).hexdigest()[:24]}.json"

    def read(self) -> Learned:
        """What is kept; nothing if there is no file, or one that another version wrote."""
        try:
            self._known = _decoded(self._path.read_bytes())
        except OSError:
            self._known = Learned()
        return self._known

    def write(self, times: list[LearnedTime], profiles: list[Profile], calibrated: Iterable[str] = ()) -> None:
        """Keep what is news, beside what other processes wrote meanwhile.

        A folder that can't be written to is no error: the next start learns again.
        """
        learned = Learned(
            device=self._model.device_name,
            model=self._model.model_path,
            times=tuple(times),
            profiles=tuple(profiles),
            calibrated=tuple(calibrated),
        )
        before = self._known
        try:
            change(self._path, lambda content: msgspec.json.encode(_merged(_decoded(content), learned, before)))
        except OSError as error:
            logger.warning("what was learned of times can't be kept: %s", error)
        else:
            self._known = learned


def _decoded(content: bytes) -> Learned:
    """Nothing, where another version wrote it."""
    try:
        learned = msgspec.json.decode(content, type=Learned)
    except msgspec.DecodeError:
        return Learned()
    return learned if learned.format == _FORMAT and _is_sound(learned) else Learned()


def _merged(there: Learned, learned: Learned, before: Learned) -> Learned:
    """What is there, but for what is news since `before`; as much of it as is known at the next start."""
    if there == Learned():
        return learned
    times = _rows(there.times, learned.times, before.times, lambda time: time[:3])
    keys = set(list(dict.fromkeys(key for key, *_ in reversed(times)))[:MAX_KEYS])
    profiles = _rows(there.profiles, learned.profiles, before.profiles, lambda profile: profile.like)
    return msgspec.structs.replace(
        learned,
        times=tuple(time for time in times if time[0] in keys),
        profiles=tuple(profiles[-MAX_PROFILES:]),
        calibrated=tuple(dict.fromkeys((*there.calibrated, *learned.calibrated))),
    )


def _rows(there: Iterable[T], now: Iterable[T], before: Iterable[T], name_of: Callable[[T], Hashable]) -> list[T]:
    """Those of others first: what was used last here is at the end, and is forgotten last."""
    theirs, known = {name_of(one): one for one in there}, set(before)
    ours = [(one, theirs.pop(name_of(one), one)) for one in now]
    return [*theirs.values(), *(other if one in known else one for one, other in ours)]


def _options(config: EngineConfig, device: str) -> tuple[object, ...]:
    """Those that decide how long forwards take; copies of the model share the cores of a CPU."""
    parallel = config.parallel
    # What is left open follows from the rest, so these say more than the options do.
    degrees = (parallel.ulysses, parallel.ring, parallel.cfg_degree, parallel.tp_size)
    return (
        config.enable_torch_compile,
        config.graphs,
        config.vae_tiling,
        config.vae_slicing,
        config.num_cpu_threads,
        config.backend,
        degrees,
        parallel.elastic_sp,
        parallel.vae_sp,
        parallel.dp_size if device == "cpu" else 1,
        config.memory,
        config.attention,
        config.quantized,
    )


def _is_sound(learned: Learned) -> bool:
    """Whether the numbers are such as are written: a file may have been edited, or half of it be from elsewhere."""
    has_times = all(rows > 0 and 0 < elapsed_s < math.inf for _, rows, _, elapsed_s in learned.times)
    has_calls = all(number > 0 for profile in learned.profiles for _, number in profile.calls)
    return has_times and has_calls and all(p.work is None or 0 < p.work < math.inf for p in learned.profiles)
