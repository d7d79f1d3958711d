"""A pipeline that isn't one of diffusers': a Flux whose pictures are upside down."""

from typing import Any

from diffusers import FluxPipeline


class UpsideDownPipeline(FluxPipeline):  # type: ignore[misc]
    def __call__(self, *args: Any, output_type: str = "pt", **kwargs: Any) -> Any:
        result = super().__call__(*args, output_type="pt", **kwargs)
        result.images = result.images.flip(-2)
        if output_type == "pil":
            result.images = self.image_processor.pt_to_numpy(result.images)
            result.images = self.image_processor.numpy_to_pil(result.images)
        return result
