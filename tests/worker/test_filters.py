"""The filters of a rank."""

import threading

import pytest
import torch

from sgld.errors import InvalidRequest
from sgld.models.filters import Filter, FilterSource, Lanczos
from sgld.sampling_params import SamplingParams
from sgld.worker.filters import MAX_KEPT, Filters

TIMEOUT_S = 60


class Shelf:
    """Loads a filter when it is told to; what is called `bad` can't be loaded."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.loaded: list[str] = []

    def __call__(self, source: FilterSource, _device: torch.device) -> Filter:
        assert self.go.wait(TIMEOUT_S)
        self.loaded.append(source.path)
        if source.path == "bad":
            raise InvalidRequest("it is bad", "upscaling_model_path")
        return Lanczos()


def params(path: str) -> SamplingParams:
    return SamplingParams(enable_upscaling=True, upscaling_model_path=path)


def settled(filters: Filters, asked: SamplingParams) -> tuple[Filter, ...]:
    while (found := filters.of(asked)) is None:
        threading.Event().wait(0.001)
    return found


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def filters(shelf: Shelf) -> Filters:
    return Filters(torch.device("cpu"), shelf)


def test_requests_wait_for_what_is_loaded_and_others_do_not(filters: Filters, shelf: Shelf) -> None:
    assert filters.of(params("a")) is None
    assert filters.of(SamplingParams()) == ()
    assert filters.is_loading
    shelf.go.set()
    (found,) = settled(filters, params("a"))
    assert filters.of(params("a")) == (found,)
    assert not filters.is_loading
    assert shelf.loaded == ["a"]
    filters.close()


def test_those_used_last_are_kept(filters: Filters, shelf: Shelf) -> None:
    shelf.go.set()
    for path in [*map(str, range(MAX_KEPT)), "0", "new", "0", "1"]:
        settled(filters, params(path))
    assert shelf.loaded == [*map(str, range(MAX_KEPT)), "new", "1"]
    filters.close()


def test_one_that_can_not_be_loaded_is_tried_again(filters: Filters, shelf: Shelf) -> None:
    shelf.go.set()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="it is bad"):
            settled(filters, params("bad"))
    assert shelf.loaded == ["bad", "bad"]
    filters.close()
