"""One rank among others."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipelines import build
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from sgld.ipc.seats import Seat
from sgld.models.load import LoadedModel
from sgld.models.sequence import Sequence
from sgld.models.sharing import Sharing
from sgld.models.tokens import TokenRanks
from sgld.parallel import ParallelConfig, Ranks
from sgld.worker.calls import current_context
from sgld.worker.member import Member
from sgld.worker.orders import Invoke
from sgld.worker.residency import Residency
from sgld.worker.runtime import Runtime
from sgld.worker.wire import packed

CPU = torch.device("cpu")


class Vae(nn.Module):
    """Its first decode has no memory."""

    num_decodes = 0

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        self.num_decodes += 1
        if self.num_decodes == 1:
            raise torch.OutOfMemoryError("out of memory")
        return x


class Roomy(Residency):
    """Something else can always leave."""

    def make_room(self, module: nn.Module) -> bool:
        return True


@pytest.fixture
def other_rank() -> Iterator[None]:
    """The first of two ranks does whatever this one expects."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


def second_with(pipeline: Any, sharing: Sharing) -> Member:
    model = LoadedModel(pipeline, CPU, {}, "", sharing=sharing)
    return Member(Seat(1, 2), model, ParallelConfig(num_gpus=2, elastic_sp=True))


@pytest.fixture
def second_of_two(other_rank: None) -> Member:
    return second_with(SimpleNamespace(components={"vae": Vae()}), Sharing(vaes=("vae",)))


def asked(component: str, method: str, ranks: Ranks, *args: torch.Tensor) -> Invoke:
    parcel, _ = packed((args, {}), CPU)
    return Invoke(1, component, method, parcel, current_context(), False, (), None, None, ranks=ranks)


def decode(ranks: Ranks) -> Invoke:
    return asked("vae", "decode", ranks, torch.ones(1))


def test_forward_of_one_rank_is_tried_again_when_something_left(second_of_two: Member) -> None:
    invoke, runtime = decode(Ranks(1, 1)), Runtime(Roomy())
    assert torch.equal(second_of_two.perform(invoke, invoke.parcel.tree, runtime), torch.ones(1))


def test_forward_of_several_ranks_is_not_as_others_are_in_the_midst_of_it(second_of_two: Member) -> None:
    invoke, runtime = decode(Ranks(0, 2)), Runtime(Roomy())
    vae: Any = second_of_two.components["vae"]
    vae.decoder = nn.Identity()
    with pytest.raises(torch.OutOfMemoryError):
        second_of_two.perform(invoke, invoke.parcel.tree, runtime)


@pytest.mark.usefixtures("other_rank")
def test_ranks_that_a_forward_names_exchange_all_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TokenRanks] = []
    monkeypatch.setattr(Sequence, "run", lambda _self, _course, _forward, ranks: seen.append(ranks))
    member = second_with(build("wan")[0], Sharing(("transformer",), max_degrees={"transformer": 2}))
    invoke = asked("transformer", "forward", Ranks(0, 2))
    member.perform(invoke, invoke.parcel.tree, Runtime())
    assert [(ranks.num_ulysses, ranks.index, ranks.overlaps) for ranks in seen] == [(2, 1, False)]
