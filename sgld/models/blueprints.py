"""Models made of their configuration alone, with weights that take no memory."""

from typing import Any

from accelerate import init_empty_weights
from torch import nn

from sgld.models.sources import ComponentSource


def model_class(library: str, name: str) -> Any:
    """A class of models of diffusers or transformers; None: they don't have it."""
    import diffusers
    import transformers

    bases = {"diffusers": diffusers.ModelMixin, "transformers": transformers.PreTrainedModel}
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    return found if isinstance(found, type) and issubclass(found, bases[library]) else None


def is_of_transformers(cls: type) -> bool:
    """Whether it is a class of models of transformers, and not of diffusers."""
    from transformers import PreTrainedModel

    return issubclass(cls, PreTrainedModel)


def configuration(cls: Any, source: ComponentSource) -> Any:
    """What the library makes of the config.json of a component."""
    place = str(source.folder) if source.folder is not None else source.path
    given = {"subfolder": source.subfolder if source.folder is None else None, "revision": source.revision}
    options = {name: value for name, value in given.items() if value is not None}
    if is_of_transformers(cls):
        return cls.config_class.from_pretrained(place, **options)
    return cls.load_config(place, **options)


def without_weights(cls: Any, source: ComponentSource) -> nn.Module:
    """A model whose weights are on the meta device; its buffers, which are computed, are real."""
    config = configuration(cls, source)
    with init_empty_weights():
        model: nn.Module = cls(config) if is_of_transformers(cls) else cls.from_config(config)
    return model
