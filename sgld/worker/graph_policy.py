"""Which calls are captured as CUDA graphs and replayed: decides, runs nothing.

A graph pays where launching kernels takes longer than running them, which is measured, not known. So a call that comes
again and again is captured, compared with an eager forward once, and kept if it returned the same in less time.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, TypeVar

CAPTURES_AFTER = 3
"""The use of a key with which it is captured. A capture takes as long as two forwards."""
MIN_GAIN = 0.03
"""So much less time than an eager forward a replay must take, to be worth its memory."""
MIN_LAUNCH_SHARE = 0.7
"""If the host is done with launching after less of a forward, the device is what takes the time: at 0.8 a graph of
T5-XXL saved 5 %, at 0.6 one of FLUX at 1024² saved 2.6, at 0.55 one of SDXL at 1024² with 8 rows nothing."""
HOST_S = 0.01
"""Where forwards run side by side others wait for the host: a graph is worth it that frees it from longer launches."""
MAX_LOSS = 0.1
"""So much longer than an eager forward a replay may seem to take then: where the device is hot, two forwards of a large
size differ by 8 %. The host would be held up for 60 % of them."""
# Most keys never come again: sizes, lengths of text and numbers of rows are in them.
_MAX_KEYS = 4096
K = TypeVar("K", bound=Hashable)


class Decision(Enum):
    """How a call runs: `capture`: eagerly, and a graph is made beside; `compare`: eagerly and replayed."""

    EAGER = "eager"
    CAPTURE = "capture"
    COMPARE = "compare"
    REPLAY = "replay"


@dataclass(frozen=True)
class _Seen:
    """A key without a graph; `num_graphs`: those that it had."""

    num_uses: int = 0
    num_graphs: int = 0
    is_refused: bool = False


@dataclass(frozen=True)
class _Graph:
    """A key with a graph; `size_bytes`: what only this one takes."""

    size_bytes: int
    num_graphs: int
    is_proved: bool = False


class GraphPolicy(Generic[K]):
    """Knows all keys and what graphs take; keeps those used last.

    What a forward needs meanwhile is in one pool that all graphs share: it comes back only with the last of them.

    :param max_bytes: of all graphs and their pool; 0: nothing is captured.
    """

    def __init__(self, max_bytes: int, captures_after: int = CAPTURES_AFTER) -> None:
        self._max_bytes = max_bytes
        self._captures_after = captures_after
        self._seen: OrderedDict[K, _Seen] = OrderedDict()
        self._graphs: OrderedDict[K, _Graph] = OrderedDict()
        self._pool_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What all graphs take."""
        return self._pool_bytes + sum(graph.size_bytes for graph in self._graphs.values())

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    def decide(self, key: K) -> Decision:
        """How this call runs.

        A key whose graph was evicted waits twice as long for the next one each time: where memory is too small for
        all that is in use, most calls must not be captures.
        """
        if (graph := self._graphs.get(key)) is not None:
            self._graphs.move_to_end(key)
            return Decision.REPLAY if graph.is_proved else Decision.COMPARE
        seen = self._seen.get(key, _Seen())
        self._see(key, replace(seen, num_uses=seen.num_uses + 1))
        is_due = seen.num_uses + 1 >= self._captures_after << seen.num_graphs
        return Decision.CAPTURE if is_due and self._max_bytes and not seen.is_refused else Decision.EAGER

    def captured(self, key: K, size_bytes: int, pool_growth_bytes: int) -> list[K]:
        """A graph was made; returns those that go for it, its own included where there is no room for it.

        1. While it is too much: the one used least recently.
        2. The pool itself is too large: all go, and with them the pool. What alone is too large isn't tried again.
        """
        num_graphs = self._seen.pop(key, _Seen()).num_graphs + 1
        self._graphs[key] = _Graph(size_bytes, num_graphs)
        self._pool_bytes += pool_growth_bytes
        gone = []
        while self._graphs and self.size_bytes > self._max_bytes:
            gone.append(oldest := next(iter(self._graphs)))
            self._drop(oldest)
        if key in gone and size_bytes + pool_growth_bytes > self._max_bytes:
            self.refuse(key)
        return gone

    def proved(self, key: K) -> None:
        """A replay returned what an eager forward did, in less time."""
        if key in self._graphs:
            self._graphs[key] = replace(self._graphs[key], is_proved=True)

    def refuse(self, key: K) -> None:
        """Run this key eagerly for good."""
        if key in self._graphs:
            self._drop(key)
        self._see(key, _Seen(is_refused=True))

    def postpone(self, key: K) -> None:
        """There was no memory for this one: others may have given some back when it is tried again, as if evicted."""
        num_graphs = self._seen.get(key, _Seen()).num_graphs
        if key in self._graphs:
            self._drop(key)
        self._see(key, _Seen(num_graphs=num_graphs + 1))

    def forget(self, is_outdated: Callable[[K], bool]) -> list[K]:
        """Nothing is known of these keys any more; returns those that had graphs."""
        gone = [key for key in self._graphs if is_outdated(key)]
        for key in gone:
            self._drop(key)
        for key in [key for key in self._seen if is_outdated(key)]:
            del self._seen[key]
        return gone

    def evict(self, which: Callable[[K], bool] = lambda key: True) -> list[K]:
        """Memory is short, or another rank has lost them: these graphs go."""
        gone = [key for key in self._graphs if which(key)]
        for key in gone:
            self._drop(key)
        return gone

    def _drop(self, key: K) -> None:
        self._see(key, _Seen(num_graphs=self._graphs.pop(key).num_graphs))
        if not self._graphs:
            self._pool_bytes = 0

    def _see(self, key: K, seen: _Seen) -> None:
        self._seen[key] = seen
        self._seen.move_to_end(key)
        if len(self._seen) > _MAX_KEYS:
            self._seen.popitem(last=False)


def is_worth_capturing(launch_s: float, total_s: float, *, frees_host: bool = False) -> bool:
    """Whether an eager forward took its time on the host, as far as one can see from when its launches were done.

    :param frees_host: others wait for the host.
    """
    return launch_s >= MIN_LAUNCH_SHARE * total_s or (frees_host and launch_s >= HOST_S)


def pays(replay_s: float, eager_s: float, *, frees_host: bool = False) -> bool:
    """Whether a replay saves so much that a graph is kept; or frees the host, and takes no longer but for noise."""
    return replay_s <= (1 + MAX_LOSS if frees_host else 1 - MIN_GAIN) * eager_s
