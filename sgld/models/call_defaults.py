"""What a request gets that leaves size, frames, steps or guidance open, found without loading a model.

The signature of the pipeline says most of it. What it computes of its models' configurations, such as the size, the
pipeline itself is asked for: it begins with stand-ins that have only the configurations, and ends at the first that it
calls.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sgld.models.plan import ComponentPlan, Plan
from sgld.models.resolve import DEFAULTS_FILE, defaults, is_modular
from sgld.models.sources import ComponentClass, config_of
from sgld.sampling_params import SamplingParams

# A client's word for what pipelines call otherwise.
_WORDS = {"frame_rate": "fps"}
_COUNTS = ("width", "height", "num_frames", "num_inference_steps")
_NAMES = frozenset(SamplingParams.__struct_fields__) - {"prompt", "seed"}


@dataclass(frozen=True)
class Default:
    """The value of a parameter, and who says so."""

    value: Any
    origin: str


def call_defaults(planned: Plan) -> dict[str, Default]:
    """What a request gets that chooses nothing, by the name of the sampling param.

    :raises ModelError: what the model's author recommends can't be read.
    """
    name = planned.pipeline_class
    if is_modular(planned.index):
        found = _told(_of_blocks(planned), f"blocks of {name}")
    elif (cls := _class(planned.index)) is not None:
        signature = {name: p.default for name, p in inspect.signature(cls.__call__).parameters.items()}
        computed = _computed(cls, planned)
        found = _told(signature, f"signature of {name}")
        found |= _told({n: computed.get(n) for n, value in signature.items() if value is None}, f"computed by {name}")
    else:
        found = {}
    recommended = {name: Default(value, DEFAULTS_FILE) for name, value in defaults(planned.source).items()}
    guidance = planned.config.noise.embedded_cfg_scale
    chosen = {"guidance_scale": Default(guidance, "embedded_cfg_scale")} if guidance is not None else {}
    return found | recommended | chosen


def counts(planned: Plan) -> dict[str, int]:
    """How large a result is where nothing is chosen, and how many steps it takes, as far as that is known."""
    found = call_defaults(planned)
    values = {name: found[name].value for name in _COUNTS if name in found}
    return {name: int(value) for name, value in values.items() if value >= 1}


def _class(index: Mapping[str, Any]) -> type[Any] | None:
    """The class of the pipeline; None: it isn't of diffusers, and isn't run."""
    import diffusers  # takes seconds

    named = index["_class_name"]
    cls = getattr(diffusers, named, None) if isinstance(named, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline) else None


def _of_blocks(planned: Plan) -> dict[str, Any]:
    """What the blocks of a modular pipeline take where nothing is given; of one with code of its own nothing."""
    from diffusers import ModularPipeline

    with _quiet():
        try:
            pipeline = ModularPipeline.from_pretrained(planned.source.pretrained_name, revision=planned.source.revision)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):
            return {}
    return {name: value for name, value in pipeline.default_call_parameters.items() if name is not None}


def _told(values: Mapping[str, Any], origin: str) -> dict[str, Default]:
    """Those that a client could choose, and that are numbers."""
    named = {_WORDS.get(name, name): value for name, value in values.items()}
    return {
        name: Default(value, origin)
        for name, value in named.items()
        if name in _NAMES and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _Stopped(BaseException):
    """The pipeline wants a model to compute; BaseException, because pipelines catch Exception."""


class _StandIn:
    """A model's configuration in the place of the model."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict(config)

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__" or name not in vars(self).get("config", {}):
            raise AttributeError(name)
        return self.config[name]

    def __call__(self, *_args: object, **_kwargs: object) -> None:
        raise _Stopped


def _computed(cls: type[Any], planned: Plan) -> dict[str, Any]:
    """What the pipeline has computed when it stops: the variables of its `__call__`."""
    call = inspect.unwrap(cls.__call__)
    accepted = inspect.signature(cls.__init__).parameters
    plain = {name: value for name, value in planned.index.items() if name[0] != "_" and not isinstance(value, list)}
    with _quiet():
        try:
            parts = {part.name: _StandIn(_config(part)) for part in planned.components}
            left_out = {name: None for name, value in planned.index.items() if isinstance(value, list)}
            given = left_out | plain | parts
            pipeline = cls(**{name: value for name, value in given.items() if name in accepted})
            call(pipeline, **({"prompt": ""} if "prompt" in inspect.signature(call).parameters else {}))
        except (Exception, _Stopped) as error:  # noqa: BLE001 - whatever stops it, its frames have what it computed
            return _variables(error.__traceback__, call)
    return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """What pipelines say of the stand-ins concerns nobody."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _variables(traceback: TracebackType | None, function: Any) -> dict[str, Any]:
    while traceback is not None:
        if traceback.tb_frame.f_code is function.__code__:
            return dict(traceback.tb_frame.f_locals)
        traceback = traceback.tb_next
    return {}


def _config(part: ComponentPlan) -> dict[str, Any]:
    """The configuration of a component as its files on this machine say it, completed by its class."""
    import diffusers

    cls = getattr(diffusers, part.class_name, None) if part.library == "diffusers" else None
    parameters = inspect.signature(cls).parameters.items() if isinstance(cls, type) else ()
    own = {name: p.default for name, p in parameters if p.default is not p.empty}
    return own | (config_of(part.source, ComponentClass(part.library, part.class_name)) or {})
