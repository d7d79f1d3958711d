"""The noise scheduler of a model: another class or other values than its author chose, at start or for one request."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sgld.config import NoiseConfig
from sgld.errors import ModelError
from sgld.outcome import one_line

if TYPE_CHECKING:
    from sgld.models.plan import ComponentPlan

NAME = "scheduler"


class Unshiftable(ValueError):
    """A noise scheduler has no shift that could be chosen; the message says why."""


def choose(
    config: NoiseConfig, parts: "tuple[ComponentPlan, ...]", model_path: str
) -> "tuple[Any, tuple[ComponentPlan, ...]]":
    """The noise scheduler that is asked for, and the components with it; None: the model's own.

    Made of the model's own: what isn't chosen stays as its author has it.

    :raises ModelError: there is none, it isn't for such models, or has no such values.
    """
    if config.scheduler is None and not config.scheduler_config and config.flow_shift is None:
        return None, parts
    part = next((part for part in parts if part.name == NAME), None)
    if part is None:
        raise ModelError(f"{model_path} has no {NAME}, so none can be chosen")
    own = _own(part)
    cls = _class(config.scheduler, own) if config.scheduler else type(own)
    values = dict(config.scheduler_config)
    _check_values(values, cls)
    try:
        kept = {name: value for name, value in own.config.items() if name in _parameters(cls) or name[0] == "_"}
        made = cls.from_config(kept, **(_carried(own.config, cls) | values))
        if config.flow_shift is not None:
            made = shifted(made, config.flow_shift)
    except Unshiftable as error:
        raise ModelError(f"flow_shift can't be {config.flow_shift}: {error}") from None
    except (TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise ModelError(f"{cls.__name__} can't be made with {values}: {one_line(error)}") from None
    given = values if config.flow_shift is None else values | {"flow_shift": config.flow_shift}
    said = [f"{name}: {value}" for name, value in given.items()]
    if cls is not type(own):
        said.insert(0, f"{cls.__name__} in the place of {type(own).__name__}")
    chosen = replace(part, class_name=cls.__name__, notes=(*part.notes, *said))
    return made, tuple(chosen if part.name == NAME else part for part in parts)


def shifted(scheduler: Any, shift: float) -> Any:
    """A noise scheduler like this one with another shift of its schedule.

    :raises Unshiftable: it has none, or it follows from something else.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("use_dynamic_shifting"):
        raise Unshiftable(f"{name} shifts by the size of what is generated (use_dynamic_shifting)")
    key = next((key for key in ("flow_shift", "shift") if key in _parameters(type(scheduler))), None)
    if key is None or (key == "flow_shift" and not config.get("use_flow_sigmas")):
        raise Unshiftable(f"{name} has no shift here; that is for flow matching")
    return type(scheduler).from_config(config, **{key: shift})


def apply(config: NoiseConfig, pipeline: Any, model_path: str) -> tuple[dict[str, Any], str]:
    """Set what a pipeline itself keeps.

    :return: sampling params to recommend, and a note.
    :raises ModelError: the pipeline has nothing of this kind.
    """
    said: dict[str, float] = {}
    if config.boundary_ratio is not None:
        if getattr(pipeline, "transformer_2", None) is None or "boundary_ratio" not in pipeline.config:
            raise ModelError(f"boundary_ratio is for models with a second transformer; {model_path} has one only")
        pipeline.register_to_config(boundary_ratio=config.boundary_ratio)
        said["boundary_ratio"] = config.boundary_ratio
    recommended = {}
    if config.embedded_cfg_scale is not None:
        denoiser = getattr(pipeline, "transformer", None)
        if denoiser is None or not getattr(denoiser.config, "guidance_embeds", False):
            raise ModelError(
                f"embedded_cfg_scale is for guidance-distilled models; {model_path} isn't one: choose guidance_scale"
            )
        recommended["guidance_scale"] = said["embedded_cfg_scale"] = config.embedded_cfg_scale
    return recommended, "; ".join(f"{name}: {value}" for name, value in said.items())


def _own(part: "ComponentPlan") -> Any:
    import diffusers  # takes seconds

    source = part.source
    try:
        cls = getattr(diffusers, part.class_name)
        return cls.from_pretrained(source.path, subfolder=source.subfolder, revision=source.revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the noise scheduler of {source} can't be read: {one_line(error)}") from None


def _class(name: str, own: Any) -> type[Any]:
    """A class of diffusers for models of the same kind: those that match flows, or those that predict noise."""
    import diffusers

    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) and _suits(cls, own):
        return cls
    names = (other for other in dir(diffusers) if other.endswith("Scheduler") and not other.startswith("Flax"))
    found = [getattr(diffusers, other, None) for other in names]
    suitable = [
        other.__name__
        for other in found
        if isinstance(other, type) and issubclass(other, diffusers.SchedulerMixin) and _suits(other, own)
    ]
    kind = "flow matching" if _matches_flows(own) else "predicted noise"
    problem = f"isn't for models of {kind}" if cls is not None else "is no noise scheduler of diffusers"
    close = [s for s in suitable if name.lower() in s.lower()] or difflib.get_close_matches(name, suitable, n=1)
    hint = f"; did you mean {close[0]}?" if close and cls is None else f"; these are: {', '.join(sorted(suitable))}"
    raise ModelError(f"scheduler {name} {problem}{hint}")


def _suits(cls: type[Any], own: Any) -> bool:
    """Whether a class is for such models. What diffusers calls compatible isn't, where only some match flows."""
    accepted = _parameters(cls)
    is_compatible = cls in own.compatibles or type(own) in cls._get_compatibles()
    if _matches_flows(own):
        can_match = "shift" in accepted or "use_flow_sigmas" in accepted
        return can_match or (is_compatible and "prediction_type" not in accepted)
    return is_compatible or ("prediction_type" in accepted and "shift" not in accepted)


def _matches_flows(own: Any) -> bool:
    return "shift" in _parameters(type(own)) or bool(own.config.get("use_flow_sigmas"))


def _carried(config: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """What two families of classes for flow matching call by different names."""
    accepted = _parameters(cls)
    if "shift" in config and "use_flow_sigmas" in accepted and "flow_shift" in accepted and "shift" not in accepted:
        return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": config["shift"]}
    if config.get("use_flow_sigmas") and "flow_shift" in config and "shift" in accepted:
        return {"shift": config["flow_shift"]}
    return {}


def _check_values(values: Mapping[str, Any], cls: type[Any]) -> None:
    accepted = [name for name in _parameters(cls) if name != "self"]
    for name in values:
        if name not in accepted:
            close = difflib.get_close_matches(name, accepted, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(accepted)}"
            raise ModelError(f"scheduler_config.{name}: {cls.__name__} has no such value{hint}")


def _parameters(cls: type[Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters
