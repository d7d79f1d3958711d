"""Blocks of a modular pipeline that aren't diffusers': Flux, and a last block that turns pictures upside down."""

from typing import Any

from diffusers import FluxAutoBlocks
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam


class _Turn(ModularPipelineBlocks):  # type: ignore[misc]
    model_name = "flux"

    @property
    def inputs(self) -> list[Any]:
        return [InputParam("images")]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [OutputParam("images")]

    def __call__(self, components: Any, state: Any) -> Any:
        block_state = self.get_block_state(state)
        block_state.images = block_state.images.flip(-2)
        self.set_block_state(state, block_state)
        return components, state


class OwnFluxBlocks(FluxAutoBlocks):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.sub_blocks.insert("turn", _Turn(), len(self.sub_blocks))
