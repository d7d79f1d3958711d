"""Which components the ranks of a replica share, and whether they can: decided before anything is loaded."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sgld.config import EngineConfig
from sgld.errors import ModelError
from sgld.models import tensor_choice
from sgld.models.roles import role
from sgld.models.sources import ComponentSource
from sgld.models.tensor_choice import Divided, Part
from sgld.parallel import ParallelConfig


@dataclass(frozen=True)
class Sharing:
    """Components that all ranks have, by what is shared of their calls; rank 0 has all others alone."""

    denoisers: tuple[str, ...] = ()
    vaes: tuple[str, ...] = ()
    divided: Divided = field(default_factory=Divided)
    """Those of which each rank has parts."""
    notes: tuple[str, ...] = field(default=())
    """One phrase each, for people."""
    max_degrees: Mapping[str, int] = field(default_factory=dict)
    """Of denoisers, where ranks choose for each forward: so many can share its tokens."""

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.denoisers, *self.vaes, *self.divided.names))


NOTHING = Sharing()
"""What a rank shares that is alone."""


def share(
    parts: Iterable[Part], config: EngineConfig, device_type: str, *, is_whole: bool, file: Path | None = None
) -> Sharing:
    """Decide what is shared.

    :param is_whole: pipelines run their models themselves.
    :param file: all weights of the model are in it.
    :raises ModelError: a model can't be shared like this, or there are too few GPUs.
    """
    parallel = config.parallel
    if device_type == "cuda":
        _check_gpus(parallel)
    if parallel.num_ranks == 1:
        return Sharing(notes=(parallel.layout,)) if parallel.dp_size > 1 else NOTHING
    _check_choices(config, is_whole=is_whole)
    roles = {part.name: (role(part.name, part.library, part.class_name), part) for part in parts}
    denoisers = [part for does, part in roles.values() if does == "dit" and part.library == "diffusers"]
    vaes = [name for name, (does, part) in roles.items() if does == "vae" and part.library == "diffusers"]
    divided = tensor_choice.choose(((part, does) for does, part in roles.values()), file, parallel)
    notes = [
        f"{parallel.layout} (of each copy {parallel.num_ranks} ranks)" if parallel.dp_size > 1 else parallel.layout
    ]
    max_degrees = {}
    if parallel.elastic_sp:
        max_degrees = {part.name: _max_degree(part, parallel) for part in denoisers}
        notes += [f"{name} runs on one GPU at a time" for name, degree in max_degrees.items() if degree == 1]
    elif parallel.sp > 1:
        denoisers, helpers = check_sequences(denoisers, parallel, divided.names)
        notes += [f"tokens of {part.name} are shared by {parallel.sp} ranks" for part in denoisers]
        alone = [part for part in helpers if part.name not in divided.names]
        notes += [f"{part.name} runs on rank 0 alone: {part.class_name} can't share tokens" for part in alone]
    elif not parallel.enable_cfg_parallel:
        denoisers = []
    if parallel.vae_sp is False:
        vaes = []
    return Sharing(tuple(part.name for part in denoisers), tuple(vaes), divided, tuple(notes), max_degrees)


def _check_choices(config: EngineConfig, *, is_whole: bool) -> None:
    parallel = config.parallel
    if is_whole:
        problem = "with --backend diffusers pipelines run their models themselves, on one GPU"
        raise ModelError(f"num_gpus is {parallel.total}, but {problem}; use --dp-size {parallel.total}")
    if parallel.elastic_sp and config.enable_torch_compile:
        # Each GPU would compile in its first forward of each size, for minutes in which it seems to hang.
        problem = "with --elastic-sp denoisers aren't compiled, but run as CUDA graphs"
        raise ModelError(f"enable_torch_compile is asked for, but {problem}; leave out one of both")


def _check_gpus(parallel: ParallelConfig) -> None:
    import torch

    num = torch.cuda.device_count()
    # Each copy sees its own GPUs only.
    if parallel.num_ranks > num:
        raise ModelError(f"num_gpus is {parallel.total}, but torch finds {num} GPUs here; {parallel.layout}")


def check_sequences(
    parts: Iterable[Part], parallel: ParallelConfig, divided: Collection[str] = ()
) -> tuple[list[Part], list[Part]]:
    """Of denoisers and what helps them those whose tokens are shared, and the others, which rank 0 runs alone.

    :param divided: names of those of which ranks have parts, and so of their heads.
    :raises ModelError: so many ranks can't share them; says why, and what can be done instead.
    """
    from sgld.models.token_plans import plan_of, why_not

    parts = list(parts)
    shared = [part for part in parts if (cls := _class(part.class_name)) is not None and plan_of(cls)]
    if parts and not shared:
        part = parts[0]
        problem = f"{part.name} ({part.class_name}) {why_not(part.class_name)}"
        instead = "use --enable-cfg-parallel or" if parallel.sp == 2 and parallel.cfg_degree == 1 else "use"
        instead += f" --dp-size {parallel.dp_size * parallel.sp}"
        raise ModelError(f"sp_degree is {parallel.sp}, but {problem}; {instead} instead")
    for part in shared:
        heads = _num_heads(part)
        each = parallel.tp_size if part.name in divided else 1
        # Ulysses pads heads, as long as each rank has one of its own.
        if isinstance(heads, int) and heads // each < parallel.ulysses:
            of_each = f" / {each}" if each > 1 else ""
            problem = f"has {heads}{of_each} attention heads, too few for ulysses_degree {parallel.ulysses}"
            raise ModelError(f"{part.name} ({part.class_name}) {problem}; use --ring-degree {parallel.sp}")
    return shared, [part for part in parts if part not in shared]


def _max_degree(part: Part, parallel: ParallelConfig) -> int:
    """So many ranks can share the tokens of a denoiser: each must have a head of its own."""
    from sgld.models.token_plans import plan_of

    cls, heads = _class(part.class_name), _num_heads(part)
    if cls is None or plan_of(cls) is None:
        return 1
    return max(degree for degree in parallel.degrees if degree == 1 or not isinstance(heads, int) or degree <= heads)


def _num_heads(part: Part) -> Any:
    config = _config(part.source)
    return next((config[name] for name in ("num_attention_heads", "n_heads", "num_heads") if name in config), None)


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
