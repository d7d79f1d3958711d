"""Ranks that have no model, and die as they are told."""

import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
import numpy as np
from anyio import to_thread

from sgld.config import EngineConfig
from sgld.engine.replica import Rank
from sgld.engine.routing import adapters_of
from sgld.errors import ChannelClosed
from sgld.ipc.channel import RankEnd, channel_pair
from sgld.ipc.tensor_queue import TensorWriter, tensor_queue
from sgld.messages import (
    AnyCommand,
    AnyReply,
    CallInfo,
    Decoded,
    Finished,
    Idle,
    LoadFailed,
    LoraDropped,
    ModelInfo,
    Pending,
    Ran,
    Ready,
    Run,
    Start,
)

MODEL = ModelInfo(model_path="none", pipeline_class="None", device="cpu", precisions={}, fps=None)
Channel = RankEnd[AnyReply, AnyCommand]


class MortalRanks:
    """Each request has one call, and all may share a forward. Running one with the prompt "bad" ends the rank, one with
    "once" does so the first time, one with "wait" waits for `go`, one with "forget" drops its adapters.

    :param devices: of each rank that loads, in order, then the CPU; "broken": it can't load, "slow": nor is it done.
    :param num_started: of each rank, how many requests it waits for before it announces their calls, and those of
        others at once.
    """

    def __init__(self, *num_started: int, devices: Sequence[str] = ()) -> None:
        self.batches: list[list[str]] = []
        """The prompts of each forward, sorted."""
        self.replicas: list[int] = []
        """Where each of these ran."""
        self.go = threading.Event()
        self._num_started = list(num_started)
        self._devices = list(devices)

    @asynccontextmanager
    async def __call__(self, config: EngineConfig, replica: int = 0) -> AsyncIterator[Rank]:
        front, rank_end = channel_pair()
        reader, writer = tensor_queue(num_slots=2, slot_bytes=4096)
        thread = threading.Thread(target=self._serve, args=(rank_end, writer, replica))
        thread.start()
        try:
            yield Rank(front, reader)
        finally:
            self.go.set()
            front.close()
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(thread.join)
            writer.close()
            reader.close()

    def _serve(self, channel: Channel, tensors: TensorWriter, replica: int) -> None:
        started: list[Start] = []
        num_announced = 0
        num_started = self._num_started.pop(0) if self._num_started else 1
        try:
            device = self._devices.pop(0) if self._devices else "cpu"
            if device == "broken":
                channel.send(LoadFailed(message="the device has no memory"))
                return
            if device == "slow":
                channel.receive(None)
            channel.send(Ready(model=msgspec.structs.replace(MODEL, device=device)))
            while (command := channel.receive(None)) is not None:
                if isinstance(command, Start):
                    started.append(command)
                    while len(started) >= num_started and num_announced < len(started):
                        channel.send(Pending(call=_call(num_announced, started[num_announced].request_id)))
                        num_announced += 1
                elif isinstance(command, Run):
                    batch = [started[index] for index in command.call_ids]
                    self.batches.append(sorted(start.params.prompt for start in batch))
                    self.replicas.append(replica)
                    if "wait" in self.batches[-1]:
                        self.go.wait(60)
                    if "bad" in self.batches[-1] or (
                        self.batches[-1] == ["once"] and self.batches.count(["once"]) == 1
                    ):
                        return
                    for source in (adapters_of(start.params) for start in batch if start.params.prompt == "forget"):
                        for path, alpha in source:
                            channel.send(LoraDropped(path=path, alpha=alpha))
                    _finish(channel, tensors, command.call_ids, batch)
        except ChannelClosed:
            pass
        finally:
            channel.close()


def _call(index: int, request_id: str) -> CallInfo:
    return CallInfo(
        id=index,
        request_id=request_id,
        kind="denoise",
        component="transformer",
        merge_key="m",
        cost_key="c",
        rows=1,
        step_index=0,
        num_steps=1,
    )


def _finish(channel: Channel, tensors: TensorWriter, call_ids: tuple[int, ...], batch: list[Start]) -> None:
    channel.send(Ran(call_ids=call_ids, cost_key="c", rows=len(batch), elapsed_s=1.0, is_timed=False))
    for start in batch:
        pixels = tensors.put(np.zeros((1, 1, 1, 3), np.uint8))
        channel.send(Decoded(request_id=start.request_id, index=0, is_video=False, pixels=pixels))
        channel.send(Finished(request_id=start.request_id))
    channel.send(Idle())
