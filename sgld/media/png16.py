"""PNG with 16 bits for each channel, which Pillow can't write in colour.

Source: W3C, Portable Network Graphics (Third Edition), sections 5 (chunks), 9 (filters) and 11.2.1 (IHDR).
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {3: 2, 4: 6}
_UP = 2


def encode_png16(frame: NDArray[np.uint16], info: PngInfo | None, compress_level: int) -> bytes:
    """A picture as the bytes of a file.

    :param frame: (H, W, 3 or 4), uint16, RGB or RGBA.
    :param info: chunks of text.
    """
    height, width, channels = frame.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPES[channels], 0, 0, 0)
    texts = [(kind, content) for kind, content, *_ in info.chunks] if info is not None else []
    pixels = zlib.compress(_filtered(frame), compress_level)
    chunks = [(b"IHDR", header), *texts, (b"IDAT", pixels), (b"IEND", b"")]
    return _SIGNATURE + b"".join(part for kind, content in chunks for part in _chunk(kind, content))


def _filtered(frame: NDArray[np.uint16]) -> bytes:
    """Rows of bytes, each less the one above it, with the number of that filter before it."""
    rows = np.ascontiguousarray(frame.astype(">u2")).view(np.uint8).reshape(len(frame), -1)
    differences = rows.copy()
    differences[1:] -= rows[:-1]
    return np.insert(differences, 0, _UP, axis=1).tobytes()


def _chunk(kind: bytes, content: bytes) -> Iterator[bytes]:
    yield struct.pack(">I", len(content))
    yield kind + content
    yield struct.pack(">I", zlib.crc32(kind + content))
