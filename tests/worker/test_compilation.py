"""A forward that compiles shows life, however long it takes."""

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import torch

from sgld.ipc.channel import FrontEnd, RankEnd, channel_pair
from sgld.messages import Alive, AnyCommand, AnyReply
from sgld.worker import heartbeat
from sgld.worker.compilation import alive_while_compiling
from sgld.worker.runtime import Runtime
from worker.requests import Function

Ends = tuple[FrontEnd[AnyCommand, AnyReply], RankEnd[AnyReply, AnyCommand]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    front, rank = channel_pair()
    yield front, rank
    front.close()
    rank.close()
    torch._dynamo.reset()


async def test_front_hears_of_a_compilation_while_it_goes_on(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.001)
    front, rank = ends
    is_heard = threading.Event()

    def compiler(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        # It takes as long as it takes the front to hear of it.
        assert is_heard.wait(60)
        return graph.forward

    module, runtime = Function(lambda x: 2 * x), Runtime()
    module.compile(backend=compiler)

    def forward() -> None:
        with torch.no_grad(), alive_while_compiling(rank, runtime):
            module(torch.ones(1, 2))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, forward)
        assert await front.receive() == Alive(stage="compiling")
        is_heard.set()
    assert runtime.num_compilations == 1


def test_forward_that_compiles_nothing_says_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.0)
    front, rank = ends
    runtime = Runtime()
    with alive_while_compiling(rank, runtime):
        Function(lambda x: 2 * x)(torch.ones(1, 2))
    with pytest.raises(anyio.WouldBlock):
        front.receive_nowait()
    assert runtime.num_compilations == 0
