"""Previews as small files, encoded once and only where somebody looks."""

import anyio
import numpy as np
from anyio.to_thread import run_sync
from numpy.typing import NDArray

from sgld.media.images import encode_image

MEDIA_TYPE = "image/jpeg"
_QUALITY = 85


class LivePreview:
    """The picture that a model predicted at a step.

    :param image: (H, W, 3), uint8.
    """

    def __init__(self, image: NDArray[np.uint8], step: int, output_index: int) -> None:
        self.step = step
        self.output_index = output_index
        self._image = image
        self._lock = anyio.Lock()
        self._content: bytes | None = None

    async def content(self) -> bytes:
        """It as a JPEG file."""
        async with self._lock:
            if self._content is None:
                self._content = await run_sync(lambda: encode_image(self._image, "jpeg", quality=_QUALITY))
        return self._content
