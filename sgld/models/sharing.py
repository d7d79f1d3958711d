"""Which components the ranks of a replica share, and whether they can: decided before anything is loaded."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models.roles import role
from sgld.models.sources import ComponentSource
from sgld.parallel import ParallelConfig


class _Part(Protocol):
    """What is asked of the plan of a component."""

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str: ...
    @property
    def class_name(self) -> str: ...
    @property
    def source(self) -> ComponentSource: ...


@dataclass(frozen=True)
class Sharing:
    """Components that all ranks have, by what is shared of their calls; rank 0 has all others alone."""

    denoisers: tuple[str, ...] = ()
    vaes: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """One phrase each, for people."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.denoisers, *self.vaes))


NOTHING = Sharing()
"""What a rank shares that is alone."""


def share(parts: Iterable[_Part], config: EngineConfig, device_type: str, *, is_whole: bool) -> Sharing:
    """Decide what is shared.

    :param is_whole: pipelines run their models themselves.
    :raises ModelError: a model can't be shared like this, or there are too few GPUs.
    """
    parallel = config.parallel
    if device_type == "cuda":
        _check_gpus(parallel)
    if parallel.num_ranks == 1:
        return Sharing()
    if is_whole:
        problem = "with --backend diffusers pipelines run their models themselves, on one GPU"
        raise ModelError(f"num_gpus is {parallel.total}, but {problem}; use --dp-size {parallel.total}")
    roles = {part.name: (role(part.name, part.library, part.class_name), part) for part in parts}
    denoisers = [part for does, part in roles.values() if does == "dit" and part.library == "diffusers"]
    vaes = [name for name, (does, part) in roles.items() if does == "vae" and part.library == "diffusers"]
    if parallel.sp > 1:
        for part in denoisers:
            check_sequence(part, parallel)
    notes = [
        f"{parallel.layout} (of each copy {parallel.num_ranks} ranks)" if parallel.dp_size > 1 else parallel.layout
    ]
    if parallel.vae_sp is False:
        vaes = []
    return Sharing(tuple(part.name for part in denoisers), tuple(vaes), tuple(notes))


def _check_gpus(parallel: ParallelConfig) -> None:
    import torch

    num = torch.cuda.device_count()
    # Each copy sees its own GPUs only.
    if parallel.num_ranks > num:
        raise ModelError(f"num_gpus is {parallel.total}, but torch finds {num} GPUs here; {parallel.layout}")


def check_sequence(part: _Part, parallel: ParallelConfig) -> None:
    """See that a denoiser's tokens can be shared by so many ranks.

    :raises ModelError: they can't; says why, and what can be done instead.
    """
    from sgld.models.sequence import plan_of

    instead = f"sp_degree is {parallel.sp}; use --enable-cfg-parallel or --dp-size {parallel.total} instead"
    cls = _class(part.class_name)
    if cls is None or plan_of(cls) is None:
        problem = "has no plan of how to split its tokens (its attention isn't diffusers' own dispatcher's)"
        raise ModelError(f"{part.name} ({part.class_name}) {problem}: {instead}")
    config = _config(part.source)
    heads = next((config[name] for name in ("num_attention_heads", "n_heads", "num_heads") if name in config), None)
    # Ulysses alone pads heads and lengths.
    if isinstance(heads, int) and parallel.ring > 1 and heads % parallel.ulysses:
        raise ModelError(
            f"{part.name} ({part.class_name}) has {heads} attention heads, which ulysses_degree {parallel.ulysses} x"
            f" ring_degree {parallel.ring} can't share: {heads} isn't a multiple of {parallel.ulysses}"
        )
    if isinstance(heads, int) and heads < parallel.ulysses:
        problem = f"has {heads} attention heads, too few for ulysses_degree {parallel.ulysses}"
        raise ModelError(f"{part.name} ({part.class_name}) {problem}")


def _class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name, None)


def _config(source: ComponentSource) -> dict[str, Any]:
    """The component's configuration, where its files are here."""
    folder: Path | None = source.folder
    try:
        found = json.loads((folder / "config.json").read_text()) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def with_tiles(
    sharing: Sharing, components: Mapping[str, Any], parallel: ParallelConfig
) -> tuple[Sharing, dict[str, str]]:
    """What is shared of a loaded model, with VAEs that decode in tiles from now on, and notes of these.

    :raises ModelError: that was asked for, and no VAE can.
    """
    tiled: dict[str, str] = {}
    for name in sharing.vaes:
        try:
            components[name].enable_tiling()
        except (AttributeError, NotImplementedError):
            continue
        if hasattr(components[name], "decoder"):
            tiled[name] = f"decodes tiles on {parallel.num_ranks} ranks"
    if parallel.vae_sp and sharing.vaes and not tiled:
        kind = type(components[sharing.vaes[0]]).__name__
        raise ModelError(f"vae_sp is asked for, but {kind} can't decode in tiles")
    return replace(sharing, vaes=tuple(tiled)), tiled
