"""The requests on their way: what the replies of ranks say of them becomes their events."""

import time
from collections.abc import Callable, Collection, Sequence
from itertools import count
from math import prod
from typing import TypeVar, assert_never

import anyio
import msgspec
import numpy as np
from anyio.to_thread import run_sync
from numpy.typing import NDArray

from sgld.engine.demand import demand_of
from sgld.engine.entry import Entry
from sgld.engine.scheduler import Scheduler
from sgld.engine.statistics import Tally
from sgld.errors import InvalidRequest, RankLost
from sgld.events import Cancelled, Completed, Failed, Frames, Preview, Progress, Queued, Restarted, Started, Terminal
from sgld.ipc.tensor_queue import TensorReader
from sgld.messages import (
    MAX_MESSAGE_BYTES,
    Decoded,
    Finished,
    Heard,
    Previewed,
    Start,
    Stepped,
    TaskCancelled,
    TaskFailed,
    TensorRef,
)
from sgld.request import NO_LIMITS, Limits, Request, RequestState
from sgld.sampling_params import DEFAULT_FPS, SamplingParams

# A request that was running when so many ranks were lost is to blame.
MAX_LOSSES = 2
# Less than this is done faster than a thread is asked to do it.
_LARGE_BYTES = 2**20
# What the message that starts a request takes beside its params, and more.
_START_BYTES = 1024
_ids = count(1)
T = TypeVar("T")
Result = Previewed | Decoded | Heard
Report = Stepped | Finished | TaskFailed | TaskCancelled


class Requests:
    """All requests that haven't ended. The replicas' schedulers and the tally are kept in step with them."""

    def __init__(self, schedulers: Sequence[Scheduler], tally: Tally) -> None:
        self.fps: float | None = None
        """Of the model's videos, where their params don't say."""
        self._schedulers = schedulers
        self._tally = tally
        self._entries: dict[str, Entry] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def num_in(self, state: RequestState, replica: int | None = None) -> int:
        """How many are in a state, with one replica or all."""
        return sum(entry.state is state and replica in (None, entry.replica) for entry in self._entries.values())

    def num_of(self, replica: int) -> int:
        """How many a replica has."""
        return sum(entry.replica == replica for entry in self._entries.values())

    def add(
        self,
        params: SamplingParams,
        replica_of: Callable[[], int],
        waited_s: float = 0.0,
        limits: Limits = NO_LIMITS,
    ) -> list[Entry]:
        """Queue a request for each output; they share a stream.

        :param replica_of: chooses a replica for the next output; those before it are queued already.
        :param waited_s: how long it has waited already, elsewhere.
        """
        group, now, demand = f"r{next(_ids)}", time.monotonic(), demand_of(params)
        entries: list[Entry] = []
        for index in range(params.num_outputs_per_prompt):
            request = Request(
                id=output_id(group, index),
                output_index=index,
                params=params.output(index),
                arrived_at=now,
                limits=limits,
            )
            entry = Entry(request, group, replica_of(), entries[0].stream if entries else None)
            self._entries[request.id] = entry
            self._scheduler_of(entry).add(request.id, now - waited_s, demand)
            entries.append(entry)
        for entry in entries:
            scheduler = self._scheduler_of(entry)
            position = scheduler.position(entry.request.id, now)
            eta_s = scheduler.eta_s(entry.request.id, now)
            self._tally.etas.told(entry.request.id, "queued", eta_s, now)
            entry.put(entry.event(Queued, position=position, eta_s=eta_s))
        return entries

    def move(self, request_id: str, replica: int) -> None:
        """Another replica has a request, whose scheduler knows of it."""
        self._entries[request_id].replica = replica

    def admit(self, replica: int) -> list[Start]:
        """Let those of a replica run whose turn it is; what to tell its rank."""
        commands = []
        for request_id in self._schedulers[replica].admit(time.monotonic()):
            entry = self._entries[request_id]
            entry.change(RequestState.RUNNING)
            self._tally.started(entry.request, now := time.monotonic())
            self._tally.etas.told(request_id, "started", self._schedulers[replica].eta_s(request_id, now), now)
            entry.put(entry.event(Started))
            request = entry.request
            commands.append(Start(request_id=request_id, params=request.params, limits=request.limits))
        return commands

    def cancel(self, entry: Entry) -> None:
        """End a request that is on its way."""
        self.end(entry, RequestState.CANCELLED, entry.event(Cancelled))

    def cancel_all(self) -> None:
        """End them all."""
        for entry in list(self._entries.values()):
            self.cancel(entry)

    def abandon_all(self) -> None:
        """None of them can be served: their streams end without an event."""
        for entry in list(self._entries.values()):
            self._entries.pop(entry.request.id)
            self._tally.ended(entry.request, RequestState.FAILED, time.monotonic())
            entry.change(RequestState.FAILED)
            entry.stream.close()

    async def take(self, reply: Result, tensors: TensorReader) -> None:
        """The rank sends pixels or sound of a request, which may have ended meanwhile.

        They are copied out of the tensor queue: the consumer may keep them, the rank needs the slots.
        """
        ref = reply.samples if isinstance(reply, Heard) else reply.pixels
        if (entry := self._entries.get(reply.request_id)) is None:
            tensors.release(ref)
            return
        if isinstance(reply, Decoded):
            await self._take_frames(entry, reply, tensors)
            return
        copied = await _off_the_loop(prod(ref.shape), lambda: _copied(tensors, ref))
        if reply.request_id not in self._entries:
            return
        match reply:
            case Previewed(step=step):
                entry.put(entry.event(Preview, step=step, image=copied))
            case Heard(sample_rate=sample_rate):
                entry.sample_rate = sample_rate
                entry.sound.append(copied.view(np.float32).T)

    async def _take_frames(self, entry: Entry, reply: Decoded, tensors: TensorReader) -> None:
        def keep() -> tuple[int, NDArray[np.uint8]] | None:
            with tensors.borrowed(reply.pixels) as view:
                return entry.keep(reply.index, view)

        entry.is_video = reply.is_video
        new = await _off_the_loop(prod(reply.pixels.shape), keep)
        # What has 16 bits is one picture, and comes whole with Completed.
        is_news = reply.is_video and entry.request.params.bit_depth == 8
        if new is not None and is_news and reply.request_id in self._entries:
            entry.put(entry.event(Frames, index=new[0], frames=new[1]))

    def report(self, reply: Report) -> Entry | None:
        """The rank says something else of a request; it may have ended meanwhile.

        :return: a request that is completed, which `tell_completed` is to tell.
        """
        entry = self._entries.get(reply.request_id)
        if entry is None:
            return None
        match reply:
            case Stepped():
                self._stepped(entry, reply)
            case Finished(postprocessing=postprocessing):
                entry.postprocessing = postprocessing
                self._leave(entry, RequestState.COMPLETED)
                return entry
            case TaskFailed(code=code, message=message):
                self.end(entry, RequestState.FAILED, entry.event(Failed, code=code, message=message))
            case TaskCancelled():
                self.end(entry, RequestState.CANCELLED, entry.event(Cancelled))
            case unknown:
                assert_never(unknown)
        return None

    def _stepped(self, entry: Entry, reply: Stepped) -> None:
        scheduler, is_denoising = self._scheduler_of(entry), reply.stage == "denoise"
        if is_denoising:
            scheduler.stepped(reply.request_id, reply.step)
        else:
            scheduler.processed(reply.request_id, reply.num_steps - reply.step)
        self._tally.stepped(reply)
        eta_s = scheduler.eta_s(reply.request_id, now := time.monotonic())
        if is_denoising and 2 * reply.step >= reply.num_steps:
            self._tally.etas.told(reply.request_id, "halfway", eta_s, now)
        entry.put(entry.event(Progress, step=reply.step, num_steps=reply.num_steps, eta_s=eta_s, stage=reply.stage))

    async def tell_completed(self, entry: Entry) -> None:
        """Tell the last event of a request, with all its frames in one; also while the engine closes."""
        num_bytes = entry.frames.num_bytes_in_memory
        with anyio.CancelScope(shield=True):
            entry.put(await _off_the_loop(num_bytes, lambda: self._completed(entry)))

    def run_again(self, problem: str, blamed: Collection[str] | None, replica: int) -> None:
        """The rank of a replica is lost: its requests run again, but one that was running when two were lost fails.

        :param blamed: those that were running; None: that isn't known.
        """
        running = [e for e in self._entries.values() if e.replica == replica and e.state is RequestState.RUNNING]
        for entry in running:
            entry.attempt += 1
            is_blamed = blamed is None or entry.request.id in blamed
            entry.num_losses += is_blamed
            if entry.num_losses >= MAX_LOSSES:
                message = f"{problem}, for the second time while it worked on this request"
                self.end(entry, RequestState.FAILED, entry.event(Failed, code=RankLost.code, message=message))
                continue
            self._tally.restarted(entry.request, time.monotonic())
            entry.change(RequestState.QUEUED)
            self._scheduler_of(entry).requeue(entry.request.id, is_suspect=is_blamed)
            entry.put(entry.event(Restarted, attempt=entry.attempt))

    def _scheduler_of(self, entry: Entry) -> Scheduler:
        return self._schedulers[entry.replica]

    def _completed(self, entry: Entry) -> Completed:
        params, frames = entry.request.params, entry.frames.joined()
        return entry.event(
            Completed,
            frames=frames.view(np.uint16) if params.bit_depth == 16 and len(frames) else frames,
            is_video=entry.is_video,
            audio=np.concatenate(entry.sound, axis=1) if entry.sound else None,
            sample_rate=entry.sample_rate,
            seed=params.seed,
            fps=self._fps_of(params),
            postprocessing=entry.postprocessing,
            elapsed_s=time.monotonic() - entry.request.arrived_at,
        )

    def _fps_of(self, params: SamplingParams) -> float | None:
        """Frames made in between don't make a video longer."""
        fps = params.fps or self.fps
        return fps if params.frame_factor == 1 else (fps or DEFAULT_FPS) * params.frame_factor

    def end(self, entry: Entry, state: RequestState, event: Terminal) -> None:
        """A request is over, and this is its last event."""
        self._leave(entry, state)
        entry.put(event)

    def _leave(self, entry: Entry, state: RequestState) -> None:
        self._entries.pop(entry.request.id)
        self._scheduler_of(entry).remove(entry.request.id, is_completed=state is RequestState.COMPLETED)
        self._tally.ended(entry.request, state, time.monotonic())
        entry.change(state)


async def _off_the_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Do what takes long with so many bytes in a thread: a clip of 97 MB takes half a second."""
    return work() if num_bytes < _LARGE_BYTES else await run_sync(work)


def _copied(tensors: TensorReader, ref: TensorRef) -> NDArray[np.uint8]:
    with tensors.borrowed(ref) as view:
        return view.copy()


def output_id(group: str, index: int) -> str:
    """The id of one output of a client's call."""
    return f"{group}-{index}"


def check_fits(params: SamplingParams) -> None:
    """See that params can be sent to a rank.

    :raises InvalidRequest: they can't.
    """
    try:
        size = len(msgspec.msgpack.encode(params))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"the request holds what JSON doesn't have: {error}") from None
    if size > MAX_MESSAGE_BYTES - _START_BYTES:
        limit = MAX_MESSAGE_BYTES - _START_BYTES
        raise InvalidRequest(f"the request takes {size} bytes, the limit is {limit}; shorten its prompts")
