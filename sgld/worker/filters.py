"""The filters of a rank: loaded in the background, the last few kept."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sgld.models.filters import Filter, FilterSource, load_filter, sources_of
from sgld.sampling_params import SamplingParams

MAX_KEPT = 4


class Filters:
    """Not thread-safe, but for loading: that is done by a thread of its own, one filter at a time."""

    def __init__(
        self, device: torch.device, load: Callable[[FilterSource, torch.device], Filter] = load_filter
    ) -> None:
        self._device = device
        self._load = load
        self._kept: OrderedDict[FilterSource, Future[Filter]] = OrderedDict()
        self._unseen: set[Future[Filter]] = set()
        """Those whose end nobody has looked at."""
        self._thread = ThreadPoolExecutor(1, "filters")

    @property
    def is_loading(self) -> bool:
        return bool(self._unseen)

    @property
    def has_news(self) -> bool:
        """Whether something was loaded since `of` was last asked."""
        return any(loading.done() for loading in self._unseen)

    def of(self, params: SamplingParams) -> tuple[Filter, ...] | None:
        """The filters of a request, in the order in which they work; None: they are being loaded.

        :raises InvalidRequest: one can't be loaded; it is tried again for the next request.
        """
        self._unseen = {loading for loading in self._unseen if not loading.done()}
        sources = sources_of(params)
        wanted = {source: self._kept.get(source) or self._begin(source) for source in sources}
        if not all(loading.done() for loading in wanted.values()):
            return None
        for source, loading in wanted.items():
            if loading.exception() is not None:
                del self._kept[source]
            else:
                self._kept.move_to_end(source)
        self._trim()
        return tuple(loading.result() for loading in wanted.values())

    def close(self) -> None:
        """Load nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, source: FilterSource) -> "Future[Filter]":
        loading = self._kept[source] = self._thread.submit(self._load, source, self._device)
        self._unseen.add(loading)
        return loading

    def _trim(self) -> None:
        """Forget those that were used least recently; whoever uses them has them still."""
        idle = [source for source, loading in self._kept.items() if loading.done()]
        for source in idle[: max(0, len(self._kept) - MAX_KEPT)]:
            del self._kept[source]
