"""A trace of every tick and request, in Chrome's trace format: a JSON array of events, which Perfetto opens.

All times are those of CLOCK_MONOTONIC, which the processes of a host share: the rank's own beside the front's. Events
are written as they come, by a thread; the file appears when the trace is closed.
"""

import logging
import os
import threading
from collections.abc import Sequence
from errno import EISDIR
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import msgspec

from sgld.fields import FieldError
from sgld.messages import CallInfo, Ran

logger = logging.getLogger(__name__)
# Events that wait for the disk; more are dropped, and the trace says how many.
MAX_WAITING = 100_000
_RANK, _REQUESTS = 1, 2
_TICKS = 1
_RANKS_APART = 1000
_Event = dict[str, Any]


class Trace:
    """Writes events to a file beside `path`, which gets this name in the end.

    :raises OSError: the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._events: SimpleQueue[_Event | None] = SimpleQueue()
        self._num_dropped = 0
        self._problem: OSError | None = None
        self._num_ticks = 0
        self._last_end_us: dict[str, float] = {}
        """Where the last tick of each running request ended."""
        self._named: set[str] = set()
        """Running requests whose track has its name."""
        file = self._temporary.open("wb")
        file.write(b"[\n" + msgspec.json.encode(_name("process_name", _RANK, 0, "ranks")))
        self._thread = threading.Thread(target=self._write, args=(file,), name="trace", daemon=True)
        self._thread.start()
        self._num_replicas = 0
        self._rank_tracks: set[int] = set()
        """Of ranks beyond the first that have their names."""
        self._put(_name("process_name", _REQUESTS, 0, "requests"))

    def ran(self, reply: Ran, calls: Sequence[CallInfo], replica: int = 0) -> None:
        """A tick on the track of the replica's rank, and its calls on those of their requests."""
        for index in range(self._num_replicas, replica + 1):
            self._put(_name("thread_name", _RANK, _TICKS + index, f"ticks of replica {index}"))
            self._num_replicas = index + 1
        self._num_ticks += 1
        start_us, length_us = reply.started_ns / 1e3, reply.elapsed_s * 1e6
        args = {
            "tick": self._num_ticks,
            "mode": reply.mode,
            "rows": reply.rows,
            "variant": reply.variant,
            "launch_us": reply.launch_s * 1e6,
            "lead_us": reply.lead_s * 1e6,
            "calls": [call.id for call in calls],
            "requests": [call.request_id for call in calls],
            "steps": [call.step_index for call in calls],
            "merge_key": calls[0].merge_key,
            "cost_key": reply.cost_key,
        }
        if reply.ranks is not None:
            args["ranks"] = str(reply.ranks)
        for track in self._tracks(reply, replica):
            self._put(_span(reply.cost_key.partition("(")[0], _RANK, track, start_us, length_us, args))
        for call in calls:
            args = {"tick": self._num_ticks, "call": call.id, "component": call.component, "rows": call.rows}
            label = f"step {call.step_index + 1}/{call.num_steps}" if call.kind == "denoise" else call.kind
            self._on_request(call.request_id, label, start_us, length_us, args)
            self._last_end_us[call.request_id] = start_us + length_us

    def _tracks(self, reply: Ran, replica: int) -> list[int]:
        """Those of the ranks that ran it, where each forward has its own; else that of the replica."""
        tracks = []
        for rank in reply.ranks.every if reply.ranks is not None else (0,):
            tracks.append(_TICKS + replica + _RANKS_APART * rank)
            if rank and tracks[-1] not in self._rank_tracks:
                self._rank_tracks.add(tracks[-1])
                self._put(_name("thread_name", _RANK, tracks[-1], f"ticks of replica {replica}, rank {rank}"))
        return tracks

    def span(self, request_id: str, label: str, start_s: float, end_s: float) -> None:
        """Something that a request went through in the front; times are those of `time.monotonic`."""
        self._on_request(request_id, label, start_s * 1e6, (end_s - start_s) * 1e6, {})

    def ended(self, request_id: str, state: str, now: float) -> None:
        """A request is over, or begins anew: since its last tick its results were on their way."""
        start_us = self._last_end_us.pop(request_id, None)
        if start_us is not None:
            label = "transfer" if state == "completed" else state
            self._on_request(request_id, label, start_us, max(now * 1e6 - start_us, 0), {})
        self._named.discard(request_id)

    def close(self) -> None:
        """Write what waits and put the file in its place; waits for the disk."""
        if self._num_dropped:
            self._events.put(_name("dropped", _RANK, 0, f"{self._num_dropped} events were dropped"))
        self._events.put(None)
        self._thread.join()
        if self._problem is None:
            try:
                self._temporary.replace(self._path)
            except OSError as error:
                self._problem = error
        if self._problem is not None:
            logger.warning("the trace %s can't be written: %s", self._path, self._problem)

    def _on_request(self, request_id: str, label: str, start_us: float, length_us: float, args: _Event) -> None:
        track = track_of(request_id)
        if request_id not in self._named:
            self._named.add(request_id)
            self._put(_name("thread_name", _REQUESTS, track, request_id))
        self._put(_span(label, _REQUESTS, track, start_us, length_us, args))

    def _put(self, event: _Event) -> None:
        if self._events.qsize() < MAX_WAITING:
            self._events.put(event)
        else:
            self._num_dropped += 1

    def _write(self, file: BinaryIO) -> None:
        encoder = msgspec.json.Encoder()
        try:
            with file:
                while (event := self._events.get()) is not None:
                    file.write(b",\n" + encoder.encode(event))
                file.write(b"\n]\n")
        except OSError as error:
            self._problem = error
            while self._events.get() is not None:
                pass


def open_trace(path: str | None) -> Trace | None:
    """The trace that is asked for, if one is.

    :raises FieldError: the file can't be written.
    """
    try:
        if path is not None and Path(path).is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        return Trace(Path(path)) if path is not None else None
    except OSError as error:
        raise FieldError("trace", path, error.strerror or str(error)) from None


def track_of(request_id: str) -> int:
    """The number of a request's track: tracks have numbers, and are sorted by them. Requests are `r12-3`."""
    group, _, output = request_id.partition("-")
    return int(group[1:]) * 100 + int(output)


def _name(kind: str, process: int, track: int, name: str) -> _Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def _span(name: str, process: int, track: int, start_us: float, length_us: float, args: _Event) -> _Event:
    return {"name": name, "ph": "X", "pid": process, "tid": track, "ts": start_us, "dur": length_us, "args": args}
