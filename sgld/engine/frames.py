"""The frames of one result: in memory, or in a file without a name where they are many.

A minute of large frames takes gigabytes. In a file they are the operating system's to keep in memory or not, whoever
looks at them. Nothing of it is left when the process goes, however that happens. Joining them copies nothing: a clip of
97 MB would take 25 ms, or far more beside others, by which its request ends later.
"""

import logging
import tempfile
import weakref
from contextlib import suppress
from math import prod
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sgld.config import cache_root

logger = logging.getLogger(__name__)
# A clip of 81 frames of 832x480 is 97 MB.
MAX_IN_MEMORY = 256 * 2**20
Frames = NDArray[np.uint8]


class FrameStore:
    """Frames in order, (F, H, W, 3 or 4) each piece, uint8, all of one size.

    :param max_in_memory: bytes; more go into a file.
    """

    def __init__(self, max_in_memory: int = MAX_IN_MEMORY) -> None:
        self._max_in_memory = max_in_memory
        self._pieces: list[Frames] = []
        self._room: Frames | None = None
        """For all frames that may be in memory; it takes none where nothing was written."""
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        """How many frames there are."""
        return sum(map(len, self._pieces))

    @property
    def num_bytes_in_memory(self) -> int:
        return 0 if self._file is not None else sum(piece.nbytes for piece in self._pieces)

    def put(self, index: int, frames: Frames) -> Frames:
        """Keep a copy of frames from `index` on, in the place of what was kept for them before.

        :return: the frames where they are kept.
        """
        while (excess := len(self) - index) > 0:
            last = self._pieces.pop()
            if len(last) > excess:
                self._pieces.append(last[:-excess])
        if self._file is None and self.num_bytes_in_memory + frames.nbytes > self._max_in_memory:
            self._move_to_file()
        kept = self._written(index, frames)
        self._pieces.append(kept)
        return kept

    def joined(self) -> Frames:
        """All frames as one array."""
        if not self._pieces:
            return np.empty((0, 0, 0, 3), np.uint8)
        if self._file is not None:
            return self._mapped(0, (len(self), *self._pieces[0].shape[1:]))
        if self._room is not None:
            return self._room[: len(self)]
        return np.concatenate(self._pieces)

    def _move_to_file(self) -> None:
        try:
            cache_root().mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=cache_root())  # noqa: SIM115 - arrays of it need it no longer than this
            weakref.finalize(self, self._file.close)
        except OSError as error:
            self._stay_in_memory(error)
            return
        pieces, self._pieces, self._room = self._pieces, [], None
        for piece in pieces:
            self._pieces.append(self._written(len(self), piece))

    def _written(self, index: int, frames: Frames) -> Frames:
        if self._file is None:
            return self._copied(index, frames)
        try:
            self._file.seek(index * prod(frames.shape[1:]))
            self._file.write(np.ascontiguousarray(frames).data)
            self._file.flush()
            return self._mapped(index, frames.shape)
        except OSError as error:
            self._stay_in_memory(error)
            return np.array(frames)

    def _copied(self, index: int, frames: Frames) -> Frames:
        """A copy in memory, right behind the frames before it where there is room."""
        if not self._pieces and index == 0:
            room_bytes = min(self._max_in_memory, MAX_IN_MEMORY)
            # A process may have no room for what it doesn't use.
            with suppress(MemoryError):
                self._room = np.empty((room_bytes // prod(frames.shape[1:]), *frames.shape[1:]), np.uint8)
        if self._room is None or index + len(frames) > len(self._room):
            self._room = None
            return np.array(frames)
        kept = self._room[index : index + len(frames)]
        kept[:] = frames
        return kept

    def _mapped(self, index: int, shape: tuple[int, ...]) -> Frames:
        assert self._file is not None, "only what is in a file is mapped"
        return np.memmap(self._file, np.uint8, "r", index * prod(shape[1:]), shape)

    def _stay_in_memory(self, error: OSError) -> None:
        logger.warning("frames stay in memory, as a file for them can't be written in %s: %s", cache_root(), error)
        self._file, self._max_in_memory = None, 2**63
