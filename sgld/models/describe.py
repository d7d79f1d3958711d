"""What a model consists of, read from its files without loading it."""

from dataclasses import dataclass

from sgld.config import EngineConfig
from sgld.models.call_defaults import Default, call_defaults
from sgld.models.plan import ComponentPlan, plan
from sgld.models.verdicts import VerdictFile
from sgld.models.weights import main_dtype


@dataclass(frozen=True)
class Component:
    """One entry of model_index.json; `size_bytes` is that of its files, `dtype` that of most of its weights."""

    name: str
    library: str
    class_name: str
    size_bytes: int
    dtype: str | None


@dataclass(frozen=True)
class Description:
    """A model: its pipeline, its components, what was decided of them, and what was proved of them so far."""

    pipeline_class: str
    components: tuple[Component, ...]
    defaults: dict[str, Default]
    """What a request gets that leaves it open."""
    modes: dict[str, str]
    """Component name to merge, interleave or exclusive."""
    decisions: dict[str, str]
    """Component name, or `model`, to how it is loaded."""


def describe(config: EngineConfig) -> Description:
    """Describe a model as it would be loaded; of one on the hub only what is in its model_index.json.

    :raises ModelError: it can't be found or read.
    """
    planned = plan(config, materializes=False)
    source = planned.source
    return Description(
        pipeline_class=planned.pipeline_class,
        components=tuple(map(_component, planned.components)),
        defaults=call_defaults(planned),
        modes=VerdictFile(source, planned.index, planned.components).read().modes,
        decisions=planned.decisions(),
    )


def _component(part: ComponentPlan) -> Component:
    folder = part.source.folder
    files = [path for path in folder.rglob("*") if path.is_file()] if folder else []
    if part.weights is not None:
        files = list(part.weights.files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    size_bytes = sum(path.stat().st_size for path in files)
    return Component(part.name, part.library, part.class_name, size_bytes, main_dtype(weights))
