"""A pipeline class that comes with a model: Ovis-Image with a picture that is mirrored."""

from typing import Any

from diffusers import OvisImagePipeline


class MirroredOvisImagePipeline(OvisImagePipeline):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs | {"output_type": "pt"})
        result.images = result.images.flip(-1)
        return result
