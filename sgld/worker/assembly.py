"""What runs the components of a loaded model on one rank, as it was decided when the model was loaded."""

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sgld.config import EngineConfig
from sgld.ipc.channel import RankEnd
from sgld.messages import AnyCommand, AnyReply, Compiling
from sgld.worker.compilation import alive_while_compiling
from sgld.worker.graphs import Graphs, graphs_on
from sgld.worker.residency import residency
from sgld.worker.runtime import Runtime
from sgld.worker.swap import Swap

if TYPE_CHECKING:
    from sgld.models.load import LoadedModel

Note = Callable[[str, str], None]
"""Is told what is found out of a component."""


def runtime_of(
    model: "LoadedModel",
    components: Mapping[str, Any],
    config: EngineConfig,
    note: Note = lambda component, note: None,
    graphs_on: Callable[..., Graphs | None] = graphs_on,
) -> Runtime:
    """Runs these components of a model; all ranks have theirs alike, so that a forward takes as long on each of them.

    :param graphs_on: makes what replays CUDA graphs.
    """
    return Runtime(
        residency(
            model.device,
            {name: part for name, part in components.items() if name in model.offloaded},
            pins=config.memory.pin_cpu_memory,
        ),
        {} if model.is_compiled_aside else {components[name]: name for name in model.compiled},
        note,
        graphs_on(model.device, config.graphs.max_bytes, components, note, frees_host=config.parallel.elastic_sp),
    )


def swap_of(model: "LoadedModel", runtime: Runtime, channel: RankEnd[AnyReply, AnyCommand], note: Note) -> Swap:
    """Has components of a model compiled by a process of its own."""
    assert model.compilation is not None
    names: dict[nn.Module, str] = {model.pipeline.components[name]: name for name in model.compiled}
    compiling = functools.partial(alive_while_compiling, channel, runtime)

    def inline(module: nn.Module) -> None:
        runtime.compile_inline(module, names[module], compiling)

    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    swap = Swap(
        names,
        after_s=model.compilation.after_s,
        inline=inline if model.compilation.is_asked_for else None,
        note=note,
        changed=runtime.forget,
        compiling=compiling,
        pending=lambda is_pending: channel.send(Compiling(is_pending=is_pending)),
        cache=Path(cache) if cache else None,
    )
    if not model.compilation.after_s:
        swap.expect()
    return swap
