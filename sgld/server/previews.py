"""Previews as small files, encoded once and only where somebody looks."""

from base64 import b64encode

import anyio
import msgspec
import numpy as np
from anyio.to_thread import run_sync
from numpy.typing import NDArray

from sgld.media.images import encode_image

MEDIA_TYPE = "image/jpeg"
_QUALITY = 85
_MAX_DATA_BYTES = 32 * 1024


class PreviewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A preview: a small JPEG file, here if it is small enough, and at its URL."""

    id: str
    output_index: int
    step: int
    url: str
    data: str | None
    """A data URL."""


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


async def preview_event(request_id: str, preview: LivePreview) -> PreviewEvent:
    """What is told of a preview."""
    content = await preview.content()
    is_small = len(content) <= _MAX_DATA_BYTES
    return PreviewEvent(
        id=request_id,
        output_index=preview.output_index,
        step=preview.step,
        url=f"/v1/requests/{request_id}/preview?output={preview.output_index}&step={preview.step}",
        data=f"data:{MEDIA_TYPE};base64,{b64encode(content).decode()}" if is_small else None,
    )
