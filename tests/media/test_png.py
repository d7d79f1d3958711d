import os
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sgld.media.metadata import png_chunks
from sgld.media.png import encode_png


def noisy(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, data = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length)[0] == zlib.crc32(kind + data)
        yield kind, data
        at += length + 12


# Less than a band, a row that is larger than one, and several bands with a rest.
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 140_000), (300, 1024)])
@pytest.mark.parametrize("channels", [3, 4])
def test_pictures_of_any_number_of_bands_are_lossless(height: int, width: int, channels: int) -> None:
    frame = noisy(height, width, channels)
    with Image.open(BytesIO(encode_png(frame))) as image:
        assert image.mode == ("RGB" if channels == 3 else "RGBA")
        np.testing.assert_array_equal(np.asarray(image), frame)


def test_bands_are_one_stream_with_its_checksum() -> None:
    content = encode_png(noisy(300, 1024), png_chunks({"params": {"prompt": "ä"}}))
    found = list(chunks(content))
    parts = [data for kind, data in found if kind == b"IDAT"]
    assert len(parts) > 3, "several bands"
    # Refuses what has another checksum, or more behind it.
    rows = zlib.decompress(b"".join(parts))
    assert len(rows) == 300 * (1 + 3 * 1024)
    assert [kind for kind, _ in found if kind != b"IDAT"] == [b"IHDR", b"iTXt", b"iTXt", b"IEND"]


def test_a_file_is_the_same_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = noisy(300, 1024)
    content = encode_png(frame)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert encode_png(frame) == content


def test_rows_that_are_alike_take_no_room() -> None:
    frame = np.repeat(noisy(1, 512), 512, axis=0)
    assert len(encode_png(frame)) < frame.nbytes / 100


def test_a_view_is_written_as_it_looks() -> None:
    frame = noisy(8, 16).transpose(1, 0, 2)[::-1]
    with Image.open(BytesIO(encode_png(frame))) as image:
        np.testing.assert_array_equal(np.asarray(image), frame)
